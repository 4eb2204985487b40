"""Items of values: in, subscripts, lookups; their work is counted before it is
done."""

import collections

from jaxrl_tok.rewards.programs import compare, keys
from jaxrl_tok.rewards.programs.operators import SEQUENCES, size_of
from jaxrl_tok.rewards.programs.values import (
  STOP,
  Call,
  Class,
  Counter,
  DefaultDict,
  Native,
  Next,
  kind_of,
)


def contains(vm, item, container, negated: bool = False) -> bool:
  """Puts `item in container`, or its negation, on the stack."""
  found = contains_now(vm, item, container)
  if found is None:
    return vm.push_native(_search(vm, item, container, negated))
  vm.frames[-1].stack.append(found is not negated)
  return False


def contains_now(vm, item, container) -> bool | None:
  """item in container; None where the container must be iterated."""
  kind = type(container)
  if kind is str:
    if type(item) is not str:
      raise TypeError(
        f"'in <string>' requires string as left operand, not {kind_of(item)}"
      )
    vm.spend((len(container) * min(len(item) + 8, 64)) >> 12)
    vm.spend(len(item) >> 8)
    return item in container
  if kind in (set, frozenset, type({}.keys())) or isinstance(container, dict):
    vm.check_key(item, len(container))
    return item in container
  if kind in (list, tuple, collections.deque, type({}.values())):
    return position(vm, container, item) >= 0
  if kind is range:
    return in_range(item, container)
  if kind is type({}.items()):
    if type(item) is tuple and len(item) == 2:
      vm.spend(1 + (len(container) >> 3))
      return any(compare.equal(vm, item, pair) for pair in container)
    return False
  return None


def in_range(item, numbers: range) -> bool:
  if type(item) is float and item.is_integer():
    item = int(item)
  return type(item) in (int, bool) and item in numbers


def position(vm, items, item) -> int:
  """Index of the first item that is or equals a value, or -1."""
  count = 0
  for other in items:
    if other is item or compare.equal(vm, other, item):
      break
    count += 1
  else:
    count = -1
  vm.spend((len(items) if count < 0 else count) >> 2)
  return count


def _search(vm, item, container, negated: bool):
  method = vm.special(container, '__contains__', item)
  if method is not None:
    return vm.truth((yield Call(method, item))) is not negated
  try:
    iterator = vm.iterate(container)
  except TypeError:
    raise TypeError(
      f"argument of type '{kind_of(container)}' is not iterable"
    ) from None
  while (other := (yield Next(iterator))) is not STOP:
    if other is item or compare.equal(vm, other, item):
      return not negated
  return negated


# --- items


def put(vm, table: dict, key, value) -> None:
  """table[key] = value"""
  keys.check_key(vm, key, len(table))
  vm.make(100)
  table[key] = value


def add_to_set(vm, items: set, item) -> None:
  keys.check_key(vm, item, len(items))
  vm.make(60)
  items.add(item)


def join(vm, separator: str, parts: list) -> str:
  """separator.join(parts)"""
  for i, part in enumerate(parts):
    if type(part) is not str:
      raise TypeError(
        f'sequence item {i}: expected str instance, {kind_of(part)} found'
      )
  size = sum(map(size_of, parts)) + size_of(separator) * len(parts)
  narrow = all(map(str.isascii, parts)) and separator.isascii()
  vm.make(48 + (size if narrow else 4 * size))
  vm.spend(len(parts) >> 2)
  return separator.join(parts)


def cut(vm, sequence, part: slice):
  """sequence[part]"""
  count = len(range(*part.indices(len(sequence))))
  vm.make(56 + count * (4 if type(sequence) is str else 8))
  return sequence[part]


def subscript(vm, subject, key) -> bool:
  """Puts subject[key] on the stack."""
  kind = type(subject)
  stack = vm.frames[-1].stack
  if kind in SEQUENCES or kind is range or kind is collections.deque:
    if type(key) is slice and kind is not collections.deque:
      found = subject[key] if kind is range else cut(vm, subject, key)
    else:
      check_index(subject, key)
      found = subject[key]
      if kind is collections.deque:
        vm.spend(len(subject) >> 10)
    stack.append(found)
    return False
  if isinstance(subject, dict):
    keys.check_key(vm, key, len(subject))
    if key in subject or kind is dict:
      stack.append(subject[key])
      return False
    return _missing(vm, subject, key)
  if kind is Class:
    stack.append(subject)  # list[int], of an annotation
    return False
  method = vm.special(subject, '__getitem__')
  if method is None:
    raise TypeError(f"'{kind_of(subject)}' object is not subscriptable")
  return vm.enter(method, [key], {})


def check_index(subject, key) -> None:
  if type(key) not in (int, bool):
    raise TypeError(
      f'{kind_of(subject)} indices must be integers or slices, not '
      f'{kind_of(key)}'
    )


def _missing(vm, subject: dict, key) -> bool:
  if type(subject) is Counter:
    vm.frames[-1].stack.append(0)
    return False
  if type(subject) is not DefaultDict or subject.factory is None:
    raise KeyError(key)
  return vm.push_native(_fill(vm, subject, key))


def _fill(vm, subject: DefaultDict, key):
  value = yield Call(subject.factory)
  put(vm, subject, key, value)
  return value


def store_subscript(vm, subject, key, value) -> None:
  """subject[key] = value"""
  kind = type(subject)
  if kind is list or kind is collections.deque:
    if type(key) is slice and kind is list:
      items = list(vm.call(_LIST, [value]))
      vm.make(8 * (len(items) + 8))
      vm.spend(len(subject) >> 9)
      subject[key] = items
    else:
      check_index(subject, key)
      subject[key] = value
  elif isinstance(subject, dict):
    put(vm, subject, key, value)
  else:
    method = vm.special(subject, '__setitem__')
    if method is None:
      raise TypeError(
        f"'{kind_of(subject)}' object does not support item assignment"
      )
    vm.call(method, [key, value])


def delete_subscript(vm, subject, key) -> None:
  """del subject[key]"""
  kind = type(subject)
  if kind is list or kind is collections.deque:
    if type(key) is not slice:
      check_index(subject, key)
    vm.spend(len(subject) >> 9)
    del subject[key]
  elif isinstance(subject, dict):
    keys.check_key(vm, key, len(subject))
    del subject[key]
  else:
    method = vm.special(subject, '__delitem__')
    if method is None:
      raise TypeError(
        f"'{kind_of(subject)}' object does not support item deletion"
      )
    vm.call(method, [key])


def _collect(vm, items, /):
  return (yield from vm.collect(items))


_LIST = Native('list', _collect, driven=True)
