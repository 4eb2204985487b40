"""Thresholds, scales, and weights that change by step."""

import asyncio
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_door import TINY

from jaxrl_tok import Task, rewards, train
from jaxrl_tok.rewards import (
  RewardError,
  TrainerState,
  gated,
  name_rewards,
  product,
  ramp,
  rescaled,
  threshold,
  weight_at,
)
from jaxrl_tok.rewards.functions import describe_weights
from jaxrl_tok.step.device_rewards import on_device

pytestmark = pytest.mark.usefixtures('one_device', 'few_programs')


def size(completions):
  return [None if c == 'n' else float(len(c)) for c in completions]


def by_token(completion_ids):
  return [[float(i) for i in ids] for ids in completion_ids]


TEXTS = ['', 'a', 'ab', 'abcd', 'n']


def test_thresholds_by_hand():
  enough = threshold(size, 2)
  assert enough.__name__ == 'size_from_2'
  assert enough(completions=TEXTS) == [0, 0, 1, 1, None]
  assert gated(enough, size)(completions=TEXTS) == [0, 0, 2, 4, None]
  with pytest.raises(ValueError, match='a threshold takes one for each'):
    threshold(by_token, 1)(completion_ids=[[1, 2]])


def test_scales_by_hand():
  scaled = rescaled(size, 1, 3)
  assert scaled.__name__ == 'size'
  assert scaled(completions=TEXTS) == [0, 0, 0.5, 1, None]
  with pytest.raises(ValueError, match=r'a scale takes .* its \.outcome'):
    rescaled(by_token, 0, 4)(completion_ids=[[1, 8]])
  assert product(scaled, size)(completions=['abcd']) == [4]
  with pytest.raises(ValueError, match='pass low < high'):
    rescaled(size, 1, 1)


def const(value, name='given'):
  """Reward function of a name that gives a value for every completion."""

  def f(completions):
    return [value] * len(completions)

  f.__name__ = name
  return f


MAKERS = {
  'gate': lambda f: gated(f, size),
  'gated': lambda f: gated(size, f),
  'product': lambda f: product(size, f),
  'threshold': lambda f: threshold(f, 0.5),
  'rescaled': lambda f: rescaled(f, 0, 1),
}


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
  'wrong',
  [math.nan, math.inf, '0', 'a', b'1', {}, {'a': 1}, {1}, object(), 10**400,
   [math.nan], ['0'], [[1.0]]],
  ids=lambda x: repr(x)[:9],
)  # fmt: skip
def test_what_scoring_refuses_is_refused_inside_a_combination(make, wrong):
  """By the name of the function and the completion, in one line, as alone."""
  with pytest.raises(ValueError, match='reward function given gave') as e:
    make(const(wrong))(completions=['ab'])
  assert 'for completion 0' in str(e.value)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize('wrong', [None, 'ab', {'a': 1, 'b': 2}, 1.0, [1.0]])
def test_no_list_of_rewards_is_refused_inside_a_combination(make, wrong):
  def given(completions):
    return wrong

  with pytest.raises(ValueError, match='reward function given returned'):
    make(given)(completions=['ab', 'b'])


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize('one', [1, True, np.float32(1), np.array(1.0)])
def test_numbers_of_every_kind_are_rewards_inside_a_combination(make, one):
  (want,) = make(const(1.0))(completions=['a'])
  assert make(const(one))(completions=['a']) == [want]
  given = product(const(np.array([1.0, 2.0])), const(2))
  assert given(completions=['a']) == [[2.0, 4.0]]


async def later(completions):
  return size(completions)


def test_coroutines_may_be_scaled():
  assert asyncio.run(rescaled(later, 0, 4)(completions=['ab'])) == [0.5]


# --- weights


def at(weight, step) -> float:
  return weight_at(weight, 'f', TrainerState(step, 100, 0.5))


def test_ramps_are_linear_between_their_points():
  weight = ramp((10, 1.0), (20, 0.0), (40, 2.0))
  steps = 0, 10, 15, 20, 30, 40, 1000
  assert [at(weight, s) for s in steps] == [1, 1, 0.5, 0, 1, 2, 2]
  assert at(ramp((5, 0.3)), 0) == at(ramp((5, 0.3)), 9) == 0.3
  assert describe_weights({'f': weight, 'g': 0.5}) == {
    'f': 'ramp((10, 1), (20, 0), (40, 2))',
    'g': 0.5,
  }
  for points in ((), ((1, 0), (1, 1)), ((2, 0), (1, 1))):
    with pytest.raises(ValueError, match='pass points'):
      ramp(*points)
  with pytest.raises(ValueError, match='weight of reward a ramp is nan'):
    ramp((0, float('nan')))


def test_any_function_of_the_state_is_a_weight():
  functions, weights = name_rewards({size: lambda s: s.epoch, by_token: 2})
  assert list(functions) == ['size', 'by_token']
  assert [at(w, 0) for w in weights.values()] == [0.5, 2]


@pytest.mark.parametrize(
  ('weight', 'kind', 'says'),
  [
    (lambda state: 'much', ValueError, "weight of reward f is 'much'; give a"),
    (lambda state: None, ValueError, 'weight of reward f is None'),
    (lambda state: float('inf'), ValueError, 'weight of reward f is inf'),
    (lambda state: len, ValueError, 'weight of reward f gives a function'),
    (lambda: 1, RewardError, 'weight of reward f raises TypeError'),
    (lambda state: state.steps, RewardError, 'raises AttributeError'),
  ],
)
def test_weights_that_are_none_are_one_line(weight, kind, says):
  with pytest.raises(kind) as e:
    at(weight, 0)
  assert says in str(e.value)
  assert '\n' not in str(e.value)


RECORDS = [
  {'prompt': f'{i:03d}', 'reference': [f'{i}', 'cat']} for i in range(40)
]


def run(tmp_path, given, **changes):
  settings = {**TINY, 'held_out': 8, 'max_steps': 3, **changes}
  task = Task(RECORDS, given, metrics=[rewards.corpus_chrf()])
  return train(task, output_dir=tmp_path / 'run', **settings)


def test_a_run_weighs_its_rewards_by_step(tmp_path):
  def one(completions):
    return [1.0] * len(completions)

  weights = {one: ramp((0, 1.0), (2, 0.0)), rewards.chrf(): 1.0}
  result = run(tmp_path, weights)
  steps = [row for row in result.metrics if row['phase'] == 'train']
  assert [row['rewards/one/weight'] for row in steps] == [1, 0.5, 0]
  for row in steps:
    total = row['rewards/one/weight'] + row['rewards/chrf/mean']
    assert row['reward'] == pytest.approx(total, rel=1e-5)
    assert 'rewards/chrf/weight' not in row
  config = yaml.safe_load(Path(tmp_path, 'run/config.yaml').read_text())
  assert config['rewards'] == {'one': 'ramp((0, 1), (2, 0))', 'chrf': 1.0}
  assert config['signatures'] == {
    'chrf': rewards.chrf().signature,
    'corpus_chrf': rewards.corpus_chrf().signature,
  }
  held_out = [row for row in result.metrics if row['phase'] == 'eval']
  assert all(0 <= row['eval/chrf'] <= 100 for row in held_out)


def test_many_steps_in_one_program_have_one_weight(tmp_path):
  @on_device
  def zero(rollout):
    return rollout.logp * 0

  each = dict.fromkeys(('steps_per_call', 'eval_every', 'save_every'), 3)
  with pytest.raises(ValueError, match='pass --steps_per_call 0') as e:
    run(tmp_path, {zero: ramp((0, 1))}, **each)
  assert 'the weight of reward zero changes by step' in str(e.value)
  assert not (tmp_path / 'run').exists()


def test_weights_that_fail_stop_a_run_before_it_begins(tmp_path):
  with pytest.raises(RewardError, match='weight of reward size raises'):
    run(tmp_path, {size: lambda: 1})
  assert not (tmp_path / 'run').exists()
