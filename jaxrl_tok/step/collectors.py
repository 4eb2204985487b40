"""The host's half of a step: prompts in, a scored batch out.

1. `draw`     the next C prompts, a rollout, its rewards.
2. `collect`  the same until every group's rewards differ (DAPO's dynamic
   sampling): groups of equal rewards teach nothing and are drawn anew from the
   prompts that follow, at most `rounds` times; what is missing then is filled
   with them. With one round it is `draw`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxrl_tok import rewards
from jaxrl_tok.data import PromptSet, batch_at
from jaxrl_tok.sharding import put_rows
from jaxrl_tok.types import Prompts, Rollout, SamplingRule, TrainState

# folded into a step's key by later rounds; below B are the sampler's rows
ROUNDS = 2**30


class Batch(NamedTuple):
  """C prompts and what was sampled from them."""

  examples: list
  prompts: Prompts  # on the host
  rollout: Rollout  # on the device
  mask: np.ndarray  # bool [B, T], the rollout's
  scores: rewards.Scores
  greedy_reward: np.ndarray | None  # float32 [C]


class TokenCounts(NamedTuple):
  """What a batch cost."""

  prompts: int
  generated: int  # completion tokens
  read: int  # prompt tokens, a group's counted G times


@dataclasses.dataclass(frozen=True)
class Collector:
  """What drawing a batch needs. Functions are those of parts.Parts."""

  sample: Callable
  score: Callable  # (tokens, mask, examples) -> rewards.Scores
  data: PromptSet
  rule: SamplingRule
  seed: int
  num_prompts: int
  # (Rollout, {column: [C, ...]}) -> (reward [B, T], {name: mean})
  device_score: Callable | None = None
  greedy: Callable | None = None  # a completion of each prompt, for ReMax
  rounds: int = 1
  # told 'dispatched' when a rollout is on its way, 'rollout' when it is there,
  # 'score' when it is scored
  phase: Callable = lambda name: None


def scored(c: Collector, rollout: Rollout, examples, columns):
  """(mask, Scores) of a rollout, by host and device."""
  tokens, mask = jax.device_get((rollout.tokens, rollout.mask))
  c.phase('rollout')
  scores = c.score(tokens, mask, examples)
  if c.device_score is not None:
    reward, means = jax.device_get(c.device_score(rollout, columns))
    scores = scores._replace(
      reward=scores.reward + reward,
      metrics=scores.metrics | {k: float(v) for k, v in means.items()},
    )
  c.phase('score')
  return mask, scores


def draw(c: Collector, state: TrainState, key, position: int) -> Batch:
  """The batch of the prompts at a position. Must run under jax.set_mesh."""
  examples, prompts, columns = batch_at(c.data, c.seed, position, c.num_prompts)
  placed, columns = put_rows(jax.sharding.get_mesh(), (prompts, columns))
  rollout = c.sample(state.weights, key, placed, c.rule)
  best = greedy_reward = None
  if c.greedy is not None:
    best = c.greedy(state.weights, key, placed, c.rule)
  c.phase('dispatched')
  mask, scores = scored(c, rollout, examples, columns)
  if best is not None:
    greedy_reward = scored(c, best, examples, columns)[1].reward.sum(1)
  return Batch(examples, prompts, rollout, mask, scores, greedy_reward)


def has_reward_variance(batch: Batch) -> np.ndarray:
  """bool [C]: the group's rewards are not all equal."""
  rows = batch.scores.reward.sum(1).reshape(len(batch.examples), -1)
  return np.ptp(rows, axis=1) > 1e-6


def pick(batches: list[Batch], groups: list[tuple[int, int]]) -> Batch:
  """The batch of the groups (which batch, which of its prompts)."""
  hosts = [jax.device_get(b.rollout) for b in batches]
  C = len(batches[0].examples)

  def take(trees):  # leaves [C, ...] or [B, ...]: by whole groups
    def one(*leaves):
      split = [np.asarray(x).reshape(C, -1, *x.shape[1:]) for x in leaves]
      chosen = np.stack([split[b][c] for b, c in groups])
      return chosen.reshape(-1, *leaves[0].shape[1:])

    return jax.tree.map(one, *trees)

  texts = [np.array(b.scores.completions, object) for b in batches]
  rollout = take(hosts)
  scores = rewards.Scores(
    take([b.scores.reward for b in batches]),
    batches[0].scores.metrics,  # what the policy earns: of all its prompts
    take(texts).tolist(),
  )
  greedy_reward = None
  if batches[0].greedy_reward is not None:
    greedy_reward = take([b.greedy_reward for b in batches])
  return Batch(
    [batches[b].examples[c] for b, c in groups],
    rollout.prompts,
    put_rows(jax.sharding.get_mesh(), rollout),
    rollout.mask,
    scores,
    greedy_reward,
  )


def collect(c: Collector, state: TrainState, key, position: int):
  """-> (Batch, Spent, metrics). Must run under jax.set_mesh."""
  batches, good, rest = [], [], []
  while True:
    number = len(batches)
    here = jax.random.fold_in(key, ROUNDS + number) if number else key
    at = position + number * c.num_prompts
    batches.append(draw(c, state, here, at))
    if c.rounds <= 1:
      break
    for group, fine in enumerate(has_reward_variance(batches[-1])):
      (good if fine else rest).append((number, group))
    if len(good) >= c.num_prompts or len(batches) == c.rounds:
      break
  lengths = [int(b.prompts.length.sum()) for b in batches]
  G = len(batches[0].mask) // c.num_prompts
  spent = TokenCounts(
    c.num_prompts * len(batches),
    sum(int(b.mask.sum()) for b in batches),
    sum(lengths) * G,
  )
  batch, metrics = batches[0], {}
  if c.rounds > 1:
    metrics = {
      'resample/rounds': len(batches),
      'resample/varied': len(good) / spent.prompts,
      'resample/missing': max(0, c.num_prompts - len(good)),
    }
    groups = (good + rest)[: c.num_prompts]
    if len(batches) > 1:
      batch = pick(batches, groups)
  return batch, spent, metrics
