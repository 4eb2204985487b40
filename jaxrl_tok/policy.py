"""Evaluation of a rollout by the current policy. The shift between states and
tokens, and the chunks of the vocabulary's logits, are here alone.

  prompt [a b c]  completion [x y EOS]
  hidden after     c x y            (one encode, one extend of T - 1 tokens)
  log-prob of      x y EOS
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxrl_tok import distribution
from jaxrl_tok.sharding import (
  gather_own,
  on_own_rows,
  path_name,
  platform,
  split_axes,
)
from jaxrl_tok.types import Policy, Prompts, Rollout, SamplingRule, TokenStats

# Logits alive at once: 4 MiB of float32 on a CPU, whose cache holds them, and
# 512 MiB elsewhere, or more where that is few tokens: the head's gradient
# [V, D] is added up once for each chunk.
ON_CPU, ELSEWHERE, CHUNK_TOKENS = 2**20, 2**27, 128


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
  elements = ON_CPU if platform() == 'cpu' else ELSEWHERE
  return max(CHUNK_TOKENS, elements // vocab_size)


def completion_hidden(policy: Policy, params, rollout: Rollout) -> jax.Array:
  """Hidden states [B, T, D] that predict the completion's tokens."""
  tokens = rollout.tokens[:, :-1]
  return _states(policy, params, rollout._replace(tokens=tokens))


def belonging(policy: Policy, given: tuple | None) -> Callable | None:
  """Returns the function of policy.read or policy.append; None without one, and
  where it goes with another encode or extend than the policy has."""
  encode, extend, function = given or (None, None, None)
  own = encode is policy.encode and extend is policy.extend
  return function if own else None


def _states(policy: Policy, params, rollout: Rollout) -> jax.Array:
  """Hidden states [B, t + 1, D] before and after each of t tokens."""
  B, t = rollout.tokens.shape
  C = rollout.prompts.tokens.shape[0]
  read = belonging(policy, policy.read)
  if read is not None and t > 0:
    first, rest = read(params, rollout.prompts, rollout.tokens)
  else:
    prefix = policy.encode(params, rollout.prompts)
    first = prefix.hidden
  check_array("policy.encode's hidden state", first, None, C=C, D=None)
  first_BxD = jnp.repeat(first, B // C, axis=0)
  if t == 0:
    return first_BxD[:, None]
  if read is None:
    rest, _ = policy.extend(params, prefix, rollout.tokens, None, 0)
  D = first_BxD.shape[1]
  check_array("policy.extend's hidden state", rest, None, B=B, t=t, D=D)
  return jnp.concatenate([first_BxD[:, None], rest], axis=1)


def values(policy: Policy, params, rollout: Rollout) -> jax.Array:
  """Values of the states, float32 [B, T + 1]: column t of the state before
  token t, column T of the one after the last column."""
  return policy.value(params, _states(policy, params, rollout))


def read_by(function: Callable, params, *args) -> list[bool]:
  """Tells for each leaf of params whether function(params, *args) reads it;
  arguments may be ShapeDtypeStructs."""
  jaxpr = jax.make_jaxpr(function)(params, *args).jaxpr
  read = {id(v) for v in jaxpr.outvars}
  for equation in reversed(jaxpr.eqns):
    if any(id(v) in read for v in equation.outvars):
      read |= {id(v) for v in equation.invars}
  count = len(jax.tree.leaves(params))
  return [id(v) in read for v in jaxpr.invars[:count]]


def head_is_frozen(policy: Policy, params, fixed, prompts: Prompts) -> bool:
  """Tells whether logits read no trained parameter, as under adapters of the
  blocks; arguments may be ShapeDtypeStructs.

  params, fixed: arguments of Policy.merge_params.
  """

  def hidden_of(params):
    return policy.encode(policy.merge_params(params, fixed), prompts).hidden

  def logits(params, hidden):
    return policy.logits(policy.merge_params(params, fixed), hidden)

  return not any(read_by(logits, params, jax.eval_shape(hidden_of, params)))


def _shaped_logits(policy: Policy, params, rule: SamplingRule, part):
  """Logits [B, t, V] of the distribution that is sampled and trained; part:
  (hidden [B, t, D], tokens [B, t], num_kept [B, t] | None)."""
  hidden_BxtxD, tokens_Bxt, kept_Bxt = part
  logits = policy.logits(params, hidden_BxtxD)
  B, t = tokens_Bxt.shape
  check_array('policy.logits', logits, float, B=B, t=t, V=policy.vocab_size)
  logits = distribution.shape_logits(logits, rule)
  if kept_Bxt is None:
    return logits
  order = logits
  if policy.rank_logits is not None:
    order = policy.rank_logits(params, hidden_BxtxD)
    order = distribution.shape_logits(order, rule)
  keep = distribution.most_likely(order, kept_Bxt, tokens_Bxt)
  return jnp.where(keep, logits, distribution.NEVER)


def _stats_of(policy: Policy, params, rule: SamplingRule) -> Callable:
  """Returns stats(part) -> (log-prob, entropy), whose logits are computed again
  backward; part as in _shaped_logits."""
  saved = jax.checkpoint_policies.save_only_these_names(distribution.BORDER)

  @functools.partial(jax.checkpoint, policy=saved)
  def stats(part):
    logits = _shaped_logits(policy, params, rule, part)
    return distribution.log_prob(logits, part[1]), distribution.entropy(logits)

  return stats


def _stats_of_frozen(policy: Policy, params, rule: SamplingRule) -> Callable:
  """Returns stats(part) -> (log-prob, entropy) for a head that is constant.

  Tokens are independent given their hidden states, so the gradient needs no
  second look at the vocabulary: it is computed beside the log-prob,

    d l / d h = (onehot(token) - softmax(z)) d z / d h,  z the logits of h,

  two products with the head where computing the logits again takes three. An
  entropy that is trained is computed again.
  """

  def with_slope(part):
    hidden, *rest = part
    logits, pull = jax.vjp(
      lambda hidden: _shaped_logits(policy, params, rule, (hidden, *rest)),
      hidden,
    )
    logp, slope = distribution.log_prob_and_slope(logits, part[1])
    return (logp, distribution.entropy(logits)), *pull(slope)

  def entropy(part):
    return distribution.entropy(_shaped_logits(policy, params, rule, part))

  @jax.custom_vjp
  def stats(part):
    logits = _shaped_logits(policy, params, rule, part)
    return distribution.log_prob(logits, part[1]), distribution.entropy(logits)

  def forward(part):
    part = jax.tree.map(lambda x: x.value, part)
    out, slope = with_slope(part)
    return out, (slope, part)

  def backward(kept, out_bar):
    (slope, (hidden, *rest)), (logp_bar, entropy_bar) = kept, out_bar
    found = jnp.zeros_like(hidden)
    if not is_zero(logp_bar):
      found = (logp_bar[..., None] * slope).astype(hidden.dtype)
    if not is_zero(entropy_bar):
      pull = jax.vjp(lambda hidden: entropy((hidden, *rest)), hidden)[1]
      found += pull(entropy_bar)[0]
    return ((found, None, None),)

  stats.defvjp(forward, backward, symbolic_zeros=True)
  return stats


def is_zero(cotangent) -> bool:
  """Tells a cotangent that is zero by construction."""
  return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)


def _in_chunks(stats: Callable, chunk: int, part):
  """Calls stats(part) for `chunk` tokens of each row at a time."""
  hidden, tokens, num_kept = part
  B, T = tokens.shape
  if chunk == T:
    return stats(part)

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
  _, found = jax.lax.scan(lambda carry, part: (carry, stats(part)), (), parts)
  return tuple(jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :T] for x in found)


def _dtypes(tree) -> dict:
  """Dtypes {path of a leaf: dtype}."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_name(path): x.dtype for path, x in leaves}


def _token_stats(
  policy: Policy,
  params,
  rule: SamplingRule,
  chunk: int | None,
  frozen_head: bool,
  part,
):
  """(log-prob, entropy) [B, T] of part, see _shaped_logits; each device has its
  own rows and, of params, what logits read."""

  def all_logits(params, hidden):
    rank = policy.rank_logits
    found = policy.logits(params, hidden)
    return found if rank is None else (found, rank(params, hidden))

  leaves, tree = jax.tree.flatten(params)
  is_read = read_by(all_logits, params, part[0][:, :1])
  paths = list(_dtypes(params))

  def stats_of_rows(whole, part):
    rule, read = gather_own(whole, axes, dtypes)
    filled = [
      read[path] if on else jnp.zeros(x.shape, x.dtype)
      for path, x, on in zip(paths, leaves, is_read)
    ]
    make = _stats_of_frozen if frozen_head else _stats_of
    stats = make(policy, jax.tree.unflatten(tree, filled), rule)
    B, T = part[1].shape
    wanted = chunk or max(1, tokens_at_once(policy.vocab_size) // B)
    return _in_chunks(stats, min(wanted, T), part)

  read = {p: x for p, x, on in zip(paths, leaves, is_read) if on}
  whole, dtypes = (rule, read), None
  axes = split_axes(whole, policy.partition_rules)
  if axes:
    cast = _dtypes(jax.eval_shape(policy.cast_params, params))
    dtypes = {f'1/{path}': cast.get(path, x.dtype) for path, x in read.items()}
  return on_own_rows(stats_of_rows, whole, part, axes)


def evaluate(
  policy: Policy,
  params,
  rollout: Rollout,
  rule: SamplingRule,
  chunk: int | None = None,
  frozen_head: bool = False,
) -> TokenStats:
  """Log-prob, entropy and value of every completion token.

  The distribution is the sampler's: its temperature and forbidden tokens, and
  as many tokens kept as the sampler recorded. Logits exist for `chunk` tokens
  of each row at a time, forward and backward, so no [B, T, V] array is ever
  made (`chunk` None: those of `tokens_at_once`). frozen_head (see
  head_is_frozen) takes no gradient of what the logits read of params.

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
  num_kept = rollout.num_kept
  if num_kept is not None:  # 0 off-mask; any legal number will do there
    num_kept = jnp.maximum(num_kept, 1)
  part = hidden, rollout.tokens, num_kept
  logp, entropy = _token_stats(policy, params, rule, chunk, frozen_head, part)
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
