"""Record of an evaluation: from its rows, one a completion, to numbers with
intervals, in training and in experiments.evaluate alike.

A row has `index` (its prompt's place in the data), `completion`, `reward` (None
where none applies), `components`, `length`, `ended`, and `metrics`, those that
have a number for each completion.

  estimates     {name: Estimate}: means, pass@k and maj@k
  slices        alike, by the values of a column
  comparison    of two models on the same prompts
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxrl_tok.report.statistics import (
  Difference,
  Estimate,
  by_prompt,
  difference,
  intervals,
  maj_at_k,
  pass_at_k,
  win_rate,
)

REWARD = 'reward', 'reward_low', 'reward_high'  # mean and its interval
OWN_METRICS = ('reward', 'mean_length', 'clipped_ratio')
MOST_VALUES, PARTS = 24, 4  # of a column; of numbers that have more


class Table(NamedTuple):
  """Values by prompt: sums and counts [m, n] of m names."""

  names: list[str]
  sums: np.ndarray
  counts: np.ndarray

  def of(self, name: str) -> tuple:
    """(sums, counts) [n] of a name."""
    i = self.names.index(name)
    return self.sums[i], self.counts[i]


def as_floats(values: Sequence) -> np.ndarray:
  """Numbers, NaN in place of None."""
  return np.array([np.nan if v is None else v for v in values], float)


def finite(name: str, values: Sequence) -> np.ndarray:
  """Numbers of a metric, NaN in place of None. Raises ValueError for numbers
  that are not finite, which would be left out as if there were none."""
  wrong = [v for v in values if v is not None and not math.isfinite(v)]
  if wrong:
    raise ValueError(
      f'the metric {name} gives {wrong[0]} for a completion; give a finite '
      'number, or None where there is none'
    )
  return as_floats(values)


def columns(rows: list[dict]) -> dict[str, np.ndarray]:
  """Values [rows] by name, NaN where there is none. Raises ValueError for a
  number that is not finite."""
  found = {
    'reward': finite('reward', [r['reward'] for r in rows]),
    'mean_length': as_floats([r['length'] for r in rows]),
    'clipped_ratio': as_floats([not r['ended'] for r in rows]),
  }
  parts = dict.fromkeys(k for r in rows for k in r.get('components', ()))
  for name in parts if len(parts) > 1 else ():  # one is the reward
    values = [r['components'].get(name) for r in rows]
    found[f'rewards/{name}/mean'] = finite(name, values)
  for name in dict.fromkeys(k for r in rows for k in r.get('metrics', ())):
    found[name] = finite(name, [r['metrics'].get(name) for r in rows])
  return found


def said(completion) -> str:
  """Text that completions vote for, in maj@k."""
  text = completion
  if isinstance(completion, list):
    text = completion[-1].get('content') if completion else ''
  return ' '.join(str(text).split())


def numbers_of_samples(samples: int) -> list[int]:
  """Numbers k of pass@k: powers of two above 1, and all samples."""
  powers = [2**i for i in range(1, samples.bit_length()) if 2**i < samples]
  return [*powers, samples] if samples > 1 else []


def votes(rows: list[dict], vote: Callable) -> tuple[list, list]:
  """(completions that gave each answer, its mean reward) of a prompt's rows."""
  answers = {}
  for row in rows:
    answers.setdefault(vote(row['completion']), []).append(row['reward'])
  return [len(v) for v in answers.values()], [
    sum(v) / len(v) for v in answers.values()
  ]


def several(rows: list[dict], n: int, vote: Callable) -> dict[str, np.ndarray]:
  """Values [n] by prompt of pass_at_K and maj_at_K, NaN where a prompt has
  fewer rewards; {} of one sample a prompt, and where a reward is neither 0 nor
  1."""
  groups = [[] for _ in range(n)]
  for row in rows:
    if row['reward'] is not None:
      if row['reward'] not in (0, 1):
        return {}
      groups[row['index']].append(row)
  found = {}
  for k in numbers_of_samples(max(map(len, groups), default=0)):
    passed, voted = np.full((2, n), np.nan)
    for i, group in enumerate(groups):
      if len(group) >= k:
        right = round(sum(r['reward'] for r in group))
        passed[i] = pass_at_k(len(group), right, k)
        voted[i] = maj_at_k(*votes(group, vote), k)
    found[f'pass_at_{k}'] = passed
    if k > 2:  # of two, either wins: the mean
      found[f'maj_at_{k}'] = voted
  return found


def tabulate(rows: list[dict], vote: Callable = said) -> Table:
  """Values by prompt of all names."""
  prompt = np.array([r['index'] for r in rows], int)
  n = int(prompt.max()) + 1
  found = {k: by_prompt(v, prompt, n) for k, v in columns(rows).items()}
  for name, values in several(rows, n, vote).items():
    found[name] = np.nan_to_num(values), np.isfinite(values).astype(int)
  sums, counts = zip(*found.values())
  return Table(list(found), np.stack(sums), np.stack(counts))


def estimates(
  rows: list[dict], vote: Callable = said, seed: int = 0
) -> dict[str, Estimate]:
  """Estimates by name: 'reward', 'rewards/NAME/mean' of several rewards,
  'mean_length', 'clipped_ratio', metrics of each completion, and of several
  samples whose rewards are 0 or 1 'pass_at_K' and 'maj_at_K'."""
  table = tabulate(rows, vote)
  return dict(zip(table.names, intervals(table.sums, table.counts, seed)))


# --- slices


NONE = 'none'  # slice of None and NaN


def slice_names(values: Sequence, column: str) -> list[str]:
  """Name of each value's slice: the value, or one of PARTS ranges where they
  are numbers and many. None and NaN are a slice of their own, NONE, and so is
  each infinity. Raises ValueError for many texts."""
  names = [NONE if v is None or v != v else str(v) for v in values]
  if len(set(names)) <= MOST_VALUES:
    return names
  try:
    numbers = np.array(values, float)
  except (TypeError, ValueError, OverflowError):
    raise ValueError(
      f'--slice {column} has more than {MOST_VALUES} different values; name a '
      'column of few values, or of numbers'
    ) from None
  finite = np.isfinite(numbers)
  if not finite.any():
    return names
  edges = np.quantile(numbers[finite], np.linspace(0, 1, PARTS + 1))
  part = np.searchsorted(edges[1:-1], numbers, side='right')
  ends = edge_names(edges.tolist())
  return [
    f'{ends[i]} to {ends[i + 1]}' if is_finite else name
    for i, is_finite, name in zip(part, finite, names)
  ]


def edge_names(edges: list[float]) -> list[str]:
  """Names of numbers, of 6 digits or as many more as tell them apart."""
  for digits in range(6, 18):
    names = [f'{edge:.{digits}g}' for edge in edges]
    if len(set(names)) == len(set(edges)):
      break
  return names


def slice_order(name: str) -> tuple:
  """Key that puts slices of numbers first, from low to high."""
  try:
    first = float(name.split(' to ')[0])
  except ValueError:
    first = math.nan
  return (1, 0.0, name) if math.isnan(first) else (0, first, name)


def slices(
  rows: list[dict], names: Sequence[str], vote: Callable = said
) -> dict[str, dict[str, Estimate]]:
  """Estimates of each slice, {slice: {name: Estimate}}; names: slice of each
  prompt."""
  order = sorted(set(names), key=slice_order)
  return {
    name: estimates([r for r in rows if names[r['index']] == name], vote)
    for name in order
  }


# --- two models


class Comparison(NamedTuple):
  """Two models on the same prompts."""

  differences: dict[str, Difference]  # first minus second
  wins: Difference  # win rate of the first, by reward


def comparison(
  first: list[dict], second: list[dict], vote: Callable = said, seed: int = 0
) -> Comparison:
  """Compares the rows of two models, prompt by prompt. Raises ValueError for
  unlike numbers of prompts."""
  tables = [tabulate(rows, vote) for rows in (first, second)]
  sizes = [t.sums.shape[1] for t in tables]
  if sizes[0] != sizes[1]:
    raise ValueError(
      f'the two models were evaluated on {sizes[0]:,} and {sizes[1]:,} '
      'prompts; compare evaluations of the same prompts'
    )
  names = [k for k in tables[0].names if k in tables[1].names]
  rewards = [columns(rows)['reward'] for rows in (first, second)]
  prompts = [
    np.array([r['index'] for r in rows], int) for rows in (first, second)
  ]
  n = sizes[0]
  return Comparison(
    {k: difference(*(t.of(k) for t in tables), seed) for k in names},
    win_rate(*rewards, tuple(prompts), n, seed),
  )
