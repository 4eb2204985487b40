"""Equality, order, hashes and texts of values, each within the budget.

Python's own == and repr walk nested values without a limit: two lists of n
levels may take 2^n steps. These count what they walk.
"""

import collections

from jaxrl_tok.rewards.programs.values import (
  Bound,
  BudgetError,
  Class,
  Counter,
  DefaultDict,
  Function,
  Instance,
  Native,
  Wrapped,
  class_of,
  is_exception,
  kind_of,
)

ATOMS = frozenset((int, float, str, bool, type(None)))
NUMBERS = (int, float)
SETS = (set, frozenset, type({}.keys()))
ITEMS = type({}.items())
DEPTH = 60  # lists inside lists
FAR = 2**32  # integers whose hashes may be made to collide


def _deeper(depth: int) -> int:
  if depth >= DEPTH:
    raise BudgetError(f'values nested deeper than {DEPTH}')
  return depth + 1


def equal(vm, a, b, depth: int = 0) -> bool:
  """a == b"""
  kind, other = type(a), type(b)
  if kind in ATOMS and other in ATOMS:
    if kind is str and len(a) > 64:
      vm.spend(len(a) >> 8)
    return a == b
  if kind is Instance or other is Instance:
    return equal_instances(vm, a, b)
  vm.spend(1)
  if kind in (list, tuple, collections.deque):
    if other is not kind or len(a) != len(b):
      return False
    depth = _deeper(depth)
    vm.spend(len(a) >> 2)
    return all(x is y or equal(vm, x, y, depth) for x, y in zip(a, b))
  if isinstance(a, dict):
    return isinstance(b, dict) and equal_dicts(vm, a, b, _deeper(depth))
  if kind is Bound:
    return (
      other is Bound and a.function is b.function and a.subject is b.subject
    )
  if kind in SETS and other in SETS:
    check_items(vm, a)
  elif kind is ITEMS and other is ITEMS:
    return equal_dicts(vm, dict(a), dict(b), depth)
  return a == b if kind in (*SETS, range, slice) else a is b


def equal_dicts(vm, a: dict, b: dict, depth: int) -> bool:
  if type(a) is Counter and type(b) is Counter:  # missing keys count 0
    vm.spend(len(a) + len(b))
    return all(a.get(k, 0) == b.get(k, 0) for k in (*a, *b))
  if len(a) != len(b):
    return False
  vm.spend(len(a) >> 1)
  for key, value in a.items():
    check_key(vm, key, len(b))
    if key not in b:
      return False
    if value is not b[key] and not equal(vm, value, b[key], depth):
      return False
  return True


def equal_instances(vm, a, b) -> bool:
  for x, y in ((a, b), (b, a)):
    method = vm.special(x, '__eq__')
    if method is not None and (not vm.strict or type(y) is Instance):
      found = vm.call(method, [y])
      if found is not NotImplemented:
        return vm.truth(found)
  return a is b


def less(vm, a, b) -> bool:
  """a < b"""
  return order(vm, a, b, 'Lt')


SYMBOLS = {'Lt': '<', 'LtE': '<=', 'Gt': '>', 'GtE': '>='}
METHODS = {
  'Lt': ('__lt__', '__gt__'),
  'LtE': ('__le__', '__ge__'),
  'Gt': ('__gt__', '__lt__'),
  'GtE': ('__ge__', '__le__'),
}
ORDERS = {
  'Lt': lambda a, b: a < b,
  'LtE': lambda a, b: a <= b,
  'Gt': lambda a, b: a > b,
  'GtE': lambda a, b: a >= b,
}


def order(vm, a, b, name: str, depth: int = 0) -> bool:
  """a < b and its kin, by the name of the operator in a syntax tree."""
  kind, other = type(a), type(b)
  if kind in ATOMS and other in ATOMS:
    if kind is str and len(a) > 64:
      vm.spend(len(a) >> 8)
    return ORDERS[name](a, b)
  vm.spend(1)
  if kind is Instance or other is Instance:
    for subject, argument, method in zip((a, b), (b, a), METHODS[name]):
      method = vm.special(subject, method)
      if method is not None and not (vm.strict and kind is not other):
        found = vm.call(method, [argument])
        if found is not NotImplemented:
          return vm.truth(found)
  elif kind is other and kind in (list, tuple, collections.deque):
    depth = _deeper(depth)
    vm.spend(min(len(a), len(b)) >> 2)
    for x, y in zip(a, b):
      if x is not y and not equal(vm, x, y, depth):
        return order(vm, x, y, name, depth)
    return ORDERS[name](len(a), len(b))
  elif kind in SETS and other in SETS:
    check_items(vm, a)
    check_items(vm, b)
    return ORDERS[name](a, b)
  raise TypeError(
    f"'{SYMBOLS[name]}' not supported between instances of '{kind_of(a)}' and "
    f"'{kind_of(b)}'"
  )


# --- hashes


def check_key(vm, key, size: int, depth: int = 0) -> None:
  """Counts the work of one lookup of a key among `size` others: of its hash,
  and, where integers are large, of keys with equal hashes."""
  kind = type(key)
  if kind is str:
    if len(key) > 64:
      vm.spend(len(key) >> 8)
  elif kind is int:
    if not -FAR < key < FAR:
      vm.spend(size >> 7)
  elif kind is tuple:
    vm.spend(1 + (len(key) >> 2))
    depth = _deeper(depth)
    for item in key:
      check_key(vm, item, size, depth)
  elif kind is frozenset:
    vm.spend(len(key) >> 5)
  elif kind is Bound:
    check_key(vm, key.subject, size, _deeper(depth))


def check_items(vm, items) -> None:
  """Counts the work of comparing the members of a set with others."""
  vm.spend(len(items) >> 3)
  for item in items:
    if type(item) is not int or not -FAR < item < FAR:
      check_key(vm, item, len(items))


def hash_instance(vm, value: Instance) -> int:
  """Hash of an object by its class: __hash__, or of the object itself where
  its class has no __eq__."""
  cls = value.cls
  while cls is not None:
    if cls.attrs.get('__hash__') is not None:
      found = vm.call(Bound(cls.attrs['__hash__'], value), [])
      if type(found) not in (int, bool):
        raise TypeError('__hash__ method should return an integer')
      return hash(found)
    if '__eq__' in cls.attrs:
      raise TypeError(f"unhashable type: '{value.cls.name}'")
    cls = cls.base
  return id(value) >> 4


# --- texts


def to_str(vm, value) -> str:
  """str(value)"""
  kind = type(value)
  if kind is str:
    return value
  if kind is Instance:
    method = vm.special(value, '__str__')
    if method is not None:
      return _text(vm, method)
    if is_exception(value):
      args = value.attrs['args']
      if len(args) == 1:
        is_key = any(c == 'KeyError' for c in _names(value.cls))
        return (to_repr if is_key else to_str)(vm, args[0])
      return to_repr(vm, args) if args else ''
  return to_repr(vm, value)


def _names(cls):
  while cls is not None:
    yield cls.name
    cls = cls.base


def _text(vm, method) -> str:
  text = vm.call(method, [])
  if type(text) is not str:
    raise TypeError(f'__str__ returned non-string (type {kind_of(text)})')
  return text


def to_repr(vm, value) -> str:
  """repr(value)"""
  parts = []
  _write(vm, value, parts, [], 0)
  return ''.join(parts)


DIGITS = 4300  # of an integer in decimal, Python's limit


def check_digits(value: int) -> None:
  if not -(1 << 14280) < value < 1 << 14280 and abs(value) >= 10**DIGITS:
    raise ValueError(
      f'Exceeds the limit ({DIGITS} digits) for integer string conversion'
    )


def _write(vm, value, parts: list, around: list, depth: int) -> None:
  kind = type(value)
  if kind in ATOMS:
    if kind is int:
      check_digits(value)
      if not -FAR < value < FAR:
        bits = value.bit_length()
        vm.spend((bits * bits) >> 18)
    elif kind is str:
      vm.make(10 * len(value))
    text = repr(value)
  elif kind is Instance:
    text = _instance(vm, value, parts, around, depth)
  elif isinstance(value, list | tuple | set | frozenset | dict) or kind in (
    *VIEWS,
    collections.deque,
  ):
    if any(value is x for x in around):
      cycle = {list: '[...]', dict: '{...}', tuple: '(...)'}
      text = cycle.get(kind, f'{kind_of(value)}(...)')
    else:
      around.append(value)
      _container(vm, value, parts, around, _deeper(depth))
      around.pop()
      return
  else:
    text = _plain(vm, value)
  vm.make(len(text) + 8)
  vm.spend(1)
  parts.append(text)


VIEWS = {
  type({}.keys()): ('dict_keys([', '])'),
  type({}.values()): ('dict_values([', '])'),
  type({}.items()): ('dict_items([', '])'),
}
BRACKETS = {
  **VIEWS,
  list: ('[', ']'),
  tuple: ('(', ')'),
  set: ('{', '}'),
  dict: ('{', '}'),
  frozenset: ('frozenset({', '})'),
  collections.deque: ('deque([', '])'),
  Counter: ('Counter({', '})'),
}


def _container(vm, value, parts: list, around: list, depth: int) -> None:
  kind = type(value)
  if not value and kind in (set, frozenset, Counter):
    parts.append(f'{kind_of(value)}()')
    return
  if kind is DefaultDict:
    start, end = f'defaultdict({to_repr(vm, value.factory)}, {{', '})'
  else:
    start, end = BRACKETS[kind]
  vm.make(20 + 2 * len(value))
  parts.append(start)
  items = value
  if kind is Counter:
    items = [k for k, _ in sorted_counts(vm, value)]
  for i, item in enumerate(items):
    if i:
      parts.append(', ')
    _write(vm, item, parts, around, depth)
    if isinstance(value, dict):
      parts.append(': ')
      _write(vm, value[item], parts, around, depth)
  parts.append(',)' if kind is tuple and len(value) == 1 else end)
  if kind is collections.deque and value.maxlen is not None:
    parts[-1] = f'], maxlen={value.maxlen})'


def sorted_counts(vm, counter: dict) -> list:
  """Pairs of a Counter, the most common first."""
  vm.make(100 * len(counter))
  vm.spend(len(counter))
  pairs = list(counter.items())
  if not all(type(n) in NUMBERS for _, n in pairs):
    raise TypeError('counts must be numbers')
  return sorted(pairs, key=lambda pair: -pair[1])


def _instance(vm, value, parts, around, depth) -> str:
  method = vm.special(value, '__repr__')
  if method is not None:
    return _text(vm, method)
  if is_exception(value):
    args = value.attrs['args']
    inner = to_repr(vm, args) if len(args) != 1 else f'({to_repr(vm, args[0])})'
    return f'{value.cls.name}{inner}'
  return f'<{value.cls.name} object>'


def _plain(vm, value) -> str:
  kind = type(value)
  if kind in (range, slice):
    return repr(value)
  if kind is Class:
    return f"<class '{value.name}'>"
  if kind is Function:
    return f'<function {value.code.name}>'
  if value is NotImplemented:
    return 'NotImplemented'
  if kind is Native:
    return f'<built-in function {value.name}>'
  if kind is Wrapped:
    return f'<{value.kind} object>'
  return f'<{class_of(value).name} object>'
