"""Several processes do what one does, stop together, and resume."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from process_runs import RUNS, SIZE, task
from safetensors.numpy import load_file

from jaxrl_tok import main

PROGRAM = Path(__file__).with_name('process_runs.py')
HEARTBEAT = 10
COMPARED = 'supervised', 'groups', 'tensor'
TIMES = ('time', 'step_time', 'tokens_per_second')


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def start(count: int, devices: int, out: Path, names: str, *flags):
  """Starts the processes of a run; each writes OUT.log.N."""
  env = os.environ | {'JAX_NUM_CPU_DEVICES': str(devices)}
  env['PYTHONPATH'] = os.pathsep.join([str(PROGRAM.parent.parent), *sys.path])
  joined = (
    *('--coordinator_address', f'127.0.0.1:{free_port()}'),
    *('--num_processes', f'{count}'),
    *('--heartbeat_timeout', f'{HEARTBEAT}'),
  )
  found = []
  for number in range(count):
    which = (*joined, '--process_id', f'{number}') if count > 1 else ()
    command = [sys.executable, PROGRAM, out, names, *which, *flags]
    with open(f'{out}.log.{number}', 'a') as log:
      found.append(
        subprocess.Popen(
          list(map(str, command)), env=env, stdout=log, stderr=log
        )
      )
  return found


def wait(found: list, seconds: float = 300) -> list[int]:
  """Exit statuses of all."""
  end = time.monotonic() + seconds
  try:
    return [p.wait(max(0, end - time.monotonic())) for p in found]
  finally:
    for p in found:
      p.kill()


def rows(out: Path, name: str) -> list[dict]:
  lines = (out / f'{name}.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def log_of(out: Path, number: int) -> str:
  return Path(f'{out}.log.{number}').read_text()


def check_same(a: Path, b: Path) -> None:
  """Two runs: equal tokens, other numbers but for rounding."""
  before, after = (rows(out, 'metrics') for out in (a, b))
  assert len(before) == len(after)
  for x, y in zip(before, after):
    assert x.keys() == y.keys()
    for name in x.keys() - {'phase'}:
      if not name.startswith(TIMES):
        assert x[name] == pytest.approx(y[name], rel=1e-4, abs=1e-5), name

  def held_out(out):
    found = [r for r in rows(out, 'samples') if r['split'] != 'train']
    return [(r['split'], r['prompt'], r['completion']) for r in found]

  assert held_out(a) == held_out(b)
  a, b = (load_file(out / 'export/model.safetensors') for out in (a, b))
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_allclose(a[name], b[name], atol=1e-5)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """Directories of the runs on this process, which has 8 devices."""
  out = tmp_path_factory.mktemp('alone')
  for name in COMPARED:
    flags = ['--output_dir', str(out / name), '--no_cache']
    main(task(name), flags, **SIZE | RUNS[name])
  return out


def test_two_processes_are_one(alone, tmp_path):
  out = tmp_path / 'two'
  assert wait(start(2, 4, out, ','.join(COMPARED))) == [0, 0], log_of(out, 1)
  for name in COMPARED:
    check_same(alone / name, out / name)


@pytest.mark.slow  # a minute; rows of two processes are tested always
def test_episodes_of_two_processes_are_those_of_one(tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  assert wait(start(1, 8, one, 'turns')) == [0], log_of(one, 0)
  assert wait(start(2, 4, two, 'turns')) == [0, 0], log_of(two, 1)
  check_same(one / 'turns', two / 'turns')


@pytest.mark.slow  # a minute; two processes are tested always
def test_four_processes_are_one(alone, tmp_path):
  out = tmp_path / 'four'
  assert wait(start(4, 2, out, 'tensor')) == [0] * 4, log_of(out, 1)
  check_same(alone / 'tensor', out / 'tensor')


def test_what_fails_on_one_process_stops_all_and_is_resumed(tmp_path):
  out, resume = tmp_path / 'out', ('--resume', 'auto')
  ends = 'plain:1:1:raise', 'plain:1:2:term', 'plain:1:3:kill'
  found = start(2, 1, out, ','.join(['whole', *ends]), *resume)
  assert found[1].wait(300) == -9
  # a process that dies: the other ends soon
  died = time.monotonic()
  assert found[0].wait(120) not in (0, 2, 75)
  assert time.monotonic() - died < HEARTBEAT + 10
  for number in (0, 1):
    log = log_of(out, number)
    assert 'whole ended with 0' in log
    # a reward that fails: one line on each
    assert "process 1: reward digits raised KeyError: 'boom'" in log or number
    assert 'plain:1:1:raise ended with 2' in log
    # a signal to one of them: all save and exit with 75
    assert 'plain:1:2:term ended with 75' in log
  log = log_of(out, 0)
  assert 'resumed from step 1' in log  # the step before the failure was saved
  assert 'stopped by a signal after step 2' in log
  # other processes go on; and a failure is the status of both
  found = start(2, 1, out, 'plain,fails:1:1:raise', *resume)
  assert wait(found) == [2, 2], log_of(out, 0)
  for number in (0, 1):
    assert 'plain ended with 0' in log_of(out, number)
  both = out / 'whole', out / 'plain'
  a, b = (load_file(x / 'export/model.safetensors') for x in both)
  assert all(np.array_equal(a[name], b[name]) for name in a)
  a, b = ([r['completion'] for r in rows(x, 'samples')] for x in both)
  assert a == b


def test_processes_that_cannot_be_joined_are_refused_in_one_line(tmp_path):
  out = tmp_path / 'none'
  found = start(1, 1, out, 'plain', '--num_processes', 2, '--process_id', 5)
  assert wait(found) == [2]
  (line,) = [x for x in log_of(out, 0).splitlines() if 'error' in x]
  assert line.startswith('error: the processes cannot be joined')
  assert '--coordinator_address' in line
