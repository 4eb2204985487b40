r"""REINFORCE plays both seats of a negotiation against itself.

  python -m experiments.negotiation

The game is environments/games/negotiation.py: books, hats and balls, worth 10
points to each seat; offers in turn, at most four turns. One policy takes both
seats, and each is paid its own points (--seats 2). The last offer that can
still be accepted is seat 0's, so that in the equilibrium it gets 1.0, and seat
1 what is worth nothing to seat 0: 0.31 on average.

A tiny decoder of words starts from random weights; a turn is 5 tokens at most.
"""

import functools

from jaxrl_tok import Task, environments, main
from jaxrl_tok.data import word_tokenizer
from jaxrl_tok.environments.games.negotiation import ITEMS

# a token is a word or a number with the space before it, or another character
WORD = r' ?[A-Za-z]+| ?\d+|(?m:.)'
SAYINGS = (
  'offer',
  'accept',
  'What? Seat 0:\n',
  'No deal.\n',
  'A deal.\n',
  'There are',
  'Points of seat 0:',
  'You would get 0 books.',
  'Seat 1:\n',
)


def negotiation(num_games: int = 2000) -> Task:
  """Negotiations of two seats.

  Args:
    num_games: Games to train with; 256 others are held out.
  """
  if num_games < 1:
    raise ValueError(f'--num_games {num_games} must be at least 1')
  texts = [*SAYINGS, *(f' {n}' for n in range(11))]
  texts += [f' {item},' for item in ITEMS]
  return Task(
    environments.negotiation_examples(num_games),
    environment=environments.negotiation(),
    held_out=environments.negotiation_examples(256, 'test'),
    tokenizer=functools.partial(word_tokenizer, texts, WORD),
    description='shares of three items between two seats',
  )


def run(argv=None):
  return main(
    negotiation,
    argv,
    max_steps=400,
    num_prompts=32,
    num_generations=8,
    seats=2,
    max_turns=4,
    max_completion_length=5,
    max_episode_length=80,
    learning_rate=1e-3,
    lr_schedule='linear',
    entropy_coef=0.01,
    length_buckets=1,
    eval_every=50,
    save_every=0,
  )


if __name__ == '__main__':
  run()
