r"""PPO learns to walk through LMRL-Gym's maze, turn by turn.

  python -m experiments.maze
  python -m experiments.maze --walks 8        # begins by imitating random walks

The maze is environments/games/maze.py, a double T with 25 starts: a step costs
1, what is no move costs 4, the step to the goal nothing, and an episode has 100
turns at most. The mean return over the starts:

  -6.84    the optimum (-7.24 where only the walls around are told)
  -6.97    ILQL, as LMRL-Gym reports it (arXiv:2311.18232)
  -37.7    online PPO, as LMRL-Gym reports it
  -85.5    random moves

A tiny decoder starts from random weights, so that at first most of what it says
is no move; or, with --walks 8, from walks of 20 moves, 8 from each start, which
it first learns by supervision. Random ones show the form of a move, and no way
to the goal; with --noise 0.5 every other move is the best one. With seed 0 the
imitation has an eval/reward of -84.7; what PPO makes of it is not measured.

A sentence of the observation is a token, and so is a move. A turn is its move
alone: --max_completion_length 1 leaves no room for an end token, and
--cut_turns act gives the environment the move. Discount and GAE count turns.
Returns reach -400 at first: values are not clipped, as a clip of 0.2 in an
update, PPO's own, would keep the critic from them. The held-out episodes are
the same 25 starts, greedily: an optimal policy has an eval/reward of -6.84.
"""

import functools
from typing import Literal

from jaxrl_tok import Task, environments, main
from jaxrl_tok.data import word_tokenizer
from jaxrl_tok.environments.games.maze import FREE, MOVES, describe
from jaxrl_tok.environments.play import SHOWN, demonstrations, noisy

# a token is a move, a sentence, or the end of a line
SENTENCE = r'move (?:up|down|left|right)|[^.\n]+\.? ?|[.\n]'


def make_tokenizer(observed: str):
  """Tokenizer of the maze's texts."""
  texts = [describe(cell, observed) for cell in FREE]
  texts += [*MOVES, 'Success\n', 'Failure\n']
  return word_tokenizer(texts, SENTENCE)


def maze(
  observed: Literal['fully', 'partially'] = 'fully',
  walks: int = 0,
  noise: float = 1.0,
) -> Task:
  """The double T maze.

  Args:
    observed: What a turn tells: position, goal and walls, or walls alone.
    walks: Walks from each start that are imitated first; 0: none are.
    noise: Share of their moves that are random, the others being optimal.
  """
  train = environments.maze_examples(observed)
  player = noisy(environments.maze_player(observed), list(MOVES), noise)
  if walks:
    short = environments.maze(observed, max_steps=20)
    train = demonstrations(train, short, player, walks)
  return Task(
    train,
    answers=SHOWN if walks else None,
    environment=environments.maze(observed),
    held_out=environments.maze_examples(observed, 'test'),
    tokenizer=functools.partial(make_tokenizer, observed),
    description="LMRL-Gym's double T maze, all 25 starts",
  )


def run(argv=None):
  return main(
    maze,
    argv,
    max_steps=120,
    stop_at_reward=-6.845,
    algorithm='ppo',
    num_prompts=25,
    num_generations=2,
    max_turns=100,
    max_completion_length=1,
    max_episode_length=520,
    length_buckets=3,
    discount='turn',
    gamma=0.95,
    gae_lambda=0.95,
    bootstrap_truncated=True,
    mini_batches=5,
    learning_rate=1e-3,
    lr_schedule='linear',
    entropy_coef=0.01,
    critic='separate',
    critic_learning_rate=1e-2,
    value_clip=0.0,
    warm_start_stop_at=0.0,
    warm_start_max_steps=200,
    warm_start_batch_size=25,
    warm_start_check_every=100,
    eval_every=5,
    save_every=0,
  )


if __name__ == '__main__':
  run()
