"""Source text of functions, which tells whether a reward was changed."""

import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Iterator

SHOWN = 8  # members of a tuple
PLAIN = str, bytes, int, float, bool, types.NoneType


def source_of(function: Callable) -> str:
  """Source of a function and of those of its module that it calls, with the
  plain values (numbers, texts) that it reads from its module, its enclosing
  function or a partial.

  Texts are hashed, for one may be a key. Other objects are left out: they have
  no text that is the same twice.
  """
  seen, parts, left = set(), [], [function]
  while left:
    found = left.pop(0)
    while isinstance(found, functools.partial):
      given = dict(enumerate(found.args)) | found.keywords
      parts += _values(given)
      found = found.func
    found = getattr(found, '__func__', found)  # of a method
    found = inspect.unwrap(found) if callable(found) else found
    if not isinstance(found, types.FunctionType | type):
      parts += _values(getattr(found, '__dict__', {}))
      found = type(found)
    if id(found) in seen:
      continue
    seen.add(id(found))
    parts.append(_text(found))
    if isinstance(found, types.FunctionType):
      named = dict(_named(found))
      parts += _values(named)
      left += [x for x in named.values() if _is_near(x, found)]
  return '\n'.join(parts)


def _text(found) -> str:
  """Source of a function or class; a hash of its code where no file has it."""
  code = getattr(found, '__code__', None)
  name = found.__name__ if code is None else code.co_name
  try:
    text = inspect.getsource(found).rstrip()
    # Python 3.13 takes the text of `python -c` for what exec compiled
    if name.strip('<>') in text:
      return text
  except (OSError, TypeError):
    pass
  if code is None:
    return found.__qualname__
  said = hashlib.sha256(code.co_code + repr(code.co_names).encode())
  return f'{found.__qualname__}: code {said.hexdigest()[:16]}'


def _values(named: dict) -> list[str]:
  """Lines NAME = VALUE of the plain values."""
  return [
    f'# {name} = {_shown(value)}'
    for name, value in sorted(named.items(), key=lambda item: str(item[0]))
    if isinstance(value, PLAIN) or _is_plain_tuple(value)
  ]


def _is_plain_tuple(value) -> bool:
  return isinstance(value, tuple) and all(isinstance(x, PLAIN) for x in value)


def _shown(value) -> str:
  if isinstance(value, tuple) and len(value) <= SHOWN:
    return f'({", ".join(map(_shown, value))})'
  if isinstance(value, str | bytes | tuple):
    said = hashlib.sha256(repr(value).encode()).hexdigest()
    return f'{type(value).__name__} {said[:16]}'
  return repr(value)


def _named(function: types.FunctionType) -> Iterator[tuple]:
  """(name, value) that a function reads from around it."""
  cells = zip(function.__code__.co_freevars, function.__closure__ or ())
  for name, cell in cells:
    try:
      yield name, cell.cell_contents
    except ValueError:  # not set yet
      continue
  for name in sorted(_names_of(function.__code__)):
    if name in function.__globals__:
      yield name, function.__globals__[name]


def _names_of(code: types.CodeType) -> set[str]:
  """Global names in code, that of inner functions included."""
  inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
  return set(code.co_names).union(*map(_names_of, inner))


def _is_near(x, function) -> bool:
  """Tells whether x is a function or class of the function's own module."""
  kinds = types.FunctionType | type | functools.partial
  if not isinstance(x, kinds):
    return False
  owner = x.func if isinstance(x, functools.partial) else x
  return getattr(owner, '__module__', None) == function.__module__
