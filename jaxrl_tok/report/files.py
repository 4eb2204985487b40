"""Files of a run: rows of JSON in and out, and writes that are never half-seen.

metrics.jsonl and samples.jsonl have an object with a "step" on every line. A
killed run leaves an unfinished last line; a file may hold anything else. Only
the rows that can be used are returned, the others are counted.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# names of variables whose values are written nowhere
SECRETS = re.compile('KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL', re.IGNORECASE)
SHORTEST = 8  # characters of such a value


def redact(text: str) -> str:
  """Text without the values of the environment's secrets: [NAME] stands for
  each. Paths are none."""
  for name, value in os.environ.items():
    is_path = value.startswith(os.sep)
    if len(value) >= SHORTEST and SECRETS.search(name) and not is_path:
      text = text.replace(value, f'[{name}]')
  return text


def number(value: object) -> float | None:
  """Finite float that a plot can hold, or None."""
  try:
    value = float(value)
  except (TypeError, ValueError, OverflowError):
    return None
  return value if abs(value) < 1e30 else None  # false for nan too


def plain(value: object) -> object:
  """Strict JSON for any value: NaN and infinities become null, arrays lists,
  and objects that JSON does not know their text."""
  if value is None or isinstance(value, (bool, int, str)):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, dict):
    return {str(key): plain(inner) for key, inner in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(inner) for inner in value]
  if hasattr(value, 'tolist'):  # of numpy and jax
    return plain(value.tolist())
  return str(value)


def to_line(row: dict) -> str:
  """One line of JSON."""
  text = json.dumps(plain(row), ensure_ascii=False, allow_nan=False)
  return redact(text) + '\n'


def parse_row(line: str) -> dict | None:
  """Row of a line, or None when it is no object with a step."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  whole = isinstance(row, dict) and number(row.get('step')) is not None
  return row if whole else None


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
  """Lines of a file from 1, without the blank ones; none without a file."""
  if not path.is_file():
    return
  # newline='\n': other separators may stand inside a sample
  with path.open(encoding='utf-8', errors='replace', newline='\n') as file:
    for number_of_line, line in enumerate(file, 1):
      if line.strip():
        yield number_of_line, line


def iterate_rows(
  path: str | Path, on_skip: Callable[[int], None] = lambda line: None
) -> Iterator[dict]:
  """Rows of a file, one at a time.

  on_skip: called with the number of each line that is no row.
  """
  for number_of_line, line in numbered_lines(Path(path)):
    row = parse_row(line)
    if row is None:
      on_skip(number_of_line)
    else:
      yield row


def read_rows(path: str | Path) -> list[dict]:
  """Rows of a file; lines that are no row are left out."""
  return list(iterate_rows(path))


def read_metrics(run_dir: str | Path) -> list[dict]:
  """Rows of a run's metrics.jsonl."""
  return read_rows(Path(run_dir) / 'metrics.jsonl')


def last_of(path: str | Path, name: str) -> float | None:
  """Largest number of a name in the rows of a file; None without any."""
  found = (number(row.get(name)) for row in iterate_rows(path))
  return max((x for x in found if x is not None), default=None)


def last_step(path: str | Path) -> float | None:
  """Last step in the rows of a file; None without any."""
  return last_of(path, 'step')


def atomic_write(path: str | Path, text: str | Iterable[str]) -> Path:
  """Writes text, or its parts one after the other, to a file that is never
  seen half-written. A failure leaves the old file as it was."""
  path = Path(path)
  part = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    with part.open('w', encoding='utf-8', errors='replace', newline='') as file:
      file.writelines(map(redact, [text] if isinstance(text, str) else text))
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)
  return path
