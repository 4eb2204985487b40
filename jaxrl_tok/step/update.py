"""Update of the parameters from a scored rollout, in one jit.

1. `make_inputs`: log-probs of the reference and of the policy at the start,
   values, the KL in the reward: the inputs of the algorithm.
2. algorithm.advantage: rewards -> advantage, over the whole batch.
3. passes.py: optimizer steps on mini-batches' gradients; one that is not
   finite is skipped.
4. Carries move: the KL's coefficient, an EMA, the reference; then metrics.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_tok import finite, masked
from jaxrl_tok.policy import check_array, check_prompts, evaluate, values
from jaxrl_tok.step.groups import merge_rows, split_groups
from jaxrl_tok.step.guard import Step
from jaxrl_tok.step.metrics import (
  length_metrics,
  reward_metrics,
  value_metrics,
)
from jaxrl_tok.step.optimizer import rate_metrics
from jaxrl_tok.step.passes import Fixed, make_gradient, make_passes
from jaxrl_tok.step.state import carries_of
from jaxrl_tok.types import (
  AdvantageInputs,
  Algorithm,
  Passes,
  Policy,
  Rollout,
  SamplingRule,
  Scored,
  TrainState,
  Trajectory,
)

# metrics for train.py alone, see skipped_metrics
IN_A_ROW, FIRST = 'nonfinite_in_a_row', 'nonfinite_first'


def kl_penalty(rollout: Rollout, ref_logp, kl_coef) -> jax.Array:
  """Penalty of the KL in the reward, kl_coef (l_roll - l_ref) [B, T]: the
  reverse KL, with credit for future divergence."""
  return kl_coef * masked.fill(rollout.logp - ref_logp, rollout.mask)


class Networks(NamedTuple):
  """Forward passes over a batch, a micro-batch at a time."""

  logp: Callable  # (arguments of merge_params, Rollout, rule) -> [B, T]
  values: Callable  # (trained, fixed, Rollout) -> [B, T + 1]


def make_networks(
  policy: Policy, parts: int, logits_chunk: int | None, critic: Policy | None
) -> Networks:
  """Makes the log-probs and values of rollouts, in `parts` micro-batches."""

  def in_parts(function, rollout: Rollout):
    C = rollout.prompts.length.shape[0]
    out = jax.lax.map(function, split_groups(rollout, parts, C))
    by_prompt = out.reshape(parts, C // parts, -1, out.shape[-1])
    return merge_rows(by_prompt).reshape(-1, out.shape[-1])

  def logp_of(policy_params: tuple, rollout: Rollout, rule: SamplingRule):
    params = policy.merge_params(*policy_params)

    def logp(part):
      return evaluate(policy, params, part, rule, logits_chunk).logp

    return in_parts(logp, rollout)

  def values_of(trained: tuple, fixed, rollout: Rollout):
    params, critic_params = trained
    network = critic
    if critic is None:
      network, critic_params = policy, policy.merge_params(params, fixed)
    return in_parts(lambda part: values(network, critic_params, part), rollout)

  return Networks(logp_of, values_of)


def make_inputs(
  networks: Networks, algorithm: Algorithm, old_logp_of: str
) -> Callable:
  """Returns inputs(state, Scored, rule) -> (AdvantageInputs, ref_logp,
  old_logp); old_logp_of: see Passes.old_logp."""
  kl = algorithm.kl

  def inputs(state: TrainState, scored: Scored, rule: SamplingRule):
    rollout = scored.rollout
    ref_logp = old_logp = log_change = value = penalty = None
    if kl is not None:
      ref_logp = networks.logp(state.reference_params, rollout, rule)
    if kl is not None and kl.form == 'reward':
      penalty = kl_penalty(rollout, ref_logp, state.carries['kl_coef'])
    if old_logp_of == 'recomputed':
      old_logp = networks.logp(state.policy_params, rollout, rule)
      log_change = masked.fill(old_logp - rollout.logp, rollout.mask)
    elif old_logp_of == 'sampler':
      old_logp = rollout.logp
    if algorithm.value_loss is not None:
      value = networks.values(state.trained, state.fixed, rollout)
    found = AdvantageInputs(scored, value, log_change, penalty)
    return found, ref_logp, old_logp

  return inputs


def check_scored(scored: Scored) -> None:
  """Raises ValueError, in one line, unless shapes, dtypes and names are those
  of types.py."""
  rollout = scored.rollout
  check_prompts(rollout.prompts)
  check_array('rollout.tokens', rollout.tokens, int, B=None, T=None)
  B, T = rollout.tokens.shape
  C = rollout.prompts.tokens.shape[0]
  if B % C:
    raise ValueError(
      f'rollout.tokens has {B} rows, which its {C} prompts do not divide'
    )
  check_array('rollout.mask', rollout.mask, bool, B=B, T=T)
  check_array('rollout.logp', rollout.logp, float, B=B, T=T)
  if rollout.num_kept is not None:
    check_array('rollout.num_kept', rollout.num_kept, int, B=B, T=T)
  check_array('rollout.ended', rollout.ended, bool, B=B)
  check_array('rollout.version', rollout.version, int, B=B)
  parts = scored.rewards, scored.applies, scored.weights
  named = [', '.join(sorted(part)) or 'none' for part in parts]
  if len(set(named)) > 1 or not scored.rewards:
    raise ValueError(
      'Scored has rewards {}, applies {} and weights {}; give all three the '
      'names of the rewards, one at least'.format(*named)
    )
  for name in scored.rewards:
    check_array(f'reward {name}', scored.rewards[name], float, B=B, T=T)
    check_array(f'applies of {name}', scored.applies[name], bool, B=B)
    check_array(f'the weight of {name}', scored.weights[name], float)
  if scored.greedy is not None:
    check_array('greedy.reward', scored.greedy.reward, float, C=C, T=T)
    check_array('greedy.mask', scored.greedy.mask, bool, C=C, T=T)


def make_update(
  policy: Policy,
  algorithm: Algorithm,
  optimizer: optax.GradientTransformation,
  micro_batches: int = 1,
  logits_chunk: int | None = None,
  critic: Policy | None = None,
  passes: Passes | None = None,
) -> Callable:
  """Returns update(state, Scored, rule) -> (state, metrics, advantage [B, T]),
  pure; jit it with the state donated.

  Args:
    micro_batches: parts that a mini-batch's gradient is computed in.
    logits_chunk: see policy.evaluate.
    critic: network of a separate critic; None: a head on the policy, or none.
    passes: epochs and mini-batches; None: those of the algorithm.
  """
  passes = passes or algorithm.passes
  networks = make_networks(
    policy, micro_batches * passes.mini_batches, logits_chunk, critic
  )
  inputs_of = make_inputs(networks, algorithm, passes.old_logp)
  run_passes = make_passes(
    make_gradient(policy, algorithm, micro_batches, logits_chunk, critic),
    optimizer,
    passes,
  )

  def update(state: TrainState, scored: Scored, rule: SamplingRule):
    check_scored(scored)
    rollout = scored.rollout
    inputs, ref_logp, old_logp = inputs_of(state, scored, rule)
    credit = algorithm.advantage(inputs, state.carries)
    learns, value = credit.rows(inputs.valid), inputs.value
    mask = inputs.mask & learns[:, None]
    trajectory = Trajectory(
      rollout._replace(mask=mask),
      inputs.reward,
      credit.advantage,
      credit.value_target,
      ref_logp,
      old_logp,
      None if value is None else masked.fill(value[:, :-1], mask),
    )
    kl_coef = state.carries.get('kl_coef', jnp.float32(0))
    fixed = Fixed(state.fixed, kl_coef, rule)
    moved, metrics, steps = run_passes(state, fixed, trajectory, inputs.valid)
    metrics = {
      **reward_metrics(scored),
      **metrics,
      **credit.metrics,
      'advantage_std': jnp.sqrt(masked.var(credit.advantage, mask)),
      **length_metrics(rollout),
      **rate_metrics(state.opt_state, state.step >= passes.critic_warmup_steps),
    }
    if value is not None:
      metrics |= value_metrics(trajectory.old_value, credit.value_target, mask)
    if algorithm.kl is not None:
      metrics['kl_coef'] = kl_coef
    state = after_update(algorithm, state, moved, metrics, learns.sum(), steps)
    metrics |= skipped_metrics(state, steps)
    return state, metrics, credit.advantage

  return update


def after_update(
  algorithm: Algorithm,
  state: TrainState,
  moved: tuple,
  metrics: dict,
  rows: jax.Array,
  steps: Step,
) -> TrainState:
  """State of the next step: parameters after the passes, carries moved.

  An update whose optimizer steps were all skipped leaves the carries as they
  are, and is counted in `skipped`. A carry whose new value would not be finite
  keeps its old one.

  moved: ((params, critic), opt_state).
  rows: number of rows learnt from, int [], a metric for the carries.
  steps: see make_passes.
  """
  (params, critic), opt_state = moved
  lost = jnp.any(steps.skipped) & ~jnp.any(steps.made)
  state = state.replace(
    step=state.step + 1,
    params=params,
    critic=critic,
    opt_state=opt_state,
    skipped=jnp.where(lost, state.skipped + 1, 0),
  )
  metrics, carries = metrics | {'rows': rows}, {}
  for name, carry in carries_of(algorithm, state.frozen).items():
    old = state.carries[name]
    new = carry.after(old, state, metrics)
    carries[name] = keep_finite(old, new, ~lost)
  return state.replace(carries=carries)


def keep_finite(old, new, wanted: jax.Array):
  """Returns `new`, a carry's value, where it is wanted and all of it is
  finite, else `old`. Leaves that were passed on are not looked at."""
  leaves = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
  fine = wanted & finite.all_finite([n for o, n in leaves if n is not o])
  return jax.tree.map(
    lambda o, n: o if n is o else jnp.where(fine, n, o), old, new
  )


def skipped_metrics(state: TrainState, steps: Step) -> dict:
  """Metrics of what was skipped: `nonfinite_updates`, optimizer steps of this
  update; IN_A_ROW, updates in a row without any other; FIRST, the index of the
  first such tensor, 0 without one."""
  some = jnp.argmax(steps.skipped)
  return {
    'nonfinite_updates': jnp.sum(steps.skipped.astype(jnp.float32)),
    IN_A_ROW: state.skipped,
    FIRST: jnp.where(steps.skipped[some], steps.first[some], 0),
  }


def shortened(update: Callable, length: int) -> Callable:
  """Update that computes the first `length` columns only, of rollouts, and
  greedy completions, without a chosen token after them; its advantage has all
  T."""

  def run(state: TrainState, scored: Scored, rule: SamplingRule):
    rollout = scored.rollout
    T = rollout.tokens.shape[1]

    def cut(x):
      return x if x is None else x[:, :length]

    short = rollout._replace(
      tokens=cut(rollout.tokens),
      mask=cut(rollout.mask),
      logp=cut(rollout.logp),
      num_kept=cut(rollout.num_kept),
      turn=cut(rollout.turn),
      seat=cut(rollout.seat),
    )
    scored = scored._replace(
      rollout=short,
      rewards={name: cut(x) for name, x in scored.rewards.items()},
      greedy=jax.tree.map(cut, scored.greedy),
    )
    state, metrics, advantage = update(state, scored, rule)
    rest = ((0, 0), (0, T - length))
    return state, metrics, jnp.pad(advantage, rest)

  return run


def columns_needed(*masks) -> int:
  """Index of the last column with a chosen token of any row of masks [., T],
  + 1; at least 1. Rows with holes (observations between turns) count to their
  last turn."""
  chosen = (mask.any(axis=0).nonzero()[0] for mask in masks)
  return max(int(columns[-1]) + 1 if len(columns) else 1 for columns in chosen)
