"""Environments: episodes of several turns on text. Nothing here imports jax.

protocol.py  reset and step of an episode; names in info
stepping.py  the episodes of a batch, side by side
episodes.py  one episode, here or in a process of its own
threads.py   calls side by side, each within a deadline
check.py     what an environment may return
"""

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
]
