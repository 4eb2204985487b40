"""Console that may be lost: a closed pipe, a full disk, a terminal that went.

A run whose console cannot be written any more goes on to the end of its step,
is saved, and ends; see train.stop_requested.
"""

import contextlib
import os
import sys
import weakref

_lost = weakref.WeakKeyDictionary()  # {standard output: why}, of all Streams


class Stream:
  """Standard output that raises nothing: once it cannot be written, `lost` says
  why, and what follows goes to standard error."""

  def __init__(self):
    if sys.stdout is None:  # a process that was started without
      sys.stdout = open(os.devnull, 'w')  # noqa: SIM115

  @property
  def lost(self) -> str | None:
    """Why standard output cannot be written any more; None while it can."""
    return _lost.get(sys.stdout)

  def __getattr__(self, name: str):
    return getattr(sys.stdout, name)  # as it is now: it may be replaced

  def write(self, text: str) -> int:
    self._try(lambda out: out.write(text))
    return len(text)

  def flush(self) -> None:
    self._try(lambda out: out.flush())

  def _try(self, do) -> None:
    if self.lost is None:
      try:
        do(sys.stdout)
        return
      except (OSError, ValueError) as e:  # the latter: a closed file
        self._give_up(getattr(e, 'strerror', None) or str(e))
    with contextlib.suppress(OSError, ValueError, AttributeError):
      do(sys.stderr)

  def _give_up(self, why: str) -> None:
    _lost[sys.stdout] = why
    with contextlib.suppress(OSError, ValueError, AttributeError):
      # what is left in its buffer would fail again when the process ends
      null = os.open(os.devnull, os.O_WRONLY)
      os.dup2(null, sys.stdout.fileno())
      os.close(null)
    with contextlib.suppress(OSError, ValueError):
      print(f'warning: the console cannot be written ({why})', file=sys.stderr)
