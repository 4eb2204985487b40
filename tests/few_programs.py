"""jax.jit that gives functions which are equal one compiled program.

Each training run makes its functions anew, and jax traces, lowers and compiles
a function that is new, also where its code and all that it holds are those of
an earlier run. Here functions of one code are compared by what they hold.
"""

import dataclasses
import functools
import types

import jax
import numpy as np

PLAIN = str, bytes, int, float, complex, types.NoneType, types.EllipsisType
HASHED = type, np.dtype, jax.sharding.Mesh, jax.sharding.Sharding, frozenset
ROOMS = (
  'jaxrl_tok',
  'optax',
)  # none changes a list or dict that it has closed on


class FewPrograms:
  """jit and eval_shape that know the functions they have seen."""

  def __init__(self):
    self.jit_of_jax, self.eval_shape_of_jax = jax.jit, jax.eval_shape
    self.programs, self.kept = {}, []

  def clear(self):
    self.programs.clear()
    self.kept.clear()

  def jit(self, function=None, **options):
    """jax.jit; of equal functions with equal options the first's result."""
    if not is_of(function, ROOMS[:1]):
      given = () if function is None else (function,)
      return self.jit_of_jax(*given, **options)
    seen = {}
    key = self.key(function, seen), self.key(options, seen, True)
    if key not in self.programs:
      self.programs[key] = self.jit_of_jax(function, **options)
    return self.programs[key]

  def eval_shape(self, function, *args, **more):
    """jax.eval_shape, by the trace that jit has."""
    if not is_of(function, ROOMS[:1]):
      return self.eval_shape_of_jax(function, *args, **more)
    return self.jit(function).eval_shape(*args, **more)

  def key(self, x, seen: dict, opened: bool = False):
    """Hashable value that is equal where a trace would be: the code of
    functions and all that they hold; identity where nothing else is known.

    opened: whether a list or dict is compared by what is in it.
    """
    if isinstance(x, PLAIN):
      return type(x), repr(x)  # 0.0 is not -0.0, and NaN is itself
    if isinstance(x, HASHED):
      return x
    if isinstance(x, types.FunctionType):
      return self.key_of_function(x, seen)
    if isinstance(x, functools.partial):
      return self.key((x.func, x.args, x.keywords), seen, opened)
    if isinstance(x, tuple) or (opened and type(x) is list):
      return type(x), *(self.key(y, seen, opened) for y in x)
    if opened and type(x) is dict:
      return dict, *((k, self.key(v, seen, opened)) for k, v in x.items())
    if isinstance(x, np.ndarray | np.generic) and x.dtype != object:
      return np.ndarray, x.shape, x.dtype, x.tobytes()
    if isinstance(x, jax.Array) and is_small(x):
      kind = x.dtype, x.weak_type, x.sharding
      return jax.Array, kind, x.shape, np.asarray(x).tobytes()
    if is_frozen(x):
      held = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
      return type(x), self.key(held, seen, True)
    self.kept.append(x)  # so that its id is no other's
    return 'id', id(x)

  def key_of_function(self, x, seen: dict):
    if id(x) in seen:
      return 'again', seen[id(x)]
    seen[id(x)] = len(seen)
    self.kept.append(x)
    opened = is_of(x, ROOMS)
    try:
      held = [cell.cell_contents for cell in x.__closure__ or ()]
    except ValueError:  # a cell that is still empty
      return 'id', id(x)
    held = self.key((*held, x.__defaults__), seen, opened)
    named = self.key((x.__kwdefaults__, x.__dict__), seen, True)
    return id(x.__code__), id(x.__globals__), held, named


def is_of(x, rooms: tuple) -> bool:
  """Whether x is a function of these packages."""
  home = getattr(x, '__module__', None) or ''
  return isinstance(x, types.FunctionType) and home.split('.')[0] in rooms


def is_small(x: jax.Array) -> bool:
  plain = not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
  return (
    not isinstance(x, jax.core.Tracer)
    and plain
    and not x.is_deleted()
    and x.size <= 1000
    and (x.is_fully_addressable or x.is_fully_replicated)
  )


def is_frozen(x) -> bool:
  made = dataclasses.is_dataclass(x) and not isinstance(x, type)
  return made and x.__dataclass_params__.frozen
