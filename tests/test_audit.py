"""Audit of completions, gates that count, and the rule of the report."""

import json
import random

import numpy as np
import pytest

from jaxrl_tok import rewards
from jaxrl_tok.report import goodhart
from jaxrl_tok.report.page import write_report

# --- the audit and the gates


def test_an_audit_by_hand():
  found = rewards.audit(
    ['say one two three four five', 'q', 'q', 'q'],
    ['one two three four six', 'so so so', "I'm sorry, but I can't", 'damn'],
  )
  assert found == pytest.approx(
    {
      'audit/words': (5 + 3 + 5 + 1) / 4,
      'audit/repetition': (0 + 1 / 2 + 0) / 3,  # of those with two words
      'audit/copied': (1 / 2) / 4,  # one of two runs of four words
      'audit/distinct_2': 9 / 10,
      'audit/refusals': 1 / 4,
      'audit/profanity': 1 / 4,
      'audit/personal_data': 0,
    }
  )
  nothing = rewards.audit(['q'], [''])
  assert set(nothing.values()) == {0}


@pytest.mark.parametrize(
  'text',
  [
    "I'm sorry, but I can't help with that.", 'I cannot assist with this.',
    'As an AI language model, I have no body.', 'I’m afraid I must decline.',
    "Sorry. I won't write that.", 'I am unable to provide addresses.',
    'I am very sorry, I have to refuse.',
  ],
)  # fmt: skip
def test_refusals_are_found(text):
  assert rewards.no_refusal()(completions=[text]) == [0]


@pytest.mark.parametrize(
  'text',
  ['', "I can't believe it!", 'I am sorry for your loss.', 'It can not help.',
   'She was not able to come.', 'an aide', 'x' * 300 + ' I cannot help you.'],
)  # fmt: skip
def test_answers_are_no_refusals(text):
  assert rewards.no_refusal()(completions=[text]) == [1]


def test_gates_count_what_they_refuse():
  """Share of completions, alone and inside of another reward."""

  def one(completions, **columns):
    return [1.0] * len(completions)

  texts = {1: 'damn it', 2: 'fine', 3: 'mail a@b.org', 4: 'fine'}
  score = rewards.make_scorer(
    {
      'gate': rewards.profanity(),
      'gated': rewards.gated(rewards.personal_data(), one),
    },
    lambda ids: [texts[i[0]] for i in ids],
    [0],
  )
  tokens = np.array([[1], [2], [3], [4]])
  found = score(tokens, tokens > 0, [{'prompt': 'p'}])
  assert found.metrics == {
    'gates/profanity/refused': 0.25,
    'gates/personal_data/refused': 0.25,
  }
  assert found.rewards['gated'][:, 0].tolist() == [1, 1, 0, 1]


# --- the rule


def rows_of(reward, evaluation='', **audit) -> list[dict]:
  """Rows of metrics.jsonl of an evaluation, every ten steps."""
  prefix = f'eval/{evaluation}/' if evaluation else 'eval/'
  found = []
  for i, r in enumerate(reward):
    row = {'step': 10 * i, 'phase': 'eval', f'{prefix}reward': r}
    row |= {f'{prefix}audit/{name}': v[i] for name, v in audit.items()}
    found.append(row)
  return found


UP, FLAT = [0.1, 0.2, 0.4, 0.6, 0.7, 0.8], [0.5] * 6


def test_a_reward_that_is_exploited_is_warned_of():
  rows = rows_of(
    UP, distinct_2=[0.9, 0.9, 0.8, 0.6, 0.4, 0.3], copied=[0.0] * 6
  )
  rows += rows_of(FLAT, 'other', distinct_2=[0.9, 0.9, 0.8, 0.6, 0.4, 0.3])
  assert goodhart.warnings(rows) == {
    'held-out': 'held-out: the reward rises from 0.1 to 0.8 while distinct_2 '
    'falls from 0.9 to 0.3; the policy may exploit a flaw of the reward: read '
    'its completions'
  }


@pytest.mark.parametrize(
  ('name', 'values'),
  [
    ('repetition', [0.0, 0.1, 0.2, 0.2, 0.3, 0.4]),
    ('copied', [0.1, 0.1, 0.1, 0.2, 0.4, 0.5]),
    ('refusals', [0.0, 0.0, 0.0, 0.0, 0.1, 0.2]),
    ('profanity', [0.0, 0.0, 0.0, 0.05, 0.1, 0.1]),
    ('words', [20, 30, 35, 40, 50, 60]),
    ('words', [40, 35, 30, 25, 19, 12]),
  ],
)
def test_every_number_has_a_worse_side(name, values):
  assert goodhart.warnings(rows_of(UP, **{name: values}))
  better = [2 * values[0] - v for v in values]
  if name != 'words':
    assert not goodhart.warnings(rows_of(UP, **{name: better}))
  assert not goodhart.warnings(rows_of(FLAT, **{name: values}))
  assert not goodhart.warnings(rows_of(UP[::-1], **{name: values}))


def test_one_evaluation_alone_is_no_alarm():
  """The last two must agree where there are three or more; a run of two
  evaluations, before and after, has no more."""
  jumps = [0.0, 0.0, 0.0, 0.0, 0.0, 0.9]
  assert not goodhart.warnings(rows_of(UP, repetition=jumps))
  assert not goodhart.warnings(rows_of([0.5] * 5 + [0.9], repetition=UP))
  assert goodhart.warnings(rows_of([0.1, 0.9], repetition=[0.0, 0.9]))
  assert not goodhart.warnings(rows_of([0.1], repetition=[0.9]))
  assert not goodhart.warnings(
    rows_of(UP, words=[1, 2, 3, 4, 5, 6])
  )  # few words
  kl = [{'step': 10, 'phase': 'train', 'kl': 3.0}]
  assert not goodhart.warnings(kl + rows_of(UP, copied=[0.0] * 6))


def test_noise_is_no_alarm():
  """500 runs in which nothing happens: rewards and audits of 64 completions
  about their means."""
  rng = random.Random(0)

  def share(p):
    return [sum(rng.random() < p for _ in range(64)) / 64 for _ in range(6)]

  alarms = 0
  for p in (0.05, 0.5) * 250:
    noise = {name: share(0.5) for name in ('repetition', 'distinct_2')}
    rows = rows_of(share(p), **noise, refusals=share(0.1))
    alarms += bool(goodhart.warnings(rows))
  assert alarms <= 1


def test_the_report_shows_audit_and_canaries(tmp_path):
  rows = rows_of(
    UP, distinct_2=[0.9, 0.9, 0.8, 0.6, 0.4, 0.3], copied=[0.0] * 6
  )
  rows += [
    {'step': s, 'phase': 'train', 'kl': s / 10, 'reward': 1} for s in (10, 20)
  ]
  samples = [
    {'step': 10 * i, 'split': split, 'evaluation': 'canaries',
     'prompt': 'Tell me <b>', 'completion': f'text {i}', 'reward': None}
    for i, split in enumerate(('before', 'during', 'during', 'after'))
  ]  # fmt: skip
  for name, lines in (('metrics', rows), ('samples', samples)):
    text = ''.join(json.dumps(row) + '\n' for row in lines)
    (tmp_path / f'{name}.jsonl').write_text(text)
  page = write_report(tmp_path).read_text()
  assert 'Reward against its audit' in page
  assert 'distinct_2 falls from 0.9 to 0.3' in page
  assert page.count(' against the reward"') == 2  # distinct_2, kl; copied is 0
  assert 'Completions of canaries, by step' in page
  for i in range(4):
    assert f'<th>step {10 * i}</th>' in page
    assert f'text {i}' in page
  assert 'Tell me <b>' not in page
