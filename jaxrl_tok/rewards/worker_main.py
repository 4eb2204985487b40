"""Process of a Worker: python -P worker_main.py DESCRIPTOR

It answers the questions that come over a socket, one at a time:

1. {"path": sys.path, "memory": bytes} as JSON, then a function, pickled;
   answered by {"ready": true}, or by the error that came up.
2. (number, question, seconds, seconds of a processor), pickled; answered by
   {"number": ..., "value": function(question)} as JSON, or by its error.

Nothing that was pickled here is read by the parent. What the function prints
goes to the error stream, and it reads an empty input. The process guards a
child of its own, which answers: whatever happens to that, or to the program,
none of its children stays. POSIX only.
"""

import contextlib
import json
import os
import pickle
import resource
import select
import signal
import socket
import sys
from pathlib import Path

SIZE = 8  # bytes of a message's length
TAG = 'JAXRL_TOK_WORKER'  # variable by which a worker's children are found
TICK = 100  # milliseconds between looks at the worker


def send(channel: socket.socket, message: bytes) -> None:
  """Sends a message, its length first."""
  channel.sendall(len(message).to_bytes(SIZE, 'big') + message)


def receive(channel: socket.socket) -> bytes:
  """Waits for a message. Raises EOFError where the other side is gone."""
  size = int.from_bytes(_read(channel, SIZE), 'big')
  return _read(channel, size)


def _read(channel: socket.socket, size: int) -> bytes:
  pieces = []
  while size:
    piece = channel.recv(min(size, 1 << 20))
    if not piece:
      raise EOFError
    pieces.append(piece)
    size -= len(piece)
  return b''.join(pieces)


def set_alarm(seconds: float, cpu: float | None) -> None:
  """Lets a signal end the process after seconds by the clock, or after `cpu`
  seconds of its own time; 0: never. No Python runs for it, so that it ends a
  library that hangs in C, and an orphan."""
  with contextlib.suppress(ValueError):
    signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_PROF, cpu or 0)


def limit_memory(size: int) -> None:
  """Limits the bytes that this process may hold: more is a MemoryError."""
  with contextlib.suppress(OSError, ValueError):  # some systems have no limit
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def tagged(tag: str) -> list[int]:
  """Other processes whose environment has a tag: also those that have left the
  group. None where there is no /proc."""
  mark, found = f'{TAG}={tag}\0'.encode(), []
  for environ in Path('/proc').glob('[0-9]*/environ'):
    with contextlib.suppress(OSError):
      if mark in environ.read_bytes():
        found.append(int(environ.parent.name))
  return [pid for pid in found if pid != os.getpid()]


def kill_tagged(tag: str) -> None:
  """Kills the processes that have a tag, and what they fork meanwhile."""
  for _ in range(9):
    found = tagged(tag)
    for pid in found:
      with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
    if not found:
      return


def guard(worker: int, channel: socket.socket) -> None:
  """Waits for the worker's end, or for that of the program that started it;
  kills what the worker has left behind, and ends as it did."""
  poll = select.poll()
  poll.register(channel, 0)
  while not (ended := os.waitpid(worker, os.WNOHANG))[0]:
    if poll.poll(TICK):
      break
  kill_tagged(os.environ[TAG])
  if not Path('/proc').is_dir():  # all of the group, as none can be told apart
    os.killpg(0, signal.SIGKILL)
  status = os.waitstatus_to_exitcode(ended[1]) if ended[0] else -signal.SIGKILL
  if status < 0:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), -status)
  os._exit(status)


def keep_streams_apart(channel: socket.socket) -> None:
  """Takes input and output away from what the function reads and prints."""
  channel.set_inheritable(False)
  os.dup2(2, 1)
  sys.stdout.reconfigure(line_buffering=True)
  with open(os.devnull) as nothing:
    os.dup2(nothing.fileno(), 0)


def attempt(call) -> dict:
  """{"value": call()}, or {"error": ...} of what it raises."""
  try:
    return {'value': call()}
  except BaseException as e:  # an exit or an interrupt, too
    from jaxrl_tok.rewards.calls import describe_error
    from jaxrl_tok.rewards.functions import raised_by_us, user_traceback

    if raised_by_us(e):
      return {'error': str(e), 'ours': True, 'traceback': ''}
    text = user_traceback(e)
    return {'error': describe_error(e), 'ours': False, 'traceback': text}


def main(descriptor: int) -> None:
  """Guards a child that answers questions."""
  channel = socket.socket(fileno=descriptor)
  keep_streams_apart(channel)
  worker = os.fork()  # nothing else runs here yet
  if worker:
    guard(worker, channel)
  with contextlib.suppress(EOFError, ConnectionError):
    serve(channel)


def serve(channel: socket.socket) -> None:
  """Answers questions until there are none."""
  mine = os.getpid()
  given = json.loads(receive(channel))
  sys.path[:] = given['path']
  begun = attempt(lambda: pickle.loads(receive(channel)))
  function = begun.pop('value', None)
  if given['memory']:
    limit_memory(given['memory'])
  send(channel, json.dumps(begun or {'ready': True}).encode())
  while True:
    number, question, seconds, cpu = pickle.loads(receive(channel))
    set_alarm(seconds, cpu)
    answer = attempt(lambda: json.dumps(function(question)))  # noqa: B023
    if os.getpid() != mine:  # a child that the function left behind
      os._exit(0)
    set_alarm(0, 0)
    value = answer.pop('value', None)
    text = json.dumps({'number': number, **answer})
    if value is not None:
      text = f'{text[:-1]}, "value": {value}}}'
    send(channel, text.encode())


if __name__ == '__main__':
  main(int(sys.argv[1]))
