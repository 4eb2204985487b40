"""FLOPs of a traced program, counted in its products.

  flops(jax.jit(f).trace(*args).jaxpr)

Loops are counted as often as they turn, and what a shard_map does on every
device of its mesh. Work beside products (norms, softmax) is not counted: it is
bound by memory.
"""

import math

import jax

from jaxrl_tok.sharding import num_shards

PRODUCTS = 'dot_general', 'ragged_dot', 'ragged_dot_general'


def _of_product(equation) -> float:
  """FLOPs of a product: 2 for each multiplication."""
  left = equation.invars[0].aval.shape
  out = equation.outvars[0].aval.shape
  if equation.primitive.name != 'dot_general':  # a row meets one group
    return 2.0 * math.prod(out) * left[-1]
  (contracted, _), _ = equation.params['dimension_numbers']
  return 2.0 * math.prod(out) * math.prod(left[i] for i in contracted)


def _inner(equation) -> list:
  """Programs inside of an equation: of a loop, a call, a branch."""
  found = []
  for value in equation.params.values():
    for x in value if isinstance(value, tuple | list) else (value,):
      x = getattr(x, 'jaxpr', x)  # a closed one
      if isinstance(x, jax.extend.core.Jaxpr):
        found.append(x)
  return found


def flops(jaxpr, turns: list | None = None) -> float:
  """FLOPs of a program on all devices together.

  Args:
    jaxpr: closed or open.
    turns: of the loops with products whose own turns depend on data, in the
      order of the program; None: once each.
  """
  given = list(turns or ())

  def count(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
      name = equation.primitive.name
      if name in PRODUCTS:
        total += _of_product(equation)
        continue
      parts = [count(inner) for inner in _inner(equation)]
      if not any(parts):
        continue
      total += times(equation, name) * (max if name == 'cond' else sum)(parts)
    return total

  def times(equation, name) -> float:
    p = equation.params
    if name == 'scan':
      return p['length']
    if name == 'while':
      return given.pop(0) if given else 1
    if name == 'pallas_call':
      return math.prod(p['grid_mapping'].grid)
    if name == 'shard_map':
      return num_shards(p['mesh'], tuple(p['newly_manual_axes']))
    return 1

  return count(getattr(jaxpr, 'jaxpr', jaxpr))
