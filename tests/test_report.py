"""The page is safe, bounded and forgiving; its numbers are the run's."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from jaxrl_tok.report import charts, figures, files, row_chart, tokens
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
    sample(
      evil,
      split,
      prompt=evil,
      answer=evil,
      tokens=[evil, evil],
      evaluation=evil,
      components={evil: evil},
      extra={evil: evil},
      note=[evil],
    )
    for split in ('train', 'before', 'after')
  ]
  messages = [{'role': evil, 'content': evil}, {'content': [{'type': evil}]}]
  rows.append(sample(messages, 'after', prompt=messages))
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
    [
      train_row(
        0, 0.5, kl=evil, **{f'rewards/{evil}/mean': 1, 'rewards/b/mean': 1}
      ),
      {'step': evil, 'phase': evil},
      {
        'step': 1,
        'phase': 'eval',
        f'eval/{evil}/reward': 1,
        f'eval/{evil}/x': 2,
      },
    ],
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
  assert '\u202e' not in str(tokens.visible(evil))


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


def test_lines_that_are_no_rows_are_counted(tmp_path):
  rows = [train_row(0, 0.25), train_row(1, 0.75)]
  path = tmp_path / 'metrics.jsonl'
  write_lines(path, [*rows, 3, None, [], {'phase': 'train'}], tail='{"step": 2')
  with path.open('a') as f:  # the resumed run goes on, on that same line
    f.write(json.dumps(train_row(2, 1.0)) + '\n')
    f.write(json.dumps(train_row(3, 0.5)) + '\n')
  write_lines(tmp_path / 'samples.jsonl', [[1], sample()])
  page = page_of(tmp_path)
  assert 'and were left out: 6.' in page.text
  assert ('training steps', '3') in list(
    report.headline(files.read_metrics(tmp_path)).items()
  )


def test_of_a_repeated_step_the_last_row_wins():
  metrics = [
    train_row(0, 0.1),
    train_row(1, 0.2),
    train_row(2, 0.3),
    {'step': 1, 'phase': 'eval', 'reward': 9.0},
    train_row(1, 0.7),
    train_row(2, 0.8),
  ]
  assert figures.curve(metrics, 'train', 'reward') == [
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
  text = str(figures.reward_pictures(metrics)[0]['svg'])
  assert len(figures.curve(metrics, 'train', 'reward')) == 30
  assert all(re.fullmatch(r'[MLHVhv\d., -]+', d) for d in svg_paths(text))
  assert figures.panels(metrics) == []


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
  text = str(figures.reward_pictures(metrics)[0]['svg']) + str(
    figures.panels(metrics)
  )
  assert 'nan' not in text.replace('nance', '')
  assert 'inf' not in text
  assert ('no values recorded' in text) == (not values)


def test_an_axis_is_of_the_size_of_its_numbers():
  low, *_, high = charts.ticks(0.0, 9.93e-14, 3)
  assert low == 0
  assert 9.93e-14 <= high <= 2e-13


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
  text = str(figures.reward_pictures(metrics)[0]['svg'])
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
    css = tokens.shade(advantage, 2.0)
    *hue, alpha = re.fullmatch(r'background:rgba\((.*)\)', css)[1].split(',')
    return hue, float(alpha)

  sizes = [0.01 * i for i in range(1, 201)]
  for sign in (1, -1):
    hues, alphas = zip(*(parts(sign * size) for size in sizes))
    assert all(hue == hues[0] for hue in hues)
    assert list(alphas) == sorted(set(alphas))
    assert alphas[-1] == tokens.DARKEST
  assert parts(1)[0] != parts(-1)[0]
  assert parts(1)[1] == parts(-1)[1]
  assert parts(5)[1] == tokens.DARKEST
  for nothing in (0, None, math.nan, '1;color:red'):
    assert tokens.shade(nothing, 2.0) == ''


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
  assert Page(str(tokens.visible(token))).text == shown


def test_a_token_says_its_numbers(tmp_path):
  write_lines(tmp_path / 'samples.jsonl', [sample(' 4')])
  page = page_of(tmp_path)
  titles = [v for k, v in page.attributes if k == 'title']
  said = 'log-prob -0.500 (p = 0.607)\nreward +0.000\nadvantage +0.200'
  assert f"' 4'\n{said}" in titles
  assert '␣4' in page.text


def compared(tmp_path, rows, unit=''):
  write_lines(tmp_path / 'samples.jsonl', rows)
  samples = report.read_samples(tmp_path / 'samples.jsonl')
  return report.comparisons(samples, unit)


def texts(side):
  return [message['text'] for message in side['completion']]


PAIRS = [
  sample('5', 'before', prompt='a', reward=0.0, advantage=None),
  sample('7', 'before', prompt='b', reward=0.25),
  sample('6', 'after', prompt='b'),
  sample('4', 'after', prompt='a'),
]


def test_before_and_after_are_matched_by_prompt(tmp_path):
  (table,) = compared(tmp_path, PAIRS, '%')
  assert [[texts(side) for side in row['sides']] for row in table['rows']] == [
    [['5'], ['4']],
    [['7'], ['6']],
  ]
  sides = table['rows'][0]['sides']
  assert [side['mark'] for side in sides] == ['wrong', 'right']
  assert table['summary'] == (
    '0 of 2 right before, 2 of 2 right after; right: a reward above 0.5'
  )


def test_rewards_are_numbers_unless_they_are_shares(tmp_path):
  (table,) = compared(tmp_path, PAIRS)
  assert table['summary'] == (
    'mean reward 0.125 before (of 2), mean reward 1 after (of 2)'
  )
  sides = [side for row in table['rows'] for side in row['sides']]
  assert [side['reward'] for side in sides] == ['0', '1', '0.25', '1']
  assert {side['mark'] for side in sides} == {None}


@pytest.mark.parametrize(
  ('config', 'shares'),
  [
    ("reward_unit: '%'\n", True),
    ("reward_unit: ''\n", False),
    ('', False),
    ('reward_unit: [1]\n', False),
    ('- reward_unit\n', False),
    ('{{ 7 * 7 }}: 2020-99-99', False),
    ('2020-99-99', False),
    ('[' * 5000, False),
  ],
)
def test_the_run_records_whether_its_reward_is_a_share(
  tmp_path, config, shares
):
  write_lines(tmp_path / 'samples.jsonl', PAIRS)
  rows = [train_row(0, 0.25), {'step': 1, 'phase': 'eval', 'eval/reward': 0.5}]
  write_lines(tmp_path / 'metrics.jsonl', rows)
  (tmp_path / 'config.yaml').write_text(config)
  text = page_of(tmp_path).text
  assert ('0 of 2 right before' in text) == shares
  assert ('✗' in text) == shares
  assert ('50 % → 50 %' in text) == shares
  assert ('0.5 → 0.5' in text) != shares
  picture = (tmp_path / 'reward.svg').read_text()
  assert ('>100 %<' in picture) == shares
  assert page_of(tmp_path, unit='%').text.count('0 of 2 right before') == 1


def test_several_evaluations_have_a_table_and_a_curve_each(tmp_path):
  rows = [
    *(row | {'evaluation': 'held_out'} for row in PAIRS[:2]),
    *PAIRS[2:],
    sample('x', 'before', prompt='a', evaluation='long', step=0, reward=-3.5),
    sample('y', 'before', prompt='a', evaluation='long', step=0, reward=-1.5),
    sample('z', 'after', prompt='c', evaluation='long', step=9),
  ]
  first, second = compared(tmp_path, rows)
  assert (first['evaluation'], second['evaluation']) == ('held-out', 'long')
  assert second['summary'] == (
    'mean reward -2.5 before (of 2), mean reward 1 after (of 1)'
  )
  a, c = second['rows']  # the first of a prompt's samples; a side may lack
  assert (texts(a['sides'][0]), a['sides'][1]) == (['x'], None)
  assert (c['sides'][0], texts(c['sides'][1])) == (None, ['z'])
  metrics = [
    {'step': i, 'phase': 'eval', 'eval/reward': i, 'eval/long/reward': 2 * i}
    for i in range(3)
  ]
  metrics += [{'step': 5, 'phase': 'eval', 'eval/long/bleu': 30}]
  assert figures.evaluation_rewards(metrics) == {
    'held-out': [(0, 0), (1, 1), (2, 2)],
    'long': [(0, 0), (1, 2), (2, 4)],
  }
  picture = Page(str(figures.reward_pictures(metrics)[0]['svg']))
  assert 'held-out: 2' in picture.text
  assert 'long: 4' in picture.text
  (panel,) = figures.panels(metrics)
  assert (panel['heading'], panel['unit']) == ('bleu', 'long')
  assert figures.evaluation_rewards([train_row(0, 1)]) == {}


def test_the_reward_is_drawn_over_tokens_and_calls_too(tmp_path):
  """A picture for each axis that the run recorded, one shown at a time without
  a script; evaluations are where the training step of their number was."""
  totals = {
    k: {'sampled_tokens': 70 * k, 'reward_calls': 8 * k} for k in (1, 2)
  }
  metrics = [train_row(k, 0.1 * k, **more) for k, more in totals.items()]
  metrics += [
    {
      'step': k,
      'phase': 'eval',
      'eval/reward': 0.2 * k,
      'eval/reward_low': 0.2 * k - 0.1,
      'eval/reward_high': 0.2 * k + 0.1,
    }
    for k in (0, 2)
  ]
  pictures = figures.reward_pictures(metrics)
  names = ['step', 'sampled tokens', 'reward calls']
  assert [p['axis'] for p in pictures] == names
  for axis, last in zip(figures.AXES, (2, 140, 16)):
    places = figures.totals(metrics, axis)
    curves = figures.reward_curves(metrics, axis, places)
    assert curves[0].points[-1] == (last, 0.2)
    assert curves[2].points == [(0, 0), (last, pytest.approx(0.4))]
    low, high = curves[2].band
    assert low == [(0, -0.1), (last, pytest.approx(0.3))]
    assert high == [(0, 0.1), (last, pytest.approx(0.5))]
  assert 'sampled tokens 140' in pictures[1]['svg']
  assert figures.panels(metrics) == []  # the interval is in the band
  write_lines(tmp_path / 'metrics.jsonl', metrics)
  page = report.write_report(tmp_path).read_text()
  assert page.count('type="radio"') == 3
  assert page.count(' checked>') == 1
  assert (tmp_path / 'reward.svg').read_text() == str(pictures[0]['svg'])
  write_lines(tmp_path / 'metrics.jsonl', [train_row(1, 0.5)])  # an older run
  assert 'type="radio"' not in report.write_report(tmp_path).read_text()


def test_an_evaluation_that_comes_again_replaces_its_samples(tmp_path):
  rows = [
    sample('old', 'after', prompt='a', step=5),
    sample('new', 'after', prompt='b', step=9),
  ]
  (table,) = compared(tmp_path, rows)
  (row,) = table['rows']
  assert [side and texts(side) for side in row['sides']] == [None, ['new']]


def test_components_of_the_reward_are_named(tmp_path):
  more = {'components': {'rhyme': 0.123456, 'short': None}, 'note': 'still'}
  row = sample(split='after', reward=7.25, extra={'parsed': [1, 'b']}, **more)
  write_lines(tmp_path / 'samples.jsonl', [row, row | {'split': 'train'}])
  shown = report.shown_sample(row)
  assert shown['reward'] == '7.25'
  assert shown['components'] == [('rhyme', '0.123'), ('short', '–')]
  assert shown['extra'] == [('parsed', '[1, "b"]'), ('note', 'still')]
  text = ' '.join(page_of(tmp_path).text.split())
  assert text.count('rhyme 0.123') == text.count('note: still') == 2
  means = [
    train_row(i, 3.0, **{'rewards/rhyme/mean': 1, 'rewards/a/b/mean': 2})
    for i in range(2)
  ]
  headings = [p['heading'] for p in figures.panels(means)]
  assert headings == ['rhyme', 'a/b']
  alone = [train_row(0, 3.0, **{'rewards/rhyme/mean': 1})]
  assert figures.panels(alone) == []  # it is the reward


def test_evaluations_have_panels_for_each_reward_and_metric():
  found = {'eval/reward': 3.0, 'eval/ref_kl': 4.0}
  found |= {'eval/rewards/a/b/mean': 1.0, 'eval/hard/rewards/c/mean': 2.0}
  rows = [{'phase': 'eval', 'step': k, **found} for k in range(3)]
  rows += [train_row(k, 1.0, kl=0.1, grad_norm=1.0) for k in range(3)]
  shown = [(p['heading'], p['unit']) for p in figures.panels(rows)]
  assert shown[:3] == [
    ('a/b', 'held-out, reward, mean'),
    ('c', 'hard, reward, mean'),
    ('ref kl', 'held-out'),
  ]
  policy = [p['heading'] for p in figures.panels(rows) if p['of_policy']]
  assert policy == ['a/b', 'c', 'ref kl', 'KL to the reference']


def test_a_mismatch_is_one_panel_whatever_is_evaluated():
  names = ('logp_gap_mean', 'kl', 'prob_gap_max')
  found = {f'eval/mismatch/{n}': 0.1 for n in names}
  found |= {f'eval/words/mismatch/{n}': 0.1 for n in names}
  rows = [{'phase': 'eval', 'step': k, **found} for k in range(3)]
  headings = [panel['heading'] for panel in figures.panels(rows)]
  assert headings == ['KL of sampler and gradient']


def test_a_prompt_of_messages_is_a_conversation(tmp_path):
  parts = [{'type': 'text', 'text': 'Look:'}, {'type': 'image'}]
  prompt = [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': parts},
  ]
  assert report.conversation(prompt) == [
    {'role': 'system', 'text': 'Be brief.'},
    {'role': 'user', 'text': 'Look: [image]'},
  ]
  assert report.conversation('a') == [{'role': '', 'text': 'a'}]
  for odd in ([], [1], ['x', {'role': 'user'}], None, 3, {'role': 'x'}):
    assert report.conversation(odd) == [{'role': '', 'text': report.clip(odd)}]
  rows = [sample(prompt=prompt), sample('5', prompt=prompt)]
  write_lines(tmp_path / 'samples.jsonl', rows)
  (step,) = report.credit(report.read_samples(tmp_path / 'samples.jsonl'))[
    'steps'
  ]
  (group,) = step['groups']  # one prompt, two samples
  assert len(group['rows']) == 2
  text = page_of(tmp_path).text
  assert text.count('Be brief.') == 1
  assert "{'role'" not in text


@pytest.mark.parametrize('answer', ['4', None])
def test_an_answer_is_a_column_only_where_there_is_one(tmp_path, answer):
  rows = [sample(split=split, answer=answer) for split in ('before', 'after')]
  write_lines(tmp_path / 'samples.jsonl', rows)
  assert ('answer' in page_of(tmp_path).text) == (answer is not None)


def test_a_notebook_shows_the_page_in_a_frame(tmp_path):
  write_lines(tmp_path / 'samples.jsonl', [sample('<script>"\'&amp;')])
  path = report.write_report(tmp_path)
  shown = report.Report(path)
  assert str(shown) == str(path)
  assert Path(shown).read_text() == path.read_text()
  frame = Page(shown._repr_html_())
  assert frame.elements == {'iframe'}
  attributes = dict(frame.attributes)
  assert attributes['srcdoc'] == path.read_text()
  assert attributes['sandbox'] is None  # the strictest
  assert frame.text == ''


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


@pytest.mark.parametrize(
  ('x', 'unit', 'shown'),
  [
    (0.123456, '', '0.123'),
    (-3.14159, '', '-3.14'),
    (1234.5, '', '1234'),
    (12_345, '', '12.3k'),
    (0.000123456, '', '0.000123'),
    (1.23456e-5, '', '1.2e-5'),
    (0.7551, '%', '75.5 %'),
    (1, '%', '100 %'),
    (0, '%', '0 %'),
    (12, '%', '1200 %'),
  ],
)
def test_figures_have_three_digits(x, unit, shown):
  assert charts.figure(x, unit) == shown


def test_a_scale_maps_its_ends_and_its_middle():
  across = charts.Scale(-1, 3, 100, 500)
  assert [across(v) for v in (-1, 1, 3)] == [100, 300, 500]
  up = charts.Scale(1, 100, 90, 10, log=True)
  assert [up(v) for v in (1, 10, 100)] == pytest.approx([90, 50, 10])
  assert charts.decades(0.2, 30) == pytest.approx([0.1, 1, 10, 100])
  assert charts.decades(10, 10) == [10, 100]


def test_an_axis_has_a_line_and_a_number_at_each_mark():
  scale = charts.Scale(0, 2, 100, 300)
  page = Page(''.join(charts.x_axis(scale, [0, 1, 2], 10, 50)))
  assert page.text == '012'
  assert [v for k, v in page.attributes if k == 'd'] == [
    'M100.0,10V50',
    'M200.0,10V50',
    'M300.0,10V50',
  ]
  page = Page(''.join(charts.y_axis(scale, [1], 10, 50, '{}!'.format)))
  assert page.text == '1!'
  assert ('d', 'M10,200.0H50') in page.attributes


def test_a_band_lies_around_its_curve():
  low, mean, high = ([(0, y), (10, y)] for y in (0.2, 0.5, 0.8))
  curve = charts.Curve('a', mean, band=(low, high))
  drawn = charts.chart([curve], 'title', (300, 150), unit='%')
  frame = charts.make_frame([curve], (300, 150), False, '%')
  ring = charts.path_data([frame.place(*p) for p in high + low[::-1]]) + 'Z'
  assert ring in svg_paths(drawn)
  assert (frame.y.low, frame.y.high) == (0, 1)


def test_dots_lie_in_their_rows():
  dots = [
    row_chart.Dot('a', 1.0, title='<b>'),
    row_chart.Dot('b', 3.0, error=1.0, shift=5),
    row_chart.Dot('b', 2.0, bar=True),
  ]
  panel = row_chart.Panel('x', dots, width=400, origin=0, guide=2.0)
  drawn = row_chart.row_chart(['a', 'b'], [panel], 'title', {'b': 'never'})
  page = Page(drawn)
  circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)
  assert circles == [('290.0', '44.0'), ('490.0', '73.0')]
  assert {'M390.0,73.0H590.0', 'M390.0,60.0v16'} <= set(svg_paths(drawn))
  assert 'never' in page.text
  assert '<b>' in page.text
  assert 'b' not in page.elements
  empty = row_chart.row_chart(['a'], [row_chart.Panel('x', [])], 'title')
  assert 'nan' not in empty


def test_a_report_needs_no_jax():
  code = (
    'import sys, jaxrl_tok.report.page, jaxrl_tok.report.logger, '
    'jaxrl_tok.report.row_chart;'
    "sys.exit('jax' in sys.modules)"
  )
  done = subprocess.run([sys.executable, '-c', code], check=False)
  assert done.returncode == 0
