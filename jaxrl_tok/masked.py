"""Statistics over the tokens that the policy chose.

Every function takes values and a bool mask of one shape, reduces over the
whole array unless told an axis, works in float32, and is finite when the mask
is empty: an empty mean is 0.
"""

import jax
import jax.numpy as jnp


def fill(x: jax.Array, mask: jax.Array, value=0.0) -> jax.Array:
  """Returns x where chosen, `value` elsewhere: garbage never reaches maths."""
  return jnp.where(mask, x, value)


def total(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
  """Sum of chosen values, sum_t m_t x_t."""
  return jnp.sum(fill(x.astype(jnp.float32), mask), axis=axis)


def count(mask: jax.Array, axis=None) -> jax.Array:
  """Number of chosen tokens, float32, at least 1 so that it may divide."""
  return jnp.maximum(jnp.sum(mask.astype(jnp.float32), axis=axis), 1.0)


def mean(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
  """Mean, sum_t m_t x_t / sum_t m_t; 0 when nothing is chosen."""
  return total(x, mask, axis) / count(mask, axis)


def var(x: jax.Array, mask: jax.Array, ddof: int = 0) -> jax.Array:
  """Variance, sum_t m_t (x_t - mean)^2 / (sum_t m_t - ddof); 0 for too few
  tokens."""
  squares = total((x - mean(x, mask)) ** 2, mask)
  freedom = jnp.sum(mask.astype(jnp.float32)) - ddof
  return jnp.where(freedom > 0, squares / jnp.maximum(freedom, 1.0), 0.0)


def whiten(x: jax.Array, mask: jax.Array, ddof: int = 0, eps=1e-8) -> jax.Array:
  """Whitening, (x - mean) / (std + eps) on chosen tokens, 0 elsewhere.

  One chosen token, or equal values, gives 0 and never NaN.
  """
  centred = fill(x - mean(x, mask), mask)
  # the mean of equal numbers is off by a rounding, which would be divided by a
  # std of nothing else: centred twice they are exactly 0
  centred = centred - mean(centred, mask)
  square = var(centred, mask, ddof)
  some = square > 0  # the root of 0 has an infinite gradient
  std = jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0)
  return fill(centred / (std + eps), mask)


def last_chosen(mask: jax.Array) -> jax.Array:
  """Mask of the last chosen token of each row, bool [..., T].

  # mask [1 1 1 0]  ->  [0 0 1 0];  [1 0 1 0] -> [0 0 1 0];  none -> none
  """
  later = jnp.flip(jnp.cumsum(jnp.flip(mask, -1), axis=-1), -1)
  return mask & (later == 1)
