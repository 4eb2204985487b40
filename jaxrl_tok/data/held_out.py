"""Held-out records: no prompt is on both sides, ever.

`split` holds out the end of a finite source, an index range of its own of an
endless one, or the records of another source.
"""

import dataclasses
import math
from numbers import Integral
from typing import NamedTuple

import numpy as np

from jaxrl_tok.data.order import (
  ATTEMPTS,
  HELD_OUT_START,
  RANGE,
  redrawn_index,
)
from jaxrl_tok.data.records import Records, hash_record, select, text_bytes
from jaxrl_tok.data.sources import open_records


class Split(NamedTuple):
  """Training and held-out records without a prompt in common."""

  train: Records
  held_out: Records
  # {'train', 'held_out': records (train: None if endless); 'repeated':
  # held-out records whose prompt was there already; 'removed': training
  # records left out because their prompt is held out}
  counts: dict


def first_places(hashes: np.ndarray) -> np.ndarray:
  """Number of the first record of every different prompt, ascending."""
  return np.sort(np.unique(hashes, return_index=True)[1])


def without(train: Records, held_out: Records) -> Records:
  """Training records whose prompt is not held out."""
  if train.num_records is not None:
    keep = ~np.isin(train.hashes, held_out.hashes)
    if not keep.any():
      raise ValueError(
        f'every prompt of {train.name} is held out; hold out fewer, or give '
        'more training records'
      )
    return train if keep.all() else select(train, np.flatnonzero(keep))
  hashes = set(held_out.hashes.tolist())

  def read(numbers) -> list[dict]:
    rows = train.read(numbers)
    for place, number in enumerate(numbers):
      attempt = 0
      while hash_record(rows[place]) in hashes:
        attempt += 1
        if attempt > ATTEMPTS:
          raise ValueError(
            f'{train.name} makes hardly a prompt that is not held out; let it '
            'make more different ones, or hold out fewer'
          )
        (rows[place],) = train.read([redrawn_index(int(number), attempt)])
    return rows

  return dataclasses.replace(train, read=read)


def last_prompts(records: Records, count: int) -> Records:
  """Different prompts from the end, a fifth of all at most."""
  n = len(records)
  last = n - 1 - first_places(records.hashes[::-1])  # descending
  count = min(count, len(last) // 5)
  if not count:
    raise ValueError(
      f'{records.name} has {len(last)} different prompts; give 5 or more, so '
      'that some can be held out'
    )
  return select(records, np.sort(last[:count]))


def generated_prompts(records: Records, count: int) -> Records:
  """Different prompts of an index range of their own, a fifth of all at most.

  A source of five times as many different prompts repeats itself seldom. One
  that repeats itself more often has few, which are then counted by 20 draws
  for each that is wanted.
  """
  found = {}  # {hash: (number, record)}
  drawn, draws = 0, max(100, count + count // 10 + 4)
  seldom = max(count, 5 * count * (1 - math.exp(-draws / (5 * count))))
  while drawn < draws:
    number = HELD_OUT_START + drawn % RANGE
    (record,) = records.read([number])
    found.setdefault(hash_record(record), (number, record))
    drawn += 1
    if drawn == draws and len(found) < seldom:
      draws, seldom = 20 * count + 100, 0
  if not seldom:
    count = min(count, len(found) // 5)
  if not count:
    raise ValueError(
      f'{records.name} makes {len(found)} different prompts; let it make 5 or '
      'more, so that some can be held out'
    )
  hashes = list(found)[:count]
  numbers, rows = zip(*(found[key] for key in hashes))
  return Records(
    records.name,
    lambda wanted: [rows[i] for i in wanted],
    lambda i: records.where(numbers[i]),
    np.array(hashes, np.uint64),
    np.array([text_bytes(row['prompt']) for row in rows], np.int32),
  )


def split(
  records, held_out, seed: int = 0, columns: dict[str, str] | None = None
) -> Split:
  """Training and held-out records of sources, or of Records.

  `held_out` is a number or a source. A number takes so many different prompts
  from the end; where the source is endless, from an index range of its own. A
  source is deduplicated. Either way, no training record has a prompt that is
  held out: it is removed, or, where the source is endless, drawn again at
  another index. seed and columns: see open_records.
  """
  records = open_records(records, seed, columns)
  repeated = taken = 0
  if not isinstance(held_out, Integral):
    held_out = open_records(held_out, seed, columns)
    if held_out.num_records is None:
      raise ValueError(
        f'{held_out.name} is endless and cannot be held out as a whole; give a '
        'number of records to hold out'
      )
    places = first_places(held_out.hashes)
    repeated = len(held_out) - len(places)
    held = select(held_out, places) if repeated else held_out
  elif held_out < 1:
    raise ValueError(f'{held_out} records held out; hold out 1 or more')
  elif records.num_records is None:
    held = generated_prompts(records, held_out)
  else:
    held = last_prompts(records, held_out)
    taken = len(held)
  train = without(records, held)
  n = train.num_records
  counts = {
    'train': n,
    'held_out': len(held),
    'repeated': repeated,
    'removed': 0 if n is None else len(records) - n - taken,
  }
  return Split(train, held, counts)
