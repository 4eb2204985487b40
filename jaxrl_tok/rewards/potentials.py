"""Dense credit by potentials: metrics of text, paid token by token.

  r_t = phi(y_<=t) - phi(y_<t),   phi of no text = 0

phi is a metric of the text so far, so that the rewards of a completion sum to
its value for the whole text: with gamma 1 the best policy and the expected
gradient are those of the outcome (Ng et al., ICML 1999; for sequences Bahdanau
et al., arXiv:1607.07086). Only credit and variance differ. With a gamma below 1
early credit weighs more, and that is another objective.

  smoothed_bleu(column)      sentence BLEU of words, one added to every order
  chrf(column)               chrF2 of characters, rewards.chrf's
  rouge_l(column)            F1 of the longest common subsequence, rouge's
  edit_distance(column)      1 - edits / characters of the reference
  keyword_coverage(column)   share of keywords that the text holds
  exact_prefix(column)       share of the reference that the text begins with

Each returns a reward function with a list of floats for each completion; its
`.outcome`, or split='outcome', is the function of one float that they sum to:

  Task('pairs.jsonl', potentials.smoothed_bleu('target'),
       eval_rewards=potentials.smoothed_bleu('target').outcome)

A completion is None (does not apply) where its reference is None or empty, or
has only spaces and the metric reads none.

Tokens are not words. A word that is still being written counts as it stands:
'th' of 'the' is a word without a match, and the token that completes 'the' is
paid for the match; a character goes to the token with its last byte, and the
end token adds no text and gets 0. To pay a word's own token once its end is
known would make a reward depend on later tokens, and the expected gradient of
rewards-to-go another one.

Texts are read once, from left to right (incremental.py), so that the work is
linear in their length: a row of the table for each symbol for ROUGE-L and edit
distance, held as bits of an integer, a few n-grams for BLEU and chrF. Words are
alike where Unicode calls them canonically equal (NFC and NFD), and characters
that are not seen (zero width, soft hyphens) do not divide them; rouge_l, whose
words are ASCII, and the metrics of characters read texts as they are.
"""

import functools
from collections.abc import Callable, Sequence

from jaxrl_tok.rewards.adapters import get_text
from jaxrl_tok.rewards.build import as_texts, named
from jaxrl_tok.rewards.functions import PIECES, shorten
from jaxrl_tok.rewards.incremental import (
  CHARACTERS,
  KEYWORDS,
  ROUGE_WORDS,
  VISIBLE,
  WORDS,
  Metric,
  Reader,
  Splitter,
  bleu_metric,
  chrf_metric,
  coverage_metric,
  deltas_of,
  edit_metric,
  make_reader,
  outcome_of,
  prefix_metric,
  rouge_l_metric,
  symbols_of,
)


def _reward(name: str, column: str, split: str, make: Callable) -> Callable:
  """Reward function of a potential; `make`, texts of the column -> Reader, or
  None without symbols."""
  if split not in ('potential', 'outcome'):
    raise ValueError(
      f'split={split!r} of {name} is neither potential nor outcome; the '
      'controls are --credit_split'
    )

  def readers(values: Sequence) -> list:
    keys = [tuple(as_texts(() if v is None else v, column)) for v in values]
    known = {key: make(key) if any(key) else None for key in set(keys)}
    return [known[key] for key in keys]

  def potential(completion_pieces, **columns) -> list:
    found = readers(columns[column])
    return [r and deltas_of(r, p) for r, p in zip(found, completion_pieces)]

  def outcome(completions, **columns) -> list:
    found = readers(columns[column])
    return [
      r and outcome_of(r, get_text(c)) for r, c in zip(found, completions)
    ]

  named(potential, name, [PIECES, column])
  potential.outcome = named(outcome, name, ['completions', column])
  return outcome if split == 'outcome' else potential


def _check_order(name: str, order: int) -> None:
  """Refuses an order of n-grams below 1."""
  if order < 1:
    raise ValueError(f'order={order} of {name} has no n-grams; give 1 or more')


def _of_text(name, column, split, splitter: Splitter, metric: Callable):
  """Reward function of a metric that compares with one text."""

  def make(texts: tuple) -> Reader | None:
    if len(texts) > 1:
      raise ValueError(
        f'the column {column} of reward {name} holds a list of '
        f'{len(texts)} texts; give one reference for each prompt'
      )
    symbols = symbols_of(splitter, *texts)
    if not symbols and not texts[0].strip():
      return None
    return make_reader(splitter, symbols, metric)

  return _reward(name, column, split, make)


def smoothed_bleu(
  column: str = 'reference', order: int = 4, split: str = 'potential'
) -> Callable:
  """Reward: smoothed sentence BLEU, after Bahdanau et al., arXiv:1607.07086.

    min(1, exp(1 - |ref| / t)) (prod_n (m_n + 1) / (c_n + 1))^(1/4)

  for a text of t words, m_n of whose c_n n-grams are in the reference, n = 1 ..
  4, each counted as often as there. Range 0 (no text) to 1. One is added for
  every order, so that a single right word is rewarded; sacrebleu's add-k leaves
  n = 1 out, and its numbers are others.

  Words are runs of letters with their combining marks, digits and _, or one
  punctuation mark; case counts.

  Failure modes: smoothing pays text without a match, the more the shorter the
  reference is (one wrong word for a reference of one: 0.84); a synonym counts
  as wrong; a policy learns the reference's commonest n-grams first.

  Args:
    column: of the data, one reference text for each prompt.
    order: longest n-grams.
    split: 'potential', a float for each token, or 'outcome', their sum.
  """
  _check_order('smoothed_bleu', order)
  metric = functools.partial(bleu_metric, order=order)
  return _of_text('smoothed_bleu', column, split, WORDS, metric)


def chrf(
  column: str = 'reference',
  order: int = 6,
  beta: float = 2.0,
  split: str = 'potential',
) -> Callable:
  """Reward: chrF2 of a sentence, sacrebleu's divided by 100; Popović, WMT 2015.

    (1 + beta^2) P Q / (beta^2 P + Q)

  P and Q are the precision and recall of character n-grams without spaces, each
  the mean over the orders 1 .. 6 that text and reference both have. Range 0 to
  1. Case counts.

  Failure modes: letters of a wrong word earn something (about 0.2 for random
  English); recall counts four times, so that longer text is better until it is
  about twice too long; spaces count nothing.

  Args:
    column: of the data, one reference text for each prompt.
    order: longest n-grams.
    beta: weight of recall.
    split: 'potential', a float for each token, or 'outcome', their sum.
  """
  _check_order('chrf', order)
  metric = functools.partial(chrf_metric, order=order, beta=beta)
  return _of_text('chrf', column, split, VISIBLE, metric)


def rouge_l(column: str = 'reference', split: str = 'potential') -> Callable:
  """Reward: ROUGE-L of a sentence, the F1 of rouge-score; Lin, 2004.

    2 P Q / (P + Q),  P = LCS / words of the text,  Q = LCS / words of the
    reference

  LCS is the length of the longest common subsequence of words, which are runs
  of a-z and 0-9 after lower-casing, not stemmed. Range 0 to 1.

  Failure modes: letters outside a-z are spaces, so that texts in other scripts
  are 0; word order counts, meaning does not; the common words of a language
  earn something in any order that they share.

  Args:
    column: of the data, one reference text for each prompt.
    split: 'potential', a float for each token, or 'outcome', their sum.
  """
  return _of_text('rouge_l', column, split, ROUGE_WORDS, rouge_l_metric)


def edit_distance(
  column: str = 'reference', split: str = 'potential'
) -> Callable:
  """Reward: 1 - CER, the character error rate; Levenshtein, 1966.

    1 - (insertions + deletions + substitutions) / characters of the reference

  1 is the reference itself, 0 no text at all, and longer text is negative
  without a bound. A right character earns 1 / |ref|, a surplus one costs it.

  Failure modes: a policy that is often wrong learns to stop at once, for 0 is
  more than a long wrong text; clip it, or warm-start the policy.

  Args:
    column: of the data, one reference text for each prompt.
    split: 'potential', a float for each token, or 'outcome', their sum.
  """
  return _of_text('edit_distance', column, split, CHARACTERS, edit_metric)


def exact_prefix(
  column: str = 'reference', split: str = 'potential'
) -> Callable:
  """Reward: share of the reference's characters that the text begins with.

    length of the common prefix / |ref|

  Range 0 to 1. The first wrong character ends it; text after the whole
  reference costs nothing.

  Failure modes: a policy may go on after the reference (add exact_match); early
  tokens are learnt long before later ones.

  Args:
    column: of the data, one reference text for each prompt.
    split: 'potential', a float for each token, or 'outcome', their sum.
  """
  return _of_text('exact_prefix', column, split, CHARACTERS, prefix_metric)


def keyword_coverage(
  column: str = 'keywords', split: str = 'potential'
) -> Callable:
  """Reward: share of the keywords that a text holds, 0 to 1.

  A keyword is one word or several in a row. Words are runs of letters with
  their combining marks, digits and _; case does not count. The token that
  completes a keyword is paid, and pays back where it goes on ('cat' in 'cats').

  Failure modes: a list of the keywords alone is right; so is a text that denies
  them. Add a reward of form.

  Args:
    column: of the data, a list of keywords, or one, for each prompt.
    split: 'potential', a float for each token, or 'outcome', their sum.
  """

  def make(texts: tuple) -> Reader:
    phrases = [symbols_of(KEYWORDS, text) for text in texts]
    if not all(phrases):
      raise ValueError(
        f'the column {column} of reward keyword_coverage has a keyword without '
        f'letters or digits in {shorten(repr(list(texts)))}; leave it out'
      )

    def metric(numbers: list) -> Metric:
      left = iter(numbers)
      own = [tuple(next(left) for _ in phrase) for phrase in phrases]
      return coverage_metric(list(dict.fromkeys(own)))

    return make_reader(KEYWORDS, [w for p in phrases for w in p], metric)

  return _reward('keyword_coverage', column, split, make)
