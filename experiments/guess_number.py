r"""REINFORCE learns to halve an interval, turn by turn.

  python -m experiments.guess_number

The game is environments/games/guess_number.py: 'higher' or 'lower' after each
guess, a wrong one costs 1. Numbers are tokens of a tiny decoder that starts
from random weights. Halving is optimal: a mean return of -2.27 for 15 numbers.
Held-out, before and after 300 steps, with seeds 0, 1 and 2: -8.73 to -2.73,
-8.27 to -2.47 and -8.20 to -2.73, every number found in the end; 1:20 on 2 CPU
cores.

A turn is one token: --max_completion_length 1 leaves no room for an end token,
and --cut_turns act gives the environment the number. The held-out episodes are
the same numbers, greedily.
"""

import functools

from jaxrl_tok import Task, environments, main
from jaxrl_tok.data import word_tokenizer

# a token is a line: a prompt, a number, an answer
LINE = r'[^\n]+\n?|\n'


def guess_number(high: int = 15, repeat: int = 4) -> Task:
  """Guess my number.

  Args:
    high: Largest number; the smallest is 1.
    repeat: Records of each number.
  """
  if high < 2:
    raise ValueError(f'--high {high} leaves nothing to guess; pass 2 or more')
  train = [
    record
    for i in range(repeat)
    for record in environments.guess_number_examples(1, high, f'train {i}')
  ]
  texts = [train[0]['prompt'], 'higher\n', 'lower\n', 'right\n']
  texts += [f'a number from 1 to {high}\n', *map(str, range(1, high + 1))]
  return Task(
    train,
    environment=environments.guess_number(),
    held_out=environments.guess_number_examples(1, high, 'test'),
    tokenizer=functools.partial(word_tokenizer, texts, LINE),
    description=f'a hidden number from 1 to {high}',
  )


def run(argv=None):
  return main(
    guess_number,
    argv,
    max_steps=300,
    num_prompts=30,
    num_generations=8,
    max_turns=10,
    max_completion_length=1,
    max_episode_length=20,
    learning_rate=1e-3,
    lr_schedule='linear',
    entropy_coef=0.01,
    length_buckets=1,
    eval_every=50,
    save_every=0,
  )


if __name__ == '__main__':
  run()
