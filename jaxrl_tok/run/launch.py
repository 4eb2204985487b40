"""From an experiment to a finished run: what all experiments share.

1. `prepare`  devices, mesh, model, prompts: every check, no compilation.
2. `begin`    state and progress: resumed, warm-started, loaded or random; the
   step's functions are compiled meanwhile.
3. look at held-out prompts, train, look again.
4. `finish`   export, report, a table of samples.
"""

import concurrent.futures
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import rich.table
import rich.text
import yaml

from jaxrl_tok import (
  checkpoint,
  data,
  distribution,
  evaluation,
  rewards,
  sharding,
  train,
)
from jaxrl_tok.hub import directory as hf
from jaxrl_tok.hub import lora
from jaxrl_tok.hub.weights import fingerprint
from jaxrl_tok.models import kernels
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.report import page as report
from jaxrl_tok.report.logger import Logger, duration
from jaxrl_tok.run import build, cache, compat, models, record
from jaxrl_tok.run import settings as flag_layer
from jaxrl_tok.sampler import SamplerConfig
from jaxrl_tok.step import programs as step_parts

SHOWN = 20  # held-out completions in samples.jsonl


class Experiment(NamedTuple):
  """What makes an experiment itself."""

  name: str
  flags: Any  # has run, model, size, sampling, algorithm
  tokenizer: Callable  # () -> tokenizer, when no --model is given
  train_records: list
  held_out_records: list
  reward_functions: list
  judge_functions: list  # of the held-out evaluation
  data: str  # in words
  reward_weights: list | None = None  # 1 each by default
  # Context -> params: supervised, when no --model is given
  warm_start: Callable | None = None
  # the same rewards as JAX functions (device_rewards.on_device), for
  # --steps_per_call, and the columns that they read
  device_functions: list | None = None
  columns: Callable | None = None  # (Context, records) -> {name: [n, ...]}


class Context(NamedTuple):
  """An experiment on this machine: checked, placed, not compiled."""

  experiment: Experiment
  model: hf.Model
  policy: Any
  mesh: Any
  rule: Any
  data: data.PromptSet
  held_out: data.PromptSet
  eval_batch: int
  logger: Logger
  adapter: lora.LoraConfig | None = None
  reward_model: hf.Model | None = None
  critic: Any = None  # a Policy of its own

  @property
  def reward_functions(self) -> list:
    """Those of the run: with --steps_per_call, those of the device."""
    experiment = self.experiment
    if experiment.flags.run.steps_per_call:
      return experiment.device_functions
    return experiment.reward_functions

  def decode(self, ids: list[list[int]]) -> list[str]:
    return data.decode_all(self.model.tokenizer, ids)

  def scorer(self, functions, weights=None) -> Callable:
    ends = self.model.end_tokens
    return rewards.make_scorer(functions, self.decode, ends, weights)


def check_devices(flags, mesh, mini_batches: int) -> None:
  """Refuses a batch that the mesh cannot split, and rows that would leave
  their device."""
  num_shards = sharding.row_shards(mesh)
  if flags.sampling.compact_levels and num_shards > 1:
    raise ValueError(
      f'--compact_levels moves rows, and {num_shards} devices of data x fsdp hold them; '
      'pass --compact_levels 0'
    )
  C, G = flags.sampling.num_prompts, flags.sampling.num_generations
  micro = flags.model.micro_batch
  micro = 0 if micro == 'auto' else micro
  prompts = micro // G or C // mini_batches
  if prompts % num_shards:
    name, unit = ('--micro_batch', G) if micro else ('--num_prompts', 1)
    parts = 1 if micro else mini_batches
    fit = -(-prompts // num_shards) * num_shards * unit * parts
    raise ValueError(
      f'{name} {prompts * unit * parts} is {prompts} prompts a pass, which the '
      f'{num_shards} devices of data x fsdp cannot share equally; pass {name} {fit}'
    )


def prepare(experiment: Experiment, algorithm) -> Context:
  """Checks all that needs the model, the data or the devices; a fault is one
  line and exit status 2."""
  cache.keep_programs()
  flags = experiment.flags
  s, V = flags.sampling, None
  try:
    if flags.run.steps_per_call and not experiment.device_functions:
      raise ValueError(
        f'{experiment.name} has no reward that is a JAX function; pass '
        '--steps_per_call 0'
      )
    mesh = sharding.make_mesh(flags.model.mesh)
    check_devices(flags, mesh, algorithm.mini_batches)
    attention = kernels.choose(flags.model.attention)
    model = models.make_model(flags, experiment.tokenizer)
    V = model.config.vocab_size
    train_set, held_out = (
      data.tokenize(records, model.tokenizer, V, s.max_prompt_length, name)
      for records, name in (
        (experiment.train_records, 'training prompt'),
        (experiment.held_out_records, 'held-out prompt'),
      )
    )
    P = max(train_set.tokens.shape[1], held_out.tokens.shape[1])
    models.check_context(model, P, s.max_completion_length)
    reward_model = models.make_reward_model(flags, model, P)
    adapter = models.lora_config(flags.model)
    if adapter is not None:
      lora.targeted(model.config, model.family, adapter.targets)
  except (ValueError, OSError) as e:
    flag_layer.fail(e)
  rule = distribution.make_rule(
    V,
    model.end_tokens,
    s.temperature,
    s.top_k,
    s.top_p,
    s.min_p,
    models.forbidden_tokens(model),
  )
  dtype = flags.model.dtype
  if dtype == 'auto':
    cpu = jax.default_backend() == 'cpu'
    dtype = 'float32' if cpu else 'bfloat16'
  learned = algorithm.value_loss is not None
  judging = dataclasses.replace(model.config, value_head=True)
  shared = learned and flags.algorithm.critic == 'shared'
  policy, critic = (
    make_policy(config, jnp.dtype(dtype), flags.model.remat, attention)
    for config in (judging if shared else model.config, judging)
  )
  if adapter is not None:
    merge_params = lora.make_merge_params(
      model.config, model.family, adapter.scale, dtype
    )
    policy = policy._replace(merge_params=merge_params)
  num_shards = sharding.row_shards(mesh)
  context = Context(
    experiment,
    model,
    policy,
    mesh,
    sharding.put_replicated(mesh, rule),
    train_set,
    held_out,
    eval_batch=-(-min(len(held_out.examples), 512) // num_shards) * num_shards,
    logger=Logger(is_main=jax.process_index() == 0),
    adapter=adapter,
    reward_model=reward_model,
    critic=critic if learned and not shared else None,
  )
  if flags.run.steps_per_call and experiment.columns:
    columns = experiment.columns(context, experiment.train_records)
    context = context._replace(data=train_set._replace(columns=columns))
  return context


def restore(context: Context, run_dir: Path, checkpoints, make_state: Callable):
  """(state, progress, old flags) that --resume names, None without any."""
  resume = context.experiment.flags.run.resume
  if resume == 'never':
    return None
  try:
    step = checkpoint.choose_step(checkpoints, resume)
    if step is None:
      return None
    like = make_state(*models.structs(context))
    state, meta = checkpoint.restore(checkpoints, step, like)
  except ValueError as e:
    flag_layer.fail(e)
  if context.adapter is not None:  # its base is not in the checkpoint
    old = yaml.safe_load((run_dir / 'config.yaml').read_text())
    if old['model_fingerprint'] != fingerprint(context.model):
      cure = f'--revision {old["model_commit"]}'
      flag_layer.fail(
        f'{context.model.origin} is not what the run began with; pass '
        + (cure if old['model_commit'] else '--model what it was')
      )
    state = state.replace(frozen=models.read_base(context))
  return state, train.Progress(**meta['progress']), meta['flags']


def begin(
  context: Context,
  algorithm,
  run_dir: Path,
  checkpoints,
  make_state: Callable,
):
  """(context with the run's logger, state, progress)."""
  flags = context.experiment.flags
  restored = restore(context, run_dir, checkpoints, make_state)
  logger = Logger(
    run_dir,
    flags.run.report_to,
    restored[1].step if restored else None,
    is_main=jax.process_index() == 0,
  )
  logger.say(f'run directory: {run_dir}')
  context = context._replace(logger=logger)
  if restored is None:
    record.write_run_files(context, algorithm, run_dir)
    return context, make_state(*models.first_weights(context)), train.Progress()
  state, progress, old = restored
  logger.say(f'resumed from step {progress.step}')
  new = flag_layer.flat(flags)
  for name in sorted(new.keys() & old.keys() - {'resume'}):
    if json.dumps(new[name]) != json.dumps(old[name]):  # tuples are lists
      logger.warn(f'--{name} was {old[name]} and is now {new[name]}')
  return context, state, progress


def micro_batches(flags, algorithm) -> int | None:
  """Passes of a mini-batch's gradient; None: as the device's memory has it."""
  s, wanted = flags.sampling, flags.model.micro_batch
  if wanted == 'auto':
    return None
  rows = s.num_prompts * s.num_generations // algorithm.mini_batches
  return rows // (wanted or rows)


def compiled_parts(
  context: Context, algorithm, optimizer, state, device_score
) -> dict:
  """The step's functions on the device; `state` may be of ShapeDtypeStructs,
  so that they are compiled while the weights are made."""
  flags = context.experiment.flags
  s = flags.sampling
  sampler = SamplerConfig(
    s.num_generations,
    s.max_completion_length,
    context.model.pad_token,
    truncate=s.truncates,
    compact_levels=s.compact_levels,
  )
  with jax.set_mesh(context.mesh):  # it is of the thread
    return step_parts.compile_parts(
      context.policy,
      algorithm,
      optimizer,
      sampler,
      loop_config(context, algorithm),
      state,
      context.rule,
      context.data,
      context.held_out.tokens.shape[1],
      micro_batches(flags, algorithm),
      flags.model.length_buckets,
      device_score=device_score,
      critic=context.critic,
    )


def loop_config(context: Context, algorithm) -> step_parts.LoopConfig:
  """When things happen, from the flags."""
  f = context.experiment.flags
  return step_parts.LoopConfig(
    seed=f.run.seed,
    num_prompts=f.sampling.num_prompts,
    max_steps=f.run.max_steps,
    eval_every=f.run.eval_every,
    eval_batch=context.eval_batch,
    save_every=f.run.save_every,
    stop_at_reward=f.run.stop_at_reward,
    patience=f.run.patience,
    log_kl=f.algorithm.log_kl,
    steps_per_call=f.run.steps_per_call,
    dynamic_sampling_rounds=algorithm.dynamic_sampling_rounds,
  )


def look(
  context: Context, parts: step_parts.Parts, state, step: int, split: str
):
  """Greedy held-out completions, recorded as 'before' or 'after'."""
  found, rows = evaluation.held_out_reward(
    parts.greedy,
    parts.judge,
    state.weights,
    context.held_out,
    context.rule,
    context.eval_batch,
  )
  at = {'step': step, 'split': split}
  context.logger.samples([{**at, **row} for row in rows[:SHOWN]])
  return found, rows


def learn(context: Context, run_dir: Path, algorithm, optimizer, schedule):
  """Begins, compiles, looks, trains and looks again.

  Returns (context, state, progress, the last look). Must run under
  jax.set_mesh.
  """
  f = context.experiment.flags
  checkpoints = checkpoint.open_checkpoints(run_dir, f.run.keep)

  def save(state, progress):
    checkpoint.save(
      checkpoints, state, dataclasses.asdict(progress), flag_layer.flat(f)
    )

  def make_state(params, frozen):
    return new_state(context, algorithm, optimizer, params, frozen)

  host, _ = models.split_rewards(context)
  device_score = models.device_score(context)
  like = make_state(*models.structs(context))
  with concurrent.futures.ThreadPoolExecutor(1) as aside:
    compiling = aside.submit(
      compiled_parts, context, algorithm, optimizer, like, device_score
    )
    context, state, progress = begin(
      context, algorithm, run_dir, checkpoints, make_state
    )
    logger = context.logger
    with logger.doing('compiling the sampler, update and evaluation'):
      compiled = compiling.result()
  parts = step_parts.Parts(
    **compiled,
    score=context.scorer(*host),
    judge=context.scorer(context.experiment.judge_functions),
    decode=context.decode,
  )
  if progress.step == 0:
    found, _ = look(context, parts, state, 0, 'before')
    first = found['eval/reward']
    logger.metrics('eval', 0, found)
    logger.say(f'held-out reward before: {first:.3f}')
    progress = dataclasses.replace(progress, first_reward=first)
  try:
    state, progress, reason = train.train(
      state,
      progress,
      parts,
      loop_config(context, algorithm),
      context.data,
      context.held_out,
      context.rule,
      logger,
      save,
      schedule,
    )
  except train.Interrupted as e:
    logger.say(f'{e}; go on with --output_dir {run_dir} --resume auto')
    logger.close()
    raise SystemExit(75) from None
  finally:
    checkpoints.close()  # waits until the last one is on disk
  logger.say(f'stopped at step {progress.step}: {reason}')
  return (
    context,
    state,
    progress,
    look(context, parts, state, progress.step, 'after'),
  )


def new_state(context: Context, algorithm, optimizer, params, frozen):
  """TrainState around params (None: random ones) and what is frozen."""
  f = context.experiment.flags
  dtype = f.algorithm.reference_dtype
  return build.make_state(
    context.policy,
    algorithm,
    optimizer,
    context.mesh,
    f.run.seed,
    params,
    frozen,
    f.algorithm.log_kl,
    context.critic,
    None if dtype == 'auto' else dtype,
  )


def run(experiment: Experiment) -> dict:
  """The whole run; returns its summary, {label: text}."""
  begun = time.monotonic()
  f = experiment.flags
  try:
    sharding.split_cpu(f.model.cpu_devices)
    algorithm = build.make_algorithm(f)
  except ValueError as e:
    flag_layer.fail(e)
  context = prepare(experiment, algorithm)
  for line in compat.warnings(flag_layer.flat(f)):
    context.logger.warn(line)
  optimizer, schedule = build.make_optimizer(f, algorithm)
  if f.run.print_config:
    state = new_state(context, algorithm, optimizer, *models.structs(context))
    record.print_config(context, algorithm, state)
    return {}
  run_dir = flag_layer.claim_output_dir(f.run, experiment.name)
  with jax.set_mesh(context.mesh):
    context, state, progress, (found, rows) = learn(
      context, run_dir, algorithm, optimizer, schedule
    )
  summary = {
    'held-out before': f'{progress.first_reward:.1%}',
    'held-out after': f'{found["eval/reward"]:.1%}',
    'steps': f'{progress.step}',
    'tokens': f'{progress.num_tokens:,}',
    'time': duration(time.monotonic() - begun),
  }
  finish(context, run_dir, state, rows, summary)
  return summary


def finish(context: Context, run_dir: Path, state, rows, summary) -> None:
  """Export, report, and the last words on the console."""
  experiment, logger = context.experiment, context.logger
  out = models.export(context, run_dir, state, summary)
  title = f'{experiment.name}: reinforcement learning on tokens'
  logger.close()
  page = report.write_report(run_dir, title, summary)
  table = rich.table.Table('prompt', 'answer', 'completion', 'reward')
  for row in rows[:8]:
    prompt = row['prompt']
    prompt = prompt if isinstance(prompt, str) else prompt[-1]['content']
    reward = f'{row["reward"]:g}'
    cells = prompt, row['answer'] or '', row['completion'], reward
    table.add_row(*map(rich.text.Text, cells))
  logger.console.print(table)
  for name, text in summary.items():
    logger.say(f'{name}: {text}')
  logger.say(f'policy: {out}{os.sep}\nreport: {page}')
