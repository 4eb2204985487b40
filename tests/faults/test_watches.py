"""Faults 16 and 27: numbers that leave their limits, steps that hang. Nothing
is compiled here."""

import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_tok.run import flags
from jaxrl_tok.watch import FEWEST, Hang, Limits, Seen, watch, watched


def rows(name, numbers):
  return [
    {'phase': 'train', 'step': i, name: x} for i, x in enumerate(numbers, 1)
  ]


def first_reason(found, limits):
  """(step, state, reason) of the first row at which a run has diverged."""
  seen = Seen()
  for row in found:
    seen, reason = watch(seen, row, limits)
    if reason:
      return row['step'], seen, reason
  return None


def test_16_kl_above_its_limit_in_a_row():
  limits = Limits(max_kl=10.0)
  numbers = [1, 30, 40, 9, 20, None, 11, 12, 13]
  step, seen, reason = first_reason(rows('kl', numbers), limits)
  assert (step, seen.since) == (8, 5)
  assert reason == 'kl 12 is above --max_kl 10, in 3 steps in a row'


def test_16_entropy_below_its_floor():
  limits = Limits(min_entropy=0.1, steps=2)
  step, seen, reason = first_reason(rows('entropy', [2, 0.0, 0.0]), limits)
  assert (step, seen.since) == (3, 2)
  assert reason == 'entropy 0 is below --min_entropy 0.1, in 2 steps in a row'


def test_16_a_gradient_far_above_its_running_median():
  """It does not become its own median; zeros, without an advantage, are none of
  it."""
  limits = Limits(max_grad_ratio=100.0)
  numbers = [*[1.0, 0.0] * FEWEST, 1.0, 500.0, 600.0, 700.0]
  step, _, reason = first_reason(rows('grad_norm', numbers), limits)
  assert step == len(numbers)
  assert reason == (
    'grad_norm 700 is 700 times its running median, above --max_grad_ratio '
    '100, in 3 steps in a row'
  )
  few = [*[1.0] * (FEWEST - 1), 500.0, 600.0, 700.0]
  assert first_reason(rows('grad_norm', few[:FEWEST]), limits) is None


@given(
  st.lists(st.sampled_from([None, 0.5, 5.0, 50.0]), max_size=12),
  st.integers(1, 4),
)
def test_the_watch_ends_at_the_first_k_in_a_row(numbers, k):
  """By a second way of counting; without a limit it never ends, and its state
  is that of a resumed run's."""
  found, known = rows('kl', numbers), [x for x in numbers if x is not None]
  ends = [i for i in range(k, len(known) + 1) if min(known[i - k : i]) > 10]
  first = first_reason(found, Limits(max_kl=10.0, steps=k))
  assert (first is None) == (not ends)
  if ends:
    steps = [i for i, x in enumerate(numbers, 1) if x is not None]
    assert first[0] == steps[ends[0] - 1]
    assert first[1].since == steps[ends[0] - k]
  assert first_reason(found, Limits()) is None
  seen = Seen()
  for row in found:
    seen, _ = watch(seen, row, Limits(max_kl=10.0, steps=k))
  evaluations = [{'phase': 'eval', 'step': 1, 'kl': 99.0}]
  assert watched([*evaluations, *found], Limits(10.0, steps=k)) == seen


PROGRAM = """
import time
from jaxrl_tok.watch import Hang
def waits_for_ever():
  time.sleep(1000)
with Hang(0.4) as hang:
  hang.begin('step 7')
  waits_for_ever()
"""


def test_27_a_step_that_hangs_ends_with_its_stack():
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM],
    check=False,
    capture_output=True,
    text=True,
    timeout=60,
    env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
  )
  assert done.returncode == 75
  assert 'in waits_for_ever' in done.stderr
  assert done.stderr.splitlines()[-1] == (
    'error: step 7 took longer than --step_timeout 0.4 s, and hangs where the '
    'stacks above end; start it again with --resume auto'
  )


def test_each_phase_has_all_of_the_time():
  left = []
  with Hang(0.4, left.append) as hang:
    for i in range(6):
      hang.begin(f'step {i}')
      time.sleep(0.1)
  with Hang(0.0, left.append) as hang:
    hang.begin('step')
  assert left == []


@pytest.mark.parametrize(
  ('given', 'said'),
  [
    (['--max_kl=-1'], '--max_kl -1.0 must be 0 or more'),
    (['--divergence_steps=0'], '--divergence_steps 0 must be at least 1'),
    (
      ['--on_divergence=rollback'],
      '--on_divergence is of a limit, and there is none; pass --max_kl, '
      '--min_entropy or --max_grad_ratio, or leave it out',
    ),
    (
      ['--reward_timeout=5'],
      '--reward_timeout is of --reward_workers, and there are none; pass '
      '--reward_workers 2, or leave it out',
    ),
    (['--reward_workers=-1'], '--reward_workers -1 must be 0 or more'),
    (
      ['--reward_timeout=0', '--reward_workers=1'],
      '--reward_timeout 0.0 must be above 0',
    ),
    (['--output_dir='], '--output_dir is empty; name a directory, or leave it'),
  ],
)
def test_26_flags_of_watches_and_workers(capsys, given, said):
  with pytest.raises(SystemExit) as e:
    flags.parse(flags.Settings(), None, 'run', given)
  assert e.value.code == 2
  assert said in capsys.readouterr().err
