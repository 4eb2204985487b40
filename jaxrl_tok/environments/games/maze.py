"""Maze: LMRL-Gym's double T, with four moves of text (arXiv:2311.18232).

  #############
  #     #     #
  ### ##### ###
  ### ##### ###
  ### ##### ###
  ###       ###
  ###### ######
  ###### ######
  ######G######
  #############

An episode starts in one of the 25 free cells and ends at the goal, or after 100
steps. A step costs 1, into a wall as well, and what is none of the four moves
costs 4; the step to the goal costs nothing.

  observed     the optimum, means over the 25 starts
  'fully'      -6.84   the position, the goal and the walls around
  'partially'  -7.24   the walls around; the player remembers its moves

`solve` computes them from the layout: exact dynamic programming over the sets
of starts that look alike so far (beliefs). LMRL-Gym's figures are -6.84 and
-25.75; the latter is no optimum of a player that remembers what it saw.
"""

import functools
from collections import Counter, defaultdict

from jaxrl_tok.environments.games.words import episodes, normal
from jaxrl_tok.environments.protocol import Maker

LAYOUT = (
  '#############',
  '#     #     #',
  '### ##### ###',
  '### ##### ###',
  '### ##### ###',
  '###       ###',
  '###### ######',
  '###### ######',
  '###### ######',
  '#############',
)
FREE = frozenset(
  (y, x)
  for y, row in enumerate(LAYOUT)
  for x, cell in enumerate(row)
  if cell == ' '
)
GOAL = 8, 6
STARTS = tuple(sorted(FREE - {GOAL}))
MOVES = {
  'move up': (-1, 0),
  'move down': (1, 0),
  'move left': (0, -1),
  'move right': (0, 1),
}
AROUND = {  # in the order of LMRL-Gym's text
  'to your right': (0, 1),
  'to your left': (0, -1),
  'above you': (-1, 0),
  'below you': (1, 0),
}
OBSERVED = 'fully', 'partially'


def move(cell: tuple, action: str) -> tuple:
  """Cell after a move; the same one before a wall."""
  dy, dx = MOVES[action]
  after = cell[0] + dy, cell[1] + dx
  return after if after in FREE else cell


def spaced(cell: tuple) -> str:
  """Coordinates with a space between digits: '8, 6', '1, 1 0'."""
  return ', '.join(' '.join(str(i)) for i in cell)


@functools.cache
def describe(cell: tuple, observed: str) -> str:
  """Observation in a cell, in LMRL-Gym's words."""
  y, x = cell
  walls = [k for k, (i, j) in AROUND.items() if (y + i, x + j) not in FREE]
  if not walls:
    text = 'There are no walls near you.\n'
  elif len(walls) == 1:
    text = f'There is a wall {walls[0]}.\n'
  else:
    text = f'There are walls {", ".join(walls)}.\n'
  if observed == 'partially':
    return text
  return (
    f'The goal is at position {spaced(GOAL)}. '
    f'Your current position is at position {spaced(cell)}. {text}'
  )


class Maze:
  """Episode in the maze; see the module."""

  def __init__(self, observed: str = 'fully', max_steps: int = 100):
    if observed not in OBSERVED:
      raise ValueError(
        f'observed {observed!r} of a maze; pass {" or ".join(OBSERVED)}'
      )
    self.observed, self.max_steps = observed, max_steps

  def reset(self, seed: int, example: dict) -> tuple:
    self.cell, self.steps = tuple(example['start']), 0
    if self.cell not in STARTS:
      raise ValueError(
        f'no maze starts in the cell {self.cell}; take one of maze_examples()'
      )
    return '', {}

  def step(self, action: str) -> tuple:
    action = normal(action)
    self.steps += 1
    if action in MOVES:
      self.cell = move(self.cell, action)
    if self.cell == GOAL:
      return 'Success\n', 0.0, True, False, {'success': True}
    over = self.steps >= self.max_steps
    text = 'Failure\n' if over else describe(self.cell, self.observed)
    reward = -1.0 if action in MOVES else -4.0
    return text, reward, False, over, {'success': False}


def maze(observed: str = 'fully', max_steps: int = 100) -> Maker:
  """Maker of mazes.

  Args:
    observed: 'fully', or 'partially': the walls around alone.
    max_steps: steps of an episode at most.
  """
  Maze(observed)
  return functools.partial(Maze, observed, max_steps)


def maze_examples(
  observed: str = 'fully', split: str = 'train', rules: str = ''
) -> list[dict]:
  """Records {'prompt', 'start'} of the 25 starts.

  Args:
    split: name of these episodes; another split has the same 25 starts.
    rules: text before the first observation.
  """
  return episodes(
    split,
    [
      {'prompt': rules + describe(cell, observed), 'start': list(cell)}
      for cell in STARTS
    ],
  )


# --- the optimum -------------------------------------------------------------


def look(cells: Counter, observed: str) -> list[tuple]:
  """Beliefs that the observations in cells tell apart: tuples of (cell, number
  of starts that lead there)."""
  groups = defaultdict(Counter)
  for cell, count in cells.items():
    groups[describe(cell, observed)][cell] += count
  return [tuple(sorted(group.items())) for group in groups.values()]


def after(belief: tuple, action: str, observed: str) -> list[tuple]:
  """Beliefs after an action, of the starts that are not at the goal yet."""
  cells = Counter()
  for cell, count in belief:
    if (there := move(cell, action)) != GOAL:
      cells[there] += count
  return look(cells, observed)


@functools.cache
def solve(observed: str = 'fully') -> tuple[float, dict]:
  """Optimum: (mean return over the starts, {belief: best action}).

  A belief's cost is the number of further steps of all its starts together:
  value iteration from 0, to its fixed point.
  """
  first = look(Counter(STARTS), observed)
  found, todo = {}, list(first)
  while todo:
    belief = todo.pop()
    if belief not in found:
      found[belief] = {a: after(belief, a, observed) for a in MOVES}
      todo += [b for beliefs in found[belief].values() for b in beliefs]
  cost, old = dict.fromkeys(found, 0), None
  while cost != old:
    old = cost
    cost = {
      belief: sum(count for _, count in belief)
      + min(sum(old[b] for b in beliefs) for beliefs in actions.values())
      for belief, actions in found.items()
    }
  best = {
    belief: min(MOVES, key=lambda a: sum(cost[b] for b in actions[a]))
    for belief, actions in found.items()
  }
  # the step to the goal costs nothing
  return 1 - sum(cost[b] for b in first) / len(STARTS), best


def maze_player(observed: str = 'fully'):
  """Player that is optimal: it remembers which starts look as all that it
  saw."""
  best = solve(observed)[1]

  def player(example: dict, observations: list, actions: list) -> str:
    seen = [example['prompt'] + observations[0], *observations[1:]]
    belief = find(look(Counter(STARTS), observed), seen[0], observed)
    for action, text in zip(actions, seen[1:]):
      if normal(action) in MOVES:
        beliefs = after(belief, normal(action), observed)
        belief = find(beliefs, text, observed)
    return best[belief]

  return player


def find(beliefs: list[tuple], text: str, observed: str) -> tuple:
  """The belief that an observation, with any rules before it, goes with."""
  return max(
    (b for b in beliefs if text.endswith(describe(b[0][0], observed))),
    key=lambda b: len(describe(b[0][0], observed)),
  )
