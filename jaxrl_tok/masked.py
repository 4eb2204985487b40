"""Statistics over the tokens that the policy chose.

Every function takes values and a bool mask of one shape, reduces over the
whole array unless told an axis, works in float32, and is finite when the mask
is empty: an empty mean is 0.

Equal values have exactly that value for a mean, and exactly 0 for a variance,
in any number and of any size: a sum in float32 is rounded, and the rounding
must not be divided by a standard deviation that is a rounding, too.
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


def _reference(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
  """Smallest chosen value, axes kept; 0 when nothing is chosen. Held fixed."""
  smallest = jnp.min(fill(x, mask, jnp.inf), axis=axis, keepdims=True)
  some = jnp.any(mask, axis=axis, keepdims=True)
  return jax.lax.stop_gradient(fill(smallest, some))


def mean(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
  """Mean, sum_t m_t x_t / sum_t m_t; 0 when nothing is chosen."""
  x = x.astype(jnp.float32)
  lowest = _reference(x, mask, axis)
  above = total(x - lowest, mask, axis) / count(mask, axis)
  return jnp.squeeze(lowest, axis) + above


def centred(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
  """Distance from the mean, x_t - mean(x) on chosen tokens, 0 elsewhere."""
  above = fill(x.astype(jnp.float32) - _reference(x, mask, axis), mask)
  kept = jnp.sum(above, axis=axis, keepdims=True)
  number = jnp.sum(mask.astype(jnp.float32), axis=axis, keepdims=True)
  return fill(above - kept / jnp.maximum(number, 1.0), mask)


def var(x: jax.Array, mask: jax.Array, ddof: int = 0, axis=None) -> jax.Array:
  """Variance, sum_t m_t (x_t - mean)^2 / (sum_t m_t - ddof); 0 for too few
  tokens."""
  squares = total(centred(x, mask, axis) ** 2, mask, axis)
  freedom = jnp.sum(mask.astype(jnp.float32), axis=axis) - ddof
  return jnp.where(freedom > 0, squares / jnp.maximum(freedom, 1.0), 0.0)


def whiten(x: jax.Array, mask: jax.Array, ddof: int = 0, eps=1e-8) -> jax.Array:
  """Whitening, (x - mean) / (std + eps) on chosen tokens, 0 elsewhere.

  One chosen token, or equal values, gives 0 and never NaN.
  """
  square = var(x, mask, ddof)
  some = square > 0  # the root of 0 has an infinite gradient
  std = jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0)
  return centred(x, mask) / (std + eps)


def all_equal(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
  """Tells whether the chosen values are equal to the last bit; so are no value
  and one."""
  largest = jnp.max(fill(x, mask, -jnp.inf), axis=axis)
  return largest <= jnp.min(fill(x, mask, jnp.inf), axis=axis)


def last_chosen(mask: jax.Array) -> jax.Array:
  """Mask of the last chosen token of each row, bool [..., T].

  # mask [1 1 1 0]  ->  [0 0 1 0];  [1 0 1 0] -> [0 0 1 0];  none -> none
  """
  later = jnp.flip(jnp.cumsum(jnp.flip(mask, -1), axis=-1), -1)
  return mask & (later == 1)
