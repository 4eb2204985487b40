"""Overlap with references: rewards, and metrics of a whole data set.

  bleu chrf ter                    rewards, of sacrebleu
  rouge                            reward, of rouge-score
  corpus_bleu corpus_chrf          metrics, 0 to 100, with their signature
  corpus_ter corpus_rouge
  self_bleu                        metric, how alike a prompt's completions are

References are a column of the data: a text, or a list of several. A reward does
not apply to a completion without a reference.

Every overlap with a reference can be raised by words that are likely in any
reference, and none of them knows whether a sentence is true or well formed:
evaluate with a metric that is not the reward.
"""

import itertools
from collections.abc import Callable

from jaxrl_tok.rewards.adapters import get_text
from jaxrl_tok.rewards.build import (
  as_texts,
  named,
  need,
  reward_of_text,
)

# --- sacrebleu


# whatever sacrebleu raises for settings that it does not know
SETTINGS_ERRORS = (
  TypeError,
  KeyError,
  AssertionError,
  ImportError,
  RuntimeError,
)


def _metric(kind: str, settings: dict):
  """Metric BLEU, CHRF or TER of sacrebleu. Raises ValueError."""
  make = getattr(need('sacrebleu.metrics', 'sacrebleu'), kind)
  try:
    return make(**settings)
  except SETTINGS_ERRORS as e:
    said = ' '.join(str(e).split())
    raise ValueError(
      f'{kind} of sacrebleu does not take {settings} ({said}); give arguments '
      f'of sacrebleu.metrics.{kind}'
    ) from None


def _signature(metric) -> str:
  """Signature of a metric before it has seen data: without nrefs."""
  metric.num_refs = -1
  items = str(metric.get_signature()).split('|')
  return '|'.join(item for item in items if not item.startswith('nrefs'))


def _sentence(name: str, kind: str, column: str, settings: dict, scale):
  """Reward: scale(sacrebleu's score of one sentence)."""
  metric = _metric(kind, settings)

  def score(text: str, value) -> float | None:
    references = as_texts(value, column)
    if not references:
      return None
    return scale(metric.sentence_score(text, references).score)

  reward = reward_of_text(name, score, column)
  reward.signature = _signature(metric)
  return reward


def bleu(column: str = 'reference', **settings) -> Callable:
  """Reward: sentence BLEU, 0 to 1; Papineni et al., ACL 2002.

    min(1, exp(1 - |ref| / |text|)) (p_1 p_2 p_3 p_4)^(1/4),
    p_n the share of the text's n-grams that a reference has

  sacrebleu's with `effective_order`, so that short texts need no four-grams,
  and smoothing 'exp': the k-th order without a match counts as 1 / 2^k matches.
  `.signature` says which BLEU it is (arXiv:1804.08771).

  A text of the reference's most frequent words scores more than 0; half a
  sentence word for word scores more than all of it in other words.

  Args:
    column: column of the data with a reference, or a list of them.
    settings: of sacrebleu.metrics.BLEU, as lowercase=True, tokenize='char'.
  """
  settings = {'effective_order': True, **settings}
  return _sentence('bleu', 'BLEU', column, settings, lambda x: x / 100)


def chrf(column: str = 'reference', **settings) -> Callable:
  """Reward: chrF, the F-score of character 1- to 6-grams, 0 to 1; Popovic, WMT
  2015.

    5 P R / (4 P + R),  P and R means over n; recall counts twice

  It gives credit for parts of words, so that it falls off less steeply than
  BLEU, and needs no word boundaries. A long text is punished little: combine
  it with `length`.

  Args:
    column: column of the data with a reference, or a list of them.
    settings: of sacrebleu.metrics.CHRF; word_order=2 is chrF++.
  """
  return _sentence('chrf', 'CHRF', column, settings, lambda x: x / 100)


def ter(column: str = 'reference', **settings) -> Callable:
  """Reward: 1 - TER, the edits (insertions, deletions, substitutions, moves of
  a run of words) that turn the text into a reference, for each of its words;
  Snover et al., AMTA 2006.

  1 is a reference, 0 an empty text, and there is no least value: a long text
  needs more edits than the reference has words. It is slow: 64 words that are
  all wrong take a quarter of a second, where BLEU takes a thousandth.

  Args:
    column: column of the data with a reference, or a list of them.
    settings: of sacrebleu.metrics.TER, as case_sensitive=True.
  """
  return _sentence('ter', 'TER', column, settings, lambda x: 1 - x / 100)


def _corpus(name: str, kind: str, column: str, settings: dict) -> Callable:
  """Metric: sacrebleu's score of all completions together."""
  metric = _metric(kind, settings)

  def corpus(completions, **given) -> dict[str, float]:
    texts, references = _aligned(completions, given[column], column)
    value = metric.corpus_score(texts, references).score
    corpus.signature = str(metric.get_signature())
    return {name: value}

  def statistics(completions, **given) -> tuple:
    texts, references = _aligned(completions, given[column], column)
    found = iter(metric._extract_corpus_statistics(texts, references))
    rows = [
      None if v is None or not as_texts(v, column) else next(found)
      for v in given[column]
    ]
    return rows, lambda sums: {
      name: metric._aggregate_and_compute([sums]).score
    }

  corpus.signature = _signature(metric)
  asked = ['completions', column]
  corpus.statistics = named(statistics, f'corpus_{name}', asked)
  return named(corpus, f'corpus_{name}', asked)


def _aligned(completions, values, column: str) -> tuple[list, list]:
  """(texts, first references of all, second ones, ...) as sacrebleu takes them,
  of the completions that have references. Raises ValueError where none has."""
  texts, references = _with_references(completions, values, column)
  most = max(map(len, references))
  padded = (row + [None] * (most - len(row)) for row in references)
  return texts, list(zip(*padded))


def _with_references(completions, values, column: str):
  """(texts, lists of references) of the completions that have references.
  Raises ValueError where none has."""
  rows = [
    (get_text(c), as_texts(v, column))
    for c, v in zip(completions, values)
    if v is not None
  ]
  rows = [row for row in rows if row[1]]
  if not rows:
    raise ValueError(
      f'no completion has a reference in column {column}; name a column that '
      'is filled'
    )
  return tuple(map(list, zip(*rows)))


def corpus_bleu(column: str = 'reference', **settings) -> Callable:
  """Metric 'bleu': BLEU of all completions together, 0 to 100: n-grams are
  counted over the whole data set. Its `.signature` belongs beside the number.
  Arguments are those of `bleu`."""
  return _corpus('bleu', 'BLEU', column, settings)


def corpus_chrf(column: str = 'reference', **settings) -> Callable:
  """Metric 'chrf': chrF of all completions together, 0 to 100, with a
  `.signature`. Arguments are those of `chrf`."""
  return _corpus('chrf', 'CHRF', column, settings)


def corpus_ter(column: str = 'reference', **settings) -> Callable:
  """Metric 'ter': edits of all completions for 100 words of the references,
  with a `.signature`; less is better. Arguments are those of `ter`."""
  return _corpus('ter', 'TER', column, settings)


def self_bleu(**settings) -> Callable:
  """Metric 'self_bleu': BLEU of each completion against the other completions
  of its prompt, 0 to 100; None of a single one. arXiv:1802.01886.

  100: all samples of a prompt are one text. It says nothing of prompts whose
  completions are like each other's; `distinct` does. Compare it between equal
  numbers of samples only: more references match more.

  Args:
    settings: of sacrebleu.metrics.BLEU, as lowercase=True.
  """
  metric = _metric('BLEU', {'effective_order': True, **settings})

  def self_bleu(prompts, completions) -> list[float | None]:
    texts, found = list(map(get_text, completions)), []
    for _, group in itertools.groupby(range(len(texts)), prompts.__getitem__):
      rows = list(group)
      for b in rows:
        others = [texts[i] for i in rows if i != b]
        found.append(
          metric.sentence_score(texts[b], others).score if others else None
        )
    return found

  self_bleu.signature = _signature(metric)
  return self_bleu


# --- rouge


class _Split:
  """Tokenizer of rouge-score, of a function text -> words."""

  def __init__(self, split: Callable):
    self.tokenize = split


KINDS = tuple(f'rouge{k}' for k in (*range(1, 10), 'L', 'Lsum'))


def _rouge(kinds: tuple, stem: bool, split: Callable | None) -> Callable:
  """(text, references) -> {kind: F of the best reference}."""
  for kind in kinds:
    if kind not in KINDS:
      raise ValueError(f'{kind} is no ROUGE; pass one of {", ".join(KINDS)}')
  module = need('rouge_score.rouge_scorer', 'rouge-score')
  scorer = module.RougeScorer(
    list(kinds), use_stemmer=stem, tokenizer=split and _Split(split)
  )

  def score(text: str, references: list[str]) -> dict[str, float]:
    found = scorer.score_multi(references, text)
    return {kind: float(value.fmeasure) for kind, value in found.items()}

  return score


def rouge(
  column: str = 'reference',
  kind: str = 'rougeL',
  stem: bool = False,
  split: Callable | None = None,
) -> Callable:
  """Reward: ROUGE, 0 to 1, the F-score of words in common with a reference, the
  best one of several; Lin, 2004. It is rouge-score's.

    2 P R / (P + R);  rougeN counts n-grams, rougeL the longest common
    subsequence, rougeLsum that of each line

  rouge-score's words are runs of a-z and 0-9: text in other scripts has none
  and scores 0; pass split=rewards.words_of for it. Time and memory of rougeL
  grow with the product of both lengths: 3,500 words against 3,500 take 2.5 s
  and 260 MB. `potentials.rouge_l(split='outcome')` is rougeL of one reference
  at a hundredth of that.

  Args:
    column: column of the data with a reference, or a list of them.
    kind: 'rouge1' to 'rouge9', 'rougeL' or 'rougeLsum'.
    stem: takes the endings of words away (Porter).
    split: text -> words; None: rouge-score's.
  """
  score = _rouge((kind,), stem, split)

  def best(text: str, value) -> float | None:
    references = as_texts(value, column)
    return score(text, references)[kind] if references else None

  return reward_of_text(kind, best, column)


def corpus_rouge(
  column: str = 'reference',
  stem: bool = False,
  split: Callable | None = None,
) -> Callable:
  """Metrics 'rouge1', 'rouge2', 'rougeL': a value for each completion, 0 to 1,
  None without a reference; their means are the corpus's. Arguments are those of
  `rouge`."""
  kinds = 'rouge1', 'rouge2', 'rougeL'
  score = _rouge(kinds, stem, split)

  def corpus(completions, **given) -> dict[str, list]:
    texts = [
      (get_text(c), [] if v is None else as_texts(v, column))
      for c, v in zip(completions, given[column])
    ]
    found = [score(*pair) if pair[1] else {} for pair in texts]
    return {k: [row.get(k) for row in found] for k in kinds}

  return named(corpus, 'corpus_rouge', ['completions', column])
