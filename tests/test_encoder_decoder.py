"""Encoder-decoders: padding, batch-mates, sharing and caches change nothing;
the decoder's own first tokens; what has a gradient."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import END, PAD, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok import distribution, sharding
from jaxrl_tok.models.encoder_decoder import make_policy, sinusoids
from jaxrl_tok.models.encoder_decoder_config import (
  Buckets,
  EncoderDecoderConfig,
  StackConfig,
)
from jaxrl_tok.models.relative_positions import bucket_of, score_bias
from jaxrl_tok.policy import evaluate
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.step.compile import AS_WRITTEN
from jaxrl_tok.types import Prompts

V, D, G, T = 11, 12, 2, 6
ENCODER = StackConfig(1, D, num_heads=2, head_dim=6, d_ff=14)
DECODER = StackConfig(2, D, num_heads=4, head_dim=3, d_ff=10)


def config_of(start, sides: dict, **choices) -> EncoderDecoderConfig:
  return EncoderDecoderConfig(
    V,
    dataclasses.replace(ENCODER, **sides),
    dataclasses.replace(DECODER, **sides),
    start,
    **choices,
  )


T5 = {'norm': 'rms', 'pre_norm': True, 'bias': False, 'attention_scale': 1.0}
BART = {
  'num_positions': 12,
  'position_offset': 2,
  'embedding_norm': True,
  'logit_bias': True,
}
CONFIGS = {
  't5': config_of(
    (0,),
    T5 | {'activation': 'relu'},
    positions=Buckets(8, 9),
    final_norm=True,
    logit_scale=D**-0.5,
  ),
  'flan': config_of(
    (0,),
    T5 | {'activation': 'gelu_tanh', 'gated': True},
    positions=Buckets(8, 9),
    final_norm=True,
    tie_embeddings=False,
    value_head=True,
  ),
  'bart': config_of((2, 4), {}, **BART),
  'mbart': config_of(
    (2, 5), {'pre_norm': True}, final_norm=True, embedding_scale=2.0, **BART
  ),
  'marian': config_of(
    (0,),
    {'activation': 'silu'},
    positions='sinusoidal',
    num_positions=12,
    embedding_scale=D**0.5,
    logit_bias=True,
  ),
}
RULE = distribution.make_rule(V, [END])
PROMPTS = random_prompts(3, 5)


def opinionated(params, seed=2):
  """Adds noise to every parameter: biases, norms and all have an effect."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  noise = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
  return jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise)])


def logits_after(policy, params, prompts, tokens):
  """Logits [B, t + 1, V] before and after each of the tokens [B, t]."""
  prefix = policy.encode(params, prompts)
  first = jnp.repeat(prefix.hidden, len(tokens) // len(prefix.length), axis=0)
  rest, _ = policy.extend(params, prefix, tokens, None, 0)
  return policy.logits(params, jnp.concatenate([first[:, None], rest], axis=1))


def logits_by_cache(policy, params, prompts, tokens):
  """Logits [B, t, V] after each token: two at once, then one at a time."""
  cast = policy.cast_params(params)
  prefix = policy.encode(cast, prompts)
  cache = policy.init_cache(*tokens.shape)
  two, cache = policy.extend(cast, prefix, tokens[:, :2], cache, 0)

  def one(cache, t):
    token = jax.lax.dynamic_slice_in_dim(tokens, t, 1, axis=1)
    hidden, cache = policy.extend(cast, prefix, token, cache, t)
    return cache, hidden[:, 0]

  _, rest = jax.lax.scan(one, cache, jnp.arange(2, tokens.shape[1]))
  hidden = jnp.concatenate([two, jnp.moveaxis(rest, 0, 1)], axis=1)
  return policy.logits(cast, hidden)


def on_every_way(policy, other, params, tokens):
  """Logits [B, .., V] of the completions `tokens` [3 * G, T], in every way.

  other: a policy whose layers are scanned, not looped over.
  """
  wide = jnp.pad(PROMPTS.tokens, ((0, 0), (0, 3)), constant_values=7)
  rows = Prompts(*(jnp.repeat(x, G, axis=0) for x in (wide, PROMPTS.length)))
  one, n = slice(1, 2), PROMPTS.length[1]
  alone = Prompts(PROMPTS.tokens[one, :n], PROMPTS.length[one])
  return {
    'shared': logits_after(policy, params, PROMPTS, tokens),
    'separate, padded more': logits_after(policy, params, rows, tokens),
    'scanned': logits_after(other, params, PROMPTS, tokens),
    'alone': logits_after(policy, params, alone, tokens[G : 2 * G]),
    'cached': logits_by_cache(policy, params, PROMPTS, tokens),
  }


@functools.cache
def made(name: str):
  """Makes one of CONFIGS: policy, parameters, a rollout, and its logits."""
  config = CONFIGS[name]
  policy = make_policy(config)
  params = opinionated(jax.jit(policy.init)(jax.random.key(1)))
  sample = make_sampler(policy, SamplerConfig(G, T, PAD, chunk=2))
  rollout = jax.jit(sample)(params, jax.random.key(3), PROMPTS, RULE)
  after = jax.jit(functools.partial(logits_after, policy))
  other = make_policy(config, scan_layers=True)
  ways = jax.jit(functools.partial(on_every_way, policy, other))
  logits = jax.device_get(ways(params, rollout.tokens))
  return types.SimpleNamespace(**locals())


@pytest.mark.parametrize('name', CONFIGS)
def test_completions_have_one_meaning(name):
  logits = dict(made(name).logits)
  want = logits.pop('shared')
  assert np.ptp(want, axis=-1).min() > 0.1
  parts = {'alone': want[G : 2 * G], 'cached': want[:, 1:]}
  for way, got in logits.items():
    part = parts.get(way, want)
    np.testing.assert_allclose(got, part, atol=1e-5, err_msg=way)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_prompt_token_matters_and_every_completion_token(name):
  """Changes of one token move the logits from there on, and no others."""
  m = made(name)
  tokens = m.rollout.tokens
  want = m.logits['shared']
  last = PROMPTS.tokens.copy()
  last[2, 4] = 1 + last[2, 4] % 8  # of the only full prompt
  got = m.after(m.params, Prompts(last, PROMPTS.length), tokens)
  changed = np.abs(got - want).max((1, 2)) > 1e-3
  assert changed.tolist() == [False] * 4 + [True] * 2
  other = tokens.at[0, 3].set((tokens[0, 3] + 1) % V)
  got = m.after(m.params, PROMPTS, other)
  changed = np.abs(got - want).max(2) > 1e-4
  assert changed[0].tolist() == [False] * 4 + [True] * 3
  assert not changed[1:].any()


@functools.cache
def gradient(name: str, remat: str = 'none'):
  """Gradient of a rollout's log-probs and values, and those log-probs."""
  m, policy = made(name), make_policy(CONFIGS[name], remat=remat)

  @jax.jit
  def run(params):
    def loss(params):
      stats = evaluate(policy, params, m.rollout, RULE)
      value = 0 if stats.value is None else stats.value.sum()
      return stats.logp.sum() + value, stats.logp

    return jax.grad(loss, has_aux=True)(params)

  return run(m.params)


@pytest.mark.parametrize('name', CONFIGS)
def test_log_probs_are_the_samplers(name):
  rollout, (_, logp) = made(name).rollout, gradient(name)
  assert rollout.mask.sum() > 12
  np.testing.assert_allclose(logp, rollout.logp, atol=1e-5)


@pytest.mark.parametrize('name', CONFIGS)
def test_all_but_the_bias_of_logits_is_trained(name):
  for path, g in jax.tree_util.tree_leaves_with_path(gradient(name)[0]):
    name = sharding.path_name(path)
    if name.startswith('logit_bias'):
      assert np.abs(g).max() == 0
    elif '/layers/' in name:  # of every layer
      assert np.abs(g).reshape(len(g), -1).max(1).min() > 1e-6, name
    else:
      assert np.abs(g).max() > 1e-6, name


def test_remat_changes_no_gradient():
  plain, again = gradient('t5')[0], gradient('t5', 'full')[0]
  for a, b in zip(*map(jax.tree.leaves, (plain, again)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize('name', ['flan', 'bart', 'mbart'])
def test_start_tokens_are_a_fixed_beginning(name):
  """A first token that is forced is a completion token that is no action."""
  m = made(name)
  short = dataclasses.replace(m.config, start_tokens=(2,))
  long = dataclasses.replace(m.config, start_tokens=(2, 3, 4))
  tokens = np.asarray(m.rollout.tokens)
  with_start = np.pad(tokens, ((0, 0), (2, 0)))
  with_start[:, :2] = 3, 4
  got, want = (
    jax.jit(functools.partial(logits_after, make_policy(config)))(
      m.params, PROMPTS, completion
    )
    for config, completion in ((long, tokens), (short, with_start))
  )
  np.testing.assert_allclose(got, want[:, 2:], atol=5e-5)


@pytest.mark.parametrize('name', ['t5', 'mbart'])
def test_casting_once_changes_no_number(name):
  policy, m = make_policy(CONFIGS[name], jnp.bfloat16), made(name)
  run = jax.jit(functools.partial(logits_after, policy))
  got = run(policy.cast_params(m.params), PROMPTS, m.rollout.tokens)
  want = run(m.params, PROMPTS, m.rollout.tokens)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, want)
  cast = policy.cast_params(m.params)
  kept = {
    sharding.path_name(path).split('/')[-2]
    for path, x in jax.tree_util.tree_leaves_with_path(cast)
    if x.dtype == jnp.float32
  }
  own = {'position_bias'} if name == 't5' else {'embed_norm', 'logit_bias'}
  norms = {'attention_norm', 'cross_attention_norm', 'mlp_norm', 'norm'}
  assert kept == norms | own


@pytest.mark.parametrize('name', ['t5', 'mbart'])
def test_bfloat16_is_rounded_in_a_scan_as_in_a_loop(name):
  """Equal bits, with the compiler's option that all programs of a run have."""
  m = made(name)
  policy = make_policy(CONFIGS[name], jnp.bfloat16, scan_layers=True)

  def both(params):
    split = policy.cast_params(params)
    return [evaluate(policy, p, m.rollout, RULE).logp for p in (params, split)]

  a, b = jax.jit(both).lower(m.params).compile(AS_WRITTEN)(m.params)
  np.testing.assert_array_equal(a, b)
  assert np.abs(a - m.rollout.logp).max() > 1e-3  # it is rounded


def test_programs_do_not_grow_with_the_layers():
  """StableHLO of a gradient and of a rollout, at 12 layers and at 2."""

  def lines(num_layers):
    config = CONFIGS['t5']
    sides = {
      side: dataclasses.replace(getattr(config, side), num_layers=num_layers)
      for side in ('encoder', 'decoder')
    }
    policy = make_policy(dataclasses.replace(config, **sides), scan_layers=True)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    rollout = made('t5').rollout

    def loss(params):
      return evaluate(policy, params, rollout, RULE).logp.sum()

    sample = make_sampler(policy, SamplerConfig(G, T, PAD, chunk=2))
    return (
      len(jax.jit(jax.grad(loss)).lower(shapes).as_text().splitlines()),
      len(
        jax.jit(sample)
        .lower(shapes, jax.random.key(0), PROMPTS, RULE)
        .as_text()
        .splitlines()
      ),
    )

  few, many = lines(2), lines(12)
  assert many[0] <= 1.1 * few[0]
  assert many[1] <= 1.5 * few[1]  # decoding loops over one function


def test_matrices_are_split_over_the_mesh():
  policy = make_policy(CONFIGS['flan'])
  mesh = sharding.make_mesh('data=1,fsdp=2,tensor=2', jax.devices()[:4])
  shapes = jax.eval_shape(policy.init, jax.random.key(0))
  places = sharding.tree_shardings(mesh, shapes, policy.partition_rules)
  for path, place in jax.tree_util.tree_leaves_with_path(places):
    name = sharding.path_name(path)
    if name.endswith(('norm/scale', 'value_head/embedding')):
      continue
    axes = ['tensor']
    if 'position_bias' not in name:
      axes.append('fsdp')
    if name.endswith(('embed/embedding', 'head/embedding')):
      axes.remove('tensor')  # 11 rows
    assert sorted(a for a in place.spec if a) == sorted(axes), name
    assert 'layers/' not in name or place.spec[0] is None


# --- positions


def test_buckets_are_t5s():
  near = bucket_of(Buckets(32, 128), -np.arange(9), both_sides=True)
  assert near.tolist() == list(range(8)) + [8]
  after = bucket_of(Buckets(32, 128), [1, 7, 8, 127, 128, 999], True)
  assert after.tolist() == [17, 23, 24, 31, 31, 31]
  borders = -np.array([15, 16, 18, 19, 112, 113, 128, 5000])
  causal = bucket_of(Buckets(32, 128), borders, both_sides=False)
  assert causal.tolist() == [15, 16, 16, 17, 30, 31, 31, 31]
  assert bucket_of(Buckets(32, 128), [0, 1, 50], False).tolist() == [0, 0, 0]


@settings(max_examples=30)
@given(
  st.integers(2, 16), st.integers(1, 200), st.booleans(), st.integers(0, 300)
)
def test_buckets_are_ordered_by_distance(half, more, both, offset):
  buckets = Buckets(4 * half, 2 * half + more)
  before = bucket_of(buckets, -np.arange(300), both)
  assert (np.diff(before) >= 0).all()
  assert before[0] == 0
  assert before[-1] < buckets.count // (2 if both else 1)
  if both:
    after = bucket_of(buckets, np.arange(1, 300), both)
    np.testing.assert_array_equal(after, before[1:] + buckets.count // 2)


def test_a_bias_depends_on_the_distance_alone():
  table = jax.random.normal(jax.random.key(0), (8, 3))
  buckets = Buckets(8, 9)
  query, key = np.arange(20, 24), np.arange(40)
  got = jax.jit(lambda q: score_bias(table, buckets, q, key, True))(query)
  assert got.shape == (3, 1, 4, 40)
  for i, q in enumerate(query):
    want = table[bucket_of(buckets, key - q, True)].T
    np.testing.assert_array_equal(got[:, 0, i], want)


def test_sinusoids_are_sines_then_cosines():
  table = sinusoids(5, 6)
  rates = np.array([1.0, 10000 ** (-2 / 6), 10000 ** (-4 / 6)])
  for position in range(5):
    angles = position * rates
    want = np.concatenate([np.sin(angles), np.cos(angles)])
    np.testing.assert_allclose(table[position], want, atol=1e-7)


# --- faults

FAULTS = {
  'no start': ({'start_tokens': ()}, 'decoder_start_token_id is missing'),
  'unknown start': ({'start_tokens': (V,)}, 'begins with 11, which is no id'),
  'classifier': ({'lm_head': False}, 'classifier that is an encoder-decoder'),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_is_one_line(name):
  changes, said = FAULTS[name]
  with pytest.raises(ValueError, match=said) as caught:
    dataclasses.replace(CONFIGS['bart'], **changes)
  assert '\n' not in str(caught.value)


def test_a_stack_has_layers():
  with pytest.raises(ValueError, match='num_layers 0 is not a number above'):
    dataclasses.replace(ENCODER, num_layers=0)


@pytest.mark.parametrize(
  ('count', 'most'), [(0, 128), (3, 128), (32, 16), (32, 12), (8, 0)]
)
def test_buckets_that_are_none_are_refused(count, most):
  with pytest.raises(ValueError, match='are no relative positions'):
    Buckets(count, most)


def test_another_kernel_is_refused():
  with pytest.raises(ValueError, match='cudnn is not for encoder-decoders'):
    make_policy(CONFIGS['t5'], attention='cudnn')
