"""Laws of the update: what must change nothing, and what may never be NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import changed, random_prompts, scored

from jaxrl_tok import masked
from jaxrl_tok.credit import advantages, algorithms, losses
from jaxrl_tok.policy import evaluate
from jaxrl_tok.step.groups import merge_rows, split_groups, split_rows
from jaxrl_tok.step.update import (
  init_state,
  length_metrics,
  make_update,
  reward_metrics,
  shortened,
)
from jaxrl_tok.types import Prompts

# hands out the gradient as the optimizer's state
RECORD = optax.GradientTransformation(
  lambda params: jax.tree.map(jnp.zeros_like, params),
  lambda g, s, p=None: (jax.tree.map(jnp.zeros_like, g), g),
)
REINFORCE = algorithms.reinforce(advantages.leave_one_out())


@pytest.fixture(scope='module')
def run(tiny):
  """run(rollout, reward, ...) -> (gradient, metrics, advantage)."""
  compiled = {}

  def run(rollout, reward, algorithm=REINFORCE, parts=1, params=None):
    key = id(algorithm), parts
    if key not in compiled:
      update = jax.jit(make_update(tiny.policy, algorithm, RECORD, parts))
      compiled[key] = update, algorithm  # keeps the id alive
    params = tiny.params if params is None else params
    state = init_state(algorithm, RECORD, params, jax.random.key(0))
    state, metrics, advantage = compiled[key][0](
      state, rollout, jnp.asarray(reward), tiny.rule
    )
    return state.opt_state, metrics, advantage

  return run


def assert_same(a, b, rtol=1e-5):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    x, y = np.asarray(x), np.asarray(y)
    np.testing.assert_allclose(x, y, atol=rtol * max(1, np.abs(y).max()))


def test_micro_batches_change_nothing(tiny, reward, run):
  grads, metrics, advantage = run(tiny.rollout, reward)
  again, others, same = run(tiny.rollout, reward, parts=4)
  assert_same(again, grads)
  assert_same(others, metrics)
  np.testing.assert_array_equal(same, advantage)


def test_groups_without_an_advantage_are_left_out(tiny, reward, run):
  """The same gradient and metrics, and no more backward passes than need be."""
  algorithm, seen = algorithms.grpo(), []

  def backward(_, gradient):
    jax.debug.callback(lambda: seen.append(1))
    return (gradient,)

  counted = jax.custom_vjp(lambda x: x)
  counted.defvjp(lambda x: (x, None), backward)

  def encode(params, prompts):
    prefix = tiny.policy.encode(params, prompts)
    return prefix._replace(hidden=counted(prefix.hidden))

  policy = tiny.policy._replace(encode=encode)
  update = jax.jit(make_update(policy, algorithm, RECORD, 4))
  last = masked.last_chosen(tiny.rollout.mask)
  for alike in ([], [0, 2], [0, 1, 3], [0, 1, 2, 3]):
    rows = np.asarray(reward).sum(1).reshape(4, 3)
    rows[alike] = 0.5
    given = np.where(last, rows.reshape(-1, 1), 0).astype(np.float32)
    state = init_state(algorithm, RECORD, tiny.params, jax.random.key(0))
    state, metrics, _ = update(state, tiny.rollout, given, tiny.rule)
    jax.effects_barrier()
    want, others, _ = run(tiny.rollout, given, algorithm)
    assert_same(state.opt_state, want)
    assert_same(metrics, others)
    assert len(seen) == 4 - len(alike)
    seen.clear()


@pytest.mark.parametrize('algorithm', [REINFORCE, algorithms.grpo()])
def test_a_shorter_update_is_the_same(tiny, reward, run, algorithm):
  """Rows that are all over by column 5: some end there, none is cut."""
  mask, end = np.asarray(tiny.rollout.mask).copy(), tiny.rule.end_tokens[0]
  tokens, last = np.asarray(tiny.rollout.tokens).copy(), 5
  tokens[mask[:, last - 1], last - 1] = end
  mask[:, last:] = False
  rollout = tiny.rollout._replace(
    tokens=np.where(mask, tokens, 0), mask=mask, logp=tiny.rollout.logp * mask
  )
  given = np.asarray(reward) * mask
  want, metrics, advantage = run(rollout, given, algorithm)
  update = shortened(make_update(tiny.policy, algorithm, RECORD), last)
  state = init_state(algorithm, RECORD, tiny.params, jax.random.key(0))
  state, others, same = jax.jit(update)(state, rollout, given, tiny.rule)
  assert_same(state.opt_state, want)
  assert_same(others, metrics)
  np.testing.assert_allclose(same, advantage, atol=1e-6)


@pytest.mark.parametrize(
  ('changes', 'flat'),
  [
    ({}, True),
    ({'entropy_coef': 0.01}, False),
    ({'kl': 'reverse', 'beta': 0.1}, False),
    ({'credit': advantages.gae}, False),
    ({'epochs': 2, 'max_update_kl': 0.1}, True),
    ({'loss': lambda: None}, False),
  ],
)
def test_when_groups_may_be_left_out(changes, flat):
  given = {'baseline': advantages.group_mean(), 'loss': losses.clip, **changes}
  if 'credit' in given:
    del given['baseline']
  assert algorithms.reinforce(**given).flat_without_advantage == flat


def test_micro_batches_change_nothing_with_a_reference(tiny, reward, run):
  algorithm = algorithms.reinforce(
    advantages.group_mean(),
    aggregate=losses.token_mean,
    gamma=0.9,
    kl='reverse',  # presets have it in the reward
    beta=0.3,
  )
  other = jax.tree.map(lambda x: x * 1.1, tiny.params)
  results = []
  for parts in (1, 4):
    update = jax.jit(make_update(tiny.policy, algorithm, RECORD, parts))
    state = init_state(algorithm, RECORD, tiny.params, jax.random.key(0))
    state = state.replace(reference=other)
    state, metrics, advantage = update(
      state, tiny.rollout, jnp.asarray(reward), tiny.rule
    )
    assert float(metrics['kl']) > 0
    results.append((state.opt_state, metrics, advantage))
  assert_same(*results)


def test_padding_changes_nothing(tiny, reward, run):
  grads, metrics, _ = run(tiny.rollout, reward)
  prompts = Prompts(
    np.pad(tiny.prompts.tokens, ((0, 0), (0, 3)), constant_values=7),
    tiny.prompts.length,
  )

  def longer(x, value=0):
    return np.pad(np.asarray(x), ((0, 0), (0, 4)), constant_values=value)

  padded = tiny.rollout._replace(
    prompts=prompts,
    tokens=longer(tiny.rollout.tokens, 5),
    mask=longer(tiny.rollout.mask),
    logp=longer(tiny.rollout.logp),
  )
  again, others, _ = run(padded, longer(reward))
  assert_same(again, grads)
  for name in ('reward', 'surrogate', 'entropy', 'grad_norm', 'advantage_std'):
    np.testing.assert_allclose(others[name], metrics[name], rtol=1e-5)


def test_other_rows_change_nothing(tiny, reward, run):
  """The gradient of a sum over prompts is the sum of their gradients."""
  grads, _, _ = run(tiny.rollout, reward)
  total = None
  for c in range(4):
    rows = slice(3 * c, 3 * c + 3)
    part = jax.tree.map(lambda x, rows=rows: x[rows], tiny.rollout)
    part = part._replace(
      prompts=jax.tree.map(lambda x, c=c: x[c : c + 1], tiny.prompts)
    )
    found, _, _ = run(part, reward[rows])
    total = found if total is None else jax.tree.map(jnp.add, total, found)
  assert_same(jax.tree.map(lambda g: g / 4, total), grads)


def test_the_end_token_is_credited_and_nothing_after_it(tiny):
  """d loss / d log-prob is -A/B at every chosen token, the end included."""
  mask = np.asarray(tiny.rollout.mask)
  reward = np.zeros(mask.shape, np.float32)
  last = mask.sum(1) - 1
  reward[np.arange(12), last] = np.arange(12)
  algorithm = algorithms.reinforce(advantages.fixed(0.5))
  advantage, _, _ = algorithm.advantage(scored(tiny.rollout, reward), ())
  weight = algorithm.aggregate(tiny.rollout.mask)
  want = np.where(mask, np.arange(12)[:, None] - 0.5, 0)
  np.testing.assert_allclose(advantage, want, atol=1e-6)
  np.testing.assert_allclose(weight, mask / 12)
  assert (want[np.arange(12), last] != 0).all()


def test_garbage_off_mask_is_harmless(tiny, reward, run):
  mask = np.asarray(tiny.rollout.mask)
  grads, metrics, _ = run(tiny.rollout, reward)
  bad = tiny.rollout._replace(
    logp=jnp.where(mask, tiny.rollout.logp, jnp.nan),
    tokens=jnp.where(mask, tiny.rollout.tokens, 3),
  )
  again, others, advantage = run(bad, np.where(mask, reward, np.nan))
  assert_same(again, grads)
  assert_same(others, metrics)
  assert np.isfinite(advantage).all()


@pytest.mark.parametrize('case', ['equal', 'no tokens', 'zero'])
def test_nothing_to_learn_is_no_gradient(tiny, reward, run, case):
  rollout, given = tiny.rollout, np.zeros_like(reward)
  if case == 'equal':
    last = np.asarray(rollout.mask.sum(1)) - 1
    given[np.arange(12), last] = 1.0
  if case == 'no tokens':
    rollout = rollout._replace(
      mask=jnp.zeros_like(rollout.mask), logp=jnp.zeros_like(rollout.logp)
    )
  grads, metrics, _ = run(rollout, given)
  for g in jax.tree.leaves(grads):
    np.testing.assert_allclose(g, 0, atol=1e-7)
  assert all(np.isfinite(v) for v in metrics.values())
  assert float(metrics['frac_reward_zero_std']) == 1


@pytest.mark.parametrize(
  ('baseline', 'name'),
  [
    (advantages.no_baseline(), 'zero'),
    (advantages.batch_mean(), 'batch'),
    (advantages.group_mean(), 'group'),
    (advantages.leave_one_out(), 'others'),
    (advantages.ema(), 'ema'),
  ],
  ids=lambda x: x if isinstance(x, str) else '',
)
def test_advantages_are_the_textbook_ones_for_outcomes(tiny, baseline, name):
  """One R a sequence: A = R - b at every chosen token, in NumPy."""
  mask = np.asarray(tiny.rollout.mask)
  R = np.random.default_rng(0).normal(size=12)
  reward = np.zeros(mask.shape, np.float32)
  reward[np.arange(12), mask.sum(1) - 1] = R
  groups = R.reshape(4, 3)
  b = {
    'zero': np.zeros(12),
    'batch': np.full(12, R.mean()),
    'group': groups.mean(1).repeat(3),
    'others': ((groups.sum(1, keepdims=True) - groups) / 2).reshape(-1),
    'ema': np.full(12, 0.25),
  }[name]
  found, _, _ = algorithms.reinforce(baseline).advantage(
    scored(tiny.rollout, reward), jnp.float32(0.25)
  )
  np.testing.assert_allclose(
    found, np.where(mask, (R - b)[:, None], 0), atol=1e-5
  )


def test_reward_to_go_is_its_sum():
  rng = np.random.default_rng(0)
  reward = rng.normal(size=7).astype(np.float32)
  mask = np.array([1, 1, 0, 1, 1, 0, 0], bool)
  for gamma in (1.0, 0.9, 0.0):
    found = advantages.reward_to_go(jnp.asarray(reward), mask, gamma)
    want = [
      sum(gamma ** (k - t) * reward[k] for k in range(t, 7) if mask[k])
      for t in range(7)
    ]
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_fractional_rewards_survive_integer_arrays(tiny, reward):
  algorithm = algorithms.reinforce(advantages.no_baseline())
  found, _, _ = algorithm.advantage(
    scored(tiny.rollout, (reward > 0).astype(np.int32)), ()
  )
  assert found.dtype == jnp.float32


def test_aggregations_against_numpy():
  mask = np.arange(5)[None] < np.array([1, 3, 5, 0])[:, None]
  loss = np.random.default_rng(0).normal(size=(4, 5))
  sums = (loss * mask).sum(1)
  want = {
    losses.token_mean: sums.sum() / 9,
    losses.seq_mean_token_mean: (sums / np.array([1, 3, 5, 1])).sum() / 4,
    losses.seq_mean_token_sum: sums.sum() / 4,
    losses.seq_mean_token_sum_norm: sums.sum() / (4 * 8),
  }
  for aggregate, value in want.items():
    weight = np.asarray(aggregate(jnp.asarray(mask), 8))
    assert (weight * loss).sum() == pytest.approx(value, abs=1e-6)
    assert (weight[~mask] == 0).all()


def test_split_and_merge_undo_each_other():
  x = jnp.arange(24).reshape(12, 2)
  np.testing.assert_array_equal(merge_rows(split_rows(x, 4)), x)
  prompts, rows = split_groups((jnp.arange(4), jnp.arange(12)), 2, 4)
  np.testing.assert_array_equal(prompts, [[0, 2], [1, 3]])
  np.testing.assert_array_equal(
    rows, [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
  )


def test_metrics(tiny, run, reward):
  _, metrics, advantage = run(tiny.rollout, reward)
  mask = np.asarray(tiny.rollout.mask)
  R = reward.sum(1)
  assert metrics['reward'] == pytest.approx(R.mean(), abs=1e-5)
  std = R.reshape(4, 3).std(1, ddof=1).mean()
  assert metrics['reward_std'] == pytest.approx(std, abs=1e-5)
  assert metrics['sampler_logp_gap'] < 1e-5
  stale = tiny.rollout._replace(logp=tiny.rollout.logp.at[5, 0].add(-0.25))
  _, others, _ = run(stale, reward)
  assert others['sampler_logp_gap'] == pytest.approx(0.25, abs=1e-4)
  chosen = np.asarray(advantage)[mask]
  assert metrics['advantage_std'] == pytest.approx(chosen.std(), rel=1e-5)
  stats = jax.jit(evaluate, static_argnums=0)(
    tiny.policy, tiny.params, tiny.rollout, tiny.rule
  )
  surrogate = (np.asarray(advantage) * np.asarray(stats.logp)).sum() / 12
  assert metrics['surrogate'] == pytest.approx(surrogate, abs=1e-5)
  found = length_metrics(tiny.rollout, tiny.rule)
  lengths = mask.sum(1)
  assert found['completions/mean_length'] == pytest.approx(lengths.mean())
  ends = np.isin(np.asarray(tiny.rollout.tokens)[:, -1], [9, 10])
  cut = (mask[:, -1] & ~ends).mean()
  assert 0 < cut < 1
  assert found['completions/clipped_ratio'] == pytest.approx(cut)
  one = reward_metrics(jnp.asarray(reward), tiny.rollout.mask, 12)
  assert one['reward_std'] == pytest.approx(R.std(ddof=1), abs=1e-5)


def test_it_learns(tiny):
  """Reward for one token: its probability rises to nearly 1."""
  from jaxrl_tok.sampler import make_sampler

  config = changed(tiny.config, samples_per_prompt=8, max_completion_length=3)
  sample = jax.jit(make_sampler(tiny.policy, config))
  optimizer = optax.adam(2e-2)
  update = jax.jit(make_update(tiny.policy, REINFORCE, optimizer))
  state = init_state(REINFORCE, optimizer, tiny.params, jax.random.key(0))
  prompts, shares = random_prompts(8), []
  for step in range(60):
    key = jax.random.fold_in(state.key, step)
    rollout = sample(state.params, key, prompts, tiny.rule)
    reward = (rollout.tokens == 4) & rollout.mask
    shares.append(float(reward.sum() / rollout.mask.sum()))
    state, _, _ = update(state, rollout, reward.astype(jnp.float32), tiny.rule)
  assert np.mean(shares[:5]) < 0.4
  assert np.mean(shares[-5:]) > 0.9
