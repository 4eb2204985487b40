"""Protocol between a peer and the benchmark: one line of JSON at a time.

1. argv[1] is the job (what to run, at which size).
2. After the warm-up the peer prints {"ready": {"package": "version", ...}}.
3. Every line on stdin asks for one round, answered by {"seconds": ...}.
4. The end of stdin is the end of the program.

Our rounds and a peer's can so be interleaved, and a slow minute of the machine
falls on both.

Import this module before anything else: it keeps the real stdout to itself and
sends whatever else is printed there, from C as well, to stderr.
"""

import importlib.metadata
import json
import os
import sys
import time

_answers = os.fdopen(os.dup(1), 'w')
os.dup2(2, 1)

# Libraries compile, grow their memory pools and fill caches in the first
# rounds, some of them (a change of sharding) only in the second.
# A model's rounds take half a minute, and torch, its peers, compiles nothing.
WARM_UP, WARM_UP_OF_A_MODEL = 3, 1


def read_job():
  return json.loads(sys.argv[1])


def rounds(packages, job):
  """Yields True once a round; what runs until the next `next` is the round.

  One generator serves a plain loop (`for _ in rounds(...): work()`) and a
  library that owns its loop and only calls back between two steps.
  """
  for _ in range(WARM_UP_OF_A_MODEL if job['model'] else WARM_UP):
    yield True
  _answer(
    {'ready': {name: importlib.metadata.version(name) for name in packages}}
  )
  while sys.stdin.readline():
    start = time.perf_counter()
    yield True
    _answer({'seconds': time.perf_counter() - start})


def check(what, found, wanted):
  """Checks a peer's work: one that did less must fail, not win."""
  if found != wanted:
    sys.exit(f'{what}: {found}, wanted {wanted}')


def _answer(record):
  print(json.dumps(record), file=_answers, flush=True)
