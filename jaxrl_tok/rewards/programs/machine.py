"""The interpreter: frames on a stack of its own, and what they cost.

Calls of the program nest in `frames`, not in Python's stack, so that neither
recursion nor generators of a program use the host's. Special methods that
Python's own types call (a key's ==) nest in it, 40 deep at most.
"""

import collections
from collections.abc import Callable

from jaxrl_tok.rewards.programs import compare
from jaxrl_tok.rewards.programs.values import (
  BASE_EXCEPTION,
  CLASS_OF,
  EXCEPTIONS,
  OBJECT,
  STOP,
  Bound,
  Budget,
  BudgetError,
  Call,
  Class,
  Code,
  Env,
  Function,
  Generator,
  Instance,
  LanguageError,
  Module,
  Native,
  NativeFrame,
  Next,
  Raised,
  Stream,
  Super,
  Wrapped,
  kind_of,
  make_error,
)

NESTED = 40  # special methods inside each other
# types whose iterators may be made of Python's own
ITERABLE = (
  *(list, tuple, str, dict, set, frozenset, range, collections.deque),
  *(type({}.keys()), type({}.values()), type({}.items())),
)
_EMPTY = ([], (), '', 'é', {}, set(), range(0), range(2**70), {}.keys())
HOST_ITERATORS = frozenset(
  type(iterator)
  for iterator in (
    *map(iter, _EMPTY),
    *map(iter, ({}.values(), {}.items(), collections.deque())),
    *map(reversed, ([], (), '', {}, range(0), range(2**70))),
    *map(reversed, ({}.keys(), {}.values(), {}.items())),
    reversed(collections.deque()),
    enumerate([]),
    zip(),
  )
)
# iterators that others may be made of: not of enumerate and zip, which would
# nest in Python's stack
FLAT = HOST_ITERATORS - {enumerate, zip}


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


class Machine:
  """One program: its names, its calls and what is left of its budget."""

  def __init__(
    self,
    budget: Budget,
    builtins: dict,
    methods: dict,
    modules: dict,
    module_code: Callable[[str], Code],
    refused: frozenset,
  ):
    self.budget = budget
    self.builtins = builtins
    self.methods = methods  # {type: {name: Native}}
    self.modules = dict(modules)
    self.module_code = module_code
    self.refused = refused  # names of Python that the subset has not
    self.host_iterators = HOST_ITERATORS
    self.globals = {}
    self.frames = []
    self.nested = 0
    self.printed = []
    # a test's: an object of the program's equals objects alone
    self.strict = False
    self.refill()

  def refill(self) -> None:
    """A whole budget again."""
    self.steps = self.budget.steps
    self.memory = self.budget.memory
    self.output = self.budget.output

  # --- budgets

  def spend(self, steps: int) -> None:
    self.steps -= steps
    if self.steps < 0:
      raise BudgetError(f'more than {self.budget.steps} steps')

  def make(self, size: int) -> None:
    """Counts bytes before they are made, and the time to fill them."""
    self.memory -= size
    if self.memory < 0:
      raise BudgetError(f'more than {self.budget.memory} bytes of memory')
    if size > 4096:
      self.spend(size >> 12)

  def write(self, text: str) -> None:
    self.output -= len(text)
    if self.output < 0:
      raise BudgetError(f'more than {self.budget.output} characters of output')
    self.printed.append(text)

  # --- the loop

  def run(self, code: Code) -> None:
    """Runs a module's code. Raises Raised, BudgetError, LanguageError."""
    self.frames.clear()
    self.nested = 0
    self.frames.append(Frame(Code('<host>'), None))
    self.frames.append(Frame(code, None))
    self.loop(1)

  def loop(self, base: int) -> None:
    """Runs until `base` frames are left."""
    frames = self.frames
    while len(frames) > base:
      frame = frames[-1]
      try:
        if frame.code is None:
          self.drive(frame)
          continue
        ops = frame.ops
        while True:
          operation, argument = ops[frame.pc]
          frame.pc += 1
          self.steps -= 1
          if self.steps < 0:
            self.spend(0)
          if operation(self, frame, argument):
            break
      except Exception as e:
        self.handle(e, base)

  def drive(self, frame: NativeFrame) -> None:
    """Runs a driven function until it asks for something or ends."""
    self.spend(1)
    stack, stream = frame.stack, frame.stream
    try:
      asked = frame.iterator.send(stack.pop() if stack else None)
    except StopIteration as e:
      self.frames.pop()
      if stream is not None:
        stream.running = False
      result = e.value if stream is None else STOP
      self.frames[-1].stack.append(result)
      return
    kind = type(asked)
    if kind is Call:
      self.enter(asked.function, asked.args, asked.kwargs)
    elif kind is Next:
      self.advance(asked.iterator, asked.value)
    else:
      stream.running = False
      self.frames.pop()
      self.frames[-1].stack.append(asked)

  def handle(self, error: Exception, base: int) -> None:
    """Unwinds to the handler of an exception, or raises it out of the loop."""
    value = self.as_value(error)
    frames = self.frames
    while len(frames) > base:
      frame = frames[-1]
      if frame.code is not None and frame.handlers:
        frame.pc, values, handled, frame.env = frame.handlers.pop()
        del frame.stack[values:], frame.handled[handled:]
        frame.stack.append(value)
        return
      frames.pop()
      self.abandon(frame)
      generator = frame.code is not None and frame.generator
      if generator:
        generator.frame, generator.running = None, False
        if value.cls.is_a(EXCEPTIONS['StopIteration']):
          value = make_error('RuntimeError', 'generator raised StopIteration')
    raise Raised(value)

  def abandon(self, frame) -> None:
    """Ends a driven function that an exception passes through."""
    if frame.code is None:
      if frame.stream is not None:
        frame.stream.running = False
      frame.iterator.close()

  def as_value(self, error: Exception) -> Instance:
    """The program's exception of one of Python's; other errors go on."""
    if isinstance(error, Raised):
      return error.value
    if isinstance(error, BudgetError | LanguageError):
      raise error
    if isinstance(error, RecursionError | MemoryError):
      raise BudgetError('values nested too deep') from None
    for kind in type(error).__mro__:
      if kind.__name__ in EXCEPTIONS:
        return make_error(kind.__name__, *error.args)
    raise error

  # --- calls

  def load_module(self, name: str) -> dict:
    """Names of a module that is written in the language."""
    return self.call(Function(self.module_code(name), None, (), {}, None), [])

  def call(self, function, args: list, keywords: dict | None = None):
    """A call's result, by a loop inside the loop."""
    if self.nested >= NESTED:
      raise BudgetError(f'special methods nested deeper than {NESTED}')
    frames, base = self.frames, len(self.frames)
    sink = Frame(Code('<host>'), None)
    frames.append(sink)
    self.nested += 1
    try:
      self.enter(function, args, keywords or {})
      self.loop(base + 1)
      return sink.stack.pop()
    finally:
      del frames[base:]
      self.nested -= 1

  def push(self, frame) -> None:
    if len(self.frames) > self.budget.depth:
      raise BudgetError(f'calls nested deeper than {self.budget.depth}')
    self.frames.append(frame)

  def push_native(self, iterator, stream: Stream | None = None) -> bool:
    self.push(stream.frame if stream else NativeFrame(iterator))
    return True

  def enter(self, function, args: list, keywords: dict) -> bool:
    """Begins a call, whose result goes on the stack of the frame on top."""
    kind = type(function)
    while kind is Bound:
      args = [function.subject, *args]
      function = function.function
      kind = type(function)
    if kind is Function:
      return self.enter_function(function, args, keywords)
    if kind is Native:
      result = function.function(self, *args, **keywords)
      if function.driven:
        return self.push_native(result)
      self.frames[-1].stack.append(result)
      return False
    if kind is Class:
      return self.enter_class(function, args, keywords)
    method = self.special(function, '__call__')
    if method is not None:
      return self.enter(method, args, keywords)
    raise TypeError(f"'{kind_of(function)}' object is not callable")

  def enter_function(self, function, args, keywords, instance=None) -> bool:
    code = function.code
    names = self.bind(function, args, keywords)
    self.make(200)
    frame = Frame(code, Env(names, function.env), function)
    if code.is_generator:
      frame.generator = Generator(frame)
      self.frames[-1].stack.append(frame.generator)
      return False
    frame.instance = instance
    self.push(frame)
    return True

  def bind(self, function: Function, args: list, keywords: dict) -> dict:
    """{parameter: value} of a call."""
    code = function.code
    positional, count = code.positional, len(args)
    names = dict(zip(positional, args))
    if count > len(positional) and code.varargs is None:
      raise TypeError(
        f'{code.name}() takes {len(positional)} positional arguments but '
        f'{count} were given'
      )
    if code.varargs is not None:
      self.make(8 * count)
      names[code.varargs] = tuple(args[len(positional) :])
    extra = {}
    by_name = positional[code.positional_only :] + code.keyword_only
    for name, value in keywords.items():
      if name not in by_name:
        extra[name] = value
      elif name in names:
        raise TypeError(
          f"{code.name}() got multiple values for argument '{name}'"
        )
      else:
        names[name] = value
    if code.kwargs is not None:
      names[code.kwargs] = extra
    elif extra:
      name = next(iter(extra))
      raise TypeError(
        f"{code.name}() got an unexpected keyword argument '{name}'"
      )
    self.fill_defaults(function, names)
    return names

  def fill_defaults(self, function: Function, names: dict) -> None:
    code, defaults = function.code, function.defaults
    first = len(code.positional) - len(defaults)
    for i, name in enumerate(code.positional):
      if name not in names:
        if i < first:
          raise TypeError(
            f"{code.name}() missing a required positional argument: '{name}'"
          )
        names[name] = defaults[i - first]
    for name in code.keyword_only:
      if name not in names:
        if name not in function.keyword_defaults:
          raise TypeError(
            f"{code.name}() missing a required keyword-only argument: '{name}'"
          )
        names[name] = function.keyword_defaults[name]

  # --- iterators

  def iterate(self, value):
    """iter(value)"""
    kind = type(value)
    if kind in ITERABLE or isinstance(value, dict):
      return iter(value)
    if kind in HOST_ITERATORS or kind is Generator or kind is Stream:
      return value
    method = self.special(value, '__iter__')
    if method is not None:
      return self.call(method, [])
    if self.special(value, '__next__') is not None:
      return value
    raise TypeError(f"'{kind_of(value)}' object is not iterable")

  def advance(self, iterator, value=None) -> None:
    """Begins next(iterator): an item, or STOP, goes on the stack on top."""
    kind = type(iterator)
    if kind in HOST_ITERATORS:
      self.frames[-1].stack.append(next(iterator, STOP))
    elif kind is Generator:
      self.resume(iterator, value)
    elif kind is Stream:
      if iterator.running:
        raise ValueError('generator already executing')
      self.push_native(None, iterator)
      iterator.running = True
    else:
      method = self.special(iterator, '__next__')
      if method is None:
        raise TypeError(f"'{kind_of(iterator)}' object is not an iterator")
      try:
        item = self.call(method, [])
      except Raised as e:
        if not e.value.cls.is_a(EXCEPTIONS['StopIteration']):
          raise
        item = STOP
      self.frames[-1].stack.append(item)

  def resume(self, generator: Generator, value) -> None:
    if generator.running:
      raise ValueError('generator already executing')
    if generator.frame is None:
      generator.result = None
      self.frames[-1].stack.append(STOP)
      return
    self.push(generator.frame)
    if generator.started:
      generator.frame.stack.append(value)
    elif value is not None:
      self.frames.pop()
      raise TypeError("can't send non-None value to a just-started generator")
    generator.started = generator.running = True

  def take(self, value, limit: int | None) -> bool:
    """Puts the items of an iterable, at most limit, on the stack as a list."""
    if type(value) in ITERABLE or isinstance(value, dict):
      if limit is None:
        items = self.items_of(value)
      else:
        items = [item for _, item in zip(range(limit), value)]
      self.frames[-1].stack.append(items)
      return False
    return self.push_native(self.collect(value, limit))

  def items_of(self, value) -> list:
    """Items of one of Python's own iterables as a new list."""
    size = value.stop if type(value) is range else 0
    try:
      size = len(value)
    except OverflowError:
      raise BudgetError(f'a list of {size} items') from None
    self.make(56 + size * (40 if type(value) in (range, str) else 8))
    self.spend(size >> 5)
    return list(value)

  def collect(self, value, limit: int | None = None):
    """Driven: the items of any iterable as a new list."""
    if type(value) in ITERABLE or isinstance(value, dict):
      return self.items_of(value)
    iterator, items = self.iterate(value), []
    while limit is None or len(items) < limit:
      item = yield Next(iterator)
      if item is STOP:
        break
      self.make(40)
      items.append(item)
    return items

  # --- classes and attributes

  def special(self, value, name: str):
    """A special method of an object of the program's classes, or None."""
    if type(value) is not Instance:
      return None
    method = value.cls.lookup(name)
    if type(method) is Function or type(method) is Native:
      return Bound(method, value)
    return None

  def enter_class(self, cls: Class, args: list, keywords: dict) -> bool:
    if cls.construct is not None:
      return self.enter(cls.construct, args, keywords)
    if cls.vm is None and not cls.is_a(BASE_EXCEPTION) and cls is not OBJECT:
      raise TypeError(f"cannot create '{cls.name}' instances")
    self.make(200)
    value = Instance(cls)
    if cls.is_a(BASE_EXCEPTION):
      value.attrs['args'] = tuple(args)
    method = cls.lookup('__init__')
    if method is not None:
      if type(method) is not Function or method.code.is_generator:
        raise LanguageError('__init__ must be a plain function')
      return self.enter_function(method, [value, *args], keywords, value)
    if keywords or (args and 'args' not in value.attrs):
      raise TypeError(f'{cls.name}() takes no arguments')
    self.frames[-1].stack.append(value)
    return False

  def push_class(self, code: Code, base, env: Env | None) -> None:
    if base is not None and (
      type(base) is not Class or base.host or base.construct
    ):
      raise LanguageError(
        'a class may be derived from exceptions and classes of the program only'
      )
    cls = Class(code.name, base or OBJECT)
    cls.vm = self
    frame = Frame(code, Env(cls.attrs, env))
    frame.owner = frame.instance = cls
    self.push(frame)

  def give_attribute(self, value, name: str) -> bool:
    """Puts an attribute on the stack; a property is called."""
    found = self.attribute(value, name)
    if type(found) is Wrapped:
      return self.enter(found.function, [value], {})
    self.frames[-1].stack.append(found)
    return False

  def attribute(self, value, name: str):
    """An attribute by the whitelists; a property as it is."""
    kind = type(value)
    if kind is Instance:
      found = value.cls.lookup(name)
      if type(found) is Wrapped and found.kind == 'property':
        return found
      if name in value.attrs:
        return value.attrs[name]
      if found is not None:
        return self.bound(found, value, value.cls)
      if value.cls.is_a(EXCEPTIONS['StopIteration']) and name == 'value':
        return (*value.attrs['args'], None)[0]
    elif kind is Class:
      return self.class_attribute(value, name)
    elif kind is Super:
      return self.super_attribute(value, name)
    elif kind is Module:
      if name in value.attrs:
        return value.attrs[name]
    elif name == '__name__' and kind in (Function, Native):
      return value.code.name if kind is Function else value.name
    elif kind is Function and name in value.attrs:
      return value.attrs[name]
    elif name in self.methods.get(kind, ()):
      return Bound(self.methods[kind][name], value)
    return self.no_attribute(value, name)

  def no_attribute(self, value, name: str):
    kind = type(value)
    if kind is Module or (kind in CLASS_OF and hasattr(kind, name)):
      raise LanguageError(f'no {kind_of(value)}.{name} in the subset')
    raise AttributeError(f"'{kind_of(value)}' object has no attribute '{name}'")

  def bound(self, found, value, cls: Class):
    """What an attribute of a class is for one of its objects."""
    if type(found) in (Function, Native):
      return Bound(found, value)
    if type(found) is Wrapped and found.kind == 'staticmethod':
      return found.function
    if type(found) is Wrapped and found.kind == 'classmethod':
      return Bound(found.function, cls)
    return found

  def class_attribute(self, cls: Class, name: str):
    if name == '__name__':
      return cls.name
    found = cls.lookup(name)
    if type(found) is Wrapped and found.kind != 'property':
      return self.bound(found, None, cls)
    if found is not None:
      return found
    if name in self.methods.get(cls.host, ()):
      return self.unbound(cls.host, self.methods[cls.host][name])
    raise self.missing_of_class(cls, name)

  def missing_of_class(self, cls: Class, name: str) -> Exception:
    if cls.host is not None and hasattr(cls.host, name):
      return LanguageError(f'no {cls.name}.{name} in the subset')
    return AttributeError(f"type object '{cls.name}' has no attribute '{name}'")

  def unbound(self, host: type, method: Native):
    """A method of one of Python's types, as str.upper, by its class."""
    if method.name in ('maketrans', 'fromkeys'):
      return Bound(method, None)

    def checked(vm, *args, **keywords):
      if not args or not isinstance(args[0], host):
        raise TypeError(
          f"descriptor '{method.name}' needs a '{host.__name__}' object"
        )
      return method.function(vm, *args, **keywords)

    return Native(method.name, checked, method.driven)

  def super_attribute(self, value: Super, name: str):
    base = value.cls.base
    found = base.lookup(name)
    if found is not None:
      if type(found) is Wrapped and found.kind == 'property':
        return self.call(found.function, [value.subject])
      return self.bound(found, value.subject, value.cls)
    if name == '__init__':
      return Native('__init__', lambda vm, *args: self.init(value, args))
    raise AttributeError(f"'super' object has no attribute '{name}'")

  def init(self, value: Super, args: tuple) -> None:
    subject = value.subject
    if value.cls.is_a(BASE_EXCEPTION):
      subject.attrs['args'] = args
    elif args:
      raise TypeError('object.__init__() takes exactly one argument')

  def store_attribute(self, subject, name: str, value) -> None:
    kind = type(subject)
    if kind is Instance:
      found = subject.cls.lookup(name)
      if type(found) is Wrapped and found.kind == 'property':
        if found.setter is None:
          raise AttributeError(f"property '{name}' has no setter")
        self.call(found.setter, [subject, value])
        return
      subject.attrs[name] = value
    elif kind is Function or (kind is Class and subject.vm is self):
      subject.attrs[name] = value
    elif kind is Class:
      raise TypeError(f"cannot set '{name}' of immutable type '{subject.name}'")
    else:
      raise AttributeError(
        f"'{kind_of(subject)}' object has no attribute '{name}' to set"
      )
    self.make(100)

  # --- values (compare.py)

  def truth(self, value) -> bool:
    return bool(value) if type(value) is not Instance else self.truth_of(value)

  def truth_of(self, value: Instance) -> bool:
    for name in ('__bool__', '__len__'):
      method = self.special(value, name)
      if method is not None:
        found = self.call(method, [])
        if type(found) not in (bool, int):
          raise TypeError(f'{name} should return bool or int')
        return bool(found)
    return True

  def equal(self, a, b) -> bool:
    return compare.equal(self, a, b)

  def hash_instance(self, value: Instance) -> int:
    return compare.hash_instance(self, value)

  def check_key(self, key, size: int) -> None:
    compare.check_key(self, key, size)
