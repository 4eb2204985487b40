"""Rewards of rewards: functions that make one reward function of several.

  gated(well_formed, correct)    correct where well_formed is not 0, else 0
  product(correct, short)        correct times short, completion by completion

A function that says None for a completion makes the whole None there. A value
for every token is multiplied token by token.
"""

import inspect
from collections.abc import Callable

import numpy as np

from jaxrl_tok.rewards.functions import (
  accepted,
  get_name,
  make_signature,
  own_lists,
  unwrap,
)


def gated(gate: Callable, reward: Callable) -> Callable:
  """The reward where the gate's value is not 0, and 0 elsewhere."""

  def multiply(open_by, value):
    if np.ndim(open_by):
      raise ValueError(
        f'{get_name(gate)} gives a value for every token; a gate gives one for '
        'each completion'
      )
    return value if open_by else _times(value, 0.0)

  name = f'{get_name(reward)}_if_{get_name(gate)}'
  return _combine(name, (gate, reward), multiply)


def product(*functions: Callable) -> Callable:
  """The values of all functions, multiplied."""
  if not functions:
    raise ValueError('product needs a reward function')
  return _combine('_x_'.join(map(get_name, functions)), functions, _multiply)


def _multiply(*values):
  total = 1.0
  for value in values:
    total = _times(value, total)
  return total


def _times(a, b):
  """a b of numbers, and of lists with one number for each token."""
  if np.ndim(a) and np.ndim(b) and len(a) != len(b):
    raise ValueError(
      f'rewards of a product give {min(len(a), len(b))} and '
      f'{max(len(a), len(b))} values for the tokens of one completion; give '
      'one for each token'
    )
  if not np.ndim(a) and not np.ndim(b):
    return a * b
  return (np.asarray(a, np.float64) * np.asarray(b, np.float64)).tolist()


def _combine(name: str, functions: tuple, multiply: Callable) -> Callable:
  """A reward function of (values of each function) -> value, for a completion
  at a time; it asks for all that its functions ask for."""
  for function in functions:
    if getattr(unwrap(function), 'on_device', False):
      raise ValueError(
        f'{name} takes functions of text; multiply @on_device rewards in a '
        'function of JAX'
      )
  takes = [accepted(f) for f in functions]

  def rows(found: list) -> list:
    sizes = {len(values) for values in found}
    if len(sizes) > 1:
      raise ValueError(
        f'the functions of reward {name} return '
        f'{" and ".join(map(str, sorted(sizes)))} rewards for one batch; '
        'each must return one for each completion'
      )
    return [
      None if any(v is None for v in values) else multiply(*values)
      for values in zip(*found)
    ]

  async def wait(found: list) -> list:
    return rows([await v if inspect.isawaitable(v) else v for v in found])

  def combined(**arguments):
    given = [own_lists(has.choose(arguments)) for has in takes]
    found = [f(**own) for f, own in zip(functions, given)]
    return (wait if any(map(inspect.isawaitable, found)) else rows)(found)

  combined.__name__ = combined.__qualname__ = name
  combined.__signature__ = make_signature(
    (name for has in takes for name in has.required),
    (name for has in takes for name in has.names),
    any(has.any_name for has in takes),
  )
  return combined
