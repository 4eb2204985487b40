"""The chart parser: against NLTK's, by hand and by laws."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk import CFG, ChartParser

from jaxrl_tok import rewards
from jaxrl_tok.rewards.chart_parser import pieces_of, read_grammar, spans

ENGLISH = """
S   -> NP VP
NP  -> Det N | Name | NP PP | Det 'old' N
VP  -> V | V NP | VP PP | V 'that' S
PP  -> 'with' NP
Det -> 'the' | 'a'
N   -> 'dog' | 'cat' | Name
Name -> 'anna' | 'old'
V   -> 'sees' | 'sleeps'
"""
AMBIGUOUS = """
S -> S S S | S S | 'a' S 'b' | A
A -> B
B -> A | 'a' | 'a' 'b'
"""


def one(reward, text):
  (value,) = reward(completions=[text])
  return value


def symbols_of(rule) -> tuple:
  parts = rule.rhs()
  return sum(not isinstance(part, str) for part in parts), len(parts)


def derive(rules: CFG, rng, symbol=None, depth=0) -> list[str]:
  """A random sentence of a grammar."""
  if isinstance(symbol, str):
    return [symbol]
  options = rules.productions(lhs=symbol or rules.start())
  if depth > 4:
    options = [min(options, key=symbols_of)]
  parts = rng.choice(options).rhs()
  return [w for part in parts for w in derive(rules, rng, part, depth + 1)]


@pytest.mark.parametrize('rules', [ENGLISH, AMBIGUOUS])
def test_sentences_are_those_of_nltk(rules):
  """Sentences of the grammar, many with a word exchanged or left out."""
  theirs, own = CFG.fromstring(rules), read_grammar(rules)
  parser, rng, found = ChartParser(theirs), random.Random(0), []
  words = sorted(own.words)
  for _ in range(1000):
    text = derive(theirs, rng)[:6]
    if rng.random() < 0.5:
      at = rng.randrange(len(text))
      text[at : at + rng.randint(0, 1)] = [rng.choice(words)]
    if rng.random() < 0.2:
      del text[rng.randrange(len(text))]
    is_sentence = bool(text) and next(parser.parse(text), None) is not None
    chart = spans(own, text, 99)
    assert (own.start in chart.get((0, len(text)), ())) == is_sentence, text
    found.append(is_sentence)
  assert 300 < sum(found) < 950


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_what_a_grammar_derives_is_covered(seed, count):
  """All words count in sentences side by side, and none outside of them."""
  rng, reward = random.Random(seed), rewards.grammar(ENGLISH, longest=99)
  sentences = [derive(CFG.fromstring(ENGLISH), rng) for _ in range(count)]
  text = [w for s in sentences for w in s]
  assert one(reward, ' '.join(text)) == 1
  mixed = [w for s in sentences for w in (*s, 'zzz')]
  share = len(text) / len(mixed)
  assert one(reward, ' '.join(mixed)) == pytest.approx(share)


@pytest.mark.parametrize(
  ('text', 'share'),
  [
    ('The dog sees the cat', 1),
    ('the dog sees. the cat', 3 / 6),
    ('anna sleeps dog', 2 / 3),
    ('the dog the cat', 0),
    ('the old dog sleeps', 1),
    ('anna sees that the dog sleeps', 1),
    ('', 0),
    ('...', 0),
  ],
)
def test_shares_by_hand(text, share):
  assert one(rewards.grammar(ENGLISH), text) == share


def test_phrases_may_be_worth_something():
  reward = rewards.grammar(ENGLISH, worth={'S': 1, 'NP': 0.25, 'VP': 0.5})
  assert one(reward, 'the dog') == 0.25
  assert one(reward, 'the dog the cat') == 0.25
  assert one(reward, 'sees the dog') == 0.5
  assert one(reward, 'the dog sees the cat') == 1
  # 2 words of a sentence, 1 of nothing, 2 of a noun phrase
  assert one(reward, 'anna sleeps x the dog') == pytest.approx(2.5 / 5)


def test_sentences_are_not_longer_than_longest():
  reward = rewards.grammar(ENGLISH, longest=5)
  assert one(reward, 'the dog sees the cat') == 1
  assert one(reward, 'the dog sees the cat with anna') == 5 / 7
  long = 'the dog sees anna ' + 'with anna ' * 20
  assert one(rewards.grammar(ENGLISH, longest=99), long) == 1


def test_quotes_may_hold_several_words_and_signs():
  reward = rewards.grammar("S -> 'Good morning, ' Name '!'\nName -> \"O'Hara\"")
  assert one(reward, 'good morning, O’Hara!') == 1
  assert one(reward, 'good morning O’Hara!') == 0
  assert pieces_of("It's 3.5, OK?") == ["it's", '3', '.', '5', ',', 'ok', '?']


@pytest.mark.parametrize(
  ('rules', 'says'),
  [
    ('', 'the grammar has no rule; write lines as'),
    ('S NP VP', "'S NP VP' is no rule; write a symbol"),
    ("'a' -> S", 'is no rule'),
    ("S -> 'a' |", 'an alternative of "S -> \'a\' |" is empty'),
    ('S ->', 'is empty'),
    ('S -> NP', "no rule for NP, which S needs; write NP -> ..., or 'NP' if"),
    ("S -> 'a", 'has a quote that is open; close it'),
  ],
)
def test_grammars_that_are_none_are_one_line(rules, says):
  with pytest.raises(ValueError, match=r'write|rule|close') as e:
    rewards.grammar(rules)
  assert says in str(e.value)
  assert '\n' not in str(e.value)


def test_worth_names_symbols_of_the_grammar():
  with pytest.raises(ValueError, match='worth names NPX, for which') as e:
    rewards.grammar(ENGLISH, worth={'NPX': 1})
  assert 'Det, N, NP, Name, PP, S, V, VP' in str(e.value)
