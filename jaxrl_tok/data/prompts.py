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

from jaxrl_tok.data.chat import Chat, check_chat, tools_of
from jaxrl_tok.data.order import ATTEMPTS, record_indices, redrawn_index
from jaxrl_tok.data.records import CHUNK, MESSAGES, Records, select
from jaxrl_tok.data.sources import open_records
from jaxrl_tok.data.tokenizers import bytes_bound, encode_prompts, largest_id

if TYPE_CHECKING:
  from jaxrl_tok.types import Prompts

LONG_PROMPTS = ('error', 'drop', 'cut_left', 'cut_right')
MEASURED = 65_536  # records that are always tokenised before training
SAMPLE = 2048  # records that stand for the others, where there are more
KEPT_IDS = 2**22  # ids that are kept, not made anew for each batch
NO_LIMIT = 2**31 - 1
MAX_TABLE = 2**31  # bytes
MAX_BUCKETS = 3
# a further bucket is a further program: it must save this much of the mean P
SAVED_SHARE, SAVED_TOKENS = 0.1, 8
# probabilities that a batch fits, at which a bucket may end
LEVELS = np.concatenate(
  [np.linspace(0.02, 0.98, 49), 1 - np.logspace(-2, -7, 16), [1.0]]
)


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
  """
  check_limit(max_prompt_length, long_prompts)
  limit = max_prompt_length or NO_LIMIT
  records = open_records(records)
  encode = make_encode(tokenizer, vocab_size, name, chat)
  bound = bound_tokens(records, tokenizer, vocab_size)
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
    ids=rows and [shorten(row, limit, long_prompts) for row in rows],
    name=name,
  )


def check_limit(limit: int | None, long_prompts: str) -> None:
  """Refuses choices that say nothing."""
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


def kept(length: np.ndarray, limit: int, name: str) -> np.ndarray:
  """Numbers of the records that --long_prompts drop leaves."""
  keep = np.flatnonzero(length <= limit)
  if not len(keep):
    raise ValueError(
      f'each {name} is longer than max_prompt_length {limit}; pass a larger '
      '--max_prompt_length'
    )
  return keep


def last_endless(length: np.ndarray, limit: int | None) -> int | None:
  """Last bucket of endless records: the limit, else twice the longest of the
  sample. A length that one in a hundred shares is taken for the longest."""
  if limit is not None or np.mean(length == length.max()) > 0.01:
    return limit
  return 2 * int(length.max())


# --- lengths -----------------------------------------------------------------


def make_encode(
  tokenizer,
  vocab_size: int,
  name: str,
  chat: Chat = Chat(),  # noqa: B008  a record
) -> Callable:
  """Returns encode(records, where) -> ids of each: none is empty, and the
  model has a row for every id."""

  check_chat(tokenizer, chat)
  proven = largest_id(tokenizer) < vocab_size

  def encode(examples, where: Callable) -> list[list[int]]:
    prompts = [e['prompt'] for e in examples]
    tools = [read_tools(e, where, i) for i, e in enumerate(examples)]
    rows = encode_prompts(tokenizer, prompts, where, chat, tools)
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


def shorten(row, limit: int, long_prompts: str):
  """Ids, cut to the limit where that is asked for."""
  if len(row) <= limit:
    return row
  cut = {'cut_left': row[-limit:], 'cut_right': row[:limit]}
  return cut.get(long_prompts, row)


def bound_tokens(records: Records, tokenizer, vocab_size: int):
  """int64 [n]: tokens that a prompt has at most, by its bytes; None where all
  must be tokenised, because nothing is proven or they are few."""
  if records.num_records is None or records.num_records <= MEASURED:
    return None
  bound = bytes_bound(tokenizer)
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


def choose_buckets(
  length: np.ndarray,
  weight: np.ndarray,
  num_prompts: int,
  last: int | None = None,
) -> tuple[int, ...]:
  """Prompt lengths P, ascending, that cost the least on average.

  A batch fits P with probability F(P)^C, F the share of prompts that do, so
  that C prompts cost sum_k P_k (F(P_k)^C - F(P_k-1)^C). One further bucket
  must save a tenth, and 8 tokens.

  Args:
    length, weight: of the prompts; weight 0: not measured.
    last: the last bucket, where a prompt may be as long; None: the longest.
  """
  known = weight > 0
  ends, place = np.unique(length[known], return_inverse=True)
  share = np.cumsum(np.bincount(place, weight[known])) / weight[known].sum()
  fits = share**num_prompts
  keep = np.unique(np.minimum(np.searchsorted(fits, LEVELS), len(ends) - 1))
  ends, fits = ends[keep].astype(float), np.minimum(fits[keep], 1.0)
  if last is not None and last > ends[-1]:  # rare, so far
    ends = np.append(ends, last)
    fits = np.append(fits * (1 - 1e-9), 1.0)
  chosen, cost = [len(ends) - 1], ends[-1]
  while len(chosen) < MAX_BUCKETS and len(chosen) < len(ends):
    trials = {
      mean_bucket(ends, fits, sorted({*chosen, i})): i
      for i in range(len(ends) - 1)
    }
    best = min(trials)
    if cost - best < max(SAVED_SHARE * cost, SAVED_TOKENS):
      break
    chosen, cost = [*chosen, trials[best]], best
  return tuple(int(ends[i]) for i in sorted(chosen))


def mean_bucket(ends: np.ndarray, fits: np.ndarray, chosen: list) -> float:
  """Mean P of a batch, with these buckets."""
  return float(np.sum(ends[chosen] * np.diff(fits[chosen], prepend=0.0)))


# --- batches -----------------------------------------------------------------


def fit(data: PromptSet, rows: list, where: Callable) -> list:
  """Ids that the last bucket holds: cut where that is asked for."""
  P = data.buckets[-1]
  rows = [shorten(row, P, data.long_prompts) for row in rows]
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


def batch_at(data: PromptSet, seed: int, position: int, count: int):
  """The `count` prompts from a position on -> (examples, Prompts, columns)."""
  numbers = record_indices(data.num_records, seed, position, count)
  examples, rows = rows_at(data, numbers)
  return examples, pad(data, rows), columns_of(data, examples)
