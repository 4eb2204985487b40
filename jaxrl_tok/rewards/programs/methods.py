"""Methods of Python's types that a program may call: METHODS[type][name]."""

import collections

from jaxrl_tok.rewards.programs import compare, keys, lookup, operators
from jaxrl_tok.rewards.programs.builtins import setter, sort, sum_numbers
from jaxrl_tok.rewards.programs.iterators import update
from jaxrl_tok.rewards.programs.text_methods import STR
from jaxrl_tok.rewards.programs.values import (
  STOP,
  Counter,
  DefaultDict,
  Generator,
  LanguageError,
  Native,
  Next,
  OrderedDict,
  Raised,
  Wrapped,
  kind_of,
  make_error,
)

# --- lists and tuples


def append(vm, items, item, /):
  vm.make(8)
  items.append(item)


def extend(vm, items, more, /):
  found = yield from vm.collect(more)
  vm.make(8 * len(found))
  items.extend(found)


def insert(vm, items, at, item, /):
  lookup.check_index(items, at)
  vm.spend(len(items) >> 9)
  vm.make(8)
  items.insert(at, item)


def pop_item(vm, items, at=-1, /):
  lookup.check_index(items, at)
  vm.spend(len(items) >> 9 if at != -1 else 0)
  return items.pop(at)


def index(vm, items, item, start=0, stop=None, /):
  part = items
  if start or stop is not None:
    start = slice(start, stop).indices(len(items))[0]
    if type(items) is collections.deque:
      items = vm.items_of(items)
    part = lookup.cut(vm, items, slice(start, stop))
  at = lookup.position(vm, part, item)
  if at < 0:
    raise ValueError(f'{compare.to_repr(vm, item)[:100]} is not in list')
  return at + start


def count(vm, items, item, /):
  vm.spend(len(items) >> 3)
  return sum(x is item or compare.equal(vm, x, item) for x in items)


def remove(vm, items, item, /):
  at = lookup.position(vm, items, item)
  if at < 0:
    raise ValueError('list.remove(x): x not in list')
  vm.spend(len(items) >> 9)
  del items[at]


def _whole(host: type, name: str, size: int = 8):
  """A method without arguments, whose work is the items'."""
  method = getattr(host, name)

  def call(vm, items, /):
    vm.make(56 + size * len(items))
    vm.spend(len(items) >> 7)
    return method(items)

  return Native(name, call)


LIST = {
  'append': Native('append', append),
  'clear': _whole(list, 'clear'),
  'copy': _whole(list, 'copy'),
  'count': Native('count', count),
  'extend': Native('extend', extend, driven=True),
  'index': Native('index', index),
  'insert': Native('insert', insert),
  'pop': Native('pop', pop_item),
  'remove': Native('remove', remove),
  'reverse': _whole(list, 'reverse'),
  'sort': Native('sort', sort, driven=True),
}
TUPLE = {name: LIST[name] for name in ('count', 'index')}

# --- dicts


def get(vm, table, key, default=None, /):
  keys.check_key(vm, key, len(table))
  return table.get(key, default)


def setdefault(vm, table, key, default=None, /):
  keys.check_key(vm, key, len(table))
  if key not in table:
    lookup.put(vm, table, key, default)
  return table[key]


def pop_key(vm, table, key, /, *default):
  keys.check_key(vm, key, len(table))
  return table.pop(key, *default)


def popitem(vm, table, /):
  return table.popitem()


def popitem_of_ordered(vm, table, /, last=True):
  if vm.truth(last) or not table:
    return table.popitem()
  vm.spend(len(table) >> 9)
  key = next(iter(table))
  return key, table.pop(key)


def move_to_end(vm, table, key, /, last=True):
  keys.check_key(vm, key, len(table))
  value = table.pop(key)
  if vm.truth(last):
    lookup.put(vm, table, key, value)
    return
  keys.check_items(vm, table)
  vm.make(100 * len(table))
  rest = dict(table)
  table.clear()
  table[key] = value
  table.update(rest)


def fromkeys(vm, _, keys, value=None, /):
  table = {}
  for key in (yield from vm.collect(keys)):
    lookup.put(vm, table, key, value)
  return table


def copy_dict(vm, table, /):
  vm.make(56 + 100 * len(table))
  keys.check_items(vm, table)
  found = type(table)(table)
  if type(table) is DefaultDict:
    found.factory = table.factory
  return found


def _view(name: str):
  method = getattr(dict, name)
  return Native(name, lambda vm, table, /: method(table))


DICT = {
  **{name: _view(name) for name in ('keys', 'values', 'items')},
  'clear': _whole(dict, 'clear'),
  'copy': Native('copy', copy_dict),
  'fromkeys': Native('fromkeys', fromkeys, driven=True),
  'get': Native('get', get),
  'pop': Native('pop', pop_key),
  'popitem': Native('popitem', popitem),
  'setdefault': Native('setdefault', setdefault),
  'update': Native('update', update, driven=True),
}


ORDERED = {
  **DICT,
  'move_to_end': Native('move_to_end', move_to_end),
  'popitem': Native('popitem', popitem_of_ordered),
}


def most_common(vm, counter, n=None):
  pairs = compare.sorted_counts(vm, counter)
  return pairs if n is None else pairs[: max(n, 0)]


def elements(vm, counter, /):
  vm.spend(len(counter) >> 3)
  vm.make(8 * sum(n for n in counter.values() if type(n) is int and n > 0))
  return iter([k for k, n in counter.items() for _ in range(n)])


def _tally(name: str):
  def tally(vm, counter, items=(), /, **pairs):
    count = operators.BINARY[name]
    if not isinstance(items, dict):
      for item in (yield from vm.collect(items)):
        keys.check_key(vm, item, len(counter))
        n = count(vm, counter.get(item, 0), 1)
        lookup.put(vm, counter, item, n)
      items = {}
    vm.make(16 * len(items))
    for key, n in (*items.items(), *pairs.items()):
      keys.check_key(vm, key, len(counter))
      lookup.put(vm, counter, key, count(vm, counter.get(key, 0), n))

  return tally


def total(vm, counter, /):
  vm.spend(len(counter) >> 3)
  return sum_numbers(vm, counter.values())


COUNTER = {
  **DICT,
  'elements': Native('elements', elements),
  'most_common': Native('most_common', most_common),
  'subtract': Native('subtract', _tally('Sub'), driven=True),
  'total': Native('total', total),
  'update': Native('update', _tally('Add'), driven=True),
}

# --- sets


def add(vm, items, item, /):
  lookup.add_to_set(vm, items, item)


def discard(vm, items, item, /):
  keys.check_key(vm, item, len(items))
  items.discard(item)


def remove_key(vm, items, item, /):
  keys.check_key(vm, item, len(items))
  items.remove(item)


def pop_any(vm, items, /):
  return keys.pop(vm, items)


def _sets(name: str):
  """A method of sets that takes iterables."""

  def call(vm, items, /, *others):
    found = []
    vm.make(60 * len(items))
    vm.spend(len(items) >> 4)
    for other in others:
      if type(other) not in compare.SETS and type(other) is not dict:
        other = yield from vm.collect(other)
        for item in other:
          keys.check_key(vm, item, len(items) + len(other))
      vm.make(60 * (len(items) + len(other)))
      keys.check_items(vm, items)
      keys.check_items(vm, other)
      found.append(other)
    return getattr(items, name)(*found)

  return Native(name, call, driven=True)


FROZENSET = {
  **{
    name: _sets(name)
    for name in (
      *('union', 'intersection', 'difference', 'symmetric_difference'),
      *('issubset', 'issuperset', 'isdisjoint'),
    )
  },
  'copy': Native('copy', lambda vm, items, /: items),
}
SET = {
  **FROZENSET,
  **{
    name: _sets(name)
    for name in (
      *('update', 'intersection_update', 'difference_update'),
      'symmetric_difference_update',
    )
  },
  'add': Native('add', add),
  'clear': _whole(set, 'clear'),
  'copy': _whole(set, 'copy', 60),
  'discard': Native('discard', discard),
  'pop': Native('pop', pop_any),
  'remove': Native('remove', remove_key),
}

# --- deques


def appendleft(vm, items, item, /):
  vm.make(8)
  items.appendleft(item)


def extendleft(vm, items, more, /):
  items.extendleft((yield from vm.collect(more)))


def rotate(vm, items, n=1, /):
  vm.spend(len(items) >> 6)
  items.rotate(n)


DEQUE = {
  **{
    name: LIST[name]
    for name in ('append', 'count', 'extend', 'index', 'insert', 'remove')
  },
  'appendleft': Native('appendleft', appendleft),
  'clear': _whole(collections.deque, 'clear'),
  'copy': _whole(collections.deque, 'copy'),
  'extendleft': Native('extendleft', extendleft, driven=True),
  'pop': Native('pop', lambda vm, items, /: items.pop()),
  'popleft': Native('popleft', lambda vm, items, /: items.popleft()),
  'reverse': _whole(collections.deque, 'reverse'),
  'rotate': Native('rotate', rotate),
}

# --- numbers, generators and the rest


def _number(host: type, name: str):
  method = getattr(host, name)
  return Native(name, lambda vm, value, /: method(value))


def send(vm, generator, value, /):
  item = yield Next(generator, value)
  if item is not STOP:
    return item
  args = () if generator.result is None else (generator.result,)
  raise Raised(make_error('StopIteration', *args))


def no_method(name: str):
  def refuse(vm, *args, **keywords):
    raise LanguageError(f'no generator.{name} in the subset')

  return Native(name, refuse)


def range_count(vm, numbers, item, /):
  return int(lookup.in_range(item, numbers))


def range_index(vm, numbers, item, /):
  if not lookup.in_range(item, numbers):
    raise ValueError(f'{kind_of(item)} is not in range')
  return numbers.index(int(item))


INT = {name: _number(int, name) for name in ('bit_length', 'bit_count')}
METHODS = {
  str: STR,
  list: LIST,
  tuple: TUPLE,
  dict: DICT,
  DefaultDict: DICT,
  OrderedDict: ORDERED,
  Counter: COUNTER,
  set: SET,
  frozenset: FROZENSET,
  collections.deque: DEQUE,
  int: INT,
  bool: INT,
  float: {'is_integer': _number(float, 'is_integer')},
  range: {
    'count': Native('count', range_count),
    'index': Native('index', range_index),
  },
  Generator: {
    'close': no_method('close'),
    'send': Native('send', send, driven=True),
    'throw': no_method('throw'),
  },
  Wrapped: {'setter': Native('setter', setter)},
}
