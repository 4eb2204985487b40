"""Every algorithm learns arithmetic from the same warm start, over seeds.

  python -m experiments.studies.compare
  python -m experiments.studies.compare --algorithms grpo dr_grpo --seeds 0
  python -m experiments.studies.compare --more --learning_rate 1e-3

Each run is `python -m experiments.arithmetic --algorithm A --seed S` with its
default budget (600 steps of 128 x 8 completions, or 95 % held-out), looked at
every 10 steps. What is compared is what does not depend on the machine:
held-out accuracy, and steps and tokens (prompt and completion) until it is
80 %. A run that is already in --output_dir is not made again.

On 2 CPU cores the 42 runs took 133 minutes of their own, two at a time. Every
row ended at 95 % held-out or more; 80 % was reached in 60 to 160 steps, the
mean over the seeds.
"""

import concurrent.futures
import dataclasses
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import rich.console
import rich.table

from jaxrl_tok.report import charts
from jaxrl_tok.report.logger import duration
from jaxrl_tok.run import settings as flag_layer

REACHED = 0.8
# rows of the table: what is passed to arithmetic
ROWS = {name: ('--algorithm', name) for name in flag_layer.ALGORITHMS}
ROWS['reinforce, token rewards'] = (*ROWS['reinforce'], '--reward', 'digits')


@dataclasses.dataclass(frozen=True)
class Flags:
  """What is compared."""

  algorithms: tuple[str, ...] = tuple(ROWS)
  """Rows of the table."""
  seeds: tuple[int, ...] = (0, 1, 2)
  """A run of each."""
  jobs: int = 2
  """Runs at a time."""
  output_dir: str = 'runs/compare'
  """Of the runs, compare.md, compare.json and compare.svg."""
  more: tuple[str, ...] = ()
  """Flags for every run; last, as all that follows is theirs."""


class Outcome(NamedTuple):
  """A finished run."""

  before: float  # held-out accuracy of the warm start
  after: float
  steps: int | None  # until REACHED; None: never
  tokens: int | None
  all_steps: int


def outcome(path: Path) -> Outcome:
  """Reads a run's metrics.jsonl."""
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  looks = [row for row in rows if row['phase'] == 'eval']
  tokens = {r['step']: r['num_tokens'] for r in rows if r['phase'] == 'train'}
  found = [(row['step'], row['eval/reward']) for row in looks]
  first = next((s for s, reward in found if s and reward >= REACHED), None)
  return Outcome(
    found[0][1], found[-1][1], first, tokens.get(first), found[-1][0]
  )


def directory(flags: Flags, row: str, seed: int) -> Path:
  name = row.replace(', ', '-').replace(' ', '_')
  return Path(flags.output_dir) / f'{name}-{seed}'


def make_run(flags: Flags, row: str, seed: int) -> Outcome:
  """The outcome of a run, which is made unless it is there."""
  where = directory(flags, row, seed)
  if not (where / 'export').is_dir():
    shutil.rmtree(where, ignore_errors=True)  # of a run that did not end
    out = Path(flags.output_dir)
    command = [
      *(sys.executable, '-m', 'experiments.arithmetic', *ROWS[row]),
      *(f'--seed={seed}', f'--output_dir={where}', '--eval_every=10'),
      *('--save_every=0', '--no_log_kl', '--report_to=none', *flags.more),
    ]
    log = out / f'{where.name}.log'
    with log.open('w') as console:
      done = subprocess.run(
        command,
        stdout=console,
        stderr=subprocess.STDOUT,
        check=False,
      )
    if done.returncode:
      last = log.read_text().strip().splitlines()[-1:]
      flag_layer.fail(f'{shlex.join(command)}: {"".join(last)}; see {log}')
  return outcome(where / 'metrics.jsonl')


def spread(values: list, form: str) -> str:
  """'mean ± standard deviation' of what there is, and how many are missing."""
  there = [v for v in values if v is not None]
  if not there:
    return 'never'
  text = format(statistics.mean(there), form)
  if len(there) > 1:
    text += f' ± {format(statistics.stdev(there), form)}'
  missing = len(values) - len(there)
  return text + (f' ({missing} never)' if missing else '')


def table(found: dict[str, list[Outcome]]) -> list[tuple[str, ...]]:
  """Header and rows."""
  lines = [
    ('algorithm', 'held-out', 'steps to 80 %', 'thousand tokens to 80 %')
  ]
  for row, outcomes in found.items():
    tokens = [None if o.tokens is None else o.tokens / 1e3 for o in outcomes]
    lines.append(
      (
        row,
        spread([100 * o.after for o in outcomes], '.1f') + ' %',
        spread([o.steps for o in outcomes], '.0f'),
        spread(tokens, ',.0f'),
      )
    )
  return lines


def markdown(lines: list[tuple[str, ...]]) -> str:
  rows = [lines[0], tuple('---' for _ in lines[0]), *lines[1:]]
  return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def picture(found: dict[str, list[Outcome]]) -> str:
  """Tokens to 80 %, a dot a run and a line at their mean, as SVG."""
  left, top, gap, right = 190, 34, 24, 690
  size = right + 70, top + gap * len(found) + 40
  known = [o.tokens / 1e6 for os in found.values() for o in os if o.tokens]
  marks = charts.ticks(0, max(known, default=1), 6)
  bottom = top + gap * len(found)

  def across(value):
    return left + (right - left) * value / marks[-1]

  parts = [
    charts.words(left, 18, 'million tokens to 80 % held-out', font_weight=600)
  ]
  for mark in marks:
    x = f'{across(mark):.1f}'
    parts += [
      charts.tag(
        'line',
        x1=x,
        x2=x,
        y1=top,
        y2=bottom,
        stroke=charts.INK,
        stroke_opacity=0.22,
      ),
      charts.words(across(mark), bottom + 18, charts.figure(mark), 'middle'),
    ]
  for i, (row, outcomes) in enumerate(found.items()):
    y = top + gap * (i + 0.5)
    there = [o.tokens / 1e6 for o in outcomes if o.tokens]
    parts.append(charts.words(left - 10, y + 4, row, 'end'))
    for value in there:
      parts.append(
        charts.tag(
          'circle', cx=f'{across(value):.1f}', cy=y, r=4, fill=charts.BLUE
        )
      )
    if there:
      x = f'{across(statistics.mean(there)):.1f}'
      parts.append(
        charts.tag(
          'line',
          x1=x,
          x2=x,
          y1=y - 8,
          y2=y + 8,
          stroke=charts.ORANGE,
          stroke_width=2.5,
        )
      )
    if len(there) < len(outcomes):
      text = f'{len(outcomes) - len(there)} of {len(outcomes)} never'
      parts.append(charts.words(right + 4, y + 4, text))
  return charts.svg(
    ''.join(parts), 'Tokens until 80 % held-out accuracy by algorithm', size
  )


def parse(argv: list[str]) -> Flags:
  cut = argv.index('--more') if '--more' in argv else len(argv)
  flags = flag_layer.cli(
    Flags(), 'python -m experiments.studies.compare', argv[:cut], __doc__
  )
  unknown = [row for row in flags.algorithms if row not in ROWS]
  if unknown:
    flag_layer.fail(f'--algorithms {unknown[0]!r} is none of {", ".join(ROWS)}')
  if flags.jobs < 1:
    flag_layer.fail(f'--jobs {flags.jobs} must be at least 1')
  return dataclasses.replace(flags, more=tuple(argv[cut + 1 :]))


def write(out: Path, found: dict[str, list[Outcome]]) -> None:
  (out / 'compare.md').write_text(markdown(table(found)))
  (out / 'compare.svg').write_text(picture(found))
  told = {k: [o._asdict() for o in v] for k, v in found.items()}
  (out / 'compare.json').write_text(json.dumps(told, indent=2) + '\n')


def main(argv=None) -> dict[str, list[Outcome]]:
  flags = parse(sys.argv[1:] if argv is None else argv)
  out = Path(flags.output_dir)
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    flag_layer.fail(f'--output_dir {out} cannot be made: {e.strerror}')
  say, began = rich.console.Console().print, time.monotonic()
  # every algorithm once before the second seed: what is there is balanced
  runs = [(r, s) for s in flags.seeds for r in flags.algorithms]
  found = {}
  with concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool:
    making = [pool.submit(make_run, flags, *run) for run in runs]
    for number, (run, future) in enumerate(zip(runs, making), 1):
      try:
        done = future.result()
      except BaseException:  # a run that failed, or Ctrl-C: no others begin
        pool.shutdown(wait=False, cancel_futures=True)
        raise
      found.setdefault(run[0], []).append(done)
      write(out, found)
      left = (time.monotonic() - began) / number * (len(runs) - number)
      say(
        f'{number} of {len(runs)}: {run[0]}, seed {run[1]}: '
        f'{done.before:.1%} -> {done.after:.1%} in {done.all_steps} steps; '
        f'ETA {duration(left)}'
      )
  lines = table(found)
  shown = rich.table.Table(*lines[0])
  for line in lines[1:]:
    shown.add_row(*line)
  say(shown)
  say(f'{len(runs)} runs in {duration(time.monotonic() - began)}')
  say(f'table: {out / "compare.md"}\npicture: {out / "compare.svg"}')
  return found


if __name__ == '__main__':
  main()
