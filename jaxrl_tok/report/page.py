"""A run directory in, one self-contained page out: report.html.

1. `read_rows` reads metrics.jsonl and samples.jsonl, forgiving a killed run.
2. charts.py draws the metrics.
3. `read_samples` keeps the greedy completions before and after, and the sampled
   ones of the first and the latest steps; `shade` colours a token by advantage.
4. `write_report` fills report.html.jinja and replaces report.html in one move.

Completions are untrusted text. The page has no script and loads nothing, Jinja
escapes every string, and colours are made of numbers only. Never imports jax.
"""

import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup, escape

from jaxrl_tok.report.charts import (
  curve,
  figure,
  number,
  panels,
  reward_curve_svg,
)

LATEST_STEPS, GROUPS, SAMPLES, TOKENS, PAIRS = 3, 3, 8, 600, 20  # what is shown
DARKEST = 0.62  # opacity of the largest advantage; text stays readable on it


# --- reading


def read_rows(path: Path) -> Iterator[dict]:
  """The JSON objects of a file, one a line; unfinished lines are skipped."""
  if not path.exists():
    return
  with path.open(encoding='utf-8', errors='replace') as lines:
    for line in lines:
      try:
        row = json.loads(line)
      except (ValueError, RecursionError):
        continue
      if isinstance(row, dict):
        yield row


def read_text(path: Path, limit: int = 100_000) -> str:
  if not path.exists():
    return ''
  return clip(path.read_text(encoding='utf-8', errors='replace'), limit)


def clip(text: object, limit: int = 4000) -> str:
  text = '' if text is None else str(text)
  more = len(text) - limit
  return text if more <= 0 else f'{text[:limit]} … ({more} more characters)'


def entries(value: object) -> list:
  return value if isinstance(value, list) else []


# --- what the page shows


def time_split(metrics: list[dict]) -> list[dict]:
  """Seconds spent sampling, scoring and updating, and their shares."""
  names = ('rollout', 'score', 'update')
  spent = [
    math.fsum(y for _, y in curve(metrics, 'train', f'time/{name}'))
    for name in names
  ]
  whole = sum(spent)
  return [
    {
      'name': name,
      'seconds': duration(seconds),
      'percent': round(100 * seconds / whole, 2),
    }
    for name, seconds in zip(names, spent)
    if whole > 0 <= seconds
  ]


def duration(seconds: float) -> str:
  if seconds < 60:
    return f'{seconds:.3g} s'
  minutes, left = divmod(round(seconds), 60)
  return (
    f'{minutes} min {left} s'
    if minutes < 60
    else f'{minutes // 60} h {minutes % 60} min'
  )


def headline(metrics: list[dict]) -> dict[str, str]:
  """Cards for a run whose caller gave no summary."""
  held_out = curve(metrics, 'eval', 'eval/reward')
  reward = curve(metrics, 'train', 'reward')
  seconds = [number(row.get('time')) or 0.0 for row in metrics]
  cards = {}
  if held_out:
    cards['held-out reward, before → after'] = (
      f'{figure(held_out[0][1])} → {figure(held_out[-1][1])}'
    )
  if reward:
    cards['training reward, last step'] = figure(reward[-1][1])
    cards['training steps'] = f'{len(reward):,}'
  if metrics:
    cards['time'] = duration(max(seconds))
  return cards


class Samples(NamedTuple):
  before: dict[str, dict]  # by prompt
  after: dict[str, dict]
  train: dict[int, list[dict]]  # by step: the first and the latest few


def read_samples(path: Path) -> Samples:
  samples, previous = Samples({}, {}, {}), None
  for row in read_rows(path):
    split, step = row.get('split'), number(row.get('step'))
    if split in ('before', 'after'):
      getattr(samples, split)[str(row.get('prompt'))] = row
    elif split == 'train' and step is not None:
      if step != previous:  # a step met again was resumed: it starts afresh
        samples.train[step], previous = [], step
      samples.train.setdefault(step, []).append(row)
      if len(samples.train) > LATEST_STEPS + 1:
        del samples.train[sorted(samples.train)[1]]
  return samples


def greedy_pairs(samples: Samples) -> dict:
  prompts = list(dict.fromkeys([*samples.before, *samples.after]))
  both = (samples.before, samples.after)
  rows = []
  for prompt in prompts[:PAIRS]:
    found = [side.get(prompt) for side in both]
    answer = next((r['answer'] for r in found if r and 'answer' in r), None)
    rows.append(
      {
        'prompt': clip(prompt),
        'answer': clip(answer),
        'sides': [r and shown_sample(r) for r in found],
      }
    )
  right = [
    sum((number(r.get('reward')) or 0) > 0.5 for r in side.values())
    for side in both
  ]
  return {
    'rows': rows,
    'right': right,
    'of': [len(side) for side in both],
    'more': len(prompts) - len(rows),
  }


def shown_sample(row: dict) -> dict:
  reward = number(row.get('reward'))
  return {
    'completion': clip(row.get('completion')),
    'reward': 'not scored' if reward is None else figure(reward),
    'mark': None if reward is None else 'right' if reward > 0.5 else 'wrong',
  }


# --- credit: one token, one colour


def shade(advantage: object, largest: float) -> str:
  """CSS for a token: its sign picks the hue, its share of the largest alpha.

  Blue where the token is pushed to be likelier, orange where less likely.
  Built from numbers only, because everything else in a sample is untrusted.
  """
  advantage = number(advantage) or 0.0
  if not advantage or largest <= 0:
    return ''
  alpha = DARKEST * min(1.0, abs(advantage) / largest)
  red, green, blue = (37, 99, 235) if advantage > 0 else (234, 88, 12)
  return f'background:rgba({red},{green},{blue},{alpha:.4f})'


def visible(token: object) -> Markup:
  """The token escaped, with marks where nothing would be seen."""
  text = ''.join(
    f'⟨U+{ord(c):04X}⟩'
    if c not in '\n\r\t'
    and unicodedata.category(c) in ('Cc', 'Cf', 'Cs', 'Zl', 'Zp')
    else c
    for c in str(token)[:200]
  )
  marks = {' ': '␣', '\n': '↵', '\r': '␍', '\t': '⇥', '\xa0': '⍽'}
  marked = re.sub(
    '[ \n\r\t\xa0]', lambda m: f'<i>{marks[m[0]]}</i>', str(escape(text))
  )
  return Markup(marked or '<i>·</i>')


def shown_tokens(row: dict, largest: float) -> list[dict]:
  columns = [entries(row.get(k)) for k in ('logp', 'rewards', 'advantage')]
  tokens = entries(row.get('tokens'))
  columns = [column[: len(tokens)] for column in columns]
  shown = []
  for token, *values in islice(zip_longest(tokens, *columns), TOKENS):
    logp, reward, advantage = map(number, values)
    said = ['–' if v is None else f'{v:+.3f}' for v in (reward, advantage)]
    chance = (
      '–'
      if logp is None
      else (f'{logp:.3f} (p = {math.exp(min(logp, 0)):.3g})')
    )
    shown.append(
      {
        'text': visible(token),
        'style': shade(advantage, largest),
        'paid': bool(reward),
        'newline': '\n' in str(token),
        'title': f'{clip(repr(token), 200)}\nlog-prob {chance}\n'
        f'reward {said[0]}\nadvantage {said[1]}',
      }
    )
  return shown


def credit(samples: Samples) -> dict:
  """Steps, newest first; each has groups (one a prompt) of shaded samples."""
  largest = max(
    (
      abs(number(a) or 0.0)
      for rows in samples.train.values()
      for row in rows
      for a in entries(row.get('advantage'))
    ),
    default=0.0,
  )
  steps = []
  for step in sorted(samples.train, reverse=True):
    groups = {}
    for row in samples.train[step]:
      groups.setdefault(str(row.get('prompt')), []).append(row)
    steps.append(
      {
        'step': f'{step:.0f}',
        'more': max(len(groups) - GROUPS, 0),
        'groups': [
          shown_group(prompt, groups[prompt], largest)
          for prompt in list(groups)[:GROUPS]
        ],
      }
    )
  return {
    'steps': steps,
    'largest': figure(largest),
    'legend': [shade(largest * i / 4, largest) for i in range(-4, 5)],
  }


def shown_group(prompt: str, rows: list[dict], largest: float) -> dict:
  return {
    'prompt': clip(prompt),
    'answer': clip(rows[0].get('answer')),
    'more': max(len(rows) - SAMPLES, 0),
    'rows': [
      {
        **shown_sample(row),
        'tokens': shown_tokens(row, largest),
        'more': max(len(entries(row.get('tokens'))) - TOKENS, 0),
      }
      for row in rows[:SAMPLES]
    ],
  }


# --- the page


@cache
def template() -> jinja2.Template:
  return jinja2.Environment(
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  ).from_string(Path(__file__).with_name('page.html.jinja').read_text('utf-8'))


def write_report(
  run_dir: str | Path,
  title: str = 'Training report',
  summary: dict | None = None,
) -> Path:
  """Writes run_dir/report.html from the files of the run and returns its path;
  its first figure also stands alone in reward.svg.

  `summary` maps a label to a text, shown as cards in that order; without one
  the cards are read off the metrics. Missing files leave a line in their place.
  """
  run_dir = Path(run_dir)
  metrics = list(read_rows(run_dir / 'metrics.jsonl'))
  samples = read_samples(run_dir / 'samples.jsonl')
  recorded = any('reward' in row or 'eval/reward' in row for row in metrics)
  drawn = reward_curve_svg(metrics) if recorded else None
  page = template().render(
    title=title,
    cards=headline(metrics) if summary is None else summary,
    reward=drawn and Markup(drawn),
    panels=panels(metrics),
    times=time_split(metrics),
    pairs=greedy_pairs(samples),
    credit=credit(samples),
    command=read_text(run_dir / 'command.txt').strip(),
    files=[
      (name, text)
      for name in ('config.yaml', 'env.json')
      if (text := read_text(run_dir / name))
    ],
  )
  if drawn:
    replace(run_dir / 'reward.svg', drawn)
  return replace(run_dir / 'report.html', page)


def replace(path: Path, text: str) -> Path:
  """Writes a file that is never seen half-written."""
  part = path.with_name(f'.{path.name}.{os.getpid()}')
  part.write_text(text, encoding='utf-8', errors='replace')
  os.replace(part, path)
  return path
