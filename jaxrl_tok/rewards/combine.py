"""Rewards of rewards: functions that make one reward function of several.

  gated(well_formed, correct)    correct where well_formed is not 0, else 0
  product(correct, short)        correct times short, completion by completion
  threshold(bleu(), 0.3)         1 from 0.3 on, else 0
  rescaled(overlong, -1, 0)      -1 to 0 as 0 to 1, and not beyond

Weights that change with the step are those of the sum, and logged as
rewards/NAME/weight:

  Task(data, {correct: 1.0, well_formed: ramp((0, 1.0), (200, 0.1))})

--multi_objective_aggregation normalize_then_sum divides each reward by its own
deviation in the group first (arXiv:2601.05242).

A function that says None for a completion makes the whole None there. A value
for every token is multiplied token by token; gates, thresholds and scales take
one for each completion, as of a potential's `.outcome`: the sum of scaled parts
is not the sum, scaled. Values that are no rewards are refused by the name of
their function, as where it stands alone.
"""

import inspect
from collections.abc import Callable

import numpy as np

from jaxrl_tok.rewards.functions import (
  accepted,
  check_weight,
  get_name,
  make_signature,
  own_lists,
  unwrap,
)
from jaxrl_tok.rewards.scoring import check_rows


def gated(gate: Callable, reward: Callable) -> Callable:
  """The reward where the gate's value is not 0, and 0 elsewhere."""

  def multiply(open_by, value):
    refuse_tokens(open_by, gate, 'a gate gives')
    return value if open_by else _times(value, 0.0)

  name = f'{get_name(reward)}_if_{get_name(gate)}'
  return _combine(name, (gate, reward), multiply)


def refuse_tokens(value, function: Callable, what: str) -> None:
  """Refuses a list with a value for every token."""
  if isinstance(value, list):
    raise ValueError(
      f'{get_name(function)} gives a value for every token; {what} one for '
      'each completion: pass its .outcome where it is a potential, else a '
      'function of their sum'
    )


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
  a_list, b_list = isinstance(a, list), isinstance(b, list)
  if a_list and b_list and len(a) != len(b):
    raise ValueError(
      f'rewards of a product give {min(len(a), len(b))} and '
      f'{max(len(a), len(b))} values for the tokens of one completion; give '
      'one for each token'
    )
  if not a_list and not b_list:
    return a * b
  return (np.asarray(a, np.float64) * np.asarray(b, np.float64)).tolist()


def threshold(reward: Callable, least: float) -> Callable:
  """1 where a reward is `least` or more, else 0: the gate of a degree."""
  name = f'{get_name(reward)}_from_{least:g}'

  def decide(value):
    refuse_tokens(value, reward, 'a threshold takes')
    return float(value >= least)

  return _combine(name, (reward,), decide)


def rescaled(reward: Callable, low: float, high: float) -> Callable:
  """A reward's values from `low` to `high` as 0 to 1, cut off beyond them, so
  that components of several units can be weighed: BLEU from 0.1 to 0.5."""
  if not low < high:
    raise ValueError(
      f'{get_name(reward)} rescaled from {low} to {high}; pass low < high'
    )

  def scale(value):
    refuse_tokens(value, reward, 'a scale takes')
    return min(1.0, max(0.0, (value - low) / (high - low)))

  return _combine(get_name(reward), (reward,), scale)


def ramp(*points: tuple[float, float]) -> Callable:
  """Weight by step: linear between points (step, weight), constant before the
  first and after the last; (TrainerState) -> float.

  Any function of a TrainerState is a weight: lambda state: 0.5 ** state.epoch.
  """
  steps = [step for step, _ in points]
  if not points or steps != sorted(set(steps)):
    raise ValueError(
      f'a ramp over steps {steps}; pass points (step, weight) with steps that '
      'grow'
    )
  weights = [check_weight(weight, 'a ramp') for _, weight in points]

  def weight(trainer_state) -> float:
    return float(np.interp(trainer_state.global_step, steps, weights))

  inside = ', '.join(f'({s:g}, {w:g})' for s, w in zip(steps, weights))
  weight.__name__ = weight.__qualname__ = f'ramp({inside})'
  return weight


def _combine(name: str, functions: tuple, combine: Callable) -> Callable:
  """A reward function of (values of each function) -> value, for a completion
  at a time; it asks for all that its functions ask for."""
  for function in functions:
    if getattr(unwrap(function), 'on_device', False):
      raise ValueError(
        f'{name} takes functions of text; multiply @on_device rewards in a '
        'function of JAX'
      )
  takes = [accepted(f) for f in functions]

  def rows(found: list, B: int) -> list:
    checked = [
      check_rows(values, B, get_name(f)) for f, values in zip(functions, found)
    ]
    return [
      None if any(v is None for v in values) else combine(*values)
      for values in zip(*checked)
    ]

  async def wait(found: list, B: int) -> list:
    return rows([await v if inspect.isawaitable(v) else v for v in found], B)

  def combined(**arguments):
    given = [own_lists(has.choose(arguments)) for has in takes]
    found = [f(**own) for f, own in zip(functions, given)]
    B = len(arguments.get('completions') or next(iter(arguments.values())))
    return (wait if any(map(inspect.isawaitable, found)) else rows)(found, B)

  combined.__name__ = combined.__qualname__ = name
  combined.__signature__ = make_signature(
    (name for has in takes for name in has.required),
    ('completions', *(name for has in takes for name in has.names)),
    any(has.any_name for has in takes),
  )
  return combined
