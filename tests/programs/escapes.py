"""Programs that try to leave the language or to hurt the host."""

# --- refused: attributes of the host, modules, names

VALUES = (
  *('0', '0.5', "''", 'True', 'None', '[]', '()', '{}', '{1}', 'range(3)'),
  *('frozenset()', 'slice(1)', 'len', 'int', 'object', 'type', 'ValueError'),
  *('f', 'C', 'C()', 'C().m', 'g()', 'iter([])', 'zip([])', 'map(len, [])'),
  *('[].append', "''.join", 'ValueError(1)', 'math', 'math.pi', 'math.sqrt'),
  *('itertools.count', 'collections.Counter()', 'collections.deque()', 'w'),
  *('reversed([])', 'enumerate([])', '{}.items()', 'type(1)', 'NotImplemented'),
  *('collections.defaultdict(int)', 'List', 'C.p', 'iter({})', 'print'),
)
DUNDERS = (
  *('__class__', '__dict__', '__init__', '__globals__', '__subclasses__'),
  *('__builtins__', '__code__', '__self__', '__func__', '__mro__', '__bases__'),
  *('__getattribute__', '__reduce_ex__', '__module__', '__closure__'),
  *('__traceback__', '__context__', '__doc__', '__call__', '__iter__'),
)
HOST = (
  *('gi_frame', 'gi_code', 'f_globals', 'f_builtins', 'func_globals', 'mro'),
  *('tb_frame', 'co_code', 'cr_frame', 'real', 'imag', 'encode', 'tobytes'),
  *('with_traceback', 'add_note', 'function', 'subject', 'cls', 'attrs', 'vm'),
  *('code', 'env', 'frame', 'host', 'construct', 'lookup', 'factory', 'stream'),
)
PRELUDE = """
import math, itertools, collections
from typing import List
def f(x=1): return x
def g(): yield 1
class C:
  def m(self): return 1
  @property
  def p(self): return 1
w = lambda: 0
"""
REFUSED = (
  *("'{0.__class__}'.format(1)", "'{0[0]}'.format([1])", "'{a.b}'.format(a=1)"),
  *("'{0.__init__.__globals__}'.format(len)", "'{:{0.x}}'.format(1)"),
  *("getattr(1, '__class__')", "hasattr(1, '__dict__')", "eval('1')"),
  *("setattr(len, '__call__', 1)", "exec('1')", "compile('1', '', 'eval')"),
  *("__import__('os')", "open('/etc/passwd')", 'input()', 'globals()'),
  *('locals()', 'vars()', 'dir()', 'breakpoint()', 'memoryview(1)', 'help()'),
  *('import os', 'import sys', 'from os import system', 'import builtins'),
  *('import subprocess as s', 'from math import __loader__', 'import math.x'),
  *('from itertools import tee', '__builtins__', '__file__', 'b"x"', '1j'),
  *('async def f(): pass', 'with f: pass', 'bytes(3)', 'id(1)', 'super(1, 2)'),
  *("f(**{'__class__': 1})", 'f(__class__=1)', '(-8) ** 0.5', 'super.x', 'a = ...'),
  *("setattr(C, '__init__', len)", "'%n' % 1 or 1 .__add__(1)"),
  *('def __getattr__(x): pass', 'class D:\n  __slots__ = ()', 'class E(int): 1'),
  *('class D:\n  def __getattr__(self, x): pass', 'class D(C, object): pass'),
  *('class D(metaclass=type): pass', 'g().throw(ValueError)', 'x: (1).y = b""'),
  *("f'{1:n}'", "f'{f.__name__.__class__}'", "print(1, file=2)", "''.encode()"),
)

# --- budgets: numbers, texts, containers, calls, syntax

BOMBS = (
  # numbers
  *('10 ** 10 ** 10', '2 ** (10 ** 18)', '1 << 10 ** 12', '(2 ** 9999) ** 9999'),
  *('x = 3\nwhile True: x *= x', 'x = 2\nwhile True: x = x ** 2', 'pow(3, 10**9)'),
  *('import math\nmath.factorial(10 ** 9)', 'import math\nmath.comb(10**9, 10**8)'),
  *('import math\nmath.prod(range(1, 10 ** 7))', 'x = 1\nwhile True: x = x << 999'),
  *('import math\nmath.perm(10 ** 9, 10 ** 8)', 'round(5, -(10 ** 12))'),
  *('x = 2 ** 65000\nwhile True: x * x', 'x = 10 ** 4200\nwhile True: str(x)'),
  *('pow(2 ** 60000 + 1, 2 ** 65000, 2 ** 60000 + 3)', 'sum([2 ** 65000] * 10 ** 6)'),
  *('x = 7 ** 9999\nwhile 1: y = x % 12345\n', 'a = 1\nwhile a: a += a * 10 ** 90'),
  *("x = [int('9' * 4000)] * 9\nwhile 1: sum(x)", 'import math\nmath.factorial(9000)'),
  # texts
  *("'a' * 10 ** 10", "x = 'ab'\nwhile True: x += x", "('a' * 10 ** 6).join(['b'] * 10 ** 6)"),
  *("('a' * 10 ** 5).replace('a', 'b' * 10 ** 5)", "'a'.ljust(10 ** 10)"),
  *("'a'.center(10 ** 9)", "'a'.zfill(10 ** 9)", "'\\t'.expandtabs(10 ** 9)"),
  *("'{:1000000000}'.format(1)", "'{:{}}'.format(1, 10 ** 9)", "f'{1:999999999}'"),
  *("f'{1:{10 ** 9}}'", "f'{1.5:.99999999f}'", "'%1000000000d' % 1", "'%.999999999f' % 1"),
  *("'%*d' % (10 ** 9, 1)", "format(1, '9' * 50)", "format(1, '0' * 200 + '9')"),
  *("('a' * 10 ** 6).split('a' * 1) * 100", "list('a' * 10 ** 7)", "'a ' * 10 ** 8"),
  *("('ab' * 10 ** 6).translate({97: 'x' * 10 ** 6})", "('a' * 9 ** 7).splitlines() * 9"),
  *("while True: print('a' * 1000)", "print('a' * 10 ** 6)", "print(*range(10 ** 6))"),
  *("x = 'a' * 10 ** 6\nwhile True: x.count('aab' * 999)", "x = 'a' * 9 ** 6\nwhile 1: x.upper()"),
  *("x = ['a' * 10 ** 6] * 10 ** 5\nx.sort()", "x = 'a' * 10 ** 6\n('b' + x) in [x + 'b'] * 10 ** 6"),
  *("repr('\\n' * 10 ** 7)", "x = 'é' * 10 ** 6\nwhile 1: x.swapcase()", "str([0] * 10 ** 7)"),
  *("x = '(' * 10 ** 6\nwhile 1: x.strip('()')", "while 1: int('9' * 4200)", "while 1: float('9' * 10 ** 5)"),
  # containers
  *('[0] * 10 ** 10', '(0,) * 10 ** 10', 'list(range(10 ** 18))', 'x = [0]\nwhile True: x += x'),
  *('set(range(10 ** 9))', 'sum(range(10 ** 12))', 'max(range(10 ** 12))', 'tuple(range(2 ** 70))'),
  *('sorted(range(10 ** 9))', 'dict.fromkeys(range(10 ** 9))', '[*range(10 ** 9)]', 'a, b = range(10 ** 30), 1\n[*a]'),
  *('x = [1]\nfor i in x: x.append(i)', 'x = list(range(10 ** 5))\nwhile 1: x.insert(0, 1)'),
  *('x = list(range(10 ** 5))\nwhile 1: -1 in x', 'x = [0] * 10 ** 5\nwhile 1: x.count(1)'),
  *('x = [0] * 10 ** 5\nwhile 1: x[:]', 'x = [0] * 10 ** 5\nwhile 1: x == [0] * 10 ** 5'),
  *('x = list(range(10 ** 5))\nwhile 1: sorted(x)', 'x = set(range(10 ** 5))\nwhile 1: x | x'),
  *('x = {}\nwhile True: x[len(x)] = x', '{i * (2 ** 61 - 1) for i in range(10 ** 5)}'),
  *('x = {}\nfor i in range(10 ** 6): x[(i * (2 ** 61 - 1),)] = i', 'x = dict.fromkeys(range(10 ** 5))\nwhile 1: x.copy()'),
  *('set([i << 70 for i in range(10 ** 5)])', 'x = [0] * 10 ** 6\nwhile 1: x.reverse()'),
  *('x = []\nfor i in range(99): x = [x, x]\nrepr(x)', 'x = ()\nfor i in range(99): x = (x, x)\nhash_me = {x}'),
  *('x = y = [0]\nfor i in range(50): x, y = [x, x], [y, y]\nx == y', 'x = []\nfor i in range(10 ** 5): x = [x]\nstr(x)'),
  *('x = []\nx.append(x)\ny = []\ny.append(y)\nx == y', 'x = []\nx.append(x)\ny = []\ny.append(y)\nx < y'),
  *('x = y = ()\nfor i in range(50): x, y = (x, x, 0), (y, y, 1)\nsorted([y, x])', 'x = {}\nfor i in range(999): x = {0: x}\nstr(x)'),
  *('x = ()\nfor i in range(10 ** 5): x = (x,)\n{x: 1}', 'x = []\nfor i in range(10 ** 5): x = [x]\ny = []\nfor i in range(10 ** 5): y = [y]\nx == y'),
  *('from collections import deque\nx = deque(range(10 ** 5))\nwhile 1: x[50000]', 'from collections import Counter\nx = Counter(range(10 ** 9))'),
  *('import itertools\nlist(itertools.count())', 'import itertools\nlist(itertools.product(range(99), repeat=9))'),
  *('from collections import Counter\nx = Counter(a=10 ** 12)\nx.elements()', 'import itertools\nmax(itertools.cycle([1]))'),
  # calls
  *('while True: pass', 'def f(): return f()\nf()', 'f = lambda x: f(x)\nf(1)', 'def f(): yield from f()\nlist(f())'),
  *('class A:\n  def __init__(self): A()\nA()', 'class A:\n  def __repr__(self): return repr(self)\nrepr(A())'),
  *('class A:\n  def __eq__(self, o): return self == o\nA() == A()', 'class A:\n  def __hash__(self): return hash_it(self)\ndef hash_it(a): return len({a})\n{A()}'),
  *('class A:\n  def __lt__(self, o): return self < o\nsorted([A(), A()])', 'class A:\n  def __add__(self, o): return self + o\nA() + 1'),
  *('class A:\n  def __len__(self): return len(self)\nlen(A())', 'class A:\n  def __bool__(self): return not self\nnot A()'),
  *('class A:\n  def __getitem__(self, k): return self[k]\nA()[0]', 'class A:\n  def __call__(self): return self()\nA()()'),
  *('class A:\n  @property\n  def p(self): return self.p\nA().p', 'class A:\n  def __contains__(self, x): return x in self\n1 in A()'),
  *('class A:\n  def __iter__(self): return iter(self)\nlist(A())', 'class A:\n  def __hash__(self): return 1\n  def __eq__(self, o): return False\n{A() for i in range(10 ** 5)}'),
  *('g = iter([])\nfor i in range(10 ** 5): g = (x for x in g)\nlist(g)', 'g = []\nfor i in range(10 ** 5): g = map(abs, g)\nlist(g)'),
  *('g = [1]\nfor i in range(10 ** 5): g = enumerate(g)\nlist(g)', 'g = [1]\nfor i in range(10 ** 5): g = zip(g)\nlist(g)'),
  *('f = lambda: 1\nfor i in range(10 ** 5): f = lambda f=f: f()\nf()', 'try:\n  while True: pass\nexcept BaseException: pass'),
  *('try:\n  10 ** 10 ** 10\nfinally:\n  while True: pass', 'def f():\n  try: f()\n  finally: f()\nf()', 'while True:\n  try: [0] * 10 ** 12\n  except Exception: pass'),
  *('e = ValueError()\nfor i in range(10 ** 4): e = ValueError(e)\nstr(e)', 'e = ValueError()\nfor i in range(10 ** 4): e = ValueError(e, 1)\nrepr(e)'),
  *('class A: pass\nx = None\nfor i in range(10 ** 6):\n  a = A()\n  a.x = x\n  x = a', 'sorted(range(10 ** 5), key=lambda x: [0] * 10 ** 4)'),
  *('list(map(lambda x: x, range(10 ** 9)))', 'any(False for i in range(10 ** 12))', 'sum(i for i in range(10 ** 12))'),
)


def deep(pattern: str, count: int) -> str:
  """A source of `count` levels: 'left|middle|right'."""
  left, middle, right = pattern.split('|')
  return left * count + middle + right * count


NESTED = (
  *('(|1|)', '[|1|]', '{|1|}', '-|1|', 'not |1|', '~|1|', 'lambda: |1|'),
  *('f(|1|)', '|1|.x', '|1|[0]', '|1|()', '|1|+1', '|1|**1', '1 if 1 else |1|'),
  *('{1: |1|}', '[x for x in |y|]', '1 and (|1| or 2)', '(yield |1|)', '(|1|'),
  *('|1| if 1 else 2', '1 < |1|', '*|a|', '(x := |1|)', '[|1|', '{|1', '|1|)'),
  *("f'{|1|}'", '@|f|\n', '{**|a|}', '|1| and 1', 'await |1|', '(|,|)', '[|*|]'),
)
