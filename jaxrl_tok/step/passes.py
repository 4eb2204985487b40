"""Passes of one update over a rollout: gradients and optimizer steps.

1. `make_gradient`: evaluate, the loss of one sequence under vmap, the weighted
   sum, its gradient, in micro-batches. Weights are those of the mini-batch,
   so the number of micro-batches changes nothing; where the loss is flat
   without an advantage, groups that have none need no gradient.
2. `make_passes`: epochs x mini-batches of optimizer steps. A single pass takes
   the prompts in order; several take groups in an order that is drawn for each
   epoch, and may stop early when the policy has moved. A step that is not
   finite changes nothing (guard.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_tok import masked
from jaxrl_tok.credit import losses
from jaxrl_tok.policy import evaluate, head_is_frozen, values
from jaxrl_tok.step.groups import split_groups, take_groups
from jaxrl_tok.step.guard import (
  Step,
  make_guarded_step,
  make_optimizer_step,
)
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
# metrics of the policy that sampled: an update's first pass has them; any other
# is the mean over the passes made
AT_FIRST = ('entropy', 'kl', 'sampler_logp_gap')
# {name: (sign, metric)}: sign times the largest of sign times the metric's mean
# over a row's tokens; TRL's names
EXTREMES = {
  'clip_ratio/low_min': (-1, losses.LOW),
  'clip_ratio/high_max': (1, losses.HIGH),
}


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
  """Loss sum(weight (L + kl_coef KL)) + sum(value_weight L_value), and metrics
  {name: [B, T] of tokens or [B] of rows}; losses of one sequence are vmapped
  over the rows. `kl` is rho k3, as in TRL: rho makes it an estimate for the
  current policy on a rollout of an older one."""
  mask = trajectory.rollout.mask
  rows = trajectory._replace(rollout=trajectory.rollout._replace(prompts=None))
  loss, metrics = jax.vmap(algorithm.loss)(stats, rows)
  kl = algorithm.kl
  if kl is not None:
    k3 = losses.k3(losses.log_ratio(stats, rows))
    metrics['kl'] = losses.ratio(stats, rows) * k3
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


class Totals(NamedTuple):
  """Metrics of a part of a mini-batch, which add up to those of all of it."""

  loss: jax.Array  # []
  # {name: (sum, number of values)}: of chosen tokens, or of rows that have one
  sums: dict
  largest: dict  # {name: []}, -inf where no row chose a token

  def add(self, other: 'Totals') -> 'Totals':
    """Totals of both parts."""
    largest = jax.tree.map(jnp.maximum, self.largest, other.largest)
    added = jax.tree.map(jnp.add, self, other)
    return added._replace(largest=largest)

  def means(self) -> dict:
    """Metrics {name: []}; 0 where there is no value."""
    found = {k: x / jnp.maximum(n, 1) for k, (x, n) in self.sums.items()}
    for name, x in self.largest.items():
      sign = EXTREMES[name][0] if name in EXTREMES else 1
      found[name] = jnp.where(x == -jnp.inf, 0.0, sign * x)
    return found


def _totals(loss: jax.Array, metrics: dict, gap, mask: jax.Array) -> Totals:
  """Totals of metrics {name: [B, T] or [B]} over the chosen tokens, or over
  the rows that have one; gap [B, T]: of the sampler's log-probs."""
  rows = jnp.any(mask, axis=1)
  sums = {}
  for name, x in metrics.items():
    on = rows if x.ndim == 1 else mask
    sums[name] = masked.total(x, on), jnp.sum(on.astype(jnp.float32))
  largest = {'sampler_logp_gap': jnp.max(gap, initial=-jnp.inf, where=mask)}
  for name, (sign, of) in EXTREMES.items():
    if of in metrics:
      x = metrics[of]
      x = x if x.ndim == 1 else masked.mean(x, mask, axis=1)
      x = sign * x.astype(jnp.float32)
      largest[name] = jnp.max(x, initial=-jnp.inf, where=rows)
  return Totals(loss, sums, largest)


class _Loss(NamedTuple):
  """A micro-batch's loss at fixed parameters."""

  grad: Callable  # part -> (gradient, Totals)
  value: Callable  # part -> Totals


def _in_micro_batches(loss: _Loss, batch: tuple, parts: int, flat: bool):
  """Returns (gradient summed over micro-batches, Totals) of a mini-batch.

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
    (grads, totals), (grads_i, totals_i) = total, loss.grad(part(i))
    grads = jax.tree.map(lambda a, g: a + g.astype(a.dtype), grads, grads_i)
    return grads, totals.add(totals_i)

  grads, totals = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.float32),
    jax.eval_shape(lambda: loss.grad(part(0))),
  )
  none = {name: jnp.float32(-jnp.inf) for name in totals.largest}
  start = grads, totals._replace(largest=none)
  grads, totals = jax.lax.fori_loop(0, count, add, start)
  if flat:
    totals = jax.lax.fori_loop(
      count,
      parts,
      lambda i, totals: totals.add(loss.value(part(i))),
      totals,
    )
  return grads, totals


def make_gradient(
  policy: Policy,
  algorithm: Algorithm,
  micro_batches: int = 1,
  logits_chunk: int | None = None,
  critic: Policy | None = None,
) -> Callable:
  """Returns gradient(trained, Fixed, Trajectory, valid [B]) -> (metrics of
  the mini-batch, gradient), pure.

  Metrics of tokens, `entropy` and `kl` among them, are means over the
  mini-batch's chosen tokens of valid rows; metrics of a sequence, such as
  `clip_ratio/*` of a loss with one ratio a sequence, are means over its valid
  rows that chose a token.

  Args:
    micro_batches: parts that the gradient is computed in.
    logits_chunk: see policy.evaluate.
    critic: network of a separate critic; None: a head on the policy, or none.
  """

  def micro_loss(trained, fixed: Fixed, trajectory: Trajectory, weights):
    """A micro-batch's share of the loss, and its Totals."""
    rollout = trajectory.rollout
    params, critic_params = trained
    merged = policy.merge_params(params, fixed.params)
    frozen = head_is_frozen(policy, params, fixed.params, rollout.prompts)
    stats = evaluate(policy, merged, rollout, fixed.rule, logits_chunk, frozen)
    if critic is not None:
      value = values(critic, critic_params, rollout)[:, :-1]
      stats = stats._replace(value=value)
    loss, metrics = total_loss(
      algorithm, stats, trajectory, *weights, fixed.kl_coef
    )
    gap = jnp.abs(stats.logp - rollout.logp)
    return loss, _totals(loss, metrics, gap, rollout.mask)

  def gradient(trained, fixed: Fixed, trajectory: Trajectory, valid):
    mask = trajectory.rollout.mask
    weights = algorithm.aggregate(mask, valid), losses.token_mean(mask, valid)
    grad = jax.grad(micro_loss, has_aux=True)
    batch = trajectory, weights
    if micro_batches == 1:
      grads, totals = grad(trained, fixed, *batch)
    else:
      loss = _Loss(
        lambda part: grad(trained, fixed, *part),
        lambda part: micro_loss(trained, fixed, *part)[1],
      )
      grads, totals = _in_micro_batches(
        loss, batch, micro_batches, algorithm.flat_without_advantage
      )
    metrics = totals.means()
    critic_loss = metrics.get('value_loss', 0.0)
    metrics |= {
      'surrogate': critic_loss - totals.loss,
      'grad_norm': optax.tree.norm(optax.tree.cast(grads, jnp.float32)),
    }
    return metrics, grads

  return gradient


# --- passes ------------------------------------------------------------------


def pass_order(key: jax.Array, passes: Passes, num_prompts: int) -> jax.Array:
  """Order int [passes, C / mini_batches] of the prompts by optimizer step; an
  epoch has each prompt once."""
  epochs = jnp.arange(passes.epochs)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, epochs)
  order = jax.vmap(lambda k: jax.random.permutation(k, num_prompts))(keys)
  return order.reshape(passes.count, num_prompts // passes.mini_batches)


def early_stop(one: Callable) -> Callable:
  """Early stopping, as a scan's body: no pass follows one that was not wanted.

  one: (moving, prompts) -> (moving, (metrics, Step, wanted bool [])).
  """

  def body(carry, prompts):
    moving, going = carry

    def work():
      moved, (metrics, step, wanted) = one(moving, prompts)
      return (moved, wanted), (metrics, step)

    def skip():
      shapes = jax.eval_shape(work)[1]
      zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
      return (moving, going), zeros

    return jax.lax.cond(going, work, skip)

  return body


def mean_metrics(stacked: dict, steps: Step) -> dict:
  """Metrics of an update: means over the passes that were finite, or over all
  that ran where none was; AT_FIRST of the first."""
  counted = steps.ran & ~steps.skipped
  counted = jnp.where(jnp.any(counted), counted, steps.ran)

  def mean(name, values):
    if name in AT_FIRST:
      return values[0]
    return masked.mean(values, counted)

  return {name: mean(name, values) for name, values in stacked.items()}


def make_passes(
  gradient: Callable, optimizer: optax.GradientTransformation, passes: Passes
) -> Callable:
  """Returns run(state, Fixed, Trajectory, valid [B]) -> ((trained, opt_state),
  metrics, Step), pure; early_stop may end the passes.

  gradient: see make_gradient.

  The Step's fields are arrays [passes]. A step is further than max_update_kl
  where KL(old || new) > max_update_kl nats a token: it is not made, and no pass
  follows it. None follows a KL that is no number either.
  """
  limit = passes.max_update_kl
  guarded = make_guarded_step(
    make_optimizer_step(optimizer, passes.critic_warmup_steps)
  )

  def one(state: TrainState, fixed: Fixed, moving, trajectory, valid):
    """One pass: (moving, (metrics, Step, whether another may follow))."""
    metrics, grads = gradient(moving[0], fixed, trajectory, valid)
    near = jnp.bool_(True)
    if limit is not None:
      near = metrics['update_kl'] <= limit
    moving, step = guarded(moving, grads, state.step, metrics, trajectory, near)
    return moving, (metrics, step, near)

  def once(state: TrainState, fixed: Fixed, trajectory: Trajectory, valid):
    moving = state.trained, state.opt_state
    moving, (metrics, step, _) = one(state, fixed, moving, trajectory, valid)
    return moving, metrics, jax.tree.map(lambda x: x[None], step)

  def several(state: TrainState, fixed: Fixed, trajectory: Trajectory, valid):
    C = trajectory.rollout.prompts.length.shape[0]
    key = jax.random.fold_in(state.key, state.step)
    order = pass_order(jax.random.fold_in(key, SHUFFLE), passes, C)

    def body(moving, prompts):
      part = take_groups((trajectory, valid), prompts, C)
      return one(state, fixed, moving, *part)

    moving = state.trained, state.opt_state
    if limit is None:
      moving, (stacked, steps, _) = jax.lax.scan(body, moving, order)
    else:
      start = moving, jnp.bool_(True)
      (moving, _), (stacked, steps) = jax.lax.scan(
        early_stop(body), start, order
      )
    metrics = mean_metrics(stacked, steps)
    if limit is not None:
      metrics['passes'] = jnp.sum(steps.made.astype(jnp.float32))
    return moving, metrics, steps

  return once if passes.count == 1 else several
