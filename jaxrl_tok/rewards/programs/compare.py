"""Equality, order and texts of values, each within the budget.

Python's own == and repr walk nested values without a limit: two lists of n
levels may take 2^n steps. These count what they walk.
"""

import collections

from jaxrl_tok.rewards.programs import keys
from jaxrl_tok.rewards.programs.keys import (
  FAR,
  check_items,
  check_key,
  deeper,
)
from jaxrl_tok.rewards.programs.values import (
  Bound,
  Class,
  Counter,
  DefaultDict,
  Function,
  Instance,
  LanguageError,
  Native,
  OrderedDict,
  Wrapped,
  class_of,
  is_exception,
  kind_of,
  name_of,
)

ATOMS = frozenset((int, float, str, bool, type(None)))
NUMBERS = (int, float)
SETS = (set, frozenset, type({}.keys()))
ITEMS = type({}.items())


def equal(vm, a, b, depth: int = 0) -> bool:
  """a == b"""
  kind, other = type(a), type(b)
  if kind in ATOMS and other in ATOMS:
    if kind is str and len(a) > 64:
      vm.spend(len(a) >> 8)
    return a == b
  vm.spend(1)
  if kind is Instance or other is Instance:
    return equal_instances(vm, a, b)
  if kind is slice and other is slice:
    a, b = (a.start, a.stop, a.step), (b.start, b.stop, b.step)
    kind = other = tuple
  if kind in (list, tuple, collections.deque):
    if other is not kind or len(a) != len(b):
      return False
    depth = deeper(depth)
    vm.spend(len(a) >> 2)
    return all(x is y or equal(vm, x, y, depth) for x, y in zip(a, b))
  if isinstance(a, dict):
    return isinstance(b, dict) and equal_dicts(vm, a, b, deeper(depth))
  if kind is Bound:
    return (
      other is Bound and a.function is b.function and a.subject is b.subject
    )
  if kind in SETS and other in SETS:
    check_items(vm, a)
    check_items(vm, b)
  elif kind is ITEMS and other is ITEMS:
    vm.make(100 * (len(a) + len(b)))
    check_items(vm, a.mapping)
    check_items(vm, b.mapping)
    return equal_dicts(vm, dict(a), dict(b), deeper(depth))
  return a == b if kind in (*SETS, range) else a is b


def equal_dicts(vm, a: dict, b: dict, depth: int) -> bool:
  if type(a) is Counter and type(b) is Counter:  # missing keys count 0
    check_items(vm, a)
    check_items(vm, b)
    return all(equal(vm, a.get(k, 0), b.get(k, 0), depth) for k in (*a, *b))
  if len(a) != len(b):
    return False
  vm.spend(len(a) >> 1)
  if type(a) is OrderedDict is type(b) and not all(
    x is y or equal(vm, x, y, depth) for x, y in zip(a, b)
  ):
    return False
  for key, value in a.items():
    check_key(vm, key, len(b))
    if key not in b:
      return False
    if value is not b[key] and not equal(vm, value, b[key], depth):
      return False
  return True


def equal_instances(vm, a, b) -> bool:
  for x, y in ((a, b), (b, a)):
    if vm.strict and not vm.akin(x, y):
      continue  # in a test, an object equals itself and its own kind alone
    method = vm.special(x, '__eq__', y)
    if method is not None:
      found = vm.call(method, [y])
      if found is not NotImplemented:
        return vm.truth(found)
  return a is b


# a value of each of Python's types, to ask what Python does with them
EXAMPLES = {
  type(value): value
  for value in (
    *(1, 1.0, True, '', [], (), {}, set(), frozenset(), None, range(0)),
    *({}.keys(), {}.values(), {}.items(), collections.deque(), slice(0)),
  )
} | {
  Counter: collections.Counter(),
  DefaultDict: collections.defaultdict(),
  OrderedDict: collections.OrderedDict(),
}


def refuse_missing(function, symbol: str, *values) -> None:
  """Raises LanguageError where Python has an operator for such values: it is
  the subset, and not the program, that lacks it."""
  if not all(type(value) in EXAMPLES for value in values):
    return
  try:
    function(*(EXAMPLES[type(value)] for value in values))
  except TypeError:
    return
  kinds = ' and '.join(map(kind_of, values))
  raise LanguageError(f'no {symbol} of {kinds} in the subset')


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
      method = vm.special(subject, method, argument)
      if method is not None:
        found = vm.call(method, [argument])
        if found is not NotImplemented:
          return vm.truth(found)
  elif kind is other and kind in (list, tuple, collections.deque):
    depth = deeper(depth)
    vm.spend(min(len(a), len(b)) >> 2)
    for x, y in zip(a, b):
      if x is not y and not equal(vm, x, y, depth):
        return order(vm, x, y, name, depth)
    return ORDERS[name](len(a), len(b))
  elif kind in SETS and other in SETS:
    check_items(vm, a)
    check_items(vm, b)
    return ORDERS[name](a, b)
  refuse_missing(ORDERS[name], SYMBOLS[name], a, b)
  raise TypeError(
    f"'{SYMBOLS[name]}' not supported between instances of '{kind_of(a)}' and "
    f"'{kind_of(b)}'"
  )


# --- texts


def to_str(vm, value) -> str:
  """str(value)"""
  kind = type(value)
  if kind is str:
    return value
  if kind is Instance:
    vm.spend(1)
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
  elif kind is slice or kind is range:
    _bounds(vm, value, parts, around, depth)
    return
  elif isinstance(value, list | tuple | set | frozenset | dict) or kind in (
    *VIEWS,
    collections.deque,
  ):
    if any(value is x for x in around):
      cycle = {list: '[...]', dict: '{...}', tuple: '(...)'}
      text = cycle.get(kind, f'{kind_of(value)}(...)')
    else:
      around.append(value)
      _container(vm, value, parts, around, deeper(depth))
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
  OrderedDict: ('OrderedDict({', '})'),
}


def _container(vm, value, parts: list, around: list, depth: int) -> None:
  kind = type(value)
  if not value and kind in (set, frozenset, Counter, OrderedDict):
    parts.append(f'{kind_of(value)}()')
    return
  if kind is DefaultDict:
    start, end = f'defaultdict({to_repr(vm, value.factory)}, {{', '})'
  else:
    start, end = BRACKETS[kind]
  vm.make(20 + 2 * len(value))
  parts.append(start)
  items = keys.in_order(vm, value) if kind in (set, frozenset) else value
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


def _bounds(vm, value, parts: list, around: list, depth: int) -> None:
  """Text of a slice or a range."""
  bounds = [value.start, value.stop, value.step]
  if type(value) is range and value.step == 1:
    del bounds[2]
  parts.append(f'{kind_of(value)}(')
  for i, bound in enumerate(bounds):
    parts.append(', ' if i else '')
    _write(vm, bound, parts, around, deeper(depth))
  parts.append(')')


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
  if kind is Class:
    return f"<class '{value.name}'>"
  if kind is Function:
    return f'<function {name_of(value)}>'
  if value is NotImplemented:
    return 'NotImplemented'
  if kind is Native:
    return f'<built-in function {value.name}>'
  if kind is Wrapped:
    return f'<{value.kind} object>'
  return f'<{class_of(value).name} object>'
