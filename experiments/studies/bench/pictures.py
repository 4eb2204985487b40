"""Roofline: rates of a decode step under the limits of the machine."""

from experiments.studies.bench.timing import Row
from jaxrl_tok.report.charts import (
  COLOURS,
  Scale,
  decades,
  dot,
  svg,
  tag,
  words,
  x_axis,
  y_axis,
)

LEFT, RIGHT, TOP, BOTTOM = 60, 660, 40, 360  # of the frame, in pixels


def roofline(rows: list[Row]) -> str:
  """FLOP/s over FLOPs a byte, both logarithmic: a roof and a dot a size."""
  points = []
  for row in rows:
    n = row.notes
    reached = n['flops_a_step'] / (n['ms_a_step'] / 1e3)
    points.append((row.size, n['flops_a_step'] / n['bytes_a_step'], reached, n))
  xs = [x for _, x, _, _ in points]
  xs += [n['matmul'] / n['copy'] for *_, n in points]
  ys = [y for _, _, y, _ in points]
  x_marks = decades(min(xs), max(xs))
  y_marks = decades(min(ys), max([*ys, *(n['matmul'] for *_, n in points)]))
  across = Scale(x_marks[0], x_marks[-1], LEFT, RIGHT, log=True)
  up = Scale(y_marks[0], y_marks[-1], BOTTOM, TOP, log=True)
  parts = x_axis(across, x_marks, TOP, BOTTOM, '{:g}'.format)
  parts += y_axis(up, y_marks, LEFT, RIGHT, lambda y: f'{y / 1e9:g}')
  for colour, (size, x, reached, n) in zip(COLOURS, points):
    ridge = n['matmul'] / n['copy']
    edge = max(across.low, up.low / n['copy'])
    roof = f'M{across(edge):.1f},{up(edge * n["copy"]):.1f}'
    if ridge < across.high:
      roof += f'L{across(ridge):.1f},{up(n["matmul"]):.1f}H{RIGHT}'
    share, at = f'{size}: {n["share_of_ceiling"]:.0%}', (across(x), up(reached))
    parts += [
      tag('path', d=roof, stroke=colour, stroke_width=1.5),
      dot(*at, colour, 5),
      words(at[0] + 9, at[1] + 4, share, font_weight=600),
    ]
  title = 'GFLOP/s of a decode step, under what was measured'
  parts += [
    words(LEFT, 20, title),
    words((LEFT + RIGHT) / 2, BOTTOM + 36, 'FLOPs a byte', 'middle'),
  ]
  return svg(''.join(parts), 'Roofline of decoding', (760, 410))
