"""Records: what a task is learnt from, one dict a prompt.

  {'prompt': text or messages, ...columns that the rewards read}

A column `tools` beside messages is given to the chat template, too. A column
`episode` tells records of one prompt apart, as a game's with a hidden start: it
is held out or trained on as if it were part of the prompt (in lists, functions
and jsonl files).

1. `check_record` refuses, by name, a record that cannot be used.
2. `Records` holds a source: how to read record i, and a hash of each prompt.
3. Sources in memory: `from_list`, and `from_function` for endless records.
"""

import dataclasses
import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxrl_tok.data.chat import check_messages
from jaxrl_tok.rewards.functions import ARGUMENTS

RESERVED = frozenset(ARGUMENTS)  # names that no column may have
MESSAGES = -1  # in Records.num_bytes
EPISODE = 'episode'  # column that tells records of one prompt apart
CHUNK = 4096  # records read at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Records(Sequence):
  """Records by number, read when they are asked for.

  # records[7] -> {'prompt': '2+2=', 'answer': '4'}
  """

  name: str  # of the source, in words
  read: Callable  # numbers -> list of records
  where: Callable  # number -> text that names the record in an error
  hashes: np.ndarray | None = None  # uint64 [n] of the prompts; None: endless
  num_bytes: np.ndarray | None = None  # int32 [n] of a text; -1: messages

  @property
  def num_records(self) -> int | None:
    """Number of records; None: endless."""
    return None if self.hashes is None else len(self.hashes)

  def __len__(self) -> int:
    if self.hashes is None:
      raise TypeError(f'{self.name} is endless; it has no length')
    return len(self.hashes)

  def __getitem__(self, i):
    if self.hashes is None:
      return self.read([int(i)])[0]
    if isinstance(i, slice):
      return self.read(range(*i.indices(len(self))))
    number = int(i) + len(self) * (i < 0)
    if not 0 <= number < len(self):
      raise IndexError(f'{self.name} has {len(self)} records, not {i}')
    return self.read([number])[0]

  def __iter__(self) -> Iterator[dict]:
    for start in range(0, len(self), CHUNK):
      yield from self[start : start + CHUNK]


# --- one record --------------------------------------------------------------


def check_names(names, where: str) -> None:
  """Refuses a record's columns by their names."""
  if 'prompt' not in names:
    raise ValueError(
      f'{where}: no "prompt"; it has {", ".join(map(str, names)) or "nothing"}'
    )
  taken = RESERVED.intersection(names)
  if taken:
    raise ValueError(
      f'{where}: a column is named {min(taken)!r}, as an argument of every '
      'reward function; rename the column'
    )


def check_prompt(prompt, where: str) -> None:
  """Refuses what is neither text nor messages."""
  if isinstance(prompt, list):
    check_messages(prompt, where)
  elif not isinstance(prompt, str):
    raise ValueError(
      f'{where}: "prompt" is a {type(prompt).__name__}; '
      'it must be text or a list of messages'
    )
  if not prompt:
    raise ValueError(f'{where}: the prompt is empty; a policy needs a token')


def check_record(record, where: str) -> dict:
  """The record, when it has a prompt that can be used; else ValueError."""
  if not isinstance(record, dict):
    raise ValueError(
      f'{where}: a {type(record).__name__}, not an object; '
      'a record is {"prompt": ..., other columns}'
    )
  check_names(record, where)
  check_prompt(record['prompt'], where)
  return record


def surrogate_error(e: UnicodeEncodeError, where: str) -> ValueError:
  return ValueError(
    f'{where}: \\u{ord(e.object[e.start]):x} is half of a surrogate pair; '
    'write both halves, or the character itself'
  )


def check_surrogates(record, where: str) -> None:
  """Refuses half of a surrogate pair, which no tokenizer or file takes."""
  try:
    json.dumps(record, ensure_ascii=False, default=str).encode('utf-8')
  except UnicodeEncodeError as e:
    raise surrogate_error(e, where) from None


def check_renames(names, columns: dict[str, str], where: str) -> None:
  """Refuses renames {old: new} that these columns cannot take."""
  for old, new in columns.items():
    if old not in names:
      raise ValueError(
        f'{where}: no column {old!r} to rename to {new!r}; it has '
        f'{", ".join(map(str, names)) or "nothing"}'
      )
    if new in names and new not in columns:
      raise ValueError(
        f'{where}: column {old!r} cannot be renamed to {new!r}, which is there '
        f'already; rename {new!r} as well'
      )


def rename(record: dict, columns: dict[str, str]) -> dict:
  """The record with its columns {old: new} renamed."""
  return {columns.get(name, name): value for name, value in record.items()}


def key_of(prompt, episode=None) -> bytes:
  """UTF-8 of a prompt and its episode, if any; equal for equal ones."""
  if episode is not None:
    prompt = [prompt, episode]
  if not isinstance(prompt, str):
    prompt = json.dumps(prompt, ensure_ascii=False, sort_keys=True, default=str)
  return prompt.encode('utf-8')


def hash_bytes(key: bytes) -> int:
  """64 bits of a key."""
  digest = hashlib.blake2b(key, digest_size=8).digest()
  return int.from_bytes(digest, 'little')


def hash_prompt(prompt, where: str, episode=None) -> int:
  try:
    return hash_bytes(key_of(prompt, episode))
  except UnicodeEncodeError as e:
    raise surrogate_error(e, where) from None


def hash_record(record: dict, where: str = '') -> int:
  """Hash of a record's prompt and episode: equal ones are one record."""
  return hash_prompt(record['prompt'], where, record.get(EPISODE))


def text_bytes(prompt) -> int:
  """Bytes of a text in UTF-8; MESSAGES for messages."""
  return len(prompt.encode('utf-8')) if isinstance(prompt, str) else MESSAGES


def has_messages(records: Records) -> bool:
  """Tells whether a prompt is a list of messages; the first one decides of
  endless records."""
  if records.num_bytes is None:
    return not isinstance(records[0]['prompt'], str)
  return bool((records.num_bytes == MESSAGES).any())


def data_fingerprint(records: Records) -> str:
  """16 hexadecimal digits that change when a prompt or the order does."""
  hashes = records.hashes
  if hashes is None:
    some = records.read(range(16))
    hashes = np.array([hash_record(r) for r in some], np.uint64)
  return hashlib.blake2b(
    hashes.astype('<u8').tobytes(), digest_size=8
  ).hexdigest()


# --- sources in memory -------------------------------------------------------


def from_prompts(
  name: str, prompts, read: Callable, where: Callable, episodes=None
):
  """Records of prompts that are checked one by one. episodes: that of each
  prompt, or None where it has none."""
  hashes, num_bytes = array('Q'), array('i')
  for i, (prompt, episode) in enumerate(
    zip(prompts, episodes or itertools.repeat(None))
  ):
    check_prompt(prompt, where(i))
    hashes.append(hash_prompt(prompt, where(i), episode))
    num_bytes.append(text_bytes(prompt))
  if not hashes:
    raise ValueError(f'{name}: no records; give {{"prompt": ...}} for each')
  return Records(
    name,
    read,
    where,
    np.frombuffer(hashes, np.uint64),
    np.frombuffer(num_bytes, np.int32),
  )


def from_list(source: Sequence[dict], columns: dict, name: str) -> Records:
  """Records that are in memory already."""

  def where(i: int) -> str:
    return f'record {i} of {name}'

  rows = []
  for i, record in enumerate(source):
    if columns and isinstance(record, dict):
      check_renames(record, columns, where(i))
      record = rename(record, columns)
    rows.append(check_record(record, where(i)))
  return from_prompts(
    name,
    (row['prompt'] for row in rows),
    lambda numbers: [rows[i] for i in numbers],
    where,
    (row.get(EPISODE) for row in rows),
  )


def from_function(
  function: Callable, seed: int, columns: dict, name: str
) -> Records:
  """Endless records: function(seed, index) -> record, the same every time."""

  def where(i: int) -> str:
    return f'{name}(seed={seed}, index={i})'

  def read(numbers) -> list[dict]:
    rows = []
    for i in map(int, numbers):
      record = function(seed, i)
      if columns and isinstance(record, dict):
        check_renames(record, columns, where(i))
        record = rename(record, columns)
      check_record(record, where(i))
      rows.append(record)
    return rows

  if hash_record(read([0])[0], where(0)) != hash_record(read([0])[0], where(0)):
    raise ValueError(
      f'{where(0)} gives another prompt each time; make it a function of seed '
      'and index alone, so that a resumed run sees the same records'
    )
  return Records(name, read, where)


def select(records: Records, numbers: np.ndarray) -> Records:
  """The records of these numbers, in this order."""
  return dataclasses.replace(
    records,
    read=lambda wanted: records.read(numbers[np.asarray(wanted, np.int64)]),
    where=lambda i: records.where(int(numbers[i])),
    hashes=records.hashes[numbers],
    num_bytes=records.num_bytes[numbers],
  )
