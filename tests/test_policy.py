"""Encoding once and extending is the plain decoder; chunks; memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
  CONFIG,
  END,
  ONE_LAYER,
  PAD,
  changed,
  look,
  make_rollout,
  make_scored,
  make_tiny,
  random_prompts,
)

from jaxrl_tok import distribution
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.policy import (
  belonging,
  completion_hidden,
  evaluate,
  head_is_frozen,
  values,
)
from jaxrl_tok.sampler import make_sampler
from jaxrl_tok.step.state import init_state
from jaxrl_tok.step.update import make_update
from jaxrl_tok.types import Prompts


def plain_hidden(policy, params, rollout):
  """Hidden states [B, T, D] by reading prompt + completion as one long prompt,
  again for every token: no prefix, no cache, no sharing."""
  C, P = rollout.prompts.tokens.shape
  B, T = rollout.tokens.shape
  length = np.repeat(np.asarray(rollout.prompts.length), B // C)
  rows = np.zeros((B, P + T), np.int32)
  for b in range(B):
    prompt = np.asarray(rollout.prompts.tokens)[b * C // B, : length[b]]
    whole = np.concatenate([prompt, np.asarray(rollout.tokens)[b]])
    rows[b, : len(whole)] = whole

  def after(t):  # t of the completion's tokens
    return policy.encode(params, Prompts(jnp.asarray(rows), length + t)).hidden

  return jnp.moveaxis(jax.lax.map(after, jnp.arange(T)), 0, 1)


@pytest.fixture(scope='module')
def two():
  """make_tiny of two layers."""
  return make_tiny()


def test_shared_prefix_is_the_plain_decoder(two):
  @jax.jit
  def both(params):
    def shared(params):
      return completion_hidden(two.policy, params, two.rollout)

    def plain(params):
      return plain_hidden(two.policy, params, two.rollout)

    weigh = jax.random.normal(jax.random.key(0), (12, 9, 16))
    weigh = weigh * two.rollout.mask[:, :, None]
    grads = [
      jax.grad(lambda p, f=f: (f(p) * weigh).sum())(params)
      for f in (shared, plain)
    ]
    return shared(params), plain(params), grads

  # only the mask's columns: what follows an end is of no interest
  shared, plain, grads = both(two.params)
  mask = np.asarray(two.rollout.mask)
  np.testing.assert_allclose(
    np.asarray(shared)[mask], np.asarray(plain)[mask], atol=2e-5
  )
  for a, b in zip(*map(jax.tree.leaves, grads)):
    np.testing.assert_allclose(a, b, atol=1e-4 * (1 + np.abs(b).max()))


def test_cache_is_no_cache(two):
  policy, params, tokens = two.policy, two.params, two.rollout.tokens

  @jax.jit
  def both(params):
    prefix = policy.encode(params, two.prompts)
    whole, _ = policy.extend(params, prefix, tokens, None, 0)
    cache, parts = policy.init_cache(12, 9), []
    for start, size in ((0, 1), (1, 1), (2, 4), (6, 3)):
      part, cache = policy.extend(
        params, prefix, tokens[:, start : start + size], cache, start
      )
      parts.append(part)
    return whole, jnp.concatenate(parts, axis=1)

  np.testing.assert_allclose(*both(params), atol=2e-5)


def test_inputs_reach_encode_as_they_are(tiny):
  """Whatever stands beside a prompt's tokens, evaluating keeps it."""
  seen = []

  def encode(params, prompts):
    seen.append(prompts.inputs['pixels'].shape)
    return tiny.policy.encode(params, prompts)

  policy = tiny.policy._replace(encode=encode)
  prompts = tiny.prompts._replace(inputs={'pixels': np.ones((4, 2, 3))})
  rollout = tiny.rollout._replace(prompts=prompts)
  stats = look(policy, tiny.params, rollout, tiny.rule)
  want = look(tiny.policy, tiny.params, tiny.rollout, tiny.rule)
  np.testing.assert_array_equal(stats.logp, want.logp)
  jax.eval_shape(lambda: values(value_zero(policy), tiny.params, rollout))
  assert seen == [(4, 2, 3)] * 2
  # its own read and append go with the other encode
  for field in ('read', 'append'):
    assert belonging(tiny.policy, getattr(tiny.policy, field)) is not None
    assert belonging(policy, getattr(policy, field)) is None


def value_zero(policy):
  return policy._replace(value=lambda params, hidden: hidden.sum(-1) * 0)


FAULTS = {
  'logits': (
    {'logits': lambda params, hidden: hidden[..., None, :11]},
    {},
    r'^policy.logits gave rank 4, float32 \[12, 9, 1, 11\], expected '
    r'\[B, t, V\] of float with B=12, t=9, V=11$',
  ),
  'value': (
    {'value': lambda params, hidden: hidden[..., :1]},
    {},
    r'^policy.value gave rank 3, float32 \[12, 9, 1\], expected \[B, T\]',
  ),
  'mask': (
    {},
    {'mask': np.ones((12, 9), np.float32)},
    r'^rollout.mask gave rank 2, float32 \[12, 9\], expected \[B, T\] of bool',
  ),
  'rows': (
    {},
    {'tokens': np.ones((11, 9), np.int32), 'mask': np.ones((11, 9), bool)},
    '^rollout.tokens has 11 rows, which its 4 prompts do not divide$',
  ),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_of_shape_is_one_line(tiny, name):
  functions, fields, line = FAULTS[name]
  policy = tiny.policy._replace(**functions)
  rollout = tiny.rollout._replace(**fields)
  with pytest.raises(ValueError) as fault:  # noqa: PT011  jax adds notes
    look(policy, tiny.params, rollout, tiny.rule)
  assert re.search(line, str(fault.value))
  assert '\n' not in str(fault.value)


def test_chunks_change_nothing(tiny):
  def loss(params, chunk):
    stats = evaluate(tiny.policy, params, tiny.rollout, tiny.rule, chunk)
    return stats.logp.sum() + 0.1 * stats.entropy.sum()

  grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  whole, want = grad(tiny.params, 9)
  for chunk in (1, 4):
    value, grads = grad(tiny.params, chunk)
    assert value == pytest.approx(float(whole), rel=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want)):
      np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max()))


def frozen(tiny):
  """Policy whose head is frozen: (policy, trained, fixed)."""
  policy = tiny.policy._replace(
    merge_params=lambda trained, head: trained | head
  )
  trained = {k: v for k, v in tiny.params.items() if k != 'head'}
  return policy, trained, {'head': tiny.params['head']}


@pytest.mark.parametrize(('chunk', 'num_kept'), [(4, 3), (9, None)])
def test_a_frozen_head_changes_no_gradient(tiny, chunk, num_kept):
  """Slopes that are computed forward, and the entropy's computed again."""
  policy, trained, fixed = frozen(tiny)
  rollout = tiny.rollout
  if num_kept is not None:
    kept = jnp.full(rollout.tokens.shape, num_kept, jnp.int32)
    rollout = rollout._replace(num_kept=kept)
  weigh = jax.random.normal(jax.random.key(0), rollout.tokens.shape)

  def loss(trained, entropy_coef, frozen_head):
    stats = evaluate(
      policy,
      policy.merge_params(trained, fixed),
      rollout,
      tiny.rule,
      chunk,
      frozen_head,
    )
    total = (stats.logp * weigh).sum()
    if entropy_coef:
      total += entropy_coef * (stats.entropy * weigh).sum()
    return total, stats

  grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=(1, 2))
  for entropy_coef in (0.0, 0.3):
    found, want = (grad(trained, entropy_coef, f) for f in (True, False))
    for a, b in zip(*map(jax.tree.leaves, (found, want)), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max()))


def test_a_head_is_frozen_where_no_trained_leaf_reaches_the_logits(tiny):
  policy, trained, fixed = frozen(tiny)
  assert head_is_frozen(policy, trained, fixed, tiny.prompts)
  assert not head_is_frozen(tiny.policy, tiny.params, None, tiny.prompts)
  scaled = policy._replace(
    merge_params=lambda trained, head: (
      trained
      | {'head': {'embedding': head['head']['embedding'] * trained['gain']}}
    )
  )
  trained['gain'] = jnp.float32(1)
  assert not head_is_frozen(scaled, trained, fixed, tiny.prompts)


def test_a_frozen_head_saves_a_product(tiny, wide):
  """Logits are not computed again: a third of the head's FLOPs."""
  policy, params, _, prompts, rule, (C, G, _, T, V) = wide
  fixed = {'head': params['head']}
  trained = {k: v for k, v in params.items() if k != 'head'}
  tokens = jnp.ones((C * G, T), jnp.int32)
  rollout = make_rollout(prompts, tokens, tokens > 0)

  def flops(frozen_head):
    def loss(trained):
      whole = trained | fixed
      stats = evaluate(policy, whole, rollout, rule, T // 2, frozen_head)
      return stats.logp.sum()

    compiled = jax.jit(jax.value_and_grad(loss)).lower(trained).compile()
    return compiled.cost_analysis()['flops']

  product = 2 * C * G * (T // 2) * V * CONFIG.d_model  # of one chunk
  assert flops(False) - flops(True) > 0.9 * product


def test_value_head_and_remat():
  config = changed(ONE_LAYER, value_head=True, tie_embeddings=True)
  prompts = random_prompts()
  tokens = np.random.default_rng(0).integers(1, 9, (8, 5)).astype(np.int32)
  mask = np.arange(5)[None] < np.arange(1, 9)[:, None]
  rollout = make_rollout(prompts, tokens, mask)
  rule = distribution.make_rule(11, [END])
  results = []
  params = jax.jit(make_policy(config).init)(jax.random.key(0))
  head = params['value_head']['embedding']
  assert (head == 0).all(), 'V begins at 0'
  params['value_head'] = {'embedding': head + 0.3}
  for remat in ('none', 'dots', 'full'):
    policy = make_policy(config, remat=remat)

    @jax.jit
    def grad(params, policy=policy):
      def loss(params):
        stats = evaluate(policy, params, rollout, rule)
        return stats.logp.sum() + stats.value.sum(), stats

      return jax.grad(loss, has_aux=True)(params)

    results.append(grad(params))
  (grads, stats), *others = results
  assert stats.value.shape == (8, 5)
  assert (np.asarray(stats.value)[~mask] == 0).all()
  assert (np.asarray(stats.value)[mask] != 0).all()
  for again, _ in others:
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(again)):
      np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_follows_the_end_changes_nothing(tiny):
  mask = np.asarray(tiny.rollout.mask)
  other = tiny.rollout._replace(
    tokens=np.where(mask, tiny.rollout.tokens, 5).astype(np.int32)
  )
  a = look(tiny.policy, tiny.params, tiny.rollout, tiny.rule)
  b = look(tiny.policy, tiny.params, other, tiny.rule)
  np.testing.assert_array_equal(a.logp, b.logp)
  np.testing.assert_array_equal(a.entropy, b.entropy)


# --- gates that need no clock


def largest_float_array(compiled) -> int:
  """Elements of the largest f32 array in the optimised program."""
  shapes = re.findall(r'f32\[([\d,]+)\]', compiled.as_text())
  return max(int(np.prod([int(n) for n in s.split(',')])) for s in shapes)


@pytest.fixture(scope='module')
def wide(tiny):
  """Vocabulary that dwarfs all else: any [B, T, V] array would show."""
  V, C, G, P, T = 4096, 2, 4, 16, 16
  config = changed(ONE_LAYER, vocab_size=V)
  policy = make_policy(config)
  params = jax.jit(policy.init)(jax.random.key(0))
  sampler = changed(tiny.config, samples_per_prompt=G, max_completion_length=T)
  rule = distribution.make_rule(V, [END])
  prompts = random_prompts(C, P, V)
  return policy, params, sampler, prompts, rule, (C, G, P, T, V)


def test_no_float_array_of_the_whole_vocabulary(tiny, wide):
  import optax

  from jaxrl_tok.credit import advantages, algorithms

  policy, params, sampler, prompts, rule, (C, G, P, T, V) = wide
  sample = jax.jit(make_sampler(policy, sampler))
  args = params, jax.random.key(0), prompts, rule
  compiled = sample.lower(*args).compile()
  assert largest_float_array(compiled) < min(C * G * T, C * P) * V
  rollout = compiled(*args)
  algorithm = algorithms.reinforce(advantages.leave_one_out())
  optimizer = optax.sgd(1.0)
  state = init_state(algorithm, optimizer, params, jax.random.key(0))
  update = jax.jit(make_update(policy, algorithm, optimizer, logits_chunk=2))
  batch = make_scored(rollout, jnp.zeros((C * G, T)))
  compiled = update.lower(state, batch, rule).compile()
  assert largest_float_array(compiled) <= max(C * G * 2 * V, 16 * V)
  # the default chunk is also below the whole
  update = jax.jit(make_update(policy, algorithm, optimizer))
  big = jax.tree.map(lambda x: jnp.concatenate([x] * 16), rollout)
  batch = make_scored(big, jnp.zeros((16 * C * G, T)))
  compiled = update.lower(state, batch, rule).compile()
  assert largest_float_array(compiled) <= 2**20


def test_encode_runs_the_prompts_not_the_rows(tiny):
  """FLOPs of encoding grow with C and not with G."""
  seen = []

  def encode(params, prompts):
    seen.append(prompts.tokens.shape)
    return tiny.policy.encode(params, prompts)

  policy = tiny.policy._replace(encode=encode)
  long = random_prompts(4, 256)

  def flops(G):
    sample = make_sampler(
      policy,
      changed(tiny.config, samples_per_prompt=G, max_completion_length=1),
    )
    args = tiny.params, jax.random.key(0), long, tiny.rule
    cost = jax.jit(sample).lower(*args).compile().cost_analysis()
    tokens = jnp.full((4 * G, 1), PAD)
    rollout = make_rollout(long, tokens, tokens > 0)
    looked = jax.jit(lambda p, r: evaluate(policy, p, r, tiny.rule))
    cost2 = looked.lower(tiny.params, rollout).compile().cost_analysis()
    return cost['flops'], cost2['flops']

  for one, eight in zip(flops(1), flops(8)):
    assert eight < 1.1 * one
  assert set(seen) == {(4, 256)}
