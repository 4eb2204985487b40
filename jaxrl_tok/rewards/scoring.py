"""Runs reward functions on a rollout and lifts their values to [B, T]."""

import functools
import json
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from jaxrl_tok.rewards.calls import as_reward_error, call_all
from jaxrl_tok.rewards.functions import (
  GROUP,
  PIECES,
  Accepted,
  RewardError,
  accepted,
  own_lists,
  quote,
  shorten,
)
from jaxrl_tok.rewards.splits import make_split

LARGEST = float(np.finfo(np.float32).max)
# treatment of a function that raises an exception or gives a wrong value: raise
# it, or let the reward not apply (mask) or be 0 (zero) there
ON_ERROR = ('raise', 'mask', 'zero')


class HostScores(NamedTuple):
  """A rollout as reward functions saw it."""

  rewards: dict  # {name: float32 [B, T]}
  applies: dict  # {name: bool [B]}  False: the function said None
  texts: list  # B completions
  metrics: dict  # {name: float}: counts, and what functions log
  extra: dict  # {column: list of B}, of log_extra


class TrainerState(NamedTuple):
  """Progress of training, as reward functions read it."""

  global_step: int = 0
  max_steps: int = 0
  epoch: float = 0.0


# --- values


def lift(
  values, mask: np.ndarray, name: str = 'reward', texts: Sequence[str] = ()
) -> np.ndarray:
  """A float or a per-token list for each completion -> float32 [B, T].

  An outcome goes on the last chosen token; a list has one entry for every
  chosen token, in order; None is 0. `texts` are the completions, for errors.

  # 2.5 with mask [1 1 1 0] -> [0 0 2.5 0];  [1, 0, .5] -> [1 0 .5 0]
  """
  rows = [quote(text) for text in texts]
  return np.stack(
    [
      lift_row(value, mask[b], name, _where(b, rows))
      for b, value in enumerate(as_rows(values, len(mask), name))
    ]
  )


def _where(b: int, rows: Sequence[str]) -> str:
  """Names a completion, for errors."""
  return f'completion {b}' + (f' ({rows[b]})' if rows else '')


def lift_row(value, mask: np.ndarray, name: str, where: str) -> np.ndarray:
  """A completion's value -> float32 [T]; see lift. Raises ValueError."""
  # float32 whatever the inputs: an int array would cut fractions off
  out, columns = np.zeros(mask.shape, np.float32), np.flatnonzero(mask)
  if value is None or not len(columns):
    return out
  if not _is_list(value):
    out[columns[-1]] = _number(value, name, where)
  elif len(value) == len(columns):
    out[columns] = _numbers(value, name, where)
  else:
    raise ValueError(
      f'reward function {name} gave {len(value)} token rewards for '
      f'{where}, which has {len(columns)} tokens; give one for each'
    )
  return out


def check_rows(values, B: int, name: str) -> list:
  """Values of a function for B completions, each a float, a list of floats or
  None. Raises ValueError for what is no reward."""
  found = []
  for b, value in enumerate(as_rows(values, B, name)):
    if value is not None:
      read = _numbers if _is_list(value) else _number
      value = np.asarray(read(value, name, _where(b, ()))).tolist()
    found.append(value)
  return found


def _is_list(value) -> bool:
  if hasattr(value, 'ndim'):  # an array, also of 0 dimensions
    return value.ndim > 0
  return hasattr(value, '__len__') and not isinstance(
    value, str | bytes | dict | set
  )


def as_rows(values, B: int, name: str) -> Sequence:
  """The B values of a function: a sequence, or anything that is an array."""
  if hasattr(values, '__array__'):
    try:
      values = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as e:  # as a GPU's tensors do
      raise ValueError(
        f'reward function {name} returned a {type(values).__name__} that '
        f'numpy cannot read ({shorten(e)}); return a list of numbers'
      ) from None
  is_rows = isinstance(values, Sequence) and not isinstance(values, str | bytes)
  if not (is_rows or (isinstance(values, np.ndarray) and values.ndim)):
    kind = 'nothing' if values is None else f'a {type(values).__name__}'
    raise ValueError(
      f'reward function {name} returned {kind} for {B} completions; it must '
      'return a list with one number for each'
    )
  if len(values) != B:
    raise ValueError(
      f'reward function {name} returned {len(values)} rewards for {B} '
      'completions; it must return one for each'
    )
  return values


def _numbers(values, name: str, where: str) -> Sequence:
  """Rewards of one completion's tokens; lists of floats at once."""
  if {type(v) for v in values} == {float}:
    found = np.array(values)
    if np.all(np.abs(found) <= LARGEST):
      return found
  return [_number(v, name, where) for v in values]


def _number(value, name: str, where: str) -> float:
  try:
    if isinstance(value, str | bytes):  # float('1') would take it
      raise TypeError
    number = float(value)
  except (TypeError, ValueError):
    raise ValueError(
      f'reward function {name} gave {shorten(repr(value))} for {where}; '
      'a reward is a number, None or a list of numbers'
    ) from None
  except OverflowError:
    number = np.inf
  if not abs(number) <= LARGEST:
    raise ValueError(
      f'reward function {name} gave {number} for {where}; '
      'rewards must be finite (return None where it does not apply)'
    )
  return number


# endings of rewards/NAME/... that count completions
COUNTS = ('/errors', '/not_applicable', '/killed')


def count_missing(name: str, applies: np.ndarray) -> dict:
  """Count of the completions that a function does not apply to, if any."""
  missing = float((~applies).sum())
  return {f'rewards/{name}/not_applicable': missing} if missing else {}


def merge_metrics(rounds: Sequence[dict]) -> dict:
  """Metrics of several rollouts of one step: counts of completions are summed,
  other numbers averaged over the rollouts that have them."""
  found = {name: [] for metrics in rounds for name in metrics}
  for metrics in rounds:
    for name, value in metrics.items():
      found[name].append(value)
  return {
    name: sum(numbers)
    if name.startswith('rewards/') and name.endswith(COUNTS)
    else float(np.mean(numbers))
    for name, numbers in found.items()
  }


# --- what functions log


class Log:
  """log_extra and log_metric of one function and one batch."""

  def __init__(self, name: str, B: int, reserved: Collection[str] = ()):
    self.name, self.B, self.reserved = name, B, reserved
    self.extra, self.values = {}, {}
    self.arguments = {
      'log_extra': self.log_extra,
      'log_metric': self.log_metric,
    }

  def clear(self) -> None:
    """Forgets what was logged, before the function is called again."""
    self.extra.clear()
    self.values.clear()

  def log_extra(self, column: str, values) -> None:
    values = list(values)
    if column in self.reserved:
      raise ValueError(
        f'reward {self.name}: log_extra names {column}, which every sample '
        'has; choose another name'
      )
    if len(values) != self.B:
      raise ValueError(
        f'reward {self.name}: log_extra got {len(values)} values of {column} '
        f'for {self.B} completions; give one for each'
      )
    self.extra[str(column)] = [_plain(v) for v in values]

  def log_metric(self, name: str, value: float) -> None:
    if name in self.reserved or str(name).startswith('rewards/'):
      raise ValueError(
        f'reward {self.name}: log_metric names {name}, which the trainer logs '
        'itself; choose another name'
      )
    try:
      number = float(value)
    except (TypeError, ValueError):
      number = math.nan
    if isinstance(value, str | bytes) or not math.isfinite(number):
      raise ValueError(
        f'reward {self.name}: log_metric got {shorten(repr(value))} of {name}; '
        'give a finite number'
      )
    self.values.setdefault(str(name), []).append(number)


def _plain(value):
  """A value that JSON can hold."""
  if hasattr(value, '__array__'):
    value = np.asarray(value).tolist()
  try:
    json.dumps(value, allow_nan=False)
  except (TypeError, ValueError):
    value = str(value)
  return value


def _merge_logs(logs: list[Log]) -> tuple[dict, dict]:
  """(extra columns, metrics) of all functions: a metric that is logged twice
  is averaged, a column that two functions log is refused."""
  extra, values, owner = {}, {}, {}
  for log in logs:
    for column, rows in log.extra.items():
      if column in extra:
        raise ValueError(
          f'rewards {owner[column]} and {log.name} both log_extra {column}; '
          'name one of them otherwise'
        )
      extra[column], owner[column] = rows, log.name
    for name, numbers in log.values.items():
      values.setdefault(name, []).extend(numbers)
  return extra, {k: float(np.mean(v)) for k, v in values.items()}


# --- a rollout


class Failed(NamedTuple):
  """Value of a completion whose call failed."""

  text: str  # what the function did, a predicate
  traceback: str = ''  # its author's part of one

  def as_error(self, name: str, where: str, cure: str) -> RewardError:
    return RewardError(
      f'reward {name} {self.text} on {where}; {cure}', self.traceback
    )


class _Judged(NamedTuple):
  """Values of one function, lifted."""

  reward: np.ndarray  # float32 [B, T]
  applies: np.ndarray  # bool [B]
  by_token: np.ndarray  # bool [B]  a list with a number for each token
  failed: np.ndarray  # bool [B]  rows whose value is none
  error: Exception | None  # the first one


def judge(
  values, mask: np.ndarray, name: str, samples: list, on_error: str
) -> _Judged:
  """Lifts values, and notes what is wrong: an exception or a wrong number of
  values concerns all rows, a wrong value its own."""
  B, cure = len(mask), 'mend it, return None where it does not apply'
  flag = 'or pass --reward_on_error mask'  # for who does not pass it yet
  reward, applies = np.zeros(mask.shape, np.float32), np.ones(B, bool)
  failed, by_token = np.zeros(B, bool), np.zeros(B, bool)
  if isinstance(values, BaseException):
    cure += f', {flag}' if on_error == 'raise' else ''
    error = as_reward_error(f'reward {name}', values, samples, cure)
    return _Judged(reward, applies, by_token, ~failed, error)
  try:
    rows = as_rows(values, B, name)
  except ValueError as e:
    error = _with_cure(e, flag, on_error)
    return _Judged(reward, applies, by_token, ~failed, error)
  error = None
  for b, value in enumerate(rows):
    if isinstance(value, Failed):
      failed[b] = True
      end = f'{cure}, {flag}' if on_error == 'raise' else cure
      error = error or value.as_error(name, _where(b, samples), end)
      continue
    applies[b], by_token[b] = value is not None, _is_list(value)
    try:
      reward[b] = lift_row(value, mask[b], name, _where(b, samples))
    except ValueError as e:
      failed[b], error = True, error or _with_cure(e, flag, on_error)
  return _Judged(reward, applies, by_token, failed, error)


def _with_cure(error: ValueError, cure: str, on_error: str) -> ValueError:
  """The error with one more cure, where a run stops at it."""
  return ValueError(f'{error}; {cure}') if on_error == 'raise' else error


def treat(
  judged: _Judged, name: str, on_error: str, warn: Callable
) -> tuple[np.ndarray, dict]:
  """Treats what failed as ON_ERROR has it: (rows bool [B] that the function
  applies to, metrics). Raises the first error with raise."""
  if on_error == 'raise':
    if judged.error is not None:
      raise judged.error
    return judged.applies, {}
  errors = f'rewards/{name}/errors'
  if judged.error is not None:
    warn(
      name,
      f'{judged.error}; --reward_on_error {on_error} goes on, and {errors} '
      'counts them',
    )
  kept = ~judged.failed | (on_error == 'zero')
  return judged.applies & kept, {errors: float(judged.failed.sum())}


def make_scorer(
  functions: dict[str, Callable],
  decode: Callable[[list[list[int]]], list[str]],
  end_tokens: Sequence[int],
  *,
  keep_special_tokens: bool = False,
  reserved: Collection[str] = (),
  on_error: str = 'raise',
  warn: Callable = lambda name, text: None,
  pieces: Callable | None = None,
  split: Callable = make_split(),  # noqa: B008  rewards as they are
) -> Callable:
  """Returns score(tokens [B, T], mask [B, T], examples, trainer_state=None,
  environments=None) -> HostScores. Each function gets copies of its own.

  Args:
    functions: {name: f}; without any (the device has them) there are texts.
    decode: token ids of each completion, end token left out -> texts.
    end_tokens: ids that end a completion.
    keep_special_tokens: calls decode(ids, skip_special_tokens=False).
    reserved: names that log_metric and log_extra may not use.
    on_error: one of ON_ERROR; with mask and zero the metric rewards/NAME/errors
      counts the completions concerned.
    warn: (name of the function, text) of what was masked or is zero.
    pieces: maker of completion_pieces, data.make_pieces.
    split: split of token rewards, see splits.make_split.

  `examples` are the C records of the prompts, each with its prompt and other
  columns; the G = B / C rows of a prompt are consecutive.
  """
  takes = {name: accepted(f) for name, f in functions.items()}
  ends, wants = set(end_tokens), _wanting_pieces(takes, pieces)
  aside = [n for n, f in functions.items() if getattr(f, 'waits', False)]
  if keep_special_tokens:
    decode = functools.partial(decode, skip_special_tokens=False)

  def score(
    tokens: np.ndarray,
    mask: np.ndarray,
    examples: list[dict],
    trainer_state: TrainerState | None = None,
    environments: list | None = None,
  ) -> HostScores:
    ids = [row[m].tolist() for row, m in zip(tokens, mask)]
    shown = [i[:-1] if i and i[-1] in ends else i for i in ids]
    texts, state = decode(shown), trainer_state or TrainerState()
    arguments = _arguments(examples, texts, ids) | {'trainer_state': state}
    if wants:
      arguments[PIECES] = pieces(ids, shown, texts)
    if environments is not None:
      arguments['environments'] = environments
    logs = {name: Log(name, len(ids), reserved) for name in functions}
    calls = {
      name: _bind(f, takes[name], arguments, logs[name])
      for name, f in functions.items()
    }
    values = call_all(calls, first_only=on_error == 'raise', aside=aside)
    samples = quote_samples(examples, texts)
    rewards, applies, by_token, metrics = {}, {}, {}, {}
    for name, found in values.items():
      judged = judge(found, mask, name, samples, on_error)
      rewards[name], by_token[name] = judged.reward, judged.by_token
      applies[name], errors = treat(judged, name, on_error, warn)
      metrics |= count_missing(name, applies[name]) | errors
    metrics |= take_counts({name: functions[name] for name in aside})
    rewards, own = split(rewards, by_token, applies, mask, state.global_step)
    extra, logged = _merge_logs(list(logs.values()))
    return HostScores(rewards, applies, texts, metrics | own | logged, extra)

  return score


def take_counts(functions: dict) -> dict[str, float]:
  """Counts {rewards/NAME/...} of functions that are called in workers."""
  return {
    f'rewards/{name}/{kind}': count
    for name, function in functions.items()
    for kind, count in function.take_counts().items()
  }


def _bind(
  function: Callable, takes: Accepted, arguments: dict, log: Log
) -> Callable:
  """The function with the arguments that it takes: copies, but where they
  leave for a worker, which is told the number of a group's rows."""
  chosen = takes.choose(arguments | log.arguments)
  waits = getattr(function, 'waits', False)
  group = {GROUP: arguments[GROUP]} if waits else {}

  def call():
    log.clear()
    return function(**(chosen if waits else own_lists(chosen)), **group)

  return call


def _wanting_pieces(takes: dict, pieces: Callable | None) -> bool:
  """Tells whether a function names completion_pieces. Raises ValueError where
  there are none."""
  names = [name for name, has in takes.items() if PIECES in has.names]
  if names and pieces is None:
    raise ValueError(
      f'reward {names[0]} asks for {PIECES}, which need the tokenizer; pass '
      'make_scorer(pieces=data.make_pieces(...))'
    )
  return bool(names)


def quote_samples(examples: list[dict], texts: list) -> list[str]:
  """Completions and their prompts, quoted, shortened, for errors."""
  G = len(texts) // max(len(examples), 1)
  prompts = [_prompt_text(e['prompt']) for e in examples for _ in range(G)]
  return [f'{quote(t)} of prompt {quote(p)}' for t, p in zip(texts, prompts)]


def _prompt_text(prompt) -> str:
  """Text of a prompt, or of the last of its messages."""
  return prompt if isinstance(prompt, str) else str(prompt[-1].get('content'))


def _arguments(examples: list[dict], texts: list, ids: list) -> dict:
  """prompts, completions, completion_ids and every column as lists of B."""
  B, C = len(ids), len(examples)
  if not C or B % C:
    raise ValueError(
      f'{B} completions of {C} prompts; give each prompt the same number'
    )
  rows = [example for example in examples for _ in range(B // C)]
  found = dict.fromkeys(name for example in examples for name in example)
  columns = {name: [row.get(name) for row in rows] for name in found}
  prompts = columns.pop('prompt')
  columns.pop('completion', None)  # the data's own; the policy's is scored
  completions = [
    text if isinstance(p, str) else [{'role': 'assistant', 'content': text}]
    for p, text in zip(prompts, texts)
  ]
  return columns | {
    'prompts': prompts,
    'completions': completions,
    'completion_ids': ids,
    GROUP: B // C,
  }
