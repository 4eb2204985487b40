"""Frozen weights in int8, with a scale for each output channel (weight-only
int8: load_in_8bit of bitsandbytes, int8_weight_only of torchao; compare
arXiv:2208.07339, which rounds activations, too).

For a matrix w [in, out]:

  s = max |w| over the inputs / 127      float32 [out]; 1 for a channel of zeros
  q = round(w / s)                       int8 in -127..127, half to even
  y = (x q) * s                          x, q in the compute dtype, the rest
                                         float32

so that |w - q s| <= s / 2. bfloat16 holds every q exactly, and w is never made.
The scale is a leaf beside the matrix, of its shape without the input axes:

  qkv [L, D, K, M + 2, H]    qkv_scale [L, K, M + 2, H]

An embedding table [V, D] has a scale for each id: each is an output of the
head. Matrices of the blocks, the table and the head are quantized; norms,
biases, positions, experts and their routers are not.
"""

import functools
import re
from collections.abc import Sequence

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxrl_tok import sharding

# (end of a parameter's path, its input axes), with or without a stack's
INPUT_AXES = (
  (r'attention/(qkv|kv)$', (-4,)),
  (r'attention/q$', (-3,)),
  (r'attention/out$', (-4, -3, -2)),
  (r'mlp/gate_up$', (-3,)),
  (r'mlp/(up|down)$', (-2,)),
  (r'(^|/)(embed|head)/embedding$', (-1,)),
)
SUFFIX = '_scale'
# Elements that a CPU multiplies at a time, 4 MiB of float32: a piece of q in
# the compute dtype stays in the cache, where all of q would go to memory and
# come back.
PIECE = 2**20


def input_axes(path: str) -> tuple | None:
  """Input axes of a parameter, negative; None: it is not quantized."""
  for end, axes in INPUT_AXES:
    if re.search(end, path):
      return axes
  return None


def _rounded(w: np.ndarray, axes: tuple):
  w = w.astype(np.float32)
  scale = np.max(np.abs(w), axes, keepdims=True) / np.float32(127)
  if not np.isfinite(scale).all():
    raise ValueError('weights that are not finite cannot be int8')
  # below the normal numbers a scale has few bits, and w is nothing
  scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
  return np.rint(w / scale).astype(np.int8), np.squeeze(scale, axes)


def quantize(w: np.ndarray, axes: Sequence[int]):
  """Quantizes an array of the host -> (q int8, scale float32).

  axes: the inputs, negative, over which a scale is shared. Rows that share
  none are done a few at a time, so that w is never whole in float32.

  Raises ValueError for values that are not finite.
  """
  axes = tuple(axes)
  if -w.ndim in axes:
    return _rounded(w, axes)
  step = max(1, PIECE // max(1, w[0].size))
  parts = [_rounded(w[i : i + step], axes) for i in range(0, len(w), step)]
  return tuple(map(np.concatenate, zip(*parts)))


def dequantize(q, scale, axes: Sequence[int]):
  """Returns q s, float32."""
  return q.astype(jnp.float32) * jnp.expand_dims(scale, axes)


def structs(tree):
  """ShapeDtypeStructs of parameters, quantized."""
  flat = flax.traverse_util.flatten_dict(tree, sep='/')
  for path, x in list(flat.items()):
    if axes := input_axes(path):
      kept = [n for i, n in enumerate(x.shape) if i - len(x.shape) not in axes]
      flat[path] = jax.ShapeDtypeStruct(x.shape, jnp.int8)
      flat[path + SUFFIX] = jax.ShapeDtypeStruct(tuple(kept), jnp.float32)
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def quantize_params(params):
  """Quantizes a tree of parameters on the host."""
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  for path, x in list(flat.items()):
    if axes := input_axes(path):
      q, scale = quantize(np.asarray(x), axes)
      flat |= {path: jnp.asarray(q), path + SUFFIX: jnp.asarray(scale)}
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def dequantize_params(params, dtype='float32'):
  """Replaces each quantized matrix and its scale by q s, pure."""
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  for path in list(flat):
    if path + SUFFIX in flat:
      scale = flat.pop(path + SUFFIX)
      w = dequantize(flat[path], scale, input_axes(path))
      flat[path] = w.astype(dtype)
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def partition_rules(rules: Sequence) -> tuple:
  """Adds rules for scales, which lie as the output axes of their matrix.

  rules: (path regex, PartitionSpec) of one layer's leaves.
  """
  found = []
  for pattern, spec in rules:
    path = pattern.removesuffix('$')
    if axes := input_axes(path):
      kept = [a for i, a in enumerate(spec) if i - len(spec) not in axes]
      found.append((f'{path}{SUFFIX}$', PartitionSpec(*kept)))
  return (*rules, *found)


# --- products ----------------------------------------------------------------


def _pieces(q, axis: int):
  """(number of pieces, their width, width of the rest) along an axis of a
  matrix; no rest where a number of pieces near the least divides it."""
  n = q.shape[axis]
  # on a CPU; accelerators fuse the cast with the product
  least = min(n, -(-q.size // PIECE)) if sharding.on_whole_cpu() else 1
  fitting = (k for k in range(least, 2 * least) if n % k == 0)
  count = next(fitting, least)
  return count, n // count, n % count


def _dot(x, y, axis: int):
  """Sums the last axis of x against one of y's, in float32."""
  return jax.lax.dot_general(
    x,
    y.astype(x.dtype),
    (((x.ndim - 1,), (axis,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, q, axis: int):
  """x [R, I] times q, [I, O] (axis 0) or [O, I] (axis 1): float32 [R, O].

  No derivative with respect to q; the backward pass reads q itself, where
  autodiff would keep its copy in the compute dtype.
  """
  out = 1 - axis
  count, width, rest = _pieces(q, out)
  if count == 1 and not rest:
    return _dot(x, q, axis)

  def piece(i):
    return _dot(x, jax.lax.dynamic_slice_in_dim(q, i * width, width, out), axis)

  y = jax.lax.map(piece, jnp.arange(count))
  y = jnp.moveaxis(y, 0, 1).reshape(len(x), -1)
  if not rest:
    return y
  last = jax.lax.slice_in_dim(q, count * width, None, axis=out)
  return jnp.concatenate([y, _dot(x, last, axis)], axis=1)


def _forward(x, q, axis: int):
  return _product(x, q, axis), (q, jnp.zeros((), x.dtype))


def _backward(axis: int, kept, dy):
  """dx [R, I] = dy [R, O] q, summed over pieces of O."""
  q, like = kept
  dy, out = dy.astype(like.dtype), 1 - axis
  count, width, rest = _pieces(q, out)
  if count == 1 and not rest:
    return _dot(dy, q, out).astype(like.dtype), None

  def piece(dx, i):
    dy_i, q_i = (
      jax.lax.dynamic_slice_in_dim(x, i * width, width, a)
      for x, a in ((dy, 1), (q, out))
    )
    return dx + _dot(dy_i, q_i, out), None

  dx = jnp.zeros((len(dy), q.shape[axis]), jnp.float32)
  dx, _ = jax.lax.scan(piece, dx, jnp.arange(count))
  if rest:
    dy_i, q_i = (
      jax.lax.slice_in_dim(x, count * width, None, axis=a)
      for x, a in ((dy, 1), (q, out))
    )
    dx = dx + _dot(dy_i, q_i, out)
  return dx.astype(like.dtype), None


_product.defvjp(_forward, _backward)


def product(x, q, scale, table: bool = False):
  """y = (x q) * s.

  Args:
    x: [..., I].
    q: int8, [*inputs, *outputs] with I inputs in all; a table: [V, I].
    scale: [*outputs]; of a table [V].

  Returns float32 [..., *outputs]. Only x has a gradient.
  """
  I = x.shape[-1]
  flat = q if table else q.reshape(I, -1)
  y = _product(x.reshape(-1, I), flat, int(table)) * scale.reshape(1, -1)
  return y.reshape(*x.shape[:-1], *scale.shape)


def lookup(q, scale, ids):
  """Rows of a table [V, D] for ids [...]: float32 [..., D]."""
  return dequantize(q[ids], scale[ids], (-1,))
