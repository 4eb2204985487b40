"""The decoder: RMSNorm, rotary grouped-query attention, SwiGLU, in Linen.

The way of one batch through it:

1. `encode` embeds the C prompts [C, P], runs the blocks causally and keeps
   each layer's keys and values, and the hidden state at the last real token.
2. `extend` runs completion tokens [B, t], B = C*G, against that shared prefix:
   with no cache all T at once (evaluating), with a cache the next t tokens,
   written at the one column `at` (sampling).
3. `logits` and `value` read hidden states.

Parameters are float32 (or what was loaded); `dtype` is the compute dtype;
norms, softmax and logits are float32. q/k/v and gate/up are single
parameters, so that a token costs few, large products.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrl_tok.models import attention
from jaxrl_tok.sharding import constrain, constrain_rows
from jaxrl_tok.types import Policy, Prefix, Prompts


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Sizes and choices of the decoder."""

  vocab_size: int  # V
  d_model: int  # D
  num_layers: int  # L
  num_heads: int  # N
  num_kv_heads: int  # K
  head_dim: int  # H
  d_ff: int  # F
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-6
  tie_embeddings: bool = False
  qkv_bias: bool = False
  qk_norm: bool = False
  value_head: bool = False

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_heads {self.num_heads} must be a multiple of '
        f'num_kv_heads {self.num_kv_heads}'
      )
    if self.head_dim % 2:
      raise ValueError(f'head_dim {self.head_dim} must be even, for RoPE')


# Attention splits by key/value head and the feed-forward by F over `tensor`;
# the other large dimension lies over `fsdp`.
PARTITION_RULES = (
  (r'attention/qkv$', PartitionSpec('fsdp', 'tensor', None, None)),
  (r'attention/qkv_bias$', PartitionSpec('tensor', None, None)),
  (r'attention/out$', PartitionSpec('tensor', None, None, 'fsdp')),
  (r'mlp/gate_up$', PartitionSpec('fsdp', None, 'tensor')),
  (r'mlp/down$', PartitionSpec('tensor', 'fsdp')),
  (r'embed/embedding$', PartitionSpec('tensor', 'fsdp')),
  (r'head/kernel$', PartitionSpec('fsdp', 'tensor')),
)


def fan_in(*axes):
  """Normal with variance 1 / (product of the given axes)."""
  return lambda key, shape, dtype=jnp.float32: (
    jax.random.normal(key, shape, dtype)
    / jnp.sqrt(jnp.prod(jnp.array([shape[a] for a in axes], jnp.float32)))
  )


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * scale, in float32. arXiv:1910.07467."""

  eps: float

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + self.eps)
    return (x32 * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))).astype(
      x.dtype
    )


class Attention(nn.Module):
  config: TransformerConfig

  @nn.compact
  def __call__(self, x, rope, prefix, prefix_length, cache, at):
    """x [B, t, D] -> (out [B, t, D], this layer's (k, v)).

    Without `prefix` the rows are prompts and attend to themselves.
    """
    c = self.config
    K, M, H = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
    qkv = self.param('qkv', fan_in(0), (c.d_model, K, M + 2, H))
    y = jnp.einsum('btd,dkmh->bkmth', x, qkv.astype(x.dtype))
    if c.qkv_bias:
      bias = self.param('qkv_bias', nn.initializers.zeros, (K, M + 2, H))
      y = y + bias.astype(x.dtype)[None, :, :, None]
    q, k, v = y[:, :, :M], y[:, :, M], y[:, :, M + 1]
    if c.qk_norm:
      q = RMSNorm(c.norm_eps, name='q_norm')(q)
      k = RMSNorm(c.norm_eps, name='k_norm')(k)
    cos, sin = rope  # [B, 1, t, H/2]
    q = attention.rotate(q, cos[:, :, None], sin[:, :, None])
    k = attention.rotate(k, cos, sin)
    if prefix is None:
      kv = (k, v)
      mixed = attention.causal_attention(q, k, v)
    else:
      kv = (k, v)
      if cache is not None:  # write first, then attend to the updated buffer
        kv = tuple(
          jax.lax.dynamic_update_slice(old, new, (0, 0, at, 0))
          for old, new in zip(cache, (k, v))
        )
      mixed = attention.shared_prefix_attention(
        q, prefix, prefix_length, kv, at
      )
    out = self.param('out', fan_in(0, 1, 2), (K, M, H, c.d_model))
    return jnp.einsum('bkmth,kmhd->btd', mixed, out.astype(x.dtype)), kv


class SwiGLU(nn.Module):
  config: TransformerConfig

  @nn.compact
  def __call__(self, x):
    """(silu(x W_gate) * x W_up) W_down. arXiv:2002.05202."""
    D, F = self.config.d_model, self.config.d_ff
    gate_up = self.param('gate_up', fan_in(0), (D, 2, F))
    down = self.param('down', fan_in(0), (F, D))
    y = jnp.einsum('btd,dgf->btgf', x, gate_up.astype(x.dtype))
    return (nn.silu(y[:, :, 0]) * y[:, :, 1]) @ down.astype(x.dtype)


class Block(nn.Module):
  config: TransformerConfig

  @nn.compact
  def __call__(self, x, rope, prefix, prefix_length, cache, at):
    eps = self.config.norm_eps
    mixed, kv = Attention(self.config, name='attention')(
      RMSNorm(eps, name='attention_norm')(x),
      rope,
      prefix,
      prefix_length,
      cache,
      at,
    )
    x = x + mixed
    x = x + SwiGLU(self.config, name='mlp')(RMSNorm(eps, name='mlp_norm')(x))
    return constrain_rows(x), kv


class Embed(nn.Module):
  config: TransformerConfig

  @nn.compact
  def __call__(self):
    shape = (self.config.vocab_size, self.config.d_model)
    return self.param('embedding', fan_in(1), shape)


class Head(nn.Module):
  features: int
  config: TransformerConfig

  @nn.compact
  def __call__(self):
    return self.param('kernel', fan_in(0), (self.config.d_model, self.features))


class Transformer(nn.Module):
  config: TransformerConfig
  dtype: jnp.dtype
  remat: bool

  def setup(self):
    block = nn.remat(Block) if self.remat else Block
    self.embed = Embed(self.config)
    self.layers = [
      block(self.config, name=f'layer_{i}')
      for i in range(self.config.num_layers)
    ]
    self.norm = RMSNorm(self.config.norm_eps)
    if not self.config.tie_embeddings:
      self.head = Head(self.config.vocab_size, self.config)
    if self.config.value_head:
      self.value_head = Head(1, self.config)

  def _run(self, tokens, positions, prefix, caches, at):
    """Embeds tokens [R, t] at positions [R, t] and runs the blocks."""
    # rows are looked up in a table that is whole along D: split over fsdp, the
    # partitioner could bring the result to the rows' devices only by copying
    # all of it to every device
    table = constrain(self.embed().astype(self.dtype), 'tensor', None)
    x = constrain_rows(table[tokens])
    # one set of angles for all layers, broadcast over heads
    rope = attention.rope_angles(
      positions[:, None], self.config.head_dim, self.config.rope_theta
    )
    new = []
    for i, layer in enumerate(self.layers):
      x, kv = layer(
        x,
        rope,
        None if prefix is None else prefix.kv[i],
        None if prefix is None else prefix.length,
        None if caches is None else caches[i],
        at,
      )
      new.append(kv)
    return self.norm(x), tuple(new)

  def encode(self, prompts: Prompts) -> Prefix:
    C, P = prompts.tokens.shape
    positions = jnp.broadcast_to(jnp.arange(P)[None], (C, P))
    x, kv = self._run(prompts.tokens, positions, None, None, 0)
    last = (prompts.length - 1)[:, None, None]
    hidden = jnp.take_along_axis(x, last, axis=1)[:, 0]
    return Prefix(kv, hidden, prompts.length)

  def extend(self, prefix: Prefix, tokens, cache, at):
    B, t = tokens.shape
    start = jnp.repeat(prefix.length, B // prefix.length.shape[0])
    positions = start[:, None] + (at + jnp.arange(t))[None]
    x, kv = self._run(tokens, positions, prefix, cache, at)
    return x, None if cache is None else kv

  def logits(self, hidden):
    if self.config.tie_embeddings:
      kernel, form = self.embed(), '...d,vd->...v'
    else:
      kernel, form = self.head(), '...d,dv->...v'
    return jnp.einsum(
      form,
      hidden,
      kernel.astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    )

  def value(self, hidden):
    kernel = self.value_head()
    return (hidden.astype(jnp.float32) @ kernel.astype(jnp.float32))[..., 0]

  def everything(self, prompts):
    """Touches every parameter, for init."""
    hidden = self.encode(prompts).hidden
    value = self.value(hidden) if self.config.value_head else None
    return self.logits(hidden), value


def make_policy(
  config: TransformerConfig, dtype=jnp.float32, remat: bool = False
) -> Policy:
  """The decoder as a Policy: pure functions of (params, arrays).

  Args:
    config: sizes.
    dtype: compute dtype; parameters keep their own.
    remat: recompute each block in the backward pass (memory for time).
  """
  module = Transformer(config, jnp.dtype(dtype), remat)

  def method(name):
    function = getattr(Transformer, name)
    return lambda params, *args: module.apply(
      {'params': params}, *args, method=function
    )

  def init(key):
    prompts = Prompts(jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32))
    return module.init(key, prompts, method=Transformer.everything)['params']

  def init_cache(rows: int, length: int):
    shape = (rows, config.num_kv_heads, length, config.head_dim)
    return tuple(
      (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
      for _ in range(config.num_layers)
    )

  return Policy(
    init=init,
    encode=method('encode'),
    extend=method('extend'),
    logits=method('logits'),
    value=method('value') if config.value_head else None,
    init_cache=init_cache,
    partition_rules=PARTITION_RULES,
    vocab_size=config.vocab_size,
    dtype=jnp.dtype(dtype),
  )
