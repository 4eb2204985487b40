"""Per-token losses of one sequence, the KL to a reference, and aggregation.

A loss sees ONE sequence: (TokenStats of [T], Trajectory of [T]) -> (loss [T],
metrics {name: [T]}); the update vmaps it. An aggregation makes one number of
token losses: it maps the mask [B, T] and the valid rows [B] of the **global**
batch to a weight for each token, so micro-batches and devices change no number.

Letters: l log-prob now, l_old at the start of the update, rho = exp(l - l_old),
sg stop-gradient, A the advantage. Functions that return a loss take as
parameters the choices that they read.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxrl_tok import masked
from jaxrl_tok.policy import check_array
from jaxrl_tok.types import Carry, TokenStats, Trajectory

sg = jax.lax.stop_gradient
CLIPPED = 'clip_ratio/region_mean'  # TRL's name


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
  return masked.fill(change, trajectory.rollout.mask)


def reinforce() -> Callable:
  """REINFORCE, L_t = -A_t l_t. Williams 1992, Machine Learning 8.

  Its value is not a distance and does not fall as the policy learns; its
  gradient is what counts.
  """

  def loss(stats: TokenStats, trajectory: Trajectory):
    logp = masked.fill(stats.logp, trajectory.rollout.mask)
    return -sg(trajectory.advantage) * logp, {}

  return loss


def _clipped(ratio, advantage, low, high):
  """Returns max(-A r, -A clip(r, 1 - low, 1 + high)) and whether it is held by
  the clip."""
  inside = jnp.clip(ratio, 1 - low, 1 + high)
  loss = jnp.maximum(-advantage * ratio, -advantage * inside)
  above = (ratio > 1 + high) & (advantage > 0)
  below = (ratio < 1 - low) & (advantage < 0)
  return loss, above | below


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
    rho = jnp.exp(log_change(stats, trajectory))
    loss_T, held = _clipped(rho, advantage, clip_low, clip_high)
    if dual_clip is not None:
      bounded = jnp.minimum(loss_T, -dual_clip * advantage)
      loss_T = jnp.where(advantage < 0, bounded, loss_T)
    return loss_T, {CLIPPED: held}

  return loss


def sequence_clip(clip_low: float = 0.2, clip_high: float = 0.2) -> Callable:
  """PPO's clip of one ratio for the whole sequence, exp(sum_t l - l_old), with
  the advantage of its first token. RLOO as in arXiv:2402.14740 and TRL.

  It stands on the last chosen token, so that summing over tokens and taking
  the mean over sequences is the mean of sequence losses.
  """

  def loss(stats: TokenStats, trajectory: Trajectory):
    mask = trajectory.rollout.mask
    ratio = jnp.exp(log_change(stats, trajectory).sum())
    first = mask & (jnp.cumsum(mask) == 1)
    advantage = masked.total(sg(trajectory.advantage), first)
    one, held = _clipped(ratio, advantage, clip_low, clip_high)
    loss_T = jnp.where(masked.last_chosen(mask), one, 0.0)
    return loss_T, {CLIPPED: jnp.broadcast_to(held, mask.shape)}

  return loss


def gspo(clip_low: float = 3e-4, clip_high: float = 4e-4) -> Callable:
  """PPO's clip of sg(s) exp(l - sg l) with s = exp(mean_t(l - l_old)): a ratio
  of the sequence, credited to tokens. GSPO-token, arXiv:2507.18071."""

  def loss(stats: TokenStats, trajectory: Trajectory):
    mask = trajectory.rollout.mask
    s = jnp.exp(masked.mean(log_change(stats, trajectory), mask))
    logp = masked.fill(stats.logp, mask)
    ratio = sg(s) * jnp.exp(logp - sg(logp))
    loss_T, held = _clipped(
      ratio, sg(trajectory.advantage), clip_low, clip_high
    )
    return loss_T, {CLIPPED: held}

  return loss


def cispo(ratio_cap: float = 5.0, ratio_floor: float = 0.0) -> Callable:
  """CISPO, L_t = -sg(clip(rho, floor, cap)) A_t l_t: every token keeps its
  gradient.

  The cap is an absolute number, not 1 + epsilon. arXiv:2506.13585.
  """

  def loss(stats: TokenStats, trajectory: Trajectory):
    rho = jnp.exp(log_change(stats, trajectory))
    weight = sg(jnp.clip(rho, ratio_floor, ratio_cap))
    logp = masked.fill(stats.logp, trajectory.rollout.mask)
    held = (rho > ratio_cap) | (rho < ratio_floor)
    return -weight * sg(trajectory.advantage) * logp, {CLIPPED: held}

  return loss


# losses whose gradient is 0 for a sequence without an advantage
FLAT_WITHOUT_ADVANTAGE = (reinforce, clip, sequence_clip, gspo, cispo)


# --- additions to any loss ---------------------------------------------------


def with_metrics(loss: Callable, name: str) -> Callable:
  """A loss that may return its [T] alone, with metrics, and checked."""

  def checked(stats: TokenStats, trajectory: Trajectory):
    out = loss(stats, trajectory)
    loss_T, metrics = out if isinstance(out, tuple) else (out, {})
    T = stats.logp.shape[0]
    check_array(f'loss {name}', loss_T, float, T=T)
    return loss_T, {k: jnp.broadcast_to(x, (T,)) for k, x in metrics.items()}

  return checked


def corrected(loss: Callable, cap: float) -> Callable:
  """Truncated importance weights, L_t * sg(min(exp(l_old - l_roll), cap)), for
  rollouts of a quantised or older policy. Token form of arXiv:2503.14286."""

  def with_weight(stats: TokenStats, trajectory: Trajectory):
    loss_T, metrics = loss(stats, trajectory)
    rollout = trajectory.rollout
    lag = masked.fill(old_logp(stats, trajectory) - rollout.logp, rollout.mask)
    weight = sg(jnp.minimum(jnp.exp(lag), cap))
    return loss_T * weight, metrics | {'importance_weight': weight}

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

  Returns loss(stats, trajectory) -> [T], of one sequence.
  """

  def loss(stats: TokenStats, trajectory: Trajectory):
    mask = trajectory.rollout.mask
    value, target, old = (
      masked.fill(x, mask)
      for x in (stats.value, trajectory.value_target, trajectory.old_value)
    )
    error = (value - sg(target)) ** 2
    if value_clip is not None:
      near = sg(old) + jnp.clip(value - sg(old), -value_clip, value_clip)
      error = jnp.maximum(error, (near - sg(target)) ** 2)
    return coefficient * error

  return loss


# --- KL to the reference, named by the effect of its gradient on-policy ------


def log_ratio(stats: TokenStats, trajectory: Trajectory) -> jax.Array:
  """Log-ratio d_t = log pi(y_t) - log ref(y_t), 0 off-mask."""
  return masked.fill(stats.logp - trajectory.ref_logp, trajectory.rollout.mask)


def k2(d: jax.Array) -> jax.Array:
  """Estimator k2 = d^2 / 2: its gradient is that of the reverse KL(pi || ref).
  Schulman 2020, joschu.net/blog/kl-approx.html."""
  return d**2 / 2


def k3(d: jax.Array) -> jax.Array:
  """Estimator k3 = exp(-d) + d - 1 >= 0: its value estimates the reverse
  KL(pi || ref), its gradient on-policy is that of the **forward**
  KL(ref || pi). Schulman 2020, joschu.net/blog/kl-approx.html."""
  return jnp.exp(-d) + d - 1


# 'reward' takes k1 = d from each token's reward before the advantage: reverse
# KL, and future divergence is credited. k1 in the loss has gradient 0.
KL_FORMS = {'none': None, 'reward': None, 'reverse': k2, 'forward': k3}


def kl_loss(form: str, stats: TokenStats, trajectory: Trajectory) -> jax.Array:
  """KL loss sg(rho) k(d) of one sequence [T]: k2 for 'reverse', k3 for
  'forward'.

  rho (1 on-policy) keeps each the gradient of its name when a rollout is used
  for several steps.
  """
  rho = sg(jnp.exp(log_change(stats, trajectory)))
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
