"""Built-in functions and types of the language, f(vm, *args).

A driven one is a generator: it yields Call(function, args) and Next(iterator)
to the interpreter, so that a key or a generator of the program runs there.
"""

from jaxrl_tok.rewards.programs import (
  compare,
  formats,
  keys,
  lookup,
  operators,
)
from jaxrl_tok.rewards.programs.iterators import (
  MISSING,
  SMALL,
  _set_of,
  collect,
  dict_of,
  enumerate_,
  filter_,
  iter_,
  len_,
  map_,
  next_,
  reversed_,
  tuple_of,
  zip_,
)
from jaxrl_tok.rewards.programs.values import (
  CLASS_OF,
  EXCEPTIONS,
  OBJECT,
  STOP,
  TYPE,
  Bound,
  BudgetError,
  Call,
  Class,
  Function,
  LanguageError,
  Native,
  Next,
  Wrapped,
  class_of,
  kind_of,
)

WIDEST = 512  # bits of a range's integers

# --- folds


def sum_(vm, items, /, start=0):
  if type(start) is str:
    raise TypeError("sum() can't sum strings [use ''.join(seq) instead]")
  return sum_numbers(vm, (yield from vm.collect(items)), start)


def sum_numbers(vm, found, start=0):
  """Sum of values, counted one by one where they are not small numbers."""
  vm.spend(len(found) >> 3)
  numbers = type(start) is float or (
    type(start) is int and -SMALL < start < SMALL
  )
  if numbers and all(
    type(x) is float or (type(x) is int and -SMALL < x < SMALL) for x in found
  ):
    return sum(found, start)
  add = operators.BINARY['Add']
  for item in found:
    vm.spend(1)
    start = add(vm, start, item)
  return start


def any_(vm, items, /):
  iterator = vm.iterate(items)
  while (item := (yield Next(iterator))) is not STOP:
    if vm.truth(item):
      return True
  return False


def all_(vm, items, /):
  iterator = vm.iterate(items)
  while (item := (yield Next(iterator))) is not STOP:
    if not vm.truth(item):
      return False
  return True


def _extreme(name: str, better: str):
  def choose(vm, *args, key=None, default=MISSING):
    if not args:
      raise TypeError(f'{name} expected at least 1 argument, got 0')
    if len(args) > 1 and default is not MISSING:
      raise TypeError(f'{name}() has no default with several arguments')
    items = list(args) if len(args) > 1 else (yield from vm.collect(args[0]))
    if not items:
      if default is not MISSING:
        return default
      raise ValueError(f'{name}() iterable argument is empty')
    best = top = MISSING
    vm.spend(len(items) >> 2)
    for item in items:
      worth = item if key is None else (yield Call(key, item))
      if best is MISSING or compare.order(vm, worth, top, better):
        best, top = item, worth
    return best

  return choose


def sorted_(vm, items, /, *, key=None, reverse=False):
  found = yield from vm.collect(items)
  yield from sort(vm, found, key=key, reverse=reverse)
  return found


class Ordered:
  """A value in a sort, compared within the budget."""

  __slots__ = ('value', 'vm')

  def __init__(self, vm, value):
    self.vm = vm
    self.value = value

  def __lt__(self, other):
    return compare.order(self.vm, self.value, other.value, 'Lt')


def sort(vm, items: list, /, *, key=None, reverse=False):
  """list.sort"""
  worths = list(items)
  if key is not None:
    worths = []
    for item in items:
      worths.append((yield Call(key, item)))
  n = len(worths)
  vm.spend(n * n.bit_length() >> 5)
  vm.make(32 * n)
  if not _plain(vm, worths):
    worths = [Ordered(vm, k) for k in worths]
  # in place, as Python does: an exception leaves the items in part sorted
  given = iter(worths)
  items.sort(key=lambda _: next(given), reverse=vm.truth(reverse))


def _plain(vm, worths: list) -> bool:
  """Whether Python may compare worths by itself: numbers and short strings, or
  short tuples of them."""
  kinds = set(map(type, worths))
  if kinds <= {int, float, bool}:
    return True
  if kinds == {str}:
    vm.spend(sum(map(len, worths)) * len(worths).bit_length() >> 9)
    return True
  if kinds != {tuple}:
    return False
  vm.spend(sum(map(len, worths)) * (2 + len(worths).bit_length()) >> 5)
  return all(
    type(x) in (int, float) or (type(x) is str and len(x) < 64)
    for k in worths
    for x in k
  )


# --- numbers and text


def int_(vm, value=0, /, base=None):
  kind = type(value)
  if kind is str:
    if len(value) > 64:
      decimal = base is None or base not in (2, 4, 8, 16, 32)
      if decimal and len(value) > 2 * compare.DIGITS:
        raise ValueError(
          f'Exceeds the limit ({compare.DIGITS} digits) for integer string '
          'conversion'
        )
      digit = 4 if decimal else (base - 1).bit_length()
      operators.check_bits(vm, digit * len(value))
      vm.spend(len(value) ** 2 >> 14)
    return int(value) if base is None else int(value, _index(base))
  if base is not None:
    raise TypeError("int() can't convert non-string with explicit base")
  if kind in (int, float, bool):
    return int(value)
  raise TypeError(
    'int() argument must be a string, a bytes-like object or a real number, '
    f"not '{kind_of(value)}'"
  )


def _index(value) -> int:
  if type(value) not in (int, bool):
    raise TypeError(
      f"'{kind_of(value)}' object cannot be interpreted as an integer"
    )
  return int(value)


def float_(vm, value=0.0, /):
  if type(value) in (int, float, bool, str):
    vm.spend(len(value) >> 6 if type(value) is str else 0)
    return float(value)
  raise TypeError(
    'float() argument must be a string or a real number, not '
    f"'{kind_of(value)}'"
  )


def str_(vm, value='', /):
  return compare.to_str(vm, value)


def bool_(vm, value=False, /):
  return vm.truth(value)


def range_(vm, *args):
  if any(type(a) is int and a.bit_length() > WIDEST for a in args):
    raise BudgetError(f'a range of integers of more than {WIDEST} bits')
  return range(*map(_index, args))


def slice_(vm, *args):
  return slice(*args)


def abs_(vm, value, /):
  if type(value) in (int, float, bool):
    return operators.BINARY['Add'](vm, 0, abs(value))
  method = vm.special(value, '__abs__')
  if method is not None:
    return vm.call(method, [])
  raise TypeError(f"bad operand type for abs(): '{kind_of(value)}'")


def round_(vm, number, ndigits=None):
  if type(number) not in (int, float, bool):
    raise TypeError(f"type {kind_of(number)} doesn't define __round__ method")
  if ndigits is None:
    return round(number)
  digits = _index(ndigits)
  if type(number) is not float and digits < 0:
    operators.check_bits(vm, min(-4 * digits, 2**70))
    vm.spend(digits * digits >> 14)
  return round(number, max(-(2**20), min(digits, 2**20)))


def divmod_(vm, a, b, /):
  binary = operators.BINARY
  if type(a) not in (int, float, bool) or type(b) not in (int, float, bool):
    raise operators.unsupported('divmod()', a, b)
  return binary['FloorDiv'](vm, a, b), binary['Mod'](vm, a, b)


def pow_(vm, base, exp, mod=None):
  if mod is None:
    return operators.BINARY['Pow'](vm, base, exp)
  for value in (base, exp, mod):
    if type(value) not in (int, bool):
      raise TypeError('pow() 3rd argument not allowed unless all are integers')
  size = max(mod.bit_length(), 32)
  vm.spend(exp.bit_length() * size * size >> 19)
  vm.spend(base.bit_length() * size >> 19)
  vm.spend(size * size >> 15 if exp < 0 else 0)
  return pow(base, exp, mod)


def _in_base(function):
  def convert(vm, value, /):
    number = _index(value)
    vm.make(number.bit_length() + 8)
    return function(number)

  return convert


def ord_(vm, text, /):
  if type(text) is not str:
    raise TypeError(f'ord() expected string of length 1, got {kind_of(text)}')
  return ord(text)


def chr_(vm, value, /):
  return chr(_index(value))


def repr_(vm, value, /):
  return compare.to_repr(vm, value)


def format_(vm, value, spec='', /):
  return formats.format_value(vm, value, spec)


def print_(vm, *args, sep=' ', end='\n', file=None, flush=False):
  if file is not None:
    raise LanguageError('no print to a file in the subset')
  sep, end = (' ' if sep is None else sep), ('\n' if end is None else end)
  if type(sep) is not str or type(end) is not str:
    raise TypeError('sep and end must be None or a string')
  parts = [compare.to_str(vm, value) for value in args]
  vm.write(lookup.join(vm, sep, parts) + end)


# --- types


def isinstance_(vm, value, kinds, /):
  return _is_a(vm, class_of(value), kinds, 'isinstance')


def issubclass_(vm, cls, kinds, /):
  if type(cls) is not Class:
    raise TypeError('issubclass() arg 1 must be a class')
  return _is_a(vm, cls, kinds, 'issubclass')


def _is_a(vm, cls: Class, kinds, name: str, depth: int = 0) -> bool:
  if type(kinds) is Class and operators.UNION in kinds.attrs:
    kinds = kinds.attrs[operators.UNION]
  if type(kinds) is tuple:
    depth = keys.deeper(depth)
    for kind in kinds:
      vm.spend(1)
      if _is_a(vm, cls, kind, name, depth):
        return True
    return False
  if type(kinds) is not Class:
    raise TypeError(f'{name}() arg 2 must be a type or a tuple of types')
  return cls.is_a(kinds)


def type_(vm, value, /):
  return class_of(value)


def callable_(vm, value, /):
  return type(value) in (Function, Native, Bound, Class) or (
    vm.special(value, '__call__') is not None
  )


def _attribute_name(vm, name) -> str:
  if type(name) is not str:
    raise TypeError('attribute name must be string')
  vm.make(len(name))
  if name.startswith('__') and name.endswith('__'):
    raise LanguageError(f'no {name[:40]} in the subset')
  return name


def getattr_(vm, value, name, default=MISSING, /):
  name = _attribute_name(vm, name)
  try:
    found = vm.attribute(value, name)
  except AttributeError:
    if default is MISSING:
      raise
    return default
  if type(found) is Wrapped:
    return (yield Call(found.function, value))
  return found


def hasattr_(vm, value, name, /):
  try:
    vm.attribute(value, _attribute_name(vm, name))
  except AttributeError:
    return False
  return True


def setattr_(vm, value, name, new, /):
  vm.store_attribute(value, _attribute_name(vm, name), new)


def _wrapper(kind: str):
  def wrap(vm, function, /):
    return Wrapped(kind, function)

  return wrap


def setter(vm, wrapped, function, /):
  return Wrapped('property', wrapped.function, function)


# --- tables

_PLAIN = {
  'abs': abs_,
  'bin': _in_base(bin),
  'callable': callable_,
  'chr': chr_,
  'classmethod': _wrapper('classmethod'),
  'divmod': divmod_,
  'enumerate': enumerate_,
  'filter': filter_,
  'format': format_,
  'hasattr': hasattr_,
  'hex': _in_base(hex),
  'isinstance': isinstance_,
  'issubclass': issubclass_,
  'iter': iter_,
  'map': map_,
  'oct': _in_base(oct),
  'ord': ord_,
  'pow': pow_,
  'print': print_,
  'property': _wrapper('property'),
  'repr': repr_,
  'reversed': reversed_,
  'round': round_,
  'setattr': setattr_,
  'staticmethod': _wrapper('staticmethod'),
  'zip': zip_,
}
_DRIVEN = {
  'all': all_,
  'any': any_,
  'getattr': getattr_,
  'len': len_,
  'max': _extreme('max', 'Gt'),
  'min': _extreme('min', 'Lt'),
  'next': next_,
  'sorted': sorted_,
  'sum': sum_,
}
CONSTRUCTORS = {
  int: Native('int', int_),
  float: Native('float', float_),
  str: Native('str', str_),
  bool: Native('bool', bool_),
  list: Native('list', collect, driven=True),
  tuple: Native('tuple', tuple_of, driven=True),
  dict: Native('dict', dict_of, driven=True),
  set: Native('set', _set_of(set), driven=True),
  frozenset: Native('frozenset', _set_of(frozenset), driven=True),
  range: Native('range', range_),
  slice: Native('slice', slice_),
}
for _host, _native in CONSTRUCTORS.items():
  CLASS_OF[_host].construct = _native
TYPE.construct = Native('type', type_)

BUILTINS = {
  **{name: Native(name, f) for name, f in _PLAIN.items()},
  **{name: Native(name, f, driven=True) for name, f in _DRIVEN.items()},
  **{CLASS_OF[host].name: CLASS_OF[host] for host in CONSTRUCTORS},
  **EXCEPTIONS,
  'IOError': EXCEPTIONS['OSError'],
  'NotImplemented': NotImplemented,
  'object': OBJECT,
  'type': TYPE,
}
