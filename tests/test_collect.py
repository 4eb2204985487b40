"""Dynamic sampling and greedy baselines, with rollouts that a test makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_tok import data, rewards, sharding
from jaxrl_tok.step import collectors as collect
from jaxrl_tok.types import Rollout

C, G, T = 4, 3, 2


@pytest.fixture
def make():
  """make(groups that vary, by prompt, rounds) -> (Collector, keys seen)."""

  def make(varies, rounds=10, **more):
    n = len(varies)
    examples = [{'prompt': f'{i}', 'varies': v} for i, v in enumerate(varies)]
    tokens = np.arange(n, dtype=np.int32)[:, None]
    found = data.PromptSet(examples, tokens, np.ones(n, np.int32))
    seen = []

    def sample(weights, key, prompts, rule):
      seen.append(np.asarray(jax.random.key_data(key)).tolist())
      number = jnp.repeat(prompts.tokens[:, 0], G)
      tokens = jnp.stack([number, jnp.arange(C * G) % G], axis=1)
      mask = jnp.ones((C * G, T), bool)
      logp = -tokens.astype(jnp.float32)
      return Rollout(prompts, tokens, mask, logp, None)

    def score(tokens, mask, examples):
      each = len(tokens) // len(examples)
      vary = np.repeat([e['varies'] for e in examples], each)
      reward = np.zeros(tokens.shape, np.float32)
      reward[:, -1] = np.where(vary, tokens[:, 1], 1.0)
      texts = [f'{a}-{b}' for a, b in tokens.tolist()]
      return rewards.Scores(reward, {'mean': float(reward.sum())}, texts)

    made = collect.Collector(
      sample, score, found, None, 0, C, rounds=rounds, **more
    )
    return made, seen

  return make


def run(collector, position=0):
  class State:
    weights = None

  mesh = sharding.make_mesh('data=1', jax.devices()[:1])
  with jax.set_mesh(mesh):
    return collect.collect(collector, State, jax.random.key(5), position)


def check_groups(batch):
  """Each group is one prompt's, with its own tokens, rewards and texts."""
  rollout = jax.device_get(batch.rollout)
  for c, example in enumerate(batch.examples):
    rows = slice(c * G, c * G + G)
    number = int(example['prompt'])
    assert batch.prompts.tokens[c, 0] == number
    assert rollout.prompts.tokens[c, 0] == number
    assert (rollout.tokens[rows, 0] == number).all()
    np.testing.assert_array_equal(rollout.logp[rows], -rollout.tokens[rows])
    assert batch.scores.completions[rows] == [f'{number}-{g}' for g in range(G)]
    want = np.arange(G) if example['varies'] else np.ones(G)
    np.testing.assert_array_equal(batch.scores.reward[rows].sum(1), want)


def test_one_round_takes_what_comes(make):
  collector, seen = make([False] * 12, rounds=0)
  batch, spent, metrics = run(collector)
  assert (len(seen), metrics) == (1, {})
  assert spent == (C, C * G * T, C * G)
  check_groups(batch)


def test_groups_without_variance_are_drawn_anew(make):
  varies = [i % 3 == 0 for i in range(30)]
  collector, seen = make(varies)
  batch, spent, metrics = run(collector)
  order = data.record_indices(30, 0, 0, 30)
  want = [i for i in order.tolist() if varies[i]][:C]
  assert [int(e['prompt']) for e in batch.examples] == want
  check_groups(batch)
  rounds = metrics['resample/rounds']
  assert rounds > 1
  assert metrics['resample/missing'] == 0
  assert spent == (rounds * C, rounds * C * G * T, rounds * C * G)
  assert len({tuple(key) for key in seen}) == rounds, 'keys repeat'
  assert seen[0] == jax.random.key_data(jax.random.key(5)).tolist()


def test_after_the_last_round_the_rest_is_filled(make):
  collector, seen = make([i == 7 for i in range(40)], rounds=3)
  batch, spent, metrics = run(collector)
  assert len(seen) == 3
  assert spent.prompts == 3 * C
  assert metrics['resample/missing'] in (C - 1, C)
  check_groups(batch)


def test_a_full_first_round_is_not_touched(make):
  collector, seen = make([True] * 12)
  batch, _, metrics = run(collector, position=4)
  assert len(seen) == 1
  assert metrics['resample/varied'] == 1
  assert [int(e['prompt']) for e in batch.examples] == (
    data.record_indices(12, 0, 4, C).tolist()
  )
  check_groups(batch)


def test_greedy_rewards_go_with_their_prompts(make):
  def greedy(weights, key, prompts, rule):
    tokens = jnp.repeat(prompts.tokens, T, axis=1)
    return Rollout(
      prompts, tokens, jnp.ones((C, T), bool), jnp.zeros((C, T)), None
    )

  collector, _ = make([i % 2 == 0 for i in range(30)], greedy=greedy)
  batch, _, metrics = run(collector)
  assert metrics['resample/rounds'] > 1
  want = [float(e['prompt']) for e in batch.examples]
  np.testing.assert_array_equal(batch.greedy_reward, want)
