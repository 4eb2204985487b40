r"""Dense credit beside its controls: estimators by splits of the reward.

  python -m experiments.studies.credit
  python -m experiments.studies.credit --rows ppo grpo --seeds 5 6 \
    --learning_rates 2.5e-4 5e-4 1e-3 --output_dir runs/tune

A run is experiments.spelling with a row's estimator and a split of the reward
(--credit_split): `outcome`, its sum on the last token; `potential`, that of
each token; and two controls that every claim about dense rewards needs, a
`constant` 1 and the shares `shuffled` in time. The seeds of a row and a split
are one program (population.py); runs of a seed begin at one warm start, with
equal prompts. Each samples 200 steps of 16 x 4 completions; remax takes 160, as
it samples a greedy completion of each prompt, too. Runs that are in
--output_dir are not made again.

Held-out CER in percent after the runs (before: 23.9 +- 0.4), seeds 0 to 4, in
credit.svg without the constant; 25 minutes of a CPU core or so:

                            outcome     potential   constant     shuffled
  reinforce               21.5 +- 0.8  21.7 +- 0.9  23.9 +- 0.4  22.4 +- 1.0
  reinforce, no baseline  23.8 +- 0.7  22.4 +- 0.5  36.9 +- 4.2  23.7 +- 1.0
  ppo                     22.6 +- 1.0  22.2 +- 0.9  86.9 +- 12   23.2 +- 0.7
  a2c                     23.2 +- 1.1  22.7 +- 1.0  67.4 +- 6.1  23.9 +- 0.6
  grpo                    21.8 +- 1.5  22.4 +- 1.4  23.9 +- 0.4  26.8 +- 1.3
  remax                   22.3 +- 0.8  22.4 +- 0.9  23.9 +- 0.4  23.1 +- 0.5

Rewards by token help where no baseline takes the variance away (-1.4 +- 0.9,
potential less outcome), and not elsewhere: with a baseline the difference is
within its interval. Their timing matters: shuffled, they are worse in every
row. A constant never helps: where a baseline takes it away nothing is learnt,
and elsewhere the policy is ruined.

Choshen et al. (ICLR 2020, arXiv:1907.01752) found that a constant reward, which
reinforces every sample alike, raises BLEU about as much as an informative one,
for it makes the policy more peaked; Kiegeland and Kreutzer (arXiv:2106.08942)
give evidence against that, with exploration and scaled rewards. Here that
control is the row `reinforce, no baseline`: the baselines leave_one_out,
group_mean and greedy take a constant away exactly, and nothing is learnt.
"""

import dataclasses
import itertools
import json
import operator
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from experiments.spelling import SETTINGS, spelling
from experiments.studies.compare import markdown
from experiments.studies.population import make_train, orders, tables
from jaxrl_tok import masked
from jaxrl_tok.credit.names import CREDIT_SPLITS
from jaxrl_tok.report.charts import COLOURS, Curve
from jaxrl_tok.report.files import atomic_write
from jaxrl_tok.report.row_chart import Dot, Panel, row_chart
from jaxrl_tok.run import begin, build
from jaxrl_tok.run import flags as flag_layer
from jaxrl_tok.run.api import Caller
from jaxrl_tok.run.prepare import Setup, prepare
from jaxrl_tok.run.settings import RunSettings, Settings, flatten, with_values
from jaxrl_tok.step.device_rewards import edit_tokens, exact_tokens

PROG = 'python -m experiments.studies.credit'
# rows of the table: settings of spelling; gamma 1, or deltas do not telescope
ROWS = {
  'reinforce': {'algorithm': 'reinforce'},
  'reinforce, no baseline': {'algorithm': 'reinforce', 'baseline': 'none'},
  'remax': {'algorithm': 'remax'},
  'ppo': {'algorithm': 'ppo'},
  'a2c': {'algorithm': 'a2c', 'gamma': 1.0},
  'grpo': {'algorithm': 'grpo'},
}
SPLITS = ('outcome', 'potential', 'constant', 'shuffled')
DRAWN = ('outcome', 'potential', 'shuffled')  # a constant is far off the scale
# learning rates, for all splits alike: of 1e-4, 2.5e-4, 5e-4 and 1e-3 (and 3e-5
# for ppo) the best for outcome and potential together, over the seeds 5 and 6
RATES = {
  'reinforce': 5e-4,
  'reinforce, no baseline': 2.5e-4,
  'remax': 5e-4,
  'ppo': 1e-4,
  'a2c': 2.5e-4,
  'grpo': 5e-4,
}


@dataclasses.dataclass(frozen=True)
class GridSettings:
  """Runs: a row and a split for each seed."""

  rows: tuple[str, ...] = tuple(ROWS)
  """Rows of the table: estimators."""
  splits: tuple[Literal[CREDIT_SPLITS], ...] = SPLITS
  """Splits of the reward over a completion's tokens, see --credit_split."""
  seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
  """Seeds of the warm start, the order of prompts and the sampling."""
  learning_rates: tuple[float, ...] = ()
  """Peak learning rates of all rows, to tune them; default: as tuned."""


@dataclasses.dataclass(frozen=True)
class CreditSettings(Settings):
  """Settings of the study, all groups."""

  grid: GridSettings = GridSettings()


DEFAULTS = with_values(
  CreditSettings(),
  SETTINGS
  | {
    'output_dir': 'runs/credit',
    'eval_every': 100,
    'steps_per_call': 1,  # rewards are JAX functions
  },
)
OWN = {'output_dir', 'max_steps', 'eval_every', 'held_out'}  # and no others
# flags, and groups of them, that would change nothing
UNUSED = (
  *(flatten(RunSettings()).keys() - OWN),
  *('model', 'algorithm', 'replay_groups', 'replay_capacity', 'ahead'),
  *('learning_rate', 'reward'),
)


class Run(NamedTuple):
  """Finished run."""

  row: str
  split: str
  seed: int
  learning_rate: float
  cer: list[float]  # held-out, greedy; before and after every block
  exact: list[float]
  entropy: list[float]  # nats a token, means over each block


# --- a run as a function -----------------------------------------------------


def all_splits(reward: jax.Array, mask: jax.Array, key) -> dict:
  """Rewards [B, T] by each split of rewards.splits; chosen tokens are a run
  from the first column on."""
  last = masked.last_chosen(mask)
  total = jnp.sum(masked.fill(reward, mask), axis=1, keepdims=True)
  draw = jnp.where(mask, jax.random.uniform(key, mask.shape), jnp.inf)
  order = jnp.argsort(draw, axis=1)
  mixed = jnp.take_along_axis(reward, order, axis=1)
  return {
    'potential': reward,
    'outcome': jnp.where(last, total, 0.0),
    'constant': last.astype(jnp.float32),
    'shuffled': masked.fill(mixed, mask),
  }


def with_split(score: Callable, split: jax.Array, key) -> Callable:
  """Score whose rewards are split, by the place of the split in SPLITS; the
  random order is of the key and the step."""

  def changed(params, rollout, columns):
    rewards, applies = score(params, rollout, columns)
    now = jax.random.fold_in(key, rollout.version[0])
    found = {}
    for name, reward in rewards.items():
      by_name = all_splits(reward, rollout.mask, now)
      found[name] = jnp.stack([by_name[s] for s in SPLITS])[split]
    return found, applies

  return changed


def measure(rollout, answer, answer_mask) -> dict:
  """Character error rate and share of right texts."""
  right = edit_tokens(rollout, answer, answer_mask).sum(1)
  exact = exact_tokens(rollout, answer, answer_mask)
  return {'cer': 1 - right.mean(), 'exact': exact.mean()}


def settings_of(settings: CreditSettings, row: str) -> CreditSettings:
  """Settings of a row: a greedy completion of every prompt is paid by fewer
  steps, so that all rows sample as many completions."""
  changes = dict(ROWS[row])
  if changes['algorithm'] == 'remax':
    G, every = settings.sampling.num_generations, settings.run.eval_every
    blocks = settings.run.max_steps // every
    every = every * G // (G + 1)
    changes |= {'eval_every': every, 'max_steps': blocks * every}
  return with_values(settings, changes)


def prepare_row(parsed: flag_layer.Parsed, row: str, seed: int) -> Setup:
  """Prepares a Setup. Raises ValueError or OSError."""
  settings = settings_of(parsed.settings, row)
  settings = with_values(settings, {'seed': seed})
  caller = Caller('spelling', PROG)  # they share its warm starts, too
  task = spelling(**parsed.own)
  return prepare(task, settings, build.Own(), caller, parsed.own)


def first_params(parsed: flag_layer.Parsed, seeds) -> dict:
  """Warm starts {seed: parameters}."""
  found = {}
  for seed in seeds:
    setup = prepare_row(parsed, 'reinforce', seed)
    with jax.set_mesh(setup.mesh):
      found[seed] = jax.device_get(begin.first_params(setup)[0])
  return found


def program(setup: Setup) -> Callable:
  """Program of a row: runs side by side, of any split and learning rate."""
  train = make_train(setup, measure, with_split)
  return jax.jit(jax.vmap(train, (0, None, None, 0, 0, 0, 0, 0)))


def grow(
  setup: Setup, many: Callable, row: str, starts: dict, runs: list
) -> list[Run]:
  """Makes runs (split, seed, learning rate) of a row by its program."""
  splits, seeds, rates = zip(*runs)
  keys = jax.vmap(jax.random.key)(np.array(seeds, np.uint32))
  each = (
    keys,
    np.array(rates, np.float32),
    orders(setup, seeds),
    np.array([SPLITS.index(s) for s in splits]),
    jax.vmap(lambda key: jax.random.fold_in(key, 2**29))(keys),
  )
  params = jax.tree.map(lambda *x: np.stack(x), *(starts[s] for s in seeds))
  with setup.logger.doing(f'{row}, {splits[0]}: {len(runs)} runs'):
    measured, means = jax.device_get(many(params, *tables(setup), *each))
  return [
    Run(
      *(row, *run),
      measured['cer'][r].tolist(),
      measured['exact'][r].tolist(),
      means['entropy'][r].tolist(),
    )
    for r, run in enumerate(runs)
  ]


# --- results -----------------------------------------------------------------


def interval(values: list[float]) -> float:
  """Half of Student's 95 % interval of the mean; 0 for a single value."""
  from scipy.stats import t

  n = len(values)
  if n < 2:
    return 0.0
  return t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5


def percent(values: list[float]) -> str:
  """Mean and half its interval, in percent; of nothing, nothing."""
  if not values:
    return ''
  mean, half = statistics.mean(values), interval(values)
  return f'{100 * mean:.1f} ± {100 * half:.1f}'


def by_row(runs: list[Run], tuned: bool) -> dict[str, list[Run]]:
  """Runs of each row of the table; where rates are compared, of each rate."""
  found = {}
  for run in runs:
    name = run.row if tuned else f'{run.row}, {run.learning_rate:g}'
    found.setdefault(name, []).append(run)
  return found


def last(runs: list[Run], split: str, name: str = 'cer') -> dict[int, float]:
  """Last held-out numbers of a split {seed: number}."""
  return {r.seed: getattr(r, name)[-1] for r in runs if r.split == split}


def table(groups: dict[str, list[Run]], name: str = 'cer') -> list[tuple]:
  """Header and rows: held-out numbers in percent, before and after each split;
  potential less outcome is of equal seeds."""
  there = {r.split for runs in groups.values() for r in runs}
  splits = [s for s in SPLITS if s in there]
  pair = {'potential', 'outcome'} <= there
  more = ('potential - outcome',) if pair else ()
  lines = [('estimator', 'before', *splits, *more)]
  for label, runs in groups.items():
    first = {r.seed: getattr(r, name)[0] for r in runs}
    found = {s: last(runs, s, name) for s in splits}
    cells = [percent(list(first.values()))]
    cells += [percent(list(found[s].values())) for s in splits]
    if pair:
      both = found['potential'], found['outcome']
      seeds = both[0].keys() & both[1].keys()
      cells.append(percent([both[0][k] - both[1][k] for k in sorted(seeds)]))
    lines.append((label, *cells))
  return lines


def picture(groups: dict[str, list[Run]]) -> str:
  """Held-out numbers after each split but the constant as SVG, a dot at the
  mean of the seeds and its interval; a dashed line at the start."""
  panels = []
  for name, heading in (('cer', 'CER, %'), ('exact', 'whole texts right, %')):
    dots, first = [], []
    for label, runs in groups.items():
      first += [getattr(r, name)[0] for r in runs]
      for number, split in enumerate(DRAWN):
        values = [100 * x for x in last(runs, split, name).values()]
        if values:
          mean, colour = statistics.mean(values), COLOURS[number]
          shift, half = 6.0 * number - 6.0, interval(values)
          dots.append(Dot(label, mean, half, colour, shift))
    guide = 100 * statistics.mean(first)
    panels.append(Panel(heading, dots, width=300, guide=guide))
  key = tuple(Curve(s, [], COLOURS[n]) for n, s in enumerate(DRAWN))
  title = 'Held-out spelling by estimator and split of the reward'
  return row_chart(list(groups), panels, title, key=key)


def write(out: Path, flags: dict, runs: list[Run], tuned: bool) -> list[tuple]:
  """Writes credit.json, credit.md and credit.svg; returns the table."""
  found = {'flags': flags, 'runs': [run._asdict() for run in runs]}
  groups = by_row(runs, tuned)
  lines = table(groups)
  text = markdown(lines) + '\n' + markdown(table(groups, 'exact'))
  atomic_write(out / 'credit.json', json.dumps(found, indent=1) + '\n')
  atomic_write(out / 'credit.md', text)
  atomic_write(out / 'credit.svg', picture(groups) + '\n')
  return lines


# --- command -----------------------------------------------------------------


def check(settings: CreditSettings) -> None:
  """Refuses runs that cannot be compared. Raises ValueError."""
  grid, run = settings.grid, settings.run
  for row in grid.rows:
    if row not in ROWS:
      raise ValueError(f'--rows {row!r} is none of {", ".join(ROWS)}')
  for name, values in flatten(grid).items():
    empty = not values and name != 'learning_rates'
    if empty or len(set(values)) < len(values):
      raise ValueError(f'--{name} must be different ones, one at least')
  if not run.eval_every or run.max_steps % run.eval_every:
    raise ValueError(
      f'--max_steps {run.max_steps} must be a multiple of --eval_every '
      f'{run.eval_every}'
    )
  G = settings.sampling.num_generations
  if 'remax' in grid.rows and run.eval_every * G % (G + 1):
    raise ValueError(
      f'--eval_every {run.eval_every} must be a multiple of {G + 1}, the '
      'completions of a prompt and its greedy one, so that remax takes fewer '
      'steps'
    )


def read(out: Path, flags: dict) -> list[Run]:
  """Reads the runs that are there. Raises ValueError for those of other
  flags."""
  path = out / 'credit.json'
  if not path.is_file():
    return []
  found = json.loads(path.read_text())
  if found['flags'] != json.loads(json.dumps(flags)):
    raise ValueError(f'{path} is of other flags; give another --output_dir')
  return [Run(**run) for run in found['runs']]


def study(parsed: flag_layer.Parsed) -> list[Run]:
  """Makes the runs that are not there, row by row. Raises ValueError or
  OSError."""
  settings = parsed.settings
  check(settings)
  grid, out = settings.grid, Path(settings.run.output_dir)
  flags = parsed.own | flatten(settings)
  for name in (*flatten(grid), 'output_dir'):
    flags.pop(name)
  tuned = not grid.learning_rates
  wanted = {
    row: [
      (split, seed, rate)
      for split in grid.splits
      for rate in grid.learning_rates or (RATES[row],)
      for seed in grid.seeds
    ]
    for row in grid.rows
  }
  out.mkdir(parents=True, exist_ok=True)
  runs, starts = read(out, flags), {}
  for row, all_runs in wanted.items():
    there = {run[:4] for run in runs}
    missing = [run for run in all_runs if (row, *run) not in there]
    if not missing:
      continue
    starts = starts or first_params(parsed, grid.seeds)
    setup = prepare_row(parsed, row, missing[0][1])
    many = program(setup)
    for _, those in itertools.groupby(missing, operator.itemgetter(0)):
      runs += grow(setup, many, row, starts, list(those))
      write(out, flags, runs, tuned)
  runs = [r for r in runs if r[1:4] in wanted.get(r.row, ())]
  lines = write(out, flags, runs, tuned)
  shown = rich.table.Table(*lines[0], title='held-out CER, %')
  for line in lines[1:]:
    shown.add_row(*line)
  console = rich.console.Console()
  console.print(shown)
  console.print(f'table: {out / "credit.md"}')
  console.print(f'picture: {out / "credit.svg"}')
  return runs


def parse(argv: list[str]) -> flag_layer.Parsed:
  """Flags of a command line."""
  return flag_layer.parse(DEFAULTS, spelling, PROG, argv, __doc__, UNUSED)


def main(argv=None) -> list[Run]:
  """Makes the study; a fault is one line and exit status 2."""
  parsed = parse(sys.argv[1:] if argv is None else list(argv))
  try:
    return study(parsed)
  except (ValueError, OSError) as e:
    flag_layer.fail(e)


if __name__ == '__main__':
  main()
