"""Laws that every preset keeps, whatever the network (test_sharding has a
transformer): micro-batches and devices change nothing, and on-policy the ratio
is 1 under a truncating sampler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import (
  END,
  OTHER_END,
  PAD,
  make_scored,
  random_prompts,
  recurrent,
)

from jaxrl_tok import distribution, sharding
from jaxrl_tok.credit import algorithms
from jaxrl_tok.models.mask_policy import masked_policy
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.step.state import init_state
from jaxrl_tok.step.update import make_update
from jaxrl_tok.types import Scored

C, G, T = 16, 2, 4
PRESETS = [
  algorithms.reinforce,
  algorithms.rloo,
  algorithms.remax,
  algorithms.a2c,
  algorithms.ppo,
  algorithms.grpo,
  algorithms.dr_grpo,
  algorithms.dapo,
  algorithms.gspo,
  algorithms.cispo,
  algorithms.reinforce_pp,
  algorithms.reinforce_pp_baseline,
  algorithms.nlpo,
]
POLICY = recurrent()
RULE = distribution.make_rule(11, [END, OTHER_END], top_p=0.8)
OPTIMIZER = optax.sgd(0.05)
# one row of some groups, both rows of another
VALID = np.isin(np.arange(C * G), [1, 6, 7, 12, 31], invert=True)


@pytest.fixture(scope='module')
def params():
  return POLICY.init(jax.random.key(1))


@functools.cache
def sampler(masked: bool):
  policy = masked_policy(POLICY) if masked else POLICY
  config = SamplerConfig(G, T, PAD, truncate=True)
  sample = make_sampler(policy, config)
  return policy, jax.jit(
    lambda weights, *args: sample(policy.merge_params(*weights), *args)
  )


def make_case(preset, params):
  """Makes (policy, algorithm, state, Scored); 5 of 32 rows are not valid."""
  algorithm = preset(max_length=T)
  policy, sample = sampler('mask_policy' in algorithm.carries)
  state = init_state(algorithm, OPTIMIZER, params, jax.random.key(0))
  moved = jax.tree.map(lambda x: x * 1.05, params)
  copies = {'reference', 'mask_policy'} & state.carries.keys()
  state = state.replace(carries=state.carries | dict.fromkeys(copies, moved))
  key, prompts = jax.random.key(3), random_prompts(C)
  rollout = sample(state.policy_params, key, prompts, RULE)
  noise = np.random.default_rng(0).normal(size=(C * G, T))
  best = jnp.linspace(-1, 1, C) if algorithm.greedy else None
  scored = make_scored(rollout, noise * rollout.mask, best, VALID)
  return policy, algorithm, state, scored


def with_other_rows(scored: Scored) -> Scored:
  """Changes tokens, log-probs and rewards in rows that are not valid."""
  rollout, on = scored.rollout, VALID[:, None]
  rollout = rollout._replace(
    tokens=jnp.where(on, rollout.tokens, 3),
    logp=jnp.where(on, rollout.logp, -0.7),
    num_kept=jnp.where(on, rollout.num_kept, 5),
  )
  rewards = {k: jnp.where(on, x, jnp.nan) for k, x in scored.rewards.items()}
  return scored._replace(rollout=rollout, rewards=rewards)


def place(mesh, state, scored):
  weights = sharding.put_replicated(mesh, scored.weights)
  rows = sharding.put_rows(mesh, scored._replace(weights={}))
  where = sharding.tree_shardings(mesh, state, POLICY.partition_rules)
  return jax.device_put(state, where), rows._replace(weights=weights)


def assert_same(found, want, largest):
  for name, value in want[1].items():
    np.testing.assert_allclose(
      found[1][name], value, rtol=1e-4, atol=1e-5, err_msg=name
    )
  np.testing.assert_allclose(found[2], want[2], atol=1e-5)
  params = (jax.tree.leaves(x[0].params) for x in (found, want))
  for a, b in zip(*params, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1, largest))


@pytest.mark.parametrize('preset', PRESETS, ids=lambda p: p.__name__)
def test_one_is_four_micro_batches_on_four_devices(preset, params):
  policy, algorithm, state, scored = make_case(preset, params)
  update = jax.jit(make_update(policy, algorithm, OPTIMIZER))
  one = update(state, scored, RULE)
  leaves = map(jax.tree.leaves, (one[0].params, params))
  moved = max(float(jnp.abs(a - b).max()) for a, b in zip(*leaves))
  assert moved > 1e-3, 'nothing was learnt'
  metrics = one[1]
  # the policy that is updated is the policy that sampled
  assert float(metrics['sampler_logp_gap']) < 1e-4
  if algorithm.passes.count == 1 and 'clip_ratio/region_mean' in metrics:
    assert float(metrics['clip_ratio/region_mean']) == 0

  mesh = sharding.make_mesh('data=4', jax.devices()[:4])
  with jax.set_mesh(mesh):
    four = jax.jit(make_update(policy, algorithm, OPTIMIZER, 4))
    rule = sharding.put_replicated(mesh, RULE)
    assert_same(four(*place(mesh, state, scored), rule), one, moved)
  # rows that are not valid might as well be others
  assert_same(update(state, with_other_rows(scored), RULE), one, moved)
