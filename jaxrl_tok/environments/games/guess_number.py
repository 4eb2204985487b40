"""Guess my number: the answers are 'higher' and 'lower'.

A guess that is wrong costs 1, and so does what is no number of the range; the
right one costs nothing. Halving is optimal: with n numbers the mean return is
minus the mean number of guesses before the right one, -1.43 for 7 numbers and
-4.8 for 100 (`optimum`).
"""

import functools
import random
import re

from jaxrl_tok.environments.games.words import episodes
from jaxrl_tok.environments.protocol import Maker

PROMPT = 'I think of a number from {} to {}. Guess it.\n'


class GuessNumber:
  """Episode of guessing; see the module."""

  def __init__(self, max_turns: int = 10):
    self.max_turns = max_turns

  def reset(self, seed: int, example: dict) -> tuple:
    self.low, self.high = example['low'], example['high']
    self.number, self.turns = example['number'], 0
    if not self.low <= self.number <= self.high:
      raise ValueError(
        f'the number {self.number} is not in {self.low}..{self.high}; correct '
        'the example'
      )
    return '', {}

  def step(self, action: str) -> tuple:
    self.turns += 1
    found = re.search(r'-?\d+', action)
    guess = int(found[0]) if found and len(found[0]) < 10 else None
    if guess == self.number:
      return 'right\n', 0.0, True, False, {'success': True}
    if guess is None or not self.low <= guess <= self.high:
      text = f'a number from {self.low} to {self.high}\n'
    else:
      text = 'higher\n' if guess < self.number else 'lower\n'
    over = self.turns >= self.max_turns
    return text, -1.0, False, over, {'success': False}


def guess_number(max_turns: int = 10) -> Maker:
  """Maker of episodes of at most `max_turns` guesses."""
  return functools.partial(GuessNumber, max_turns)


def guess_number_examples(
  low: int = 1, high: int = 100, split: str = 'train', count: int | None = None
) -> list[dict]:
  """Records {'prompt', 'low', 'high', 'number'}: every number once, or `count`
  that are drawn, others in each split."""
  numbers = list(range(low, high + 1))
  if not numbers:
    raise ValueError(f'no number is in {low}..{high}; let high be at least low')
  if count is not None:
    numbers = random.Random(split).choices(numbers, k=count)
  prompt = PROMPT.format(low, high)
  return episodes(
    split,
    [
      {'prompt': prompt, 'low': low, 'high': high, 'number': number}
      for number in numbers
    ],
  )


def guess_number_player(example: dict, observations: list, actions: list):
  """Player that halves the numbers which are left."""
  low, high = map(int, re.findall(r'-?\d+', example['prompt'])[-2:])
  for action, answer in zip(actions, observations[1:]):
    if answer == 'higher\n':
      low = int(action) + 1
    elif answer == 'lower\n':
      high = int(action) - 1
  return str((low + high) // 2)


def optimum(count: int) -> float:
  """Best mean return with `count` numbers: in a search tree as full as can be,
  2^d of them are found after d wrong guesses."""
  total, left, depth = 0, count, 0
  while left:
    here = min(left, 2**depth)
    total, left, depth = total + here * depth, left - here, depth + 1
  return -total / count
