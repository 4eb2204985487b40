"""Order of records: a bijection each epoch, a function of (seed, position)."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxrl_tok import data
from jaxrl_tok.data import order


@given(st.integers(1, 600), st.integers(0, 2**70), st.integers(0, 5))
@example(1, 0, 0)
@example(2, 0, 0)
@example(3, 0, 0)
@example(64, 0, 1)
@example(127, 0, 1)
@example(1024, 0, 1)
@settings(deadline=None)
def test_each_epoch_is_a_permutation(n, seed, epoch):
  found = data.record_indices(n, seed, epoch * n, n)
  assert sorted(found.tolist()) == list(range(n))


def test_a_million_records_come_once_each():
  n = 1_000_000
  seen = np.zeros(n, int)
  for at in range(0, n, n // 8):
    np.add.at(seen, data.record_indices(n, 3, n + at, n // 8), 1)
  assert (seen == 1).all()


@given(
  n=st.integers(1, 20),
  seed=st.integers(0, 99),
  position=st.integers(0, 200),
  parts=st.lists(st.integers(1, 50), min_size=1, max_size=6),
)
@settings(deadline=None)
def test_order_does_not_depend_on_how_it_is_asked_for(n, seed, position, parts):
  whole = data.record_indices(n, seed, position, sum(parts))
  split, at = [], position
  for count in parts:
    split += data.record_indices(n, seed, at, count).tolist()
    at += count
  assert whole.tolist() == split
  assert data.record_index(n, seed, position) == whole[0]


def test_seeds_and_epochs_differ():
  orders = {
    tuple(data.record_indices(50, seed, epoch * 50, 50).tolist())
    for seed in (0, 1, -1, 2, 2**32, 2**64, 2**64 + 1)
    for epoch in range(5)
  }
  assert len(orders) == 35


def chi_square(counts) -> float:
  """Excess of chi^2 over its degrees of freedom, in standard deviations."""
  counts = np.asarray(counts, float).ravel()
  mean, df = counts.mean(), counts.size - 1
  return (np.sum((counts - mean) ** 2 / mean) - df) / np.sqrt(2 * df)


@pytest.mark.parametrize('n', [2, 3, 4])
def test_every_permutation_of_a_small_set_is_as_likely(n):
  epochs = 4000
  found = data.record_indices(n, 0, 0, n * epochs).reshape(epochs, n)
  _, counts = np.unique(found, axis=0, return_counts=True)
  assert len(counts) == {2: 2, 3: 6, 4: 24}[n]
  assert abs(chi_square(counts)) < 5


def test_every_record_is_as_likely_at_every_place():
  n, epochs = 30, 3000
  found = data.record_indices(n, 7, 0, n * epochs).reshape(epochs, n)
  counts = [np.bincount(found[:, place], minlength=n) for place in range(n)]
  assert abs(chi_square(counts)) < 5
  steps = (found[:, 1:] - found[:, :-1]) % n  # successors: n - 1 differences
  assert abs(chi_square(np.bincount(steps.ravel(), minlength=n)[1:])) < 5


def test_a_large_order_looks_like_none():
  n = 100_000
  found = data.record_indices(n, 0, 0, n)
  assert abs(np.corrcoef(found, np.arange(n))[0, 1]) < 0.015
  assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.015
  half = found[: n // 2] < n // 2  # a batch is of all the data
  assert abs(half.mean() - 0.5) < 0.01


def test_endless_records_come_in_order():
  assert data.record_indices(None, 5, 2**40, 3).tolist() == [
    2**40,
    2**40 + 1,
    2**40 + 2,
  ]


def test_an_order_of_nothing_is_refused():
  with pytest.raises(ValueError, match='no records to order'):
    data.record_indices(0, 0, 0, 1)
  with pytest.raises(ValueError, match='position -1'):
    data.record_indices(5, 0, -1, 1)


@given(st.integers(0, 2**40), st.integers(1, 64))
def test_a_redrawn_index_is_of_its_own_range(index, attempt):
  found = order.redrawn_index(index, attempt)
  assert order.REDRAWN_START <= found < 2**31
  assert found == order.redrawn_index(index, attempt)
  assert found != order.redrawn_index(index, attempt + 1)
  assert order.HELD_OUT_START + order.RANGE == order.REDRAWN_START
