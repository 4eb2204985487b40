"""Layers of an encoder-decoder, in Linen: attention to itself, attention to the
prompt, and feed-forward, each added to the residual x."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl_tok.models import attention
from jaxrl_tok.models.blocks import FeedForward, Norm, fan_in, project
from jaxrl_tok.models.encoder_decoder_config import StackConfig
from jaxrl_tok.sharding import constrain_rows


class LayerPrefix(NamedTuple):
  """Keys [C, N, H, n] and values [C, N, n, H] of one decoder layer."""

  start: tuple  # of the start tokens
  prompt: tuple  # of the prompt, across


def queries_begin(c: StackConfig):
  """Initializer of queries: scores that nothing scales begin as scaled ones."""
  factor = 1.0 if c.attention_scale is None else c.head_dim**-0.5
  return lambda key, shape: factor * fan_in(0)(key, shape)


def heads(module: nn.Module, name: str, x, matrix):
  """x [R, t, D] times a matrix [D, N, *parts, H], and its bias."""
  y = project(module, name, x, matrix)
  if module.config.bias:
    zeros = nn.initializers.zeros
    bias = module.param(f'{name}_bias', zeros, matrix.shape[1:])
    y = y + bias.astype(x.dtype)[None, None]
  return y


def output(module: nn.Module, mixed, x):
  """Joins heads [R, N, 1, t, H] to the residual's width."""
  c = module.config
  shape = (c.num_heads, 1, c.head_dim, c.d_model)
  out = module.param('out', fan_in(0, 1, 2), shape)
  # one axis to sum over: with three, XLA transposes the matrix each step
  mixed = jnp.moveaxis(mixed, 3, 1).reshape(*x.shape[:2], -1)
  y = project(module, 'out', mixed, out.reshape(-1, c.d_model))
  if c.bias:
    bias = module.param('out_bias', nn.initializers.zeros, (c.d_model,))
    y = y + bias.astype(x.dtype)[None, None]
  return y


def scale_of(c: StackConfig) -> float:
  """Factor of attention's scores."""
  return c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale


class SelfAttention(nn.Module):
  """Attention of a side to its own tokens."""

  config: StackConfig

  @nn.compact
  def __call__(self, x, attend):
    """Args:
      x: [R, t, D].
      attend: (q [R, N, 1, t, H], (k [R, N, H, t], v [R, N, t, H])) ->
        (mixed, keys and values to keep).

    Returns: (out [R, t, D], what attend keeps).
    """
    c = self.config
    D, N, H = c.d_model, c.num_heads, c.head_dim

    def begin(key, shape):
      matrix = fan_in(0)(key, shape)
      return matrix.at[:, :, 0].set(queries_begin(c)(key, (D, N, H)))

    qkv = self.param('qkv', begin, (D, N, 3, H))
    y = heads(self, 'qkv', x, qkv)
    y = jnp.moveaxis(y, 1, 3)  # [R, N, 3, t, H]
    kv = y[:, :, 1].swapaxes(2, 3), y[:, :, 2]
    mixed, kept = attend(y[:, :, :1], kv)
    return output(self, mixed, x), kept


class CrossAttention(nn.Module):
  """Attention of the decoder to its prompt."""

  config: StackConfig

  @nn.compact
  def __call__(self, x, memory, kv, length):
    """Args:
      x: [B, t, D].
      memory: the encoder's [C, P, D], of which keys and values are made; None
        where kv is given.
      kv: as made before.
      length: int32 [C].

    Returns: (out [B, t, D], kv).
    """
    c = self.config
    D, N, H = c.d_model, c.num_heads, c.head_dim
    if kv is None:
      matrix = self.param('kv', fan_in(0), (D, N, 2, H))
      y = jnp.moveaxis(heads(self, 'kv', memory, matrix), 1, 3)
      kv = y[:, :, 0].swapaxes(2, 3), y[:, :, 1]
    q = heads(self, 'q', x, self.param('q', queries_begin(c), (D, N, H)))
    q = jnp.moveaxis(q, 1, 2)[:, :, None]
    mixed = attention.prompt_attention(q, kv, length, scale_of(c))
    return output(self, mixed, x), kv


def residual(c: StackConfig, name: str, x, function):
  """Adds function(x) -> (y, kept) to x, a norm before it or after the sum."""
  norm = Norm(c, name=f'{name}_norm')
  y, kept = function(norm(x) if c.pre_norm else x)
  x = x + y
  return constrain_rows(x if c.pre_norm else norm(x)), kept


class EncoderBlock(nn.Module):
  """Self-attention in both directions, and feed-forward."""

  config: StackConfig

  @nn.compact
  def __call__(self, x, length, bias):
    c = self.config

    def attend(q, kv):
      mixed = attention.prompt_attention(q, kv, length, scale_of(c), bias)
      return mixed, None

    own, mlp = SelfAttention(c, name='attention'), FeedForward(c, name='mlp')
    x, _ = residual(c, 'attention', x, lambda y: own(y, attend))
    return residual(c, 'mlp', x, lambda y: (mlp(y), None))[0]


class DecoderBlock(nn.Module):
  """Causal self-attention, attention to the prompt, and feed-forward."""

  config: StackConfig

  @nn.compact
  def __call__(self, x, memory, prefix, length, cache, at, bias):
    """Reads start tokens (memory is given) or completions (prefix is).

    Returns: (x, LayerPrefix), or (x, this layer's cache).
    """
    c = self.config
    scale = scale_of(c)

    def attend(q, kv):
      if prefix is None:
        return attention.causal_attention(q, *kv, scale, bias=bias), kv
      if cache is not None:  # write first, then attend to the updated buffer
        kv = tuple(
          jax.lax.dynamic_update_slice_in_dim(old, new, at, axis)
          for old, new, axis in zip(cache, kv, (3, 2))
        )
      n = jnp.full(length.shape, prefix.start[1].shape[2])
      mixed = attention.shared_prefix_attention(
        q, prefix.start, n, kv, at, scale, bias=bias
      )
      return mixed, kv

    own = SelfAttention(c, name='attention')
    across = CrossAttention(c, name='cross_attention')
    mlp = FeedForward(c, name='mlp')
    made = None if prefix is None else prefix.prompt
    x, kv = residual(c, 'attention', x, lambda y: own(y, attend))
    x, made = residual(
      c, 'cross_attention', x, lambda y: across(y, memory, made, length)
    )
    x, _ = residual(c, 'mlp', x, lambda y: (mlp(y), None))
    return x, LayerPrefix(kv, made) if prefix is None else kv
