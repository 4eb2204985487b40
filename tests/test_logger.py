"""Rows come back as written; the console prints text, never markup."""

import io
import json
import math
import os
import struct
import types

import numpy as np
import pytest
import rich.console

from jaxrl_tok.report import logger as module
from jaxrl_tok.report.files import (
  atomic_write,
  iterate_rows,
  read_metrics,
  read_rows,
)
from jaxrl_tok.report.logger import Logger, duration, trim_jsonl

AWKWARD = '[red]x[/red] [/] é\u2028\x85"\n\\ \U0001f600'


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
  """Whatever CI sets, rich decides by the stream alone."""
  for name in ('FORCE_COLOR', 'TTY_COMPATIBLE', 'TTY_INTERACTIVE'):
    monkeypatch.delenv(name, raising=False)


@pytest.fixture
def clock(monkeypatch):
  """Time that moves when told; clock.now is in seconds."""
  clock = types.SimpleNamespace(now=1000.0)
  clock.monotonic = lambda: clock.now
  monkeypatch.setattr(module, 'time', clock)
  return clock


def rows_of(path):
  return [json.loads(line) for line in path.read_bytes().splitlines()]


# --- files


def test_rows_are_read_back_as_written(tmp_path, clock):
  log = Logger(tmp_path / 'new' / 'run')
  clock.now += 1.25
  log.metrics('warm_start', 0, {'loss': 2})
  log.metrics('train', 1, {'reward': 0.1, 'num_tokens': 2**24 + 1})
  samples = [{'step': 1, 'split': 'train', 'completion': AWKWARD}] * 2
  log.samples(samples)
  # on disk at once: a killed run keeps its rows
  found = rows_of(tmp_path / 'new' / 'run' / 'metrics.jsonl')
  assert found == [
    {'step': 0, 'time': 1.25, 'phase': 'warm_start', 'loss': 2.0},
    {
      'step': 1,
      'time': 1.25,
      'phase': 'train',
      'reward': 0.1,
      'num_tokens': 2**24 + 1,
    },
  ]
  assert rows_of(tmp_path / 'new' / 'run' / 'samples.jsonl') == samples
  log.close()
  assert not (tmp_path / 'new' / 'run' / 'tb').exists()


def test_a_row_is_one_line_of_utf8(tmp_path):
  log = Logger(tmp_path)
  log.samples([{'step': 1, 'completion': AWKWARD}, {'step': 2}])
  log.close()
  raw = (tmp_path / 'samples.jsonl').read_bytes()
  assert raw.count(b'\n') == 2
  assert raw.endswith(b'}\n')
  assert 'é' in raw.decode('utf-8')


def test_numbers_of_any_kind_are_written(tmp_path):
  log = Logger(tmp_path)
  log.metrics('eval', 3, {'a': np.float32(0.5), 'b': np.int64(2), 'c': True})
  log.close()
  (row,) = rows_of(tmp_path / 'metrics.jsonl')
  assert (row['a'], row['b'], row['c']) == (0.5, 2.0, 1.0)


def strict(line):
  """JSON as other readers have it: no NaN, no Infinity."""

  def refuse(name):
    raise AssertionError(name)

  return json.loads(line, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null(tmp_path):
  log = Logger(tmp_path)
  values = {'a': math.nan, 'b': np.float32('inf'), 'c': -math.inf, 'd': None}
  log.metrics('train', 1, {**values, 'e': 2})
  log.samples([{'step': 1, 'logp': [-math.inf, np.float32('nan'), -0.5]}])
  log.close()
  metrics, samples = (
    strict((tmp_path / f'{name}.jsonl').read_text())
    for name in ('metrics', 'samples')
  )
  assert [metrics[k] for k in 'abcde'] == [None, None, None, None, 2.0]
  assert samples == {'step': 1, 'logp': [None, None, -0.5]}


def test_a_sample_may_hold_anything(tmp_path):
  log = Logger(tmp_path)
  row = {
    'step': 1,
    'completion': 'half a pair: \ud800, a pair: \U0001f600',
    'array': np.arange(2.0),
    'inner': {1: (True, None)},
    'object': range(3),
  }
  log.samples([row])
  log.close()
  assert read_rows(tmp_path / 'samples.jsonl') == [
    {
      **row,
      'array': [0.0, 1.0],
      'inner': {'1': [True, None]},
      'object': 'range(0, 3)',
    }
  ]


def test_a_new_logger_adds_to_the_files(tmp_path):
  for step in (1, 2):
    log = Logger(tmp_path)
    log.metrics('train', step, {})
    log.close()
  steps = [row['step'] for row in rows_of(tmp_path / 'metrics.jsonl')]
  assert steps == [1, 2]


def test_a_resumed_logger_drops_what_comes_again(tmp_path):
  log = Logger(tmp_path)
  for step in range(5):
    log.metrics('train', step, {})
    log.samples([{'step': step}])
  log.close()
  log = Logger(tmp_path, resume_step=2)
  log.metrics('train', 3, {'again': 1})
  log.close()
  metrics = rows_of(tmp_path / 'metrics.jsonl')
  assert [row['step'] for row in metrics] == [0, 1, 2, 3]
  assert metrics[-1]['again'] == 1
  samples = rows_of(tmp_path / 'samples.jsonl')
  assert [row['step'] for row in samples] == [0, 1, 2]
  assert {p.name for p in tmp_path.iterdir()} == {
    'metrics.jsonl',
    'samples.jsonl',
  }


def line_of(step):
  return json.dumps({'step': step, 'text': AWKWARD}, ensure_ascii=False) + '\n'


def test_trim_drops_a_line_cut_anywhere(tmp_path):
  path = tmp_path / 'rows.jsonl'
  whole, last = (line_of(1) + line_of(2)).encode(), line_of(2).encode()
  for cut in range(1, len(last) - 1):  # also within a character's bytes
    path.write_bytes(whole + last[:cut])
    trim_jsonl(path, 2)
    assert path.read_bytes() == whole


def test_trim_keeps_every_row_up_to_the_step_bitwise(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text(''.join(map(line_of, [1, 3, 2, 4, 2])), encoding='utf-8')
  trim_jsonl(path, 2)
  kept = ''.join(map(line_of, [1, 2, 2])).encode()
  assert path.read_bytes() == kept
  trim_jsonl(path, 2)  # once more changes nothing
  assert path.read_bytes() == kept
  trim_jsonl(path, 0)
  assert path.read_bytes() == b''


def test_trim_ends_a_whole_last_line(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(line_of(1).encode().rstrip(b'\n'))
  trim_jsonl(path, 1)
  assert path.read_bytes() == line_of(1).encode()


ODD = '3', 'null', '[]', '"x"', '{}', '{"step": null}', '{"step": "x"}', 'x'
NAN_STEP = '{"step": NaN}'


def test_lines_that_are_no_rows_are_skipped_and_counted(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  odd = [*ODD, NAN_STEP, '[' * 100_000, '{"step": ' + '9' * 5000 + '}']
  for line in odd:
    raw = f'{line_of(1)}{line}\n\n{line_of(2)}'.encode() + b'{"step": 3, "\xc3'
    path.write_bytes(raw)
    skipped = []
    rows = list(iterate_rows(path, skipped.append))
    assert [row['step'] for row in rows] == [1, 2]
    assert skipped == [2, 5]
    assert read_rows(path) == read_metrics(tmp_path) == rows
    assert trim_jsonl(path, 5) == 1  # the unfinished line is no surprise
    assert path.read_text() == line_of(1) + line_of(2)
  assert read_rows(tmp_path / 'none.jsonl') == []


def test_a_resume_warns_of_lines_that_are_no_rows(tmp_path, capsys):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('null\n3\n' + line_of(1) + '{"step"')
  Logger(tmp_path, resume_step=1).close()
  said = f'warning: {path}: 2 lines that are no rows are dropped\n'
  assert capsys.readouterr().out == said
  assert path.read_text() == line_of(1)


def test_a_write_is_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'file'
  assert atomic_write(path, 'a\r\né\ud800') == path
  assert path.read_bytes() == 'a\r\né?'.encode()

  def parts():
    yield 'b'
    assert path.read_bytes() == 'a\r\né?'.encode()
    if fails:
      raise OSError('disk')

  fails = True
  with pytest.raises(OSError, match='disk'):
    atomic_write(path, parts())
  assert path.read_bytes() == 'a\r\né?'.encode()
  fails = False
  atomic_write(path, parts())
  assert path.read_bytes() == b'b'
  assert os.listdir(tmp_path) == ['file']


def test_trim_of_no_file_makes_none(tmp_path):
  trim_jsonl(tmp_path / 'rows.jsonl', 3)
  assert list(tmp_path.iterdir()) == []


def scalars(directory):
  """Reads event files, records of length, checksum, data, checksum, to
  {(tag, step): value}."""
  from tensorboardX.proto import event_pb2

  found = {}
  for path in directory.glob('events.out.tfevents.*'):
    raw = path.read_bytes()
    while raw:
      (size,) = struct.unpack('<Q', raw[:8])
      event = event_pb2.Event.FromString(raw[12 : 12 + size])
      raw = raw[16 + size :]
      for value in event.summary.value:
        found[value.tag, event.step] = value.simple_value
  return found


def test_tensorboard_has_the_same_numbers(tmp_path):
  log = Logger(tmp_path, 'tensorboard')
  log.metrics('warm_start', 1, {'loss': 2})
  log.metrics('train', 1, {'reward': 0.25})
  log.metrics('train', 2, {'reward': 0.5})
  log.metrics('eval', 2, {'eval/reward': 1.0, 'eval/long/reward': 0.75})
  log.metrics('eval', 3, {'eval/reward': math.nan, 'kl': None})
  log.close()
  assert scalars(tmp_path / 'tb') == {
    ('warm_start/loss', 1): 2.0,
    ('reward', 1): 0.25,
    ('reward', 2): 0.5,
    ('eval/reward', 2): 1.0,
    ('eval/long/reward', 2): 0.75,
  }


# --- silence


def test_other_processes_write_and_say_nothing(tmp_path, capfd):
  log = Logger(tmp_path / 'run', 'tensorboard', resume_step=3, is_main=False)
  log.metrics('train', 1, {'reward': 1})
  log.samples([{'step': 1}])
  log.message('x')
  log.warn('x')
  with log.doing('x'):
    pass
  with log.bar('train', 2) as show:
    show(1, 'x')
    show(2, 'x')
  log.close()
  assert list(tmp_path.iterdir()) == []
  assert capfd.readouterr() == ('', '')


def test_without_a_directory_only_the_console_is_used(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  log = Logger(report_to='tensorboard')
  log.metrics('train', 1, {'reward': 1})
  log.samples([{'step': 1}])
  log.close()
  assert list(tmp_path.iterdir()) == []


# --- console


def test_text_is_never_markup(capsys):
  log = Logger()
  text = '[red]x[/red] [/] [bold :smile: {0} \\[y]'
  log.message(text)
  log.message(text, style='bold')
  log.warn(text)
  with log.doing(text):
    pass
  with log.bar('train', 1) as show:
    show(1, text)
  lines = capsys.readouterr().out.splitlines()
  assert lines[:4] == [text, text, f'warning: {text}', f'{text} ...']
  assert lines[4].startswith(f'{text}: ')
  assert lines[5] == f'train 1/1  {text}  ETA 0:00'
  assert len(lines) == 6


def test_a_long_line_is_not_broken(capsys):
  Logger().message('word ' * 100)
  assert capsys.readouterr().out.count('\n') == 1


def test_plain_lines_come_at_most_every_few_seconds(capsys, clock):
  log = Logger()
  with log.bar('train', 100) as show:
    for done in range(1, 101):
      clock.now += 1.0
      show(done, f'r {done}')
  out = capsys.readouterr().out
  assert '\x1b' not in out
  assert '\r' not in out
  gap = int(module.PLAIN_EVERY)
  shown = [*range(1, 101, gap)]
  shown += [100] * (shown[-1] != 100)  # the last is always said
  assert out.splitlines() == [
    f'train {i}/100  r {i}  ETA {duration(100 - i)}' for i in shown
  ]


def test_the_eta_of_a_resumed_bar_counts_only_its_own_steps(capsys, clock):
  with Logger().bar('train', 100, start=90) as show:
    clock.now += 20.0
    show(92, '')
  assert capsys.readouterr().out.endswith('ETA 1:20\n')


def test_doing_says_how_long_it_took(capsys, clock):
  with Logger().doing('compiling'):
    clock.now += 12.34
  assert capsys.readouterr().out == 'compiling ...\ncompiling: 12.3 s\n'


def test_a_terminal_gets_a_live_line_with_an_eta():
  log = Logger()
  screen = io.StringIO()
  log.console = rich.console.Console(
    file=screen, force_terminal=True, width=100, _environ={'TERM': 'xterm'}
  )
  with log.bar('train [red]', 4) as show:
    show(2, 'half [blue] :smile:')
  with log.doing('compiling [green]'):
    pass
  said = screen.getvalue()
  assert '\x1b' in said
  for part in ('train [red]', '2/4', 'half [blue] :smile:', 'ETA 0:00'):
    assert part in said
  assert 'compiling [green] ...' in said
  assert 'compiling [green]: 0.0 s' in said


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [
    (0, '0:00'),
    (0.4, '0:00'),
    (7, '0:07'),
    (59.4, '0:59'),
    (59.6, '1:00'),
    (75.2, '1:15'),
    (3599.4, '59:59'),
    (3599.6, '1:00:00'),
    (3723, '1:02:03'),
    (100 * 3600 + 1, '100:00:01'),
  ],
)
def test_duration(seconds, text):
  assert duration(seconds) == text


def test_a_resume_keeps_the_warm_start_and_says_after_again(tmp_path):
  path = tmp_path / 'rows.jsonl'
  rows = [
    {'step': 40, 'phase': 'warm_start'},
    {'step': 2, 'split': 'before'},
    {'step': 2, 'split': 'after'},
    {'step': 3, 'phase': 'train'},
  ]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  trim_jsonl(path, 2)
  kept = [json.loads(line) for line in path.read_text().splitlines()]
  assert kept == rows[:2]
