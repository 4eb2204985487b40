"""Watch of a run's numbers: a pure function over the metrics of each step.

  seen, reason = watch(seen, metrics, limits)

A run has diverged where, in `steps` rows in a row that have the number,

  kl         is above max_kl: the policy has left its reference
  entropy    is below min_entropy: it has one thing to say
  grad_norm  is above max_grad_ratio times the median of the last rows

Its small state is made again from metrics.jsonl by a resumed run. `Hang` ends a
step that takes too long.
"""

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

TRY_AGAIN = 75  # exit status of a run that should be started again
NORMS = 50  # rows whose gradient norms make the median
FEWEST = 10  # of them, below which there is none


class Limits(NamedTuple):
  """Limits of a run's numbers; 0: none."""

  max_kl: float = 0.0
  min_entropy: float = 0.0
  max_grad_ratio: float = 0.0
  steps: int = 3  # rows in a row


class Seen(NamedTuple):
  """State of the watch: rows in a row beyond each limit, the step of the first
  of them, and the last gradient norms that were none."""

  kl: int = 0
  entropy: int = 0
  grad_norm: int = 0
  since: int = 0
  norms: tuple = ()

  @property
  def in_doubt(self) -> int:
    """Rows in a row beyond a limit, up to the last one."""
    return max(self.kl, self.entropy, self.grad_norm)


class Diverged(ValueError):
  """Numbers that are beyond their limits, and ended the run.

  Attributes:
    since: step of the policy whose numbers were the first beyond.
    settings: of a run that goes on from an earlier checkpoint; None: none does.
    status: exit status of the program: starting it again does not help.
    agreed: every process knows, by the numbers of the update.
  """

  agreed, status = True, 1

  def __init__(self, message: str, since: int):
    super().__init__(message)
    self.since, self.settings = since, None


def watch(seen: Seen, metrics: dict, limits: Limits) -> tuple[Seen, str | None]:
  """(state after a row of metrics.jsonl, why the run has diverged: a sentence,
  or None). Numbers that a row does not have, or null, leave their count."""
  kl, entropy = metrics.get('kl'), metrics.get('entropy')
  norm, norms = metrics.get('grad_norm'), seen.norms
  median = statistics.median(norms) if len(norms) >= FEWEST else None
  most = median and limits.max_grad_ratio * median
  tests = {
    'kl': (kl, limits.max_kl, lambda x, limit: x > limit),
    'entropy': (entropy, limits.min_entropy, lambda x, limit: x < limit),
    'grad_norm': (norm, most, lambda x, limit: x > limit),
  }
  counts = {}
  for name, (value, limit, beyond) in tests.items():
    counts[name] = getattr(seen, name)
    if value is not None and limit:
      counts[name] = counts[name] + 1 if beyond(value, limit) else 0
  if norm and not counts['grad_norm']:  # 0: nothing was learnt from
    norms = (*norms, norm)[-NORMS:]
  found = Seen(**counts, norms=norms)
  since = seen.since if seen.in_doubt else metrics['step']
  seen = found._replace(since=since if found.in_doubt else 0)
  said = {
    'kl': lambda: f'kl {kl:.3g} is above --max_kl {limits.max_kl:g}',
    'entropy': lambda: (
      f'entropy {entropy:.3g} is below --min_entropy {limits.min_entropy:g}'
    ),
    'grad_norm': lambda: (
      f'grad_norm {norm:.3g} is {norm / median:.0f} times its running median, '
      f'above --max_grad_ratio {limits.max_grad_ratio:g}'
    ),
  }
  for name, count in counts.items():
    if count >= limits.steps and tests[name][0] is not None:
      return seen, f'{said[name]()}, in {count} steps in a row'
  return seen, None


def watched(rows: Iterable[dict], limits: Limits) -> Seen:
  """State of the watch after the rows of metrics.jsonl."""
  seen = Seen()
  for row in rows:
    if row.get('phase') == 'train':
      seen, _ = watch(seen, row, limits)
  return seen


# --- steps that hang ---------------------------------------------------------


class Hang:
  """Watch of the clock: ends the process, with the stacks of its threads, where
  a phase of a step takes longer than `seconds`; 0: never.

  A thread of Python's ends it with TRY_AGAIN. Where that cannot run, because C
  holds the interpreter, faulthandler's own thread ends it a little later with
  status 1.

  Args:
    leave: called with TRY_AGAIN.
  """

  def __init__(self, seconds: float, leave: Callable = os._exit):
    self.seconds, self.leave = seconds, leave
    self.done = threading.Event()
    self.moment, self.phase = time.monotonic(), ''

  def begin(self, phase: str) -> None:
    """Begins a phase: it has all of the time."""
    self.moment, self.phase = time.monotonic(), phase
    if self.seconds:
      with contextlib.suppress(OSError, ValueError):  # a notebook's stream
        faulthandler.dump_traceback_later(1.1 * self.seconds + 5, exit=True)

  def run(self) -> None:
    while not self.done.wait(min(1.0, self.seconds / 4)):
      moment, phase = self.moment, self.phase
      if time.monotonic() - moment > self.seconds:
        return self.end(phase)

  def end(self, phase: str) -> None:
    """Writes the stacks and a line, and leaves."""
    with contextlib.suppress(Exception):  # the error stream may be closed
      faulthandler.dump_traceback(sys.stderr, all_threads=True)
    with contextlib.suppress(Exception):
      line = (
        f'error: {phase} took longer than --step_timeout {self.seconds:g} s, '
        'and hangs where the stacks above end; start it again with --resume '
        'auto'
      )
      print(line, file=sys.stderr, flush=True)
    self.leave(TRY_AGAIN)

  def __enter__(self):
    if self.seconds:
      self.begin('the start')
      threading.Thread(target=self.run, name='watch', daemon=True).start()
    return self

  def __exit__(self, *error) -> None:
    self.done.set()
    if self.seconds:
      faulthandler.cancel_dump_traceback_later()
