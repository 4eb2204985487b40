"""Programs of a run: a step's functions, compiled before the first step.

Every shape that a run can meet is known beforehand: the prompt lengths of the
data's buckets, and the completion lengths of updates. Training itself compiles
nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxrl_tok import processes
from jaxrl_tok.data import PromptSet, batch_at
from jaxrl_tok.sampler import SamplerConfig
from jaxrl_tok.sharding import put_replicated
from jaxrl_tok.step import memory
from jaxrl_tok.step.compile import QUICKLY, Job, compile_all
from jaxrl_tok.step.device_steps import StepBatch, Table, make_device_steps
from jaxrl_tok.step.mismatch import make_mismatch
from jaxrl_tok.step.reference import make_reference_kl, make_reference_logp
from jaxrl_tok.step.shapes import (
  EvaluationShape,
  Networks,
  ProgramConfig,
  Shapes,
  completion_lengths,
  mesh_shapes,
  rollout_kind,
  rollout_size,
)
from jaxrl_tok.step.turn_programs import (
  bound_turns,
  episode_rollout,
  make_sampling,
  turn_jobs,
)
from jaxrl_tok.step.update import columns_needed, make_update, shortened
from jaxrl_tok.types import (
  Prompts,
  Rollout,
  Scored,
  TrainState,
)


class Programs(NamedTuple):
  """Compiled functions; arrays in, arrays out."""

  sample: Callable | None  # (state, key, Prompts) -> Rollout
  greedy: Callable | None  # alike, one greedy completion of each prompt
  device_score: Callable | None  # (Rollout, columns) -> (rewards, applies)
  update: Callable  # (state, batch.scored) -> (state, metrics, StepBatch)
  evaluations: dict  # {name: (state, key, Prompts) -> Rollout}
  evaluation_scores: dict  # {name: (Rollout, columns) -> (rewards, applies)}
  mismatch: Callable  # (state, an evaluation's Rollout) -> {name: float32 []}
  reference_kl: Callable | None  # (state, Rollout) -> nats a token
  # (state, an evaluation's Rollout) -> float32 [B, T]; None: of no evaluation
  reference_logp: Callable | None
  # sampler -> (state, key) -> episodes.TurnPrograms; None: there are no turns
  turns: Callable | None = None


class _Run(NamedTuple):
  """Arguments that the functions below share."""

  networks: Networks
  config: ProgramConfig
  state: TrainState  # structs
  shapes: Shapes
  columns: dict  # structs of what device rewards read, [C, ...]

  def sampled(self, count: int, length: int, config: SamplerConfig):
    """Returns (job of a sampler, structs of its Rollout)."""
    sample = make_sampling(self.networks.policy, config)
    prompts = self.shapes.prompts(count, length)
    version = self.state.step
    args = (
      self.state.policy_params,
      self.state.key,
      prompts,
      self.networks.rule,
      version,
    )
    found = jax.eval_shape(sample, *args)
    rollout = jax.tree.map(
      lambda x: self.shapes.array(*x.shape, dtype=x.dtype), found
    )
    job = Job([jax.jit(sample, out_shardings=self.shapes.rows)], args)
    return job, rollout

  def rollout(self, count: int, length: int, sampler: SamplerConfig):
    """Structs of the Rollout that an update or a measure of it is given."""
    if self.config.turn_length is None:
      return self.sampled(count, length, sampler)[1]
    return episode_rollout(
      self.shapes,
      *(count, length, sampler, self.config.max_completion_length),
      self.config.seats,
    )


class Way(NamedTuple):
  """Way to compute a gradient."""

  run: _Run  # with networks of this remat
  remat: str
  parts: int  # micro-batches

  @property
  def label(self) -> str:
    return f'micro-batches: {self.parts}, remat: {self.remat}'


def gradients(run: _Run, rollout: Rollout, num_prompts: int) -> list[Way]:
  """Ways to compute gradients, the fastest first: those whose arrays, by
  shapes, a device holds beside the state."""
  n, config = run.networks, run.config
  networks = {n.remat: n} | {
    name: n._replace(policy=policy, critic=critic)
    for name, (policy, critic) in n.remats.items()
  }
  if config.micro_batches is not None and not n.remats:
    return [Way(run, n.remat, config.micro_batches)]
  found = memory.ways(
    {name: each.policy for name, each in networks.items()},
    run.state,
    rollout,
    n.rule,
    num_prompts // n.algorithm.passes.mini_batches,
    run.shapes.rows.mesh,
    config.micro_batches,
    config.memory,
  )
  return [
    Way(run._replace(networks=networks[remat]), remat, parts)
    for remat, parts in found
  ]


def update_function(run: _Run, micro_batches: int, length: int | None = None):
  """Returns update(state, Scored, rule) with a number of micro-batches, for
  rollouts that end by column `length`."""
  n = run.networks
  update = make_update(
    n.policy,
    n.algorithm,
    n.optimizer,
    micro_batches,
    run.config.logits_chunk,
    n.critic,
  )
  whole = length in (None, run.config.max_completion_length)
  return update if whole else shortened(update, length)


def sampling_jobs(run: _Run, P: int) -> dict:
  """Jobs {name: Job} of rollouts by prompts of length P, and of their rewards
  on the device."""
  n, config, jobs, rollouts = run.networks, run.config, {}, {}
  kinds = {'sample': config.sampler}
  if n.algorithm.greedy:
    kinds['greedy'] = config.greedy
  for name, sampler in kinds.items():
    jobs[name, P], rollout = run.sampled(config.num_prompts, P, sampler)
    rollouts[rollout_kind(rollout)] = rollout
  if n.device_score is not None:
    score, params = n.device_score
    job = jax.jit(score, out_shardings=run.shapes.rows)
    for kind, rollout in rollouts.items():
      args = params, rollout, run.columns
      jobs['device_score', *kind] = Job([job], args)
  return jobs


def mismatch_inputs(rollout: Rollout) -> Rollout:
  """Rollout without what a mismatch does not read, so that evaluations of one
  size share a program."""
  return rollout._replace(num_kept=None)


def mismatch_job(run: _Run, rollout: Rollout) -> dict:
  """Job {name: Job} that measures sampler against gradient."""
  job = jax.jit(
    make_mismatch(run.networks.policy), out_shardings=run.shapes.whole
  )
  args = run.state.policy_params, mismatch_inputs(rollout), run.networks.rule
  return {('mismatch', *rollout_size(rollout)): Job([job], args, QUICKLY)}


def reference_kl_job(run: _Run, rollout: Rollout) -> dict:
  """Job {name: Job} that measures the KL to the reference, where asked for."""
  n, config = run.networks, run.config
  if not config.reference_kl:
    return {}
  measure = make_reference_kl(n.policy, config.logits_chunk)
  job = jax.jit(measure, out_shardings=run.shapes.whole)
  args = run.state.reference_params, rollout, n.rule
  return {('reference_kl', rollout.prompts.tokens.shape[1]): Job([job], args)}


def reference_logp_job(run: _Run, rollout: Rollout) -> dict:
  """Job {name: Job} of log-probs under the reference, for an evaluation."""
  measure = make_reference_logp(run.networks.policy, run.config.logits_chunk)
  job = jax.jit(measure, out_shardings=run.shapes.rows)
  rollout = mismatch_inputs(rollout)
  args = run.state.reference_params, rollout, run.networks.rule
  return {('reference_logp', *rollout_size(rollout)): Job([job], args)}


def update_jobs(run: _Run, P: int) -> dict:
  """Jobs {name: Job} of updates by batches whose prompts are of length P."""
  n, config, shapes, jobs = run.networks, run.config, run.shapes, {}
  C = config.num_prompts + config.replay_groups
  rollout = run.rollout(C, P, config.sampler)
  jobs |= reference_kl_job(run, rollout)
  scored = shapes.scored(rollout, list(n.weights), n.algorithm.greedy, C)
  # the state comes out placed as it went in: no compilation at step 2
  placed = jax.tree.map(lambda x: x.sharding, run.state)
  for length in completion_lengths(
    config.max_completion_length, config.length_buckets
  ):
    ways = gradients(run, rollout, C)
    functions = [
      jax.jit(
        update_function(way.run, way.parts, length),
        donate_argnums=0,
        out_shardings=(placed, shapes.whole, shapes.rows),
      )
      for way in ways
    ]
    named = [(way.label, way.parts) for way in ways]
    args = run.state, scored, n.rule
    jobs['update', P, length] = Job(functions, args, ways=named)
  return jobs


def step_jobs(
  networks: Networks, config: ProgramConfig, state: TrainState, P: int
) -> dict:
  """Jobs {name: Job} of a step with prompts of P tokens, without rewards; of
  turns the largest one, which comes last. Must run under jax.set_mesh; state:
  structs with their shardings."""
  networks = networks._replace(device_score=None)
  run = _Run(networks, config, state, mesh_shapes(), {})
  config = dataclasses.replace(config, length_buckets=1)
  run = run._replace(config=config)
  if config.turn_length is None:
    jobs = sampling_jobs(run, P)
  else:
    rows = config.num_prompts * config.samples_per_prompt
    jobs = turn_jobs(run, rows, P, config.sampler)
  jobs |= update_jobs(run, P)
  return {key[0]: job for key, job in jobs.items()}


def many_steps_job(run: _Run, table: Table) -> Job:
  """Job of steps_per_call steps in one program."""
  n, config, shapes = run.networks, run.config, run.shapes
  C, (rows, P) = config.num_prompts, table.tokens.shape
  _, rollout = run.sampled(C, P, config.sampler)
  score, params = n.device_score
  best = make_sampling(n.policy, config.greedy) if n.algorithm.greedy else None
  sample = make_sampling(n.policy, config.sampler)
  steps = [
    make_device_steps(
      sample,
      score,
      update_function(way.run, way.parts),
      n.weights,
      best,
      config.reward_on_error,
    )
    for way in gradients(run, rollout, C)
  ]
  structs = jax.tree.map(lambda x: shapes.like(x, rows, shapes.whole), table)
  index = shapes.array(config.steps_per_call, C, sharding=shapes.whole)
  args = run.state, structs, index, n.rule, params
  last = jax.eval_shape(steps[0], *args)[2]
  placed = (
    jax.tree.map(lambda x: x.sharding, run.state),
    shapes.whole,
    jax.tree.map(lambda x: shapes.rows if x.ndim else shapes.whole, last),
  )
  functions = [
    jax.jit(f, donate_argnums=0, out_shardings=placed) for f in steps
  ]
  return Job(functions, args)


def compile_programs(
  networks: Networks,
  config: ProgramConfig,
  state: TrainState,
  data: PromptSet,
  evaluations: dict[str, EvaluationShape],
) -> Programs:
  """Compiles a run's programs in parallel; nothing is compiled afterwards.

  state: arrays, or ShapeDtypeStructs with their shardings.

  Must run under jax.set_mesh.
  """
  shapes, C = mesh_shapes(), config.num_prompts
  _, _, columns = batch_at(data, 0, 0, C)
  columns = {k: shapes.like(v, C) for k, v in columns.items()}
  run, jobs = _Run(networks, config, state, shapes, columns), {}
  for name, e in evaluations.items():
    size = e.num_prompts, e.prompt_length, e.sampler
    if config.turn_length is None:
      jobs['evaluation', name], rollout = run.sampled(*size)
    else:
      rollout = run.rollout(*size)
      rows = e.num_prompts * e.sampler.samples_per_prompt
      jobs |= turn_jobs(run, rows, e.prompt_length, e.sampler)
    jobs |= mismatch_job(run, rollout)
    if e.reference:
      jobs |= reference_logp_job(run, rollout)
    if e.device_score is not None:
      score, params = e.device_score
      columns = {k: shapes.like(v, e.num_prompts) for k, v in e.columns.items()}
      job = jax.jit(score, out_shardings=shapes.rows)
      jobs['evaluation_score', name] = Job([job], (params, rollout, columns))
  table = None
  if config.steps_per_call:
    table = Table(*data.table())
    jobs['steps'] = many_steps_job(run, table)
    _, rollout = run.sampled(C, table.tokens.shape[1], config.sampler)
    jobs |= reference_kl_job(run, rollout)
  else:
    if config.turn_length is not None:
      rows = C * config.samples_per_prompt
      jobs |= turn_jobs(run, rows, data.buckets[-1], config.sampler)
    for P in data.buckets if config.turn_length is None else ():
      jobs |= sampling_jobs(run, P)
    # a replay buffer holds prompts of one length
    for P in data.buckets[-1:] if config.replay_groups else data.buckets:
      jobs |= update_jobs(run, P)
  params = {
    name: e.device_score[1] for name, e in evaluations.items() if e.device_score
  }
  return bind(networks, compile_all(jobs), table, params)


def bind(
  n: Networks, built: dict, table: Table | None, evaluation_params: dict
) -> Programs:
  """Binds the compiled programs' constants: rule, reward parameters, table."""

  def by_name(name):
    return {key[1:]: f for key, f in built.items() if key[0] == name}

  def sampling(compiled):
    if not compiled:
      return None

    def run(state: TrainState, key, prompts: Prompts) -> Rollout:
      sample = compiled[(prompts.tokens.shape[1],)]
      return sample(state.policy_params, key, prompts, n.rule, state.step)

    return run

  def evaluation(compiled):
    return lambda state, key, prompts: compiled(
      state.policy_params, key, prompts, n.rule, state.step
    )

  scores = by_name('device_score')

  def device_score(rollout: Rollout, columns: dict):
    compiled = scores[rollout_kind(rollout)]
    return compiled(n.device_score[1], rollout, columns)

  mismatches = by_name('mismatch')

  def mismatch(state: TrainState, rollout: Rollout) -> dict:
    measure = mismatches[rollout_size(rollout)]
    return measure(state.policy_params, mismatch_inputs(rollout), n.rule)

  measures = by_name('reference_kl')

  def reference_kl(state: TrainState, rollout: Rollout):
    measure = measures[(rollout.prompts.tokens.shape[1],)]
    return measure(state.reference_params, rollout, n.rule)

  logps = by_name('reference_logp')

  def reference_logp(state: TrainState, rollout: Rollout):
    measure = logps[rollout_size(rollout)]
    return measure(state.reference_params, mismatch_inputs(rollout), n.rule)

  evaluations = {
    name: evaluation(f) for (name,), f in by_name('evaluation').items()
  }
  evaluation_scores = {
    name: functools.partial(f, evaluation_params[name])
    for (name,), f in by_name('evaluation_score').items()
  }
  if table is not None:
    update = bound_steps(n, built['steps'], table)
  else:
    update = bound_update(n, by_name('update'))
  return Programs(
    sampling(by_name('sample')),
    sampling(by_name('greedy')),
    device_score if scores else None,
    update,
    evaluations,
    evaluation_scores,
    mismatch,
    reference_kl if measures else None,
    reference_logp if logps else None,
    functools.partial(bound_turns, n, built) if by_name('turn') else None,
  )


def bound_update(n: Networks, updates: dict) -> Callable:
  """Returns update(state, Scored), by the program with the fewest columns that
  hold every chosen token, those of greedy completions included."""

  def update(state: TrainState, scored: Scored):
    rollout, greedy = scored.rollout, scored.greedy
    masks = rollout.mask, *(() if greedy is None else (greedy.mask,))
    needed = columns_needed(*processes.local(masks))
    if len(updates) > 1:
      needed = processes.largest(needed)
    P = rollout.prompts.tokens.shape[1]
    length = min(T for p, T in updates if p == P and needed <= T)
    state, metrics, advantage = updates[P, length](state, scored, n.rule)
    return state, metrics, StepBatch(scored, advantage)

  return update


def bound_steps(n: Networks, compiled: Callable, table: Table) -> Callable:
  """Returns update(state, index [n, C]): n steps on rows of the table."""
  placed = put_replicated(jax.sharding.get_mesh(), table)

  def update(state: TrainState, index):
    with jax.transfer_guard('disallow'):  # nothing comes back in between
      return compiled(state, placed, index, n.rule, n.device_score[1])

  return update
