"""Masked statistics against NumPy on the chosen values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok import masked


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**12 - 1), st.integers(0, 100))
def test_statistics_are_those_of_the_chosen(bits, seed):
  mask = np.array([bits >> i & 1 for i in range(12)], bool).reshape(3, 4)
  x = np.random.default_rng(seed).normal(size=(3, 4)).astype(np.float32)
  garbage = np.where(mask, x, np.nan)
  chosen = x[mask]
  mean = chosen.mean() if len(chosen) else 0.0
  assert masked.mean(garbage, mask) == pytest.approx(mean, abs=1e-6)
  for ddof in (0, 1):
    want = chosen.var(ddof=ddof) if len(chosen) > ddof else 0.0
    assert masked.var(garbage, mask, ddof) == pytest.approx(want, abs=1e-6)
  white = np.asarray(masked.whiten(garbage, mask))
  assert (white[~mask] == 0).all()
  if len(chosen) > 1:
    assert white[mask].mean() == pytest.approx(0, abs=1e-5)
    assert white[mask].std() == pytest.approx(1, abs=1e-3)
  else:
    assert (white == 0).all()


def test_equal_values_whiten_to_zero_with_finite_gradient():
  x, mask = jnp.full((5,), 2.0), jnp.ones((5,), bool)
  assert (np.asarray(masked.whiten(x, mask)) == 0).all()
  one = jnp.array([True, False, False, False, False])
  assert np.isfinite(jax.grad(lambda x: masked.whiten(x, one).sum())(x)).all()


def test_last_chosen():
  mask = jnp.array(
    [[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool
  )
  want = [[0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
  np.testing.assert_array_equal(masked.last_chosen(mask), want)
