"""Timing of several contenders, whose rounds are taken in turn.

A machine's speed changes from one second to the next; contenders in turn meet
equal changes, so the ratio of their medians is comparable.
"""

import contextlib
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxrl_tok.step.compile import usual_options

SCRIPTS = Path(__file__).parent / 'peers'
# dtypes that a peer is tried in
PEER_DTYPES = {
  'hf': ('float32', 'bfloat16'),
  'trl': ('float32', 'bfloat16', 'autocast'),
  'tunix': ('float32',),
}


class Row(NamedTuple):
  """Result of a contender."""

  bench: str
  size: str
  who: str
  seconds: list[float]  # of the rounds
  tokens: int  # made in a round; 0: that is not the point
  notes: dict  # numbers beside

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)


class Work(NamedTuple):
  """Sizes and rounds of a benchmark."""

  name: str  # of the size
  size: tuple  # sizes.Size
  dtype: str
  rows: int  # B
  prompt_length: int
  completion_length: int
  rounds: int
  peers: dict  # {name: interpreter}
  show: Callable  # prints a line
  profile: str | None = None  # directory for traces
  model: Any = None  # hub Model in place of random weights
  directory: str | None = None  # of the model, for the peers
  peer_dtypes: tuple = ('float32', 'bfloat16')


def compiled(function: Callable, *args):
  """Compiles a jitted function with the options of a run's programs."""
  return function.lower(*args).compile(usual_options(jax.default_backend()))


def once(function: Callable) -> float:
  """Seconds of a call, until its arrays are there."""
  began = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - began


def in_turn(contenders: dict[str, Callable], work: Work) -> dict:
  """Times contenders in turn: {name: [seconds]}, each contender() -> seconds
  of one round. The first rounds warm up; a profile is of one more round, which
  does not count."""
  for contender in contenders.values():
    contender()
  if work.profile:
    with jax.profiler.trace(work.profile):
      for contender in contenders.values():
        contender()
  found = {name: [] for name in contenders}
  for i in range(work.rounds):
    for name, contender in contenders.items():
      found[name].append(contender())
    last = ', '.join(f'{name} {s[-1]:.3g} s' for name, s in found.items())
    work.show(f'round {i + 1} of {work.rounds}: {last}')
  return found


class Peer:
  """Peer, a script of peers/ in another interpreter: it warms up, then does a
  round for every line that it is sent."""

  def __init__(self, name: str, python: str, job: dict):
    script = SCRIPTS / f'{name}_peer.py'
    self._name = f'{name}, {job["dtype"]}'
    # in a file, which is closed with it: a pipe that nobody reads would fill
    self._errors = tempfile.TemporaryFile('w+')  # noqa: SIM115
    self._process = subprocess.Popen(
      [python, str(script), json.dumps(job)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
    )
    self.versions = None

  def _read(self) -> dict:
    line = self._process.stdout.readline()
    if not line:
      self._errors.seek(0)
      lines = self._errors.read().strip().splitlines()
      last = lines[-1] if lines else 'silent'
      raise ValueError(f'{self._name} ended: {last}')
    return json.loads(line)

  def ready(self) -> dict:
    """Versions of what it runs, when it is warm."""
    if self.versions is None:
      self.versions = self._read()['ready']
    return self.versions

  def __call__(self) -> float:
    self.ready()
    with contextlib.suppress(BrokenPipeError):  # reading finds the reason
      self._process.stdin.write('go\n')
      self._process.stdin.flush()
    return self._read()['seconds']

  def close(self) -> None:
    with contextlib.suppress(OSError):
      self._process.stdin.close()
    try:
      self._process.wait(timeout=10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()
    self._errors.close()


def with_peers(
  work: Work, bench: str, C: int, G: int, own: dict, adapters=None
):
  """Times our contenders and the work's peers in turn: (seconds, versions).

  adapters: {rank, alpha} that a peer trains, of all linear layers; None: all of
    the model.
  """
  named = {}
  try:
    for peer, python in work.peers.items():
      for dtype in [d for d in PEER_DTYPES[peer] if d in work.peer_dtypes]:
        job = {
          'bench': bench,
          'size': work.size._asdict(),
          'model': work.directory,
          'adapters': adapters,
          'prompts': C,
          'samples': G,
          'prompt_length': work.prompt_length,
          'completion_length': work.completion_length,
          'dtype': dtype,
          'learning_rate': 1e-5,
          'threads': os.cpu_count(),
        }
        one = named[f'{peer} {dtype}'] = Peer(peer, python, job)
        work.show(f'{peer} {dtype} warms up')
        one.ready()  # one at a time: they share the machine
    seconds = in_turn(own | named, work)
    return seconds, {who: peer.versions for who, peer in named.items()}
  finally:
    for peer in named.values():
      peer.close()
