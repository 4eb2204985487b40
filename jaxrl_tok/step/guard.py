"""Optimizer steps that are made where all of a step is finite.

A step that is not finite changes nothing; Step tells its first such tensor.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_tok import finite, masked
from jaxrl_tok.sharding import path_name
from jaxrl_tok.types import Trajectory

# metrics that tell whether a loss is finite
OF_LOSS = ('surrogate', 'update_kl')


def param_labels(trained) -> tuple:
  """Labels leaves of TrainState.trained 'critic' or 'policy'; a separate critic
  and the value head on a shared trunk are the critic."""

  def label(path, _):
    own = path_name(path[:1]) == '1' or 'value_head' in path_name(path)
    return 'critic' if own else 'policy'

  return jax.tree_util.tree_map_with_path(label, trained)


def make_optimizer_step(
  optimizer: optax.GradientTransformation, critic_warmup_steps: int
) -> Callable:
  """Returns apply((trained, opt_state), gradient, step) -> both after one
  optimizer step; the policy waits while the critic warms up, and an optimizer
  that takes extra arguments is told the training step."""
  optimizer = optax.with_extra_args_support(optimizer)

  def apply(moving: tuple, grads, step) -> tuple:
    trained, opt_state = moving

    def hold(tree):
      return jax.tree.map(
        lambda x, label: (
          x
          if label == 'critic'
          else jnp.where(step >= critic_warmup_steps, x, 0)
        ),
        tree,
        param_labels(tree),
      )

    grads = hold(grads) if critic_warmup_steps else grads
    more = {'step': step} if critic_warmup_steps else {}
    changes, opt_state = optimizer.update(grads, opt_state, trained, **more)
    changes = hold(changes) if critic_warmup_steps else changes
    return optax.apply_updates(trained, changes), opt_state

  return apply


class Step(NamedTuple):
  """Outcome of one optimizer step; a pass that never ran has zeros."""

  ran: jax.Array  # bool []  its gradient was computed
  made: jax.Array  # bool []  it changed the parameters
  skipped: jax.Array  # bool []  it was not finite, and changed nothing
  first: jax.Array  # int32 []  then its first such tensor: finite.tensor_names


def batch_finite(trajectory: Trajectory, metrics: dict) -> list[jax.Array]:
  """Tells of each tensor of finite.OF_BATCH, bool [], whether it is finite on
  chosen tokens; one that is not there is."""
  t = trajectory
  tensors = [
    None if x is None else masked.fill(x, t.rollout.mask)
    for x in (
      t.rollout.logp,
      t.ref_logp,
      t.old_logp,
      t.reward,
      t.old_value,
      t.value_target,
      t.advantage,
    )
  ]
  tensors.append([metrics[k] for k in OF_LOSS if k in metrics])
  return [jnp.isfinite(sum(finite.squares(x), 0.0)) for x in tensors]


def make_guarded_step(apply: Callable) -> Callable:
  """Returns step((trained, opt_state), gradient, number, metrics, Trajectory,
  wanted bool []) -> (both after it, Step), pure.

  The step is made where it is wanted and finite: every tensor of the batch, the
  gradient's norm and every new parameter. Otherwise all stays, the optimizer's
  count included.

  A branch decides, not a selection of each number, which would hold the new
  parameters and moments beside the old ones; the test computes the new
  parameters without storing them.
  """

  def step(moving, grads, number, metrics, trajectory, wanted) -> tuple:
    batch = batch_finite(trajectory, metrics)

    def moved():
      return apply(moving, grads, number)

    fine = jnp.all(jnp.stack([*batch, jnp.isfinite(metrics['grad_norm'])]))
    fine &= finite.all_finite(moved()[0])

    def first():
      return finite.first_tensor(batch, grads, moved()[0])

    def stay():  # one branch has all of it: a second one would copy the state
      return moving, jax.lax.cond(fine, lambda: jnp.int32(0), first)

    made = fine & wanted
    moving, found = jax.lax.cond(made, lambda: (moved(), jnp.int32(0)), stay)
    return moving, Step(jnp.bool_(True), made, ~fine, found)

  return step
