"""Reward functions in workers: calls that can be ended, and rows at fault.

1. The prompts of a batch are shared between the workers, in order; the G
   completions of a prompt stay together. Each call has a deadline.
2. Where a call raises, is late or ends its worker, its completions are asked
   again one by one, each within a tenth of the deadline and all within one, so
   that one completion fails and not a batch.
3. A row that fails has a Failed in place of a value: scoring.judge treats it as
   --reward_on_error has it.

A function in a worker keeps what it remembers in that worker, and loses it when
the worker is killed.
"""

import inspect
import itertools
import math
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxrl_tok.rewards.calls import call_all
from jaxrl_tok.rewards.functions import accepted, get_name, own_lists, shorten
from jaxrl_tok.rewards.load import import_file, imported_files
from jaxrl_tok.rewards.scoring import GROUP, Failed, Log, as_rows
from jaxrl_tok.rewards.workers import Answer, Failure, Limits, Workers, pack

# arguments that stay in this process
HERE = ('log_extra', 'log_metric', 'environments', GROUP)
HINTS = {'late': ' (see --reward_timeout)', 'memory': ' (see --reward_memory)'}
ALONE = 0.1  # share of a call's deadline that one completion alone has


# --- in the worker -----------------------------------------------------------


class Judged(NamedTuple):
  """Function's say on some completions; lists, for JSON."""

  values: list
  extra: dict  # {column: list}
  metrics: list  # (name, value)


class Judge:
  """Answers questions (name, arguments, names of what it may log, number of
  completions)."""

  def __init__(self, functions: dict[str, Callable]):
    self.functions = functions

  def __reduce__(self):
    import cloudpickle

    packed = cloudpickle.dumps(self.functions)
    return made_judge, (imported_files(), packed)

  def __call__(self, question: tuple) -> list:
    name, arguments, logs, n = question
    log = Log(name, n)
    chosen = {k: v for k, v in log.arguments.items() if k in logs}

    def call():
      log.clear()
      return self.functions[name](**own_lists(arguments), **chosen)

    values = call_all({name: call})[name]
    if isinstance(values, BaseException):
      raise values
    rows = [plain_value(v) for v in as_rows(values, n, name)]
    logged = [(k, v) for k, each in log.values.items() for v in each]
    return list(Judged(rows, log.extra, logged))


def made_judge(files: list[str], packed: bytes) -> Judge:
  """Judge of pickled functions, once the files that they are from are run."""
  for file in files:
    import_file(Path(file))
  return Judge(pickle.loads(packed))


def plain_value(value):
  """Value of a completion that JSON can hold; what is no number is a text in a
  list, {"shown": text}."""
  if hasattr(value, '__array__'):
    import numpy as np

    value = np.asarray(value).tolist()
  if value is None or isinstance(value, str | int | float):
    return value
  if isinstance(value, list | tuple):
    return [plain_value(v) for v in value]
  try:
    return float(value)
  except (TypeError, ValueError, OverflowError):
    return {'shown': shorten(repr(value))}


# --- here --------------------------------------------------------------------


class Shown:
  """Value that was no number, shown as its author would see it."""

  def __init__(self, text: str):
    self.text = text

  def __repr__(self) -> str:
    return self.text


def read_value(value):
  """Value of a worker's answer."""
  if isinstance(value, dict):
    return Shown(value['shown'])
  if isinstance(value, list):
    return [read_value(v) for v in value]
  return value


class Isolated:
  """Reward function that is called in workers, under its own name and
  signature.

  Args:
    row_seconds: seconds more for each completion of a call, whose completions
      are then not asked one by one; None: see the module.

  Attributes:
    waits: calls of several such functions can wait side by side.
    own_worker: it is in a worker already.
  """

  waits = own_worker = True

  def __init__(
    self,
    function: Callable,
    name: str,
    workers: Workers,
    row_seconds: float | None = None,
  ):
    self.function, self.name, self.workers = function, name, workers
    self.row_seconds, self.killed = row_seconds, 0
    self.__name__ = self.__qualname__ = get_name(function)

  @property
  def __signature__(self) -> inspect.Signature:
    return inspect.signature(self.function)

  def __reduce__(self):
    return Isolated, (self.function, self.name, self.workers, self.row_seconds)

  def take_counts(self) -> dict[str, float]:
    """Counts of what happened since they were last taken."""
    killed, self.killed = self.killed, 0
    return {'killed': float(killed)}

  def __call__(self, **arguments) -> list:
    by_scorer = GROUP in arguments
    logs = {k: arguments.pop(k) for k in HERE if k in arguments}
    G = logs.pop(GROUP, 1)
    logs.pop('environments', None)
    n = max((len(v) for v in arguments.values() if type(v) is list), default=0)
    asked = shares(n, G, self.workers.count)
    found = self.ask(asked, arguments, logs, self.limits(asked))
    answers = dict(zip(asked, found))
    again = [rows for rows, a in answers.items() if is_divisible(a, rows)]
    if again and self.row_seconds is None:
      answers = self.one_by_one(answers, again, arguments, logs)
    values = merge(answers, logs, {} if self.row_seconds else HINTS)
    failed = next((v for v in values if isinstance(v, Failed)), None)
    if failed is not None and not by_scorer:  # another function calls this one
      where = f'completion {values.index(failed)}'
      raise failed.as_error(self.name, where, 'mend it')
    return values

  def limits(self, asked: Sequence[range]) -> Limits:
    """Limits of a call."""
    found = self.workers.limits
    more = (self.row_seconds or 0) * max(map(len, asked), default=0)
    return found._replace(seconds=found.seconds + more)

  def ask(
    self, asked: Sequence[range], arguments: dict, logs, limits, until=None
  ) -> list:
    """Answers for some rows each."""
    questions = [
      (self.name, take_rows(arguments, rows), list(logs), len(rows))
      for rows in asked
    ]
    found = self.workers.ask(questions, limits, until)
    self.killed += sum(isinstance(a, Failure) and a.is_killed for a in found)
    return found

  def one_by_one(self, answers, again: list[range], arguments, logs) -> dict:
    """Answers of single rows in place of those of calls that failed."""
    limits = self.workers.limits
    single = [range(b, b + 1) for rows in again for b in rows]
    found = self.ask(
      single,
      arguments,
      logs,
      limits._replace(seconds=limits.seconds * ALONE),
      time.monotonic() + limits.seconds,
    )
    kept = {rows: a for rows, a in answers.items() if rows not in again}
    both = kept | dict(zip(single, found))
    return dict(sorted(both.items(), key=lambda item: item[0].start))


def shares(n: int, G: int, count: int) -> list[range]:
  """Rows of each of at most `count` calls: whole groups of G, in order."""
  groups = math.ceil(n / G)
  parts = max(min(count, groups), 1)
  edges = [min(i * groups // parts * G, n) for i in range(parts + 1)]
  return [range(a, b) for a, b in itertools.pairwise(edges)]


def take_rows(arguments: dict, rows: range) -> dict:
  """Arguments of some rows; what is no list is of all."""
  return {
    k: v[rows.start : rows.stop] if type(v) is list else v
    for k, v in arguments.items()
  }


def is_divisible(answer: Answer | Failure, rows: range) -> bool:
  """Tells whether rows should be asked one by one."""
  failed = isinstance(answer, Failure) and answer.kind != 'refused'
  return failed and len(rows) > 1


def merge(
  answers: dict[range, Answer | Failure], logs: dict, hints: dict
) -> list:
  """Values of all rows, and what was logged, once more for the caller's log.
  Raises ValueError where the function's answer was refused.

  hints: {kind of a failure: words after its text}.
  """
  values, columns, metrics = [], {}, []
  for rows, answer in answers.items():
    if isinstance(answer, Failure):
      if answer.kind == 'refused':
        raise ValueError(answer.text)
      text = answer.text + hints.get(answer.kind, '')
      values += [Failed(text, answer.traceback)] * len(rows)
      continue
    judged = Judged(*answer.value)
    values += map(read_value, judged.values)
    metrics += judged.metrics
    for column, logged in judged.extra.items():
      columns.setdefault(column, {})[rows] = logged
  for column, found in columns.items():
    none = ([None] * len(rows) for rows in answers)
    parts = (found.get(rows, n) for rows, n in zip(answers, none))
    logs['log_extra'](column, [v for part in parts for v in part])
  for name, value in metrics:
    logs['log_metric'](name, value)
  return values


def can_be_sent(function: Callable) -> bool:
  """Tells whether a function's arguments can leave this process: it does not
  name environments, and it takes rows. One of a worker of its own is there
  already."""
  takes = accepted(function)
  own = getattr(function, 'own_worker', False)
  rows = takes.any_name or takes.names - {'trainer_state', *HERE}
  return not own and bool(rows) and 'environments' not in takes.names


def in_workers(
  functions: dict[str, Callable], limits: Limits, count: int = 1
) -> tuple[dict[str, Callable], Workers | None]:
  """({name: function that is called in workers, or as it is}, the workers).
  Raises ValueError, in one line, for one that cannot be sent there."""
  sent = {name: f for name, f in functions.items() if can_be_sent(f)}
  if not sent:
    return functions, None
  for name, f in sent.items():  # so that the error names one
    pack(Judge({name: f}), f'reward {name}')
  names = ', '.join(sent)
  workers = Workers(Judge(sent), limits, count, f'reward {names}')
  isolated = {name: Isolated(f, name, workers) for name, f in sent.items()}
  return functions | isolated, workers


def in_worker(
  function: Callable, seconds: float, row_seconds: float
) -> Callable:
  """Reward function in a worker of its own, which is started when it is first
  called. A call has seconds, and row_seconds more for each completion."""
  name = get_name(function)
  limits = Limits(seconds)
  workers = Workers(Judge({name: function}), limits, 1, f'reward {name}')
  return Isolated(function, name, workers, row_seconds)
