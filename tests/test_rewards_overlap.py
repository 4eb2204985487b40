"""Overlap with references: equality with the libraries, and values by hand."""

import math
import random

import pytest
import sacrebleu
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer

from jaxrl_tok import rewards
from jaxrl_tok.rewards.meteor import align
from jaxrl_tok.rewards.text import words_of

WORDS = (
  'the cat sat on a mat and saw running runs dogs , . ! naïve Ünïted 猫 が '
  "it's 3.5 e-mail 👩‍🚀 x"
)
VOCABULARY = WORDS.split()


def random_pairs(n: int, seed: int = 0) -> list[tuple[str, str]]:
  """Pairs of a text and a reference: both random, or one an edit of the other;
  empty texts, single tokens and repeated n-grams among them."""
  rng = random.Random(seed)
  fixed = ['', ' ', 'cat', '猫', 'the the the the the', 'a b a b a b a b', '.']
  pairs = [(a, b) for a in fixed for b in fixed]
  while len(pairs) < n:
    few = rng.sample(VOCABULARY, rng.randint(1, len(VOCABULARY)))
    reference = rng.choices(few, k=rng.randint(1, 24))
    text = rng.choices(few, k=rng.randint(0, 24))
    if rng.random() < 0.7:
      text = [w for w in reference if rng.random() < 0.8]
      at = rng.randint(0, len(text))
      text[at:at] = rng.choices(VOCABULARY, k=rng.randint(0, 3))
      if rng.random() < 0.3:
        text = text[at:] + text[:at]
    pairs.append((' '.join(text), ' '.join(reference)))
  return pairs


PAIRS = random_pairs(1000)
TEXTS, REFERENCES = map(list, zip(*PAIRS))


def values(reward, texts=TEXTS, references=REFERENCES) -> list:
  return reward(completions=texts, reference=references)


@pytest.mark.parametrize('settings', [{}, {'lowercase': True}])
def test_bleu_is_sacrebleus(settings):
  want = [
    sacrebleu.sentence_bleu(t, [r], use_effective_order=True, **settings).score
    for t, r in PAIRS
  ]
  assert values(rewards.bleu(**settings)) == [x / 100 for x in want]
  assert len(set(want)) > 500


@pytest.mark.parametrize('settings', [{}, {'word_order': 2}])
def test_chrf_is_sacrebleus(settings):
  want = [sacrebleu.sentence_chrf(t, [r], **settings).score for t, r in PAIRS]
  assert values(rewards.chrf(**settings)) == [x / 100 for x in want]


def test_ter_is_sacrebleus():
  want = [sacrebleu.sentence_ter(t, [r]).score for t, r in PAIRS]
  assert values(rewards.ter()) == [1 - x / 100 for x in want]


@pytest.mark.parametrize('kind', ['rouge1', 'rouge2', 'rougeL', 'rougeLsum'])
@pytest.mark.parametrize('stem', [False, True])
def test_rouge_is_rouge_scores(kind, stem):
  scorer = RougeScorer([kind], use_stemmer=stem)
  want = [scorer.score(r, t)[kind].fmeasure for t, r in PAIRS]
  assert values(rewards.rouge(kind=kind, stem=stem)) == want


def test_several_references_are_the_librarys_too():
  pairs = [(t, [r, s]) for (t, r), s in zip(PAIRS[100:300], REFERENCES[500:])]
  texts, references = map(list, zip(*pairs))
  want = [
    sacrebleu.sentence_bleu(t, r, use_effective_order=True).score / 100
    for t, r in pairs
  ]
  assert values(rewards.bleu(), texts, references) == want
  scorer = RougeScorer(['rougeL'])
  want = [scorer.score_multi(r, t)['rougeL'].fmeasure for t, r in pairs]
  assert values(rewards.rouge(), texts, references) == want


@pytest.mark.parametrize(
  ('metric', 'library', 'name'),
  [
    (rewards.corpus_bleu, sacrebleu.corpus_bleu, 'bleu'),
    (rewards.corpus_chrf, sacrebleu.corpus_chrf, 'chrf'),
    (rewards.corpus_ter, sacrebleu.corpus_ter, 'ter'),
  ],
)
def test_metrics_of_a_corpus_are_sacrebleus(metric, library, name):
  own, texts, one = metric(), TEXTS[:300], REFERENCES[:300]
  assert values(own, texts, one) == {name: library(texts, [one]).score}
  assert own.signature.startswith('nrefs:1|')
  # rows without a reference are left out, others have one or two
  many = [[r] if b % 2 else [r, 'a cat'] for b, r in enumerate(one)]
  found = values(own, [*texts, 'lost'], [*many, None])
  two = [None if b % 2 else 'a cat' for b in range(len(many))]
  assert found == {name: library(texts, [one, two]).score}
  assert own.signature.startswith('nrefs:var|')
  with pytest.raises(ValueError, match='no completion has a reference'):
    values(own, ['a'], [None])
  # it is a function of sums, which a bootstrap resamples
  few, refs = [*texts[:20], 'lost'], [*many[:20], None]
  rows, compute = own.statistics(few, reference=refs)
  assert rows[-1] is None
  sums = [sum(column) for column in zip(*rows[:-1])]
  assert compute(sums) == pytest.approx(values(own, few, refs))


def test_signatures_say_which_metric_it_is():
  version = sacrebleu.__version__
  assert rewards.bleu().signature == (
    f'case:mixed|eff:yes|tok:13a|smooth:exp|version:{version}'
  )
  assert 'tok:char' in rewards.corpus_bleu(tokenize='char').signature
  assert 'nw:2' in rewards.chrf(word_order=2).signature


def test_rouge_of_a_corpus_is_the_mean():
  scorer = RougeScorer(['rouge1', 'rouge2', 'rougeL'])
  found = [scorer.score(r, t) for t, r in PAIRS]
  for name, value in values(rewards.corpus_rouge()).items():
    assert value == [row[name].fmeasure for row in found]
  assert rewards.corpus_rouge()(['a'], reference=[None])['rouge1'] == [None]


def test_rouge_of_other_scripts_needs_a_split():
  pair = ['кошка спит'], ['кошка ест']
  assert values(rewards.rouge(), *pair) == [0.0]
  assert values(rewards.rouge(split=words_of), *pair) == [0.5]


def test_values_by_hand():
  # 3 of 4 words, 1 of 3 pairs, 0 of 2 (one half), 0 of 1 (one quarter)
  pair = ['a cat sat here'], ['a cat is here']
  want = (3 / 4 * 1 / 3 * (0.5 / 2) * (0.25 / 1)) ** 0.25
  assert values(rewards.bleu(), *pair)[0] == pytest.approx(want)
  assert values(rewards.ter(), *pair) == [0.75]
  assert values(rewards.rouge(), *pair) == [0.75]
  short = values(rewards.bleu(), ['a cat'], ['a cat sat here'])[0]
  assert short == pytest.approx(math.exp(1 - 4 / 2))  # the brevity penalty
  assert values(rewards.ter(), ['x y z'], ['a']) == [-2.0]


@pytest.mark.parametrize(
  ('make', 'says'),
  [
    (lambda: rewards.bleu(tokenize='none such'), 'BLEU of sacrebleu does not'),
    (lambda: rewards.bleu(smooth='exp'), 'arguments of sacrebleu.metrics.BLEU'),
    (lambda: rewards.corpus_chrf(order=3), 'CHRF of sacrebleu does not take'),
    (lambda: rewards.rouge(kind='rouge'), 'rouge is no ROUGE; pass one of'),
    (lambda: rewards.rouge(kind='rouge0'), 'rouge0 is no ROUGE'),
  ],
)
def test_settings_that_a_library_lacks_are_one_line(make, says):
  with pytest.raises(ValueError, match=r'sacrebleu|ROUGE') as e:
    make()
  assert says in str(e.value)
  assert '\n' not in str(e.value)


def test_self_bleu_compares_samples_of_a_prompt():
  self_bleu = rewards.self_bleu()
  texts = ['a cat sat', 'a cat sat', 'no dog', 'one', 'a b c d', 'a b c e']
  found = self_bleu(['p', 'p', 'p', 'q', 'r', 'r'], texts)
  assert found[:2] == pytest.approx([100, 100])
  assert found[3] is None
  assert found[4] == sacrebleu.sentence_bleu(texts[4], [texts[5]]).score
  assert found[2] == 0 < found[4] < 100


# --- meteor


class NoSynonyms:
  """WordNet without a word."""

  def synsets(self, word):
    return []


def nltks(text: str, reference: str) -> float:
  return single_meteor_score(
    words_of(reference), words_of(text), wordnet=NoSynonyms()
  )


def test_meteor_is_nltks_without_its_wordnet():
  """Equal where no stem occurs twice, so that there is one alignment."""
  own, rng = rewards.meteor_without_synonyms(), random.Random(1)
  forms = [
    ('run', 'runs', 'running'), ('cat', 'Cats'), ('naïve',), ('猫',), ('jump',
    'jumped'), ('nation', 'national'), ('x',), ("it's",), ('über',), ('eat',),
  ]  # fmt: skip
  for _ in range(1000):
    text, reference = (
      ' '.join(map(rng.choice, rng.sample(forms, rng.randint(0, len(forms)))))
      for _ in range(2)
    )
    found = values(own, [text], [reference])[0]
    assert found == pytest.approx(nltks(text, reference), abs=1e-12)


def test_meteor_makes_no_more_chunks_than_nltks_pairs():
  """Its alignment has as many matches, in runs as long as there are."""
  own = values(rewards.meteor_without_synonyms())
  theirs = [nltks(t, r) for t, r in PAIRS]
  assert all(a >= b - 1e-12 for a, b in zip(own, theirs))
  assert sum(a > b + 1e-12 for a, b in zip(own, theirs)) > 100


def test_meteor_by_hand():
  own = rewards.meteor_without_synonyms()
  # 4 of 6 words match, in 3 chunks: the cat, on, mat
  found = values(own, ['the cat sat on a mat'], ['the cat is on the mat'])[0]
  p = r = 4 / 6
  mean = p * r / (0.9 * p + 0.1 * r)
  assert found == pytest.approx(mean * (1 - 0.5 * (3 / 4) ** 3))
  assert values(own, ['runs'], ['running']) == [0.5]  # one chunk of one match
  assert values(own, ['x'], [['y', 'x']]) == [0.5]
  assert values(own, [''], ['a']) == [0.0]


def test_alignment_takes_the_longest_runs_first():
  assert align(list('abxab'), list('ab')) == [(0, 0), (1, 1)]
  assert align(list('cabc'), list('abc')) == [(1, 0), (2, 1), (3, 2)]
  assert align(list('aa'), list('aaa')) == [(0, 0), (1, 1)]
  assert align([], ['a']) == []


@pytest.mark.parametrize('seed', range(5))
def test_alignment_pairs_as_many_words_as_there_are(seed):
  rng = random.Random(seed)
  a, b = (rng.choices('abc', k=rng.randint(0, 12)) for _ in range(2))
  pairs = align(a, b)
  assert all(a[i] == b[j] for i, j in pairs)
  assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
  assert len(pairs) == sum(min(a.count(w), b.count(w)) for w in 'abc')
