"""Limits of this machine, measured in the run of the benchmarks.

matmul     GFLOP/s of a float32 (or the dtype's) product of 1024 x 1024
skinny     GFLOP/s of the size's own products: B rows by D x 2F, and back
copy       GB/s of reading and writing an array of the working set's size
operation  microseconds of one small operation in a loop
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.studies.bench.sizes import Size, num_weights
from experiments.studies.bench.timing import once


class Ceilings(NamedTuple):
  """Highest rates, and the shortest operation."""

  matmul: float  # FLOP/s
  skinny: float  # FLOP/s
  copy: float  # bytes/s, read and written
  operation: float  # s


def best(function, rounds: int = 5) -> float:
  """Seconds of the fastest call, as for a ceiling."""
  once(function)
  return min(once(function) for _ in range(rounds))


def measure(size: Size, rows: int, dtype, working_set: int) -> Ceilings:
  """Measures all of them; working_set in bytes."""
  n = 1024 if jax.default_backend() == 'cpu' else 8192
  square = jnp.ones((n, n), dtype)
  product = jax.jit(lambda x: x @ x)
  matmul = 2 * n**3 / best(lambda: product(square))

  D, F = size.d_model, size.d_ff
  x = jnp.ones((rows, D), dtype)
  wide, back = jnp.ones((D, 2 * F), dtype), jnp.ones((2 * F, D), dtype)
  repeats = 64

  @jax.jit
  def many(x, wide, back):
    def step(x, _):
      return (x @ wide) @ back * 1e-6, None

    return jax.lax.scan(step, x, None, length=repeats)[0]

  flops = repeats * 2 * 2 * rows * D * 2 * F
  skinny = flops / best(lambda: many(x, wide, back))

  line = jnp.ones(max(working_set // 4, 1024), jnp.float32)
  copied = jax.jit(lambda x: x + 1)
  copy = 2 * line.nbytes / best(lambda: copied(line))

  @jax.jit
  def small(x):
    def step(x, _):
      return jnp.flip(jnp.sort(x)), None  # two that do not fuse

    return jax.lax.scan(step, x, None, length=1000)[0]

  tiny = jnp.arange(8.0)
  return Ceilings(matmul, skinny, copy, best(lambda: small(tiny)) / 2000)


def decode_step(size: Size, C: int, G: int, P: int, T: int, width: int):
  """Work (FLOPs, bytes) of a mean decode step: all weights are read once, each
  row's cache as far as it is written, and the prompts' keys once a prompt.

  width: bytes of a number.
  """
  B = C * G
  flops = 2 * B * num_weights(size)
  flops += (
    4 * B * size.num_layers * size.num_heads * size.head_dim * (P + T / 2)
  )
  cache = size.num_layers * 2 * size.num_kv_heads * size.head_dim * width
  moved = num_weights(size) * width + cache * (C * P + B * T / 2)
  return flops, moved
