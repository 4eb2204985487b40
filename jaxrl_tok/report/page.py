"""Report of a run: one self-contained page, report.html.

1. `files.py` reads metrics.jsonl and samples.jsonl of a run, killed or not.
2. `figures.py` draws the metrics, `goodhart.py` the reward against its audit.
3. `read_samples` keeps the held-out completions before and after training, and
   the sampled ones of the first and the latest steps; `shade` colours a token
   by its advantage (tokens.py).
4. `write_report` fills report.html.jinja and replaces report.html at once.

Completions are untrusted text. The page has no script and loads nothing, Jinja
escapes every string, and colours are made of numbers only. Never imports jax.
"""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jinja2
import yaml
from markupsafe import escape

from jaxrl_tok.report import goodhart
from jaxrl_tok.report.charts import figure
from jaxrl_tok.report.episodes import episode
from jaxrl_tok.report.figures import (
  HELD_OUT,
  curve,
  evaluation_rewards,
  panels,
  reward_pictures,
)
from jaxrl_tok.report.files import atomic_write, iterate_rows, number
from jaxrl_tok.report.kept import kept_tables
from jaxrl_tok.report.tokens import (
  TOKENS,
  clip,
  entries,
  shade,
  shown_tokens,
)

# limits of the page
LATEST_STEPS, GROUPS, SAMPLES, PAIRS, MESSAGES = 3, 3, 8, 20, 40
COLUMNS = {  # of samples.jsonl; any other was logged by a reward
  *('step', 'time', 'split', 'evaluation', 'prompt', 'completion', 'answer'),
  *('reward', 'components', 'tokens', 'logp', 'rewards', 'advantage', 'extra'),
  *('index', 'length', 'ended', 'metrics', 'turns', 'ended_by', 'chosen'),
}


# --- reading


def read_text(path: Path, limit: int = 100_000) -> str:
  """Text of a file, '' without it."""
  if not path.is_file():
    return ''
  return clip(path.read_text(encoding='utf-8', errors='replace'), limit)


def reward_unit(config: str) -> str:
  """Setting reward_unit of a config.yaml: '%' where the reward is the share of
  right answers, '' where it is any other number."""
  try:
    settings = yaml.safe_load(config)
  except (yaml.YAMLError, ValueError, RecursionError):
    return ''
  found = settings.get('reward_unit') if isinstance(settings, dict) else None
  return '%' if found == '%' else ''


class Samples(NamedTuple):
  """Rows of samples.jsonl that the page shows."""

  held_out: dict[str, dict[str, list]]  # {evaluation: {before, after: rows}}
  train: dict[float, list[dict]]  # by step: the first and the latest few


def read_samples(
  path: Path, on_skip: Callable[[int], None] = lambda line: None
) -> Samples:
  """Rows by split. A step that comes again was resumed: it starts afresh."""
  samples, previous = Samples({}, {}), {}
  for row in iterate_rows(path, on_skip):
    split, step = row.get('split'), number(row['step'])
    if split in ('before', 'after'):
      evaluation = str(row.get('evaluation') or HELD_OUT)
      if evaluation == 'held_out':  # the default, as its metrics are named
        evaluation = HELD_OUT
      sides = samples.held_out.setdefault(
        evaluation, {'before': [], 'after': []}
      )
      if previous.get((evaluation, split), step) != step:
        sides[split].clear()
      previous[evaluation, split] = step
      sides[split].append(row)
    elif split == 'train':
      if step != previous.get(split):
        samples.train[step] = []
      previous[split] = step
      samples.train.setdefault(step, []).append(row)
      if len(samples.train) > LATEST_STEPS + 1:
        del samples.train[sorted(samples.train)[1]]
  return samples


# --- words


def duration(seconds: float) -> str:
  """Time in words: '7.25 s', '3 min 20 s', '2 h 5 min'."""
  if seconds < 60:
    return f'{seconds:.3g} s'
  minutes, left = divmod(round(seconds), 60)
  return (
    f'{minutes} min {left} s'
    if minutes < 60
    else f'{minutes // 60} h {minutes % 60} min'
  )


def message_text(content: object) -> str:
  """Text of a message, whose content may be a list of parts."""
  if not isinstance(content, list):
    return clip(content)
  texts = [
    part.get('text', f'[{part.get("type")}]')
    if isinstance(part, dict)
    else part
    for part in content
  ]
  return clip(' '.join(map(str, texts)))


def conversation(value: object) -> list[dict]:
  """Messages {role, text} of a prompt or completion; plain text has no role."""
  messages = [m for m in entries(value) if isinstance(m, dict)]
  if not messages or len(messages) < len(value):
    return [{'role': '', 'text': clip(value)}]
  return [
    {'role': clip(m.get('role'), 40), 'text': message_text(m.get('content'))}
    for m in messages[:MESSAGES]
  ]


def prompt_key(row: dict) -> str:
  """Text that tells prompts apart."""
  return json.dumps(row.get('prompt'), sort_keys=True)


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


def headline(metrics: list[dict], unit: str = '') -> dict[str, str]:
  """Cards {label: text} for a run whose caller gave none."""
  reward = curve(metrics, 'train', 'reward')
  seconds = [number(row.get('time')) or 0.0 for row in metrics]
  cards = {}
  for name, points in evaluation_rewards(metrics).items():
    ends = [figure(points[i][1], unit) for i in (0, -1)]
    cards[f'{name} reward, before → after'] = ' → '.join(ends)
  if reward:
    cards['training reward, last step'] = figure(reward[-1][1], unit)
    cards['training steps'] = f'{len(reward):,}'
  if metrics:
    cards['time'] = duration(max(seconds))
  return cards


def shown_sample(row: dict, unit: str = '') -> dict:
  """Completion of a row, its reward and what else was logged of it."""
  reward = number(row.get('reward'))
  components, extra = row.get('components'), row.get('extra')
  components = components if isinstance(components, dict) else {}
  extra = extra if isinstance(extra, dict) else {}
  extra = extra | {k: v for k, v in row.items() if k not in COLUMNS}
  mark = None
  if unit == '%' and reward is not None:
    mark = 'right' if reward > 0.5 else 'wrong'
  return {
    'completion': episode(row, conversation)
    or conversation(row.get('completion')),
    'reward': 'not scored' if reward is None else figure(reward),
    'mark': mark,
    'components': [
      (clip(name, 60), '–' if number(v) is None else figure(number(v)))
      for name, v in components.items()
    ],
    'extra': [
      (clip(name, 60), clip(v if isinstance(v, str) else json.dumps(v), 300))
      for name, v in extra.items()
    ],
  }


def in_words(side: str, rows: list[dict], unit: str) -> str:
  """Rewards of one side: '3 of 4 right before'; 'mean reward 1.2 before (of
  4)'."""
  rewards = [r for row in rows if (r := number(row.get('reward'))) is not None]
  if not rewards:
    return f'no rewards {side}'
  if unit == '%':
    right = sum(r > 0.5 for r in rewards)
    return f'{right} of {len(rewards)} right {side}'
  mean = math.fsum(rewards) / len(rewards)
  return f'mean reward {figure(mean)} {side} (of {len(rewards)})'


def comparisons(samples: Samples, unit: str = '') -> list[dict]:
  """Completions before and after training, a table for each evaluation."""
  found = []
  for evaluation, sides in samples.held_out.items():
    firsts = []  # a prompt may have several samples: the first is shown
    for rows in sides.values():
      firsts.append({prompt_key(row): row for row in reversed(rows)})
    order = dict.fromkeys(
      prompt_key(r) for rows in sides.values() for r in rows
    )
    table = []
    for key in list(order)[:PAIRS]:
      rows = [first.get(key) for first in firsts]
      there = [row for row in rows if row]
      answer = next((r['answer'] for r in there if 'answer' in r), None)
      table.append(
        {
          'prompt': conversation(there[0].get('prompt')),
          'answer': clip(answer),
          'sides': [row and shown_sample(row, unit) for row in rows],
        }
      )
    found.append(
      {
        'evaluation': clip(evaluation, 60),
        'summary': ', '.join(in_words(s, r, unit) for s, r in sides.items())
        + ('; right: a reward above 0.5' if unit == '%' else ''),
        'rows': table,
        'answers': any(row['answer'] for row in table),
        'more': len(order) - len(table),
      }
    )
  return found


# --- credit


def credit(samples: Samples, unit: str = '') -> dict:
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
      groups.setdefault(prompt_key(row), []).append(row)
    steps.append(
      {
        'step': f'{step:.0f}',
        'more': max(len(groups) - GROUPS, 0),
        'groups': [
          shown_group(rows, largest, unit)
          for rows in list(groups.values())[:GROUPS]
        ],
      }
    )
  return {
    'steps': steps,
    'largest': figure(largest),
    'legend': [shade(largest * i / 4, largest) for i in range(-4, 5)],
  }


def shown_group(rows: list[dict], largest: float, unit: str) -> dict:
  """Samples of one prompt."""
  return {
    'prompt': conversation(rows[0].get('prompt')),
    'answer': clip(rows[0].get('answer')),
    'more': max(len(rows) - SAMPLES, 0),
    'rows': [
      {
        **shown_sample(row, unit),
        'tokens': shown_tokens(row, largest),
        'more': max(len(entries(row.get('tokens'))) - TOKENS, 0),
      }
      for row in rows[:SAMPLES]
    ],
  }


# --- the page


class Report:
  """Page of a run, which a notebook shows; str(report) is its path."""

  def __init__(self, path: str | Path):
    self.path = Path(path)

  def __str__(self) -> str:
    return str(self.path)

  def __fspath__(self) -> str:
    return str(self.path)

  def __repr__(self) -> str:
    return f'Report({str(self.path)!r})'

  def _repr_html_(self) -> str:
    """Page in a frame of its own, so that neither styles the other."""
    page = escape(self.path.read_text(encoding='utf-8'))
    return (
      f'<iframe srcdoc="{page}" sandbox title="report" width="100%" '
      'height="800" style="border:0"></iframe>'
    )


@cache
def template(name: str = 'page.html.jinja') -> jinja2.Template:
  """Template of a page, where every string is escaped."""
  return jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  ).get_template(name)


def write_report(
  run_dir: str | Path,
  title: str = 'Training report',
  summary: dict | None = None,
  unit: str | None = None,
) -> Path:
  """Writes report.html and its first figure, reward.svg, into a run directory.

  Args:
    summary: cards {label: text}, in order. None: made of the metrics.
    unit: '%' where the reward is the share of right answers, '' where it is
      any other number. None: reward_unit of config.yaml.

  Missing files leave a sentence in their place. Returns the page's path.
  """
  run_dir, skipped = Path(run_dir), []
  config = read_text(run_dir / 'config.yaml')
  unit = reward_unit(config) if unit is None else unit
  metrics = list(iterate_rows(run_dir / 'metrics.jsonl', skipped.append))
  samples = read_samples(run_dir / 'samples.jsonl', skipped.append)
  recorded = curve(metrics, 'train', 'reward') or evaluation_rewards(metrics)
  drawn = reward_pictures(metrics, unit) if recorded else []
  page = template().render(
    title=title,
    cards=headline(metrics, unit) if summary is None else summary,
    rewards=drawn,
    panels=panels(metrics),
    times=time_split(metrics),
    goodhart=goodhart.curves(metrics),
    warnings=list(goodhart.warnings(metrics).values()),
    comparisons=comparisons(samples, unit),
    kept=kept_tables(
      iterate_rows(run_dir / 'samples.jsonl'),
      lambda row: shown_sample(row, unit),
      conversation,
    ),
    credit=credit(samples, unit),
    command=read_text(run_dir / 'command.txt').strip(),
    files=[
      (name, text)
      for name, text in (
        ('config.yaml', config),
        ('env.json', read_text(run_dir / 'env.json')),
      )
      if text
    ],
    skipped=len(skipped),
  )
  if drawn:
    atomic_write(run_dir / 'reward.svg', str(drawn[0]['svg']))
  return atomic_write(run_dir / 'report.html', page)
