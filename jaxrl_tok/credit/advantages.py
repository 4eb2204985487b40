"""Credit: returns, the baselines subtracted from them, and learned values.

A return is of one sequence [T]; a baseline sees the returns of the batch
[C, G, T] and gives each token the number to subtract. With a baseline b that
does not contain the row's own reward,

  E[ sum_t grad log pi(y_t) (G_t - b_t) ] = grad E[R]      exactly.

Outcome rewards (one R on the last token, gamma 1) have G_t = R at every
token. A row that ended before column t enters the others' baseline with its
last return, so for them a baseline is the textbook one on R, and for token
rewards it is compared column by column.

`returns`, `gae` and `vtrace` make an Algorithm.advantage; their parameters are
the choices that they read.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_tok import masked
from jaxrl_tok.types import Scored


def reward_to_go(reward: jax.Array, mask: jax.Array, gamma: float) -> jax.Array:
  """G_t = sum_{k >= t} gamma^(k-t) m_k r_k. One sequence, float32 [T]."""
  gained = masked.fill(reward.astype(jnp.float32), mask)

  def back(later, now):
    total = now + gamma * later
    return total, total

  return jax.lax.scan(back, jnp.float32(0), gained, reverse=True)[1]


def hold_last(returns: jax.Array, mask: jax.Array) -> jax.Array:
  """A sequence's returns [T], with the last chosen token's held after it.

  # G [3 2 1 0 0]  mask [1 1 1 0 0]  ->  [3 2 1 1 1]
  """
  last = jnp.sum(masked.fill(returns, masked.last_chosen(mask)))
  over = jnp.cumsum(jnp.flip(mask)) == 0
  return jnp.where(jnp.flip(over), last, returns)


# --- baselines ---------------------------------------------------------------


class Baseline(NamedTuple):
  """init () -> carry; apply (returns [C, G, T], carry, greedy reward [C] or
  None) -> (b, carry), where b broadcasts against the returns."""

  name: str
  init: Callable[[], Any]
  apply: Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]
  min_group: int = 1  # samples a prompt that it needs
  greedy: bool = False  # whether it needs the greedy rewards


def _stateless(name, function, min_group=1) -> Baseline:
  def apply(returns, carry, greedy):
    return function(returns), carry

  return Baseline(name, lambda: (), apply, min_group)


def _mean(returns: jax.Array, axis) -> jax.Array:
  """The mean, exactly that of equal numbers: GRPO divides what is left by a
  std that would else be rounding, too."""
  about = returns.mean(axis, keepdims=True)
  return about + (returns - about).mean(axis, keepdims=True)


def no_baseline() -> Baseline:
  """b = 0: unbiased, and of high variance."""
  return _stateless('none', lambda returns: jnp.zeros((1, 1, 1)))


def fixed(value: float) -> Baseline:
  """b = a number: unbiased."""
  return _stateless(
    f'fixed {value}',
    lambda returns: jnp.full((1, 1, 1), value, jnp.float32),
  )


def batch_mean() -> Baseline:
  """b_t = mean of all B rows. Contains the row's own return, so the expected
  gradient is exactly (B-1)/B of the true one."""
  return _stateless('batch_mean', lambda returns: _mean(returns, (0, 1)))


def group_mean() -> Baseline:
  """b_t = mean of the prompt's G rows (GRPO's centre, arXiv:2402.03300).
  Contains the row's own return, so the expected gradient is exactly (G-1)/G
  of the true one; of a group of one nothing is left."""
  return _stateless(
    'group_mean', lambda returns: _mean(returns, 1), min_group=2
  )


def leave_one_out() -> Baseline:
  """b_it = mean_{j != i} G_jt over the prompt's other rows: unbiased.
  Needs G >= 2. RLOO, arXiv:2402.14740."""

  def others(returns):
    G = returns.shape[1]
    if G < 2:
      raise ValueError(
        'leave-one-out needs at least 2 samples per prompt; '
        'pass --num_generations 2 or --baseline ema'
      )
    return returns - (returns - _mean(returns, 1)) * (G / (G - 1))

  return _stateless('leave_one_out', others, min_group=2)


def ema(decay: float = 0.9) -> Baseline:
  """b <- decay b + (1 - decay) mean(R); starts at 0. The batch is scored by
  the b before it enters, so the estimate is unbiased."""

  def apply(returns, b, greedy):
    new = decay * b + (1 - decay) * returns[:, :, 0].mean()
    return b[None, None, None], new

  return Baseline(f'ema {decay}', lambda: jnp.float32(0), apply)


def greedy() -> Baseline:
  """b = the reward of the prompt's greedy completion: unbiased.
  ReMax, arXiv:2310.10505."""

  def apply(returns, carry, greedy_reward):
    return greedy_reward[:, None, None], carry

  return Baseline('greedy', lambda: (), apply, greedy=True)


def group_std(returns: jax.Array, eps: float = 1e-4) -> jax.Array:
  """Standard deviation (ddof 1) of whole returns [C, G] in each group, plus
  eps: float32 [C, 1]. A group of one has 0. GRPO, arXiv:2402.03300."""
  G = returns.shape[1]
  squares = (returns - _mean(returns, 1)) ** 2
  return jnp.sqrt(squares.sum(1, keepdims=True) / max(G - 1, 1)) + eps


# --- what makes an advantage -------------------------------------------------


def returns(
  baseline: Baseline, gamma: float = 1.0, scale: Callable | None = None
) -> Callable:
  """A_t = m_t (G_t - b_t), Williams 1992; with a scale s of the group's whole
  returns, / s. No value target."""

  def advantage(scored: Scored, carry):
    B, T = scored.reward.shape
    C, mask = scored.rollout.prompts.length.shape[0], scored.rollout.mask
    returns_BxT = jax.vmap(reward_to_go, (0, 0, None))(
      scored.reward, mask, gamma
    )
    held_BxT = jax.vmap(hold_last)(returns_BxT, mask)
    held_CxGxT = held_BxT.reshape(C, B // C, T)
    b, carry = baseline.apply(held_CxGxT, carry, scored.greedy_reward)
    minus = held_CxGxT - b
    if scale is not None:
      minus = minus / scale(held_CxGxT[:, :, 0])[:, :, None]
    return masked.fill(minus.reshape(B, T), mask), None, carry

  return advantage


def gae_advantage(
  reward: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  bootstrap: jax.Array,
  gamma: float,
  gae_lambda: float,
) -> jax.Array:
  """delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1}.

  One sequence: reward, value, mask [T]; bootstrap [] is V after the last
  column. A token that the policy did not choose carries V and A across.
  arXiv:1506.02438.
  """

  def back(later, now):
    r, v, chosen = now
    value_later, advantage_later = later
    delta = r + gamma * value_later - v
    advantage = delta + gamma * gae_lambda * advantage_later
    kept = jnp.where(chosen, v, value_later)
    carried = jnp.where(chosen, advantage, advantage_later)
    return (kept, carried), jnp.where(chosen, advantage, 0.0)

  steps = masked.fill(reward, mask), masked.fill(value, mask), mask
  start = bootstrap, jnp.float32(0)
  return jax.lax.scan(back, start, steps, reverse=True)[1]


def vtrace_advantage(
  reward: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  bootstrap: jax.Array,
  rho: jax.Array,
  gamma: float,
  gae_lambda: float,
  rho_bar: float,
  c_bar: float,
) -> tuple[jax.Array, jax.Array]:
  """V-trace: (advantage [T], value target [T]) of one off-policy sequence.

  e_t = min(rho_t, rho_bar) delta_t + gamma c_t e_{t+1}
  c_t = lambda min(rho_t, c_bar);  target v_t = e_t + V_t
  A_t = min(rho_t, 1) (r_t + gamma (lambda v_{t+1} + (1-lambda) V_{t+1}) - V_t)

  rho [T] is pi / mu. arXiv:1802.01561, in rlax's form (its lambda also mixes
  the targets in A). With rho = 1, the targets are GAE's.
  """

  def back(later, now):
    r, v, ratio, chosen = now
    value_later, target_later, error_later = later
    delta = r + gamma * value_later - v
    c = gae_lambda * jnp.minimum(ratio, c_bar)
    error = jnp.minimum(ratio, rho_bar) * delta + gamma * c * error_later
    mixed = gae_lambda * target_later + (1 - gae_lambda) * value_later
    advantage = jnp.minimum(ratio, 1.0) * (r + gamma * mixed - v)
    after = v, error + v, error
    carry = jax.tree.map(lambda x, y: jnp.where(chosen, x, y), after, later)
    out = advantage, error + v
    return carry, jax.tree.map(lambda x: jnp.where(chosen, x, 0.0), out)

  steps = (
    masked.fill(reward, mask),
    masked.fill(value, mask),
    masked.fill(rho, mask, 1.0),
    mask,
  )
  start = bootstrap, bootstrap, jnp.float32(0)
  return jax.lax.scan(back, start, steps, reverse=True)[1]


def _after_the_end(scored: Scored, bootstrap_truncated: bool) -> jax.Array:
  """float32 [B]: V after the last column where a row was cut and that is asked
  for (a cut is not an end); 0 where a row ended by itself.

  It is no default: of that state V is never trained, so that a policy may
  learn to run into the limit for what V promises there, and V to follow.
  """
  wanted = scored.cut & bootstrap_truncated
  return jnp.where(wanted, scored.value[:, -1], 0.0)


def gae(
  gamma: float = 1.0,
  gae_lambda: float = 0.95,
  bootstrap_truncated: bool = False,
) -> Callable:
  """Generalized advantages by a learned V; the value target is A_t + V_t."""

  def advantage(scored: Scored, carry):
    value, mask = scored.value[:, :-1], scored.rollout.mask
    last = _after_the_end(scored, bootstrap_truncated)
    found = jax.vmap(gae_advantage, (0, 0, 0, 0, None, None))(
      scored.reward, value, mask, last, gamma, gae_lambda
    )
    return found, masked.fill(found + value, mask), carry

  return advantage


def vtrace(
  gamma: float = 1.0,
  gae_lambda: float = 1.0,
  bootstrap_truncated: bool = False,
  rho_bar: float = 1.0,
  c_bar: float = 1.0,
) -> Callable:
  """V-trace's advantages and targets, for a sampler that lags the policy."""

  def advantage(scored: Scored, carry):
    value, mask = scored.value[:, :-1], scored.rollout.mask
    last = _after_the_end(scored, bootstrap_truncated)
    rho = jnp.exp(masked.fill(scored.log_change, mask))
    found = jax.vmap(vtrace_advantage, (0,) * 5 + (None,) * 4)(
      *(scored.reward, value, mask, last, rho),
      *(gamma, gae_lambda, rho_bar, c_bar),
    )
    return *found, carry

  return advantage


# credits that need a learned V
LEARNED = (gae, vtrace)


# --- what is done to rewards before and to advantages after ------------------


def overlong_penalty(
  mask: jax.Array, max_length: int, buffer: int
) -> jax.Array:
  """DAPO's soft punishment of long completions, in **tokens**, float32 [T] on
  the last chosen one of one sequence. With n chosen tokens it is

    0                              n <= max_length - buffer
    (max_length - buffer - n) / buffer  up to -1 at max_length

  arXiv:2503.14476.
  """
  over = jnp.sum(mask) - (max_length - buffer)
  penalty = -jnp.clip(over / buffer, 0.0, 1.0)
  return jnp.where(masked.last_chosen(mask), penalty, 0.0)


def shaped(advantage: Callable, max_length: int, buffer: int) -> Callable:
  """The same advantage with overlong_penalty in its rewards."""

  def with_penalty(scored: Scored, carry):
    penalty = jax.vmap(overlong_penalty, (0, None, None))(
      scored.rollout.mask, max_length, buffer
    )
    return advantage(scored._replace(reward=scored.reward + penalty), carry)

  return with_penalty


def finished(advantage: Callable, whiten: bool, limit: float | None):
  """The same advantage, whitened over the batch's chosen tokens (ddof 0) and
  clipped to [-limit, limit]; the value target stays as it is."""

  def finish(scored: Scored, carry):
    found, target, carry = advantage(scored, carry)
    if whiten:
      found = masked.whiten(found, scored.rollout.mask)
    if limit is not None:
      found = jnp.clip(found, -limit, limit)
    return found, target, carry

  return finish
