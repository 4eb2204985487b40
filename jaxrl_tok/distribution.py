"""Distribution that is both sampled from and trained, made from logits.

Temperature, forbidden tokens, top-k, top-p and min-p are part of the policy.
Each truncation keeps some number of the most likely tokens, so one number a
token, `num_kept`, describes them all: the sampler records it, and evaluating
keeps as many of its own most likely tokens and always the sampled one. The
log-prob is that of the renormalised distribution on both sides.

All functions take float32 logits [..., V] and broadcast over the front.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxrl_tok.types import SamplingRule, StopRule

BORDER = 'border of the kept tokens'  # its name in remat policies
NEVER = -1e30  # finite: 0 * NEVER is 0 in a product and in its gradient
LOWEST = -(2**31)  # int32
# logits of 1e20 divided by it are still far from NEVER and from infinity
LOWEST_TEMPERATURE = 1e-6


def make_rule(
  vocab_size: int,
  end_tokens,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
  forbidden=None,
  stop=None,
) -> SamplingRule:
  """Makes a SamplingRule of arrays; top_k 0 keeps every token. stop: (kind
  [V], next_state [states, kinds]) of data.stop_automaton, or None.

  Raises ValueError for a temperature so low that logits overflow."""
  if temperature < LOWEST_TEMPERATURE:
    raise ValueError(
      f'temperature {temperature:g} makes logits overflow; pass '
      f'{LOWEST_TEMPERATURE:g} or more'
    )
  return SamplingRule(
    temperature=jnp.float32(temperature),
    top_k=jnp.int32(top_k if top_k > 0 else vocab_size),
    top_p=jnp.float32(top_p),
    min_p=jnp.float32(min_p),
    end_tokens=jnp.asarray(end_tokens, jnp.int32).reshape(-1),
    forbidden=None if forbidden is None else jnp.asarray(forbidden, bool),
    stop=None
    if stop is None
    else StopRule(*(jnp.asarray(x, jnp.int32) for x in stop)),
  )


def shape_logits(logits: jax.Array, rule: SamplingRule) -> jax.Array:
  """Divides logits by the temperature; forbidden tokens become NEVER."""
  logits = logits / rule.temperature
  if rule.forbidden is None:
    return logits
  allowed = jnp.expand_dims(~rule.forbidden, tuple(range(logits.ndim - 1)))
  return jnp.where(allowed, logits, NEVER)


def _ordered(x: jax.Array) -> jax.Array:
  """Maps float32 to int32 in order: -1, -0 = 0, 1 to -k, 0, k."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return jnp.where(bits < 0, LOWEST - bits, bits)


def _highest(enough, shape) -> jax.Array:
  """Finds the highest int32 [...] for which `enough` still holds, by bisection.

  `enough` (int32 [...] -> bool [...]) holds from the lowest number up to some
  border. Reading the vocabulary 32 times costs far less than sorting it.
  """

  def halve(_, ends):
    low, high = ends
    middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up
    fine = enough(middle)
    return jnp.where(fine, middle, low), jnp.where(fine, high, middle - 1)

  ends = jnp.full(shape, LOWEST, jnp.int32), jnp.full(shape, 2**31 - 1)
  return jax.lax.fori_loop(0, 32, halve, ends)[0]


def _largest(keys: jax.Array, number: jax.Array) -> jax.Array:
  """Finds the last of the `number` largest keys [..., V] -> int32 [...]."""
  return _highest(
    lambda b: jnp.sum(keys >= b[..., None], -1, dtype=jnp.int32) >= number,
    keys.shape[:-1],
  )


def truncate(logits: jax.Array, rule: SamplingRule):
  """Applies top-k, then top-p to what is left, then min-p.

  top-p keeps the smallest set of most likely tokens whose probability reaches
  top_p (arXiv:1904.09751): the rest, which is what is summed, has at most 1 -
  top_p. A float32 sum of the kept would reach 1 before its tail. min-p keeps
  those of at least min_p times the largest (arXiv:2407.01082), compared as
  logits: equals stay equals. At least one token is kept; of equals at the
  border, all are.

  Returns: (keep bool [..., V], number of tokens kept int32 [...]).
  """
  logits = jax.lax.stop_gradient(logits)
  largest = jnp.max(logits, axis=-1, keepdims=True)
  keys = _ordered(logits)
  inside = keys >= _largest(keys, rule.top_k)[..., None]
  inside &= logits > NEVER / 2
  probs = jax.nn.softmax(jnp.where(inside, logits, NEVER), axis=-1)
  border = _highest(
    lambda b: (
      jnp.sum(jnp.where(keys < b[..., None], probs, 0.0), -1) <= 1 - rule.top_p
    ),
    keys.shape[:-1],
  )
  border = jnp.where(rule.top_p < 1, border, LOWEST)[..., None]
  likely = logits - largest >= jnp.log(rule.min_p)
  keep = (inside & (keys >= border) & likely) | (logits == largest)
  return keep, jnp.sum(keep, axis=-1, dtype=jnp.int32)


def most_likely(
  logits: jax.Array, num_kept: jax.Array, tokens: jax.Array
) -> jax.Array:
  """Keeps the `num_kept` most likely tokens, `tokens` always among them.

  Sampled tokens that fell just outside replace the least likely inside: the
  number stays, only nearly equal mass moves. num_kept and tokens are int32
  [...]. Returns bool [..., V].
  """
  keys = _ordered(jax.lax.stop_gradient(logits))
  last = _largest(keys, num_kept)[..., None]
  sampled = jnp.take_along_axis(keys, tokens[..., None], axis=-1)
  # saved for the backward pass, which need not look for it again
  border = checkpoint_name(jnp.where(sampled < last, last + 1, last), BORDER)
  vocab = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  return (keys >= border) | (vocab == tokens[..., None])


def log_prob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Computes logit - logsumexp, without a [..., V] log_softmax."""
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def log_prob_and_slope(logits: jax.Array, tokens: jax.Array):
  """Computes the log-prob, and its gradient with respect to the logits,
  onehot(token) - softmax(logits) [..., V]."""
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
  summed = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  vocab = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  slope = (vocab == tokens[..., None]) - jnp.exp(logits - summed)
  return (chosen - summed)[..., 0], slope


def entropy(logits: jax.Array) -> jax.Array:
  """Computes -sum_v p_v log p_v in nats, as logsumexp - sum_v p_v logit_v.

  A policy may forbid tokens by logits of -inf: their term is 0."""
  probs = jax.nn.softmax(logits, axis=-1)
  terms = probs * jnp.maximum(logits, NEVER)
  return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(terms, axis=-1)


def draw(logits: jax.Array, uniform: jax.Array) -> jax.Array:
  """Inverts the cumulative distribution at one uniform number a row.

  Blocks of tokens are searched first, then the tokens of one block. Draws are
  exact up to float32 rounding, and never a token of probability 0. logits [B,
  V], uniform [B] in [0, 1) -> int32 [B].
  """
  B, V = logits.shape
  S = max(int(V**0.5), 16)  # block size
  weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  blocks = jnp.pad(weights, ((0, 0), (0, -V % S))).reshape(B, -1, S)

  def invert(weights_BxN, target_B):
    """Finds the first index whose cumulative weight exceeds the target -> (it,
    the target less the weight before it)."""
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
