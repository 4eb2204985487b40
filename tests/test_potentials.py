"""Potentials: the metric of every beginning of a text, in differences.

Equal to the libraries' sentence values, for every tokenizer and every token, at
a cost that is linear in the text.
"""

import functools
import itertools
import math
import random
import re
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from sacrebleu.metrics import CHRF
from test_stops import PIECES, V, llama_like, some, trained
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxrl_tok import data
from jaxrl_tok.rewards import (
  check_functions,
  get_name,
  incremental,
  make_scorer,
  potentials,
)

FACTORIES = {
  'smoothed_bleu': potentials.smoothed_bleu,
  'chrf': potentials.chrf,
  'rouge_l': potentials.rouge_l,
  'edit_distance': potentials.edit_distance,
  'exact_prefix': potentials.exact_prefix,
  'keyword_coverage': potentials.keyword_coverage,
}
COLUMN = 'reference'
KINDS = [f(COLUMN) for f in FACTORIES.values()]
# words that meet again, punctuation, scripts, and letters whose lower case is
# longer, another letter, or depends on what follows
WORDS = (
  *('the', 'cat', 'sat', 'on', 'a', 'mat', 'The', 'x1', "don't", '.', ','),
  *('é', 'Ünï', '你好', 'İ', 'ΟΔΟΣ', '\u212a', 'a\u0301', '😀', '\u00a0', '_'),
)


def random_text(rng: random.Random, n: int) -> str:
  parts = (
    rng.choice(WORDS) + rng.choice((' ', ' ', '', '\n')) for _ in range(n)
  )
  return ''.join(parts)


def random_pairs(count: int):
  """Pairs (text, reference): unrelated, or alike at the start; no text, one
  word, long ones, the same word again and again."""
  rng = random.Random(0)
  for i in range(count):
    reference = random_text(rng, rng.choice((1, 2, 5, 20)))
    reference += 'a' * (not reference.strip())
    text = random_text(rng, rng.choice((0, 1, 3, 8, 20)))
    if i % 3 == 0:
      text = reference[: rng.randint(0, len(reference))] + text
    if i % 7 == 0:
      text, reference = 'the cat ' * (i % 9), 'the cat the ' * (1 + i % 4)
    yield text, reference


def outcome(reward, text: str, reference) -> float:
  return reward.outcome(completions=[text], **{COLUMN: [reference]})[0]


def deltas(reward, pieces: list[str], reference) -> list[float]:
  return reward(completion_pieces=[pieces], **{COLUMN: [reference]})[0]


# --- the libraries' values, on 1,000 pairs -----------------------------------


def words_of(text: str) -> list[str]:
  """Marks, decomposed, are written as letters, which \\w takes."""
  parts = (
    f'x{ord(c):x}' if unicodedata.category(c)[0] == 'M' else c
    for c in unicodedata.normalize('NFD', text)
  )
  return re.findall(r'\w+|[^\w\s]', ''.join(parts))


def bleu_by_definition(text: str, reference: str) -> float:
  hyp, ref = words_of(text), words_of(reference)
  if not hyp:
    return 0.0
  logs = 0.0
  for n in range(1, 5):
    grams, others = (
      Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1))
      for x in (hyp, ref)
    )
    logs += math.log(((grams & others).total() + 1) / (grams.total() + 1))
  return min(1.0, math.exp(1 - len(ref) / len(hyp))) * math.exp(logs / 4)


def edits(text: str, reference: str) -> int:
  """Levenshtein's table, cell by cell."""
  row = list(range(len(reference) + 1))
  for i, c in enumerate(text, 1):
    before, row[0] = row[0], i
    for j, d in enumerate(reference, 1):
      best = min(row[j] + 1, row[j - 1] + 1, before + (c != d))
      before, row[j] = row[j], best
  return row[-1]


def common_prefix(text: str, reference: str) -> float:
  n = 0
  while n < min(len(text), len(reference)) and text[n] == reference[n]:
    n += 1
  return n / len(reference)


def chrf_of_sacrebleu(text: str, reference: str) -> float:
  return CHRF().sentence_score(text, [reference]).score / 100


@functools.cache
def rouge():
  return rouge_scorer.RougeScorer(['rougeL'])


BY_DEFINITION = {
  'smoothed_bleu': bleu_by_definition,
  'chrf': chrf_of_sacrebleu,
  'rouge_l': lambda text, ref: rouge().score(ref, text)['rougeL'].fmeasure,
  'edit_distance': lambda text, ref: 1 - edits(text, ref) / len(ref),
  'exact_prefix': common_prefix,
}


@pytest.mark.parametrize('name', BY_DEFINITION)
def test_the_outcome_is_the_metric_of_the_sentence(name):
  reward, values = FACTORIES[name](COLUMN), []
  for text, reference in random_pairs(1000):
    values.append(outcome(reward, text, reference))
    want = BY_DEFINITION[name](text, reference)
    assert values[-1] == pytest.approx(want, abs=1e-9), (text, reference)
  assert len(set(values)) > 100


def test_keywords_are_whole_words_in_a_row():
  reward = potentials.keyword_coverage(COLUMN)
  for text, keywords, want in (
    ('The CAT sat.', ['cat', 'dog'], 1 / 2),
    ('cats', ['cat'], 0),
    ('New\nYork-style', ['new york', 'style', 'York'], 1),
    ('new, york', ['new york'], 1),
    ('york new', ['new york'], 0),
    ('ΟΔΟΣ straße', ['οδος', 'STRASSE'], 1),
    ('a a', ['a', 'A'], 1),
    ('one word', 'word', 1),
    ('', ['a'], 0),
  ):
    assert outcome(reward, text, keywords) == want, text


# --- every token of every tokenizer ------------------------------------------


def assert_sums(reward, pieces: list[str], reference) -> None:
  """Rewards up to a token sum to the metric of the text up to there."""
  found, text, total = deltas(reward, pieces, reference), '', 0.0
  assert len(found) == len(pieces)
  for piece, delta in zip(pieces, found):
    text, total = text + piece, total + delta
    assert total == pytest.approx(outcome(reward, text, reference), abs=1e-9)
    assert piece or delta == 0


@pytest.mark.parametrize('reward', KINDS, ids=get_name)
def test_the_rewards_up_to_a_token_are_the_metric_of_its_text(reward):
  rng = random.Random(1)
  for text, reference in random_pairs(150):
    pieces, start = [], 0
    while start < len(text):
      n = rng.choice((0, 1, 1, 2, 5))
      pieces.append(text[start : start + n])
      start += n
    if reward.__name__ == 'keyword_coverage':
      reference = re.findall(r'\w+', reference) or ['a']
    assert_sums(reward, pieces, reference)


def characters() -> PreTrainedTokenizerFast:
  """One token a character."""
  names = ['<eos>', *"abcdefghijklmnopqrstuvwxyz0123456789 .,é好😀'"]
  vocabulary = {name: i for i, name in enumerate(names)}
  tokenizer = Tokenizer(models.WordLevel(vocabulary, '<eos>'))
  tokenizer.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
  tokenizer.decoder = decoders.Fuse()
  return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='<eos>')


def digits() -> PreTrainedTokenizerFast:
  """Byte-level BPE whose digits are tokens of their own."""
  tokenizer = trained()
  backend = tokenizer.backend_tokenizer
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  return tokenizer


MAKERS = {
  make.__name__: make
  for make in (trained, llama_like, data.byte_tokenizer, characters, digits)
}


@functools.cache
def scorer_of(name: str) -> tuple:
  """(score, tokenizer): the rewards of this file, by a tokenizer."""
  tokenizer = MAKERS[name]()
  decode = functools.partial(data.decode_all, tokenizer)
  pieces = data.make_pieces(tokenizer, decode, len(tokenizer))
  functions = {f.__name__: f for f in KINDS}
  functions |= {f'{f.__name__}_outcome': f.outcome for f in KINDS}
  ends = [tokenizer.eos_token_id]
  return make_scorer(functions, decode, ends, pieces=pieces), tokenizer


@pytest.mark.parametrize('name', MAKERS)
@settings(max_examples=60)
@given(st.data())
def test_rewards_sum_to_the_outcome_for_every_tokenizer(name, data):
  """As the trainer calls them, in float32: texts as the tokenizer reads them,
  with random ids between, ended and cut."""
  score, tokenizer = scorer_of(name)
  rows = []
  for _ in range(4):
    row = tokenizer.backend_tokenizer.encode(
      data.draw(st.text('ab é好😀.12', max_size=8)), add_special_tokens=False
    ).ids
    row += data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=3))
    rows.append([*row, tokenizer.eos_token_id] if len(rows) % 2 else row)
  T = max(1, *map(len, rows))
  mask = np.array([[t < len(row) for t in range(T)] for row in rows])
  tokens = np.array([row + [0] * (T - len(row)) for row in rows])
  reference = data.draw(st.text('ab é好😀.12', min_size=1, max_size=8)) + 'a'
  scores = score(tokens, mask, [{'prompt': 'p', COLUMN: reference}])
  for f in KINDS:
    found = scores.rewards[f.__name__]
    want = scores.rewards[f'{f.__name__}_outcome']
    np.testing.assert_allclose(found.sum(1), want.sum(1), atol=1e-6)
    assert (found[~mask] == 0).all()


@pytest.mark.parametrize('make', PIECES, ids=lambda make: make.__name__)
@settings(max_examples=30)
@given(st.data())
def test_rewards_sum_for_every_kind_of_decoder(make, data):
  tokenizer = make(some(PIECES[make], data))
  decode = functools.partial(decode_all, tokenizer)
  pieces = make_pieces(tokenizer, decode, V)
  ids = data.draw(st.lists(st.integers(0, V - 1), max_size=10))
  (found,) = pieces([ids], [ids], decode([ids]))
  reference = data.draw(st.text('ab é€.', max_size=6)) + 'b'
  for reward in KINDS:
    assert_sums(reward, found, reference)


decode_all, make_pieces = data.decode_all, data.make_pieces


def test_a_word_is_paid_by_the_token_that_completes_it():
  """'the' is two tokens; 'sat' is right until a token makes it 'satin'."""
  tail = [' cat', ' s', 'at', 'in', '.', '']
  found = deltas(potentials.rouge_l(COLUMN), ['th', 'e', *tail], 'the cat sat')
  values = np.cumsum(found)
  want = [0, 2 / 4, 4 / 5, 4 / 6, 6 / 6, 4 / 6, 4 / 6, 4 / 6]
  np.testing.assert_allclose(values, want, atol=1e-12)
  found = deltas(potentials.exact_prefix(COLUMN), ['t', 'h', 'x', 'e'], 'the')
  assert found == pytest.approx([1 / 3, 1 / 3, 0, 0])
  found = deltas(potentials.edit_distance(COLUMN), ['a', 'b', 'x', ''], 'ab')
  assert found == [0.5, 0.5, -0.5, 0]
  found = deltas(
    potentials.keyword_coverage(COLUMN), ['a c', 'at', 's', ' cat'], ['cat']
  )
  assert found == [0, 1, -1, 1]


def test_smoothed_bleu_by_hand():
  """One right word of two: BP exp(1 - 2), (2/2 1 1 1)^(1/4). Then both:
  (3/3 2/2 1 1)^(1/4). No text is 0, not what smoothing would make of it."""
  found = deltas(
    potentials.smoothed_bleu(COLUMN), ['', 'a', ' b', ' c', ''], 'a b'
  )
  third = ((3 / 4) * (2 / 3) * (1 / 2)) ** (1 / 4)
  want = [0, math.exp(-1), 1 - math.exp(-1), third - 1, 0]
  assert found == pytest.approx(want)


# letters, marks of several orders, signs with marks, and what is not seen
TYPES = st.text(
  'aE\u00e9\u0301\u0323\u0327\u00c7 =\u2260\u0338\u0928\u093f\u094d\uac01'
  '\u1100\u1161\u200d\u00ad_.\u212b\u05e9\u05bc\u05c1\ufe0f',
  max_size=12,
)
BY_WORDS = [KINDS[0], KINDS[-1]]


@settings(max_examples=150)
@given(TYPES, TYPES, st.sampled_from(['NFC', 'NFD']), st.data())
def test_canonically_equal_texts_are_paid_alike(text, word, form, data):
  """In any pieces; and rewards up to a token sum to the metric up to there."""
  reference, other = word + 'a', unicodedata.normalize(form, text)
  cuts = data.draw(st.sets(st.integers(0, len(other))))
  edges = [0, *sorted(cuts), len(other)]
  pieces = [other[i:j] for i, j in itertools.pairwise(edges)]
  for reward in BY_WORDS:
    want = outcome(reward, text, reference)
    hidden = other.replace('a', 'a\u200b')
    for one in (other, hidden):
      for ref in (reference, unicodedata.normalize(form, reference)):
        assert outcome(reward, one, ref) == pytest.approx(want, abs=1e-12)
    assert_sums(reward, pieces, reference)


@pytest.mark.parametrize('reward', BY_WORDS, ids=get_name)
def test_a_mark_is_a_part_of_its_word(reward):
  for text, reference, alike in (
    ('हानोदो', 'हिन्दी', False),
    ('हिन्दी', 'हिन्दी', True),
    ('नमस्ते', 'नमसत', False),
    ('e\u0301cole', '\u00e9cole', True),
    ('ecole', '\u00e9cole', False),
    ('a\u0323\u0302', '\u1ead', True),
    ('so\u00adft', 'soft', True),
    ('แมวนั่ง', 'แมว', False),
  ):
    assert (outcome(reward, text, reference) == 1) == alike, (text, reference)


def test_a_run_of_marks_takes_linear_time():
  for name in ('a\u0301', 'a\u0323\u0301'):
    counts = Counter()
    reader = counted('smoothed_bleu', name * 3, counts)
    text = name[0] + name[1:] * 400
    incremental.deltas_of(reader, list(text))
    assert counts['steps'] <= 2 * (incremental.MARKS + 2) * len(text)


def test_blank_references_do_not_apply():
  for name in ('smoothed_bleu', 'chrf', 'rouge_l'):
    assert outcome(FACTORIES[name](COLUMN), 'a', ' \n\u00a0') is None
  assert outcome(potentials.edit_distance(COLUMN), ' ', ' ') == 1


# --- cost --------------------------------------------------------------------


def counted(name: str, reference: str, counts: Counter):
  """Reader of a metric whose pushes, and whose n-grams or rows, are counted."""
  splitter, metric = {
    'smoothed_bleu': (incremental.WORDS, incremental.bleu_metric),
    'chrf': (incremental.VISIBLE, incremental.chrf_metric),
    'rouge_l': (incremental.ROUGE_WORDS, incremental.rouge_l_metric),
    'edit_distance': (incremental.CHARACTERS, incremental.edit_metric),
    'exact_prefix': (incremental.CHARACTERS, incremental.prefix_metric),
  }[name]

  def make(numbers):
    found = metric(numbers)

    def push(state, number):
      counts['pushes'] += 1
      return found.push(state, number)

    return found._replace(push=push)

  symbols = incremental.symbols_of(splitter, reference)
  reader = incremental.make_reader(splitter, symbols, make)

  class Trie(dict):
    def get(self, *args):
      counts['steps'] += 1
      return super().get(*args)

  return reader._replace(children=Trie(reader.children))


@pytest.mark.parametrize('name', BY_DEFINITION)
@pytest.mark.parametrize('kind', ['words', 'one word', 'marks'])
def test_the_work_is_linear_in_the_text(name, kind):
  """Counted: each character is looked up once, each symbol is pushed once, and
  a word that is being written once more for each of its tokens. Also for a
  text without an end of a word."""
  reference = 'the cat sat on a mat. ' * 3
  unit = {'words': 'the cat, on ', 'one word': 'thecaton', 'marks': '.,'}[kind]
  found = []
  for n in (20, 40, 400):
    counts = Counter()
    text = unit * n
    reader = counted(name, reference, counts)
    incremental.deltas_of(reader, list(text))
    assert counts['pushes'] <= 2 * len(text)
    assert counts['steps'] <= len(text)
    found.append((counts['pushes'] / n, counts['steps'] / n))
  np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=0.02)
  assert found[0][0] > 0 or (name, kind) == ('rouge_l', 'marks')


def test_one_push_of_bleu_looks_up_its_orders_at_most():
  """N-grams that one word ends, whatever came before."""
  seen = Counter()

  class Number(int):  # a word's number, whose hashes are those of its n-grams
    def __hash__(self):
      seen['hashes'] += 1
      return int(self)

  metric = incremental.bleu_metric([0, 1, 2, 0, 1, 2])
  state = metric.start
  for n in range(300):
    before = seen['hashes']
    state = metric.push(state, Number(n % 3))
    assert seen['hashes'] - before <= 1 + 2 + 3 + 4
  assert seen['hashes'] > 900


# --- the door ----------------------------------------------------------------


@pytest.mark.parametrize('name', FACTORIES)
def test_a_factory_gives_a_reward_function_and_its_outcome(name):
  reward = FACTORIES[name](COLUMN)
  check_functions({name: reward, 'sum': reward.outcome}, ['prompt', COLUMN])
  assert get_name(reward) == get_name(reward.outcome) == name
  alone = FACTORIES[name](COLUMN, split='outcome')
  message = [[{'role': 'assistant', 'content': 'the cat'}]]
  given = {COLUMN: ['the cat']}
  assert alone(completions=message, **given) == [pytest.approx(1, abs=1e-12)]
  assert not hasattr(alone, 'outcome')
  with pytest.raises(ValueError, match=f'{name} asks for target'):
    check_functions({name: FACTORIES[name]('target')}, ['prompt', COLUMN])
  with pytest.raises(ValueError, match=r"split='sum' of .* controls are --"):
    FACTORIES[name](split='sum')


@pytest.mark.parametrize('reward', KINDS, ids=get_name)
def test_nothing_to_compare_with_does_not_apply(reward):
  given = {COLUMN: [None, '', 'a']}
  found = reward(completion_pieces=[['a'], ['a'], ['a', '']], **given)
  assert found[:2] == [None, None]
  assert found[2] == [pytest.approx(1), 0]
  found = reward.outcome(completions=['a', 'a', ''], **given)
  assert found == [None, None, 0]
  assert deltas(reward, [], 'a') == []


@pytest.mark.parametrize('reward', KINDS, ids=get_name)
@pytest.mark.parametrize('value', [{'a': 1}, [['a']], [None], [{}, 'a']])
def test_a_column_without_text_is_named(reward, value):
  with pytest.raises(ValueError, match=f'column {COLUMN} holds') as e:
    outcome(reward, 'a', value)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('reward', KINDS, ids=get_name)
@pytest.mark.parametrize('value', [5, [5], ['5'], np.array([5])])
def test_numbers_and_lists_of_one_are_texts(reward, value):
  assert outcome(reward, '5', value) == outcome(reward, '5', '5') == 1


def test_orders_and_beta_are_sacrebleus():
  chrf = potentials.chrf(COLUMN, order=3, beta=1)
  other = CHRF(char_order=3, beta=1)
  for text, reference in random_pairs(50):
    want = other.sentence_score(text, [reference]).score / 100
    assert outcome(chrf, text, reference) == pytest.approx(want, abs=1e-9)
  one = potentials.smoothed_bleu(COLUMN, order=1)
  assert outcome(one, 'a x', 'a b') == pytest.approx(2 / 3)
  for factory in (potentials.smoothed_bleu, potentials.chrf):
    with pytest.raises(ValueError, match=r'order=0 of .* give 1 or more'):
      factory(order=0)


def test_lists_are_of_keywords_alone():
  with pytest.raises(ValueError, match='give one reference for each prompt'):
    outcome(potentials.smoothed_bleu(COLUMN), 'a', ['a', 'b'])
  reward = potentials.keyword_coverage(COLUMN)
  assert outcome(reward, 'a', []) is None
  with pytest.raises(ValueError, match='a keyword without letters or digits'):
    outcome(reward, 'a', ['a', '...'])
