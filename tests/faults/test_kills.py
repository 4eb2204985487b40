"""Fault 1: kill -9 at random moments, by hand (-m slow); about ten minutes.

KILLS=20 SEED=0 python -m pytest -m slow -n 0 -s tests/faults/test_kills.py
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def command(out: Path) -> list[str]:
  flags = f'--output_dir={out}', '--resume=auto'
  return [sys.executable, str(HERE / 'kill_run.py'), *flags]


def environment() -> dict:
  """One device, and a path to the package."""
  paths = [str(HERE.parent.parent), os.environ.get('PYTHONPATH', '')]
  more = {'PYTHONPATH': os.pathsep.join(paths), 'JAX_NUM_CPU_DEVICES': '1'}
  return os.environ | more


def rows(out: Path, name: str) -> list[dict]:
  """Rows of steps, without times."""
  file = out / f'{name}.jsonl'
  lines = file.read_text().splitlines() if file.is_file() else []
  found = [json.loads(line) for line in lines if line.endswith('}')]
  clocks = 'time', 'step_time', 'tokens_per_second'
  return [
    {k: v for k, v in r.items() if k.split('/')[0] not in clocks} for r in found
  ]


def steps(out: Path) -> int:
  return max((row['step'] for row in rows(out, 'metrics')), default=0)


def live(out: Path, more: int, wait: float) -> bool:
  """Runs until `more` steps are written, and some seconds later kills it by
  SIGKILL; tells whether it was killed before its end."""
  log, begun = out.parent / 'log', None
  with log.open('wb') as file:
    process = subprocess.Popen(
      command(out), stdout=file, stderr=file, env=environment()
    )
  while process.poll() is None:
    if begun is None and 'run directory: ' in log.read_text(errors='replace'):
      begun = steps(out)  # those after the checkpoint are gone
    if begun is not None and steps(out) >= begun + more:
      time.sleep(wait)
      process.kill()
      process.wait()
      break
    time.sleep(0.02)
  return process.returncode != 0


def digests(out: Path, step: int) -> dict:
  """Digests of the whole state, and of the place in the data."""
  file = out / f'checkpoints/{step}/meta/metadata'
  meta = json.loads(file.read_text())
  return {k: meta[k] for k in ('digests', 'cursor', 'progress')}


@pytest.mark.slow
def test_fault_1_kill_9_at_random_moments(tmp_path):
  """Parameters, optimizer, critic, tokens and metrics are those of a run that
  was not stopped."""
  whole, out = tmp_path / 'whole/run', tmp_path / 'killed/run'
  for place in (whole, out):
    place.parent.mkdir()
  subprocess.run(
    command(whole), check=True, capture_output=True, env=environment()
  )
  chance = random.Random(int(os.environ.get('SEED', '0')))
  wanted, kills = int(os.environ.get('KILLS', '20')), []
  while len(kills) < wanted:
    more, wait = chance.choice([0, 1, 4, 8, 12]), chance.uniform(0, 1)
    if not live(out, more, wait):
      break
    kills.append(steps(out))
  done = subprocess.run(
    command(out), check=False, capture_output=True, env=environment(), text=True
  )
  print(f'{len(kills)} kills, at steps {kills}')
  assert done.returncode == 0, done.stderr
  for name in ('metrics', 'samples'):
    assert rows(out, name) == rows(whole, name)
  last = steps(whole)
  assert digests(out, last) == digests(whole, last)
  one, two = (x / 'export/model.safetensors' for x in (whole, out))
  assert one.read_bytes() == two.read_bytes()
