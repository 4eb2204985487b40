"""Methods of str that a program may call: STR[name]."""

from jaxrl_tok.rewards.programs import formats, keys, lookup, operators
from jaxrl_tok.rewards.programs.values import LanguageError, Native

# --- str: methods whose work is linear in the text
LINEAR = (
  'upper lower title capitalize swapcase casefold isalpha isdigit isdecimal '
  'isnumeric isalnum isspace isupper islower istitle isascii isidentifier '
  'isprintable strip lstrip rstrip startswith endswith find rfind index rindex '
  'count partition rpartition removeprefix removesuffix'
)
# methods whose work is the product of both lengths: a text's end is searched
# without what Python's search from its start knows
PRODUCT = frozenset(
  ('strip', 'lstrip', 'rstrip', 'rfind', 'rindex', 'rpartition', 'rsplit')
)


def search(vm, name: str, text: str, sought) -> None:
  """Counts the work of looking for a text, or one of a tuple, in another."""
  if type(sought) is tuple:
    vm.spend(len(sought) >> 2)
    length = sum(len(part) for part in sought if type(part) is str)
  else:
    length = len(sought) if type(sought) is str else 1
  if name in PRODUCT:
    vm.spend(len(text) * (length + 4) >> 10)
  else:
    vm.spend(len(text) * min(length + 8, 64) >> 12)
    vm.spend(length >> 8)


def _linear(name: str):
  method = getattr(str, name)

  def call(vm, text, /, *args):
    vm.make(3 * operators.size_of(text) if name not in _TESTS else 0)
    vm.spend(len(text) >> 7)
    if args:
      search(vm, name, text, args[0])
    return method(text, *args)

  return call


_TESTS = frozenset(
  name
  for name in LINEAR.split()
  if name.startswith('is') or name.endswith(('with', 'find', 'index', 'count'))
)


def _split(name: str):
  method = getattr(str, name)

  def call(vm, text, /, sep=None, maxsplit=-1):
    search(vm, name, text, sep)
    pieces = len(text) // 2 + 1 if sep is None else text.count(sep) + 1
    if type(maxsplit) is int and 0 <= maxsplit < pieces:
      pieces = maxsplit + 1
    vm.make(operators.size_of(text) + 64 * pieces)
    vm.spend(len(text) >> 6)
    return method(text, sep, maxsplit)

  return call


def splitlines(vm, text, /, keepends=False):
  vm.make(64 * len(text))
  return text.splitlines(bool(keepends))


def join(vm, separator, items, /):
  found = yield from vm.collect(items)
  return lookup.join(vm, separator, found)


def replace(vm, text, old, new, count=-1, /):
  if type(old) is not str or type(new) is not str:
    raise TypeError('replace() arguments must be str')
  search(vm, 'replace', text, old)
  found = text.count(old)
  if type(count) is int and count >= 0:
    found = min(found, count)
  vm.make(operators.size_of(text) + 4 * found * len(new) + 48)
  return text.replace(old, new, count)


def _padded(name: str):
  method = getattr(str, name)

  def call(vm, text, width, /, *args):
    if type(width) is int:
      vm.make(4 * max(width, len(text)) + 48)
    return method(text, width, *args)

  return call


def expandtabs(vm, text, /, tabsize=8):
  if type(tabsize) is int:
    vm.make(4 * (len(text) + text.count('\t') * max(tabsize, 0)))
  return text.expandtabs(tabsize)


def maketrans(vm, _, /, *args):
  size = sum(len(a) for a in args if type(a) in (str, dict))
  vm.make(100 * size)
  vm.spend(size >> 2)
  if len(args) == 1 and type(args[0]) is dict:
    keys.check_items(vm, args[0])
  return str.maketrans(*args)


def translate(vm, text, table, /):
  if not isinstance(table, dict):
    raise LanguageError('no translate() but by a dict in the subset')
  vm.spend(len(text) >> 2)
  found, widest = {}, 1
  for code in {ord(c) for c in set(text)}:
    vm.spend(1)
    keys.check_key(vm, code, len(table))
    if code in table:
      new = found[code] = table[code]
      widest = max(widest, len(new) if type(new) is str else 1)
  vm.make(4 * len(text) * widest + 48)
  return text.translate(found)


def format_(vm, text, /, *args, **keywords):
  return formats.format_text(vm, text, formats.Arguments(args, keywords))


def format_map(vm, text, table, /):
  return formats.format_text(vm, text, formats.Arguments((), table))


STR = {
  **{name: Native(name, _linear(name)) for name in LINEAR.split()},
  **{name: Native(name, _split(name)) for name in ('split', 'rsplit')},
  **{
    name: Native(name, _padded(name))
    for name in ('ljust', 'rjust', 'center', 'zfill')
  },
  'expandtabs': Native('expandtabs', expandtabs),
  'format': Native('format', format_),
  'format_map': Native('format_map', format_map),
  'join': Native('join', join, driven=True),
  'maketrans': Native('maketrans', maketrans),
  'replace': Native('replace', replace),
  'splitlines': Native('splitlines', splitlines),
  'translate': Native('translate', translate),
}
