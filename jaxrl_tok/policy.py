"""Evaluation of a rollout by the current policy. The shift between states and
tokens, and the chunks of the vocabulary's logits, are here alone.

  prompt [a b c]  completion [x y EOS]
  hidden after     c x y            (one encode, one extend of T - 1 tokens)
  log-prob of      x y EOS
"""

import functools

import chex
import jax
import jax.numpy as jnp

from jaxrl_tok import distribution
from jaxrl_tok.types import Policy, Prompts, Rollout, SamplingRule, TokenStats

# Logits alive at once: 4 MiB of float32, or more where that is few tokens: the
# head's gradient [V, D] is added up once for each chunk.
CHUNK_ELEMENTS, CHUNK_TOKENS = 2**20, 128


def check_array(what: str, x, kind: type | None, **sizes) -> None:
  """Raises ValueError, in one line, unless x has these axes and this kind.

  Args:
    what: origin of x, for the message: 'policy.logits'.
    kind: float, int, bool, or None for any.
    sizes: {letter of an axis: its size, or None for any}, in order.
  """
  try:
    chex.assert_rank(x, len(sizes))
    chex.assert_shape(x, tuple(sizes.values()))
    if kind is not None:
      chex.assert_type(x, kind)
  except AssertionError:
    known = ', '.join(f'{a}={n}' for a, n in sizes.items() if n is not None)
    raise ValueError(
      f'{what} gave rank {jnp.ndim(x)}, {jnp.result_type(x)} '
      f'{list(jnp.shape(x))}, expected [{", ".join(sizes)}]'
      + (f' of {kind.__name__}' if kind else '')
      + (f' with {known}' if known else '')
    ) from None


def check_prompts(prompts: Prompts) -> None:
  """Raises ValueError, in one line, for prompts of another shape or dtype."""
  check_array('prompts.tokens', prompts.tokens, int, C=None, P=None)
  C = prompts.tokens.shape[0]
  check_array('prompts.length', prompts.length, int, C=C)


def tokens_at_once(vocab_size: int) -> int:
  """Number of tokens, of all rows together, whose logits are alive at once."""
  return max(CHUNK_TOKENS, CHUNK_ELEMENTS // vocab_size)


def completion_hidden(policy: Policy, params, rollout: Rollout) -> jax.Array:
  """Hidden states [B, T, D] that predict the completion's tokens."""
  tokens = rollout.tokens[:, :-1]
  return _states(policy, params, rollout._replace(tokens=tokens))


def _states(policy: Policy, params, rollout: Rollout) -> jax.Array:
  """Hidden states [B, t + 1, D] before and after each of t tokens."""
  prefix = policy.encode(params, rollout.prompts)
  B, t = rollout.tokens.shape
  C = rollout.prompts.tokens.shape[0]
  check_array("policy.encode's hidden state", prefix.hidden, None, C=C, D=None)
  first_BxD = jnp.repeat(prefix.hidden, B // C, axis=0)
  if t == 0:
    return first_BxD[:, None]
  rest, _ = policy.extend(params, prefix, rollout.tokens, None, 0)
  D = first_BxD.shape[1]
  check_array("policy.extend's hidden state", rest, None, B=B, t=t, D=D)
  return jnp.concatenate([first_BxD[:, None], rest], axis=1)


def values(policy: Policy, params, rollout: Rollout) -> jax.Array:
  """Values of the states, float32 [B, T + 1]: column t of the state before
  token t, column T of the one after the last column."""
  return policy.value(params, _states(policy, params, rollout))


def _stats_of(policy: Policy, params, rule: SamplingRule):
  """Returns stats(hidden [B, t, D], tokens [B, t], num_kept | None) ->
  (log-prob, entropy), whose logits are computed again backward."""
  saved = jax.checkpoint_policies.save_only_these_names(distribution.BORDER)

  @functools.partial(jax.checkpoint, policy=saved)
  def stats(hidden_BxtxD, tokens_Bxt, kept_Bxt):
    logits = policy.logits(params, hidden_BxtxD)
    B, t = tokens_Bxt.shape
    check_array('policy.logits', logits, float, B=B, t=t, V=policy.vocab_size)
    logits = distribution.shape_logits(logits, rule)
    if kept_Bxt is not None:
      order = logits
      if policy.rank_logits is not None:
        order = policy.rank_logits(params, hidden_BxtxD)
        order = distribution.shape_logits(order, rule)
      keep = distribution.most_likely(order, kept_Bxt, tokens_Bxt)
      logits = jnp.where(keep, logits, distribution.NEVER)
    logp = distribution.log_prob(logits, tokens_Bxt)
    return logp, distribution.entropy(logits)

  return stats


def _in_chunks(stats, chunk: int, hidden, tokens, num_kept):
  """Calls stats for `chunk` tokens of each row at a time."""
  B, T = tokens.shape

  def split(x, value=0):  # [B, T, ...] -> [T / chunk, B, chunk, ...]
    pad = ((0, 0), (0, -T % chunk)) + ((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, pad, constant_values=value)
    x = x.reshape(B, -1, chunk, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  parts = (
    split(hidden),
    split(tokens),
    None if num_kept is None else split(num_kept, 1),
  )
  _, found = jax.lax.scan(lambda carry, part: (carry, stats(*part)), (), parts)
  return tuple(jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :T] for x in found)


def evaluate(
  policy: Policy,
  params,
  rollout: Rollout,
  rule: SamplingRule,
  chunk: int | None = None,
) -> TokenStats:
  """Log-prob, entropy and value of every completion token.

  The distribution is the sampler's: its temperature and forbidden tokens, and
  as many tokens kept as the sampler recorded. Logits exist for `chunk` tokens
  of each row at a time, forward and backward, so no [B, T, V] array is ever
  made (`chunk` None: those of `tokens_at_once`).

  Returns TokenStats of float32 [B, T], 0 off-mask; value None without a head.
  Raises ValueError, in one line, for arrays of another rank, size or dtype
  than types.py says.
  """
  check_prompts(rollout.prompts)
  check_array('rollout.tokens', rollout.tokens, int, B=None, T=None)
  B, T = rollout.tokens.shape
  check_array('rollout.mask', rollout.mask, bool, B=B, T=T)
  if B % rollout.prompts.tokens.shape[0]:
    raise ValueError(
      f'rollout.tokens has {B} rows, which its '
      f'{rollout.prompts.tokens.shape[0]} prompts do not divide'
    )
  hidden = completion_hidden(policy, params, rollout)
  if chunk is None:
    chunk = max(1, tokens_at_once(policy.vocab_size) // B)
  chunk = min(chunk, T)
  stats = _stats_of(policy, params, rule)
  num_kept = rollout.num_kept
  if num_kept is not None:  # 0 off-mask; any legal number will do there
    num_kept = jnp.maximum(num_kept, 1)
  if chunk == T:
    logp, entropy = stats(hidden, rollout.tokens, num_kept)
  else:
    logp, entropy = _in_chunks(stats, chunk, hidden, rollout.tokens, num_kept)
  value = None
  if policy.value is not None:
    value = policy.value(params, hidden)
    check_array('policy.value', value, float, B=B, T=T)
    value = jnp.where(rollout.mask, value, 0.0)
  return TokenStats(
    jnp.where(rollout.mask, logp, 0.0),
    jnp.where(rollout.mask, entropy, 0.0),
    value,
  )
