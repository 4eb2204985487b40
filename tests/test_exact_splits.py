"""Exactness of dense credit: every completion of an enumerable case, whose
tokens are texts.

The case of test_exact: token 0 writes 'a', token 1 ' b', token 2 ends. A word
has one to three tokens: ' b' begins one, 'a' goes on with it.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import advantage_inputs
from test_exact import (
  END,
  MASK,
  POLICY,
  RULE,
  TOKENS,
  N,
  T,
  ascend,
  assert_close,
  everything,
  expected_gradient,
  params,
  rollout_of,
  size,
  true_gradient,
)

from jaxrl_tok import masked
from jaxrl_tok.credit import advantages, algorithms
from jaxrl_tok.policy import evaluate
from jaxrl_tok.rewards import make_scorer, make_split, potentials
from jaxrl_tok.types import Prompts, Rollout

__all__ = ['ascend', 'everything', 'params']  # fixtures
TEXTS = {0: 'a', 1: ' b', END: ''}
# references for which completions of three tokens have many values
REWARDS = {
  'bleu': (potentials.smoothed_bleu, 'a ba b'),
  'chrf': (potentials.chrf, 'a ba b'),
  'rouge_l': (potentials.rouge_l, 'aa b'),
  'edit_distance': (potentials.edit_distance, 'ab a'),
  'keyword_coverage': (potentials.keyword_coverage, ['a', 'ba', 'b']),
  'exact_prefix': (potentials.exact_prefix, 'a ba'),
}
BASELINES = {
  'none': (advantages.no_baseline(), 1),
  'leave_one_out': (advantages.leave_one_out(), 2),
}


def pieces(ids, shown=None, texts=None):
  return [[TEXTS[i] for i in row] for row in ids]


def decode(rows):
  return [''.join(row) for row in pieces(rows)]


def scored(reward, reference, how='potential', seed=0) -> np.ndarray:
  """Rewards [N, T] of every completion."""
  score = make_scorer(
    {'r': reward}, decode, [END], pieces=pieces, split=make_split(how, seed)
  )
  given = [{'prompt': 'p', 'reference': reference}]
  return score(TOKENS, MASK, given).rewards['r']


def values_of(name) -> tuple:
  """(potentials [N, T], outcomes float64 [N]) of a reward."""
  factory, reference = REWARDS[name]
  reward = factory('reference')
  outcome = scored(reward.outcome, reference).sum(1, dtype=np.float64)
  return scored(reward, reference), outcome


def found_gradient(ascend, everything, reward, baseline='none'):
  """Expected gradient of an update by these token rewards."""
  make, G = BASELINES[baseline]
  carries = {'ema_baseline': np.float32(0)}
  return expected_gradient(ascend, everything, make, reward, G, carries)[0]


def apart(found, want) -> float:
  """Size of the difference of two gradients over the size of the second."""
  return size(jax.tree.map(np.subtract, found, want)) / size(want)


@pytest.mark.parametrize('baseline', BASELINES)
@pytest.mark.parametrize('name', REWARDS)
def test_the_expected_gradient_is_that_of_the_outcome(
  ascend, everything, name, baseline
):
  reward, outcome = values_of(name)
  assert len(set(outcome.round(6))) > 2
  assert (np.count_nonzero(reward, axis=1) > 1).any()  # dense
  want = true_gradient(everything, outcome)
  assert_close(found_gradient(ascend, everything, reward, baseline), want)


def test_the_sum_on_the_last_token_has_the_same_gradient(ascend, everything):
  factory, reference = REWARDS['bleu']
  reward = scored(factory('reference'), reference, 'outcome')
  last = np.asarray(masked.last_chosen(MASK))
  assert (reward[~last] == 0).all()
  _, outcome = values_of('bleu')
  want = true_gradient(everything, outcome)
  assert_close(found_gradient(ascend, everything, reward), want)


@pytest.mark.parametrize('name', ['rouge_l', 'exact_prefix'])
def test_shuffled_in_time_the_gradient_is_another(ascend, everything, name):
  """One order, and the mean of many: the sums are the outcome's, what they
  teach is not."""
  factory, reference = REWARDS[name]
  _, outcome = values_of(name)
  want = true_gradient(everything, outcome)
  rows = [
    scored(factory('reference'), reference, 'shuffled', seed)
    for seed in range(64)
  ]
  for reward in rows:
    np.testing.assert_allclose(reward.sum(1), outcome, atol=1e-6)
  for reward in (rows[0], np.mean(rows, axis=0)):
    found = found_gradient(ascend, everything, reward)
    assert apart(found, want) > 0.04


def test_a_constant_reward_teaches_nothing_on_average(ascend, everything):
  """It is noise alone: the expected gradient is 0."""
  factory, reference = REWARDS['bleu']
  reward = scored(factory('reference'), reference, 'constant')
  np.testing.assert_array_equal(reward.sum(1), 1)
  found = found_gradient(ascend, everything, reward)
  assert size(found) < 1e-5


def test_to_wait_for_a_words_end_and_pay_its_own_token_is_biased(
  ascend, everything
):
  """A token that goes on with a word would take, from the word's tokens before
  it, a reward that its own choice decides; potentials do not."""
  reward, outcome = values_of('rouge_l')
  late = reward.copy()
  for n, t in zip(*np.nonzero(MASK)):
    if t + 1 < T and MASK[n, t + 1] and TOKENS[n, t + 1] == 0:
      late[n, t + 1] += late[n, t]  # 'a' goes on with the word
      late[n, t] = 0
  np.testing.assert_allclose(late.sum(1), outcome, atol=1e-6)
  assert (late != reward).any()
  want = true_gradient(everything, outcome)
  found = found_gradient(ascend, everything, late)
  assert apart(found, want) > 0.05


@pytest.fixture(scope='module')
def products(params):
  """Products [N T, N T] of the gradients of all tokens' log-probs."""
  one = rollout_of(np.arange(N)[:, None])
  of_tokens = jax.jit(
    jax.jacrev(lambda p: evaluate(POLICY, p, one, RULE).logp)
  )(params)
  leaves = [
    np.asarray(x, np.float64).reshape(N * T, -1)
    for x in jax.tree.leaves(of_tokens)
  ]
  return sum(x @ x.T for x in leaves)


def variance(everything, products, reward, baseline) -> float:
  """Variance of a gradient of one group, over its mean squared: exactly."""
  make, G = BASELINES[baseline]
  algorithm = algorithms.reinforce(make)
  groups = np.array(list(itertools.product(range(N), repeat=G)))
  prob = np.exp(np.asarray(everything[0], np.float64)[groups].sum(1))

  def weights(index):
    mask = jnp.asarray(MASK)[index]
    prompts = Prompts(None, jnp.full((1,), 2))
    one = Rollout(prompts, None, mask, None, None, None, None)
    inputs = advantage_inputs(one, jnp.asarray(reward)[index])
    advantage = algorithm.advantage(inputs, {}).advantage / G
    return jnp.zeros((N, T)).at[index].add(advantage)

  found = np.asarray(jax.jit(jax.vmap(weights))(groups))
  w = found.reshape(len(groups), -1).astype(np.float64)
  mean = prob @ w
  square = mean @ products @ mean
  return (prob @ np.einsum('gi,ij,gj->g', w, products, w) - square) / square


@pytest.mark.parametrize('baseline', BASELINES)
@pytest.mark.parametrize('name', REWARDS)
def test_credit_changes_the_variance_alone(
  everything, products, name, baseline
):
  """About 0.8 of the outcome's, for rewards that leave out what was earned
  before a token; 1.12 for ROUGE-L, where words that are being written are paid
  for and taken back."""
  factory, reference = REWARDS[name]
  dense, whole = (
    variance(
      everything,
      products,
      scored(factory('reference'), reference, how),
      baseline,
    )
    for how in ('potential', 'outcome')
  )
  low, high = (1.1, 1.14) if name == 'rouge_l' else (0.77, 0.82)
  assert low < dense / whole < high
