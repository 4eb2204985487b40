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


@pytest.mark.parametrize('axis', [None, 1])
@settings(max_examples=40, deadline=None)
@given(
  value=st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False),
  columns=st.sampled_from([1, 3, 7, 10]),
  seed=st.integers(0, 100),
)
def test_equal_values_are_their_mean_and_have_no_variance(
  axis, value, columns, seed
):
  """Exactly, for any number of values of any size: 1234.567 three times, too,
  whose sum in float32 has no exact third."""
  mask = np.random.default_rng(seed).random((10, columns)) < 0.8
  x = np.where(mask, np.float32(value), np.nan)
  some = mask.any(axis)
  want = np.where(some, np.float32(value), 0)
  np.testing.assert_array_equal(masked.mean(x, mask, axis), want)
  np.testing.assert_array_equal(masked.var(x, mask, 1, axis), 0 * want)
  np.testing.assert_array_equal(masked.centred(x, mask, axis), np.zeros_like(x))
  np.testing.assert_array_equal(masked.whiten(x, mask), np.zeros_like(x))
  assert np.all(masked.all_equal(x, mask, axis))


def test_all_equal_sees_the_last_bit_of_a_chosen_value():
  x = np.full((2, 3), 1e5, np.float32)
  x[0, 1] = np.nextafter(x[0, 1], np.float32(0))
  x[1, 2] = np.nan
  mask = np.array([[1, 1, 1], [1, 1, 0]], bool)
  assert masked.all_equal(x, mask, axis=1).tolist() == [False, True]
  assert not masked.all_equal(x, mask)
  mask[0, 1] = False
  assert masked.all_equal(x, mask)


def test_statistics_along_an_axis_are_those_of_its_rows():
  rng = np.random.default_rng(0)
  x, mask = rng.normal(size=(5, 6)) + 1e4, rng.random((5, 6)) < 0.6
  mask[2] = False
  mask[3] = np.arange(6) == 4
  x = x.astype(np.float32)
  for b in range(5):
    for ddof in (0, 1):
      found = masked.var(x, mask, ddof, axis=1)[b]
      few = mask[b].sum() <= ddof
      want = 0 if few else x[b][mask[b]].astype(float).var(ddof=ddof)
      assert found == pytest.approx(want, rel=1e-4)
    mean = x[b][mask[b]].astype(float).mean() if mask[b].any() else 0
    assert masked.mean(x, mask, 1)[b] == pytest.approx(mean, rel=1e-6)
    near = np.where(mask[b], x[b] - mean, 0)
    np.testing.assert_allclose(masked.centred(x, mask, 1)[b], near, atol=1e-3)


def test_mean_has_the_gradient_of_a_mean():
  mask = jnp.array([True, True, False, True])
  for x in (jnp.array([3.0, 1.0, jnp.nan, 2.0]), jnp.full(4, 7.0)):
    slope = jax.grad(lambda x: masked.mean(x, mask))(x)
    np.testing.assert_allclose(slope, np.where(mask, 1 / 3, 0), rtol=1e-6)


def test_last_chosen():
  mask = jnp.array(
    [[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool
  )
  want = [[0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
  np.testing.assert_array_equal(masked.last_chosen(mask), want)
