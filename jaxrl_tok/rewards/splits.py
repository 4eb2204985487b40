"""Splits of a completion's reward over its tokens: controls of dense credit.

  potential   a number for each token, as the reward function gives it
  outcome     their sum, on the last chosen token
  shuffled    the numbers permuted in time: equal sum, credit at random
  constant    1 on the last chosen token, whatever the text: no reward at all

`shuffled` and `constant` are the controls of Choshen et al. (ICLR 2020,
arXiv:1907.01752): a gain that they bring, too, is no gain of the dense reward.
A constant reward makes a policy's distribution more peaked where no baseline
takes it away; with leave_one_out, group_mean or greedy every advantage is 0 and
nothing is learnt.

Only rewards that are lists of a number for each token are split.
"""

import zlib
from collections.abc import Callable

import numpy as np


def as_given(reward: np.ndarray, mask: np.ndarray, draw) -> np.ndarray:
  """Rewards of tokens as they are."""
  return reward


def on_last(reward: np.ndarray, mask: np.ndarray, draw) -> np.ndarray:
  """Sum of a completion's rewards on its last chosen token."""
  total = np.where(mask, reward, 0).sum(1, dtype=np.float64)
  return place_last(total, mask)


def shuffle(reward: np.ndarray, mask: np.ndarray, draw) -> np.ndarray:
  """Rewards of a completion in random order over its chosen tokens; a row's
  order depends on the draw and its place in the batch alone."""
  found = np.zeros_like(reward)
  for b, keys in enumerate(draw().random(mask.shape)):
    columns = np.flatnonzero(mask[b])
    found[b, columns] = reward[b, columns[np.argsort(keys[columns])]]
  return found


def constant(reward: np.ndarray, mask: np.ndarray, draw) -> np.ndarray:
  """Reward 1 on the last chosen token of every completion."""
  return place_last(np.ones(len(mask)), mask)


def place_last(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Values [B] on the last chosen tokens: float32 [B, T]."""
  T = mask.shape[1]
  last = T - 1 - mask[:, ::-1].argmax(1)
  on = mask & (np.arange(T) == last[:, None])
  return np.where(on, values[:, None], 0).astype(np.float32)


# {word of --credit_split: (reward [B, T], mask [B, T], draw) -> reward}
SPLITS = {
  'potential': as_given,
  'outcome': on_last,
  'constant': constant,
  'shuffled': shuffle,
}


def make_split(how: str = 'potential', seed: int = 0) -> Callable:
  """Returns split(rewards, by_token, applies, mask, step) -> (rewards,
  metrics).

  Rewards are {name: float32 [B, T]}, `by_token` and `applies` {name: bool [B]};
  rows that are not by token stay as they are. A random order is a function of
  (seed, step, name), so that a resumed run repeats it. With 'constant',
  rewards/NAME/outcome is the mean that the reward itself has.

  Raises ValueError once every function has applied to a completion and none
  has given a number for each token: the split has no effect.
  """
  function, applied, effective = SPLITS[how], set(), set()

  def split(rewards, by_token, applies, mask, step: int) -> tuple[dict, dict]:
    if function is as_given:
      return rewards, {}
    applied.update(name for name, rows in applies.items() if rows.any())
    effective.update(name for name, rows in by_token.items() if rows.any())
    if not effective and applied >= rewards.keys():
      raise ValueError(
        f'--credit_split {how} has no effect: {", ".join(rewards)} gives one '
        'number for each completion, and none for each token; leave it out, '
        'or pass a reward of rewards.potentials'
      )
    found, metrics = {}, {}
    for name, reward in rewards.items():
      number = zlib.crc32(name.encode())

      def draw(number=number):
        return np.random.default_rng((seed, step, number))

      rows = by_token[name] & applies[name]
      changed = function(reward, mask, draw)
      found[name] = np.where(rows[:, None], changed, reward)
      if function is constant and rows.any():
        metrics[f'rewards/{name}/outcome'] = float(reward[rows].sum(1).mean())
    return found, metrics

  return split
