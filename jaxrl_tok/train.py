"""The loop: the only place that owns order, time and processes.

One step:

1. `batch_at`  the next C prompts                    -> Prompts [C, P]
2. `sample`    with the key of this step             -> Rollout [B, T]
3. `score`     on the host, the one crossing         -> reward [B, T]
4. `update`    advantage -> loss -> optax            -> TrainState, metrics

The metrics of a step are read when the next rollout has been dispatched, so
the device never waits for the log. What is needed to go on (TrainState and
Progress) is saved together; a resumed run is the run that was not stopped.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_tok import rewards
from jaxrl_tok.data import PromptSet, batch_at
from jaxrl_tok.evaluation import credit_rows, held_out_reward, make_drift
from jaxrl_tok.logger import Logger
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.sharding import ROWS, put_rows
from jaxrl_tok.types import Policy, Prompts, SamplingRule, TrainState
from jaxrl_tok.update import make_update


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """When things happen. 0 means never."""

  seed: int = 0
  num_prompts: int = 32  # C
  max_steps: int = 1000
  eval_every: int = 50
  eval_batch: int = 512  # held-out prompts at a time
  save_every: int = 0  # and always at the end
  stop_at_reward: float | None = None  # held-out, greedy
  patience: int = 0  # evaluations without a better one
  log_kl: bool = True  # at each evaluation, where there is a reference


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


class Parts(NamedTuple):
  """The step's functions, those of the device compiled."""

  sample: Callable  # (state.weights, key, Prompts, rule) -> Rollout
  update: Callable  # (state, rollout, reward, rule) -> (state, metrics, A)
  greedy: Callable  # (state.weights, key, Prompts, rule) -> Rollout
  drift: Callable | None  # (reference, rollout, rule) -> KL
  score: Callable  # (tokens, mask, examples) -> rewards.Scores
  judge: Callable  # the same, for held-out data
  decode: Callable  # lists of ids -> texts
  device_reward: Callable | None = None  # rollout -> reward [B, T]
  device_weight: float = 1.0


class Interrupted(Exception):
  """A signal asked the run to stop; its state is saved."""


def compile_parts(
  policy: Policy,
  algorithm,
  optimizer,
  sampler: SamplerConfig,
  config: LoopConfig,
  state: TrainState,
  rule: SamplingRule,
  prompt_lengths: tuple[int, int],
  micro_batches: int = 1,
  logits_chunk: int | None = None,
  device_reward: tuple | None = None,
) -> dict[str, Callable]:
  """Compiles the sampler, update, evaluation and drift, side by side.

  prompt_lengths: P of the training and of the held-out prompts.
  device_reward: (function of (params, Rollout), params).

  Must run under jax.set_mesh. Nothing is compiled after this for these shapes.
  """
  mesh = jax.sharding.get_mesh()
  rows = NamedSharding(mesh, PartitionSpec(ROWS))
  whole = NamedSharding(mesh, PartitionSpec())

  def array(*shape, dtype=np.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

  C, E = config.num_prompts, config.eval_batch
  prompts, held_out = (
    Prompts(array(n, P), array(n)) for n, P in zip((C, E), prompt_lengths)
  )
  greedy = dataclasses.replace(
    sampler, samples_per_prompt=1, greedy=True, truncate=False
  )

  def sampling(config):
    sample = make_sampler(policy, config)
    return lambda weights, *args: sample(policy.join(*weights), *args)

  sample = sampling(sampler)
  sampled = jax.eval_shape(sample, state.weights, state.key, prompts, rule)
  rollout = jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), sampled)
  reward = array(*rollout.logp.shape, dtype=np.float32)
  update = make_update(
    policy, algorithm, optimizer, micro_batches, logits_chunk
  )
  # the state comes out placed as it went in: no compilation at step 2
  placed = jax.tree.map(lambda x: x.sharding, state)
  jobs = {
    'sample': (
      jax.jit(sample, out_shardings=rows),
      (state.weights, state.key, prompts, rule),
    ),
    'update': (
      jax.jit(update, donate_argnums=0, out_shardings=(placed, whole, rows)),
      (state, rollout, reward, rule),
    ),
    'greedy': (
      jax.jit(sampling(greedy), out_shardings=rows),
      (state.weights, state.key, held_out, rule),
    ),
  }
  measured = algorithm.needs_reference  # at every step
  if config.log_kl and state.reference_params is not None and not measured:
    drift = jax.jit(make_drift(policy, logits_chunk), out_shardings=whole)
    jobs['drift'] = drift, (state.reference_params, rollout, rule)
  if device_reward is not None:
    function, params = device_reward
    scored = jax.jit(function, out_shardings=rows)
    jobs['device_reward'] = scored, (params, rollout)

  def build(job):
    function, args = job
    with jax.set_mesh(mesh):  # it is of the thread
      return function.lower(*args).compile()

  with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
    built = dict(zip(jobs, pool.map(build, jobs.values())))
  if device_reward is not None:
    built['device_reward'] = functools.partial(built['device_reward'], params)
  return {'drift': None, **built}


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
    self._times[f'time/{phase}'] = now - self._clock
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
    metrics |= {'num_tokens': progress.num_tokens, **times}
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


def _after_step(
  progress: Progress, prompts: Prompts, rows: int, generated: int
) -> Progress:
  C = len(prompts.length)
  read = int(prompts.length.sum()) * rows // C
  return dataclasses.replace(
    progress,
    step=progress.step + 1,
    position=progress.position + C,
    num_tokens=progress.num_tokens + generated + read,
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
  mesh = jax.sharding.get_mesh()
  fold_in = jax.jit(jax.random.fold_in)
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
    while not (reason := stop_reason(progress, config)):
      step = progress.step
      examples, prompts = batch_at(
        data, config.seed, progress.position, config.num_prompts
      )
      rollout = parts.sample(
        state.weights,
        fold_in(state.key, step),
        put_rows(mesh, prompts),
        rule,
      )
      log.flush()  # the step before this one
      tokens, mask = jax.device_get((rollout.tokens, rollout.mask))
      log.mark('rollout')
      scores = parts.score(tokens, mask, examples)
      if parts.device_reward is not None:
        more = jax.device_get(parts.device_reward(rollout))
        scores = rewards.add(scores, 'reward_model', more, parts.device_weight)
      log.mark('score')
      state, metrics, advantage = parts.update(
        state, rollout, put_rows(mesh, scores.reward), rule
      )
      generated = int(mask.sum())
      progress = _after_step(progress, prompts, len(tokens), generated)
      rate = {'learning_rate': float(learning_rate(step))}
      due = config.eval_every and progress.step % config.eval_every == 0
      due = due or progress.step == config.max_steps
      if due and parts.drift is not None:
        metrics['kl'] = parts.drift(state.reference_params, rollout, rule)
      log.hold(progress, generated, metrics, scores.metrics, rate)
      if due:
        log.flush()
        found, _ = look(state.weights)
        logger.metrics('eval', progress.step, found)
        rows = credit_rows(rollout, advantage, scores, examples, parts.decode)
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
