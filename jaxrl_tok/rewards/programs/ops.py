"""Instructions: f(vm, frame, argument), which move values on the frame's stack.

True says that another frame may be on top now.
"""

from jaxrl_tok.rewards.programs import formats, keys, lookup, operators
from jaxrl_tok.rewards.programs.values import (
  Instance,
  LanguageError,
  kind_of,
)

# --- the stack


def const(vm, f, value):
  f.stack.append(value)


def pop(vm, f, _):
  f.stack.pop()


def dup(vm, f, _):
  f.stack.append(f.stack[-1])


def dup_two(vm, f, _):
  f.stack += f.stack[-2:]


def dup_under(vm, f, _):
  """a b -> b a b"""
  f.stack.insert(-2, f.stack[-1])


def swap(vm, f, _):
  s = f.stack
  s[-1], s[-2] = s[-2], s[-1]


def lift_two(vm, f, _):
  """a b c -> c a b"""
  f.stack.insert(-2, f.stack.pop())


def save_result(vm, f, slot):
  f.results[slot] = f.stack.pop()


def load_result(vm, f, slot):
  f.stack.append(f.results[slot])


# --- names


def load_local(vm, f, name):
  try:
    f.stack.append(f.env.names[name])
  except KeyError:
    raise _unbound(name) from None


def _unbound(name: str) -> UnboundLocalError:
  return UnboundLocalError(
    f"cannot access local variable '{name}' where it is not associated with "
    'a value'
  )


def load_outer(vm, f, argument):
  name, hops = argument
  env = f.env
  for _ in range(hops):
    env = env.parent
  try:
    f.stack.append(env.names[name])
  except KeyError:
    # a comprehension's frame is its function's
    if env is f.base_env:
      raise _unbound(name) from None
    raise NameError(
      f"cannot access free variable '{name}' where it is not associated with "
      'a value in enclosing scope'
    ) from None


def load_global(vm, f, name):
  if name in vm.globals:
    f.stack.append(vm.globals[name])
  else:
    load_builtin(vm, f, name)


def load_builtin(vm, f, name):
  if name in vm.builtins:
    f.stack.append(vm.builtins[name])
  elif name in vm.refused:
    raise LanguageError(f'no {name} in the subset')
  else:
    raise NameError(f"name '{name}' is not defined")


def load_class_name(vm, f, argument):
  name, hops = argument
  if name in f.env.names:
    f.stack.append(f.env.names[name])
  elif hops is None:
    load_global(vm, f, name)
  else:
    load_outer(vm, f, argument)


def store_local(vm, f, name):
  f.env.names[name] = f.stack.pop()


def store_outer(vm, f, argument):
  name, hops = argument
  env = f.env
  for _ in range(hops):
    env = env.parent
  env.names[name] = f.stack.pop()


def store_global(vm, f, name):
  vm.globals[name] = f.stack.pop()


def delete_name(vm, f, argument):
  name, hops = argument
  if hops is None:
    names, error = vm.globals, NameError(f"name '{name}' is not defined")
  else:
    env = f.env
    for _ in range(hops):
      env = env.parent
    names, error = env.names, _unbound(name)
  if name not in names:
    raise error
  del names[name]


# --- values


def build_list(vm, f, count):
  _build(vm, f, count, list)


def build_tuple(vm, f, count):
  _build(vm, f, count, tuple)


def build_set(vm, f, count):
  for item in f.stack[len(f.stack) - count :]:
    vm.check_key(item, count)
  _build(vm, f, count, set)


def _build(vm, f, count, kind):
  at = len(f.stack) - count
  vm.make(56 + 8 * count)
  items = kind(f.stack[at:])
  del f.stack[at:]
  f.stack.append(items)


def from_list(vm, f, operation):
  """A list on the stack, as what an operation builds of its items."""
  items = f.stack.pop()
  f.stack += items
  operation(vm, f, len(items))


def build_dict(vm, f, _):
  vm.make(64)
  f.stack.append({})


def build_string(vm, f, count):
  at = len(f.stack) - count
  parts = f.stack[at:]
  del f.stack[at:]
  f.stack.append(lookup.join(vm, '', parts))


def build_slice(vm, f, _):
  step, upper, lower = f.stack.pop(), f.stack.pop(), f.stack.pop()
  f.stack.append(slice(lower, upper, step))


def format_value(vm, f, argument):
  conversion, has_spec = argument
  spec = f.stack.pop() if has_spec else ''
  f.stack.append(formats.format_field(vm, f.stack.pop(), conversion, spec))


def append_item(vm, f, depth):
  item = f.stack.pop()
  vm.make(8)
  f.stack[-depth].append(item)


def add_item(vm, f, depth):
  item = f.stack.pop()
  lookup.add_to_set(vm, f.stack[-depth], item)


def add_pair(vm, f, depth):
  value = f.stack.pop()
  key = f.stack.pop()
  lookup.put(vm, f.stack[-depth], key, value)


def add_keyword(vm, f, depth):
  value = f.stack.pop()
  key = f.stack.pop()
  put_keyword(f.stack[-depth], key, value)


def put_keyword(keywords, key, value):
  if type(key) is not str:
    raise TypeError('keywords must be strings')
  if key.startswith('__') and key.endswith('__'):
    raise LanguageError(f'no {key[:40]} in the subset')
  if key in keywords:
    raise TypeError(f"got multiple values for keyword argument '{key[:40]}'")
  keywords[key] = value


def merge_dict(vm, f, depth):
  found = f.stack.pop()
  if not isinstance(found, dict):
    raise TypeError(f"'{kind_of(found)}' object is not a mapping")
  vm.make(100 * len(found))
  keys.check_items(vm, found)
  f.stack[-depth].update(found)


def merge_keywords(vm, f, depth):
  found = f.stack.pop()
  if not isinstance(found, dict):
    raise TypeError(
      f'argument after ** must be a mapping, not {kind_of(found)}'
    )
  vm.make(100 * len(found))
  vm.spend(len(found) >> 1)
  for key, value in found.items():
    put_keyword(f.stack[-depth], key, value)


def extend_list(vm, f, _):
  items = f.stack.pop()
  vm.make(8 * len(items))
  f.stack[-1].extend(items)


def take(vm, f, limit):
  """The items of an iterable as a list, at most limit of them."""
  return vm.take(f.stack.pop(), limit)


def unpack(vm, f, argument):
  before, after = argument
  items = f.stack.pop()
  count = len(items)
  if after is None:
    if count != before:
      many = count > before
      raise ValueError(
        f'too many values to unpack (expected {before})'
        if many
        else f'not enough values to unpack (expected {before}, got {count})'
      )
    f.stack += items[::-1]
    return
  if count < before + after:
    raise ValueError(
      f'not enough values to unpack (expected at least {before + after}, got '
      f'{count})'
    )
  last = count - after
  parts = [*items[:before], items[before:last], *items[last:]]
  f.stack += parts[::-1]


# --- operators


def binary(vm, f, name):
  right = f.stack.pop()
  f.stack[-1] = operators.BINARY[name](vm, f.stack[-1], right)


def inplace(vm, f, name):
  right, left = f.stack.pop(), f.stack.pop()
  return operators.inplace(vm, name, left, right)


def unary(vm, f, name):
  f.stack[-1] = operators.unary(vm, name, f.stack[-1])


def compare(vm, f, name):
  right, left = f.stack.pop(), f.stack.pop()
  if name == 'In' or name == 'NotIn':
    return lookup.contains(vm, left, right, name == 'NotIn')
  f.stack.append(operators.COMPARE[name](vm, left, right))
  return False


def subscript(vm, f, _):
  key, subject = f.stack.pop(), f.stack.pop()
  return lookup.subscript(vm, subject, key)


def store_subscript(vm, f, _):
  key, subject, value = f.stack.pop(), f.stack.pop(), f.stack.pop()
  lookup.store_subscript(vm, subject, key, value)


def delete_subscript(vm, f, _):
  key, subject = f.stack.pop(), f.stack.pop()
  lookup.delete_subscript(vm, subject, key)


def load_attr(vm, f, name):
  return vm.give_attribute(f.stack.pop(), name)


def store_attr(vm, f, name):
  subject, value = f.stack.pop(), f.stack.pop()
  vm.store_attribute(subject, name, value)


def delete_attr(vm, f, name):
  subject = f.stack.pop()
  if type(subject) is not Instance or name not in subject.attrs:
    raise AttributeError(f"no attribute '{name}'")
  del subject.attrs[name]
