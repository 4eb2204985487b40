"""Bad records are named, text survives the tokenizer, order is a function."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok import data

TOKENIZER = data.byte_tokenizer()
TEMPLATE = (
  '{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}'
  '{% if add_generation_prompt %}assistant: {% endif %}'
)
GOOD = b'{"prompt": "2+2="}\n'
# text that a tokenizer can be given: no lone surrogates, and not the names of
# the special tokens, which are ids of their own
TEXT = st.text(st.characters(exclude_categories=['Cs'])).filter(
  lambda x: '<eos>' not in x and '<pad>' not in x
)


@pytest.fixture
def tokenizer():
  return data.byte_tokenizer()


def write(tmp_path, content: bytes):
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(content)
  return path


# --- read_jsonl


def test_records_keep_their_columns_and_blank_lines_are_skipped(tmp_path):
  talk = [
    {'role': 'system', 'content': ''},
    {'role': 'user', 'content': 'né'},
    {'role': 'assistant', 'content': 'x'},
    {'role': 'tool', 'content': 'y'},
  ]
  rows = [
    {'prompt': '2+2=', 'answer': 4, 'extra': {'deep': [1, None]}},
    {'prompt': talk, 'answer': '€'},
    {'prompt': '\U0001f600'},
  ]
  lines = [json.dumps(row, ensure_ascii=i == 2) for i, row in enumerate(rows)]
  path = write(tmp_path, '\r\n\n'.join(lines).encode())  # no newline at the end
  assert data.read_jsonl(path) == rows
  assert data.read_jsonl(str(path)) == rows


@pytest.mark.parametrize(
  ('line', 'says'),
  [
    (b'{"prompt": "x"', 'not JSON'),
    (b"{'prompt': 'x'}", 'not JSON'),
    (b'{"prompt": "x"} {"prompt": "y"}', 'not JSON'),
    (b'{"prompt": "x", "n": ' + b'1' * 5000 + b'}', 'not JSON'),
    (b'{"prompt": "\xff"}', 'not UTF-8'),
    (b'["x"]', 'a list, not an object'),
    (b'"x"', 'a str, not an object'),
    (b'null', 'a NoneType, not an object'),
    (b'{"text": "x", "answer": 1}', 'no "prompt"; it has text, answer'),
    (b'{}', 'no "prompt"; it has nothing'),
    (b'{"prompt": ""}', 'the prompt is empty'),
    (b'{"prompt": []}', 'the prompt is empty'),
    (b'{"prompt": 7}', '"prompt" is a int'),
    (b'{"prompt": null}', '"prompt" is a NoneType'),
    (b'{"prompt": {"role": "user", "content": "x"}}', '"prompt" is a dict'),
    (b'{"prompt": ["x"]}', "not 'x'"),
    (b'{"prompt": [{"role": "user"}]}', "not {'role': 'user'}"),
    (b'{"prompt": [{"role": "user", "content": 7}]}', "'content': 7}"),
    (b'{"prompt": [{"role": "robot", "content": "x"}]}', "role 'robot'"),
    (b'{"prompt": [{"content": "x"}]}', 'role None'),
    (b'{"prompt": "a\\ud800b"}', 'half of a surrogate pair'),
    (b'{"prompt": "a", "answer": "\\udc00"}', 'half of a surrogate pair'),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, says):
  path = write(tmp_path, GOOD + b'\n' + GOOD + line + b'\n' + GOOD)
  with pytest.raises(ValueError, match='rows') as e:
    data.read_jsonl(path)
  assert str(e.value).startswith(f'{path}:4: ')
  assert says in str(e.value)
  assert '\n' not in str(e.value)


def test_a_byte_order_mark_is_named(tmp_path):
  path = write(tmp_path, b'\xef\xbb\xbf' + GOOD)
  with pytest.raises(ValueError, match=r'rows\.jsonl:1: .*BOM.*plain UTF-8'):
    data.read_jsonl(path)


@pytest.mark.parametrize('content', [b'', b'\n \n\r\n'])
def test_an_empty_file_is_named(tmp_path, content):
  path = write(tmp_path, content)
  with pytest.raises(ValueError, match='no records') as e:
    data.read_jsonl(path)
  assert str(path) in str(e.value)


# --- the byte tokenizer


@given(TEXT)
@settings(deadline=None)
def test_text_survives_the_byte_tokenizer(text):
  ids = TOKENIZER(text)['input_ids']
  assert len(ids) == len(text.encode())  # one id a byte, none added
  assert TOKENIZER.decode(ids) == text
  assert data.decode_all(TOKENIZER, [ids]) == [text]


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
  assert data.decode_all(tokenizer, rows) == texts

  class Slow:  # a tokenizer without a Rust backend
    def batch_decode(self, ids, skip_special_tokens=False):
      return tokenizer.batch_decode(ids, skip_special_tokens)

  assert data.decode_all(Slow(), rows) == texts


# --- tokenize


def test_prompts_are_padded_on_the_right(tokenizer):
  records = [{'prompt': p, 'n': i} for i, p in enumerate(['ab', 'é', 'abcd'])]
  for limit, P in ((None, 4), (4, 4), (7, 7)):
    found = data.tokenize(records, tokenizer, 258, limit)
    assert found.examples == records
    assert found.tokens.shape == (3, P)
    assert found.tokens.dtype == found.length.dtype == np.int32
    assert found.length.tolist() == [2, 2, 4]
    for record, row, n in zip(records, found.tokens, found.length):
      assert tokenizer.decode(row[:n].tolist()) == record['prompt']
      assert not row[n:].any()


def test_a_prompt_that_is_too_long_is_named(tokenizer):
  records = [{'prompt': p} for p in ('ab', 'abcde', 'abcdefg')]
  with pytest.raises(ValueError, match='held-out 1 has 5 tokens') as e:
    data.tokenize(records, tokenizer, 258, 4, 'held-out')
  assert 'pass --max_prompt_length 7' in str(e.value)
  data.tokenize(records, tokenizer, 258, 7)  # the cure cures


def test_a_prompt_without_tokens_is_named(tokenizer):
  with pytest.raises(ValueError, match='prompt 1 is empty'):
    data.tokenize([{'prompt': 'a'}, {'prompt': ''}], tokenizer, 258)
  with pytest.raises(ValueError, match='training: no records'):
    data.tokenize([], tokenizer, 258, name='training')


def test_an_id_without_a_row_is_named(tokenizer):
  records = [{'prompt': 'a'}, {'prompt': 'a<eos>'}]
  data.tokenize(records, tokenizer, 258)
  with pytest.raises(ValueError, match='prompt 1 has token id 257') as e:
    data.tokenize(records, tokenizer, 257)
  assert '257 rows' in str(e.value)
  assert 'tokenizer that belongs to the model' in str(e.value)


def test_messages_go_through_the_chat_template(tokenizer):
  records = [
    {'prompt': [{'role': 'user', 'content': 'hi'}]},
    {'prompt': 'text stays text'},
  ]
  with pytest.raises(ValueError, match='no chat template; give prompts as'):
    data.tokenize(records, tokenizer, 258)
  tokenizer.chat_template = TEMPLATE
  found = data.tokenize(records, tokenizer, 258)
  texts = [
    tokenizer.decode(row[:n].tolist())
    for row, n in zip(found.tokens, found.length)
  ]
  assert texts == ['user: hi\nassistant: ', 'text stays text']


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


# --- order


@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 5))
@settings(deadline=None)
def test_each_epoch_is_a_permutation(n, seed, epoch):
  found = data.record_indices(n, seed, epoch * n, n)
  assert sorted(found.tolist()) == list(range(n))


@given(
  n=st.integers(1, 20),
  seed=st.integers(0, 99),
  position=st.integers(0, 200),
  parts=st.lists(st.integers(1, 50), min_size=1, max_size=6),
)
@settings(deadline=None)
def test_order_does_not_depend_on_how_it_is_asked_for(n, seed, position, parts):
  whole = data.record_indices(n, seed, position, sum(parts))
  split, at = [], position
  for count in parts:
    split += data.record_indices(n, seed, at, count).tolist()
    at += count
  assert whole.tolist() == split


def test_seeds_and_epochs_differ():
  orders = {
    tuple(data.record_indices(50, seed, epoch * 50, 50).tolist())
    for seed in range(5)
    for epoch in range(5)
  }
  assert len(orders) == 25


def test_a_batch_is_the_records_at_its_positions(tokenizer):
  records = [{'prompt': f'{i}' * (i % 3 + 1), 'i': i} for i in range(7)]
  found = data.tokenize(records, tokenizer, 258)
  examples, prompts, _ = data.batch_at(found, seed=3, position=5, count=6)
  index = data.record_indices(7, 3, 5, 6)
  assert [e['i'] for e in examples] == index.tolist()
  assert (prompts.tokens == found.tokens[index]).all()
  assert (prompts.length == found.length[index]).all()
