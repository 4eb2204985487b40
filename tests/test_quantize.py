"""Int8 weights: the rule, its products, and a base that LoRA freezes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrl_tok.models import quantize

TINY = np.finfo(np.float32).tiny
NUMBERS = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
MATRICES = hnp.arrays(
  np.float32,
  hnp.array_shapes(min_dims=2, max_dims=3, max_side=5),
  elements=NUMBERS,
)


# --- the rule


@given(MATRICES)
@settings(max_examples=200)
@example(np.zeros((2, 3), np.float32))
@example(np.full((2, 3), 190e-45, np.float32))  # a scale of one bit
@example(np.float32([[127.5, 0.5], [-1e-30, 3e38]]))
def test_weights_are_within_half_a_scale(w):
  q, scale = quantize.quantize(w, (-2,))
  assert q.dtype == np.int8
  assert scale.dtype == np.float32
  assert np.isfinite(scale).all()
  assert (scale > 0).all()
  assert np.abs(q.astype(int)).max() <= 127
  s = np.expand_dims(scale, -2).astype(np.float64)
  error = np.abs(w.astype(np.float64) - q * s)
  assert (error <= s * (0.5 + 1e-5)).all()  # float32's last bits of w / s


@given(MATRICES, st.integers(-20, 20))
def test_the_rule_is_scale_invariant(w, power):
  w = np.where(np.abs(w) < 1e-20, 0, w)
  c = np.float32(2.0**power)
  q, scale = quantize.quantize(w, (-1,))
  scaled, by = quantize.quantize(w * c, (-1,))
  np.testing.assert_array_equal(scaled, q)
  zero = np.abs(w).max(-1) == 0
  np.testing.assert_array_equal(by, np.where(zero, 1, scale * c))


def test_a_channel_of_zeros_stays_one():
  w = np.float32([[0, 1, 0], [0, -2, 1e-42]])
  q, scale = quantize.quantize(w, (-2,))
  np.testing.assert_array_equal(q, [[0, 64, 0], [0, -127, 0]])
  np.testing.assert_array_equal(scale, np.float32([1, 2 / 127, 1]))


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
  w = np.ones((3, 4), np.float32)
  w[2, 1] = bad
  with pytest.raises(ValueError, match=r'^weights that are not finite'):
    quantize.quantize(w, (-1,))


def test_rows_in_pieces_are_those_of_the_whole(monkeypatch):
  w = np.random.default_rng(0).normal(size=(7, 5, 3)).astype(np.float32)
  whole = quantize.quantize(w, (-2,))
  monkeypatch.setattr(quantize, 'PIECE', 2 * 15)
  for a, b in zip(quantize.quantize(w, (-2,)), whole):
    np.testing.assert_array_equal(a, b)


# --- products


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


SHAPES = {  # path -> one layer's shape
  'attention/qkv': (6, 2, 3, 4),
  'attention/out': (2, 1, 3, 10),
  'mlp/gate_up': (6, 2, 5),
  'mlp/down': (6, 11),
  'embed/embedding': (13, 6),
}


@pytest.mark.parametrize('piece', [1, 6 * 3, 10**6])
@pytest.mark.parametrize('path', SHAPES)
def test_products_are_those_of_the_dequantized_matrix(path, piece, monkeypatch):
  monkeypatch.setattr(quantize, 'PIECE', piece)
  axes, table = quantize.input_axes(path), 'embedding' in path
  q, scale = quantize.quantize(normal(*SHAPES[path]), axes)
  w = np.float64(q) * np.expand_dims(np.float64(scale), axes)
  flat = w.T if table else w.reshape(6, -1)
  x = normal(2, 3, 6, seed=1)
  want = (np.float64(x) @ flat).reshape(2, 3, *scale.shape)
  dy = normal(*want.shape, seed=2)

  def run(x):
    return quantize.product(x, q, scale, table)

  y, back = jax.vjp(jax.jit(run), x)
  size = np.abs(x).sum() * np.abs(w).max()
  np.testing.assert_allclose(y, want, atol=1e-6 * size, rtol=0)
  want = np.float64(dy).reshape(2, 3, -1) @ flat.T
  size = np.abs(dy).sum() * np.abs(w).max()
  np.testing.assert_allclose(back(dy)[0], want, atol=1e-6 * size, rtol=0)


def test_products_in_bfloat16_round_x_alone():
  q, scale = quantize.quantize(normal(64, 9), (-2,))
  x = jnp.asarray(normal(5, 64, seed=1), jnp.bfloat16)
  y, back = jax.vjp(lambda x: quantize.product(x, q, scale), x)
  w = np.float64(q) * np.float64(scale)
  np.testing.assert_allclose(y, np.float64(x) @ w, atol=1e-4)
  assert y.dtype == jnp.float32
  assert back(y)[0].dtype == jnp.bfloat16


def test_the_backward_pass_keeps_no_copy_of_the_matrix():
  q, scale = quantize.quantize(normal(64, 48), (-2,))

  def residuals(x):
    return jax.vjp(lambda x: quantize.product(x, q, scale), x)[1]

  kept = jax.eval_shape(residuals, normal(2, 64))
  large = [x for x in jax.tree.leaves(kept) if x.size >= q.size]
  assert all(x.dtype == jnp.int8 for x in large)
