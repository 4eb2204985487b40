"""Pictures as SVG that need nothing else: no script, no font, no style sheet.

1. `thin` keeps a curve to a few hundred points; `smooth` takes a centred
   moving mean.
2. `Scale` maps values to pixels; `x_axis` and `y_axis` draw it with its ticks.
3. `chart` draws curves over steps: bands, end values, and an invisible column
   for each step whose <title> holds the values there.

Dots by row are drawn by row_chart.py. Pictures of another kind combine `Scale`,
the axes, `line`, `dot`, `words` and `svg`. Colours can be read on a white page
and on a black one. Text is escaped.
"""

import math
import re
from itertools import accumulate, pairwise
from typing import NamedTuple

from markupsafe import escape

BLUE, ORANGE, INK = '#3b82f6', '#e07b0c', '#717b87'
COLOURS = (BLUE, ORANGE, '#16a34a', '#a855f7', '#e11d48', '#0891b2')

Points = list[tuple[float, float]]


class Curve(NamedTuple):
  """Values over steps, and how they are drawn."""

  label: str
  points: Points
  colour: str = BLUE
  width: float = 2.2
  opacity: float = 1.0
  dots: bool = False
  end: str | None = None  # word beside the last value; None: no value either
  band: tuple[Points, Points] | None = None  # lowest and highest around it


# --- numbers


def thin(points: Points, most: int = 400) -> Points:
  """At most `most` points: the means of equal runs of neighbours."""
  n, buckets = len(points), min(len(points), most)
  edges = [i * n // buckets for i in range(buckets + 1)] if n else []
  return [mean_point(points[i:j]) for i, j in pairwise(edges)]


def mean_point(points: Points) -> tuple[float, float]:
  """Mean of points."""
  xs, ys = zip(*points)
  return math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)


def smooth(points: Points, half: int) -> Points:
  """Moving mean: each y with its `half` neighbours on either side."""
  sums = [0.0, *accumulate(y for _, y in points)]
  ranges = [
    (max(i - half, 0), min(i + half + 1, len(points)))
    for i in range(len(points))
  ]
  return [
    (x, (sums[j] - sums[i]) / (j - i)) for (x, _), (i, j) in zip(points, ranges)
  ]


def figure(x: float, unit: str = '') -> str:
  """Number with 3 significant digits, or 2 below 1e-4: 0.25, 1500, 12k, 3.2M,
  1.2e-14. A unit of '%' shows a share: 0.25 is 25 %."""
  if unit == '%':
    return f'{100 * x:.3g} %' if abs(x) < 9.995 else f'{100 * x:.0f} %'
  for least, size, mark in ((1e9, 1e9, 'G'), (1e6, 1e6, 'M'), (1e4, 1e3, 'k')):
    if abs(x) >= least:
      return f'{x / size:.3g}{mark}'
  if 0 < abs(x) < 1e-4:
    return re.sub('e-0*', 'e-', f'{x:.2g}')
  return f'{x:.0f}' if abs(x) >= 100 else f'{x:.3g}'


def ticks(low: float, high: float, count: int, whole: bool = False) -> list:
  """Multiples of 1, 2 or 5 times a power of ten that cover low..high."""
  if high - low <= 1e-6 * max(abs(low), abs(high)):
    low, high = min(low, 0.0), max(high, 0.0)
    high = high if high - low > 0 else low + 1.0
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next((m * power for m in (1, 2, 5) if m * power >= rough), 10 * power)
  step = max(1, round(step)) if whole else step
  return [
    i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)
  ]


def decades(low: float, high: float) -> list[float]:
  """Powers of ten that cover low..high, two at least."""
  first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
  return [10.0**e for e in range(first, max(last, first + 1) + 1)]


class Scale(NamedTuple):
  """Map from values to pixels: low lies at `start`, high at `stop`."""

  low: float
  high: float
  start: float
  stop: float
  log: bool = False

  def __call__(self, value: float) -> float:
    low, high = self.low, self.high
    if self.log:
      value, low, high = map(math.log10, (value, low, high))
    share = (value - low) / (high - low)
    return self.start + share * (self.stop - self.start)


# --- SVG


def tag(name: str, inside: str = '', **attributes: object) -> str:
  """Element of SVG. Attributes are escaped; `inside` is markup, see `words`."""
  pairs = ''.join(
    f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
    for key, value in attributes.items()
  )
  return f'<{name}{pairs}>{inside}</{name}>' if inside else f'<{name}{pairs}/>'


def words(x: float, y: float, text: str, anchor: str = 'start', **more) -> str:
  """Text at a place."""
  return tag(
    'text',
    str(escape(text)),
    x=f'{x:.1f}',
    y=f'{y:.1f}',
    text_anchor=anchor,
    **{'class_': 'ink', 'fill': INK, **more},
  )


def line(d: str, **more) -> str:
  """Path of the grid, or of another stroke."""
  ink = {'class_': 'grid', 'stroke': INK, 'stroke_opacity': 0.22}
  return tag('path', d=d, **{**ink, **more})


def dot(
  x: float, y: float, colour: str = BLUE, r: float = 4, title: str = ''
) -> str:
  """Filled circle; its title is shown when the pointer rests on it."""
  inside = tag('title', str(escape(title))) if title else ''
  return tag('circle', inside, cx=f'{x:.1f}', cy=f'{y:.1f}', r=r, fill=colour)


def path_data(points: Points) -> str:
  """Attribute d of a path through pixels."""
  first, *rest = [f'{x:.1f},{y:.1f}' for x, y in points]
  return f'M{first}' + (f'L{" ".join(rest)}' if rest else 'h0')


def svg(inside: str, title: str, size: tuple[int, int]) -> str:
  """Picture of a size in pixels."""
  return tag(
    'svg',
    tag('title', str(escape(title))) + inside,
    xmlns='http://www.w3.org/2000/svg',
    role='img',
    aria_label=title,
    viewBox=f'0 0 {size[0]} {size[1]}',
    width=size[0],
    height=size[1],
    font_family="system-ui, -apple-system, 'Segoe UI', sans-serif",
    font_size=12,
    fill='none',
  )


def x_axis(
  scale: Scale, marks: list, top: float, bottom: float, form=figure
) -> list[str]:
  """Vertical lines at marks, with their numbers below."""
  parts = []
  for mark in marks:
    x = scale(mark)
    parts += [
      line(f'M{x:.1f},{top}V{bottom}'),
      words(x, bottom + 14, form(mark), 'middle'),
    ]
  return parts


def y_axis(
  scale: Scale, marks: list, left: float, right: float, form=figure
) -> list[str]:
  """Horizontal lines at marks, with their numbers on the left."""
  parts = []
  for mark in marks:
    y = scale(mark)
    parts += [
      line(f'M{left},{y:.1f}H{right}'),
      words(left - 7, y + 4, form(mark), 'end'),
    ]
  return parts


def spread(ends: list[tuple[float, str]], gap: float = 14) -> list:
  """Labels (y, text) in order, moved apart where they would overlap."""
  placed = []
  for y, text in sorted(ends):
    placed.append((max(y, placed[-1][0] + gap) if placed else y, text))
  return placed


def legend(curves: list[Curve], x: float, y: float = 13) -> list[str]:
  """Names of curves in a line, each behind a piece of its stroke."""
  parts = []
  for c in curves:
    parts += draw(c, [(x, y), (x + 20, y)], dots=[(x + 10, y)])
    parts.append(words(x + 27, y + 4, c.label))
    x += 27 + 6.3 * len(c.label) + 24
  return parts


# --- curves over steps


class Frame(NamedTuple):
  """Plot area of a chart: its two axes and their ticks."""

  x: Scale
  y: Scale
  x_ticks: list[float]
  y_ticks: list[float]

  @property
  def left(self) -> float:
    return self.x.start

  @property
  def right(self) -> float:
    return self.x.stop

  def place(self, x: float, y: float) -> tuple[float, float]:
    """Pixel of a point."""
    return self.x(x), self.y(y)


def make_frame(
  curves: list[Curve], size: tuple[int, int], large: bool, unit: str = ''
) -> Frame:
  """Plot area that holds the curves and their bands."""
  bands = [side for c in curves if c.band for side in c.band]
  groups = [c.points for c in curves] + bands
  xs, ys = zip(*(point for points in groups for point in points))
  x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
  near = 0.02 * (x_high - x_low)  # a tick just outside widens the axis to it
  x_ticks = [
    x
    for x in ticks(x_low, x_high, size[0] // (110 if large else 75), whole=True)
    if x_low - near <= x <= x_high + near
  ]
  y_low, y_high = min(ys), max(ys)
  if unit == '%' and y_low >= 0 and y_high <= 1:
    y_low, y_high = 0, 1
  elif y_low > 0.8 * y_high > 0:  # small noise should look small
    y_low = 0
  y_ticks = ticks(y_low, y_high, size[1] // 50)
  left, top, right, bottom = (52, 34, 124, 42) if large else (50, 8, 62, 22)
  return Frame(
    Scale(
      min([x_low, *x_ticks]), max([x_high, *x_ticks]), left, size[0] - right
    ),
    Scale(y_ticks[0], y_ticks[-1], size[1] - bottom, top),
    x_ticks,
    y_ticks,
  )


def chart(
  curves: list[Curve],
  title: str,
  size: tuple[int, int],
  large: bool = False,
  unit: str = '',
  caption: str = 'training step',
  x_name: str = 'step',
) -> str:
  """Picture of curves over steps; a large one has a legend and a caption.

  Args:
    unit: '%' for shares, which are shown as per cent on an axis from 0 to 1.
    x_name: word before the value of x that the pointer rests on.
  """
  curves = [c for c in curves if c.points]
  if not curves:
    empty = words(size[0] / 2, size[1] / 2, 'no values recorded', 'middle')
    return svg(empty, title, size)

  def form(value):
    return figure(value, unit)

  frame = make_frame(curves, size, large, unit)
  floor = frame.y.start
  parts = y_axis(frame.y, frame.y_ticks, frame.left, frame.right, form)
  parts += x_axis(frame.x, frame.x_ticks, floor, floor + 4)
  for c in curves:
    if c.band:
      outline = [frame.place(*p) for p in c.band[1] + c.band[0][::-1]]
      ring = path_data(outline) + 'Z'
      parts.append(tag('path', d=ring, fill=c.colour, fill_opacity=0.2))
  for c in curves:
    at = [frame.place(*point) for point in c.points]
    parts += draw(c, at, dots=at)
  if large:
    middle = (frame.left + frame.right) / 2
    parts += legend(curves, frame.left)
    parts.append(words(middle, size[1] - 6, caption, 'middle'))
  parts += hover_strips(curves, frame, 80 if large else 32, form, x_name)
  ends = [
    (frame.y(c.points[-1][1]), f'{c.end}: {form(c.points[-1][1])}'.lstrip(': '))
    for c in curves
    if c.end is not None
  ]
  parts += [
    words(frame.right + 8, y + 4, text, font_weight=600)
    for y, text in spread(ends)
  ]
  return svg(''.join(parts), title, size)


def draw(c: Curve, points: Points, dots: Points) -> list[str]:
  """Stroke of a curve through pixels, and its dots where they are few."""
  stroke = tag(
    'path',
    d=path_data(points),
    stroke=c.colour,
    stroke_width=c.width,
    stroke_opacity=c.opacity,
    stroke_linejoin='round',
    stroke_linecap='round',
  )
  shown = dots if c.dots and len(dots) <= 60 else []
  return [stroke, *(dot(x, y, c.colour, 3.2) for x, y in shown)]


def hover_strips(
  curves: list[Curve], frame: Frame, most: int, form=figure, x_name='step'
) -> list[str]:
  """Invisible columns whose <title> holds the values there."""
  parts, tables = [], [(c.label, thin(c.points, most)) for c in curves]
  xs = max((table for _, table in tables), key=len)
  middles = [(a + b) / 2 for (a, _), (b, _) in pairwise(xs)]
  edges = [frame.x.low, *middles, frame.x.high]
  for (x, _), low, high in zip(xs, edges, edges[1:]):
    lines = [f'{x_name} {x:,.0f}']
    for label, table in tables:
      at, y = min(table, key=lambda point: abs(point[0] - x))
      there = '' if at == x else f' ({x_name} {at:,.0f})'
      lines.append(f'{label}: {form(y)}{there}')
    left, right = frame.x(low), frame.x(high)
    parts.append(
      tag(
        'rect',
        tag('title', str(escape('\n'.join(lines)))),
        class_='strip',
        x=f'{left:.1f}',
        y=frame.y.stop,
        width=f'{right - left:.1f}',
        height=frame.y.start - frame.y.stop,
        fill=INK,
        fill_opacity=0,
      )
    )
  return parts
