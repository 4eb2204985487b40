"""The page is safe, bounded and forgiving; its numbers are the run's."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from jaxrl_tok.report import charts
from jaxrl_tok.report import page as report

HOSTILE = (
  '<script>alert(1)</script>',
  "\"' onmouseover=alert(1) x='",
  '</title></pre></svg><img src=http://evil.example onerror=alert(1)>',
  "<a href='javascript:alert(1)'>x</a>",
  '{{ 7 * 7 }}{% raw %}',
  'red;background:url(http://evil.example)',
  '\u202egnp.exe\x00\ud800',
)


class Page(HTMLParser):
  """Collects elements, attributes and text."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.attributes, self.text = set(), [], ''
    self.feed(text)

  def handle_starttag(self, name, attributes):
    self.elements.add(name)
    self.attributes += attributes

  def handle_data(self, data):
    self.text += data


def write_lines(path, rows, tail=''):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows) + tail)


def train_row(step, reward, **more):
  return {
    'step': step,
    'time': 1.5 * step,
    'phase': 'train',
    'reward': reward,
    **more,
  }


def sample(text='4', split='train', step=1, **more):
  return {
    'step': step,
    'split': split,
    'prompt': '2+2=',
    'completion': text,
    'answer': '4',
    'reward': 1.0,
    'tokens': [text, '<eos>'],
    'logp': [-0.5, -0.1],
    'rewards': [0.0, 1.0],
    'advantage': [0.2, 0.8],
    **more,
  }


def page_of(run_dir, **keywords):
  return Page(report.write_report(run_dir, **keywords).read_text())


def svg_paths(text):
  return re.findall(r' d="([^"]*)"', text)


@pytest.mark.parametrize('evil', HOSTILE)
def test_hostile_text_is_shown_and_never_obeyed(tmp_path, evil):
  rows = [
    sample(evil, split, prompt=evil, answer=evil, tokens=[evil, evil])
    for split in ('train', 'before', 'after')
  ]
  rows.append(
    sample(
      split='train',
      reward=evil,
      advantage=[evil, None],
      logp=evil,
      rewards={'x': evil},
      step=2,
    )
  )
  write_lines(tmp_path / 'samples.jsonl', rows)
  write_lines(
    tmp_path / 'metrics.jsonl',
    [train_row(0, 0.5, kl=evil), {'step': evil, 'phase': evil}],
  )
  for name in ('config.yaml', 'command.txt', 'env.json'):
    (tmp_path / name).write_text(evil, errors='replace')
  page = page_of(tmp_path, title=evil, summary={evil: evil})

  assert not page.elements & {'script', 'img', 'a', 'iframe', 'link', 'object'}
  for name, value in page.attributes:
    assert not name.startswith('on')
    assert name not in ('href', 'src')
    if name == 'style':
      assert re.fullmatch(r'[a-z]+:(rgba\([\d,.]+\)|[\d.]+%)', value)
  seen = evil.encode(errors='replace').decode()
  assert page.text.count(seen) >= 8
  assert '\u202e' not in str(report.visible(evil))


def test_the_page_has_a_policy_and_no_address_to_load(tmp_path):
  write_lines(tmp_path / 'metrics.jsonl', [train_row(i, 0.1) for i in range(9)])
  page = page_of(tmp_path)
  assert ('content', "default-src 'none'; style-src 'unsafe-inline'") in (
    page.attributes
  )
  addresses = {v for _, v in page.attributes if v and '://' in v}
  assert addresses == {'http://www.w3.org/2000/svg'}


@pytest.mark.parametrize('names', [(), ('metrics',), ('samples',)])
def test_missing_files_give_a_page(tmp_path, names):
  for name in names:
    (tmp_path / f'{name}.jsonl').write_text('')
  page = page_of(tmp_path)
  for what in (
    'rewards',
    'held-out completions',
    'training samples',
    'configuration',
  ):
    assert f'no {what} recorded' in page.text
  assert [p.name for p in tmp_path.iterdir() if p.suffix == '.html'] == [
    'report.html'
  ]


def test_unfinished_lines_are_skipped(tmp_path):
  rows = [train_row(0, 0.25), train_row(1, 0.75)]
  path = tmp_path / 'metrics.jsonl'
  write_lines(path, rows, tail='{"step": 2, "phase": "train", "rew')
  assert list(report.read_rows(path)) == rows
  with path.open('a') as f:  # the resumed run goes on, on that same line
    f.write(json.dumps(train_row(2, 1.0)) + '\n')
    f.write(json.dumps(train_row(3, 0.5)) + '\n')
  assert [row['step'] for row in report.read_rows(path)] == [0, 1, 3]


def test_of_a_repeated_step_the_last_row_wins():
  metrics = [
    train_row(0, 0.1),
    train_row(1, 0.2),
    train_row(2, 0.3),
    {'step': 1, 'phase': 'eval', 'reward': 9.0},
    train_row(1, 0.7),
    train_row(2, 0.8),
  ]
  assert charts.curve(metrics, 'train', 'reward') == [
    (0, 0.1),
    (1, 0.7),
    (2, 0.8),
  ]


def test_a_resumed_step_replaces_its_samples(tmp_path):
  rows = [
    sample(step=1),
    sample(step=2),
    sample(step=2),
    sample('5', step=1),
    sample('6', step=2),
  ]
  write_lines(tmp_path / 'samples.jsonl', rows)
  train = report.read_samples(tmp_path / 'samples.jsonl').train
  assert {
    step: [row['completion'] for row in rows] for step, rows in train.items()
  } == {1: ['5'], 2: ['6']}


def test_the_first_and_the_latest_steps_are_kept(tmp_path):
  steps = [*range(50), 10, 10, 10, *range(11, 50)]  # resumed at 10
  write_lines(tmp_path / 'samples.jsonl', [sample(step=i) for i in steps])
  train = report.read_samples(tmp_path / 'samples.jsonl').train
  assert sorted(train) == [0, 47, 48, 49]


def test_what_is_not_finite_leaves_no_trace_in_a_path():
  bad = [math.nan, math.inf, -math.inf, None, 'x', 1e300, 10**400]
  metrics = [
    train_row(i, bad[i % 7] if i % 2 else 0.01 * i, kl=bad[i % 7])
    for i in range(60)
  ]
  metrics.append(train_row(math.nan, 0.5))
  text = charts.reward_curve_svg(metrics)
  assert len(charts.curve(metrics, 'train', 'reward')) == 30
  assert all(re.fullmatch(r'[MLHhv\d., -]+', d) for d in svg_paths(text))
  assert charts.panels(metrics) == []


@pytest.mark.parametrize(
  'values',
  [
    [],
    [0.5],
    [0.0, 0.0],
    [-3.0, -3.0],
    [1e9, 1e9 + 1],
    [1e-12, 2e-12],
    [-1e29, 1e29],
  ],
)
def test_any_range_can_be_drawn(values):
  metrics = [train_row(i, v, kl=v) for i, v in enumerate(values)]
  text = charts.reward_curve_svg(metrics) + str(charts.panels(metrics))
  assert 'nan' not in text.replace('nance', '')
  assert 'inf' not in text
  assert ('no reward recorded' in text) == (not values)


@pytest.mark.parametrize('n', [0, 1, 399, 400, 401, 8_000])
def test_thinning_bounds_the_points_and_keeps_the_mean(n):
  points = [(float(i), (i * 7919 % 101) / 101) for i in range(n)]
  thinned = charts.thin(points, 400)
  assert len(thinned) == min(n, 400)
  assert thinned == sorted(thinned)
  if n:
    tolerance = 1e-12 if n % len(thinned) == 0 else 0.01
    for axis in (0, 1):
      ours = math.fsum(p[axis] for p in thinned) / len(thinned)
      theirs = math.fsum(p[axis] for p in points) / n
      assert ours == pytest.approx(theirs, rel=tolerance)


def test_a_long_run_gives_a_small_figure():
  metrics = [train_row(i, i % 2) for i in range(20_000)]
  text = charts.reward_curve_svg(metrics)
  assert max(d.count(',') for d in svg_paths(text)) <= 400
  assert len(text) < 60_000


def test_smoothing_is_a_mean_and_leaves_a_line_alone():
  line = [(float(i), 3.0 * i) for i in range(20)]
  inner = slice(4, -4)
  smoothed = charts.smooth(line, 4)
  assert [x for x, _ in smoothed] == [x for x, _ in line]
  for (_, y), (_, same) in zip(smoothed[inner], line[inner]):
    assert y == pytest.approx(same)
  assert smoothed[0] == pytest.approx((0, 6.0))  # mean of 0, 3, 6, 9, 12


def test_ticks_are_even_and_cover():
  for low, high in ((0, 1), (-0.3, 7.2), (1e5, 1e6), (2, 2), (0, 0)):
    found = charts.ticks(low, high, 5)
    assert found[0] <= low
    assert found[-1] >= high
    gaps = [b - a for a, b in pairwise(found)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps))
    assert 2 <= len(found) <= 8


def test_shading_grows_with_the_advantage_and_its_sign_is_the_hue():
  def parts(advantage):
    css = report.shade(advantage, 2.0)
    *hue, alpha = re.fullmatch(r'background:rgba\((.*)\)', css)[1].split(',')
    return hue, float(alpha)

  sizes = [0.01 * i for i in range(1, 201)]
  for sign in (1, -1):
    hues, alphas = zip(*(parts(sign * size) for size in sizes))
    assert all(hue == hues[0] for hue in hues)
    assert list(alphas) == sorted(set(alphas))
    assert alphas[-1] == report.DARKEST
  assert parts(1)[0] != parts(-1)[0]
  assert parts(1)[1] == parts(-1)[1]
  assert parts(5)[1] == report.DARKEST
  for nothing in (0, None, math.nan, '1;color:red'):
    assert report.shade(nothing, 2.0) == ''


@pytest.mark.parametrize(
  ('token', 'shown'),
  [
    ('', '·'),
    (' a', '␣a'),
    ('\n\n', '↵↵'),
    ('\t', '⇥'),
    ('<b>', '<b>'),
    ('\u200b', '⟨U+200B⟩'),
  ],
)
def test_no_token_is_invisible(token, shown):
  assert Page(str(report.visible(token))).text == shown


def test_a_token_says_its_numbers(tmp_path):
  write_lines(tmp_path / 'samples.jsonl', [sample(' 4')])
  page = page_of(tmp_path)
  titles = [v for k, v in page.attributes if k == 'title']
  said = 'log-prob -0.500 (p = 0.607)\nreward +0.000\nadvantage +0.200'
  assert f"' 4'\n{said}" in titles
  assert '␣4' in page.text


def test_before_and_after_are_matched_by_prompt(tmp_path):
  rows = [
    sample('5', 'before', prompt='a', reward=0.0, advantage=None),
    sample('7', 'before', prompt='b', reward=0.0),
    sample('6', 'after', prompt='b'),
    sample('4', 'after', prompt='a'),
  ]
  write_lines(tmp_path / 'samples.jsonl', rows)
  pairs = report.greedy_pairs(report.read_samples(tmp_path / 'samples.jsonl'))
  assert [
    [side['completion'] for side in row['sides']] for row in pairs['rows']
  ] == [['5', '4'], ['7', '6']]
  assert [side['mark'] for side in pairs['rows'][0]['sides']] == [
    'wrong',
    'right',
  ]
  assert pairs['right'] == [0, 2]


def test_time_shares_add_up():
  metrics = [
    train_row(
      i, 0.0, **{'time/rollout': 2.0, 'time/score': 1.0, 'time/update': 1.0}
    )
    for i in range(100)
  ]
  assert [(t['seconds'], t['percent']) for t in report.time_split(metrics)] == [
    ('3 min 20 s', 50.0),
    ('1 min 40 s', 25.0),
    ('1 min 40 s', 25.0),
  ]


def test_a_report_needs_no_jax():
  code = "import sys, jaxrl_tok.report; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0
