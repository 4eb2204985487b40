"""Credit: returns, the baselines subtracted from them, and learned values.

A return is of one sequence [T]; a baseline sees the returns of the batch
[C, G, T] and gives each token the number to subtract. With a baseline b that
does not contain the row's own reward,

  E[ sum_t grad log pi(y_t) (G_t - b_t) ] = grad E[R]      exactly.

An outcome reward (one R on the last token, gamma 1) has G_t = R at every
token. A row that ended before column t enters the others' baseline with its
last return: for outcomes a baseline is the textbook one on R, for token
rewards it is compared column by column.

A row that is not valid (no reward applies to it) has no credit, and is in no
baseline, scale or whitening: the numbers of the others are those of a batch
without it.

`returns`, `gae` and `vtrace` make an Algorithm.advantage; their parameters are
the choices that they read.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_tok import masked
from jaxrl_tok.policy import check_array
from jaxrl_tok.types import Advantage, AdvantageInputs, Carry


def reward_to_go(reward: jax.Array, mask: jax.Array, gamma: float) -> jax.Array:
  """Return G_t = sum_{k >= t} gamma^(k-t) m_k r_k of one sequence [T]."""
  chex.assert_rank([reward, mask], 1)
  gained = masked.fill(reward.astype(jnp.float32), mask)

  def back(later, now):
    total = now + gamma * later
    return total, total

  return jax.lax.scan(back, jnp.float32(0), gained, reverse=True)[1]


def hold_last(returns: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns [T] of a sequence, with the last chosen token's held after it.

  # G [3 2 1 0 0]  mask [1 1 1 0 0]  ->  [3 2 1 1 1]
  """
  last = jnp.sum(masked.fill(returns, masked.last_chosen(mask)))
  over = jnp.cumsum(jnp.flip(mask)) == 0
  return jnp.where(jnp.flip(over), last, returns)


# --- baselines ---------------------------------------------------------------


class Baseline(NamedTuple):
  """A number to subtract from each return."""

  name: str
  # (returns_CxGxT, valid_CxG, {name: carry}, greedy reward [C] | None)
  #   -> b of rank 3, which broadcasts against the returns
  apply: Callable
  carries: dict = {}  # noqa: RUF012  {name: Carry} that it remembers by
  min_group: int = 1  # samples a prompt that it needs
  greedy: bool = False  # whether it reads the greedy rewards


def as_baseline(baseline: Baseline | Callable) -> Baseline:
  """A Baseline, or one made of a function (returns_CxGxT, valid_CxG) -> b."""
  if isinstance(baseline, Baseline):
    return baseline
  name = getattr(baseline, '__name__', type(baseline).__name__)
  return _memoryless(name, baseline)


def _memoryless(name, function, min_group=1) -> Baseline:
  def apply(returns_CxGxT, valid_CxG, carries, greedy_reward_C):
    return function(returns_CxGxT, valid_CxG)

  return Baseline(name, apply, min_group=min_group)


def _mean(x_CxGxT: jax.Array, valid_CxG: jax.Array, axis) -> jax.Array:
  """Mean over valid rows, axes kept. Equal numbers have exactly that number
  for a mean: GRPO divides the rest by a std that would be rounding, too."""
  valid = jnp.broadcast_to(valid_CxG[:, :, None], x_CxGxT.shape)

  def mean(x):
    return jnp.expand_dims(masked.mean(x, valid, axis), axis)

  about = mean(x_CxGxT)
  return about + mean(x_CxGxT - about)


def _rows(valid_CxG: jax.Array) -> jax.Array:
  """Number of valid rows in each group, float32 [C, 1]."""
  return jnp.sum(valid_CxG.astype(jnp.float32), 1, keepdims=True)


def no_baseline() -> Baseline:
  """No baseline, b = 0: unbiased, and of high variance."""
  return _memoryless('none', lambda returns, valid: jnp.zeros((1, 1, 1)))


def fixed(value: float) -> Baseline:
  """Fixed baseline, b = a number: unbiased."""
  return _memoryless(
    f'fixed {value}',
    lambda returns, valid: jnp.full((1, 1, 1), value, jnp.float32),
  )


def batch_mean() -> Baseline:
  """Mean of all B rows, b_t. It contains the row's own return, so the expected
  gradient is exactly (B-1)/B of the true one."""
  return _memoryless(
    'batch_mean', lambda returns, valid: _mean(returns, valid, (0, 1))
  )


def group_mean() -> Baseline:
  """Mean of the prompt's G rows, b_t (GRPO's centre, arXiv:2402.03300). It
  contains the row's own return, so the expected gradient is exactly (G-1)/G
  of the true one; a group of one valid row has nothing left."""
  return _memoryless(
    'group_mean', lambda returns, valid: _mean(returns, valid, 1), min_group=2
  )


def leave_one_out() -> Baseline:
  """Leave-one-out, b_it = mean_{j != i} G_jt over the prompt's other rows:
  unbiased. It needs G >= 2; a group of one valid row has nothing left.
  RLOO, arXiv:2402.14740."""

  def others(returns_CxGxT, valid_CxG):
    if valid_CxG.shape[1] < 2:
      raise ValueError(
        'leave-one-out needs at least 2 samples per prompt; '
        'pass --num_generations 2 or --baseline ema'
      )
    n = _rows(valid_CxG)[:, :, None]
    from_mean = returns_CxGxT - _mean(returns_CxGxT, valid_CxG, 1)
    return returns_CxGxT - from_mean * (n / jnp.maximum(n - 1, 1))

  return _memoryless('leave_one_out', others, min_group=2)


def ema(decay: float = 0.9) -> Baseline:
  """Moving average, b <- decay b + (1 - decay) mean(R), from 0. A batch is
  scored by the b before it enters, so the estimate is unbiased."""

  def apply(returns_CxGxT, valid_CxG, carries, greedy_reward_C):
    return carries['ema_baseline'][None, None, None]

  def after(b, state, metrics):
    moved = decay * b + (1 - decay) * metrics['return_mean']
    return jnp.where(metrics['rows'] > 0, moved, b)

  carry = Carry(lambda params: jnp.float32(0), after)
  return Baseline(f'ema {decay}', apply, {'ema_baseline': carry})


def greedy() -> Baseline:
  """Greedy baseline, b = the reward of the prompt's greedy completion:
  unbiased. ReMax, arXiv:2310.10505."""

  def apply(returns_CxGxT, valid_CxG, carries, greedy_reward_C):
    return greedy_reward_C[:, None, None]

  return Baseline('greedy', apply, greedy=True)


def group_std(
  returns_CxG: jax.Array, valid_CxG: jax.Array, eps: float = 1e-4
) -> jax.Array:
  """Standard deviation (ddof 1) of whole returns in each group, plus eps:
  float32 [C, 1]. It is infinite for fewer than two valid rows, whose advantage
  is then 0. GRPO, arXiv:2402.03300."""
  mean_Cx1 = _mean(returns_CxG[:, :, None], valid_CxG, 1)[:, :, 0]
  squares = masked.fill((returns_CxG - mean_Cx1) ** 2, valid_CxG)
  n = _rows(valid_CxG)
  variance = squares.sum(1, keepdims=True) / jnp.maximum(n - 1, 1)
  return jnp.where(n > 1, jnp.sqrt(variance) + eps, jnp.inf)


# --- makers of an advantage --------------------------------------------------


def returns(
  baseline: Baseline | Callable,
  gamma: float = 1.0,
  scale: Callable | None = None,
) -> Callable:
  """Returns minus a baseline, A_t = m_t (G_t - b_t). Williams 1992, Machine
  Learning 8; no value target.

  Args:
    scale: (whole returns_CxG, valid_CxG) -> [C, 1], by which A is divided.
  """
  baseline = as_baseline(baseline)

  def advantage(inputs: AdvantageInputs, carries: dict) -> Advantage:
    mask, prompts = inputs.mask, inputs.rollout.prompts
    B, T = mask.shape
    C = prompts.length.shape[0]
    returns_BxT = jax.vmap(reward_to_go, (0, 0, None))(
      inputs.reward, mask, gamma
    )
    held_BxT = jax.vmap(hold_last)(returns_BxT, mask)
    held_CxGxT = held_BxT.reshape(C, B // C, T)
    valid_CxG = inputs.valid.reshape(C, B // C)
    greedy_reward_C = inputs.scored.greedy_reward
    b = baseline.apply(held_CxGxT, valid_CxG, carries, greedy_reward_C)
    check_array(f'baseline {baseline.name}', b, None, C=None, G=None, T=None)
    found_CxGxT = held_CxGxT - b
    whole_CxG = held_CxGxT[:, :, 0]
    if scale is not None:
      found_CxGxT = found_CxGxT / scale(whole_CxG, valid_CxG)[:, :, None]
    metrics = {'return_mean': masked.mean(whole_CxG, valid_CxG)}
    found_BxT = masked.fill(found_CxGxT.reshape(B, T), mask)
    return Advantage(found_BxT, metrics=metrics)

  return advantage


def gae_advantage(
  reward: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  bootstrap: jax.Array,
  gamma: float,
  gae_lambda: float,
) -> jax.Array:
  """GAE [T] of one sequence.

  delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1}

  Reward, value, mask are [T]; bootstrap [] is V after the last chosen token. A
  token that the policy did not choose carries V and A across.
  arXiv:1506.02438.
  """
  chex.assert_rank([reward, value, mask, bootstrap], [1, 1, 1, 0])

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
  chex.assert_rank([reward, value, mask, bootstrap, rho], [1, 1, 1, 0, 1])

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


def _value_after(inputs: AdvantageInputs, bootstrap_truncated: bool):
  """V of the state after the last chosen token, float32 [B], where a row was
  cut and that is asked for (a cut is not an end); 0 where a row ended.

  It is no default: V of that state is never trained, so that a policy may
  learn to run into the limit for what V promises there, and V to follow.
  """
  mask = inputs.mask
  column_B = jnp.argmax(masked.last_chosen(mask), axis=1) + 1
  after = jnp.take_along_axis(inputs.value, column_B[:, None], axis=1)[:, 0]
  cut = ~inputs.rollout.ended & jnp.any(mask, axis=1)
  return jnp.where(cut & bootstrap_truncated, after, 0.0)


def gae(
  gamma: float = 1.0,
  gae_lambda: float = 0.95,
  bootstrap_truncated: bool = False,
) -> Callable:
  """Generalized advantages by a learned V; the value target is A_t + V_t.
  arXiv:1506.02438."""

  def advantage(inputs: AdvantageInputs, carries: dict) -> Advantage:
    value, mask = inputs.value[:, :-1], inputs.mask
    last = _value_after(inputs, bootstrap_truncated)
    found = jax.vmap(gae_advantage, (0, 0, 0, 0, None, None))(
      inputs.reward, value, mask, last, gamma, gae_lambda
    )
    return Advantage(found, masked.fill(found + value, mask))

  return advantage


def vtrace(
  gamma: float = 1.0,
  gae_lambda: float = 1.0,
  bootstrap_truncated: bool = False,
  rho_bar: float = 1.0,
  c_bar: float = 1.0,
) -> Callable:
  """V-trace's advantages and targets, for a sampler that lags the policy.
  arXiv:1802.01561."""

  def advantage(inputs: AdvantageInputs, carries: dict) -> Advantage:
    value, mask = inputs.value[:, :-1], inputs.mask
    last = _value_after(inputs, bootstrap_truncated)
    rho = jnp.exp(masked.fill(inputs.log_change, mask))
    found, target = jax.vmap(vtrace_advantage, (0,) * 5 + (None,) * 4)(
      *(inputs.reward, value, mask, last, rho),
      *(gamma, gae_lambda, rho_bar, c_bar),
    )
    return Advantage(found, target)

  return advantage


# credits that need a learned V
LEARNED = (gae, vtrace)


# --- changes of rewards before and of advantages after -----------------------


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
  """An advantage with overlong_penalty in its rewards."""

  def with_penalty(inputs: AdvantageInputs, carries: dict) -> Advantage:
    penalty = jax.vmap(overlong_penalty, (0, None, None))(
      inputs.mask, max_length, buffer
    )
    reward = inputs.reward + penalty
    return advantage(inputs._replace(reward=reward), carries)

  return with_penalty


def finished(advantage: Callable, whiten: bool, limit: float | None):
  """An advantage, whitened over the batch's chosen tokens (ddof 0) and clipped
  to [-limit, limit]; the value target stays as it is."""

  def finish(inputs: AdvantageInputs, carries: dict) -> Advantage:
    out = advantage(inputs, carries)
    found = out.advantage
    if whiten:
      found = masked.whiten(found, inputs.mask)
    if limit is not None:
      found = jnp.clip(found, -limit, limit)
    return out._replace(advantage=found)

  return finish
