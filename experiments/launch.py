"""From flags to a finished run: what every experiment shares.

1. `start`     devices, mesh, model, data, checks: no compilation yet.
2. `run`       state, compile, evaluate, train, evaluate, export, report.

An experiment gives its flags, its records, its reward functions and, where it
has one, a warm start.
"""

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')

import jax
import jax.numpy as jnp
import numpy as np
import optax
import yaml

from experiments import flags as flag_layer
from jaxrl_tok import (
  advantages,
  algorithms,
  checkpoint,
  data,
  distribution,
  losses,
  report,
  rewards,
  sharding,
  train,
  update,
)
from jaxrl_tok.logger import Logger, duration
from jaxrl_tok.models import hf
from jaxrl_tok.models.transformer import TransformerConfig, make_policy
from jaxrl_tok.sampler import SamplerConfig

# words of users -> functions; the only such tables
BASELINES = {
  'none': lambda f: advantages.no_baseline(),
  'batch_mean': lambda f: advantages.batch_mean(),
  'group_mean': lambda f: advantages.group_mean(),
  'leave_one_out': lambda f: advantages.leave_one_out(),
  'ema': lambda f: advantages.ema(f.ema_decay),
}
AGGREGATIONS = {
  'token_mean': lambda T: losses.token_mean,
  'seq_mean_token_mean': lambda T: losses.seq_mean_token_mean,
  'seq_mean_token_sum': lambda T: losses.seq_mean_token_sum,
  'seq_mean_token_sum_norm': losses.seq_mean_token_sum_norm,
}
SCHEDULES = {
  'constant': lambda peak, steps: optax.constant_schedule(peak),
  'linear': lambda peak, steps: optax.linear_schedule(peak, peak / 10, steps),
  'cosine': lambda peak, steps: optax.cosine_decay_schedule(peak, steps, 0.1),
}


class Model(NamedTuple):
  """A policy to start from. `params` None: random weights."""

  config: TransformerConfig
  params: Any
  tokenizer: Any
  end_tokens: tuple
  pad_token: int
  origin: str


class Experiment(NamedTuple):
  """What makes an experiment itself."""

  name: str
  flags: Any  # has run, model, sampling, algorithm
  config: TransformerConfig | None  # of a fresh model, when no --model
  tokenizer: Callable  # () -> tokenizer of a fresh model
  train_records: list
  held_out_records: list
  reward_functions: list
  judge_functions: list  # of the held-out evaluation
  described_data: str
  # (Context) -> params; supervised, before the first evaluation
  warm_start: Callable | None = None


class Context(NamedTuple):
  """What `start` found out: everything checked, nothing compiled."""

  experiment: Experiment
  model: Model
  policy: Any
  mesh: Any
  rule: Any
  data: data.PromptSet
  held_out: data.PromptSet
  logger: Logger
  run_dir: Path


def tiny_config(size: flag_layer.SizeFlags, vocab_size: int) -> TransformerConfig:
  """A decoder of the given size that the Qwen2 layout can hold."""
  if size.d_model % size.num_heads:
    flag_layer.fail(
      f'--d_model {size.d_model} must be divisible by --num_heads '
      f'{size.num_heads}'
    )
  try:
    return TransformerConfig(
      vocab_size=vocab_size,
      d_model=size.d_model,
      num_layers=size.num_layers,
      num_heads=size.num_heads,
      num_kv_heads=size.num_kv_heads,
      head_dim=size.d_model // size.num_heads,
      d_ff=size.d_ff,
      tie_embeddings=True,
      qkv_bias=True,
    )
  except ValueError as e:
    flag_layer.fail(e)


def make_optimizer(f: flag_layer.AlgorithmFlags, max_steps: int):
  """(optax chain, schedule of the learning rate)."""
  later = SCHEDULES[f.lr_schedule](
    f.learning_rate, max(max_steps - f.lr_warmup_steps, 1)
  )
  schedule = later
  if f.lr_warmup_steps:
    rise = optax.linear_schedule(0.0, f.learning_rate, f.lr_warmup_steps)
    schedule = optax.join_schedules([rise, later], [f.lr_warmup_steps])
  chain = optax.chain(
    optax.clip_by_global_norm(f.max_grad_norm),
    optax.adamw(schedule, b2=f.adam_b2, weight_decay=f.weight_decay),
  )
  return chain, schedule


def make_algorithm(f: flag_layer.AlgorithmFlags, sampling):
  """The Algorithm that the flags name."""
  word = f.baseline
  if word == 'auto':
    word = 'leave_one_out' if sampling.num_generations > 1 else 'ema'
  return algorithms.reinforce(
    BASELINES[word](f),
    aggregate=AGGREGATIONS[f.aggregation](sampling.max_completion_length),
    gamma=f.gamma,
    kl=f.kl,
    beta=f.beta,
  )


def load_model(experiment: Experiment) -> Model:
  """--model DIR, or the experiment's fresh one."""
  given = experiment.flags.model.model
  if given is None:
    tokenizer = experiment.tokenizer()
    return Model(
      experiment.config,
      None,
      tokenizer,
      (tokenizer.eos_token_id,),
      tokenizer.pad_token_id,
      'random weights',
    )

  def shapes(config):
    return jax.eval_shape(make_policy(config).init, jax.random.key(0))

  return Model(*hf.load(given, shapes), given)


def forbidden_tokens(model: Model) -> np.ndarray | None:
  """bool [V] of ids that no completion may hold: rows without a token, and
  padding where it ends nothing. None when there are none."""
  V = model.config.vocab_size
  forbidden = np.arange(V) >= len(model.tokenizer)
  if model.pad_token not in model.end_tokens and model.pad_token < V:
    forbidden[model.pad_token] = True
  return forbidden if forbidden.any() else None


def check_devices(flags, mesh) -> None:
  """Refuses a batch that the mesh cannot split."""
  ways = sharding.row_shards(mesh)
  C, G = flags.sampling.num_prompts, flags.sampling.num_generations
  prompts = (flags.model.micro_batch or C * G) // G
  if prompts % ways:
    name = '--micro_batch' if flags.model.micro_batch else '--num_prompts'
    unit = G if flags.model.micro_batch else 1
    fit = -(-prompts // ways) * ways * unit
    raise ValueError(
      f'{name} {prompts * unit} is {prompts} prompts and they must be '
      f'divisible by the {ways} devices of data x fsdp; pass {name} {fit}'
    )


def start(experiment: Experiment) -> Context:
  """Checks everything that needs the model, the data or the devices."""
  flags = experiment.flags
  try:
    mesh = sharding.make_mesh(flags.model.mesh)
    check_devices(flags, mesh)
    model = load_model(experiment)
    V, P = model.config.vocab_size, flags.sampling.max_prompt_length
    sets = [
      data.tokenize(records, model.tokenizer, V, P, name)
      for records, name in (
        (experiment.train_records, 'training prompt'),
        (experiment.held_out_records, 'held-out prompt'),
      )
    ]
  except (ValueError, OSError) as e:
    flag_layer.fail(e)
  s = flags.sampling
  rule = distribution.make_rule(
    V,
    model.end_tokens,
    s.temperature,
    s.top_k,
    s.top_p,
    s.min_p,
    forbidden_tokens(model),
  )
  dtype = flags.model.dtype
  if dtype == 'auto':
    cpu = jax.default_backend() == 'cpu'
    dtype = 'float32' if cpu else 'bfloat16'
  policy = make_policy(model.config, jnp.dtype(dtype), flags.model.remat)
  if flags.run.print_config:
    logger, run_dir = Logger(), Path()
  else:
    run_dir = flag_layer.claim_output_dir(flags.run, experiment.name)
    logger = None
  return Context(
    experiment,
    model,
    policy,
    mesh,
    sharding.put_replicated(mesh, rule),
    *sets,
    logger,
    run_dir,
  )


def environment() -> dict:
  """Versions, commit and devices of this run."""
  commit = subprocess.run(
    ['git', 'rev-parse', 'HEAD'],
    capture_output=True,
    text=True,
    cwd=Path(__file__).parent,
    check=False,
  )
  return {
    'python': platform.python_version(),
    **hf.versions(),
    'commit': commit.stdout.strip() or None,
    'platform': platform.platform(),
    'backend': jax.default_backend(),
    'devices': [str(d) for d in jax.devices()],
  }


def write_run_files(context: Context) -> None:
  """config.yaml, command.txt and env.json."""
  run_dir = context.run_dir
  config = {
    'experiment': context.experiment.name,
    **flag_layer.flat(context.experiment.flags),
    'model_config': dataclasses.asdict(context.model.config),
    'model_origin': context.model.origin,
    'data': context.experiment.described_data,
  }
  (run_dir / 'config.yaml').write_text(yaml.safe_dump(config, sort_keys=False))
  words = [Path(sys.executable).name, '-m', f'experiments.{context.experiment.name}']
  command = shlex.join(words + sys.argv[1:])
  (run_dir / 'command.txt').write_text(command + '\n')
  (run_dir / 'env.json').write_text(json.dumps(environment(), indent=2) + '\n')


def make_state(context: Context, algorithm, optimizer, params=None):
  """TrainState, each leaf created where it will live."""
  key = jax.random.key(context.experiment.flags.run.seed)
  rules = context.policy.partition_rules
  if params is None:
    params = context.model.params

  def fresh(key):
    return update.init_state(
      algorithm, optimizer, context.policy.init(key), key
    )

  def around(params, key):
    return update.init_state(algorithm, optimizer, params, key)

  if params is None:
    return sharding.born_sharded(fresh, context.mesh, rules, key)[0]
  placed = sharding.tree_shardings(context.mesh, params, rules)
  params = jax.device_put(params, placed)
  return sharding.born_sharded(around, context.mesh, rules, params, key)[0]


def print_config(context: Context, algorithm, optimizer) -> None:
  """Every setting, what the model weighs and where each parameter lies."""
  console = context.logger
  console.say(
    yaml.safe_dump(
      {
        **flag_layer.flat(context.experiment.flags),
        'model_config': dataclasses.asdict(context.model.config),
        'data': context.experiment.described_data,
      },
      sort_keys=False,
    ).rstrip()
  )
  key = jax.random.key(0)
  state = jax.eval_shape(
    lambda key: update.init_state(
      algorithm, optimizer, context.policy.init(key), key
    ),
    key,
  )
  placed = sharding.tree_shardings(
    context.mesh, state.params, context.policy.partition_rules
  )

  def size(tree):
    leaves = jax.tree.leaves(tree)
    return sum(x.size for x in leaves), sum(
      x.size * x.dtype.itemsize for x in leaves
    )

  count, held = size(state.params)
  console.say(f'parameters: {count:,} ({held:,} bytes)')
  console.say(f'optimizer state: {size(state.opt_state)[1]:,} bytes')
  console.say(f'mesh: {dict(context.mesh.shape)}')
  for (path, leaf), spec in zip(
    jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(placed)
  ):
    console.say(
      f'  {sharding.path_name(path)} {list(leaf.shape)} {tuple(spec.spec)}'
    )


def run(experiment: Experiment) -> dict:
  """The whole run; returns the numbers of its summary."""
  begun = time.monotonic()
  context = start(experiment)
  flags = experiment.flags
  algorithm = make_algorithm(flags.algorithm, flags.sampling)
  optimizer, schedule = make_optimizer(flags.algorithm, flags.run.max_steps)
  with jax.set_mesh(context.mesh):
    if flags.run.print_config:
      print_config(context, algorithm, optimizer)
      return {}
    return _run(context, algorithm, optimizer, schedule, begun)


def _restore(context, checkpoints, like):
  """What --resume names: (state, progress, its flags), None without any."""
  try:
    step = checkpoint.choose_step(
      checkpoints, context.experiment.flags.run.resume
    )
    if step is None:
      return None
    state, meta = checkpoint.restore(checkpoints, step, like)
  except ValueError as e:
    flag_layer.fail(e)
  return state, train.Progress(**meta['progress']), meta['flags']


def _begin(context: Context, algorithm, optimizer, checkpoints):
  """(state, progress, context with its logger): resumed, or from 0."""
  flags, restored = context.experiment.flags, None
  if flags.run.resume != 'never':
    like = make_state(context, algorithm, optimizer)
    restored = _restore(context, checkpoints, like)
  logger = Logger(
    context.run_dir,
    flags.run.report_to,
    restored[1].step if restored else None,
    speak=jax.process_index() == 0,
  )
  logger.say(f'run directory: {context.run_dir}')
  context = context._replace(logger=logger)
  if restored:
    state, progress, old = restored
    logger.say(f'resumed from step {progress.step}')
    new = flag_layer.flat(flags)
    for name in sorted(new.keys() & old.keys() - {'resume'}):
      if new[name] != old[name]:
        logger.warn(f'--{name} was {old[name]} and is now {new[name]}')
    return state, progress, context
  write_run_files(context)
  params = None
  if context.experiment.warm_start is not None and flags.model.model is None:
    params = context.experiment.warm_start(context)
  state = make_state(context, algorithm, optimizer, params)
  return state, train.Progress(), context


def _compile(context: Context, algorithm, optimizer, state, eval_prompts):
  experiment, flags = context.experiment, context.experiment.flags
  C, G = flags.sampling.num_prompts, flags.sampling.num_generations
  s, model = flags.sampling, context.model

  def scorer(functions):
    return rewards.make_scorer(
      functions, lambda ids: data.decode_all(model.tokenizer, ids), model.end_tokens
    )

  sampler = SamplerConfig(
    G,
    s.max_completion_length,
    model.pad_token,
    truncate=s.top_k > 0 or s.top_p < 1 or s.min_p > 0,
  )
  with context.logger.doing('compiling the sampler, update and evaluation'):
    return train.compile_parts(
      context.policy,
      algorithm,
      optimizer,
      sampler,
      state,
      context.rule,
      context.data,
      context.held_out,
      C,
      eval_prompts,
      scorer(experiment.reward_functions),
      scorer(experiment.judge_functions),
      micro_batches=C * G // (flags.model.micro_batch or C * G),
    )


def _run(context: Context, algorithm, optimizer, schedule, begun) -> dict:
  experiment, flags = context.experiment, context.experiment.flags
  checkpoints = checkpoint.open_checkpoints(context.run_dir, flags.run.keep)
  state, progress, context = _begin(
    context, algorithm, optimizer, checkpoints
  )
  logger = context.logger
  ways = sharding.row_shards(context.mesh)
  eval_prompts = -(-min(len(context.held_out.examples), flags.run.eval_prompts) // ways) * ways
  parts = _compile(context, algorithm, optimizer, state, eval_prompts)

  def held_out(split):
    found, rows = train.evaluate_held_out(
      parts, state, context.held_out, context.rule, eval_prompts
    )
    logger.samples(
      [{'step': progress.step, 'split': split, **row} for row in rows[:20]]
    )
    return found, rows[:20]

  if progress.step == 0:
    found, _ = held_out('before')
    logger.metrics('eval', 0, found)
    logger.say(f'held-out before: {found["eval/reward"]:.3f}')
    progress = dataclasses.replace(
      progress, first_reward=found['eval/reward']
    )
  run = flags.run
  try:
    state, progress, reason = train.train(
      state,
      parts,
      train.LoopConfig(
        seed=run.seed,
        num_prompts=flags.sampling.num_prompts,
        max_steps=run.max_steps,
        eval_every=run.eval_every,
        save_every=run.save_every,
        stop_at_reward=run.stop_at_reward,
        patience=run.patience,
      ),
      context.data,
      context.held_out,
      context.rule,
      eval_prompts,
      context.model.tokenizer,
      logger,
      checkpoints,
      flag_layer.flat(flags),
      progress,
      schedule,
    )
  except train.Interrupted as e:
    checkpoints.close()
    logger.say(f'{e}; go on with --output_dir {context.run_dir} --resume auto')
    logger.close()
    raise SystemExit(75) from None
  logger.say(f'stopped at step {progress.step}: {reason}')
  found, rows = held_out('after')
  summary = {
    'held-out before': f'{progress.first_reward:.1%}',
    'held-out after': f'{found["eval/reward"]:.1%}',
    'steps': f'{progress.step}',
    'tokens': f'{progress.num_tokens:,}',
    'time': duration(time.monotonic() - begun),
  }
  export(context, state, summary)
  checkpoints.close()
  logger.close()
  page = report.write_report(
    context.run_dir, f'{experiment.name}: REINFORCE on tokens', summary
  )
  show_samples(logger, rows)
  for name, text in summary.items():
    logger.say(f'{name}: {text}')
  logger.say(f'report: {page}')
  return summary


def export(context: Context, state, summary: dict) -> None:
  """The trained policy as a Hugging Face directory; a resume replaces it."""
  import shutil

  out = context.run_dir / 'export'
  shutil.rmtree(out, ignore_errors=True)
  experiment, model = context.experiment, context.model
  origin = None if model.params is None else model.origin
  hf.save(
    out,
    model.config,
    state.params,
    model.tokenizer,
    model.end_tokens,
    model.pad_token,
    card={
      'title': f'{experiment.name} policy',
      'base_model': origin,
      'data': experiment.described_data,
      'algorithm': experiment.flags.algorithm.algorithm,
      'metrics': summary,
    },
  )


def show_samples(logger: Logger, rows: list[dict], limit: int = 8) -> None:
  """A table of held-out prompts, answers and greedy completions."""
  import rich.table
  import rich.text

  table = rich.table.Table('prompt', 'answer', 'completion', 'reward')
  for row in rows[:limit]:
    prompt = row['prompt']
    if not isinstance(prompt, str):
      prompt = prompt[-1]['content']
    cells = prompt, row['answer'] or '', row['completion'], f'{row["reward"]:g}'
    table.add_row(*(rich.text.Text(cell) for cell in cells))
  logger.console.print(table)
