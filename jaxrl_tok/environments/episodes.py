"""Episodes: an environment and its calls, here or in a process of its own.

Exceptions of users' code become records: a process can send them, and an error
names environment, turn and action.
"""

import contextlib
import multiprocessing
import traceback
from typing import Any, NamedTuple

from jaxrl_tok.environments.protocol import Maker, close, name_of
from jaxrl_tok.rewards.calls import describe_error
from jaxrl_tok.rewards.functions import (
  get_name,
  raised_by_us,
  user_traceback,
)


class Failure(NamedTuple):
  """Exception that an environment raised."""

  described: str  # kind and text, on one line
  traceback: str  # the user's part of it; '' for an error of ours


class Outcome(NamedTuple):
  """Result of a call."""

  name: str  # of the environment
  value: Any = None
  failure: Failure | None = None


def as_failure(e: BaseException) -> Failure:
  """Record of an exception."""
  if raised_by_us(e):
    return Failure(str(e), '')
  return Failure(describe_error(e), user_traceback(e))


class Episode:
  """Environment of one row, made anew at each reset."""

  def __init__(self, make: Maker):
    self.make, self.environment, self.name = make, None, get_name(make)

  def reset(self, seed: int, example: dict) -> Outcome:
    try:
      self.environment = self.make()
      self.name = name_of(self.environment)
      return Outcome(self.name, self.environment.reset(seed, example))
    except (Exception, SystemExit) as e:
      return Outcome(self.name, None, as_failure(e))

  def step(self, action: str) -> Outcome:
    try:
      return Outcome(self.name, self.environment.step(action))
    except (Exception, SystemExit) as e:
      return Outcome(self.name, None, as_failure(e))

  def close(self) -> None:
    """Calls the environment's own close, if it has one."""
    environment, self.environment = self.environment, None
    close(environment)

  def prepare(self) -> None:
    """Does nothing: there is no process to start."""

  def kill(self) -> None:
    """Leaves a call alone that hangs."""


def serve(pipe, make: Maker) -> None:
  """Answers the calls of a parent process until it is gone."""
  episode = Episode(make)
  pipe.send('ready')
  with contextlib.suppress(EOFError, KeyboardInterrupt):
    while True:
      method, arguments = pipe.recv()
      outcome = getattr(episode, method)(*arguments)
      try:
        pipe.send(outcome)
      except Exception as e:  # what cannot be pickled
        failure = Failure(describe_error(e), traceback.format_exc())
        pipe.send(Outcome(episode.name, None, failure))


class RemoteEpisode:
  """Episode in a process, which outlives it and is given to the next one."""

  def __init__(self, make: Maker):
    self.name, self.process, self.pipe = get_name(make), None, None
    self.make = make

  def prepare(self) -> None:
    """Starts the process, unless it runs. Raises ValueError."""
    if self.process is not None and self.process.is_alive():
      return
    spawn = multiprocessing.get_context('spawn')
    self.pipe, theirs = spawn.Pipe()
    process = spawn.Process(
      target=serve, args=(theirs, self.make), name='environment', daemon=True
    )
    try:
      process.start()
      theirs.close()
      self.pipe.recv()
    except Exception as e:
      raise ValueError(
        f'the environment {self.name} cannot be made in a process '
        f'({describe_error(e)}); pass a function or class of a module that can '
        'be imported, or use threads'
      ) from None
    self.process = process

  def ask(self, method: str, *arguments) -> Outcome:
    process, pipe = self.process, self.pipe
    if process is None:
      return Outcome(self.name, None, Failure('its process was ended', ''))
    try:
      pipe.send((method, arguments))
      outcome = pipe.recv()
    except (EOFError, OSError):
      if self.process is process:  # nobody has killed it
        process.join(1)
      said = f'its process ended, exit code {process.exitcode}'
      return Outcome(self.name, None, Failure(said, ''))
    self.name = outcome.name if outcome else self.name
    return outcome

  def reset(self, seed: int, example: dict) -> Outcome:
    return self.ask('reset', seed, example)

  def step(self, action: str) -> Outcome:
    return self.ask('step', action)

  def close(self) -> None:
    self.ask('close')

  def kill(self) -> None:
    """Ends the process; a call that waits for it fails."""
    process, self.process = self.process, None
    if process is not None:
      process.kill()
      process.join()
