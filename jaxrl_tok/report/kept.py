"""Completions that an evaluation keeps at every step, as of canary prompts."""

import json
from collections.abc import Callable, Iterable

STEPS, PROMPTS = 6, 20  # of a table; the first step is always shown


def kept_tables(rows: Iterable[dict], show: Callable, talk: Callable) -> list:
  """Tables {evaluation, steps, rows, more} of evaluations with completions of
  steps between the first and the last: a row for each prompt, a cell for each
  step.

  Args:
    rows: of samples.jsonl.
    show: row -> what a cell shows.
    talk: prompt -> messages.
  """
  found, kept = {}, set()
  for row in rows:
    split, name = row.get('split'), str(row.get('evaluation'))
    if split not in ('before', 'during', 'after'):
      continue
    if split == 'during':
      kept.add(name)
    key = json.dumps(row.get('prompt'), sort_keys=True)
    by_prompt = found.setdefault(name, {}).setdefault(key, {})
    by_prompt[row['step']] = row  # a step that comes again was resumed
  tables = []
  for name in found.keys() & kept:
    prompts = list(found[name].values())
    steps = sorted({step for by_step in prompts for step in by_step})
    steps = steps if len(steps) <= STEPS else [steps[0], *steps[1 - STEPS :]]
    tables.append(
      {
        'evaluation': name[:60],
        'steps': [f'{step:.0f}' for step in steps],
        'rows': [
          {
            'prompt': talk(next(iter(by_step.values())).get('prompt')),
            'cells': [
              show(by_step[step]) if step in by_step else None for step in steps
            ],
          }
          for by_step in prompts[:PROMPTS]
        ],
        'more': max(0, len(prompts) - PROMPTS),
      }
    )
  return sorted(tables, key=lambda table: table['evaluation'])
