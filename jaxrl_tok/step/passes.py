"""Passes of one update over a rollout: gradients and optimizer steps.

1. `make_gradient`: evaluate, the loss of one sequence under vmap, the weighted
   sum, its gradient, in micro-batches. Weights are those of the mini-batch,
   so the number of micro-batches changes nothing; where the loss is flat
   without an advantage, groups that have none need no gradient.
2. `make_passes`: epochs x mini-batches of optimizer steps. A single pass takes
   the prompts in order; several take groups in an order that is drawn for each
   epoch, and may stop early when the policy has moved.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_tok import masked
from jaxrl_tok.credit import losses
from jaxrl_tok.policy import evaluate, values
from jaxrl_tok.sharding import path_name
from jaxrl_tok.step.groups import split_groups, take_groups
from jaxrl_tok.types import (
  Algorithm,
  Passes,
  Policy,
  SamplingRule,
  TokenStats,
  TrainState,
  Trajectory,
)

# folded into a step's key, whose numbers below B are the sampler's rows
SHUFFLE = 2**31 - 1
# metrics of the policy that sampled: an update's first pass has them
AT_FIRST = ('entropy', 'kl', 'sampler_logp_gap')


class Fixed(NamedTuple):
  """Values that a gradient reads and does not change."""

  params: tuple  # TrainState.fixed: the second argument of merge_params
  kl_coef: jax.Array  # float32 []
  rule: SamplingRule


def total_loss(
  algorithm: Algorithm,
  stats: TokenStats,
  trajectory: Trajectory,
  weight: jax.Array,
  value_weight: jax.Array,
  kl_coef: jax.Array,
):
  """Loss sum(weight (L + kl_coef KL)) + sum(value_weight L_value), and token
  metrics {name: [B, T]}; losses of one sequence are vmapped over the rows."""
  mask = trajectory.rollout.mask
  rows = trajectory._replace(rollout=trajectory.rollout._replace(prompts=None))
  loss, metrics = jax.vmap(algorithm.loss)(stats, rows)
  kl = algorithm.kl
  if kl is not None:
    metrics['kl'] = losses.k3(losses.log_ratio(stats, rows))
    if losses.KL_FORMS[kl.form] is not None:
      pull = jax.vmap(losses.kl_loss, (None, 0, 0))(kl.form, stats, rows)
      loss = loss + kl_coef * pull
  total = masked.total(loss * weight, mask)
  metrics['entropy'] = stats.entropy
  if algorithm.value_loss is not None:
    value_loss = jax.vmap(algorithm.value_loss)(stats, rows)
    total += masked.total(value_loss * value_weight, mask)
    metrics['value_loss'] = value_loss
  if trajectory.old_logp is not None:
    metrics['update_kl'] = losses.k3(-losses.log_change(stats, rows))
  return total, metrics


def sort_by_advantage(advantage: jax.Array, parts: int, num_prompts: int):
  """Sorts prompts with an advantage into the first parts of `split_groups`:
  (order int [C] of the prompts, number of parts with a gradient)."""
  has_one = jnp.any(advantage.reshape(num_prompts, -1) != 0, axis=1)
  order = jnp.argsort(~has_one, stable=True).reshape(parts, -1)
  count = jnp.sum(jnp.any(has_one[order], axis=1))
  # prompts are dealt out to the parts in turn
  return order.T.reshape(-1), count


def _add_metrics(total, new):
  """Sums of (sums, largest gap) of two micro-batches."""
  (sums, gap), (sums_i, gap_i) = total, new
  return jax.tree.map(jnp.add, sums, sums_i), jnp.maximum(gap, gap_i)


class _Loss(NamedTuple):
  """A micro-batch's loss at fixed parameters."""

  grad: Callable  # part -> (gradient, (sums, gap))
  value: Callable  # part -> (sums, gap)


def _in_micro_batches(loss: _Loss, batch: tuple, parts: int, flat: bool):
  """Returns (gradient summed over micro-batches, (sums, gap)) of a mini-batch.

  Args:
    batch: (Trajectory, weights), leaves [C, ...] or [B, ...].
    flat: takes no gradient of groups without an advantage.
  """
  trajectory, _ = batch
  C, count = trajectory.rollout.prompts.length.shape[0], parts
  if flat:
    order, count = sort_by_advantage(trajectory.advantage, parts, C)
    batch = take_groups(batch, order, C)
  split = split_groups(batch, parts, C)

  def part(i):
    return jax.tree.map(lambda x: x[i], split)

  def add(i, total):
    (grads, metrics), (grads_i, metrics_i) = total, loss.grad(part(i))
    grads = jax.tree.map(lambda a, g: a + g.astype(a.dtype), grads, grads_i)
    return grads, _add_metrics(metrics, metrics_i)

  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.float32),
    jax.eval_shape(lambda: loss.grad(part(0))),
  )
  grads, metrics = jax.lax.fori_loop(0, count, add, zeros)
  if flat:
    metrics = jax.lax.fori_loop(
      count,
      parts,
      lambda i, metrics: _add_metrics(metrics, loss.value(part(i))),
      metrics,
    )
  return grads, metrics


def make_gradient(
  policy: Policy,
  algorithm: Algorithm,
  micro_batches: int = 1,
  logits_chunk: int | None = None,
  critic: Policy | None = None,
) -> Callable:
  """Returns gradient(trained, Fixed, Trajectory, valid [B]) -> (metrics of
  the mini-batch, gradient), pure.

  Args:
    micro_batches: parts that the gradient is computed in.
    logits_chunk: see policy.evaluate.
    critic: network of a separate critic; None: a head on the policy, or none.
  """

  def micro_loss(trained, fixed: Fixed, trajectory: Trajectory, weights):
    """A micro-batch's share of the loss, and sums over its tokens."""
    rollout = trajectory.rollout
    params, critic_params = trained
    merged = policy.merge_params(params, fixed.params)
    stats = evaluate(policy, merged, rollout, fixed.rule, logits_chunk)
    if critic is not None:
      value = values(critic, critic_params, rollout)[:, :-1]
      stats = stats._replace(value=value)
    loss, metrics = total_loss(
      algorithm, stats, trajectory, *weights, fixed.kl_coef
    )
    sums = {k: masked.total(v, rollout.mask) for k, v in metrics.items()}
    sums |= {'loss': loss, 'tokens': rollout.mask.sum().astype(jnp.float32)}
    gap = masked.fill(jnp.abs(stats.logp - rollout.logp), rollout.mask)
    return loss, (sums, gap.max())

  def gradient(trained, fixed: Fixed, trajectory: Trajectory, valid):
    mask = trajectory.rollout.mask
    weights = algorithm.aggregate(mask, valid), losses.token_mean(mask, valid)
    grad = jax.grad(micro_loss, has_aux=True)
    batch = trajectory, weights
    if micro_batches == 1:
      grads, (sums, gap) = grad(trained, fixed, *batch)
    else:
      loss = _Loss(
        lambda part: grad(trained, fixed, *part),
        lambda part: micro_loss(trained, fixed, *part)[1],
      )
      grads, (sums, gap) = _in_micro_batches(
        loss, batch, micro_batches, algorithm.flat_without_advantage
      )
    loss, tokens = sums.pop('loss'), jnp.maximum(sums.pop('tokens'), 1)
    means = {name: value / tokens for name, value in sums.items()}
    metrics = {
      **means,
      'surrogate': means.get('value_loss', 0.0) - loss,  # without the critic's
      'grad_norm': optax.tree.norm(grads),
      'sampler_logp_gap': gap,
    }
    return metrics, grads

  return gradient


# --- optimizer steps ---------------------------------------------------------


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
  """Order int [passes, C / mini_batches] of the prompts by optimizer step; an
  epoch has each prompt once."""
  epochs = jnp.arange(passes.epochs)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, epochs)
  order = jax.vmap(lambda k: jax.random.permutation(k, num_prompts))(keys)
  return order.reshape(passes.count, num_prompts // passes.mini_batches)


def early_stop(one: Callable, limit: float) -> Callable:
  """Early stopping, as a scan's body: a pass that finds the policy further than
  `limit` nats a token changes nothing, and no pass follows it."""

  def body(carry, prompts):
    moving, going = carry

    def work():
      moved, metrics = one(moving, prompts)
      near = metrics['update_kl'] <= limit
      found = jax.tree.map(lambda n, o: jnp.where(near, n, o), moved, moving)
      return (found, near), metrics | {'passes': near.astype(jnp.float32)}

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
  metrics), pure; early_stop may end the passes. gradient: see make_gradient."""
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
      ran = jnp.ones(passes.count)
    else:
      start = moving, jnp.bool_(True)
      (moving, _), stacked = jax.lax.scan(early_stop(one, limit), start, order)
      made = stacked.pop('passes')
      # the pass that found the policy too far has metrics, but no step
      ran = jnp.concatenate([jnp.ones(1), made[:-1]])
    metrics = {
      k: v[0] if k in AT_FIRST else jnp.sum(v * ran) / jnp.sum(ran)
      for k, v in stacked.items()
    }
    if limit is not None:
      metrics['passes'] = jnp.sum(made)
    return moving, metrics

  return once if passes.count == 1 else several
