"""Rewards and metrics of plain text, for any task that writes prose.

  sentiment()       reward: VADER's compound score, sad -1 to happy 1
  no_repetition     reward: share of word pairs that are not said again
  distinct          metric: distinct 1-, 2-, 3-grams over all completions
  perplexity        metric: under the starting policy

A word is a run of letters, with their combining marks, digits and apostrophes,
in lower case. Texts that Unicode calls canonically equal have equal words.
"""

import functools
import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Sequence

from jaxrl_tok.rewards.adapters import get_text
from jaxrl_tok.rewards.build import need

# --- characters and words

# planes that have marks and characters that are not seen
PLANES = range(0x20000), range(0xE0000, 0xE1000)
# characters that are not seen, beside those of the category Cf: fillers, the
# grapheme joiner, variation selectors
UNSEEN = '\u034f\u115f\u1160\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0'


@functools.cache
def characters_of(category: str) -> str:
  """Characters whose category in Unicode begins so, as the ranges of a class of
  a regular expression: M are combining marks, Cf is not seen (zero width, soft
  hyphens)."""
  codes = itertools.chain(*PLANES)
  runs = itertools.groupby(
    codes, lambda i: unicodedata.category(chr(i)).startswith(category)
  )
  found = (list(run) for there, run in runs if there)
  return ''.join(f'\\U{run[0]:08x}-\\U{run[-1]:08x}' for run in found)


@functools.cache
def unseen() -> re.Pattern:
  """Pattern of the characters that are not seen."""
  return re.compile(f'[{characters_of("Cf")}{UNSEEN}\U000e0100-\U000e01ef]+')


def is_unseen(c: str) -> bool:
  """Tells whether a character is not seen: see `seen`."""
  return not c.isascii() and unseen().fullmatch(c) is not None


def seen(text: str, form: str = 'NFC') -> str:
  """Text without the characters that are not seen, in a normal form of Unicode;
  NFKC writes full width, no-break spaces and ligatures plainly, too.

  # 's\\u200bo e\\u0301' -> 'so é'
  """
  if text.isascii():
    return text
  return unicodedata.normalize(form, unseen().sub('', text))


@functools.cache
def run_of(signs: str = '', marks: bool = True) -> str:
  """Regular expression of a run of letters, digits and `signs` (part of a
  class), that goes on over combining marks."""
  one = f'(?:[^\\W_]|[{signs}])' if signs else r'[^\W_]'
  return f'{one}(?:{one}|[{characters_of("M")}])*' if marks else f'{one}+'


@functools.cache
def word_pattern(marks: bool) -> re.Pattern:
  """Pattern of words, with apostrophes inside."""
  run = run_of(marks=marks)
  return re.compile(f"{run}(?:['’]{run})*")


def words_of(text: str) -> list[str]:
  """Words of a text, in lower case."""
  # marks are looked for where they can be: it takes time
  return word_pattern(not text.isascii()).findall(seen(text).lower())


def ngrams(words: Sequence, n: int) -> list[tuple]:
  """Runs of n words, each of words[i:i + n]."""
  return list(zip(*(words[i:] for i in range(n))))


def sentiment() -> Callable:
  """Reward: VADER's compound score of a completion, -1 (sad) to 1 (happy).

    s / sqrt(s^2 + 15),  s the sum of the words' valences

  A lexicon and rules, offline; Hutto and Gilbert, ICWSM 2014. The package is
  vaderSentiment, in the extra [rewards]. Raises ValueError where it is missing.
  """
  module = need('vaderSentiment.vaderSentiment', 'vaderSentiment')
  score = module.SentimentIntensityAnalyzer().polarity_scores

  def sentiment(completions, **columns) -> list[float]:
    return [score(get_text(c))['compound'] for c in completions]

  return sentiment


def no_repetition(completions, **columns) -> list[float]:
  """Reward: share of a completion's word pairs that it says for the first time,
  0 to 1; 1 for a single word, 0 for none.

  # 'so happy and so happy': 3 of 4 pairs are new -> 0.75
  """
  found = []
  for completion in completions:
    words = words_of(get_text(completion))
    pairs = ngrams(words, 2)
    found.append(len(set(pairs)) / len(pairs) if pairs else float(len(words)))
  return found


def distinct(completions, **columns) -> dict[str, float]:
  """Metric: share of the n-grams of all completions together that are
  different, distinct_1, distinct_2, distinct_3; arXiv:1510.03055.

  It falls where completions become alike, though none repeats itself. Compare
  it between equal numbers of completions only.
  """
  texts = [words_of(get_text(c)) for c in completions]
  found = {}
  for n in (1, 2, 3):
    grams = list(itertools.chain(*(ngrams(words, n) for words in texts)))
    found[f'distinct_{n}'] = len(set(grams)) / max(len(grams), 1)
  return found


def perplexity(ref_logps, **columns) -> float:
  """Metric: perplexity of the completions under the starting policy, exp of the
  mean negative log-prob of their tokens, at the sampling temperature.

  Text that the pretrained model finds strange is high; text that it would
  repeat for ever is low: a policy that hacks its reward may move it either way.
  """
  rows, compute = surprise(ref_logps)
  sums = [sum(column) for column in zip(*rows)] or [0.0, 0]
  return compute(sums)['perplexity']


def surprise(ref_logps) -> tuple:
  """Statistics of perplexity: (sum of log-probs, tokens) of each completion,
  and the metric of their sums."""

  def compute(sums) -> dict[str, float]:
    mean = -sums[0] / max(sums[1], 1)
    return {'perplexity': math.exp(mean) if mean < 700 else math.inf}

  return [[math.fsum(row), len(row)] for row in ref_logps], compute


perplexity.statistics = surprise
