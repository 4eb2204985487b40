"""One update from one scored rollout, in one jit.

1. What the algorithm wants to know beforehand: log-probs of the reference and
   of the policy at the start, values, the KL taken from the reward.
2. reward -> advantage, over the whole batch.
3. Passes: `epochs` times `mini_batches` optimizer steps, each on whole prompts
   in an order drawn anew each epoch; one pass takes them as they come.
4. In a pass, a weight for every token (the aggregation); then micro-batches by
   a loop: evaluate, the loss of one sequence under `vmap`, the weighted sum,
   its gradient added in float32. Weights are of the whole mini-batch, so the
   number of micro-batches changes nothing; where the loss is flat without an
   advantage, those that have none are looked at without a gradient.
5. optax; then what moves between updates: the KL's coefficient, the reference,
   the mask policy; and the metrics.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxrl_tok import masked
from jaxrl_tok.credit import losses
from jaxrl_tok.policy import evaluate, values
from jaxrl_tok.sharding import path_name
from jaxrl_tok.step.groups import merge_rows, split_groups, take_groups
from jaxrl_tok.types import (
  Algorithm,
  Policy,
  Rollout,
  SamplingRule,
  Scored,
  TokenStats,
  TrainState,
  Trajectory,
)

# folded into a step's key, whose numbers below B are the sampler's rows
SHUFFLE = 2**31 - 1


def init_state(
  algorithm: Algorithm,
  optimizer: optax.GradientTransformation,
  params,
  key: jax.Array,
  keep_reference: bool = False,
  frozen=None,
  critic=None,
  reference_dtype=None,
) -> TrainState:
  """The state before the first update.

  Args:
    keep_reference: keep a copy of params as the reference even where the
      algorithm needs none. What is `frozen` (Policy.merge_params) is the reference
      itself.
    critic: parameters of a critic of its own.
    reference_dtype: of the reference's copy; None: as params are.
  """
  wanted = algorithm.kl is not None or keep_reference
  reference = slow = None
  if wanted and frozen is None:
    reference = _copied(params, reference_dtype)
  if algorithm.mask_sync_steps:
    slow = _copied(params)
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optimizer.init((params, critic)),
    key=key,
    algorithm=algorithm.init(),
    beta=jnp.float32(algorithm.kl.beta if algorithm.kl else 0.0),
    reference=reference,
    critic=critic,
    mask_policy=slow,
    frozen=frozen,
  )


def _copied(params, dtype=None):
  return jax.tree.map(lambda x: jnp.array(x, dtype or x.dtype), params)


def param_labels(trained) -> tuple:
  """'critic' or 'policy' for every leaf of TrainState.trained: a critic of its
  own, and the value head on a shared trunk, are the critic."""

  def side(path, _):
    own = path_name(path[:1]) == '1' or 'value_head' in path_name(path)
    return 'critic' if own else 'policy'

  return jax.tree_util.tree_map_with_path(side, trained)


def reward_metrics(reward: jax.Array, mask: jax.Array, num_prompts: int):
  """Statistics of the summed reward of each row; TRL's names.

  reward_std is the mean over prompts of the standard deviation (ddof 1) in
  the group; with one sample a prompt, that of the batch.
  """
  rows_CxG = masked.total(reward, mask, axis=1).reshape(num_prompts, -1)
  groups = rows_CxG if rows_CxG.shape[1] > 1 else rows_CxG.T
  std = groups.std(axis=1, ddof=1) if groups.shape[1] > 1 else jnp.zeros((1,))
  return {
    'reward': rows_CxG.mean(),
    'reward_std': std.mean(),
    'frac_reward_zero_std': (std < 1e-6).mean(),
  }


def length_metrics(rollout: Rollout, rule: SamplingRule):
  """Lengths in tokens, and the share of completions cut at T."""
  lengths = rollout.mask.sum(1).astype(jnp.float32)
  return {
    'completions/mean_length': lengths.mean(),
    'completions/min_length': lengths.min(),
    'completions/max_length': lengths.max(),
    'completions/clipped_ratio': is_cut(rollout, rule).mean(),
  }


def is_cut(rollout: Rollout, rule: SamplingRule) -> jax.Array:
  """bool [B]: the row ran into column T without ending by itself."""
  last = rollout.tokens[:, -1]
  ended = jnp.any(last[:, None] == rule.end_tokens[None], axis=1)
  return rollout.mask[:, -1] & ~ended


def penalised(reward, rollout: Rollout, ref_logp, beta) -> jax.Array:
  """r_t - beta (l_roll - l_ref): the reverse KL, future divergence credited."""
  d = masked.fill(rollout.logp - ref_logp, rollout.mask)
  return reward - beta * d


def total_loss(
  algorithm: Algorithm,
  stats: TokenStats,
  trajectory: Trajectory,
  weight: jax.Array,
  value_weight: jax.Array,
  beta: jax.Array,
):
  """sum(weight (L + beta KL)) + sum(value_weight L_value), and per-token
  metrics {name: [B, T]}. All of [B, T]; the losses of one sequence are vmapped.
  """
  mask = trajectory.rollout.mask
  rows = trajectory._replace(rollout=trajectory.rollout._replace(prompts=None))
  loss, metrics = jax.vmap(algorithm.loss)(stats, rows)
  kl = algorithm.kl
  if kl is not None:
    metrics['kl'] = losses.k3(losses.log_ratio(stats, rows))
    if losses.KL_FORMS[kl.form] is not None:
      pull = jax.vmap(losses.kl_loss, (None, 0, 0))(kl.form, stats, rows)
      loss = loss + beta * pull
  total = masked.total(loss * weight, mask)
  metrics['entropy'] = stats.entropy
  if algorithm.value_loss is not None:
    value_loss = jax.vmap(algorithm.value_loss)(stats, rows)
    total += masked.total(value_loss * value_weight, mask)
    metrics['value_loss'] = value_loss
  if trajectory.old_logp is not None:
    metrics['update_kl'] = losses.k3(-losses.log_change(stats, rows))
  return total, metrics


def value_metrics(value, target, mask) -> dict:
  """How much of the returns the critic knew: 1 - var(target - V) / var(target)
  over chosen tokens; 0 where the targets do not vary."""
  spread = masked.var(target, mask)
  left = masked.var(target - value, mask)
  known = jnp.where(spread > 0, 1 - left / jnp.maximum(spread, 1e-12), 0.0)
  return {'explained_variance': known, 'value': masked.mean(value, mask)}


def sort_by_advantage(advantage: jax.Array, parts: int, num_prompts: int):
  """(an order int [C] of the prompts, how many parts have a gradient): what
  has an advantage fills the first parts that `split_groups` makes of it."""
  worth = jnp.any(advantage.reshape(num_prompts, -1) != 0, axis=1)
  order = jnp.argsort(~worth, stable=True).reshape(parts, -1)
  count = jnp.sum(jnp.any(worth[order], axis=1))
  # prompts are dealt out to the parts in turn
  return order.T.reshape(-1), count


# metrics of the policy that sampled: an update's first pass has them
AT_FIRST = ('entropy', 'kl', 'sampler_logp_gap')


def make_update(
  policy: Policy,
  algorithm: Algorithm,
  optimizer: optax.GradientTransformation,
  micro_batches: int = 1,
  logits_chunk: int | None = None,
  critic: Policy | None = None,
) -> Callable:
  """Returns update(state, rollout, reward [B, T], rule, greedy_reward [C] or
  None) -> (state, metrics, advantage [B, T]), pure; jit it with the state
  donated.

  Args:
    micro_batches: parts that a mini-batch's gradient is computed in.
    logits_chunk: see policy.evaluate.
    critic: the critic, where it is not a head on the policy.
  """
  passes, kl = algorithm.passes, algorithm.kl

  def in_parts(function, rollout: Rollout):
    """A function of rollouts -> [B, ...], a micro-batch at a time."""
    parts = micro_batches * algorithm.mini_batches
    C = rollout.prompts.length.shape[0]
    out = jax.lax.map(function, split_groups(rollout, parts, C))
    by_prompt = out.reshape(parts, C // parts, -1, out.shape[-1])
    return merge_rows(by_prompt).reshape(-1, out.shape[-1])

  def logp_of(weights, rollout, rule):
    params = policy.merge_params(*weights)

    def look(part):
      return evaluate(policy, params, part, rule, logits_chunk).logp

    return in_parts(look, rollout)

  def values_of(trained, fixed, rollout):
    params, own = trained
    judge, judged = critic, own
    if critic is None:
      judge, judged = policy, policy.merge_params(params, fixed)
    return in_parts(lambda part: values(judge, judged, part), rollout)

  def micro_loss(trained, fixed, trajectory, weights, beta, rule):
    """A micro-batch's share of the loss, and sums over its tokens."""
    rollout = trajectory.rollout
    params, own = trained
    joined = policy.merge_params(params, fixed)
    stats = evaluate(policy, joined, rollout, rule, logits_chunk)
    if critic is not None:
      stats = stats._replace(value=values(critic, own, rollout)[:, :-1])
    loss, metrics = total_loss(algorithm, stats, trajectory, *weights, beta)
    sums = {k: masked.total(v, rollout.mask) for k, v in metrics.items()}
    sums |= {'loss': loss, 'tokens': rollout.mask.sum().astype(jnp.float32)}
    gap = masked.fill(jnp.abs(stats.logp - rollout.logp), rollout.mask)
    return loss, (sums, gap.max())

  def gradient(trained, fixed, trajectory: Trajectory, beta, rule):
    """-> metrics of a mini-batch, its gradient."""
    mask = trajectory.rollout.mask
    weights = algorithm.aggregate(mask), losses.token_mean(mask)
    grad = jax.grad(micro_loss, has_aux=True)
    if micro_batches == 1:
      grads, (sums, gap) = grad(trained, fixed, trajectory, weights, beta, rule)
    else:
      C = trajectory.rollout.prompts.length.shape[0]
      count, batch = micro_batches, (trajectory, weights)
      if algorithm.flat_without_advantage:
        order, count = sort_by_advantage(trajectory.advantage, micro_batches, C)
        batch = take_groups(batch, order, C)
      parts = split_groups(batch, micro_batches, C)

      def of_part(function, i):
        part = jax.tree.map(lambda x: x[i], parts)
        return function(trained, fixed, *part, beta, rule)

      def add_metrics(total, new):
        (sums, gap), (sums_i, gap_i) = total, new
        return jax.tree.map(jnp.add, sums, sums_i), jnp.maximum(gap, gap_i)

      def add(i, total):
        (grads, metrics), (grads_i, metrics_i) = total, of_part(grad, i)
        grads = jax.tree.map(lambda a, g: a + g.astype(a.dtype), grads, grads_i)
        return grads, add_metrics(metrics, metrics_i)

      def look(i, metrics):
        return add_metrics(metrics, of_part(micro_loss, i)[1])

      zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32),
        jax.eval_shape(lambda: of_part(grad, 0)),
      )
      grads, metrics = jax.lax.fori_loop(0, count, add, zeros)
      if algorithm.flat_without_advantage:
        metrics = jax.lax.fori_loop(count, micro_batches, look, metrics)
      sums, gap = metrics
    loss, tokens = sums.pop('loss'), jnp.maximum(sums.pop('tokens'), 1)
    means = {name: value / tokens for name, value in sums.items()}
    metrics = {
      **means,
      'surrogate': means.get('value_loss', 0.0) - loss,  # without the critic's
      'grad_norm': optax.tree.norm(grads),
      'sampler_logp_gap': gap,
    }
    return metrics, grads

  def apply(moving: tuple, grads, step) -> tuple:
    """One optimizer step of moving = (trained, opt_state); the policy waits
    while the critic warms up."""
    trained, opt_state = moving
    waits = algorithm.critic_warmup_steps

    def hold(tree):
      return jax.tree.map(
        lambda x, side: (
          x if side == 'critic' else jnp.where(step >= waits, x, 0)
        ),
        tree,
        param_labels(tree),
      )

    grads = hold(grads) if waits else grads
    changes, opt_state = optimizer.update(grads, opt_state, trained)
    changes = hold(changes) if waits else changes
    return optax.apply_updates(trained, changes), opt_state

  def several_passes(state: TrainState, trajectory: Trajectory, rule):
    """-> ((trained, opt_state), metrics) after all passes, or those before the
    policy had moved by max_update_kl."""
    C = trajectory.rollout.prompts.length.shape[0]
    limit = algorithm.max_update_kl
    key = jax.random.fold_in(state.key, state.step)
    key = jax.random.fold_in(key, SHUFFLE)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
      key, jnp.arange(algorithm.epochs)
    )
    order = jax.vmap(lambda k: jax.random.permutation(k, C))(keys)
    order = order.reshape(passes, C // algorithm.mini_batches)

    def one(moving, prompts):
      part = take_groups(trajectory, prompts, C)
      metrics, grads = gradient(moving[0], state.fixed, part, state.beta, rule)
      return apply(moving, grads, state.step), metrics

    def early_stop(carry, prompts):
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

    moving = state.trained, state.opt_state
    if limit is None:
      moving, stacked = jax.lax.scan(one, moving, order)
      looked = jnp.ones(passes)
    else:
      start = moving, jnp.bool_(True)
      (moving, _), stacked = jax.lax.scan(early_stop, start, order)
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

  def update(
    state: TrainState,
    rollout: Rollout,
    reward,
    rule: SamplingRule,
    greedy_reward=None,
  ):
    C, mask = rollout.prompts.length.shape[0], rollout.mask
    ref_logp = old_logp = log_change = value = None
    given, scored_reward = reward, reward
    if kl is not None:
      ref_logp = logp_of(state.reference_weights, rollout, rule)
    if kl is not None and kl.form == 'reward':
      scored_reward = penalised(reward, rollout, ref_logp, state.beta)
    if algorithm.recompute_logp:
      old_logp = logp_of(state.weights, rollout, rule)
      log_change = masked.fill(old_logp - rollout.logp, mask)
    elif passes > 1:
      old_logp = rollout.logp
    if algorithm.value_loss is not None:
      value = values_of(state.trained, state.fixed, rollout)
    advantage, value_target, carry = algorithm.advantage(
      Scored(
        rollout,
        scored_reward,
        is_cut(rollout, rule),
        value,
        greedy_reward,
        log_change,
      ),
      state.algorithm,
    )
    trajectory = Trajectory(
      rollout,
      scored_reward,
      advantage,
      value_target,
      ref_logp,
      old_logp,
      None if value is None else masked.fill(value[:, :-1], mask),
    )
    if passes == 1:
      metrics, grads = gradient(
        state.trained, state.fixed, trajectory, state.beta, rule
      )
      moving = state.trained, state.opt_state
      moving = apply(moving, grads, state.step)
    else:
      moving, metrics = several_passes(state, trajectory, rule)
    (params, own), opt_state = moving
    moved = state.replace(params=params, critic=own, opt_state=opt_state)
    metrics = {
      **reward_metrics(given, mask, C),
      **metrics,
      'advantage_std': jnp.sqrt(masked.var(advantage, mask)),
      **length_metrics(rollout, rule),
    }
    if value is not None:
      metrics |= value_metrics(trajectory.old_value, value_target, mask)
    state, more = after_update(moved, metrics, mask.shape[0])
    state = state.replace(step=state.step + 1, algorithm=carry)
    return state, metrics | more, advantage

  def after_update(state: TrainState, metrics: dict, rows: int):
    """What moves by itself after an update: (state, metrics of it)."""
    done, more = state.step + 1, {}

    def refreshed(old, every):
      due = done % every == 0
      return jax.tree.map(
        lambda o, new: jnp.where(due, new.astype(o.dtype), o),
        old,
        state.params,
      )

    if kl is not None:
      more['kl_coef'] = state.beta
      if kl.target is not None:
        beta = losses.adapted_beta(
          state.beta, metrics['kl'], rows, kl.target, kl.horizon
        )
        state = state.replace(beta=beta)
    if algorithm.ref_sync_steps:
      reference = refreshed(state.reference, algorithm.ref_sync_steps)
      state = state.replace(reference=reference)
    if algorithm.mask_sync_steps:
      slow = refreshed(state.mask_policy, algorithm.mask_sync_steps)
      state = state.replace(mask_policy=slow)
    return state, more

  return update


def shortened(update: Callable, length: int) -> Callable:
  """The same update of a rollout whose rows are all over by column `length`,
  at the price of so many columns; what it returns is of all T."""

  def cut(x):
    return x[:, :length]

  def run(state, rollout: Rollout, reward, rule, greedy_reward=None):
    short = rollout._replace(
      tokens=cut(rollout.tokens),
      mask=cut(rollout.mask),
      logp=cut(rollout.logp),
      num_kept=None if rollout.num_kept is None else cut(rollout.num_kept),
    )
    state, metrics, advantage = update(
      state, short, cut(reward), rule, greedy_reward
    )
    rest = ((0, 0), (0, reward.shape[1] - length))
    return state, metrics, jnp.pad(advantage, rest)

  return run
