"""Statistics: intervals hold the truth as often as they say, and estimators of
several samples are means over all subsets."""

import itertools
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

from jaxrl_tok.report import statistics

RUNS, N, G = 1000, 40, 4  # simulated evaluations, their prompts, completions


def simulated(rng, shift=0.0, common=None, runs=RUNS):
  """Values [runs, N, G] of completions that are alike within a prompt; some
  have no value. Their mean is `shift`."""
  own = rng.normal(0, 1, (runs, N, 1))
  common = 0 if common is None else common
  values = shift + common + own + rng.normal(0, 1, (runs, N, G))
  return np.where(rng.random(values.shape) < 0.1, np.nan, values)


def by_prompt(values):
  """(sums, counts) of values [N, G]."""
  prompt = np.repeat(np.arange(N), G)
  return statistics.by_prompt(values.ravel(), prompt, N)


SAMPLES = {}  # equal arguments give equal samples


@pytest.fixture
def few_draws(monkeypatch):
  draw = statistics.draws

  def draws(n, count=600, seed=0):
    if n not in SAMPLES:
      SAMPLES[n] = list(draw(n, 600, seed))
    return SAMPLES[n]

  monkeypatch.setattr(statistics, 'draws', draws)
  monkeypatch.setattr(statistics, 'FLIPS', 400)


def test_intervals_of_means_hold_the_truth(few_draws):
  """In about 95 % of 1,000 evaluations, though completions of a prompt are
  correlated; resampling completions would hold it in far fewer."""
  held = naive = 0
  for values in simulated(np.random.default_rng(0), 0.3):
    sums, counts = by_prompt(values)
    (found,) = statistics.intervals(sums[None], counts[None])
    held += found.low <= 0.3 <= found.high
    flat = values[np.isfinite(values)]
    assert found.value == pytest.approx(flat.mean())
    reach = 1.96 * flat.std() / math.sqrt(len(flat))
    naive += abs(flat.mean() - 0.3) <= reach
  assert 930 <= held <= 970
  assert naive < 850


def test_intervals_of_paired_differences_hold_the_truth(few_draws):
  rng = np.random.default_rng(1)
  common = rng.normal(0, 3, (RUNS, N, 1))  # prompts are easy or hard for both
  first, second = (simulated(rng, shift, common) for shift in (0.5, 0.2))
  held, widths, alone = 0, [], []
  for a, b in zip(first, second):
    pair = by_prompt(a), by_prompt(b)
    found = statistics.difference(*pair)
    held += found.low <= 0.3 <= found.high
    widths.append(found.high - found.low)
    for sums, counts in pair if len(alone) < 100 else ():
      (one,) = statistics.intervals(sums[None], counts[None])
      alone.append(one.high - one.low)
  assert 930 <= held <= 970
  assert np.mean(widths) < 0.6 * np.mean(alone)  # what pairing is for


def test_equal_models_differ_in_a_twentieth_of_tests(few_draws):
  """Win rates and their intervals, too: half of all, and p-values uniform."""
  rng, runs = np.random.default_rng(2), 300
  common = rng.normal(0, 3, (runs, N, 1))
  first, second = (simulated(rng, 0, common, runs) for _ in range(2))
  prompt = np.repeat(np.arange(N), G)
  small = wins = halves = 0
  for a, b in zip(first, second):
    small += statistics.difference(by_prompt(a), by_prompt(b)).p <= 0.05
    rate = statistics.win_rate(a.ravel(), b.ravel(), (prompt, prompt), N)
    wins += rate.p <= 0.05
    halves += rate.low <= 0.5 <= rate.high
  # 15 and 285 are expected; the standard deviation is 3.8
  assert 4 <= small <= 27
  assert 4 <= wins <= 27
  assert 273 <= halves <= 297


def test_quantiles_are_wider_for_fewer_prompts():
  low = [statistics.quantiles(n)[0] for n in (3, 10, 100, 10_000)]
  assert low == sorted(low)
  assert low[-1] == pytest.approx(0.025, abs=1e-4)
  t = stats.t.ppf(0.975, 9)
  assert low[1] == pytest.approx(stats.norm.cdf(-t * math.sqrt(10 / 9)))


def test_a_bootstrap_sample_draws_every_prompt_alike():
  found = np.concatenate(list(statistics.draws(7, 5000)))
  assert found.shape == (5000, 7)
  assert set(found.sum(1)) == {7}
  assert found.mean(0) == pytest.approx(np.ones(7), abs=0.06)
  assert found.var() == pytest.approx(6 / 7, abs=0.05)
  again = np.concatenate(list(statistics.draws(7, 5000)))
  assert (found == again).all()


def test_few_prompts_have_no_interval():
  one = statistics.intervals(np.ones((1, 1)), np.ones((1, 1)))
  assert one == [statistics.Estimate(1.0, None, None, 1)]
  none = statistics.intervals(np.zeros((1, 3)), np.zeros((1, 3)))[0]
  assert math.isnan(none.value)
  assert (none.low, none.high, none.prompts) == (None, None, 0)
  apart = (np.array([1.0, 0]), np.array([1, 0]))
  apart = statistics.difference(apart, tuple(x[::-1] for x in apart))
  assert math.isnan(apart.value)
  assert apart.p is None


def test_prompts_that_one_model_has_no_value_for_are_left_out():
  sums, counts = np.array([2.0, 3, 9]), np.array([1, 1, 0])
  found = statistics.difference((sums, counts), (sums * 0, counts + 1))
  assert found.value == pytest.approx(2.5)
  assert found.prompts == 2


def test_win_rate_counts_pairs_and_half_of_ties():
  first = np.array([1.0, 3, np.nan, 5])
  second = np.array([2.0, 3, 0])
  prompts = np.array([0, 0, 1, 2]), np.array([0, 0, 1])
  shares = statistics.wins(first, second, prompts, 3)
  assert shares[0] == (1 + 0.5) / 4
  assert np.isnan(shares[1:]).all()


def test_sign_test_counts_signs():
  """Two of the 2^n signs of n equal differences are as large."""
  p = statistics.sign_test(np.ones(6))
  assert p == pytest.approx(2 / 2**6, abs=0.01)
  assert statistics.sign_test(np.zeros(6)) == 1
  assert statistics.crossing(np.array([1.0, 2, 3])) == 0.5
  assert statistics.crossing(np.array([1.0, -2])) == 1


# --- several samples of a prompt

few = st.integers(1, 9)


@hypothesis.given(n=few, data=st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(n, data):
  right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
  found = [
    any(i < right for i in chosen)
    for chosen in itertools.combinations(range(n), k)
  ]
  assert statistics.pass_at_k(n, right, k) == pytest.approx(np.mean(found))


def test_pass_at_k_is_stable():
  """Where binomials are beyond a float."""
  assert statistics.pass_at_k(10_000, 1, 5000) == pytest.approx(0.5)
  assert statistics.pass_at_k(10_000, 5000, 1) == pytest.approx(0.5)
  assert statistics.pass_at_k(10_000, 0, 10_000) == 0
  for k in (0, 4):
    with pytest.raises(ValueError, match='give 1 to 3'):
      statistics.pass_at_k(3, 1, k)


def majority(answers: list[int], right: list[float]) -> float:
  """Worth of the commonest answer; equally common ones share it."""
  times = [answers.count(a) for a in range(len(right))]
  best = [w for t, w in zip(times, right) if t == max(times)]
  return float(np.mean(best))


@hypothesis.given(
  st.lists(st.integers(0, 3), min_size=1, max_size=8), st.data()
)
def test_maj_at_k_is_the_mean_over_all_subsets(answers, data):
  k = data.draw(st.integers(1, len(answers)))
  right = data.draw(
    st.lists(st.sampled_from([0, 0.5, 1]), min_size=4, max_size=4)
  )
  subsets = itertools.combinations(answers, k)
  want = np.mean([majority(list(chosen), right) for chosen in subsets])
  counts = [answers.count(a) for a in range(4)]
  assert statistics.maj_at_k(counts, right, k) == pytest.approx(want)
  one = statistics.maj_at_k(counts, right, 1)
  assert one == pytest.approx(np.mean([right[a] for a in answers]))
