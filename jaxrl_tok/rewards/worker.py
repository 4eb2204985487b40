"""Worker: a process that answers one question at a time, within a deadline.

Questions and answers are lines of JSON. The worker sets an alarm whose signal
ends it, so that a library that hangs, also in C, is gone in time; the next
question starts another one. POSIX only.
"""

import atexit
import contextlib
import json
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


class Worker:
  """Process that runs a Python file, started when it is asked.

  Args:
    file: its main writes a line once it is ready, then a line of JSON for each
      line of JSON that it reads.
    arguments: of its command line.
  """

  def __init__(self, file: Path, *arguments: str):
    # -P: modules beside the file do not hide those of libraries
    self.command = [sys.executable, '-P', str(file), *arguments]
    self.process = None
    atexit.register(self.stop)

  def start(self) -> None:
    self.process = subprocess.Popen(
      self.command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
      encoding='utf-8',
    )
    if not self.process.stdout.readline():
      self.stop()
      raise ValueError(
        f'the worker of {Path(self.command[2]).stem} does not start; run '
        f'{" ".join(self.command)} to see why'
      )

  def ask(self, question):
    """Answer to a question; None where there was none in time, or the worker
    died of it."""
    if self.process is None:
      self.start()
    try:
      self.process.stdin.write(json.dumps(question) + '\n')
      self.process.stdin.flush()
      line = self.process.stdout.readline()
    except OSError:
      line = ''
    if not line:
      self.stop()
      return None
    return json.loads(line)

  def stop(self) -> None:
    process, self.process = self.process, None
    if process is None:
      return
    process.kill()
    process.wait()
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # a question that was not read
      process.stdin.close()


def ask_all(workers: queue.SimpleQueue, questions: list) -> list:
  """Answers to questions, asked of idle workers side by side."""

  def ask(question):
    worker = workers.get()
    try:
      return worker.ask(question)
    finally:
      workers.put(worker)

  with ThreadPoolExecutor(max(1, workers.qsize())) as pool:
    return list(pool.map(ask, questions))
