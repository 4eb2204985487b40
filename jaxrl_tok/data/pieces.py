"""Pieces: the text that each token adds to a decoded completion.

words.py knows the bytes that every token adds. A row's bytes become characters
once, from left to right, so that the work is linear in its tokens:

1. A character goes to the token with its last byte; a token whose bytes
   complete none adds ''.
2. Bytes that are no UTF-8 are shown as U+FFFD, by the token that makes sure of
   it: the one after them, or the last of the completion.
3. A run of byte tokens (<0x0A>) that is no UTF-8 shows a U+FFFD for each; the
   byte that breaks the run adds those of the bytes before it, too.

  tokens  'the'  ' ca'  0xC3  0xA9   <eos>
  pieces  'the'  ' ca'  ''    'é'    ''

The pieces up to a token depend on no later one, with one exception: a character
of byte tokens that a later byte of its run makes unreadable is no piece.
"""

import codecs
import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from jaxrl_tok.data.stops import BROKEN, PROBE_LENGTH, PROBES, next_run
from jaxrl_tok.data.words import (
  BYTE,
  LOST,
  SPACE,
  decoder_parts,
  token_words,
)


def add_run(pieces: list, run: list, after: int) -> None:
  """Adds the characters of a run of byte tokens to pieces, in place.

  Args:
    run: (place, byte) of each.
    after: place of the token behind the run, or of the last one.
  """
  code, begin = bytes(byte for _, byte in run), 0
  try:
    code.decode()
  except UnicodeDecodeError:
    add_lost(pieces, run, after)
    return
  for n, (place, _) in enumerate(run, 1):
    text, read = codecs.utf_8_decode(code[begin:n], 'strict', False)
    pieces[place] += text
    begin += read


def add_lost(pieces: list, run: list, after: int) -> None:
  """Adds a U+FFFD for each byte of a run that is no UTF-8, in place."""
  state, due = (), 0
  for place, byte in run:
    state, due = next_run(state, byte), due + 1
    if state == BROKEN:
      pieces[place] += LOST * due
      due = 0
  pieces[after] += LOST * due


def added_texts(
  first: Sequence[str],
  later: Sequence[str],
  skipped: Sequence[bool],
  ids: Sequence[int],
  length: int,
) -> list[str]:
  """Texts that tokens add, as the words of their ids have it.

  Args:
    first, later, skipped: as Words has them, of every id.
    length: number of pieces, at least one for each id; the last gets what is
      known at the end only.
  """
  pieces, run, rest = [''] * length, [], b''
  space = begun = False
  for n, i in enumerate(ids):
    if skipped[i]:
      continue
    word, begun = (later if begun else first)[i], True
    if not word:
      continue
    word = ' ' + word if space else word
    space = word[-1] == chr(SPACE)
    word = word[:-1] if space else word
    byte = ord(word[-1]) - BYTE if word else -1
    plain = word[:-1] if byte >= 0 else word
    if plain:
      add_run(pieces, run, n)
      run, code = [], rest + plain.encode('latin-1')
      text, read = codecs.utf_8_decode(code, 'replace', False)
      pieces[n] += text
      rest = code[read:]
    if byte >= 0:
      pieces[n] += rest.decode(errors='replace')
      rest = b''
      run.append((n, byte))
  add_run(pieces, run, length - 1)
  if rest:
    pieces[-1] += rest.decode(errors='replace')
  return pieces


def align(pieces: list[str], text: str) -> list[str]:
  """Pieces with as many U+FFFD as a decoder shows, which may be others than
  there are bytes; a run that is longer there goes on with its last one."""
  wanted = [len(run) for run in re.findall(f'{LOST}+', text)]
  own = [len(run) for run in re.findall(f'{LOST}+', ''.join(pieces))]
  if len(wanted) != len(own):
    return pieces
  counts = []
  for n, m in zip(wanted, own):
    ones = [int(j < n) for j in range(m - 1)]
    counts += [*ones, n - sum(ones)]
  count = iter(counts)
  return [re.sub(LOST, lambda _: LOST * next(count), p) for p in pieces]


def probes(tokenizer, vocab_size: int) -> list[list[int]]:
  """Rows of random ids, for a check of the tokenizer."""
  rng = np.random.default_rng(0)
  known = np.array(
    [i for i in tokenizer.get_vocab().values() if i < vocab_size]
  )
  lengths = rng.integers(1, PROBE_LENGTH + 1, PROBES)
  return [rng.choice(known, n).tolist() for n in lengths]


def make_pieces(
  tokenizer,
  decode: Callable,
  vocab_size: int,
  skip_special_tokens: bool = True,
) -> Callable:
  """Returns pieces(ids, shown, texts) -> for each completion a list with the
  text that each of its ids adds; the list sums to its text.

  The vocabulary is read at the first call, which may have no completions.

  Args:
    decode: lists of ids -> texts.
    vocab_size: V of the model.
    skip_special_tokens: as decode has it.

  `ids` are all chosen tokens of completions, `shown` those without the end
  token, `texts` their decoded texts. Raises ValueError for a tokenizer whose
  text is not the sum of its tokens' texts.
  """

  @functools.cache
  def table() -> tuple:
    words = token_words(tokenizer, decode, vocab_size, skip_special_tokens)
    found = words.first, words.later, words.skipped.tolist()
    rows = probes(tokenizer, vocab_size)
    for row, text in zip(rows, decode(rows)):
      of_row(found, row, row, text)
    return found

  def of_row(words: tuple, ids: list, shown: list, text: str) -> list[str]:
    found = added_texts(*words, shown, len(ids)) if ids else []
    if ''.join(found) != text:
      found = align(found, text)
    if ''.join(found) != text:
      kinds = ', '.join(decoder_parts(tokenizer)) or 'none'
      raise ValueError(
        "completion_pieces needs text that is the sum of its tokens' texts, "
        f'and the tokenizer (decoder: {kinds}) reads {shown[:20]} as '
        f'{text[:60]!r}, not as {"".join(found)[:60]!r}; use a reward of whole '
        'texts, as potentials.NAME(...).outcome'
      )
    return found

  def pieces(ids: list, shown: list, texts: list) -> list[list[str]]:
    words = table()
    return [of_row(words, *row) for row in zip(ids, shown, texts)]

  return pieces
