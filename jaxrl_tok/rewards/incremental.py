"""Incremental metrics of text: what a longer text adds costs what is added.

1. A Splitter turns characters into symbols: words, or single characters.
2. A trie of the reference's symbols numbers them while they are being written.
3. A Metric is pushed one number after another: n-grams, common subsequence,
   edit distance, prefix, phrases. Its states are immutable, so that a word that
   is not complete yet is pushed on trial.

`phi` is the metric of the text read so far; `deltas_of` are its differences.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# --- from text to symbols ----------------------------------------------------

JOINS, ALONE, DIVIDES = range(3)  # kinds of characters
ROOT, DEAD = 0, -1  # nodes of a trie
UNKNOWN = -1  # number of a symbol that the reference does not have


class Splitter(NamedTuple):
  """Tokenization by character: what joins to words, is a symbol alone, or
  divides and is none."""

  kind: Callable  # character -> kind
  fold: Callable = str  # text -> text


def _word_kind(c: str) -> int:
  """Kind of letters, digits, _: JOINS; of spaces: DIVIDES; else ALONE."""
  if c.isalnum() or c == '_':
    return JOINS
  return DIVIDES if c.isspace() else ALONE


def _rouge_kind(c: str) -> int:
  return JOINS if c.isascii() and c.isalnum() else DIVIDES


def _keyword_kind(c: str) -> int:
  return JOINS if c.isalnum() or c == '_' else DIVIDES


def _visible_kind(c: str) -> int:
  return DIVIDES if c.isspace() else ALONE


WORDS = Splitter(functools.cache(_word_kind))  # words and punctuation marks
ROUGE_WORDS = Splitter(functools.cache(_rouge_kind), str.lower)
KEYWORDS = Splitter(functools.cache(_keyword_kind), str.casefold)
VISIBLE = Splitter(functools.cache(_visible_kind))  # all but spaces
CHARACTERS = Splitter(lambda c: ALONE)


def symbols_of(splitter: Splitter, text: str) -> list[str]:
  """Symbols of a text.

  # WORDS: 'the cat.' -> ['the', 'cat', '.']
  """
  found, joined = [], False
  for c in splitter.fold(text):
    kind = splitter.kind(c)
    if kind == JOINS and joined:
      found[-1] += c
    elif kind != DIVIDES:
      found.append(c)
    joined = kind == JOINS
  return found


class Metric(NamedTuple):
  """Metric that reads symbols, by their numbers; states are immutable."""

  start: Any
  push: Callable  # (state, number) -> state
  value: Callable  # state -> float


class Reader(NamedTuple):
  """Metric that reads text. A place is (state, node of the word that is being
  written, or None)."""

  splitter: Splitter
  metric: Metric
  children: dict  # {(node, character): node} of the reference's symbols
  numbers: dict  # {node: number}


def make_reader(
  splitter: Splitter, reference: Sequence[str], make: Callable
) -> Reader:
  """Reader of a metric; `make`: numbers of the reference's symbols ->
  Metric."""
  children, numbers, found = {}, {}, []
  for symbol in reference:
    node = ROOT
    for c in symbol:
      node = children.setdefault((node, c), len(children) + 1)
    found.append(numbers.setdefault(node, len(numbers)))
  return Reader(splitter, make(found), children, numbers)


def read(reader: Reader, place: tuple, text: str) -> tuple:
  """Place after a text that follows a place."""
  (state, node), (kind_of, fold) = place, reader.splitter
  push, step, number = (
    reader.metric.push,
    reader.children.get,
    reader.numbers.get,
  )
  for c in fold(text):
    kind = kind_of(c)
    if kind == JOINS:
      node = step((node or ROOT, c), DEAD)
      continue
    if node is not None:
      state, node = push(state, number(node, UNKNOWN)), None
    if kind == ALONE:
      state = push(state, number(step((ROOT, c), DEAD), UNKNOWN))
  return state, node


def phi(reader: Reader, place: tuple) -> float:
  """Potential of a place: the metric of its text, a word that is being written
  included."""
  state, node = place
  if node is not None:
    number = reader.numbers.get(node, UNKNOWN)
    state = reader.metric.push(state, number)
  return reader.metric.value(state)


def outcome_of(reader: Reader, text: str) -> float:
  """Metric of a whole text; 0 of none."""
  start = reader.metric.start, None
  return phi(reader, read(reader, start, text)) if text else 0.0


def deltas_of(reader: Reader, pieces: Sequence[str]) -> list[float]:
  """Differences of the potential, one for each piece of a text."""
  place, before, found = (reader.metric.start, None), 0.0, []
  for piece in pieces:
    now = before
    if piece:
      place = read(reader, place, piece)
      now = phi(reader, place)
    found.append(now - before)
    before = now
  return found


# --- metrics -----------------------------------------------------------------


class Matches(NamedTuple):
  """N-grams read so far; `used` has a bit for each one of the reference's that
  is matched already, so that a repeated n-gram counts as often as there."""

  length: int  # symbols
  recent: tuple  # numbers of the last order - 1 symbols
  used: int
  counts: tuple  # matches of each order


def _ngrams(reference: Sequence[int], order: int) -> tuple:
  """(start, push) of a metric whose states are Matches."""
  grams = Counter(
    tuple(reference[i : i + n])
    for n in range(1, order + 1)
    for i in range(len(reference) - n + 1)
  )
  slots, width = {}, 0
  for gram, count in grams.items():
    slots[gram] = ((1 << count) - 1) << width
    width += count

  def push(state: Matches, number: int) -> Matches:
    length, recent, used, counts = state
    last = (*recent, number)
    found = list(counts)
    for n in range(1, len(last) + 1):
      slot = slots.get(last[-n:])
      if slot is None:  # no longer n-gram of the reference ends here
        break
      free = slot & ~used
      used |= free & -free  # its lowest bit
      found[n - 1] += free > 0
    recent = last[1:] if len(last) == order else last
    return Matches(length + 1, recent, used, tuple(found))

  return Matches(0, (), 0, (0,) * order), push


def bleu_metric(reference: Sequence[int], order: int = 4) -> Metric:
  """Metric of `smoothed_bleu`."""
  start, push = _ngrams(reference, order)
  R = len(reference)

  def value(state: Matches) -> float:
    t = state.length
    if not t:
      return 0.0
    product = 1.0
    for n, matched in enumerate(state.counts):
      product *= (matched + 1) / (max(t - n, 0) + 1)
    return math.exp(min(0.0, 1 - R / t)) * product ** (1 / order)

  return Metric(start, push, value)


def chrf_metric(
  reference: Sequence[int], order: int = 6, beta: float = 2.0
) -> Metric:
  """Metric of `chrf`."""
  start, push = _ngrams(reference, order)
  R, weight = len(reference), beta**2

  def value(state: Matches) -> float:
    # orders that text and reference both have
    both = min(order, state.length, R)
    if not any(state.counts[:both]):
      return 0.0
    P = sum(state.counts[n] / (state.length - n) for n in range(both)) / both
    Q = sum(state.counts[n] / (R - n) for n in range(both)) / both
    return (1 + weight) * P * Q / (weight * P + Q)

  return Metric(start, push, value)


def _places(reference: Sequence[int]) -> dict:
  """Bits {number: places in the reference}."""
  found = {}
  for i, number in enumerate(reference):
    found[number] = found.get(number, 0) | 1 << i
  return found


def rouge_l_metric(reference: Sequence[int]) -> Metric:
  """Metric of `rouge_l`. A row of the table of common subsequences is an
  integer with a 0 where the row rises by one; Hyyrö, 2004."""
  R, places = len(reference), _places(reference)
  whole = (1 << R) - 1

  def push(state: tuple, number: int) -> tuple:
    row, length = state
    hits = row & places.get(number, 0)
    return (row + hits | row - hits) & whole, length + 1

  def value(state: tuple) -> float:
    row, length = state
    common = R - row.bit_count()
    if not common:
      return 0.0
    precision, recall = common / length, common / R
    return 2 * precision * recall / (precision + recall)

  return Metric((whole, 0), push, value)


def edit_metric(reference: Sequence[int]) -> Metric:
  """Metric of `edit_distance`. A row of the table of distances is two integers
  with a 1 where the row rises, and where it falls; Myers, 1999."""
  R, places = len(reference), _places(reference)
  whole, last = (1 << R) - 1, 1 << R - 1

  def push(state: tuple, number: int) -> tuple:
    rises, falls, distance = state
    equal = places.get(number, 0)
    down = equal | falls
    across = ((equal & rises) + rises ^ rises) | equal
    more = falls | whole & ~(across | rises)
    less = rises & across
    distance += bool(more & last) - bool(less & last)
    more, less = more << 1 | 1, less << 1
    return (less | ~(down | more)) & whole, more & down & whole, distance

  def value(state: tuple) -> float:
    return 1 - state[2] / R

  return Metric((whole, 0, R), push, value)


def prefix_metric(reference: Sequence[int]) -> Metric:
  """Metric of `exact_prefix`."""
  R = len(reference)

  def push(state: tuple, number: int) -> tuple:
    right, goes_on = state
    goes_on = goes_on and right < R and reference[right] == number
    return right + goes_on, goes_on

  return Metric((0, True), push, lambda state: state[0] / R)


def coverage_metric(phrases: Sequence[tuple]) -> Metric:
  """Metric of `keyword_coverage`; phrases, each the numbers of its words."""
  bits = {phrase: 1 << i for i, phrase in enumerate(phrases)}
  lengths = sorted({len(phrase) for phrase in phrases})

  def push(state: tuple, number: int) -> tuple:
    recent, found = state
    last = (*recent, number)[-lengths[-1] :]
    for n in lengths:
      found |= bits.get(last[-n:], 0)
    return last, found

  return Metric(
    ((), 0), push, lambda state: state[1].bit_count() / len(phrases)
  )
