"""Order of records, a pure function of (seed, position).

1. Positions count prompts from the start of a run; position // n is the epoch.
2. Every epoch of n records is its own bijection of range(n), keyed by (seed,
   epoch): the swap-or-not shuffle of Hoang, Morris and Rogaway (2012). It costs
   O(1) a record and no array of n.
3. Endless records are read in order: the index is the position.
"""

import numpy as np

ROUNDS = 24  # a record's place is uniform up to 2^-24
WEYL = np.uint64(0x9E3779B97F4A7C15)
MIX_A = np.uint64(0xBF58476D1CE4E5B9)
MIX_B = np.uint64(0x94D049BB133111EB)
ONE, HALF, TOP = np.uint64(1), np.uint64(32), np.uint64(63)
# index ranges of an endless function: training from 0, then these. All are
# below 2^31, which every random generator takes as a seed.
HELD_OUT_START = 2**30
REDRAWN_START = 2**30 + 2**29
RANGE = 2**29
ATTEMPTS = 64  # at an endless record that cannot be used


def mix(z: np.ndarray) -> np.ndarray:
  """splitmix64's finalizer: uint64 -> uint64, a bijection."""
  z = (z ^ (z >> np.uint64(30))) * MIX_A
  z = (z ^ (z >> np.uint64(27))) * MIX_B
  return z ^ (z >> np.uint64(31))


def fold(*numbers: int) -> np.ndarray:
  """One key of integers of any size, uint64 [1]."""
  key = np.zeros(1, np.uint64)
  for number in numbers:
    number = 2 * number if number >= 0 else -2 * number - 1
    while True:
      word, number = number % 2**64, number >> 64
      key = mix((key ^ np.uint64(word)) + WEYL)
      if not number:
        break
  return key


def record_indices(
  n: int | None, seed: int, position: int, count: int
) -> np.ndarray:
  """Numbers of the records at positions position .. position + count - 1,
  int64 [count]. n None: endless.

  Each of R rounds pairs x with (shift - x) mod n and swaps both or neither, by
  a bit that the two share: a bijection, whatever the shift and the bits are.
  """
  if position < 0 or count < 0:
    raise ValueError(f'position {position} and count {count} must be 0 or more')
  if n is None:
    return np.arange(position, position + count)
  if n < 1:
    raise ValueError('no records to order; give 1 or more')
  size = np.uint64(n)
  epoch, x = np.divmod(
    np.arange(position, position + count, dtype=np.uint64), size
  )
  epochs = np.arange(position // n, (position + count) // n + 1).astype(
    np.uint64
  )
  which = (epoch - epochs[0]).astype(np.int64)
  steps = np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None] * WEYL
  key_RxE = mix(mix((fold(seed) ^ epochs) + WEYL) + steps)
  for key_E, shift_E in zip(key_RxE, key_RxE % size):
    key, shift = key_E[which], shift_E[which]
    partner = shift + np.where(x > shift, size, 0) - x  # (shift - x) mod n
    bit = (np.maximum(x, partner) ^ key) * MIX_A
    bit = ((bit ^ (bit >> HALF)) * MIX_B) >> TOP
    x = np.where(bit == ONE, partner, x)
  return x.astype(np.int64)


def record_index(n: int | None, seed: int, position: int) -> int:
  """Number of the record at a position."""
  return int(record_indices(n, seed, position, 1)[0])


def redrawn_index(index: int, attempt: int) -> int:
  """Index that stands in for one whose record cannot be used."""
  word = int(fold(index, attempt)[0])
  return REDRAWN_START + word % RANGE
