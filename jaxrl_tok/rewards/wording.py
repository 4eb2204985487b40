"""Rewards of the words of a text: which it says, and how long they are.

keywords      share of the words to be said
no_copy       share that the prompt does not say
readability   Flesch reading ease
length        nearness to a range of lengths
overlong      DAPO's penalty of long completions, -1 to 0
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable

from jaxrl_tok.rewards.adapters import get_text
from jaxrl_tok.rewards.build import (
  as_texts,
  named,
  prompt_text,
  reward_of_text,
)
from jaxrl_tok.rewards.text import ngrams, words_of


def keywords(column: str = 'keywords') -> Callable:
  """Reward: share of the keywords that a completion says, 0 to 1.

  A keyword is one word or several in a row; capitals do not matter, and endings
  do. A list of the keywords with nothing between them scores 1: combine it with
  `grammar`, a language model's log-prob or `length`.

  `potentials.keyword_coverage` pays it token by token; its words end at
  apostrophes.

  Args:
    column: column of the data with the list of keywords.
  """

  def score(text: str, value) -> float | None:
    wanted = [tuple(words_of(k)) for k in as_texts(value, column)]
    wanted = [k for k in wanted if k]
    words = words_of(text)
    said = {n: set(ngrams(words, n)) for n in {len(k) for k in wanted}}
    found = [k in said[len(k)] for k in wanted]
    return sum(found) / len(found) if found else None

  return reward_of_text('keywords', score, column)


def no_copy(n: int = 4, column: str = 'prompts') -> Callable:
  """Reward: share of a completion's n-grams of words that the prompt does not
  say, 0 to 1; 1 for a completion of fewer than n words.

  Every n-th word exchanged is enough to hide a copy; small n punishes what the
  subject needs.

  Args:
    n: words in a row that are a copy.
    column: text that may not be copied: the prompts, or a column of the data.
  """
  if n < 1:
    raise ValueError(f'no_copy of {n} words in a row; pass n=1 or more')

  def score(text: str, source) -> float:
    if column != 'prompts':
      source = '\n'.join(as_texts(source, column))
    taken = set(ngrams(words_of(prompt_text(source)), n))
    found = Counter(ngrams(words_of(text), n))
    copied = sum(count for gram, count in found.items() if gram in taken)
    return 1 - copied / max(found.total(), 1)

  return reward_of_text('no_copy', score, column)


# --- readability

# groups of vowels that are said as one: in ia, io, iu and before -ing there
# are two, and -sm has one of its own
VOWELS = re.compile(
  r'(?<![tscxg])i(?=[aou]) | [aeouy](?=ing) | [aeiouy]+ | sm$', re.VERBOSE
)
# e that is written and not said: at the end, before -s and -d, and before an
# ending; but -le is a syllable after a consonant, as is -es after a hiss
SILENT = re.compile(
  r"""(?: (?<![aeiouyl]) | (?<=[aeiouyl]l) ) e$
  | (?: (?<![aeiouyscxzgl]) | (?<=[aeiouyl]l) ) es$
  | (?: (?<![aeiouytdl]) | (?<=[aeiouyl]l) ) ed$
  | e (?= (?: ly | ness | ment | less | ful ) $ )""",
  re.VERBOSE,
)


def syllables(word: str) -> int:
  """Syllables of an English word by its letters: groups of vowels, without a
  silent e; 1 at least. Right for 91 % of the words of the CMU dictionary."""
  plain = unicodedata.normalize('NFKD', word.lower())
  plain = re.sub('[^a-z]', '', plain)
  return max(1, len(VOWELS.findall(SILENT.sub('', plain))))


# stops before a space, or at the end
STOP = re.compile(r'(?<![.!?…])[.!?…]++(?=\s|$)')


def flesch(text: str) -> float | None:
  """Flesch reading ease of an English text, None without words; J. Appl.
  Psychol. 32, 1948.

    206.835 - 1.015 words / sentences - 84.6 syllables / words

  100 is for a child of ten, 60 plain English, 30 and less a scholarly text; 121
  is the most, and there is no least value. Syllables are those of `syllables`.
  """
  words = words_of(text)
  if not words:
    return None
  sentences = [s for s in STOP.split(text) if words_of(s)]
  spoken = sum(map(syllables, words))
  length = len(words) / len(sentences)
  return 206.835 - 1.015 * length - 84.6 * spoken / len(words)


def readability(ease: float = 100.0, width: float = 100.0) -> Callable:
  """Reward: nearness of a completion's Flesch reading ease to `ease`, 0 to 1; 0
  without words.

    max(0, 1 - |flesch - ease| / width)

  It counts letters and stops: words of one syllable and many full stops are
  easy whatever they say.

  Args:
    ease: the wanted reading ease, see `flesch`.
    width: difference from it that is worth nothing.
  """
  if not width > 0:
    raise ValueError(f'readability of width {width}; pass a number above 0')

  def score(text: str) -> float:
    found = flesch(text)
    return 0.0 if found is None else max(0.0, 1 - abs(found - ease) / width)

  return reward_of_text('readability', score)


# --- length

UNITS = {
  'words': lambda text, ids: len(words_of(text)),
  'characters': lambda text, ids: len(text),
  'tokens': lambda text, ids: len(ids),
}


def length(
  least: int, most: int | None = None, unit: str = 'words'
) -> Callable:
  """Reward: 1 for a length n from `least` to `most`, less outside, 0 to 1.

    min(1, n / least, max(0, 2 - n / most))

  It falls to 0 at n = 0 and at twice `most`. It says nothing of what the words
  are: combine it with `no_repetition`.

  Args:
    least, most: the range; None: no upper end.
    unit: 'words', 'characters' or 'tokens' (the end token counts).
  """
  top = math.inf if most is None else most
  if unit not in UNITS:
    raise ValueError(f'{unit} is no unit of length; pass {", ".join(UNITS)}')
  if not 0 <= least <= top or top <= 0:
    raise ValueError(
      f'length from {least} to {most}; pass least <= most, most above 0'
    )
  count = UNITS[unit]

  def reward(completions, completion_ids) -> list[float]:
    sizes = map(count, map(get_text, completions), completion_ids)
    return [
      min(1.0, n / least if least else 1.0, max(0.0, 2 - n / top))
      for n in sizes
    ]

  return named(reward, 'length', ['completions', 'completion_ids'])


def overlong(most: int, margin: int) -> Callable:
  """Reward: DAPO's soft penalty of long completions, -1 to 0 by the number n of
  tokens; arXiv:2503.14476, eq. 13.

    0 for n <= most - margin;  (most - margin - n) / margin up to n = most;
    -1 beyond

  Args:
    most: tokens of a completion at most.
    margin: tokens before it over which the penalty grows.
  """
  if not 0 < margin <= most:
    raise ValueError(
      f'overlong of {most} tokens with a margin of {margin}; pass a margin '
      'above 0, at most as large'
    )

  def reward(completion_ids) -> list[float]:
    return [
      -min(1.0, max(0.0, (len(ids) - most + margin) / margin))
      for ids in completion_ids
    ]

  return named(reward, 'overlong', ['completion_ids'])
