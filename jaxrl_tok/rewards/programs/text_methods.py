"""Methods of str that a program may call: STR[name]."""

from jaxrl_tok.rewards.programs import formats, lookup, operators
from jaxrl_tok.rewards.programs.values import Native

# --- str: methods whose work and result are linear in the text
LINEAR = (
  'upper lower title capitalize swapcase casefold strip lstrip rstrip isalpha '
  'isdigit isdecimal isnumeric isalnum isspace isupper islower istitle '
  'isascii isidentifier isprintable startswith endswith find rfind index '
  'rindex count partition rpartition removeprefix removesuffix'
)


def _linear(name: str):
  method = getattr(str, name)

  def call(vm, text, /, *args):
    vm.make(3 * operators.size_of(text) if name not in _TESTS else 0)
    # a search's worst case is the product of both lengths
    sizes = [len(a) for a in args if type(a) is str]
    vm.spend(len(text) * min(sum(sizes) + 8, 64) >> 12)
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
  vm.spend(len(text) * min(len(old) + 8, 64) >> 12)
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
  vm.make(100 * sum(len(a) for a in args if hasattr(type(a), '__len__')))
  return str.maketrans(*args)


def translate(vm, text, table, /):
  if not isinstance(table, dict):
    raise TypeError('translate() takes a dict in the subset')
  widest = max((len(v) for v in table.values() if type(v) is str), default=1)
  vm.make(4 * len(text) * max(widest, 1) + 48)
  vm.spend(len(text) >> 3)
  return text.translate({k: table[k] for k in table})


def format_(vm, text, /, *args, **keywords):
  return formats.format_text(vm, text, list(args), keywords)


def format_map(vm, text, table, /):
  return formats.format_text(vm, text, [], table)


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
