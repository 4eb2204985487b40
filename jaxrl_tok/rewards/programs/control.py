"""Instructions of jumps, calls and exceptions; see ops.py."""

from jaxrl_tok.rewards.programs.ops import put_keyword
from jaxrl_tok.rewards.programs.values import (
  BASE_EXCEPTION,
  EXCEPTIONS,
  STOP,
  Class,
  Env,
  Function,
  Generator,
  Instance,
  LanguageError,
  Module,
  Raised,
  Super,
  is_exception,
  kind_of,
  make_error,
)

# --- jumps


def jump(vm, f, at):
  f.pc = at


def jump_if_false(vm, f, at):
  if not vm.truth(f.stack.pop()):
    f.pc = at


def jump_if_true(vm, f, at):
  if vm.truth(f.stack.pop()):
    f.pc = at


def keep_if_false(vm, f, at):
  """Jumps with a false value, goes on without a true one."""
  if vm.truth(f.stack[-1]):
    f.stack.pop()
  else:
    f.pc = at


def keep_if_true(vm, f, at):
  if vm.truth(f.stack[-1]):
    f.pc = at
  else:
    f.stack.pop()


def get_iter(vm, f, _):
  f.stack[-1] = vm.iterate(f.stack[-1])


def next_item(vm, f, end):
  """Pushes the next item and skips check_stop, or leaves both to it."""
  iterator = f.stack[-1]
  if type(iterator) in vm.host_iterators:
    item = next(iterator, STOP)
    if item is STOP:
      f.stack.pop()
      f.pc = end
    else:
      f.stack.append(item)
      f.pc += 1
    return False
  vm.advance(iterator)
  return True


def check_stop(vm, f, end):
  if f.stack[-1] is STOP:
    del f.stack[-2:]
    f.pc = end


# --- calls


def call(vm, f, argument):
  count, names = argument
  stack = f.stack
  keywords = {}
  if names:
    at = len(stack) - len(names)
    for name, value in zip(names, stack[at:]):
      put_keyword(keywords, name, value)
    del stack[at:]
  at = len(stack) - count
  args = stack[at:]
  del stack[at:]
  return vm.enter(stack.pop(), args, keywords)


def call_spread(vm, f, _):
  keywords, args, function = f.stack.pop(), f.stack.pop(), f.stack.pop()
  return vm.enter(function, args, keywords)


def leave(vm, f, _):
  """Ends a frame with the value on its stack."""
  value = f.stack.pop()
  vm.frames.pop()
  generator = f.generator
  if generator is not None:
    generator.frame, generator.running = None, False
    generator.result = value
    value = STOP
  elif f.instance is not None:
    if value is not None and type(f.instance) is Instance:
      raise TypeError(f"__init__() should return None, not '{kind_of(value)}'")
    value = f.instance
  vm.frames[-1].stack.append(value)
  return True


def give(vm, f, _):
  """Yields the value on the stack."""
  value = f.stack.pop()
  f.generator.running = False
  vm.frames.pop()
  vm.frames[-1].stack.append(value)
  return True


def result_of(vm, f, _):
  iterator = f.stack[-1]
  f.stack[-1] = iterator.result if type(iterator) is Generator else None


def make_function(vm, f, argument):
  code, count, names = argument
  keyword = dict(zip(names, f.stack[len(f.stack) - len(names) :]))
  del f.stack[len(f.stack) - len(names) :]
  at = len(f.stack) - count
  defaults = tuple(f.stack[at:])
  del f.stack[at:]
  vm.make(200)
  f.stack.append(Function(code, f.env, defaults, keyword, f.owner))


def build_class(vm, f, argument):
  code, count = argument
  base = f.stack.pop() if count else None
  vm.push_class(code, base, f.env)
  return True


def load_super(vm, f, hops):
  env = f.env
  for _ in range(hops):
    env = env.parent
  function = f.function
  if function is None or function.owner is None or not function.code.positional:
    raise RuntimeError('super(): no arguments')
  subject = env.names.get(function.code.positional[0])
  f.stack.append(Super(function.owner, subject))


def import_module(vm, f, argument):
  name, item, line = argument
  module = vm.modules.get(name)
  if module is None:
    raise LanguageError(f'line {line}: no import of {name} in the subset')
  if module.attrs is None:
    module = vm.modules[name] = Module(name, vm.load_module(name))
  if item is None:
    f.stack.append(module)
  elif item in module.attrs:
    f.stack.append(module.attrs[item])
  else:
    raise LanguageError(f'line {line}: no {item} of {name} in the subset')


# --- environments and exceptions


def push_env(vm, f, _):
  vm.make(200)
  f.env = Env({}, f.env)


def pop_env(vm, f, _):
  f.env = f.env.parent


def setup(vm, f, handler):
  f.handlers.append((handler, len(f.stack), len(f.handled), f.env))


def pop_block(vm, f, _):
  f.handlers.pop()


def enter_handler(vm, f, _):
  f.handled.append(f.stack.pop())


def exit_handler(vm, f, _):
  f.handled.pop()


def load_handled(vm, f, _):
  f.stack.append(f.handled[-1])


def match_handler(vm, f, _):
  kinds, value = f.stack.pop(), f.handled[-1]
  kinds = kinds if type(kinds) is tuple else (kinds,)
  vm.spend(len(kinds) >> 1)
  for kind in kinds:
    if type(kind) is not Class or not kind.is_a(BASE_EXCEPTION):
      raise TypeError(
        'catching classes that do not inherit from BaseException is not allowed'
      )
  f.stack.append(any(value.cls.is_a(kind) for kind in kinds))


def raise_again(vm, f, _):
  vm.spend(len(vm.frames) >> 3)
  for frame in reversed(vm.frames):
    if frame.code is not None and frame.handled:
      raise Raised(frame.handled[-1])
  raise RuntimeError('No active exception to reraise')


def raise_value(vm, f, _):
  value = f.stack.pop()
  if type(value) is Class and value.is_a(BASE_EXCEPTION):
    value = vm.call(value, [])
  if not is_exception(value):
    raise TypeError('exceptions must derive from BaseException')
  raise Raised(value)


def fail_assert(vm, f, has_message):
  args = (f.stack.pop(),) if has_message else ()
  raise Raised(make_error(EXCEPTIONS['AssertionError'].name, *args))
