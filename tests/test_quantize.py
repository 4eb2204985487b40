"""Int8 weights: the rule, its products, and a base that LoRA freezes."""

import re
import shutil
from collections.abc import Callable
from typing import NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GOLDEN, ONE, SEQ2SEQ, random_prompts
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file

from jaxrl_tok import distribution, sharding
from jaxrl_tok.credit import algorithms
from jaxrl_tok.hub import export
from jaxrl_tok.hub.directory import open_model
from jaxrl_tok.hub.trainable import adapted
from jaxrl_tok.hub.weights import read_params
from jaxrl_tok.models import lora, quantize
from jaxrl_tok.policy import evaluate
from jaxrl_tok.run import flags
from jaxrl_tok.run.settings import Settings
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.step.state import make_state

TINY = np.finfo(np.float32).tiny
NUMBERS = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
MATRICES = hnp.arrays(
  np.float32,
  hnp.array_shapes(min_dims=2, max_dims=3, max_side=5),
  elements=NUMBERS,
)


# --- the rule


@given(MATRICES)
@settings(max_examples=200)
@example(np.zeros((2, 3), np.float32))
@example(np.full((2, 3), 190e-45, np.float32))  # a scale of one bit
@example(np.float32([[127.5, 0.5], [-1e-30, 3e38]]))
def test_weights_are_within_half_a_scale(w):
  q, scale = quantize.quantize(w, (-2,))
  assert q.dtype == np.int8
  assert scale.dtype == np.float32
  assert np.isfinite(scale).all()
  assert (scale > 0).all()
  assert np.abs(q.astype(int)).max() <= 127
  s = np.expand_dims(scale, -2).astype(np.float64)
  error = np.abs(w.astype(np.float64) - q * s)
  assert (error <= s * (0.5 + 1e-5)).all()  # float32's last bits of w / s


@given(MATRICES, st.integers(-20, 20))
def test_the_rule_is_scale_invariant(w, power):
  w = np.where(np.abs(w) < 1e-20, 0, w)
  c = np.float32(2.0**power)
  q, scale = quantize.quantize(w, (-1,))
  scaled, by = quantize.quantize(w * c, (-1,))
  np.testing.assert_array_equal(scaled, q)
  zero = np.abs(w).max(-1) == 0
  np.testing.assert_array_equal(by, np.where(zero, 1, scale * c))


def test_a_channel_of_zeros_stays_one():
  w = np.float32([[0, 1, 0], [0, -2, 1e-42]])
  q, scale = quantize.quantize(w, (-2,))
  np.testing.assert_array_equal(q, [[0, 64, 0], [0, -127, 0]])
  np.testing.assert_array_equal(scale, np.float32([1, 2 / 127, 1]))


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
  w = np.ones((3, 4), np.float32)
  w[2, 1] = bad
  with pytest.raises(ValueError, match=r'^weights that are not finite'):
    quantize.quantize(w, (-1,))


def test_rows_in_pieces_are_those_of_the_whole(monkeypatch):
  w = np.random.default_rng(0).normal(size=(7, 5, 3)).astype(np.float32)
  whole = quantize.quantize(w, (-2,))
  monkeypatch.setattr(quantize, 'PIECE', 2 * 15)
  for a, b in zip(quantize.quantize(w, (-2,)), whole):
    np.testing.assert_array_equal(a, b)


# --- products


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


SHAPES = {  # path -> one layer's shape
  'attention/qkv': (6, 2, 3, 4),
  'attention/out': (2, 1, 3, 10),
  'mlp/gate_up': (6, 2, 5),
  'mlp/down': (6, 11),
  'embed/embedding': (13, 6),
}


@pytest.mark.parametrize('piece', [1, 6 * 3, 10**6])
@pytest.mark.parametrize('path', SHAPES)
def test_products_are_those_of_the_dequantized_matrix(path, piece, monkeypatch):
  monkeypatch.setattr(quantize, 'PIECE', piece)
  axes, table = quantize.input_axes(path), 'embedding' in path
  q, scale = quantize.quantize(normal(*SHAPES[path]), axes)
  w = np.float64(q) * np.expand_dims(np.float64(scale), axes)
  flat = w.T if table else w.reshape(6, -1)
  x = normal(2, 3, 6, seed=1)
  want = (np.float64(x) @ flat).reshape(2, 3, *scale.shape)
  dy = normal(*want.shape, seed=2)

  def run(x):
    return quantize.product(x, q, scale, table)

  y, back = jax.vjp(jax.jit(run), x)
  size = np.abs(x).sum() * np.abs(w).max()
  np.testing.assert_allclose(y, want, atol=1e-6 * size, rtol=0)
  want = np.float64(dy).reshape(2, 3, -1) @ flat.T
  size = np.abs(dy).sum() * np.abs(w).max()
  np.testing.assert_allclose(back(dy)[0], want, atol=1e-6 * size, rtol=0)


def test_products_in_bfloat16_round_x_alone():
  q, scale = quantize.quantize(normal(64, 9), (-2,))
  x = jnp.asarray(normal(5, 64, seed=1), jnp.bfloat16)
  y, back = jax.vjp(lambda x: quantize.product(x, q, scale), x)
  w = np.float64(q) * np.float64(scale)
  np.testing.assert_allclose(y, np.float64(x) @ w, atol=1e-4)
  assert y.dtype == jnp.float32
  assert back(y)[0].dtype == jnp.bfloat16


def test_the_backward_pass_keeps_no_copy_of_the_matrix():
  q, scale = quantize.quantize(normal(64, 48), (-2,))

  def residuals(x):
    return jax.vjp(lambda x: quantize.product(x, q, scale), x)[1]

  kept = jax.eval_shape(residuals, normal(2, 64))
  large = [x for x in jax.tree.leaves(kept) if x.size >= q.size]
  assert all(x.dtype == jnp.int8 for x in large)


# --- a base that LoRA freezes


MESH = sharding.make_mesh('data=1', jax.devices()[:1])
SAME = {'atol': 1e-5, 'rtol': 1e-5}


class Run(NamedTuple):
  """Functions and arrays of a policy with an int8 base."""

  model: object
  trainable: object
  policy: object
  adapters: dict
  base: dict
  rollout: object
  logp: Callable  # (adapters, base, rollout) -> log-probs [B, T], compiled
  # gradient of a weighted sum of them by the adapters, and they, compiled
  gradient: Callable


@pytest.fixture(scope='module', params=['qwen2', 'gpt2'])
def run(request):
  model = open_model(GOLDEN / request.param)
  trainable = adapted(model, lora.LoraConfig(2, 16.0), quantized=True)
  adapters, base = trainable.load(MESH)
  adapters = jax.tree.map(lambda x: 0.1 * normal(*x.shape), adapters)
  policy = model.make_policy()._replace(merge_params=trainable.merge)
  prompts = random_prompts(3, 5, 20)
  config = SamplerConfig(2, 6, pad_token=0, chunk=3)
  rule = distribution.make_rule(model.vocab_size, [0])
  rollout = jax.jit(make_sampler(policy, config))(
    trainable.merge(adapters, base), jax.random.key(0), prompts, rule
  )
  weights = normal(*rollout.logp.shape)

  @jax.jit
  def logp(adapters, base, rollout):
    params = trainable.merge(adapters, base)
    return evaluate(policy, params, rollout, rule).logp

  @jax.jit
  def gradient(adapters, base, rollout):
    def loss(adapters):
      found = logp(adapters, base, rollout)
      return (found * weights).sum(), found

    return jax.grad(loss, has_aux=True)(adapters)

  return Run(model, trainable, policy, adapters, base, rollout, logp, gradient)


def test_the_base_is_the_rule_of_its_file(run):
  want = quantize.quantize_params(read_params(run.model))
  for a, b in zip(jax.tree.leaves(run.base), jax.tree.leaves(want)):
    np.testing.assert_array_equal(a, b)
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), run.base)
  structs = run.trainable.structs()[1]
  assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), structs)
  flat = flax.traverse_util.flatten_dict(run.base, sep='/')
  for path, x in flat.items():
    whole = re.search(r'norm|bias|positions|_scale$', path)
    assert x.dtype == (jnp.float32 if whole else jnp.int8), path


def test_sampled_log_probs_are_those_evaluated(run):
  mask = run.rollout.mask
  assert mask.sum() > len(mask)
  _, found = run.gradient(run.adapters, run.base, run.rollout)
  np.testing.assert_allclose(found, run.rollout.logp, **SAME)


def test_a_gradient_is_that_of_the_dequantized_model(run):
  floats = jax.jit(quantize.dequantize_params)(run.base)
  args = run.adapters, run.base, run.rollout
  want, logp = run.gradient(run.adapters, floats, run.rollout)
  gradient, found = run.gradient(*args)
  np.testing.assert_allclose(found, logp, **SAME)
  for a, b in zip(*map(jax.tree.leaves, (gradient, want)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)
    assert np.abs(b).max() > 1e-3


def test_casting_for_a_rollout_leaves_int8(run):
  params = run.trainable.merge(run.adapters, run.base)
  policy = run.model.make_policy(jnp.bfloat16)
  cast = jax.eval_shape(policy.cast_params, params)
  flat = jax.tree_util.tree_leaves_with_path(cast)
  for path, x in flat:
    name = sharding.path_name(path)
    if name.endswith('_scale'):
      assert x.dtype == jnp.float32
    assert (x.dtype == jnp.int8) == (quantize.input_axes(name) is not None)


def test_the_export_is_the_policy_that_was_trained(run, tmp_path):
  out = run.trainable.export(tmp_path, run.adapters, run.base, {'title': 'x'})
  model = open_model(out)
  params = read_params(model)
  types = {x.dtype.name for x in jax.tree.leaves(params)}
  assert types == {'float32'}
  with_none = jax.tree.map(jnp.zeros_like, run.adapters)
  _, found = run.gradient(with_none, params, run.rollout)
  _, want = run.gradient(run.adapters, run.base, run.rollout)
  np.testing.assert_allclose(found, want, **SAME)


def test_log_probs_do_not_depend_on_devices(run):
  mesh = sharding.make_mesh('data=2,fsdp=2,tensor=2')
  with jax.set_mesh(mesh):
    adapters, base = run.trainable.load(mesh)
    flat = flax.traverse_util.flatten_dict(base, sep='/')
    for path, scale in flat.items():
      if path.endswith('_scale'):
        q = flat[path.removesuffix('_scale')]
        axes = quantize.input_axes(path.removesuffix('_scale'))
        spec = [*q.sharding.spec, *(None,) * q.ndim][: q.ndim]
        kept = [a for i, a in enumerate(spec) if i - q.ndim not in axes]
        own = [*scale.sharding.spec, *(None,) * scale.ndim][: scale.ndim]
        assert own == kept, path
    adapters = sharding.put_replicated(mesh, jax.device_get(run.adapters))
    rollout = jax.tree.map(lambda x: np.concatenate([x] * 4), run.rollout)
    rollout = sharding.put_rows(mesh, jax.device_get(rollout))
    found = run.logp(adapters, base, rollout)
  _, want = run.gradient(run.adapters, run.base, run.rollout)
  np.testing.assert_allclose(found, np.concatenate([want] * 4), **SAME)


def test_weights_of_a_file_that_are_not_finite_are_named(tmp_path):
  copy = shutil.copytree(GOLDEN / 'qwen2', tmp_path / 'bad')
  tensors = dict(load_file(copy / 'model.safetensors'))
  name = 'model.layers.1.mlp.down_proj.weight'
  tensors[name] = np.full_like(tensors[name], np.inf)
  save_file(tensors, copy / 'model.safetensors', metadata={'format': 'pt'})
  with pytest.raises(ValueError, match=rf'^{name}: weights that are not fin'):
    read_params(open_model(copy), quantized=True)


def test_a_separate_critic_begins_as_the_dequantized_base(run):
  trainable, model = run.trainable, run.model
  policy = model.make_policy()._replace(merge_params=trainable.merge)
  state = make_state(
    policy,
    algorithms.grpo(),
    optax.sgd(1e-3),
    MESH,
    0,
    *jax.tree.map(jnp.array, (run.adapters, run.base)),  # they are donated
    critic=model.with_value_head().make_policy(),
  )
  want = quantize.dequantize_params(run.base)
  found = {k: state.critic[k] for k in want}
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('name', ['bart', 't5_gated'])
def test_encoder_decoders_are_quantized_too(name):
  model = open_model(SEQ2SEQ / name)
  policy, base = model.make_policy(), read_params(model, quantized=True)
  flat = flax.traverse_util.flatten_dict(base, sep='/')
  assert flat['decoder/layers/cross_attention/kv'].dtype == jnp.int8
  assert flat['encoder/layers/attention/qkv'].dtype == jnp.int8
  prompts = random_prompts(2, 4, 20)

  @jax.jit
  def logits(params):
    return policy.logits(params, policy.encode(params, prompts).hidden)

  want = logits(jax.jit(quantize.dequantize_params)(base))
  np.testing.assert_allclose(logits(base), want, atol=1e-4)


# --- a run


INT8 = '--lora_rank=2 --quantize=int8 --lr_schedule=constant --save_every=2'


@pytest.mark.usefixtures('few_programs')
def test_a_run_resumes_and_exports(train_fixture, tmp_path):
  flags = [*INT8.split(), '--kl=reverse', '--beta=0.01', '--max_steps=3']
  run, rows = train_fixture('qwen2', ONE, *flags)
  assert len(rows) == 3
  adapter = run / 'adapter/adapter_model.safetensors'
  first = adapter.read_bytes()
  later = export.export_run(run, tmp_path / 'later')
  shutil.rmtree(run / 'checkpoints/3')
  train_fixture('qwen2', ONE, *flags, '--resume=auto', out=run.name)
  assert adapter.read_bytes() == first
  exports = (
    load_file(d / 'model.safetensors') for d in (run / 'export', later)
  )
  for a, b in zip(*(dict(sorted(x.items())).values() for x in exports)):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  ('argv', 'said'),
  [
    (
      '--quantize=int8',
      '--quantize int8 holds weights that nothing trains, and without LoRA or '
      'a --reward_model there are none; pass --lora_rank 16',
    ),
    (
      '--quantize=int8 --lora_rank=2 --param_dtype=bfloat16',
      '--param_dtype bfloat16 and --quantize int8 both say how the base is '
      'stored; leave one out',
    ),
    ('--quantize=int4', "--quantize 'int4' must be one of none, int8"),
  ],
)
def test_refusals(argv, said, capsys):
  argv = [f'--model={GOLDEN / "qwen2"}', *argv.split()]
  with pytest.raises(SystemExit):
    flags.parse(Settings(), None, 'x', argv)
  assert said in capsys.readouterr().err
