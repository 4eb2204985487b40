"""Rhyme and metre, by verses whose form is known."""

import itertools
import random

import pytest

from jaxrl_tok import rewards
from jaxrl_tok.rewards import HAIKU, IAMBIC_PENTAMETER
from jaxrl_tok.rewards.verse import (
  line_agreement,
  pronunciations,
  rhyming_part,
  words_rhyme,
)


def one(reward, text, **columns):
  (value,) = reward(completions=[text], **{k: [v] for k, v in columns.items()})
  return value


SONNET = """Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date;"""
BLAKE = """Tyger Tyger, burning bright,
In the forests of the night;
What immortal hand or eye,
Could frame thy fearful symmetry?"""
LIMERICK = """There was an Old Man with a beard,
Who said, "It is just as I feared!
Two Owls and a Hen,
Four Larks and a Wren,
Have all built their nests in my beard!\""""


@pytest.mark.parametrize(
  ('a', 'b', 'rhymes'),
  [
    ('cat', 'mat', True),
    ('day', 'weigh', True),
    ('though', 'cough', False),
    ('love', 'move', False),
    ('again', 'men', True),
    ('happy', 'snappy', True),
    ('happy', 'city', False),
    ('two', 'too', False),  # one sound
    ('cat', 'cat', False),
    ('read', 'bed', True),  # one of its pronunciations
    ('glorp', 'dorp', False),  # unknown
    ("summer's", "drummer's", True),
    ("cat's", "rat's", True),
    ("cat's", "dog's", False),
  ],
)
def test_words_that_rhyme(a, b, rhymes):
  assert words_rhyme(a, b, pronunciations()) == rhymes
  assert words_rhyme(b, a, pronunciations()) == rhymes


def test_rhyming_parts_begin_at_the_last_stressed_vowel():
  assert rhyming_part(['AH0', 'G', 'EH1', 'N']) == ('EH', 'N')
  assert rhyming_part(['HH', 'AE1', 'P', 'IY0']) == ('AE', 'P', 'IY')
  assert rhyming_part(['M', 'AH0']) == ('AH',)
  assert rhyming_part(['M']) == rhyming_part([]) == ()


@pytest.mark.parametrize(
  ('poem', 'scheme', 'share'),
  [
    (SONNET, 'AABB', 0),
    (SONNET, 'ABAX', 1),
    (BLAKE, 'AABB', 0.5),  # eye and symmetry do not
    (BLAKE, 'AAXX', 1),
    (LIMERICK, 'AABBA', 1),
    (LIMERICK, 'AABB', 2 / 4),  # a second stanza of one line
    ('', 'AABB', 0),
    ('\n\n', 'AA', 0),
    ('a cat', 'AA', 0),
    ('a cat\nthe mat\na cat', 'AAA', 1),
  ],
)
def test_schemes_by_hand(poem, scheme, share):
  assert one(rewards.rhyme(scheme), poem) == share
  assert one(rewards.rhyme(scheme.lower()), poem + '\n\n') == share


@pytest.mark.parametrize('scheme', ['', 'ABC', 'XX', 'A A', 'A1'])
def test_a_scheme_without_a_rhyme_is_refused(scheme):
  with pytest.raises(ValueError, match='has no rhyme') as e:
    rewards.rhyme(scheme)
  assert '\n' not in str(e.value)


def test_rhymes_with_a_column():
  reward = rewards.rhyme_with()
  assert one(reward, 'I like my cat!', rhymes_with='mat') == 1
  assert one(reward, 'a cat', rhymes_with=['dog', 'on the mat']) == 1
  assert one(reward, 'a cat', rhymes_with='cat') == 0
  assert one(reward, '', rhymes_with='cat') == 0
  assert one(reward, 'cat', rhymes_with='...') is None


def test_other_pronunciations_may_be_given():
  """Spanish words of two syllables, by their letters."""

  def pronounce(word):
    vowels = [i for i, c in enumerate(word) if c in 'aeiou']
    return [[
      c if i not in vowels else f'{c}{int(i == vowels[-2])}'
      for i, c in enumerate(word)
    ]]  # fmt: skip

  reward = rewards.rhyme('AA', pronounce=pronounce)
  assert one(reward, 'la casa\nla masa') == 1
  assert one(reward, 'la casa\nla cosa') == 0
  assert one(reward, 'la casa\n') == 0


# --- metre


def test_metres_by_hand():
  reward = rewards.metre(IAMBIC_PENTAMETER)
  first, second, *_ = SONNET.splitlines()
  assert one(reward, first) == 1
  assert one(reward, second) == 0.9  # temperate: TEMperate
  trochees = 'Double, double toil and trouble'
  assert one(rewards.metre('10101010'), trochees) == 1
  assert one(rewards.metre('01010101'), trochees) == pytest.approx(2 / 8)
  assert one(rewards.metre('1010'), trochees) == 0.5
  assert one(reward, '') == 0
  assert one(reward, 'glorp ' * 10) == 0


def test_haiku_count_syllables():
  haiku = (
    'An old silent pond\nA frog jumps into the pond\nSplash! Silence again'
  )
  reward = rewards.metre(*HAIKU)
  assert one(reward, haiku) == 1
  lines = haiku.splitlines()
  assert one(reward, '\n'.join(lines[:2])) == pytest.approx(2 / 3)
  assert one(reward, '\n'.join([*lines[:2], 'Splash'])) == (
    pytest.approx((2 + 1 / 5) / 3)
  )


@pytest.mark.parametrize('patterns', [(), ('',), ('01', '2'), ('da DUM',)])
def test_patterns_that_are_none_are_refused(patterns):
  with pytest.raises(ValueError, match='is no pattern of stress') as e:
    rewards.metre(*patterns)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('seed', range(20))
def test_the_best_pronunciations_are_those_of_all(seed):
  """Equal to the largest over all choices."""
  rng = random.Random(seed)
  words = [
    {''.join(rng.choices('01?-', k=rng.randint(1, 3))) for _ in range(2)}
    for _ in range(4)
  ]
  pattern = ''.join(rng.choices('01?', k=rng.randint(1, 9)))

  def agreement(line):
    fits = sum(
      a != '-' and (a == b or '?' in (a, b)) for a, b in zip(line, pattern)
    )
    return fits / max(len(line), len(pattern))

  best = max(agreement(''.join(c)) for c in itertools.product(*words))
  assert line_agreement(words, pattern) == pytest.approx(best)
