"""Foundation of a run: what it learns from beside its flags.

A checkpoint holds a description of the data, the tokenizer, the chat template,
the model's configuration and the source of the rewards. A run that goes on from
it says what has changed, and is refused unless --allow_change names it.
"""

import difflib
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from jaxrl_tok import data
from jaxrl_tok.checkpoint import NotResumed
from jaxrl_tok.rewards.functions import get_name
from jaxrl_tok.run.algorithm_settings import AlgorithmSettings
from jaxrl_tok.run.prepare import Setup
from jaxrl_tok.run.settings import (
  DataSettings,
  OptimizerSettings,
  SamplingSettings,
  Settings,
  SizeSettings,
  flatten,
)
from jaxrl_tok.run.sources import source_of
from jaxrl_tok.run.warm_start import tokenizer_text

KEY = 'foundation'  # in a checkpoint's settings
OLD_DATA = 'data_fingerprint'  # all that there was before it
CHUNK = 4096  # records read at a time
HASHED = 20_000  # records whose every column is hashed, spread over the data
SHOWN = 8  # records, and tokens, that a change is shown by
LINES = 12  # of a text's change that are shown
NOT_MODEL = '_name_or_path', 'transformers_version', 'architectures'
# flags that decide what is learnt; all others may change, max_steps, too, with
# which a schedule ends: whoever passes another one wants to go on for longer
BINDING = {
  *flatten(SamplingSettings()),
  *flatten(DataSettings()),
  *flatten(AlgorithmSettings()),
  *flatten(OptimizerSettings()),
  *flatten(SizeSettings()),
  *('seed', 'keep_special_tokens', 'dtype'),
  *('reward_model', 'reward_model_weight', 'reward_model_by', 'quantize'),
  *('max_turns', 'max_episode_length', 'cut_turns', 'discount', 'history'),
} - {'compact_levels', 'log_kl'}


def _plain(value) -> str:
  """JSON of a value; of an object its type, which is the same twice."""
  return json.dumps(
    value,
    sort_keys=True,
    ensure_ascii=False,
    default=lambda x: x.tolist() if hasattr(x, 'tolist') else type(x).__name__,
  )


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode(errors='replace')).hexdigest()[:16]


def _short(value) -> str:
  text = value if isinstance(value, str) else _plain(value)
  return text if len(text) <= 80 else f'{text[:60]}… {_hash(text)}'


def _spread(count: int, most: int) -> list[int]:
  """Numbers below count, `most` at most, from the first to the last."""
  found = np.linspace(0, max(count - 1, 0), min(count, most))
  return sorted({int(i) for i in found})


def describe_data(records) -> dict:
  """{label: value} of records: their number, hashes, and a few in full."""
  count = records.num_records
  numbers = _spread(16 if count is None else count, HASHED)
  digest, shown = hashlib.sha256(), set(_spread(len(numbers), SHOWN))
  found = {'records': 'endless' if count is None else count}
  for start in range(0, len(numbers), CHUNK):
    part = numbers[start : start + CHUNK]
    for at, (i, record) in enumerate(zip(part, records.read(part)), start):
      digest.update(_plain(record).encode(errors='replace'))
      if at in shown:
        found |= {f'record {i}, {k}': _short(v) for k, v in record.items()}
  found['prompts'] = data.data_fingerprint(records)
  found['every column'] = digest.hexdigest()[:16]
  return found


def describe_tokenizer(tokenizer) -> dict:
  """{label: value} of a tokenizer: its size, a hash, and a few tokens."""
  vocabulary = tokenizer.get_vocab()
  names = {i: token for token, i in vocabulary.items()}
  ids = sorted(names)
  found = {
    'tokens': len(vocabulary),
    'all of it': _hash(tokenizer_text(tokenizer)),
  }
  found |= {f'token {ids[i]}': names[ids[i]] for i in _spread(len(ids), SHOWN)}
  return found


def describe_template(tokenizer) -> dict:
  """{name: text} of the chat templates."""
  found = getattr(tokenizer, 'chat_template', None) or {}
  return found if isinstance(found, dict) else {'chat template': found}


def describe_rewards(setup: Setup) -> dict:
  """{name: source} of the rewards, constraints and the environment."""
  functions = dict(setup.rewards.host) | dict(setup.rewards.device)
  found = {name: source_of(f) for name, f in functions.items()}
  if setup.task.environment is not None:
    make = setup.task.environment
    found[f'environment {get_name(make)}'] = source_of(make)
  return found


def describe(setup: Setup) -> dict[str, dict]:
  """Describes all that a run stands on: {word of --allow_change: {label:
  value}}, plain JSON."""
  tokenizer = setup.model.tokenizer
  config = setup.model.hf_config or {}
  found = {
    'data': describe_data(setup.data.records),
    'tokenizer': describe_tokenizer(tokenizer),
    'template': describe_template(tokenizer),
    'model': {k: _plain(v) for k, v in config.items() if k not in NOT_MODEL},
    'rewards': describe_rewards(setup),
  }
  return json.loads(_plain(found))


# --- what has changed ---------------------------------------------------------


def _change(label: str, old, new) -> list[str]:
  """Lines that show a change: those of a text that differ, or old -> new."""
  texts = [str(x).splitlines() for x in (old, new)]
  if max(map(len, texts)) < 2:
    a, b = ('nothing' if x is None else x for x in (old, new))
    return [f'{label}: {a} -> {b}']
  lines = difflib.unified_diff(*texts, lineterm='', n=0)
  lines = [s for s in lines if not s.startswith(('---', '+++', '@@'))]
  more = [f'... and {len(lines) - LINES} lines more'] * (len(lines) > LINES)
  return [f'{label}:', *(f'  {line}' for line in [*lines[:LINES], *more])]


def changes(old: dict, new: dict) -> dict[str, list[str]]:
  """Lines {word of --allow_change: lines} that show what differs between the
  settings of a checkpoint and those of this run, foundations included."""
  before, after = old.get(KEY), new[KEY]
  if before is None:  # of an older version
    same = old.get(OLD_DATA) in (None, after['data']['prompts'])
    before = after if same else after | {'data': {'prompts': old[OLD_DATA]}}
    after = after if same else {'data': {'prompts': after['data']['prompts']}}
  found = {}
  for word in sorted(before.keys() & after.keys()):
    a, b = before[word], after[word]
    lines = [
      line
      for label in sorted(a.keys() | b.keys(), key=_order)
      if a.get(label) != b.get(label)
      for line in _change(label, a.get(label), b.get(label))
    ]
    if lines:
      found[word] = lines
  lines = _changed_flags(old, new)
  return found | ({'settings': lines} if lines else {})


def _order(label: str) -> tuple:
  """Numbers in a label by their value."""
  return tuple(
    (0, int(word), '') if word.isdecimal() else (1, 0, word)
    for word in label.replace(',', '').split()
  )


def _changed_flags(old: dict, new: dict) -> list[str]:
  """Lines of the flags that decide what is learnt."""
  of_task = old.keys() - flatten(Settings()) - {KEY, OLD_DATA}
  names = new.keys() & old.keys() & (BINDING | of_task)
  return [
    f'--{name}: {old[name]} -> {new[name]}'
    for name in sorted(names)
    if old[name] != new[name]
  ]


def check_changes(found: dict, allowed: Sequence[str], say) -> None:
  """Says what has changed, and refuses what --allow_change does not name."""
  for word, lines in found.items():
    say(f'changed since the checkpoint: {word}')
    for line in lines:
      say(f'  {line}')
  refused = [word for word in found if word not in allowed]
  if refused:
    words = ','.join(sorted({*refused, *allowed}))
    raise NotResumed(
      f'the run began with other {", ".join(refused)} (shown above); bring '
      f'them back, or go on with the new ones by --allow_change {words}'
    )
