"""Sources of records: faults are named, and nothing held out is trained on."""

import builtins
import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok import data
from jaxrl_tok.data import sources

GOOD = b'{"prompt": "2+2="}\n'
TALK = [
  {'role': 'system', 'content': ''},
  {'role': 'user', 'content': 'né'},
  {'role': 'assistant', 'content': 'x'},
  {'role': 'tool', 'content': 'y'},
]


def write(tmp_path, content: bytes, name='rows.jsonl'):
  path = tmp_path / name
  path.write_bytes(content)
  return path


def write_rows(tmp_path, rows, name='rows.jsonl'):
  lines = [json.dumps(row) for row in rows]
  return write(tmp_path, '\n'.join(lines).encode(), name)


def one_line(error) -> str:
  assert '\n' not in str(error.value)
  return str(error.value)


def test_importing_data_imports_nothing_heavy():
  heavy = ('jax', 'transformers', 'tokenizers', 'datasets', 'pyarrow')
  code = (
    f'import sys, jaxrl_tok.data; found = [m for m in {heavy} if m in '
    'sys.modules]; sys.exit(str(found) if found else 0)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], check=False, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


# --- jsonl


def test_records_keep_their_columns_and_blank_lines_are_skipped(tmp_path):
  rows = [
    {'prompt': '2+2=', 'answer': 4, 'extra': {'deep': [1, None]}},
    {'prompt': TALK, 'answer': '€', 'completion': 'of the data'},
    {'prompt': '\U0001f600'},
  ]
  lines = [json.dumps(row, ensure_ascii=i == 2) for i, row in enumerate(rows)]
  path = write(tmp_path, '\r\n\n'.join(lines).encode())  # no newline at the end
  for source in (path, str(path)):
    found = data.open_records(source)
    assert list(found) == rows
    assert len(found) == found.num_records == 3
    assert found[-1] == found[2] == rows[2]
    assert found[1:] == rows[1:]
    assert found.read([2, 0, 2]) == [rows[2], rows[0], rows[2]]
    assert found.num_bytes.tolist() == [4, -1, 4]
    with pytest.raises(IndexError):
      found[3]
  assert data.read_jsonl(path) == rows


BAD = [
  (b'{"prompt": "x"', 'not JSON'),
  (b"{'prompt': 'x'}", 'not JSON'),
  (b'{"prompt": "x"} {"prompt": "y"}', 'not JSON'),
  (b'{"prompt": "x", "n": ' + b'1' * 5000 + b'}', 'not JSON'),
  (b'{"prompt": "x", "n": ' + b'[' * 200_000 + b'}', 'not JSON'),
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
  (b'{"prompt": "a", "completions": 1}', "named 'completions'"),
  (b'{"prompt": "a", "x": "' + b'x' * 2**22 + b'"}', 'more than 4 MiB'),
]


@pytest.mark.parametrize(('line', 'says'), BAD, ids=[b[:30] for b, _ in BAD])
def test_a_bad_line_is_named(tmp_path, line, says):
  path = write(tmp_path, GOOD + b'\n' + GOOD + line + b'\n' + GOOD)
  with pytest.raises(ValueError, match='rows') as e:
    data.open_records(path)
  assert one_line(e).startswith(f'{path}:4: ')
  assert says in str(e.value)


def test_pairs_of_surrogates_are_text(tmp_path):
  path = write(tmp_path, b'{"prompt": "\\ud83d\\ude00 \\\\ud800"}')
  assert data.open_records(path)[0] == {'prompt': '\U0001f600 \\ud800'}


def test_a_byte_order_mark_is_named(tmp_path):
  path = write(tmp_path, b'\xef\xbb\xbf' + GOOD)
  with pytest.raises(ValueError, match=r'rows\.jsonl:1: .*BOM.*plain UTF-8'):
    data.open_records(path)


@pytest.mark.parametrize('content', [b'', b'\n \n\r\n'])
def test_an_empty_file_is_named(tmp_path, content):
  path = write(tmp_path, content)
  with pytest.raises(ValueError, match='no records') as e:
    data.open_records(path)
  assert str(path) in one_line(e)


@pytest.mark.parametrize(
  ('name', 'says'),
  [
    ('rows.jsonl.gz', 'is compressed; unpack it first'),
    ('rows.csv', 'neither .jsonl nor .parquet; convert it'),
  ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, name, says):
  path = write(tmp_path, GOOD, name)
  with pytest.raises(ValueError, match='rows') as e:
    data.open_records(path)
  assert says in one_line(e)


def test_what_is_no_file_is_refused(tmp_path):
  with pytest.raises(OSError, match='no such file; a data set of the hub is'):
    data.open_records(tmp_path / 'absent.jsonl')
  with pytest.raises(OSError, match='is a directory; name a file in it'):
    data.open_records(tmp_path)
  os.mkfifo(tmp_path / 'pipe')
  with pytest.raises(ValueError, match='no regular file'):
    data.open_records(tmp_path / 'pipe')


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
  path = write(tmp_path, GOOD)
  real = builtins.open  # root may read any file, whatever its mode

  def closed(name, *args, **kwargs):
    if str(name) == str(path):
      raise PermissionError(13, 'Permission denied', str(path))
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, 'open', closed)
  with pytest.raises(OSError, match='cannot be read; change its mode'):
    data.open_records(path)


def test_a_file_that_changes_is_named(tmp_path):
  path = write(tmp_path, GOOD * 3)
  found = data.open_records(path)
  with open(path, 'r+b') as file:
    file.truncate(len(GOOD) + 5)
  assert found[0] == {'prompt': '2+2='}
  with pytest.raises(ValueError, match='has changed since it was opened'):
    found[1]


def test_a_record_of_a_file_is_named_by_its_line(tmp_path):
  path = write(tmp_path, b'\n' + GOOD + b'\n\n' + GOOD)
  found = data.open_records(path)
  assert [found.where(i) for i in range(2)] == [f'{path}:2', f'{path}:5']


# --- parquet and data sets

ROWS = [
  {'prompt': f'{i}é', 'answer': i, 'deep': {'a': [i, None]}} for i in range(9)
]


def write_parquet(path, rows, **options):
  pa.parquet.write_table(pa.Table.from_pylist(rows), path, **options)
  return path


def test_parquet_is_read_row_by_row(tmp_path, monkeypatch):
  monkeypatch.setattr(sources, 'CHUNK', 2)  # chunks and row groups cross
  path = write_parquet(tmp_path / 'a.parquet', ROWS, row_group_size=3)
  found = data.open_records(path)
  assert list(found) == ROWS
  assert found.read([8, 0, 4, 4]) == [ROWS[i] for i in (8, 0, 4, 4)]
  assert found.where(4) == f'{path}: row 4'
  talks = [{'prompt': TALK[: i + 1], 'n': i} for i in range(4)]
  path = write_parquet(tmp_path / 'b.parquet', talks)
  assert list(data.open_records(path)) == talks


@pytest.mark.parametrize(
  ('rows', 'says'),
  [
    ([{'text': 'x'}], ': no "prompt"; it has text'),
    ([{'prompt': 'x', 'log_extra': 1}], ": a column is named 'log_extra'"),
    ([{'prompt': 'x'}, {'prompt': None}], ': row 1: "prompt" is a NoneType'),
    ([{'prompt': 'x'}, {'prompt': ''}], ': row 1: the prompt is empty'),
    ([{'prompt': 1}], ': row 0: "prompt" is a int'),
    (
      [{'prompt': [{'role': 'x', 'content': 'y'}]}],
      ": row 0: unknown role 'x'",
    ),
  ],
)
def test_a_bad_row_is_named(tmp_path, rows, says):
  path = write_parquet(tmp_path / 'a.parquet', rows)
  with pytest.raises(ValueError, match='parquet') as e:
    data.open_records(path)
  assert one_line(e).startswith(f'{path}{says}')
  with pytest.raises(ValueError, match='mine') as e:
    data.open_records(datasets.Dataset.from_list(rows), name='mine')
  assert one_line(e).startswith(f'mine{says}')


def test_broken_parquet_is_named(tmp_path):
  path = write(tmp_path, GOOD, 'a.parquet')
  with pytest.raises(ValueError, match=r'a\.parquet: not parquet') as e:
    data.open_records(path)
  one_line(e)
  text = pa.array([b'a', b'\xff']).cast(pa.string(), safe=False)
  pa.parquet.write_table(pa.table({'prompt': text}), path)
  with pytest.raises(ValueError, match=r'a\.parquet: row 1: not UTF-8'):
    data.open_records(path)
  empty = pa.table({'prompt': pa.array([], pa.string())})
  pa.parquet.write_table(empty, path)
  with pytest.raises(ValueError, match='no records'):
    data.open_records(path)


def test_a_data_set_is_read_as_python_values():
  for form in (None, 'numpy'):
    source = datasets.Dataset.from_list(ROWS).with_format(form)
    found = data.open_records(source)
    assert list(found) == ROWS
    assert found.read([8, 0, 8]) == [ROWS[8], ROWS[0], ROWS[8]]
    assert isinstance(found[3]['answer'], int)


def test_a_transform_of_a_data_set_is_kept():
  source = datasets.Dataset.from_list(ROWS).with_transform(
    lambda rows: {'prompt': [f'{a}!' for a in rows['answer']]}
  )
  assert list(data.open_records(source)) == [
    {'prompt': f'{i}!'} for i in range(9)
  ]


def test_several_splits_are_refused():
  one = datasets.Dataset.from_list(ROWS)
  with pytest.raises(ValueError, match=r'several splits.*give one split'):
    data.open_records(datasets.DatasetDict(train=one, test=one))


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
  (tmp_path / 'owner/name').mkdir(parents=True)
  write_rows(tmp_path / 'owner/name', ROWS, 'train.jsonl')
  monkeypatch.chdir(tmp_path)  # datasets takes a directory for a hub's name
  monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
  found = data.open_records('hub:owner/name@main:train[:4]')
  assert list(found) == ROWS[:4]
  with pytest.raises(ValueError, match='hub:owner/name@main:dev cannot') as e:
    data.open_records('hub:owner/name@main:dev')
  one_line(e)


@pytest.mark.parametrize(
  ('text', 'want'),
  [
    ('hub:a/b@main:train', ('a/b', 'main', 'train', 'main')),
    ('hub:a/b/socratic@v1:test[:9]', ('a/b', 'socratic', 'test[:9]', 'v1')),
  ],
)
def test_a_hub_name_says_what_is_loaded(monkeypatch, text, want):
  def load_dataset(path, config, split, revision):
    assert (path, config, split, revision) == want
    return datasets.Dataset.from_list(ROWS)

  monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
  monkeypatch.setattr(
    datasets, 'get_dataset_config_names', lambda *_, **__: ['socratic', 'main']
  )
  assert list(data.open_records(text)) == ROWS


@pytest.mark.parametrize(
  'text', ['hub:', 'hub:name@main:train', 'hub:a/b:train', 'hub:a/b@main']
)
def test_a_hub_name_of_another_form_is_refused(text):
  with pytest.raises(ValueError, match='is not of the form hub:OWNER/NAME@'):
    data.open_records(text)


@pytest.mark.parametrize('name', ['pyarrow', 'datasets'])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name):
  monkeypatch.setitem(sys.modules, name, None)
  path = write_parquet(tmp_path / 'a.parquet', ROWS)
  source = path if name == 'pyarrow' else 'hub:a/b@main:train'
  with pytest.raises(ValueError, match=f'needs {name}, which') as e:
    data.open_records(source)
  assert one_line(e).endswith('run pip install datasets')


# --- renamed columns


def test_columns_are_renamed_in_every_source(tmp_path):
  rows = [{'question': f'{i}?', 'answer': i, 'prompt': 'old'} for i in range(4)]
  renames = {'question': 'prompt', 'prompt': 'before'}
  want = [{'prompt': f'{i}?', 'answer': i, 'before': 'old'} for i in range(4)]
  for source in (
    rows,
    write_rows(tmp_path, rows),
    write_parquet(tmp_path / 'a.parquet', rows),
    datasets.Dataset.from_list(rows),
    lambda seed, index: rows[index % 4],
  ):
    found = data.open_records(source, columns=renames)
    assert found.read(range(4)) == want
    with pytest.raises(ValueError, match="'question' cannot be renamed to"):
      data.open_records(source, columns={'question': 'prompt'})
    with pytest.raises(ValueError, match="no column 'x' to rename to 'y'"):
      data.open_records(source, columns={'x': 'y'})


@pytest.mark.parametrize('name', sorted(data.RESERVED))
def test_a_reserved_column_is_refused_in_every_source(tmp_path, name):
  rows = [{'prompt': 'x', name: 1}]
  for source in (
    rows,
    write_rows(tmp_path, rows),
    write_parquet(tmp_path / 'a.parquet', rows),
    datasets.Dataset.from_list(rows),
    lambda seed, index: rows[0],
  ):
    with pytest.raises(ValueError, match=f"named '{name}'") as e:
      data.open_records(source)
    one_line(e)
    found = data.open_records(source, columns={name: 'other'})
    assert found[0] == {'prompt': 'x', 'other': 1}


# --- lists, iterables, functions


def test_an_iterable_is_read_once_and_kept():
  found = data.open_records({'prompt': f'{i}'} for i in range(5))
  assert [r['prompt'] for r in found] == list('01234')
  assert found[4] == {'prompt': '4'}
  assert data.open_records(found) is found


@pytest.mark.parametrize(
  ('source', 'says'),
  [
    ([], 'no records'),
    (['x'], 'record 0 of the data: a str, not an object'),
    ([{'prompt': 'a'}, {'text': 'a'}], 'record 1 of the data: no "prompt"'),
    ([{'prompt': 'a\ud800'}], 'half of a surrogate pair'),
    ([{'prompt': [{'role': 'user', 'content': '\ud800'}]}], 'half of a surr'),
    ({'prompt': ['a']}, 'one dict, not records'),
    (7, 'the data is a int; give a path'),
  ],
)
def test_bad_records_in_memory_are_named(source, says):
  with pytest.raises(ValueError, match='data') as e:
    data.open_records(source)
  assert says in one_line(e)


def test_an_iterable_that_does_not_end_is_refused(monkeypatch):
  monkeypatch.setattr(sources, 'MAX_ITERATED', 1000)
  with pytest.raises(ValueError, match=r'more than 1,000.*\(seed, index\)'):
    data.open_records({'prompt': 'x'} for _ in iter(int, 1))


def sums(seed: int, index: int) -> dict:
  rng = np.random.default_rng((seed, index))
  a, b = rng.integers(0, 30, 2).tolist()
  return {'prompt': f'{a}+{b}=', 'answer': a + b}


def test_a_function_makes_endless_records():
  found = data.open_records(sums, seed=3)
  assert found.num_records is None
  assert found[10**9] == sums(3, 10**9)
  assert found.where(4) == 'sums(seed=3, index=4)'
  with pytest.raises(TypeError, match='sums is endless'):
    len(found)
  with pytest.raises(ValueError, match=r'<lambda>\(seed=0, index=0\): no "pro'):
    data.open_records(lambda seed, index: {'text': 'x'})


def test_a_function_that_is_not_pure_is_refused():
  rng = np.random.default_rng(0)
  with pytest.raises(ValueError, match='gives another prompt each time'):
    data.open_records(lambda seed, index: {'prompt': f'{rng.random()}'})


def test_a_fingerprint_is_of_the_prompts_and_their_order(tmp_path):
  rows = [{'prompt': 'a', 'x': 1}, {'prompt': TALK}, {'prompt': 'c'}]
  prints = {
    data.data_fingerprint(data.open_records(source))
    for source in (rows, write_rows(tmp_path, rows), rows[::-1], rows[:2])
  }
  assert len(prints) == 3
  endless = {
    data.data_fingerprint(data.open_records(sums, seed)) for seed in (0, 0, 1)
  }
  assert len(endless) == 2


# --- held out

SMALL = st.lists(st.integers(0, 12), min_size=1, max_size=60)


def prompts(records) -> list[str]:
  return [record['prompt'] for record in records]


@given(numbers=SMALL, count=st.integers(1, 10))
@settings(deadline=None)
def test_the_end_is_held_out_and_nothing_of_it_is_trained_on(numbers, count):
  rows = [{'prompt': f'{n}', 'i': i} for i, n in enumerate(numbers)]
  different = len(set(numbers))
  if different < 5:
    with pytest.raises(ValueError, match='5 or more'):
      data.split(rows, count)
    return
  train, held, counts = data.split(rows, count)
  assert len(held) == min(count, different // 5) == len(set(prompts(held)))
  assert not set(prompts(train)) & set(prompts(held))
  assert set(prompts(train)) | set(prompts(held)) == set(prompts(rows))
  # the last different ones, in the order of the file
  last = list(dict.fromkeys(prompts(rows)[::-1]))[: len(held)]
  assert set(prompts(held)) == set(last)
  places = [record['i'] for record in held]
  assert places == sorted(places)
  assert [r['i'] for r in train] == [
    r['i'] for r in rows if r['prompt'] not in last
  ]
  assert counts == {
    'train': len(train),
    'held_out': len(held),
    'repeated': 0,
    'removed': len(rows) - len(train) - len(held),
  }


@given(numbers=SMALL, others=SMALL)
@settings(deadline=None)
def test_a_source_is_held_out_as_it_is(numbers, others):
  rows = [{'prompt': f'{n}', 'i': i} for i, n in enumerate(numbers)]
  out = [{'prompt': f'{n}', 'i': i} for i, n in enumerate(others)]
  if set(numbers) <= set(others):
    with pytest.raises(ValueError, match='is held out; hold out fewer'):
      data.split(rows, out)
    return
  train, held, counts = data.split(rows, out)
  assert prompts(held) == list(dict.fromkeys(prompts(out)))
  assert [r['i'] for r in train] == [
    r['i'] for r in rows if int(r['prompt']) not in others
  ]
  assert counts['repeated'] == len(others) - len(set(others))
  assert counts['removed'] == len(rows) - len(train)


def test_different_records_split_as_they_stand(tmp_path):
  rows = [{'prompt': f'{i}'} for i in range(20)]
  path = write_rows(tmp_path, rows)
  for source in (rows, path, write_parquet(tmp_path / 'a.parquet', rows)):
    train, held, counts = data.split(source, 3)
    assert (list(train), list(held)) == (rows[:-3], rows[-3:])
    assert counts['removed'] == counts['repeated'] == 0
  assert held[-1] == rows[-1]
  assert data.split(path, 3).train.where(16) == f'{path}:17'
  assert data.split(path, 3).held_out.where(0) == f'{path}:18'
  assert len(data.split(rows, np.int64(99)).held_out) == 4


def test_messages_are_held_out_like_text():
  rows = [
    {'prompt': [{'role': 'user', 'content': f'{i % 7}'}]} for i in range(9)
  ]
  train, held, counts = data.split(rows, 1)
  assert prompts(held) == [rows[8]['prompt']]
  assert counts['removed'] == 1  # 8 % 7 is there twice
  assert rows[1]['prompt'] not in prompts(train)


def test_endless_records_are_held_out_of_a_range_of_their_own():
  train, held, counts = data.split(sums, 50, seed=1)
  assert len(held) == len(set(prompts(held))) == 50
  assert counts == {'train': None, 'held_out': 50, 'repeated': 0, 'removed': 0}
  assert prompts(held) == prompts(data.split(sums, 50, seed=1).held_out)
  assert held.where(0) == f'sums(seed=1, index={2**30})'
  some = train.read(range(2000))
  assert not set(prompts(some)) & set(prompts(held))
  plain = [sums(1, i) for i in range(2000)]
  redrawn = [i for i in range(2000) if some[i] != plain[i]]
  assert redrawn == [
    i for i in range(2000) if plain[i]['prompt'] in set(prompts(held))
  ]
  assert 0 < len(redrawn) < 400
  # one by one, in any order: the same records
  assert [train[i] for i in redrawn[::-1]] == [some[i] for i in redrawn[::-1]]


def test_a_fifth_of_few_endless_prompts_is_held_out():
  for different, count, want in (
    (155, 512, 31),
    (50, 9, 9),
    (40, 9, 8),
    (5, 1, 1),
    (10**6, 512, 512),
  ):

    def draw(seed, i, n=different):
      return {'prompt': f'{np.random.default_rng(i).integers(n)}'}

    assert len(data.split(draw, count).held_out) == want
  with pytest.raises(ValueError, match='makes 4 different prompts'):
    data.split(lambda seed, i: {'prompt': f'{i % 4}'}, 2)


def test_endless_records_that_are_all_held_out_are_named():
  train, _, _ = data.split(sums, data.open_records([sums(0, 0)]))
  assert train[0] != sums(0, 0)
  with pytest.raises(ValueError, match='hardly a prompt that is not held out'):
    data.split(lambda *_: {'prompt': 'x'}, [{'prompt': 'x'}]).train[0]


@pytest.mark.parametrize(
  ('held', 'says'), [(0, 'hold out 1 or more'), (sums, 'cannot be held out')]
)
def test_a_held_out_number_that_makes_no_sense_is_refused(held, says):
  with pytest.raises(ValueError, match=says):
    data.split([{'prompt': f'{i}'} for i in range(9)], held)


def test_an_episode_tells_records_of_one_prompt_apart(tmp_path):
  """In lists, functions and files: it is held out as part of the prompt is."""
  rows = [{'prompt': 'Guess!', 'episode': f'e{i}'} for i in range(10)]
  path = tmp_path / 'games.jsonl'
  path.write_text(''.join(f'{json.dumps(row)}\n' for row in rows))

  def endless(seed, index):
    return rows[index % 10]

  for source in (rows, str(path), endless):
    found = data.split(source, 2)
    held = {r['episode'] for r in found.held_out}
    train = {found.train[i]['episode'] for i in range(8)}
    assert len(held) == 2
    assert not held & train
