"""Kernels compute the attention that XLA does; which one, and where."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, changed, random_prompts

from jaxrl_tok import sharding
from jaxrl_tok.models import attention, kernels
from jaxrl_tok.models.rope import make_rope
from jaxrl_tok.models.transformer import Layer, make_policy

H, SCALE = 8, 0.4
xla = attention.causal_attention
interpreted = functools.partial(kernels.splash, interpret=True)


def draw(*shapes):
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return tuple(map(jax.random.normal, keys, shapes))


def prompts_case(C=2, K=1, M=2, P=100):
  """Arrays (q, k, v) of prompts that attend to themselves."""
  return draw((C, K, M, P, H), (C, K, H, P), (C, K, P, H))


def rows_case(length, G=2, K=2, M=2, P=7, T=5):
  """Arrays (q, prefix, length, suffix) of G completions a ragged prompt."""
  C = len(length)
  B = C * G
  q, kp, vp, ks, vs = draw(
    (B, K, M, T, H),
    (C, K, H, P),
    (C, K, P, H),
    (B, K, H, T),
    (B, K, T, H),
  )
  return q, (kp, vp), jnp.array(length, jnp.int32), (ks, vs)


def shared(q, prefix, length, suffix, *how):
  return attention.shared_prefix_attention(q, prefix, length, suffix, 0, *how)


def by_row(attend):
  return functools.partial(kernels.by_row, attend)


def assert_same(one, other, args, *how, atol):
  """Compares values, and gradients with respect to all floats."""
  weigh = draw(args[0].shape)[0]
  of = tuple(i for i, x in enumerate(args) if i != 2 or len(args) == 3)

  def look(function):
    def total(*args):
      out = function(*args, SCALE, *how)
      return (out * weigh).sum(), out

    return jax.jit(jax.grad(total, of, has_aux=True))(*args)

  for a, b in zip(*map(jax.tree.leaves, (look(one), look(other)))):
    np.testing.assert_allclose(a, b, atol=atol)


# --- the same attention


@pytest.mark.parametrize('how', [(), (2.0, 3)])
def test_whole_rows_are_the_shared_prefix(how):
  args = rows_case([1, 4, 7])
  assert_same(by_row(xla), shared, args, *how, atol=1e-5)


def test_splash_is_xlas_attention():
  args = rows_case([1, 60], G=1, K=1, P=60, T=50)
  assert_same(by_row(interpreted), shared, args, 2.0, 20, atol=2e-4)


def test_splash_is_of_each_devices_rows_and_heads():
  mesh = sharding.make_mesh('data=2,tensor=2', jax.devices()[:4])
  with jax.set_mesh(mesh):
    assert_same(interpreted, xla, prompts_case(K=2), atol=2e-4)


def test_a_device_has_all_of_what_the_mesh_does_not_divide():
  seen = []

  def double(x):
    seen.append(x.shape)
    return 2 * x

  mesh = sharding.make_mesh('data=2,tensor=2', jax.devices()[:4])
  for shape in ((4, 2), (4, 1), (3, 2)):
    x = jnp.ones(shape)
    with jax.set_mesh(mesh):
      there = jax.jit(sharding.on_each_device, static_argnums=(0, 1))
      assert (there(double, (sharding.ROWS, 'tensor'), x) == 2).all()
  assert seen == [(2, 1), (2, 1), (3, 1)]


@pytest.mark.parametrize('window', [3, 99])
def test_cudnn_is_asked_for_xlas_attention(monkeypatch, window):
  """Layout, mask and scale, with jax's other implementation of them."""
  ask, asked = jax.nn.dot_product_attention, []

  def answer(*args, implementation, **how):
    asked.append((implementation, how['is_causal']))
    return ask(*args, implementation='xla', **how)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', answer)
  args = rows_case([1, 4, 7])
  assert_same(by_row(kernels.cudnn), shared, args, None, window, atol=1e-5)
  assert set(asked) == {('cudnn', True)}


# --- the programs


@pytest.fixture
def anywhere(monkeypatch):
  """Pretends that this machine has every kernel, and jax found cuDNN."""
  from jax._src.cudnn import fused_attention_stablehlo as fused

  monkeypatch.setattr(kernels, 'available', lambda kernel: True)
  monkeypatch.setattr(fused, 'check_cudnn_version', lambda: 91_000)


def programs(name, platform, P=128, T=128):
  """Text of the programs that train on completions and that decode one
  token."""
  rope = make_rope({'rope_theta': 10_000.0}, H)
  layers = Layer(rope), Layer(rope, window=50)
  config = changed(CONFIG, head_dim=H, layers=layers)
  policy = make_policy(config, jnp.bfloat16, attention=name)
  params = jax.eval_shape(policy.init, jax.random.key(0))
  prompts = random_prompts(2, P)
  tokens = jax.ShapeDtypeStruct((4, T), jnp.int32)

  def loss(params, tokens):
    prefix = policy.encode(params, prompts)
    hidden, _ = policy.extend(params, prefix, tokens, None, 0)
    return hidden.astype(jnp.float32).sum()

  def decode(params, prefix, token, cache):
    return policy.extend(params, prefix, token, cache, T - 1)

  def text(function, *args):
    traced = jax.jit(function).trace(*args)
    return traced.lower(lowering_platforms=(platform,)).as_text()

  prefix = jax.eval_shape(policy.encode, params, prompts)
  cache = jax.eval_shape(lambda: policy.init_cache(4, T))
  token = jax.ShapeDtypeStruct((4, 1), jnp.int32)
  return (
    text(jax.grad(loss), params, tokens),
    text(decode, params, prefix, token, cache),
  )


@pytest.mark.parametrize(
  ('name', 'platform', 'calls'),
  [
    ('cudnn', 'cuda', ['__cudnn$fmhaSoftmax(', '__cudnn$fmhaSoftmaxBackward(']),
    ('splash', 'tpu', ['splash_mha_fwd', 'splash_mha_dq', 'splash_mha_dkv']),
  ],
)
def test_kernels_train_and_xla_decodes(anywhere, name, platform, calls):
  mark = {'cudnn': '__cudnn', 'splash': 'tpu_custom_call'}[name]
  update, decode = programs(name, platform)
  assert mark not in decode
  for call in calls:
    assert call in update


# --- the choice


def device(kind, capability=None):
  return types.SimpleNamespace(device_kind=kind, compute_capability=capability)


@pytest.mark.parametrize(
  ('backend', 'where', 'chosen'),
  [
    ('cpu', device('cpu'), 'xla'),
    ('tpu', device('TPU v5 lite'), 'splash'),
    ('tpu', device('TPU v3'), 'xla'),
    ('gpu', device('NVIDIA H100', '9.0'), 'cudnn'),
    ('gpu', device('Tesla T4', '7.5'), 'xla'),
  ],
)
def test_auto_is_what_the_backend_has(monkeypatch, backend, where, chosen):
  from jax._src.cudnn import fused_attention_stablehlo as fused

  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(jax, 'local_devices', lambda: [where])
  if backend == 'gpu':
    assert kernels.choose('auto') == 'xla', 'jax finds no cuDNN'
    monkeypatch.setattr(fused, 'check_cudnn_version', lambda: 91_000)
  assert kernels.choose('auto') == chosen


def test_what_a_kernel_does_not_take_is_xlas():
  def fits(name, H=64, dtype=jnp.bfloat16, cap=None, T=128, P=0):
    q = jax.ShapeDtypeStruct((1, 1, 1, T, H), dtype)
    return kernels.fitting(name, q, cap, P)

  assert fits('cudnn') is kernels.cudnn
  assert fits('splash') is kernels.splash
  assert fits('xla') is None
  assert fits('cudnn', cap=50.0) is None
  assert fits('splash', cap=50.0) is kernels.splash
  assert fits('cudnn', dtype=jnp.float32) is None
  assert fits('splash', dtype=jnp.float16) is None
  assert fits('cudnn', H=60) is fits('cudnn', H=256) is None
  for name in kernels.NEEDS:
    assert fits(name, T=127) is None
    assert fits(name, T=32, P=96) is getattr(kernels, name)
    assert fits(name, T=32, P=97) is fits(name, T=1, P=1000) is None


@pytest.mark.parametrize('length', [1, 128, 129, 512, 513, 900, 1024])
def test_blocks_divide_what_they_cover(length):
  padded, block = kernels.blocks(length)
  assert length <= padded < length + 256
  assert padded % block == block % 128 == 0


@pytest.mark.parametrize(
  ('name', 'said'),
  [
    ('cudnn', 'needs a GPU, Ampere or newer, with cuDNN, and jax here runs on'),
    ('splash', 'needs a TPU, and jax here runs on cpu; pass --attention auto'),
  ],
)
def test_a_kernel_that_is_not_here_is_one_line(capsys, name, said):
  from experiments import arithmetic

  with pytest.raises(ValueError, match=f'^--attention {name} needs'):
    make_policy(CONFIG, attention=name)
  with pytest.raises(SystemExit) as stopped:
    arithmetic.run(['--attention', name])
  line = capsys.readouterr().err.strip()
  assert stopped.value.code == 2
  assert '\n' not in line
  assert said in line
