"""Comparison on arithmetic, from one warm start, over seeds: of all algorithms,
or of ways to learn more from each completion.

  python -m experiments.studies.compare
  python -m experiments.studies.compare --rows reuse
  python -m experiments.studies.compare --rows grpo dr_grpo --seeds 0
  python -m experiments.studies.compare --more --learning_rate 1e-3

A run is `python -m experiments.arithmetic` with the flags of its row and
`--seed S`, within the default budget (800 steps of 128 x 8 completions, or 95 %
held-out), evaluated every 10 steps; `reuse` has 100 steps. The numbers
do not depend on the machine: held-out accuracy at the end and at equal sampled
tokens (--budget), and steps, sampled tokens and reward calls until it is 80 %.
A run that is already in --output_dir is not made again.

On 2 CPU cores the 42 runs of all algorithms took 133 minutes of their own, two
at a time. All rows ended at 95 % held-out or more; 80 % was reached in 60 to
160 steps, the mean over the seeds (measured before the data's order changed).
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
ALL = {name: ('--algorithm', name) for name in ALGORITHMS}
ALL['reinforce, token rewards'] = (*ALL['reinforce'], '--reward', 'digits')
SHORT = '--max_steps=100', '--stop_at_reward=1'
CAPPED, REPLAYED = '--importance_cap=2', '--replay_groups=128'
CRITIC = '--algorithm=a2c', '--gamma=1'
REUSE = {
  'on policy': (),
  'ahead': ('--ahead', CAPPED),
  'replay': (REPLAYED, CAPPED),
  '2 epochs': ('--loss=clip', '--epochs=2'),
  '4 epochs': ('--loss=clip', '--epochs=4'),
  'critic': CRITIC,
  'V-trace, replay': (*CRITIC, '--credit=vtrace', REPLAYED),
}
GROUPS = {'algorithms': tuple(ALL), 'reuse': tuple(REUSE)}
ROWS = ALL | {name: (*SHORT, *flags) for name, flags in REUSE.items()}


@dataclasses.dataclass(frozen=True)
class Flags:
  """The comparison."""

  rows: tuple[str, ...] = ('algorithms',)
  """Rows of the table, or groups of them: algorithms, reuse (replay, sampling
  ahead, V-trace, several epochs)."""
  seeds: tuple[int, ...] = (0, 1, 2)
  """Seeds, with a run for each."""
  budget: int = 0
  """Sampled tokens at which rows are compared; 0: as many as every run has, or
  its end at --stop_at_reward."""
  jobs: int = 2
  """Runs at a time."""
  output_dir: str = 'runs/compare'
  """Directory of the runs, compare.md, compare.json and compare.svg."""
  more: tuple[str, ...] = ()
  """Flags for all runs; give it last, as it takes all that follows."""


class Outcome(NamedTuple):
  """Outcome of a finished run."""

  steps: int | None  # until REACHED; None: never
  tokens: int | None  # sampled, until then
  calls: int | None  # of rewards, until then
  curve: list  # (step, sampled tokens, held-out accuracy) of each evaluation

  @property
  def before(self) -> float:
    """Held-out accuracy of the warm start."""
    return self.curve[0][2]

  @property
  def after(self) -> float:
    return self.curve[-1][2]

  def at(self, budget: int) -> float:
    """Held-out accuracy of the last evaluation within sampled tokens."""
    return [y for _, tokens, y in self.curve if tokens <= budget][-1]


def outcome(run_dir: Path) -> Outcome:
  """Reads the outcome of a run from its metrics."""
  rows = read_metrics(run_dir)
  totals = {
    r['step']: (r['sampled_tokens'], r['reward_calls'])
    for r in rows
    if 'sampled_tokens' in r
  }
  curve = [
    (r['step'], totals.get(r['step'], (0, 0))[0], r['eval/reward'])
    for r in rows
    if r.get('phase') == 'eval' and 'eval/reward' in r
  ]
  first = next((s for s, _, y in curve if s and y >= REACHED), None)
  return Outcome(first, *totals.get(first, (None, None)), curve)


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


def common_budget(found: dict[str, list[Outcome]]) -> int:
  """Sampled tokens that every run has, but for runs that ended as good as can
  be asked for."""
  runs = [o.curve[-1] for outcomes in found.values() for o in outcomes]
  some = [tokens for _, tokens, y in runs if y < 0.95]
  return min(some or [max(tokens for _, tokens, _ in runs)])


def table(
  found: dict[str, list[Outcome]], budget: int = 0
) -> list[tuple[str, ...]]:
  """Header and rows."""
  budget = budget or common_budget(found)
  lines = [
    (
      'row',
      'held-out, end',
      f'at {budget / 1e3:,.0f} thousand tokens',
      'steps to 80 %',
      'thousand sampled tokens to 80 %',
      'thousand reward calls to 80 %',
    )
  ]
  for row, outcomes in found.items():
    lines.append(
      (
        row,
        spread([100 * o.after for o in outcomes], '.1f') + ' %',
        spread([100 * o.at(budget) for o in outcomes], '.1f') + ' %',
        spread([o.steps for o in outcomes], '.0f'),
        spread([o.tokens and o.tokens / 1e3 for o in outcomes], ',.0f'),
        spread([o.calls and o.calls / 1e3 for o in outcomes], ',.1f'),
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
  heading = 'million sampled tokens to 80 % held-out'
  return row_chart(
    list(found),
    [Panel(heading, dots, width=500, origin=0)],
    'Sampled tokens until 80 % held-out accuracy',
    notes,
  )


def write(out: Path, found: dict[str, list[Outcome]], budget: int) -> None:
  """Writes compare.md, compare.svg and compare.json."""
  outcomes = {k: [o._asdict() for o in v] for k, v in found.items()}
  atomic_write(out / 'compare.md', markdown(table(found, budget)))
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
  rows = [row for word in flags.rows for row in GROUPS.get(word, (word,))]
  more = tuple(argv[cut + 1 :])
  return dataclasses.replace(flags, rows=tuple(rows), more=more)


def check(flags: Flags) -> None:
  """Refuses flags that cannot be compared. Raises ValueError."""
  unknown = [row for row in flags.rows if row not in ROWS]
  if unknown:
    known = ', '.join((*GROUPS, *ROWS))
    raise ValueError(f'--rows {unknown[0]!r} is none of {known}')
  for name in ('rows', 'seeds'):
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
  # every row once before the second seed: what is there is balanced
  runs = [(r, s) for s in flags.seeds for r in flags.rows]
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
      write(out, found, flags.budget)
      left = (time.monotonic() - began) / number * (len(runs) - number)
      console.print(
        f'{number} of {len(runs)}: {run[0]}, seed {run[1]}: '
        f'{done.before:.1%} -> {done.after:.1%} in {done.curve[-1][0]} steps; '
        f'ETA {duration(left)}'
      )
  show(console, table(found, flags.budget))
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
