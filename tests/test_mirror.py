"""Runs in a bucket, gs://BUCKET/RUN, with a fake of Google Cloud Storage."""

import json
from pathlib import Path

import fake_gcs
import hypothesis
import hypothesis.strategies as st
import jax
import pytest
from conftest import late_letters

from jaxrl_tok import Task, checkpoint, main
from jaxrl_tok.hub.export import export_run
from jaxrl_tok.report import mirror
from jaxrl_tok.report.files import read_metrics
from jaxrl_tok.report.logger import Logger
from jaxrl_tok.run.record import claim_output_dir
from jaxrl_tok.run.settings import RunSettings

pytestmark = pytest.mark.usefixtures('few_programs')

RUN = 'gs://bucket/my runs/first'


def forget():
  """Forgets the local directories, as another machine does not know them."""
  mirror._mirrors.clear()


@pytest.fixture
def store(monkeypatch):
  with fake_gcs.Server() as server:
    for name, value in server.environment.items():
      monkeypatch.setenv(name, value)
    import gcsfs

    gcsfs.GCSFileSystem.clear_instance_cache()
    forget()
    yield server.store
    forget()
    gcsfs.GCSFileSystem.clear_instance_cache()


def contents(run_dir: Path) -> dict[str, bytes]:
  return {
    file.relative_to(run_dir).as_posix(): file.read_bytes()
    for file in run_dir.rglob('*')
    if file.is_file()
  }


NAMES = ['metrics.jsonl', 'model/a é.json', 'model/config.json', 'x [1]/y']
STEPS = st.lists(
  st.tuples(st.sampled_from(NAMES), st.sampled_from(['write', 'add', 'delete']))
)


@hypothesis.settings(
  max_examples=10,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(st.lists(STEPS, max_size=3))
def test_another_machine_reads_what_was_written(store, between):
  """Whatever is written, added to and deleted between copies."""
  store.objects.clear()
  forget()
  run_dir = mirror.local(RUN)
  for number, steps in enumerate(between):
    for name, action in steps:
      file = run_dir / name
      file.parent.mkdir(exist_ok=True)
      if action == 'delete':
        file.unlink(missing_ok=True)
      else:
        with file.open('w' if action == 'write' else 'a') as opened:
          opened.write(f'{name} {number}\n')
    mirror.push(run_dir)
  forget()
  assert contents(mirror.local(RUN)) == contents(run_dir)


def test_only_what_changed_is_copied(store):
  run_dir = mirror.local(RUN)
  for name in ('a', 'b'):
    (run_dir / name).write_text(name)
  mirror.push(run_dir)
  assert store.generation == 2
  mirror.push(run_dir)
  assert store.generation == 2
  (run_dir / 'a').write_text('more')
  (run_dir / '.a.77').write_text('half of it')
  mirror.push(run_dir, every=60)  # too early
  assert store.generation == 2
  mirror.push(run_dir)
  assert store.names('bucket') == ['my runs/first/a', 'my runs/first/b']
  assert store.objects['bucket', 'my runs/first/a'][0] == b'more'


def test_a_directory_that_is_replaced_has_no_old_files(store):
  for name in ('export/old', 'export/config.json', 'tb/old', 'checkpoints/1/x'):
    store.put('bucket', f'my runs/first/{name}', b'old')
  run_dir = mirror.local(RUN)
  assert contents(run_dir) == {}  # not read
  assert {p.name for p in run_dir.iterdir()} == {'export', 'tb', 'checkpoints'}
  (run_dir / 'export/config.json').write_text('new')
  (run_dir / 'tb/new').write_text('new')
  mirror.push(run_dir)
  names = [name.partition('first/')[2] for name in store.names('bucket')]
  assert names == ['checkpoints/1/x', 'export/config.json', 'tb/new', 'tb/old']


def test_config_is_the_last_file_of_a_directory(store):
  run_dir = mirror.local(RUN)
  (run_dir / 'export').mkdir()
  for name in ('config.json', 'a', 'z'):
    (run_dir / 'export' / name).write_text(name)
  mirror.push(run_dir)
  order = sorted(store.objects, key=lambda key: store.objects[key][1])
  assert order[-1][1].endswith('config.json')


def test_a_local_run_is_as_it_was(tmp_path):
  assert mirror.local(tmp_path / 'x') == tmp_path / 'x'
  assert mirror.local('a/../b') == Path('a/../b')
  assert mirror.name_of('runs/x') == 'runs/x'
  assert mirror.checkpoints('x') == Path('x').absolute() / 'checkpoints'
  mirror.push(tmp_path)
  mirror.probe(tmp_path)
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('address', ['s3://a/b', 'gs://', 'memory://x'])
def test_other_addresses_are_refused(address):
  with pytest.raises(ValueError, match='must be a directory or gs://'):
    mirror.check_address(address)


def test_without_gcsfs_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(mirror.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r'jaxrl_tok\[gcs\]'):
    mirror.check_address(RUN)


def test_a_bucket_that_is_not_empty_is_refused(store):
  store.put('bucket', 'my runs/first/checkpoints/1/x', b'')
  run = RunSettings(output_dir=RUN)
  with pytest.raises(ValueError, match=f'--output_dir {RUN} is not empty'):
    claim_output_dir(run, 'x')
  with pytest.raises(ValueError, match='must be a local directory'):
    claim_output_dir(run, 'x', resumable=False)


def test_a_bucket_that_cannot_be_written_is_refused(store):
  store.refuse = lambda method, name: method != 'GET'
  with pytest.raises(OSError, match='cannot be written') as error:
    claim_output_dir(RunSettings(output_dir=RUN), 'x')
  assert '\n' not in str(error.value)


def test_a_failed_copy_is_said_and_tried_again(store, capsys):
  run_dir = mirror.local(RUN)
  logger = Logger(run_dir)
  store.refuse = lambda method, name: method != 'GET'
  logger.metrics('train', 1, {'reward': 1.0})
  logger._push()
  assert 'cannot be written' in ' '.join(capsys.readouterr().out.split())
  with pytest.raises(OSError, match='cannot be written'):
    mirror.push(run_dir)  # before a checkpoint
  store.refuse = lambda method, name: False
  logger.close()
  kept = store.objects['bucket', 'my runs/first/metrics.jsonl'][0]
  assert json.loads(kept)['reward'] == 1.0


def train(out, *flags):
  return main(
    Task([{'prompt': f'{i}:'} for i in range(20)], late_letters),
    [f'--output_dir={out}', '--mesh=data=1', *flags],
    d_model=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    d_ff=8,
    num_prompts=4,
    num_generations=2,
    held_out=4,
    eval_every=0,
    save_every=1,
    report_to='none',
    baseline='none',
    max_completion_length=2,
    length_buckets=1,
    log_kl=False,
  )


def test_a_run_goes_on_in_its_bucket(store, tmp_path, capsys, monkeypatch):
  """Stopped after step 1, resumed on a machine that knows nothing of it."""
  one = jax.local_devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *args: one)
  train(RUN, '--max_steps=1')
  forget()
  result = train(RUN, '--max_steps=2', '--resume=auto')
  said = ' '.join(capsys.readouterr().out.split())
  assert said.count(f'run directory: {RUN}') == 2
  assert 'resumed from step 1' in said
  assert f'report: {RUN}/report.html' in said
  assert repr(result).startswith(f'run {RUN}')
  assert not list(Path().glob('gs:*'))
  forget()
  run_dir = mirror.local(RUN)
  rows = [row for row in read_metrics(run_dir) if row['phase'] == 'train']
  assert [row['step'] for row in rows] == [1, 2]
  assert checkpoint.saved_steps(run_dir) == [1, 2]
  names = {n.partition('first/')[2] for n in store.names('bucket')}
  assert {'report.html', 'config.yaml', 'export/config.json'} <= names
  assert not any('.partial' in name for name in names)
  export_run(RUN, tmp_path / 'out')  # from the checkpoint
  weights = 'model.safetensors'
  found = (tmp_path / 'out' / weights).read_bytes()
  assert store.objects['bucket', f'my runs/first/export/{weights}'][0] == found
