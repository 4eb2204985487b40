"""Dialogue: a simulated user wants a table in a restaurant.

The user has a goal, a kind of food, an area and a price; one of them is told in
the first sentence. The policy asks for the others, and books:

  # user    Hello, I would like a table, and thai food.
  # policy  which area please?
  # user    In the north.
  # policy  which price please?
  # user    It should be cheap.
  # policy  book thai north cheap            1 for the right one

- Answers: a kind user, asked with 'please', tells everything at once; any other
  answers the first thing that was asked.
- Budget: the user waits for `patience` turns. A turn without 'please' (other
  than booking), a question that was answered before, and one that is not
  understood take two of them. When none is left the user leaves: -1.
- Reward: 1 for the right booking, 0 for a wrong one, and -0.1 for each turn
  before it.

`dialogue_player` asks for one thing after the other, with 'please': it is
right each time, with a mean return of 0.85 over dialogue_examples() (0.9 with a
kind user, 0.8 with others). A guess of what was not told is right in a third of
the cases at best, and costs more than a question.
"""

import itertools
import random
import re

from jaxrl_tok.environments.games.words import episodes, normal
from jaxrl_tok.environments.protocol import Maker

SLOTS = {
  'food': ('thai', 'french', 'indian', 'greek'),
  'area': ('north', 'south', 'east', 'west'),
  'price': ('cheap', 'moderate', 'expensive'),
}
SAID = {
  'food': 'I would like {} food.',
  'area': 'In the {}.',
  'price': 'It should be {}.',
}
HELLO = {
  'food': 'Hello, I would like a table, and {} food.\n',
  'area': 'Hello, I would like a table in the {}.\n',
  'price': 'Hello, I would like a table, {} please.\n',
}
SLOT_OF = {value: slot for slot, values in SLOTS.items() for value in values}
UNSURE = 'Pardon?\n'
TURN, LEFT = -0.1, -1.0  # rewards of a turn, and where the user leaves


class Dialogue:
  """Episode with a user; see the module."""

  def reset(self, seed: int, example: dict) -> tuple:
    self.goal, self.patience = dict(example['goal']), example['patience']
    self.kind, self.told = example['kind'], {example['first']}
    if set(self.goal) != set(SLOTS):
      raise ValueError(
        f'a goal of {sorted(self.goal)}; give one of each of {sorted(SLOTS)}'
      )
    return '', {}

  def step(self, action: str) -> tuple:
    words = re.findall(r'[a-z]+', normal(action))
    if words[:1] == ['book']:
      chosen = {SLOT_OF[word]: word for word in words if word in SLOT_OF}
      right = chosen == self.goal and len(words) == 1 + len(SLOTS)
      text = 'Thank you!\n' if right else 'That is not what I wanted.\n'
      return text, float(right), True, False, {'success': right}
    text, cost = self.reply(words)
    self.patience -= cost
    if self.patience <= 0:
      return 'Goodbye.\n', LEFT, True, False, {'success': False}
    return text, TURN, False, False, {'success': False}

  def reply(self, words: list[str]) -> tuple[str, int]:
    """(what the user says, patience that it takes)."""
    polite = 'please' in words
    asked = [word for word in words if word in SLOTS]
    if not asked:
      return UNSURE, 2
    told = asked[:1]
    again = told[0] in self.told
    if polite and self.kind and not again:
      told = [slot for slot in SLOTS if slot not in self.told]
    self.told.update(told)
    text = ' '.join(SAID[slot].format(self.goal[slot]) for slot in told)
    return f'{text}\n', 1 if polite and not again else 2


def dialogue() -> Maker:
  """Maker of dialogues."""
  return Dialogue


def dialogue_examples(
  count: int = 288, split: str = 'train', seed: int = 0
) -> list[dict]:
  """Records {'prompt', 'goal', 'first', 'kind', 'patience'}.

  All 288 users (goals, what is told first, kind or not) in an order of their
  own for each split; more of them repeat, with another patience of 4 to 6.
  """
  users = list(itertools.product(*SLOTS.values(), SLOTS, (True, False)))
  rng = random.Random(f'{split} {seed}')
  rng.shuffle(users)
  records = []
  for i in range(count):
    *values, first, kind = users[i % len(users)]
    goal = dict(zip(SLOTS, values))
    records.append(
      {
        'prompt': HELLO[first].format(goal[first]),
        'goal': goal,
        'first': first,
        'kind': kind,
        'patience': rng.randint(4, 6),
      }
    )
  return episodes(split, records)


def dialogue_player(example: dict, observations: list, actions: list) -> str:
  """Player that asks, with 'please', for what was not told, then books."""
  heard = re.findall(r'[a-z]+', ' '.join([example['prompt'], *observations]))
  goal = {SLOT_OF[word]: word for word in heard if word in SLOT_OF}
  missing = [slot for slot in SLOTS if slot not in goal]
  if missing:
    return f'which {missing[0]} please?'
  return f'book {" ".join(goal[slot] for slot in SLOTS)}'
