"""Flags: settings on the command line, checked before jax is imported.

tyro turns the groups of Settings, and the parameters of a task's function, into
flags (--learning-rate and --learning_rate both work). Every fault is one line:
the fact and the cure.
"""

import contextlib
import dataclasses
import functools
import inspect
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import (
  Annotated,
  Any,
  NamedTuple,
  get_args,
  get_origin,
  get_type_hints,
)

import docstring_parser
import tyro

from jaxrl_tok.report.files import redact
from jaxrl_tok.run.checks import (
  algorithm_defaults,
  check,
  check_kinds,
  kind_in_words,
)
from jaxrl_tok.run.settings import (
  Settings,
  check_names,
  flatten,
  suggest,
  with_values,
)


class Parsed(NamedTuple):
  """A command line, read and checked."""

  settings: Settings
  own: dict  # arguments of the task's function
  typed: frozenset  # names of the flags that argv gives


def show_fault(message) -> None:
  """Prints one line on stderr, an error's notes included."""
  notes = getattr(message, '__notes__', ())
  lines = [str(message), *(n for n in notes if '\n' not in n)]  # not jax's
  print(redact(f'error: {"; ".join(lines)}'), file=sys.stderr)


def fail(message) -> None:
  """Prints one line on stderr, and exits with status 2."""
  show_fault(message)
  raise SystemExit(2)


# --- from a function's parameters to flags -----------------------------------


def own_flags(function: Callable) -> tuple[list, list[str]]:
  """Turns a function's parameters into flags: (dataclass fields of those that
  are flags of its own, names of those that are settings and get their value).

  A parameter's type and default are the flag's; its line under Args in the
  docstring is the flag's help. A list or tuple is a flag that is repeated.
  """
  known = flatten(Settings()).keys()
  hints = get_type_hints(function)
  text = docstring_parser.parse(inspect.getdoc(function) or '')
  helps = {p.arg_name: p.description for p in text.params}
  fields, shared = [], []
  for p in inspect.signature(function).parameters.values():
    if p.name in known:
      shared.append(p.name)
      continue
    if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
      raise ValueError(
        f'{function.__name__} takes *{p.name}; name each of its flags'
      )
    kind = hints.get(p.name, str)
    if get_origin(kind) in (list, tuple):
      kind = tyro.conf.UseAppendAction[kind]
    words = ' '.join((helps.get(p.name) or '').split())
    flag = Annotated[kind, tyro.conf.arg(help=words)] if words else kind
    default = dataclasses.MISSING if p.default is p.empty else p.default
    fields.append((p.name, flag, dataclasses.field(default=default)))
  return fields, shared


def unused_flags(settings: Settings, names) -> set[str]:
  """Names of flags among `names`; a group's name stands for all its flags."""
  found = set(names)
  for field in dataclasses.fields(settings):
    if field.name in found:
      found |= flatten(getattr(settings, field.name)).keys()
  return found


def hide(settings: Settings, names) -> Settings:
  """Hides settings of these names from the command line."""

  def hidden(group):
    fields = [
      (
        f.name,
        tyro.conf.Suppress[tyro.conf.Fixed[f.type]],
        dataclasses.field(default=getattr(group, f.name)),
      )
      for f in dataclasses.fields(group)
      if f.name in names
    ]
    if not fields:
      return group
    own = type(group)
    kind = dataclasses.make_dataclass(
      own.__name__, fields, bases=(own,), frozen=True
    )
    kind.__doc__ = own.__doc__
    return kind(**vars(group))

  groups = {
    field.name: hidden(getattr(settings, field.name))
    for field in dataclasses.fields(settings)
  }
  return dataclasses.replace(settings, **groups)


def _with_own(settings: Settings, fields: list):
  """Returns (type, default) of all flags: a task's own, then the groups."""
  groups = [
    (f.name, type(group), dataclasses.field(default=group))
    for f in dataclasses.fields(settings)
    for group in [getattr(settings, f.name)]
  ]
  needed = any(f[2].default is dataclasses.MISSING for f in fields)
  if fields:
    group = dataclasses.make_dataclass('TaskFlags', fields, frozen=True)
    group.__doc__ = 'The task.'
    first = 'task', group
    if not needed:
      first = *first, dataclasses.field(default=group())
    groups = [first, *groups]
  kind = dataclasses.make_dataclass('Flags', groups, frozen=True)
  return kind, None if needed else kind()


# --- reading -----------------------------------------------------------------


def names_typed(argv: list[str]) -> list[str]:
  """Names of the flags in argv, as settings spell them."""
  found = (re.match(r'--([^=]+)', word) for word in argv)
  return [m[1].replace('-', '_') for m in found if m]


def check_spelling(known, argv: list[str]) -> None:
  """Refuses a misspelt flag in one line, where tyro would draw a box."""
  names = {*known, 'help'}
  names |= {f'no_{name}' for name in names}
  for word in argv:
    for name in names_typed([word]):
      if name not in names:
        cure = suggest(name, known)
        cure = re.sub(r'(mean|called) (\w+)', r'\1 --\2', cure)
        fail(f'unknown flag {word.split("=")[0]}; {cure}')


def check_given_once(settings: Settings, argv: list[str]) -> None:
  """Refuses a flag of several texts that is repeated: the last would win."""
  lists = {k for k, v in flatten(settings).items() if isinstance(v, tuple)}
  names = names_typed(argv)
  for name in sorted(lists & {n for n in names if names.count(n) > 1}):
    fail(f'--{name} is given twice; write all its texts after one --{name}')


def _names(kind) -> set[str]:
  """Names of a dataclass' flags, those of its groups included."""
  names = set()
  for field in dataclasses.fields(kind):
    inner = field.type
    if dataclasses.is_dataclass(inner):
      names |= _names(inner)
    elif tyro.conf.Suppress not in get_args(inner):
      names.add(field.name)
  return names


def _kinds(kind) -> dict:
  """Types {name: type} of a dataclass' flags, those of its groups included."""
  found = {}
  for name, inner in get_type_hints(kind).items():
    found |= _kinds(inner) if dataclasses.is_dataclass(inner) else {name: inner}
  return found


# tyro's sentences on a value that a flag cannot have: the value, the flag
WRONG_VALUE = (
  r"invalid choice '(?P<value>.*?)' for argument '--(?P<name>[\w-]+)'",
  r'Error parsing --(?P<name>[\w-]+): no type matching .* instantiated from '
  r"\['(?P<value>.*?)'\]",
)


def _say_choices(words: str, kind) -> str:
  """Tyro's words; of a value that is none of several, those in their order."""
  for pattern in WRONG_VALUE:
    m = re.search(pattern, words)
    name = m['name'].replace('-', '_') if m else None
    if name in (kinds := _kinds(kind)):
      return f'--{name} {m["value"]!r} must be {kind_in_words(kinds[name])}'
  return words


def cli(kind, default, prog: str, argv: list[str], description: str | None):
  """Reads argv with tyro, its faults in one line."""
  check_spelling(_names(kind), argv)
  read = functools.partial(
    tyro.cli,
    kind,
    args=argv,
    default=default,
    description=description,
    prog=prog,
    use_underscores=True,
    config=(tyro.conf.OmitArgPrefixes,),
  )
  if any(word in ('-h', '--help') for word in argv):
    return read()
  output = io.StringIO()
  try:
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
      return read()
  except SystemExit:
    # tyro draws a box of several lines; the fact in it is the second sentence
    words = re.sub(r'[\u2500-\u257f]+|-{5,}', ' ', output.getvalue())
    words = re.split(r'Argument helptext|For full helptext', words)[0]
    words = ' '.join(words.split()).rstrip('.')
    fail(f'{_say_choices(words, kind)}; --help lists the flags')


def parse(
  settings: Settings,
  function: Callable | None,
  prog: str,
  argv: list[str],
  description: str | None = None,
  unused: Sequence[str] = (),
) -> Parsed:
  """Parses argv into settings; a fault exits with one line.

  Args:
    settings: defaults.
    function: a function whose parameters are flags, too (see own_flags).
    prog: the command, for --help.
    unused: flags, or groups of them, that would have no effect: left out.
  """
  try:
    fields, shared = own_flags(function) if function else ([], [])
  except ValueError as e:
    fail(e)
  unused = unused_flags(settings, unused)
  for name in names_typed(argv):
    if name.removeprefix('no_') in unused:
      fail(
        f'--{name} has no effect here; leave it out (--help lists the flags)'
      )
  check_given_once(settings, argv)
  fields = [field for field in fields if field[0] not in unused]
  settings = hide(settings, unused)

  def read(settings: Settings):
    kind, default = _with_own(settings, fields)
    found = cli(kind, default, prog, argv, description)
    groups = [f.name for f in dataclasses.fields(settings)]
    values = {name: getattr(found, name) for name in groups}
    task = getattr(found, 'task', None)
    own = {name: getattr(task, name) for name, *_ in fields}
    return type(settings)(**values), own

  found, own = read(settings)
  try:
    changed = algorithm_defaults(found)
    changed |= without_kl(flatten(found), names_typed(argv))
    if changed:  # argv's values replace them
      found, own = read(with_values(settings, changed))
    check(found)
  except (ValueError, OSError) as e:
    fail(e)
  own |= {name: flatten(found)[name] for name in shared}
  return Parsed(found, own, frozenset(names_typed(argv)))


def without_kl(values: dict, typed: Sequence[str]) -> dict:
  """Changes of defaults where argv turns the KL off by one of its two flags,
  --kl none or --beta 0, beside a default of the other."""
  if 'kl' in typed and values['kl'] == 'none' and 'beta' not in typed:
    return {'beta': 0.0}
  if 'beta' in typed and values['beta'] == 0 and 'kl' not in typed:
    return {'kl': 'none'}
  return {}


def settings_of(values: dict[str, Any]) -> Settings:
  """Settings of a library call: `values` over the defaults. Raises ValueError
  for a name that is no setting and for values that cannot be."""
  check_names(values, flatten(Settings()).keys())
  first = with_values(Settings(), values)
  check_kinds(first)
  found = with_values(Settings(), algorithm_defaults(first) | values)
  check(found)
  return found
