"""Training loop: it alone decides order and time of a run's steps.

One step:

1. collector.start    the next prompts -> rollout, dispatched
2. log.flush          numbers of the step before, while the device samples
3. collector.finish   rewards on the host, the one crossing -> Batch
4. update             advantage -> loss -> optax -> TrainState, metrics
5. evaluations, checkpoint, where they are due

TrainState, the collector's cursor and Progress are saved together; a resumed
run equals one that never stopped. Where a step raises an exception, the last
moment at which the three belonged together is saved first (`rescue`).
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Sequence

import jax

from jaxrl_tok import Interrupted, finite, processes
from jaxrl_tok.evaluation import Due, due
from jaxrl_tok.progress import (
  LoopConfig,
  Progress,
  after_evaluation,
  stop_reason,
)
from jaxrl_tok.report import disk
from jaxrl_tok.report.logger import Logger
from jaxrl_tok.rewards.functions import shorten
from jaxrl_tok.step.collectors import Batch, Collector
from jaxrl_tok.step.device_steps import GREEDY_TOKENS, StepBatch
from jaxrl_tok.step.state import step_key
from jaxrl_tok.step.update import FIRST, IN_A_ROW
from jaxrl_tok.types import TrainState
from jaxrl_tok.watch import Diverged, Hang, Limits, watch, watched

# totals of a run that are logged with each step
TOTALS = 'num_tokens', 'sampled_tokens', 'reward_calls'


class NotFinite(ValueError):
  """Updates in a row were not finite, and ended the run.

  Attributes:
    since: step of the state that they began from; they changed nothing.
    by_policy: the policy is spoilt: the sampler's log-probs were the first
      tensor, or the gradient's are not finite.
    by_reward: the reward was the first tensor; the policy has no part in it.
    agreed: every process knows, by the numbers of the update.
  """

  agreed = True

  def __init__(
    self, message: str, since: int, first: str, spoilt: bool = False
  ):
    super().__init__(message)
    self.since, self.by_policy = since, spoilt or first == finite.SAMPLED
    self.by_reward = first == finite.REWARD and not self.by_policy


class DeviceRewardError(ValueError):
  """Reward on the device that was not finite. It is known when its step is
  over, and state and cursor have passed it; every process knows."""

  agreed = True


SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # the last: no terminal


@contextlib.contextmanager
def stop_requested():
  """Yields a function that is True once SIGINT, SIGTERM or SIGHUP came. A
  second signal ends the process at once. SIGHUP stays ignored where it is, as
  by nohup."""
  came, before = [], {}

  def note(number, frame):
    came.append(number)
    for s in before:
      signal.signal(s, signal.SIG_DFL)

  with contextlib.suppress(ValueError):  # only the main thread has signals
    for s in SIGNALS:
      if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN:
        before[s] = signal.signal(s, note)
  try:
    yield lambda: bool(came)
  finally:
    for s, old in before.items():
      signal.signal(s, old)


def find_warnings(metrics: dict, tensor: str = '') -> dict[str, str]:
  """Finds conditions that hinder learning: {kind: message}, shown once each.

  tensor: name of the first one that is not finite, where an update was not.
  """
  found = {}
  if metrics.get('nonfinite_updates'):
    found['nonfinite'] = (
      f'an update was not finite and changed nothing; the first such tensor is '
      f'{tensor}; the metric nonfinite_updates counts them'
    )
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
  if metrics.get('ended/episode_length') == 1:
    found['clipped'] = (
      'every episode was cut by --max_episode_length; pass more, or fewer '
      '--max_turns'
    )
  elif metrics['completions/clipped_ratio'] == 1 and 'turns' not in metrics:
    found['clipped'] = (
      'every completion was cut before its end token; raise '
      '--max_completion_length or teach the policy to end'
    )
  return found


def is_errors(name: str) -> bool:
  """Tells whether a metric is rewards/NAME/errors."""
  return name.startswith('rewards/') and name.endswith('/errors')


class StepLog:
  """Times the phases of a step and logs it when its metrics are there.

  `hold` keeps a step whose update has been dispatched, or the steps of a call;
  `flush` waits for them, which ends an update phase, and writes them down.

  Args:
    tensors: names of an update's tensors, see finite.tensor_names.
    history: rows of metrics.jsonl of the steps before.

  Attributes:
    seen: state of the watch of the run's numbers.
    in_a_row: updates that were not finite, up to the step written last.
    first: name of the first tensor of the first of them.
    spoilt: the policy that they began from has log-probs that are not finite.
    passed: a reward on the device failed in a step that cannot be repeated.
  """

  def __init__(
    self,
    logger: Logger,
    show: Callable,
    config: LoopConfig,
    tensors: list[str],
    history: Sequence[dict] = (),
  ):
    self._logger, self._show = logger, show
    self._config, self._tensors = config, tensors
    self._held, self._warned = [], set()
    self._limits = Limits(
      config.max_kl,
      config.min_entropy,
      config.max_grad_ratio,
      config.divergence_steps,
    )
    self.seen = watched(history, self._limits)
    self.in_a_row, self.first = 0, ''
    self.spoilt = self.passed = False
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
      return self._hold_all(progress, batch, jax.device_get(metrics))
    times = {'time/score': batch.metrics['time/score']}
    times['time/rollout'] = self._elapsed() - times['time/score']
    progress = dataclasses.replace(
      progress,
      step=progress.step + 1,
      num_tokens=progress.num_tokens + counts.generated + counts.read,
      sampled_tokens=progress.sampled_tokens + counts.generated + counts.greedy,
      reward_calls=progress.reward_calls + counts.scored,
    )
    found = dict(batch.metrics)
    self._held = [(progress, counts.generated, metrics, found, times)]
    return progress

  def add(self, metrics: dict) -> None:
    """Adds metrics of the last step that is held."""
    if self._held:
      self._held[-1][3].update(metrics)

  def flush(self) -> None:
    """Waits for the steps that are held, and writes their rows."""
    while self._held:
      progress, generated, metrics, found, times = self._held.pop(0)
      metrics = jax.device_get(metrics) | jax.device_get(found)
      if 'time/step' not in times:
        times['time/update'] = self._elapsed()
      self._write(progress, generated, metrics, times)

  def drain(self) -> None:
    """Writes the rows that can be written, before an error ends the run."""
    while self._held:
      with contextlib.suppress(Exception):
        self.flush()

  def _hold_all(self, progress: Progress, batch: Batch, metrics: dict):
    """Holds all steps of a call."""
    counts, read = batch.counts, batch.counts.read
    n = len(read)
    taken = self._elapsed() / n
    for i in range(n):
      row = {name: value[i] for name, value in metrics.items()}
      generated = round(float(row['completions/tokens']))
      greedy = round(float(row.pop(GREEDY_TOKENS, 0)))
      progress = dataclasses.replace(
        progress,
        step=progress.step + 1,
        num_tokens=progress.num_tokens + generated + int(read[i]),
        sampled_tokens=progress.sampled_tokens + generated + greedy,
        reward_calls=progress.reward_calls + counts.scored,
      )
      held = progress, generated, row, {}, {'time/step': taken}
      self._held.append(held)
    return progress

  def _write(
    self, progress: Progress, generated: int, metrics: dict, times: dict
  ) -> None:
    metrics = metrics | {name: getattr(progress, name) for name in TOTALS}
    metrics |= times
    errors = {}
    if self._config.reward_on_error == 'raise':
      errors = {n: metrics.pop(n) for n in list(metrics) if is_errors(n)}
    self.in_a_row = int(metrics.pop(IN_A_ROW, 0))
    first = self._tensors[int(metrics.pop(FIRST, 0))]
    if self.in_a_row <= 1 or not self.first:
      self.first = first
    gap = float(metrics.get('sampler_logp_gap', 0.0))
    found = first == finite.SAMPLED or not math.isfinite(gap)
    self.spoilt = self.in_a_row > 0 and (self.spoilt or found)
    metrics['step_time'] = sum(times.values())
    metrics['tokens_per_second'] = generated / metrics['step_time']
    self._logger.metrics('train', progress.step, metrics)
    self._check(progress.step, errors)
    row = metrics | {'step': progress.step}
    self.seen, reason = watch(self.seen, row, self._limits)
    if reason:
      raise Diverged(
        f'the run has diverged at step {progress.step}: {reason}; lower '
        '--learning_rate, or raise --beta',
        self.seen.since - 1,
      )
    for kind, text in find_warnings(metrics, first).items():
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

  def _check(self, step: int, errors: dict) -> None:
    """Raises ValueError, in one line, for a step that ends the run."""
    most = self._config.max_nonfinite
    for name, value in errors.items():
      if value:
        self.passed = True
        raise DeviceRewardError(
          f'@on_device reward {name[8:-7]} gave {value:.0f} completions of '
          f'step {step} values that are not finite; mend it, or pass '
          '--reward_on_error mask'
        )
    if most and self.in_a_row >= most:
      cure, first = 'lower --learning_rate', self.first
      if self.spoilt and first != finite.SAMPLED:
        first += " and the policy's log-probs are not finite"
      elif first == finite.REWARD:
        cure = 'make the rewards smaller'
      elif not self.spoilt:
        cure += ', or mend the loss or the reward'
      raise NotFinite(
        f'{self.in_a_row} updates in a row, up to step {step}, were not finite '
        f'and changed nothing; the first such tensor is {first}; {cure}',
        step - self.in_a_row,
        self.first,
        self.spoilt,
      )

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
    progress = after_evaluation(progress, metrics, self._config)
    self.restart()
    return progress


@dataclasses.dataclass
class Moment:
  """State, cursor and progress that belong together, but while a step is under
  way."""

  state: TrainState
  cursor: dict
  progress: Progress
  saved: int | None = None  # step of the newest checkpoint of this run

  @property
  def is_whole(self) -> bool:
    """Tells whether the three are of one step, and all arrays are there: an
    update takes the memory of the state that it is given."""
    arrays = (
      x for x in jax.tree.leaves(self.state) if hasattr(x, 'is_deleted')
    )
    if any(x.is_deleted() for x in arrays):
      return False
    return int(self.state.step) == self.progress.step

  def save(self, save: Callable) -> None:
    save(self.state, self.cursor, self.progress)
    self.saved = self.progress.step


def rescue(at: Moment, begun: int, save: Callable, error: Exception) -> None:
  """Saves the last whole moment before an error ends the run, so that a resumed
  run repeats the step that failed, or the evaluations that did. A note on the
  error tells where it cannot.

  A reward on the device fails after its step, which could not be repeated:
  nothing is saved, nor on a full disk, nor a policy that has diverged. Batches
  whose updates were not finite are not repeated. Such updates leave the policy
  that they began from. It is
  saved where the rewards are at fault, and where there is no checkpoint unless
  it is spoilt. Several processes save what all of them know to have failed.
  """
  if at.progress.step in (begun, at.saved) or not processes.is_agreed(error):
    return
  if isinstance(error, DeviceRewardError | Diverged) or disk.is_full(error):
    return
  if isinstance(error, NotFinite):
    older = begun or at.saved is not None
    if error.by_policy or (older and not error.by_reward):
      return
    at.state = at.state.replace(skipped=at.state.skipped * 0)
  try:
    if at.is_whole:
      at.save(save)
  except Exception as failed:  # a full disk, or a device that gave up
    error.add_note(
      f'the state after step {at.progress.step} cannot be saved '
      f'({shorten(failed)})'
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
  history: Sequence[dict] = (),
) -> tuple[TrainState, dict, Progress, str]:
  """Trains until stop_reason; the module's docstring has the steps.

  Args:
    cursor: collector.init() of a new run.
    update: (state, batch.scored) -> (state, metrics, StepBatch), compiled.
    save: called at save_every, after the best evaluation with keep_best, at
      the end, when a signal came and before an error ends the run; not at
      save_every while updates are not finite or numbers beyond their limits,
      and never where they are not because the policy is spoilt.
    history: rows of metrics.jsonl of the steps before, for the watch.

  Evaluations of the first state's step that an error cut short are run first;
  those of a step's own batch cannot be.

  Must run under jax.set_mesh. Returns (state, cursor, progress, why it
  stopped). Raises Interrupted, after saving, when a signal came; NotFinite
  after max_nonfinite updates in a row; Diverged, see watch.py. A step that
  takes longer than step_timeout ends the process.
  """
  at, begun = Moment(state, cursor, progress), progress.step
  with (
    logger.bar('train', config.max_steps, progress.step) as show,
    stop_requested() as asked,
    Hang(config.step_timeout) as hang,
  ):
    names = finite.tensor_names(state.trained)
    log = StepLog(logger, show, config, names, history)
    try:
      if progress.evaluated < progress.step:
        known = [e for e in evaluations if e.name != 'train']
        run_evaluations(at, known, config, log, hang)
      while not (reason := stop_reason(at.progress, config)):
        run_step(at, collector, update, evaluations, config, log, hang)
        step = at.progress.step
        stop = processes.on_any(asked() or bool(logger.lost))
        best = config.keep_best and at.progress.best_step == step
        if stop or best or is_due(config.save_every, step):
          log.flush()
          in_doubt = log.in_a_row or log.seen.in_doubt
          if not in_doubt or ((stop or best) and not log.spoilt):
            at.save(save)
          log.restart()
        if stop:
          why = 'as its console is lost' if logger.lost else 'by a signal'
          raise Interrupted(f'stopped {why} after step {step}')
      log.flush()
    except Interrupted:
      raise
    except Exception as error:
      log.drain()
      if not (log.spoilt or log.passed):
        rescue(at, begun, save, error)
      raise
  if at.progress.step not in (begun, at.saved) and not log.spoilt:
    at.save(save)
  return at.state, at.cursor, at.progress, reason


def run_step(
  at: Moment,
  collector: Collector,
  update: Callable,
  evaluations: Sequence[Due],
  config: LoopConfig,
  log: StepLog,
  hang: Hang,
) -> None:
  """Makes one step, or as many as an update has: steps 1 to 4 and the
  evaluations that are due; see train."""
  hang.begin(f'step {at.progress.step + 1}')
  pending = collector.start(at.state, step_key(at.state), at.cursor)
  log.flush()
  batch, cursor = collector.finish(pending)
  at.state, metrics, last = update(at.state, batch.scored)
  at.cursor = cursor
  at.progress = log.hold(at.progress, batch, metrics)
  run_evaluations(at, evaluations, config, log, hang, batch, last)


def run_evaluations(
  at: Moment,
  evaluations: Sequence[Due],
  config: LoopConfig,
  log: StepLog,
  hang: Hang,
  batch: Batch | None = None,
  last: StepBatch | None = None,
) -> None:
  """Runs the evaluations that are due; progress has them once all are done."""
  progress = at.progress
  for e in due(evaluations, progress.step, config.max_steps):
    hang.begin(f'the evaluation {e.name} of step {progress.step}')
    found = e.run(at.state, progress.step, batch, last)
    progress = log.evaluation(progress, e.name, *found)
  at.progress = dataclasses.replace(progress, evaluated=progress.step)


def is_due(every: int, step: int) -> bool:
  """Tells whether what happens every `every` steps is due after this one."""
  return bool(every) and step % every == 0
