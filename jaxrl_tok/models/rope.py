"""Rotary positions: how fast each pair of a head turns, and turning it.

A Rope is the numbers that the transformer needs. Scalings that stretch a
model's context are a table: each maps the plain frequencies to others. None
depends on the length at hand. Scalings that do ('dynamic', 'longrope') would
give a cached key another angle than a key read anew, and are refused by name.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LARGEST_TABLE = 2**18  # numbers: 1 MiB, 4096 positions of a head of 128


class Rope(NamedTuple):
  """Frequencies, in radians a position, of the head's first pairs.

  Dimensions of a head beyond 2 * len(frequencies) are not turned.
  """

  frequencies: tuple
  magnitude: float = 1.0  # multiplies cos and sin


def _linear(speed, p):
  """Divides positions by the factor. kaiokendev, 2023."""
  return speed / p['factor'], 1.0


def _llama3(speed, p):
  """Divides slow pairs by the factor, keeps fast ones, and ramps between them
  in turns per original context. Llama 3.1's configuration."""
  turns = p['original_max_position_embeddings'] * speed / (2 * math.pi)
  low, high = p['low_freq_factor'], p['high_freq_factor']
  keep = np.clip((turns - low) / (high - low), 0, 1)
  return keep * speed + (1 - keep) * speed / p['factor'], 1.0


def _yarn(speed, p):
  """Ramps over the pairs, from those of beta_fast turns per original context
  (kept) to those of beta_slow (divided by the factor). arXiv:2309.00071."""
  pairs, factor = len(speed), p['factor']

  def pair_of(turns):  # that turns so often in the original context
    length = p['original_max_position_embeddings']
    wave = math.log(length / (turns * 2 * math.pi))
    return pairs * wave / math.log(p['rope_theta'])

  low = pair_of(p.get('beta_fast') or 32)
  high = pair_of(p.get('beta_slow') or 1)
  if p.get('truncate', True):
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, 2 * pairs - 1)
  width = high - low or 0.001
  divide = np.clip((np.arange(pairs) - low) / width, 0, 1)

  def magnitude(weight):
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

  size = p.get('attention_factor')
  if size is None:
    size = magnitude(1.0)
    if p.get('mscale') and p.get('mscale_all_dim'):
      size = magnitude(p['mscale']) / magnitude(p['mscale_all_dim'])
  return divide * speed / factor + (1 - divide) * speed, size


SCALINGS = {
  'default': lambda speed, p: (speed, 1.0),
  'linear': _linear,
  'llama3': _llama3,
  'yarn': _yarn,
}


def make_rope(parameters: dict, head_dim: int) -> Rope:
  """Makes a Rope from Hugging Face's rope_parameters.

  Frequency j is theta^(-2j/R), R = head_dim * partial_rotary_factor, then
  scaled. RoFormer, arXiv:2104.09864. Raises ValueError for a scaling that is
  not in the table, or whose numbers are missing or cannot be.
  """
  kind = parameters.get('rope_type', 'default')
  if kind not in SCALINGS:
    raise ValueError(
      f'rope scaling {kind!r} is not supported; supported: '
      f'{", ".join(SCALINGS)}'
    )
  try:
    rotary = int(head_dim * parameters.get('partial_rotary_factor', 1.0))
    with np.errstate(all='ignore'):
      speed = parameters['rope_theta'] ** -(np.arange(0, rotary, 2) / rotary)
      speed, magnitude = SCALINGS[kind](speed, parameters)
    fine = rotary <= head_dim and np.isfinite(speed).all() and (speed > 0).all()
  except KeyError as e:
    raise ValueError(f'rope scaling {kind!r} has no {e}') from None
  except (TypeError, ValueError, ArithmeticError):  # text, zero
    fine = False
  if not fine:
    raise ValueError(
      f'rope scaling {kind!r} has numbers that cannot be: {parameters}'
    )
  return Rope(tuple(speed.tolist()), float(magnitude))


def rope_angles(positions: jax.Array, rope: Rope, length: int):
  """Looks up (cos, sin), each float32 [..., R/2], for int positions [...] <
  length.

  Short contexts have a table inside the program: XLA on CPU would compute the
  angles again for every head of every layer.
  """
  speed = np.asarray(rope.frequencies, np.float32)
  if length * len(speed) > LARGEST_TABLE:
    angles = jnp.multiply.outer(positions.astype(jnp.float32), speed)
    return jnp.cos(angles) * rope.magnitude, jnp.sin(angles) * rope.magnitude
  angles = np.arange(length, dtype=np.float32)[:, None] * speed
  tables = np.cos(angles), np.sin(angles)
  return tuple(
    jnp.asarray(table * np.float32(rope.magnitude))
    .at[positions]
    .get(mode='promise_in_bounds')
    for table in tables
  )


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Turns the pairs (x_j, x_{j + R/2}) by their angle (Hugging Face's order)
  and leaves dimensions beyond R.

  x [..., H], cos and sin broadcastable to [..., R/2], R <= H.
  """
  half = cos.shape[-1]
  x32 = x[..., : 2 * half].astype(jnp.float32)
  a, b = jnp.split(x32, 2, axis=-1)
  turned = [a * cos - b * sin, b * cos + a * sin]
  if 2 * half == x.shape[-1]:
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
  turned = [y.astype(x.dtype) for y in turned]
  return jnp.concatenate([*turned, x[..., 2 * half :]], axis=-1)
