"""Launch of a prepared run: from its first state to its Result.

1. `begin`    state: resumed, supervised, loaded or random; the step's programs
   are compiled meanwhile.
2. evaluate, train (train.py), evaluate.
3. `finish`   export, report, samples on the console.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import yaml

from jaxrl_tok import Interrupted, checkpoint
from jaxrl_tok.credit import losses
from jaxrl_tok.data import data_fingerprint
from jaxrl_tok.evaluation import (
  Due,
  credit_rows,
  due,
  evaluate_held_out,
)
from jaxrl_tok.hub import fetch
from jaxrl_tok.hub.weights import fingerprint, read_params
from jaxrl_tok.policy import evaluate as evaluate_rollout
from jaxrl_tok.report.charts import figure
from jaxrl_tok.report.logger import Logger, duration
from jaxrl_tok.report.page import Report, write_report
from jaxrl_tok.run import compat, record
from jaxrl_tok.run.prepare import EvalSetup, Setup
from jaxrl_tok.run.result import Result, show_samples
from jaxrl_tok.run.settings import flatten
from jaxrl_tok.run.warm_start import warm_start
from jaxrl_tok.sampler import make_sampler
from jaxrl_tok.step import device_rewards, off_policy
from jaxrl_tok.step.collectors import (
  Collector,
  dynamic,
  examples_at,
  single_turn,
)
from jaxrl_tok.step.device_steps import table_rows
from jaxrl_tok.step.programs import (
  EvaluationShape,
  Networks,
  Programs,
  compile_programs,
)
from jaxrl_tok.step.state import make_state
from jaxrl_tok.step.update import make_update
from jaxrl_tok.train import LoopConfig, Progress, train
from jaxrl_tok.types import Scored

SHOWN = 20  # held-out completions in samples.jsonl
DATA = 'data_fingerprint'


# --- state -------------------------------------------------------------------


def new_state(setup: Setup, params, frozen):
  """TrainState around trained (None: random) and frozen parameters."""
  return make_state(
    setup.policy,
    with_log_kl(setup),
    setup.optimizer,
    setup.mesh,
    setup.settings.run.seed,
    params,
    frozen,
    setup.critic,
  )


def with_log_kl(setup: Setup):
  """Adds a reference to the algorithm, if the KL is measured for the log."""
  algorithm, f = setup.algorithm, setup.settings.algorithm
  if not f.log_kl or algorithm.kl is not None:
    return algorithm
  dtype = None if f.reference_dtype == 'auto' else f.reference_dtype
  carries = {'reference': losses.reference(0, dtype)} | algorithm.carries
  return algorithm._replace(carries=carries)


def measures_kl(setup: Setup) -> bool:
  """Tells whether the KL to the reference is measured beside the update."""
  return setup.settings.algorithm.log_kl and setup.algorithm.kl is None


def first_params(setup: Setup) -> tuple:
  """Parameters (trained, frozen) at step 0."""
  if setup.model.directory is None:
    if setup.task.answers and setup.model.hf_config:
      return warm_start(setup), None
    return None, None
  with setup.logger.doing(f'reading {setup.model.origin}'):
    return setup.trainable.load(setup.mesh)


def restore(setup: Setup, run_dir: Path, checkpoints):
  """Restores the checkpoint that --resume names: (state, cursor, progress, old
  settings); None without one."""
  resume = setup.settings.run.resume
  if resume == 'never':
    return None
  step = checkpoint.choose_step(checkpoints, resume)
  if step is None:
    return None
  like = new_state(setup, *setup.trainable.structs())
  state, cursor, meta = checkpoint.restore(checkpoints, step, like)
  if like.frozen is not None:  # it is not in the checkpoint
    old = yaml.safe_load((run_dir / 'config.yaml').read_text())
    if old['model_fingerprint'] != fingerprint(setup.model):
      cure = f'--revision {old["model_commit"]}'
      raise ValueError(
        f'{setup.model.origin} is not the model that the run began with; pass '
        + (cure if old['model_commit'] else '--model as it was')
      )
    frozen = setup.trainable.load_frozen(setup.mesh)
    state = state.replace(frozen=frozen)
  return state, cursor, Progress(**meta['progress']), meta['settings']


def begin(setup: Setup, run_dir: Path, checkpoints):
  """Begins or resumes: (setup with the run's logger, state, cursor or None,
  progress)."""
  restored = restore(setup, run_dir, checkpoints)
  if restored is None and jax.process_index() == 0:
    for name in ('metrics', 'samples'):  # of a run without a checkpoint
      (run_dir / f'{name}.jsonl').unlink(missing_ok=True)
  logger = Logger(
    run_dir,
    setup.settings.run.report_to,
    restored[2].step if restored else None,
    is_main=jax.process_index() == 0,
  )
  logger.message(f'run directory: {run_dir}')
  setup = setup._replace(logger=logger)
  if restored is None:
    record.write_run_files(setup, run_dir)
    state = new_state(setup, *first_params(setup))
    return setup, state, None, Progress()
  state, cursor, progress, old = restored
  logger.message(f'resumed from step {progress.step}')
  new = saved_settings(setup)
  if old.get(DATA, new[DATA]) != new[DATA]:
    logger.warn(
      'the training prompts are not those that the run began with; it goes on '
      'at their place in the order'
    )
  for name in sorted(new.keys() & old.keys() - {'resume', DATA}):
    if json.dumps(new[name]) != json.dumps(old[name]):  # tuples are lists
      logger.warn(f'--{name} was {old[name]} and is now {new[name]}')
  return setup, state, cursor, progress


def saved_settings(setup: Setup) -> dict:
  """Settings in a checkpoint, as JSON has them."""
  found = setup.task_flags | flatten(setup.settings)
  found[DATA] = data_fingerprint(setup.data.records)
  return json.loads(json.dumps(found, default=str))


# --- programs, collector, evaluations ----------------------------------------


def device_score(setup: Setup) -> tuple | None:
  """Scorer of the rewards on the device, JAX functions and the reward model:
  (function, parameters); None without any."""
  model, params, scorer = setup.reward_model, None, None
  if model is None and not setup.rewards.device:
    return None
  if model is not None:
    with setup.logger.doing(f'reading {model.origin}'):
      params = read_params(model, setup.mesh)
    kernel = setup.settings.model.attention
    scorer = device_rewards.reward_model(
      model.make_policy(setup.dtype, attention=kernel)
    )
  score = device_rewards.make_device_scorer(setup.rewards.device, scorer)
  return score, params


def evaluation_shape(e: EvalSetup) -> EvaluationShape:
  """Sizes of an evaluation's program, and the rewards that it runs."""
  if not e.rewards.device:
    return EvaluationShape(e.num_prompts, e.data.buckets[-1], e.sampler)
  score = device_rewards.make_device_scorer(e.rewards.device)
  _, columns = e.data.batch([e.data.records[0]], e.data.buckets[-1])
  return EvaluationShape(
    e.num_prompts, e.data.buckets[-1], e.sampler, (score, None), columns
  )


def compile_run(setup: Setup, score: tuple | None) -> Programs:
  """Compiles the run's programs; from structs, so that the weights are made
  meanwhile."""
  like = new_state(setup, *setup.trainable.structs())
  config = dataclasses.replace(setup.config, reference_kl=measures_kl(setup))
  networks = Networks(
    setup.policy,
    with_log_kl(setup),
    setup.optimizer,
    setup.rule,
    setup.critic,
    score,
    setup.rewards.weights,
  )
  shapes = {e.evaluation.name: evaluation_shape(e) for e in setup.evaluations}
  with jax.set_mesh(setup.mesh):  # each thread has its own
    return compile_programs(networks, config, like, setup.data, shapes)


def make_collector(setup: Setup, programs: Programs) -> Collector:
  """Makes the collector that the settings ask for."""
  run, sampling = setup.settings.run, setup.settings.sampling
  if run.steps_per_call:
    _, length, _ = setup.data.table()
    return table_rows(
      setup.data,
      length,
      run.seed,
      sampling.num_prompts,
      run.steps_per_call,
      sampling.num_generations,
    )
  scorer = setup.scorer(setup.rewards, programs.device_score)
  collector = single_turn(
    programs.sample,
    scorer,
    setup.data,
    run.seed,
    sampling.num_prompts,
    programs.greedy,
  )
  rounds = setup.algorithm.dynamic_sampling_rounds
  if rounds > 1:
    collector = dynamic(collector, rounds)
  if sampling.replay_groups:
    collector = off_policy.replayed(
      collector,
      sampling.replay_capacity,
      sampling.replay_groups,
      lambda positions: examples_at(setup.data, run.seed, positions),
      setup.data.buckets[-1],
      run.seed,
    )
  return off_policy.ahead(collector) if sampling.ahead else collector


def check_cursor(setup: Setup, collector: Collector, cursor, step: int) -> None:
  """Refuses to go on where another collector, or another number of steps in a
  call, stopped."""
  n, sampling = setup.settings.run.steps_per_call, setup.settings.sampling
  if collector.init().keys() - cursor.keys():
    raise ValueError(
      f'checkpoint {step} is of a run with other collectors; resume with the '
      '--ahead and --replay_groups that the run was started with (config.yaml)'
    )
  held = len(cursor.get('positions', range(sampling.replay_capacity)))
  if held != sampling.replay_capacity:
    raise ValueError(
      f'the replay buffer of checkpoint {step} holds {held} groups; pass '
      f'--replay_capacity {held}'
    )
  if n and step % n:
    raise ValueError(
      f'--steps_per_call {n} cannot go on from step {step}, which is no '
      'multiple of it; pass --steps_per_call 0'
    )


def evaluate(setup: Setup, programs: Programs, e: EvalSetup, state, step: int):
  """Runs an evaluation: (metrics, rows)."""
  name = e.evaluation.name
  device = programs.evaluation_scores.get(name)
  key = jax.random.fold_in(jax.random.key(setup.settings.run.seed), step)

  def sample(number, prompts):
    at = jax.random.fold_in(key, number)
    return programs.evaluations[name](state, at, prompts)

  return evaluate_held_out(
    sample,
    setup.scorer(e.rewards, device),
    e.data,
    e.num_prompts,
    e.data.buckets[-1],
    step,
    e.evaluation.metrics,
    name,
  )


def due_evaluations(setup: Setup, programs: Programs) -> list[Due]:
  """Evaluations while training: the step's batch by token, and the task's."""
  every = setup.settings.run.eval_every

  def own_batch(state, step, batch, last):
    rows = credit_rows(last, batch, setup.decode)
    found = {}
    if programs.reference_kl is not None:
      found['kl'] = programs.reference_kl(state, last.scored.rollout)
    at = {'step': step, 'split': 'train'}
    return found, [{**at, **row} for row in rows]

  def of(e: EvalSetup) -> Due:
    def run(state, step, batch, last):
      metrics, _ = evaluate(setup, programs, e, state, step)
      return metrics, []

    return Due(e.evaluation.name, every_steps(setup, e), run)

  return [Due('train', every, own_batch), *map(of, setup.evaluations)]


def every_steps(setup: Setup, e: EvalSetup) -> int:
  """Steps between runs of an evaluation; 0: at the end only."""
  asked = e.evaluation.every
  return setup.settings.run.eval_every if asked is None else asked


def not_logged(setup: Setup, step: int) -> set[str]:
  """Names of evaluations that the loop does not run after its last step."""
  every = [
    Due(e.evaluation.name, every_steps(setup, e), None)
    for e in setup.evaluations
  ]
  ran = due(every, step, setup.settings.run.max_steps)
  return {e.name for e in every} - {e.name for e in ran}


def evaluate_all(
  setup: Setup,
  programs: Programs,
  state,
  step: int,
  split: str,
  logged: set[str],
):
  """Evaluates everything, and records samples as 'before' or 'after' and the
  metrics of the evaluations named in `logged`. Returns the (metrics, rows) of
  the task's held-out data."""
  first = None
  for e in setup.evaluations:
    metrics, rows = evaluate(setup, programs, e, state, step)
    at = {'step': step, 'split': split, 'evaluation': e.evaluation.name}
    setup.logger.samples([{**at, **row} for row in rows[:SHOWN]])
    if e.evaluation.name in logged:
      setup.logger.metrics('eval', step, metrics)
    first = first or (metrics, rows)
  return first


# --- the run -----------------------------------------------------------------


def check_shapes(setup: Setup) -> None:
  """Checks shapes of a user's own functions by tracing a step with them, before
  the run begins. Must run under jax.set_mesh."""
  own = any(value is not None for value in setup.own)
  judged = [(setup.rewards, setup.data)]
  judged += [(e.rewards, e.data) for e in setup.evaluations]
  if not own and not any(rewards.device for rewards, _ in judged):
    return
  state, found = new_state(setup, *setup.trainable.structs()), []
  for rewards, prompts in judged:
    examples = [prompts.records[0]] * setup.config.num_prompts
    batch, columns = prompts.batch(examples, prompts.buckets[-1])
    rollout = jax.eval_shape(
      functools.partial(trace_rollout, setup), state, batch
    )
    score = device_rewards.make_device_scorer(rewards.device)
    found.append((rollout, *jax.eval_shape(score, None, rollout, columns)))
  if own:
    jax.eval_shape(functools.partial(trace_update, setup), state, *found[0])


def trace_rollout(setup: Setup, state, prompts):
  """Rollout of prompts, evaluated, too."""
  params = setup.policy.merge_params(*state.policy_params)
  sample = make_sampler(setup.policy, setup.config.sampler)
  rollout = sample(params, state.key, prompts, setup.rule)
  evaluate_rollout(setup.policy, params, rollout, setup.rule)
  return rollout


def trace_update(setup: Setup, state, rollout, rewards: dict, applies: dict):
  """State after an update by the device's rewards, and zeros for the host's."""
  B, C = len(rollout.mask), len(rollout.prompts.length)
  names = setup.rewards.host
  rewards = rewards | dict.fromkeys(names, jnp.zeros(rollout.mask.shape))
  applies = applies | dict.fromkeys(names, jnp.ones(B, bool))
  weights = dict.fromkeys(rewards, jnp.float32(1))
  greedy = jnp.zeros(C) if setup.algorithm.greedy else None
  update = make_update(
    setup.policy, with_log_kl(setup), setup.optimizer, critic=setup.critic
  )
  scored = Scored(rollout, rewards, applies, weights, greedy)
  return update(state, scored, setup.rule)[0]


class Finished(NamedTuple):
  """Run that has stopped."""

  setup: Setup
  programs: Programs
  state: Any
  progress: Progress
  reward: float  # held-out, after it
  rows: list  # held-out completions of the last state


def learn(setup: Setup, run_dir: Path) -> Finished:
  """Begins, compiles, evaluates, trains and evaluates again. Must run under
  jax.set_mesh."""
  run = setup.settings.run
  checkpoints = checkpoint.open_checkpoints(run_dir, run.keep)
  settings = saved_settings(setup)

  def save(state, cursor, progress):
    found = dataclasses.asdict(progress)
    checkpoint.save(checkpoints, state, cursor, found, settings)

  score = device_score(setup)
  with concurrent.futures.ThreadPoolExecutor(1) as aside:
    compiling = aside.submit(compile_run, setup, score)
    setup, state, cursor, progress = begin(setup, run_dir, checkpoints)
    with setup.logger.doing('compiling the sampler, update and evaluation'):
      programs = compiling.result()
  collector = make_collector(setup, programs)
  cursor = collector.init() if cursor is None else cursor
  check_cursor(setup, collector, cursor, progress.step)
  if progress.step == 0:
    names = {e.evaluation.name for e in setup.evaluations}
    metrics, _ = evaluate_all(setup, programs, state, 0, 'before', names)
    first = metrics['eval/reward']
    setup.logger.message(f'held-out reward before: {first:.3f}')
    progress = dataclasses.replace(progress, first_reward=first)
  begun = progress.step
  config = LoopConfig(
    run.max_steps, run.save_every, run.stop_at_reward, run.patience
  )
  try:
    state, cursor, progress, reason = train(
      state,
      cursor,
      progress,
      collector,
      programs.update,
      due_evaluations(setup, programs),
      config,
      setup.logger,
      save,
      setup.learning_rate or (lambda step: None),
    )
  except Interrupted as e:
    setup.logger.message(
      f'{e}; go on with --output_dir {run_dir} --resume auto'
    )
    setup.logger.close()
    raise
  finally:
    checkpoints.close()  # waits until the last one is on disk
  setup.logger.message(f'stopped at step {progress.step}: {reason}')
  step = progress.step
  logged = not_logged(setup, step) if step > begun else set()
  metrics, rows = evaluate_all(setup, programs, state, step, 'after', logged)
  reward = metrics['eval/reward']
  return Finished(setup, programs, state, progress, reward, rows)


def run(setup: Setup) -> Result | None:
  """Runs a prepared run; None with --print_config, which only prints."""
  began = time.monotonic()
  for line in compat.warnings(flatten(setup.settings)):
    setup.logger.warn(line)
  if setup.settings.run.print_config:
    state = new_state(setup, *setup.trainable.structs())
    record.print_config(setup, state)
    return None
  with jax.set_mesh(setup.mesh):
    check_shapes(setup)
    run_dir = record.claim_output_dir(setup.settings.run, setup.caller.name)
    done = learn(setup, run_dir)
  return finish(done, run_dir, time.monotonic() - began)


def finish(done: Finished, run_dir: Path, seconds: float) -> Result:
  """Writes export and report, and prints the summary."""
  setup, progress = done.setup, done.progress
  unit = setup.task.reward_unit
  summary = {
    'held-out before': figure(progress.first_reward, unit),
    'held-out after': figure(done.reward, unit),
    'steps': f'{progress.step}',
    'tokens': f'{progress.num_tokens:,}',
    'time': duration(seconds),
  }
  out = export(setup, run_dir, done.state, summary)
  setup.logger.close()
  title = f'{setup.caller.name}: reinforcement learning on tokens'
  page = write_report(run_dir, title, summary)
  show_samples(setup.logger.console, done.rows)
  for name, text in summary.items():
    setup.logger.message(f'{name}: {text}')
  setup.logger.message(f'policy: {out}{os.sep}\nreport: {page}')
  return Result(run_dir, summary, Report(page), setup, done.state, done.rows)


def export(setup: Setup, run_dir: Path, state, summary: dict) -> Path:
  """Writes export/, and for adapters adapter/; uploads where asked."""
  origin = setup.model.origin if setup.model.directory else None
  card = {
    'title': f'{setup.caller.name} policy',
    'base_model': origin,
    'data': record.describe_data(setup),
    'algorithm': setup.algorithm.name,
    'metrics': summary,
  }
  out = setup.trainable.export(
    run_dir, state.params, state.frozen, card, setup.dtype
  )
  repository = setup.settings.run.push_to_hub
  if repository and jax.process_index() == 0:
    try:  # a failed upload loses nothing of the run
      with setup.logger.doing(f'uploading to {repository}'):
        setup.logger.message(fetch.push(out, repository))
    except ConnectionError as e:
      setup.logger.warn(e)
  return out
