"""Environments: episodes of several turns on text.

  protocol.py  reset and step of an episode; names in info
  stepping.py  the episodes of a batch, side by side
  episodes.py  one episode, here or in a process of its own
  threads.py   calls side by side, each within a deadline
  check.py     what an environment may return
  play.py      scripted players, their scores and transcripts

Games, of one file each in games/: a maker, its examples and a player.

  maze()              a step costs 1; fully or partially observed
  wordle()            a hidden word of 200, six guesses
  guess_number()      higher, lower
  twenty_questions()  yes, no
  dialogue()          a user who wants a table, with little time
  negotiation()       two seats share three items

  Task(environments.maze_examples(), environment=environments.maze())

Nothing here imports jax.
"""

from jaxrl_tok.environments.games.dialogue import (
  dialogue,
  dialogue_examples,
  dialogue_player,
)
from jaxrl_tok.environments.games.guess_number import (
  guess_number,
  guess_number_examples,
  guess_number_player,
)
from jaxrl_tok.environments.games.maze import maze, maze_examples, maze_player
from jaxrl_tok.environments.games.negotiation import (
  negotiation,
  negotiation_examples,
  negotiation_player,
)
from jaxrl_tok.environments.games.twenty_questions import (
  twenty_questions,
  twenty_questions_examples,
  twenty_questions_player,
)
from jaxrl_tok.environments.games.wordle import (
  wordle,
  wordle_examples,
  wordle_player,
)
from jaxrl_tok.environments.play import play
from jaxrl_tok.environments.protocol import Environment, Maker, Messages
from jaxrl_tok.environments.stepping import (
  ON_ERROR,
  EpisodeError,
  Stepper,
  Turn,
)

__all__ = [
  'ON_ERROR',
  'Environment',
  'EpisodeError',
  'Maker',
  'Messages',
  'Stepper',
  'Turn',
  'dialogue',
  'dialogue_examples',
  'dialogue_player',
  'guess_number',
  'guess_number_examples',
  'guess_number_player',
  'maze',
  'maze_examples',
  'maze_player',
  'negotiation',
  'negotiation_examples',
  'negotiation_player',
  'play',
  'twenty_questions',
  'twenty_questions_examples',
  'twenty_questions_player',
  'wordle',
  'wordle_examples',
  'wordle_player',
]
