"""Encoder-decoder: an encoder reads the prompt, a decoder writes after it.

Steps of one batch through it:

1. `encode` runs the encoder over the C prompts [C, P], which see all of their
   tokens. Each decoder layer makes keys and values of the result, once. Then
   the decoder reads its start tokens, which are equal for all prompts and no
   actions; the hidden state after them predicts a completion's first token.
2. `extend` runs completion tokens [B, t], B = C*G, through the decoder. Each
   layer attends to the start tokens and the completion so far, causally, then
   to its prompt's keys, which the G rows of a prompt share.
3. `logits` and `value` read hidden states, in float32.

Layers of both sides are stacked, [L, ...] (stack.py). Families differ by the
values of EncoderDecoderConfig: T5 arXiv:1910.10683, BART arXiv:1910.13461,
mBART arXiv:2001.08210, Marian arXiv:1804.00344.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxrl_tok.models import quantize, stack, transformer
from jaxrl_tok.models.blocks import Norm, Table, head, lookup
from jaxrl_tok.models.encoder_decoder_blocks import DecoderBlock, EncoderBlock
from jaxrl_tok.models.encoder_decoder_config import (
  Buckets,
  EncoderDecoderConfig,
  StackConfig,
)
from jaxrl_tok.models.relative_positions import score_bias
from jaxrl_tok.sharding import constrain_rows
from jaxrl_tok.types import Policy, Prefix, Prompts

FLOAT32 = transformer.FLOAT32 + r'|(position|logit)_bias/'

BLOCK_RULES = quantize.partition_rules(
  (
    (r'cross_attention/q$', PartitionSpec('fsdp', 'tensor', None)),
    (r'cross_attention/q_bias$', PartitionSpec('tensor', None)),
    (r'cross_attention/kv$', PartitionSpec('fsdp', 'tensor', None, None)),
    (r'cross_attention/kv_bias$', PartitionSpec('tensor', None, None)),
    (r'cross_attention/out$', PartitionSpec('tensor', None, None, 'fsdp')),
  )
)
PARTITION_RULES = (
  *stack.partition_rules(BLOCK_RULES),
  (r'position_bias/embedding$', PartitionSpec(None, 'tensor')),
  *transformer.PARTITION_RULES,
)


class Outer(nn.Module):
  """Parameters of a side, or of both, outside of the layers, for init."""

  config: EncoderDecoderConfig
  side: str | None  # encoder or decoder

  @nn.compact
  def __call__(self):
    c = self.config
    zeros = nn.initializers.zeros
    if self.side is None:
      Table(c.vocab_size, c, name='embed')()
      if not c.tie_embeddings:
        Table(c.vocab_size, c, name='head')()
      if c.value_head:  # V begins at 0
        Table(1, c, zeros, name='value_head')()
      return
    own = getattr(c, self.side)
    for name, there in (
      ('embed_norm', c.embedding_norm),
      ('norm', c.final_norm),
    ):
      if there:
        Norm(own, name=name)(jnp.zeros((1, c.d_model)))
    if c.positions == 'learned':
      rows = c.position_offset + c.num_positions
      Table(rows, c, name='positions')()


class Network(NamedTuple):
  """Choices that the functions below are compiled with."""

  config: EncoderDecoderConfig
  dtype: jnp.dtype  # compute dtype
  remat: str
  scan: bool  # of stacked layers, for many tokens at once


def _init_side(c: EncoderDecoderConfig, side: str, key):
  own, keys = getattr(c, side), jax.random.split(key, 3)
  x, length = jnp.zeros((1, 1, c.d_model)), jnp.ones((1,), jnp.int32)
  if side == 'encoder':
    block, args = EncoderBlock(own), (x, length, None)
  else:
    block, args = DecoderBlock(own), (x, x, None, length, None, 0, None)
  begin = jax.vmap(lambda key: block.init(key, *args)['params'])
  found = {'layers': begin(jax.random.split(keys[0], own.num_layers))}
  found |= Outer(c, side).init(keys[1]).get('params', {})
  if isinstance(c.positions, Buckets):
    shape = c.positions.count, own.num_heads
    bias = c.d_model**-0.5 * jax.random.normal(keys[2], shape)
    found['position_bias'] = {'embedding': bias}
  return found


def init(net: Network, key):
  """Initializes all parameters, those of the layers stacked."""
  c, keys = net.config, jax.random.split(key, 3)
  found = Outer(c, None).init(keys[0])['params'] | {
    side: _init_side(c, side, keys[i])
    for i, side in enumerate(('encoder', 'decoder'), 1)
  }
  if c.logit_bias:
    found['logit_bias'] = {'bias': jnp.zeros(c.vocab_size)}
  return found


@functools.lru_cache(maxsize=8)
def sinusoids(length: int, d_model: int) -> np.ndarray:
  """Table float32 [length, D]: sines of all frequencies, then cosines.

  position / 10000^(2i / D) for i = 0 .. D/2 - 1. arXiv:1706.03762.
  """
  half = -(-d_model // 2)
  rates = 10000.0 ** (-2 * np.arange(half) / d_model)
  angles = np.arange(length)[:, None] * rates[None]
  table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  return table[:, :d_model].astype(np.float32)


def _embedded(net: Network, params, side: str, tokens, positions, limit: int):
  """Embeds tokens [R, t] at positions [t] < limit of a side."""
  c, own = net.config, params[side]
  x = constrain_rows(lookup(params['embed'], tokens, net.dtype))
  if c.embedding_scale != 1:
    x = x * jnp.asarray(c.embedding_scale, x.dtype)
  if c.positions == 'learned':
    rows = own['positions']['embedding'][c.position_offset + positions]
    x = x + rows.astype(x.dtype)[None]
  elif c.positions == 'sinusoidal':
    table = jnp.asarray(sinusoids(limit, c.d_model), x.dtype)
    x = x + table[positions][None]
  if c.embedding_norm:
    norm = Norm(getattr(c, side))
    x = norm.apply({'params': own['embed_norm']}, x)
  return x


def _bias(net: Network, params, side: str, query, key):
  """Biases of the scores of positions [t] to positions [S]; None: none."""
  c = net.config
  if not isinstance(c.positions, Buckets):
    return None
  table = params[side]['position_bias']['embedding']
  return score_bias(table, c.positions, query, key, side == 'encoder')


def _run(net: Network, params, side: str, step, x, given=None, caches=None):
  """Runs the layers of a side, and its last norm."""
  own = getattr(net.config, side)
  layers = (own,) * own.num_layers
  x, out = stack.run_layers(
    step,
    layers,
    params[side]['layers'],
    x,
    given,
    caches,
    net.scan,
    net.remat,
  )
  if net.config.final_norm:
    x = Norm(own).apply({'params': params[side]['norm']}, x)
  return x, out


@functools.partial(jax.jit, static_argnums=0)
def _encoder_block(c: StackConfig, weights, x, length, bias):
  """Runs one layer; jit makes one function of equal ones in a loop."""
  return EncoderBlock(c).apply({'params': weights}, x, length, bias)


@functools.partial(jax.jit, static_argnums=0)
def _decoder_block(c: StackConfig, weights, *args):
  """Runs one layer, as `_encoder_block`."""
  return DecoderBlock(c).apply({'params': weights}, *args)


def encode(net: Network, params, prompts: Prompts) -> Prefix:
  """Reads prompts and, after them, the start tokens."""
  (C, P), length = prompts.tokens.shape, prompts.length
  places = jnp.arange(P)
  bias = _bias(net, params, 'encoder', places, places)

  def read(kind, weights, x, given, cache):
    return _encoder_block(kind, weights, x, length, bias), None

  x = _embedded(net, params, 'encoder', prompts.tokens, places, P)
  memory, _ = _run(net, params, 'encoder', read, x)
  start = jnp.asarray(net.config.start_tokens, jnp.int32)
  n = len(start)
  places = jnp.arange(n)
  start_bias = _bias(net, params, 'decoder', places, places)

  def begin(kind, weights, x, given, cache):
    return _decoder_block(
      kind, weights, x, memory, None, length, None, 0, start_bias
    )

  tokens = jnp.broadcast_to(start[None], (C, n))
  x = _embedded(net, params, 'decoder', tokens, places, n)
  x, kv = _run(net, params, 'decoder', begin, x)
  return Prefix(kv, x[:, -1], length)


def extend(net: Network, params, prefix: Prefix, tokens, cache, at):
  """Reads completion tokens [B, t] after the start tokens."""
  n, t = len(net.config.start_tokens), tokens.shape[1]
  S = t if cache is None else cache[0][1].shape[2]
  query, places = n + at + jnp.arange(t), jnp.arange(n + S)
  bias = _bias(net, params, 'decoder', query, places)
  bias = (None, None) if bias is None else (bias[..., :n], bias[..., n:])

  def step(kind, weights, x, own, old):
    return _decoder_block(
      kind, weights, x, None, own, prefix.length, old, at, bias
    )

  x = _embedded(net, params, 'decoder', tokens, query, n + S)
  x, kv = _run(net, params, 'decoder', step, x, prefix.kv, cache)
  return x, None if cache is None else kv


def logits(net: Network, params, hidden):
  """Logits float32 [..., V] of hidden states [..., D]."""
  c = net.config
  found = head(params['embed' if c.tie_embeddings else 'head'], hidden)
  if c.logit_scale != 1:
    found = found * c.logit_scale
  if c.logit_bias:
    bias = params['logit_bias']['bias'].astype(jnp.float32)
    bias = jnp.expand_dims(bias, range(hidden.ndim - 1))
    found = found + jax.lax.stop_gradient(bias)
  return found


def cast_params(net: Network, params):
  """Casts parameters, once a rollout, and splits their stacks."""
  cast = transformer.cast_leaves(params, net.dtype, FLOAT32)
  for side in ('encoder', 'decoder'):
    own = getattr(net.config, side)
    layers = stack.split(cast[side]['layers'], (own,) * own.num_layers)
    cast[side] = cast[side] | {'layers': layers}
  return cast


def init_cache(net: Network, rows: int, length: int):
  """Keys and values of each decoder layer, zeros."""
  c = net.config.decoder

  def zeros(*shape):
    return jnp.zeros((rows, c.num_heads, *shape), net.dtype)

  return tuple(
    (zeros(c.head_dim, length), zeros(length, c.head_dim))
    for _ in range(c.num_layers)
  )


def make_policy(
  config: EncoderDecoderConfig,
  dtype=jnp.float32,
  remat: str = 'none',
  attention: str = 'auto',
  scan_layers: bool | None = None,
) -> Policy:
  """Makes a Policy of an encoder-decoder: pure functions of (params, arrays).

  Args:
    config: sizes.
    dtype: compute dtype; parameters keep their own.
    remat, scan_layers: as transformer.make_policy's.
    attention: xla or auto, which is xla.

  Raises ValueError for another kernel.
  """
  if attention not in ('auto', 'xla'):
    raise ValueError(
      f'--attention {attention} is not for encoder-decoders; pass xla'
    )
  most = max(config.encoder.num_layers, config.decoder.num_layers)
  scan = stack.should_scan(scan_layers, most)
  return transformer.as_policy(
    Network(config, jnp.dtype(dtype), remat, scan),
    PARTITION_RULES,
    init=init,
    encode=encode,
    extend=extend,
    logits=logits,
    init_cache=init_cache,
    cast_params=cast_params,
  )
