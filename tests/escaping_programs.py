"""Programs that try to leave the language or to hurt the host."""

from pathlib import Path

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
  *(
    "f(**{'__class__': 1})",
    'f(__class__=1)',
    '(-8) ** 0.5',
    'super.x',
    'a = ...',
  ),
  *("setattr(C, '__init__', len)", "'%n' % 1 or 1 .__add__(1)"),
  *(
    'def __getattr__(x): pass',
    'class D:\n  __slots__ = ()',
    'class E(int): 1',
  ),
  *('class D:\n  def __getattr__(self, x): pass', 'class D(C, object): pass'),
  *('class D(metaclass=type): pass', 'g().throw(ValueError)', 'x: (1).y = b""'),
  *("f'{1:n}'", "f'{f.__name__.__class__}'", 'print(1, file=2)', "''.encode()"),
)

# --- budgets: numbers, texts, containers, calls, syntax

FILE = Path(__file__).parent / 'programs' / 'bombs.txt'
BOMBS = FILE.read_text().split('\n---\n')


def deep(pattern: str, count: int) -> str:
  """A source of `count` levels: 'left|middle|right'."""
  left, middle, right = pattern.split('|')
  return left * count + middle + right * count


NESTED = (
  *('(|1|)', '[|1|]', '{|1|}', '-|1|', 'not |1|', '~|1|', 'lambda: |1|'),
  *('f(|1|)', '|1|.x', '|1|[0]', '|1|()', '|1|+1', '|1|**1', '1 if 1 else |1|'),
  *('{1: |1|}', '[x for x in |y|]', '1 and (|1| or 2)', '(yield |1|)', '(|1|'),
  *('|1| if 1 else 2', '1 < |1|', '*|a|', '(x := |1|)', '[|1|', '{|1|', '|1|)'),
  *(
    "f'{|1|}'",
    '@|f|\n',
    '{**|a|}',
    '|1| and 1',
    'await |1|',
    '(|,|)',
    '[|*|]',
  ),
)
