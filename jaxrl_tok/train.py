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
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_tok import checkpoint
from jaxrl_tok.data import PromptSet, batch_at
from jaxrl_tok.logger import Logger
from jaxrl_tok.policy import evaluate
from jaxrl_tok.losses import k3, log_ratio
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.sharding import ROWS, put_rows
from jaxrl_tok.types import Policy, Prompts, Rollout, SamplingRule, TrainState
from jaxrl_tok.update import make_update


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """When things happen. 0 means never."""

  seed: int = 0
  num_prompts: int = 32  # C
  max_steps: int = 1000
  eval_every: int = 50
  save_every: int = 0
  stop_at_reward: float | None = None  # held-out, greedy
  patience: int = 0  # evaluations without a better one


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
  """The step's functions, compiled."""

  sample: Callable  # (params, key, Prompts, rule) -> Rollout
  update: Callable  # (state, rollout, reward, rule) -> (state, metrics, A)
  greedy: Callable  # (params, key, Prompts [E], rule) -> Rollout
  score: Callable  # (tokens, mask, examples) -> rewards.Scores
  judge: Callable  # the same, for held-out data


class Interrupted(Exception):  # noqa: N818
  """A signal asked the run to stop; its state is saved."""


def compile_parts(
  policy: Policy,
  algorithm,
  optimizer,
  sampler: SamplerConfig,
  state: TrainState,
  rule: SamplingRule,
  data: PromptSet,
  held_out: PromptSet,
  num_prompts: int,
  eval_prompts: int,
  score: Callable,
  judge: Callable,
  micro_batches: int = 1,
  logits_chunk: int | None = None,
) -> Parts:
  """Compiles the sampler, the update and the evaluation, side by side.

  Must run under jax.set_mesh. Nothing is compiled after this for these
  shapes.
  """
  mesh = jax.sharding.get_mesh()
  rows = NamedSharding(mesh, PartitionSpec(ROWS))

  def prompts(count, P):
    return Prompts(
      jax.ShapeDtypeStruct((count, P), np.int32, sharding=rows),
      jax.ShapeDtypeStruct((count,), np.int32, sharding=rows),
    )

  train_prompts = prompts(num_prompts, data.tokens.shape[1])
  eval_shape = prompts(eval_prompts, held_out.tokens.shape[1])
  greedy = dataclasses.replace(
    sampler, samples_per_prompt=1, greedy=True, truncate=False
  )
  sample_fn = make_sampler(policy, sampler)
  shapes = jax.eval_shape(
    sample_fn, state.params, state.key, train_prompts, rule
  )
  rollout = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), shapes
  )
  reward = jax.ShapeDtypeStruct(rollout.logp.shape, np.float32, sharding=rows)
  # the state comes out placed as it went in: no compilation at step 2
  placed = jax.tree.map(lambda x: x.sharding, state)
  update_fn = make_update(
    policy, algorithm, optimizer, micro_batches, logits_chunk
  )
  whole = NamedSharding(mesh, PartitionSpec())
  jobs = (
    (
      jax.jit(sample_fn, out_shardings=rows),
      (state.params, state.key, train_prompts, rule),
    ),
    (
      jax.jit(
        update_fn, donate_argnums=0, out_shardings=(placed, whole, rows)
      ),
      (state, rollout, reward, rule),
    ),
    (
      jax.jit(make_sampler(policy, greedy), out_shardings=rows),
      (state.params, state.key, eval_shape, rule),
    ),
  )
  def build(job):  # set_mesh is per thread
    function, args = job
    with jax.set_mesh(mesh):
      return function.lower(*args).compile()

  with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
    sample, update, greedy = pool.map(build, jobs)
  return Parts(sample, update, greedy, score, judge)


def evaluate_held_out(
  parts: Parts, state: TrainState, held_out: PromptSet, rule, eval_prompts: int
):
  """Greedy completions of all held-out prompts.

  Returns (metrics, rows): the mean reward and length, and one dict a prompt.
  """
  mesh = jax.sharding.get_mesh()
  n = len(held_out.examples)
  rewards, lengths, rows = [], [], []
  for start in range(0, n, eval_prompts):
    index = np.arange(start, start + eval_prompts) % n  # the last one wraps
    real = min(eval_prompts, n - start)
    prompts = Prompts(held_out.tokens[index], held_out.length[index])
    rollout = parts.greedy(state.params, state.key, put_rows(mesh, prompts), rule)
    tokens, mask = jax.device_get((rollout.tokens, rollout.mask))
    examples = [held_out.examples[i] for i in index[:real]]
    scores = parts.judge(tokens[:real], mask[:real], examples)
    totals = scores.reward.sum(1)
    rewards.extend(totals.tolist())
    lengths.extend(mask[:real].sum(1).tolist())
    rows.extend(
      {**_described(example), 'completion': text, 'reward': float(total)}
      for example, text, total in zip(examples, scores.completions, totals)
    )
  metrics = {
    'eval/reward': float(np.mean(rewards)),
    'eval/mean_length': float(np.mean(lengths)),
  }
  return metrics, rows


def _described(example: dict) -> dict:
  answer = example.get('answer')
  return {
    'prompt': example['prompt'],
    'answer': None if answer is None else str(answer),
  }


def credit_rows(step, rollout, advantage, scores, examples, tokenizer, limit=4):
  """samples.jsonl rows of the first `limit` prompts: credit token by token."""
  G = len(scores.completions) // len(examples)
  count = min(limit, len(examples)) * G
  tokens, mask, logp, advantage = jax.device_get(
    (rollout.tokens, rollout.mask, rollout.logp, advantage)
  )
  rows = []
  for b in range(count):
    chosen = mask[b]
    rows.append(
      {
        'step': step,
        'split': 'train',
        **_described(examples[b // G]),
        'completion': scores.completions[b],
        'reward': float(scores.reward[b].sum()),
        'tokens': [tokenizer.decode([t]) for t in tokens[b][chosen].tolist()],
        'logp': logp[b][chosen].tolist(),
        'rewards': scores.reward[b][chosen].tolist(),
        'advantage': advantage[b][chosen].tolist(),
      }
    )
  return rows


def stop_reason(progress: Progress, config: LoopConfig) -> str | None:
  """Why a run should end here, or None."""
  reached, best = config.stop_at_reward, progress.eval_reward
  if reached is not None and best is not None and best >= reached:
    return f'held-out reward {best:.3f} reached {reached}'
  if config.patience and progress.evals_since_best >= config.patience:
    return f'no better held-out reward in {config.patience} evaluations'
  if progress.step >= config.max_steps:
    return f'max_steps {config.max_steps}'
  return None


@contextlib.contextmanager
def stop_requested():
  """Yields a function that is True once SIGINT or SIGTERM came. A second
  signal ends the process at once."""
  came = []

  def note(number, frame):
    came.append(number)
    for s in kept:
      signal.signal(s, signal.SIG_DFL)

  kept = {}
  try:
    for s in (signal.SIGINT, signal.SIGTERM):
      kept[s] = signal.signal(s, note)
  except ValueError:  # not the main thread: signals are not ours
    kept.clear()
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


def train(
  state: TrainState,
  parts: Parts,
  config: LoopConfig,
  data: PromptSet,
  held_out: PromptSet,
  rule: SamplingRule,
  eval_prompts: int,
  tokenizer: Any,
  logger: Logger,
  checkpoints=None,
  flags: dict | None = None,
  progress: Progress | None = None,
  learning_rate: Callable = lambda step: 0.0,
) -> tuple[TrainState, Progress, str]:
  """Runs steps until something says stop; see the module docstring.

  Must run under jax.set_mesh. Returns (state, progress, why it stopped).
  Raises Interrupted, after saving, when a signal came.
  """
  mesh = jax.sharding.get_mesh()
  progress = progress or Progress()
  rows = jax.jit(jax.random.fold_in)
  clock = time.monotonic()
  pending = None  # (step, metrics on the device, metrics of the host)
  warned = set()

  def flush():
    """Waits for the last update and logs its step."""
    nonlocal pending, clock
    if pending is None:
      return
    step, on_device, on_host = pending
    pending = None
    metrics = {k: float(v) for k, v in jax.device_get(on_device).items()}
    now = time.monotonic()
    metrics |= on_host
    metrics['time/update'] = now - clock
    clock = now
    metrics['step_time'] = sum(
      metrics[f'time/{x}'] for x in ('rollout', 'score', 'update')
    )
    generated = metrics.pop('generated')
    metrics['tokens_per_second'] = generated / metrics['step_time']
    logger.metrics('train', step, metrics)
    for kind, text in warnings_of(metrics).items():
      if kind not in warned:
        warned.add(kind)
        logger.warn(f'step {step}: {text}')
    held = progress.eval_reward
    show(
      step,
      f'reward {metrics["reward"]:.3f}'
      + (f'  held-out {held:.3f}' if held is not None else '')
      + (f'  kl {metrics["kl"]:.4f}' if 'kl' in metrics else '')
      + f'  entropy {metrics["entropy"]:.3f}'
      + f'  {metrics["tokens_per_second"]:,.0f} tok/s',
    )

  def save():
    if checkpoints is not None and progress.step != checkpoints.latest_step():
      checkpoint.save(
        checkpoints, state, dataclasses.asdict(progress), flags or {}
      )

  with (
    logger.bar('train', config.max_steps, progress.step) as show,
    stop_requested() as asked,
  ):
    while not (reason := stop_reason(progress, config)):
      step = progress.step
      examples, prompts = batch_at(
        data, config.seed, progress.position, config.num_prompts
      )
      key = rows(state.key, step)
      rollout = parts.sample(state.params, key, put_rows(mesh, prompts), rule)
      flush()  # the step before this one
      tokens, mask = jax.device_get((rollout.tokens, rollout.mask))
      rolled = time.monotonic()
      scores = parts.score(tokens, mask, examples)
      scored = time.monotonic()
      state, metrics, advantage = parts.update(
        state, rollout, put_rows(mesh, scores.reward), rule
      )
      generated = int(mask.sum())
      G = len(tokens) // config.num_prompts
      read = int(prompts.length.sum()) * G
      progress = dataclasses.replace(
        progress,
        step=step + 1,
        position=progress.position + config.num_prompts,
        num_tokens=progress.num_tokens + generated + read,
      )
      host = {
        **scores.metrics,
        'num_tokens': progress.num_tokens,
        'learning_rate': float(learning_rate(step)),
        'time/rollout': rolled - clock,
        'time/score': scored - rolled,
        'generated': generated,
      }
      pending, clock = (step + 1, metrics, host), scored
      due = config.eval_every and progress.step % config.eval_every == 0
      if due or progress.step == config.max_steps:
        flush()
        found, _ = evaluate_held_out(parts, state, held_out, rule, eval_prompts)
        logger.metrics('eval', progress.step, found)
        logger.samples(
          credit_rows(
            progress.step, rollout, advantage, scores, examples, tokenizer
          )
        )
        progress = _after_evaluation(progress, found['eval/reward'])
        clock = time.monotonic()
      if config.save_every and progress.step % config.save_every == 0:
        flush()
        save()
        clock = time.monotonic()
      if asked():
        flush()
        save()
        raise Interrupted(f'stopped by a signal after step {progress.step}')
    flush()
  save()
  return state, progress, reason


def _after_evaluation(progress: Progress, reward: float) -> Progress:
  best = progress.best_reward
  better = best is None or reward > best
  return dataclasses.replace(
    progress,
    eval_reward=reward,
    best_reward=reward if better else best,
    evals_since_best=0 if better else progress.evals_since_best + 1,
  )
