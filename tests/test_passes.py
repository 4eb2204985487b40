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
  look,
  make_rollout,
  make_scored,
  random_prompts,
  sharpened,
)

from jaxrl_tok import checkpoint, distribution, masked
from jaxrl_tok.credit import advantages, algorithms, names
from jaxrl_tok.models.mask_policy import masked_policy
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.policy import evaluate, values
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.step.guard import param_labels
from jaxrl_tok.step.state import init_state, with_value_head
from jaxrl_tok.step.update import (
  columns_needed,
  make_update,
  shortened,
)
from jaxrl_tok.types import Passes, TokenStats, Trajectory

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


def test_the_norm_of_bfloat16_gradients_is_added_up_in_float32(params, batch):
  stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  # its state is the gradient that it was given last
  keeps = optax.GradientTransformation(
    lambda trained: jax.tree.map(jnp.zeros_like, trained),
    lambda grads, state, trained=None: (grads, grads),
  )
  algorithm = algorithms.reinforce(advantages.leave_one_out())
  state = init_state(algorithm, keeps, stored, jax.random.key(0))
  after, metrics, _ = jax.jit(make_update(PLAIN, algorithm, keeps))(
    state, batch, RULE
  )
  grads = jax.tree.leaves(after.opt_state)
  assert {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}
  want = np.sqrt(sum((np.asarray(g, float) ** 2).sum() for g in grads))
  # the compiler may add up before it rounds each number to bfloat16
  np.testing.assert_allclose(metrics['grad_norm'], want, rtol=2e-4)


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


# --- metrics, against float64 ------------------------------------------------


def row_means(x, mask) -> np.ndarray:
  """Means over each row's chosen tokens, of the rows that have one."""
  return np.array(
    [x[b][mask[b]].mean() for b in range(len(x)) if mask[b].any()]
  )


def clip_metrics(low, high, mask, by_sequence: bool) -> dict:
  """TRL's clip ratios of tokens held below and above, bool [B, T]."""
  rows = {'low': row_means(low, mask), 'high': row_means(high, mask)}
  tokens = {'low': low[mask], 'high': high[mask]}
  low, high = (rows if by_sequence else tokens).values()
  return {
    'low_mean': low.mean(),
    'high_mean': high.mean(),
    'region_mean': low.mean() + high.mean(),
    'low_min': rows['low'].min(),
    'high_max': rows['high'].max(),
  }


@pytest.fixture(scope='module')
def moved(params):
  """Parameters and a reference that the sampler's are neither of."""
  rng = np.random.default_rng(2)

  def noisy(x, scale):
    return x + scale * rng.normal(size=x.shape).astype(np.float32)

  return (
    jax.tree.map(lambda x: noisy(x, 0.05), params),
    jax.tree.map(lambda x: noisy(x, 0.2), params),
  )


@pytest.mark.parametrize(
  ('name', 'micro_batches'), [('grpo', 4), ('rloo', 1), ('gspo', 2)]
)
def test_metrics_off_policy(moved, batch, name, micro_batches):
  """kl is rho k3, kl and entropy are means over chosen tokens of valid rows;
  clip ratios of a sequence's ratio count sequences. Nothing chosen is 0."""
  now, reference = moved
  valid = np.arange(C * G) % 5 != 3
  rollout = batch.rollout
  last = masked.last_chosen(rollout.mask)
  outcome = jnp.where(last, batch.rewards['reward'], 0)
  scored = make_scored(rollout, outcome, applies=valid)
  algorithm = algorithms.by_name(name)(kl='reverse', beta=0.1)
  passes = Passes(old_logp='sampler')
  sgd = optax.sgd(0.1)
  update = make_update(
    PLAIN, algorithm, sgd, micro_batches=micro_batches, passes=passes
  )
  state = init_state(algorithm, sgd, now, jax.random.key(0))
  state = state.replace(carries=state.carries | {'reference': reference})
  update = jax.jit(update)
  _, metrics, A = update(state, scored, RULE)
  nobody = scored._replace(applies={'reward': jnp.zeros(C * G, bool)})
  _, none, _ = update(state, nobody, RULE)
  for key in ('kl', 'entropy', 'sampler_logp_gap', 'clip_ratio/low_min'):
    assert float(none[key]) == 0, key
  mask = np.asarray(rollout.mask) & valid[:, None]
  stats, ref = (
    look(PLAIN, now, rollout, RULE),
    look(PLAIN, reference, rollout, RULE),
  )
  l, l_ref, entropy, A = (
    np.asarray(x, np.float64) for x in (stats.logp, ref.logp, stats.entropy, A)
  )
  change = np.where(mask, l - rollout.logp, 0)
  d, by_sequence = l - l_ref, name != 'grpo'
  kl = (np.exp(change) * (np.exp(-d) + d - 1))[mask].mean()
  assert abs(kl - (np.exp(-d) + d - 1)[mask].mean()) > 1e-3
  assert float(metrics['kl']) == pytest.approx(kl, rel=1e-4)
  assert float(metrics['entropy']) == pytest.approx(entropy[mask].mean(), 1e-4)
  bounds = (3e-4, 4e-4) if name == 'gspo' else (0.2, 0.2)
  if by_sequence:
    change = change.sum(1, keepdims=True)
    if name == 'gspo':
      change = change / np.maximum(mask.sum(1, keepdims=True), 1)
    change = np.broadcast_to(change, mask.shape)
  low = (np.exp(change) < 1 - bounds[0]) & (A < 0)
  high = (np.exp(change) > 1 + bounds[1]) & (A > 0)
  want = clip_metrics(low, high, mask, by_sequence)
  assert want['low_mean'] > 0 < want['high_mean']
  for key, value in want.items():
    found = float(metrics[f'clip_ratio/{key}'])
    assert found == pytest.approx(value, abs=1e-6), key


# --- importance weights, against float64 -------------------------------------


def weights_of(mode, lag, mask, cap):
  """Weights [B, T] and whether the cap was met, of log-ratios lag."""
  level, rule = mode.split('_')
  lag = np.where(mask, lag, 0)
  if level == 'sequence':
    lag = np.broadcast_to(lag.sum(1, keepdims=True), lag.shape)
  ratio = np.exp(lag)
  over = ratio > cap
  return np.where(over, cap if rule == 'truncate' else 0, ratio), over


@pytest.mark.parametrize('loss', names.LOSSES)
@pytest.mark.parametrize('mode', names.IMPORTANCE_MODES)
def test_importance_weights(mode, loss):
  """L_t w, its slope and its metrics: a weight beside a loss without one."""
  if loss == 'sequence_clip' and mode.startswith('token'):
    with pytest.raises(ValueError, match='--importance_mode sequence_trunc'):
      algorithms.rloo(importance_cap=1.5, importance_mode=mode)
    return
  rng, rows = np.random.default_rng(0), 6
  shape, cap = (rows, T), 1.5
  mask = rng.random(shape) < 0.8
  mask[0], mask[1] = False, np.arange(T) < 1
  l = -rng.uniform(0.1, 2, shape)
  l_old, A = l - rng.normal(0, 0.2, shape), rng.normal(size=(rows, 1))
  l_roll = l_old - rng.normal(0, 0.4, shape)
  one = {'aggregate': 'seq_mean_token_sum', 'loss': loss}
  plain = algorithms.reinforce(**one)
  given = {'importance_cap': cap, 'importance_mode': mode}
  made = algorithms.reinforce(**one, **given)
  l, l_old, l_roll, A = (
    np.broadcast_to(x, shape).astype(np.float32) for x in (l, l_old, l_roll, A)
  )
  rollout = make_rollout(None, jnp.zeros(shape), mask, l_roll)
  trajectory = Trajectory(rollout, None, A, None, None, l_old, None)

  def losses_of(algorithm):
    def total(l):
      stats = TokenStats(l, jnp.zeros(shape), None)
      found, metrics = jax.vmap(algorithm.loss)(stats, trajectory)
      return jnp.where(mask, found, 0).sum(1).sum(), (found, metrics)

    return jax.value_and_grad(total, has_aux=True)(jnp.asarray(l))

  (_, (before, _)), slope = losses_of(plain)
  (_, (after, metrics)), weighed = losses_of(made)
  lag = l_old.astype(np.float64) - l_roll
  weight, over = weights_of(mode, lag, mask, cap)
  assert 0 < over[mask].mean() < 1
  for x, y in ((before, after), (slope, weighed)):
    x, y = np.asarray(x), np.asarray(y)
    np.testing.assert_allclose(y[mask], (x * weight)[mask], 1e-5, 1e-6)
  share = f'frac_importance_{mode.split("_")[1]}'
  share += 'd' if 'truncate' in mode else 'ed'
  for key, want in (('importance_weight', weight), (share, over)):
    found = np.asarray(metrics[key], np.float64)
    if mode.startswith('sequence'):  # one number for each sequence
      np.testing.assert_allclose(found, want[:, 0], rtol=1e-5)
    else:
      np.testing.assert_allclose(found[mask], want[mask], rtol=1e-5)
