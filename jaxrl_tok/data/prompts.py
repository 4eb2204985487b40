"""Prompts as ids: batches of a few lengths, chosen before training.

1. `prompt_set` measures the prompts, applies --long_prompts and chooses the
   buckets: at most three prompt lengths P, the last of which holds them all.
2. `batch_at` is a pure function of (seed, position): a resumed run needs
   nothing but the position. Its P is the smallest bucket that holds the batch.
3. Prompts are tokenised when a batch needs them, unless they are few.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxrl_tok.data.buckets import choose_buckets, last_endless
from jaxrl_tok.data.chat import Chat, check_chat, tools_of
from jaxrl_tok.data.order import ATTEMPTS, record_indices, redrawn_index
from jaxrl_tok.data.records import CHUNK, MESSAGES, Records, select
from jaxrl_tok.data.sources import open_records
from jaxrl_tok.data.tokenizers import (
  added_ids,
  bytes_bound,
  encode_prompts,
  largest_id,
)

if TYPE_CHECKING:
  from jaxrl_tok.types import Prompts

LONG_PROMPTS = ('error', 'drop', 'cut_left', 'cut_right')
MEASURED = 65_536  # records that are always tokenised before training
SAMPLE = 2048  # records that stand for the others, where there are more
KEPT_IDS = 2**22  # ids that are kept, not made anew for each batch
NO_LIMIT = 2**31 - 1
MAX_TABLE = 2**31  # bytes


@dataclasses.dataclass(frozen=True, eq=False)
class PromptSet:
  """Records, and how they become batches of prompts."""

  records: Records
  encode: Callable  # (records, where) -> checked ids of each
  buckets: tuple[int, ...]  # ascending
  long_prompts: str
  counts: dict  # 'records', 'longest', 'dropped', 'cut'
  columns: Callable | None  # records -> {name: array [n, ...]}
  column_shapes: dict  # {name: (shape of one record's, dtype)}
  ids: list | None  # of all records, int32 each, where they are few
  name: str
  # ids at a prompt's start and end that a cut leaves: those that the tokenizer
  # puts around a text for an encoder
  frame: tuple[list, list] = ([], [])

  @property
  def num_records(self) -> int | None:
    """Number of records; None: endless."""
    return self.records.num_records

  def batch(
    self, examples: Sequence[dict], length: int | None = None
  ) -> tuple['Prompts', dict]:
    """(Prompts, columns) of given records; P is `length`, else a bucket."""

    def where(i: int) -> str:
      return f'record {i} of the batch'

    rows = fit(self, self.encode(examples, where), where)
    return pad(self, rows, length), columns_of(self, examples)

  def table(self) -> tuple[np.ndarray, np.ndarray, dict]:
    """(tokens int32 [n, P], length int32 [n], columns {name: [n, ...]}) of
    all records, for whole steps on the device."""
    n, P = self.num_records, self.buckets[-1]
    if n is None:
      raise ValueError(
        f'{self.records.name} is endless, so it cannot lie on the device as a '
        'whole; pass --steps_per_call 0'
      )
    if 4 * n * P > MAX_TABLE:
      raise ValueError(
        f'{n:,} prompts of {P} tokens are {4 * n * P / 2**30:.1f} GiB on the '
        f'device, more than {MAX_TABLE / 2**30:.0f}; pass --steps_per_call 0'
      )
    prompts, columns = [], []
    for start in range(0, n, CHUNK):
      numbers = np.arange(start, min(n, start + CHUNK))
      examples, rows = rows_at(self, numbers)
      prompts.append(pad(self, rows, P))
      columns.append(columns_of(self, examples))
    return (
      np.concatenate([p.tokens for p in prompts]),
      np.concatenate([p.length for p in prompts]),
      {k: np.concatenate([c[k] for c in columns]) for k in columns[0]},
    )


def prompt_set(
  records,
  tokenizer,
  vocab_size: int,
  max_prompt_length: int | None = None,
  long_prompts: str = 'error',
  columns: Callable | None = None,
  name: str = 'training prompt',
  num_prompts: int = 64,
  chat: Chat = Chat(),  # noqa: B008  a record
  whole: bool = False,
) -> PromptSet:
  """Prompts of records, measured; every fault of a finite set is found here.

  Args:
    records: Records, or what open_records takes.
    max_prompt_length: tokens; None: as long as the longest.
    long_prompts: for a longer one: 'error'; 'drop' the record; 'cut_left' and
      'cut_right' leave tokens out at the start and at the end.
    columns: records -> {name: array [n, ...]}, read by rewards on the device.
    name: of a prompt in errors.
    num_prompts: of a batch, by which buckets are chosen.
    chat: of prompts that are messages.
    whole: as encode_prompts has it: an encoder reads the prompts.
  """
  frame = added_ids(tokenizer) if whole else ([], [])
  check_limit(max_prompt_length, long_prompts, sum(map(len, frame)))
  limit = max_prompt_length or NO_LIMIT
  records = open_records(records)
  encode = make_encode(tokenizer, vocab_size, name, chat, whole)
  bound = bound_tokens(records, tokenizer, vocab_size, whole)
  length, weight, rows = measure(records, encode, bound, limit)
  longest, long = int(length.max()), np.flatnonzero(length > limit)
  if len(long) and long_prompts == 'error':
    at = int(long[0])
    raise too_long(records.where(at), name, length[at], limit, longest)
  counts = {
    'records': records.num_records,
    'longest': longest,
    'dropped': len(long) if long_prompts == 'drop' else 0,
    'cut': len(long) if long_prompts.startswith('cut') else 0,
  }
  last = None  # the longest
  if records.num_records is None:
    last = last_endless(length, max_prompt_length)
  elif counts['dropped']:
    keep = kept(length, limit, name)
    records, length, weight = select(records, keep), length[keep], weight[keep]
    rows = rows and [rows[i] for i in keep]
  return PromptSet(
    records=records,
    encode=encode,
    buckets=choose_buckets(
      np.minimum(length, limit), weight, num_prompts, last
    ),
    long_prompts=long_prompts,
    counts=counts,
    columns=columns,
    column_shapes=shapes_of(columns, records),
    ids=rows and [shorten(row, limit, long_prompts, frame) for row in rows],
    name=name,
    frame=frame,
  )


def check_limit(limit: int | None, long_prompts: str, added: int = 0) -> None:
  """Refuses choices that say nothing. added: tokens around every text."""
  if long_prompts not in LONG_PROMPTS:
    raise ValueError(
      f'long_prompts {long_prompts!r} is not one of {", ".join(LONG_PROMPTS)}'
    )
  if limit is None and long_prompts != 'error':
    raise ValueError(
      f'--long_prompts {long_prompts} needs a length; pass --max_prompt_length'
    )
  if limit is not None and limit < 1:
    raise ValueError(f'--max_prompt_length {limit} must be 1 or more')
  if limit is not None and limit <= added and long_prompts.startswith('cut'):
    raise ValueError(
      f'--max_prompt_length {limit} holds no more than the {added} tokens that '
      f'the tokenizer puts around a text; pass {added + 1} or more'
    )


def kept(length: np.ndarray, limit: int, name: str) -> np.ndarray:
  """Numbers of the records that --long_prompts drop leaves."""
  keep = np.flatnonzero(length <= limit)
  if not len(keep):
    raise ValueError(
      f'each {name} is longer than max_prompt_length {limit}; pass a larger '
      '--max_prompt_length'
    )
  return keep


# --- lengths -----------------------------------------------------------------


def make_encode(
  tokenizer,
  vocab_size: int,
  name: str,
  chat: Chat = Chat(),  # noqa: B008  a record
  whole: bool = False,
) -> Callable:
  """Returns encode(records, where) -> ids of each: none is empty, and the
  model has a row for every id."""

  check_chat(tokenizer, chat)
  proven = largest_id(tokenizer) < vocab_size

  def encode(examples, where: Callable) -> list[list[int]]:
    prompts = [e['prompt'] for e in examples]
    tools = [read_tools(e, where, i) for i, e in enumerate(examples)]
    rows = encode_prompts(tokenizer, prompts, where, chat, tools, whole)
    for i, row in enumerate(rows):
      if not row:
        raise ValueError(
          f'{where(i)}: the {name} is empty; a policy needs a token'
        )
      if not proven and not 0 <= min(row) <= max(row) < vocab_size:
        raise ValueError(
          f'{where(i)}: the {name} has token id {max(row)} and the model has '
          f'{vocab_size} rows; use the tokenizer that belongs to the model'
        )
    return rows

  return encode


def read_tools(example: dict, where: Callable, i: int):
  """Tools of a record whose prompt is messages; None for text."""
  if isinstance(example['prompt'], str):
    return None
  try:
    return tools_of(example)
  except ValueError as e:
    raise ValueError(f'{where(i)}: {e}') from None


def too_long(where: str, name: str, length, limit, longest) -> ValueError:
  return ValueError(
    f'{where}: the {name} has {length} tokens, more than max_prompt_length '
    f'{limit}; pass --max_prompt_length {longest}, or --long_prompts drop, '
    'cut_left or cut_right'
  )


def shorten(row, limit: int, long_prompts: str, frame=([], [])):
  """Ids, cut to the limit where that is asked for; those of the frame, where
  the row has them, stay."""
  if len(row) <= limit or not long_prompts.startswith('cut'):
    return row
  start, end = (len(ids) for ids in frame)
  last = len(row) - end
  framed = [list(row[:start]), list(row[last:])] == list(map(list, frame))
  if not framed:  # messages
    start, last = 0, len(row)
  room = limit - start - (len(row) - last)
  text = row[start:last]
  text = text[-room:] if long_prompts == 'cut_left' else text[:room]
  return np.concatenate([row[:start], text, row[last:]]).astype(np.int32)


def bound_tokens(records: Records, tokenizer, vocab_size: int, whole=False):
  """int64 [n]: tokens that a prompt has at most, by its bytes; None where all
  must be tokenised, because nothing is proven or they are few."""
  if records.num_records is None or records.num_records <= MEASURED:
    return None
  bound = bytes_bound(tokenizer, whole)
  if bound is None or largest_id(tokenizer) >= vocab_size:
    return None
  factor, constant = bound
  by_bytes = factor * records.num_bytes.astype(np.int64) + constant
  return np.where(records.num_bytes == MESSAGES, NO_LIMIT, by_bytes)


def measure(records: Records, encode: Callable, bound, limit: int):
  """(length [n], weight [n], rows | None) of the prompts in tokens.

  Each is measured, unless its bound says that it is neither too long nor the
  longest: such a one has length 0 and weight 0, and a sample's records weigh
  more for it.
  """
  n = records.num_records
  numbers = np.arange(SAMPLE if n is None else n)
  if bound is None:
    rows, kept = [], n is not None
    length = np.zeros(len(numbers), np.int32)
    for some, found in encoded(records, encode, numbers):
      length[some] = [len(row) for row in found]
      kept = kept and length.sum() <= KEPT_IDS
      rows = rows + [np.array(row, np.int32) for row in found] if kept else None
    return length, np.ones(len(numbers)), rows
  length, weight = np.zeros(n, np.int32), np.zeros(n)
  sample = record_indices(n, 0, 0, SAMPLE)
  for some, found in encoded(records, encode, sample):
    length[some] = [len(row) for row in found]
  weight[sample] = 1
  if (length > bound)[sample].any():
    return measure(records, encode, None, limit)
  rest = np.flatnonzero((bound > min(length.max(), limit)) & (weight == 0))
  rest = rest[np.argsort(-bound[rest], kind='stable')]
  for start in range(0, len(rest), CHUNK):
    some = rest[start : start + CHUNK]
    some = some[bound[some] > min(length.max(), limit)]
    if not len(some):
      break
    for part, found in encoded(records, encode, some):
      length[part] = [len(row) for row in found]
      weight[part] = 1
  weight[sample] += np.sum(weight == 0) / SAMPLE
  return length, weight, None


def encoded(records: Records, encode: Callable, numbers: np.ndarray):
  """(numbers, their ids), chunk by chunk."""
  for start in range(0, len(numbers), CHUNK):
    some = numbers[start : start + CHUNK]
    examples = records.read(some)
    yield some, encode(examples, lambda i, s=some: records.where(int(s[i])))


# --- batches -----------------------------------------------------------------


def fit(data: PromptSet, rows: list, where: Callable) -> list:
  """Ids that the last bucket holds: cut where that is asked for."""
  P = data.buckets[-1]
  rows = [shorten(row, P, data.long_prompts, data.frame) for row in rows]
  for i, row in enumerate(rows):
    if len(row) > P:
      raise too_long(where(i), data.name, len(row), P, len(row))
  return rows


def rows_at(data: PromptSet, numbers: np.ndarray) -> tuple[list[dict], list]:
  """(records, their ids) of these numbers. An endless record that is too long
  and is to be dropped is drawn again at another index."""
  examples = data.records.read(numbers)
  if data.ids is not None:
    return examples, [data.ids[i] for i in numbers]

  def where(i: int) -> str:
    return data.records.where(int(numbers[i]))

  rows = data.encode(examples, where)
  if data.num_records is None and data.long_prompts == 'drop':
    for i, number in enumerate(numbers):
      attempt = 0
      while len(rows[i]) > data.buckets[-1] and attempt < ATTEMPTS:
        attempt += 1
        again = redrawn_index(int(number), attempt)
        examples[i : i + 1] = data.records.read([again])
        rows[i : i + 1] = data.encode(
          examples[i : i + 1], lambda _, i=i: where(i)
        )
  return examples, fit(data, rows, where)


def pad(data: PromptSet, rows: list, length: int | None = None) -> 'Prompts':
  """Right-padded prompts; P is `length`, else the smallest bucket."""
  from jaxrl_tok.types import Prompts

  lengths = np.array([len(row) for row in rows], np.int32)
  longest = int(lengths.max())
  P = length or next(b for b in data.buckets if b >= longest)
  if longest > P:
    raise ValueError(
      f'a {data.name} has {longest} tokens, more than the {P} of the batch; '
      'give a larger length'
    )
  tokens = np.zeros((len(rows), P), np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
  return Prompts(tokens, lengths)


def shapes_of(columns: Callable | None, records: Records) -> dict:
  """{name: (shape of one record's, dtype)} that every batch must have."""
  if columns is None:
    return {}
  found = columns(records.read([0]))
  return {k: (np.shape(v)[1:], np.asarray(v).dtype) for k, v in found.items()}


def columns_of(data: PromptSet, examples: Sequence[dict]) -> dict:
  """{name: array [n, ...]} of the records."""
  if data.columns is None:
    return {}
  found = {k: np.asarray(v) for k, v in data.columns(examples).items()}
  if found.keys() != data.column_shapes.keys():
    raise ValueError(
      f'columns {", ".join(found)} of a batch, and '
      f'{", ".join(data.column_shapes)} of the first record; return the same '
      'names for any records'
    )
  for name, value in found.items():
    shape, dtype = data.column_shapes[name]
    if value.shape != (len(examples), *shape) or value.dtype != dtype:
      raise ValueError(
        f'column {name!r} is {value.dtype} {list(value.shape)}, not {dtype} '
        f'{[len(examples), *shape]}; pad it to one shape for all records'
      )
  return found


def batch_at(
  data: PromptSet,
  seed: int,
  position: int,
  count: int,
  own: np.ndarray | None = None,
  longest: Callable = int,
):
  """Reads `count` prompts from a position on: (examples, Prompts, columns).

  Args:
    own: those of them, int [n], that this process has; None: all.
    longest: length of its longest prompt -> that of all processes.
  """
  numbers = record_indices(data.num_records, seed, position, count)
  numbers = numbers if own is None else numbers[own]
  examples, rows = rows_at(data, numbers)
  P = data.buckets[-1]
  if len(data.buckets) > 1:
    need = longest(max(map(len, rows)))
    P = next(b for b in data.buckets if b >= need)
  return examples, pad(data, rows, P), columns_of(data, examples)
