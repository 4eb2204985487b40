"""Work of built-in functions is counted: steps grow with each argument's size,
so that no call outlives the budget. No clock is read."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl_tok.rewards.programs import Budget, run
from jaxrl_tok.rewards.programs.builtins import BUILTINS
from jaxrl_tok.rewards.programs.interpreter import execute, make_machine
from jaxrl_tok.rewards.programs.methods import METHODS
from jaxrl_tok.rewards.programs.values import Counter, DefaultDict, OrderedDict

N = 2**12
ENDLESS = Budget(steps=10**12, memory=10**15, output=10**9)


def factory_dict(table: dict) -> DefaultDict:
  found = DefaultDict(table)
  found.factory = None
  return found


# makers of a value of n items
LARGE = {
  str: lambda n: 'ab' * (n // 2),
  list: lambda n: [1] * n,
  tuple: lambda n: (1,) * n,
  dict: lambda n: dict.fromkeys(range(n), 1),
  DefaultDict: lambda n: factory_dict(dict.fromkeys(range(n), 1)),
  Counter: lambda n: Counter(dict.fromkeys(range(n), 1)),
  OrderedDict: lambda n: OrderedDict(dict.fromkeys(range(n), 1)),
  set: lambda n: set(range(n)),
  frozenset: lambda n: frozenset(range(n)),
  collections.deque: lambda n: collections.deque([1] * n),
  'texts': lambda n: ('q',) * n,
  'classes': lambda n: (BUILTINS['int'],) * n,
  'errors': lambda n: (BUILTINS['ValueError'],) * n,
  'characters': lambda n: dict.fromkeys(map(str, range(n)), 'x'),
  'pairs': lambda n: [(i % 7, i) for i in range(n)],
  'lone': lambda n: 'y' * n + 'a',
  'words': lambda n: set(map(str, range(n))),
  'fields': lambda n: '{}' * n,
  'percents': lambda n: '%s' * n,
}


def steps_of(source: str, **names) -> int:
  """Steps that a program takes which finds such names."""
  vm = make_machine(ENDLESS)
  vm.globals |= names
  outcome = execute(vm, f'try:\n  {source}\nexcept Exception: pass')
  assert outcome.kind == 'ok', (source, outcome.error)
  return outcome.steps


def grows(source: str, maker, **names) -> bool:
  """Whether steps grow by one in 1024 items of x, or in 4096 characters."""
  few, many = (steps_of(source, x=maker(n), **names) for n in (N, 4 * N))
  return many - few >= 3 * N >> (12 if type(maker(1)) is str else 10)


# arguments of methods that need some
ARGUMENTS = {
  name: args
  for args, names in (
    ("'c'", 'find rfind index rindex count partition rpartition startswith'),
    ("'c'", 'endswith removeprefix removesuffix'),
    ('{-1}', 'union intersection difference issubset issuperset isdisjoint'),
    ('{-1}', 'symmetric_difference difference_update intersection_update'),
    ('{-1}', 'symmetric_difference_update'),
    ('len(x) + 1', 'ljust rjust center zfill'),
    ('x', 'extend extendleft fromkeys subtract'),
    ("'c', 'd'", 'replace'),
    ("['a'] * 9", 'join'),
    ("{97: 'b'}", 'translate'),
    ('x, x', 'maketrans'),
    ('{}', 'format_map'),
    ('0, 1', 'insert'),
    ('0', 'pop'),
    ('2', 'remove'),
    ('1', 'rotate'),
    ('5, False', 'move_to_end'),
  )
  for name in names.split()
}
OF_LISTS = {'count': '2', 'index': '2'}
# methods whose work is not the items'
CONSTANT = {
  **{kind: {'popitem'} for kind in (dict, DefaultDict, OrderedDict, Counter)},
  collections.deque: {'append', 'appendleft', 'pop', 'popleft'},
  list: {'append'},
  set: {'add', 'discard', 'remove'},
  frozenset: {'copy'},
}
LOOKUPS = {'get', 'setdefault', 'pop', 'keys', 'values', 'items', 'update'}
METHOD_CALLS = [
  (kind, name)
  for kind, table in METHODS.items()
  if kind in LARGE
  for name in table
  if name not in CONSTANT.get(kind, ())
  and not (issubclass(kind, dict) and name in LOOKUPS)
  and not (kind is set and name == 'update')
]


@pytest.mark.parametrize(
  'kind', [kind for kind in METHODS if kind in LARGE], ids=lambda k: k.__name__
)
def test_work_of_a_method_is_counted(kind):
  free = []
  for name in [name for k, name in METHOD_CALLS if k is kind]:
    args = ARGUMENTS.get(name, '')
    if kind in (list, tuple, collections.deque):
      args = OF_LISTS.get(name, args)
    if kind is set and name == 'pop':
      args = ''
    if not grows(f'x.{name}({args})', LARGE[kind]):
      free.append(name)
  assert free == []


CALLS = {
  str: """
    x==Y x<Y x+'a' x*2 x[1:] x[::-1] 'c'in~x list(x) sorted(x) max(x) ''.join(x)
    '%s'%x '{}'.format(x) f'{x}' f'{x:>9}' repr(x) float(x) {x:1} set(x)
    'a'.replace('a',x) 'a'.join(['b',x]) x.split('b') x.rsplit('b') x.split(x)
    'a'.count(x) a,*b=x for~a~in~x:~pass print(x) hasattr(1,x) tuple(x)
    getattr(1,x,2) all(x) str.maketrans(x,x) x.strip(x) x.find(x[1:])
  """,
  list: """
    x==x[:] x<x[:] x+x x*2 x[1:] 2~in~x tuple(x) sorted(x) max(x) min(x) sum(x)
    set(x) dict.fromkeys(x) x+=x [*x] [x,*x] a,*b=x repr(x) str(x) all(x)
    del~x[0] x[0:1]=x (lambda~*a:1)(*x) max(*x) list(map(abs,x)) f'{x}'
    list(zip(x,x)) list(enumerate(x)) x.sort() x.sort(key=abs) print(*x)
    [].extend(x) set().union(x) set().update(x) list(reversed(x))
    list(filter(None,x)) zip(*x) slice(x)==slice(x[:]) repr(slice(x))
  """,
  tuple: """
    x==x+() x<x+() {x:1} {x} x~in~{} x+x x*2 x[1:] list(x) sorted(x)
    {(x,1):1} {slice(x):1} 'a'.startswith(x) set(x)
  """,
  dict: """
    x==dict(x) dict(x) x|x {**x} list(x) sorted(x) repr(x) list(x.items())
    set(x) x.keys()&x.keys() x.keys()==set(x) {}.update(x) max(x)
    list(x.values()) x.items()==x.items() (1,2)in~x.items() 2~in~x.values()
  """,
  Counter: 'x+x x-x x&x x|x x==x.copy() repr(x) x.update(x)',
  set: """
    x==x.copy() x<=x.copy() x|x x&x x-x x^x list(x) sorted(x) repr(x) max(x)
    x.pop() x.union() x.difference() x~in~{1} {1}.discard(x) {1}.remove(x)
    set(x) frozenset(x) next(iter(x)) x|=x
  """,
  'words': 'list(x) x.pop() repr(x) x|x next(iter(x)) x==x.copy()',
  frozenset: 'x.union() {x:1} x==x|x x~in~{} list(x)',
  collections.deque: 'x+x x==x.copy() list(x) repr(x) x[len(x)//2] del~x[9]',
  'texts': "''.join(x) 'a'.startswith(x) 'a'.endswith(x) sorted(x) set(x)",
  'classes': 'issubclass(str,x) isinstance("",x) isinstance("",(x,x))',
  'characters': "(lambda~**a:1)(**x) dict(**x) ''.maketrans(x)",
  'pairs': 'dict(x) sorted(x) set(x) max(x)',
  'lone': "'x'.strip(x) x.strip('a') x.rstrip(x) 'xx'.split(x)",
  'fields': 'x.format(*x)',
  'percents': 'x%tuple(x) x%1',
}


@pytest.mark.parametrize('kind', CALLS, ids=str)
def test_work_of_a_call_is_counted(kind):
  free = []
  for call in CALLS[kind].split():
    call = call.replace('~', ' ').replace('Y', 'x[:-1] + "c"')
    if not grows(call, LARGE[kind]):
      free.append(call)
  assert free == []


def test_work_of_except_is_counted():
  source = '1 / 0\n except x: pass\n except ZeroDivisionError: pass'
  source = f'\n try:\n  {source}'.replace('\n', '\n ')
  few, many = (
    steps_of(f'pass\n {source}', x=LARGE['errors'](n)) for n in (N, 4 * N)
  )
  assert many - few >= N


@pytest.mark.parametrize(
  ('call', 'long', 'other'),
  [
    ('x.strip(y)', 'x', 'y'),
    ('x.rfind(y)', 'a', 'a'),
    ('x.rsplit(y)', 'a', 'a'),
    ('x.rpartition(y)', 'a', 'a'),
    ('x.rindex(y)', 'a', 'a'),
  ],
)
def test_a_product_of_sizes_is_counted(call, long, other):
  """A search from the end takes the product of both lengths."""
  few, more = (
    steps_of(call, x=long * n, y=other * (n // 2)) for n in (2**12, 2**14)
  )
  assert more > 12 * few


CLASHES = {
  'near': '(-1, -2)',
  'floats': '(0.5, 2.0 ** 60)',
  'far': '(1, 2 ** 61)',
  'nested': '((0, -1), (0, -2))',
}


@pytest.mark.parametrize('name', CLASHES)
@pytest.mark.parametrize(
  'use', ['{t: 0 for t in x}', 'set(x)', '{(t,) for t in x}']
)
def test_keys_of_one_hash_are_counted(name, use):
  """n keys that collide cost the order of n^2, as they do in CPython."""
  source = 'x = [()]\nfor _ in range({}):\n  x = '
  source += f'[t + (v,) for t in x for v in {CLASHES[name]}]\n'
  budget = Budget(steps=10**9, memory=2**40)

  def steps(doublings):
    head = source.format(doublings)
    return run(head + use, budget).steps - run(head, budget).steps

  assert steps(11) > 2.3 * steps(10)


def test_objects_that_collide_are_counted():
  source = (
    'class C:\n  def __hash__(self): return 1\nx = {C() for _ in range(%d)}'
  )
  few, many = (run(source % n, ENDLESS).steps for n in (100, 200))
  assert many > 3 * few


@pytest.mark.parametrize(
  ('source', 'held'),
  [
    ('y = 2 ** 60000\nx = [-y for _ in range(10000)]', 'bytes'),
    ('y = 2 ** 60000\nx = [-1 % y for _ in range(10000)]', 'bytes'),
    ('y = -2 ** 60000\nx = [abs(y) for _ in range(10000)]', 'bytes'),
    ('x = list(range(2 ** 60000, 2 ** 60000 + 10000))', 'bits'),
    ('import collections\nc = collections.Counter(a=1)\nc["a"] = [1]\n'
     'for _ in range(40): c.update(a=c["a"])', 'bytes'),
    ('x = []\nfor _ in range(9000):\n  try: getattr(1, "a" * 10000)\n'
     '  except Exception as e: x.append(e)', 'bytes'),
  ],
)  # fmt: skip
def test_what_is_held_is_counted(source, held):
  outcome = run(source, Budget(memory=2**24))
  assert outcome.kind == 'budget'
  assert held in outcome.error


# --- sets

ORDERED = """
def f(): pass
class C: pass
print(list(set('abcdefgh')), set('abc'), {None, 'a', 1, (2, 'b'), (1, 'c')})
print(frozenset({'x', 'y', 'z'}), [*{'p', 'q'}], dict.fromkeys({'k', 'l', 'm'}))
x = set(str(i) for i in range(50))
print(x.pop(), x.pop(), ''.join(x), max(x, key=len), next(iter(x)))
print(x & x, x - {'3'})
for w in x: print(w, end=' ')
a, *b = {'u', 'v', 'w'}
print(a, b, sorted({('b', 1), ('a', 2)}, key=lambda t: 0), {float('nan'), 'a'})
y = [C() for _ in range(9)]
print([y.index(c) for c in set(y)], [g.__name__ for g in {f, len, abs, print}])
print({frozenset({'a', 'b'}), frozenset({'c'})}, {(None, 1), (None, 2)})
"""


def test_order_of_sets_is_the_same_in_every_process():
  found = set()
  source = 'import json, sys\nfrom jaxrl_tok.rewards.programs import run\n'
  source += 'o = run(json.load(sys.stdin))\nprint(o.error + o.output)'
  for seed in ('0', '1', '2'):
    done = subprocess.run(
      [sys.executable, '-c', source],
      check=True,
      cwd=Path(__file__).parent.parent,
      env={**os.environ, 'PYTHONHASHSEED': seed},
      input=json.dumps(ORDERED),
      capture_output=True,
      text=True,
    )
    found.add(done.stdout)
  assert len(found) == 1
  assert "['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h']" in found.pop()


def test_sets_of_numbers_have_the_order_of_cpython():
  for items in ({9, 1, 40, 7}, {0.5, 3, 2**70, -1}, {(3, 1), (1, 2), (0, -1)}):
    assert run(f'print(list({items!r}))').output == f'{list(items)}\n'


def test_a_set_that_grows_while_it_is_read_is_an_error():
  for items in ("{'a', 'b'}", '{1, 2}'):
    outcome = run(f'x = {items}\nfor i in x: x.add((i,))')
    assert outcome.error.startswith('RuntimeError: Set changed size')
