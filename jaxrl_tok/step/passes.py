"""Optimizer steps of one update: epochs x mini-batches over a rollout.

One pass takes the prompts as they come. Several take whole prompts in an order
that each epoch draws anew, and may end early when the policy has moved.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxrl_tok.sharding import path_name
from jaxrl_tok.step.gradient import Fixed
from jaxrl_tok.step.groups import take_groups
from jaxrl_tok.types import Passes, TrainState, Trajectory

# folded into a step's key, whose numbers below B are the sampler's rows
SHUFFLE = 2**31 - 1
# metrics of the policy that sampled: an update's first pass has them
AT_FIRST = ('entropy', 'kl', 'sampler_logp_gap')


def param_labels(trained) -> tuple:
  """'critic' or 'policy' for every leaf of TrainState.trained: a critic of its
  own, and the value head on a shared trunk, are the critic."""

  def label(path, _):
    own = path_name(path[:1]) == '1' or 'value_head' in path_name(path)
    return 'critic' if own else 'policy'

  return jax.tree_util.tree_map_with_path(label, trained)


def make_optimizer_step(
  optimizer: optax.GradientTransformation, critic_warmup_steps: int
) -> Callable:
  """Returns apply((trained, opt_state), gradient, step) -> the same after one
  optimizer step; the policy waits while the critic warms up."""

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
    changes, opt_state = optimizer.update(grads, opt_state, trained)
    changes = hold(changes) if critic_warmup_steps else changes
    return optax.apply_updates(trained, changes), opt_state

  return apply


def pass_order(key: jax.Array, passes: Passes, num_prompts: int) -> jax.Array:
  """int [passes, C / mini_batches]: the prompts of every optimizer step; every
  epoch has each prompt once."""
  epochs = jnp.arange(passes.epochs)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, epochs)
  order = jax.vmap(lambda k: jax.random.permutation(k, num_prompts))(keys)
  return order.reshape(passes.count, num_prompts // passes.mini_batches)


def early_stop(one: Callable, limit: float) -> Callable:
  """A scan's body that makes a pass unless one before it moved the policy
  beyond `limit` nats a token; that pass's change is taken back."""

  def body(carry, prompts):
    moving, going = carry

    def work():
      moved, metrics = one(moving, prompts)
      near = metrics['update_kl'] <= limit
      kept = jax.tree.map(lambda n, o: jnp.where(near, n, o), moved, moving)
      return (kept, near), metrics | {'passes': near.astype(jnp.float32)}

    def skip():
      shapes = jax.eval_shape(work)[1]
      zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
      return (moving, going), zeros

    return jax.lax.cond(going, work, skip)

  return body


def make_passes(
  gradient: Callable, optimizer: optax.GradientTransformation, passes: Passes
) -> Callable:
  """Returns run(state, Fixed, Trajectory, valid [B]) -> ((trained, opt_state),
  metrics) after all passes, or after those before the policy had moved by
  max_update_kl. Pure; gradient: see gradient.make_gradient."""
  apply = make_optimizer_step(optimizer, passes.critic_warmup_steps)

  def once(state: TrainState, fixed: Fixed, trajectory: Trajectory, valid):
    metrics, grads = gradient(state.trained, fixed, trajectory, valid)
    moving = state.trained, state.opt_state
    return apply(moving, grads, state.step), metrics

  def several(state: TrainState, fixed: Fixed, trajectory: Trajectory, valid):
    C = trajectory.rollout.prompts.length.shape[0]
    key = jax.random.fold_in(state.key, state.step)
    order = pass_order(jax.random.fold_in(key, SHUFFLE), passes, C)

    def one(moving, prompts):
      part = take_groups((trajectory, valid), prompts, C)
      metrics, grads = gradient(moving[0], fixed, *part)
      return apply(moving, grads, state.step), metrics

    moving, limit = (state.trained, state.opt_state), passes.max_update_kl
    if limit is None:
      moving, stacked = jax.lax.scan(one, moving, order)
      looked = jnp.ones(passes.count)
    else:
      start = moving, jnp.bool_(True)
      (moving, _), stacked = jax.lax.scan(early_stop(one, limit), start, order)
      made = stacked.pop('passes')
      # the pass that found the policy too far looked, but did not step
      looked = jnp.concatenate([jnp.ones(1), made[:-1]])
    metrics = {
      k: v[0] if k in AT_FIRST else jnp.sum(v * looked) / jnp.sum(looked)
      for k, v in stacked.items()
    }
    if limit is not None:
      metrics['passes'] = jnp.sum(made)
    return moving, metrics

  return once if passes.count == 1 else several
