"""Turns: collector of episodes, and their rewards.

The environment's reward is one of the rewards, with the name REWARD, a number
on the last token of each turn; functions of the task's own judge the whole
episode, that is all that the policy said in it. See episodes.py.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxrl_tok import processes
from jaxrl_tok.data import PromptSet, batch_at
from jaxrl_tok.rewards.scoring import HostScores, count_missing, merge_metrics
from jaxrl_tok.step.collectors import (
  Batch,
  Collector,
  Scorer,
  TokenCounts,
  score,
)
from jaxrl_tok.step.episodes import (
  TRAINING,
  Episode,
  Played,
  Sizes,
  World,
  episode_seeds,
  play,
)
from jaxrl_tok.types import Prompts, TrainState

REWARD = 'environment'  # name of the environment's reward


# --- scores -------------------------------------------------------------------


def with_rewards(scorer: Scorer, played: Played, on_error: str) -> Scorer:
  """Scorer that adds the environment's rewards of these episodes, and their
  turns for samples.jsonl."""
  failed = np.array([e.ended == 'error' for e in played.episodes])
  empty = np.array([not any(e.mask) for e in played.episodes])
  for episode in played.episodes:
    if episode.ended in ('deadline', 'error'):
      scorer.warn(REWARD, f'{episode.info["error"]}; its episode ends there')
      break

  def host(tokens, mask, examples, trainer_state=None) -> HostScores:
    found = scorer.host(tokens, mask, examples, trainer_state)
    reward = np.zeros(mask.shape, np.float32)
    for row, episode in zip(reward, played.episodes):
      row[: len(episode.reward)] = episode.reward
    applies = ~empty & ~(failed & (on_error == 'mask'))
    metrics = count_missing(REWARD, applies)
    if on_error != 'raise':
      metrics[f'rewards/{REWARD}/errors'] = float(failed.sum())
    if empty.any():  # reset was late: there is nothing to learn from
      none = {name: on & ~empty for name, on in found.applies.items()}
      found = found._replace(applies=none)
    episodes = played.episodes
    return found._replace(
      rewards={REWARD: reward} | found.rewards,
      applies={REWARD: applies} | found.applies,
      metrics=found.metrics | metrics,
      extra=found.extra
      | {
        'turns': [e.story for e in episodes],
        'ended_by': [e.ended for e in episodes],
        'numbers': [e.numbers for e in episodes],
      },
    )

  return scorer._replace(host=host)


def episode_metrics(episodes: list[Episode]) -> dict[str, float]:
  """Means of the episodes' numbers, and of the tokens that were observed."""
  found = merge_metrics([e.numbers for e in episodes])
  seen = [len(e.mask) - sum(e.mask) for e in episodes]
  return found | {'turns/observed_tokens': float(np.mean(seen))}


# --- the collector -----------------------------------------------------------


class Opened(NamedTuple):
  """Batch whose prompts are read, before its first turn."""

  prompts: Prompts  # on the host, of this process
  examples: list
  positions: np.ndarray  # int64 [C] of all records, in the data's order
  version: jax.Array
  started: tuple  # (state, key), for a collector that samples again
  cursor: dict


def turns(
  programs: Callable,
  world: World,
  scorer: Scorer,
  data: PromptSet,
  seed: int,
  sizes: Sizes,
) -> Collector:
  """Collector of the episodes of the next prompts.

  programs: (state, key) -> TurnPrograms.
  """
  num_prompts = sizes.num_prompts

  def start(state: TrainState, key, cursor: dict) -> Opened:
    position, mesh = int(cursor['position']), jax.sharding.get_mesh()
    own = processes.own_rows(mesh, num_prompts)
    examples, prompts, _ = batch_at(
      data, seed, position, num_prompts, own, processes.largest
    )
    return Opened(
      prompts,
      examples,
      np.arange(position, position + num_prompts),
      state.step,
      (state, key),
      {'position': np.int64(position + num_prompts)},
    )

  def finish(opened: Opened):
    mesh = jax.sharding.get_mesh()
    own = processes.own_rows(mesh, num_prompts)
    step = int(np.ravel(processes.local(opened.version))[0])
    played = play(
      programs(*opened.started),
      world,
      sizes,
      opened.examples,
      opened.prompts,
      episode_seeds(seed, TRAINING, opened.positions[own]),
      step,
    )
    began = time.monotonic()
    by = with_rewards(scorer, played, world.on_error)
    counts = count_tokens(played.episodes)
    found, told = processes.together(
      lambda: score(by, played.rollout, ({}, {}), opened.examples, step),
      lambda found: [
        found.metrics | episode_metrics(played.episodes),
        *counts,
      ],
    )
    metrics, *counts = zip(*told)
    metrics = merge_metrics(metrics)
    metrics['time/score'] = played.seconds + time.monotonic() - began
    extra = {k: v for k, v in found.extra.items() if k != 'numbers'}
    batch = Batch(
      found.scored,
      opened.examples,
      opened.positions,
      metrics,
      TokenCounts(num_prompts, *map(sum, counts)),
      extra,
    )
    return batch, opened.cursor

  return Collector(lambda: {'position': np.int64(0)}, start, finish)


def count_tokens(episodes: list[Episode]) -> tuple[int, int, int, int]:
  """Counts (generated, read, greedy, scored), see TokenCounts; prompts and
  observations are read once."""
  chosen = sum(sum(e.mask) for e in episodes)
  all_tokens = sum(len(e.prompt) + len(e.tokens) for e in episodes)
  return chosen, all_tokens - chosen, 0, len(episodes)
