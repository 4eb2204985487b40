"""Laws of the update: what must change nothing, and what may never be NaN."""

import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import (
  advantage_inputs,
  changed,
  greedy_outcomes,
  make_scored,
  random_prompts,
  random_reward,
)

from jaxrl_tok import masked
from jaxrl_tok.credit import advantages, algorithms, losses, sequence
from jaxrl_tok.policy import evaluate
from jaxrl_tok.sampler import make_sampler
from jaxrl_tok.step.groups import merge_rows, split_groups, split_rows
from jaxrl_tok.step.programs import bound_update
from jaxrl_tok.step.state import init_state
from jaxrl_tok.step.update import (
  check_scored,
  columns_needed,
  make_update,
  shortened,
)
from jaxrl_tok.types import Greedy, Prompts, Scored

# hands out the gradient as the optimizer's state
RECORD = optax.GradientTransformation(
  lambda params: jax.tree.map(jnp.zeros_like, params),
  lambda g, s, p=None: (jax.tree.map(jnp.zeros_like, g), g),
)
REINFORCE = algorithms.reinforce(advantages.leave_one_out())
GRPO = algorithms.grpo()
REMAX = algorithms.remax()


class Found(NamedTuple):
  """An update's results: `grads` of (policy, critic)."""

  grads: Any
  metrics: dict
  advantage: jax.Array
  carries: dict


@pytest.fixture(scope='module')
def reward(tiny):
  return random_reward(tiny.rollout)


@pytest.fixture(scope='module')
def run(tiny):
  """Runs (Scored, algorithm, micro-batches, carries, columns) -> Found."""
  compiled = {}

  def run(scored, algorithm=REINFORCE, parts=1, carries=None, length=9):
    key = id(algorithm), parts, length
    if key not in compiled:
      update = make_update(tiny.policy, algorithm, RECORD, parts)
      update = update if length == 9 else shortened(update, length)
      compiled[key] = jax.jit(update), algorithm  # keeps the id alive
    state = init_state(algorithm, RECORD, tiny.params, jax.random.key(0))
    state = state.replace(carries=state.carries | (carries or {}))
    state, metrics, advantage = compiled[key][0](state, scored, tiny.rule)
    return Found(state.opt_state, metrics, advantage, state.carries)

  return run


@pytest.fixture(scope='module')
def batch(tiny, reward):
  return make_scored(tiny.rollout, reward)


def assert_same(a, b, rtol=1e-5):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    np.testing.assert_allclose(x, y, atol=rtol * max(1, np.abs(y).max()))


def with_mask(scored: Scored, mask) -> Scored:
  """A batch whose policy chose the tokens of `mask` alone."""
  rollout = scored.rollout
  rollout = rollout._replace(mask=mask, logp=rollout.logp * mask)
  rewards = {k: np.where(mask, x, 0) for k, x in scored.rewards.items()}
  return scored._replace(rollout=rollout, rewards=rewards)


def test_micro_batches_change_nothing(batch, run):
  one, four = run(batch), run(batch, parts=4)
  assert_same(four.grads, one.grads)
  assert_same(four.metrics, one.metrics)
  np.testing.assert_array_equal(four.advantage, one.advantage)


def test_micro_batches_change_nothing_with_a_reference(tiny, batch, run):
  algorithm = algorithms.reinforce(
    advantages.group_mean(),
    aggregate=losses.token_mean,
    gamma=0.9,
    kl='reverse',  # presets have it in the reward
    beta=0.3,
  )
  other = {'reference': jax.tree.map(lambda x: x * 1.1, tiny.params)}
  one, four = (run(batch, algorithm, n, other) for n in (1, 4))
  assert float(one.metrics['kl']) > 0
  assert_same(four, one)


# --- groups without an advantage ---------------------------------------------


@jax.custom_vjp
def counted(params, passes):
  """params; the gradient of `passes` is 1 for every backward pass."""
  return params


counted.defvjp(
  lambda params, passes: (params, None), lambda _, g: (g, jnp.float32(1))
)


def test_groups_without_an_advantage_are_left_out(tiny, reward, run):
  """Gradient and metrics stay; there are no more backward passes than need
  be."""
  policy = tiny.policy._replace(merge_params=lambda p, frozen: counted(*p))
  update = jax.jit(make_update(policy, GRPO, RECORD, 4))
  last = masked.last_chosen(tiny.rollout.mask)
  params = tiny.params, jnp.float32(0)
  for alike in ([], [0, 2], [0, 1, 3], [0, 1, 2, 3]):
    rows = np.asarray(reward).sum(1).reshape(4, 3)
    rows[alike] = 0.5
    given = make_scored(tiny.rollout, np.where(last, rows.reshape(-1, 1), 0))
    state = init_state(GRPO, RECORD, params, jax.random.key(0))
    state, metrics, _ = update(state, given, tiny.rule)
    (grads, passes), _ = state.opt_state
    want = run(given, GRPO)
    assert_same(grads, want.grads[0])
    for name, value in metrics.items():
      if name != 'grad_norm':  # that of `passes` is in it, too
        np.testing.assert_allclose(value, want.metrics[name], atol=1e-5)
    assert float(passes) == 4 - len(alike)


@pytest.mark.parametrize(
  ('changes', 'flat'),
  [
    ({}, True),
    ({'entropy_coef': 0.01}, False),
    ({'kl': 'reverse', 'beta': 0.1}, False),
    ({'credit': advantages.gae}, False),
    ({'epochs': 2, 'max_update_kl': 0.1}, True),
    ({'loss': lambda stats, trajectory: stats.logp}, False),
  ],
)
def test_when_groups_may_be_left_out(changes, flat):
  given = {'baseline': advantages.group_mean(), 'loss': losses.clip, **changes}
  if 'credit' in given:
    del given['baseline']
  assert algorithms.reinforce(**given).flat_without_advantage == flat


# --- columns -----------------------------------------------------------------


@pytest.mark.parametrize(
  'algorithm', [REINFORCE, GRPO, REMAX], ids=lambda a: a.name
)
@pytest.mark.parametrize('holes', [False, True])
def test_a_shorter_update_changes_nothing(tiny, batch, run, algorithm, holes):
  """Rows over by column 6, some with observed tokens between two turns."""
  mask = np.asarray(tiny.rollout.mask).copy()
  mask[:, 6:] = False
  if holes:
    mask[::2] = [1, 1, 0, 0, 0, 1, 0, 0, 0]
  given = with_mask(batch, mask)
  if algorithm.greedy:
    greedy = np.arange(9) < np.array([1, 4, 5, 6])[:, None]
    rewards = np.where(greedy, np.arange(9, dtype=np.float32), 0)
    given = given._replace(greedy=Greedy(rewards, greedy))
  assert columns_needed(mask) == 6
  want = run(given, algorithm)
  found = run(given, algorithm, length=6)
  assert_same(found.grads, want.grads)
  assert_same(found.metrics, want.metrics)
  np.testing.assert_allclose(found.advantage, want.advantage, atol=1e-6)


def test_columns_reach_to_the_last_turn():
  """A row `turn, 20 observed tokens, turn` needs the columns of both turns."""
  mask = np.zeros((3, 40), bool)
  assert columns_needed(mask) == 1
  mask[0, :3] = mask[0, 23:26] = True
  mask[1, :9] = True
  assert columns_needed(mask) == 26
  mask[2] = True
  assert columns_needed(mask) == 40


def test_an_update_holds_the_greedy_completions(batch):
  """The shortest program that holds every chosen token is taken, also where a
  greedy completion is the longest."""
  taken = []

  def program(length):
    return lambda *given: (taken.append(length), {}, None)

  P = batch.rollout.prompts.tokens.shape[1]
  update = bound_update(
    types.SimpleNamespace(rule=None), {(P, n): program(n) for n in (4, 6, 9)}
  )
  short = with_mask(batch, np.asarray(batch.rollout.mask) & (np.arange(9) < 4))
  for length in (1, 4, 5, 6, 8):
    greedy = np.broadcast_to(np.arange(9) < length, (4, 9))
    update(None, short._replace(greedy=Greedy(np.zeros((4, 9)), greedy)))
  update(None, short)
  assert taken == [4, 4, 6, 6, 9, 4]


def test_padding_changes_nothing(tiny, reward, run):
  want = run(make_scored(tiny.rollout, reward))
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
  found = run(make_scored(padded, longer(reward)))
  assert_same(found.grads, want.grads)
  assert_same(found.metrics, want.metrics)


# --- rows --------------------------------------------------------------------


def test_other_rows_change_nothing(tiny, reward, run):
  """The gradient of a sum over prompts is the sum of their gradients."""
  want = run(make_scored(tiny.rollout, reward)).grads
  total = None
  for c in range(4):
    rows = slice(3 * c, 3 * c + 3)
    part = jax.tree.map(lambda x, rows=rows: x[rows], tiny.rollout)
    part = part._replace(
      prompts=jax.tree.map(lambda x, c=c: x[c : c + 1], tiny.prompts)
    )
    found = run(make_scored(part, reward[rows])).grads
    total = found if total is None else jax.tree.map(jnp.add, total, found)
  assert_same(jax.tree.map(lambda g: g / 4, total), want)


@pytest.fixture(scope='module')
def explicit(tiny):
  """Returns explicit(weight [B, T]): the gradient of -sum(weight log-prob)."""

  def loss(params, weight):
    logp = evaluate(tiny.policy, params, tiny.rollout, tiny.rule).logp
    return -jnp.sum(jnp.where(tiny.rollout.mask, weight * logp, 0))

  gradient = jax.jit(jax.grad(loss))
  return lambda weight: gradient(tiny.params, np.float32(weight))


# a whole group, one row, two rows of three
NOT_VALID = [3, 4, 5, 1, 9, 11]
VALID = np.isin(np.arange(12), NOT_VALID, invert=True)


def by_hand(algorithm, R, mask) -> np.ndarray:
  """Weight of each token's log-prob in the loss, where rows that are not valid
  are in no group: numbers for outcomes R [B]."""
  advantage = np.zeros(12)
  for c in range(4):
    rows = [b for b in range(3 * c, 3 * c + 3) if VALID[b]]
    for b in rows:
      others = [R[i] for i in rows if i != b]
      if not others:
        continue
      if algorithm is REINFORCE:
        advantage[b] = R[b] - np.mean(others)
      else:
        group = R[rows]
        advantage[b] = (R[b] - group.mean()) / (group.std(ddof=1) + 1e-4)
  each = VALID.sum()
  each = each if algorithm is REINFORCE else each * mask.sum(1, keepdims=True)
  return np.where(mask, advantage[:, None] / each, 0)


@pytest.mark.parametrize('parts', [1, 4])
@pytest.mark.parametrize('algorithm', [REINFORCE, GRPO], ids=lambda a: a.name)
def test_rows_that_are_not_valid_are_in_no_group(
  tiny, run, explicit, algorithm, parts
):
  mask, R = np.asarray(tiny.rollout.mask), np.linspace(-1, 2, 12) ** 2
  reward = np.where(masked.last_chosen(mask), R[:, None], 0)
  reward[~VALID] = np.nan  # no number of theirs is read
  found = run(
    make_scored(tiny.rollout, reward, applies=VALID), algorithm, parts
  )
  assert_same(found.grads[0], explicit(by_hand(algorithm, R, mask)))
  assert (np.asarray(found.advantage)[~VALID] == 0).all()
  metrics = found.metrics
  assert all(np.isfinite(v) for v in metrics.values())
  assert metrics['frac_not_valid'] == pytest.approx(0.5)
  assert metrics['reward'] == pytest.approx(R[VALID].mean(), rel=1e-5)
  # a group with a single row has no spread, and is of equal rewards
  std = [R[[0, 2]].std(ddof=1), R[6:9].std(ddof=1)]
  assert metrics['reward_group_std'] == pytest.approx(np.mean(std), rel=1e-5)
  whole = R[VALID].std(ddof=1)
  assert metrics['reward_std'] == pytest.approx(whole, rel=1e-5)
  assert metrics['frac_reward_zero_std'] == pytest.approx(1 / 3)


@pytest.mark.parametrize('parts', [1, 4])
def test_without_a_valid_row_nothing_moves(tiny, reward, run, parts):
  algorithm = ALL_CARRIES
  given = make_scored(
    tiny.rollout, reward, applies=np.zeros(12, bool), weight=2.0
  )
  before = {'ema_baseline': jnp.float32(0.25)}
  found = run(given, algorithm, parts, before)
  for g in jax.tree.leaves(found.grads):
    np.testing.assert_array_equal(g, 0)
  assert all(np.isfinite(v) for v in found.metrics.values())
  assert float(found.carries['ema_baseline']) == 0.25
  assert float(found.metrics['frac_not_valid']) == 1
  np.testing.assert_array_equal(found.advantage, 0)


ALL_CARRIES = algorithms.reinforce(advantages.ema(), entropy_coef=0.1)


def test_the_end_token_is_credited_and_nothing_after_it(tiny):
  """d loss / d log-prob is -A/B at every chosen token, the end included."""
  mask = np.asarray(tiny.rollout.mask)
  reward = np.zeros(mask.shape, np.float32)
  last = mask.sum(1) - 1
  reward[np.arange(12), last] = np.arange(12)
  algorithm = algorithms.reinforce(advantages.fixed(0.5))
  inputs = advantage_inputs(tiny.rollout, reward)
  advantage = algorithm.advantage(inputs, {}).advantage
  weight = algorithm.aggregate(inputs.mask, inputs.valid)
  want = np.where(mask, np.arange(12)[:, None] - 0.5, 0)
  np.testing.assert_allclose(advantage, want, atol=1e-6)
  np.testing.assert_allclose(weight, mask / 12)
  assert (want[np.arange(12), last] != 0).all()


def test_garbage_off_mask_is_harmless(tiny, reward, batch, run):
  mask = np.asarray(tiny.rollout.mask)
  want = run(batch)
  bad = tiny.rollout._replace(
    logp=jnp.where(mask, tiny.rollout.logp, jnp.nan),
    tokens=jnp.where(mask, tiny.rollout.tokens, 3),
  )
  found = run(make_scored(bad, np.where(mask, reward, np.nan)))
  assert_same(found.grads, want.grads)
  assert_same(found.metrics, want.metrics)
  assert np.isfinite(found.advantage).all()


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
  found = run(make_scored(rollout, given))
  for g in jax.tree.leaves(found.grads):
    np.testing.assert_allclose(g, 0, atol=1e-7)
  assert all(np.isfinite(v) for v in found.metrics.values())
  assert float(found.metrics['frac_reward_zero_std']) == 1


# --- parts of an update ------------------------------------------------------


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
  """Outcome R of a sequence: A = R - b at every chosen token, in NumPy."""
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
  found = algorithms.reinforce(baseline).advantage(
    advantage_inputs(tiny.rollout, reward),
    {'ema_baseline': jnp.float32(0.25)},
  )
  np.testing.assert_allclose(
    found.advantage, np.where(mask, (R - b)[:, None], 0), atol=1e-5
  )


def test_the_ema_follows_the_mean_return(tiny, reward, run):
  given = make_scored(tiny.rollout, reward)
  found = run(given, ALL_CARRIES, 1, {'ema_baseline': jnp.float32(0.5)})
  want = 0.9 * 0.5 + 0.1 * reward.sum(1).mean()
  assert float(found.carries['ema_baseline']) == pytest.approx(want, abs=1e-6)


def test_reward_to_go_is_its_sum():
  rng = np.random.default_rng(0)
  reward = rng.normal(size=7).astype(np.float32)
  mask = np.array([1, 1, 0, 1, 1, 0, 0], bool)
  for gamma in (1.0, 0.9, 0.0):
    found = sequence.reward_to_go(jnp.asarray(reward), mask, gamma)
    want = [
      sum(gamma ** mask[t:k].sum() * reward[k] for k in range(t, 7) if mask[k])
      for t in range(7)
    ]
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_fractional_rewards_survive_integer_arrays(tiny, reward):
  whole = (reward > 0).astype(np.int32)
  inputs = advantage_inputs(tiny.rollout, reward)
  scored = inputs.scored._replace(rewards={'reward': whole})
  inputs = inputs._replace(scored=scored)
  algorithm = algorithms.reinforce(advantages.fixed(0.25))
  found = algorithm.advantage(inputs, {}).advantage
  assert found.dtype == jnp.float32
  mask = np.asarray(tiny.rollout.mask)
  want = np.cumsum(whole[:, ::-1], 1)[:, ::-1] - 0.25
  np.testing.assert_allclose(found, np.where(mask, want, 0), atol=1e-6)


def test_aggregations_against_numpy():
  mask = np.arange(5)[None] < np.array([1, 3, 5, 0, 2])[:, None]
  valid = np.array([1, 1, 1, 1, 0], bool)
  loss = np.random.default_rng(0).normal(size=(5, 5))
  sums = (loss * mask).sum(1)[:4]
  want = {
    losses.token_mean: sums.sum() / 9,
    losses.seq_mean_token_mean: (sums / np.array([1, 3, 5, 1])).sum() / 4,
    losses.seq_mean_token_sum: sums.sum() / 4,
    losses.seq_mean_token_sum_norm: sums.sum() / (4 * 8),
  }
  for aggregate, value in want.items():
    weight = np.asarray(aggregate(jnp.asarray(mask), jnp.asarray(valid), 8))
    assert (weight * loss).sum() == pytest.approx(value, abs=1e-6)
    assert (weight[~mask] == 0).all()
    assert (weight[4] == 0).all()


def test_split_and_merge_undo_each_other():
  x = jnp.arange(24).reshape(12, 2)
  np.testing.assert_array_equal(merge_rows(split_rows(x, 4)), x)
  prompts, rows = split_groups((jnp.arange(4), jnp.arange(12)), 2, 4)
  np.testing.assert_array_equal(prompts, [[0, 2], [1, 3]])
  np.testing.assert_array_equal(
    rows, [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
  )


# --- rewards by name, and metrics --------------------------------------------


def test_rewards_are_weighted_where_they_apply(tiny, reward, run):
  """r = sum_k w_k r_k over the rewards that apply to the row."""
  mask = np.asarray(tiny.rollout.mask)
  other = np.where(mask, np.arange(9, dtype=np.float32), np.nan)
  first = np.arange(12) % 3 != 0
  second = np.arange(12) < 6
  spoiled = np.where(first[:, None], reward, np.nan).astype(np.float32)
  scored = Scored(
    tiny.rollout,
    {'a': spoiled, 'b': other},
    {'a': first, 'b': second},
    {'a': jnp.float32(0.5), 'b': jnp.float32(-2)},
  )
  valid = first | second
  np.testing.assert_array_equal(scored.valid, valid)
  b = np.where(mask, np.arange(9), 0)
  want = 0.5 * np.where(first[:, None], reward, 0)
  want = want - 2 * np.where(second[:, None], b, 0)
  np.testing.assert_allclose(scored.reward, want, rtol=1e-5, atol=1e-6)
  metrics = run(scored).metrics
  rows = want.sum(1)
  assert metrics['reward'] == pytest.approx(rows[valid].mean(), rel=1e-4)
  assert metrics['frac_not_valid'] == pytest.approx(1 - valid.mean())
  means = reward.sum(1)[first].mean(), b.sum(1)[second].mean()
  assert metrics['rewards/a/mean'] == pytest.approx(means[0], abs=1e-5)
  assert metrics['rewards/b/mean'] == pytest.approx(means[1], rel=1e-5)


def test_metrics(tiny, run, reward, batch):
  _, metrics, advantage, _ = run(batch)
  mask = np.asarray(tiny.rollout.mask)
  R = reward.sum(1)
  assert metrics['reward'] == pytest.approx(R.mean(), abs=1e-5)
  std = R.reshape(4, 3).std(1, ddof=1).mean()
  assert metrics['reward_group_std'] == pytest.approx(std, abs=1e-5)
  assert metrics['reward_std'] == pytest.approx(R.std(ddof=1), abs=1e-5)
  assert metrics['sampler_logp_gap'] < 1e-5
  stale = tiny.rollout._replace(logp=tiny.rollout.logp.at[5, 0].add(-0.25))
  others = run(make_scored(stale, reward)).metrics
  assert others['sampler_logp_gap'] == pytest.approx(0.25, abs=1e-4)
  chosen = np.asarray(advantage)[mask]
  assert metrics['advantage_std'] == pytest.approx(chosen.std(), rel=1e-5)
  stats = jax.jit(evaluate, static_argnums=0)(
    tiny.policy, tiny.params, tiny.rollout, tiny.rule
  )
  surrogate = (np.asarray(advantage) * np.asarray(stats.logp)).sum() / 12
  assert metrics['surrogate'] == pytest.approx(surrogate, abs=1e-5)


# --- refusals ----------------------------------------------------------------


def spoil(scored: Scored, **fields) -> Scored:
  return scored._replace(rollout=scored.rollout._replace(**fields))


@pytest.mark.parametrize(
  'change',
  [
    lambda s: s._replace(rewards={}, applies={}, weights={}),
    lambda s: s._replace(weights={}),
    lambda s: s._replace(applies={'other': s.applies['reward']}),
    lambda s: s._replace(rewards={'reward': s.rewards['reward'][:, :3]}),
    lambda s: s._replace(applies={'reward': s.applies['reward'][:5]}),
    lambda s: spoil(s, mask=s.rollout.mask.astype(jnp.int32)),
    lambda s: spoil(s, logp=s.rollout.logp[:, :4]),
    lambda s: spoil(s, ended=s.rollout.ended[:3]),
    lambda s: spoil(s, version=jnp.int32(0)),
    lambda s: spoil(s, prompts=random_prompts(5)),
    lambda s: s._replace(greedy=greedy_outcomes(jnp.zeros(3), 9)),
  ],
  ids=lambda change: str(change.__code__.co_firstlineno),
)
def test_records_that_do_not_fit_are_refused_in_one_line(batch, change):
  check_scored(batch)
  with pytest.raises(ValueError, match=r'expected|give|divide') as refused:
    check_scored(change(batch))
  assert '\n' not in str(refused.value)
  assert len(str(refused.value)) < 200


def test_an_update_refuses_before_it_is_compiled(tiny, batch):
  update = make_update(tiny.policy, REINFORCE, RECORD)
  state = init_state(REINFORCE, RECORD, tiny.params, jax.random.key(0))
  with pytest.raises(ValueError, match='Scored has rewards reward, applies'):
    jax.jit(update).lower(state, batch._replace(weights={}), tiny.rule)


# --- and it learns -----------------------------------------------------------


def test_it_learns(tiny):
  """Reward for one token: its probability rises to nearly 1."""
  config = changed(tiny.config, samples_per_prompt=8, max_completion_length=3)
  sample = jax.jit(make_sampler(tiny.policy, config))
  optimizer = optax.adam(2e-2)
  update = jax.jit(make_update(tiny.policy, REINFORCE, optimizer))
  state = init_state(REINFORCE, optimizer, tiny.params, jax.random.key(0))
  prompts, shares = random_prompts(8), []
  for step in range(15):
    key = jax.random.fold_in(state.key, step)
    rollout = sample(state.params, key, prompts, tiny.rule)
    reward = (rollout.tokens == 4) & rollout.mask
    shares.append(float(reward.sum() / rollout.mask.sum()))
    scored = make_scored(rollout, reward)
    state, _, _ = update(state, scored, tiny.rule)
  assert int(state.step) == 15
  assert shares[0] < 0.2
  assert np.mean(shares[-3:]) > 0.9
