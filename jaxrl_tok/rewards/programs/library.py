"""Modules of the language: tables of pure functions, and functions written in
the language itself, whose work is counted as the program's own."""

import collections
import functools
import math
import string

from jaxrl_tok.rewards.programs import control, operators
from jaxrl_tok.rewards.programs.builtins import BUILTINS
from jaxrl_tok.rewards.programs.compiler import compile_source
from jaxrl_tok.rewards.programs.copies import COPY
from jaxrl_tok.rewards.programs.library_sources import SOURCES
from jaxrl_tok.rewards.programs.methods import COUNTER
from jaxrl_tok.rewards.programs.values import (
  CLASS_OF,
  OBJECT,
  Budget,
  Class,
  Code,
  Counter,
  DefaultDict,
  Function,
  LanguageError,
  Module,
  Native,
  OrderedDict,
  name_of,
)

# --- math

_FLOATS = (
  'acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh degrees exp '
  'expm1 fabs floor fmod frexp hypot isclose isfinite isinf isnan ldexp log '
  'log10 log1p log2 modf pow radians sin sinh sqrt tan tanh trunc'
)


def _of_floats(name: str):
  function = getattr(math, name)

  def call(vm, *args, **keywords):
    vm.spend(len(args) >> 3)
    if any(type(a) not in (int, float, bool) for a in args):
      raise TypeError('must be real number')
    return function(*args, **keywords)

  return Native(name, call)


def _integers(args) -> None:
  for value in args:
    if type(value) not in (int, bool):
      raise TypeError(
        f"'{CLASS_OF.get(type(value), OBJECT).name}' object cannot be "
        'interpreted as an integer'
      )


def _of_integers(name: str, bits):
  """A function of integers whose result has so many bits at most."""
  function = getattr(math, name)

  def call(vm, *args):
    vm.spend(len(args) >> 2)
    _integers(args)
    size = bits(*args) if args else 1
    operators.check_bits(vm, size)
    vm.spend(size * size >> 19)
    return function(*args)

  return Native(name, call)


def _choose_bits(n, k=None, *_):
  k = n if k is None else k
  return max(n.bit_length() * max(min(k, n), 0), 1)


def _comb_bits(n, k, *_):
  return _choose_bits(n, min(k, n - k))


def _sizes(*args):
  return sum(a.bit_length() for a in args)


def _folded(name: str, finish):
  def call(vm, values, /, **keywords):
    found = yield from vm.collect(values)
    vm.spend(len(found) >> 3)
    return finish(vm, found, **keywords)

  return Native(name, call, driven=True)


def _prod(vm, values: list, start=1):
  multiply = operators.BINARY['Mult']
  for value in values:
    vm.spend(1)
    start = multiply(vm, start, value)
  return start


def _fsum(vm, values: list):
  if any(type(v) not in (int, float, bool) for v in values):
    raise TypeError('must be real number')
  return math.fsum(values)


def _dist(vm, p, q, /):
  p = yield from vm.collect(p)
  q = yield from vm.collect(q)
  if any(type(v) not in (int, float, bool) for v in (*p, *q)):
    raise TypeError('must be real number')
  return math.dist(p, q)


MATH = {
  **{name: _of_floats(name) for name in _FLOATS.split()},
  **{name: getattr(math, name) for name in ('e', 'inf', 'nan', 'pi', 'tau')},
  'comb': _of_integers('comb', _comb_bits),
  'dist': Native('dist', _dist, driven=True),
  'factorial': _of_integers('factorial', _choose_bits),
  'fsum': _folded('fsum', _fsum),
  'gcd': _of_integers('gcd', _sizes),
  'isqrt': _of_integers('isqrt', _sizes),
  'lcm': _of_integers('lcm', _sizes),
  'perm': _of_integers('perm', _choose_bits),
  'prod': _folded('prod', _prod),
}

# --- collections


def default_dict(vm, factory=None, items=(), /, **pairs):
  table = DefaultDict()
  table.factory = factory
  update = vm.methods[dict]['update'].function
  yield from update(vm, table, items, **pairs)
  return table


def ordered_dict(vm, items=(), /, **pairs):
  table = OrderedDict()
  update = vm.methods[dict]['update'].function
  yield from update(vm, table, items, **pairs)
  return table


def counter(vm, items=(), /, **pairs):
  table = Counter()
  yield from COUNTER['update'].function(vm, table, items, **pairs)
  return table


def deque(vm, iterable=(), maxlen=None):
  return collections.deque((yield from vm.collect(iterable)), maxlen)


for _host, _name, _function in (
  (DefaultDict, 'defaultdict', default_dict),
  (OrderedDict, 'OrderedDict', ordered_dict),
  (Counter, 'Counter', counter),
  (collections.deque, 'deque', deque),
):
  CLASS_OF[_host].construct = Native(_name, _function, driven=True)
COLLECTIONS = {
  **{CLASS_OF[k].name: CLASS_OF[k] for k in (DefaultDict, Counter)},
  'deque': CLASS_OF[collections.deque],
  'OrderedDict': CLASS_OF[OrderedDict],
}

# --- typing and string

_TYPES = (
  'Any Callable Collection DefaultDict Deque Dict FrozenSet Generator Hashable '
  'Iterable Iterator List Literal Mapping NoReturn Optional Sequence Set Tuple '
  'Type Union'
)
TYPING = {name: Class(name, OBJECT) for name in _TYPES.split()}
_STRINGS = (
  'ascii_letters ascii_lowercase ascii_uppercase digits hexdigits octdigits '
  'printable punctuation whitespace'
)
STRING = {name: getattr(string, name) for name in _STRINGS.split()}

# --- functools


def rename(vm, function, other, /):
  """Gives a function another's name and attributes, as functools.wraps."""
  if type(function) is Function and type(function.attrs) is dict:
    if type(other) is Function:
      vm.make(100 * len(other.attrs))
      function.attrs |= {**other.attrs, '__name__': name_of(other)}
    elif type(other) is Native:
      function.attrs['__name__'] = other.name
  return function


def refuse(vm, *args, **keywords):
  raise LanguageError('no cache_info() in the subset')


# functions that a module's source is given, by the names of its parameters
GIVEN = {'rename': Native('rename', rename), 'refuse': Native('refuse', refuse)}

MODULES = {
  'collections': Module('collections', COLLECTIONS),
  'copy': Module('copy', COPY),
  'math': Module('math', MATH),
  'string': Module('string', STRING),
  'typing': Module('typing', TYPING),
  **{name: Module(name, None) for name in SOURCES},  # compiled when imported
}


@functools.cache
def module_code(name: str) -> tuple[Code, list]:
  """The function that makes the names of a module of SOURCES, and its
  arguments."""
  code = compile_source(SOURCES[name], Budget(), frozenset(BUILTINS), None)
  made = next(
    argument[0]
    for operation, argument in code.ops
    if operation is control.make_function
  )
  return made, [GIVEN[parameter] for parameter in made.positional]
