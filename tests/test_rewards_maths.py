"""math-verify in a process with a deadline."""

import os
import signal

import pytest

from jaxrl_tok import rewards
from jaxrl_tok.rewards import math_worker
from jaxrl_tok.rewards.workers import Answer, Failure, Limits, Workers

HANGS = '$10^{10^{10^{10}}}$'


@pytest.fixture(scope='module')
def equal():
  return rewards.math_equal(deadline=3.0)


@pytest.mark.parametrize(
  ('text', 'answer', 'value'),
  [
    (r'It is $\frac{2}{4}$', '1/2', 1),
    (r'so \boxed{0.5}', r'\frac{1}{2}', 1),
    ('72', 72, 1),
    ('$x^2+2x+1$', '(x+1)^2', 1),
    (r'$\{1,2\}$', r'\{2,1\}', 1),
    (r'$\sqrt{8}$', r'$2\sqrt{2}$', 1),
    ('x = 3', '3', 1),
    ('3', ['4', '3'], 1),
    (r'\boxed{1} or \boxed{2}', '2', 0),  # a set
    ('$(1,2)$', '(2, 1)', 0),
    ('2', '3', 0),
    ('', '3', 0),
    ('3', '', None),
    ('3', None, None),
  ],
)
def test_answers_by_hand(equal, text, answer, value):
  assert equal(completions=[text], answer=[answer]) == [value]


@pytest.mark.parametrize(
  ('gold', 'said', 'equal', 'is_polynomial'),
  [
    ('2(x+3)', '2x+6', True, True),
    ('2(x+3)', '2x+5', False, True),
    ('x-(y-1)', 'x-y+1', True, True),
    (r'\frac{x+y}{2}', '(y+x)/2', True, True),
    (r'3\cdot x^2', 'xx', False, True),
    ('(x+y)^8', '(y+x)^8', True, True),
    ('x', 'y', False, True),
    ('x+3', '3', False, False),
    ('x^9', 'x^9', True, False),
    ('0.5x', 'x/2', True, False),
    (r'\frac{2}{x}', '2/x', True, False),
    ('2^x', '2^x', True, False),
  ],
)
def test_polynomials_are_decided_as_math_verify_does(
  gold, said, equal, is_polynomial
):
  from math_verify import verify

  gold, said = (math_worker.read(f'${text}$') for text in (gold, said))
  assert math_worker.same(gold, said) == equal
  assert verify(gold, said, timeout_seconds=None) == equal
  both = all(map(math_worker.is_polynomial, (gold, said)))
  assert both == is_polynomial


@pytest.mark.parametrize(
  ('gold', 'said', 'equal'),
  [
    (r'6\cdot 2+\frac{z}{2}', r'6\cdot 2+z/2', True),
    (r'6\cdot 2+z', '12+z', True),
    (r'6\cdot 2+z', '11+z', False),
    ('x', 'z-z+x', True),
    ('x', 'x+x-x', True),
    ('z', r'\frac{z\cdot 2}{2}', True),
    (r'(2+3)\cdot x', '5x', True),
    (r'x-2\cdot 3+6', 'x', True),
    (r'x-2\cdot 3+6', 'x+1', False),
  ],
)
def test_what_is_not_evaluated_yet_is_equal(gold, said, equal):
  """Sums and products of numbers, and letters that cancel."""
  gold, said = (math_worker.read(f'${text}$') for text in (gold, said))
  assert math_worker.same(gold, said) == equal


def test_a_deadline_concerns_one_completion(equal):
  """Without a deadline this would not end."""
  logged = {}
  values = equal(
    completions=['3', HANGS, [{'role': 'assistant', 'content': '4'}]],
    answer=['3', '5', '4'],
    log_metric=logged.__setitem__,
  )
  assert values == [1, 0, 1]
  assert logged == {'math_timeouts': 1}


def test_a_worker_that_is_killed_is_started_again():
  with Workers(math_worker.equal, Limits(20), name='math_equal') as workers:
    (worker,) = workers.all
    question = ['3'], '3'
    assert workers.ask([question]) == [Answer(True)]
    os.killpg(worker.process.pid, signal.SIGKILL)
    (failure,) = workers.ask([question])
    assert failure == Failure('ended', 'ended its process (signal SIGKILL)')
    assert workers.ask([question]) == [Answer(True)]
    process = worker.process
  assert process.returncode == -signal.SIGKILL


def test_columns_and_settings_are_checked():
  reward = rewards.math_equal(column='solution')
  rewards.check_functions({'math_equal': reward}, ['prompt', 'solution'])
  with pytest.raises(ValueError, match='asks for solution'):
    rewards.check_functions({'math_equal': reward}, ['prompt', 'answer'])
  for wrong in ({'deadline': 0}, {'workers': 0}):
    with pytest.raises(
      ValueError, match='pass a deadline above 0 and 1 worker'
    ):
      rewards.math_equal(**wrong)
