"""Pieces: a text is the sum of what its tokens add, and what a token adds is
known when it is sampled."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stops import PIECES, V, llama_like, some, trained, words
from tokenizers import decoders

from jaxrl_tok import data
from jaxrl_tok.data import pieces as module
from jaxrl_tok.data.words import LOST
from jaxrl_tok.rewards import check_functions, gated, make_scorer, product

TEXT = st.text('abQ: é€\n好😀.', max_size=8)


def maker(tokenizer, skip=True, vocab_size=None):
  """(pieces of rows, decode) of a tokenizer."""
  decode = functools.partial(
    data.decode_all, tokenizer, skip_special_tokens=skip
  )
  size = vocab_size or len(tokenizer) + 2
  return data.make_pieces(tokenizer, decode, size, skip), decode


def pieces_of(tokenizer, ids, **more) -> list[str]:
  pieces, decode = maker(tokenizer, **more)
  return pieces([ids], [ids], decode([ids]))[0]


@pytest.mark.parametrize('make', PIECES, ids=lambda make: make.__name__)
@settings(max_examples=40)
@given(st.data(), st.booleans())
def test_pieces_sum_to_the_text(make, data, skip):
  """Random tokens of every kind of tokenizer, bytes that are no UTF-8 too."""
  tokenizer = make(some(PIECES[make], data))
  pieces, decode = maker(tokenizer, skip, V)
  ids = st.lists(st.integers(0, V - 1), max_size=10)
  rows = data.draw(st.lists(ids, min_size=1, max_size=8))
  found = pieces(rows, rows, decode(rows))
  assert list(map(len, found)) == list(map(len, rows))
  assert list(map(''.join, found)) == decode(rows)


@pytest.fixture(scope='module')
def tokenizers():
  makers = trained, llama_like, data.byte_tokenizer
  return {make.__name__: make() for make in makers}


NAMES = 'trained', 'llama_like', 'byte_tokenizer'


@pytest.mark.parametrize('name', NAMES)
@settings(max_examples=60)
@given(st.data())
def test_a_piece_is_known_when_its_token_is_sampled(tokenizers, name, data):
  """Pieces of a beginning are those of the whole: a reward that reads them
  depends on no later token. The last token of a beginning may add U+FFFD for
  bytes that the whole goes on with."""
  tokenizer = tokenizers[name]
  pieces, decode = tokenizer_maker(tokenizer)
  row = []
  for _ in range(3):
    row += tokenizer.backend_tokenizer.encode(
      data.draw(TEXT), add_special_tokens=False
    ).ids
    row += data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=2))
  (whole,) = pieces([row], [row], decode([row]))
  for n in range(1, len(row)):
    (part,) = pieces([row[:n]], [row[:n]], decode([row[:n]]))
    if name == 'llama_like' and LOST in ''.join(part + whole):
      continue  # characters of a run that is no UTF-8 are taken back
    assert part[:-1] == whole[: n - 1]
    assert part[-1].rstrip(LOST) == whole[n - 1].rstrip(LOST)


@functools.cache
def tokenizer_maker(tokenizer):
  return maker(tokenizer)


@pytest.mark.parametrize('name', NAMES)
@given(text=TEXT)
def test_a_character_is_added_by_its_last_byte(tokenizers, name, text):
  tokenizer = tokenizers[name]
  ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
  pieces, decode = tokenizer_maker(tokenizer)
  (found,) = pieces([ids], [ids], decode([ids]))
  assert LOST not in ''.join(found)
  names = tokenizer.convert_ids_to_tokens(ids)
  if name == 'byte_tokenizer':
    assert found == [
      x for c in text for x in (len(c.encode()) - 1) * [''] + [c]
    ]
  for token, piece in zip(names, found):
    if token.startswith('<0x'):
      assert len(piece) <= 1
      assert piece or int(token[3:5], 16) >= 0x80


def byte_ids(tokenizer, code: bytes) -> list[int]:
  return tokenizer.convert_tokens_to_ids([f'<0x{b:02X}>' for b in code])


@pytest.mark.parametrize(
  ('code', 'want', 'behind'),  # at the end, and before an 'a'
  [
    (b'\xc3\xa9', ['', 'é'], ['', 'é', 'a']),
    ('好b'.encode(), ['', '', '好', 'b'], ['', '', '好', 'b', 'a']),
    # cut: shown by what comes next, or by the last token
    (b'\xc3', [LOST], ['', f'{LOST}a']),
    (b'\xe5\xa5', ['', LOST * 2], ['', '', f'{LOST * 2}a']),
    # broken by the second byte
    (b'\xc3\xff\xa9', ['', LOST * 2, LOST], ['', LOST * 2, LOST, 'a']),
    # é is taken back
    (b'\xc3\xa9\xff', ['', '', LOST * 3], ['', '', LOST * 3, 'a']),
  ],
)
def test_a_run_of_byte_tokens_is_shown_as_the_decoder_shows_it(
  code, want, behind
):
  tokenizer = llama_like()
  a = tokenizer.convert_tokens_to_ids('a')
  ids = byte_ids(tokenizer, code)
  assert pieces_of(tokenizer, [a, *ids]) == ['a', *want]
  assert pieces_of(tokenizer, [a, *ids, a]) == ['a', *behind]


def test_a_special_token_adds_nothing_or_its_name():
  tokenizer = data.byte_tokenizer()
  a, b = tokenizer.convert_tokens_to_ids(['a', 'b'])
  row = [a, tokenizer.eos_token_id, b]
  assert pieces_of(tokenizer, row) == ['a', '', 'b']
  assert pieces_of(tokenizer, row, skip=False) == ['a', '<eos>', 'b']


def test_the_work_is_linear_in_the_tokens(tokenizers, monkeypatch):
  """Counted: no token's word is read twice, nothing is decoded again."""
  counts = {'words': 0, 'decoded': 0}

  class Counting(list):
    def __getitem__(self, i):
      counts['words'] += 1
      return super().__getitem__(i)

  tokenizer = tokenizers['llama_like']
  rng = np.random.default_rng(0)
  pieces, decode = tokenizer_maker(tokenizer)
  pieces([], [], [])  # the vocabulary is read once

  def counted_texts(first, later, skipped, ids, length):
    return added(Counting(first), Counting(later), skipped, ids, length)

  added = module.added_texts
  monkeypatch.setattr(module, 'added_texts', counted_texts)
  for n in (50, 500):
    counts['words'] = 0
    row = rng.integers(3, 250, n).tolist()
    found = pieces([row], [row], decode([row]))
    assert counts['words'] == n
    assert len(found[0]) == n


def test_a_tokenizer_whose_text_is_no_sum_is_refused():
  """CTC shows equal neighbours once."""
  tokenizer = words([*'abcdefghi'])
  tokenizer.backend_tokenizer.decoder = decoders.CTC('<pad>')
  pieces, _ = maker(tokenizer, vocab_size=V)
  with pytest.raises(ValueError, match='decoder: CTC') as e:
    pieces([], [], [])
  assert '\n' not in str(e.value)
  assert 'use a reward of whole texts' in str(e.value)


# --- the argument of reward functions ----------------------------------------

END = 257
TOKENS = np.array([[0, 0, END, 0], [0, 0, 0, 0]])
MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)


def scored(tokenizers, *functions):
  """Calls functions on 'é' with its end, and on 'é' with a cut '好'."""
  tokenizer = tokenizers['byte_tokenizer']
  pieces, decode = tokenizer_maker(tokenizer)
  asked = []

  def spy(ids, shown, texts):
    asked.append(ids)
    return pieces(ids, shown, texts)

  encoded = [
    tokenizer.convert_tokens_to_ids(list(symbols)) for symbols in ('Ã©', 'Ã©å¥')
  ]
  tokens = TOKENS.copy()
  for row, ids in zip(tokens, encoded):
    row[: len(ids)] = ids
  score = make_scorer(
    {f'f{i}': f for i, f in enumerate(functions)}, decode, [END], pieces=spy
  )
  return score(tokens, MASK, [{'prompt': 'p'}, {'prompt': 'q'}]), asked


def test_pieces_are_passed_to_functions_that_name_them(tokenizers):
  seen = []

  def reads(completions, completion_pieces):
    seen.append((completions, completion_pieces))
    return [[float(len(p)) for p in row] for row in completion_pieces]

  def takes_any(completions, **columns):
    assert 'completion_pieces' not in columns
    return [1.0] * len(completions)

  scores, asked = scored(tokenizers, reads, takes_any)
  assert len(asked) == 1
  # the end token adds nothing; a character that is cut is the last token's
  assert seen == [(['é', f'é{LOST}'], [['', 'é', ''], ['', 'é', '', LOST]])]
  np.testing.assert_array_equal(
    scores.rewards['f0'], [[0, 1, 0, 0], [0, 1, 0, 1]]
  )
  _, asked = scored(tokenizers, takes_any)
  assert asked == []  # not made where nothing names them


def test_a_function_of_functions_passes_pieces_on(tokenizers):
  def reads(completion_pieces):
    return [[1.0] * len(row) for row in completion_pieces]

  def gate(completions, **columns):
    assert 'completion_pieces' not in columns
    return [1.0, 0.0]

  both = gated(gate, product(reads, reads))
  check_functions({'f': both}, ['prompt'])
  scores, _ = scored(tokenizers, both)
  assert scores.rewards['f0'].sum(1).tolist() == [3.0, 0.0]


def test_pieces_need_a_tokenizer():
  def reads(completion_pieces):
    return []

  with pytest.raises(ValueError, match='reward f asks for completion_pieces'):
    make_scorer({'f': reads}, lambda rows: rows, [END])
