"""Exactness: every sequence of an enumerable case, and every group of them.

V = 3 (token 2 ends), T = 3: 15 completions of one prompt. The expected
gradient of an algorithm is the sum over all groups of G completions of their
probability times the gradient that `update` computes for them; the true one
is the gradient of sum_y pi(y) R(y).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import (
  CONFIG,
  advantage_inputs,
  changed,
  look,
  make_rollout,
  make_scored,
  sharpened,
)

from jaxrl_tok import distribution, masked
from jaxrl_tok.credit import advantages, algorithms, losses
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.policy import completion_hidden, evaluate
from jaxrl_tok.step.state import init_state
from jaxrl_tok.step.update import make_update
from jaxrl_tok.types import Advantage, Carry, Greedy, Prompts, Rollout

END, T = 2, 3
POLICY = make_policy(changed(CONFIG, vocab_size=3, layers=CONFIG.layers[:1]))
RULE = distribution.make_rule(3, [END])
# a greedy completion of two tokens, each with a reward
GREEDY = Greedy(
  jnp.array([[0.3, -0.2] + [0.0] * (T - 2)]),
  jnp.array([[True, True] + [False] * (T - 2)]),
)
# hands out the gradient itself, as its state
RECORD = optax.GradientTransformation(
  lambda params: jax.tree.map(jnp.zeros_like, params),
  lambda g, s, p=None: (jax.tree.map(jnp.zeros_like, g), g),
)


def sequences():
  """Completions, all of them: (tokens [n, T], mask [n, T])."""
  rows = []
  for row in itertools.product(range(3), repeat=T):
    length = row.index(END) + 1 if END in row else T
    if not any(row[length:]):
      rows.append((row, [t < length for t in range(T)]))
  tokens, mask = map(np.array, zip(*rows))
  return tokens.astype(np.int32), mask


TOKENS, MASK = sequences()
N = len(TOKENS)


def rollout_of(index):
  """Rollout of groups of sequences, by their numbers index [C, G]."""
  C = len(index)
  flat = index.reshape(-1)
  prompts = Prompts(np.full((C, 2), 1, np.int32), np.full((C,), 2, np.int32))
  ended = jnp.asarray((TOKENS[flat] == END).any(1))
  return make_rollout(prompts, TOKENS[flat], MASK[flat], ended=ended)


def token_rewards(kind):
  """Rewards [N, T]: 'outcome' one a sequence, 'dense' one for each prefix."""
  rng = np.random.default_rng(0)
  if kind == 'outcome':
    last = np.asarray(masked.last_chosen(jnp.asarray(MASK)))
    return np.where(last, rng.normal(size=(N, 1)) + 1, 0).astype(np.float32)
  table = {}
  reward = np.zeros((N, T), np.float32)
  for n, t in zip(*np.nonzero(MASK)):
    prefix = tuple(TOKENS[n, : t + 1])
    reward[n, t] = table.setdefault(prefix, rng.normal() + 0.5)
  return reward


@pytest.fixture(scope='module')
def params():
  return sharpened(jax.jit(POLICY.init)(jax.random.key(3)), 3.0)


@pytest.fixture(scope='module')
def everything(params):
  """Log-prob [N] of each sequence, and its gradient with a leading axis N."""
  one = rollout_of(np.arange(N)[:, None])

  def logp(params):
    return evaluate(POLICY, params, one, RULE).logp.sum(1)

  return jax.jit(lambda p: (logp(p), jax.jacrev(logp)(p)))(params)


def true_gradient(everything, value):
  """sum_y pi(y) R(y) grad log pi(y), for R = value [N]."""
  logp, jacobian = everything
  weight = np.exp(np.asarray(logp, np.float64)) * value
  return jax.tree.map(
    lambda j: np.tensordot(weight, np.asarray(j, np.float64), 1), jacobian
  )


@pytest.fixture(scope='module')
def ascend(params):
  """advantage [N, T] -> the gradient (as ascent) that `update` computes for
  one row of each sequence. Compiled once, for the advantage is a carry."""
  zeros = jnp.zeros((N, T))
  stays = Carry(lambda params: zeros, lambda value, state, metrics: value)
  given = algorithms.reinforce(advantages.no_baseline())._replace(
    advantage=lambda inputs, carries: Advantage(carries['given']),
    carries={'given': stays},
  )
  state = init_state(given, RECORD, params, jax.random.key(0))
  update = jax.jit(make_update(POLICY, given, RECORD))
  rows = make_scored(rollout_of(np.arange(N)[:, None]), zeros)

  def ascend(advantage):
    carries = {'given': jnp.asarray(advantage, jnp.float32)}
    new, _, _ = update(state.replace(carries=carries), rows, RULE)
    return jax.tree.map(lambda g: -np.asarray(g), new.opt_state)

  return ascend


def expected_gradient(
  ascend, everything, baseline, reward, G, carries, penalty=None, **changes
):
  """E[gradient of update] over every group of G.

  A row's gradient is linear in its advantage, so the rows that hold the same
  sequence are added up before `update` sees them (in float64: 3375 groups
  of three would lose the sixth digit in float32).
  """
  groups = np.array(list(itertools.product(range(N), repeat=G)))
  logp = np.asarray(everything[0], np.float64)
  prob = np.exp(logp[groups].sum(1))
  assert prob.sum() == pytest.approx(1, abs=1e-5)
  algorithm = algorithms.reinforce(baseline, **changes)

  def advantage_of(index):
    """Advantage [G, T] of a batch that is this group."""
    mask = jnp.asarray(MASK)[index]
    prompts = Prompts(None, jnp.full((1,), 2))
    one = Rollout(prompts, None, mask, None, None, None, None)
    inputs = advantage_inputs(one, jnp.asarray(reward)[index], greedy=GREEDY)
    if penalty is not None:
      inputs = inputs._replace(kl_penalty=penalty[index])
    return algorithm.advantage(inputs, carries).advantage

  advantage = np.asarray(jax.jit(jax.vmap(advantage_of))(groups), np.float64)
  summed = np.zeros((N, T))
  np.add.at(summed, groups, advantage * prob[:, None, None] / G)
  return ascend(summed * N)  # update takes the mean over its N rows


def assert_close(found, want, atol=1e-6):
  largest = max(np.abs(w).max() for w in jax.tree.leaves(want))
  assert largest > 0.02, 'the gradient to compare with is nearly zero'
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize('kind', ['outcome', 'dense'])
@pytest.mark.parametrize(
  ('baseline', 'G', 'share'),
  [
    (advantages.no_baseline(), 1, 1.0),
    (advantages.fixed(0.7), 1, 1.0),
    (advantages.ema(0.9), 1, 1.0),
    (advantages.greedy(), 1, 1.0),
    (advantages.leave_one_out(), 2, 1.0),
    (advantages.leave_one_out(), 3, 1.0),
    (advantages.group_mean(), 2, 1 / 2),
    (advantages.group_mean(), 3, 2 / 3),
    (advantages.batch_mean(), 2, 1 / 2),
  ],
  ids=lambda x: x.name if isinstance(x, tuple) else str(x),
)
def test_expected_gradient_is_exact(
  ascend, everything, baseline, G, share, kind
):
  reward = token_rewards(kind)
  carries = {'ema_baseline': jnp.float32(0.4)}  # as learnt from other batches
  found = expected_gradient(ascend, everything, baseline, reward, G, carries)
  want = true_gradient(everything, share * reward.sum(1).astype(np.float64))
  assert_close(found, want)


def doubled(whole_CxG, valid_CxG):
  """A scale of one's own; group_std would be 1e-4 where a sequence is drawn
  twice, and float32 lose what is added to such an advantage."""
  return jnp.full((len(whole_CxG), 1), 2.0)


@pytest.mark.parametrize('equal', [False, True])
@pytest.mark.parametrize(
  ('baseline', 'G', 'share', 'changes'),
  [
    (advantages.group_mean(), 2, 1 / 2, {'scale': 'group_std'}),
    (advantages.group_mean(), 3, 2 / 3, {'scale': 'group_std'}),
    (advantages.leave_one_out(), 2, 1.0, {'scale': 'group_std'}),
    (advantages.ema(0.9), 1, 1.0, {'scale': doubled}),
    (advantages.greedy(), 1, 1.0, {'scale': doubled}),
    (
      advantages.group_mean(),
      3,
      2 / 3,
      {
        'scale': 'group_std',
        'multi_objective_aggregation': 'normalize_then_sum',
      },
    ),
  ],
  ids=(
    'mean of 2',
    'mean of 3',
    'leave one out',
    'ema',
    'greedy',
    'each reward',
  ),
)
def test_a_kl_in_the_reward_adds_its_gradient_at_one_factor(
  params, ascend, everything, kl_gradients, baseline, G, share, changes, equal
):
  """E[gradient] is that of the scaled rewards plus beta times the KL's, which
  no deviation of rewards divides; also where all rewards are equal."""
  reference, wanted = kl_gradients
  reward = token_rewards('outcome')
  if equal:
    reward = np.where(reward != 0, np.float32(1 / 3), 0)
  one = rollout_of(np.arange(N)[:, None])
  logps = (look(POLICY, p, one, RULE).logp for p in (params, reference))
  d = np.subtract(*map(np.asarray, logps))
  carries = {'ema_baseline': jnp.float32(0.4)}
  given = ascend, everything, baseline, reward, G, carries
  alone = expected_gradient(*given, **changes)
  if equal and baseline.min_group > 1:
    assert max(np.abs(g).max() for g in jax.tree.leaves(alone)) == 0
  want = jax.tree.map(lambda g: -share * np.asarray(g), wanted['reward'])
  for beta in (1.0, 0.01):
    both = expected_gradient(*given, penalty=beta * jnp.asarray(d), **changes)
    found = jax.tree.map(lambda x, y, by=beta: (x - y) / by, both, alone)
    assert_close(found, want, max(1e-5, 1e-7 / beta))


@pytest.mark.parametrize('gae_lambda', [1.0, 0.0])
def test_any_value_is_an_exact_baseline(ascend, everything, gae_lambda):
  """A_t = G_t - V(s_t), lambda 1, is unbiased for every V; with lambda 0 for
  the true V alone."""
  reward = token_rewards('dense')
  logp = np.asarray(everything[0], np.float64)
  prob = np.exp(logp)
  rng = np.random.default_rng(4)
  V = np.zeros((N, T + 1))
  prefixes = {}
  for n, t in zip(*np.nonzero(MASK)):
    prefixes.setdefault(tuple(TOKENS[n, :t]), []).append((n, t))
  for where in prefixes.values():  # the true value of a state, or any
    weight = np.array([prob[n] for n, _ in where])
    togo = np.array([reward[n, t:].sum() for n, t in where])
    true = (weight * togo).sum() / weight.sum()
    for n, t in where:
      V[n, t] = true
    if gae_lambda:
      noise = rng.normal()
      for n, t in where:
        V[n, t] += noise
  algorithm = algorithms.a2c(gamma=1.0, gae_lambda=gae_lambda)
  rollout = rollout_of(np.arange(N)[:, None])
  inputs = advantage_inputs(rollout, reward, jnp.asarray(V, jnp.float32))
  advantage, target = algorithm.advantage(inputs, {})[:2]
  weighted = np.asarray(advantage, np.float64) * prob[:, None]
  found = ascend(weighted * N)
  assert_close(found, true_gradient(everything, reward.sum(1).astype(float)))
  np.testing.assert_allclose(
    np.asarray(target)[MASK],
    (np.asarray(advantage) + V[:, :T])[MASK],
    atol=1e-5,
  )


def test_ema_scores_before_it_learns():
  algorithm = algorithms.reinforce(advantages.ema(0.75))
  rollout = rollout_of(np.arange(4).reshape(2, 2))
  last = np.asarray(masked.last_chosen(rollout.mask))
  inputs = advantage_inputs(rollout, np.where(last, 4.0, 0.0))
  ema = algorithm.carries['ema_baseline']
  before = ema.init(None)
  assert before == 0
  out = algorithm.advantage(inputs, {'ema_baseline': before + 2})
  np.testing.assert_allclose(np.asarray(out.advantage)[rollout.mask], 2.0)
  after = ema.after(jnp.float32(2), None, out.metrics | {'rows': 4})
  assert float(after) == pytest.approx(0.75 * 2 + 0.25 * 4)


# --- the KL forms, on-policy -------------------------------------------------


def state_distributions(params):
  """log pi(. | prefix) [N, T, 3] at every position of every sequence."""
  one = rollout_of(np.arange(N)[:, None])
  hidden = completion_hidden(POLICY, params, one)
  return jax.nn.log_softmax(POLICY.logits(params, hidden))


REFERENCE_KEY = jax.random.key(8)


@pytest.fixture(scope='module')
def kl_gradients(params, everything):
  """Gradients of the reverse and the forward KL per state, in pi's visits, and
  those of the reverse KL between whole sequences."""
  reference = sharpened(jax.jit(POLICY.init)(REFERENCE_KEY), 2.0)
  prob = jnp.exp(everything[0])[:, None] * MASK  # [N, T] visits
  ref = state_distributions(reference)

  def reverse(p):
    log_pi = state_distributions(p)
    kl = (jnp.exp(log_pi) * (log_pi - ref)).sum(-1)
    return (prob * kl).sum()

  def forward(p):
    kl = (jnp.exp(ref) * (ref - state_distributions(p))).sum(-1)
    return (prob * kl).sum()

  one = rollout_of(np.arange(N)[:, None])

  def whole(p):
    logp = evaluate(POLICY, p, one, RULE).logp.sum(1)
    other = evaluate(POLICY, reference, one, RULE).logp.sum(1)
    return (jnp.exp(logp) * (logp - other)).sum()

  named = {'reverse': reverse, 'forward': forward, 'reward': whole}
  grads = jax.jit(lambda p: {k: jax.grad(f)(p) for k, f in named.items()})
  return reference, grads(params)


@pytest.mark.parametrize('kl', ['reverse', 'forward', 'reward'])
def test_kl_forms_have_the_gradient_of_their_name(
  params, everything, kl_gradients, kl
):
  """With rewards 0 and beta 1 the expected descent direction is the KL's."""
  reference, wanted = kl_gradients
  algorithm = algorithms.reinforce(advantages.no_baseline(), kl=kl, beta=1.0)
  index = np.arange(N)[:, None]
  rollout = rollout_of(index)
  rollout = rollout._replace(logp=look(POLICY, params, rollout, RULE).logp)
  prob = jnp.exp(everything[0])
  weigh = algorithm._replace(
    aggregate=lambda mask, valid: mask * prob[:, None]  # the expectation
  )
  state = init_state(weigh, RECORD, params, jax.random.key(0))
  state = state.replace(carries=state.carries | {'reference': reference})
  update = jax.jit(make_update(POLICY, weigh, RECORD))
  nothing = make_scored(rollout, jnp.zeros((N, T)))
  state, metrics, _ = update(state, nothing, RULE)
  assert_close(state.opt_state, wanted[kl], atol=1e-5)
  assert float(metrics['kl']) > 0


def test_k3_times_the_ratio_in_the_loss_is_the_reverse_kl(params, kl_gradients):
  """The ratio is differentiated there; held fixed, it is the forward KL."""
  reference, wanted = kl_gradients
  one = rollout_of(np.arange(N)[:, None])

  def loss(p, held):
    logp = evaluate(POLICY, p, one, RULE).logp
    fixed = jax.lax.stop_gradient(logp)
    prob = jnp.exp(fixed.sum(1, keepdims=True))
    d = logp - evaluate(POLICY, reference, one, RULE).logp
    ratio = jnp.where(held, 1.0, jnp.exp(logp - fixed))
    return (prob * MASK * ratio * losses.k3(d)).sum()

  grad = jax.jit(jax.grad(loss))
  assert_close(grad(params, False), wanted['reverse'], atol=1e-5)
  assert_close(grad(params, True), wanted['forward'], atol=1e-5)


def size(tree):
  """Norm of a tree of arrays."""
  return np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(tree)))


def test_k1_in_the_loss_pulls_to_no_reference(params, everything, kl_gradients):
  """k1 summed over tokens has an expected gradient of 0 on-policy; as a mean
  over the n tokens of a sequence it has that of E[1/n], whatever the
  reference, and descent makes completions longer."""
  reference, _ = kl_gradients
  one = rollout_of(np.arange(N)[:, None])
  prob = jnp.exp(everything[0])
  valid = jnp.ones(N, bool)

  @functools.partial(jax.jit, static_argnums=1)
  def expected(ref_params, aggregate, k):
    """Gradient of sum_y pi(y) times the aggregated estimator of y alone."""
    ref_logp = evaluate(POLICY, ref_params, one, RULE).logp
    weight = aggregate(one.mask, valid) * N * prob[:, None]

    def loss(p):
      d = masked.fill(evaluate(POLICY, p, one, RULE).logp - ref_logp, one.mask)
      return (weight * jnp.where(k == 1, d, losses.k2(d))).sum()

    return jax.grad(loss)(params)

  total, mean = losses.seq_mean_token_sum, losses.seq_mean_token_mean
  assert size(expected(reference, total, 1)) < 1e-5
  assert size(expected(reference, total, 2)) > 0.02
  shorter = true_gradient(everything, 1 / MASK.sum(1))  # of E[1/n]
  found = expected(reference, mean, 1)
  assert_close(found, shorter)
  assert_close(expected(params, mean, 1), shorter)  # the policy itself
  assert size(found) > 0.1
  longer = true_gradient(everything, MASK.sum(1))  # of E[n]
  along = jax.tree.map(lambda a, b: -(np.asarray(a) * b).sum(), found, longer)
  assert sum(jax.tree.leaves(along)) > 0.01


def test_estimators():
  d = jnp.linspace(-2, 2, 9)
  assert (np.asarray(losses.k3(d)) >= 0).all()
  np.testing.assert_allclose(losses.k2(d), np.asarray(d) ** 2 / 2)


# --- importance weights, of a rollout by another policy ----------------------


@pytest.fixture(scope='module')
def off_policy(params):
  """mode -> (gradient as descent, metrics), expected over the sequences of
  another policy, of each one's update; and their log-probs there."""
  other = sharpened(jax.jit(POLICY.init)(jax.random.key(9)), 2.0)
  rollout = rollout_of(np.arange(N)[:, None])
  logp = look(POLICY, other, rollout, RULE).logp
  rollout = rollout._replace(logp=logp)
  prob = jnp.exp(logp.sum(1))
  assert prob.sum() == pytest.approx(1, abs=1e-5)
  rewards = make_scored(rollout, token_rewards('outcome'))

  def gradient(mode, cap, **changes):
    algorithm = algorithms.reinforce(
      advantages.no_baseline(),
      importance_cap=cap,
      importance_mode=mode,
      **changes,
    )
    weigh = algorithm._replace(
      aggregate=lambda mask, valid: mask * prob[:, None]  # the expectation
    )
    state = init_state(weigh, RECORD, params, jax.random.key(0))
    update = jax.jit(make_update(POLICY, weigh, RECORD))
    new, metrics, _ = update(state, rewards, RULE)
    return jax.tree.map(lambda g: -np.asarray(g), new.opt_state), metrics

  return gradient, logp


@pytest.mark.parametrize('loss', ['reinforce', 'sequence_clip'])
@pytest.mark.parametrize('mode', ['sequence_truncate', 'sequence_mask'])
def test_weights_of_sequences_are_exact(off_policy, everything, mode, loss):
  """Below the cap, E over the sampler's sequences is the policy gradient."""
  gradient, _ = off_policy
  found, metrics = gradient(mode, 1e4, loss=loss)
  reward = token_rewards('outcome').sum(1).astype(np.float64)
  assert_close(found, true_gradient(everything, reward))
  share = 'truncated' if 'truncate' in mode else 'masked'
  assert metrics[f'frac_importance_{share}'] == 0


@pytest.mark.parametrize('mode', ['sequence_truncate', 'sequence_mask'])
def test_a_cap_leaves_the_gradient_of_what_it_keeps(
  off_policy, everything, mode
):
  gradient, logp = off_policy
  ratio = np.exp(np.asarray(everything[0], float) - np.asarray(logp).sum(1))
  cap, n = 1.01 * np.sort(ratio)[-3], len(ratio)  # two are over
  found, metrics = gradient(mode, cap)
  over, truncates = ratio > cap, 'truncate' in mode
  kept = np.where(over, cap if truncates else 0, ratio)
  reward = token_rewards('outcome').sum(1).astype(np.float64)
  want = true_gradient(everything, reward * kept / ratio)
  assert_close(found, want)
  share = 'truncated' if truncates else 'masked'
  assert metrics[f'frac_importance_{share}'] == pytest.approx(over.sum() / n)
  assert metrics['importance_weight'] == pytest.approx(kept.mean(), rel=1e-4)
