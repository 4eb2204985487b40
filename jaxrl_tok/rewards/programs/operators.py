"""Operators on values, whose work and results are counted before they are made:
BINARY[name](vm, a, b) by the names of a syntax tree."""

import collections
import operator

from jaxrl_tok.rewards.programs import compare, formats, keys
from jaxrl_tok.rewards.programs.values import (
  OBJECT,
  BudgetError,
  Class,
  Counter,
  Instance,
  LanguageError,
  class_of,
  kind_of,
)

SMALL = 2**63
NUMBERS = frozenset((int, float, bool))
SEQUENCES = frozenset((list, tuple, str))
SETS = compare.SETS
UNION = '|'  # attribute of a union: its classes
SYMBOLS = {
  'Add': '+',
  'Sub': '-',
  'Mult': '*',
  'Div': '/',
  'FloorDiv': '//',
  'Mod': '%',
  'Pow': '** or pow()',
  'LShift': '<<',
  'RShift': '>>',
  'BitAnd': '&',
  'BitOr': '|',
  'BitXor': '^',
  'MatMult': '@',
}
HOST = {
  'Add': operator.add,
  'Sub': operator.sub,
  'Mult': operator.mul,
  'Div': operator.truediv,
  'FloorDiv': operator.floordiv,
  'Mod': operator.mod,
  'Pow': operator.pow,
  'LShift': operator.lshift,
  'RShift': operator.rshift,
  'BitAnd': operator.and_,
  'BitOr': operator.or_,
  'BitXor': operator.xor,
  'MatMult': operator.matmul,
}
SPECIAL = {
  'Add': 'add',
  'Sub': 'sub',
  'Mult': 'mul',
  'Div': 'truediv',
  'FloorDiv': 'floordiv',
  'Mod': 'mod',
  'Pow': 'pow',
  'BitAnd': 'and',
  'BitOr': 'or',
  'BitXor': 'xor',
}


def size_of(value) -> int:
  """Bytes that the items of a str, list or tuple take."""
  if type(value) is str:
    return len(value) if value.isascii() else 4 * len(value)
  return 8 * len(value)


def unsupported(name: str, a, b, suffix: str = '') -> TypeError:
  symbol = '**' if suffix and name == 'Pow' else SYMBOLS.get(name, name)
  return TypeError(
    f'unsupported operand type(s) for {symbol}{suffix}: '
    f"'{kind_of(a)}' and '{kind_of(b)}'"
  )


# --- numbers


def check_bits(vm, bits: int) -> None:
  """Counts an integer of so many bits before it is made."""
  if bits > vm.budget.int_bits:
    raise BudgetError(f'an integer of more than {vm.budget.int_bits} bits')
  vm.make(bits >> 3)


def _counted(vm, found):
  """A result, whose bits are counted where they are many."""
  if type(found) is int and not -SMALL < found < SMALL:
    check_bits(vm, found.bit_length())
  return found


def _product_cost(vm, a: int, b: int) -> None:
  vm.spend((a.bit_length() * b.bit_length()) >> 19)


def _multiply(vm, a, b):
  if type(a) is int and type(b) is int:
    if not (-SMALL < a < SMALL and -SMALL < b < SMALL):
      check_bits(vm, a.bit_length() + b.bit_length() - 1)
      _product_cost(vm, a, b)
    return a * b
  return a * b


def _power(vm, a, b):
  if isinstance(a, int) and isinstance(b, int):
    if b > 0 and a not in (0, 1, -1):
      check_bits(vm, (a.bit_length() - 1) * b + 1)
      bits = a.bit_length() * b
      vm.spend((bits * bits) >> 19)
    return a**b
  found = a**b
  if type(found) is complex:
    raise LanguageError('no complex numbers in the subset')
  return found


def _shift(vm, a, b):
  if isinstance(a, int) and isinstance(b, int) and a and b > 0:
    check_bits(vm, a.bit_length() + b)
  return a << b


def _added(function):
  def add(vm, a, b):
    return _counted(vm, function(a, b))

  return add


def _divided(function):
  def divide(vm, a, b):
    if type(a) is int and type(b) is int and not -SMALL < a < SMALL:
      _product_cost(vm, a, b)
    return _counted(vm, function(a, b))

  return divide


ARITHMETIC = {
  **{name: _added(HOST[name]) for name in ('Add', 'Sub')},
  **{name: _added(HOST[name]) for name in ('BitAnd', 'BitOr', 'BitXor')},
  **{name: _divided(HOST[name]) for name in ('Div', 'FloorDiv', 'Mod')},
  'RShift': _divided(operator.rshift),
  'Mult': _multiply,
  'Pow': _power,
  'LShift': _shift,
}

# --- other types


def repeat(vm, sequence, count: int):
  """sequence * count"""
  vm.make(56 + size_of(sequence) * max(count, 0))
  vm.spend((len(sequence) * max(count, 0)) >> 7)
  return sequence * count


def concatenate(vm, a, b):
  vm.make(56 + size_of(a) + size_of(b))
  return a + b


def _deque_add(vm, a, b):
  vm.make(56 + 8 * (len(a) + len(b)))
  return a + b


def _counters(vm, name: str, a: dict, b: dict):
  """Counter + - & | Counter, counts above 0 alone."""
  vm.make(100 * (len(a) + len(b)))
  vm.spend(len(a) + len(b))
  keys.check_items(vm, a)
  keys.check_items(vm, b)
  for count in (*a.values(), *b.values()):
    if type(count) not in NUMBERS:
      raise LanguageError('no counts but numbers in the subset')
  found = Counter()
  for key in (*a, *(k for k in b if k not in a)):
    one, other = a.get(key, 0), b.get(key, 0)
    if name in ('Add', 'Sub'):
      count = ARITHMETIC[name](vm, one, other)
    else:
      count = (min if name == 'BitAnd' else max)(one, other)
    if count > 0:
      found[key] = count
  return found


SET_OPERATORS = {
  name: HOST[name] for name in ('Sub', 'BitAnd', 'BitOr', 'BitXor')
}


def _others(vm, name: str, a, b):
  """a operator b where one of them is no number; NotImplemented: none."""
  kind, other = type(a), type(b)
  if name == 'Add' and kind is other and kind in SEQUENCES:
    return concatenate(vm, a, b)
  if name == 'Mod' and kind is str:
    return formats.percent(vm, a, b)
  if name == 'Mult':
    if kind in SEQUENCES and other in (int, bool):
      return repeat(vm, a, b)
    if other in SEQUENCES and kind in (int, bool):
      return repeat(vm, b, a)
  if (
    kind is Counter
    and other is Counter
    and name in (*('Add', 'Sub', 'BitAnd', 'BitOr'),)
  ):
    return _counters(vm, name, a, b)
  if name == 'Add' and kind is other is collections.deque:
    return _deque_add(vm, a, b)
  if kind in SETS and other in SETS and name in SET_OPERATORS:
    vm.make(60 * (len(a) + len(b)))
    keys.check_items(vm, a)
    keys.check_items(vm, b)
    return SET_OPERATORS[name](a, b)
  if name == 'BitOr' and kind is other is dict:
    vm.make(100 * (len(a) + len(b)))
    keys.check_items(vm, a)
    keys.check_items(vm, b)
    return a | b
  compare.refuse_missing(HOST[name], SYMBOLS[name], a, b)
  return NotImplemented


def _instances(vm, name: str, a, b):
  if name in SPECIAL:
    for prefix, subject, argument in (('', a, b), ('r', b, a)):
      method = f'__{prefix}{SPECIAL[name]}__'
      method = vm.special(subject, method, argument)
      if method is not None:
        found = vm.call(method, [argument])
        if found is not NotImplemented:
          return found
  return NotImplemented


def _union(a: Class, b):
  """int | None: a class of which both are."""
  b = class_of(None) if b is None else b
  if type(b) is not Class:
    return NotImplemented
  return Class('Union', OBJECT, {UNION: (a, b)})


def _make_binary(name: str):
  arithmetic = ARITHMETIC.get(name)

  def binary(vm, a, b, suffix=''):
    if type(a) in NUMBERS and type(b) in NUMBERS and arithmetic:
      return arithmetic(vm, a, b)
    if type(a) is Instance or type(b) is Instance:
      if name == 'Mod' and type(a) is str:
        return formats.percent(vm, a, b)
      found = _instances(vm, name, a, b)
    elif type(a) is Class and name == 'BitOr':
      found = _union(a, b)
    else:
      found = _others(vm, name, a, b)
    if found is NotImplemented:
      raise _why_not(name, a, b, suffix)
    return found

  return binary


def _why_not(name: str, a, b, suffix: str) -> TypeError:
  if name == 'Add' and type(a) in SEQUENCES:
    return TypeError(
      f'can only concatenate {kind_of(a)} (not "{kind_of(b)}") to {kind_of(a)}'
    )
  if name == 'Mult' and (type(a) in SEQUENCES or type(b) in SEQUENCES):
    other = b if type(a) in SEQUENCES else a
    return TypeError(
      f"can't multiply sequence by non-int of type '{kind_of(other)}'"
    )
  return unsupported(name, a, b, suffix)


BINARY = {name: _make_binary(name) for name in SYMBOLS}


def inplace(vm, name: str, a, b) -> bool:
  """Puts the result of a operator= b on the stack."""
  stack = vm.frames[-1].stack
  kind = type(a)
  if kind in (list, collections.deque) and name == 'Add':
    return vm.push_native(_extend(vm, a, b))
  if kind is list and name == 'Mult' and type(b) in (int, bool):
    vm.make(8 * len(a) * max(b, 0))
    a *= b
  elif kind is set and type(b) in SETS and name in SET_OPERATORS:
    vm.make(60 * len(b))
    keys.check_items(vm, a)
    keys.check_items(vm, b)
    a = INPLACE_SETS[name](a, b)
  elif isinstance(a, dict) and name == 'BitOr' and kind is not Counter:
    return vm.push_native(_update(vm, a, b))
  else:
    method = vm.special(a, f'__i{SPECIAL.get(name)}__', b)
    if method is not None:
      return vm.enter(method, [b], {})
    a = BINARY[name](vm, a, b, '=')
  stack.append(a)
  return False


INPLACE_SETS = {
  'Sub': operator.isub,
  'BitAnd': operator.iand,
  'BitOr': operator.ior,
  'BitXor': operator.ixor,
}


def _update(vm, a: dict, b):
  yield from vm.methods[dict]['update'].function(vm, a, b)
  return a


def _extend(vm, a, b):
  a.extend((yield from vm.collect(b)))
  return a


UNARY = {
  'USub': ('__neg__', operator.neg, '-'),
  'UAdd': ('__pos__', operator.pos, '+'),
  'Invert': (None, operator.invert, '~'),
}


def unary(vm, name: str, value):
  if name == 'Not':
    return not vm.truth(value)
  method, function, symbol = UNARY[name]
  if type(value) in NUMBERS:
    return _counted(vm, function(int(value) if type(value) is bool else value))
  found = method and vm.special(value, method)
  if found:
    return vm.call(found, [])
  compare.refuse_missing(function, f'unary {symbol}', value)
  raise TypeError(f"bad operand type for unary {symbol}: '{kind_of(value)}'")


# --- comparison


def _not_equal(vm, a, b):
  method = None
  if type(a) is Instance and (not vm.strict or vm.akin(a, b)):
    method = vm.special(a, '__ne__', b)
  if method is not None:
    found = vm.call(method, [b])
    if found is not NotImplemented:
      return found
  return not compare.equal(vm, a, b)


def _make_order(name: str):
  return lambda vm, a, b: compare.order(vm, a, b, name)


COMPARE = {
  'Eq': compare.equal,
  'NotEq': _not_equal,
  'Is': lambda vm, a, b: a is b,
  'IsNot': lambda vm, a, b: a is not b,
  **{name: _make_order(name) for name in compare.ORDERS},
}
