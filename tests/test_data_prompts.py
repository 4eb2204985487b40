"""Prompts: text survives the tokenizer, and batches have the chosen lengths."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok import data
from jaxrl_tok.data import prompts, tokenizers
from jaxrl_tok.types import Prompts

TOKENIZER = data.byte_tokenizer()
TEMPLATE = (
  '{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}'
  '{% if add_generation_prompt %}assistant: {% endif %}'
)
GOLDEN = Path(__file__).parent / 'golden/families'
FAMILIES = sorted(p.parent for p in GOLDEN.glob('*/tokenizer.json'))
# text that a tokenizer can be given: no lone surrogates, and not the names of
# the special tokens, which are ids of their own
TEXT = st.text(st.characters(exclude_categories=['Cs'])).filter(
  lambda x: '<eos>' not in x and '<pad>' not in x
)


@pytest.fixture
def tokenizer():
  return data.byte_tokenizer()


class Words:
  """A tokenizer without Rust code: an id for each number in the text."""

  def __call__(self, text):
    return {'input_ids': [int(word) for word in text.split()]}


def records_of(lengths, letter='x') -> list[dict]:
  """Records of so many bytes, and all different."""
  return [
    {'prompt': f'{i}'.rjust(n, letter)[-n:], 'i': i}
    for i, n in enumerate(lengths)
  ]


def texts_of(found, tokenizer=TOKENIZER) -> list[str]:
  return [
    tokenizer.decode(row[:n].tolist())
    for row, n in zip(found.tokens, found.length)
  ]


# --- the byte tokenizer


@given(TEXT)
@settings(deadline=None)
def test_text_survives_the_byte_tokenizer(text):
  ids = TOKENIZER(text)['input_ids']
  assert len(ids) == len(text.encode())  # one id a byte, none added
  assert TOKENIZER.decode(ids) == text
  assert data.decode_all(TOKENIZER, [ids]) == [text]
  assert data.prompt_ids(TOKENIZER, text) == ids


def test_there_are_258_ids_and_every_byte_has_its_own(tokenizer):
  assert len(tokenizer) == 258
  assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (256, 257)
  assert tokenizer('<pad><eos>')['input_ids'] == [256, 257]
  seen = {}  # by first and continuation bytes of real characters
  for number in [*range(0x800), *range(0x800, 0xD800, 64), 0x10000, 0x10FFFF]:
    raw = chr(number).encode()
    for byte, i in zip(raw, tokenizer(chr(number))['input_ids'], strict=True):
      assert seen.setdefault(byte, i) == i
  assert len(set(seen.values())) == len(seen)
  assert max(seen.values()) < 256


def test_the_byte_tokenizer_survives_its_files(tokenizer, tmp_path):
  from transformers import AutoTokenizer

  tokenizer.chat_template = TEMPLATE
  tokenizer.save_pretrained(tmp_path)
  again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
  text = " né  €\U0001f600\x00\r\n . , n't <eos>"
  assert again(text)['input_ids'] == tokenizer(text)['input_ids']
  assert again.decode(again(text)['input_ids']) == text
  assert again.get_vocab() == tokenizer.get_vocab()
  assert again.eos_token_id == 257
  assert again.pad_token_id == 256
  assert again.chat_template == TEMPLATE


def test_decode_all_leaves_special_tokens_out(tokenizer):
  hi = tokenizer('hé .')['input_ids']
  rows = [[*hi, 257], [256, *hi, 256, 256], [], [257], hi + [257] + hi]
  texts = ['hé .', 'hé .', '', '', 'hé .hé .']
  whole = ['hé .<eos>', '<pad>hé .<pad><pad>', '', '<eos>', 'hé .<eos>hé .']

  class Slow:  # a tokenizer without a Rust backend
    def batch_decode(self, ids, skip_special_tokens=False):
      return tokenizer.batch_decode(ids, skip_special_tokens)

  for one in (tokenizer, Slow()):
    assert data.decode_all(one, rows) == texts
    assert data.decode_all(one, rows, skip_special_tokens=False) == whole


# --- many prompts in one call


@pytest.mark.parametrize('path', FAMILIES, ids=lambda p: p.name)
def test_many_prompts_are_read_as_one_by_one(path):
  from transformers import AutoTokenizer

  one = AutoTokenizer.from_pretrained(path, local_files_only=True)
  one.chat_template = TEMPLATE
  many = ['a b', [{'role': 'user', 'content': 'é'}], '', '\U0001f600 <eos>']
  found = data.encode_prompts(one, many)
  assert found == [data.prompt_ids(one, prompt) for prompt in many]
  assert found[0] == one('a b')['input_ids']
  assert (
    found[1]
    == one('user: é\nassistant: ', add_special_tokens=False)['input_ids']
  )
  backend = one.backend_tokenizer  # as a tokenizer.json may have it
  backend.enable_truncation(2)
  backend.enable_padding(length=50)
  assert data.encode_prompts(one, many) == found


def test_a_template_that_refuses_is_named(tokenizer):
  many = ['x', [{'role': 'user', 'content': 'hi'}]]
  with pytest.raises(ValueError, match=r'^1: .*no chat template; give prompts'):
    data.encode_prompts(tokenizer, many)
  tokenizer.chat_template = '{{ raise_exception("user\ntwice") }}'
  with pytest.raises(ValueError, match=r'^at 1: .*\(user twice\); use the rol'):
    data.encode_prompts(tokenizer, many, lambda i: f'at {i}')


def test_a_template_is_not_given_a_second_start_token(tokenizer):
  from tokenizers import processors

  tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
    single='<pad> $A', special_tokens=[('<pad>', 256)]
  )
  assert data.prompt_ids(tokenizer, 'x')[0] == 256
  tokenizer.chat_template = '<pad>' + TEMPLATE
  ids = data.prompt_ids(tokenizer, [{'role': 'user', 'content': 'x'}])
  assert ids[0] == 256
  assert ids.count(256) == 1


# --- the bound of tokens by bytes


def bpe(normalizer=None, pre=None, merges=()):
  """A byte-level BPE tokenizer with a few merges, as families have them."""
  from tokenizers import Tokenizer, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = [*alphabet, *(a + b for a, b in merges)]
  backend = Tokenizer(
    models.BPE({s: i for i, s in enumerate(vocab)}, list(merges))
  )
  backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  if normalizer is not None:
    backend.normalizer = normalizer
  return PreTrainedTokenizerFast(tokenizer_object=backend)


@given(TEXT.filter(bool))
@settings(deadline=None)
def test_a_text_has_no_more_tokens_than_the_bound(text):
  from tokenizers import Regex, normalizers, pre_tokenizers

  qwen = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(r'\p{N}|\s+'), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  for one in (
    TOKENIZER,
    bpe(merges=[('a', 'b')]),
    bpe(normalizers.NFC(), qwen),
  ):
    factor, constant = tokenizers.bytes_bound(one)
    n = len(data.prompt_ids(one, text))
    assert 1 <= n <= factor * len(text.encode()) + constant


def test_only_a_proven_bound_is_given():
  from tokenizers import Regex, normalizers, pre_tokenizers, processors

  assert tokenizers.bytes_bound(TOKENIZER) == (1, 0)
  assert tokenizers.bytes_bound(bpe(normalizers.NFC())) == (3, 0)
  level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  gone = pre_tokenizers.Split(Regex(r'\s'), 'removed')
  for one in (
    Words(),
    bpe(normalizers.NFKC()),
    bpe(pre=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    bpe(pre=pre_tokenizers.Sequence([gone, level])),
    bpe(pre=pre_tokenizers.Whitespace()),
  ):
    assert tokenizers.bytes_bound(one) is None
  started = bpe()
  started.add_special_tokens({'bos_token': '<s>'})
  started.backend_tokenizer.post_processor = processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', started.bos_token_id)]
  )
  assert tokenizers.bytes_bound(started) == (1, 1)


# --- lengths


def test_prompts_are_padded_on_the_right(tokenizer):
  records = [{'prompt': p, 'n': i} for i, p in enumerate(['ab', 'é', 'abcd'])]
  for limit in (None, 4, 7):
    found = data.prompt_set(records, tokenizer, 258, limit)
    assert found.buckets == (4,)  # the longest: nothing is padded more
    assert found.num_records == 3
    tokens, length, columns = found.table()
    assert tokens.shape == (3, 4)
    assert tokens.dtype == length.dtype == np.int32
    assert length.tolist() == [2, 2, 4]
    assert columns == {}
    for record, row, n in zip(records, tokens, length):
      assert tokenizer.decode(row[:n].tolist()) == record['prompt']
      assert not row[n:].any()


def test_a_prompt_that_is_too_long_is_named(tokenizer):
  records = [{'prompt': p} for p in ('ab', 'abcde', 'abcdefg')]
  says = 'record 1 of the data: the held-out prompt has 5 tokens'
  with pytest.raises(ValueError, match=says) as e:
    data.prompt_set(records, tokenizer, 258, 4, name='held-out prompt')
  assert 'pass --max_prompt_length 7' in str(e.value)
  data.prompt_set(records, tokenizer, 258, 7)  # the cure cures


@pytest.mark.parametrize(
  ('how', 'want'),
  [
    ('drop', ['ab', 'abcd']),
    ('cut_left', ['ab', 'bcde', 'defg', 'abcd']),
    ('cut_right', ['ab', 'abcd', 'abcd', 'abcd']),
  ],
)
@pytest.mark.parametrize('kept', [True, False], ids=['kept', 'made anew'])
def test_long_prompts_are_dropped_or_cut(monkeypatch, how, want, kept):
  monkeypatch.setattr(prompts, 'KEPT_IDS', 2**20 if kept else 0)
  records = [{'prompt': p} for p in ('ab', 'abcde', 'abcdefg', 'abcd')]
  found = data.prompt_set(records, TOKENIZER, 258, 4, how)
  assert found.buckets == (4,)
  assert found.counts == {
    'records': 4,
    'longest': 7,
    'dropped': 2 if how == 'drop' else 0,
    'cut': 0 if how == 'drop' else 2,
  }
  assert found.num_records == len(want)
  tokens, length, _ = found.table()
  assert texts_of(Prompts(tokens, length)) == want
  examples, batch, _ = data.batch_at(found, 0, 0, 4)
  assert set(texts_of(batch)) == set(want)
  assert {e['prompt'] for e in examples} <= {r['prompt'] for r in records}
  if how == 'drop':
    with pytest.raises(ValueError, match=r'record 0 of the batch: .* 5 tokens'):
      found.batch([{'prompt': 'abcde'}])
  else:
    assert texts_of(found.batch([{'prompt': 'abcde'}])[0]) == [want[1]]


def test_every_prompt_too_long_is_named(tokenizer):
  with pytest.raises(ValueError, match='each training prompt is longer than'):
    data.prompt_set([{'prompt': 'abc'}], tokenizer, 258, 2, 'drop')


@pytest.mark.parametrize(
  ('limit', 'how', 'says'),
  [
    (None, 'drop', '--long_prompts drop needs a length'),
    (0, 'error', '--max_prompt_length 0 must be 1 or more'),
    (4, 'cut', "long_prompts 'cut' is not one of error, drop, cut_left"),
  ],
)
def test_choices_that_say_nothing_are_refused(limit, how, says):
  with pytest.raises(ValueError, match=says):
    data.prompt_set([{'prompt': 'abc'}], TOKENIZER, 258, limit, how)


def test_a_prompt_without_tokens_is_named():
  records = [{'prompt': '1'}, {'prompt': ' '}]
  with pytest.raises(ValueError, match=r'record 1 of the data: .* is empty'):
    data.prompt_set(records, Words(), 258)


def test_an_id_without_a_row_is_named(tokenizer):
  records = [{'prompt': 'a'}, {'prompt': 'a<eos>'}]
  data.prompt_set(records, tokenizer, 258)
  with pytest.raises(ValueError, match=r'record 1 .* has token id 257') as e:
    data.prompt_set(records, tokenizer, 257)
  assert '257 rows' in str(e.value)
  assert 'tokenizer that belongs to the model' in str(e.value)
  with pytest.raises(ValueError, match=r'record 0 .* has token id 9 '):
    data.prompt_set([{'prompt': '9 -1'}], Words(), 258)


def test_messages_go_through_the_chat_template(tokenizer):
  records = [
    {'prompt': [{'role': 'user', 'content': 'hi'}]},
    {'prompt': 'text stays text'},
  ]
  with pytest.raises(ValueError, match='no chat template; give prompts as'):
    data.prompt_set(records, tokenizer, 258)
  tokenizer.chat_template = TEMPLATE
  found = data.prompt_set(records, tokenizer, 258)
  batch, _ = found.batch(records)
  assert texts_of(batch) == ['user: hi\nassistant: ', 'text stays text']


# --- more records than are all tokenised


def count_encoded(monkeypatch) -> list[int]:
  """Numbers of prompts, one for each call to the tokenizer."""
  calls, real = [], prompts.encode_prompts

  def encode(tokenizer, some, *rest):
    calls.append(len(some))
    return real(tokenizer, some, *rest)

  monkeypatch.setattr(prompts, 'encode_prompts', encode)
  return calls


@pytest.mark.parametrize('limit', [None, 90, 200])
@pytest.mark.parametrize('how', ['drop', 'cut_left'])
def test_many_records_are_measured_as_if_each_was(monkeypatch, limit, how):
  rng = np.random.default_rng(0)
  lengths = rng.integers(2, 60, 3000)
  lengths[[5, 2000, 2999]] = 80, 120, 100
  records = data.open_records(records_of(lengths))
  how = 'error' if limit is None else how
  exact = data.prompt_set(records, TOKENIZER, 258, limit, how)
  monkeypatch.setattr(prompts, 'MEASURED', 1000)
  monkeypatch.setattr(prompts, 'SAMPLE', 100)
  calls = count_encoded(monkeypatch)
  found = data.prompt_set(records, TOKENIZER, 258, limit, how)
  assert sum(calls) < 300
  assert found.counts['dropped'] == exact.counts['dropped']
  assert found.counts['cut'] == exact.counts['cut']
  assert found.counts['longest'] == exact.counts['longest'] == 120
  last = {None: 120, 200: 120, 90: 80 if how == 'drop' else 90}[limit]
  assert found.buckets[-1] == exact.buckets[-1] == last
  assert found.ids is None
  a, b = (data.batch_at(x, 1, 2900, 200) for x in (found, exact))
  assert a[0] == b[0]
  assert texts_of(a[1]) == texts_of(b[1])


def test_a_long_one_of_many_records_is_named(monkeypatch):
  monkeypatch.setattr(prompts, 'MEASURED', 1000)
  monkeypatch.setattr(prompts, 'SAMPLE', 10)
  records = records_of([9] * 1234 + [31] + [9] * 800)
  with pytest.raises(ValueError, match=r'record 1234 .* 31 tokens, more than'):
    data.prompt_set(records, TOKENIZER, 258, 30)


def test_what_is_not_proven_is_tokenised(monkeypatch):
  from tokenizers import normalizers

  monkeypatch.setattr(prompts, 'MEASURED', 100)
  monkeypatch.setattr(prompts, 'SAMPLE', 10)
  calls = count_encoded(monkeypatch)
  records = records_of([20] * 300)
  records[250]['prompt'] = 'ﷺ' * 6  # 18 bytes, and NFKC's 18 * 33
  nfkc = bpe(normalizers.NFKC())
  found = data.prompt_set(records, nfkc, 258)
  assert sum(calls) == 300
  assert found.buckets[-1] == len(data.prompt_ids(nfkc, 'ﷺ' * 6)) > 100
  calls.clear()  # messages have no bound
  chat = data.byte_tokenizer()
  chat.chat_template = TEMPLATE
  talks = [
    {'prompt': [{'role': 'user', 'content': 'x' * (i % 30 + 1)}]}
    for i in range(300)
  ]
  assert data.prompt_set(talks, chat, 258).buckets == (48,)
  assert sum(calls) >= 300
  calls.clear()  # a bound that the sample refutes
  monkeypatch.setattr(prompts, 'bytes_bound', lambda *args: (0, 3))
  assert data.prompt_set(records_of([20] * 300), TOKENIZER, 258).buckets == (
    20,
  )
  assert sum(calls) >= 300


# --- buckets


def buckets(lengths, C=64, last=None) -> tuple[int, ...]:
  lengths = np.asarray(lengths)
  return data.choose_buckets(lengths, np.ones(len(lengths)), C, last)


def mean_P(lengths, chosen, C, batches=300) -> float:
  rng = np.random.default_rng(0)
  longest = rng.choice(lengths, (batches, C)).max(1)
  return np.asarray(chosen)[np.searchsorted(chosen, longest)].mean()


def test_one_long_prompt_costs_other_batches_nothing():
  short = np.random.default_rng(0).integers(6, 41, 20_000)
  for C in (1, 8, 128):
    found = buckets([*short, 4000], C)
    assert found[-1] == 4000
    assert 40 in found  # what the short ones have without it
    assert mean_P(short, found, C) <= mean_P(short, buckets(short, C), C)


@pytest.mark.parametrize('lengths', [[6], [6] * 50, range(4, 11), [20, 27]])
def test_lengths_that_are_alike_have_one_bucket(lengths):
  for C in (1, 64):
    assert buckets(lengths, C) == (max(lengths),)


@given(
  st.lists(st.integers(1, 5000), min_size=1, max_size=300),
  st.integers(1, 256),
  st.none() | st.integers(1, 6000),
)
@settings(deadline=None)
def test_buckets_are_few_and_the_last_holds_all(lengths, C, last):
  found = buckets(lengths, C, last)
  assert 1 <= len(found) <= 3
  assert list(found) == sorted(set(found))
  assert found[-1] == max(max(lengths), last or 0)
  assert set(found[:-1]) <= set(lengths)


@pytest.mark.parametrize('C', [1, 8, 64])
def test_buckets_save_what_they_say(C):
  lengths = np.random.default_rng(1).lognormal(4, 0.8, 50_000).astype(int) + 1
  found = buckets(lengths, C)
  assert len(found) == 3
  assert mean_P(lengths, found, C) < 0.7 * lengths.max()
  even = np.linspace(0, lengths.max(), 4)[1:]
  assert mean_P(lengths, found, C) <= 1.02 * mean_P(lengths, even, C)


def test_a_batch_has_the_smallest_bucket_that_holds_it():
  records = records_of([*[9] * 200, *[60] * 2, 300])
  found = data.prompt_set(records, TOKENIZER, 258, num_prompts=4)
  assert found.buckets == (9, 60, 300)
  seen = set()
  for position in range(0, 400, 4):
    examples, batch, _ = data.batch_at(found, 0, position, 4)
    longest = max(len(e['prompt']) for e in examples)
    assert batch.tokens.shape == (
      4,
      next(b for b in found.buckets if b >= longest),
    )
    assert batch.length.max() == longest
    seen.add(batch.tokens.shape[1])
  assert seen == {9, 60, 300}
  assert found.batch(records[:3], length=60)[0].tokens.shape == (3, 60)
  assert found.batch(records[:3])[0].tokens.shape == (3, 9)
  assert found.table()[0].shape == (203, 300)
  with pytest.raises(ValueError, match='300 tokens, more than the 60 of the b'):
    found.batch(records, length=60)


# --- endless records


def words(seed: int, index: int) -> dict:
  n = int(np.random.default_rng((seed, index)).integers(3, 9))
  return {'prompt': f'{index}'.rjust(n + 10, 'x'), 'i': index}


def test_endless_records_are_batched_in_order():
  found = data.prompt_set(data.open_records(words, 1), TOKENIZER, 258)
  assert found.num_records is None
  assert found.counts['records'] is None
  assert found.buckets == (18,)
  examples, batch, _ = data.batch_at(found, 1, 10**6, 5)
  assert [e['i'] for e in examples] == list(range(10**6, 10**6 + 5))
  assert texts_of(batch) == [e['prompt'] for e in examples]
  with pytest.raises(ValueError, match=r'words is endless.*--steps_per_call 0'):
    found.table()


def rare(seed: int, index: int) -> dict:
  """Record of a prompt; one in 5,000 is long."""
  return {'prompt': f'{index}'.rjust(200 if index % 5000 == 4999 else 20, 'x')}


def test_an_endless_prompt_that_is_longer_than_the_sample():
  found = data.prompt_set(rare, TOKENIZER, 258)
  assert found.buckets == (20,)
  with pytest.raises(ValueError, match='has 200 tokens, more than') as e:
    data.batch_at(found, 0, 4990, 20)
  assert str(e.value).startswith('rare(seed=0, index=4999): ')
  assert '--max_prompt_length 200' in str(e.value)
  roomy = data.prompt_set(rare, TOKENIZER, 258, 200)
  assert roomy.buckets == (20, 200)
  assert data.batch_at(roomy, 0, 4990, 20)[1].tokens.shape == (20, 200)
  assert data.batch_at(roomy, 0, 0, 20)[1].tokens.shape == (20, 20)
  dropped = data.prompt_set(rare, TOKENIZER, 258, 30, 'drop')
  examples, batch, _ = data.batch_at(dropped, 0, 4990, 20)
  assert examples[9] != rare(0, 4999)
  assert examples[:9] + examples[10:] == [
    rare(0, i) for i in range(4990, 5010) if i != 4999
  ]
  assert batch.length.max() <= 30
  assert data.batch_at(dropped, 0, 4999, 1)[0] == [examples[9]]
  cut = data.prompt_set(rare, TOKENIZER, 258, 30, 'cut_left')
  assert texts_of(data.batch_at(cut, 0, 4999, 1)[1]) == ['4999'.rjust(30, 'x')]


def test_an_endless_sample_without_an_end_has_room():
  def tail(seed, index):  # its longest is longer the longer one looks
    n = int(np.random.default_rng((seed, index)).lognormal(3, 0.5)) + 5
    return {'prompt': 'x' * n}

  found = data.prompt_set(tail, TOKENIZER, 258, num_prompts=8)
  assert found.buckets[-1] == 2 * found.counts['longest']
  assert len(found.buckets) > 1


# --- batches


def test_a_batch_is_the_records_at_its_positions(tokenizer):
  records = [{'prompt': f'{i}' * (i % 3 + 1), 'i': i} for i in range(7)]
  found = data.prompt_set(records, tokenizer, 258)
  examples, batch, _ = data.batch_at(found, seed=3, position=5, count=6)
  index = data.record_indices(7, 3, 5, 6)
  tokens, length, _ = found.table()
  assert [e['i'] for e in examples] == index.tolist()
  assert (batch.tokens == tokens[index]).all()
  assert (batch.length == length[index]).all()
  assert batch.inputs == {}


@pytest.mark.parametrize('kept', [2**20, 0], ids=['kept', 'made anew'])
def test_columns_are_those_of_the_batch(monkeypatch, kept):
  monkeypatch.setattr(prompts, 'KEPT_IDS', kept)

  def columns(examples):
    numbers = np.array([[e['i'], -e['i']] for e in examples], np.int32)
    return {'pair': numbers, 'half': numbers[:, 0] / 2}

  found = data.prompt_set(records_of([5] * 11), TOKENIZER, 258, columns=columns)
  assert found.column_shapes == {
    'pair': ((2,), np.int32),
    'half': ((), np.float64),
  }
  examples, _, got = data.batch_at(found, 0, 8, 6)
  assert got['pair'][:, 0].tolist() == [e['i'] for e in examples]
  assert (got['half'] * 2 == got['pair'][:, 0]).all()
  assert found.batch(examples)[1]['pair'].tolist() == got['pair'].tolist()
  assert found.table()[2]['pair'][:, 0].tolist() == list(range(11))


@pytest.mark.parametrize(
  ('columns', 'says'),
  [
    (lambda e: {'a': np.zeros((len(e), len(e[0]['prompt'])))}, "column 'a' is"),
    (lambda e: {'a': np.zeros(len(e) + e[0]['i'])}, "column 'a' is float64"),
    (lambda e: {'a': np.zeros(len(e), f'i{4 + 4 * e[0]["i"]}')}, 'int64'),
    (lambda e: {f'a{e[0]["i"]}': np.zeros(len(e))}, 'return the same names'),
  ],
)
def test_columns_of_changing_shape_are_refused(columns, says):
  records = records_of([3, 5])
  found = data.prompt_set(records, TOKENIZER, 258, columns=columns)
  found.batch(records[:1])
  with pytest.raises(ValueError, match=says) as e:
    found.batch(records[1:])
  assert '\n' not in str(e.value)


def test_a_table_that_is_too_large_is_refused(monkeypatch):
  monkeypatch.setattr(prompts, 'MAX_TABLE', 2**10)
  found = data.prompt_set(records_of([5] * 100), TOKENIZER, 258)
  with pytest.raises(
    ValueError, match=r'100 prompts of 5 tokens.*steps_per_ca'
  ):
    found.table()
