"""Per-token losses of one sequence, the KL to a reference, and aggregation.

A loss sees ONE sequence: (TokenStats of [T], Trajectory of [T]) -> (loss [T],
metrics {name: [T]}); update.py vmaps it. How token losses become one number
is its own choice: an aggregation maps the mask [B, T] of the **global** batch
to a weight for each token, so micro-batches and devices change no number.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_tok import masked
from jaxrl_tok.types import TokenStats, Trajectory


def reinforce(stats: TokenStats, trajectory: Trajectory):
  """L_t = -A_t log pi(y_t). Williams 1992, Machine Learning 8.

  Its value is not a distance and does not fall as the policy learns; its
  gradient is what counts.
  """
  advantage = jax.lax.stop_gradient(trajectory.advantage)
  logp = masked.fill(stats.logp, trajectory.rollout.mask)
  return -advantage * logp, {}


# --- KL to the reference, named by the effect of its gradient on-policy ------


def log_ratio(stats: TokenStats, trajectory: Trajectory) -> jax.Array:
  """d_t = log pi(y_t) - log ref(y_t), 0 off-mask."""
  return masked.fill(stats.logp - trajectory.ref_logp, trajectory.rollout.mask)


def k2(d: jax.Array) -> jax.Array:
  """d^2 / 2: its gradient is that of the reverse KL(pi || ref)."""
  return d**2 / 2


def k3(d: jax.Array) -> jax.Array:
  """exp(-d) + d - 1 >= 0: its value estimates the reverse KL(pi || ref), its
  gradient on-policy is that of the **forward** KL(ref || pi)."""
  return jnp.exp(-d) + d - 1


def add_kl(loss: Callable, estimator: Callable, coefficient: float) -> Callable:
  """L_t + coefficient * estimator(d_t); estimator k2 (reverse), k3 (forward).

  d itself (k1) is no choice: its expected gradient on-policy is exactly 0.
  """

  def with_kl(stats: TokenStats, trajectory: Trajectory):
    loss_T, metrics = loss(stats, trajectory)
    return loss_T + coefficient * estimator(
      log_ratio(stats, trajectory)
    ), metrics

  return with_kl


# --- aggregation: mask [B, T] -> weight [B, T], sum(weight * loss) is the loss


def token_mean(mask: jax.Array) -> jax.Array:
  """1 / (chosen tokens of the batch): every token counts the same."""
  return mask / masked.count(mask)


def seq_mean_token_mean(mask: jax.Array) -> jax.Array:
  """1 / (B * length): every sequence counts the same."""
  return mask / masked.count(mask, axis=1)[:, None] / mask.shape[0]


def seq_mean_token_sum(mask: jax.Array) -> jax.Array:
  """1 / B: the true policy gradient of the expected return."""
  return mask / jnp.float32(mask.shape[0])


def seq_mean_token_sum_norm(max_length: int) -> Callable:
  """1 / (B * max_length), a constant scale of seq_mean_token_sum.
  Dr. GRPO, arXiv:2503.20783."""
  return lambda mask: mask / jnp.float32(mask.shape[0] * max_length)
