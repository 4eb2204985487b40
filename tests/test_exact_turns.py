"""Exactness of credit by turns: every episode of an enumerable game.

The policy of test_exact plays: a turn is one token, token 2 stops, 0 and 1 go
on, and the environment answers with token 1. After two turns, or three, it is
over. The expected gradient of an algorithm is a sum over all groups of G
episodes.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import advantage_inputs, make_rollout, sharpened
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exact import POLICY, RULE, assert_close

from experiments.studies.alive import alive
from jaxrl_tok.credit import advantages, algorithms, sequence
from jaxrl_tok.policy import evaluate
from jaxrl_tok.types import Prompts

STOP, ANSWER, R = 2, 1, 0.75


def episodes(turns):
  """All episodes: tokens, mask and turn [n, T], T = 2 turns - 1."""
  rows, T = [], 2 * turns - 1
  for chosen in itertools.product(range(3), repeat=turns):
    n = chosen.index(STOP) + 1 if STOP in chosen else turns
    if any(chosen[n:]):
      continue
    tokens = [x for token in chosen[:n] for x in (token, ANSWER)][:-1]
    mask = [t % 2 == 0 for t in range(len(tokens))]
    pad = [0] * (T - len(tokens))
    rows.append((tokens + pad, mask + [False] * len(pad)))
  tokens, mask = (np.array(x) for x in zip(*rows))
  return tokens, mask, np.broadcast_to(np.arange(T) // 2, tokens.shape)


def rollout_of(game, index):
  """Rollout of groups of episodes, by their numbers index [C, G]."""
  C, flat = len(index), index.reshape(-1)
  prompts = Prompts(np.full((C, 2), 1, np.int32), np.full((C,), 2, np.int32))
  tokens, mask, turn = (jnp.asarray(x)[flat] for x in game)
  return make_rollout(prompts, tokens, mask, turn=turn)


def rewards_of(game, kind):
  """Reward [n, T] on the last token of each turn: R each, or by the prefix."""
  tokens, mask, _ = game
  if kind == 'constant':
    return np.where(mask, R, 0)
  rng, table, found = np.random.default_rng(0), {}, np.zeros(mask.shape)
  for n, t in zip(*np.nonzero(mask)):
    prefix = tuple(tokens[n, : t + 1])
    found[n, t] = table.setdefault(prefix, rng.normal() + 0.5)
  return found


def ours(game, reward, groups, seats=1):
  """Advantages [groups, G, T] by leave-one-out."""
  algorithm = algorithms.reinforce(advantages.leave_one_out())

  def of_group(index):
    one = rollout_of(game, index[None])
    if seats == 2:
      one = one._replace(seat=one.turn % 2)
    inputs = advantage_inputs(one, jnp.asarray(reward)[index])
    return algorithm.advantage(inputs, {}).advantage

  return np.asarray(jax.jit(jax.vmap(of_group))(groups), np.float64)


def of_rows_alive(game, reward, groups):
  """Advantages [groups, G, T] of MT-GRPO: the rewards of a turn less their mean
  over the rows that are alive at it, own row included, summed to the end."""
  alive = game[1][groups]
  mean = np.where(alive, reward[groups], 0).sum(1, keepdims=True) / np.maximum(
    alive.sum(1, keepdims=True), 1
  )
  centred = np.where(alive, reward[groups] - mean, 0)
  togo = np.flip(np.cumsum(np.flip(centred, 2), 2), 2)
  return np.where(alive, togo, 0)


class Game:
  """Two turns, and the policy's log-probs with their gradients."""

  def __init__(self):
    self.game = episodes(2)
    self.n = len(self.game[0])
    params = sharpened(jax.jit(POLICY.init)(jax.random.key(3)), 3.0)
    one = rollout_of(self.game, np.arange(self.n)[:, None])

    def logp(params):
      return evaluate(POLICY, params, one, RULE).logp

    found = jax.jit(lambda p: (logp(p), jax.jacrev(logp)(p)))(params)
    self.logp, self.jacobian = jax.tree.map(
      lambda x: np.asarray(x, np.float64), found
    )

  def gradient(self, weight):
    """Sum of weight [n, T] times the gradients of the tokens' log-probs."""
    return jax.tree.map(lambda j: np.tensordot(weight, j, 2), self.jacobian)

  def of_seats(self, reward):
    """Gradient of each seat's own rewards; the seats take turns."""
    _, mask, turn = self.game
    prob, weight = np.exp(self.logp.sum(1)), np.zeros(mask.shape)
    for seat in range(2):
      own = mask & (turn % 2 == seat)
      paid = np.where(own, reward, 0).sum(1)
      weight += np.where(own, (prob * paid)[:, None], 0)
    return self.gradient(weight)

  def true(self, reward):
    value = np.exp(self.logp.sum(1)) * reward.sum(1)
    return self.gradient(value[:, None] * self.game[1])

  def expected(self, credit, reward, G):
    """Expected gradient of the mean over the rows of a group."""
    groups = np.array(list(itertools.product(range(self.n), repeat=G)))
    prob = np.exp(self.logp.sum(1)[groups].sum(1))
    assert prob.sum() == pytest.approx(1, abs=1e-5)
    advantage = credit(self.game, reward, groups)
    weight = np.zeros(self.game[0].shape)
    np.add.at(weight, groups, advantage * prob[:, None, None] / G)
    return self.gradient(weight)


@pytest.fixture(scope='module')
def two():
  return Game()


@pytest.mark.parametrize('kind', ['constant', 'by prefix'])
@pytest.mark.parametrize('G', [2, 3])
def test_leave_one_out_by_turn_is_exact(two, G, kind):
  reward = rewards_of(two.game, kind)
  assert_close(two.expected(ours, reward, G), two.true(reward))


def test_each_seat_is_credited_with_its_own_rewards(two):
  reward = rewards_of(two.game, 'by prefix')
  credit = functools.partial(ours, seats=2)
  assert_close(two.expected(credit, reward, 2), two.of_seats(reward))


@pytest.mark.parametrize('G', [2, 3])
def test_the_mean_of_the_rows_alive_is_biased(two, G):
  """With a constant reward it never learns to go on: its gradient is 0. Nor
  does a constant change it that is added to the reward of every turn."""
  constant = rewards_of(two.game, 'constant')
  want = jax.tree.leaves(two.true(constant))
  assert max(np.abs(g).max() for g in want) > 0.02
  for g in jax.tree.leaves(two.expected(of_rows_alive, constant, G)):
    np.testing.assert_allclose(g, 0, atol=1e-9)
  other = rewards_of(two.game, 'by prefix')
  pair = (
    two.expected(of_rows_alive, reward, G)
    for reward in (other, other + constant)
  )
  for a, b in zip(*map(jax.tree.leaves, pair)):
    np.testing.assert_allclose(a, b, atol=1e-9)


@pytest.mark.parametrize('turns', [2, 3])
def test_the_bias_is_one_reward_for_each_further_turn(turns):
  """Credit of an episode's first token, against that of stopping at once."""
  game = episodes(turns)
  reward, length = rewards_of(game, 'constant'), game[1].sum(1)
  n = len(length)
  groups = np.array(list(itertools.product(range(n), repeat=2)))
  credits = {}
  for name, credit in (('ours', ours), ('alive', of_rows_alive)):
    # mean over the other row, alike for every first row
    first = credit(game, reward, groups)[:, 0, 0].reshape(n, n).mean(1)
    credits[name] = first - first[length == 1]
  further = length - 1
  np.testing.assert_allclose(credits['ours'], R * further, atol=1e-5)
  np.testing.assert_allclose(
    credits['alive'] - credits['ours'], -R * further, atol=1e-5
  )


def test_the_study_has_this_credit():
  """experiments/studies/alive.py, written for a run."""
  game = episodes(3)
  reward = rewards_of(game, 'by prefix')
  index = np.array([0, 5, 14, 7])
  inputs = advantage_inputs(rollout_of(game, index[None]), reward[index])
  want = of_rows_alive(game, reward, index[None])[0]
  np.testing.assert_allclose(jax.jit(alive)(inputs, {}), want, atol=1e-5)


# --- discounts


@st.composite
def turned(draw):
  """Turns of 1 to 3 tokens with observations between: (turn, mask, reward)."""
  turn, mask = [], []
  for k in range(draw(st.integers(1, 3))):
    tokens, seen = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    turn += [k] * (tokens + seen)
    mask += [True] * tokens + [False] * seen
  fill = 15 - len(turn)
  rng = np.random.default_rng(draw(st.integers(0, 100)))
  return (
    np.array(turn + [0] * fill),
    np.array(mask + [False] * fill),
    rng.normal(size=15).astype(np.float32),
  )


@jax.jit
def togo(turn, mask, reward):
  gamma = sequence.by_turn(0.5, turn, mask)
  value = jnp.zeros(15)
  gae = sequence.gae_advantage(reward, value, mask, 0.0 * value[0], gamma, 1.0)
  trace = sequence.vtrace_advantage(
    *(reward, value, mask, value[0], 1 + value, gamma, 1.0, 1.0, 1.0)
  )
  return sequence.reward_to_go(reward, mask, gamma), gae, trace[0]


@settings(max_examples=30, deadline=None)
@given(case=turned())
def test_a_discount_by_turn_counts_turns(case):
  turn, mask, reward = case
  want = [
    sum(
      0.5 ** (turn[later] - turn[t]) * reward[later]
      for later in range(t, 15)
      if mask[later]
    )
    for t in range(15)
  ]
  for found in togo(turn, mask, reward):
    np.testing.assert_allclose(found[mask], np.array(want)[mask], atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(case=turned(), other=turned())
def test_a_baseline_goes_by_turns(case, other):
  """Advantage by hand: the other row's return from its turn of that number on,
  0 where it had ended."""
  turn, mask, reward = (np.stack(x) for x in zip(case, other))
  prompts = Prompts(None, jnp.full((1,), 2))
  rollout = make_rollout(prompts, jnp.zeros((2, 15)), mask, turn=turn)
  inputs = advantage_inputs(rollout, reward)
  found = by_turn_of(inputs)
  reward = np.where(mask, reward, 0)
  for i, t in zip(*np.nonzero(mask)):
    own, there = reward[i, t:].sum(), mask[1 - i] & (turn[1 - i] >= turn[i, t])
    want = own - reward[1 - i][there].sum()
    np.testing.assert_allclose(found[i, t], want, atol=1e-5)


by_turn_of = jax.jit(
  lambda inputs: (
    advantages.returns(advantages.leave_one_out())(inputs, {}).advantage
  )
)
