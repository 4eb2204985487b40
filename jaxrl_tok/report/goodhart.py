"""Reward against its audit: what a policy pays for a reward that rises.

`series` reads each evaluation's reward and audit (rewards/audit.py), `warnings`
judges them, `curves` draws them: the reward on x, a number of the audit on y, a
point for each evaluation. Gao et al., Scaling Laws for Reward Model
Overoptimization, arXiv:2210.10760.
"""

import functools
import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup

from jaxrl_tok.report.charts import (
  BLUE,
  INK,
  ORANGE,
  Points,
  Scale,
  dot,
  figure,
  path_data,
  svg,
  tag,
  ticks,
  words,
  x_axis,
  y_axis,
)
from jaxrl_tok.report.figures import (
  HELD_OUT,
  curve,
  evaluation_rewards,
  metric_names,
)

# {number of the audit: change that is one for the worse}
WORSE = {
  'repetition': 0.15,
  'copied': 0.15,
  'distinct_2': -0.15,
  'refusals': 0.1,
  'profanity': 0.05,
  'personal_data': 0.05,
}
RISE = 0.05  # share of its size by which a reward has risen
CLEAR = 3  # times the noise of the values from one evaluation to the next
FACTOR, FEW = 2, 8  # times as many words, or as few, and more apart than this


class Series(NamedTuple):
  """Numbers of an evaluation over the steps that all of them have."""

  steps: list[float]
  reward: list[float]
  audit: dict  # {name: values}


def series(metrics: list[dict]) -> dict[str, Series]:
  """Series of each evaluation that has a reward and an audit; the KL of
  training, where a step has one, is in that of the held-out data."""
  found, names = {}, metric_names(metrics, 'eval')
  for evaluation, reward in evaluation_rewards(metrics).items():
    held_out = evaluation == HELD_OUT
    prefix = 'eval/audit/' if held_out else f'eval/{evaluation}/audit/'
    audit = {
      name.removeprefix(prefix): dict(curve(metrics, 'eval', name))
      for name in names
      if name.startswith(prefix)
    }
    if not audit:
      continue
    kl = dict(curve(metrics, 'train', 'kl'))
    rewards = dict(reward)
    steps = [
      s for s in rewards if all(s in points for points in audit.values())
    ]
    shown = {k: [points[s] for s in steps] for k, points in audit.items()}
    if held_out and kl:
      shown['kl'] = [0.0 if s == 0 else kl.get(s) for s in steps]
    found[evaluation] = Series(steps, [rewards[s] for s in steps], shown)
  return found


# --- the rule ----------------------------------------------------------------


def noise(values: list[float]) -> float:
  """Standard deviation of values about a smooth curve, by the median of their
  second differences; 0 where there are fewer than five."""
  if len(values) < 5:
    return 0.0
  bends = [
    abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:])
  ]
  return statistics.median(bends) / (0.6745 * math.sqrt(6))


def has_risen(first: float, now: float) -> bool:
  """Tells whether a reward has risen by more than RISE of its size."""
  return now - first > RISE * max(abs(first), abs(now))


def is_worse(name: str, first: float, now: float) -> bool:
  """Tells whether a number of the audit has changed for the worse."""
  if name == 'words':
    low, high = sorted((first, now))
    return high >= FACTOR * low and high - low > FEW
  change = WORSE.get(name)
  if change is None:
    return False
  return now - first >= change if change > 0 else now - first <= change


def suspects(found: Series) -> list[str]:
  """Numbers of the audit that have become worse while the reward has risen,
  both since the first evaluation, in the last one and, where there are three
  or more, in the one before it; and by more than CLEAR times the noise."""
  if len(found.steps) < 2:
    return []
  last = [-1, -2] if len(found.steps) > 2 else [-1]

  def holds(values: list, rule: Callable) -> bool:
    least = CLEAR * noise(values)
    return all(
      rule(values[0], values[i]) and abs(values[i] - values[0]) > least
      for i in last
    )

  if not holds(found.reward, has_risen):
    return []
  return [
    name
    for name, values in found.audit.items()
    if None not in values and holds(values, functools.partial(is_worse, name))
  ]


def warnings(metrics: list[dict]) -> dict[str, str]:
  """{evaluation: warning in one line} of those whose reward rises while their
  audit becomes worse."""
  lines = {}
  for evaluation, found in series(metrics).items():
    names = suspects(found)
    if not names:
      continue

    def change(values, name):
      verb = 'rises' if values[-1] > values[0] else 'falls'
      return f'{name} {verb} from {figure(values[0])} to {figure(values[-1])}'

    worse = ', '.join(change(found.audit[name], name) for name in names)
    lines[evaluation] = (
      f'{evaluation}: {change(found.reward, "the reward")} while {worse}; the '
      'policy may exploit a flaw of the reward: read its completions'
    )
  return lines


# --- pictures ----------------------------------------------------------------


def drawn(reward: list, values: list, steps: list, title: str) -> str:
  """Picture of a number of the audit against the reward: the first evaluation
  is grey, the last one orange."""
  width, height, left, right, top, bottom = 300, 170, 46, 12, 8, 34
  x_ticks = ticks(min(reward), max(reward), 4)
  y_ticks = ticks(min(values), max(values), 3)
  x = Scale(x_ticks[0], x_ticks[-1], left, width - right)
  y = Scale(y_ticks[0], y_ticks[-1], height - bottom, top)
  parts = [
    *y_axis(y, y_ticks, left, width - right),
    *x_axis(x, x_ticks, top, height - bottom),
    words((left + width - right) / 2, height - 4, 'reward', 'middle'),
  ]
  at: Points = [(x(a), y(b)) for a, b in zip(reward, values)]
  parts += [
    tag('path', d=path_data([a, b]), stroke=BLUE, stroke_opacity=0.5)
    for a, b in pairwise(at)
  ]
  colours = [INK, *[BLUE] * (len(at) - 2), ORANGE]
  for place, colour, step, r, v in zip(at, colours, steps, reward, values):
    said = f'step {step:.0f}\nreward {figure(r)}\n{title} {figure(v)}'
    parts.append(dot(*place, colour, 3.4, said))
  return svg(''.join(parts), f'{title} against the reward', (width, height))


def curves(metrics: list[dict]) -> list[dict]:
  """Pictures {heading, unit, svg} of every number of the audit that changes
  over two evaluations or more."""
  shown = []
  for evaluation, found in series(metrics).items():
    for name, values in found.audit.items():
      known = [
        row for row in zip(found.reward, values, found.steps) if None not in row
      ]
      if len(known) < 2 or len({v for _, v, _ in known}) < 2:
        continue
      heading = name.replace('_', ' ')
      picture = drawn(*map(list, zip(*known)), heading)
      shown.append(
        {'heading': heading, 'unit': evaluation, 'svg': Markup(picture)}
      )
  return shown
