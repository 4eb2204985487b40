"""Counts of records that are asked for, and as many as there are."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import (
  arithmetic,
  code,
  formulas,
  news,
  opinions,
  poems,
  sentences,
  spelling,
  translate,
)
from jaxrl_tok import Task
from jaxrl_tok.data import draw_different
from jaxrl_tok.run.inputs import rewards_of
from jaxrl_tok.run.settings import Settings


def one_line(error) -> str:
  assert '\n' not in str(error.value)
  return str(error.value)


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 9))
def test_as_many_are_drawn_as_there_are_or_none(kinds, count, seed):
  rng = random.Random(seed)

  def draw():
    key = rng.randrange(2 * kinds)
    return None if key >= kinds else (key, rng.random())

  if count <= kinds:
    found = draw_different(draw, count, '--x')
    assert len(found) == count
    assert set(found) <= set(range(kinds))
  else:
    with pytest.raises(ValueError, match=f'--x .* are about {kinds};') as e:
      draw_different(draw, count, '--x')
    one_line(e)


@pytest.mark.parametrize(
  ('task', 'flag'),
  [
    (arithmetic.arithmetic, 'num_problems'),
    (code.code, 'num_problems'),
    (formulas.formulas, 'num_problems'),
    (formulas.formulas, 'depth'),
    (news.news, 'num_items'),
    (opinions.opinions, 'num_prompts_drawn'),
    (poems.poems, 'num_openings'),
    (sentences.sentences, 'num_requests'),
    (spelling.spelling, 'num_texts'),
    (spelling.spelling, 'words'),
    (translate.translate, 'num_pairs'),
  ],
)
@pytest.mark.parametrize('count', [0, -5])
def test_a_count_below_one_is_named(task, flag, count):
  with pytest.raises(ValueError, match='must be at least 1') as e:
    task(**{flag: count})
  assert one_line(e) == f'--{flag} {count} must be at least 1'


def test_more_than_there_are_is_one_line():
  with pytest.raises(ValueError, match='--depth 1, --num_problems 20000') as e:
    formulas.problems(1, 20_000, 128)
  assert 'there are about' in one_line(e)
  train, tests = formulas.problems(1, 80, 20)
  assert len({r['prompt'] for r in train + tests}) == 100


def one(completions):
  return [1.0] * len(completions)


def two(completions):
  return [2.0] * len(completions)


def test_weights_that_are_all_zero_leave_nothing_to_learn():
  records = [{'prompt': 'a'}]
  for given_rewards in ({one: 0}, {one: 0.0, two: 0}):
    with pytest.raises(ValueError, match='has the weight 0') as e:
      rewards_of(Task(records, given_rewards), Settings())
    assert 'one' in one_line(e)
  limited = Task(records, {one: 0}, constraints={two: '<=1'})
  for task in (
    Task(records, {one: 0, two: 1}),
    Task(records, {one: lambda state: 0.0}),
    limited,
  ):
    assert rewards_of(task, Settings()).weights
