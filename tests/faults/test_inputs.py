"""Faults 20 to 26: data, prompts and flags that cannot be, through a user's own
door. Each is one line before anything is compiled or written."""

import gzip
import json
import os

import numpy as np
import pytest

from jaxrl_tok import Task, main
from jaxrl_tok.rewards import make_scorer
from jaxrl_tok.run import inputs, launch

pytestmark = pytest.mark.usefixtures('one_device')
RECORDS = [{'prompt': f'{i} and {i * i}:'} for i in range(20)]
GOOD = ''.join(json.dumps(record) + '\n' for record in RECORDS)
SMALL = {
  'num_prompts': 4,
  'num_generations': 2,
  'held_out': 4,
  'max_completion_length': 3,
  'd_model': 16,
  'num_heads': 2,
  'num_kv_heads': 1,
  'report_to': 'none',
  'mesh': 'data=1',
}


def lengths(completions, **columns):
  return [float(len(text)) for text in completions]


@pytest.fixture
def refusal(tmp_path, capsys, monkeypatch):
  """refusal(data, *flags) -> the line that a run ends in; that it reaches what
  compiles is an error."""

  def reached(setup, run_dir):
    raise AssertionError('compiles')

  monkeypatch.setattr(launch, 'learn', reached)
  monkeypatch.chdir(tmp_path)

  def refused(data, *flags):
    with pytest.raises(SystemExit) as stopped:
      main(Task(data, lengths), ['--output_dir=run', *flags], **SMALL)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith('error: ')
    assert not os.path.exists('run')
    return line.removeprefix('error: ')

  return refused


def compressed(text: str) -> bytes:
  return gzip.compress(text.encode())


FILES = {  # what is in data.jsonl, and the line
  'bad line': (GOOD + '{"prompt": \n', ':21: not JSON (Expecting value, col'),
  'BOM': ('\ufeff' + GOOD, ':1: starts with a BOM; save it as plain UTF-8'),
  'UTF-16': (GOOD.encode('utf-16'), ':1: not UTF-8 (invalid start byte)'),
  'no UTF-8': (
    GOOD.encode() + b'{"prompt": "\xff"}\n',
    ':21: not UTF-8 (invalid start byte)',
  ),
  'no object': (GOOD + '[1]\n', ':21: a list, not an object; a record is {'),
  'no prompt': (GOOD + '{"q": 1}\n', ':21: no "prompt"; it has q'),
  'a key twice': (
    GOOD + '{"prompt": "a", "prompt": "b"}\n',
    ":21: not JSON (the key 'prompt' is there twice)",
  ),
  'half a surrogate pair': (
    GOOD + '{"prompt": "a\\ud800b"}\n',
    ':21: \\ud800 is half of a surrogate pair; write both halves, or',
  ),
  'empty': ('', ': no records; write {"prompt": ...} on each line'),
  'compressed': (compressed(GOOD), ':1: not UTF-8 (invalid start byte)'),
  '50 MB in a line': (
    GOOD + json.dumps({'prompt': 'x ' * 25_000_000}) + '\n',
    ':21: a line of more than 4 MiB; write one record a line, or',
  ),
  'nested too deeply': (
    GOOD + '{"prompt": "a", "x": ' + '[' * 99_999 + ']' * 99_999 + '}\n',
    ':21: not JSON (maximum recursion depth exceeded',
  ),
  'null': (GOOD + '{"prompt": null}\n', ':21: "prompt" is a NoneType; it must'),
  'empty prompt': (
    GOOD + '{"prompt": ""}\n',
    ':21: the prompt is empty; a policy needs a token',
  ),
}


@pytest.mark.parametrize('kind', FILES)
def test_21_a_file_that_cannot_be_read_is_named_with_its_line(
  refusal, tmp_path, kind
):
  content, line = FILES[kind]
  content = content if isinstance(content, bytes) else content.encode()
  (tmp_path / 'data.jsonl').write_bytes(content)
  assert refusal('data.jsonl').startswith('data.jsonl' + line)


def test_21_places_that_hold_no_records(refusal, tmp_path):
  (tmp_path / 'dir').mkdir()
  (tmp_path / 'data.jsonl.gz').write_bytes(compressed(GOOD))
  for place, line in {
    'dir': 'dir is a directory; name a file in it',
    'data.jsonl.gz': 'data.jsonl.gz is compressed; unpack it first, or save it',
    'none.jsonl': 'none.jsonl: no such file; a data set of the hub is hub:',
    '/dev/null': '/dev/null is no regular file; save it as one, records are',
  }.items():
    assert refusal(place).startswith(line)


def test_22_prompts_that_cannot_be(refusal):
  wizard = [{'prompt': [{'role': 'wizard', 'content': 'x'}]}] * 20
  assert refusal(wizard).startswith("record 0 of the data: unknown role 'wiz")
  chats = [{'prompt': [{'role': 'user', 'content': f'{i}'}]} for i in range(20)]
  assert 'chat template' in refusal(chats)
  assert refusal(RECORDS, '--max_prompt_length=2').startswith(
    'record 0 of the data: the training prompt has 8 tokens, more than max_'
  )
  assert 'more than the context of ' in refusal(
    RECORDS, '--max_completion_length=100000000'
  )


def test_22_one_long_prompt_among_short_ones_is_said(refusal, monkeypatch):
  """Before it is trained on: a step with it takes many times as long."""
  warned = []
  monkeypatch.setattr(
    inputs.Logger, 'warn', lambda self, text: warned.append(text)
  )
  with pytest.raises(AssertionError, match='compiles'):
    refusal([{'prompt': 'x' * 4000}, *RECORDS])
  assert warned == [
    'the longest training prompt has 4,000 tokens, and most batches have '
    '11 at most: a step with it takes many times as long, and as much '
    'memory; --max_prompt_length 11 --long_prompts drop leaves it out'
  ]


def test_26_a_learning_rate_that_no_policy_survives_is_said(
  refusal, monkeypatch
):
  warned = []
  monkeypatch.setattr(
    inputs.Logger, 'warn', lambda self, text: warned.append(text)
  )
  for flags in (['--learning_rate=1.5'], ['--learning_rate=0.01']):
    with pytest.raises(AssertionError, match='compiles'):
      refusal(RECORDS, *flags)
    os.rmdir('run')
  assert warned == [
    '--learning_rate 1.5 moves each parameter by about 1.5 in a step of adamw, '
    'which few policies survive; 1e-6 to 1e-2 is usual, and --max_kl 10 ends a '
    'run that diverges'
  ]


@pytest.mark.parametrize(
  ('flag', 'line'),
  [
    (f'--seed={2**64}', f'--seed {2**64} must be in 0..4294967295'),
    ('--learning_rate=nan', '--learning_rate nan must be a finite number'),
    ('--temperature=0', '--temperature 0.0 must be above 0'),
    ('--temperature=1e-30', 'temperature 1e-30 makes logits overflow; pass 1'),
    ('--num_prompts=0', '--num_prompts 0 must be at least 1'),
    ('--mesh=data=3', '--mesh data=3 x fsdp=1 x tensor=1 needs 3 devices and'),
    ('--d_model=7', '--d_model 7 must be divisible by --num_heads 2'),
    (
      '--max_kl=9',
      '--max_kl 9.0 limits the KL that is logged with evaluations',
    ),
    ('--lerning_rate=1', 'unknown flag --lerning_rate; did you mean --learn'),
  ],
)
def test_26_flags_that_cannot_be(refusal, flag, line):
  more = ['--eval_every=0'] if 'kl' in flag else []
  assert refusal(RECORDS, flag, *more).startswith(line)


@pytest.mark.parametrize(
  'rows',
  [
    [[], [], []],
    [[257], [257], [257]],
    [[65, 257], [66, 66], [257]],
    [[255, 254], [0xE2, 257], [0, 10]],
  ],
  ids=['empty', 'an end alone', 'some without an end', 'no UTF-8'],
)
def test_20_completions_of_any_kind_are_scored(rows):
  """Empty ones, ends alone, none, bytes that are no text."""
  T = max(1, *map(len, rows))
  tokens, mask = np.zeros((3, T), int), np.zeros((3, T), bool)
  for b, row in enumerate(rows):
    tokens[b, : len(row)], mask[b, : len(row)] = row, True

  def decode(ids, skip_special_tokens=True):
    return [
      bytes(i for i in row if i < 256).decode(errors='replace') for row in ids
    ]

  score = make_scorer({'lengths': lengths}, decode, [257])
  found = score(tokens, mask, [{'prompt': 'a'}] * 3)
  assert np.isfinite(found.rewards['lengths']).all()
  sums = found.rewards['lengths'].sum(1)
  want = [len(t) if row else 0 for t, row in zip(found.texts, rows)]
  assert sums.tolist() == want
