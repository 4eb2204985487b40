"""Soak: a run whose reward misbehaves in every way, killed again and again.

  python tests/faults/soak.py OUT --minutes 120 --kill_every 180

A loop starts the run again after every end that is not its own. The reward goes
a random one of misbehaving.WAYS for one completion in `--one_in`; the run is
killed (kill -9) at random moments. At the end, soak.json and soak.svg in OUT
hold lost steps, counted faults, memory, open files and processes over time; the
exit status is 1 where the run made no way, or a process is left.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

MARK = 'JAXRL_TOK_SOAK'  # variable of all processes of a soak
AGAIN = (
  75,
  -signal.SIGKILL,
  -signal.SIGTERM,
)  # statuses after which it goes on
STEPS = 1_000_000


# --- the run -----------------------------------------------------------------


def hostile(completions, completion_ids, trainer_state, log_metric, **columns):
  """Lengths; now and then a completion goes one of the ways."""
  import misbehaving

  ways, step = list(misbehaving.WAYS.items()), trainer_state.global_step
  for ids in completion_ids:
    chance = random.Random(f'{step} {ids}')  # asked again, it goes the same way
    if chance.random() < 1 / int(os.environ['ONE_IN']):
      name, (go, _) = chance.choice(ways)
      log_metric(f'went/{name}', 1.0)
      go()
  return [float(len(text)) for text in completions]


def run(out: str) -> None:
  """The run, for ever."""
  from jaxrl_tok import Task, main

  records = [{'prompt': f'{i} and {i * i}:'} for i in range(200)]
  main(
    Task(records, {'hostile': hostile}),
    [f'--output_dir={out}', '--resume=auto'],
    reward_workers=2,
    reward_timeout=5.0,
    reward_memory=0.5,
    reward_on_error='mask',
    step_timeout=300.0,
    max_steps=STEPS,
    save_every=10,
    eval_every=0,
    num_prompts=8,
    num_generations=4,
    max_completion_length=8,
    length_buckets=1,
    d_model=32,
    num_layers=1,
    log_kl=False,
    held_out=8,
    report_to='none',
    mesh='data=1',
  )


# --- the loop around it ------------------------------------------------------


class Look(NamedTuple):
  """Numbers of the run at a moment."""

  seconds: float
  memory: float  # MiB of the run, without workers
  files: int  # open in it
  processes: int  # of the soak, without the run
  step: int


def processes_of(mark: str) -> list[int]:
  """Processes whose environment has the soak's mark."""
  text, found = f'{MARK}={mark}'.encode(), []
  for file in Path('/proc').glob('[0-9]*/environ'):
    with contextlib.suppress(OSError):
      found += [int(file.parent.name)] * (text in file.read_bytes())
  return found


def last_step(out: Path) -> int:
  """Last step in metrics.jsonl."""
  with contextlib.suppress(OSError, ValueError, IndexError):
    lines = (out / 'metrics.jsonl').read_text().splitlines()
    return json.loads(lines[-1])['step']
  return 0


def look(began: float, process, mark: str, out: Path) -> Look | None:
  """A look at the run; None while it begins or ends."""
  place = Path('/proc') / str(process.pid)
  try:
    status = (place / 'status').read_text()
    files = len(os.listdir(place / 'fd'))
    memory = int(re.search(r'VmRSS:\s+(\d+)', status)[1]) / 1024
  except (OSError, TypeError):
    return None
  others = len(processes_of(mark)) - 1
  seconds = time.monotonic() - began
  return Look(seconds, memory, files, others, last_step(out))


def soak(out: Path, minutes: float, kill_every: float, one_in: int) -> dict:
  """Runs the soak; returns its summary."""
  out.mkdir(parents=True, exist_ok=True)
  here, mark = Path(__file__).parent, f'{os.getpid()}'
  path = os.pathsep.join([str(here), str(here.parent.parent), *sys.path])
  env = os.environ | {MARK: mark, 'ONE_IN': str(one_in), 'PYTHONPATH': path}
  began, looks, starts, kills = time.monotonic(), [], [], 0
  end, chance, statuses = began + 60 * minutes, random.Random(0), {}
  while time.monotonic() < end:
    log = out / f'log-{len(starts)}.txt'
    starts.append(last_step(out / 'run'))
    with log.open('w') as file:
      process = subprocess.Popen(
        [sys.executable, __file__, str(out / 'run'), '--run'],
        stdout=file,
        stderr=file,
        env=env,
      )
      spent = chance.uniform(0.5, 1.5) * kill_every
      kill_at = min(time.monotonic() + spent, end)
      while process.poll() is None and time.monotonic() < kill_at:
        time.sleep(1)
        looks += filter(None, [look(began, process, mark, out / 'run')])
      if process.poll() is None:
        last = time.monotonic() >= end
        process.send_signal(signal.SIGTERM if last else signal.SIGKILL)
        kills += not last
        with contextlib.suppress(subprocess.TimeoutExpired):
          process.wait(60)
    status = process.poll()
    statuses[str(status)] = statuses.get(str(status), 0) + 1
    if status not in AGAIN:
      break
  time.sleep(3)
  lost, resumed = lost_steps(out, starts)
  rows = read_rows(out / 'run')
  return {
    'minutes': (time.monotonic() - began) / 60,
    'starts': len(starts),
    'kills': kills,
    'statuses': statuses,
    'steps': last_step(out / 'run'),
    'lost_steps': lost,
    'resumed_from': resumed,
    'errors': total(rows, 'rewards/hostile/errors'),
    'killed_workers': total(rows, 'rewards/hostile/killed'),
    'processes_left': len(processes_of(mark)),
    'looks': looks,
  }


def lost_steps(out: Path, starts: list[int]) -> tuple[list[int], list[int]]:
  """(steps that were made again after each kill, steps that were gone on
  from)."""
  lost, resumed = [], []
  for i, before in enumerate(starts[1:], 1):
    text = (out / f'log-{i}.txt').read_text(errors='replace')
    if found := re.search(r'resumed from step (\d+)', text):
      resumed.append(int(found[1]))
      lost.append(before - int(found[1]))
  return lost, resumed


def read_rows(out: Path) -> list[dict]:
  with contextlib.suppress(OSError):
    lines = (out / 'metrics.jsonl').read_text().split('\n')
    return list(map(json.loads, lines[:-1]))
  return []


def total(rows: list[dict], name: str) -> float:
  """Sum of a metric over the steps that stayed."""
  return sum(row.get(name) or 0 for row in rows)


def picture(looks: list[Look]) -> str:
  """Memory, files and processes over minutes, each below the other."""
  from jaxrl_tok.report.charts import COLOURS, Curve, chart, svg, tag

  names = {
    'memory': 'memory of the run, MiB',
    'files': 'open files of the run',
    'processes': 'workers and their children',
    'step': 'step',
  }
  parts, size = [], (720, 190)
  for i, (name, label) in enumerate(names.items()):
    points = [(x.seconds / 60, float(getattr(x, name))) for x in looks]
    curve = Curve(label, points, COLOURS[i], end='')
    inside = chart(
      [curve], label, size, large=True, caption='minutes', x_name='minute'
    )
    parts.append(tag('g', inside, transform=f'translate(0 {i * 200})'))
  return svg(''.join(parts), 'Soak, by minutes', (720, 200 * len(names)))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('out', type=Path)
  parser.add_argument('--minutes', type=float, default=120)
  parser.add_argument('--kill_every', type=float, default=180)
  parser.add_argument('--one_in', type=int, default=200)
  parser.add_argument('--run', action='store_true', help='the run itself')
  given = parser.parse_args()
  if given.run:
    run(str(given.out))
    return
  found = soak(given.out, given.minutes, given.kill_every, given.one_in)
  looks = found.pop('looks')
  if len(looks) > 1:
    (given.out / 'soak.svg').write_text(picture(looks))
  text = json.dumps(found | {'looks': [list(x) for x in looks]})
  (given.out / 'soak.json').write_text(text)
  third = max(len(looks) // 3, 1)
  for name in ('memory', 'files', 'processes'):
    numbers = [getattr(x, name) for x in looks]
    for part, some in (('first', numbers[:third]), ('last', numbers[-third:])):
      found[f'{name}, {part} third'] = round(sum(some) / max(len(some), 1), 1)
  print(json.dumps(found, indent=2))
  well = found['steps'] > 0 and not found['processes_left']
  own = set(found['statuses']) <= set(map(str, AGAIN))
  raise SystemExit(not (well and own))


if __name__ == '__main__':
  main()
