"""Training loop: it alone decides order and time of a run's steps.

One step:

1. collector.start    the next prompts -> rollout, dispatched
2. log.flush          numbers of the step before, while the device samples
3. collector.finish   rewards on the host, the one crossing -> Batch
4. update             advantage -> loss -> optax -> TrainState, metrics
5. evaluations, checkpoint, where they are due

TrainState, the collector's cursor and Progress are saved together; a resumed
run equals one that never stopped.
"""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Sequence

import jax

from jaxrl_tok import Interrupted
from jaxrl_tok.evaluation import Due, due
from jaxrl_tok.report.logger import Logger
from jaxrl_tok.step.collectors import Batch, Collector
from jaxrl_tok.step.state import step_key
from jaxrl_tok.types import TrainState


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """Schedule of checkpoints and stops; 0: never."""

  max_steps: int = 1000
  save_every: int = 0  # and always at the end
  stop_at_reward: float | None = None  # held-out, greedy
  patience: int = 0  # evaluations without a better one


@dataclasses.dataclass(frozen=True)
class Progress:
  """Progress of a run; saved beside the state as JSON."""

  step: int = 0
  num_tokens: int = 0  # prompt and completion tokens so far
  first_reward: float | None = None  # held-out, before the first step
  eval_reward: float | None = None  # held-out, the last evaluation
  best_reward: float | None = None
  evals_since_best: int = 0


def stop_reason(progress: Progress, config: LoopConfig) -> str | None:
  """Reason to end the run after this step, or None."""
  reached, held_out = config.stop_at_reward, progress.eval_reward
  if None not in (reached, held_out) and held_out >= reached:
    return f'held-out reward {held_out:.3f} reached {reached}'
  if config.patience and progress.evals_since_best >= config.patience:
    return f'no better held-out reward in {config.patience} evaluations'
  if progress.step >= config.max_steps:
    return f'max_steps {config.max_steps}'
  return None


@contextlib.contextmanager
def stop_requested():
  """Yields a function that is True once SIGINT or SIGTERM came. A second
  signal ends the process at once."""
  came, before = [], {}

  def note(number, frame):
    came.append(number)
    for s in before:
      signal.signal(s, signal.SIG_DFL)

  with contextlib.suppress(ValueError):  # only the main thread has signals
    for s in (signal.SIGINT, signal.SIGTERM):
      before[s] = signal.signal(s, note)
  try:
    yield lambda: bool(came)
  finally:
    for s, old in before.items():
      signal.signal(s, old)


def find_warnings(metrics: dict) -> dict[str, str]:
  """Finds conditions that hinder learning: {kind: message}, shown once each."""
  found = {}
  if metrics['frac_reward_zero_std'] == 1:
    found['variance'] = (
      'in every group all rewards are equal, so there is no advantage to '
      'learn from; use easier prompts, a denser reward or more samples'
    )
  if metrics.get('frac_not_valid') == 1:
    found['valid'] = (
      'no reward applied to any completion (every function returned None), so '
      'nothing is learnt; return a number where a reward applies'
    )
  if metrics.get('dynamic_sampling/missing'):
    found['missing'] = (
      f'{metrics["dynamic_sampling/missing"]:.0f} groups had equal rewards '
      f'after {metrics["dynamic_sampling/rounds"]:.0f} rounds and are kept '
      'without an advantage; use easier or harder prompts, or more '
      '--dynamic_sampling_rounds'
    )
  if metrics['completions/clipped_ratio'] == 1:
    found['clipped'] = (
      'every completion was cut before its end token; raise '
      '--max_completion_length or teach the policy to end'
    )
  return found


class StepLog:
  """Times the phases of a step and logs it when its metrics are there.

  `hold` keeps a step whose update has been dispatched; `flush` waits for it,
  which ends its update phase, and writes it down.
  """

  def __init__(self, logger: Logger, show: Callable):
    self._logger, self._show = logger, show
    self._held, self._warned = None, set()
    self.restart()

  def restart(self) -> None:
    """Restarts the clock: the time until now belongs to no step."""
    self._clock = time.monotonic()

  def _elapsed(self) -> float:
    """Seconds since the last mark; marks the time."""
    now = time.monotonic()
    elapsed, self._clock = now - self._clock, now
    return elapsed

  def hold(self, progress: Progress, batch: Batch, metrics: dict) -> Progress:
    """Returns progress after the batch; metrics may still be on the device."""
    counts = batch.counts
    if counts.generated is None:  # many steps in one call, over already
      return self._hold_last(progress, batch, jax.device_get(metrics))
    times = {'time/score': batch.metrics['time/score']}
    times['time/rollout'] = self._elapsed() - times['time/score']
    progress = dataclasses.replace(
      progress,
      step=progress.step + 1,
      num_tokens=progress.num_tokens + counts.generated + counts.read,
    )
    found = dict(batch.metrics)
    self._held = progress, counts.generated, metrics, found, times
    return progress

  def add(self, metrics: dict) -> None:
    """Adds metrics of the step that is held."""
    if self._held is not None:
      self._held[3].update(metrics)

  def flush(self) -> None:
    """Waits for the step that is held, and writes its row."""
    if self._held is None:
      return
    held, self._held = self._held, None
    progress, generated, metrics, found, times = held
    metrics = jax.device_get(metrics) | jax.device_get(found)
    if 'time/step' not in times:
      times['time/update'] = self._elapsed()
    self._write(progress, generated, metrics, times)

  def _hold_last(self, progress: Progress, batch: Batch, metrics: dict):
    """Writes all steps of a call but the last, and holds that one."""
    n, read = len(batch.counts.read), batch.counts.read
    taken = self._elapsed() / n
    for i in range(n):
      row = {name: value[i] for name, value in metrics.items()}
      generated = round(float(row['completions/tokens']))
      progress = dataclasses.replace(
        progress,
        step=progress.step + 1,
        num_tokens=progress.num_tokens + generated + int(read[i]),
      )
      self.flush()
      self._held = progress, generated, row, {}, {'time/step': taken}
    return progress

  def _write(
    self, progress: Progress, generated: int, metrics: dict, times: dict
  ) -> None:
    metrics = metrics | {'num_tokens': progress.num_tokens, **times}
    metrics['step_time'] = sum(times.values())
    metrics['tokens_per_second'] = generated / metrics['step_time']
    self._logger.metrics('train', progress.step, metrics)
    for kind, text in find_warnings(metrics).items():
      if kind not in self._warned:
        self._warned.add(kind)
        self._logger.warn(f'step {progress.step}: {text}')
    parts = (
      ('reward', metrics['reward'], '.3f'),
      ('held-out', progress.eval_reward, '.3f'),
      ('kl', metrics.get('kl'), '.4f'),
      ('entropy', metrics['entropy'], '.3f'),
      ('tok/s', metrics['tokens_per_second'], ',.0f'),
    )
    text = (f'{n} {v:{form}}' for n, v, form in parts if v is not None)
    self._show(progress.step, '  '.join(text))

  def evaluation(
    self, progress: Progress, name: str, metrics: dict, rows: list
  ) -> Progress:
    """Logs an evaluation and returns progress after it. Metrics of the step's
    own batch are logged with the step."""
    self._logger.samples(rows)
    if name == 'train':
      self.add(metrics)
      return progress
    self.flush()
    self._logger.metrics('eval', progress.step, metrics)
    if name == 'held_out':
      progress = after_evaluation(progress, metrics['eval/reward'])
    self.restart()
    return progress


def after_evaluation(progress: Progress, reward: float) -> Progress:
  """Progress with a new held-out reward, and evaluations since the best."""
  best = progress.best_reward
  better = best is None or reward > best
  return dataclasses.replace(
    progress,
    eval_reward=reward,
    best_reward=reward if better else best,
    evals_since_best=0 if better else progress.evals_since_best + 1,
  )


def train(
  state: TrainState,
  cursor: dict,
  progress: Progress,
  collector: Collector,
  update: Callable,
  evaluations: Sequence[Due],
  config: LoopConfig,
  logger: Logger,
  save: Callable = lambda state, cursor, progress: None,
) -> tuple[TrainState, dict, Progress, str]:
  """Trains until stop_reason; the module's docstring has the steps.

  Args:
    cursor: collector.init() of a new run.
    update: (state, batch.scored) -> (state, metrics, StepBatch), compiled.
    save: called at save_every, at the end and when a signal came.

  Must run under jax.set_mesh. Returns (state, cursor, progress, why it
  stopped). Raises Interrupted, after saving, when a signal came.
  """
  begun = progress.step
  with (
    logger.bar('train', config.max_steps, progress.step) as show,
    stop_requested() as asked,
  ):
    log = StepLog(logger, show)
    while not (reason := stop_reason(progress, config)):
      pending = collector.start(state, step_key(state), cursor)
      log.flush()
      batch, cursor = collector.finish(pending)
      state, metrics, last = update(state, batch.scored)
      progress = log.hold(progress, batch, metrics)
      for e in due(evaluations, progress.step, config.max_steps):
        found = e.run(state, progress.step, batch, last)
        progress = log.evaluation(progress, e.name, *found)
      if (stop := asked()) or is_due(config.save_every, progress.step):
        log.flush()
        save(state, cursor, progress)
        log.restart()
      if stop:
        raise Interrupted(f'stopped by a signal after step {progress.step}')
    log.flush()
  if progress.step > begun and not is_due(config.save_every, progress.step):
    save(state, cursor, progress)
  return state, cursor, progress, reason


def is_due(every: int, step: int) -> bool:
  """Tells whether what happens every `every` steps is due after this one."""
  return bool(every) and step % every == 0
