"""Workers: processes that answer questions, and that can be ended.

A worker is a Python of its own, started when it is first asked: it shares
neither memory nor files with this process, and sees no accelerator. It answers
one question at a time, within seconds and bytes; one that is late, takes too
much or ends is killed with its children, and the next question starts another
one. Workers end with this process, however that ends.

  with Workers(function, Limits(seconds=30), count=4) as workers:
    answers = workers.ask(questions)   # Answer or Failure each, side by side

Functions are pickled on their way there (cloudpickle: lambdas and functions of
the main program, too); answers come back as JSON. POSIX only.
"""

import contextlib
import json
import os
import queue
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from jaxrl_tok.rewards.calls import describe_error
from jaxrl_tok.rewards.worker_main import SIZE, TAG, kill_tagged, send

MAIN = Path(__file__).with_name('worker_main.py')
START = 120.0  # seconds in which a worker starts
TICK = 0.25  # seconds between looks at a worker that is busy
LARGEST = 1 << 28  # bytes of an answer
GIB = 1 << 30
WROTE_OVER = 'wrote over its answer'


class Limits(NamedTuple):
  """Limits of a question."""

  seconds: float  # by the clock
  memory: int = 4 * GIB  # bytes, of a worker and its children; 0: any
  cpu: float | None = None  # seconds of a processor, of the worker alone


class Answer(NamedTuple):
  """Value that a worker gave."""

  value: Any


class Failure(NamedTuple):
  """Question without an answer."""

  # 'raised', 'refused' (by us), 'skipped', 'late', 'memory' or 'ended'
  kind: str
  text: str  # what the function did, a predicate: 'took more than 30 s'
  traceback: str = ''

  @property
  def is_killed(self) -> bool:
    """Tells whether the worker died of it."""
    return self.kind in ('late', 'memory', 'ended')


class Silent(Exception):
  """Worker that gave no answer; the argument is a Failure."""


def pack(function: Callable, name: str) -> bytes:
  """A function, pickled. Raises ValueError, in one line."""
  import cloudpickle

  try:
    return cloudpickle.dumps(function)
  except Exception as e:
    raise ValueError(
      f'{name} cannot be sent to a worker ({describe_error(e)}); make what it '
      'holds inside the function, or run it here (--reward_workers 0)'
    ) from None


# --- processes of a group ----------------------------------------------------


def memory_of(group: int) -> int:
  """Bytes in memory of all processes of a group; 0 where there is no /proc."""
  page, total = os.sysconf('SC_PAGE_SIZE'), 0
  for stat in Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(OSError, ValueError, IndexError):
      fields = stat.read_text().rpartition(')')[2].split()
      total += int(fields[21]) * page if int(fields[2]) == group else 0
  return total


def describe_exit(code: int | None) -> str:
  """Exit status in words."""
  if code is not None and code < 0:
    with contextlib.suppress(ValueError):
      return f'signal {signal.Signals(-code).name}'
  return f'exit code {code}'


# --- one worker --------------------------------------------------------------


class Worker:
  """Process that answers one question at a time; used by one thread at a
  time.

  Args:
    function: what answers, packed.
    name: of the function, for errors.
  """

  def __init__(self, function: bytes, name: str, memory: int):
    self.function, self.name, self.memory = function, name, memory
    self.process: subprocess.Popen | None = None
    self.channel: socket.socket | None = None
    self.tag, self.number, self.looked = '', 0, 0.0

  def start(self) -> None:
    """Starts the process, unless it runs. Raises ValueError, in one line."""
    if self.process is not None:
      return
    self.tag = secrets.token_hex(8)
    self.channel, theirs = socket.socketpair()
    environment = os.environ | {TAG: self.tag, 'JAX_PLATFORMS': 'cpu'}
    with theirs:
      self.process = subprocess.Popen(
        [sys.executable, '-P', str(MAIN), str(theirs.fileno())],
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
        env=environment,
      )
    path = [os.path.abspath(p) for p in sys.path]
    given = json.dumps({'path': path, 'memory': self.memory}).encode()
    try:
      self.send(given, START)
      self.send(self.function, START)
      said = self.receive(START)
    except Silent as e:
      said = {'error': e.args[0].text}
    if 'error' in said:
      self.kill()
      raise ValueError(
        f'the worker of {self.name} does not start ({said["error"]}); mend '
        'what it imports, or run it here (--reward_workers 0)'
      )

  def ask(self, question: Any, limits: Limits) -> Answer | Failure:
    """Answer to a question. Raises ValueError where the worker does not
    start."""
    import cloudpickle

    try:
      self.number += 1
      asked = self.number, question, limits.seconds + 1, limits.cpu
      message = cloudpickle.dumps(asked)
    except Exception as e:
      said = f'{self.name} cannot be sent its arguments ({describe_error(e)})'
      cure = 'run it here (--reward_workers 0)'
      return Failure('refused', f'{said}; {cure}')
    self.start()
    try:
      self.send(message, limits.seconds)
      said = self.receive(limits.seconds)
    except Silent as e:
      return e.args[0]
    except BaseException:  # Ctrl-C
      self.kill()
      raise
    if said.get('number') != self.number:
      return self.give_up('ended', WROTE_OVER)
    if 'error' in said:
      if said['ours']:
        return Failure('refused', said['error'])
      return Failure('raised', f'raised {said["error"]}', said['traceback'])
    return Answer(said.get('value'))

  def send(self, message: bytes, seconds: float) -> None:
    self.channel.settimeout(seconds)
    try:
      send(self.channel, message)
    except OSError:  # it has ended, or stopped
      raise Silent(self.ended(seconds)) from None

  def receive(self, seconds: float) -> dict:
    """Waits for an answer, and looks at the process now and then. Raises
    Silent."""
    end, found = time.monotonic() + seconds, bytearray()
    self.looked = time.monotonic()
    while True:
      left = max(end - time.monotonic(), 0.0)
      if select.select([self.channel], [], [], min(left, TICK))[0]:
        found += self.piece()
        size = int.from_bytes(found[:SIZE], 'big')
        if len(found) >= SIZE and not 0 < size <= LARGEST:
          raise Silent(self.give_up('ended', WROTE_OVER))
        if len(found) >= SIZE + size:
          return self.parse(bytes(found[SIZE:]))
      elif self.process.poll() is not None:
        raise Silent(self.ended(seconds))
      elif not left:
        raise Silent(self.give_up('late', f'took more than {seconds:g} s'))
      self.look()

  def piece(self) -> bytes:
    """Bytes that are there. Raises Silent where the other side is closed."""
    with contextlib.suppress(OSError):
      if piece := self.channel.recv(1 << 20):
        return piece
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.process.wait(1)
      raise Silent(self.ended(0))
    raise Silent(self.give_up('ended', 'closed the pipe of its answers'))

  def parse(self, text: bytes) -> dict:
    try:
      said = json.loads(text)
    except ValueError:
      said = None
    if not isinstance(said, dict):
      raise Silent(self.give_up('ended', WROTE_OVER))
    return said

  def look(self) -> None:
    """Raises Silent where the worker and its children take too much memory."""
    if not self.memory or time.monotonic() - self.looked < TICK:
      return
    self.looked = time.monotonic()
    if memory_of(self.process.pid) > self.memory:
      said = f'took more than {self.memory / GIB:.3g} GiB of memory'
      raise Silent(self.give_up('memory', said))

  def ended(self, seconds: float) -> Failure:
    """Failure of a process that is gone, or that does not listen."""
    code = self.process.poll()
    if code is None:
      return self.give_up('late', f'took more than {seconds:g} s')
    if -code in (signal.SIGALRM, signal.SIGPROF):
      return self.give_up('late', 'took too long')
    return self.give_up('ended', f'ended its process ({describe_exit(code)})')

  def give_up(self, kind: str, text: str) -> Failure:
    self.kill()
    return Failure(kind, text)

  def kill(self) -> None:
    """Ends the process and its children."""
    process, self.process = self.process, None
    if process is None:
      return
    with contextlib.suppress(OSError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kill_tagged(self.tag)
    self.channel.close()


# --- several -----------------------------------------------------------------


def kill_all(workers: list[Worker]) -> None:
  for worker in workers:
    worker.kill()


class Workers:
  """Workers that answer by one function, side by side.

  Args:
    function: (question) -> what JSON can hold.
    limits: of a question, unless `ask` is given others.
    count: processes.
    name: of the function, for errors.

  Raises ValueError for a function that cannot be sent.
  """

  def __init__(
    self, function: Callable, limits: Limits, count: int = 1, name: str = ''
  ):
    self.function, self.limits = function, limits
    self.count, self.name = count, name
    packed = pack(function, name)
    self.all = [Worker(packed, name, limits.memory) for _ in range(count)]
    self.idle: queue.SimpleQueue = queue.SimpleQueue()
    for worker in self.all:
      self.idle.put(worker)
    self.close_at_last = weakref.finalize(self, kill_all, self.all)

  def __reduce__(self):
    return Workers, (self.function, self.limits, self.count, self.name)

  def ask(
    self,
    questions: Sequence,
    limits: Limits | None = None,
    until: float | None = None,
  ) -> list[Answer | Failure]:
    """Answers to questions, in their order.

    until: time.monotonic() after which no question is asked any more.
    """
    limits, until = limits or self.limits, until or float('inf')

    def ask(question):
      worker = self.idle.get()
      try:
        if time.monotonic() >= until:
          return Failure('skipped', 'had no time left')
        return worker.ask(question, limits)
      finally:
        self.idle.put(worker)

    with ThreadPoolExecutor(min(self.count, len(questions)) or 1) as pool:
      try:
        return list(pool.map(ask, questions))
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        self.close()
        raise

  def close(self) -> None:
    """Ends the processes; a later question starts them again."""
    kill_all(self.all)

  def __enter__(self):
    """Starts the processes. Raises ValueError."""
    with ThreadPoolExecutor(self.count) as pool:
      list(pool.map(Worker.start, self.all))
    return self

  def __exit__(self, *error) -> None:
    self.close()
