"""Keys of dicts and members of sets: the work of a lookup, hashes, and an order
of sets that is the same in every process.

Only a str's hash cannot be foreseen. hash(-1) == hash(-2), hash(2.0 ** 61) ==
hash(1) and hash(n + 2 ** 61 - 1) == hash(n), so that numbers, tuples and sets
of them can be made to collide: a lookup then compares with every one.
"""

import collections

from jaxrl_tok.rewards.programs.values import (
  Bound,
  BudgetError,
  Counter,
  DefaultDict,
  Instance,
  OrderedDict,
)

DEPTH = 60  # lists inside lists
FAR = 2**32  # integers whose hashes may be made to collide
FREE = 64  # bits: any number of keys may have this one's hash
FEW = 128  # keys of one hash that cost nothing more
NUMBERS = frozenset((int, float, bool))
UNHASHABLE = frozenset(
  (list, dict, set, collections.deque, Counter, DefaultDict, OrderedDict)
)


def deeper(depth: int) -> int:
  if depth >= DEPTH:
    raise BudgetError(f'values nested deeper than {DEPTH}')
  return depth + 1


def check_key(vm, key, size: int) -> None:
  """Counts the work of one lookup of a key among `size` others: of its hash,
  and of comparing it with keys that may have its hash."""
  kind = type(key)
  if kind is str:
    if len(key) > 64:
      vm.spend(len(key) >> 8)
    return
  if kind is int and -FAR < key < FAR and vm.colliding < FEW:
    return
  bits, weight = _alike(vm, key, 0)
  many = size if bits > 40 else min(size, 1 << bits)
  if many > FEW:
    vm.colliding += 1
  else:
    many = min(size, vm.colliding)
  vm.spend(many * weight >> 7)


def _alike(vm, key, depth: int) -> tuple[int, int]:
  """(bits, weight): 2^bits keys may have this one's hash; comparing it with one
  of them takes weight."""
  kind = type(key)
  if kind is int:
    near = -FAR < key < FAR
    return (key in (-1, -2) if near else FREE), 1 + (key.bit_length() >> 12)
  if kind is str:
    vm.odd_parts = True
    vm.spend(len(key) >> 8)
    return 0, 1 + (len(key) >> 10)
  if kind is set:  # looked up as a frozenset
    vm.spend(1 + (len(key) >> 3))
  if kind is bool or kind in UNHASHABLE:
    return 0, 1
  if kind is float:
    vm.odd_parts |= key != key
    whole = -FAR < key < FAR and key == int(key)
    return (key in (-1.0, -2.0) if whole else 6), 1
  if kind is frozenset:
    vm.odd_parts |= depth > 0
    vm.spend(1 + (len(key) >> 3))
    return (FREE if key else 0), 1 + (len(key) >> 3)
  if kind is slice or kind is range:
    key = (key.start, key.stop, key.step)
  elif kind is not tuple:
    vm.odd_parts |= depth > 0
    if key is not None:
      _number(vm, key)
    return 0, 1
  vm.spend(1 + (len(key) >> 2))
  depth = deeper(depth)
  bits = weight = 0
  for item in key:
    more, longer = _alike(vm, item, depth)
    bits, weight = bits + more, weight + longer
  return bits, 1 + (weight >> 3)


def _number(vm, value) -> None:
  """Numbers a value that is a key by its identity, in the order that they come:
  addresses differ from process to process."""
  if id(value) not in vm.numbers:
    vm.make(100)
    vm.numbers[id(value)] = len(vm.numbers), value


def check_items(vm, items) -> None:
  """Counts the work of looking up the members of a set, or the keys of a dict,
  in another."""
  size = len(items)
  vm.spend(size >> 3)
  for item in items:
    if type(item) is not int or not -FAR < item < FAR or vm.colliding >= FEW:
      check_key(vm, item, size)


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


# --- the order of sets


def in_order(vm, items):
  """Members of a set in an order that every process shares: Python's own for
  numbers and tuples of numbers (then the set itself is given), else sorted."""
  kinds = set(map(type, items))
  vm.spend(len(items) >> 6)
  if _all_fixed(vm, kinds, items):
    return items
  size = len(items)
  vm.make(8 * size)
  if kinds == {str}:
    vm.spend((2 * size + sum(map(len, items)) // 8) * size.bit_length() >> 6)
    return sorted(items)
  vm.spend(size * size.bit_length() >> 2)
  return sorted(items, key=lambda value: _rank(vm, value))


def _all_fixed(vm, kinds: set, items) -> bool:
  """Whether hashes of all members are of numbers alone. A nan's is its own."""
  if kinds <= NUMBERS | {tuple} and not vm.odd_parts:
    return True
  if not kinds <= NUMBERS | {tuple, frozenset}:
    return False
  vm.spend(len(items) >> 3)
  return all(_fixed(vm, item) for item in items)


def _fixed(vm, value) -> bool:
  kind = type(value)
  if kind is tuple or kind is frozenset:
    vm.spend(1 + (len(value) >> 3))
    return all(_fixed(vm, item) for item in value)
  return kind in NUMBERS and value == value


def pop(vm, items: set):
  """Takes a member out of a set: Python's, or the first in the order."""
  if set(map(type, items)) == {str}:
    vm.spend((2 * len(items) + sum(map(len, items)) // 8) >> 6)
    first = min(items)
  else:
    found = in_order(vm, items)
    if found is items:
      return items.pop()
    first = found[0]
  items.remove(first)
  return first


def _rank(vm, value) -> tuple:
  """Place of a value among others: its kind, then itself."""
  kind = type(value)
  if kind in NUMBERS:
    return (0, value) if value == value else (1,)
  if kind is str:
    return 2, value
  if value is None:
    return (3,)
  if kind in (tuple, slice, range, frozenset):
    vm.spend(1)
    if kind is slice or kind is range:
      value = (value.start, value.stop, value.step)
    ranks = [_rank(vm, item) for item in value]
    vm.make(64 * len(ranks))
    if kind is frozenset:
      ranks.sort()
    return {tuple: 4, frozenset: 5}.get(kind, 6), ranks
  return 7, vm.numbers.get(id(value), (0,))[0]


def watched(items: set, found: list):
  """Members of a set, found in its order, while it keeps its size."""
  size = len(items)
  for item in found:
    if len(items) != size:
      raise RuntimeError('Set changed size during iteration')
    yield item
