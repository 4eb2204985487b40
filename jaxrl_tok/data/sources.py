"""Sources of records: a file, the hub, a data set, a list or a function.

`open_records` checks every record of a finite source before anything is
trained, names a fault by its place, and keeps no record of a file: offsets
and hashes only, so that a million of them cost some megabytes.
"""

import importlib
import json
import os
import re
import stat
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from jaxrl_tok.data.chat import without_nulls
from jaxrl_tok.data.records import (
  CHUNK,
  EPISODE,
  MESSAGES,
  RESERVED,
  Records,
  check_names,
  check_record,
  check_renames,
  check_surrogates,
  from_function,
  from_list,
  from_prompts,
  hash_bytes,
  hash_record,
  key_of,
  rename,
)
from jaxrl_tok.rewards.functions import shorten

CHAT = 'prompt', 'tools'  # columns that a chat template is given
MAX_LINE = 4 * 2**20  # bytes of a jsonl line
MAX_ITERATED = 5_000_000  # records of an iterable, which are kept in memory
SURROGATE = re.compile(rb'\\u[dD][89a-fA-F]')
HUB_FORM = (
  'hub:OWNER/NAME@REVISION:SPLIT or hub:OWNER/NAME/CONFIG@REVISION:SPLIT'
)
HUB = re.compile(r'hub:([^/@:]+/[^/@:]+)(?:/([^@:]+))?@([^@:]+):(.+)')
REFUSED = {  # by the end of a file's name
  **dict.fromkeys(
    ('.gz', '.bz2', '.xz', '.zst', '.zip', '.tar'),
    'is compressed; unpack it first, or save it as .parquet',
  ),
  **dict.fromkeys(
    ('.csv', '.tsv', '.xlsx', '.arrow', '.npz', '.pkl'),
    'is neither .jsonl nor .parquet; convert it to one of them',
  ),
}


def open_records(
  source,
  seed: int = 0,
  columns: dict[str, str] | None = None,
  name: str | None = None,
) -> Records:
  """Records of a source, all of them checked.

  Args:
    source: the path of a .jsonl or .parquet file;
      'hub:OWNER/NAME@REVISION:SPLIT'; a datasets.Dataset; dicts in a list or
      another finite iterable; or function(seed, index) -> dict, for endless
      records.
    seed: given to the function.
    columns: {old name: new name}, such as {'question': 'prompt'}.
    name: of the records in errors.
  """
  columns = columns or {}
  if isinstance(source, Records):
    if columns:
      raise ValueError(f'{source.name} is open already; rename when opening')
    return source
  if isinstance(source, str | os.PathLike):
    text = os.fspath(source)
    if text.startswith('hub:'):
      return open_dataset(load_hub(text), columns, name or text)
    return open_file(Path(text), columns, name or text)
  if is_dataset(source):
    return open_dataset(source, columns, name or 'the data set')
  if callable(source) and not hasattr(source, '__iter__'):
    name = name or getattr(source, '__name__', type(source).__name__)
    return from_function(source, seed, columns, name)
  return from_list(as_list(source), columns, name or 'the data')


def read_jsonl(path: str | os.PathLike) -> list[dict]:
  """All records of a jsonl file."""
  return list(open_jsonl(Path(path), {}, str(path)))


def read_pairs(source, text: str, answer: str) -> list[dict]:
  """All records of a source, with `text` and `answer` in place of the columns
  of these names; its other columns stay. Raises ValueError for a record that
  lacks one, or has no text there."""
  rows = open_records(
    source, columns={text: 'prompt'} if text != 'prompt' else {}
  )
  found = []
  for i, row in enumerate(rows):
    if not isinstance(row.get(answer), str):
      raise ValueError(
        f'{rows.where(i)}: no text in column {answer}; it has '
        f'{", ".join(text if k == "prompt" else k for k in row)}'
      )
    pair = {'text': row.pop('prompt'), 'answer': row.pop(answer)}
    found.append({**row, **pair})
  return found


def as_list(source) -> list:
  """Records of a finite iterable."""
  if isinstance(source, dict):
    kind = 'several splits' if is_splits(source) else 'one dict'
    raise ValueError(
      f'the data is {kind}, not records; give one split or a list of dicts'
    )
  if not isinstance(source, Iterable):
    raise ValueError(
      f'the data is a {type(source).__name__}; give a path, a list of dicts, '
      'a data set, or a function of (seed, index)'
    )
  if isinstance(source, list | tuple):
    return source
  rows = []
  for row in source:
    rows.append(row)
    if len(rows) > MAX_ITERATED:
      raise ValueError(
        f'the data is an iterable of more than {MAX_ITERATED:,} records; give '
        'a file, or a function of (seed, index) for endless ones'
      )
  return rows


def need(module: str, source: str):
  """A module of the extra [data]."""
  try:
    return importlib.import_module(module)
  except ImportError:
    raise ValueError(
      f'{source} needs {module.split(".")[0]}, which is not installed; run '
      'pip install datasets'
    ) from None


def one_line(e: Exception) -> str:
  return ' '.join(str(e).split()) or type(e).__name__


# --- files -------------------------------------------------------------------


def open_file(path: Path, columns: dict, name: str) -> Records:
  """A .parquet file, or jsonl under any other name."""
  ending = path.suffix.lower()
  if ending in REFUSED:
    raise ValueError(f'{path} {REFUSED[ending]}')
  if not path.exists():
    raise FileNotFoundError(
      f'{path}: no such file; a data set of the hub is {HUB_FORM}'
    )
  if path.is_dir():
    raise IsADirectoryError(f'{path} is a directory; name a file in it')
  if not stat.S_ISREG(path.stat().st_mode):
    raise ValueError(
      f'{path} is no regular file; save it as one, records are read again'
    )
  door = open_parquet if ending == '.parquet' else open_jsonl
  try:
    return door(path, columns, name)
  except PermissionError:
    raise PermissionError(f'{path} cannot be read; change its mode') from None


def unique_keys(pairs: list) -> dict:
  """Object of its pairs. Raises ValueError where a key is there twice, as the
  last one would win."""
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'the key {shorten(repr(twice))} is there twice')
  return found


loads = json.JSONDecoder(object_pairs_hook=unique_keys).decode


def parse_line(raw: bytes, columns: dict, where: str) -> dict:
  """The record of one line."""
  try:
    record = loads(raw.decode('utf-8'))
  except UnicodeDecodeError as e:
    raise ValueError(f'{where}: not UTF-8 ({e.reason})') from None
  except json.JSONDecodeError as e:
    raise ValueError(f'{where}: not JSON ({e.msg}, column {e.colno})') from None
  except (ValueError, RecursionError) as e:  # a number or depth too large
    raise ValueError(f'{where}: not JSON ({e})') from None
  if columns and isinstance(record, dict):
    check_renames(record, columns, where)
    record = rename(record, columns)
  return record


def jsonl_lines(file, path: Path) -> Iterator[tuple[int, int, bytes]]:
  """(line number, offset, line) of every line that is not blank."""
  number = offset = 0
  while raw := file.readline(MAX_LINE + 1):
    number += 1
    if len(raw) > MAX_LINE:
      raise ValueError(
        f'{path}:{number}: a line of more than {MAX_LINE // 2**20} MiB; write '
        'one record a line, or leave out what no reward reads'
      )
    if number == 1 and raw.startswith(b'\xef\xbb\xbf'):
      raise ValueError(f'{path}:1: starts with a BOM; save it as plain UTF-8')
    if not raw.isspace():
      yield number, offset, raw
    offset += len(raw)


def scan_jsonl(file, path: Path, columns: dict):
  """Checks every line -> (offset, number of bytes, prompt's hash, prompt's
  number of bytes), an array of each."""
  offsets, sizes, hashes = array('q'), array('q'), array('Q')
  num_bytes = array('i')
  free = RESERVED.isdisjoint
  for number, offset, raw in jsonl_lines(file, path):
    prompt = None
    if not columns:  # nearly every line; what it cannot take is read again
      try:
        record = loads(raw.decode('utf-8'))
        if type(record) is dict and free(record):
          prompt = record.get('prompt')
      except (ValueError, RecursionError):
        pass
    if type(prompt) is not str or not prompt:
      where = f'{path}:{number}'
      record = check_record(parse_line(raw, columns, where), where)
      prompt = record['prompt']
    if b'\\u' in raw and SURROGATE.search(raw):
      check_surrogates(record, f'{path}:{number}')
    key = key_of(prompt)
    if EPISODE in record:
      hashes.append(hash_record(record))
    else:
      hashes.append(hash_bytes(key))
    offsets.append(offset)
    sizes.append(len(raw))
    num_bytes.append(len(key) if type(prompt) is str else MESSAGES)
  return tuple(
    np.frombuffer(a, a.typecode) if a else np.zeros(0, a.typecode)
    for a in (offsets, sizes, hashes, num_bytes)
  )


def open_jsonl(path: Path, columns: dict, name: str) -> Records:
  """One record a line; blank lines are skipped. Errors name file:line."""
  file = open(path, 'rb')  # noqa: SIM115  records are read from it later
  offsets, sizes, hashes, num_bytes = scan_jsonl(file, path, columns)
  if not len(offsets):
    raise ValueError(
      f'{path}: no records; write {{"prompt": ...}} on each line'
    )

  def where(i: int) -> str:
    left, number = int(offsets[i]), 1
    with open(path, 'rb') as again:
      while left and (block := again.read(min(left, MAX_LINE))):
        number += block.count(b'\n')
        left -= len(block)
    return f'{path}:{number}'

  def read(numbers) -> list[dict]:
    handle, rows = file.fileno(), []
    for i in numbers:
      raw = os.pread(handle, int(sizes[i]), int(offsets[i]))
      try:
        rows.append(parse_line(raw, columns, ''))
      except ValueError:
        raise ValueError(
          f'{path} has changed since it was opened; start again'
        ) from None
    return rows

  return Records(name, read, where, hashes, num_bytes)


def open_parquet(path: Path, columns: dict, name: str) -> Records:
  """Rows of a parquet file, which lie in a temporary Arrow file from then on:
  a row is read where it lies, no column is kept in memory."""
  pa = need('pyarrow', str(path))
  parquet = need('pyarrow.parquet', str(path))

  def where(i: int) -> str:
    return f'{path}: row {i}'

  try:  # the mapped file lives on without its name
    with (
      tempfile.NamedTemporaryFile() as kept,
      parquet.ParquetFile(path) as file,
    ):
      with pa.ipc.new_file(kept.name, file.schema_arrow) as sink:
        for batch in file.iter_batches(CHUNK):
          sink.write_batch(batch)
      table = pa.ipc.open_file(pa.memory_map(kept.name))
    batches = [table.get_batch(k) for k in range(table.num_record_batches)]
  except pa.ArrowException as e:
    raise ValueError(f'{path}: not parquet ({one_line(e)})') from None
  starts = np.cumsum([0, *(batch.num_rows for batch in batches)])

  def read(numbers) -> list[dict]:
    rows, numbers = [], np.asarray(numbers, np.int64)
    for i, k in zip(numbers, np.searchsorted(starts, numbers, 'right') - 1):
      one = batches[k].slice(int(i - starts[k]), 1)
      rows.append(of_arrow(rename(one.to_pylist()[0], columns)))
    return rows

  source = prompt_column(table.schema.names, columns, str(path))
  prompts = (
    without_nulls(p.as_py()) for b in batches for p in b.column(source)
  )
  return from_prompts(name, decoded(prompts, where), read, where)


def of_arrow(record: dict) -> dict:
  """Record whose messages and tools have the fields that were written."""
  chat = {k: without_nulls(record[k]) for k in CHAT if k in record}
  return record | chat


def decoded(prompts: Iterator, where: Callable) -> Iterator:
  """Prompts of an Arrow column, whose text may be broken."""
  number = 0
  try:
    for prompt in prompts:
      yield prompt
      number += 1
  except UnicodeDecodeError as e:
    raise ValueError(f'{where(number)}: not UTF-8 ({e.reason})') from None


def prompt_column(names: list[str], columns: dict, where: str) -> str:
  """The old name of the column that holds the prompts."""
  check_renames(names, columns, where)
  check_names([columns.get(name, name) for name in names], where)
  return {new: old for old, new in columns.items()}.get('prompt', 'prompt')


# --- data sets of Hugging Face -----------------------------------------------


def is_dataset(source) -> bool:
  """A datasets.Dataset, whose package is imported only where one is given."""
  module = sys.modules.get('datasets')
  return module is not None and isinstance(source, module.Dataset)


def is_splits(source) -> bool:
  module = sys.modules.get('datasets')
  return module is not None and isinstance(source, module.DatasetDict)


def load_hub(text: str):
  """The datasets.Dataset that hub:OWNER/NAME/CONFIG@REVISION:SPLIT names.

  Without CONFIG: the default one, or `main` where there is none.
  """
  found = HUB.fullmatch(text)
  if not found:
    raise ValueError(f'{text} is not of the form {HUB_FORM}')
  datasets = need('datasets', text)
  path, config, revision, wanted = found.groups()
  try:
    if config is None:
      names = datasets.get_dataset_config_names(path, revision=revision)
      if len(names) > 1 and 'main' in names and 'default' not in names:
        config = 'main'
    data = datasets.load_dataset(path, config, split=wanted, revision=revision)
  except Exception as e:  # the network, the hub, a config, a split
    raise ValueError(f'{text} cannot be loaded: {one_line(e)}') from None
  return data


def open_dataset(data, columns: dict, name: str) -> Records:
  """Rows of a datasets.Dataset, read as Python values."""
  if (data.format or {}).get('type') not in (None, 'custom'):
    data = data.with_format(None)  # 'custom': the user's own transform

  def where(i: int) -> str:
    return f'{name}: row {i}'

  def read(numbers) -> list[dict]:
    found = data[[int(i) for i in numbers]]
    names = [columns.get(old, old) for old in found]
    rows = (dict(zip(names, row)) for row in zip(*found.values()))
    return [of_arrow(row) for row in rows]

  def prompts() -> Iterator:
    for start in range(0, len(data), CHUNK):
      yield from map(without_nulls, narrow[start : start + CHUNK][source])

  plain = (data.format or {}).get('type') is None
  names = data.column_names if plain else list(data[0])
  source = prompt_column(names, columns, name)
  narrow = data.select_columns([source]) if plain else data
  return from_prompts(name, prompts(), read, where)
