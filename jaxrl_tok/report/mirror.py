"""Runs in a bucket: gs://BUCKET/RUN as a directory of this machine.

A bucket neither appends to a file nor renames a directory. The files of a run
are therefore written to a local directory, as any run's, and copied whole:

  local   at the beginning: makes the directory, copies what a resumed run reads
  push    once a minute, before each checkpoint, and at the end: copies what has
          changed, deletes what is gone

Metrics are in the bucket before the checkpoint that they lead to, so that a run
killed at any moment loses no row. Checkpoints are written to the bucket itself,
by Orbax. Nothing here changes a run in a local directory.
"""

import atexit
import contextlib
import dataclasses
import importlib.util
import shutil
import tempfile
import time
from pathlib import Path

EVERY = 60.0  # seconds between copies while a run goes on
# directories that no resumed run reads: written anew as a whole, and others
REPLACED = ('export', 'adapter')
NOT_READ = (*REPLACED, 'tb', 'checkpoints')
# files that make a directory one that can be opened: the last to be copied
LAST = ('config.json', 'adapter_config.json', 'report.html')


@dataclasses.dataclass
class Mirror:
  """A run's directory in a bucket and its local one.

  Attributes:
    address: gs://BUCKET/RUN.
    local: the local directory.
    copied: files that are in the bucket, {name: (bytes, time of change), or
      None where the local one is not known to be equal}.
    pushed: time of the last copy.
  """

  address: str
  local: Path
  copied: dict = dataclasses.field(default_factory=dict)
  pushed: float = dataclasses.field(default_factory=time.monotonic)


_mirrors: dict[Path, Mirror] = {}  # by the local directory


def is_address(path: str | Path | None) -> bool:
  """Tells whether a path is an address, SCHEME://..."""
  return '://' in str(path or '')


def check_address(path: str | Path | None, flag: str = '--output_dir') -> None:
  """Refuses, in one line, an address that cannot be a run's directory."""
  if not is_address(path):
    return
  scheme, _, rest = str(path).partition('://')
  if scheme != 'gs' or not rest.strip('/'):
    raise ValueError(f'{flag} {path} must be a directory or gs://BUCKET/RUN')
  if importlib.util.find_spec('gcsfs') is None:
    raise ValueError(
      f"{flag} {path} needs gcsfs; pip install 'jaxrl_tok[gcs]', or give a "
      'local directory'
    )


def check_local(path: str | Path, flag: str) -> None:
  """Refuses an address where only a local directory can be."""
  if is_address(path):
    raise ValueError(f'{flag} {path} must be a local directory')


def _filesystem():
  import fsspec

  return fsspec.filesystem('gs')


@contextlib.contextmanager
def _one_line(address: str, what: str):
  """Turns the many errors of a network into an OSError of one line."""
  try:
    yield
  except Exception as e:
    said = ' '.join(str(e).split())[:200] or type(e).__name__
    raise OSError(
      f'{address} cannot be {what} ({said}); is there such a bucket, and may '
      'you use it?'
    ) from None


def local(path: str | Path) -> Path:
  """Local directory of a run; a path that is no address is its own.

  The first time, what a resumed run reads is copied from the bucket; a
  directory that it does not read is empty here.
  """
  if not is_address(path):
    return Path(path)
  address = str(path).rstrip('/')
  for mirror in _mirrors.values():
    if mirror.address == address:
      return mirror.local
  place = Path(tempfile.mkdtemp(prefix='jaxrl_tok-run-'))
  mirror = Mirror(address, place)
  with _one_line(address, 'read'):
    files, root = _filesystem(), address.partition('://')[2]
    files.invalidate_cache()
    for found in files.find(root):
      name = found[len(root) + 1 :]
      if not name or name.endswith('/'):  # a folder of the console
        continue
      mirror.copied[name] = None
      target = place / name
      if name.partition('/')[0] in NOT_READ:
        (place / name.partition('/')[0]).mkdir(exist_ok=True)
        continue
      target.parent.mkdir(parents=True, exist_ok=True)
      files.get_file(found, str(target))
      mirror.copied[name] = _version(target)
  _mirrors[place] = mirror
  atexit.register(_forget, mirror)
  return place


def _forget(mirror: Mirror) -> None:
  """Deletes the local directory, unless it has what the bucket has not."""
  if all(mirror.copied.get(n) == _version(f) for n, f in _files(mirror)):
    shutil.rmtree(mirror.local, ignore_errors=True)


def _mirror_of(path: Path) -> Mirror | None:
  for place in (path, *path.parents) if _mirrors else ():
    if place in _mirrors:
      return _mirrors[place]
  return None


def name_of(path: str | Path) -> str:
  """Name of a file or directory for a user: its address in the bucket, or
  else the path as it is."""
  mirror = _mirror_of(Path(path))
  if mirror is None:
    return str(path)
  rest = Path(path).relative_to(mirror.local).as_posix()
  return mirror.address if rest == '.' else f'{mirror.address}/{rest}'


def _version(file: Path) -> tuple[int, int]:
  found = file.stat()
  return found.st_size, found.st_mtime_ns


def _files(mirror: Mirror) -> list[tuple[str, Path]]:
  """Whole files (name, path): not those that are being written."""
  found = []
  for file in mirror.local.rglob('*'):
    parts = file.relative_to(mirror.local).parts
    partial = any(p.startswith('.') or p.endswith('.partial') for p in parts)
    if file.is_file() and not partial:
      found.append(('/'.join(parts), file))
  return sorted(found, key=lambda x: (x[1].name in LAST, x[0]))


def push(path: str | Path, every: float = 0.0) -> None:
  """Copies the files of a run that have changed to its bucket, and deletes
  those that are gone; nothing for a local run.

  every: does nothing until so many seconds after the last copy.

  Raises OSError, in one line, where the bucket cannot be written.
  """
  mirror = _mirror_of(Path(path))
  if mirror is None or time.monotonic() - mirror.pushed < every:
    return
  mirror.pushed = time.monotonic()
  here = _files(mirror)
  with _one_line(mirror.address, 'written'):
    files, root = _filesystem(), mirror.address.partition('://')[2]
    for name, file in here:
      version = _version(file)
      if mirror.copied.get(name) != version:
        files.put_file(str(file), f'{root}/{name}')
        mirror.copied[name] = version
    for name in sorted(mirror.copied.keys() - {name for name, _ in here}):
      top = name.partition('/')[0]
      written = any(other.startswith(f'{top}/') for other, _ in here)
      if top not in NOT_READ or (top in REPLACED and written):
        files.rm_file(f'{root}/{name}')
        del mirror.copied[name]


def probe(path: str | Path) -> None:
  """Refuses, in one line, a bucket that cannot be written."""
  mirror = _mirror_of(Path(path))
  if mirror is not None:
    with _one_line(mirror.address, 'written'):
      files, name = _filesystem(), f'{mirror.address}/.writable'
      files.pipe_file(name, b'')
      with contextlib.suppress(FileNotFoundError):  # another process did
        files.rm_file(name)


def checkpoints(run_dir: str | Path):
  """Directory of a run's checkpoints, which Orbax reads and writes: a Path, or
  one in the bucket."""
  mirror = _mirror_of(Path(run_dir))
  if mirror is None:
    return Path(run_dir).absolute() / 'checkpoints'
  from etils import epath

  return epath.Path(mirror.address) / 'checkpoints'
