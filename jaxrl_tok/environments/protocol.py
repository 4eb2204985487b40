"""Protocol: an episode is an object with reset and step, Gymnasium's 5-tuple on
text.

  transcript = prompt, observation of reset, action, observation, action, ...

- The prompt is the example's, a record of the data; `reset` returns what is
  read after it, '' where the prompt tells everything. `step` returns what is
  read after the action.
- An observation is text; where the prompt is messages, the user says it, or it
  is a list of messages, such as a tool's answer.
- Equal seeds and examples give equal episodes for equal actions, also when
  others run beside them: draw from random.Random(seed), never from the random
  module itself. The rows of a prompt's group get one seed.
- A method `close`, if there is one, is called once the episode is over.
- `terminated`: the episode is over by its own rules. `truncated`: it was cut
  off, by a limit of steps.

Names in info that are read:

  'success'  bool, whether the goal was reached, in the last turn of an episode
  'seat'     int, the seat that acts next, in a game of several (reset and step)
  'rewards'  {seat: float}, the reward of this step for every seat that gets one

A game of several seats is played by one policy. `reward` is that of the seat
that has just acted, and equals info['rewards'][seat] where there are rewards by
seat; what another seat gets at this step belongs to the last turn that it took.
"""

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

Messages = list[dict[str, Any]]


class Environment(Protocol):
  """Episode of text."""

  def reset(self, seed: int, example: dict) -> tuple[str | Messages, dict]:
    """Begins the episode: (observation, info)."""

  def step(self, action: str) -> tuple[str | Messages, float, bool, bool, dict]:
    """Takes an action: (observation, reward, terminated, truncated, info)."""


Maker = Callable[[], Environment]


def close(environment) -> None:
  """Calls an environment's own `close`, if it has one; what that raises is of
  no more interest."""
  method = getattr(environment, 'close', None)
  if method is not None:
    with contextlib.suppress(Exception):
      method()


def name_of(environment) -> str:
  """Name of an environment for errors: its `name`, or its class's."""
  name = getattr(environment, 'name', None)
  return name if isinstance(name, str) else type(environment).__name__
