"""Classes, objects and attributes: half of a Machine."""

from jaxrl_tok.rewards.programs import compare, keys
from jaxrl_tok.rewards.programs.values import (
  BASE_EXCEPTION,
  CLASS_OF,
  EXCEPTIONS,
  OBJECT,
  Bound,
  BudgetError,
  Class,
  Code,
  Env,
  Frame,
  Function,
  Instance,
  LanguageError,
  Module,
  Native,
  ObjectError,
  Super,
  Wrapped,
  kind_of,
  name_of,
)

INHERITED = 50  # classes above a class
# special methods that a test may use: they are the program's functions
OPEN = frozenset(
  ('__init__', '__call__', '__getitem__', '__setitem__', '__delitem__')
)


class Objects:
  """Classes and attributes by the whitelists."""

  # --- classes and attributes

  def special(self, value, name: str, other=None, iterated: bool = False):
    """A special method of an object of the program's classes, or None.

    other: the other operand.
    iterated: __getitem__ stands for __iter__.

    Raises ObjectError where a test's own code would run it, but for a call or
    an item, or on a value that is akin: such a method, not the value that the
    test asks for, would decide the test.
    """
    if type(value) is not Instance:
      return None
    method = value.cls.lookup(name)
    if type(method) is not Function and type(method) is not Native:
      return None
    open_ = name in OPEN and not iterated
    if self.strict and not open_ and not self.akin(value, other):
      cls = value.cls.name
      raise ObjectError(
        f'the test uses {name} of an object of the class {cls}, which may pose '
        f'as another value; where {cls} is tested, name it in classes'
      )
    return Bound(method, value)

  def akin(self, value, other) -> bool:
    """Whether a test lets an object meet a value by its special methods: both
    are objects of the program, or its class is tested, or is the test's."""
    if type(value) is not Instance:
      return False
    cls = value.cls
    if cls in self.akin_classes or cls.name in self.akin_classes:
      return True
    return type(other) is Instance and other.cls.vm is not None

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
    if cls.depth > INHERITED:
      raise BudgetError(f'classes derived deeper than {INHERITED}')
    cls.vm = self
    frame = Frame(code, Env(cls.attrs, env))
    if code.strict:
      self.akin_classes.add(cls)
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
      return name_of(value) if kind is Function else value.name
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
    """Binds an attribute of a class to one of its objects."""
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
    elif kind is Function and type(subject.attrs) is not dict:
      raise AttributeError(
        f"function '{name_of(subject)}' of a module has no attribute to set"
      )
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
    return keys.hash_instance(self, value)

  def check_key(self, key, size: int) -> None:
    keys.check_key(self, key, size)
