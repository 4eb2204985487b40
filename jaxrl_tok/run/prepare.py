"""Preparation of a run: a task and settings become a Setup, everything that the
run is made of, checked and placed, not yet compiled."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxrl_tok import data, distribution, processes, rewards, sharding
from jaxrl_tok.evaluation import reads_reference
from jaxrl_tok.mesh_spec import AUTO, DEFAULT
from jaxrl_tok.progress import BEST_METRIC
from jaxrl_tok.report.logger import Logger
from jaxrl_tok.run import build, cache, models, placement
from jaxrl_tok.run.build import Own
from jaxrl_tok.run.checks import check_micro_batch
from jaxrl_tok.run.inputs import (
  Rewards,
  check_chat_used,
  completion_length,
  constraint_functions,
  make_pieces,
  message_counts,
  open_task,
  prompt_set,
  renames,
  rewards_of,
  rewards_of_evaluation,
  with_chat_date,
)
from jaxrl_tok.run.networks import make_networks
from jaxrl_tok.run.optimizer import make_optimizer
from jaxrl_tok.run.reward_workers import RewardWorkers, make_reward_workers
from jaxrl_tok.run.settings import Settings
from jaxrl_tok.run.task import Caller, Evaluation, Task
from jaxrl_tok.run.turns import max_length
from jaxrl_tok.run.world import check_played, make_world
from jaxrl_tok.sampler import SamplerConfig
from jaxrl_tok.step.collectors import Scorer
from jaxrl_tok.step.episodes import World
from jaxrl_tok.step.shapes import ProgramConfig

EVAL_BATCH = 512  # held-out prompts at a time
RESERVED = (
  *('prompt', 'answer', 'completion', 'reward', 'tokens', 'advantage'),
  *('turns', 'ended_by', 'numbers'),
)


class EvalSetup(NamedTuple):
  """Evaluation, prepared."""

  evaluation: Evaluation
  rewards: Rewards
  data: data.PromptSet
  num_prompts: int  # at a time
  sampler: SamplerConfig


class Setup(NamedTuple):
  """Run on this machine, before anything is compiled."""

  caller: Caller
  settings: Settings
  own: Own  # values in place of settings
  task_flags: dict  # of the task's own function
  task: Task
  model: Any  # hub.model.Model or models.OwnModel
  trainable: Any
  policy: Any
  critic: Any  # Policy of a separate critic, or None
  dtype: str  # compute dtype
  remats: dict  # {remat: (policy, critic)}, see shapes.Networks
  algorithm: Any
  optimizer: Any
  mesh: Any
  mesh_reason: str  # why --mesh auto chose it; '' where it was given
  rule: Any
  rewards: Rewards
  data: data.PromptSet
  evaluations: list  # of EvalSetup; the first is the task's held-out data
  reward_model: Any
  config: ProgramConfig
  logger: Logger
  pieces: Callable  # see data/pieces.py
  world: World | None = None  # environments of the task
  reward_workers: RewardWorkers | None = None

  def decode(self, ids: list[list[int]], skip_special_tokens=True) -> list:
    return data.decode_all(
      self.model.tokenizer, ids, skip_special_tokens=skip_special_tokens
    )

  def scorer(
    self, found: Rewards, device: Callable | None, training: bool = False
  ) -> Scorer:
    """Scorer of reward functions; `device` is compiled. --credit_split is of
    training alone."""
    how = self.settings.algorithm.credit_split if training else 'potential'
    run, n = self.settings.run, self.data.num_records
    C = self.settings.sampling.num_prompts

    def trainer_state(step: int) -> rewards.TrainerState:
      return rewards.TrainerState(step, run.max_steps, step * C / n if n else 0)

    functions = found.host
    if self.reward_workers is not None:
      functions = self.reward_workers.take(functions)
    host = rewards.make_scorer(
      functions,
      self.decode,
      self.model.end_tokens,
      keep_special_tokens=run.keep_special_tokens,
      reserved=RESERVED,
      on_error=run.reward_on_error,
      warn=self.warn_of_reward,
      pieces=self.pieces,
      split=rewards.make_split(how, run.seed),
    )
    return Scorer(
      host,
      device,
      found.weights,
      trainer_state,
      run.reward_on_error,
      self.warn_of_reward,
    )

  def warn_of_reward(self, name: str, text: str) -> None:
    """Prints the first warning of a reward."""
    self.logger.warn_once(f'reward {name}', text)


def check_devices(settings: Settings, mesh, mini_batches: int) -> None:
  """Refuses batches that the mesh cannot split equally, and compact_levels on
  several devices."""
  sampling, shards = settings.sampling, sharding.row_shards(mesh)
  if sampling.compact_levels and shards > 1:
    raise ValueError(
      f'--compact_levels moves rows, and {shards} devices of data x fsdp hold '
      'them; pass --compact_levels 0'
    )
  C, G = sampling.num_prompts + sampling.replay_groups, sampling.num_generations
  for name in (
    ('num_prompts', 'replay_groups') if sampling.replay_groups else ()
  ):
    count = getattr(sampling, name)
    if count % shards:
      raise ValueError(
        f'--{name} {count} groups cannot be shared equally by the {shards} '
        f'devices of data x fsdp; pass --{name} {-(-count // shards) * shards}'
      )
  micro = settings.model.micro_batch
  micro = 0 if micro == 'auto' else micro
  prompts = micro // G or C // mini_batches
  if prompts % shards:
    name, unit = ('--micro_batch', G) if micro else ('--num_prompts', 1)
    parts = 1 if micro else mini_batches
    fit = -(-prompts // shards) * shards * unit * parts
    raise ValueError(
      f'{name} {prompts * unit * parts} is {prompts} prompts a pass, which the '
      f'{shards} devices of data x fsdp cannot share equally; pass {name} {fit}'
    )


def check_warm_start(task: Task, settings: Settings, model, mesh) -> None:
  """Refuses batches of a supervised start that the mesh cannot split."""
  shards = sharding.row_shards(mesh)
  n = settings.warm_start.warm_start_batch_size
  starts = task.answers and model.directory is None and model.hf_config
  if starts and n % shards:
    raise ValueError(
      f'--warm_start_batch_size {n} prompts cannot be shared equally by the '
      f'{shards} devices of data x fsdp; pass --warm_start_batch_size '
      f'{-(-n // shards) * shards}'
    )


def check_mesh(mesh, task, settings, model, algorithm, world) -> None:
  """Refuses a mesh whose devices cannot share what a run is made of."""
  check_played(world, algorithm, mesh)
  check_devices(settings, mesh, algorithm.passes.mini_batches)
  check_warm_start(task, settings, model, mesh)


def lengths(task: Task, settings: Settings, model, split) -> tuple:
  """Tokens after a prompt: (of a completion or episode, of a turn | None)."""
  T = completion_length(task, settings, model, split)
  return (T, None) if task.environment is None else (max_length(settings, T), T)


def micro_batches(settings: Settings, mini_batches: int) -> int | None:
  """Number of micro-batches of a mini-batch; None: chosen by memory."""
  sampling, wanted = settings.sampling, settings.model.micro_batch
  if wanted == 'auto':
    return None
  check_micro_batch(settings, mini_batches)
  C = sampling.num_prompts + sampling.replay_groups
  rows = C * sampling.num_generations // mini_batches
  return rows // wanted if wanted else 1


def program_config(
  settings: Settings,
  model,
  mini_batches: int,
  T: int,
  turn_length: int | None = None,
) -> ProgramConfig:
  """Choices that the run's programs are compiled for. turn_length: tokens of a
  turn, where completions are episodes."""
  s = settings.sampling
  return ProgramConfig(
    num_prompts=s.num_prompts,
    samples_per_prompt=s.num_generations,
    max_completion_length=T,
    turn_length=turn_length,
    seats=settings.turns.seats,
    pad_token=model.pad_token,
    truncate=s.truncates,
    compact_levels=s.compact_levels,
    micro_batches=micro_batches(settings, mini_batches),
    length_buckets=settings.model.length_buckets,
    steps_per_call=settings.run.steps_per_call,
    replay_groups=s.replay_groups,
    reward_on_error=settings.run.reward_on_error,
  )


def make_rule(settings: Settings, model):
  """Makes the sampling rule of the settings."""
  s = settings.sampling
  return distribution.make_rule(
    model.vocab_size,
    model.end_tokens,
    s.temperature,
    s.top_k,
    s.top_p,
    s.min_p,
    models.forbidden_tokens(model),
    data.stop_automaton(
      model.tokenizer,
      s.stop,
      model.vocab_size,
      skip_special_tokens=not settings.run.keep_special_tokens,
    ),
  )


def check_evaluation(e: Evaluation, taken, steps_per_call: int) -> None:
  """Refuses an evaluation that cannot be, or that says nothing."""
  n = steps_per_call
  rules = (
    (e.name in taken, f'two evaluations are named {e.name}; rename one'),
    (
      e.name == 'train',
      "an evaluation is named train, as the step's own batch; rename it",
    ),
    (
      e.samples < 1,
      f'the evaluation {e.name} has samples={e.samples}; give 1 or more',
    ),
    (
      e.samples > 1 and e.greedy,
      f'the {e.samples} greedy completions of a prompt that the evaluation '
      f'{e.name} asks for are all the same; pass greedy=False, or samples=1',
    ),
    (
      e.every is not None and e.every < 0,
      f'the evaluation {e.name} has every={e.every}; give 0 (at the end) or '
      'more',
    ),
    (
      bool(n and e.every and e.every % n),
      f'every={e.every} of the evaluation {e.name} must be a multiple of '
      f'--steps_per_call {n}',
    ),
  )
  for refused, message in rules:
    if refused:
      raise ValueError(message)


def check_reference(evaluations: list, settings: Settings, algorithm) -> None:
  """Refuses a metric that reads the reference where none is kept."""
  kept = settings.algorithm.log_kl or algorithm.kl is not None
  if kept or models.lora_config(settings) is not None:
    return
  for e in evaluations:
    if name := reads_reference(e.evaluation.metrics):
      raise ValueError(
        f'the metric {name} reads log-probs under the starting policy, which '
        '--no_log_kl does not keep; leave out --no_log_kl, or the metric'
      )


def check_best(evaluations: list, settings: Settings) -> None:
  """Refuses a best evaluation where there is only one, after the last step."""
  run = settings.run
  asked = {
    '--best_metric': run.best_metric,
    '--export best': run.export == 'best',
    '--patience': run.patience,
  }
  flag = next((name for name, value in asked.items() if value), None)
  names = [e.evaluation.name for e in evaluations]
  part = (run.best_metric or BEST_METRIC).split('/')[1]
  chosen = evaluations[names.index(part) if part in names else 0].evaluation
  every = run.eval_every if chosen.every is None else chosen.every
  if flag and not every:
    raise ValueError(
      f'{flag} compares evaluations, and {chosen.name} is made after the last '
      'step only; pass --eval_every 50'
    )


def make_evaluations(
  task: Task, settings: Settings, model, held_out, config: ProgramConfig, mesh
) -> list[EvalSetup]:
  """Prepares the task's held-out evaluation, then its other evaluations."""
  own = Evaluation(
    'held_out',
    held_out,
    task.eval_rewards,
    greedy=task.greedy,
    metrics=task.metrics,
  )
  columns = renames(settings)
  shards, names, found = sharding.row_shards(mesh), set(), []
  for e in (own, *task.evaluations):
    check_evaluation(e, names, settings.run.steps_per_call)
    names.add(e.name)
    by = rewards_of_evaluation(e.rewards, task, settings)
    if e is own and not by.weights:
      raise ValueError(
        'eval_rewards=() leaves held-out data without a reward; leave it out'
      )
    if e is own:
      functions, _ = constraint_functions(task)
      by = by.add({k: f for k, f in functions.items() if k not in by.weights})
    records = data.open_records(
      e.data,
      settings.run.seed,
      None if isinstance(e.data, data.Records) else columns,
    )
    if records.num_records is None:
      raise ValueError(
        f'{records.name} of the evaluation {e.name} is endless; give a finite '
        'number of records, such as a list'
      )
    prompts = prompt_set(
      settings,
      model,
      by,
      records,
      task,
      config.max_completion_length,
      'held-out prompt' if e is own else f'prompt of {e.name}',
    )
    sampler = config.greedy if e.greedy else config.sampler
    sampler = sampler_of(sampler, e.samples)
    count = -(-min(prompts.num_records, EVAL_BATCH) // shards) * shards
    if settings.run.audit and rewards.audit not in e.metrics:
      e = dataclasses.replace(e, metrics=(*e.metrics, rewards.audit))
    found.append(EvalSetup(e, by, prompts, count, sampler))
  return found


def sampler_of(config: SamplerConfig, samples: int) -> SamplerConfig:
  """Sampler's choices for so many completions of each prompt."""
  return dataclasses.replace(
    config, samples_per_prompt=samples, compact_levels=0
  )


def say_notes(logger: Logger, why: str, notes) -> None:
  """Prints why the mesh was chosen, and what is odd about the model."""
  if why:
    logger.message(f'mesh: {why}')
  for note in notes:
    logger.warn(note)


def prepare(
  task: Task, settings: Settings, own: Own, caller: Caller, task_flags: dict
) -> Setup:
  """Prepares a run, with all checks that need the model, data or devices.

  Raises ValueError or OSError, in one line.
  """
  build.check_own(own)
  if not settings.run.dry_run:  # which says how long compiling takes
    cache.keep_programs()
  devices, why = placement.find_devices(settings), ''
  auto = settings.model.mesh == AUTO
  mesh = sharding.make_mesh(DEFAULT if auto else settings.model.mesh, devices)
  found = rewards_of(task, settings)
  tokenizer = task.tokenizer or data.byte_tokenizer
  model = models.make_model(settings, own.policy, tokenizer)
  chat, settings = settings.data, with_chat_date(settings, model.tokenizer)
  split = open_task(task, settings)
  T, turn_length = lengths(task, settings, model, split)
  world = make_world(task, settings, model, T, split.train, split.held_out)
  algorithm = build.make_algorithm(settings, own, T, found.constraints)
  parts = algorithm.passes.mini_batches
  trainable = models.make_trainable(settings, model)
  with jax.set_mesh(mesh):
    networks = make_networks(settings, model, trainable, algorithm)
  optimizer = make_optimizer(settings, own, algorithm)
  if auto:
    made = model, networks, algorithm, optimizer, trainable
    mesh, why = placement.choose(settings, task, made, devices, T)
  check_mesh(mesh, task, settings, model, algorithm, world)
  train = prompt_set(
    settings, model, found, split.train, task, T, 'training prompt'
  )
  config = program_config(settings, model, parts, T, turn_length)
  evaluations = make_evaluations(
    task, settings, model, split.held_out, config, mesh
  )
  check_best(evaluations, settings)
  check_reference(evaluations, settings, algorithm)
  check_chat_used(chat, [train, *(e.data for e in evaluations)])
  P = max(train.buckets[-1], *(e.data.buckets[-1] for e in evaluations))
  models.check_context(model, P, T)
  reward_model = models.make_reward_model(settings, model, P, T)
  logger, held_out = Logger(is_main=processes.is_main()), evaluations[0].data
  message_counts(logger, settings.run.held_out, split, train, held_out)
  say_notes(logger, why, model.notes)
  return Setup(
    caller,
    settings,
    own,
    task_flags,
    task,
    model,
    trainable,
    *networks,
    algorithm,
    optimizer,
    mesh,
    why,
    placement.replicated(settings, mesh, make_rule(settings, model)),
    found,
    train,
    evaluations,
    reward_model,
    config,
    logger,
    make_pieces(settings, model, found, *(e.rewards for e in evaluations)),
    world,
    make_reward_workers(settings, found, *(e.rewards for e in evaluations)),
  )
