"""The loop: the only place that owns order, time and processes.

One step:

1. `collect`   the next C prompts                    -> Prompts [C, P]
   `sample`    with the key of this step             -> Rollout [B, T]
   `score`     on the host, the one crossing         -> reward [B, T]
2. `update`    advantage -> loss -> optax            -> TrainState, metrics

Where every reward is a JAX function, `steps` does some of these in one call.

The metrics of a step are read when the next rollout has been dispatched, so
the device never waits for the log. What is needed to go on (TrainState and
Progress) is saved together; a resumed run is the run that was not stopped.
"""

import contextlib
import dataclasses
import functools
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxrl_tok import rewards
from jaxrl_tok.data import PromptSet, record_indices
from jaxrl_tok.evaluation import credit_rows, held_out_reward
from jaxrl_tok.report.logger import Logger
from jaxrl_tok.sharding import put_replicated, put_rows
from jaxrl_tok.step.collectors import Collector, collect
from jaxrl_tok.step.device_steps import Table
from jaxrl_tok.step.programs import LoopConfig, Parts
from jaxrl_tok.types import Rollout, SamplingRule, TrainState


@dataclasses.dataclass(frozen=True)
class Progress:
  """Where a run stands; saved beside the state as JSON."""

  step: int = 0
  position: int = 0  # of the next prompt in the data's order
  num_tokens: int = 0  # prompt and completion tokens so far
  first_reward: float | None = None  # held-out, before the first step
  eval_reward: float | None = None  # held-out, the last evaluation
  best_reward: float | None = None
  evals_since_best: int = 0


class Interrupted(Exception):
  """A signal asked the run to stop; its state is saved."""


def stop_reason(progress: Progress, config: LoopConfig) -> str | None:
  """Why a run should end here, or None."""
  reached, held_out = config.stop_at_reward, progress.eval_reward
  if None not in (reached, held_out) and held_out >= reached:
    return f'held-out reward {held_out:.3f} reached {reached}'
  if config.patience and progress.evals_since_best >= config.patience:
    return f'no better held-out reward in {config.patience} evaluations'
  if progress.step >= config.max_steps:
    return f'max_steps {config.max_steps}'
  return None


def evaluates(step: int, config: LoopConfig) -> bool:
  """Whether held-out prompts are looked at after this step."""
  every = config.eval_every
  return step == config.max_steps or bool(every and step % every == 0)


@contextlib.contextmanager
def stop_requested():
  """Yields a function that is True once SIGINT or SIGTERM came. A second
  signal ends the process at once."""
  came, kept = [], {}

  def note(number, frame):
    came.append(number)
    for s in kept:
      signal.signal(s, signal.SIG_DFL)

  with contextlib.suppress(ValueError):  # only the main thread has signals
    for s in (signal.SIGINT, signal.SIGTERM):
      kept[s] = signal.signal(s, note)
  try:
    yield lambda: bool(came)
  finally:
    for s, old in kept.items():
      signal.signal(s, old)


def warnings_of(metrics: dict) -> dict[str, str]:
  """{kind: message} of what a user would want to hear once."""
  found = {}
  if metrics['frac_reward_zero_std'] == 1:
    found['variance'] = (
      'in every group all rewards are equal, so there is no advantage to '
      'learn from; use easier prompts, a denser reward or more samples'
    )
  if metrics.get('resample/missing'):
    found['missing'] = (
      f'{metrics["resample/missing"]} groups had equal rewards after '
      f'{metrics["resample/rounds"]} rounds and are kept without an advantage; '
      'use easier or harder prompts, or more --dynamic_sampling_rounds'
    )
  if metrics['completions/clipped_ratio'] == 1:
    found['clipped'] = (
      'every completion was cut before its end token; raise '
      '--max_completion_length or teach the policy to end'
    )
  return found


class StepLog:
  """Times the phases of a step and logs it when its metrics are there.

  `mark` ends a phase; `hold` keeps a step whose update has been dispatched;
  `flush` waits for it, which ends its update phase, and writes it down.
  """

  def __init__(self, logger: Logger, show: Callable):
    self._logger, self._show = logger, show
    self._held, self._times, self._warned = None, {}, set()
    self.restart()

  def restart(self) -> None:
    """Time since the last mark was no step's."""
    self._clock = time.monotonic()

  def mark(self, phase: str) -> None:
    now = time.monotonic()
    name = f'time/{phase}'
    self._times[name] = self._times.get(name, 0.0) + now - self._clock
    self._clock = now

  def hold(self, progress: Progress, generated: int, *metrics: dict) -> None:
    """metrics: dicts of numbers on the host or still on the device."""
    self._held = progress, generated, metrics, self._times
    self._times = {}

  def flush(self) -> None:
    if self._held is None:
      return
    (progress, generated, dicts, times), self._held = self._held, None
    metrics = {}
    for part in jax.device_get(dicts):
      metrics |= part
    now = time.monotonic()
    times['time/update'] = now - self._clock
    self._clock = now
    self.write(progress, generated, metrics, times)

  def many(self, steps: list) -> None:
    """Writes [(progress, generated, metrics)] of steps made since the last
    mark; they took equally long."""
    now = time.monotonic()
    taken, self._clock = (now - self._clock) / len(steps), now
    for progress, generated, metrics in steps:
      self.write(progress, generated, metrics, {'time/step': taken})

  def write(
    self, progress: Progress, generated: int, metrics: dict, times: dict
  ) -> None:
    metrics = metrics | {'num_tokens': progress.num_tokens, **times}
    metrics['step_time'] = sum(times.values())
    metrics['tokens_per_second'] = generated / metrics['step_time']
    self._logger.metrics('train', progress.step, metrics)
    for kind, text in warnings_of(metrics).items():
      if kind not in self._warned:
        self._warned.add(kind)
        self._logger.warn(f'step {progress.step}: {text}')
    held_out = progress.eval_reward
    parts = (
      ('reward', metrics['reward'], '.3f'),
      ('held-out', held_out, '.3f'),
      ('kl', metrics.get('kl'), '.4f'),
      ('entropy', metrics['entropy'], '.3f'),
      ('tok/s', metrics['tokens_per_second'], ',.0f'),
    )
    said = (f'{n} {v:{form}}' for n, v, form in parts if v is not None)
    self._show(progress.step, '  '.join(said))


def _after_step(progress: Progress, prompts: int, tokens: int) -> Progress:
  return dataclasses.replace(
    progress,
    step=progress.step + 1,
    position=progress.position + prompts,
    num_tokens=progress.num_tokens + tokens,
  )


def _after_evaluation(progress: Progress, reward: float) -> Progress:
  best = progress.best_reward
  better = best is None or reward > best
  return dataclasses.replace(
    progress,
    eval_reward=reward,
    best_reward=reward if better else best,
    evals_since_best=0 if better else progress.evals_since_best + 1,
  )


def update_for(updates: dict, mask: np.ndarray) -> Callable:
  """The update of the fewest columns that hold every completion."""
  longest = mask.any(axis=0).sum()
  return updates[min(T for T in updates if longest <= T)]


class Looked(NamedTuple):
  """A step's batch, for the samples that show its credit."""

  examples: list
  rollout: Rollout
  scores: rewards.Scores
  advantage: jax.Array


def host_step(parts, config, data, rule, log, learning_rate) -> Callable:
  """Returns advance(state, progress) -> (state, progress, Looked): a step with
  its rewards on the host."""
  mesh = jax.sharding.get_mesh()
  fold_in = jax.jit(jax.random.fold_in)

  def phase(name):
    if name == 'dispatched':
      log.flush()  # the step before this one
    else:
      log.mark(name)

  collector = Collector(
    parts.sample,
    parts.score,
    data,
    rule,
    config.seed,
    config.num_prompts,
    parts.device_score,
    parts.greedy_prompts,
    config.dynamic_sampling_rounds,
    phase,
  )

  def advance(state: TrainState, progress: Progress):
    step = progress.step
    key = fold_in(state.key, step)
    batch, spent, found = collect(collector, state, key, progress.position)
    greedy_reward = batch.greedy_reward
    update = update_for(parts.updates, batch.mask)
    state, metrics, advantage = update(
      state,
      batch.rollout,
      put_rows(mesh, batch.scores.reward),
      rule,
      None if greedy_reward is None else put_rows(mesh, greedy_reward),
    )
    tokens = spent.generated + spent.read
    progress = _after_step(progress, spent.prompts, tokens)
    rate = {'learning_rate': float(learning_rate(step))}
    found |= batch.scores.metrics | rate
    if parts.reference_kl is not None and evaluates(progress.step, config):
      weights = state.reference_weights
      metrics['kl'] = parts.reference_kl(weights, batch.rollout, rule)
    log.hold(progress, spent.generated, metrics, found)
    look = Looked(batch.examples, batch.rollout, batch.scores, advantage)
    return state, progress, look

  return advance


def device_steps(parts, config, data, rule, log, learning_rate) -> Callable:
  """The same in steps_per_call steps that never leave the device."""
  mesh = jax.sharding.get_mesh()
  C, n = config.num_prompts, config.steps_per_call
  table = put_replicated(mesh, Table(data.tokens, data.length, data.columns))

  def advance(state: TrainState, progress: Progress):
    index = record_indices(
      len(data.examples), config.seed, progress.position, n * C
    ).reshape(n, C)
    placed = put_replicated(mesh, index.astype(np.int32))
    with jax.transfer_guard('disallow'):  # nothing comes back in between
      state, metrics, last = parts.steps(state, table, placed, rule)
    metrics = jax.device_get(metrics)
    B, made = last.reward.shape[0], []
    reference_kl = None
    if parts.reference_kl is not None and evaluates(progress.step + n, config):
      reference_kl = parts.reference_kl(
        state.reference_weights, last.rollout, rule
      )
    for i in range(n):
      row = {k: v[i] for k, v in metrics.items()}
      row['learning_rate'] = float(learning_rate(progress.step))
      generated = round(float(row['completions/mean_length']) * B)
      read = int(data.length[index[i]].sum()) * (B // C)
      progress = _after_step(progress, C, generated + read)
      made.append((progress, generated, row))
    if reference_kl is not None:
      row['kl'] = reference_kl
    log.many(made)
    examples = [data.examples[i] for i in index[-1]]
    tokens, mask, reward = jax.device_get(
      (last.rollout.tokens, last.rollout.mask, last.reward)
    )
    texts = parts.score(tokens, mask, examples).completions
    scores = rewards.Scores(reward, {}, texts)
    return (
      state,
      progress,
      Looked(examples, last.rollout, scores, last.advantage),
    )

  return advance


def train(
  state: TrainState,
  progress: Progress,
  parts: Parts,
  config: LoopConfig,
  data: PromptSet,
  held_out: PromptSet,
  rule: SamplingRule,
  logger: Logger,
  save: Callable[[TrainState, Progress], None] = lambda state, progress: None,
  learning_rate: Callable = lambda step: 0.0,
) -> tuple[TrainState, Progress, str]:
  """Runs steps until something says stop; see the module docstring.

  save: called at save_every, at the end and when a signal came.
  learning_rate: schedule, for the log.

  Must run under jax.set_mesh. Returns (state, progress, why it stopped).
  Raises Interrupted, after saving, when a signal came.
  """
  look = functools.partial(
    held_out_reward,
    parts.greedy,
    parts.judge,
    held_out=held_out,
    rule=rule,
    batch=config.eval_batch,
  )
  saved = progress.step
  with (
    logger.bar('train', config.max_steps, progress.step) as show,
    stop_requested() as asked,
  ):
    log = StepLog(logger, show)
    make_advance = device_steps if config.steps_per_call else host_step
    advance = make_advance(parts, config, data, rule, log, learning_rate)
    while not (reason := stop_reason(progress, config)):
      state, progress, seen = advance(state, progress)
      if evaluates(progress.step, config):
        log.flush()
        found, _ = look(state.weights)
        logger.metrics('eval', progress.step, found)
        rows = credit_rows(
          seen.rollout, seen.advantage, seen.scores, seen.examples, parts.decode
        )
        at = {'step': progress.step, 'split': 'train'}
        logger.samples([{**at, **row} for row in rows])
        progress = _after_evaluation(progress, found['eval/reward'])
        log.restart()
      stop = asked()
      every = config.save_every
      if stop or (every and progress.step % every == 0):
        log.flush()
        save(state, progress)
        saved = progress.step
        log.restart()
      if stop:
        raise Interrupted(f'stopped by a signal after step {progress.step}')
    log.flush()
  if progress.step != saved:
    save(state, progress)
  return state, progress, reason
