"""METEOR without synonyms: a reward of words in common with a reference."""

import functools
import itertools
from collections.abc import Callable

from jaxrl_tok.rewards.build import best_of, need, reward_of_text
from jaxrl_tok.rewards.text import words_of


def align(a: list, b: list) -> list[tuple[int, int]]:
  """Pairs (i, j) of equal words a[i] == b[j], each word in one pair at most, as
  many as there can be: again and again the longest run of words that both
  have, the first one of several."""
  free_a, free_b, pairs = set(range(len(a))), set(range(len(b))), []
  while runs := _longest_runs(a, b, free_a, free_b):
    for i, j, n in runs:
      own, other = set(range(i, i + n)), set(range(j, j + n))
      if own <= free_a and other <= free_b:  # not taken by a run before it
        pairs += zip(range(i, i + n), range(j, j + n))
        free_a, free_b = free_a - own, free_b - other
  return sorted(pairs)


def _longest_runs(a: list, b: list, free_a: set, free_b: set) -> list:
  """Longest runs (i, j, n), a[i:i + n] == b[j:j + n], of free words, in
  order."""
  places = {}
  for j in sorted(free_b):
    places.setdefault(b[j], []).append(j)
  before, most, found = {}, 1, []  # before: {j: length of the run to a[i - 1]}
  for i in range(len(a)):
    now = {}
    for j in places.get(a[i], ()) if i in free_a else ():
      n = now[j] = before.get(j - 1, 0) + 1
      most, found = max(n, most), found if n <= most else []
      if n == most:
        found.append((i - n + 1, j - n + 1, n))
    before = now
  return found


def meteor_without_synonyms(
  column: str = 'reference',
  alpha: float = 0.9,
  beta: float = 3.0,
  gamma: float = 0.5,
) -> Callable:
  """Reward: METEOR of equal stems, 0 to 1; Banerjee and Lavie, ACL 2005. Best
  reference of several.

    P R / (alpha P + (1 - alpha) R) (1 - gamma (chunks / matches)^beta)

  Words match where their stems are equal (Porter, English), in lower case; see
  `align` for which ones. A chunk is a run of matches that is one in both texts.
  Synonyms do not match: numbers are lower than those of METEOR with WordNet,
  and not to be compared with them. Recall counts nine times as much as
  precision, so that long texts gain: combine it with `length`.
  """
  porter = need('nltk.stem.porter', 'nltk').PorterStemmer()
  stem = functools.lru_cache(1 << 16)(porter.stem)

  def score(text: str, reference: str) -> float:
    a, b = ([stem(w) for w in words_of(t)] for t in (text, reference))
    pairs = align(a, b)
    if not pairs:
      return 0.0
    m = len(pairs)
    steps = ((i - k, j - l) for (k, l), (i, j) in itertools.pairwise(pairs))
    chunks = 1 + sum(step != (1, 1) for step in steps)
    p, r = m / len(a), m / len(b)
    mean = p * r / (alpha * p + (1 - alpha) * r)
    return mean * (1 - gamma * (chunks / m) ** beta)

  return reward_of_text(
    'meteor_without_synonyms', best_of(score, column), column
  )
