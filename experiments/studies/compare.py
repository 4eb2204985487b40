"""Comparison of all algorithms on arithmetic, from one warm start, over seeds.

  python -m experiments.studies.compare
  python -m experiments.studies.compare --algorithms grpo dr_grpo --seeds 0
  python -m experiments.studies.compare --more --learning_rate 1e-3

A run is `python -m experiments.arithmetic --algorithm A --seed S` with its
default budget (600 steps of 128 x 8 completions, or 95 % held-out), evaluated
every 10 steps. The numbers do not depend on the machine: held-out accuracy,
and steps and tokens (prompt and completion) until it is 80 %. A run that is
already in --output_dir is not made again.

On 2 CPU cores the 42 runs took 133 minutes of their own, two at a time. All
rows ended at 95 % held-out or more; 80 % was reached in 60 to 160 steps, the
mean over the seeds (measured before the order of the data changed).
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

from jaxrl_tok.credit.names import ALGORITHMS
from jaxrl_tok.report.charts import ORANGE
from jaxrl_tok.report.files import atomic_write, read_metrics
from jaxrl_tok.report.logger import duration
from jaxrl_tok.report.row_chart import Dot, Panel, row_chart
from jaxrl_tok.run import flags as flag_layer

PROG = 'python -m experiments.studies.compare'
REACHED = 0.8
# rows of the table: flags of arithmetic
ROWS = {name: ('--algorithm', name) for name in ALGORITHMS}
ROWS['reinforce, token rewards'] = (*ROWS['reinforce'], '--reward', 'digits')


@dataclasses.dataclass(frozen=True)
class Flags:
  """The comparison."""

  algorithms: tuple[str, ...] = tuple(ROWS)
  """Rows of the table."""
  seeds: tuple[int, ...] = (0, 1, 2)
  """Seeds, with a run for each."""
  jobs: int = 2
  """Runs at a time."""
  output_dir: str = 'runs/compare'
  """Directory of the runs, compare.md, compare.json and compare.svg."""
  more: tuple[str, ...] = ()
  """Flags for all runs; give it last, as it takes all that follows."""


class Outcome(NamedTuple):
  """Outcome of a finished run."""

  before: float  # held-out accuracy of the warm start
  after: float
  steps: int | None  # until REACHED; None: never
  tokens: int | None
  all_steps: int


def outcome(run_dir: Path) -> Outcome:
  """Reads the outcome of a run from its metrics."""
  rows = read_metrics(run_dir)
  tokens = {r['step']: r['num_tokens'] for r in rows if 'num_tokens' in r}
  found = [
    (r['step'], r['eval/reward'])
    for r in rows
    if r.get('phase') == 'eval' and 'eval/reward' in r
  ]
  first = next((s for s, reward in found if s and reward >= REACHED), None)
  return Outcome(
    found[0][1], found[-1][1], first, tokens.get(first), found[-1][0]
  )


def directory(flags: Flags, row: str, seed: int) -> Path:
  """Directory of a run."""
  name = row.replace(', ', '-').replace(' ', '_')
  return Path(flags.output_dir) / f'{name}-{seed}'


def make_run(flags: Flags, row: str, seed: int) -> Outcome:
  """Makes a run, unless it is there already, and returns its outcome. Raises
  ValueError if the run fails."""
  where = directory(flags, row, seed)
  if not (where / 'export').is_dir():
    shutil.rmtree(where, ignore_errors=True)  # a run that did not end
    command = [
      *(sys.executable, '-m', 'experiments.arithmetic', *ROWS[row]),
      *(f'--seed={seed}', f'--output_dir={where}', '--eval_every=10'),
      *('--save_every=0', '--no_log_kl', '--report_to=none', *flags.more),
    ]
    log = where.with_name(f'{where.name}.log')
    with log.open('w') as console:
      done = subprocess.run(
        command,
        stdout=console,
        stderr=subprocess.STDOUT,
        check=False,
      )
    if done.returncode:
      last = log.read_text().strip().splitlines()[-1:]
      raise ValueError(f'{shlex.join(command)}: {"".join(last)}; see {log}')
  return outcome(where)


# --- table and picture -------------------------------------------------------


def spread(values: list, form: str) -> str:
  """Formats 'mean ± standard deviation' of the values that are not None, and
  their number."""
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
  """Table in Markdown."""
  rows = [lines[0], tuple('---' for _ in lines[0]), *lines[1:]]
  return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def picture(found: dict[str, list[Outcome]]) -> str:
  """Draws tokens to 80 % as SVG: a dot a run and a bar at their mean."""
  dots, notes = [], {}
  for row, outcomes in found.items():
    known = [o.tokens / 1e6 for o in outcomes if o.tokens]
    dots += [Dot(row, value) for value in known]
    if known:
      dots.append(Dot(row, statistics.mean(known), colour=ORANGE, bar=True))
    if len(known) < len(outcomes):
      notes[row] = f'{len(outcomes) - len(known)} of {len(outcomes)} never'
  heading = 'million tokens to 80 % held-out'
  return row_chart(
    list(found),
    [Panel(heading, dots, width=500, origin=0)],
    'Tokens until 80 % held-out accuracy by algorithm',
    notes,
  )


def write(out: Path, found: dict[str, list[Outcome]]) -> None:
  """Writes compare.md, compare.svg and compare.json."""
  outcomes = {k: [o._asdict() for o in v] for k, v in found.items()}
  atomic_write(out / 'compare.md', markdown(table(found)))
  atomic_write(out / 'compare.svg', picture(found) + '\n')
  atomic_write(out / 'compare.json', json.dumps(outcomes, indent=2) + '\n')


def show(console: rich.console.Console, lines: list[tuple[str, ...]]) -> None:
  """Prints the table."""
  shown = rich.table.Table(*lines[0])
  for line in lines[1:]:
    shown.add_row(*line)
  console.print(shown)


# --- command -----------------------------------------------------------------


def parse(argv: list[str]) -> Flags:
  """Flags of a command line; --more takes what follows it as it is."""
  cut = argv.index('--more') if '--more' in argv else len(argv)
  flags = flag_layer.cli(Flags, Flags(), PROG, argv[:cut], __doc__)
  return dataclasses.replace(flags, more=tuple(argv[cut + 1 :]))


def check(flags: Flags) -> None:
  """Refuses flags that cannot be compared. Raises ValueError."""
  unknown = [row for row in flags.algorithms if row not in ROWS]
  if unknown:
    raise ValueError(
      f'--algorithms {unknown[0]!r} is none of {", ".join(ROWS)}'
    )
  for name in ('algorithms', 'seeds'):
    values = getattr(flags, name)
    if not values or len(set(values)) < len(values):
      raise ValueError(f'--{name} must be different ones, one at least')
  if flags.jobs < 1:
    raise ValueError(f'--jobs {flags.jobs} must be at least 1')


def compare(flags: Flags) -> dict[str, list[Outcome]]:
  """Makes the missing runs, a few at a time, and writes results after each.
  Raises ValueError or OSError."""
  out = Path(flags.output_dir)
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise ValueError(
      f'--output_dir {out} cannot be made: {e.strerror}; give another'
    ) from None
  console, began = rich.console.Console(), time.monotonic()
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
      console.print(
        f'{number} of {len(runs)}: {run[0]}, seed {run[1]}: '
        f'{done.before:.1%} -> {done.after:.1%} in {done.all_steps} steps; '
        f'ETA {duration(left)}'
      )
  show(console, table(found))
  console.print(f'{len(runs)} runs in {duration(time.monotonic() - began)}')
  console.print(f'table: {out / "compare.md"}')
  console.print(f'picture: {out / "compare.svg"}')
  return found


def main(argv=None) -> dict[str, list[Outcome]]:
  """Compares; a fault is one line and exit status 2."""
  flags = parse(sys.argv[1:] if argv is None else list(argv))
  try:
    check(flags)
    return compare(flags)
  except (ValueError, OSError) as e:
    flag_layer.fail(e)


if __name__ == '__main__':
  main()
