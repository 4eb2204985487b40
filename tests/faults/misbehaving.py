"""Reward functions that misbehave, in every way that a run must survive; read
by tests and by soak.py. No jax: workers import this file."""

import asyncio
import os
import re
import resource
import sys
import time
from collections.abc import Callable


def sleeps():
  time.sleep(1000)


def spins_in_c():
  re.match('(a+)+$', 'a' * 60 + 'b')


def spins():
  while True:
    pass


def exits():
  sys.exit(0)


def ends():
  os._exit(0)


def raises():
  raise KeyError('boom')


def forks_and_sleeps():
  """Waits for ever for a child that has a child of its own."""
  if os.fork() == 0:
    os.fork()
    time.sleep(1000)
  os.wait()


def leaves_a_daemon():
  """Leaves a process that left the group, and ends."""
  if os.fork() == 0:
    os.setsid()
    time.sleep(1000)
  os._exit(3)


def returns_twice():
  os.fork()


def takes_memory():
  return bytearray(10 << 30)


def lets_a_child_take_memory():
  """Children that take a little less than the limit, each, for a while."""
  soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
  for _ in range(3):
    if os.fork() == 0:
      held = [bytearray(b'x' * (1 << 20)) for _ in range((soft >> 20) - 200)]
      time.sleep(1000 + len(held))
  os.wait()


def prints_garbage():
  os.write(1, b'{"number": 1, "value": [[9, 9, 9], {}, []]}\n' * 50)
  print('garbage', flush=True)


def closes_all_files():
  os.closerange(0, 100)


def segfaults():
  os.kill(os.getpid(), 11)


# what each does, and a part of the line that names it; '': it is survived
WAYS: dict[str, tuple[Callable, str]] = {
  'sleeps': (sleeps, 'took more than'),
  'spins in C': (spins_in_c, 'took more than'),
  'exits': (exits, 'raised SystemExit: 0'),
  'ends': (ends, 'ended its process (exit code 0)'),
  'raises': (raises, "raised KeyError: 'boom'"),
  'forks and sleeps': (forks_and_sleeps, 'took more than'),
  'leaves a daemon': (leaves_a_daemon, 'ended its process (exit code 3)'),
  'returns twice': (returns_twice, ''),
  'takes 10 GB': (takes_memory, 'raised MemoryError'),
  'prints garbage': (prints_garbage, ''),
  'closes all files': (closes_all_files, 'ended its process'),
  'segfaults': (segfaults, 'ended its process (signal SIGSEGV)'),
}


def obeying(completions, log_metric=None, log_extra=None, **columns):
  """Lengths; a completion that is the name of a way goes it."""
  for text in completions:
    if text in WAYS:
      WAYS[text][0]()
  if log_metric is not None:
    log_metric('rows', len(completions))
    log_extra('seen', [f'<{text}>' for text in completions])
  return [float(len(text)) for text in completions]


async def later(completions, **columns):
  await asyncio.sleep(0.01)
  return [float(len(text)) for text in completions]


def by_group(completion_ids, **columns):
  """Reward for each token, less the group's longest; needs whole groups."""
  most = max(map(len, completion_ids))
  return [[float(i) - most for i in ids] for ids in completion_ids]


def odd_values(completions, **columns):
  """Values that are none, by the name of the completion."""
  import numpy as np

  odd = {
    'none': None,
    'nan': float('nan'),
    'inf': float('inf'),
    'text': '1',
    'dict': {'a': 1},
    'set': {1},
    'array': np.float32(0.5),
    'list': [1.0, 2],
    'object': object,
  }
  return [odd.get(text, 1.0) for text in completions]


def varied(completion_ids, **columns):
  return [len(set(ids)) + ids[0] / 300 for ids in completion_ids]


def ends_at_step_2(completion_ids, trainer_state, **columns):
  """Varied values; ends the process in the step after step 2."""
  if trainer_state.global_step == 2:
    os._exit(0)
  return varied(completion_ids)


def ends_for_some(completion_ids, trainer_state, **columns):
  """Varied values; ends the process for some completions of that step."""
  if trainer_state.global_step == 2:
    for ids in completion_ids:
      if sum(ids) % 7 == 0:
        os._exit(0)
  return varied(completion_ids)
