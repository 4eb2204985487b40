"""Per-token losses of one sequence, the KL to a reference, and aggregation.

A loss sees ONE sequence: (TokenStats of [T], Trajectory of [T]) -> (loss [T],
metrics); the update vmaps it. An aggregation makes one number of token losses:
it maps the mask [B, T] and the valid rows [B] of the **global** batch to a
weight for each token, so micro-batches and devices change no number.

A metric [T] has a value for each token and is logged as the mean over the
mini-batch's chosen tokens of valid rows; a metric [] has one for the sequence
and is logged as the mean over the valid rows that chose a token.

Letters: l log-prob now, l_old at the start of the update, rho = exp(l - l_old),
sg stop-gradient, A the advantage. Functions that return a loss take as
parameters the choices that they read.

Every log-ratio is bounded before exp, see `bounded`; a clip that holds and an
advantage of 0 have a gradient of exactly 0.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxrl_tok import masked
from jaxrl_tok.policy import check_array
from jaxrl_tok.types import Carry, TokenStats, Trajectory

sg = jax.lax.stop_gradient
# Largest log-ratio that exp sees. Its ratio, 22026, is beyond every clip and
# cap in use. Products stay inside float32's 3e38: a ratio times an advantage of
# 1e30, summed over 2000 tokens, is 4e37; a ratio times k3 is 5e8, and the
# square of its sum over 2000 tokens, as in a gradient's norm, 1e24.
MAX_LOG_RATIO = 10.0
# TRL's names: shares of tokens, or of sequences where the ratio is a sequence's
LOW, HIGH = 'clip_ratio/low_mean', 'clip_ratio/high_mean'
REGION = 'clip_ratio/region_mean'
CISPO_CLIPPED = 'cispo_clip_ratio'
# Largest size of a token's log-ratio: none is as large, and sums and squares of
# it stay finite
LARGEST = 1e6


def old_logp(stats: TokenStats, trajectory: Trajectory) -> jax.Array:
  """Log-probs at the start of the update, l_old [T]: with one step a rollout
  the current ones, held fixed."""
  if trajectory.old_logp is None:
    return sg(stats.logp)
  return trajectory.old_logp


def log_change(stats: TokenStats, trajectory: Trajectory) -> jax.Array:
  """Change of the log-probs, l - l_old [T]; 0 off-mask, where garbage may not
  reach exp."""
  change = stats.logp - old_logp(stats, trajectory)
  return limited(masked.fill(change, trajectory.rollout.mask))


def limited(x: jax.Array) -> jax.Array:
  """Limits log-ratios of tokens to [-LARGEST, LARGEST]; the gradient is 1."""
  return sg(jnp.clip(x, -LARGEST, LARGEST)) + (x - sg(x))


def bounded(x: jax.Array) -> jax.Array:
  """Bound of a log-ratio before exp, min(x, MAX_LOG_RATIO); its gradient is 1
  everywhere.

  Values up to the bound are untouched. Beyond it exp and its gradient are those
  at the bound: finite, and still a pull back, where a gradient of 0 would leave
  the policy where it is. Small ratios need no bound: exp gives 0.
  """
  return sg(jnp.minimum(x, MAX_LOG_RATIO)) + (x - sg(x))


def ratio(stats: TokenStats, trajectory: Trajectory) -> jax.Array:
  """Ratio of each token, rho_t = exp(l - l_old) [T], bounded; 1 off-mask."""
  return jnp.exp(bounded(log_change(stats, trajectory)))


def reinforce() -> Callable:
  """REINFORCE, L_t = -A_t l_t. Williams 1992, Machine Learning 8.

  Its value is not a distance and does not fall as the policy learns; its
  gradient is what counts.
  """

  def loss(stats: TokenStats, trajectory: Trajectory):
    logp = masked.fill(stats.logp, trajectory.rollout.mask)
    return -sg(trajectory.advantage) * logp, {}

  return loss


def _clipped(rho, advantage, low, high):
  """PPO's max(-A rho, -A clip(rho, 1 - low, 1 + high)) and its clip metrics.

  A tie is not held: on-policy the gradient is the policy gradient for bounds of
  0 too.
  """
  above = (rho > 1 + high) & (advantage > 0)
  below = (rho < 1 - low) & (advantage < 0)
  held = above | below
  bound = jnp.where(above, 1 + high, 1 - low)
  loss = -advantage * jnp.where(held, bound, rho)
  return loss, {LOW: below, HIGH: above, REGION: held}


def clip(
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float | None = None,
) -> Callable:
  """PPO's clip, L_t = max(-A rho, -A clip(rho, 1 - low, 1 + high)).
  arXiv:1707.06347.

  With dual_clip c > 1, where A < 0: min(L_t, -c A), arXiv:1912.09729.
  """

  def loss(stats: TokenStats, trajectory: Trajectory):
    advantage = sg(trajectory.advantage)
    rho = ratio(stats, trajectory)
    loss_T, metrics = _clipped(rho, advantage, clip_low, clip_high)
    if dual_clip is not None:
      held = (advantage < 0) & (rho > dual_clip)
      loss_T = jnp.where(held, -dual_clip * advantage, loss_T)
    return loss_T, metrics

  return loss


def sequence_clip(clip_low: float = 0.2, clip_high: float = 0.2) -> Callable:
  """PPO's clip of one ratio for the whole sequence, exp(sum_t l - l_old), with
  the advantage of its first token. RLOO as in arXiv:2402.14740 and TRL.

  It stands on the last chosen token, so that summing over tokens and taking
  the mean over sequences is the mean of sequence losses.
  """

  def loss(stats: TokenStats, trajectory: Trajectory):
    mask = trajectory.rollout.mask
    rho = jnp.exp(bounded(log_change(stats, trajectory).sum()))
    first = mask & (jnp.cumsum(mask) == 1)
    advantage = masked.total(sg(trajectory.advantage), first)
    one, metrics = _clipped(rho, advantage, clip_low, clip_high)
    return jnp.where(masked.last_chosen(mask), one, 0.0), metrics

  return loss


def gspo(clip_low: float = 3e-4, clip_high: float = 4e-4) -> Callable:
  """PPO's clip of sg(s) exp(l - sg l) with s = exp(mean_t(l - l_old)): a ratio
  of the sequence, credited to tokens. GSPO-token, arXiv:2507.18071.

  Its clip metrics are a sequence's share of tokens: 0 or 1 where the tokens
  share one advantage.
  """

  def loss(stats: TokenStats, trajectory: Trajectory):
    mask = trajectory.rollout.mask
    s = jnp.exp(bounded(masked.mean(log_change(stats, trajectory), mask)))
    logp = masked.fill(stats.logp, mask)
    rho = sg(s) * jnp.exp(logp - sg(logp))
    loss_T, held = _clipped(rho, sg(trajectory.advantage), clip_low, clip_high)
    return loss_T, {k: masked.mean(x, mask) for k, x in held.items()}

  return loss


def cispo(ratio_cap: float = 5.0, ratio_floor: float = 0.0) -> Callable:
  """CISPO, L_t = -sg(clip(rho, floor, cap)) A_t l_t: every token keeps its
  gradient.

  The cap is an absolute number, not 1 + epsilon. arXiv:2506.13585. Its metric
  is the share of tokens whose ratio is above the cap with A > 0, as in TRL, or
  below the floor with A < 0.
  """

  def loss(stats: TokenStats, trajectory: Trajectory):
    advantage, rho = sg(trajectory.advantage), ratio(stats, trajectory)
    weight = sg(jnp.clip(rho, ratio_floor, ratio_cap))
    logp = masked.fill(stats.logp, trajectory.rollout.mask)
    above = (rho > ratio_cap) & (advantage > 0)
    below = (rho < ratio_floor) & (advantage < 0)
    return -weight * advantage * logp, {CISPO_CLIPPED: above | below}

  return loss


# losses whose gradient is 0 for a sequence without an advantage
FLAT_WITHOUT_ADVANTAGE = (reinforce, clip, sequence_clip, gspo, cispo)


# --- additions to any loss ---------------------------------------------------


def with_metrics(loss: Callable, name: str) -> Callable:
  """A loss that may return its [T] alone, with metrics [T] or [], and
  checked."""

  def checked(stats: TokenStats, trajectory: Trajectory):
    out = loss(stats, trajectory)
    loss_T, metrics = out if isinstance(out, tuple) else (out, {})
    T = stats.logp.shape[0]
    check_array(f'loss {name}', loss_T, float, T=T)
    for metric, x in metrics.items():
      if jnp.shape(x) not in ((), (T,)):
        raise ValueError(
          f'metric {metric} of the loss {name} has shape '
          f'{list(jnp.shape(x))}; return a number, or one for each of the '
          f'{T} tokens'
        )
    return loss_T, metrics

  return checked


def corrected(
  loss: Callable, cap: float, mode: str = 'token_truncate'
) -> Callable:
  """Importance weights for rollouts of a quantised or older policy, L_t sg(w).

  The ratio is exp(l_old - l_roll) of each token, arXiv:2503.14286, or exp of
  its sum over the sequence: unbiased, and of a larger variance.

    *_truncate  w = min(ratio, cap)
    *_mask      w = ratio up to the cap, 0 above

  Args:
    mode: token or sequence, truncate or mask: names.IMPORTANCE_MODES, TRL's.

  Its metrics, by token or by sequence: the mean weight, and the share that the
  cap truncated or masked.
  """
  level, rule = mode.split('_')
  above, share = {
    'truncate': (cap, 'frac_importance_truncated'),
    'mask': (0.0, 'frac_importance_masked'),
  }[rule]

  def with_weight(stats: TokenStats, trajectory: Trajectory):
    loss_T, metrics = loss(stats, trajectory)
    rollout = trajectory.rollout
    lag = masked.fill(old_logp(stats, trajectory) - rollout.logp, rollout.mask)
    lag = limited(lag)
    lag = lag.sum() if level == 'sequence' else lag
    rho = sg(jnp.exp(bounded(lag)))
    over = rho > cap
    weight = jnp.where(over, above, rho)
    return loss_T * weight, metrics | {'importance_weight': weight, share: over}

  return with_weight


def with_entropy(loss: Callable, coefficient: float) -> Callable:
  """Entropy bonus, L_t - coefficient H_t. arXiv:1602.01783."""

  def with_bonus(stats: TokenStats, trajectory: Trajectory):
    loss_T, metrics = loss(stats, trajectory)
    entropy = masked.fill(stats.entropy, trajectory.rollout.mask)
    return loss_T - coefficient * entropy, metrics

  return with_bonus


def value_error(coefficient: float, value_clip: float | None) -> Callable:
  """Value loss, coefficient (V_t - target_t)^2. With a clip c, as in PPO's
  first code, it is

  coefficient max((V - target)^2, (V_old + clip(V - V_old, -c, c) - target)^2)

  whose gradient is 0 where the clip holds. Returns loss(stats, trajectory) ->
  [T], of one sequence.
  """

  def loss(stats: TokenStats, trajectory: Trajectory):
    mask = trajectory.rollout.mask
    value, target, old = (
      masked.fill(x, mask)
      for x in (stats.value, trajectory.value_target, trajectory.old_value)
    )
    error = (value - sg(target)) ** 2
    if value_clip is not None:
      move = value - sg(old)
      near = sg(old + jnp.clip(move, -value_clip, value_clip))
      clipped = (near - sg(target)) ** 2
      held = (jnp.abs(move) > value_clip) & (clipped > error)
      error = jnp.where(held, clipped, error)
    return coefficient * error

  return loss


# --- KL to the reference, named by the effect of its gradient on-policy ------


def log_ratio(stats: TokenStats, trajectory: Trajectory) -> jax.Array:
  """Log-ratio d_t = log pi(y_t) - log ref(y_t), 0 off-mask."""
  d = stats.logp - trajectory.ref_logp
  return limited(masked.fill(d, trajectory.rollout.mask))


def k2(d: jax.Array) -> jax.Array:
  """Estimator k2 = d^2 / 2: its gradient is that of the reverse KL(pi || ref).
  Schulman 2020, joschu.net/blog/kl-approx.html."""
  return d**2 / 2


def k3(d: jax.Array) -> jax.Array:
  """Estimator k3 = exp(-d) + d - 1 >= 0: its value estimates the reverse
  KL(pi || ref), its gradient on-policy is that of the **forward**
  KL(ref || pi). Schulman 2020, joschu.net/blog/kl-approx.html.

  -d is bounded: below d = -MAX_LOG_RATIO value and gradient are those there.
  """
  x = bounded(-d)
  return jnp.exp(x) - x - 1


# 'reward' takes k1 = d from each token's reward before the advantage: reverse
# KL, and future divergence is credited. k1 in the loss knows no reference: its
# expected gradient on-policy is 0 for a sum over tokens, for a mean over the n
# tokens of a sequence that of E[1/n], which makes completions longer.
KL_FORMS = {'none': None, 'reward': None, 'reverse': k2, 'forward': k3}


def kl_loss(form: str, stats: TokenStats, trajectory: Trajectory) -> jax.Array:
  """KL loss sg(rho) k(d) of one sequence [T]: k2 for 'reverse', k3 for
  'forward'.

  rho (1 on-policy) keeps each the gradient of its name when a rollout is used
  for several steps.
  """
  rho = sg(ratio(stats, trajectory))
  return rho * KL_FORMS[form](log_ratio(stats, trajectory))


# --- carries: values that move between updates -------------------------------


def constant(value: float) -> Carry:
  """Carry of a number that stays as it is."""
  return Carry(lambda params: jnp.float32(value), lambda x, state, metrics: x)


def adaptive_kl(beta: float, target: float, horizon: float) -> Carry:
  """Controller of the KL's coefficient, in proportion to the error:

  beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) rows / horizon)

  arXiv:1909.08593.

  Reads the update's metrics `kl` (nats a token) and `rows` (completions).
  """

  def after(beta, state, metrics):
    error = jnp.clip(metrics['kl'] / target - 1, -0.2, 0.2)
    return beta * (1 + error * metrics['rows'] / horizon)

  return Carry(lambda params: jnp.float32(beta), after)


def reference(sync_steps: int = 0, dtype=None) -> Carry:
  """Parameters of the reference policy: a copy of the trained ones, made anew
  after every `sync_steps` updates (0: never).

  Args:
    dtype: type of the copy's numbers; None: that of each parameter.
  """

  def init(params):
    return jax.tree.map(lambda x: jnp.array(x, dtype or x.dtype), params)

  def after(copy, state, metrics):
    if not sync_steps:
      return copy
    due = state.step % sync_steps == 0
    return jax.tree.map(
      lambda old, new: jnp.where(due, new.astype(old.dtype), old),
      copy,
      state.params,
    )

  return Carry(init, after)


def slow_copy(sync_steps: int) -> Carry:
  """Parameters of NLPO's mask policy, a copy made anew after every
  `sync_steps` updates. arXiv:2210.01241."""
  return reference(sync_steps)


# --- aggregation: sum(weight * loss) is the loss -----------------------------


def _rows(valid: jax.Array) -> jax.Array:
  """Number of valid rows, at least 1, float32 []."""
  chex.assert_rank(valid, 1)
  return masked.count(valid)


def token_mean(
  mask: jax.Array, valid: jax.Array, max_length: int | None = None
) -> jax.Array:
  """Weight 1 / (chosen tokens of valid rows): every token counts the same.
  arXiv:2503.14476."""
  chosen = mask & valid[:, None]
  return chosen / masked.count(chosen)


def seq_mean_token_mean(
  mask: jax.Array, valid: jax.Array, max_length: int | None = None
) -> jax.Array:
  """Weight 1 / (valid rows * length): every sequence counts the same.
  arXiv:2402.03300."""
  chosen = mask & valid[:, None]
  return chosen / masked.count(chosen, axis=1)[:, None] / _rows(valid)


def seq_mean_token_sum(
  mask: jax.Array, valid: jax.Array, max_length: int | None = None
) -> jax.Array:
  """Weight 1 / (valid rows): true policy gradient of the expected return."""
  return (mask & valid[:, None]) / _rows(valid)


def seq_mean_token_sum_norm(
  mask: jax.Array, valid: jax.Array, max_length: int
) -> jax.Array:
  """Weight 1 / (valid rows * max_length), a constant scale of
  seq_mean_token_sum.
  Dr. GRPO, arXiv:2503.20783."""
  return (mask & valid[:, None]) / (_rows(valid) * max_length)
