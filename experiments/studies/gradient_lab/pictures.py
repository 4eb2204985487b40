"""Table and picture of a policy's numbers."""

import rich.table
import rich.text

from experiments.studies.gradient_lab.methods import DEFAULT, SUM
from jaxrl_tok.report.charts import BLUE, INK, ORANGE, Curve
from jaxrl_tok.report.row_chart import Dot, Panel, row_chart


def label(row: dict) -> str:
  """Name of a row, aggregation apart."""
  if row['reward'] == 'exact':
    return row['baseline']
  name, summed, _ = row['reward'].partition('_outcome')
  whose = 'own' if row['of'] == name else row['of']
  return f'{name}{" summed" if summed else ""}, {whose} gradient'


LEGEND = (
  'variance: of one step, best scaled, / the squared reference; / default: '
  'completions for the same precision; cosine: of one step with the reference; '
  'mean: of the mean of all steps with it; ±: standard errors of the '
  'difference to the default'
)


def table(policy: dict) -> rich.table.Table:
  """Numbers of every baseline, in sections by aggregation."""
  names = 'baseline', 'variance', '/ default', 'cosine', 'mean'
  found = rich.table.Table(*names)
  for column in found.columns[1:]:
    column.justify = 'right'
  for aggregation in DOTS:
    found.add_section()
    found.add_row(rich.text.Text(aggregation_label(aggregation), 'bold'))
    for row in policy['rows']:
      if row['aggregation'] == aggregation:
        found.add_row(
          label(row),
          f'{row["variance"]:.1f}',
          f'{row["needed"]:.2f} ± {row["needed_error"]:.2f}',
          f'{row["cosine"]:.3f} ± {row["ahead_error"]:.3f}',
          f'{row["mean_cosine"]:.3f}',
        )
  return found


DOTS = {  # aggregation: (colour, pixels below the row's middle)
  SUM: (BLUE, -5),
  'token_mean': (ORANGE, 0),
  'seq_mean_token_mean': (INK, 5),
}
PANELS = (  # number, its error, heading
  ('needed', 'needed_error', "← variance / default's"),
  ('cosine', 'ahead_error', 'cosine with the truth →'),
)


def aggregation_label(name: str) -> str:
  """Name of an aggregation; seq_mean_token_sum_norm, a constant times SUM, has
  SUM's numbers."""
  return f'{name} (and _norm)' if name == SUM else name


def picture(policies: list[dict]) -> str:
  """Dots for baselines (down) and aggregations (colours): two panels a
  policy."""
  panels = []
  for policy in policies:
    rows = [row for row in policy['rows'] if row['aggregation'] in DOTS]
    group = f'{policy["reward"]:.0%} of samples right'
    for name, error, heading in PANELS:
      dots = [make_dot(row, name, error) for row in rows]
      guide = rows[0][name]  # the default's
      panels.append(Panel(heading, dots, guide=guide, group=group))
      group = ''
  return row_chart(
    list(dict.fromkeys(map(label, policies[0]['rows']))),
    panels,
    'Noise of one policy gradient by baseline and aggregation',
    bold=DEFAULT[0],
    key=tuple(
      Curve(aggregation_label(name), [], colour, dots=True)
      for name, (colour, _) in DOTS.items()
    ),
  )


def make_dot(row: dict, name: str, error: str) -> Dot:
  """Dot of a row's number, with all of its numbers for the pointer."""
  colour, below = DOTS[row['aggregation']]
  title = (
    f'{label(row)}, {row["aggregation"]}: variance {row["variance"]:.1f} '
    f"|g|^2, {row['needed']:.2f} of the default's; cosine {row['cosine']:.3f}"
  )
  return Dot(label(row), row[name], row[error], colour, below, title)
