"""Pairs of completions: their forms, and metrics of margins by hand."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok.data.pairs import read_pairs
from jaxrl_tok.run.pair_metrics import interval, pair_metrics, reliability

USER = {'role': 'user', 'content': 'What colour is the sky?'}
BLUE = {'role': 'assistant', 'content': 'Blue.'}
GREEN = {'role': 'assistant', 'content': 'Green.'}
SKY = {'prompt': [USER], 'chosen': 'Blue.', 'rejected': 'Green.', 'margin': 0.0}


@pytest.mark.parametrize(
  ('row', 'want'),
  [
    ({'prompt': 'a ', 'chosen': 'b', 'rejected': 'c'}, ('a ', 'b', 'c')),
    # without a prompt: the common words; the space belongs to what follows
    (
      {'chosen': 'The sky is blue.', 'rejected': 'The sky is black.'},
      ('The sky is', ' blue.', ' black.'),
    ),
    (
      {'chosen': 'Human: hi\n\nBot: yes', 'rejected': 'Human: hi\n\nBot: no'},
      ('Human: hi\n\nBot:', ' yes', ' no'),
    ),
    ({'prompt': [USER], 'chosen': [BLUE], 'rejected': [GREEN]}, None),
    ({'chosen': [USER, BLUE], 'rejected': [USER, GREEN]}, None),
    ({'prompt': [USER], 'chosen': [USER, BLUE], 'rejected': [USER, GREEN]},
     None),
    ({'prompt': USER['content'], 'chosen': [USER, BLUE],
      'rejected': [USER, GREEN]}, None),
    ({'prompt': USER['content'], 'chosen': [BLUE], 'rejected': [GREEN]}, None),
  ],
)  # fmt: skip
def test_forms_of_pairs(row, want):
  (pair,), same = read_pairs([row])
  want = want or tuple(SKY[k] for k in ('prompt', 'chosen', 'rejected'))
  assert tuple(pair[k] for k in ('prompt', 'chosen', 'rejected')) == want
  assert (pair['margin'], same) == (0.0, 0)


def test_pairs_of_a_file(tmp_path):
  path = tmp_path / 'pairs.jsonl'
  rows = [
    {'prompt': 'p', 'chosen': 'a', 'rejected': 'b', 'margin': 2, 'id': 7},
    {'prompt': 'p', 'chosen': 'a', 'rejected': 'a'},
  ]
  path.write_text('\n'.join(map(json.dumps, rows)) + '\n\n')
  found, same = read_pairs(str(path))
  assert found == [rows[0] | {'margin': 2.0}]
  assert same == 1
  path.write_text('{"prompt": "p"\n')
  with pytest.raises(ValueError, match=r'pairs\.jsonl:1: not JSON'):
    read_pairs(path)
  with pytest.raises(FileNotFoundError, match='no such file'):
    read_pairs(tmp_path / 'nowhere.jsonl')


@pytest.mark.parametrize(
  ('row', 'fact'),
  [
    ('text', 'a str; a pair is'),
    ({'prompt': 'p', 'chosen': 'a'}, 'no "rejected"; it has prompt, chosen'),
    ({'prompt': 'p', 'chosen': 'a', 'rejected': [BLUE]}, 'are not both texts'),
    ({'chosen': 'The sky', 'rejected': 'A tree'}, 'begin with no common words'),
    ({'chosen': [USER, BLUE], 'rejected': [BLUE, GREEN]}, 'one conversation'),
    ({'chosen': [BLUE], 'rejected': [GREEN]}, 'one conversation'),
    ({'chosen': [USER, USER], 'rejected': [USER, BLUE]}, 'one conversation'),
    ({'chosen': [USER, {'role': 'x', 'content': ''}], 'rejected': [USER, BLUE]},
     "unknown role 'x'"),
    ({'prompt': 'p', 'chosen': 'a', 'rejected': 'b', 'margin': 'much'},
     "is 'much'; give a finite number"),
    ({'prompt': 'p', 'chosen': 'a', 'rejected': 'a'}, 'no pair of different'),
  ],
)  # fmt: skip
def test_what_is_no_pair_is_named(row, fact):
  with pytest.raises(ValueError, match=r'\w') as e:
    read_pairs([row])
  assert fact in str(e.value)
  assert '\n' not in str(e.value)


# --- metrics


def test_metrics_by_hand():
  found = pair_metrics([math.log(3), -math.log(3), 0.0, math.log(9)])
  assert found['accuracy'] == (1 + 0 + 0.5 + 1) / 4
  assert found['margin'] == pytest.approx(math.log(9) / 4)
  losses = [math.log(4 / 3), math.log(4), math.log(2), math.log(10 / 9)]
  assert found['log_loss'] == pytest.approx(sum(losses) / 4)
  # said .75, .75, .5, .9; bins of a tenth: [.5, .6), [.7, .8), [.9, 1]
  rows = reliability(np.array([math.log(3), -math.log(3), 0.0, math.log(9)]))
  assert [row['pairs'] for row in rows] == [1, 2, 1]
  gaps = 1 * abs(0.5 - 0.5) + 2 * abs(0.5 - 0.75) + 1 * abs(1 - 0.9)
  assert found['ece'] == pytest.approx(gaps / 4)


def test_the_interval_is_wilsons():
  # Newcombe, Stat. Med. 17, 1998, table I: 81 of 263, 15 of 148, 0 of 20
  for n, k, low, high in (
    (263, 81, 0.2553, 0.3662),
    (148, 15, 0.0624, 0.1605),
    (20, 0, 0.0, 0.1611),
  ):
    assert interval(k / n, n) == pytest.approx((low, high), abs=1e-4)


@settings(max_examples=30)
@given(st.lists(st.floats(-40, 40), min_size=1, max_size=40))
def test_laws_of_metrics(margins):
  found, turned = pair_metrics(margins), pair_metrics([-m for m in margins])
  assert found['accuracy'] == pytest.approx(1 - turned['accuracy'])
  assert 0 <= found['accuracy_low'] <= found['accuracy_high'] <= 1
  assert 0 <= found['ece'] <= 1
  rows = reliability(np.array(margins))
  assert sum(row['pairs'] for row in rows) == len(margins)


def test_who_knows_the_truth_is_calibrated():
  rng = np.random.default_rng(0)
  margins = rng.normal(0, 2, 20_000)
  right = rng.random(20_000) < 1 / (1 + np.exp(-margins))
  chosen = np.where(right, margins, -margins)
  assert pair_metrics(chosen)['ece'] < 0.01
  for wrong in (3 * chosen, chosen / 3):  # too sure, too unsure
    assert pair_metrics(wrong)['ece'] > 0.05
    assert pair_metrics(wrong)['log_loss'] > pair_metrics(chosen)['log_loss']
