r"""REINFORCE learns to find a thing by questions of yes and no.

  python -m experiments.twenty_questions

The game is environments/games/twenty_questions.py: 42 things, 32 questions; a
question and a wrong guess cost 1. The scripted player gets -5.57, and no player
more than -4.86. A question is a token of a tiny decoder that starts from random
weights, and so is a guess.

A turn is one token: --max_completion_length 1 leaves no room for an end token,
and --cut_turns act gives the environment the question. The held-out episodes
are the same things, greedily.
"""

import functools

from jaxrl_tok import Task, environments, main
from jaxrl_tok.data import word_tokenizer
from jaxrl_tok.environments.games.twenty_questions import (
  PROMPT,
  QUESTIONS,
  THINGS,
)

# a token is a line: a prompt, a question, an answer
LINE = r'[^\n]+\n?|\n'


def twenty_questions() -> Task:
  """Twenty questions."""
  texts = [PROMPT, 'yes\n', 'no\n', 'ask another question\n', *QUESTIONS]
  texts += [f'is it a {thing}?' for thing in THINGS]
  return Task(
    environments.twenty_questions_examples(),
    environment=environments.twenty_questions(),
    held_out=environments.twenty_questions_examples('test'),
    tokenizer=functools.partial(word_tokenizer, texts, LINE),
    description='42 things to find by questions',
  )


def run(argv=None):
  return main(
    twenty_questions,
    argv,
    max_steps=300,
    num_prompts=32,
    num_generations=8,
    max_turns=20,
    max_completion_length=1,
    max_episode_length=40,
    learning_rate=1e-3,
    lr_schedule='linear',
    entropy_coef=0.01,
    length_buckets=1,
    eval_every=50,
    save_every=0,
  )


if __name__ == '__main__':
  run()
