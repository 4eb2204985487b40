"""The interpreter: frames on a stack of its own, and what they cost.

Calls of the program nest in `frames`, not in Python's stack, so that neither
recursion nor generators of a program use the host's. Special methods that
Python's own types call (a key's ==) nest in it, 40 deep at most.
"""

import collections
from collections.abc import Callable
from types import MappingProxyType

from jaxrl_tok.rewards.programs import keys
from jaxrl_tok.rewards.programs.objects import Objects
from jaxrl_tok.rewards.programs.values import (
  EXCEPTIONS,
  STOP,
  Bound,
  Budget,
  BudgetError,
  Call,
  Class,
  Code,
  Env,
  Frame,
  Function,
  Generator,
  Instance,
  LanguageError,
  Native,
  NativeFrame,
  Next,
  ObjectError,
  Raised,
  Stream,
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
    keys.watched(set(), []),
  )
)
# iterators that others may be made of: not of enumerate and zip, which would
# nest in Python's stack
FLAT = HOST_ITERATORS - {enumerate, zip}


class Machine(Objects):
  """One program: its names, its calls and what is left of its budget."""

  def __init__(
    self,
    budget: Budget,
    builtins: dict,
    methods: dict,
    modules: dict,
    module_code: Callable[[str], tuple[Code, list]],
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
    self.akin_classes = set()  # of tests, and names of the tested ones
    self.numbers = {}  # {id: (number, value)} of keys by identity
    self.odd_parts = False  # keys with parts that are no numbers were seen
    self.colliding = 0  # lookups of keys whose hashes may be others', too
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

  @property
  def strict(self) -> bool:
    """Whether a test's own code runs, or the host on its behalf."""
    return not self.frames or self.frames[-1].strict

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
    if isinstance(error, BudgetError | LanguageError | ObjectError):
      raise error
    if isinstance(error, RecursionError | MemoryError):
      raise BudgetError('values nested too deep') from None
    for kind in type(error).__mro__:
      if kind.__name__ in EXCEPTIONS:
        self.make(sum(len(a) for a in error.args if type(a) is str))
        return make_error(kind.__name__, *error.args)
    raise error

  # --- calls

  def load_module(self, name: str) -> dict:
    """Names of a module that is written in the language."""
    code, natives = self.module_code(name)
    names = self.call(Function(code, None, (), {}, None), natives)
    for value in names.values():
      if type(value) is Function:
        value.attrs = MappingProxyType(value.attrs)
    return names

  def call(self, function, args: list, keywords: dict | None = None):
    """A call's result, by a loop inside the loop."""
    if self.nested >= NESTED:
      raise BudgetError(f'special methods nested deeper than {NESTED}')
    frames, base = self.frames, len(self.frames)
    sink = Frame(Code('<host>', self.strict), None)
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
    self.push(stream.frame if stream else NativeFrame(iterator, self.strict))
    return True

  def enter(self, function, args: list, keywords: dict) -> bool:
    """Begins a call, whose result goes on the stack of the frame on top."""
    kind = type(function)
    while kind is Bound:
      self.spend(len(args) >> 3)
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
    if code.strict is None:
      frame.strict = self.frames[-1].strict
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
    count += len(positional) + len(code.keyword_only) + len(keywords)
    self.spend(count >> 3)
    for name, value in keywords.items():
      if name not in code.by_name:
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
    if kind is set or kind is frozenset:
      found = keys.in_order(self, value)
      return iter(value) if found is value else keys.watched(value, found)
    if kind in ITERABLE or isinstance(value, dict):
      return iter(value)
    if kind in HOST_ITERATORS or kind is Generator or kind is Stream:
      return value
    method = self.special(value, '__iter__')
    if method is not None:
      return self.call(method, [])
    method = self.special(value, '__getitem__', iterated=True)
    if method is not None:
      return Stream('iterator', self.by_index(method), self.strict)
    raise TypeError(f"'{kind_of(value)}' object is not iterable")

  def by_index(self, method):
    """Driven: items of an object by its __getitem__."""
    index = 0
    while True:
      self.spend(1)
      try:
        item = self.call(method, [index])
      except Raised as e:
        if not e.value.cls.is_a(EXCEPTIONS['IndexError']):
          raise
        return
      yield item
      index += 1

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
        items = [item for _, item in zip(range(limit), self.iterate(value))]
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
    if type(value) in (set, frozenset):
      value = keys.in_order(self, value)
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
