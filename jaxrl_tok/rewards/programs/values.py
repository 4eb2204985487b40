"""Values of the interpreted language that Python's own types do not hold.

int, float, str, bool, None, list, tuple, dict, set, frozenset, range, slice,
deque and their iterators are held as themselves; everything else is a class of
this file. Their attributes are read by the interpreter alone: an attribute of
the program is looked up in a table.
"""

import collections
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Budget(NamedTuple):
  """Limits of one program.

  A step is an instruction, or the part of a built-in function's work that takes
  as long (about a microsecond). Memory is counted as it is made and never given
  back, so it bounds what is held at any time.
  """

  steps: int = 1_000_000
  memory: int = 2**26  # bytes of everything made
  depth: int = 1_000  # calls inside calls
  output: int = 2**16  # characters printed
  int_bits: int = 2**16  # size of one integer
  source: int = 2**16  # characters of the program
  nesting: int = 100  # syntax inside syntax


class BudgetError(Exception):
  """A program used more than its Budget; it cannot catch this."""


class LanguageError(Exception):
  """A program uses a part of Python that the subset has not; it cannot catch
  this."""


class ObjectError(Exception):
  """An object of the program's own class stands for another value in a test;
  neither can catch this."""


class Raised(Exception):
  """An exception of the program, on its way up."""

  def __init__(self, value: 'Instance'):
    super().__init__(value.cls.name)
    self.value = value


class Stop:
  """End of an iterator, given in place of an item."""


STOP = Stop()


class Env:
  """Names of one call, and the call around its function."""

  __slots__ = ('names', 'parent')

  def __init__(self, names: dict, parent: 'Env | None'):
    self.names = names
    self.parent = parent


class Code:
  """Instructions of a function: [(operation, argument)], and its parameters."""

  __slots__ = (
    'by_name',
    'is_generator',
    'keyword_only',
    'kwargs',
    'lines',
    'name',
    'ops',
    'positional',
    'positional_only',
    'strict',
    'varargs',
  )

  def __init__(self, name: str, strict: bool | None = False):
    self.name = name
    self.strict = strict  # of a test; None, of a module: as its caller
    self.ops = []
    self.lines = []
    self.positional = ()  # positional-only ones first
    self.positional_only = 0
    self.keyword_only = ()
    self.by_name = frozenset()  # parameters that a keyword reaches
    self.varargs = self.kwargs = None
    self.is_generator = False


class Function:
  """A function of the program."""

  __slots__ = ('attrs', 'code', 'defaults', 'env', 'keyword_defaults', 'owner')

  def __init__(self, code, env, defaults, keyword_defaults, owner):
    self.code = code
    self.env = env
    self.defaults = defaults  # of the last positional ones
    self.keyword_defaults = keyword_defaults
    self.owner = owner  # class whose body defines it
    self.attrs = {}


class Native:
  """A function of the whitelist, f(vm, *args, **kwargs).

  driven: f is a generator that yields Call, Next and Send to the interpreter
  and is sent their results: so it nests no call of Python in another.
  """

  __slots__ = ('driven', 'function', 'name')

  def __init__(self, name: str, function: Callable, driven: bool = False):
    self.name = name
    self.function = function
    self.driven = driven


class Bound:
  """A function and its first argument."""

  __slots__ = ('function', 'subject')

  def __init__(self, function, subject):
    self.function = function
    self.subject = subject


class Wrapped:
  """property, staticmethod or classmethod of a function."""

  __slots__ = ('function', 'kind', 'setter')

  def __init__(self, kind: str, function, setter=None):
    self.kind = kind
    self.function = function
    self.setter = setter


class Module:
  """A module of the whitelist, or another table of names."""

  __slots__ = ('attrs', 'name')

  def __init__(self, name: str, attrs: dict):
    self.name = name
    self.attrs = attrs


class Class:
  """A class: of the program, an exception, or one of Python's types (host)."""

  __slots__ = ('attrs', 'base', 'construct', 'depth', 'host', 'name', 'vm')

  def __init__(self, name, base, attrs=None, host=None, construct=None):
    self.name = name
    self.base = base
    self.attrs = {} if attrs is None else attrs
    self.host = host
    self.construct = construct
    self.vm = None
    self.depth = base.depth + 1 if base else 0

  def lookup(self, name: str):
    """An attribute of the class or its bases, or None."""
    cls = self
    while cls is not None:
      if name in cls.attrs:
        return cls.attrs[name]
      cls = cls.base
    return None

  def is_a(self, other: 'Class') -> bool:
    cls = self
    while cls is not None:
      if cls is other:
        return True
      cls = cls.base
    return False


class Instance:
  """An object of a class of the program, or an exception. Its == and hash are
  the class's, so that it may be a key."""

  __slots__ = ('attrs', 'cls')

  def __init__(self, cls: Class, attrs: dict | None = None):
    self.cls = cls
    self.attrs = {} if attrs is None else attrs

  def __eq__(self, other):
    vm = self.cls.vm
    return self is other if vm is None else vm.equal(self, other)

  def __hash__(self):
    vm = self.cls.vm
    return id(self) >> 4 if vm is None else vm.hash_instance(self)


class Super:
  """super() in a method."""

  __slots__ = ('cls', 'subject')

  def __init__(self, cls, subject):
    self.cls = cls
    self.subject = subject


class Generator:
  """A function's call that yields."""

  __slots__ = ('frame', 'result', 'running', 'started')

  def __init__(self, frame):
    self.frame = frame  # None: it has ended
    self.started = self.running = False
    self.result = None


class Stream:
  """An iterator of the whitelist: a driven generator whose other yields are its
  items."""

  __slots__ = ('frame', 'name', 'running')

  def __init__(self, name: str, iterator: Iterator, strict: bool):
    self.name = name
    self.frame = NativeFrame(iterator, strict, self)
    self.running = False


class Frame:
  """A call of a Function, a class body or the module."""

  __slots__ = (
    'base_env',
    'code',
    'env',
    'function',
    'generator',
    'handled',
    'handlers',
    'instance',
    'ops',
    'owner',
    'pc',
    'results',
    'stack',
    'strict',
  )

  def __init__(self, code: Code, env: Env | None, function=None):
    self.code = code
    self.ops = code.ops
    self.env = self.base_env = env
    self.function = function
    self.pc = 0
    self.stack = []
    self.handlers = []  # (instruction, values, exceptions, env) of a try
    self.handled = []  # exceptions whose handlers run
    self.results = {}  # values of returns that wait for a finally
    self.generator = self.instance = self.owner = None
    self.strict = code.strict


class NativeFrame:
  """A driven generator on the stack of calls."""

  __slots__ = ('iterator', 'stack', 'stream', 'strict')
  code = None

  def __init__(self, iterator: Iterator, strict: bool, stream=None):
    self.iterator = iterator
    self.strict = strict
    self.stream = stream
    self.stack = []


class DefaultDict(dict):
  """A dict with a function that makes missing values."""

  __slots__ = ('factory',)


class Counter(dict):
  """A dict of counts: a missing key counts 0."""

  __slots__ = ()


class OrderedDict(dict):
  """A dict whose keys can be moved; its order counts in ==."""

  __slots__ = ()


class Call:
  """Request of a driven function: the result of a call."""

  __slots__ = ('args', 'function', 'kwargs')

  def __init__(self, function, *args, **kwargs):
    self.function = function
    self.args = list(args)
    self.kwargs = kwargs


class Next:
  """Request of a driven function: the next item of an iterator, or STOP."""

  __slots__ = ('iterator', 'value')

  def __init__(self, iterator, value=None):
    self.iterator = iterator
    self.value = value  # sent to a generator


# --- classes

OBJECT = Class('object', None)
TYPE = Class('type', OBJECT)


def _host(name: str, host: type, base: Class = OBJECT) -> Class:
  return Class(name, base, host=host)


INT = _host('int', int)
LIST, DICT = _host('list', list), _host('dict', dict)
CLASS_OF = {
  int: INT,
  bool: _host('bool', bool, INT),
  float: _host('float', float),
  str: _host('str', str),
  list: LIST,
  tuple: _host('tuple', tuple),
  dict: DICT,
  set: _host('set', set),
  frozenset: _host('frozenset', frozenset),
  range: _host('range', range),
  slice: _host('slice', slice),
  collections.deque: _host('deque', collections.deque),
  DefaultDict: _host('defaultdict', DefaultDict, DICT),
  Counter: _host('Counter', Counter, DICT),
  OrderedDict: _host('OrderedDict', OrderedDict, DICT),
  type(None): Class('NoneType', OBJECT),
  Function: Class('function', OBJECT),
  Native: Class('builtin_function_or_method', OBJECT),
  Bound: Class('method', OBJECT),
  Wrapped: Class('property', OBJECT),
  Module: Class('module', OBJECT),
  Generator: Class('generator', OBJECT),
  Class: TYPE,
}
ITERATOR = Class('iterator', OBJECT)


def class_of(value) -> Class:
  kind = type(value)
  if kind is Instance:
    return value.cls
  if kind in CLASS_OF:
    return CLASS_OF[kind]
  return CLASS_OF.setdefault(kind, Class(kind.__name__, OBJECT))


def kind_of(value) -> str:
  """Name of a value's class, for messages."""
  return class_of(value).name


def name_of(function: Function) -> str:
  return function.attrs.get('__name__', function.code.name)


# exceptions of the language: {name: name of its base}
_BASES = {
  'BaseException': None,
  'Exception': 'BaseException',
  'SystemExit': 'BaseException',
  'KeyboardInterrupt': 'BaseException',
  'GeneratorExit': 'BaseException',
  'ArithmeticError': 'Exception',
  'FloatingPointError': 'ArithmeticError',
  'OverflowError': 'ArithmeticError',
  'ZeroDivisionError': 'ArithmeticError',
  'AssertionError': 'Exception',
  'AttributeError': 'Exception',
  'EOFError': 'Exception',
  'ImportError': 'Exception',
  'ModuleNotFoundError': 'ImportError',
  'LookupError': 'Exception',
  'IndexError': 'LookupError',
  'KeyError': 'LookupError',
  'MemoryError': 'Exception',
  'NameError': 'Exception',
  'UnboundLocalError': 'NameError',
  'OSError': 'Exception',
  'FileNotFoundError': 'OSError',
  'PermissionError': 'OSError',
  'TimeoutError': 'OSError',
  'RuntimeError': 'Exception',
  'NotImplementedError': 'RuntimeError',
  'RecursionError': 'RuntimeError',
  'StopIteration': 'Exception',
  'SyntaxError': 'Exception',
  'TypeError': 'Exception',
  'ValueError': 'Exception',
  'UnicodeError': 'ValueError',
  'Warning': 'Exception',
  'DeprecationWarning': 'Warning',
  'UserWarning': 'Warning',
}
EXCEPTIONS = {}
for _name, _base in _BASES.items():
  EXCEPTIONS[_name] = Class(_name, EXCEPTIONS.get(_base, OBJECT))
BASE_EXCEPTION = EXCEPTIONS['BaseException']


def make_error(name: str, *args) -> Instance:
  return Instance(EXCEPTIONS[name], {'args': args})


def is_exception(value) -> bool:
  return type(value) is Instance and value.cls.is_a(BASE_EXCEPTION)
