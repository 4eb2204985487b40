"""The roofline: what a decode step reaches, under what the machine can do."""

import math

from experiments.studies.bench.timing import Row
from jaxrl_tok.report import charts

LEFT, RIGHT, TOP, BOTTOM = 60, 660, 40, 360  # of the frame, in pixels
COLOURS = (
  charts.BLUE,
  charts.ORANGE,
  '#16a34a',
  '#a855f7',
  '#e11d48',
  '#0891b2',
)


def roofline(rows: list[Row]) -> str:
  """FLOP/s over FLOPs a byte, both logarithmic: a roof and a dot a size."""
  points = []
  for row in rows:
    n = row.notes
    reached = n['flops_a_step'] / (n['ms_a_step'] / 1e3)
    points.append((row.size, n['flops_a_step'] / n['bytes_a_step'], reached, n))
  xs = [x for _, x, _, _ in points] + [
    n['matmul'] / n['copy'] for *_, n in points
  ]
  low_x, high_x = (
    math.floor(math.log10(min(xs))),
    math.ceil(math.log10(max(xs))),
  )
  tops = [max(n['matmul'], y) for _, _, y, n in points]
  high_y = math.ceil(math.log10(max(tops)))
  low_y = math.floor(math.log10(min(y for _, _, y, _ in points)))
  high_x += high_x == low_x  # a decade at least
  high_y += high_y == low_y

  def across(x):
    return LEFT + (RIGHT - LEFT) * (math.log10(x) - low_x) / (high_x - low_x)

  def up(y):
    return BOTTOM - (BOTTOM - TOP) * (math.log10(y) - low_y) / (high_y - low_y)

  ink = {'stroke': charts.INK, 'stroke_opacity': 0.22, 'class_': 'grid'}
  parts = []
  for e in range(low_x, high_x + 1):
    x = f'{across(10.0**e):.1f}'
    parts += [
      charts.tag('path', d=f'M{x},{TOP}V{BOTTOM}', **ink),
      charts.words(float(x), BOTTOM + 16, f'{10.0**e:g}', 'middle'),
    ]
  for e in range(low_y, high_y + 1):
    y = f'{up(10.0**e):.1f}'
    parts += [
      charts.tag('path', d=f'M{LEFT},{y}H{RIGHT}', **ink),
      charts.words(LEFT - 8, float(y) + 4, f'{10.0 ** (e - 9):g}', 'end'),
    ]
  for colour, (size, x, reached, n) in zip(COLOURS, points):
    ridge = n['matmul'] / n['copy']
    edge = max(10.0**low_x, 10.0**low_y / n['copy'])
    roof = f'M{across(edge):.1f},{up(edge * n["copy"]):.1f}'
    if ridge < 10.0**high_x:
      roof += f'L{across(ridge):.1f},{up(n["matmul"]):.1f}H{RIGHT}'
    parts += [
      charts.tag('path', d=roof, stroke=colour, fill='none', stroke_width=1.5),
      charts.tag(
        'circle',
        cx=f'{across(x):.1f}',
        cy=f'{up(reached):.1f}',
        r=5,
        fill=colour,
      ),
      charts.words(
        across(x) + 9,
        up(reached) + 4,
        f'{size}: {n["share_of_ceiling"]:.0%}',
        font_weight=600,
      ),
    ]
  parts += [
    charts.words(LEFT, 20, 'GFLOP/s of a decode step, under what was measured'),
    charts.words((LEFT + RIGHT) / 2, BOTTOM + 36, 'FLOPs a byte', 'middle'),
  ]
  return charts.svg(''.join(parts), 'Roofline of decoding', (760, 410))
