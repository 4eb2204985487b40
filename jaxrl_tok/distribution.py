"""From logits to the distribution that is both sampled from and trained.

Temperature, forbidden tokens, top-k, top-p and min-p are part of the policy.
Each truncation keeps some number of the most likely tokens, so one number a
token, `kept`, describes them all: the sampler records it, and evaluating keeps
the same number of its own most likely tokens and always the sampled one. The
log-prob is that of the renormalised distribution on both sides.

All functions take float32 logits [..., V] and broadcast over the front.
"""

import jax
import jax.numpy as jnp

from jaxrl_tok.types import SamplingRule

NEVER = -1e30  # finite: 0 * NEVER is 0 in a product and in its gradient


def make_rule(
  vocab_size: int,
  end_tokens,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
  forbidden=None,
) -> SamplingRule:
  """A SamplingRule of arrays; top_k 0 keeps every token."""
  return SamplingRule(
    temperature=jnp.float32(temperature),
    top_k=jnp.int32(top_k if top_k > 0 else vocab_size),
    top_p=jnp.float32(top_p),
    min_p=jnp.float32(min_p),
    end_tokens=jnp.asarray(end_tokens, jnp.int32).reshape(-1),
    forbidden=None if forbidden is None else jnp.asarray(forbidden, bool),
  )


def shape_logits(logits: jax.Array, rule: SamplingRule) -> jax.Array:
  """logit / temperature, and NEVER for forbidden tokens."""
  logits = logits / rule.temperature
  if rule.forbidden is None:
    return logits
  allowed = jnp.expand_dims(~rule.forbidden, tuple(range(logits.ndim - 1)))
  return jnp.where(allowed, logits, NEVER)


def truncate(logits: jax.Array, rule: SamplingRule):
  """Applies top-k, then top-p to what is left, then min-p.

  top-p keeps the smallest set of most likely tokens whose probability reaches
  top_p (arXiv:1904.09751); min-p keeps those of at least min_p times the
  largest (arXiv:2407.01082). At least one is kept; of equals at the border,
  all are.

  Returns: (logits with NEVER outside the kept set, kept int32 [...]).
  """
  sorted_logits = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
  rank = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  inside = (rank < rule.top_k) & (sorted_logits > NEVER / 2)
  probs = jax.nn.softmax(jnp.where(inside, sorted_logits, NEVER), axis=-1)
  before = jnp.cumsum(probs, axis=-1) - probs
  inside &= (before < rule.top_p) & (probs >= rule.min_p * probs[..., :1])
  number = jnp.maximum(jnp.sum(inside, axis=-1, dtype=jnp.int32), 1)
  border = jnp.take_along_axis(sorted_logits, number[..., None] - 1, axis=-1)
  keep = logits >= border
  kept = jnp.sum(keep, axis=-1, dtype=jnp.int32)
  return jnp.where(keep, logits, NEVER), kept


def keep_most_likely(
  logits: jax.Array, kept: jax.Array, tokens: jax.Array
) -> jax.Array:
  """NEVER outside the `kept` most likely tokens, `tokens` always inside.

  A sampled token that fell just outside replaces the least likely inside:
  the number stays, only nearly equal mass moves. kept, tokens int32 [...].
  """
  fixed = jax.lax.stop_gradient(logits)
  ascending = jnp.sort(fixed, axis=-1)
  place = logits.shape[-1] - kept[..., None]
  border = jnp.take_along_axis(ascending, place, axis=-1)
  sampled = jnp.take_along_axis(fixed, tokens[..., None], axis=-1)
  vocab = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  keep = jnp.where(sampled < border, fixed > border, fixed >= border)
  return jnp.where(keep | (vocab == tokens[..., None]), logits, NEVER)


def log_prob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """logit - logsumexp, without a [..., V] log_softmax."""
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits: jax.Array) -> jax.Array:
  """-sum_v p_v log p_v in nats = logsumexp - sum_v p_v logit_v."""
  probs = jax.nn.softmax(logits, axis=-1)
  return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(probs * logits, axis=-1)


def draw(logits: jax.Array, uniform: jax.Array) -> jax.Array:
  """Inverts the cumulative distribution at one uniform number a row.

  Two levels: the block of tokens in which the number falls, then the token in
  the block. Exact up to float32 rounding, and a token of probability 0 is
  never drawn. logits [B, V], uniform [B] in [0, 1) -> int32 [B].
  """
  B, V = logits.shape
  S = max(int(V**0.5), 16)  # block size
  weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  blocks = jnp.pad(weights, ((0, 0), (0, -V % S))).reshape(B, -1, S)

  def invert(weights_BxN, target_B):
    """First index whose cumulative weight exceeds the target, and the rest."""
    summed = jnp.cumsum(weights_BxN, axis=-1)
    # below the total even after rounding, so that an index always exists
    target_B = jnp.minimum(target_B, summed[:, -1] * (1 - 2.0**-23))
    index = jnp.sum(summed <= target_B[:, None], axis=-1, dtype=jnp.int32)
    below = jnp.where(
      index > 0,
      jnp.take_along_axis(summed, jnp.maximum(index - 1, 0)[:, None], axis=-1)[
        :, 0
      ],
      0.0,
    )
    return index, target_B - below

  block_sums = blocks.sum(-1)
  block, rest = invert(block_sums, uniform * block_sums.sum(-1))
  inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  return block * S + invert(inside, rest)[0]
