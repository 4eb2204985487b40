"""Metrics of a batch mean what TRL's of equal names mean: NumPy as witness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_rollout, make_scored, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok.step.metrics import (
  length_metrics,
  reward_metrics,
  value_metrics,
)

G, T = 3, 2
measure = jax.jit(reward_metrics)


def measured(R, valid=None, size=G):
  """Metrics of a batch with one outcome reward R [B], in groups of `size`."""
  B = len(R)
  prompts = random_prompts(C=B // size)
  rollout = make_rollout(prompts, np.ones((B, T)), np.ones((B, T)))
  reward = np.stack([np.zeros(B), R], axis=1)
  found = measure(make_scored(rollout, reward, applies=valid))
  return {name: float(value) for name, value in found.items()}


def by_trl(R, valid):
  """TRL's numbers, with 0 for its NaN of a lone row: a row that no reward
  applies to is NaN, and every statistic leaves it out."""
  x = np.where(valid, R, np.nan).astype(np.float64)
  rows = x[~np.isnan(x)]
  groups = [g[~np.isnan(g)] for g in x.reshape(-1, G)]
  spread = [g.std(ddof=1) for g in groups if len(g) > 1]
  same = [len(set(g)) == 1 for g in groups if len(g)]
  return {
    'reward': rows.mean() if len(rows) else 0,
    'reward_std': rows.std(ddof=1) if len(rows) > 1 else 0,
    'reward_group_std': np.mean(spread) if spread else 0,
    'frac_reward_zero_std': np.mean(same) if same else 0,
    'frac_not_valid': 1 - np.mean(valid),
  }


@settings(max_examples=60)
@given(
  st.lists(
    st.tuples(st.sampled_from([-2.0, 0.0, 0.1, 0.7, 1.0, 30.0]), st.booleans()),
    min_size=4 * G,
    max_size=4 * G,
  )
)
def test_statistics_of_rewards_are_those_of_trl(rows):
  R, valid = (np.array(x) for x in zip(*rows))
  found = measured(R, valid)
  for name, value in by_trl(R.astype(np.float32), valid).items():
    assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
  assert found['rewards/reward/mean'] == found['reward']
  assert found['rewards/reward/std'] == found['reward_std']


@pytest.mark.parametrize('size', [2, 3, 6])
@pytest.mark.parametrize('value', [1234.567, 1e5, -1e-7, 0.1, 1e15])
def test_equal_rewards_are_equal_whatever_they_are(value, size):
  R = np.full(6, value, np.float32)
  assert measured(R, size=size)['frac_reward_zero_std'] == 1
  R[0] = np.nextafter(R[0], np.float32(0))
  other = measured(R, size=size)['frac_reward_zero_std']
  assert other == pytest.approx(1 - size / 6)


def test_one_sample_a_prompt_has_the_spread_of_the_batch():
  R = np.array([0.0, 1.0, 5.0, 2.0])
  found = measured(R, size=1)
  assert found['reward_std'] == pytest.approx(R.std(ddof=1))
  assert found['reward_group_std'] == pytest.approx(R.std(ddof=1))
  assert found['frac_reward_zero_std'] == 0


def test_lengths_of_all_completions_and_of_those_that_ended():
  lengths, ended = np.array([1, 4, 6, 2, 6, 5]), np.array([1, 1, 0, 1, 0, 1])
  mask = np.arange(6)[None] < lengths[:, None]
  rollout = make_rollout(
    random_prompts(C=3), np.ones((6, 6)), mask, ended=jnp.array(ended, bool)
  )
  found = length_metrics(rollout)
  for kind, x in (
    ('length', lengths),
    ('terminated_length', lengths[ended > 0]),
  ):
    for name, f in (('mean', np.mean), ('min', np.min), ('max', np.max)):
      assert found[f'completions/{name}_{kind}'] == pytest.approx(f(x))
  assert found['completions/tokens'] == lengths.sum()
  assert found['completions/clipped_ratio'] == pytest.approx(2 / 6)
  none = length_metrics(rollout._replace(ended=jnp.zeros(6, bool)))
  for name in ('mean', 'min', 'max'):
    assert none[f'completions/{name}_terminated_length'] == 0
  assert none['completions/clipped_ratio'] == 1


def test_value_metrics():
  rng = np.random.default_rng(0)
  target = rng.normal(size=(4, 3)).astype(np.float32)
  mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], bool)
  value = np.where(mask, 0.5 * target, np.nan)
  found = value_metrics(jnp.asarray(value), jnp.asarray(target), mask)
  assert float(found['explained_variance']) == pytest.approx(0.75, abs=1e-5)
  same = jnp.ones((4, 3))
  assert float(value_metrics(same, same, mask)['explained_variance']) == 0
