"""PPO learns to walk through LMRL-Gym's maze, turn by turn."""

import functools
from typing import Literal

from jaxrl_tok import Task, environments, main
from jaxrl_tok.data import word_tokenizer
from jaxrl_tok.environments.games.maze import FREE, MOVES, describe

# a token is a move, a sentence, or the end of a line
SENTENCE = r'move (?:up|down|left|right)|[^.\n]+\.? ?|[.\n]'


def make_tokenizer(observed: str):
  """Tokenizer of the maze's texts."""
  texts = [describe(cell, observed) for cell in FREE]
  texts += [*MOVES, 'Success\n', 'Failure\n']
  return word_tokenizer(texts, SENTENCE)


def maze(observed: Literal['fully', 'partially'] = 'fully') -> Task:
  """The double T maze.

  Args:
    observed: What a turn tells: position, goal and walls, or walls alone.
  """
  return Task(
    environments.maze_examples(observed),
    environment=environments.maze(observed),
    held_out=environments.maze_examples(observed, 'test'),
    tokenizer=functools.partial(make_tokenizer, observed),
    description="LMRL-Gym's double T maze, all 25 starts",
  )


def run(argv=None):
  return main(
    maze,
    argv,
    max_steps=200,
    algorithm='ppo',
    num_prompts=25,
    num_generations=2,
    max_turns=100,
    max_completion_length=1,
    max_episode_length=520,
    discount='turn',
    gamma=0.99,
    gae_lambda=0.95,
    learning_rate=1e-3,
    entropy_coef=0.01,
    save_every=0,
  )


if __name__ == '__main__':
  run()
