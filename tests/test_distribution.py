"""Sampling rules against their definitions, and the draw against both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok import distribution

draw = jax.jit(distribution.draw)


truncate = jax.jit(distribution.truncate)
most_likely = jax.jit(distribution.most_likely)
# values that tie, and some that no truncation keeps
VALUES = (0.0, -0.0, 1.0, 1.5, -1.0, -3.25, -20.0, -120.0, 3.0, -np.inf)
ROWS = st.lists(st.sampled_from(VALUES), min_size=12, max_size=12).filter(
  lambda row: max(row) > -np.inf
)
KNOBS = st.tuples(
  st.sampled_from((0, 1, 2, 5, 11, 40)),
  st.sampled_from((1e-9, 0.1, 0.5, 0.9, 0.9999, 1 - 1e-7, 1 - 1e-9, 1.0)),
  st.sampled_from((0.0, 1e-30, 1e-6, 0.1, 0.5, 1.0)),
)


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


def must_and_may(row, top_k, top_p, min_p):
  """Sets that truncation has to keep, and may keep, by float64: tokens as
  likely as others stand or fall with them."""
  x = np.asarray(row, np.float64)
  p = np.exp(x - x.max())
  inside = (x[:, None] < x[None]).sum(1) < (top_k or len(x))
  inside &= x > -np.inf
  p = np.where(inside, p, 0) / p[inside].sum()
  above = np.where(x[:, None] < x[None], p[None], 0).sum(1)
  gap = x - x.max() - np.log(min_p) if min_p else np.full(len(x), np.inf)
  may, must = (
    inside
    & ((above < top_p + slack) | (np.float32(top_p) == 1))
    & (gap >= -10 * slack)
    for slack in (2e-7, -2e-7)
  )
  return must | (x == x.max()), may | (x == x.max())


@settings(max_examples=300, deadline=None)
@given(ROWS, KNOBS)
def test_truncation_of_ties_and_limits_is_its_definition(row, knobs):
  x = jnp.asarray([row], jnp.float32)
  keep, num_kept = truncate(x, distribution.make_rule(12, [0], 1.0, *knobs))
  keep = np.asarray(keep[0])
  must, may = must_and_may(row, *knobs)
  assert (must <= keep).all()
  assert (keep <= may).all()
  assert int(num_kept[0]) == keep.sum()


@settings(max_examples=200, deadline=None)
@given(ROWS, KNOBS, st.data())
def test_signs_of_zeros_change_nothing(row, knobs, data):
  """-0.0 and 0.0 are equals for the sampler and for evaluating."""
  flips = data.draw(st.lists(st.booleans(), min_size=12, max_size=12))
  other = [-v if v == 0 and flip else v for v, flip in zip(row, flips)]
  rule = distribution.make_rule(12, [0], 1.0, *knobs)
  kept, again = [], []
  for values in (row, other):
    x = jnp.asarray([values], jnp.float32)
    keep, num_kept = truncate(x, rule)
    token = jnp.argmax(x, axis=-1)
    kept.append(np.asarray(keep))
    again.append(np.asarray(most_likely(x, num_kept, token)))
  np.testing.assert_array_equal(kept[0], kept[1])
  np.testing.assert_array_equal(again[0], again[1])
  np.testing.assert_array_equal(kept[0], again[0])


@pytest.mark.parametrize(
  ('more', 'number'),
  [
    ({'top_k': 10}, 10),
    ({'min_p': 1e-30}, 10),
    ({'top_k': 4, 'min_p': 1e-20}, 4),
    ({'top_p': 1 - 1e-7}, 1),  # the others have 3e-9 together
    ({'top_k': 9, 'top_p': 1 - 1e-9}, 9),  # 1 in float32
  ],
)
def test_top_p_of_one_keeps_the_tail(more, number):
  """A float32 sum reaches 1 at the first of these tokens."""
  logits = jnp.asarray([[0.0, *range(-20, -29, -1)]])
  rule = distribution.make_rule(10, [0], **more)
  assert int(truncate(logits, rule)[1][0]) == number


@pytest.mark.parametrize('kind', ['zipf', 'normal', 'flat'])
def test_top_p_near_one_is_exact_in_large_vocabularies(kind):
  V = 150_000
  rng = np.random.default_rng(0)
  logits = {
    'zipf': -1.1 * np.log(1 + rng.permutation(V)),
    'normal': 3 * rng.normal(size=V),
    'flat': 1e-2 * rng.normal(size=V),
  }[kind].astype(np.float32)
  p = np.exp(logits.astype(np.float64))
  p = np.sort(p / p.sum())[::-1]
  mass = np.append(0, np.cumsum(p))
  for top_p in (0.9, 0.99, 0.9999, 0.999999):
    rule = distribution.make_rule(V, [0], top_p=top_p)
    n = int(truncate(jnp.asarray(logits)[None], rule)[1][0])
    # errors of float32: of 1 - top_p, and of a sum of that size
    slack = 1e-7 + 1e-4 * (1 - top_p)
    assert mass[n] >= top_p - slack
    assert mass[n - 1] < top_p + slack


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


def test_tokens_that_a_policy_forbids_by_infinity_have_no_entropy():
  x = jnp.array([[1.0, -jnp.inf, 2.0]])
  value, grad = jax.value_and_grad(lambda x: distribution.entropy(x).sum())(x)
  want = distribution.entropy(jnp.array([1.0, 2.0]))
  np.testing.assert_allclose(value, want, rtol=1e-6)
  assert np.isfinite(grad).all()
  assert grad[0, 1] == 0


def test_a_temperature_that_overflows_is_refused():
  """The least likely token at 1e-30 would be a forbidden one no more."""
  with pytest.raises(ValueError, match=r'^temperature 1e-30 makes logits'):
    distribution.make_rule(11, [0], 1e-30)
  rule = distribution.make_rule(3, [0], 1e-6, forbidden=[False, True, False])
  shaped = distribution.shape_logits(jnp.array([-50.0, 50.0, -49.0]), rule)
  assert np.asarray(shaped).argmax() == 2
  assert np.isfinite(shaped).all()
  assert np.asarray(shaped).argmin() == 1


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
