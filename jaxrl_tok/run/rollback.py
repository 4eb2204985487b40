"""Rollback of a run that has diverged: once, to its last good checkpoint, with
half the learning rate. rollback.json in its directory keeps both rates, so that
whoever resumes the run goes on with the half one."""

import json
from pathlib import Path

from jaxrl_tok import checkpoint, processes
from jaxrl_tok.report import mirror
from jaxrl_tok.report.files import atomic_write
from jaxrl_tok.run.optimizer import peak_learning_rate
from jaxrl_tok.run.settings import Settings, with_values
from jaxrl_tok.watch import Diverged

NAME = 'rollback.json'


def check_limits(setup) -> None:
  """Refuses limits of numbers that are not there, and a rollback that has no
  learning rate to halve."""
  run, f = setup.settings.run, setup.settings.algorithm
  algorithm = setup.algorithm
  if run.on_divergence == 'rollback' and setup.own.optimizer is not None:
    raise ValueError(
      '--on_divergence rollback halves --learning_rate, and the optimizer is '
      'your own; leave it out'
    )
  if run.max_kl and not (f.log_kl or algorithm.kl is not None):
    raise ValueError(
      f'--max_kl {run.max_kl} limits a KL that nothing measures; leave '
      '--no_log_kl out'
    )
  if run.max_kl and algorithm.kl is None and not run.eval_every:
    raise ValueError(
      f'--max_kl {run.max_kl} limits the KL that is logged with evaluations, '
      'and there are none while training; pass --eval_every 10'
    )


def halved(setup, run_dir: Path, error: Diverged) -> Settings | None:
  """Settings that go on from the last good checkpoint; None where the run stops
  instead: it was not asked to, it did once, or there is no such checkpoint."""
  run, file = setup.settings.run, run_dir / NAME
  good = [s for s in checkpoint.saved_steps(run_dir) if s < error.since]
  asked = run.on_divergence == 'rollback'
  if not asked or not good or processes.from_main(file.exists()):
    return None
  rate = peak_learning_rate(setup.settings)
  rates = {'step': good[-1], 'from': rate, 'to': rate / 2}
  if processes.is_main():
    atomic_write(file, [json.dumps(rates) + '\n'])
  setup.logger.warn(
    f'{error}; rolled back to step {good[-1]}, with --learning_rate '
    f'{rate / 2:g} in place of {rate:g}'
  )
  values = {'resume': str(good[-1]), 'output_dir': mirror.name_of(run_dir)}
  return with_values(setup.settings, values)


def with_rollback(settings: Settings) -> Settings:
  """Settings with the rate of the rollback that the run to go on with had,
  unless another rate than before is given."""
  run = settings.run
  if run.resume == 'never':
    return settings
  file = mirror.local(run.output_dir) / NAME
  if not file.is_file():
    return settings
  rates = json.loads(file.read_text())
  if peak_learning_rate(settings) != rates['from']:
    return settings
  allowed = ','.join(dict.fromkeys([*run.allowed, 'settings']))
  values = {'learning_rate': rates['to'], 'allow_change': allowed}
  return with_values(settings, values)
