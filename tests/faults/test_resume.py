"""Faults 1, 3 and 9 of a run that goes on: it tells what has changed, loses no
rows unsaid, and stops in a word. tests/faults/test_kills.py has kill -9 at
random moments."""

import dataclasses
import json
import shutil
import signal

import pytest
from safetensors.numpy import load_file
from tensorboardX.proto.event_pb2 import Event

from jaxrl_tok import Task, data, main
from jaxrl_tok.checkpoint import NotResumed
from jaxrl_tok.progress import LoopConfig, Progress, after_evaluation
from jaxrl_tok.report.console import Stream
from jaxrl_tok.report.files import read_metrics
from jaxrl_tok.report.logger import Logger
from jaxrl_tok.run import foundation, record
from jaxrl_tok.run.settings import RunSettings
from jaxrl_tok.run.sources import source_of
from jaxrl_tok.train import stop_requested

pytestmark = pytest.mark.usefixtures('one_device', 'few_programs')

RECORDS = [{'prompt': f'{i} and {i}:', 'answer': str(i)} for i in range(20)]
SMALL = {
  'num_prompts': 4,
  'num_generations': 2,
  'held_out': 4,
  'max_steps': 4,
  'eval_every': 0,
  'save_every': 2,
  'keep': 3,
  'report_to': 'none',
  'max_completion_length': 3,
  'length_buckets': 1,
  'log_kl': False,
  'd_model': 16,
  'num_layers': 1,
  'num_heads': 2,
  'num_kv_heads': 1,
  'd_ff': 16,
}


def varied(completion_ids, **columns):
  return [len(set(ids)) + ids[0] / 300 for ids in completion_ids]


def run(out, *flags, records=RECORDS, reward=varied, **more):
  return main(
    Task(records, reward), [f'--output_dir={out}', *flags], **SMALL | more
  )


def rows(out) -> list[dict]:
  """Rows of steps, without the times."""
  return [
    {k: v for k, v in row.items() if 'time' not in k and k[-6:] != 'second'}
    for row in read_metrics(out)
    if row['phase'] == 'train'
  ]


def refused(capsys, out, *flags, **more) -> tuple[str, list[str]]:
  """(the line that a run ended in, the lines before it); nothing changed."""
  before = {p: p.stat().st_mtime_ns for p in out.rglob('*')}
  with pytest.raises(SystemExit) as stopped:
    run(out, *flags, **more)
  assert stopped.value.code == 2
  assert {p: p.stat().st_mtime_ns for p in out.rglob('*')} == before
  said = capsys.readouterr()
  (line,) = said.err.strip().splitlines()
  return line, said.out.splitlines()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Directory of a run that nothing stopped."""
  out = tmp_path_factory.mktemp('runs') / 'whole'
  run(out)
  return out


@pytest.fixture
def halted(whole, tmp_path):
  """Directory of a run that was killed after step 3."""
  out = shutil.copytree(whole, tmp_path / 'halted')
  shutil.rmtree(out / 'checkpoints/4')
  lines = (out / 'metrics.jsonl').read_text().splitlines(keepends=True)
  kept = [s for s in lines if json.loads(s)['step'] < 4]
  (out / 'metrics.jsonl').write_text(''.join(kept))
  shutil.rmtree(out / 'export')
  return out


def same(a, b) -> None:
  assert rows(a) == rows(b)
  one, two = (load_file(x / 'export/model.safetensors') for x in (a, b))
  assert {k: v.tobytes() for k, v in one.items()} == {
    k: v.tobytes() for k, v in two.items()
  }


# --- fault 9: what has changed ------------------------------------------------


def test_fault_9_changed_data_are_shown_and_refused(halted, whole, capsys):
  changed = [r | {'answer': '000'} for r in RECORDS]
  line, said = refused(capsys, halted, '--resume=auto', records=changed)
  assert line == (
    'error: the run began with other data (shown above); bring them back, or '
    'go on with the new ones by --allow_change data'
  )
  shown = [s.strip() for s in said if '-> 000' in s]
  assert shown[0] == 'warning:   record 0, answer: 0 -> 000' or len(shown) > 2
  run(halted, '--resume=auto', '--allow_change=data', records=changed)
  same(halted, whole)  # this reward reads no answer


def test_fault_9_flags_and_rewards_are_shown_and_refused(halted, capsys):
  def varied(completion_ids, **columns):
    return [1.0 for ids in completion_ids]

  flags = '--resume=auto', '--learning_rate=0.5', '--allow_change=data'
  line, said = refused(capsys, halted, *flags, reward=varied)
  assert 'began with other rewards, settings (shown above)' in line
  assert line.endswith('by --allow_change data,rewards,settings')
  text = '\n'.join(said)
  assert '  --learning_rate: None -> 0.5' in text
  assert '+    return [1.0 for ids in completion_ids]' in text
  assert '-  return [len(set(ids)) + ids[0] / 300 for ids in compl' in text


def described(**changes):
  base = {
    'data': foundation.describe_data(data.open_records(RECORDS)),
    'tokenizer': foundation.describe_tokenizer(data.byte_tokenizer()),
    'template': {'chat template': 'a\n{{ b }}\nc'},
    'model': {'rope_theta': '10000.0'},
    'rewards': {'varied': source_of(varied)},
  }
  return {'seed': 0, foundation.KEY: base | changes}


def test_each_change_has_its_word_and_a_diff():
  old = described()
  assert foundation.changes(old, described()) == {}
  half = foundation.describe_data(data.open_records(RECORDS[:10]))
  found = foundation.changes(
    old,
    described(
      data=half,
      template={'chat template': 'a\n{{ x }}\nc'},
      model={'rope_theta': '500.0', 'd_new': '1'},
    )
    | {'seed': 1},
  )
  assert found['template'] == ['chat template:', '  -{{ b }}', '  +{{ x }}']
  assert found['model'] == [
    'd_new: nothing -> 1',
    'rope_theta: 10000.0 -> 500.0',
  ]
  assert found['settings'] == ['--seed: 0 -> 1']
  assert 'records: 20 -> 10' in found['data']
  assert found.keys() == {'data', 'template', 'model', 'settings'}
  said = []
  with pytest.raises(NotResumed, match='by --allow_change data,model,settin'):
    foundation.check_changes(found, ['model'], said.append)
  assert said.count('changed since the checkpoint: model') == 1
  foundation.check_changes(found, list(found), said.append)


def test_rotated_ids_of_a_tokenizer_are_seen():
  texts = ['ab ab', 'ab'], ['ba ba', 'ba']
  a, b = (
    foundation.describe_tokenizer(data.bpe_tokenizer(t, 259)) for t in texts
  )
  found = foundation.changes(described(tokenizer=a), described(tokenizer=b))
  assert found.keys() == {'tokenizer'}


def test_one_column_of_one_record_is_seen():
  changed = [*RECORDS[:7], RECORDS[7] | {'answer': '8'}, *RECORDS[8:]]
  new = foundation.describe_data(data.open_records(changed))
  found = foundation.changes(described(), described(data=new))
  assert any(line.startswith('every column: ') for line in found['data'])


def test_a_checkpoint_of_an_older_version_knows_prompts_alone():
  new = described()
  prompts = new[foundation.KEY]['data']['prompts']
  assert foundation.changes({foundation.OLD_DATA: prompts}, new) == {}
  found = foundation.changes({foundation.OLD_DATA: '123'}, new)
  assert found == {'data': [f'prompts: 123 -> {prompts}']}


def test_a_run_may_go_on_for_longer():
  old = described() | {'max_steps': 10, 'lr_schedule': 'cosine'}
  old |= {'save_every': 3}
  assert foundation.changes(old, old | {'max_steps': 20, 'save_every': 1}) == {}
  found = foundation.changes(old, old | {'lr_schedule': 'constant'})
  assert found == {'settings': ['--lr_schedule: cosine -> constant']}


FACTOR = 2.0


def scaled(completions, **columns):
  return [FACTOR * helper(c) for c in completions]


def helper(text):
  return len(text)


def test_a_source_has_what_the_function_reads(monkeypatch):
  before = source_of(scaled)
  assert 'def helper(text)' in before
  assert '# FACTOR = 2.0' in before
  assert source_of(scaled) == before
  monkeypatch.setitem(globals(), 'FACTOR', 3.0)
  assert '# FACTOR = 3.0' in source_of(scaled)

  def made(weight):
    return lambda completions, **columns: [weight for c in completions]

  assert source_of(made(1)) == source_of(made(1)) != source_of(made(2))
  assert source_of(made('key-1')) != source_of(made('key-2'))
  assert 'key-1' not in source_of(made('key-1'))  # it may be one
  space = {}
  exec('def f(**c):\n  return 1', space)  # of no file
  assert source_of(space['f']).startswith('f: code ')


# --- checkpoints that are not there -------------------------------------------


def test_fault_1_killed_before_the_first_checkpoint(halted, whole, capsys):
  """Said, and the rows of before are set aside, not written twice."""
  shutil.rmtree(halted / 'checkpoints')
  run(halted, '--resume=auto')
  said = capsys.readouterr().out
  assert (
    f'{halted} has no checkpoint: begins at step 0; rows up to step 3 are set '
    'aside (*.old.jsonl)'
  ) in said
  assert len(rows(halted)) == 4
  assert (halted / 'metrics.old.jsonl').read_text().count('"train"') == 3
  same(halted, whole)


def test_lines_that_are_no_rows_do_not_stop_a_resume(halted, whole, capsys):
  with (halted / 'metrics.jsonl').open('a') as file:
    file.write('3\nnull\n[]\n{"a": 1}\n{"step": NaN}\n{"step": 4, "re')
  run(halted, '--resume=2', '--save_every=1')
  assert '5 lines that are no rows are dropped' in capsys.readouterr().out
  same(halted, whole)


# --- the run's directory ------------------------------------------------------


def test_two_runs_in_one_directory(tmp_path):
  """The lock ends with the run, and a forked child does not keep it."""
  for _ in range(2):
    with (
      record.locked(tmp_path),
      pytest.raises(ValueError, match='another run is in'),
      record.locked(tmp_path),
    ):
      pass
  with record.locked(tmp_path):
    record.let_go()  # as a child does
    with record.locked(tmp_path):
      pass
  assert list(tmp_path.iterdir()) == []


def test_two_default_runs_in_one_second(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(record.time, 'strftime', lambda form: 'NOW')
  found = [
    record.claim_output_dir(RunSettings(), 'x').as_posix() for _ in range(3)
  ]
  assert found == ['runs/x-NOW', 'runs/x-NOW-2', 'runs/x-NOW-3']


# --- fault 3: signals, and consoles that are lost -----------------------------


@pytest.mark.parametrize(
  'number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
)
def test_fault_3_signals_ask_once(number):
  if signal.getsignal(number) == signal.SIG_IGN:  # tests under nohup
    signal.signal(number, signal.SIG_DFL)
  before = signal.getsignal(number)
  with stop_requested() as asked:
    assert not asked()
    signal.raise_signal(number)
    assert asked()
    assert signal.getsignal(number) == signal.SIG_DFL  # a second one ends it
  assert signal.getsignal(number) == before


def test_nohup_is_obeyed():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with stop_requested() as asked:
      signal.raise_signal(signal.SIGHUP)
      assert not asked()
  finally:
    signal.signal(signal.SIGHUP, before)


class Closed:
  """Standard output whose reader went away."""

  encoding = 'utf-8'

  def isatty(self):
    return False

  def write(self, text):
    raise BrokenPipeError(32, 'Broken pipe')

  def flush(self):
    raise BrokenPipeError(32, 'Broken pipe')


def test_a_console_that_is_lost_is_said_once(monkeypatch, capsys):
  stream = Stream()
  stream.write('before\n')
  monkeypatch.setattr('sys.stdout', Closed())
  for word in ('one', 'two'):
    assert stream.write(word) == 3
    stream.flush()
  assert stream.lost == 'Broken pipe'
  said = capsys.readouterr()
  assert said.out == 'before\n'
  assert said.err == (
    'warning: the console cannot be written (Broken pipe)\nonetwo'
  )


def test_a_console_on_a_full_disk_is_said(monkeypatch, capsys):
  """Nothing is left in its buffer that would fail when the process ends."""
  stream = Stream()
  with open('/dev/full', 'w') as full:
    monkeypatch.setattr('sys.stdout', full)
    stream.write('words')
    stream.flush()
    assert stream.lost == 'No space left on device'
    full.flush()
  assert capsys.readouterr().err.count('\n') == 1


def test_fault_8_rows_on_a_full_disk(tmp_path):
  (tmp_path / 'metrics.jsonl').symlink_to('/dev/full')
  log = Logger(tmp_path)
  with pytest.raises(OSError, match='the disk is full: metrics'):
    log.metrics('train', 1, {'reward': 1.0})
  log.close()


def test_fault_3_a_closed_pipe_ends_a_run_with_a_save(
  whole, tmp_path, monkeypatch, capsys
):
  """As `| head -6`; resumed it is the run that nothing stopped."""
  out = tmp_path / 'run'
  monkeypatch.setattr('sys.stdout', Closed())
  with pytest.raises(SystemExit) as stopped:
    run(out)
  monkeypatch.undo()
  assert stopped.value.code == 75
  said = capsys.readouterr().err
  assert said.count('the console cannot be written') == 1
  assert (
    'stopped as its console is lost after step 1; go on with --output_dir '
    f'{out} --resume auto'
  ) in said
  assert [p.name for p in (out / 'checkpoints').iterdir()] == ['1']
  run(out, '--resume=auto')
  same(out, whole)


def test_where_to_go_on_is_said_once_it_is_on_disk(tmp_path, monkeypatch):
  """The sentence comes after the checkpoint's files."""
  out, seen, say = tmp_path / 'run', [], Logger.message

  def message(self, text, style=None):
    if '--resume auto' in text:
      seen.extend((out / 'checkpoints').glob('*/commit_success.txt'))
    say(self, text, style)

  def stopping(completion_ids, trainer_state, **columns):
    if trainer_state.global_step == 1:
      signal.raise_signal(signal.SIGTERM)
    return varied(completion_ids)

  monkeypatch.setattr(Logger, 'message', message)
  with pytest.raises(SystemExit) as stopped:
    run(out, reward=stopping)
  assert stopped.value.code == 75
  assert len(seen) == 1


# --- clocks and curves --------------------------------------------------------


def test_the_clock_goes_on(tmp_path):
  lines = [{'step': s, 'time': 100.0 * s, 'phase': 'train'} for s in (1, 2, 3)]
  text = ''.join(json.dumps(row) + '\n' for row in lines)
  (tmp_path / 'metrics.jsonl').write_text(text)
  log = Logger(tmp_path, resume_step=2)
  assert log.earlier == 200
  log.metrics('train', 3, {'reward': 1.0})
  log.close()
  assert [row['step'] for row in read_metrics(tmp_path)] == [1, 2, 3]
  assert 200 <= read_metrics(tmp_path)[2]['time'] < 290


def test_curves_are_not_drawn_twice(tmp_path):
  """Events of TensorBoard past the step that a run goes on from are purged."""
  for resumed in (None, 2):
    log = Logger(tmp_path, 'tensorboard', resume_step=resumed)
    log.metrics('train', 3, {'reward': 1.0})
    log.close()
  files = sorted((tmp_path / 'tb').iterdir())
  found = []
  for file in files:
    raw = file.read_bytes()
    while raw:
      size = int.from_bytes(raw[:8], 'little')
      event = Event.FromString(raw[12 : 12 + size])
      raw = raw[12 + size + 4 :]
      if event.session_log.status:
        found.append(event.step)
  assert found == [3]


# --- the best -----------------------------------------------------------------


def test_patience_exports_the_best():
  """Held-out .1 .9 .5 .4 .3 with --patience 3."""
  settings = RunSettings(patience=3)
  assert settings.exports_best
  assert settings.keeps_best
  assert not RunSettings().exports_best
  assert not dataclasses.replace(settings, export='last').exports_best
  progress, config = Progress(), LoopConfig(patience=3)
  for step, value in enumerate((0.1, 0.9, 0.5, 0.4, 0.3), 1):
    progress = dataclasses.replace(progress, step=step)
    progress = after_evaluation(progress, {'eval/reward': value}, config)
  assert (progress.best_step, progress.best_value) == (2, 0.9)


def test_a_run_with_patience_exports_its_best_step(tmp_path):
  held_out = {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.4, 5: 0.3}

  def staged(completion_ids, trainer_state, **columns):
    step = trainer_state.global_step
    return [held_out.get(step, 0.0) for ids in completion_ids]

  out = tmp_path / 'run'
  task = Task(RECORDS, varied, eval_rewards=staged)
  result = main(
    task,
    [f'--output_dir={out}', '--patience=3', '--eval_every=1', '--keep=2'],
    **SMALL | {'max_steps': 20, 'save_every': 1},
  )
  assert [v for k, v in result.summary.items() if 'best' in k] == ['step 2']
  kept = sorted(int(p.name) for p in (out / 'checkpoints').iterdir())
  assert kept == [2, 4, 5]
