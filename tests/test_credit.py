"""Credit: laws of any composition, scales, several rewards, cut completions.

Laws are of random algorithms on random batches: a row that is not valid, or a
column that was not chosen, might as well not be there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import advantage_inputs, look, make_rollout, make_scored
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxrl_tok import masked
from jaxrl_tok.credit import algorithms, names, sequence, shaping
from jaxrl_tok.step.metrics import reward_metrics
from jaxrl_tok.step.state import init_state
from jaxrl_tok.step.update import make_update
from jaxrl_tok.types import AdvantageInputs, Prompts, Scored

C, G, T = 3, 4, 5
B = C * G


def prefixes(lengths):
  """Mask [B, T] of completions of these lengths."""
  return np.arange(T) < np.asarray(lengths)[:, None]


def inputs_of(mask, R, greedy=None):
  """Inputs of an advantage: one outcome R [B], which applies everywhere."""
  rows = jnp.zeros((C, 1), int), jnp.ones((C,), int)
  rollout = make_rollout(Prompts(*rows), np.zeros(mask.shape), mask)
  last = np.asarray(masked.last_chosen(rollout.mask))
  reward = np.where(last, np.asarray(R)[:, None], 0.0)
  return advantage_inputs(rollout, reward, greedy_reward=greedy)


# --- laws of any composition -------------------------------------------------


@st.composite
def compositions(draw):
  """Algorithm of any alias, with choices of any of its parts."""
  name = draw(st.sampled_from(names.ALGORITHMS))
  changes = {
    'max_length': T,
    'whiten': draw(st.booleans()),
    'overlong_buffer': draw(st.sampled_from([0, 3])),
    'mask_truncated_completions': draw(st.booleans()),
    'kl': draw(st.sampled_from(['none', 'reward'])),
  }
  changes['beta'] = 0.1 if changes['kl'] == 'reward' else 0.0
  aggregations = names.AGGREGATIONS[2 if name == 'rloo' else 0 :]
  changes['aggregate'] = draw(st.sampled_from(aggregations))
  if name in ('a2c', 'ppo', 'nlpo'):
    changes['credit'] = draw(st.sampled_from(['gae', 'vtrace']))
    changes['gamma'] = 0.9
    if not changes['mask_truncated_completions']:
      changes['bootstrap_truncated'] = draw(st.booleans())
  else:
    several = draw(st.sampled_from(names.MULTI_OBJECTIVE))
    alone = several == 'normalize_then_sum'
    changes |= {
      'multi_objective_aggregation': several,
      'baseline': draw(st.sampled_from(names.BASELINES[: 4 if alone else 6])),
      'scale': draw(st.sampled_from(names.SCALES[1 if alone else 0 :])),
      'gamma': draw(st.sampled_from([1.0, 0.9])),
    }
  return algorithms.ALIASES[name](**changes)


def batch_of(seed, groups, rows) -> dict:
  """Batch of `groups` prompts with `rows` completions each, of two rewards of
  tokens; every row has one at least. Leaves have the rows in front."""
  rng = np.random.default_rng(seed)
  n = groups * rows
  first = rng.random(n) < 0.7
  return {
    'mask': prefixes(rng.integers(1, T + 1, n)),
    'ended': rng.random(n) < 0.6,
    'rewards': rng.normal(size=(n, 2, T)),
    'applies': np.stack([first, ~first | (rng.random(n) < 0.6)], 1),
    'value': rng.normal(size=(n, T + 1)),
    'log_change': rng.normal(size=(n, T)) / 4,
    'kl': rng.normal(size=(n, T)) / 10,
    'greedy': np.repeat(rng.normal(size=groups), rows),
  }


def credit_of(algorithm, batch, groups):
  """(Advantage, weights of the aggregation, metrics of the rewards)."""
  mask = np.asarray(batch['mask'])
  prompts = Prompts(jnp.zeros((groups, 1), int), jnp.ones((groups,), int))
  rollout = make_rollout(
    prompts, np.zeros(mask.shape), mask, ended=jnp.asarray(batch['ended'])
  )
  x = {k: jnp.asarray(v) for k, v in batch.items()}
  x |= {k: v.astype(jnp.float32) for k, v in x.items() if v.dtype == float}
  two = 'one', 'two'
  scored = Scored(
    rollout,
    {name: x['rewards'][:, i] for i, name in enumerate(two)},
    {name: x['applies'][:, i] for i, name in enumerate(two)},
    {'one': jnp.float32(1), 'two': jnp.float32(0.5)},
    x['greedy'].reshape(groups, -1)[:, 0],
  )
  penalty = None if algorithm.kl is None else x['kl']
  inputs = AdvantageInputs(scored, x['value'], x['log_change'], penalty)
  carries = {'ema_baseline': jnp.float32(0.25)}
  with jax.disable_jit():
    out = algorithm.advantage(inputs, carries)
    learns = out.rows(inputs.valid)
    weight = algorithm.aggregate(inputs.mask & learns[:, None], inputs.valid)
    return out, weight, reward_metrics(scored)


def near(found, want):
  np.testing.assert_allclose(found, want, rtol=2e-4, atol=2e-4)


@settings(max_examples=15, deadline=None)
@given(algorithm=compositions(), seed=st.integers(0, 1000))
def test_a_row_that_is_not_valid_might_as_well_not_be_there(algorithm, seed):
  """Advantages, targets, weights, metrics and carries are those of the batch
  without the row: None is not applicable, not 0."""
  batch = batch_of(seed, C, G)
  rng = np.random.default_rng(seed)
  valid = np.ones((C, G), bool)
  for c in range(C):
    valid[c, rng.permutation(G)[:2]] = False
  valid = valid.reshape(B)
  batch['applies'] &= valid[:, None]
  others = {k: x[valid] for k, x in batch.items()}
  out, weight, metrics = credit_of(algorithm, batch, C)
  want, want_weight, want_metrics = credit_of(algorithm, others, C)
  near(out.advantage[valid], want.advantage)
  near(weight[valid], want_weight)
  assert not np.asarray(out.advantage)[~valid].any()
  assert not np.asarray(weight)[~valid].any()
  if want.value_target is not None:
    near(out.value_target[valid], want.value_target)
    assert not np.asarray(out.value_target)[~valid].any()
  shares = 'frac_not_valid', 'completions/masked_ratio'  # of all rows
  for found, wanted in ((out.metrics, want.metrics), (metrics, want_metrics)):
    assert found.keys() == wanted.keys()
    for name in found.keys() - set(shares):
      near(found[name], wanted[name])


def with_holes(batch: dict, columns: np.ndarray, width: int) -> dict:
  """The batch with its column t of row b at columns[b, t] of `width`, and
  garbage that was not chosen between them."""
  rng = np.random.default_rng(9)

  def spread(x, garbage):
    n, shape = len(x), (*x.shape[:-1], width)
    out = np.full(shape, False) if garbage is None else rng.normal(size=shape)
    for b in range(n):
      out[b, ..., columns[b]] = np.moveaxis(x[b], -1, 0)
    return out

  found = {k: spread(batch[k], 0) for k in ('rewards', 'log_change', 'kl')}
  value = np.pad(spread(batch['value'][:, :-1], 0), ((0, 0), (0, 1)))
  for b, n in enumerate(batch['mask'].sum(1)):  # after the last chosen token
    value[b, columns[b, n - 1] + 1] = batch['value'][b, n]
  return batch | found | {'mask': spread(batch['mask'], None), 'value': value}


@settings(max_examples=15, deadline=None)
@given(algorithm=compositions(), seed=st.integers(0, 1000))
def test_a_row_alone_in_its_group_has_no_advantage(algorithm, seed):
  """Where rows of a group are compared; a KL in the reward has a credit of its
  own. Penalties of length are rewards, which apply to valid rows."""
  assume(algorithm.min_group == 2 and algorithm.kl is None)
  batch = batch_of(seed, C, G)
  batch['applies'][1:G] = False
  out, _, _ = credit_of(algorithm, batch, C)
  assert (np.asarray(out.advantage)[:G] == 0).all()
  assert (np.asarray(out.advantage)[G:] != 0).any()


def test_a_row_alone_in_its_group_is_not_whitened_with_the_others():
  algorithm = algorithms.reinforce_pp_baseline(kl='none', beta=0.0)
  batch = batch_of(0, C, G)
  batch['applies'][1:G] = False
  alone, _, _ = credit_of(algorithm, batch, C)
  batch['applies'][0] = False
  without, _, _ = credit_of(algorithm, batch, C)
  assert (np.asarray(alone.advantage)[:G] == 0).all()
  near(alone.advantage, without.advantage)


@settings(max_examples=15, deadline=None)
@given(algorithm=compositions(), seed=st.integers(0, 1000))
def test_columns_that_were_not_chosen_might_as_well_not_be_there(
  algorithm, seed
):
  """The clock of every credit ticks with chosen tokens: other columns, in other
  places of each row, move no advantage."""
  width, rng = T + 3, np.random.default_rng(seed)
  batch = batch_of(seed, C, G)
  columns = np.sort([rng.permutation(width)[:T] for _ in range(B)], axis=1)
  out, _, _ = credit_of(algorithm, with_holes(batch, columns, width), C)
  want, _, _ = credit_of(algorithm, batch, C)
  pairs = [(out.advantage, want.advantage)]
  if want.value_target is not None:
    pairs.append((out.value_target, want.value_target))
  for x, y in pairs:
    x = np.array(x)
    near(np.take_along_axis(x, columns, axis=1), y)
    np.put_along_axis(x, columns, 0, axis=1)
    assert not x.any()


@settings(max_examples=50, deadline=None)
@given(bits=st.integers(0, 255), seed=st.integers(0, 100))
def test_the_clock_ticks_with_chosen_tokens(bits, seed):
  """One rule for returns and GAE: V = 0 and lambda = 1 make them equal."""
  mask = np.array([bits >> i & 1 for i in range(8)], bool)
  reward = np.random.default_rng(seed).normal(size=8).astype(np.float32)
  with jax.disable_jit():
    togo = sequence.reward_to_go(reward, mask, 0.5)
    zeros = jnp.zeros(8)
    gae = sequence.gae_advantage(reward, zeros, mask, jnp.float32(0), 0.5, 1)
    clock = np.asarray(sequence.to_clock(jnp.asarray(reward), mask))
    back = sequence.from_clock(jnp.asarray(clock), jnp.asarray(mask))
  np.testing.assert_allclose(togo[mask], gae[mask], rtol=1e-6)
  n = mask.sum()
  np.testing.assert_array_equal(clock, [*reward[mask], *np.zeros(8 - n)])
  np.testing.assert_array_equal(back, np.where(mask, reward, 0))


def test_a_discount_skips_columns_that_were_not_chosen():
  mask = jnp.array([True, False, False, True])
  reward = jnp.array([0.0, 9.0, 9.0, 1.0])  # 9 is the tool's, not counted
  togo = sequence.reward_to_go(reward, mask, 0.5)
  np.testing.assert_array_equal(togo, [0.5, 1, 1, 1])


# --- scales, several rewards, completions that were cut ----------------------


@pytest.mark.parametrize('beta', [0.1, 0.01, 0.001])
@pytest.mark.parametrize('scale', ['group_std', 'batch_std'])
def test_a_kl_in_the_reward_is_not_divided_by_a_deviation(scale, beta):
  """Equal rewards leave the KL's part alone, in proportion to beta."""
  rng = np.random.default_rng(0)
  mask = prefixes([T] * B)
  penalty = beta * rng.normal(size=(B, T)).astype(np.float32)
  inputs = inputs_of(mask, np.full(B, 1.0))
  found = algorithms.grpo(scale=scale, kl='reward', beta=beta).advantage(
    inputs._replace(kl_penalty=jnp.asarray(penalty)), {}
  )
  K = penalty[:, ::-1].cumsum(1)[:, ::-1].reshape(C, G, T)
  want = (K.mean(1, keepdims=True) - K).reshape(B, T)
  np.testing.assert_allclose(found.advantage, want, atol=3e-7)


def test_rewards_that_cancel_in_their_sum_are_normalised_alone():
  """GDPO by hand, a group of three with weights 1 and 0.5."""
  one, two = np.array([1.0, 0, 0]), np.array([0.0, 2, 2])
  batch = {
    'mask': np.ones((3, T), bool),
    'ended': np.ones(3, bool),
    'rewards': np.zeros((3, 2, T)),
    'applies': np.ones((3, 2), bool),
    'value': np.zeros((3, T + 1)),
    'log_change': np.zeros((3, T)),
    'kl': np.zeros((3, T)),
    'greedy': np.zeros(3),
  }
  batch['rewards'][:, :, -1] = np.stack([one, two], 1)
  summed = algorithms.grpo()
  each = algorithms.grpo(multi_objective_aggregation='normalize_then_sum')
  assert not credit_of(summed, batch, 1)[0].advantage.any()

  def white(x):
    return (x - x.mean()) / (x.std(ddof=1) + 1e-4)

  want = white(white(one) + 0.5 * white(two))
  found = credit_of(each, batch, 1)[0].advantage
  np.testing.assert_allclose(found, np.tile(want[:, None], T), rtol=1e-5)
  batch['applies'][:, 1] = [True, False, True]  # of two rows; row 1 has one
  two = np.array([0.0, 2])
  white_two = np.insert(white(two), 1, 0)
  want = white(white(one) + 0.5 * white_two)
  found = credit_of(each, batch, 1)[0].advantage
  np.testing.assert_allclose(found, np.tile(want[:, None], T), rtol=1e-5)


def test_a_reward_may_not_have_the_name_of_the_penalty():
  algorithm = algorithms.grpo(overlong_buffer=2, max_length=T)
  mask = prefixes([T] * B)
  inputs = inputs_of(mask, np.zeros(B))
  scored, name = inputs.scored, shaping.PENALTY
  one = ({name: x} for x in (jnp.zeros((B, T)), inputs.valid, jnp.float32(1)))
  scored = scored._replace(**dict(zip(('rewards', 'applies', 'weights'), one)))
  with pytest.raises(ValueError, match='rename it'):
    algorithm.advantage(inputs._replace(scored=scored), {})


def test_a_prompt_without_a_greedy_reward_has_no_advantage():
  mask = prefixes([2] * B)
  greedy = np.array([0.5, np.nan, -1], np.float32)
  inputs = inputs_of(mask, np.arange(B), greedy)
  found = algorithms.remax().advantage(inputs, {}).advantage[:, 0]
  want = np.arange(B) - greedy.repeat(G)
  np.testing.assert_allclose(found, np.nan_to_num(want))


def test_completions_that_were_cut_are_not_learnt_from(tiny):
  """They count in baselines and in the number of rows, as in TRL, and no token
  of theirs is in the loss, its KL or a mean over tokens."""
  rollout = tiny.rollout
  ended = np.asarray(rollout.ended)
  assert 0 < ended.sum() < len(ended)
  last = np.asarray(masked.last_chosen(rollout.mask))
  R = np.random.default_rng(2).normal(size=len(ended))
  scored = make_scored(rollout, np.where(last, R[:, None], 0))
  groups = R.reshape(-1, tiny.G)
  A = (R - groups.mean(1).repeat(tiny.G)) * ended
  record = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda g, s, p=None: (jax.tree.map(jnp.zeros_like, g), g),
  )
  cut = algorithms.reinforce('group_mean', mask_truncated_completions=True)

  def by_hand(inputs, carries):
    return jnp.where(inputs.mask, jnp.asarray(A, jnp.float32)[:, None], 0)

  gradients, found = [], []
  by_hand = algorithms.reinforce(credit=by_hand)
  for algorithm, micro_batches in ((cut, 2), (by_hand, 1)):
    state = init_state(algorithm, record, tiny.params, jax.random.key(0))
    update = make_update(tiny.policy, algorithm, record, micro_batches)
    state, metrics, advantage = jax.jit(update)(state, scored, tiny.rule)
    gradients.append(state.opt_state)
    found.append(metrics)
    np.testing.assert_allclose(advantage[:, 0], A, atol=1e-6)
  for x, y in zip(*map(jax.tree.leaves, gradients)):
    np.testing.assert_allclose(x, y, atol=1e-5)
  stats = look(tiny.policy, tiny.params, rollout, tiny.rule)
  on = np.asarray(rollout.mask) & ended[:, None]
  entropy = np.asarray(stats.entropy)[on].mean()
  assert found[0]['entropy'] == pytest.approx(entropy, rel=1e-4)
  assert found[0]['completions/masked_ratio'] == pytest.approx((~ended).mean())
  assert found[0]['reward'] == pytest.approx(R.mean(), rel=1e-4)
