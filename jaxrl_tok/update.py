"""One parameter update from one scored rollout, in one jit.

1. The reference's log-probs, where the algorithm wants them.
2. reward -> advantage, over the whole batch.
3. A weight for every token (the aggregation), over the whole batch.
4. Micro-batches of whole prompts by `scan`: evaluate, the loss of one
   sequence under `vmap`, the weighted sum, its gradient added in float32.
   Weights are global, so the number of micro-batches changes nothing.
5. optax, and the metrics.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxrl_tok import losses, masked
from jaxrl_tok.policy import evaluate
from jaxrl_tok.types import (
  Algorithm,
  Policy,
  Rollout,
  SamplingRule,
  TrainState,
  Trajectory,
)


def init_state(
  algorithm: Algorithm,
  optimizer: optax.GradientTransformation,
  params,
  key: jax.Array,
  keep_reference: bool = False,
  frozen=None,
) -> TrainState:
  """The state before the first update; the reference is a copy of params,
  kept where the algorithm needs it or the caller asks. What is `frozen`
  (Policy.join) is the reference itself."""
  wanted = algorithm.needs_reference or keep_reference
  copied = None
  if wanted and frozen is None:
    copied = jax.tree.map(jnp.copy, params)
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optimizer.init(params),
    key=key,
    algorithm=algorithm.init(),
    reference=copied,
    frozen=frozen,
  )


def split_rows(tree, parts: int):
  """[R, ...] -> [parts, R / parts, ...], part m taking rows m, m + parts, ...

  Strided, so that a batch split over devices stays on its devices.
  """
  return jax.tree.map(
    lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), tree
  )


def merge_rows(tree):
  """Undoes split_rows."""
  return jax.tree.map(
    lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree
  )


def split_groups(tree, parts: int, num_prompts: int):
  """Splits a tree of [C, ...] and [B, ...] leaves by whole prompts."""

  def one(x):  # a group's G rows move together
    return x.reshape(num_prompts, -1, *x.shape[1:])

  split = split_rows(jax.tree.map(one, tree), parts)
  return jax.tree.map(
    lambda x, y: y.reshape(parts, -1, *x.shape[1:]), tree, split
  )


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
  last = rollout.tokens[:, -1]
  ended = jnp.any(last[:, None] == rule.end_tokens[None], axis=1)
  return {
    'completions/mean_length': lengths.mean(),
    'completions/min_length': lengths.min(),
    'completions/max_length': lengths.max(),
    'completions/clipped_ratio': (rollout.mask[:, -1] & ~ended).mean(),
  }


def make_update(
  policy: Policy,
  algorithm: Algorithm,
  optimizer: optax.GradientTransformation,
  micro_batches: int = 1,
  logits_chunk: int | None = None,
) -> Callable:
  """Returns update(state, rollout, reward [B, T], rule) ->
  (state, metrics, advantage [B, T]), pure; jit it with the state donated."""

  def reference_logp(state, rollout, rule):
    C, reference = rollout.prompts.length.shape[0], state.reference_params
    parts = split_groups(rollout, micro_batches, C)
    logp = jax.lax.map(
      lambda part: evaluate(policy, reference, part, rule, logits_chunk).logp,
      parts,
    )  # [parts, B / parts, T]
    T = logp.shape[-1]
    by_prompt = logp.reshape(micro_batches, C // micro_batches, -1, T)
    return merge_rows(by_prompt).reshape(-1, T)

  def weighted_loss(params, frozen, trajectory: Trajectory, weight, rule):
    """A micro-batch's share of the loss, and sums over its tokens."""
    rollout = trajectory.rollout
    joined = policy.join(params, frozen)
    stats = evaluate(policy, joined, rollout, rule, logits_chunk)
    rows = trajectory._replace(rollout=rollout._replace(prompts=None))
    loss_BxT, metrics = jax.vmap(algorithm.loss)(stats, rows)
    metrics['entropy'] = stats.entropy
    if trajectory.ref_logp is not None:
      metrics['kl'] = losses.k3(losses.log_ratio(stats, rows))
    sums = {k: masked.total(v, rollout.mask) for k, v in metrics.items()}
    gap = masked.fill(jnp.abs(stats.logp - rollout.logp), rollout.mask)
    return masked.total(loss_BxT * weight, rollout.mask), (sums, gap.max())

  def gradient(params, frozen, trajectory, weight, rule):
    grad = jax.value_and_grad(weighted_loss, has_aux=True)
    if micro_batches == 1:
      return grad(params, frozen, trajectory, weight, rule)
    C = trajectory.rollout.prompts.length.shape[0]
    parts = split_groups((trajectory, weight), micro_batches, C)

    def step(total, part):
      outs, grads = grad(params, frozen, *part, rule)
      added = jax.tree.map(lambda a, g: a + g.astype(a.dtype), total, grads)
      return added, outs

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    grads, (loss, (sums, gap)) = jax.lax.scan(step, zeros, parts)
    sums = jax.tree.map(jnp.sum, sums)
    return (loss.sum(), (sums, gap.max())), grads

  def update(state: TrainState, rollout: Rollout, reward, rule: SamplingRule):
    C = rollout.prompts.length.shape[0]
    ref_logp, scored = None, reward
    if algorithm.needs_reference:
      ref_logp = reference_logp(state, rollout, rule)
    if algorithm.kl_in_reward:
      scored = reward - algorithm.kl_in_reward * masked.fill(
        rollout.logp - ref_logp, rollout.mask
      )
    advantage, value_target, carry = algorithm.advantage(
      rollout, scored, None, state.algorithm
    )
    trajectory = Trajectory(rollout, scored, advantage, value_target, ref_logp)
    weight = algorithm.aggregate(rollout.mask)
    (loss, (sums, gap)), grads = gradient(
      *state.weights, trajectory, weight, rule
    )
    changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
    tokens = masked.count(rollout.mask)
    metrics = {
      **reward_metrics(reward, rollout.mask, C),
      'surrogate': -loss,
      **{name: value / tokens for name, value in sums.items()},
      'advantage_std': jnp.sqrt(masked.var(advantage, rollout.mask)),
      'grad_norm': optax.tree.norm(grads),
      'sampler_logp_gap': gap,
      **length_metrics(rollout, rule),
    }
    state = state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, changes),
      opt_state=opt_state,
      algorithm=carry,
    )
    return state, metrics, advantage

  return update
