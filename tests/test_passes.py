"""Critics, several passes over a rollout, and what algorithms carry along."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import (
  CONFIG,
  END,
  OTHER_END,
  PAD,
  changed,
  make_scored,
  random_prompts,
  sharpened,
)

from jaxrl_tok import checkpoint, distribution
from jaxrl_tok.credit import advantages, algorithms
from jaxrl_tok.models.mask_policy import masked_policy
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.policy import evaluate, values
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.step.passes import param_labels
from jaxrl_tok.step.state import init_state, with_value_head
from jaxrl_tok.step.update import (
  columns_needed,
  make_update,
  shortened,
)
from jaxrl_tok.types import Passes

C, G, T = 8, 2, 5
PLAIN = make_policy(changed(CONFIG, layers=CONFIG.layers[:1]))
CRITIC = make_policy(changed(CONFIG, layers=CONFIG.layers[:1], value_head=True))
RULE = distribution.make_rule(11, [END, OTHER_END], top_p=0.8)


def adamw(rate: float):
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95))


# the critic has its own rate, moments and norm
OPTIMIZER = optax.multi_transform(
  {'policy': adamw(0.01), 'critic': adamw(0.1)}, param_labels
)


@pytest.fixture(scope='module')
def params():
  return sharpened(jax.jit(PLAIN.init)(jax.random.key(1)), 3.0)


@pytest.fixture(scope='module')
def batch(params):
  """Scored of the plain policy."""
  sample = make_sampler(PLAIN, SamplerConfig(G, T, PAD, truncate=True))
  rollout = jax.jit(sample)(params, jax.random.key(3), random_prompts(C), RULE)
  noise = np.random.default_rng(0).normal(size=(C * G, T))
  return make_scored(rollout, noise * rollout.mask)


def changes(new, old) -> float:
  """The largest change of any number of a tree."""
  pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
  return max(float(jnp.abs(a - b).max()) for a, b in pairs)


def without_head(params):
  return {k: v for k, v in params.items() if k != 'value_head'}


@pytest.fixture(scope='module')
def separate(params):
  """PPO of 4 epochs x 4 mini-batches with a critic of its own, a warm-up, an
  adaptive KL and a reference that follows: (state, update)."""
  algorithm = algorithms.ppo(
    epochs=4,
    mini_batches=4,
    critic_warmup_steps=1,
    kl='reverse',
    beta=0.2,
    kl_target=0.01,
    kl_horizon=100.0,
    ref_sync_steps=2,
    reference_dtype='bfloat16',
    max_update_kl=0.02,
  )
  critic = jax.tree.map(jnp.copy, with_value_head(CRITIC, params))
  key = jax.random.key(0)
  state = init_state(algorithm, OPTIMIZER, params, key, critic=critic)
  update = make_update(PLAIN, algorithm, OPTIMIZER, critic=CRITIC)
  # placed as a restored one is, so that both run one program
  return jax.device_put(state, jax.devices()[0]), jax.jit(update)


def test_the_critic_warms_up_alone_and_then_both_learn(separate, batch):
  state, update = separate
  one, metrics, _ = update(state, batch, RULE)
  assert changes(one.params, state.params) == 0
  assert changes(one.critic, state.critic) > 0.01
  assert float(metrics['passes']) == 16  # nothing moved: none was too far
  two, metrics, _ = update(one, batch, RULE)
  assert changes(two.params, one.params) > 1e-3
  assert 0 <= float(metrics['passes']) < 16  # stopped when it had moved
  _, metrics, _ = update(two, batch, RULE)
  assert float(metrics['explained_variance']) > 0.1  # it has seen this batch


def test_the_reference_follows_in_its_own_dtype(separate, batch):
  state, update = separate
  start = state.carries['reference']
  dtypes = {str(x.dtype) for x in jax.tree.leaves(start)}
  assert dtypes == {'bfloat16'}
  one, _, _ = update(state, batch, RULE)
  assert changes(one.carries['reference'], start) == 0
  two, _, _ = update(one, batch, RULE)
  cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), two.params)
  assert changes(two.carries['reference'], cast) == 0


def test_the_coefficient_follows_the_kl(separate, batch):
  """beta (1 + clip(KL / target - 1, -0.2, 0.2) rows / horizon)."""
  state, update = separate
  for _ in range(3):
    new, metrics, _ = update(state, batch, RULE)
    error = np.clip(float(metrics['kl']) / 0.01 - 1, -0.2, 0.2)
    beta = float(state.carries['kl_coef'])
    want = beta * (1 + error * C * G / 100)
    assert float(new.carries['kl_coef']) == pytest.approx(want, rel=1e-5)
    assert float(metrics['kl_coef']) == beta
    state = new


def test_resumed_is_never_stopped(separate, batch, tmp_path):
  """Resume with 4 epochs x 4 mini-batches, and all that TrainState carries."""
  state, update = separate
  states = [state]
  for _ in range(4):
    states.append(update(states[-1], batch, RULE)[0])
  manager = checkpoint.open_checkpoints(tmp_path, 1)
  cursor = {'position': np.int64(0)}
  checkpoint.save(manager, states[2], cursor, {}, {})
  manager.wait_until_finished()
  again, _, _ = checkpoint.restore(manager, 2, states[0])
  manager.close()
  for _ in range(2):
    again = update(again, batch, RULE)[0]
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(states[4])):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = map(jax.random.key_data, (a, b))
    np.testing.assert_array_equal(a, b)


def test_a_shared_critic_warms_up_by_its_head_alone(params, batch):
  algorithm = algorithms.a2c(critic_warmup_steps=1)
  begin = with_value_head(CRITIC, params)
  state = init_state(algorithm, OPTIMIZER, begin, jax.random.key(0))
  update = jax.jit(make_update(CRITIC, algorithm, OPTIMIZER))
  one, _, _ = update(state, batch, RULE)
  assert changes(without_head(one.params), without_head(begin)) == 0
  head = one.params['value_head']['embedding']
  assert float(jnp.abs(head).max()) > 0.05  # its rate is ten times as large
  two, _, _ = update(one, batch, RULE)
  moved = changes(without_head(two.params), without_head(begin))
  assert 1e-3 < moved < 0.05


def test_values_before_and_after_every_token(params, batch):
  """Column t is evaluate's value before token t; the last one is that of one
  token more."""
  rollout = batch.rollout
  own = with_value_head(CRITIC, params)
  own['value_head'] = {'embedding': own['value_head']['embedding'] + 0.3}

  @jax.jit
  def look(own, rollout):
    longer = rollout._replace(
      tokens=jnp.pad(rollout.tokens, ((0, 0), (0, 1))),
      mask=jnp.pad(rollout.mask, ((0, 0), (0, 1)), constant_values=True),
      logp=jnp.pad(rollout.logp, ((0, 0), (0, 1))),
      num_kept=None,
    )
    stats = evaluate(CRITIC, own, longer, RULE)
    return stats.value, values(CRITIC, own, rollout)

  before, found = look(own, rollout)
  mask = np.pad(rollout.mask, ((0, 0), (0, 1)), constant_values=True)
  assert found.shape == (C * G, T + 1)
  np.testing.assert_allclose(
    np.where(mask, found, 0), np.where(mask, before, 0), atol=1e-5
  )


def test_a_shorter_update_has_the_values_of_the_long_one(params, batch):
  """Rows with two turns, some of them cut after observed tokens: GAE reads the
  value after the last turn."""
  mask = np.array([[1, 0, 0, 1, 0], [1, 1, 0, 0, 0]] * C, bool)
  ended = np.arange(C * G) % 3 > 0
  rollout = batch.rollout._replace(mask=mask, ended=ended)
  scored = make_scored(rollout, np.where(mask, batch.rewards['reward'], 0))
  algorithm = algorithms.a2c(bootstrap_truncated=True)
  begin = with_value_head(CRITIC, params)
  begin['value_head'] = {'embedding': begin['value_head']['embedding'] + 0.3}
  sgd, found = optax.sgd(0.1), []
  update = make_update(CRITIC, algorithm, sgd)
  for function in (update, shortened(update, columns_needed(mask))):
    state = init_state(algorithm, sgd, begin, jax.random.key(0))
    found.append(jax.jit(function)(state, scored, RULE))
  (long, metrics, advantage), (short, others, same) = found
  assert changes(long.params, begin) > 1e-3
  assert changes(short.params, long.params) < 1e-5
  np.testing.assert_allclose(same, advantage, atol=1e-5)
  for name, value in metrics.items():
    np.testing.assert_allclose(others[name], value, 1e-5, 1e-5, err_msg=name)


def test_passes_go_through_every_prompt_once_an_epoch(params, batch):
  """With a zero learning rate, the passes' gradients of the token sum average
  to that of the whole rollout."""
  algorithm = algorithms.reinforce(advantages.fixed(0.2))
  collect = optax.GradientTransformation(
    lambda p: jax.tree.map(jnp.zeros_like, p),
    lambda g, s, p=None: (
      jax.tree.map(jnp.zeros_like, g),
      jax.tree.map(jnp.add, s, g),
    ),
  )
  found = []
  for passes in (Passes(), Passes(3, 4, old_logp='sampler')):
    state = init_state(algorithm, collect, params, jax.random.key(0))
    update = jax.jit(make_update(PLAIN, algorithm, collect, passes=passes))
    state, metrics, _ = update(state, batch, RULE)
    n = passes.count
    found.append(jax.tree.map(lambda g, n=n: g / n, state.opt_state))
    assert float(metrics['sampler_logp_gap']) < 1e-4
  assert changes(*found) < 1e-5 * max(1, changes(found[0], found[0]) + 1)


def test_nlpo_draws_only_what_its_slow_copy_finds_likely(params):
  """Log-probs are those of the renormalised distribution; with the policy
  itself as the copy, sampling is top-p sampling."""
  policy = masked_policy(PLAIN)
  other = sharpened(jax.jit(PLAIN.init)(jax.random.key(9)), 3.0)
  sample = make_sampler(policy, SamplerConfig(G, T, PAD, truncate=True))
  plain = make_sampler(PLAIN, SamplerConfig(G, T, PAD, truncate=True))

  @jax.jit
  def run(params, slow):
    prompts, key = random_prompts(C), jax.random.key(3)
    joined = policy.merge_params(params, (None, slow))
    rollout = sample(joined, key, prompts, RULE)
    stats = evaluate(policy, joined, rollout, RULE)
    # of each drawn token, its rank in the slow copy's own distribution
    everything = rollout._replace(num_kept=None)
    alone = evaluate(PLAIN, slow, everything, RULE)
    return rollout, stats, alone, plain(params, key, prompts, RULE)

  rollout, stats, _, same = run(params, params)
  np.testing.assert_array_equal(rollout.tokens, same.tokens)
  np.testing.assert_allclose(rollout.logp, same.logp, atol=1e-5)
  rollout, stats, alone, same = run(params, other)
  assert (rollout.tokens != same.tokens).any()
  mask = np.asarray(rollout.mask)
  np.testing.assert_allclose(stats.logp, rollout.logp, atol=1e-5)
  # a set of mass 0.8 has no token below what is left over, 0.2
  num_kept = np.asarray(rollout.num_kept)
  likely = np.exp(np.asarray(alone.logp))[mask & (num_kept > 1)]
  assert len(likely)
  assert num_kept[mask].min() >= 1
  one = np.exp(np.asarray(alone.logp))[mask & (num_kept == 1)]
  assert (one >= 0.8 - 1e-5).all()
