"""Faults 18 and 19: rewards that fail, hang, exit, fork or take memory, in
workers. Nothing is compiled here."""

import os
import signal
import subprocess
import sys
import time

import misbehaving
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from misbehaving import WAYS

from jaxrl_tok.rewards import isolated, load_rewards, make_scorer
from jaxrl_tok.rewards.calls import call_all
from jaxrl_tok.rewards.isolated import in_workers, shares
from jaxrl_tok.rewards.worker_main import tagged
from jaxrl_tok.rewards.workers import Failure, Limits, Workers, memory_of

FUNCTIONS = {
  name: getattr(misbehaving, name)
  for name in ('obeying', 'later', 'by_group', 'odd_values')
}
SECONDS = 1.5


@pytest.fixture(scope='module')
def pool():
  """Reward functions in two workers: (functions, Workers)."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(isolated, 'ALONE', 0.4)
    found, pool = in_workers(FUNCTIONS, Limits(SECONDS, 1 << 30), 2)
    with pool:
      yield found, pool


def decode(rows, skip_special_tokens=True):
  return [''.join(map(chr, row)) for row in rows]


def scored(functions, texts, G=1, **more):
  """HostScores of texts, and the warnings."""
  T, warned = max(map(len, texts)), []
  tokens = np.zeros((len(texts), T), int)
  mask = np.zeros((len(texts), T), bool)
  for b, text in enumerate(texts):
    tokens[b, : len(text)], mask[b, : len(text)] = list(map(ord, text)), True
  examples = [{'prompt': f'p{i}'} for i in range(len(texts) // G)]
  score = make_scorer(
    functions, decode, [], warn=lambda name, text: warned.append(text), **more
  )
  return score(tokens, mask, examples), warned


@pytest.mark.parametrize('way', WAYS)
def test_19_a_way_fails_its_completion_alone(pool, way):
  """The others are scored, children are gone, the next batch is right."""
  functions, pool = pool
  tags = [worker.tag for worker in pool.all]
  obeying, said = {'obeying': functions['obeying']}, WAYS[way][1]
  texts = ['a', 'bb', way, 'dddd']
  found, warned = scored(obeying, texts, 2, on_error='mask')
  failed = bool(said)
  assert found.applies['obeying'].tolist() == [True, True, not failed, True]
  values = found.rewards['obeying'].sum(1).tolist()
  assert values == [1, 2, 0 if failed else len(way), 4]
  assert found.metrics['rewards/obeying/errors'] == failed
  killed = found.metrics['rewards/obeying/killed']
  assert (killed > 0) == ('took' in said or 'ended' in said)
  if failed:
    assert f'reward obeying {said}' in warned[0]
    assert f"on completion 2 ('{way}' of prompt 'p1'); mend it" in warned[0]
    assert '\n' not in warned[0]
  for tag in set(tags) - {worker.tag for worker in pool.all}:
    assert tagged(tag) == []
  if way == 'exits':  # raise: before the step is lost
    with pytest.raises(ValueError, match='or pass --reward_on_error mask') as e:
      scored(obeying, texts, 2)
    assert 'misbehaving.py' in e.value.traceback


def test_19_memory_of_children_counts():
  with Workers(slow_children, Limits(20.0, 300 << 20), name='f') as pool:
    (found,) = pool.ask([0])
  assert found == Failure('memory', 'took more than 0.293 GiB of memory')


def slow_children(question):
  misbehaving.lets_a_child_take_memory()


@given(
  st.lists(st.text('ab', min_size=1, max_size=4), min_size=1, max_size=4),
  st.sampled_from([1, 2, 3]),
  st.sampled_from(['later', 'by_group', 'obeying']),
)
@settings(max_examples=20)
def test_values_are_those_of_the_function_here(pool, texts, G, name):
  """Metrics that it logs come back, too; means are over calls."""
  texts = [text for text in texts for _ in range(G)]
  there = {name: pool[0][name]}
  here = {name: FUNCTIONS[name]}
  if name == 'by_group':  # each group by itself is what the law holds for
    texts = texts[:G]
  a, b = scored(there, texts, G)[0], scored(here, texts, G)[0]
  np.testing.assert_array_equal(a.rewards[name], b.rewards[name])
  np.testing.assert_array_equal(a.applies[name], b.applies[name])
  assert a.extra == b.extra
  assert a.metrics.keys() - {f'rewards/{name}/killed'} == b.metrics.keys()


@pytest.mark.parametrize('on_error', ['mask', 'zero'])
def test_18_values_that_are_none(pool, on_error):
  """Errors of a worker have the words of those in this process."""
  texts = ['none', 'nan', 'inf', 'text', 'dict', 'set', 'array', 'object', 'ok']
  found = [
    scored({'odd': f}, texts, on_error=on_error)
    for f in (pool[0]['odd_values'], misbehaving.odd_values)
  ]
  (a, said), (b, want) = found
  assert said == want
  np.testing.assert_array_equal(a.rewards['odd'], b.rewards['odd'])
  np.testing.assert_array_equal(a.applies['odd'], b.applies['odd'])
  assert a.metrics['rewards/odd/errors'] == 6


@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 9))
def test_shares_are_whole_groups_in_order(groups, G, count):
  found = shares(groups * G, G, count)
  assert [b for rows in found for b in rows] == list(range(groups * G))
  assert len(found) == max(min(count, groups), 1)
  for rows in found:
    assert len(rows) % G == 0


def local_function():
  lock = os.scandir('/')

  def holds(completions, **columns):
    return [lock]

  return holds


def test_a_function_that_cannot_be_sent_is_one_line():
  with pytest.raises(ValueError, match='reward holds cannot be sent') as e:
    in_workers({'holds': local_function()}, Limits(9), 1)
  assert '\n' not in str(e.value)
  assert str(e.value).endswith('or run it here (--reward_workers 0)')


def test_a_file_of_rewards_is_run_in_the_worker(tmp_path):
  file = tmp_path / 'mine.py'
  file.write_text(
    'import threading\nLOCK = threading.Lock()\n'
    'def one(completions, **columns):\n'
    '  with LOCK:\n    return [1.0] * len(completions)\n'
  )
  ((name, (function, _)),) = load_rewards([f'{file}:one']).items()
  found, pool = in_workers({name: function}, Limits(20), 1)
  with pool:
    assert scored(found, ['a', 'b'])[0].rewards[name].sum() == 2
  file.write_text('import no_such_module\n')
  with pytest.raises(ValueError, match=r'worker of .* does not start') as e:
    pool.__enter__()
  assert "No module named 'no_such_module'" in str(e.value)
  assert '\n' not in str(e.value)


PROGRAM = """
import os, signal, sys, time
from jaxrl_tok.rewards.isolated import in_workers
from jaxrl_tok.rewards.workers import Limits
def hang(completions, **columns):
  if os.fork() == 0:
    os.setsid()
    time.sleep(1000)
  print(os.getpid(), flush=True)
  while True:
    pass
functions, pool = in_workers({'hang': hang}, Limits(60.0), 1)
pool.__enter__()
print('tag', pool.all[0].tag, flush=True)
functions['hang'](completions=['a'])
"""


def test_19_workers_end_with_the_program():
  """Also one that spins, and its child that has left the group."""
  program = subprocess.Popen(
    [sys.executable, '-c', PROGRAM],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
  )
  tag = program.stdout.readline().split()[1]
  assert program.stderr.readline().strip().isdecimal()  # it hangs
  assert len(tagged(tag)) == 3
  program.send_signal(signal.SIGKILL)
  program.wait(30)
  end = time.monotonic() + 30
  while tagged(tag) and time.monotonic() < end:
    time.sleep(0.05)
  assert tagged(tag) == []
  program.stdout.close()
  program.stderr.close()


def test_memory_is_of_this_group():
  assert memory_of(os.getpgrp()) > 10 << 20


def test_errors_of_the_network_are_tried_again():
  """With back-off; others are not."""
  waited, tries = [], {'busy': 0, 'broken': 0, 'plain': 0}

  def fails(name, error, times):
    def call():
      tries[name] += 1
      if tries[name] <= times:
        raise error
      return name

    return call

  async def waits():
    return fails('busy', TimeoutError('slow'), 3)()

  calls = {
    'plain': fails('plain', KeyError('x'), 9),
    'busy': waits,
    'broken': fails('broken', ConnectionResetError(), 9),
  }
  found = call_all(calls, first_only=False, wait=waited.append)
  assert found['busy'] == 'busy'
  assert isinstance(found['broken'], ConnectionResetError)
  assert isinstance(found['plain'], KeyError)
  assert waited == [1.0, 2.0, 4.0]
  assert tries == {'busy': 4, 'broken': 4, 'plain': 1}
