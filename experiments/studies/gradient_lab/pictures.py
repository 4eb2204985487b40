"""The table and the picture of a policy's numbers."""

import rich.table
import rich.text
from markupsafe import escape

from experiments.studies.gradient_lab.methods import DEFAULT, SUM
from jaxrl_tok.report import charts


def label(row: dict) -> str:
  """A row's name, aggregation apart."""
  if row['reward'] == 'exact':
    return row['baseline']
  whose = 'own' if row['of'] == row['reward'] else row['of']
  return f'{row["reward"]}, {whose} gradient'


LEGEND = (
  'variance: of one step, best scaled, / the squared reference; / default: '
  'completions for the same precision; cosine: of one step with the reference; '
  'mean: of the mean of all steps with it; ±: standard errors of the '
  'difference to the default'
)


def table(policy: dict) -> rich.table.Table:
  names = 'baseline', 'variance', '/ default', 'cosine', 'mean'
  found = rich.table.Table(*names)
  for column in found.columns[1:]:
    column.justify = 'right'
  for aggregation in DOTS:
    also = ' (and _norm)' if aggregation == SUM else ''
    found.add_section()
    found.add_row(rich.text.Text(f'{aggregation}{also}', 'bold'))
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


LEFT, PANEL, GAP, TOP, ROW = 160, 150, 42, 76, 24  # of the picture, in pixels
DOTS = {  # aggregation: (colour, pixels below the row's middle)
  SUM: (charts.BLUE, -5),
  'token_mean': (charts.ORANGE, 0),
  'seq_mean_token_mean': (charts.INK, 5),
}
PANELS = (  # number, its error, heading
  ('needed', 'needed_error', "← variance / default's"),
  ('cosine', 'ahead_error', 'cosine with the truth →'),
)


def picture(policies: list[dict]) -> str:
  """Dots for baselines (down) and aggregations (colours): two panels a policy.
  seq_mean_token_sum_norm, a constant times SUM, lies under SUM's."""
  names = list(dict.fromkeys(map(label, policies[0]['rows'])))
  bottom = TOP + ROW * len(names)
  width = LEFT + 2 * len(policies) * (PANEL + GAP)
  parts = key(LEFT)
  for i, name in enumerate(names):
    y = TOP + ROW * (i + 0.5)
    weight = 700 if name == DEFAULT[0] else 400
    parts += [
      charts.words(LEFT - 10, y + 4, name, 'end', font_weight=weight),
      line(f'M{LEFT},{y + ROW / 2:.1f}H{width - GAP}', 0.12),
    ]
  for i, policy in enumerate(policies):
    x = LEFT + 2 * i * (PANEL + GAP)
    said = f'{policy["reward"]:.0%} of samples right'
    parts.append(charts.words(x, 44, said, font_weight=600))
    for j, (name, error, heading) in enumerate(PANELS):
      at = x + j * (PANEL + GAP)
      parts.append(charts.words(at, 64, heading))
      parts += panel(policy['rows'], names, name, error, at, bottom)
  title = 'Noise of one policy gradient by baseline and aggregation'
  return charts.svg(''.join(parts), title, (width, bottom + 28))


def line(d: str, opacity: float = 0.22, **more) -> str:
  ink = {'class_': 'grid', 'stroke': charts.INK, 'stroke_opacity': opacity}
  return charts.tag('path', d=d, **ink, **more)


def key(x: float) -> list[str]:
  """Which colour is which aggregation."""
  parts = []
  for name, (colour, _) in DOTS.items():
    text = f'{name} (and _norm)' if name == SUM else name
    parts += [
      charts.tag('circle', cx=x + 4, cy=13, r=4, fill=colour),
      charts.words(x + 13, 17, text),
    ]
    x += 13 + 6.6 * len(text) + 22
  return parts


def panel(rows, names, name, error, left, bottom) -> list[str]:
  """Grid, the default's line, and a dot with its error for every row."""
  rows = [row for row in rows if row['aggregation'] in DOTS]
  ends = [row[name] + sign * row[error] for row in rows for sign in (-1, 1)]
  marks = charts.ticks(min(ends), max(ends), 4)
  low, high = marks[0], marks[-1]

  def place(value):
    return left + (value - low) / (high - low) * PANEL

  default = place(rows[0][name])
  parts = [line(f'M{default:.1f},{TOP}V{bottom}', 0.8, stroke_dasharray='3 3')]
  for mark in marks:
    parts += [
      line(f'M{place(mark):.1f},{TOP}V{bottom}'),
      charts.words(place(mark), bottom + 16, charts.figure(mark), 'middle'),
    ]
  for row in rows:
    colour, down = DOTS[row['aggregation']]
    y = TOP + ROW * (names.index(label(row)) + 0.5) + down
    said = (
      f'{label(row)}, {row["aggregation"]}: variance {row["variance"]:.1f} '
      f"|g|^2, {row['needed']:.2f} of the default's; cosine "
      f'{row["cosine"]:.3f}'
    )
    span = [place(row[name] + sign * row[error]) for sign in (-1, 1)]
    parts += [
      charts.tag(
        'path', d=f'M{span[0]:.1f},{y:.1f}H{span[1]:.1f}', stroke=colour
      ),
      charts.tag(
        'circle',
        charts.tag('title', str(escape(said))),
        cx=f'{place(row[name]):.1f}',
        cy=f'{y:.1f}',
        r=3.4,
        fill=colour,
      ),
    ]
  return parts
