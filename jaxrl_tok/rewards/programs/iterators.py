"""Built-in functions that make and read iterators; see builtins.py."""

import functools

from jaxrl_tok.rewards.programs import compare, keys, lookup
from jaxrl_tok.rewards.programs.machine import FLAT
from jaxrl_tok.rewards.programs.values import (
  STOP,
  Call,
  Generator,
  Instance,
  LanguageError,
  Next,
  Raised,
  Stream,
  kind_of,
  make_error,
)

MISSING = object()
SMALL = 2**63


def collect(vm, items=(), /):
  return (yield from vm.collect(items))


def tuple_of(vm, items=(), /):
  if type(items) is tuple:
    return items
  found = yield from vm.collect(items)
  vm.make(8 * len(found))
  return tuple(found)


def _set_of(kind):
  def build(vm, items=(), /):
    if type(items) in compare.SETS or isinstance(items, dict):
      found = items
      keys.check_items(vm, items)
    else:
      found = yield from vm.collect(items)
      for item in found:
        keys.check_key(vm, item, len(found))
    vm.make(60 * len(found))
    vm.spend(len(found) >> 4)
    return kind(found)

  return build


def dict_of(vm, items=(), /, **pairs):
  table = {}
  yield from update(vm, table, items, **pairs)
  return table


def update(vm, table: dict, items=(), /, **pairs):
  """dict.update"""
  if isinstance(items, dict):
    vm.make(100 * len(items))
    keys.check_items(vm, items)
    table.update(items)
  else:
    for pair in (yield from vm.collect(items)):
      pair = yield from vm.collect(pair, 3)
      if len(pair) != 2:
        raise ValueError(
          f'dictionary update sequence element has length {len(pair)}; 2 is '
          'required'
        )
      lookup.put(vm, table, *pair)
  vm.make(100 * len(pairs))
  table.update(pairs)


def _stream(name: str):
  """A function whose generator's yields are items of an iterator."""

  def wrap(function):
    @functools.wraps(function)
    def make(vm, /, *args, **keywords):
      vm.make(200)
      return Stream(name, function(vm, *args, **keywords), vm.strict)

    return make

  return wrap


def _flat(iterators) -> bool:
  return len(iterators) <= 8 and all(type(i) in FLAT for i in iterators)


def zip_(vm, *iterables, strict=False):
  vm.make(100)
  vm.spend(len(iterables))
  iterators = [vm.iterate(i) for i in iterables]
  if _flat(iterators):
    return zip(*iterators, strict=bool(strict))
  return zip_slow(vm, iterators, strict)


@_stream('zip')
def zip_slow(vm, iterators, strict):
  while True:
    row = []
    for iterator in iterators:
      item = yield Next(iterator)
      if item is STOP:
        if strict and row:
          raise ValueError('zip() arguments have different lengths')
        return
      row.append(item)
    vm.make(56 + 8 * len(row))
    if not row:
      return
    yield tuple(row)


def enumerate_(vm, iterable, start=0):
  iterator = vm.iterate(iterable)
  if type(start) not in (int, bool):
    raise TypeError(f"'{kind_of(start)}' object cannot be an integer")
  if type(iterator) in FLAT and -SMALL < start < SMALL:
    return enumerate(iterator, start)
  return enumerate_slow(vm, iterator, start)


@_stream('enumerate')
def enumerate_slow(vm, iterator, count):
  while (item := (yield Next(iterator))) is not STOP:
    yield (count, item)
    count += 1


def map_(vm, function, *iterables):
  if not iterables:
    raise TypeError('map() must have at least two arguments.')
  vm.spend(len(iterables))
  return map_slow(vm, function, [vm.iterate(i) for i in iterables])


@_stream('map')
def map_slow(vm, function, iterators):
  while True:
    args = []
    for iterator in iterators:
      item = yield Next(iterator)
      if item is STOP:
        return
      args.append(item)
    yield (yield Call(function, *args))


def filter_(vm, function, iterable, /):
  return filter_slow(vm, function, vm.iterate(iterable))


@_stream('filter')
def filter_slow(vm, function, iterator):
  while (item := (yield Next(iterator))) is not STOP:
    kept = item if function is None else (yield Call(function, item))
    if vm.truth(kept):
      yield item


def iter_(vm, iterable, /):
  return vm.iterate(iterable)


def next_(vm, iterator, default=MISSING, /):
  if type(iterator) in (list, tuple, str, dict, set, range):
    raise TypeError(f"'{kind_of(iterator)}' object is not an iterator")
  item = yield Next(iterator)
  if item is not STOP:
    return item
  if default is not MISSING:
    return default
  result = iterator.result if type(iterator) is Generator else None
  args = () if result is None else (result,)
  raise Raised(make_error('StopIteration', *args))


def reversed_(vm, items, /):
  kind = type(items)
  method = vm.special(items, '__reversed__')
  if kind in compare.SETS[:2] or method or kind is Generator:
    raise TypeError(f"'{kind_of(items)}' object is not reversible")
  if vm.special(items, '__getitem__', iterated=True) is not None:
    raise LanguageError('no reversed() of an object in the subset')
  if kind in (list, tuple, str, range) or hasattr(kind, '__reversed__'):
    return reversed(items)
  raise TypeError(f"'{kind_of(items)}' object is not reversible")


def len_(vm, items, /):
  if type(items) is Instance:
    method = vm.special(items, '__len__')
    if method is not None:
      return (yield Call(method))
  elif hasattr(type(items), '__len__'):
    return len(items)
  raise TypeError(f"object of type '{kind_of(items)}' has no len()")
