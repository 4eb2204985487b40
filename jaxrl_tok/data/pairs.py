"""Pairs of completions, one preferred to the other.

  {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}

Texts or messages, as in TRL: where there is no prompt, what `chosen` and
`rejected` begin with is the prompt; an optional column `margin` says by how
much the score of the chosen one must be larger.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from jaxrl_tok.data.chat import WRITERS, check_message, content_text
from jaxrl_tok.data.sources import (
  as_list,
  is_dataset,
  jsonl_lines,
  load_hub,
  need,
  parse_line,
)

FORM = 'a pair is {"prompt": ..., "chosen": ..., "rejected": ...}'


def read_pairs(source) -> tuple[list[dict], int]:
  """Pairs {'prompt': text or messages, 'chosen': text, 'rejected': text,
  'margin': float} of a source, and the number of those that were left out
  because both completions are the same.

  Other columns are kept. Raises ValueError, which names a pair by its place.

  Args:
    source: the path of a .jsonl or .parquet file, a name
      hub:OWNER/NAME@REVISION:SPLIT, a datasets.Dataset, or dicts.
  """
  found, same = [], 0
  for row, where in rows_of(source):
    pair = as_pair(row, where)
    if pair['chosen'] == pair['rejected']:
      same += 1
    else:
      found.append(pair)
  if not found:
    raise ValueError(f'{name_of(source)}: no pair of different completions')
  return found, same


def name_of(source) -> str:
  """Name of a source, for messages."""
  is_name = isinstance(source, str | os.PathLike)
  return os.fspath(source) if is_name else 'the data'


def rows_of(source) -> Iterable[tuple[dict, str]]:
  """(row, its place in words) of each row of a source."""
  name = name_of(source)
  if isinstance(source, str | os.PathLike) and not name.startswith('hub:'):
    path = Path(name)
    if not path.is_file():
      raise FileNotFoundError(f'{path}: no such file')
    if path.suffix.lower() != '.parquet':
      with path.open('rb') as file:
        for number, _, raw in jsonl_lines(file, path):
          where = f'{path}:{number}'
          yield parse_line(raw, {}, where), where
      return
    source = need('pyarrow.parquet', name).read_table(path).to_pylist()
  elif isinstance(source, str):
    source = load_hub(source)
  rows = source if is_dataset(source) else as_list(source)
  for number, row in enumerate(rows):
    yield row, f'record {number} of {name}'


def as_pair(row, where: str) -> dict:
  """Pair of a row, with a prompt of its own and completions that are text."""
  if not isinstance(row, dict):
    raise ValueError(f'{where}: a {type(row).__name__}; {FORM}')
  for name in ('chosen', 'rejected'):
    if row.get(name) is None:
      raise ValueError(
        f'{where}: no "{name}"; it has {", ".join(map(str, row))}; {FORM}'
      )
  both = row['chosen'], row['rejected']
  kinds = {type(x) for x in both}
  if kinds == {str}:
    split = split_texts
  elif kinds == {list}:
    split = split_messages
  else:
    raise ValueError(
      f'{where}: "chosen" and "rejected" are not both texts or both lists of '
      f'messages; {FORM}'
    )
  prompt, chosen, rejected = split(row.get('prompt'), *both, where)
  margin = row.get('margin')
  return row | {
    'prompt': prompt,
    'chosen': chosen,
    'rejected': rejected,
    'margin': as_margin(0.0 if margin is None else margin, where),
  }


def as_margin(value, where: str) -> float:
  """Margin as a finite float."""
  if isinstance(value, int | float) and math.isfinite(value):
    return float(value)
  raise ValueError(f'{where}: "margin" is {value!r}; give a finite number')


def split_texts(prompt, chosen: str, rejected: str, where: str) -> tuple:
  """Prompt and completions of texts. Without a prompt, it is the words that
  both texts begin with; the space after them belongs to the completions."""
  if prompt is not None:
    return prompt, chosen, rejected
  alike = itertools.takewhile(lambda ab: ab[0] == ab[1], zip(chosen, rejected))
  common = ''.join(a for a, _ in alike)
  size = max((i for i, c in enumerate(common) if c.isspace()), default=0)
  while size and common[size - 1].isspace():
    size -= 1
  if not size:
    raise ValueError(
      f'{where}: "chosen" and "rejected" begin with no common words, which '
      'would be the prompt; give a "prompt"'
    )
  return common[:size], chosen[size:], rejected[size:]


def split_messages(prompt, chosen: list, rejected: list, where: str) -> tuple:
  """Prompt and completions of conversations: the messages that both have in
  common, and the text of the last one of each. A prompt that is messages may
  stand in front of both or be left out of them; one that is text is the first
  message, and is there already."""
  for message in [*chosen, *rejected]:
    check_message(message, where)
  if isinstance(prompt, list):
    n = len(prompt)
    chosen, rejected = (
      m if m[:n] == prompt else prompt + m for m in (chosen, rejected)
    )
  elif isinstance(prompt, str) and len(chosen) == len(rejected) == 1:
    user = {'role': 'user', 'content': prompt}
    chosen, rejected = [user, *chosen], [user, *rejected]
  common = chosen[:-1]
  ends = [m[-1] if m else {} for m in (chosen, rejected)]
  writes = all(end.get('role') in WRITERS for end in ends)
  if not common or common != rejected[:-1] or not writes:
    raise ValueError(
      f'{where}: "chosen" and "rejected" must be one conversation but for the '
      'last message, which is the assistant\'s; or give a "prompt" of messages'
    )
  return (common, *(content_text(end.get('content')) for end in ends))


def longest(pairs: Iterable[dict], encode: Callable) -> int:
  """Tokens of the longest completion; encode: text -> ids."""
  return max(
    len(encode(pair[name])) for pair in pairs for name in ('chosen', 'rejected')
  )
