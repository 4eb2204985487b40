"""Laws that every preset keeps: micro-batches and devices change nothing, and
on-policy the ratio is 1 under a truncating sampler."""

import functools
import sys

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
  random_prompts,
  sharpened,
)

from jaxrl_tok import distribution, sharding
from jaxrl_tok.credit import algorithms
from jaxrl_tok.models.mask_policy import masked_policy
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.step.update import init_state, make_update

C, G, T = 16, 2, 5
ALL = [
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
# compiling takes long: 3.11 looks at the one half, 3.13 at the other
PRESETS = ALL[sys.version_info.minor // 2 % 2 :: 2]
POLICY = make_policy(changed(CONFIG, layers=CONFIG.layers[:1], value_head=True))
RULE = distribution.make_rule(11, [END, OTHER_END], top_p=0.8)
OPTIMIZER = optax.sgd(1.0)


@pytest.fixture(scope='module')
def params():
  found = sharpened(jax.jit(POLICY.init)(jax.random.key(1)), 3.0)
  found['value_head']['embedding'] += 0.2
  return found


@functools.cache
def sampled(masked: bool):
  policy = masked_policy(POLICY) if masked else POLICY
  config = SamplerConfig(G, T, PAD, truncate=True)
  sample = make_sampler(policy, config)
  return jax.jit(
    lambda weights, *args: sample(policy.merge_params(*weights), *args)
  )


def make_case(preset, params):
  """(policy, algorithm, state, what an update is given)."""
  algorithm = preset(max_length=T)
  policy = masked_policy(POLICY) if algorithm.mask_sync_steps else POLICY
  state = init_state(algorithm, OPTIMIZER, params, jax.random.key(0))
  moved = jax.tree.map(lambda x: x * 1.05, params)
  if state.reference is not None:
    state = state.replace(reference=moved)
  if state.mask_policy is not None:
    state = state.replace(mask_policy=moved)
  rollout = sampled(bool(algorithm.mask_sync_steps))(
    state.weights, jax.random.key(3), random_prompts(C), RULE
  )
  noise = np.random.default_rng(0).normal(size=(C * G, T))
  reward = np.where(rollout.mask, noise, 0).astype(np.float32)
  best = jnp.linspace(-1, 1, C) if algorithm.greedy else None
  return policy, algorithm, state, (rollout, reward, RULE, best)


@pytest.mark.parametrize('preset', PRESETS, ids=lambda p: p.__name__)
def test_one_is_four_micro_batches_on_four_devices(preset, params):
  policy, algorithm, state, given = make_case(preset, params)
  update = jax.jit(make_update(policy, algorithm, OPTIMIZER))
  one, metrics, advantage = update(state, *given)
  moved = [
    np.abs(np.asarray(a) - np.asarray(b)).max()
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(params))
  ]
  assert max(moved) > 1e-3, 'nothing was learnt'
  # the policy that is updated is the policy that sampled
  assert float(metrics['sampler_logp_gap']) < 1e-4
  if algorithm.passes == 1 and 'clip_ratio/region_mean' in metrics:
    assert float(metrics['clip_ratio/region_mean']) == 0

  mesh = sharding.make_mesh('data=4', jax.devices()[:4])
  with jax.set_mesh(mesh):
    rollout, reward, rule, best = given
    rows = sharding.put_rows(mesh, (rollout, reward))
    best = None if best is None else sharding.put_rows(mesh, best)
    placed = jax.device_put(
      state,
      sharding.tree_shardings(mesh, state, POLICY.partition_rules),
    )
    rule = sharding.put_replicated(mesh, rule)
    many = jax.jit(make_update(policy, algorithm, OPTIMIZER, 4))
    four, others, same = many(placed, *rows, rule, best)
  largest = max(moved)
  for a, b in zip(jax.tree.leaves(four.params), jax.tree.leaves(one.params)):
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1, largest))
  np.testing.assert_allclose(same, advantage, atol=1e-5)
  for name, value in metrics.items():
    np.testing.assert_allclose(
      others[name], value, rtol=1e-4, atol=1e-5, err_msg=name
    )
