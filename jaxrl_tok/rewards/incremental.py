"""Incremental metrics of text: what a longer text adds costs what is added.

1. A Splitter turns characters into symbols: words, or single characters. Words
   are read in Unicode's canonical decomposition, whose order of marks is kept
   while they come, so that equal texts are equal in any pieces.
2. A trie of the reference's symbols numbers them while they are being written.
3. A Metric is pushed one number after another: n-grams, common subsequence,
   edit distance, prefix, phrases. Its states are immutable, so that a word that
   is not complete yet is pushed on trial.

`phi` is the metric of the text read so far; `deltas_of` are its differences.
"""

import functools
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxrl_tok.rewards.text import is_unseen

# --- from text to symbols ----------------------------------------------------

# kinds of characters
JOINS = 0  # goes on with a word, or begins one
MARK = 1  # goes on with the word or the sign before it, if any
SIGN = 2  # a symbol that marks alone go on with
ALONE = 3  # a symbol
DIVIDES = 4
UNSEEN = 5  # as if it were not there
ROOT, DEAD = 0, -1  # nodes of a trie
UNKNOWN = -1  # number of a symbol that the reference does not have
MARKS = (
  30  # in a row, whose order is kept; Unicode's stream-safe text has fewer
)


class Splitter(NamedTuple):
  """Tokenization by character; `fold` is text -> text, character by
  character."""

  kind: Callable  # character -> kind
  fold: Callable = str


def _word_kind(c: str, others: int = SIGN) -> int:
  """Kind of letters, digits and _: JOINS; of combining marks: MARK; of spaces:
  DIVIDES; else `others`."""
  if is_unseen(c):
    return UNSEEN
  if c.isalnum() or c == '_':
    return JOINS
  if unicodedata.category(c)[0] == 'M':
    return MARK
  return DIVIDES if c.isspace() else others


def _rouge_kind(c: str) -> int:
  return JOINS if c.isascii() and c.isalnum() else DIVIDES


def _visible_kind(c: str) -> int:
  return DIVIDES if c.isspace() else ALONE


@functools.cache
def _parts(c: str) -> str:
  return unicodedata.normalize('NFD', c)


@functools.cache
def _caseless_parts(c: str) -> str:
  return unicodedata.normalize('NFD', _parts(c).casefold())


def decomposed(text: str) -> str:
  """Text whose characters are decomposed, each by itself."""
  return text if text.isascii() else ''.join(map(_parts, text))


def caseless(text: str) -> str:
  """`decomposed` text whose case is folded."""
  return text.lower() if text.isascii() else ''.join(map(_caseless_parts, text))


# words, and signs
WORDS = Splitter(functools.cache(_word_kind), decomposed)
ROUGE_WORDS = Splitter(functools.cache(_rouge_kind), str.lower)
KEYWORDS = Splitter(functools.cache(lambda c: _word_kind(c, DIVIDES)), caseless)
VISIBLE = Splitter(functools.cache(_visible_kind))  # all but spaces
CHARACTERS = Splitter(lambda c: ALONE)


def ordered(marks: str, mark: str) -> tuple[str, str]:
  """(marks that stay in their place, marks that others may still come before)
  of a run of marks and the next one, in Unicode's canonical order."""
  order = unicodedata.combining(mark)
  if not order:
    return marks + mark, ''
  if len(marks) == MARKS:
    return marks, mark
  at = sum(unicodedata.combining(m) <= order for m in marks)
  return '', marks[:at] + mark + marks[at:]


def symbols_of(splitter: Splitter, text: str) -> list[str]:
  """Symbols of a text.

  # WORDS: 'the cat.' -> ['the', 'cat', '.']
  """
  found, marks, joins, is_open = [], '', False, False
  for c in splitter.fold(text):
    kind = splitter.kind(c)
    if kind in (MARK, UNSEEN):
      if kind == MARK and is_open:
        settled, marks = ordered(marks, c)
        found[-1] += settled
      continue
    if marks:
      found[-1] += marks
    if kind == JOINS and joins:
      found[-1] += c
    elif kind != DIVIDES:
      found.append(c)
    marks, joins, is_open = '', kind == JOINS, kind in (JOINS, SIGN)
  if marks:
    found[-1] += marks
  return found


class Metric(NamedTuple):
  """Metric that reads symbols, by their numbers; states are immutable."""

  start: Any
  push: Callable  # (state, number) -> state
  value: Callable  # state -> float


class Reader(NamedTuple):
  """Metric that reads text."""

  splitter: Splitter
  metric: Metric
  children: dict  # {(node, character): node} of the reference's symbols
  numbers: dict  # {node: number}


class Place(NamedTuple):
  """Place in a text: what is read before it, and the symbol that is being
  written."""

  state: Any
  node: int | None = None  # of the symbol, without `marks`; None: there is none
  marks: str = ''  # at its end, that others may still come before
  joins: bool = False  # it is a word, which letters go on with


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


def walk(reader: Reader, node: int, text: str) -> int:
  """Node after characters that follow a node."""
  for c in text:
    node = reader.children.get((node, c), DEAD)
  return node


def read(reader: Reader, place: Place, text: str) -> Place:
  """Place after a text that follows a place."""
  (state, node, marks, joins), (kind_of, fold) = place, reader.splitter
  push, step, number = (
    reader.metric.push,
    reader.children.get,
    reader.numbers.get,
  )
  for c in fold(text):
    kind = kind_of(c)
    if kind == JOINS and joins:
      if marks:
        node, marks = walk(reader, node, marks), ''
      node = step((node, c), DEAD)
      continue
    if kind in (MARK, UNSEEN):
      if kind == MARK and node is not None:
        settled, marks = ordered(marks, c)
        node = walk(reader, node, settled)
      continue
    if node is not None:
      state = push(state, number(walk(reader, node, marks), UNKNOWN))
      node, marks, joins = None, '', False
    if kind == DIVIDES:
      continue
    first = step((ROOT, c), DEAD)
    if kind == ALONE:
      state = push(state, number(first, UNKNOWN))
    else:
      node, joins = first, kind == JOINS
  return Place(state, node, marks, joins)


def phi(reader: Reader, place: Place) -> float:
  """Potential of a place: the metric of its text, a symbol that is being
  written included."""
  state = place.state
  if place.node is not None:
    node = walk(reader, place.node, place.marks)
    state = reader.metric.push(state, reader.numbers.get(node, UNKNOWN))
  return reader.metric.value(state)


def outcome_of(reader: Reader, text: str) -> float:
  """Metric of a whole text; 0 of none."""
  start = Place(reader.metric.start)
  return phi(reader, read(reader, start, text)) if text else 0.0


def deltas_of(reader: Reader, pieces: Sequence[str]) -> list[float]:
  """Differences of the potential, one for each piece of a text."""
  place, before, found = Place(reader.metric.start), 0.0, []
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
