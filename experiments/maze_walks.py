r"""Supervised learning of random walks: a policy for the maze to start from.

  python -m experiments.maze_walks --output_dir runs/walks
  python -m experiments.maze --model runs/walks/export

Walks of 20 moves at most, from all 25 starts, are cut into records: a
transcript, and the move that came next. The policy learns them by supervision
alone: it knows the form of a move then, and no way to the goal. --noise 0.5
takes the best move in half of the turns instead of a random one.

The run ends after one update with a learning rate that changes nothing.
"""

import functools
from typing import Literal

from experiments.maze import make_tokenizer
from jaxrl_tok import Task, environments, main
from jaxrl_tok.environments.games.maze import MOVES
from jaxrl_tok.environments.play import imitation_records, noisy, play


def maze_walks(
  observed: Literal['fully', 'partially'] = 'fully',
  walks: int = 8,
  noise: float = 1.0,
) -> Task:
  """Random walks in the maze, to be imitated.

  Args:
    observed: What a turn tells: position, goal and walls, or walls alone.
    walks: Walks from each start.
    noise: Share of moves that are random, the others being optimal.
  """
  from jaxrl_tok import rewards

  if not 0 <= noise <= 1:
    raise ValueError(f'--noise {noise} must be in [0, 1], a share of the moves')
  player = environments.maze_player(observed)
  train, held_out = (
    imitation_records(
      play(
        environments.maze(observed, max_steps=20),
        noisy(player, list(MOVES), noise, seed),
        environments.maze_examples(observed) * count,
      ),
      end='',  # a turn is its move alone, see experiments/maze.py
    )
    for seed, count in ((0, walks), (1, 1))
  )
  return Task(
    train,
    rewards.exact_match,
    held_out=held_out,
    answers='answer',
    tokenizer=functools.partial(make_tokenizer, observed),
    description=f'{len(train):,} moves of random walks',
    reward_unit='%',
  )


def run(argv=None):
  return main(
    maze_walks,
    argv,
    max_steps=1,
    learning_rate=1e-9,
    max_completion_length=2,
    warm_start_max_steps=300,
    save_every=0,
  )


if __name__ == '__main__':
  run()
