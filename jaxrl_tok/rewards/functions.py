"""Reward functions as values: their names, weights, arguments and calls.

A call passes by name the arguments that a signature accepts, and no others:

  f(prompts=, completions=, completion_ids=, **columns,
    trainer_state=, log_extra=, log_metric=, environments=)

`completion_pieces`, for each completion the list of texts that its tokens add,
is made for functions that name it alone: **kwargs do not.
"""

import asyncio
import concurrent
import copy
import difflib
import functools
import importlib
import inspect
import math
import os
import traceback
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

PIECES = 'completion_pieces'  # passed where it is named
GROUP = '_group_size'  # rows of a prompt, for calls of workers alone
# arguments that are no columns of the data; `environments` only with one
ARGUMENTS = (
  'prompts',
  'completions',
  'completion_ids',
  PIECES,
  'trainer_state',
  'log_extra',
  'log_metric',
  'environments',
)
SHOWN = 60  # characters of a text or a value in a message
PACKAGE = f'{Path(__file__).parent.parent}{os.sep}'
# files whose frames say nothing to the author of a reward function
MACHINERY = (
  PACKAGE,
  '<frozen importlib',
  *(str(Path(m.__file__).parent) for m in (asyncio, concurrent, importlib)),
)


def shorten(text) -> str:
  """One line of at most 60 characters."""
  text = ' '.join(str(text).split())
  return text if len(text) <= SHOWN else text[: SHOWN - 1] + '…'


def quote(text: str) -> str:
  """The first 60 characters of a completion, on one line."""
  return repr(text[:SHOWN]) + '…' * (len(text) > SHOWN)


# --- errors


class RewardError(ValueError):
  """A user's code raised an exception. The message is one line; `traceback`
  is its author's part of the exception's traceback, also where it was raised in
  another process ('': by none)."""

  def __init__(self, message: str, traceback: str | None = None):
    super().__init__(message)
    self._traceback = traceback

  @property
  def traceback(self) -> str:
    if self._traceback is not None:
      return self._traceback
    return user_traceback(self.__cause__ or self)


def user_traceback(error: BaseException) -> str:
  """Text of a traceback from the first frame of a user's file on."""
  found = traceback.TracebackException.from_exception(error)
  part = found
  while part is not None:
    frames = list(part.stack)
    while frames and frames[0].filename.startswith(MACHINERY):
      del frames[0]
    part.stack = traceback.StackSummary.from_list(frames) if frames else None
    part = part.__cause__ or part.__context__
  return ''.join(found.format())


def raised_by_us(error: BaseException) -> bool:
  """Whether code of jaxrl_tok that a reward function called, or that is one,
  raised the exception: then its message needs no traceback."""
  frames = traceback.extract_tb(error.__traceback__)
  return (
    isinstance(error, ValueError)
    and len(frames) > 1  # the first is the caller's
    and frames[-1].filename.startswith(PACKAGE)
  )


# --- names and weights


def unwrap(function: Callable) -> Callable:
  """The function inside partials."""
  while isinstance(function, functools.partial):
    function = function.func
  return function


def get_name(function: Callable) -> str:
  """Name of a function, of a partial's function, or of an object's class."""
  function = unwrap(function)
  name = getattr(function, '__name__', type(function).__name__)
  return name.strip('<>')  # a lambda's


def name_rewards(rewards, taken: Iterable[str] = ()) -> tuple[dict, dict]:
  """({name: function}, {name: weight}) of everything that may be called a
  Task's rewards: f, [f, g], {f: weight}, {name: f} or {name: (f, weight)}.

  Functions of one name become name, name_2, and so on; `taken` are names that
  no function may have. A weight is a number, or a function of a TrainerState.
  """
  functions, weights = {}, {}
  for name, function, weight in _entries(rewards):
    check_callable(function, f'reward {name}' if name else 'a reward')
    free = free_name(name or get_name(function), {*functions, *taken})
    functions[free] = function
    weights[free] = check_weight(weight, free)
  if not functions:
    raise ValueError(
      'a Task needs a reward; pass a function (completions, **columns) that '
      'returns a number for each completion'
    )
  return functions, weights


def _entries(rewards):
  """(name | None, function, weight) of each reward."""
  if rewards is None:
    return
  if isinstance(rewards, dict):
    for key, value in rewards.items():
      if not isinstance(key, str):
        yield None, key, value
      elif isinstance(value, tuple | list) and len(value) == 2:
        yield key, *value
      else:
        yield key, value, 1.0
  elif callable(rewards) or isinstance(rewards, str | bytes):
    yield None, rewards, 1.0
  elif isinstance(rewards, Iterable):
    for function in rewards:
      yield None, function, 1.0
  else:
    yield None, rewards, 1.0


def free_name(name: str, taken: Collection[str]) -> str:
  """name, or the first of name_2, name_3, ... that is not taken."""
  free, number = name, 2
  while free in taken:
    free, number = f'{name}_{number}', number + 1
  return free


def check_callable(function, said: str = 'a reward') -> None:
  """Refuses everything but functions and callable objects."""
  if isinstance(function, type):
    raise ValueError(
      f'{said} is the class {function.__name__}; pass an object of it, '
      f'{function.__name__}()'
    )
  if not callable(function):
    raise ValueError(
      f'{said} is {shorten(repr(function))}, which is no function; pass '
      'functions, or {function: weight}'
    )


def check_weight(weight, name: str) -> float | Callable:
  """A weight as a float; a function of TrainerState is itself. Raises
  ValueError."""
  if callable(weight) and not hasattr(weight, '__array__'):
    return weight
  try:
    if isinstance(weight, bool):
      raise TypeError
    value = float(weight)
  except (TypeError, ValueError, OverflowError):
    value = math.nan
  if not math.isfinite(value):
    raise ValueError(
      f'the weight of reward {name} is {shorten(repr(weight))}; give a finite '
      'number'
    )
  return value


def weight_at(weight: float | Callable, name: str, trainer_state) -> float:
  """Weight of a reward at a step. Raises ValueError."""
  if not callable(weight):
    return weight
  try:
    found = weight(trainer_state)
  except Exception as e:
    raise RewardError(
      f'the weight of reward {name} raises {type(e).__name__} ({shorten(e)}); '
      'write it as (trainer_state) -> number'
    ) from e
  if callable(found):
    raise ValueError(
      f'the weight of reward {name} gives a function; let it give a number'
    )
  return check_weight(found, name)


def describe_weights(weights: dict) -> dict:
  """Weights {name: number, or the name of a function}, for files."""
  return {k: get_name(w) if callable(w) else w for k, w in weights.items()}


# --- arguments


class Accepted(NamedTuple):
  """Arguments that a function accepts by name."""

  names: frozenset
  required: tuple
  any_name: bool  # it has **kwargs
  positional_only: tuple  # required ones that no name reaches
  first: str | None  # the name of what may be passed first by position

  def choose(self, arguments: dict) -> dict:
    return {
      k: v
      for k, v in arguments.items()
      if k in self.names or (self.any_name and k not in (PIECES, GROUP))
    }


# types whose values cannot be changed
ATOMS = frozenset((str, int, float, bool, type(None), bytes))


def own_lists(arguments: dict) -> dict:
  """Copies of arguments that are lists, for one function: what it does to its
  lists, messages or ids changes neither the data nor what others get.
  Environments are objects that are shared: their list alone is new."""
  copies = {
    'completion_ids': lambda rows: [copy.copy(row) for row in rows],
    PIECES: lambda rows: [copy.copy(row) for row in rows],
    'environments': list,
  }
  return {
    name: copies.get(name, own_values)(value) if type(value) is list else value
    for name, value in arguments.items()
  }


def own_values(values: list) -> list:
  """Copies of the values of a list; one that cannot be copied, such as an open
  file, is passed itself."""
  return [v if type(v) in ATOMS else _own_value(v) for v in values]


def _own_value(value):
  try:
    return _copy(value)
  except Exception:  # whatever the copy of a user's class raises
    return value


def _copy(value):
  """copy.deepcopy, faster for lists and dicts of JSON."""
  if type(value) is list:
    return [v if type(v) in ATOMS else _copy(v) for v in value]
  if type(value) is dict:
    return {k: v if type(v) in ATOMS else _copy(v) for k, v in value.items()}
  return copy.deepcopy(value)


def accepted(function: Callable) -> Accepted:
  """Arguments of a function: of a wrapper and of the function that it wraps.
  Without a signature (some builtins) it is every name."""
  outer, inner = _signature(function, False), _signature(function, True)
  if outer is None:
    return inner or Accepted(frozenset(), (), True, (), None)
  if not outer.any_name or inner is None:
    return outer
  return outer._replace(
    names=outer.names | inner.names,
    any_name=inner.any_name,
    first=outer.first or inner.first,
  )


def _signature(function: Callable, follow_wrapped: bool) -> Accepted | None:
  try:
    signature = inspect.signature(function, follow_wrapped=follow_wrapped)
  except (TypeError, ValueError):
    return None
  names, required, positional, any_name, first = set(), [], [], False, None
  for name, p in signature.parameters.items():
    needed = p.default is p.empty
    if p.kind is p.VAR_KEYWORD:
      any_name = True
    elif p.kind is p.POSITIONAL_ONLY:
      positional += [name] * needed
    elif p.kind is not p.VAR_POSITIONAL:
      names.add(name)
      required += [name] * needed
      if p.kind is p.POSITIONAL_OR_KEYWORD and first is None:
        first = name
  return Accepted(
    frozenset(names), tuple(required), any_name, tuple(positional), first
  )


def make_signature(
  required: Iterable[str], optional: Iterable[str] = (), any_name: bool = True
) -> inspect.Signature:
  """Signature of a function that is made of others, for check_functions."""
  required = sorted(set(required))
  parameters = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in required
  ] + [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    for name in sorted(set(optional) - set(required))
  ]
  if any_name:
    kind = inspect.Parameter.VAR_KEYWORD
    parameters.append(inspect.Parameter('columns', kind))
  return inspect.Signature(parameters)


def check_functions(
  functions: dict[str, Callable],
  columns: Collection[str],
  environment: bool = False,
) -> None:
  """Refuses functions that a call could not satisfy. Raises ValueError.

  Args:
    functions: {name: function}.
    columns: names of the data's columns.
    environment: whether the task has one, whose objects are an argument.
  """
  own = [a for a in ARGUMENTS if environment or a != 'environments']
  given = [*own, *(c for c in columns if c not in ('prompt', 'completion'))]
  for name, function in functions.items():
    has = accepted(function)
    if has.positional_only:
      raise ValueError(
        f'reward {name} takes {has.positional_only[0]} by position only; '
        'arguments arrive by name: take the / out of its signature'
      )
    missing = [a for a in has.required if a not in given]
    if missing:
      near = difflib.get_close_matches(missing[0], given, 1, 0.6)
      cure = f'did you mean {near[0]}?' if near else 'or give it a default'
      raise ValueError(
        f'reward {name} asks for {missing[0]}, which is no column of the data '
        f'({", ".join(columns)}); name a column or one of '
        f'{", ".join(own)}; {cure}'
      )
    if not has.any_name and not has.names.intersection(given):
      raise ValueError(
        f'reward {name} takes none of the arguments of a reward function; '
        'write it as (completions, **columns)'
      )
