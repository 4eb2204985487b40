"""Threads that answer calls side by side, each within a deadline.

A call's time runs from its own start, not from its place in the queue. Python
cannot end a thread: one whose call is late is left alone and another takes its
place. All are daemons, so that none of them holds up the end of a program.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

WAITING, RUNNING, DONE, LATE = range(4)


class Job:
  """Call of a thread, with its result."""

  def __init__(self, call: Callable, deadline: float):
    self.call, self.deadline = call, deadline
    self.state = WAITING
    self.started = 0.0
    self.seconds = 0.0
    self.value: Any = None  # of the call
    self.error: BaseException | None = None  # that it raised

  @property
  def late(self) -> bool:
    return self.state == LATE


def work(jobs: queue.SimpleQueue, changed: threading.Condition) -> None:
  """Takes jobs until one is None, or until its own is late."""
  while (job := jobs.get()) is not None:
    with changed:
      if job.state != WAITING:
        continue
      job.state, job.started = RUNNING, time.monotonic()
      changed.notify_all()
    try:
      job.value = job.call()
    except (Exception, SystemExit) as e:
      job.error = e
    with changed:
      if job.state == LATE:
        return
      job.state, job.seconds = DONE, time.monotonic() - job.started
      changed.notify_all()


class Threads:
  """Threads with one queue, started when they are needed.

  Args:
    workers: calls that run side by side.
    deadline: seconds of a call.
  """

  def __init__(self, workers: int, deadline: float):
    self.workers, self.deadline = workers, deadline
    self.jobs: queue.SimpleQueue = queue.SimpleQueue()
    self.changed = threading.Condition()
    self.running = 0

  def start(self) -> None:
    threading.Thread(
      target=work,
      args=(self.jobs, self.changed),
      name='environment',
      daemon=True,
    ).start()

  def run(self, calls: list[Callable], deadline=None) -> list[Job]:
    """Jobs of the calls, in their order, each done or late.

    deadline: seconds of a call, if others than usual.
    """
    found = [Job(call, deadline or self.deadline) for call in calls]
    while self.running < min(self.workers, len(found)):
      self.start()
      self.running += 1
    for job in found:
      self.jobs.put(job)
    with self.changed:
      try:
        while any(job.state in (WAITING, RUNNING) for job in found):
          self.changed.wait(self.expire(found, time.monotonic()))
      except BaseException:  # Ctrl-C
        self.expire(found, float('inf'))
        raise
    return found

  def expire(self, jobs: list[Job], now: float) -> float:
    """Seconds until the next deadline, after jobs past theirs are late."""
    left = float(threading.TIMEOUT_MAX)
    for job in jobs:
      if job.state == RUNNING:
        left = min(left, job.started + job.deadline - now)
        if job.started + job.deadline <= now:
          job.state, job.seconds = LATE, job.deadline
          self.start()  # in place of the one that is stuck
      elif job.state == WAITING and now == float('inf'):
        job.state = LATE
    return max(left, 0.0)

  def close(self) -> None:
    """Ends the threads that are idle; a stuck one ends with its call."""
    for _ in range(self.running):
      self.jobs.put(None)
    self.running = 0
