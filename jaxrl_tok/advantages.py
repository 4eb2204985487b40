"""Credit: returns, and the baselines subtracted from them.

A return is of one sequence [T]; a baseline sees the returns of the batch
[C, G, T] and gives each token the number to subtract. With a baseline b that
does not contain the row's own reward,

  E[ sum_t grad log pi(y_t) (G_t - b_t) ] = grad E[R]      exactly.

Outcome rewards (one R on the last token, gamma 1) have G_t = R at every
token. A row that ended before column t enters the others' baseline with its
last return, so for them a baseline is the textbook one on R, and for token
rewards it is compared column by column.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_tok import masked
from jaxrl_tok.types import Rollout


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


class Baseline(NamedTuple):
  """init () -> carry; apply (returns [C, G, T], carry) -> (b, carry), where b
  broadcasts against the returns."""

  init: Callable[[], Any]
  apply: Callable[[jax.Array, Any], tuple[jax.Array, Any]]


def _stateless(function) -> Baseline:
  return Baseline(lambda: (), lambda returns, carry: (function(returns), carry))


def no_baseline() -> Baseline:
  """b = 0: unbiased, and of high variance."""
  return _stateless(lambda returns: jnp.zeros((1, 1, 1)))


def fixed(value: float) -> Baseline:
  """b = a number: unbiased."""
  return _stateless(lambda returns: jnp.full((1, 1, 1), value, jnp.float32))


def batch_mean() -> Baseline:
  """b_t = mean of all B rows. Contains the row's own return, so the expected
  gradient is exactly (B-1)/B of the true one."""
  return _stateless(lambda returns: returns.mean((0, 1), keepdims=True))


def group_mean() -> Baseline:
  """b_t = mean of the prompt's G rows (GRPO's centre, arXiv:2402.03300).
  Contains the row's own return, so the expected gradient is exactly (G-1)/G
  of the true one."""
  return _stateless(lambda returns: returns.mean(1, keepdims=True))


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
    return (returns.sum(1, keepdims=True) - returns) / (G - 1)

  return _stateless(others)


def ema(decay: float = 0.9) -> Baseline:
  """b <- decay b + (1 - decay) mean(R); starts at 0. The batch is scored by
  the b before it enters, so the estimate is unbiased."""

  def apply(returns, b):
    new = decay * b + (1 - decay) * returns[:, :, 0].mean()
    return b[None, None, None], new

  return Baseline(lambda: jnp.float32(0), apply)


def return_minus_baseline(baseline: Baseline, gamma: float = 1.0) -> Callable:
  """REINFORCE's credit: A_t = m_t (G_t - b_t). Williams 1992.

  Returns an Algorithm.advantage: (Rollout, reward [B, T], value, carry) ->
  (advantage [B, T], None, carry).
  """

  def advantage(rollout: Rollout, reward, value, carry):
    B, T = reward.shape
    C = rollout.prompts.length.shape[0]
    returns_BxT = jax.vmap(reward_to_go, (0, 0, None))(
      reward, rollout.mask, gamma
    )
    held_BxT = jax.vmap(hold_last)(returns_BxT, rollout.mask)
    held_CxGxT = held_BxT.reshape(C, B // C, T)
    b, carry = baseline.apply(held_CxGxT, carry)
    minus = (held_CxGxT - b).reshape(B, T)
    return masked.fill(minus, rollout.mask), None, carry

  return advantage
