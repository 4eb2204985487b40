"""Blocks of a transformer, in Linen: attention and feed-forward on a residual.

Families differ by the values of TransformerConfig, never by code of their
own. Parameters are float32 (or as they were loaded) and are cast to the
compute dtype, x's, where they are used; norms, softmax and adapters are
float32. q/k/v and gate/up are single parameters, so that a token costs few,
large products.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl_tok import sharding
from jaxrl_tok.models import attention, experts, kernels, quantize, rope
from jaxrl_tok.sharding import constrain, constrain_rows

ACTIVATIONS = {
  'relu': nn.relu,
  'silu': nn.silu,
  'gelu': functools.partial(nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class Layer:
  """Choices of one block, which may differ from those of the next."""

  rope: rope.Rope | None  # None: it does not see positions
  window: int | None = None  # keys seen, the query's own included; None: all
  routed: bool = False  # experts in place of the one feed-forward


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Sizes and choices of a transformer."""

  vocab_size: int  # V
  d_model: int  # D
  num_heads: int  # N
  num_kv_heads: int  # K
  head_dim: int  # H
  d_ff: int  # F
  layers: tuple  # of Layer, L of them
  max_length: int = 32_768  # prompt and completion together
  learned_positions: bool = False  # max_length of them, added to embeddings
  embedding_scale: float = 1.0
  norm: str = 'rms'  # rms, rms_plus_one (x * (1 + scale)) or layer
  norm_eps: float = 1e-6
  pre_norm: bool = True  # before attention and before the feed-forward
  post_norm: bool = False  # after each of them
  parallel: bool = False  # both read x, not one after the other
  qk_norm: str | None = None  # 'head': of each head; 'all': of all together
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  activation: str = 'silu'  # a name in ACTIVATIONS
  gated: bool = True  # activation(x gate) * x up; False: activation(x up)
  attention_scale: float | None = None  # None: 1 / sqrt(H)
  attention_cap: float | None = None
  logit_cap: float | None = None
  num_experts: int = 0  # of each routed layer
  experts_per_token: int = 0
  expert_d_ff: int = 0
  normalize_experts: bool = True  # the chosen ones' weights sum to 1
  tie_embeddings: bool = False
  lm_head: bool = True  # False: a classifier, which has no logits
  value_head: bool = False

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_heads {self.num_heads} must be a multiple of '
        f'num_kv_heads {self.num_kv_heads}'
      )
    turned = any(layer.rope for layer in self.layers)
    if turned and self.head_dim % 2:
      raise ValueError(f'head_dim {self.head_dim} must be even, for RoPE')

  @property
  def num_layers(self) -> int:
    return len(self.layers)


def fan_in(*axes):
  """Normal with variance 1 / (product of the given axes)."""
  return lambda key, shape, dtype=jnp.float32: (
    jax.random.normal(key, shape, dtype)
    / jnp.sqrt(jnp.prod(jnp.array([shape[a] for a in axes], jnp.float32)))
  )


class Norm(nn.Module):
  """Normalizes over `axes`, in float32.

  rms           x / sqrt(mean(x^2) + eps) * scale         arXiv:1910.07467
  rms_plus_one  x / sqrt(mean(x^2) + eps) * (1 + scale)   Gemma
  layer         (x - mean(x)) / sqrt(var(x) + eps) * scale + bias
  """

  config: TransformerConfig
  axes: tuple = (-1,)

  @nn.compact
  def __call__(self, x):
    kind, eps = self.config.norm, self.config.norm_eps
    axes = tuple(a % x.ndim for a in self.axes)
    shape = tuple(x.shape[a] for a in axes)
    others = tuple(a for a in range(x.ndim) if a not in axes)
    zero, one = nn.initializers.zeros, nn.initializers.ones

    def parameter(name, init):
      return jnp.expand_dims(self.param(name, init, shape), others)

    y = x.astype(jnp.float32)
    if kind == 'layer':
      y = y - jnp.mean(y, axes, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y**2, axes, keepdims=True) + eps)
    if kind == 'rms_plus_one':
      y = y * (1 + parameter('scale', zero))
    else:
      y = y * parameter('scale', one)
    if kind == 'layer':
      y = y + parameter('bias', zero)
    return y.astype(x.dtype)


def product(x, w, dtype=None):
  """Products of x [..., D] with a matrix [D, *outputs]: [..., *outputs].

  On a CPU the outputs are one axis: over several, XLA transposes the matrix for
  the gradient each time. Over devices, merging axes could gather the matrix.
  """
  shape = w.shape[1:]
  if sharding.on_whole_cpu():
    w = w.reshape(len(w), -1)
  y = jnp.tensordot(x, w, 1, preferred_element_type=dtype)
  return y.reshape(*x.shape[:-1], *shape)


def project(module: nn.Module, name: str, x, w):
  """x times a matrix, int8 or not, plus (x A) B where it has an adapter.

  The adapter's products and the sum are in float32: a change below the last
  bit of the compute dtype is rounded together with what it is added to.
  """
  lora = module.get_variable('params', f'{name}_lora')
  scale = module.get_variable('params', name + quantize.SUFFIX)
  if scale is not None:
    y = quantize.product(x, w, scale)
  elif lora is None:
    return product(x, w.astype(x.dtype))
  else:
    y = product(x, w.astype(x.dtype), jnp.float32)
  if lora is not None:
    low_BxtxR = x.astype(jnp.float32) @ lora['a']
    y = y + product(low_BxtxR, lora['b'])
  return y.astype(x.dtype)


class Attention(nn.Module):
  """Attention of one block, to the prompt and to the completion so far."""

  config: TransformerConfig
  layer: Layer
  kernel: str  # from kernels.choose

  @nn.compact
  def __call__(self, x, angles, prefix, prefix_length, cache, at):
    """x [B, t, D] -> (out [B, t, D], this layer's (k, v)); without `prefix` the
    rows are prompts and attend to themselves."""
    c = self.config
    K, M, H = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
    qkv = self.param('qkv', fan_in(0), (c.d_model, K, M + 2, H))
    # the product's own order, then transposed: asked for bkmth, XLA transposes
    # the matrix instead, at every token
    y = project(self, 'qkv', x, qkv)
    if c.qkv_bias:
      bias = self.param('qkv_bias', nn.initializers.zeros, (K, M + 2, H))
      y = y + bias.astype(x.dtype)[None, None]
    y = jnp.moveaxis(y, 1, 3)  # [B, K, M + 2, t, H]
    q, k, v = y[:, :, :M], y[:, :, M], y[:, :, M + 1]
    if c.qk_norm:  # axes of heads and H, or of H alone
      over = ((1, 2, 4), (1, 3)) if c.qk_norm == 'all' else ((-1,), (-1,))
      q = Norm(c, over[0], name='q_norm')(q)
      k = Norm(c, over[1], name='k_norm')(k)
    if angles is not None:
      cos, sin = angles  # [B, 1, t, R/2]
      q = rope.rotate(q, cos[:, :, None], sin[:, :, None])
      k = rope.rotate(k, cos, sin)
    scale = H**-0.5 if c.attention_scale is None else c.attention_scale
    how = {'cap': c.attention_cap, 'window': self.layer.window}
    kv, attend = (k.swapaxes(2, 3), v), None
    if cache is None:  # with one it is few tokens, and the prompt's keys count
      P = 0 if prefix is None else prefix[1].shape[2]
      attend = kernels.fitting(self.kernel, q, c.attention_cap, P)
    if prefix is None:
      attend = attend or attention.causal_attention
      mixed = attend(q, *kv, scale, **how)
    elif attend:
      mixed = kernels.by_row(attend, q, prefix, prefix_length, kv, scale, **how)
    else:
      if cache is not None:  # write first, then attend to the updated buffer
        kv = tuple(
          jax.lax.dynamic_update_slice_in_dim(old, new, at, axis)
          for old, new, axis in zip(cache, kv, (3, 2))
        )
      mixed = attention.shared_prefix_attention(
        q, prefix, prefix_length, kv, at, scale, **how
      )
    out = self.param('out', fan_in(0, 1, 2), (K, M, H, c.d_model))
    # one axis to sum over: with three, XLA transposes the matrix each step
    mixed = jnp.moveaxis(mixed, 3, 1).reshape(*x.shape[:2], -1)
    out = out.reshape(-1, c.d_model)
    x = project(self, 'out', mixed, out)
    return with_bias(self, 'out_bias', x) if c.out_bias else x, kv


def with_bias(module: nn.Module, name: str, x):
  """Adds a bias over the last axis of x."""
  bias = module.param(name, nn.initializers.zeros, x.shape[-1:])
  return x + jnp.expand_dims(bias.astype(x.dtype), range(x.ndim - 1))


class FeedForward(nn.Module):
  """Computes (activation(x W_gate) * x W_up) W_down, arXiv:2002.05202, or
  without the gate activation(x W_up) W_down."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x):
    c = self.config
    D, F, activation = c.d_model, c.d_ff, ACTIVATIONS[c.activation]
    if c.gated:
      gate_up = self.param('gate_up', fan_in(0), (D, 2, F))
      y = project(self, 'gate_up', x, gate_up)
      if c.mlp_bias:
        bias = self.param('gate_up_bias', nn.initializers.zeros, (2, F))
        y = y + bias.astype(x.dtype)[None, None]
      y = activation(y[:, :, 0]) * y[:, :, 1]
    else:
      up = self.param('up', fan_in(0), (D, F))
      y = project(self, 'up', x, up)
      y = activation(with_bias(self, 'up_bias', y) if c.mlp_bias else y)
    down = self.param('down', fan_in(0), (F, D))
    x = project(self, 'down', y, down)
    return with_bias(self, 'down_bias', x) if c.mlp_bias else x


class Block(nn.Module):
  """Attention and feed-forward, each added to the residual x."""

  config: TransformerConfig
  layer: Layer
  kernel: str

  @nn.compact
  def __call__(self, x, angles, prefix, prefix_length, cache, at):
    c = self.config

    def before(name, y):
      return Norm(c, name=f'{name}_norm')(y) if c.pre_norm else y

    def after(name, y):
      return Norm(c, name=f'{name}_post_norm')(y) if c.post_norm else y

    mixed, kv = Attention(c, self.layer, self.kernel, name='attention')(
      before('attention', x), angles, prefix, prefix_length, cache, at
    )
    mixed = after('attention', mixed)
    y = before('mlp', x if c.parallel else x + mixed)
    if self.layer.routed:
      y = experts.Experts(
        c.num_experts,
        c.experts_per_token,
        c.expert_d_ff,
        c.normalize_experts,
        ACTIVATIONS[c.activation],
        fan_in,
        name='experts',
      )(y)
    else:
      y = FeedForward(c, name='mlp')(y)
    return constrain_rows(x + mixed + after('mlp', y)), kv


class Table(nn.Module):
  """Matrix with a row for each id."""

  rows: int
  config: TransformerConfig
  begin: Callable = fan_in(1)

  @nn.compact
  def __call__(self):
    return self.param('embedding', self.begin, (self.rows, self.config.d_model))


def lookup(table: dict, ids, dtype):
  """Rows [..., D] of a Table, int8 or not, for ids.

  They are looked up in a table that is whole along D: split over fsdp, the
  partitioner could bring the result to the rows' devices only by copying all
  of it to every device.
  """
  x, scale = table['embedding'], table.get('embedding' + quantize.SUFFIX)
  if scale is None:
    return constrain(x.astype(dtype), 'tensor', None)[ids]
  x = constrain(x, 'tensor', None)
  return quantize.lookup(x, scale, ids).astype(dtype)


def head(table: dict, hidden):
  """Products of hidden states [..., D] with each row of a Table, int8 or not:
  float32 [..., V]."""
  x, scale = table['embedding'], table.get('embedding' + quantize.SUFFIX)
  if scale is not None:
    return quantize.product(hidden, x, scale, table=True)
  return jnp.einsum(
    '...d,vd->...v',
    hidden,
    x.astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  )
