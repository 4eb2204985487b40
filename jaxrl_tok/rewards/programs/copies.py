"""The module copy of the language: COPY[name]."""

import collections

from jaxrl_tok.rewards.programs import keys, lookup, methods
from jaxrl_tok.rewards.programs.compare import ATOMS
from jaxrl_tok.rewards.programs.values import (
  Bound,
  Call,
  Class,
  Counter,
  DefaultDict,
  Function,
  Instance,
  LanguageError,
  Native,
  OrderedDict,
  kind_of,
)

# kinds whose values are their own copies
SAME = ATOMS | {Class, Function, Native, Bound, range, type(NotImplemented)}
DICTS = (dict, DefaultDict, Counter, OrderedDict)


def copy(vm, value, /):
  kind = type(value)
  if kind is Instance:
    vm.make(200 + 100 * len(value.attrs))
    return Instance(value.cls, dict(value.attrs))
  if kind in DICTS:
    return methods.copy_dict(vm, value)
  if kind in (list, set, collections.deque):
    return vm.methods[kind]['copy'].function(vm, value)
  if kind in SAME or kind in (tuple, frozenset, slice):
    return value
  raise LanguageError(f'no copy of a {kind_of(value)} in the subset')


def deepcopy(vm, value, /):
  return (yield Call(DEEP, value, {}))


def _deep(vm, value, known: dict):
  """Driven: a copy of a value, of each of its parts once.

  known: {id: (copy, value)} of what is copied.
  """
  kind = type(value)
  if kind in SAME:
    return value
  if id(value) in known:
    return known[id(value)][0]
  vm.make(100)
  if kind in (tuple, frozenset):
    items = []
    for item in vm.items_of(value):
      items.append((yield Call(DEEP, item, known)))
    if id(value) in known:  # a part of it holds it
      return known[id(value)][0]
    if kind is frozenset:
      found = _members(vm, set(), items)
    else:
      same = all(x is y for x, y in zip(items, value))
      found = value if same else tuple(items)
    return _know(known, value, kind(found))
  if kind is list or kind is collections.deque:
    new = [] if kind is list else collections.deque(maxlen=value.maxlen)
    _know(known, value, new)
    for item in vm.items_of(value):
      vm.make(8)
      new.append((yield Call(DEEP, item, known)))
    return new
  if kind is set:
    items = []
    for item in vm.items_of(value):
      items.append((yield Call(DEEP, item, known)))
    return _know(known, value, _members(vm, set(), items))
  if kind in DICTS or kind is Instance:
    return (yield from _deep_table(vm, value, known))
  raise LanguageError(f'no deepcopy of a {kind_of(value)} in the subset')


def _deep_table(vm, value, known: dict):
  """Driven: a deep copy of a dict or an object."""
  kind = type(value)
  if kind is Instance:
    new = _know(known, value, Instance(value.cls))
    pairs = value.attrs
    for name in list(pairs):
      vm.make(100)
      new.attrs[name] = yield Call(DEEP, pairs[name], known)
    return new
  new = _know(known, value, kind())
  if kind is DefaultDict:
    new.factory = value.factory
  for key in vm.items_of(value):
    keys.check_key(vm, key, len(value))
    item = yield Call(DEEP, value[key], known)
    key = yield Call(DEEP, key, known)
    lookup.put(vm, new, key, item)
  return new


def _members(vm, found: set, items: list) -> set:
  for item in items:
    lookup.add_to_set(vm, found, item)
  return found


def _know(known: dict, value, new):
  known[id(value)] = new, value
  return new


DEEP = Native('deepcopy', _deep, driven=True)
COPY = {
  'copy': Native('copy', copy),
  'deepcopy': Native('deepcopy', deepcopy, driven=True),
}
