"""Tools that do no harm: arithmetic, and looking things up."""

import ast
import math
from collections.abc import Callable

from jaxrl_tok.rewards.programs import Budget, run

LONGEST = 200  # characters of an expression
BUDGET = Budget(steps=10_000, memory=2**20, int_bits=2**12)


def calculate(expression: str) -> str:
  """Computes an arithmetic expression.

  Args:
    expression: Numbers, + - * / // % ** and parentheses, as (12 + 7.5) * 3.
  """
  if len(expression) > LONGEST:
    raise ValueError(f'an expression has {LONGEST} characters at most')
  try:
    tree = ast.parse(expression.strip(), mode='eval').body
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    raise ValueError(f'{expression!r} is no expression') from None
  outcome = run(f'value = {ast.unparse(tree)}', BUDGET)
  value = outcome.namespace.get('value')
  if outcome.kind != 'ok':
    raise ValueError(outcome.error)
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise ValueError(f'{expression!r} is no number')
  if not math.isfinite(value):
    raise ValueError(f'{expression!r} is not finite')
  return str(int(value)) if value == int(value) else f'{value:.12g}'


def lookup(table: dict[str, str]) -> Callable:
  """Makes a tool that looks texts up in a table, by names in any case."""
  entries = {key.strip().lower(): value for key, value in table.items()}

  def lookup(name: str) -> str:
    """Looks up what is known about a name.

    Args:
      name: The name to look up.
    """
    found = entries.get(name.strip().lower())
    return f'nothing is known about {name}' if found is None else found

  return lookup
