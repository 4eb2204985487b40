"""Credit: returns, the baselines subtracted from them, and learned values.

A return is of one sequence [T]; a baseline sees the returns of the batch
[C, G, T] and gives each token the number to subtract. With a baseline b that
does not contain the row's own reward,

  E[ sum_t grad log pi(y_t) (G_t - b_t) ] = grad E[R]      exactly.

An outcome reward (one R on the last token, gamma 1) has G_t = R at every
token. A row that ended before token t enters the others' baseline with its
last return: for outcomes a baseline is the textbook one on R, for token
rewards it is compared token by token.

In an episode of several turns the baseline goes by turns: that of a turn's
tokens is made of the other rows' returns from their turn of that number on, 0
where they had ended. It is unbiased, for the number of a turn is known before
its tokens are drawn. The rewards of a turn less their mean over the rows that
are still alive (MT-GRPO) are not: with a reward of r a turn, every further
turn would be credited r too little.

A row that is not valid (no reward applies to it) has no credit, and is in no
baseline, scale or whitening: the numbers of the others are those of a batch
without it. None is "not applicable", not 0.

`returns`, `gae` and `vtrace` make an Algorithm.advantage; their parameters are
the choices that they read.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_tok import masked
from jaxrl_tok.credit import losses, sequence
from jaxrl_tok.policy import check_array
from jaxrl_tok.types import Advantage, AdvantageInputs, Carry, Greedy, Scored

# --- baselines ---------------------------------------------------------------


class Baseline(NamedTuple):
  """A number to subtract from each return."""

  name: str
  # (returns_CxGxT, valid_CxG, {name: carry}, greedy returns [C, T] | None)
  #   -> b of rank 3, which broadcasts against the returns
  apply: Callable
  carries: dict = {}  # noqa: RUF012  {name: Carry} that it remembers by
  min_group: int = 1  # samples a prompt that it needs
  greedy: bool = False  # whether it reads the greedy returns


def as_baseline(baseline: Baseline | Callable) -> Baseline:
  """A Baseline, or one made of a function (returns_CxGxT, valid_CxG) -> b."""
  if isinstance(baseline, Baseline):
    return baseline
  name = getattr(baseline, '__name__', type(baseline).__name__)
  return _memoryless(name, baseline)


def _memoryless(name, function, min_group=1) -> Baseline:
  def apply(returns_CxGxT, valid_CxG, carries, greedy_CxT):
    return function(returns_CxGxT, valid_CxG)

  return Baseline(name, apply, min_group=min_group)


def _mean(x_CxGxT: jax.Array, valid_CxG: jax.Array, axis) -> jax.Array:
  """Mean over valid rows, axes kept."""
  valid = jnp.broadcast_to(valid_CxG[:, :, None], x_CxGxT.shape)
  return jnp.expand_dims(masked.mean(x_CxGxT, valid, axis), axis)


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

  def apply(returns_CxGxT, valid_CxG, carries, greedy_CxT):
    return carries['ema_baseline'][None, None, None]

  def after(b, state, metrics):
    moved = decay * b + (1 - decay) * metrics['return_mean']
    return jnp.where(metrics['rows'] > 0, moved, b)

  carry = Carry(lambda params: jnp.float32(0), after)
  return Baseline(f'ema {decay}', apply, {'ema_baseline': carry})


def greedy() -> Baseline:
  """Greedy baseline, b_t = the return of the prompt's greedy completion from
  its t-th token on, or from its last one after that: unbiased. An outcome has
  b_t = R(greedy), as in ReMax, arXiv:2310.10505; a reward of each token is
  compared with what the greedy completion has yet to earn there. A prompt whose
  greedy completion no reward applies to (NaN) has nothing left."""

  def apply(returns_CxGxT, valid_CxG, carries, greedy_CxT):
    b = greedy_CxT[:, None, :]
    return jnp.where(jnp.isnan(b), returns_CxGxT, b)

  return Baseline('greedy', apply, greedy=True)


def greedy_returns(greedy: Greedy | None, gamma: float) -> jax.Array | None:
  """Returns [C, T] of greedy completions, the last held; NaN where one has no
  reward."""

  def one(reward, mask):
    togo = sequence.reward_to_go(jnp.nan_to_num(reward), mask, gamma)
    missing = jnp.any(jnp.isnan(reward))
    return jnp.where(missing, jnp.nan, sequence.hold_last(togo, mask))

  return None if greedy is None else jax.vmap(one)(*greedy)


# --- scales ------------------------------------------------------------------


def group_std(
  returns_CxG: jax.Array, valid_CxG: jax.Array, eps: float = 1e-4
) -> jax.Array:
  """Standard deviation (ddof 1) of whole returns in each group, plus eps:
  float32 [C, 1]. It is infinite for fewer than two valid rows, whose advantage
  is then 0. GRPO, arXiv:2402.03300."""
  variance = masked.var(returns_CxG, valid_CxG, 1, axis=1)[:, None]
  return jnp.where(_rows(valid_CxG) > 1, jnp.sqrt(variance) + eps, jnp.inf)


def batch_std(
  returns_CxG: jax.Array, valid_CxG: jax.Array, eps: float = 1e-4
) -> jax.Array:
  """Standard deviation (ddof 1) of the whole returns of all valid rows of the
  batch, plus eps: one number as float32 [C, 1], infinite for fewer than two
  valid rows. arXiv:2508.08221; TRL's scale_rewards='batch'."""
  spread = jnp.sqrt(masked.var(returns_CxG, valid_CxG, 1)) + eps
  some = jnp.where(jnp.sum(valid_CxG) > 1, spread, jnp.inf)
  return jnp.full((len(valid_CxG), 1), some)


# --- several rewards: (Scored, normalise) -> A [C, G, T] ---------------------
# normalise(reward [B, T], applies [B]) -> (G - b) / s of that reward


def group_size(baseline: Baseline | None, scale: Callable | None) -> int:
  """Valid rows that a group needs for an advantage: 2 where they are compared
  with each other, else 1."""
  size = 1 if baseline is None else baseline.min_group
  return size if scale in (None, batch_std) else max(size, 2)


def in_company(valid_B: jax.Array, num_prompts: int, size: int) -> jax.Array:
  """Valid rows bool [B] of groups with at least `size` valid rows."""
  valid_CxG = valid_B.reshape(num_prompts, -1)
  return (valid_CxG & (_rows(valid_CxG) >= size)).reshape(-1)


def compared(scored: Scored, num_prompts: int, size: int) -> Scored:
  """Scored whose rewards apply in company only: a row that is alone with a
  reward is in no statistic of it."""
  applies = {
    name: in_company(rows, num_prompts, size)
    for name, rows in scored.applies.items()
  }
  return scored._replace(applies=applies)


def sum_then_normalize(scored: Scored, normalise: Callable) -> jax.Array:
  """Advantage of the weighted sum, A = (G - b) / s with G of sum_k w_k r_k. A
  reward that does not apply to a row adds nothing to its sum."""
  return normalise(scored.reward, scored.valid)


def normalize_then_sum(scored: Scored, normalise: Callable) -> jax.Array:
  """Weighted sum of advantages, each reward compared by itself over the rows
  that it applies to, then brought to mean 0 and deviation 1 over the batch:

  a = sum_k w_k (G_k - b_k) / s_k;  A = (a - mean(a_0)) / (std(a_0) + 1e-4)

  Mean and std (ddof 1) are of the valid rows' a at their first token, which for
  outcomes is every token's. GDPO, arXiv:2601.05242; weights, eps and the name
  are TRL's.
  """
  parts = [
    scored.weights[name] * normalise(reward, scored.applies[name])
    for name, reward in scored.rewards.items()
  ]
  found = sum(parts)
  valid_CxG = scored.valid.reshape(found.shape[:2])
  whole_CxG = found[:, :, 0]
  centre = masked.mean(whole_CxG, valid_CxG)
  found = (found - centre) / batch_std(whole_CxG, valid_CxG)[:, :, None]
  return masked.fill(found, valid_CxG[:, :, None])


# --- makers of an advantage --------------------------------------------------


def returns(
  baseline: Baseline | Callable,
  gamma: float = 1.0,
  scale: Callable | None = None,
  multi_objective_aggregation: Callable = sum_then_normalize,
  discount: str = 'token',
) -> Callable:
  """Returns minus a baseline, A_t = m_t (G_t - b_t). Williams 1992, Machine
  Learning 8; no value target.

  Scales are statistics of the task's rewards, and a KL in the reward leaves
  after them, at its own size. With R the returns of the rewards and K those of
  the KL's penalty,

    A = (R - b(R)) / s(R) - K + (b(R) - b(R - K))

  which without a scale is (R - K) - b(R - K).

  Args:
    scale: (whole returns_CxG, valid_CxG) -> [C, 1], by which A is divided.
    multi_objective_aggregation: what is normalised, the sum of the rewards or
      each of them.
    discount: unit that gamma counts, 'token' or 'turn'.
  """
  baseline = as_baseline(baseline)
  size = group_size(baseline, scale)

  def advantage(inputs: AdvantageInputs, carries: dict) -> Advantage:
    mask, scored = inputs.mask, inputs.scored
    B, T = mask.shape
    C = scored.rollout.prompts.length.shape[0]
    ticks = jax.vmap(sequence.to_clock)(mask, mask)
    turn = clock_turns(inputs)
    each = jax.vmap(sequence.to_clock)(discounts(inputs, discount, gamma), mask)

    def held(reward_BxT):
      """Returns by the clock, the last held: [C, G, T]."""
      reward = jax.vmap(sequence.to_clock)(masked.fill(reward_BxT, mask), mask)
      togo = jax.vmap(sequence.reward_to_go)(reward, ticks, each)
      return jax.vmap(sequence.hold_last)(togo, ticks).reshape(C, B // C, T)

    greedy = greedy_returns(scored.greedy, gamma)

    def base(returns_CxGxT, valid_CxG):
      seen = at_turns(returns_CxGxT, turn)
      b = baseline.apply(seen, valid_CxG, carries, greedy)
      check_array(f'baseline {baseline.name}', b, None, C=None, G=None, T=None)
      return at_tokens(b, turn, returns_CxGxT.shape)

    def normalise(reward_BxT, applies_B):
      applies_CxG = applies_B.reshape(C, B // C)
      G = held(masked.fill(reward_BxT, applies_B[:, None]))
      found = G - base(G, applies_CxG)
      if scale is not None:
        found = found / scale(G[:, :, 0], applies_CxG)[:, :, None]
      return masked.fill(found, applies_CxG[:, :, None])

    if multi_objective_aggregation is not sum_then_normalize:
      scored = compared(scored, C, size)
    valid_CxG = inputs.valid.reshape(C, B // C)
    reward, kl = inputs.task_reward, inputs.kl_penalty
    if kl is None:
      found = multi_objective_aggregation(scored, normalise)
    elif scale is None and multi_objective_aggregation is sum_then_normalize:
      reward = inputs.reward
      found = normalise(reward, inputs.valid)
    else:
      b = base(held(reward), valid_CxG)
      moved = b - base(held(inputs.reward), valid_CxG)
      found = multi_objective_aggregation(scored, normalise) + moved - held(kl)
    whole_CxG = held(reward)[:, :, 0]
    metrics = {'return_mean': masked.mean(whole_CxG, valid_CxG)}
    found_BxT = jax.vmap(sequence.from_clock)(found.reshape(B, T), mask)
    return Advantage(found_BxT, metrics=metrics)

  return advantage


def at_turns(returns_CxGxT: jax.Array, turn: jax.Array | None) -> jax.Array:
  """Returns by the number of their turn, 0 after the last one; by the clock
  where there are no turns."""
  if turn is None:
    return returns_CxGxT
  flat = returns_CxGxT.reshape(turn.shape)
  found = jax.vmap(sequence.turn_starts)(flat, turn)
  return found.reshape(returns_CxGxT.shape)


def at_tokens(b: jax.Array, turn: jax.Array | None, shape: tuple) -> jax.Array:
  """Baseline b of rank 3, by the number of a turn, by the clock."""
  if turn is None:
    return b
  at = jnp.maximum(turn, 0).reshape(shape)
  return jnp.take_along_axis(jnp.broadcast_to(b, shape), at, axis=2)


def clock_turns(inputs: AdvantageInputs) -> jax.Array | None:
  """Number int32 [B, T] of each chosen token's turn by the clock, -1 after the
  last one; None: the rollout has no turns."""
  turn = inputs.rollout.turn
  if turn is None:
    return None
  return jax.vmap(sequence.to_clock)(turn + 1, inputs.mask) - 1


def discounts(
  inputs: AdvantageInputs, discount: str, value: float
) -> jax.Array:
  """Value of gamma or lambda at each token, [B, T]; with discount 'turn' it
  counts turns, and is 1 within one."""
  mask, turn = inputs.mask, inputs.rollout.turn
  if discount == 'turn' and turn is not None:
    return jax.vmap(sequence.by_turn, (None, 0, 0))(value, turn, mask)
  return jnp.full(mask.shape, value)


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
  discount: str = 'token',
) -> Callable:
  """Generalized advantages by a learned V; the value target is A_t + V_t.
  arXiv:1506.02438. discount: unit that gamma and lambda count, 'token' or
  'turn'."""

  def advantage(inputs: AdvantageInputs, carries: dict) -> Advantage:
    value, mask = inputs.value[:, :-1], inputs.mask
    last = _value_after(inputs, bootstrap_truncated)
    steps = (discounts(inputs, discount, x) for x in (gamma, gae_lambda))
    found = jax.vmap(sequence.gae_advantage)(
      inputs.reward, value, mask, last, *steps
    )
    return Advantage(found, masked.fill(found + value, mask))

  return advantage


def vtrace(
  gamma: float = 1.0,
  gae_lambda: float = 1.0,
  bootstrap_truncated: bool = False,
  rho_bar: float = 1.0,
  c_bar: float = 1.0,
  discount: str = 'token',
) -> Callable:
  """V-trace's advantages and targets, for a sampler that lags the policy.
  arXiv:1802.01561. discount: as gae has it."""

  def advantage(inputs: AdvantageInputs, carries: dict) -> Advantage:
    value, mask = inputs.value[:, :-1], inputs.mask
    last = _value_after(inputs, bootstrap_truncated)
    rho = jnp.exp(losses.bounded(masked.fill(inputs.log_change, mask)))
    steps = (discounts(inputs, discount, x) for x in (gamma, gae_lambda))
    found, target = jax.vmap(sequence.vtrace_advantage, (0,) * 7 + (None,) * 2)(
      *(inputs.reward, value, mask, last, rho, *steps, rho_bar, c_bar)
    )
    return Advantage(found, target)

  return advantage


# credits that need a learned V
LEARNED = (gae, vtrace)
