"""Transformer decoder: embeddings, blocks (blocks.py) and heads.

Steps of one batch through it:

1. `encode` embeds the C prompts [C, P], runs the blocks causally and keeps
   each layer's keys and values, and the hidden state at the last real token.
2. `extend` runs completion tokens [B, t], B = C*G, against that shared prefix:
   with no cache all T at once (evaluating), with a cache the next t tokens,
   written at the one column `at` (sampling).
3. `append` joins the tokens of a cache to the prefix, for the next turn.
4. `logits` and `value` read hidden states, in float32.

Parameters of the L blocks are stacked, [L, ...] (stack.py).
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrl_tok.models import attention, experts, kernels, quantize, rope, stack
from jaxrl_tok.models.blocks import (
  Block,
  Layer,
  Norm,
  Table,
  TransformerConfig,
  head,
  lookup,
)
from jaxrl_tok.sharding import (
  constrain_rows,
  gather_own,
  lookup_own,
  on_own_rows,
  path_name,
  rows_are_own,
  split_axes,
)
from jaxrl_tok.types import Policy, Prefix, Prompts

# leaves that the modules use in float32; all others in the compute dtype
FLOAT32 = r'norm/(scale|bias)$|(^|/)value_head/|_lora/[ab]$|_scale$'

# Attention splits by key/value head and the feed-forward by F over `tensor`;
# the other large dimension lies over `fsdp`.
BLOCK_RULES = quantize.partition_rules(
  (
    *experts.PARTITION_RULES,
    (r'attention/qkv$', PartitionSpec('fsdp', 'tensor', None, None)),
    (r'attention/qkv_bias$', PartitionSpec('tensor', None, None)),
    (r'attention/out$', PartitionSpec('tensor', None, None, 'fsdp')),
    (r'mlp/gate_up$', PartitionSpec('fsdp', None, 'tensor')),
    (r'mlp/up$', PartitionSpec('fsdp', 'tensor')),
    (r'mlp/up_bias$', PartitionSpec('tensor')),
    (r'mlp/down$', PartitionSpec('tensor', 'fsdp')),
  )
)
PARTITION_RULES = (
  *stack.partition_rules(BLOCK_RULES),
  (r'(embed|head)/embedding$', PartitionSpec('tensor', 'fsdp')),
  (r'(embed|head)/embedding_scale$', PartitionSpec('tensor')),
)


class Outer(nn.Module):
  """Parameters outside of the blocks, for init."""

  config: TransformerConfig

  @nn.compact
  def __call__(self):
    c = self.config
    Table(c.vocab_size, c, name='embed')()
    if c.learned_positions:
      Table(c.max_length, c, name='positions')()
    Norm(c, name='norm')(jnp.zeros((1, c.d_model)))
    if c.lm_head and not c.tie_embeddings:
      Table(c.vocab_size, c, name='head')()
    if c.value_head:  # V begins at 0
      Table(1, c, nn.initializers.zeros, name='value_head')()


class Inner(nn.Module):
  """Block number i, for init: its name is part of its random key."""

  config: TransformerConfig
  i: int

  @nn.compact
  def __call__(self):
    c, kind = self.config, self.config.layers[self.i]
    x, at = jnp.zeros((1, 1, c.d_model)), jnp.zeros((1, 1, 1), jnp.int32)
    angles = kind.rope and rope.rope_angles(at, kind.rope, 1)
    block = Block(c, kind, 'xla', name=f'layer_{self.i}')
    block(x, angles, None, None, None, 0)


class Network(NamedTuple):
  """Choices that the functions below are compiled with."""

  config: TransformerConfig
  dtype: jnp.dtype  # compute dtype
  remat: str
  kernel: str  # from kernels.choose
  scan: bool  # of stacked layers, for many tokens at once


def init(net: Network, key):
  """Initializes all parameters, those of the blocks stacked."""
  c = net.config
  layers = [
    Inner(c, i).init(key)['params'][f'layer_{i}'] for i in range(c.num_layers)
  ]
  return Outer(c).init(key)['params'] | {'layers': stack.stack_layers(layers)}


def _embed(net: Network, params, tokens, positions, axes=()):
  """Embeds tokens [R, t] at positions [R, t]. axes: sharding.split_axes of
  params, inside of on_own_rows."""
  c, table = net.config, params['embed']
  if 'embed/embedding' in axes and len(table) == 1:
    x = lookup_own(table['embedding'], tokens, net.dtype)
  else:  # int8 is gathered
    table = gather_own({'embed': table}, axes)['embed']
    x = constrain_rows(lookup(table, tokens, net.dtype))
  if c.embedding_scale != 1:
    x = x * jnp.asarray(c.embedding_scale, x.dtype)
  if c.learned_positions:
    x = x + params['positions']['embedding'].astype(net.dtype)[positions]
  return x


def _angles(net: Network, positions, limit) -> dict:
  """RoPE angles {rope: ...}, shared by all layers of a kind and broadcast over
  heads."""
  kinds = {layer.rope for layer in net.config.layers} - {None}
  return {r: rope.rope_angles(positions[:, None], r, limit) for r in kinds}


def has(kind: Layer, path: tuple) -> bool:
  """Tells whether a layer has the parameter: experts or a feed-forward."""
  return path[0] != ('mlp' if kind.routed else 'experts')


def _run(net: Network, params, tokens, positions, limit, prefix, caches, at):
  """Embeds tokens [R, t] at positions [R, t] < limit and runs the blocks."""
  c = net.config
  x = _embed(net, params, tokens, positions)
  angles = _angles(net, positions, limit)
  length = None if prefix is None else prefix.length

  def step(kind, weights, x, prefix_kv, cache):
    return Block(c, kind, net.kernel).apply(
      {'params': weights},
      x,
      angles.get(kind.rope),
      prefix_kv,
      length,
      cache,
      at,
    )

  x, new = stack.run_layers(
    step,
    c.layers,
    params['layers'],
    x,
    None if prefix is None else prefix.kv,
    caches,
    net.scan,
    net.remat,
    has,
  )
  return Norm(c).apply({'params': params['norm']}, x), new


def _last(x, length):
  """Hidden states [C, D] of x [C, P, D] at the last real tokens."""
  return jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)[:, 0]


def read(net: Network, params, prompts: Prompts, tokens):
  """Reads prompts and completions [B, t] together: a layer's weights are
  gathered once for both, and nothing is kept of the prompts' keys and
  values."""
  axes = split_axes(params, PARTITION_RULES)
  function = functools.partial(_read_own, net, axes)
  if not axes:
    return function(params, (prompts, tokens))
  return on_own_rows(function, params, (prompts, tokens), axes)


def _read_own(net: Network, axes: dict, params, rows):
  """Reads (prompts, tokens) that are a device's own; axes: of params."""
  (prompts, tokens), c = rows, net.config
  length, axes = prompts.length, axes if rows_are_own() else {}
  of_layers = {
    path.removeprefix('layers/'): axis
    for path, axis in axes.items()
    if path.startswith('layers/')
  }
  (C, P), (B, t) = prompts.tokens.shape, tokens.shape
  front = jnp.broadcast_to(jnp.arange(P)[None], (C, P))
  start = jnp.repeat(length, B // C)
  back = start[:, None] + jnp.arange(t)[None]
  angles = _angles(net, front, P), _angles(net, back, P + t)
  x = (
    _embed(net, params, prompts.tokens, front, axes),
    _embed(net, params, tokens, back, axes),
  )

  def step(kind, weights, x, given, cache):
    weights = gather_own(cast_leaves(weights, net.dtype), of_layers, stacked=1)
    block = functools.partial(
      Block(c, kind, net.kernel).apply, {'params': weights}
    )
    turns = (a.get(kind.rope) for a in angles)
    first, kv = block(x[0], next(turns), None, None, None, 0)
    rest, _ = block(x[1], next(turns), kv, length, None, 0)
    return (first, rest), None

  x, _ = stack.run_layers(
    step, c.layers, params['layers'], x, None, None, net.scan, net.remat, has
  )
  first, rest = (Norm(c).apply({'params': params['norm']}, y) for y in x)
  return _last(first, length), rest


def encode(net: Network, params, prompts: Prompts) -> Prefix:
  """Reads the prompts, causally."""
  C, P = prompts.tokens.shape
  positions = jnp.broadcast_to(jnp.arange(P)[None], (C, P))
  x, kv = _run(net, params, prompts.tokens, positions, P, None, None, 0)
  return Prefix(kv, _last(x, prompts.length), prompts.length)


def extend(net: Network, params, prefix: Prefix, tokens, cache, at):
  """Reads completion tokens [B, t] after their prompts."""
  B, t = tokens.shape
  start = jnp.repeat(prefix.length, B // prefix.length.shape[0])
  positions = start[:, None] + (at + jnp.arange(t))[None]
  longest = t if cache is None else cache[0][1].shape[2]
  # keys and values of the prompt are [.., H, P] and [.., P, H]
  limit = jax.tree.leaves(prefix.kv)[1].shape[-2] + longest
  x, kv = _run(net, params, tokens, positions, limit, prefix, cache, at)
  return x, None if cache is None else kv


def append(prefix: Prefix, cache, hidden, count) -> Prefix:
  """Prefix after the first `count` [B] of the tokens in a cache, too. Columns
  after them are written over by the next ones, and are read by no query."""

  def one(kv, new, start):
    return tuple(
      jax.lax.dynamic_update_slice_in_dim(x, y, start, axis)
      for x, y, axis in zip(kv, new, (2, 1))
    )

  def write(_, rows):
    old, new, start = rows
    return tuple(jax.vmap(one)(x, y, start) for x, y in zip(old, new))

  kv = on_own_rows(write, {}, (prefix.kv, cache, prefix.length), {})
  last = _last(hidden, jnp.maximum(count, 1))
  return Prefix(
    kv,
    jnp.where((count > 0)[:, None], last, prefix.hidden),
    prefix.length + count,
  )


def logits(net: Network, params, hidden):
  """Logits float32 [..., V] of hidden states [..., D]."""
  name = 'embed' if net.config.tie_embeddings else 'head'
  return attention.capped(head(params[name], hidden), net.config.logit_cap)


def value(net, params, hidden):
  """Values float32 [...] of hidden states [..., D]."""
  row = params['value_head']['embedding'].astype(jnp.float32)
  return (hidden.astype(jnp.float32) @ row.T)[..., 0]


def cast_leaves(params, dtype, kept: str = FLOAT32):
  """Casts the leaves that the blocks would cast at every use, and no others:
  gradient and sampler compute with equal numbers.

  kept: regex of the paths that are used in float32. int8 stays, too.
  """

  def one(path, x):
    stays = x.dtype == jnp.int8 or re.search(kept, path_name(path))
    return x if stays else x.astype(dtype)

  return jax.tree_util.tree_map_with_path(one, params)


def cast_params(net: Network, params):
  """Casts parameters, once a rollout, and splits their stacks."""
  cast = cast_leaves(params, net.dtype)
  layers = stack.split(cast['layers'], net.config.layers, has)
  return cast | {'layers': layers}


def init_cache(net: Network, rows: int, length: int):
  """Keys [B, K, H, T] and values [B, K, T, H] of each layer, zeros."""
  K, H = net.config.num_kv_heads, net.config.head_dim

  def zeros(*shape):
    return jnp.zeros((rows, K, *shape), net.dtype)

  return tuple(
    (zeros(H, length), zeros(length, H)) for _ in range(net.config.num_layers)
  )


def as_policy(net, rules: Sequence, **functions: Callable) -> Policy:
  """Makes a Policy of functions of (net, ...).

  Args:
    net: has a config with vocab_size, max_length and value_head.
    rules: ((path regex, PartitionSpec), ...).
    functions: {field of Policy: function}.
  """
  c = net.config
  if c.value_head:
    functions['value'] = value
  bound = {name: functools.partial(f, net) for name, f in functions.items()}
  return Policy(
    **bound,
    split_prefix=stack.split_prefix,
    partition_rules=rules,
    vocab_size=c.vocab_size,
    max_length=c.max_length,
  )


def make_policy(
  config: TransformerConfig,
  dtype=jnp.float32,
  remat: str = 'none',
  attention: str = 'auto',
  scan_layers: bool | None = None,
) -> Policy:
  """Makes a Policy of a transformer: pure functions of (params, arrays).

  Args:
    config: sizes.
    dtype: compute dtype; parameters keep their own.
    remat: 'none', or the name in stack.REMAT of what each block keeps, which
      trades time for memory.
    attention: kernel for many tokens at once: xla, cudnn, splash, or auto, the
      backend's own where it fits (kernels.py).
    scan_layers: compile one layer and scan it, or (False) a loop of all. None:
      as stack.should_scan says. Sampling always loops.

  Raises ValueError for a kernel that the backend does not have.
  """
  scan = stack.should_scan(scan_layers, config.num_layers)
  kernel = kernels.choose(attention)
  net = Network(config, jnp.dtype(dtype), remat, kernel, scan)
  policy = as_policy(
    net,
    PARTITION_RULES,
    init=init,
    encode=encode,
    extend=extend,
    logits=logits,
    init_cache=init_cache,
    cast_params=cast_params,
  )
  both = functools.partial(read, net)
  own = policy.encode, policy.extend
  return policy._replace(read=(*own, both), append=(*own, append))
