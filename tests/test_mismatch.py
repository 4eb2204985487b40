"""Sampler and gradient are one distribution, in every family and dtype; a
seeded fault of either is seen."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
  CONFIG,
  DECODER_FAMILIES,
  changed,
  make_rollout,
  make_tiny,
  random_prompts,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import opened
from test_lora import opened as opened_lora

from jaxrl_tok import distribution, sharding
from jaxrl_tok.models.mask_policy import masked_policy
from jaxrl_tok.models.rope import make_rope
from jaxrl_tok.models.transformer import Layer, make_policy
from jaxrl_tok.run.evaluations import mismatch_warning
from jaxrl_tok.step.mismatch import compare, first_rows, make_mismatch

NAMES = {'logp_gap_mean', 'logp_gap_max', 'kl', 'prob_gap_max'}
C, G, T = 4, 2, 8
ROPE = make_rope({'rope_theta': 10_000.0}, 6)


def off_the_grid(params, scale=0.02):
  """Every parameter moved to a float32 that bfloat16 does not have."""
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  moved = [
    np.float32(x) + np.float32(scale) * rng.normal(size=x.shape).astype('f4')
    for x in map(np.asarray, leaves)
  ]
  for x in moved:
    assert (x != x.astype(jnp.bfloat16).astype(np.float32)).any()
  return jax.tree.unflatten(tree, moved)


def rollout_of(V: int, seed: int = 0):
  rng = np.random.default_rng(seed)
  mask = np.arange(T)[None] < rng.integers(1, T + 1, C * G)[:, None]
  mask[3] = np.arange(T) % 2 == 0  # turns, with observations between them
  tokens = rng.integers(1, V - 1, (C * G, T))
  return make_rollout(random_prompts(C, 6, V), tokens, mask)


def measured(policy, params, frozen=None, V=11, rollout=None):
  rollout = rollout or rollout_of(V)
  found = jax.jit(make_mismatch(policy))(
    (params, frozen), rollout, distribution.make_rule(V, [V - 1], 0.7)
  )
  assert found.keys() == NAMES
  return {name: float(x) for name, x in found.items()}


def assert_none(found, at_most=1e-5):
  assert all(0 <= x < at_most for x in found.values()), found


# --- the numbers


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.sampled_from([1e-4, 0.1, 3.0, 100.0]))
def test_comparison_is_the_definition(seed, apart):
  """KL and gaps in float64, from probabilities; a token that no one samples
  adds nothing."""
  rng = np.random.default_rng(seed)
  one = rng.normal(size=(3, 7)).astype(np.float32)
  two = (one + apart * rng.normal(size=(3, 7))).astype(np.float32)
  one[:, 2] = two[:, 2] = distribution.NEVER
  tokens = np.array([0, 1, 3])
  gap, kl, prob = map(np.asarray, compare(one, two, tokens))
  p, q = (np.exp(np.float64(x)) for x in (one, two))
  p, q = (x / x.sum(1, keepdims=True) for x in (p, q))
  with np.errstate(divide='ignore', invalid='ignore'):
    ratio = np.where(p > 0, np.log(p / q), 0)
  chosen = np.abs(ratio[np.arange(3), tokens])
  np.testing.assert_allclose(gap, chosen, rtol=1e-4, atol=2e-6)
  want = (p * ratio).sum(1)
  np.testing.assert_allclose(kl, want, rtol=1e-3, atol=1e-6 + 1e-4 * apart**2)
  assert (kl >= 0).all()
  np.testing.assert_allclose(prob, np.abs(p - q).max(1), atol=1e-6)


def test_far_distributions_have_a_finite_kl():
  far = jnp.array([[200.0, 0.0, -200.0]])
  gap, kl, prob = compare(far, -far, jnp.array([0]))
  assert (float(gap[0]), float(kl[0]), float(prob[0])) == (400, 400, 1)


@pytest.mark.parametrize('shards', [1, 2])
def test_rows_are_the_first_of_the_first_prompts(shards):
  rollout = rollout_of(11)
  mesh = sharding.make_mesh(f'data={shards}', jax.devices()[:shards])
  with jax.set_mesh(mesh):
    for rows in (1, 4, 64):
      found = jax.jit(first_rows, static_argnums=1)(rollout, rows)
      g = min(rows, G)
      c = min(max(rows // g, shards), C)
      want = np.array([i * G + j for i in range(c) for j in range(g)])
      np.testing.assert_array_equal(found.tokens, rollout.tokens[want])
      np.testing.assert_array_equal(
        found.prompts.tokens, rollout.prompts.tokens[:c]
      )
      np.testing.assert_array_equal(found.mask, rollout.mask[want])


# --- policies without a fault


def test_tiny_policies_have_none():
  tiny = make_tiny()  # of two layers
  assert_none(measured(tiny.policy, tiny.params, rollout=tiny.rollout))


VARIANTS = {
  'windows': {'layers': (Layer(ROPE, window=3), Layer(ROPE))},
  'experts': {
    'layers': (Layer(ROPE, routed=True),),
    'num_experts': 4,
    'experts_per_token': 2,
    'expert_d_ff': 8,
  },
  'a value head': {'value_head': True, 'layers': (Layer(ROPE),)},
}


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('name', VARIANTS)
def test_variants_have_none(name, dtype):
  policy = make_policy(changed(CONFIG, **VARIANTS[name]), dtype)
  params = off_the_grid(jax.jit(policy.init)(jax.random.key(0)), 0.2)
  assert_none(measured(policy, params), 1e-5 if dtype == jnp.float32 else 0.02)


def test_a_slow_copy_has_none(tiny):
  slow = jax.tree.map(lambda x: 0.5 * x, tiny.params)
  policy = masked_policy(tiny.policy)
  assert_none(measured(policy, tiny.params, (None, slow)))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_adapters_have_none(dtype):
  model, trainable, adapters, base = opened_lora('qwen2_lora')
  policy = model.make_policy(dtype)._replace(merge_params=trainable.merge)
  adapters, base = off_the_grid((adapters, base), 0.003)
  found = measured(policy, adapters, base, model.vocab_size)
  assert_none(found, 1e-5 if dtype == 'float32' else 0.02)


# --- one cast for sampler and gradient


def to_bfloat16(params):
  return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


@functools.cache
def off_grid(name: str):
  """(bfloat16 policy, parameters off the grid, V, rollout) of a family, and
  its mismatch: a function of parameters."""
  model, params, _, _ = opened(name)
  policy, V = model.make_policy('bfloat16'), model.vocab_size
  rule, rollout = distribution.make_rule(V, [V - 1]), rollout_of(V)
  measure = jax.jit(make_mismatch(policy))
  return (
    (policy, off_the_grid(params, 0.003), V, rollout),
    lambda params: measure((params, None), rollout, rule),
  )


# families whose parameters are cast by code of their own; the others, whose
# runs are by hand as well (test_families_train), by hand
OFTEN = 'gpt2', 'gpt_neox', 'gemma3_text', 'qwen3_moe', 'qwen2'


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow)
    for name in DECODER_FAMILIES
  ],
)
def test_one_cast_for_sampler_and_gradient(name):
  """Gap of log-probs in bfloat16, parameters on and off its grid: moving them
  off it changes nothing, as both sides round the same ones."""
  (_, params, _, _), measure = off_grid(name)
  on = jax.tree.map(lambda x: x.astype(jnp.float32), to_bfloat16(params))
  near, far = measure(on), measure(params)
  assert far['logp_gap_mean'] <= 10 * near['logp_gap_mean'] + 1e-3
  assert far['logp_gap_max'] < 0.05
  assert far['kl'] < 1e-4


def test_cast_params_change_no_result():
  """Bit by bit, each kind of parameter on its own: norms, biases, a router,
  embeddings, a value head, adapters."""
  config = changed(
    CONFIG,
    layers=(Layer(ROPE), Layer(ROPE, routed=True)),
    norm='layer',
    num_experts=3,
    experts_per_token=2,
    expert_d_ff=8,
    out_bias=True,
    mlp_bias=True,
    value_head=True,
    learned_positions=True,
    max_length=32,
    embedding_scale=3.0,
  )
  policy = make_policy(config, jnp.bfloat16)
  params = off_the_grid(jax.jit(policy.init)(jax.random.key(0)), 0.2)
  attention = params['layers']['attention']
  rng, L = np.random.default_rng(1), len(attention['qkv'])
  attention['qkv_lora'] = {
    'a': rng.normal(size=(L, 16, 2)).astype('f4'),
    'b': rng.normal(size=(L, 2, *attention['qkv'].shape[2:])).astype('f4'),
  }

  @jax.jit
  def look(params):
    prefix = policy.encode(params, random_prompts())
    hidden = prefix.hidden
    return policy.logits(params, hidden), policy.value(params, hidden)

  want, got = look(params), look(policy.cast_params(params))
  for a, b in zip(want, got):
    np.testing.assert_array_equal(a, b)
  # and the check sees each float32 leaf, if it is cast as well
  cast = jax.tree_util.tree_leaves_with_path(policy.cast_params(params))
  kept = {
    re.sub(r'layers/\d+/', 'layers/', sharding.path_name(path))
    for path, x in cast
    if x.dtype == jnp.float32
  }
  assert len(kept) == 4 + 4 + 2 + 1 + 2  # q/k, others, last, head, adapter

  def cast_one(chosen):
    return jax.tree_util.tree_map_with_path(
      lambda path, x: (
        x.astype(jnp.bfloat16).astype(jnp.float32)
        if sharding.path_name(path) == chosen
        else x
      ),
      params,
    )

  for path in kept:
    other = look(cast_one(path))
    assert any((a != b).any() for a, b in zip(want, other)), path


# --- faults are seen


def late(policy):
  """Writes its cache one column too far."""

  def extend(params, prefix, tokens, cache, at):
    return policy.extend(
      params, prefix, tokens, cache, at if cache is None else at + 1
    )

  return policy._replace(extend=extend)


def forgetful(policy):
  """Never writes its cache."""

  def extend(params, prefix, tokens, cache, at):
    hidden, _ = policy.extend(params, prefix, tokens, cache, at)
    return hidden, cache

  return policy._replace(extend=extend)


def rounded(policy):
  """Rounds what the sampler reads."""
  return policy._replace(
    cast_params=lambda params: jax.tree.map(
      lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params
    )
  )


@pytest.mark.parametrize(
  ('fault', 'least'), [(late, 0.05), (forgetful, 0.05), (rounded, 1e-3)]
)
def test_a_fault_is_seen(tiny, fault, least):
  found = measured(fault(tiny.policy), tiny.params, rollout=tiny.rollout)
  assert found['logp_gap_mean'] > least
  assert found['logp_gap_max'] > 2 * least
  assert found['prob_gap_max'] > least
  assert found['kl'] > least**2


def test_norms_cast_for_the_sampler_alone_are_seen():
  """A fault that other trainers have: the sampler rounds norm scales."""
  (policy, params, V, rollout), measure = off_grid('gemma2')
  broken = policy._replace(cast_params=to_bfloat16)
  seen = measured(broken, params, V=V, rollout=rollout)['logp_gap_mean']
  assert seen > 100 * measure(params)['logp_gap_mean']
  assert seen > 1e-3


def test_a_fault_is_a_warning_and_rounding_is_none(tiny):
  for policy, warned in ((tiny.policy, False), (late(tiny.policy), True)):
    found = measured(policy, tiny.params, rollout=tiny.rollout)
    metrics = {f'eval/words/mismatch/{k}': v for k, v in found.items()}
    line = mismatch_warning(metrics)
    assert (line is not None) == warned
    assert not warned or line.startswith('eval/words/mismatch/kl is ')
  assert mismatch_warning({'eval/reward': 1.0}) is None
  assert mismatch_warning({'eval/mismatch/kl': 5e-3}) is None


def test_tokens_of_others_are_not_counted(tiny):
  """A fault in the last column is of no interest to rows that have ended."""

  def extend(params, prefix, tokens, cache, at):
    hidden, cache_after = tiny.policy.extend(params, prefix, tokens, cache, at)
    wrong = 0.0 if cache is None else jnp.where(at >= 3, 1.0, 0.0)
    return hidden + wrong, cache_after

  policy = tiny.policy._replace(extend=extend)
  ends = tiny.rollout.mask & (jnp.arange(9)[None] < 4)
  compiled = jax.jit(make_mismatch(policy))

  def measure(mask):
    rollout = tiny.rollout._replace(mask=mask)
    found = compiled((tiny.params, None), rollout, tiny.rule)
    return {name: float(x) for name, x in found.items()}

  assert_none(measure(ends))
  assert measure(tiny.rollout.mask)['logp_gap_max'] > 0.01
  assert set(measure(jnp.zeros_like(ends)).values()) == {0.0}
