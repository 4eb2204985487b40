"""Curves of a run's metrics, drawn as SVG that needs nothing else.

1. `curve` picks one metric of one phase; `thin` keeps it to a few hundred
   points and `smooth` takes a centred moving mean.
2. `chart` draws curves: grid, axes, end values, and a column for each step
   whose <title> says the values there, without a script.
3. `reward_curve_svg` and `panels` choose what a run's report shows.
"""

import math
import re
from itertools import accumulate, pairwise
from typing import NamedTuple

from markupsafe import Markup, escape

BLUE, ORANGE, INK = '#3b82f6', '#e07b0c', '#717b87'  # seen on white and black

PANELS = (  # phase, metric, heading, unit
  ('train', 'entropy', 'Entropy', 'nats per token'),
  ('train', 'kl', 'KL to the reference', 'nats'),
  ('train', 'surrogate', 'Surrogate loss', ''),
  ('train', 'grad_norm', 'Gradient norm', ''),
  ('train', 'clip_ratio/region_mean', 'Clipped ratios', 'fraction'),
  ('train', 'update_kl', 'KL within an update', 'nats'),
  ('train', 'explained_variance', 'Variance that the critic explains', ''),
  ('train', 'completions/mean_length', 'Completion length', 'tokens, mean'),
  ('train', 'tokens_per_second', 'Speed', 'tokens per second'),
  ('train', 'frac_reward_zero_std', 'Groups without variance', 'fraction'),
  ('train', 'sampler_logp_gap', 'Sampler log-prob gap', 'nats'),
  ('warm_start', 'loss', 'Warm-start loss', 'cross-entropy'),
)

Points = list[tuple[float, float]]


class Curve(NamedTuple):
  label: str
  points: Points
  colour: str
  width: float = 2.2
  opacity: float = 1.0
  dots: bool = False
  end: str | None = None  # a word to write beside the last value


def number(value: object) -> float | None:
  """A finite float that a plot can hold, or None."""
  try:
    value = float(value)
  except (TypeError, ValueError, OverflowError):
    return None
  return value if abs(value) < 1e30 else None  # false for nan too


# --- curves


def curve(metrics: list[dict], phase: str, name: str) -> Points:
  """(step, value) in order of step; of a step's repetitions the last wins."""
  points = {}
  for row in metrics:
    if row.get('phase') == phase and name in row:
      points[number(row.get('step'))] = number(row[name])
  found = [(x, y) for x, y in points.items() if None not in (x, y)]
  return sorted(found)


def thin(points: Points, most: int = 400) -> Points:
  """At most `most` points: the means of equal runs of neighbours."""
  n, buckets = len(points), min(len(points), most)
  edges = [i * n // buckets for i in range(buckets + 1)] if n else []
  return [mean_point(points[i:j]) for i, j in pairwise(edges)]


def mean_point(points: Points) -> tuple[float, float]:
  xs, ys = zip(*points)
  return math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)


def smooth(points: Points, half: int) -> Points:
  """Each y becomes the mean of the `half` neighbours on either side and it."""
  sums = [0.0, *accumulate(y for _, y in points)]
  ranges = [
    (max(i - half, 0), min(i + half + 1, len(points)))
    for i in range(len(points))
  ]
  return [
    (x, (sums[j] - sums[i]) / (j - i)) for (x, _), (i, j) in zip(points, ranges)
  ]


def figure(x: float) -> str:
  """A number for an axis or a card: 0.25, 1500, 12k, 3.2M."""
  for least, size, mark in ((1e9, 1e9, 'G'), (1e6, 1e6, 'M'), (1e4, 1e3, 'k')):
    if abs(x) >= least:
      return f'{x / size:.3g}{mark}'
  if 0 < abs(x) < 1e-3:
    return re.sub('e-0*', 'e-', f'{x:.3g}')
  return f'{x:.0f}' if abs(x) >= 100 else f'{x:.3g}'


def ticks(low: float, high: float, count: int, whole: bool = False) -> list:
  """Round numbers 1, 2 or 5 times a power of ten, covering low..high."""
  if high - low <= max(1e-9, 1e-6 * max(abs(low), abs(high))):
    low, high = min(low, 0.0), max(high, 0.0)
    high = high if high - low > 1e-9 else low + 1.0
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next((m * power for m in (1, 2, 5) if m * power >= rough), 10 * power)
  step = max(1, round(step)) if whole else step
  return [
    i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)
  ]


def path_data(points: Points) -> str:
  first, *rest = [f'{x:.1f},{y:.1f}' for x, y in points]
  return f'M{first}' + (f'L{" ".join(rest)}' if rest else 'h0')


def spread(ends: list[tuple[float, str]], gap: float = 14) -> list:
  """Moves labels apart that would overlap, keeping their order."""
  placed = []
  for y, text in sorted(ends):
    placed.append((max(y, placed[-1][0] + gap) if placed else y, text))
  return placed


# --- SVG


def tag(name: str, inside: str = '', **attributes: object) -> str:
  """One element. Attributes are escaped; `inside` is markup, see `words`."""
  pairs = ''.join(
    f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
    for key, value in attributes.items()
  )
  return f'<{name}{pairs}>{inside}</{name}>' if inside else f'<{name}{pairs}/>'


def words(x: float, y: float, text: str, anchor: str = 'start', **more) -> str:
  return tag(
    'text',
    str(escape(text)),
    x=f'{x:.1f}',
    y=f'{y:.1f}',
    text_anchor=anchor,
    **{'class_': 'ink', 'fill': INK, **more},
  )


def svg(inside: str, title: str, size: tuple[int, int]) -> str:
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


class Frame(NamedTuple):
  """Where a plot lies on its figure, and what its axes span."""

  left: float
  top: float
  right: float
  bottom: float
  x_ticks: list[float]
  y_ticks: list[float]
  x_low: float
  x_high: float

  def place(self, x: float, y: float) -> tuple[float, float]:
    low, high = self.y_ticks[0], self.y_ticks[-1]
    across = (x - self.x_low) / (self.x_high - self.x_low)
    up = (y - low) / (high - low)
    return (
      self.left + across * (self.right - self.left),
      self.bottom - up * (self.bottom - self.top),
    )


def make_frame(
  curves: list[Curve], size: tuple[int, int], large: bool
) -> Frame:
  xs, ys = zip(*(point for c in curves for point in c.points))
  x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
  near = 0.02 * (x_high - x_low)  # a tick just outside widens the axis to it
  x_ticks = [
    x
    for x in ticks(x_low, x_high, size[0] // (110 if large else 75), whole=True)
    if x_low - near <= x <= x_high + near
  ]
  y_low, y_high = min(ys), max(ys)
  if large and y_low >= 0 and y_high <= 1:
    y_low, y_high = 0, 1
  elif y_low > 0.8 * y_high > 0:  # small noise should look small
    y_low = 0
  left, top, right, bottom = (46, 34, 106, 42) if large else (50, 8, 62, 22)
  return Frame(
    left,
    top,
    size[0] - right,
    size[1] - bottom,
    x_ticks,
    ticks(y_low, y_high, size[1] // 50),
    min([x_low, *x_ticks]),
    max([x_high, *x_ticks]),
  )


def chart(
  curves: list[Curve], title: str, size: tuple[int, int], large: bool = False
) -> str:
  """Grid, curves, end values, and a strip for each step that can be hovered."""
  curves = [c for c in curves if c.points]
  if not curves:
    return svg(
      words(size[0] / 2, size[1] / 2, 'no reward recorded', 'middle'),
      title,
      size,
    )
  frame = make_frame(curves, size, large)
  parts = grid(frame)
  for c in curves:
    at = [frame.place(*point) for point in c.points]
    parts += draw(c, at, dots=at)
  if large:
    parts += legend(curves, frame.left)
    parts += [
      words(
        (frame.left + frame.right) / 2, size[1] - 6, 'training step', 'middle'
      )
    ]
  parts += hover_strips(curves, frame, 80 if large else 32)
  ends = [
    (
      frame.place(*c.points[-1])[1],
      f'{c.end} {figure(c.points[-1][1])}'.strip(),
    )
    for c in curves
    if c.end is not None
  ]
  parts += [
    words(frame.right + 8, y + 4, text, font_weight=600)
    for y, text in spread(ends)
  ]
  return svg(''.join(parts), title, size)


def grid(frame: Frame) -> list[str]:
  line = {'class_': 'grid', 'stroke': INK, 'stroke_opacity': 0.22}
  parts = []
  for value in frame.y_ticks:
    _, y = frame.place(frame.x_low, value)
    parts += [
      tag('path', d=f'M{frame.left},{y:.1f}H{frame.right}', **line),
      words(frame.left - 7, y + 4, figure(value), 'end'),
    ]
  for value in frame.x_ticks:
    x, _ = frame.place(value, frame.y_ticks[0])
    parts += [
      tag('path', d=f'M{x:.1f},{frame.bottom}v4', **line),
      words(x, frame.bottom + 17, figure(value), 'middle'),
    ]
  return parts


def draw(c: Curve, points: Points, dots: Points) -> list[str]:
  parts = [
    tag(
      'path',
      d=path_data(points),
      stroke=c.colour,
      stroke_width=c.width,
      stroke_opacity=c.opacity,
      stroke_linejoin='round',
      stroke_linecap='round',
    )
  ]
  if c.dots and len(dots) <= 60:
    parts += [
      tag('circle', cx=f'{x:.1f}', cy=f'{y:.1f}', r=3.2, fill=c.colour)
      for x, y in dots
    ]
  return parts


def legend(curves: list[Curve], x: float) -> list[str]:
  parts = []
  for c in curves:
    parts += draw(c, [(x, 13), (x + 20, 13)], dots=[(x + 10, 13)])
    parts.append(words(x + 27, 17, c.label))
    x += 27 + 6.3 * len(c.label) + 24
  return parts


def hover_strips(curves: list[Curve], frame: Frame, most: int) -> list[str]:
  """Invisible columns whose <title> says the values there, without a script."""
  parts, tables = [], [(c.label, thin(c.points, most)) for c in curves]
  xs = max((table for _, table in tables), key=len)
  middles = [(a + b) / 2 for (a, _), (b, _) in pairwise(xs)]
  edges = [frame.x_low, *middles, frame.x_high]
  for (x, _), low, high in zip(xs, edges, edges[1:]):
    near = [
      (label, min(table, key=lambda point: abs(point[0] - x)))
      for label, table in tables
    ]
    text = '\n'.join(
      [
        f'step {x:.0f}',
        *(
          f'{label}: {figure(y)}' + ('' if at == x else f' (step {at:.0f})')
          for label, (at, y) in near
        ),
      ]
    )
    (left, _), (right, _) = frame.place(low, 0), frame.place(high, 0)
    parts.append(
      tag(
        'rect',
        tag('title', str(escape(text))),
        class_='strip',
        x=f'{left:.1f}',
        y=frame.top,
        width=f'{right - left:.1f}',
        height=frame.bottom - frame.top,
        fill=INK,
        fill_opacity=0,
      )
    )
  return parts


# --- the figures of a run


def reward_curve_svg(metrics: list[dict]) -> str:
  """Reward in training and on held-out prompts, as a figure on its own.

  Its colours are explicit and lie midway, so that it can be read on a white
  page and on a black one.
  """
  reward = curve(metrics, 'train', 'reward')
  held_out = curve(metrics, 'eval', 'eval/reward')
  half = max(2, len(reward) // 30)
  each = (
    'each step'
    if len(reward) <= 400
    else (f'means of {math.ceil(len(reward) / 400)} steps')
  )
  return chart(
    [
      Curve(
        f'training reward, {each}', thin(reward), BLUE, width=1.2, opacity=0.5
      ),
      Curve(
        f'moving mean of {2 * half + 1} steps',
        thin(smooth(reward, half)),
        BLUE,
        end='train',
      ),
      Curve(
        'held-out reward, greedy',
        thin(held_out),
        ORANGE,
        dots=True,
        end='held-out',
      ),
    ],
    'Training reward and held-out reward by step',
    (920, 340),
    large=True,
  )


def panels(metrics: list[dict]) -> list[dict]:
  shown = []
  for phase, name, heading, unit in PANELS:
    points = thin(curve(metrics, phase, name), 300)
    if points:
      drawn = chart(
        [Curve(name, points, BLUE, width=1.6, end='')],
        f'{heading} by step',
        (300, 150),
      )
      shown.append({'heading': heading, 'unit': unit, 'svg': Markup(drawn)})
  return shown
