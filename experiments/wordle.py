r"""REINFORCE learns to guess hidden words, turn by turn.

  python -m experiments.wordle

The game is environments/games/wordle.py: 200 words, six guesses, a letter of
answer for each letter; a wrong guess costs 1. A tiny decoder of words (a word
is a token, an answer as well) first imitates games of a scripted player half of
whose guesses are any word, 8 for each hidden word, and then learns from the
reward: 2.5 minutes on 2 CPU cores beside other work.

  seeds 0, 1, 2            mean return           words found
  after the imitation      -2.28, -2.23, -2.27   93, 94, 93 %
  300 steps later          -1.90, -1.90, -1.86   98, 99, 98 %
  the player, no noise     -1.60                 100 %

Without imitation (--games 0) 300 steps are too few: -5.95 before and after.

A turn is one token: --max_completion_length 1 leaves no room for an end token,
and --cut_turns act gives the environment the word. The held-out episodes are
the same 200 words, greedily.
"""

import functools

from jaxrl_tok import Task, environments, main
from jaxrl_tok.data import word_tokenizer
from jaxrl_tok.environments.games.wordle import PROMPT, WORDS
from jaxrl_tok.environments.play import SHOWN, demonstrations, noisy

# a token is a line: a prompt, a word, an answer
LINE = r'[^\n]+\n?|\n'


def wordle(num_words: int = 200, games: int = 8, noise: float = 0.5) -> Task:
  """Wordle.

  Args:
    num_words: Words of the list, from its start.
    games: Games of each word that are imitated first; 0: none are.
    noise: Share of their guesses that are any word, the others being good.
  """
  if not 5 <= num_words <= len(WORDS):
    raise ValueError(
      f'--num_words {num_words} must be in 5..{len(WORDS)}, words of the list'
    )
  words = WORDS[:num_words]
  texts = [PROMPT, 'not in the list\n', *words]
  texts += [f'{a} {b} {c} {d} {e}\n' for a, b, c, d, e in answers()]
  train, make = environments.wordle_examples(words), environments.wordle(words)
  player = noisy(environments.wordle_player(words), words, noise)
  if games:
    train = demonstrations(train, make, player, games)
  return Task(
    train,
    answers=SHOWN if games else None,
    environment=make,
    held_out=environments.wordle_examples(words, 'test'),
    tokenizer=functools.partial(word_tokenizer, texts, LINE),
    description=f'{num_words} hidden words of five letters',
  )


def answers():
  """Answers that there are: five of g, y and b."""
  found = [()]
  for _ in range(5):
    found = [(*marks, mark) for marks in found for mark in 'gyb']
  return found


def run(argv=None):
  return main(
    wordle,
    argv,
    max_steps=300,
    num_prompts=32,
    num_generations=8,
    max_turns=6,
    max_completion_length=1,
    max_episode_length=12,
    learning_rate=1e-3,
    lr_schedule='linear',
    entropy_coef=0.01,
    length_buckets=1,
    eval_every=50,
    save_every=0,
    warm_start_stop_at=0.0,
    warm_start_max_steps=400,
    warm_start_batch_size=64,
    warm_start_check_every=200,
  )


if __name__ == '__main__':
  run()
