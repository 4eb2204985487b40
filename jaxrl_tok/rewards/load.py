"""Reward functions of a user's own file, by the words of a command line:

--reward my_rewards.py:rhyme --reward my_rewards.py:short=0.2
"""

import difflib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from jaxrl_tok.rewards.functions import (
  RewardError,
  check_callable,
  check_weight,
  free_name,
  shorten,
)


def load_rewards(words: Iterable[str]) -> dict[str, tuple[Callable, float]]:
  """{name: (function, weight)}, as Task takes them, of FILE:NAME=WEIGHT each;
  functions of one name become name, name_2, and so on."""
  found = {}
  for word in words:
    name, function, weight = load_reward(word)
    found[free_name(name, found)] = function, weight
  return found


def load_reward(word: str) -> tuple[str, Callable, float]:
  """(name, function, weight) of 'FILE:NAME' or 'FILE:NAME=WEIGHT'. Raises
  RewardError where the file raises, else ValueError."""
  file, colon, rest = word.rpartition(':')
  name, equals, weight = (part.strip() for part in rest.partition('='))
  if not (colon and file and name):
    raise ValueError(
      f'--reward {word} names no function; pass FILE:NAME or FILE:NAME=WEIGHT, '
      'as my_rewards.py:rhyme=0.2'
    )
  weight = check_weight(weight, name) if equals else 1.0
  path = Path(file).expanduser()
  if not path.is_file():
    raise ValueError(
      f'--reward {word}: {file} is no file; give its path, from the current '
      'directory'
    )
  module = import_file(path.resolve())
  if not hasattr(module, name):
    raise ValueError(
      f'--reward {word}: {file} has no {name}; {_cure(module, name)}'
    )
  function = getattr(module, name)
  check_callable(function, f'--reward {word}')
  return name, function, weight


def _cure(module: ModuleType, name: str) -> str:
  """Names that a file does have."""
  has = [k for k, v in vars(module).items() if callable(v) and k[0] != '_']
  near = difflib.get_close_matches(name, has, 1, 0.5)
  if near:
    return f'did you mean {near[0]}?'
  return f'it has {", ".join(has)}' if has else 'it has no functions'


FILE_MODULE = 'reward_file_'  # and the file's name


def imported_files() -> list[str]:
  """Paths of the files that import_file has run."""
  modules = list(sys.modules.items())
  return [m.__file__ for name, m in modules if name.startswith(FILE_MODULE)]


@functools.cache
def import_file(path: Path) -> ModuleType:
  """The module of a file, run once; files beside it may be imported."""
  name = f'{FILE_MODULE}{path.stem}'
  spec = importlib.util.spec_from_file_location(name, path)
  if spec is None:
    raise ValueError(f'{path.name} is no Python file; its name must end in .py')
  module = importlib.util.module_from_spec(spec)
  if str(path.parent) not in sys.path:
    sys.path.append(str(path.parent))
  sys.modules[name] = module  # dataclasses look their module up
  try:
    spec.loader.exec_module(module)
  except (Exception, SystemExit) as e:
    del sys.modules[name]
    said = f'{type(e).__name__}: {shorten(e)}'.removesuffix(': ')
    cure = 'mend it'
    if isinstance(e, SystemExit):
      cure = "put what it runs under if __name__ == '__main__'"
    raise RewardError(f'{path.name} does not import ({said}); {cure}') from e
  return module
