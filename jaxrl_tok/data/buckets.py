"""Buckets: the few prompt lengths P that batches are padded to, chosen by what
they cost on average."""

import numpy as np

MAX_BUCKETS = 3
# a further bucket is a further program: it must save this much of the mean P
SAVED_SHARE, SAVED_TOKENS = 0.1, 8
# probabilities that a batch fits, at which a bucket may end
LEVELS = np.concatenate(
  [np.linspace(0.02, 0.98, 49), 1 - np.logspace(-2, -7, 16), [1.0]]
)


def last_endless(length: np.ndarray, limit: int | None) -> int | None:
  """Last bucket of endless records: the limit, else twice the longest of the
  sample. A length that one in a hundred shares is taken for the longest."""
  if limit is not None or np.mean(length == length.max()) > 0.01:
    return limit
  return 2 * int(length.max())


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
