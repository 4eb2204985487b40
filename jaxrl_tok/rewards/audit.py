"""Audit of completions: numbers that are never optimised, beside a reward that
is.

A policy that has found a flaw of its reward shows it elsewhere: completions
become alike, longer, copies of the prompt. Every evaluation logs

  audit/words          words of a completion, mean
  audit/repetition     share of a completion's word pairs that it said before
  audit/copied         share of its runs of 4 words that the prompt has
  audit/distinct_2     different word pairs over all completions, a share
  audit/refusals       share of completions that decline to answer
  audit/profanity      share that say a swear word
  audit/personal_data  share with an address, a number of a card, ...

The report draws each against the reward. Words are those of Latin letters and
digits, in which text without spaces is one word; compare distinct_2 between
evaluations of one data set only.
"""

from jaxrl_tok.rewards.gates import no_refusal, personal_data, profanity
from jaxrl_tok.rewards.text import distinct, no_repetition, words_of
from jaxrl_tok.rewards.wording import no_copy

AUDIT = 'audit'  # first word of the names


def mean(values: list[float]) -> float:
  """Mean; 0 of none."""
  return sum(values) / len(values) if values else 0.0


def audit(prompts, completions) -> dict[str, float]:
  """Metric: the audit of all completions, see the module's docstring."""
  words = [words_of(text) for text in completions]
  spoken = [text for text, said in zip(completions, words) if len(said) > 1]
  found = {
    'words': mean([float(len(said)) for said in words]),
    'repetition': 1 - mean(no_repetition(spoken)) if spoken else 0.0,
    'copied': 1 - mean(no_copy()(completions=completions, prompts=prompts)),
    'distinct_2': distinct(completions)['distinct_2'],
    'refusals': 1 - mean(no_refusal()(completions)),
    'profanity': 1 - mean(profanity()(completions)),
    'personal_data': 1 - mean(personal_data()(completions)),
  }
  return {f'{AUDIT}/{name}': value for name, value in found.items()}
