"""The gradient lab measures what is trained, and measures it right."""

import json
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import greedy_outcomes, make_scored, random_reward

from experiments.studies.gradient_lab import __main__ as lab
from experiments.studies.gradient_lab import (
  measures,
  methods,
  samples,
)
from jaxrl_tok.run import warm_start
from jaxrl_tok.step import device_rewards
from jaxrl_tok.step.state import init_state
from jaxrl_tok.step.update import make_update

# hands out the gradient as the optimizer's state
RECORD = optax.GradientTransformation(
  lambda params: jax.tree.map(jnp.zeros_like, params),
  lambda g, s, p=None: (jax.tree.map(jnp.zeros_like, g), g),
)
METHODS = {m[:3]: m for m in methods.make_methods(max_length=9)}
GREEDY = np.array([0.5, -1.0, 0.25, 0.0], np.float32)


@pytest.fixture(scope='module')
def reward(tiny):
  return random_reward(tiny.rollout)


def drawn(tiny, reward) -> methods.Samples:
  """Samples whose rewards are alike."""
  B, T = tiny.rollout.mask.shape
  by_name = dict.fromkeys(methods.REWARDS, jnp.asarray(reward))
  greedy = dict.fromkeys(by_name, greedy_outcomes(GREEDY, T))
  return methods.Samples(tiny.rollout, by_name, greedy, jnp.zeros((B, T + 1)))


@pytest.fixture(scope='module')
def estimate(tiny):
  """weights [2, B, T] -> (estimates [2, W], squared scores [B])."""
  jitted = jax.jit(methods.estimates, static_argnums=0)
  given = tiny.policy, tiny.params, tiny.rollout, tiny.rule
  return lambda weights: jitted(*given, jnp.asarray(weights, jnp.float32))


def test_an_estimate_is_what_an_update_computes(tiny, reward, estimate):
  """Token rewards, lengths that differ, and a credit with a scale."""
  names = 'exact', 'group_mean / std', 'seq_mean_token_mean'
  method = METHODS[names]
  weights = methods.token_weights([method] * 2, drawn(tiny, reward), {})
  update = jax.jit(make_update(tiny.policy, method.algorithm, RECORD))
  state = init_state(method.algorithm, RECORD, tiny.params, jax.random.key(0))
  state, *_ = update(state, make_scored(tiny.rollout, reward), tiny.rule)
  gradient = methods.flat(state.opt_state[0])
  assert np.abs(gradient).max() > 0.1
  close = 1e-5 * np.abs(gradient).max()
  np.testing.assert_allclose(estimate(weights)[0][0], -gradient, atol=close)


def test_two_ways_to_a_gradient(tiny, estimate):
  """Gradients token by token are those of one pass; a row's score is the sum
  over its tokens."""
  mask = np.asarray(tiny.rollout.mask)
  weights = np.random.default_rng(0).normal(size=(2, *mask.shape)) * mask
  weights[1] = np.where(np.arange(12)[:, None] == 5, mask, 0)
  found, score = estimate(weights)
  want = jax.jit(methods.whole_gradient, static_argnums=0)(
    *(tiny.policy, tiny.params, tiny.rollout, tiny.rule),
    weights[0].astype(np.float32),
  )
  np.testing.assert_allclose(found[0], want, atol=1e-5 * np.abs(want).max())
  np.testing.assert_allclose(score[5], np.sum(found[1] ** 2), rtol=1e-4)


def test_greedy_rewards_and_carries_of_baselines_are_given(tiny, reward):
  """Weights of a method are its algorithm's, not another baseline's."""
  names = 'none', 'greedy', 'ema', 'leave_one_out'
  compared = [METHODS['exact', name, methods.SUM] for name in names]
  carries = {'ema_baseline': jnp.float32(0.5)}
  batch = drawn(tiny, reward)
  none, greedy, ema, others = methods.token_weights(compared, batch, carries)
  mask = tiny.rollout.mask / 12
  b = np.repeat(GREEDY, 3)[:, None]
  np.testing.assert_allclose(none - greedy, b * mask, atol=1e-6)
  np.testing.assert_allclose(none - ema, 0.5 * mask, atol=1e-6)
  assert np.abs(others - none).max() > 0.01


# --- statistics --------------------------------------------------------------

PAIR = measures.Rows(*map(np.array, ([0, 1], [0, 0], [0, 0], [1.0, 1.0])))


def measured(estimates, reference, rows=PAIR, errors=False, blocks=None):
  """Measures estimates [N, M, W], in blocks of two by default."""
  estimates = np.asarray(estimates, np.float32)
  N, M, W = estimates.shape
  by_block = estimates.reshape(blocks or N // 2, -1, M, W)
  reference = np.asarray(reference, np.float32)
  find = jax.jit(jax.vmap(lambda x: measures.products(x, reference, rows)))
  found = [jax.device_get(find(x)) for x in by_block]
  sums = measures.summed(found, by_block.sum(1), rows)
  function = measures.with_errors if errors else measures.measure
  return function(sums, rows, np.sum(reference.astype(float) ** 2, axis=1))


def test_numbers_by_hand():
  """g = (2, 0). The anchor is (2, 1) or (2, -1): mean (2, 0), variance
  4 / 3 with ddof 1. The method is (1, 1) or (1, 0), the other way around in
  half of the batches: its mean (1, 1/2), best scaled (2, 1)."""
  anchor = [[2, 1], [2, -1], [2, 1], [2, -1]]
  method = [[1, 1], [1, 0], [1, 0], [1, 1]]
  found = measured(np.stack([anchor, method], 1), [[2, 0]])
  # |g|^2 = 4; the anchor's variance 4/3, the method's 2^2 1/3
  np.testing.assert_allclose(found['variance'], [1 / 3, 1 / 3])
  np.testing.assert_allclose(found['needed'], [1, 1])
  # apart (0, 1), (0, 1), (0, -1), (0, 3): mean 1, variance 8/3, 1 - (8/3)/4
  np.testing.assert_allclose(found['bias'], [0, (1 - 2 / 3) / 4], atol=1e-7)
  np.testing.assert_allclose(found['mean_cosine'][1], (1 + 1 / 12) ** -0.5)
  want = [2 / 5**0.5, (1 + 0.5**0.5) / 2]
  np.testing.assert_allclose(found['cosine'], want, rtol=1e-6)
  np.testing.assert_allclose(found['check'], 1)


def test_a_scale_is_no_difference():
  rng = np.random.default_rng(0)
  g = rng.normal(size=(1, 7))
  x = g + rng.normal(size=(12, 1, 7))
  found = measured(np.concatenate([x, 5 * x], axis=1), g)
  for name in ('variance', 'cosine', 'needed'):
    np.testing.assert_allclose(found[name][1], found[name][0], rtol=1e-5)
  np.testing.assert_allclose(found['bias'], 0, atol=1e-5)


def test_a_bias_is_found_in_noise_ten_times_as_large():
  """A fixed bias at a right angle to g adds its square and no variance."""
  rng = np.random.default_rng(1)
  g = np.array([[2.0, 0, 0, 0]])
  x = g + 10 * rng.normal(size=(40, 1, 4))
  found = measured(np.concatenate([x, x + [0, 1.0, 0, 0]], axis=1), g)
  np.testing.assert_allclose(found['bias'], [0, 1 / 4], atol=1e-4)
  np.testing.assert_allclose(found['mean_cosine'][1], 0.8**0.5, rtol=1e-4)
  np.testing.assert_allclose(found['needed'], 1, rtol=1e-5)


def test_variance_is_numpys_and_needs_no_blocks():
  rng = np.random.default_rng(2)
  g = rng.normal(size=(1, 5))
  x = g + rng.normal(size=(24, 2, 5)) * [[[1.0]], [[2.0]]][0]
  found, again = measured(x, g), measured(x, g, blocks=3)
  # of the anchor, whose mean is known to be g
  want = x[:, 0].var(axis=0, ddof=1).sum() / np.sum(g**2)
  np.testing.assert_allclose(found['variance'][0], want, rtol=1e-5)
  for name in found:
    np.testing.assert_allclose(again[name], found[name], rtol=1e-4, atol=1e-6)


def test_the_jackknife_of_a_mean_is_its_standard_error():
  rng = np.random.default_rng(3)
  g = np.array([[1.0, 0, 0]])
  x = g + rng.normal(size=(20, 2, 3))
  value, error = measured(x, g, errors=True)['check']
  means = x[:, 0, 0].reshape(10, 2).mean(1)
  np.testing.assert_allclose(value[0], means.mean(), rtol=1e-5)
  np.testing.assert_allclose(error[0], means.std(ddof=1) / 10**0.5, rtol=1e-4)


def test_the_value_head_is_the_regression():
  rng = np.random.default_rng(4)
  x, head = rng.normal(size=(50, 3)), np.array([1.0, -2.0, 0.5])
  found = samples.ridge(x.T @ x, x.T @ (x @ head))
  np.testing.assert_allclose(found, head, rtol=1e-3)


# --- the experiment ----------------------------------------------------------


@pytest.mark.parametrize(
  ('flags', 'fact'),
  [
    ('--blocks=1', 'must be at least 2'),
    ('--levels 0.4 2', 'one or more in [0, 1]'),
    ('--num_generations=1', 'pass --num_generations 2'),
    ('--warm_start_stop_at=0.5', 'has no effect here'),
    ('--max_completion_length=3', 'pass --max_completion_length 4'),
    ('--baseline=none', '--baseline has no effect here'),
    ('--algorithm=ppo', '--algorithm has no effect here'),
    ('--reward=digits', '--reward has no effect here'),
    ('--data=x.jsonl', '--data has no effect here'),
    ('--max_steps=3', '--max_steps has no effect here'),
    ('--digits=0', 'must be in 1..9'),
    ('--level=1', 'did you mean --levels?'),
  ],
)
def test_flags_that_cannot_be_are_one_line(flags, fact, capsys):
  with pytest.raises(SystemExit) as e:
    lab.main(flags.split())
  error = capsys.readouterr().err
  assert e.value.code == 2
  assert fact in error
  assert error.count('\n') == 1


@device_rewards.on_device
def early(rollout, **columns):
  """Reward 1 for a first token in the lower half."""
  return jnp.where(rollout.tokens[:, 0] < 129, 1.0, 0.0)


def test_a_small_run_writes_its_results(tmp_path, monkeypatch):
  """A random policy with a reward that it now and then earns."""
  one = jax.local_devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *args: one)
  monkeypatch.setattr(
    warm_start,
    'warm_start',
    lambda setup: jax.jit(setup.policy.init)(jax.random.key(0)),
  )
  for name in methods.REWARDS:
    monkeypatch.setitem(methods.REWARDS, name, early)
  flags = (
    '--levels 0.4 --digits=1 --num_problems=60 --num_prompts=2 '
    '--num_generations=4 --max_completion_length=3 --blocks=2 '
    '--reference_blocks=2 --d_model=16 --num_layers=1 --num_heads=2 '
    f'--num_kv_heads=1 --d_ff=16 --output_dir={tmp_path}'
  )
  lab.main(flags.split())
  result = json.loads((tmp_path / 'gradient_lab.json').read_text())
  (policy,) = result['policies']
  assert sum(policy['lengths']) == pytest.approx(1)
  assert 0.2 < policy['reward'] < 0.8
  rows = {
    (r['reward'], r['of'], r['baseline'], r['aggregation']): r
    for r in policy['rows']
  }
  assert len(rows) == len(METHODS) + 1
  for (reward, of, baseline, aggregation), row in rows.items():
    assert all(np.isfinite(x) for x in row.values() if not isinstance(x, str))
    if reward == 'exact':  # 1 / T and (G - 1) / G are no difference
      baseline = baseline.replace('leave_one_out', 'group_mean')
      aggregation = aggregation.removesuffix('_norm')
      same = rows[reward, of, baseline, aggregation]
      assert row['needed'] == pytest.approx(same['needed'], rel=1e-3)
  page = (tmp_path / 'gradient_lab.svg').read_text()
  ElementTree.fromstring(page)
  assert page.count('<circle') == 3 + 3 * 8 * 2 + 3 * 2
  assert rows['digits_outcome', 'digits', *methods.DEFAULT][
    'needed'
  ] == pytest.approx(rows['digits', 'digits', *methods.DEFAULT]['needed'])
