"""The experiment of programs: its problems, their tests, a tiny run."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import code
from jaxrl_tok import data, rewards
from jaxrl_tok.data.tokenizers import decode_all, encode_texts

pytestmark = pytest.mark.usefixtures('one_device')

JUDGE = rewards.passes_tests(prefix='head')


def score(record: dict, answer: str) -> float:
  columns = {k: [record[k]] for k in ('head', 'tests')}
  return JUDGE(completions=[answer], **columns)[0]


@given(st.integers(0, 2**32))
def test_a_known_solution_passes_its_tests(seed):
  """Words, source and function of each part say one thing."""
  one = code.problem(random.Random(seed))
  assert score(one, one['answer']) == 1
  assert len(one['tests']) == 5
  assert score(one, one['answer'] + '+1') < 1  # nor a list and a number
  assert score(one, '') == 0


def test_tests_tell_programs_apart():
  """Another problem's solution passes all tests of hardly any problem."""
  train, held_out = code.problems(300, 50)
  prompts = [r['prompt'] for r in train + held_out]
  assert len(set(prompts)) == 350
  answers = [r['answer'] for r in train]
  found = [score(r, a) for r, a in zip(train, answers[1:] + answers[:1])]
  assert sum(x == 1 for x in found) <= 3
  assert code.problems(300, 50) == (train, held_out)


def test_problems_of_ones_own_hide_their_tests(tmp_path):
  rows = [
    {
      'text': f'Write a function to add {i}.',
      'test_list': [f'assert add({n}) == {n + i}' for n in range(3)],
      'test_setup_code': 'import math',
    }
    for i in range(10)
  ]
  file = tmp_path / 'problems.jsonl'
  file.write_text('\n'.join(map(json.dumps, rows)))
  task = code.code(data=str(file), model='some/model')
  (message,) = task.train[2]['prompt']
  assert message['content'].count('assert') == 1
  assert 'assert add(0) == 2' in message['content']
  assert len(task.train[2]['tests']) == 2
  answer = '```python\ndef add(n):\n  return math.floor(n) + 2\n```'
  assert score(task.train[2], answer) == 1
  assert score(task.train[3], answer) == 0
  assert task.answers is None
  with pytest.raises(ValueError, match='pass --model'):
    code.code(data=str(file))


@given(st.text())
def test_pieces_of_words_are_the_text(text):
  """Also the text of tokens that the tokenizer was made of others."""
  tokenizer = data.word_tokenizer([text, 'x for x in xs'])
  ids = encode_texts(tokenizer, [text])
  assert decode_all(tokenizer, ids) == [text]
  assert tokenizer.unk_token_id not in ids[0]
  assert len(encode_texts(tokenizer, ['x for x in xs'])[0]) == 5
  unknown = encode_texts(tokenizer, ['never']) == [[tokenizer.unk_token_id]]
  assert unknown or 'never' in text


def test_runs_end_to_end(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  words = (
    '--num_problems=64 --d_model=16 --num_layers=1 --num_heads=2 '
    '--num_kv_heads=1 --d_ff=16 --length_buckets=1 '
    '--num_prompts=8 --num_generations=2 '
    '--held_out=8 --max_steps=2 --warm_start_max_steps=2 --report_to=none '
    f'--warm_start_batch_size=8 --output_dir={tmp_path / "run"}'
  )
  result = code.run(words.split())
  assert result.summary['steps'] == '2'
  (first,) = [r for r in result.metrics if r['phase'] == 'eval'][:1]
  kinds = ['passed', 'failed', 'syntax', 'language', 'budget', 'exception']
  assert sum(first[f'eval/code/{k}'] for k in kinds) == pytest.approx(1)
  assert first['eval/reward'] == first['eval/code/all']
