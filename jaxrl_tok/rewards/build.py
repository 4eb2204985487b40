"""Parts that reward functions of text are made of."""

import importlib
from collections.abc import Callable
from numbers import Real

from jaxrl_tok.rewards.adapters import get_text
from jaxrl_tok.rewards.functions import make_signature, shorten


def need(module: str, package: str, extra: str = 'rewards'):
  """Imports a module of an optional package. Raises ValueError where it is
  missing."""
  try:
    return importlib.import_module(module)
  except ImportError:
    raise missing(package, extra) from None


def missing(package: str, extra: str = 'rewards') -> ValueError:
  """Error that an optional package is not installed, with its extra."""
  return ValueError(
    f"{package} is not installed; run pip install -e '.[{extra}]'"
  )


def reward_of_text(name: str, score: Callable, *columns: str) -> Callable:
  """Reward function that scores a completion at a time.

  Args:
    name: name of the reward function.
    score: (text, value of each column) -> float, or None where it does not
      apply.
    columns: names of the data's columns, or of arguments of reward functions.
      Where a value is None, the reward does not apply.
  """

  def reward(completions, **given) -> list:
    return [
      None if any(v is None for v in values) else score(text, *values)
      for text, *values in zip(
        map(get_text, completions), *(given[c] for c in columns)
      )
    ]

  return named(reward, name, ['completions', *columns])


def named(
  reward: Callable, name: str, required: list[str], optional: tuple = ()
) -> Callable:
  """The function with a name, and a signature that names its arguments."""
  reward.__name__ = reward.__qualname__ = name
  reward.__signature__ = make_signature(required, optional, any_name=False)
  return reward


def as_texts(value, column: str) -> list[str]:
  """Texts of a column's value: a text, a number, or a list of them. Raises
  ValueError for other values."""
  if hasattr(value, 'tolist'):  # of numpy
    value = value.tolist()
  values = value if isinstance(value, list | tuple) else [value]
  for v in values:
    if not isinstance(v, str | Real):
      raise ValueError(
        f'column {column} holds {shorten(repr(v))}; give a text, a number or a '
        'list of them'
      )
  return [str(v) for v in values]


def best_of(score: Callable, column: str) -> Callable:
  """(text, value of the column) -> the largest score(text, reference) of its
  references; None where there is none."""

  def best(text: str, value) -> float | None:
    return max((score(text, r) for r in as_texts(value, column)), default=None)

  return best


def prompt_text(prompt) -> str:
  """Text of a prompt, or of all of its messages."""
  if isinstance(prompt, str):
    return prompt
  return '\n'.join(str(message.get('content') or '') for message in prompt)
