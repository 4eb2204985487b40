"""Record of an evaluation, and its page."""

import math
from collections import Counter
from xml.etree import ElementTree

import hypothesis
import hypothesis.strategies
import numpy as np
import pytest

from jaxrl_tok.evaluation import metric_value
from jaxrl_tok.report import evaluation_page as page
from jaxrl_tok.report.evaluated import (
  comparison,
  estimates,
  numbers_of_samples,
  slice_names,
  slices,
)

N, G = 12, 4


def rows_of(rewards, texts=None, **more) -> list[dict]:
  """Rows of rewards [N, G]; the first completion of each prompt was cut."""
  return [
    {
      'prompt': f'prompt {i}',
      'answer': None,
      'completion': texts[i][g] if texts else f'text {i % 3} {g % 2}',
      'reward': reward,
      'index': i,
      'length': 3 + g,
      'ended': g > 0,
      **{name: values[i][g] for name, values in more.items()},
    }
    for i, some in enumerate(rewards)
    for g, reward in enumerate(some)
  ]


def random_rewards(seed=0, share=0.5):
  rng = np.random.default_rng(seed)
  return (rng.random((N, G)) < share).astype(float).tolist()


def test_estimates_are_means_of_completions():
  rewards = random_rewards()
  rewards[3] = [None] * G  # no reward applies
  rewards[4][1] = None
  parts = [[{'a': 1.0, 'b': 2.0 * g} for g in range(G)] for _ in range(N)]
  parts[0][0] = {'a': 1.0}
  metrics = [[{'x': float(i), 'y': None} for _ in range(G)] for i in range(N)]
  found = estimates(rows_of(rewards, components=parts, metrics=metrics))
  known = [r for some in rewards for r in some if r is not None]
  assert found['reward'].value == pytest.approx(np.mean(known))
  assert found['reward'].prompts == N - 1
  assert found['mean_length'] == (4.5, 4.5, 4.5, N)
  assert found['clipped_ratio'].value == 1 / G
  assert found['rewards/a/mean'].value == 1
  b = [2.0 * g for i in range(N) for g in range(G) if (i, g) != (0, 0)]
  assert found['rewards/b/mean'].value == pytest.approx(np.mean(b))
  assert found['x'].value == pytest.approx((N - 1) / 2)
  assert found['y'].prompts == 0
  for x in found.values():
    assert x.low is None or x.low <= x.value <= x.high


def test_passes_and_majorities_are_of_rewards_that_are_0_or_1():
  rewards = [[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
  texts = [list('abbc'), list('aaab'), list('abcd')]
  found = estimates(rows_of(rewards, texts))
  assert found['pass_at_2'].value == pytest.approx((1 / 2 + 1 + 0) / 3)
  assert found['pass_at_4'].value == pytest.approx(2 / 3)
  # of all four, b wins, then a; nothing is right
  assert found['maj_at_4'].value == pytest.approx(1 / 3)
  by_first = estimates(rows_of(rewards, texts), vote=lambda text: 'same')
  assert by_first['maj_at_4'].value == pytest.approx((1 / 4 + 3 / 4) / 3)
  rewards[2][0] = None  # three are left
  fewer = estimates(rows_of(rewards, texts))
  assert fewer['pass_at_4'] == pytest.approx((1, 1, 1, 2))
  rewards[2][0] = 0.5
  assert 'pass_at_2' not in estimates(rows_of(rewards, texts))
  assert numbers_of_samples(1) == []
  assert numbers_of_samples(12) == [2, 4, 8, 12]


def test_slices_are_estimates_of_their_prompts():
  rewards = random_rewards()
  names = slice_names([10, 9] * (N // 2), 'digits')
  found = slices(rows_of(rewards), names)
  assert list(found) == ['9', '10']  # in order of numbers
  assert found['10']['reward'].value == np.mean(rewards[::2])
  assert found['10']['reward'].prompts == N // 2
  parts = slice_names(list(range(100)), 'length')
  assert {parts.count(p) for p in parts} == {25}
  assert parts[0] == '0 to 24.75'
  with pytest.raises(ValueError, match=r'--slice word has more than 24'):
    slice_names([f'w{i}' for i in range(99)], 'word')


def test_a_comparison_is_paired():
  low, high = random_rewards(0, 0.3), random_rewards(1, 0.9)
  first, second = rows_of(high), rows_of(low)
  found = comparison(first, second)
  one = found.differences['reward']
  assert one.value == pytest.approx(np.mean(high) - np.mean(low))
  assert one.low < one.value < one.high
  assert one.p < 0.01
  assert found.differences['mean_length'][:3] == (0, 0, 0)
  back = comparison(second, first)
  assert back.differences['reward'].value == -one.value
  assert back.wins.value == pytest.approx(1 - found.wins.value)
  same = comparison(first, first)
  assert same.wins.value == 0.5
  assert same.differences['reward'].p == 1


# --- the page

HOSTILE = '<script>alert(1)</script><img src=x onerror=y> & "\'\u202e'


def written(tmp_path, sides, compared, **more) -> str:
  page.write_page(tmp_path / 'p.html', sides, compared, {'task': HOSTILE})
  return (tmp_path / 'p.html').read_text()


def side(name, rows, names=None):
  by = {} if names is None else {'kind': slices(rows, names)}
  return page.Side(name, estimates(rows), by, rows)


def test_the_page_escapes_what_it_shows(tmp_path):
  texts = [[HOSTILE] * G for _ in range(N)]
  names = [HOSTILE, 'other'] * (N // 2)
  rows = rows_of(random_rewards(), texts, metrics=[[{HOSTILE: 1.0}] * G] * N)
  for sides in ([side(HOSTILE, rows, names)], [side('a', rows, names)] * 2):
    compared = comparison(rows, rows) if len(sides) > 1 else None
    text = written(tmp_path, sides, compared)
    assert '<script' not in text
    assert '<img' not in text
    assert "default-src 'none'" in text
    assert 'http' not in text.replace('http-equiv', '').replace(
      'http://www.w3.org/2000/svg', ''
    )


def test_the_page_shows_both_ends_and_intervals(tmp_path):
  low, high = rows_of(random_rewards(0, 0.3)), rows_of(random_rewards(1, 0.6))
  names = ['odd', 'even'] * (N // 2)
  sides = [side('mine', high, names), side('theirs', low, names)]
  text = written(tmp_path, sides, comparison(high, low))
  for words in (
    *('mine', 'theirs', 'pass@4', 'maj@4', 'win rate of the first', 'odd'),
    *('the first model is better', 'the second model is better', 'p = 0.'),
  ):
    assert words in text, words
  pictures = text.split('<svg')[1:]
  for picture in pictures:
    ElementTree.fromstring('<svg' + picture.split('</svg>')[0] + '</svg>')
  rows = page.metric_rows(sides, comparison(high, low))
  assert all(len(row['cells']) == 2 for row in rows)
  assert len(pictures) == sum(
    bool(row['svg']) + bool(row['difference']['svg']) for row in rows
  ) + len(set(names))
  (worst, best) = page.sample_rows([side('one', low)])
  assert (worst['heading'], best['heading']) == ('lowest', 'highest')
  means = [np.mean(r) for r in random_rewards(0, 0.3)]
  for group, pick in ((worst, min), (best, max)):
    shown = group['rows'][0]['prompt'][0]['text']
    assert means[int(shown.split()[1])] == pick(means)


def test_pages_of_few_numbers_are_whole(tmp_path):
  """One prompt, no rewards, a metric without an interval."""
  rows = rows_of([[None] * G])
  one = side('one', rows)
  one.estimates['distinct_1'] = page.Estimate(0.5, prompts=1)
  text = written(tmp_path, [one], None)
  assert 'distinct 1' in text
  assert 'no rewards recorded' in text


# --- values that are none


def test_ranges_are_told_apart_by_as_many_digits_as_that_takes():
  for values in (
    [1_700_000_000 + i for i in range(100)],
    [1 + i * 1e-12 for i in range(100)],
    [i * 1e9 for i in range(100)],
  ):
    names = slice_names(values, 'x')
    assert sorted(Counter(names).values()) == [25] * 4
    low = [float(n.split(' to ')[0]) for n in names]
    assert low == sorted(low)
    assert all(b <= v * (1 + 1e-6) for b, v in zip(low, values))


@hypothesis.settings(max_examples=25)
@hypothesis.given(
  hypothesis.strategies.lists(
    hypothesis.strategies.sampled_from([None, math.nan, math.inf, -math.inf]),
    max_size=9,
  )
)
def test_what_is_no_number_does_not_move_the_ranges(others):
  numbers = [i * 0.5 for i in range(40)]
  names = slice_names([*others, *numbers], 'x')
  assert names[len(others) :] == slice_names(numbers, 'x')
  for value, name in zip(others, names):
    is_none = value is None or math.isnan(value)
    assert name == ('none' if is_none else str(value))
  few = slice_names([*others, 1, 2], 'x')
  assert few[: len(others)] == names[: len(others)]


def plain_rows(n):
  row = {'completion': 'a', 'reward': 1.0, 'length': 1, 'ended': True}
  return [row | {'index': i} for i in range(n)]


def test_slices_of_numbers_stand_first_in_their_order():
  names = ['none', '10 to 20', 'x', '9', '-inf', 'inf', '1e+20', '9']
  found = slices(plain_rows(len(names)), names)
  assert list(found) == ['-inf', '9', '10 to 20', '1e+20', 'inf', 'none', 'x']
  assert found['9']['reward'].prompts == 2


@pytest.mark.parametrize('value', [math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite_is_refused_by_the_metrics_name(value):
  """And not left out of the mean as if there were none."""
  rows = plain_rows(2)
  rows[0]['metrics'], rows[1]['metrics'] = {'odd': 1.0}, {'odd': value}
  with pytest.raises(ValueError, match='the metric odd gives') as e:
    estimates(rows)
  assert '\n' not in str(e.value)
  with pytest.raises(ValueError, match='for completion 1; give a finite'):
    metric_value([1.0, value], 2)
  assert metric_value([1.0, None], 2) == [1.0, None]


def test_runs_of_unlike_sizes_are_not_compared():
  says = 'evaluated on 5 and 3 prompts; compare evaluations of the same'
  with pytest.raises(ValueError, match=says):
    comparison(plain_rows(5), plain_rows(3))
