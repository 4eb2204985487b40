"""Dots with error bars by row, in panels side by side, as SVG."""

from typing import NamedTuple

from jaxrl_tok.report.charts import (
  BLUE,
  Curve,
  Scale,
  dot,
  legend,
  line,
  svg,
  tag,
  ticks,
  words,
  x_axis,
)

LEFT, GAP, ROW = 190, 42, 24  # pixels


class Dot(NamedTuple):
  """Value in a row of a panel."""

  row: str
  value: float
  error: float = 0.0  # half the length of a bar through it
  colour: str = BLUE
  shift: float = 0.0  # pixels below the row's middle
  title: str = ''  # shown when the pointer rests on it
  bar: bool = False  # a short upright bar, for a mean


class Panel(NamedTuple):
  """Dots over one axis, beside other panels of the same rows."""

  heading: str
  dots: list[Dot]
  width: float = 150
  origin: float | None = None  # value that the axis includes
  guide: float | None = None  # value with a dashed line
  group: str = ''  # text over the headings of this panel and the next ones


def row_chart(
  rows: list[str],
  panels: list[Panel],
  title: str,
  notes: dict[str, str] | None = None,
  bold: str | None = None,
  key: tuple[Curve, ...] = (),
) -> str:
  """Picture of dots: a row for every name, panels side by side.

  Args:
    notes: text after the last panel, by row.
    bold: the row whose name is bold.
    key: what the colours mean; label and colour of each curve are shown.
  """
  notes = notes or {}
  top = 32 + 20 * any(p.group for p in panels) + 22 * bool(key)
  bottom, x, parts = top + ROW * len(rows), float(LEFT), legend(key, LEFT)
  for panel in panels:
    parts += [
      words(x, top - 32, panel.group, font_weight=600),
      words(x, top - 12, panel.heading),
      *panel_parts(rows, panel, x, top, bottom),
    ]
    x += panel.width + GAP
  end = x - GAP
  for i, row in enumerate(rows):
    y = top + ROW * (i + 0.5)
    weight = 700 if row == bold else 400
    parts += [
      words(LEFT - 10, y + 4, row, 'end', font_weight=weight),
      line(f'M{LEFT},{y + ROW / 2:.1f}H{end}', stroke_opacity=0.12),
      words(end + 10, y + 4, notes.get(row, '')),
    ]
  margin = 30 + 6.3 * max(map(len, notes.values()), default=0)
  return svg(''.join(parts), title, (round(end + margin), bottom + 28))


def dot_parts(d: Dot, scale: Scale, y: float) -> list[str]:
  """Dot or upright bar at a height, with its error."""
  x, parts = scale(d.value), []
  if d.error:
    low, high = scale(d.value - d.error), scale(d.value + d.error)
    span = f'M{low:.1f},{y:.1f}H{high:.1f}'
    parts.append(tag('path', d=span, stroke=d.colour))
  if d.bar:
    upright = f'M{x:.1f},{y - 8:.1f}v16'
    parts.append(tag('path', d=upright, stroke=d.colour, stroke_width=2.5))
  else:
    parts.append(dot(x, y, d.colour, 3.6, d.title))
  return parts


def panel_parts(
  rows: list[str], panel: Panel, left: float, top: float, bottom: float
) -> list[str]:
  """Axis, guide and dots of a panel."""
  ends = [d.value + sign * d.error for d in panel.dots for sign in (-1, 1)]
  ends += [v for v in (panel.origin, panel.guide) if v is not None]
  ends = ends or [0.0]
  marks = ticks(min(ends), max(ends), max(3, round(panel.width / 80)))
  scale = Scale(marks[0], marks[-1], left, left + panel.width)
  parts = x_axis(scale, marks, top, bottom)
  if panel.guide is not None:
    dashed = {'stroke_opacity': 0.8, 'stroke_dasharray': '3 3'}
    parts.append(line(f'M{scale(panel.guide):.1f},{top}V{bottom}', **dashed))
  for d in panel.dots:
    y = top + ROW * (rows.index(d.row) + 0.5) + d.shift
    parts += dot_parts(d, scale, y)
  return parts
