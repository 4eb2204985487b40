"""Sampling rules against their definitions, and the draw against both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok import distribution

draw = jax.jit(distribution.draw)


def definition(logits, top_k, top_p, min_p):
  """Kept set of one row, written from the papers in float64."""
  order = np.argsort(-logits, kind='stable')[: top_k or len(logits)]
  probs = np.exp(logits[order] - logits.max())
  probs /= probs.sum()
  num_kept = []
  for i, token in enumerate(order):
    if probs[:i].sum() < top_p and probs[i] >= min_p * probs[0]:
      num_kept.append(token)
  return set(num_kept)


@pytest.mark.parametrize(
  ('top_k', 'top_p', 'min_p'),
  [(0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.2), (5, 0.7, 0.1)],
)
def test_truncation_is_its_definition(top_k, top_p, min_p):
  logits = np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32) * 2
  rule = distribution.make_rule(12, [0], 1.0, top_k, top_p, min_p)
  keep, num_kept = distribution.truncate(jnp.asarray(logits), rule)
  for row, shown, number in zip(logits, np.asarray(keep), np.asarray(num_kept)):
    want = definition(row.astype(np.float64), top_k, top_p, min_p)
    assert set(np.flatnonzero(shown)) == want
    assert number == len(want)


def test_evaluating_keeps_what_sampling_kept():
  logits = np.random.default_rng(1).normal(size=(40, 12)).astype(np.float32)
  rule = distribution.make_rule(12, [0], top_p=0.7)
  keep, num_kept = distribution.truncate(jnp.asarray(logits), rule)
  token = jnp.argmax(logits, axis=-1)
  again = distribution.most_likely(jnp.asarray(logits), num_kept, token)
  np.testing.assert_array_equal(keep, again)


def test_a_sampled_token_just_outside_replaces_the_border():
  logits = jnp.array([[3.0, 2.0, 1.999, 0.0]])
  keep = distribution.most_likely(logits, jnp.array([2]), jnp.array([2]))
  np.testing.assert_array_equal(keep[0], [1, 0, 1, 0])


def test_equal_logits_at_the_border_agree():
  logits = jnp.zeros((1, 5))
  rule = distribution.make_rule(5, [0], top_k=2)
  keep, num_kept = distribution.truncate(logits, rule)
  assert int(num_kept[0]) == 5
  for token in range(5):
    again = distribution.most_likely(logits, num_kept, jnp.array([token]))
    np.testing.assert_array_equal(again, keep)


def test_log_prob_and_entropy():
  logits = np.random.default_rng(2).normal(size=(7, 9))
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  token = np.arange(7)
  x = jnp.asarray(logits, jnp.float32)
  np.testing.assert_allclose(
    distribution.log_prob(x, jnp.asarray(token)),
    np.log(p[np.arange(7), token]),
    atol=1e-6,
  )
  np.testing.assert_allclose(
    distribution.entropy(x), -(p * np.log(p)).sum(-1), atol=1e-6
  )


def test_masked_logits_have_finite_entropy_gradients():
  x = jnp.array([[1.0, distribution.NEVER, 2.0]])
  grad = jax.grad(lambda x: distribution.entropy(x).sum())(x)
  assert np.isfinite(grad).all()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from((2, 15, 16, 17, 258, 700)), st.integers(0, 10_000))
def test_draw_inverts_the_cumulative_distribution(V, seed):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(16, V)).astype(np.float32) * 3
  uniform = rng.random(16).astype(np.float32)
  tokens = np.asarray(draw(logits, uniform))
  p = np.exp(logits.astype(np.float64))
  edges = np.cumsum(p / p.sum(-1, keepdims=True), axis=-1)
  upper = np.take_along_axis(edges, tokens[:, None], 1)[:, 0]
  lower = upper - np.take_along_axis(p, tokens[:, None], 1)[:, 0] / p.sum(-1)
  assert (uniform >= lower - 1e-5).all()
  assert (uniform <= upper + 1e-5).all()


@pytest.mark.parametrize('uniform', [0.0, 0.25, 0.5, 1 - 2.0**-24])
def test_draw_never_takes_a_token_of_probability_zero(uniform):
  V = 300
  rng = np.random.default_rng(0)
  for _ in range(20):
    alive = rng.choice(V, 3, replace=False)
    logits = np.full((1, V), distribution.NEVER, np.float32)
    logits[0, alive] = rng.normal(size=3)
    token = int(
      distribution.draw(jnp.asarray(logits), jnp.float32([uniform]))[0]
    )
    assert token in alive


def test_draw_has_the_right_frequencies():
  V, n = 40, 40_000
  logits = np.random.default_rng(5).normal(size=V).astype(np.float32)
  uniform = jax.random.uniform(jax.random.key(0), (n,))
  rows = jnp.broadcast_to(jnp.asarray(logits)[None], (n, V))
  counts = np.bincount(distribution.draw(rows, uniform), minlength=V)
  p = np.exp(logits) / np.exp(logits).sum()
  chi2 = ((counts - n * p) ** 2 / (n * p)).sum()
  assert chi2 < 39 + 5 * np.sqrt(2 * 39)  # 39 degrees of freedom, 5 sigma
