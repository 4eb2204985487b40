"""Episodes side by side: deadlines, errors, order."""

import functools
import math
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from counting_episodes import Count
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok.environments import EpisodeError, Stepper, Turn


class Returns:
  """Returns what its example has."""

  def reset(self, seed, example):
    self.found = example['step']
    return example.get('reset', ('', {}))

  def step(self, action):
    if isinstance(self.found, Exception):
      raise self.found
    return self.found


class Hangs:
  """Hangs at the action 'hang', until it is released."""

  release = threading.Event()

  def reset(self, seed, example):
    return '', {}

  def step(self, action):
    if action == 'hang':
      self.release.wait()
    return action, 1.0, False, False, {}


def play(stepper, seeds, actions):
  """Turns of each row under rows of actions, without their seconds."""
  found = [[t._replace(seconds=0.0)] for t in stepper.reset(*seeds)]
  for column in zip(*actions):
    live = {i: a for i, a in enumerate(column) if not found[i][-1].ended}
    for row, turn in stepper.step(live).items():
      found[row].append(turn._replace(seconds=0.0))
  return found


def starts(n):
  return list(range(n)), [{'start': f's{i}'} for i in range(n)]


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 12), st.integers(0, 99), st.integers(1, 6))
def test_turns_are_those_of_one_thread(rows, seed, workers):
  """Threads that finish in another order change nothing."""
  rng = random.Random(seed)
  actions = [
    [str(rng.choice((0, 0, 0.002))) for _ in range(3)] for _ in range(rows)
  ]
  with (
    Stepper(Count, workers=workers) as many,
    Stepper(Count, workers=1) as one,
  ):
    found = play(many, starts(rows), actions)
    assert found == play(one, starts(rows), actions)
  assert all(row[-1].ended == 'terminated' for row in found)
  assert [t.reward for t in found[0]] == [0, 1, 2, 3]


def test_equal_seeds_are_equal_episodes_and_examples_stay_whole():
  example = {'start': 'a'}
  with Stepper(Count) as stepper:
    first, second, other = stepper.reset([7, 7, 8], [example] * 3)
    turns = stepper.step({0: '0', 2: '0', 1: '0'})
  assert first.observation == second.observation != other.observation
  assert list(turns) == [0, 2, 1]
  assert turns[0]._replace(seconds=0) == turns[1]._replace(seconds=0)
  assert example == {'start': 'a'}


def test_rows_that_have_ended_take_no_action():
  with Stepper(Count) as stepper:
    stepper.reset(*starts(2))
    for _ in range(3):
      turns = stepper.step({0: '0'})
    assert turns[0].ended == 'terminated'
    with pytest.raises(ValueError, match='row 0 has no episode') as e:
      stepper.step({0: '0', 1: '0'})
    assert '\n' not in str(e.value)
    stepper.step({1: '0'})
    assert stepper.reset(*starts(1))[0].ended == ''  # all rows are new


def test_episodes_are_closed_once():
  Count.closed.clear()
  with Stepper(Count) as stepper:
    stepper.reset(*starts(3))
    for _ in range(3):
      stepper.step({0: '0'})
    assert len(Count.closed) == 1
    stepper.reset(*starts(2))
    assert len(Count.closed) == 3
  assert len(Count.closed) == 5


def test_a_turn_that_hangs_ends_at_its_deadline():
  """Later turns wait for nothing, also where every thread is stuck."""
  Hangs.release.clear()
  with Stepper(Hangs, deadline=0.15, workers=2) as stepper:
    stepper.reset(*starts(5))
    begin = time.monotonic()
    turns = stepper.step({0: 'hang', 1: 'a', 2: 'hang', 3: 'hang', 4: 'b'})
    assert time.monotonic() - begin < 2
    assert {i: t.ended for i, t in turns.items()} == {
      0: 'deadline',
      1: '',
      2: 'deadline',
      3: 'deadline',
      4: '',
    }
    assert turns[0].reward == 0
    assert turns[0].seconds == 0.15
    assert turns[0].info['error'] == (
      'environment Hangs took longer than 0.15 s at turn 1 (row 0, seed 0)'
    )
    assert turns[4].observation == 'b'
    begin = time.monotonic()
    assert stepper.step({1: 'c', 4: 'd'})[4].observation == 'd'
    assert time.monotonic() - begin < 0.1
  Hangs.release.set()


def test_a_hanging_thread_does_not_hold_up_the_end_of_a_program():
  code = (
    'import time\n'
    'from jaxrl_tok.environments import Stepper\n'
    'class Stuck:\n'
    '  def reset(self, seed, example):\n'
    '    time.sleep(99)\n'
    'print(Stepper(Stuck, 0.1).reset([0], [{}])[0].ended)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    check=False,
    capture_output=True,
    text=True,
    timeout=30,
  )
  assert (done.stdout, done.stderr) == ('deadline\n', '')


def step_error(found, **more) -> str:
  with Stepper(Returns, **more) as stepper:
    stepper.reset([3], [{'step': found}])
    with pytest.raises(EpisodeError) as e:
      stepper.step({0: 'go'})
  assert '\n' not in str(e.value)
  return str(e.value)


@pytest.mark.parametrize(
  ('found', 'said'),
  [
    (None, 'step of environment Returns at turn 1 (row 0, seed 3) returned'),
    (('', 0.0, True, {}), 'returned 4 values; return 5: observation, reward'),
    (('', None, True, False, {}), 'the reward of environment Returns'),
    (('', math.nan, True, False, {}), 'is nan; return a finite number'),
    (('', '1', True, False, {}), "is '1'; return a finite number"),
    (('', np.ones(2), True, False, {}), 'return a finite number'),
    ((7, 0.0, True, False, {}), 'the observation of environment Returns'),
    (([{'role': 'x', 'content': ''}], 0, True, False, {}), "role 'x'"),
    (('', 0, 'yes', False, {}), 'terminated of environment Returns'),
    (('', 0, False, None, {}), 'truncated of environment Returns'),
    (('', 0, False, False, None), 'info of environment Returns'),
    (('', 0, False, False, {'rewards': {1: 'a'}}), 'the reward of seat 1'),
    (
      KeyError('door'),
      "environment Returns at turn 1 (row 0, seed 3) on the action 'go': "
      "KeyError: 'door'; mend it, or",
    ),
  ],
)
def test_wrong_answers_are_refused_in_a_line(found, said):
  assert said in step_error(found)


def test_wrong_resets_are_refused_in_a_line():
  with Stepper(Returns) as stepper:
    with pytest.raises(EpisodeError, match='return 2: observation, info') as e:
      stepper.reset([0], [{'step': 0, 'reset': ('a', {}, 1)}])
    assert 'at its reset (row 0' in str(e.value)
  with pytest.raises(ValueError, match='pass a function that makes one'):
    Stepper(Returns())


def test_numbers_of_numpy_are_numbers():
  found = ('', np.float32(0.5), np.bool_(True), np.bool_(False), {})
  with Stepper(Returns) as stepper:
    stepper.reset([0], [{'step': found}])
    turn = stepper.step({0: ''})[0]
  assert (turn.reward, turn.ended, type(turn.reward)) == (
    0.5,
    'terminated',
    float,
  )


def test_errors_end_their_episodes_where_asked():
  good = ('on', 1.0, False, False, {})
  with Stepper(Returns, on_error='end') as stepper:
    stepper.reset(
      [0, 1, 2], [{'step': s} for s in (ValueError('no'), good, (1, 2))]
    )
    turns = stepper.step({0: 'a', 1: 'a', 2: 'a'})
    assert [t.ended for t in turns.values()] == ['error', '', 'error']
    assert turns[0].reward == 0
    assert 'ValueError: no' in turns[0].info['error']
    assert stepper.step({1: 'a'})[1].observation == 'on'


def test_the_first_row_in_error_is_told():
  with Stepper(Returns, workers=4) as stepper:
    stepper.reset([0, 1, 2], [{'step': OSError(str(i))} for i in range(3)])
    with pytest.raises(EpisodeError, match=r'row 1.*OSError: 1') as e:
      stepper.step({1: 'a', 0: 'a', 2: 'a'})
  assert 'in step' in e.value.traceback


def test_processes_answer_as_threads_do_and_can_be_killed():
  actions = [['0', '0', '0'], ['0', '30', '0']]
  with Stepper(Count, deadline=0.5, processes=True) as stepper:
    found = play(stepper, starts(2), actions)
    with Stepper(Count) as threads:
      own = play(threads, starts(2), [['0'] * 3] * 2)
    assert found[0] == own[0]
    assert found[1][:2] == own[1][:2]
    assert found[1][2].ended == 'deadline'
    again = play(stepper, starts(2), [['0'] * 3] * 2)  # one process is new
    assert again == own
    stepper.reset(*starts(1))
    with pytest.raises(EpisodeError, match='its process ended, exit code 3'):
      stepper.step({0: 'exit'})
    processes = [e.process for e in stepper.idle]
  assert not any(p.is_alive() for p in processes if p)


def test_a_maker_that_no_process_can_import_is_told():
  with (
    Stepper(lambda: None, processes=True) as stepper,
    pytest.raises(ValueError, match='lambda cannot be made in a process'),
  ):
    stepper.reset([0], [{}])


def test_settings_of_a_stepper_are_checked():
  with pytest.raises(ValueError, match='both are above 0'):
    Stepper(Count, deadline=0)
  with pytest.raises(ValueError, match='raise, end'):
    Stepper(Count, on_error='skip')
  with pytest.raises(ValueError, match='2 seeds for 1 examples'):
    Stepper(functools.partial(Count)).reset([0, 1], [{}])


def test_a_turn_is_plain_data():
  assert Turn('', 0.0, '', {}, 0.0)._fields == (
    'observation',
    'reward',
    'ended',
    'info',
    'seconds',
  )
