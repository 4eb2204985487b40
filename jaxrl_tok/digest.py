"""Digests of arrays: 64 bits that change when any bit of an array does.

  digest = sum_i mix(w_i XOR mix(i + c))  mod 2^32,  for two constants c

over the words w_i of an array (32 bits; shorter numbers are padded with zeros,
longer ones are two words) at their places i. mix is a bijection of 32 bits
(the finalizer of MurmurHash3), so that a change of one word always changes the
digest, and a change of several goes unseen with probability 2^-64. A sum of
integers has no order: equal arrays have equal digests however they lie on
devices and processes. It guards against disks, not against an adversary.
"""

import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_tok.sharding import path_name

LANES = 0x9E3779B9, 0x3C6EF372  # the constants c
FINITE = 2  # after the lanes: whether all numbers are finite


def _mix(x):
  """Bijection of uint32; each bit of the result depends on all of x."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x = (x ^ (x >> shift)) * np.uint32(factor)
  return x ^ (x >> 16)


def _sums(xp, words, places):
  """Lanes of words and their places, both uint32 of one shape."""
  return xp.stack(
    [
      xp.sum(_mix(words ^ _mix(places + np.uint32(c))), dtype=np.uint32)
      for c in LANES
    ]
  )


def _on_device(x: jax.Array) -> jax.Array:
  """Lanes of an array, and whether its numbers are finite: uint32 [3]."""
  fine = jnp.bool_(True)
  if jnp.issubdtype(x.dtype, jnp.inexact):
    fine = jnp.all(jnp.isfinite(x))
  if x.dtype == jnp.bool_:
    words = x.astype(jnp.uint32)
  else:
    bits = min(8 * x.dtype.itemsize, 32)
    words = jax.lax.bitcast_convert_type(x, f'uint{bits}').astype(jnp.uint32)
  places, stride = jnp.zeros(words.shape, jnp.uint32), 1
  for axis in reversed(range(words.ndim)):  # no reshape: shards stay
    along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    places += along * np.uint32(stride % 2**32)
    stride *= words.shape[axis]
  return jnp.append(_sums(jnp, words, places), fine.astype(jnp.uint32))


def _on_host(x: np.ndarray) -> np.ndarray:
  """_on_device of an array in memory, which may have 64-bit numbers."""
  floats = jnp.issubdtype(x.dtype, jnp.inexact)
  fine = not floats or bool(np.isfinite(x).all())
  size = x.dtype.itemsize
  raw = np.ascontiguousarray(x).reshape(-1)
  words = raw.view(f'<u{min(size, 4)}').astype(np.uint32)
  places = np.arange(words.size, dtype=np.uint32)
  return np.append(_sums(np, words, places), np.uint32(fine))


@functools.cache
def _program(mesh):
  """_on_device, compiled; its result is on every device of a mesh."""
  place = None if mesh is None else NamedSharding(mesh, PartitionSpec())
  return jax.jit(_on_device, out_shardings=place)


def lanes(tree) -> dict[str, np.ndarray]:
  """Digest uint32 [3] of each leaf {path: lanes}, computed where the leaf lies.

  Every process must call it. Leaves come one by one: collectives of programs
  that run at one time can wait for each other on a CPU.
  """
  found = {}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    if not isinstance(x, jax.Array):
      found[path_name(path)] = _on_host(np.asarray(x))
      continue
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    mesh = getattr(x.sharding, 'mesh', None)
    found[path_name(path)] = np.asarray(_program(mesh)(x).addressable_data(0))
  return found


def to_text(values: dict) -> dict[str, str]:
  """Digests {path: 16 hexadecimal digits} of lanes."""
  return {n: f'{int(v[0]):08x}{int(v[1]):08x}' for n, v in values.items()}


def of_json(value) -> str:
  """Digest of plain JSON, whatever the order of its names."""
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
