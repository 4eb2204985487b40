"""Tokenizers of GGUF files: byte-level BPE by its pre-tokenizer, and
SentencePiece's BPE by score."""

import itertools
import unicodedata

import hypothesis
import hypothesis.strategies as st
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from jaxrl_tok.hub.gguf_tokenizer import SPLITTINGS, make_tokenizer, write
from jaxrl_tok.hub.tokenizer import read_tokenizer, special_tokens

G = 'tokenizer.ggml.'
SPACE = '\u2581'


def metadata(tokens, types, **more) -> dict:
  named = {'tokens': tokens, 'token_type': types, **more}
  return {f'{G}{name}': value for name, value in named.items()}


# --- byte-level --------------------------------------------------------------


def byte_level(pre: str, *merged: str, **more) -> dict:
  """Metadata of bytes and of words that are merged from their left, then
  <bos>, <eos>, <user>, and a row without a token."""
  alphabet = sorted(ByteLevel.alphabet())
  tokens, merges = list(alphabet), []
  for word in merged:
    for i in range(1, len(word)):
      if word[: i + 1] not in tokens:
        tokens.append(word[: i + 1])
        merges.append(f'{word[:i]} {word[i]}')
  types = [1] * len(tokens) + [3, 3, 4, 5]
  ids = {'bos_token_id': len(tokens), 'eos_token_id': len(tokens) + 1}
  tokens = [*tokens, '<bos>', '<eos>', '<user>', '[PAD]']
  merges = merges or ['ÿ ÿ']
  if 'ÿÿ' not in tokens and merges == ['ÿ ÿ']:
    tokens.append('ÿÿ')
    types.append(1)
  fields = {'model': 'gpt2', 'pre': pre, 'merges': merges, **ids, **more}
  return metadata(tokens, types, **fields)


TEXT = "I'LL say ABCdef don't12345 x\r\n\n  y½²  café ﬁ\n"
PIECES = {  # the model's own splitting of TEXT
  'gpt-2': (
    *('I', "'", 'LL', ' say', ' ABCdef', ' don', "'t", '12345', ' x'),
    *('\r\n\n ', ' y', '½²', ' ', ' café', ' ﬁ', '\n'),
  ),
  'smollm': (
    *('I', "'", 'LL', ' say', ' ABCdef', ' don', "'t", *'12345', ' x'),
    *('\r\n\n ', ' y', '½', '²', ' ', ' café', ' ﬁ', '\n'),
  ),
  'llama-bpe': (
    *('I', "'LL", ' say', ' ABCdef', ' don', "'t", '123', '45', ' x'),
    *('\r\n\n', ' ', ' y', '½²', ' ', ' café', ' ﬁ', '\n'),
  ),
  'dbrx': (
    *('I', "'LL", ' say', ' ABCdef', ' don', "'t", '123', '45', ' x'),
    *('\r\n\n', ' ', ' y', '½²', ' ', ' café', ' ﬁ', '\n'),
  ),
  'qwen2': (
    *('I', "'LL", ' say', ' ABCdef', ' don', "'t", *'12345', ' x'),
    *('\r\n\n', ' ', ' y', '½', '²', ' ', ' café', ' ﬁ', '\n'),
  ),
  'tekken': (
    *('I', "'LL", ' say', ' ABCdef', ' don', "'t", *'12345', ' x'),
    *('\r\n\n', ' ', ' y', '½', '²', ' ', ' café', ' ﬁ', '\n'),
  ),
  'gpt-4o': (
    *("I'LL", ' say', ' ABCdef', " don't", '123', '45', ' x'),
    *('\r\n\n', ' ', ' y', '½²', ' ', ' café', ' ﬁ', '\n'),
  ),
}


@pytest.mark.parametrize('pre', PIECES)
def test_text_is_split_as_the_model_splits_it(pre):
  tokenizer, _, _ = make_tokenizer(byte_level(pre))
  found = tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
  assert tuple(TEXT[a:b] for _, (a, b) in found) == PIECES[pre]


def test_case_splits_words_where_the_model_has_it_so():
  def pieces(pre, text):
    tokenizer, _, _ = make_tokenizer(byte_level(pre))
    found = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[a:b] for _, (a, b) in found]

  assert pieces('tekken', 'getHTTPCode /x') == ['get', 'HTTPCode', ' /', 'x']
  assert pieces('llama-bpe', 'getHTTPCode') == ['getHTTPCode']


@pytest.mark.parametrize('pre', SPLITTINGS)
def test_no_byte_is_lost(pre):
  tokenizer, _, _ = make_tokenizer(byte_level(pre, 'Ġthe', 'hello'))

  @hypothesis.settings(max_examples=25)
  @hypothesis.given(st.text(st.characters(codec='utf-8')))
  def check(text):
    want = unicodedata.normalize('NFC', text) if pre == 'qwen2' else text
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not {'<bos>', '<eos>', '<user>'} & set(text.split()):
      assert tokenizer.decode(ids) == want

  check()


def test_merges_begin_in_a_piece_and_never_cross_it():
  def texts(pre, text):
    tokenizer, _, _ = make_tokenizer(byte_level(pre, 'Ġhello', '1234'))
    return tokenizer.encode(text, add_special_tokens=False).tokens

  assert texts('gpt-2', ' hello1234') == ['Ġhello', '1234']
  assert texts('llama-bpe', ' hello1234') == ['Ġhello', '123', '4']
  assert texts('smollm', ' hello1234') == ['Ġhello', *'1234']


def test_a_word_that_is_a_token_needs_no_merges_where_the_model_has_it_so():
  def texts(pre):
    meta = byte_level(pre)
    meta[f'{G}tokens'][-2] = 'word'  # of no merge
    meta[f'{G}token_type'][-2] = 1
    tokenizer, _, _ = make_tokenizer(meta)
    return tokenizer.encode('word', add_special_tokens=False).tokens

  assert texts('llama-bpe') == texts('tekken') == ['word']
  assert texts('gpt-2') == texts('dbrx') == list('word')


@pytest.mark.parametrize(
  ('pre', 'flags', 'frame'),
  [
    ('gpt-2', {}, ([], [])),
    ('llama-bpe', {}, (['<bos>'], [])),
    ('llama-bpe', {'add_bos_token': False}, ([], [])),
    ('tekken', {'add_eos_token': True}, (['<bos>'], ['<eos>'])),
    ('qwen2', {'add_bos_token': True}, (['<bos>'], [])),
  ],
)
def test_bos_and_eos_are_added_as_the_file_says(pre, flags, frame):
  tokenizer, _, _ = make_tokenizer(byte_level(pre, **flags))
  before, after = frame
  assert tokenizer.encode('x').tokens == [*before, 'x', *after]


def test_control_tokens_are_special_and_the_users_are_not():
  tokenizer, _, _ = make_tokenizer(byte_level('gpt-2'))
  ids = tokenizer.encode('a<bos>b<user>c[PAD]').ids
  assert tokenizer.decode(ids) == 'ab<user>c[PAD]'
  assert tokenizer.decode(ids, skip_special_tokens=False) == (
    'a<bos>b<user>c[PAD]'
  )
  assert tokenizer.token_to_id('<user>') in ids


# --- SentencePiece -----------------------------------------------------------

LETTERS = ('a', 'b', 'c', SPACE)
WORDS = ('ab', 'bc', 'abc', 'ca', 'aa', SPACE + 'a', SPACE + 'ab', 'cab', 'bb')


def pieces(scores, **more) -> dict:
  """Metadata of <unk>, <s>, </s>, all bytes, letters and words of scores."""
  tokens = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))]
  types = [2, 3, 3] + [6] * 256
  tokens, types = [*tokens, *LETTERS, *WORDS], types + [1] * 13
  known = [0.0] * 259 + [-100.0] * 4 + [float(s) for s in scores]
  fields = {'model': 'llama', 'pre': 'default', 'scores': known, **more}
  return metadata(tokens, types, **fields)


def by_score(text: str, scores: dict) -> list[str]:
  """SentencePiece's rule: joins the neighbours whose token has the highest
  score, the first of them, until there is none."""
  parts = list(text)
  while True:
    joined = [a + b for a, b in itertools.pairwise(parts)]
    known = [(scores[t], -i) for i, t in enumerate(joined) if t in scores]
    if not known:
      return parts
    i = -max(known)[1]
    parts[i : i + 2] = [joined[i]]


@hypothesis.settings(max_examples=60)
@hypothesis.given(
  st.permutations(range(len(WORDS))),
  st.text('abc ', min_size=1, max_size=14),
  st.booleans(),
)
def test_pieces_are_joined_by_score(order, text, space):
  scores = [-1.0 - place for place in order]
  meta = pieces(scores, add_space_prefix=space)
  tokenizer, _, _ = make_tokenizer(meta)
  escaped = (' ' * space + text).replace(' ', SPACE)
  found = tokenizer.encode(text)
  assert found.tokens == ['<s>', *by_score(escaped, dict(zip(WORDS, scores)))]
  assert tokenizer.decode(found.ids) == text


def test_unknown_letters_are_bytes():
  meta = pieces(range(9))
  tokenizer, _, _ = make_tokenizer(meta)
  found = tokenizer.encode('é a')
  assert found.tokens == ['<s>', SPACE, '<0xC3>', '<0xA9>', SPACE + 'a']
  assert tokenizer.decode(found.ids) == 'é a'
  without = [1 if kind == 6 else kind for kind in meta[f'{G}token_type']]
  tokenizer, _, _ = make_tokenizer(meta | {f'{G}token_type': without})
  assert tokenizer.encode('éé a').tokens[1:3] == [SPACE, '<unk>']


def test_stretches_behind_a_special_token_begin_with_a_space():
  tokenizer, _, _ = make_tokenizer(pieces(range(9)))
  found = tokenizer.encode('a</s>a')
  assert found.tokens == ['<s>', SPACE + 'a', '</s>', SPACE + 'a']


def test_merges_of_the_file_come_before_scores():
  tokenizer, _, _ = make_tokenizer(pieces(range(9), merges=['b c', 'a b']))
  assert tokenizer.encode('abc').tokens == ['<s>', SPACE, 'a', 'bc']


# --- ends and files ----------------------------------------------------------


@pytest.mark.parametrize(
  ('named', 'ids', 'want'),
  [
    ({}, {'eos_token_id': 2}, [2]),
    ({}, {'eos_token_id': 2, 'eot_token_id': 1}, [2, 1]),
    ({}, {'eos_token_id': 2, 'eot_token_id': 1, 'eom_token_id': 3}, [2, 1, 3]),
    ({3: '<|im_end|>'}, {'eos_token_id': 2}, [2, 3]),
    ({3: '<|im_end|>'}, {'eos_token_id': 3}, [3]),
    ({3: '<end_of_turn>', 4: '<|eot_id|>'}, {'eos_token_id': 2}, [2, 4, 3]),
    ({}, {'eos_token_id': 10**6}, []),  # no token: llama.cpp passes over it
  ],
)
def test_ends_are_those_of_the_file_and_those_known_by_name(named, ids, want):
  meta = pieces(range(9), **ids)
  for i, token in named.items():
    meta[f'{G}tokens'][i], meta[f'{G}token_type'][i] = token, 3
  assert make_tokenizer(meta)[2] == want


def test_text_that_looks_like_an_end_is_none():
  meta = pieces(range(9))
  meta[f'{G}tokens'][-1] = '<|im_end|>'  # a normal token
  assert make_tokenizer(meta)[2] == [2]


def test_written_files_give_the_ids_ends_and_template(tmp_path):
  meta = pieces(range(9), eot_token_id=3, padding_token_id=0)
  meta['tokenizer.chat_template'] = 'hello'
  ids = write(tmp_path, meta)
  assert ids == {'bos_token_id': 1, 'pad_token_id': 0, 'eos_token_id': [2, 3]}
  tokenizer, notes = read_tokenizer(tmp_path, 272)
  assert notes == ()
  text = 'abc </s>é'
  want = make_tokenizer(meta)[0].encode(text).ids
  assert tokenizer(text)['input_ids'] == want
  assert tokenizer.chat_template == 'hello'
  assert (tokenizer.bos_token, tokenizer.eos_token) == ('<s>', '</s>')
  assert special_tokens(tmp_path, ids, tokenizer, 272) == ((2, 3), 0)


@pytest.mark.parametrize('template', [3, ['hello']])
def test_a_template_that_is_no_text_is_refused(tmp_path, template):
  meta = pieces(range(9)) | {'tokenizer.chat_template': template}
  with pytest.raises(ValueError, match=r'^tokenizer.chat_template .*; convert'):
    write(tmp_path, meta)
