"""Page of an evaluation: evaluation.html, of one model or of two side by side.

1. `metric_rows`   a row for each metric: values, intervals as small pictures.
2. `slice_rows`    the reward of each slice, on one axis.
3. `sample_rows`   worst and best prompts; of two models, where they differ.

Completions are untrusted text: the page is made as report.html is (page.py).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from jaxrl_tok.report.charts import (
  BLUE,
  INK,
  ORANGE,
  Scale,
  dot,
  figure,
  line,
  svg,
  tag,
)
from jaxrl_tok.report.evaluated import Comparison
from jaxrl_tok.report.files import atomic_write
from jaxrl_tok.report.page import (
  clip,
  conversation,
  shown_sample,
  template,
)
from jaxrl_tok.report.statistics import Difference, Estimate

SHOWN, SAMPLES = 6, 4  # prompts at either end, completions of each
WIDTH, ROW = 150, 16  # pixels of an interval's picture, of each line in it
COLOURS = BLUE, ORANGE  # of the first model, of the second
WORDS = {'mean_length': 'length, tokens', 'clipped_ratio': 'share cut'}


class Side(NamedTuple):
  """Model on the page."""

  name: str
  estimates: dict[str, Estimate]
  slices: dict  # {column: {slice: {name: Estimate}}}
  rows: list


def in_words(name: str) -> str:
  """Name of a metric: 'pass_at_4' -> 'pass@4', 'rewards/x/mean' -> 'x'."""
  name = re.sub(r'^(pass|maj)_at_(\d+)$', r'\1@\2', name)
  name = re.sub(r'^rewards/(.+)/mean$', r'reward \1', name)
  return WORDS.get(name, name.replace('_', ' '))


def span(x: Estimate | Difference | None, unit: str = '') -> str:
  """Interval of an estimate: '0.41 to 0.52', '' without one."""
  if x is None or x.low is None:
    return ''
  return f'{figure(x.low, unit)} to {figure(x.high, unit)}'


def chance(p: float | None) -> str:
  """p-value in words."""
  if p is None:
    return ''
  return 'p < 0.001' if p < 0.001 else f'p = {p:.2g}'


# --- pictures


def bounds_of(
  found: Sequence[Estimate], share: bool = False
) -> tuple[float, float]:
  """Ends of an axis: lowest and highest number of estimates with a margin; of
  one estimate from 0, and of one share to 1."""
  ends = [v for x in found for v in (x.value, x.low, x.high) if v is not None]
  low, high = min(ends), max(ends)
  if len(found) == 1 and low >= 0:
    return 0.0, 1.0 if share and high <= 1 else (1.1 * high or 1.0)
  margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
  return low - margin, high + margin


def interval_svg(
  found: Sequence[Estimate], ends: tuple[float, float], title: str
) -> Markup:
  """Picture of estimates on one axis, a line and a dot for each."""
  scale, parts = Scale(*ends, 6, WIDTH - 6), []
  height = ROW * len(found)
  if ends[0] < 0 < ends[1]:
    x = scale(0)
    parts.append(line(f'M{x:.1f},0V{height}', stroke_dasharray='2 3'))
  for i, (x, colour) in enumerate(zip(found, COLOURS)):
    y = ROW * (i + 0.5)
    parts.append(line(f'M6,{y}H{WIDTH - 6}', stroke_opacity=0.15))
    if x.low is not None:
      d = f'M{scale(x.low):.1f},{y}H{scale(x.high):.1f}'
      parts.append(
        tag('path', d=d, stroke=colour, stroke_width=3.5, stroke_opacity=0.55)
      )
    parts.append(dot(scale(x.value), y, colour, 3.6))
  return Markup(svg(''.join(parts), title, (WIDTH, height)))


def difference_svg(x: Difference, title: str) -> Markup | None:
  """Picture of a difference and its interval beside 0; None without one."""
  if x.low is None:
    return None
  reach = max(abs(v) for v in (x.low, x.high, x.value)) * 1.1 or 1.0
  scale, y, parts = Scale(-reach, reach, 6, WIDTH - 6), ROW / 2, []
  parts.append(line(f'M{scale(0):.1f},0V{ROW}', stroke_opacity=0.8))
  colour = INK if x.low <= 0 <= x.high else COLOURS[x.value < 0]
  d = f'M{scale(x.low):.1f},{y}H{scale(x.high):.1f}'
  parts.append(
    tag('path', d=d, stroke=colour, stroke_width=3.5, stroke_opacity=0.55)
  )
  parts.append(dot(scale(x.value), y, colour, 3.6))
  return Markup(svg(''.join(parts), title, (WIDTH, ROW)))


# --- tables


def unit_of(name: str, unit: str) -> str:
  """'%' of shares of right answers and of cut completions."""
  share = name in ('reward', 'exact') or re.match('(pass|maj)_at', name)
  return '%' if name == 'clipped_ratio' or (unit == '%' and share) else ''


def cells(found: Sequence[Estimate | None], unit: str) -> list[dict]:
  """Value and interval of each model."""
  return [
    {'value': figure(x.value, unit), 'span': span(x, unit)}
    if x is not None and x.prompts
    else {'value': '–', 'span': ''}
    for x in found
  ]


def metric_rows(
  sides: Sequence[Side], compared: Comparison | None, unit: str = ''
) -> list[dict]:
  """Rows of the table of metrics."""
  names = dict.fromkeys(name for side in sides for name in side.estimates)
  found = []
  for name in names:
    both = [side.estimates.get(name) for side in sides]
    there = [x for x in both if x is not None and x.prompts]
    one, unit_here = in_words(name), unit_of(name, unit)
    row = {
      'name': clip(one, 60),
      'cells': cells(both, unit_here),
      'svg': interval_svg(
        there, bounds_of(there, unit_here == '%'), f'Intervals of {one}'
      )
      if len(there) == len(sides) and any(x.low is not None for x in there)
      else None,
      'difference': None,
    }
    if compared is not None and name in compared.differences:
      x = compared.differences[name]
      row['difference'] = {
        'value': figure(x.value, unit_here),
        'span': span(x, unit_here),
        'p': chance(x.p),
        'svg': difference_svg(x, f'Difference of {one}'),
      }
    found.append(row)
  return found


def slice_rows(sides: Sequence[Side], unit: str = '') -> list[dict]:
  """Tables of the reward by slice, one for each column, each on one axis."""
  tables = []
  for column in sides[0].slices:
    parts = [side.slices[column] for side in sides]
    every = [found['reward'] for part in parts for found in part.values()]
    ends, rows = bounds_of(every), []
    for name in parts[0]:
      both = [part[name]['reward'] for part in parts]
      title = f'Reward where {clip(column, 40)} is {clip(name, 40)}'
      rows.append(
        {
          'name': clip(name, 60),
          'prompts': f'{both[0].prompts:,}',
          'cells': cells(both, unit_of('reward', unit)),
          'svg': interval_svg(both, ends, title),
        }
      )
    tables.append({'column': clip(column, 60), 'rows': rows})
  return tables


# --- samples


def by_index(rows: list[dict]) -> dict[int, list[dict]]:
  """Rows of each prompt."""
  found = {}
  for row in rows:
    found.setdefault(row['index'], []).append(row)
  return found


def mean_reward(rows: list[dict]) -> float | None:
  """Mean reward of rows; None where none applies."""
  known = [row['reward'] for row in rows if row['reward'] is not None]
  return sum(known) / len(known) if known else None


def sample_rows(sides: Sequence[Side], unit: str = '') -> list[dict]:
  """Groups of prompts with the completions of each model: the lowest and the
  highest rewards of one, the largest differences of two."""
  groups = [by_index(side.rows) for side in sides]
  scores = {}
  for index in groups[0]:
    means = [mean_reward(group[index]) for group in groups]
    if None not in means:
      scores[index] = means[0] - (means[1] if len(means) > 1 else 0)
  order = sorted(scores, key=lambda i: (scores[i], i))
  if len(sides) > 1:
    ends = (
      ('the second model is better', [i for i in order if scores[i] < 0]),
      ('the first model is better', [i for i in order[::-1] if scores[i] > 0]),
    )
  else:
    half = max(1, len(order) // 2)
    ends = ('lowest', order[:half]), ('highest', order[half:][::-1])
  return [
    {
      'heading': heading,
      'more': max(0, len(chosen) - SHOWN),
      'rows': [shown_prompt(groups, i, unit) for i in chosen[:SHOWN]],
    }
    for heading, chosen in ends
    if chosen
  ]


def shown_prompt(groups: list[dict], index: int, unit: str) -> dict:
  """Prompt with the first completions of each model."""
  rows = [group[index] for group in groups]
  first = rows[0][0]
  return {
    'prompt': conversation(first['prompt']),
    'answer': clip(first['answer']),
    'sides': [[shown_sample(r, unit) for r in some[:SAMPLES]] for some in rows],
    'more': max(0, len(rows[0]) - SAMPLES),
  }


# --- the page


def headline(
  sides: Sequence[Side], compared: Comparison | None, unit: str = ''
) -> dict[str, str]:
  """Cards: reward of each model, difference and win rate of two."""
  found, here = {}, unit_of('reward', unit)
  for side in sides:
    x = side.estimates['reward']
    found[label(f'reward, {short(side.name)}', x, here)] = figure(x.value, here)
  if compared is not None:
    gap, wins = compared.differences['reward'], compared.wins
    found[label('difference', gap, here)] = figure(gap.value, here)
    found[label('win rate of the first', wins, '%')] = figure(wins.value, '%')
  return found


def label(name: str, x: Estimate | Difference, unit: str) -> str:
  """Label of a card, with the interval."""
  return f'{name}; {span(x, unit) or "no interval"}'


def short(name: str) -> str:
  """End of a model's name, 28 characters at most."""
  return name if len(name) <= 28 else f'…{name[-27:]}'


def write_page(
  path: str | Path,
  sides: Sequence[Side],
  compared: Comparison | None,
  facts: dict[str, str],
  unit: str = '',
) -> Path:
  """Writes the page; facts: {label: text} of how the numbers were made."""
  p = compared and compared.differences['reward'].p
  page = template('evaluation.html.jinja').render(
    title='Evaluation',
    names=[short(side.name) for side in sides],
    whole_names=[clip(side.name, 200) for side in sides],
    colours=COLOURS,
    cards=headline(sides, compared, unit),
    verdict=None if compared is None else chance(p),
    wins_p=None if compared is None else chance(compared.wins.p),
    metrics=metric_rows(sides, compared, unit),
    slices=slice_rows(sides, unit),
    samples=sample_rows(sides, unit),
    answers=any(row['answer'] for row in sides[0].rows),
    facts=[(clip(k, 60), clip(v, 400)) for k, v in facts.items()],
  )
  return atomic_write(path, page)
