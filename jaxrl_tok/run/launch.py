"""Launch of a prepared run: from its first state to its Result.

1. `begin`    state: resumed, supervised, loaded or random; the step's programs
   are compiled meanwhile.
2. evaluate, train (train.py), evaluate.
3. `finish`   export, report, samples on the console.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxrl_tok import Interrupted, checkpoint, finite, processes
from jaxrl_tok.hub import fetch
from jaxrl_tok.progress import BEST_METRIC, Progress, known_best
from jaxrl_tok.report import disk, mirror
from jaxrl_tok.report.charts import figure
from jaxrl_tok.report.files import read_metrics
from jaxrl_tok.report.logger import duration
from jaxrl_tok.report.page import Report, write_report
from jaxrl_tok.rewards.functions import RewardError, shorten
from jaxrl_tok.run import compat, dry_run, record, rollback
from jaxrl_tok.run.begin import (
  begin,
  check_shapes,
  measures_kl,
  new_state,
  saved_settings,
  with_log_kl,
)
from jaxrl_tok.run.collect import check_cursor, make_collector
from jaxrl_tok.run.evaluations import (
  device_score,
  due_evaluations,
  evaluate_all,
  evaluation_shape,
  not_logged,
  read_reward_model,
  warn_of_audit,
)
from jaxrl_tok.run.optimizer import rate_warning
from jaxrl_tok.run.prepare import Setup
from jaxrl_tok.run.result import Result, show_samples
from jaxrl_tok.run.reward_workers import working
from jaxrl_tok.run.settings import RunSettings, flatten
from jaxrl_tok.step.episodes import World
from jaxrl_tok.step.programs import Programs, compile_programs
from jaxrl_tok.step.shapes import Networks
from jaxrl_tok.train import (
  DeviceRewardError,
  LoopConfig,
  NotFinite,
  train,
)
from jaxrl_tok.watch import Diverged


def compile_run(setup: Setup, model: tuple | None) -> Programs:
  """Compiles the run's programs; from structs, so that the weights are made
  meanwhile. model: see read_reward_model."""
  like = new_state(setup, *setup.trainable.structs())
  config = dataclasses.replace(setup.config, reference_kl=measures_kl(setup))
  networks = Networks(
    setup.policy,
    with_log_kl(setup),
    setup.optimizer,
    setup.rule,
    setup.critic,
    device_score(setup.rewards, model),
    setup.rewards.weights,
    setup.remats,
  )
  shapes = {
    e.evaluation.name: evaluation_shape(e, model) for e in setup.evaluations
  }
  with jax.set_mesh(setup.mesh):  # each thread has its own
    return compile_programs(networks, config, like, setup.data, shapes)


def close(
  setup: Setup, run_dir: Path, checkpoints, error: BaseException
) -> None:
  """Closes a run that an error ends, once its checkpoint is on disk; a note on
  the error tells where that fails."""
  try:
    if processes.is_agreed(error):
      with saving(run_dir):
        checkpoints.close()
  except Exception as failed:
    if not disk.is_full(error):
      error.add_note(str(failed))
  with contextlib.suppress(OSError):
    setup.logger.close()


def saving(run_dir: Path):
  """Context of a checkpoint that is written: it fails in one line."""
  return disk.writing('a checkpoint', mirror.name_of(run_dir))


def resume_command(
  run_dir: Path, step: int | str = 'auto', change: str = ''
) -> str:
  """Sentence with the flags that go on with a run; change: what the cure
  changes, a word of --allow_change."""
  found = f'go on with --output_dir {mirror.name_of(run_dir)} --resume {step}'
  return f'{found} --allow_change {change}' if change else found


def change_of(error: Exception) -> str:
  """Word of --allow_change for the cure of an error; '' for others."""
  if isinstance(error, RewardError | DeviceRewardError):
    return 'rewards'
  if isinstance(error, NotFinite):
    return 'rewards' if error.by_reward else 'settings'
  return 'settings' if isinstance(error, Diverged) else ''


def drop_spoilt(
  run_dir: Path, keep: int, error: Exception, kept: Sequence[int] = ()
) -> list[int]:
  """Deletes the checkpoints of a policy whose log-probs are not finite, which
  nothing can go on from; returns their steps. A note on the error tells where
  that fails.

  kept: steps of checkpoints that were there before the run: they stay, as its
  flags may be at fault.
  """
  if not isinstance(error, NotFinite) or not error.by_policy:
    return []
  try:
    last = max([error.since - 1, *kept])
    with checkpoint.open_checkpoints(run_dir, keep) as checkpoints:
      return checkpoint.drop_after(checkpoints, last)
  except Exception as failed:
    error.add_note(
      f'checkpoints from step {error.since} on are of that policy and cannot '
      f'be deleted ({shorten(failed)})'
    )
    return []


def resume_note(
  run_dir: Path, error: Exception, dropped: Sequence[int] = ()
) -> str | None:
  """Sentence on how to go on after an error, from the newest good checkpoint;
  None without a checkpoint where nothing is lost.

  dropped: steps of the checkpoints that drop_spoilt deleted.

  After updates that were not finite, a checkpoint is good where a later update
  was finite: that of the policy that they began from is not known to be.
  """
  steps = good = checkpoint.saved_steps(run_dir)
  begin_again = 'no good checkpoint is there: begin again'
  if dropped:
    listed = ', '.join(map(str, dropped))
    begin_again = f'deleted checkpoints of that policy: {listed}; {begin_again}'
  if isinstance(error, Diverged):
    good = [s for s in steps if s < error.since]
    if not good:
      return begin_again
  if isinstance(error, NotFinite) and not error.by_reward:
    good = [s for s in steps if s < error.since]
    if not good and (error.by_policy or not steps):
      return begin_again
  if not steps:
    return begin_again if isinstance(error, DeviceRewardError) else None
  step = (good or steps)[-1]
  word = 'auto' if step == steps[-1] else step
  command = resume_command(run_dir, word, change_of(error))
  if good:
    found = f'the last good checkpoint is step {step}: {command}'
    if isinstance(error, DeviceRewardError):
      found = f'steps after the last checkpoint are lost; {found}'
    if dropped:
      found = f'deleted checkpoints of that policy: {listed}; {found}'
    return found
  return f'checkpoint {step} is of the policy that they began from: {command}'


class Finished(NamedTuple):
  """Run that has stopped."""

  setup: Setup
  programs: Programs
  state: Any
  progress: Progress
  exported: int  # step of `state`: the last, or the best
  reward: float  # held-out, after it
  rows: list  # held-out completions of the state


def learn(setup: Setup, run_dir: Path) -> Finished:
  """Begins, compiles, evaluates, trains and evaluates again. Must run under
  jax.set_mesh."""
  run = setup.settings.run
  config, best, made = loop_config(run), {}, {}
  checkpoints = checkpoint.open_checkpoints(run_dir, run.keep, best.values)
  saved = saved_settings(setup)

  def save(state, cursor, progress):
    if processes.is_main():
      mirror.push(run_dir)  # rows first: a resumed run reads them
    best['step'] = progress.best_step if config.keep_best else None
    found = dataclasses.asdict(progress)
    with saving(run_dir):
      checkpoint.save(checkpoints, state, cursor, found, saved)

  model = read_reward_model(setup)
  with concurrent.futures.ThreadPoolExecutor(1) as aside:
    compiling = aside.submit(compile_run, setup, model)
    setup, state, cursor, progress = begin(setup, run_dir, checkpoints, saved)
    with setup.logger.doing('compiling the sampler, update and evaluation'):
      programs = compiling.result()
  collector = make_collector(setup, programs)
  cursor = collector.init() if cursor is None else cursor
  check_cursor(setup, collector, cursor, progress.step)
  there = checkpoints.all_steps()
  progress, line = known_best(progress, config, there)
  if line:
    setup.logger.warn(line)
  if progress.step == 0:
    names = {e.evaluation.name for e in setup.evaluations}
    found = evaluate_all(setup, programs, state, 0, 'before', names, made)
    first = found.metrics['eval/reward']
    setup.logger.message(f'held-out reward before: {first:.3f}')
    progress = dataclasses.replace(progress, first_reward=first)
  evaluated, history = progress.evaluated, read_metrics(run_dir)
  try:
    state, cursor, progress, reason = train(
      state,
      cursor,
      progress,
      collector,
      programs.update,
      due_evaluations(setup, programs, made, history),
      config,
      setup.logger,
      save,
      list(history),
    )
  except Interrupted as e:
    with saving(run_dir):
      checkpoints.close()
    setup.logger.message(f'{e}; {resume_command(run_dir)}')
    setup.logger.close()
    raise
  except BaseException as e:
    close(setup, run_dir, checkpoints, e)
    raise
  with saving(run_dir):
    checkpoints.close()  # waits until the last one is on disk
  setup.logger.message(f'stopped at step {progress.step}: {reason}')
  step = progress.step
  logged = not_logged(setup, step) if step > evaluated else set()
  if run.exports_best:
    step, state = best_state(setup, run_dir, state, progress)
    logged = logged if step == progress.step else set()
  found = evaluate_all(setup, programs, state, step, 'after', logged, made)
  check_last(found.metrics, step, int(state.skipped))
  reward = found.metrics['eval/reward']
  return Finished(setup, programs, state, progress, step, reward, found.rows)


def best_state(
  setup: Setup, run_dir: Path, state, progress: Progress
) -> tuple[int, Any]:
  """(step, state) of the best evaluation, from its checkpoint; the last ones,
  and a warning, without it."""
  best = progress.best_step
  if best == progress.step:
    return best, state
  with checkpoint.open_checkpoints(run_dir) as checkpoints:
    line = (
      'no evaluation while training was the best, or its checkpoint is not '
      'there'
    )
    if best in checkpoints.all_steps():
      try:
        found, _, _ = checkpoint.restore(checkpoints, best, state)
        return best, found.replace(frozen=state.frozen)
      except checkpoint.BadCheckpoint as e:
        line = f'{e}'
  setup.logger.warn(f'{line}; the last policy is exported')
  return progress.step, state


def loop_config(run: RunSettings) -> LoopConfig:
  """Schedule of a run's loop."""
  return LoopConfig(
    run.max_steps,
    run.save_every,
    run.stop_at_reward,
    run.patience,
    run.max_nonfinite,
    run.reward_on_error,
    run.best_metric or BEST_METRIC,
    run.best_mode,
    run.keeps_best,
    run.step_timeout,
    run.max_kl,
    run.min_entropy,
    run.max_grad_ratio,
    run.divergence_steps,
  )


def check_last(metrics: dict, step: int, skipped: int = 0) -> None:
  """Refuses to finish with a policy whose log-probs are not finite: the last
  update that was made has spoilt it, before the last `skipped` ones."""
  gap = metrics.get('eval/mismatch/logp_gap_mean', 0.0)
  if not math.isfinite(gap):
    raise NotFinite(
      f'the policy after step {step} has log-probs that are not finite, and is '
      'not exported; lower --learning_rate',
      step - skipped,
      finite.SAMPLED,
    )


def closing(world: World | None):
  """Context that ends the environments of a run."""
  return contextlib.nullcontext() if world is None else world.stepper


def run(setup: Setup) -> Result | None:
  """Runs a prepared run; None with --print_config and --dry_run, which only
  print."""
  began = time.monotonic()
  for line in compat.warnings(flatten(setup.settings)):
    setup.logger.warn(line)
  rollback.check_limits(setup)
  line = rate_warning(setup.settings)
  if line and setup.own.optimizer is None:
    setup.logger.warn(line)
  if setup.settings.run.print_config:
    state = new_state(setup, *setup.trainable.structs())
    record.print_config(setup, state)
    return None
  if setup.settings.run.dry_run:
    dry_run.run(setup)
    return None
  with (
    jax.set_mesh(setup.mesh),
    closing(setup.world),
    working(setup.reward_workers),
  ):
    check_shapes(setup)
    run_dir = record.claim_output_dir(setup.settings.run, setup.caller.name)
    with record.locked(run_dir):
      return run_in(setup, run_dir, began)


def run_in(setup: Setup, run_dir: Path, began: float) -> Result:
  """Runs in a directory that is this run's alone; an error says how to go on.

  began: time of its beginning (time.monotonic).
  """
  begins = setup.settings.run.resume  # 'never', 'auto' or a step
  before = (
    [int(begins)] if begins.isdecimal() else checkpoint.saved_steps(run_dir)
  )
  try:
    done = learn(setup, run_dir)
    return finish(done, run_dir, time.monotonic() - began)
  except (Interrupted, checkpoint.NotResumed):
    raise
  except Exception as e:
    if not processes.is_agreed(e):
      raise
    if isinstance(e, Diverged):
      e.settings = rollback.halved(setup, run_dir, e)
      if e.settings is not None:
        raise
    dropped = drop_spoilt(run_dir, setup.settings.run.keep, e, before)
    if note := resume_note(run_dir, e, dropped):
      e.add_note(note)
    raise


def finish(done: Finished, run_dir: Path, seconds: float) -> Result:
  """Writes export and report, and prints the summary."""
  setup, progress = done.setup, done.progress
  unit = setup.task.reward_unit
  seconds += setup.logger.earlier  # before it was resumed
  summary = {
    'held-out before': figure(progress.first_reward, unit),
    'held-out after': figure(done.reward, unit),
    'steps': f'{progress.step}',
    'tokens': f'{progress.num_tokens:,}',
    'time': duration(seconds),
  }
  if setup.settings.run.exports_best:
    label = f'exported, best by {progress.best_metric} (optimistic)'
    summary[label] = f'step {done.exported}'
  out = export(setup, run_dir, done.state, summary)
  warn_of_audit(setup.logger, read_metrics(run_dir))
  setup.logger.close()
  title = f'{setup.caller.name}: reinforcement learning on tokens'
  page = run_dir / 'report.html'
  if processes.is_main():
    page = write_report(run_dir, title, summary)
    mirror.push(run_dir)
  show_samples(setup.logger.console, done.rows)
  for name, text in summary.items():
    setup.logger.message(f'{name}: {text}')
  policy, report = mirror.name_of(out), mirror.name_of(page)
  setup.logger.message(f'policy: {policy}{os.sep}\nreport: {report}')
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
  if repository and processes.is_main():
    try:  # a failed upload loses nothing of the run
      with setup.logger.doing(f'uploading to {repository}'):
        setup.logger.message(fetch.push(out, repository))
    except ConnectionError as e:
      setup.logger.warn(e)
  return out
