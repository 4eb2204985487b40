"""Benchmark startup: from the start of a process to its first finished step."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.studies.bench.timing import Row, Work
from jaxrl_tok.report.files import read_metrics

LOOK_EVERY = 0.05  # s


def first_step(home: str) -> float:
  """Seconds until the default experiment has logged its first step; `home`
  holds its caches."""
  env = os.environ | {'XDG_CACHE_HOME': home}
  env.pop('JAX_COMPILATION_CACHE_DIR', None)  # it would not be in `home`
  with tempfile.TemporaryDirectory() as out:
    command = [sys.executable, '-m', 'experiments.arithmetic', '--max_steps=1']
    with Path(out, 'console').open('w') as console:
      began = time.perf_counter()
      process = subprocess.Popen(
        [*command, f'--output_dir={out}/run'],
        env=env,
        stdout=console,
        stderr=console,
      )
      took = None
      while took is None and process.poll() is None:
        time.sleep(LOOK_EVERY)
        rows = read_metrics(Path(out, 'run'))
        if any(row.get('phase') == 'train' for row in rows):
          took = time.perf_counter() - began
      process.wait()  # compiled programs are cached by its end
    if took is None:
      last = Path(out, 'console').read_text().strip().splitlines()[-1:]
      raise ValueError(f'{" ".join(command)} ended: {"".join(last)}')
  return took


def startup(work: Work) -> list[Row]:
  """Measures a start with empty caches, the warm start included; then one with
  its programs and warm start cached."""
  found = {'cold': [], 'warm': []}
  for i in range(work.rounds):
    with tempfile.TemporaryDirectory() as home:
      for who, times in found.items():
        times.append(first_step(home))
        work.show(f'round {i + 1} of {work.rounds}: {who} {times[-1]:.1f} s')
  return [Row('startup', '-', who, t, 0, {}) for who, t in found.items()]
