"""Environments: episodes of several turns on text.

  protocol.py  reset and step of an episode; names in info
  stepping.py  the episodes of a batch, side by side
  episodes.py  one episode, here or in a process of its own
  threads.py   calls side by side, each within a deadline
  check.py     what an environment may return
  tools.py     functions that a policy calls; tool_calls.py: formats of calls
  toolbox.py   calculate, lookup
  adapters.py  from_gymnasium(), from_textarena(), from_openenv(), from_trl(),
               from_lmrl(), from_reasoning_gym()
  token_env.py our episode of one completion as a gymnasium.Env
  play.py      scripted players, their scores and transcripts

Games, of one file each in games/: a maker, its examples and a player.

  maze()              a step costs 1; fully or partially observed
  wordle()            a hidden word of 200, six guesses
  guess_number()      higher, lower
  twenty_questions()  yes, no
  dialogue()          a user who wants a table, with little time
  negotiation()       two seats share three items
  calculator()        arithmetic by a tool

  Task(environments.maze_examples(), environment=environments.maze())

Nothing here imports jax.
"""

from jaxrl_tok.environments.adapters import (
  from_gymnasium,
  from_lmrl,
  from_openenv,
  from_reasoning_gym,
  from_textarena,
  from_trl,
  reasoning_gym_examples,
  trl_tools,
)
from jaxrl_tok.environments.games.calculator import (
  calculator,
  calculator_examples,
  calculator_player,
)
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
from jaxrl_tok.environments.token_env import token_env
from jaxrl_tok.environments.tool_calls import Call, parse_calls
from jaxrl_tok.environments.toolbox import calculate, lookup
from jaxrl_tok.environments.tools import tool_schemas, tools, with_tools

__all__ = [
  'ON_ERROR',
  'Call',
  'Environment',
  'EpisodeError',
  'Maker',
  'Messages',
  'Stepper',
  'Turn',
  'calculate',
  'calculator',
  'calculator_examples',
  'calculator_player',
  'dialogue',
  'dialogue_examples',
  'dialogue_player',
  'from_gymnasium',
  'from_lmrl',
  'from_openenv',
  'from_reasoning_gym',
  'from_textarena',
  'from_trl',
  'guess_number',
  'guess_number_examples',
  'guess_number_player',
  'lookup',
  'maze',
  'maze_examples',
  'maze_player',
  'negotiation',
  'negotiation_examples',
  'negotiation_player',
  'parse_calls',
  'play',
  'reasoning_gym_examples',
  'token_env',
  'tool_schemas',
  'tools',
  'trl_tools',
  'twenty_questions',
  'twenty_questions_examples',
  'twenty_questions_player',
  'with_tools',
  'wordle',
  'wordle_examples',
  'wordle_player',
]
