"""The current policy looking at a rollout: the only shift, the only
vocabulary chunking.

  prompt [a b c]  completion [x y EOS]
  hidden after     c x y            (one encode, one extend of T - 1 tokens)
  log-prob of      x y EOS
"""

import functools

import jax
import jax.numpy as jnp

from jaxrl_tok import distribution
from jaxrl_tok.types import Policy, Rollout, SamplingRule, TokenStats

# Logits alive at once: 4 MiB of float32, or more where that is few tokens: the
# head's gradient [V, D] is added up once for each chunk.
CHUNK_ELEMENTS, CHUNK_TOKENS = 2**20, 128


def tokens_at_once(vocab_size: int) -> int:
  """Of all rows together, whose logits are alive at once by default."""
  return max(CHUNK_TOKENS, CHUNK_ELEMENTS // vocab_size)


def completion_hidden(policy: Policy, params, rollout: Rollout) -> jax.Array:
  """Hidden states [B, T, D] that predict the completion's tokens."""
  tokens = rollout.tokens[:, :-1]
  return _states(policy, params, rollout._replace(tokens=tokens))


def _states(policy: Policy, params, rollout: Rollout) -> jax.Array:
  """Hidden states [B, t + 1, D] before and after each of t tokens."""
  prefix = policy.encode(params, rollout.prompts)
  B, t = rollout.tokens.shape
  first_BxD = jnp.repeat(prefix.hidden, B // prefix.hidden.shape[0], axis=0)
  if t == 0:
    return first_BxD[:, None]
  rest, _ = policy.extend(params, prefix, rollout.tokens, None, 0)
  return jnp.concatenate([first_BxD[:, None], rest], axis=1)


def values(policy: Policy, params, rollout: Rollout) -> jax.Array:
  """What the value head says, float32 [B, T + 1]: column t of the state before
  token t, column T of the one after the last column."""
  return policy.value(params, _states(policy, params, rollout))


def evaluate(
  policy: Policy,
  params,
  rollout: Rollout,
  rule: SamplingRule,
  chunk: int | None = None,
) -> TokenStats:
  """Log-prob, entropy and value of every completion token.

  The distribution is the sampler's: the same temperature and forbidden
  tokens, and as many tokens kept as the sampler recorded. Logits exist for
  `chunk` tokens of each row at a time, forward and backward, so no [B, T, V]
  array is ever made (`chunk` None: those of `tokens_at_once`).

  Returns TokenStats of float32 [B, T], 0 off-mask; value None without a head.
  """
  hidden = completion_hidden(policy, params, rollout)
  B, T, _ = hidden.shape
  if chunk is None:
    chunk = max(1, tokens_at_once(policy.vocab_size) // B)
  chunk = min(chunk, T)

  saved = jax.checkpoint_policies.save_only_these_names(distribution.BORDER)

  @functools.partial(jax.checkpoint, policy=saved)
  def stats(hidden_Bxt, tokens_Bxt, kept_Bxt):
    logits = distribution.shape_logits(policy.logits(params, hidden_Bxt), rule)
    if kept_Bxt is not None:
      order = logits
      if policy.ranking is not None:
        order = policy.ranking(params, hidden_Bxt)
        order = distribution.shape_logits(order, rule)
      keep = distribution.most_likely(order, kept_Bxt, tokens_Bxt)
      logits = jnp.where(keep, logits, distribution.NEVER)
    logp = distribution.log_prob(logits, tokens_Bxt)
    return logp, distribution.entropy(logits)

  num_kept = rollout.num_kept
  if num_kept is not None:  # 0 off-mask; any legal number will do there
    num_kept = jnp.maximum(num_kept, 1)
  if chunk == T:
    logp, entropy = stats(hidden, rollout.tokens, num_kept)
  else:

    def split(x, value=0):  # [B, T, ...] -> [T / chunk, B, chunk, ...]
      pad = ((0, 0), (0, -T % chunk)) + ((0, 0),) * (x.ndim - 2)
      x = jnp.pad(x, pad, constant_values=value)
      x = x.reshape(B, -1, chunk, *x.shape[2:])
      return jnp.moveaxis(x, 1, 0)

    parts = (
      split(hidden),
      split(rollout.tokens),
      None if num_kept is None else split(num_kept, 1),
    )
    _, (logp, entropy) = jax.lax.scan(
      lambda carry, part: (carry, stats(*part)), (), parts
    )
    logp, entropy = (
      jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :T] for x in (logp, entropy)
    )
  value = None
  if policy.value is not None:
    value = jnp.where(rollout.mask, policy.value(params, hidden), 0.0)
  return TokenStats(
    jnp.where(rollout.mask, logp, 0.0),
    jnp.where(rollout.mask, entropy, 0.0),
    value,
  )
