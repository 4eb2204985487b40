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
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_tok import processes
from jaxrl_tok.data import PromptSet, batch_at
from jaxrl_tok.sampler import SamplerConfig
from jaxrl_tok.sharding import ROWS, put_replicated, row_shards
from jaxrl_tok.step import memory
from jaxrl_tok.step.compile import QUICKLY, Job, compile_all
from jaxrl_tok.step.device_steps import StepBatch, Table, make_device_steps
from jaxrl_tok.step.mismatch import make_mismatch
from jaxrl_tok.step.reference import make_reference_kl, make_reference_logp
from jaxrl_tok.step.turn_programs import (
  bound_turn,
  episode_rollout,
  make_sampling,
  turn_jobs,
)
from jaxrl_tok.step.update import columns_needed, make_update, shortened
from jaxrl_tok.types import (
  Algorithm,
  Greedy,
  Policy,
  Prompts,
  Rollout,
  SamplingRule,
  Scored,
  TrainState,
)

SHORTEST = 32  # tokens; less is computed faster than compiled


@dataclasses.dataclass(frozen=True)
class ProgramConfig:
  """Sizes and choices that programs are compiled for."""

  num_prompts: int = 32  # C
  samples_per_prompt: int = 16  # G
  max_completion_length: int = 32  # T
  pad_token: int = 0
  truncate: bool = False
  compact_levels: int = 0
  micro_batches: int | None = 1  # passes of a gradient; None: see memory.py
  length_buckets: int = 1  # see completion_lengths
  logits_chunk: int | None = None
  steps_per_call: int = 0  # steps of one program; 0: step by step
  replay_groups: int = 0  # groups of earlier steps in a batch
  reference_kl: bool = False  # measured for the log
  reward_on_error: str = 'raise'  # of rewards on the device
  turn_length: int | None = None  # tokens of a turn; None: there are no turns
  seats: int = 1  # that the policy plays

  @property
  def sampler(self) -> SamplerConfig:
    return SamplerConfig(
      self.samples_per_prompt,
      self.turn_length or self.max_completion_length,
      self.pad_token,
      truncate=self.truncate,
      compact_levels=self.compact_levels,
    )

  @property
  def greedy(self) -> SamplerConfig:
    return dataclasses.replace(
      self.sampler, samples_per_prompt=1, greedy=True, truncate=False
    )


class Networks(NamedTuple):
  """Functions that programs are made of."""

  policy: Policy
  algorithm: Algorithm
  optimizer: object  # optax
  rule: SamplingRule
  critic: Policy | None = None
  # (function of device_rewards.make_device_scorer, its params), None: no
  # reward on the device
  device_score: tuple | None = None
  weights: dict = {}  # noqa: RUF012  {reward: float}, host and device


class EvaluationShape(NamedTuple):
  """Sizes of an evaluation's program."""

  num_prompts: int  # at a time
  prompt_length: int
  sampler: SamplerConfig
  # (function of make_device_scorer, its params); None: host rewards alone
  device_score: tuple | None = None
  columns: dict = {}  # noqa: RUF012  arrays [n, ...] that those rewards read
  reference: bool = False  # log-probs under the reference are measured


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
  # sampler -> (state, key, rows, number of the turn, Prompts) -> Rollout; None:
  # there are no turns
  turn: Callable | None = None


def completion_lengths(T: int, count: int) -> list[int]:
  """Lengths that an update is compiled for, ascending: T and each half the one
  before, `count` at most, none below SHORTEST."""
  found = [T]
  while len(found) < count and found[-1] >= 2 * SHORTEST:
    found.append(-(-found[-1] // 2))
  return found[::-1]


class Shapes(NamedTuple):
  """ShapeDtypeStructs of a run's arrays, with their shardings."""

  rows: NamedSharding
  whole: NamedSharding

  def array(self, *shape, dtype=np.int32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or self.rows)

  def like(self, x, count: int, sharding=None):
    """Struct of `count` rows of x."""
    return self.array(count, *x.shape[1:], dtype=x.dtype, sharding=sharding)

  def prompts(self, count: int, length: int, inputs=()) -> Prompts:
    inputs = {k: self.like(v, count) for k, v in dict(inputs).items()}
    return Prompts(self.array(count, length), self.array(count), inputs)

  def scored(self, rollout: Rollout, names, greedy: bool, C: int) -> Scored:
    B, T = rollout.tokens.shape
    f32 = np.float32
    return Scored(
      rollout,
      {n: self.array(B, T, dtype=f32) for n in names},
      {n: self.array(B, dtype=bool) for n in names},
      {n: self.array(dtype=f32, sharding=self.whole) for n in names},
      Greedy(self.array(C, T, dtype=f32), self.array(C, T, dtype=bool))
      if greedy
      else None,
    )


def mesh_shapes() -> Shapes:
  """Shapes on the mesh of jax.set_mesh."""
  mesh = jax.sharding.get_mesh()
  return Shapes(
    NamedSharding(mesh, PartitionSpec(ROWS)),
    NamedSharding(mesh, PartitionSpec()),
  )


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


def divisions(run: _Run, rollout: Rollout, num_prompts: int) -> list[int]:
  """Numbers of micro-batches to try, the fewest first."""
  n, wanted = run.networks, run.config.micro_batches
  if wanted is not None:
    return [wanted]
  mesh = run.shapes.rows.mesh
  shards, device = row_shards(mesh), mesh.local_devices[0]
  each = memory.bytes_a_prompt(
    n.policy, run.state.policy_params, rollout, n.rule, shards
  )
  most = memory.budget(device, run.state, shards)
  parts = n.algorithm.passes.mini_batches
  return memory.divisions(num_prompts // parts, each, most, shards)


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


def rollout_size(rollout: Rollout) -> tuple:
  """Shapes of rollouts that one program takes: (C, P, B, T)."""
  return *rollout.prompts.tokens.shape, *rollout.tokens.shape


def rollout_kind(rollout: Rollout) -> tuple:
  """Shape of rollouts that one program takes: (P, B, has num_kept)."""
  P, B = rollout.prompts.tokens.shape[1], rollout.tokens.shape[0]
  return P, B, rollout.num_kept is not None


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
    functions = [
      jax.jit(
        update_function(run, parts, length),
        donate_argnums=0,
        out_shardings=(placed, shapes.whole, shapes.rows),
      )
      for parts in divisions(run, rollout, C)
    ]
    jobs['update', P, length] = Job(functions, (run.state, scored, n.rule))
  return jobs


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
      update_function(run, parts),
      n.weights,
      best,
      config.reward_on_error,
    )
    for parts in divisions(run, rollout, C)
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

  turns = by_name('turn')

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
    functools.partial(bound_turn, n, turns) if turns else None,
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
