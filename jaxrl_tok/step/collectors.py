"""Collectors: prompts in, scored rollouts out; they wrap each other as optax's
transformations do.

  single_turn(...)             G completions of each of the next prompts
  turns.turns(...)             G episodes in an environment, of each of them
  dynamic(collector, rounds)   until every group's rewards differ (DAPO)
  off_policy.replayed(...)     with groups of earlier steps beside the new ones
  off_policy.ahead(...)        sampled while the step before is scored

`start` dispatches and never waits; `finish` waits for the device, scores on the
host (the one crossing) and returns the next cursor. A cursor is a dict of
numbers and arrays, saved with TrainState: a resumed run repeats no prompt.

Batch.metrics are of all completions that a step samples: counts, as
rewards/NAME/errors, are sums over its rollouts, and what functions log is the
mean. The update's rewards/NAME/mean and std are of the batch that is trained
(step/metrics.py); a collector has no metrics of those names.

Of several processes each reads and scores the prompts whose rows lie on its
devices (processes.py); Batch.examples and .extra are those, counts and metrics
are of all.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_tok import processes
from jaxrl_tok.data import PromptSet, batch_at
from jaxrl_tok.rewards.functions import weight_at
from jaxrl_tok.rewards.scoring import merge_metrics, quote_samples
from jaxrl_tok.sharding import put_replicated, put_rows, put_whole
from jaxrl_tok.types import Rollout, Scored, TrainState

# folded into a step's key by later rounds; below B are the sampler's rows
ROUNDS = 2**30


class TokenCounts(NamedTuple):
  """Tokens and prompts of a batch; arrays [n] for a batch of n steps."""

  prompts: Any  # taken from the data
  generated: Any  # completion tokens; None: the update's metrics have them
  read: Any  # prompt tokens, a group's counted G times
  greedy: Any = 0  # tokens of greedy completions, where they are the baseline
  scored: Any = 0  # completions that rewards judged, greedy ones included


class Batch(NamedTuple):
  """A finished batch: `scored` is all that an update is given."""

  scored: Any  # Scored, or the indices that device_steps' update takes
  examples: list  # records of this process's prompts, all C of a single one
  positions: np.ndarray  # int64 [C] of all records, in the data's order
  metrics: dict  # numbers on the host, of all that the step sampled
  counts: TokenCounts
  extra: dict  # {column: values of own rows} that reward functions logged


class Pending(NamedTuple):
  """A dispatched batch: arrays that the device is still making."""

  rollout: Rollout
  device: tuple  # (rewards, applies) of rewards on the device
  greedy: Rollout | None
  greedy_device: tuple
  positions: np.ndarray  # int64 [C] of all records, in the data's order
  examples: list | None  # of this process; None: read again by position
  version: jax.Array  # int32 []  updates before this step
  started: tuple  # (state, key), for a collector that samples again
  cursor: dict


class Collector(NamedTuple):
  """Source of batches. Must run under jax.set_mesh."""

  init: Callable  # () -> cursor
  start: Callable  # (state, key, cursor) -> Pending
  finish: Callable  # Pending -> (Batch, cursor)


class Scorer(NamedTuple):
  """Rewards of a task, on the host and on the device."""

  # (tokens, mask, examples, TrainerState) -> rewards.HostScores; without
  # functions on the host it has the texts alone
  host: Callable
  # (Rollout, {column: [C, ...]}) -> (rewards, applies); None without any
  device: Callable | None
  weights: dict  # {name: float, or a function of TrainerState}
  trainer_state: Callable  # step -> rewards.TrainerState
  on_error: str = 'raise'  # see rewards.ON_ERROR
  warn: Callable = lambda name, text: None  # of what was masked or is zero


def token_rewards(scored: Scored) -> np.ndarray:
  """Rewards of tokens float32 [B, T]: Scored.reward, on the host, of the rows
  that are here."""
  rewards, applies, weights, mask = processes.local(
    (scored.rewards, scored.applies, scored.weights, scored.rollout.mask)
  )
  total = np.zeros(mask.shape, np.float32)
  for name, reward in rewards.items():
    total += weights[name] * np.where(mask & applies[name][:, None], reward, 0)
  return total


def total_reward(scored: Scored) -> np.ndarray:
  """Rewards of rows float32 [B]: sums of token_rewards."""
  return token_rewards(scored).sum(1)


def valid_rows(scored: Scored) -> np.ndarray:
  """Scored.valid, bool [B], on the host."""
  mask, applies = processes.local((scored.rollout.mask, scored.applies))
  none = np.zeros(len(mask), bool)  # where there is no reward
  return np.any([none, *applies.values()], axis=0)


class Score(NamedTuple):
  """Scored rollout, with the texts, metrics and columns of its rewards."""

  scored: Scored
  texts: list  # B completions
  metrics: dict
  extra: dict


def score(
  scorer: Scorer, rollout: Rollout, device: tuple, examples: list, step: int
) -> Score:
  """Scores a rollout; waits for it. device: (rewards, applies) found there."""
  mesh = jax.sharding.get_mesh()
  tokens, mask = processes.local((rollout.tokens, rollout.mask))
  trainer_state = scorer.trainer_state(step)
  host = scorer.host(tokens, mask, examples, trainer_state)
  samples = quote_samples(examples, host.texts)
  rewards, applies, errors = check_device(scorer, *device, samples)
  rewards = rewards | put_rows(mesh, host.rewards)
  applies = applies | put_rows(mesh, host.applies)
  weights = {
    name: np.float32(weight_at(scorer.weights[name], name, trainer_state))
    for name in rewards
  }
  scored = Scored(rollout, rewards, applies, put_replicated(mesh, weights))
  changing = {
    f'rewards/{name}/weight': float(weight)
    for name, weight in weights.items()
    if callable(scorer.weights[name])
  }
  metrics = host.metrics | errors | changing
  return Score(scored, host.texts, metrics, host.extra)


def check_device(
  scorer: Scorer, rewards: dict, applies: dict, samples: list[str]
) -> tuple[dict, dict, dict]:
  """Treats values of device rewards that are not finite by scorer.on_error:
  (rewards, applies, metrics). Raises ValueError, in one line.

  samples: completions, quoted, for the error.
  """
  mesh, errors = jax.sharding.get_mesh(), {}
  for name, values in processes.local(rewards).items():
    failed = ~np.isfinite(values).all(axis=1)
    if scorer.on_error != 'raise':
      errors[f'rewards/{name}/errors'] = float(failed.sum())
    if not failed.any():
      continue
    b = int(failed.argmax())
    flag = '; or pass --reward_on_error mask'
    error = ValueError(
      f'@on_device reward {name} gave {values[b][~np.isfinite(values[b])][0]} '
      f'for completion {b} ({samples[b]}); rewards must be finite (return '
      '(values, applies) where it does not apply)'
      + flag
      * (scorer.on_error == 'raise')
    )
    if scorer.on_error == 'raise':
      raise error
    scorer.warn(name, f'{error}; --reward_on_error {scorer.on_error} goes on')
    fixed = np.where(failed[:, None], np.float32(0), values)
    rewards = rewards | put_rows(mesh, {name: fixed})
    if scorer.on_error == 'mask':
      on = processes.local(applies[name]) & ~failed
      applies = applies | put_rows(mesh, {name: on})
  return rewards, applies, errors


def single_turn(
  sample: Callable,
  scorer: Scorer,
  data: PromptSet,
  seed: int,
  num_prompts: int,
  greedy: Callable | None = None,
) -> Collector:
  """Collector of completions of the next `num_prompts` prompts.

  Args:
    sample: (state, key, Prompts) -> Rollout, compiled.
    greedy: one greedy completion of each prompt, where the algorithm wants
      its reward.
  """

  def start(state: TrainState, key, cursor: dict) -> Pending:
    position, mesh = int(cursor['position']), jax.sharding.get_mesh()
    own = processes.own_rows(mesh, num_prompts)
    examples, prompts, columns = batch_at(
      data, seed, position, num_prompts, own, processes.largest
    )
    placed, columns = put_rows(mesh, (prompts, columns))

    def dispatch(by):
      rollout = by(state, key, placed)
      on_device = ({}, {})
      if scorer.device is not None:
        on_device = scorer.device(rollout, columns)
      return rollout, on_device

    rollout, on_device = dispatch(sample)
    best, best_on_device = dispatch(greedy) if greedy else (None, ({}, {}))
    return Pending(
      rollout,
      on_device,
      best,
      best_on_device,
      np.arange(position, position + num_prompts),
      examples,
      state.step,
      (state, key),
      {'position': np.int64(position + num_prompts)},
    )

  def finish(p: Pending):
    jax.block_until_ready(p.rollout.mask)
    began = time.monotonic()
    examples = p.examples
    if examples is None:
      own = processes.own_rows(jax.sharding.get_mesh(), num_prompts)
      examples = examples_at(data, seed, p.positions[own])
    found, told = processes.together(
      lambda: score_pending(scorer, p, examples),
      lambda found: [found.metrics, *count_tokens(p.rollout, p.greedy)],
    )
    once = processes.each_row_once(jax.sharding.get_mesh(), num_prompts)
    metrics, *counts = zip(*(told[i] for i in once))
    metrics = merge_metrics(metrics)
    metrics['time/score'] = time.monotonic() - began
    counts = TokenCounts(num_prompts, *map(sum, counts))
    batch = Batch(
      found.scored, examples, p.positions, metrics, counts, found.extra
    )
    return batch, p.cursor

  return Collector(lambda: {'position': np.int64(0)}, start, finish)


def score_pending(scorer: Scorer, p: Pending, examples: list) -> Score:
  """Scores a batch, and the greedy completions that are its baseline."""
  step = int(np.ravel(processes.local(p.version))[0])
  found = score(scorer, p.rollout, p.device, examples, step)
  if p.greedy is None:
    return found
  best = score(scorer, p.greedy, p.greedy_device, examples, step).scored
  known = np.where(valid_rows(best), total_reward(best), np.float32(np.nan))
  placed = put_rows(jax.sharding.get_mesh(), known)
  return found._replace(scored=found.scored._replace(greedy_reward=placed))


def count_tokens(
  rollout: Rollout, greedy: Rollout | None
) -> tuple[int, int, int, int]:
  """Counts (generated, read, greedy, scored) of the rows that are here, see
  TokenCounts."""
  mask, length = processes.local((rollout.mask, rollout.prompts.length))
  read = int(length.sum()) * (len(mask) // len(length))
  if greedy is None:
    return int(mask.sum()), read, 0, len(mask)
  drawn = int(processes.local(greedy.mask).sum())
  return int(mask.sum()), read, drawn, len(mask) + len(length)


def examples_at(data: PromptSet, seed: int, positions: np.ndarray) -> list:
  """Records at positions of the data's order."""
  runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
  found = (batch_at(data, seed, int(run[0]), len(run))[0] for run in runs)
  return [example for examples in found for example in examples]


# --- groups, on the host -----------------------------------------------------


def has_reward_variance(
  scored: Scored, by_reward: bool = False, ended_only: bool = False
) -> np.ndarray:
  """Groups bool [C] whose valid rows do not all have one reward.

  Args:
    by_reward: compares each reward by itself over the rows that it applies to,
      as its normalisation does (normalize_then_sum).
    ended_only: asks for a valid row that ended, where others are not learnt
      from (mask_truncated_completions).
  """
  C = len(scored.rollout.prompts.length)
  valid = valid_rows(scored)
  some = valid & processes.local(scored.rollout.ended) if ended_only else valid
  some = some.reshape(C, -1).any(axis=1)

  def varies(rows, on):
    rows, on = rows.reshape(C, -1), on.reshape(C, -1)
    high = np.where(on, rows, -np.inf).max(axis=1)
    return high > np.where(on, rows, np.inf).min(axis=1)

  if not by_reward:
    return some & varies(total_reward(scored), valid)
  applies = processes.local(scored.applies)
  alone = (
    scored._replace(
      rewards={name: reward},
      applies={name: applies[name]},
      weights={name: scored.weights[name]},
    )
    for name, reward in scored.rewards.items()
  )
  each = [varies(total_reward(s), valid_rows(s)) for s in alone]
  return some & np.any(each, axis=0)


def padded_prompts(scored: list[Scored], length: int = 0) -> list[Scored]:
  """Copies records to the host and pads their prompts to one length, at least
  `length`."""
  scored = processes.whole(scored)
  P = max(length, *(s.rollout.prompts.tokens.shape[1] for s in scored))

  def longer(s: Scored) -> Scored:
    prompts = s.rollout.prompts
    more = ((0, 0), (0, P - prompts.tokens.shape[1]))
    prompts = prompts._replace(tokens=np.pad(prompts.tokens, more))
    return s._replace(rollout=s.rollout._replace(prompts=prompts))

  return list(map(longer, scored))


def take_scored(
  scored: list[Scored], groups: list[tuple[int, int]], num_prompts: int
) -> Scored:
  """Gathers groups (index of a record, of its prompt) in one record, on the
  host; all records have `num_prompts` prompts and equal weights."""

  def one(*leaves):
    if not np.ndim(leaves[0]):
      return leaves[0]
    split = [x.reshape(num_prompts, -1, *x.shape[1:]) for x in leaves]
    chosen = np.stack([split[b][c] for b, c in groups])
    return chosen.reshape(-1, *leaves[0].shape[1:])

  return jax.tree.map(one, *scored)


def place(scored: Scored) -> Scored:
  """Places a record of the host on the mesh's devices, split by row."""
  mesh, weights = jax.sharding.get_mesh(), scored.weights
  placed = put_whole(mesh, scored._replace(weights={}))
  return placed._replace(weights=put_replicated(mesh, weights))


# --- wrappers ----------------------------------------------------------------


def dynamic(
  collector: Collector,
  rounds: int,
  varied: Callable = has_reward_variance,
  examples: Callable | None = None,
) -> Collector:
  """Dynamic sampling: replaces groups of equal rewards, which have no
  advantage, by groups of the next prompts. After `rounds` rollouts they fill
  what is missing. DAPO, arXiv:2503.14476.

  Args:
    varied: Scored -> groups bool [C] that are kept.
    examples: positions int64 [n] -> their records, which several processes
      read again, as groups move between them; what functions log by completion
      is then left out.
  """

  def finish(pending: Pending):
    (state, key), batches, good, rest = pending.started, [], [], []
    while True:
      batch, cursor = collector.finish(pending)
      number, C = len(batches), len(batch.positions)
      batches.append(batch)
      for group, fine in enumerate(varied(processes.whole(batch.scored))):
        (good if fine else rest).append((number, group))
      if len(good) >= C or len(batches) >= rounds:
        break
      again = jax.random.fold_in(key, ROUNDS + number + 1)
      pending = collector.start(state, again, cursor)
    counts = TokenCounts(*map(sum, zip(*(b.counts for b in batches))))
    metrics = merge_metrics([b.metrics for b in batches]) | {
      'dynamic_sampling/rounds': len(batches),
      'dynamic_sampling/varied': len(good) / (len(batches) * C),
      'dynamic_sampling/missing': max(0, C - len(good)),
      'time/score': sum(b.metrics['time/score'] for b in batches),
    }
    chosen = select_groups(batches, (good + rest)[:C], examples)
    return chosen._replace(metrics=metrics, counts=counts), cursor

  return collector._replace(finish=finish)


def select_groups(
  batches: list[Batch],
  groups: list[tuple[int, int]],
  examples: Callable | None = None,
) -> Batch:
  """Gathers groups (index of a batch, of its prompt) in one batch; `examples`
  as in `dynamic`."""
  if len(batches) == 1:
    return batches[0]
  C = len(batches[0].positions)
  scored = take_scored(padded_prompts([b.scored for b in batches]), groups, C)
  G = len(scored.rollout.mask) // len(groups)

  def rows(name):  # a function may log a column now and then
    found = [b.extra.get(name, [None] * (C * G)) for b in batches]
    return [x for b, c in groups for x in found[b][c * G : (c + 1) * G]]

  positions = np.array([batches[b].positions[c] for b, c in groups])
  chosen = batches[0]._replace(scored=place(scored), positions=positions)
  if processes.count() > 1:
    own = processes.own_rows(jax.sharding.get_mesh(), C)
    return chosen._replace(examples=examples(positions[own]), extra={})
  return chosen._replace(
    examples=[batches[b].examples[c] for b, c in groups],
    extra={name: rows(name) for b in batches for name in b.extra},
  )
