"""Texts of values with format specs: f-strings, str.format, format and %.

Widths and precisions are bounded, and a spec reaches numbers and strings
only, so no attribute is read on the way.
"""

import re

from jaxrl_tok.rewards.programs import compare, keys
from jaxrl_tok.rewards.programs.values import (
  BudgetError,
  LanguageError,
  kind_of,
)

WIDEST = 10_000  # characters of a field's width or precision
SPEC = re.compile(
  r'(?:.?[<>=^])?[-+ ]?z?#?0?(\d*)[,_]?(?:\.(\d+))?[a-zA-Z%]?', re.DOTALL
)
PERCENT = re.compile(
  r'%(?:\((?P<name>[^()]*)\))?(?P<flags>[-+ #0]*)(?P<width>\*|\d*)'
  r'(?:\.(?P<precision>\*|\d*))?[hlL]?(?P<kind>.)?',
  re.DOTALL,
)


def format_field(vm, value, conversion: str, spec) -> str:
  """A replacement field: {value!conversion:spec}."""
  if conversion:
    value = (
      compare.to_str(vm, value)
      if conversion == 's'
      else compare.to_repr(vm, value)
    )
    if conversion == 'a':
      vm.make(10 * len(value))
      value = ascii(value)[1:-1].replace("\\'", "'")
  return format_value(vm, value, spec)


def format_value(vm, value, spec) -> str:
  """format(value, spec)"""
  if type(spec) is not str:
    raise TypeError(f'format() argument 2 must be str, not {kind_of(spec)}')
  if not spec:
    return compare.to_str(vm, value)
  if type(value) not in (int, float, str, bool):
    raise TypeError(
      f'unsupported format string passed to {kind_of(value)}.__format__'
    )
  sizes = re.findall(r'\d+', spec[:100])
  if len(spec) > 100 or any(len(n) > 5 or int(n) > WIDEST for n in sizes):
    raise BudgetError(f'a format of more than {WIDEST} characters')
  if not SPEC.fullmatch(spec):
    raise ValueError(f"Invalid format specifier '{spec}'")
  _count_number(vm, value, spec[-1] not in 'xXob')
  vm.make(4 * sum(map(int, sizes)) + 64)
  if type(value) is str:
    vm.make(4 * len(value))
  if spec[-1] == 'n':
    raise LanguageError('no format n in the subset')
  return format(value, spec)


def _count_number(vm, value, decimal: bool = True) -> None:
  if type(value) is int and not -keys.FAR < value < keys.FAR:
    if decimal:
      compare.check_digits(value)
    vm.spend(value.bit_length() ** 2 >> 18)
    vm.make(2 * value.bit_length())


# --- str.format


class Arguments:
  """Arguments of str.format: '{}' takes the next one."""

  def __init__(self, args: list, keywords: dict):
    self.args = args
    self.keywords = keywords
    self.numbered = None  # by the fields themselves, or in turn
    self.used = 0

  def get(self, name: str):
    """The argument of a field's name."""
    if '.' in name or '[' in name:
      raise LanguageError('no attributes or items in a format string')
    if name and not name.isdecimal():
      return self.keywords[name]
    if self.numbered is not None and self.numbered != bool(name):
      ways = ('automatic field numbering', 'manual field specification')
      raise ValueError(
        f'cannot switch from {ways[self.numbered]} to {ways[bool(name)]}'
      )
    self.numbered = bool(name)
    if not name:
      name, self.used = str(self.used), self.used + 1
    if len(name) > 6 or int(name) >= len(self.args):
      raise IndexError(
        f'Replacement index {name[:20]} out of range for positional args tuple'
      )
    return self.args[int(name)]


def format_text(vm, text: str, arguments: Arguments, nested: int = 0) -> str:
  """text.format(...), without attributes and items of fields."""
  parts, at = [], 0
  vm.spend(len(text) >> 3)
  vm.make(len(text))
  while at < len(text):
    vm.spend(1 + (len(text) >> 12))
    stop = min(
      (i for i in (text.find('{', at), text.find('}', at)) if i >= 0),
      default=len(text),
    )
    parts.append(text[at:stop])
    if stop == len(text):
      break
    if text[stop : stop + 2] in ('{{', '}}'):
      parts.append(text[stop])
      at = stop + 2
      continue
    if text[stop] == '}':
      raise ValueError("Single '}' encountered in format string")
    field, at = _field(text, stop + 1)
    name, conversion, spec = _split(field)
    value = arguments.get(name)
    if '{' in spec:
      if nested:
        raise ValueError('Max string recursion exceeded')
      spec = format_text(vm, spec, arguments, 1)
    parts.append(format_field(vm, value, conversion, spec))
    vm.spend(1)
  vm.make(sum(map(len, parts)) * 4)
  return ''.join(parts)


def _field(text: str, start: int) -> tuple[str, int]:
  """A field's text and the place after its }."""
  depth = 1
  for at in range(start, min(len(text), start + 1000)):
    depth += {'{': 1, '}': -1}.get(text[at], 0)
    if not depth:
      return text[start:at], at + 1
  raise ValueError("expected '}' before end of string")


def _split(field: str) -> tuple[str, str, str]:
  """(name, conversion, spec) of name!conversion:spec."""
  head, _, spec = field.partition(':')
  name, bang, conversion = head.partition('!')
  if bang and conversion not in ('s', 'r', 'a'):
    raise ValueError(f'Unknown conversion specifier {conversion[:1]!r}')
  return name, conversion, spec


# --- %


def percent(vm, text: str, values) -> str:
  """text % values"""
  args = values if type(values) is tuple else (values,)
  used, parts, at = 0, [], 0
  vm.spend(len(text) >> 3)

  def next_value():
    nonlocal used
    if used >= len(args):
      raise TypeError('not enough arguments for format string')
    used += 1
    return args[used - 1]

  for found in PERCENT.finditer(text):
    parts.append(text[at : found.start()])
    at = found.end()
    if found['kind'] == '%' and found[0] == '%%':
      parts.append('%')
      continue
    if found['kind'] is None:
      raise ValueError('incomplete format')
    sizes = [_size(found[part], next_value) for part in ('width', 'precision')]
    if found['name'] is not None:
      if not isinstance(values, dict):
        raise TypeError('format requires a mapping')
      value, used = values[found['name']], len(args)
    else:
      value = next_value()
    parts.append(_percent_field(vm, found, sizes, value))
  parts.append(text[at:])
  if used < len(args) and not isinstance(values, dict | list):
    raise TypeError('not all arguments converted during string formatting')
  vm.make(4 * sum(map(len, parts)))
  return ''.join(parts)


def _size(text: str | None, next_value) -> str:
  """Width or precision of a field, as text."""
  if text is None:
    return ''
  number = next_value() if text == '*' else (text or '0')
  if text == '*' and type(number) is not int:
    raise TypeError('* wants int')
  if len(str(number)) > 5 or int(number) > WIDEST:
    raise BudgetError(f'a format of more than {WIDEST} characters')
  return str(number)


def _percent_field(vm, found, sizes: list[str], value) -> str:
  kind = found['kind']
  if kind not in 'diouxXeEfFgGcrsa':
    raise ValueError(f'unsupported format character {kind!r}')
  if kind in 'rsa':
    value = format_field(vm, value, kind, '')
    kind = 's'
  elif kind == 'c':
    if type(value) not in (int, str):
      raise TypeError('%c requires int or char')
  elif type(value) not in (int, float, bool):
    raise TypeError(
      f'%{kind} format: a number is required, not {kind_of(value)}'
    )
  _count_number(vm, value, kind not in 'xXo')
  width, precision = sizes
  dot = '.' if found['precision'] is not None else ''
  spec = f'%{found["flags"][:20]}{width or ""}{dot}{precision}{kind}'
  vm.make(4 * (int(width or 0) + int(precision or 0)) + 64)
  return spec % (value,)
