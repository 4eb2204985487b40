"""REINFORCE on tokens corrects spelling, paid character by character.

  python -m experiments.spelling
  python -m experiments.spelling --credit_split outcome
  python -m experiments.spelling --reward chrf --text book.txt --words 500

Bahdanau et al. (arXiv:1607.07086): a text of 10 characters, each replaced by
another with probability 0.3, is to be written as it was. Texts are parts of
English phrases: runs of the 50 commonest words of the language reference that
is installed with Python (pydoc_data.topics). Each token is paid by how much it
raises 1 - CER, the share of characters that are right
(rewards.potentials.edit_distance); --credit_split gives the field's controls,
and experiments.studies.credit compares them.

A tiny decoder is warm-started by supervision until 75 % of the characters of
held-out prompts are right; a copy of the prompt has 70 %. Held-out prompts are
noise never seen, of texts that training has; `eval/unseen/...` are of other
texts.

On 2 CPU cores: about a minute, the first compilation included. CER, and in
brackets the share of texts that are wholly right, before and after, with seeds
0, 1 and 2:

  held-out       23.4 to 20.6 %   24.4 to 22.0 %   23.8 to 20.8 %
                 (36 to 34)       (38 to 32)       (40 to 32)
  unseen texts   26.3 to 23.8 %   27.8 to 22.2 %   28.4 to 22.9 %
                 (30 to 29)       (30 to 30)       (30 to 27)

A policy games the reward by copying: a character of the prompt is right in 70
of 100 cases, so that a policy that is not sure of a word copies it. CER falls,
and the share of texts that are wholly right, which no reward sees, falls too;
at --learning_rate 2e-3 from 37 to 14 %, and CER then does not fall either
(seeds 5 and 6). A start at 65 % of the characters only ever learns to copy
(CER 30 % after 200 steps of 64 x 4 at 1e-3, entropy 0.06). With all words in
place of 50, 500 supervised steps do no better than a copy.
"""

import collections
import itertools
import random
import re
from pathlib import Path
from typing import Literal

from jaxrl_tok import Evaluation, Task, main
from jaxrl_tok.data import check_counts

LETTERS = 'abcdefghijklmnopqrstuvwxyz '
END_OF_PROMPT = '>'
SETTINGS = {
  'max_steps': 200,
  'num_prompts': 16,
  'num_generations': 4,
  'learning_rate': 5e-4,
  'lr_schedule': 'linear',
  'warm_start_stop_at': 0.75,
  'warm_start_check_every': 25,
  'save_every': 0,
}


def read_words(file: str | None = None) -> list[str]:
  """Words of a-z, and marks between them, of a text file or of the language
  reference that is installed with Python.

  # 'The "if" statement:\n' -> ['the', 'if', 'statement', ':']
  """
  if file is None:
    from pydoc_data.topics import topics

    text = '\n\n'.join(topics.values())
  else:
    text = Path(file).read_text(encoding='utf-8')
  return re.findall('[a-z]+|[.,;:!?()]', text.lower())


def phrases(words: list[str], common: int) -> list[str]:
  """Different runs of words among the `common` most frequent ones."""
  counts = collections.Counter(filter(str.isalpha, words))
  known = {word for word, _ in counts.most_common(common)}
  runs = (
    ' '.join(run)
    for is_known, run in itertools.groupby(words, known.__contains__)
    if is_known
  )
  return list(dict.fromkeys(runs))


def windows(texts: list[str], length: int) -> list[str]:
  """Different parts of texts with `length` characters that begin where a word
  does, and do not end with a space."""
  found = {}
  for text in texts:
    for match in re.finditer(r'\b[a-z]', text):
      part = text[match.start() : match.start() + length]
      if len(part) == length and part[-1] != ' ':
        found[part] = None
  return list(found)


def corrupted(rng: random.Random, text: str, p: float) -> str:
  """Text whose characters are each replaced by another one with
  probability p."""
  return ''.join(
    rng.choice(LETTERS.replace(c, '')) if rng.random() < p else c for c in text
  )


def draw(
  texts: list[str], p: float, count: int, without=frozenset(), seed: int = 0
) -> list[dict]:
  """Draws records {'prompt': 'tqe cxt saz>', 'answer': 'the cat sat'}, but for
  the prompts in `without`. Raises ValueError where those are most."""
  rng, found = random.Random(seed), []
  for _ in range(20 * count):
    text = rng.choice(texts)
    prompt = corrupted(rng, text, p) + END_OF_PROMPT
    if prompt not in without:
      found.append({'prompt': prompt, 'answer': text})
    if len(found) == count:
      return found
  raise ValueError(
    'nearly all prompts are held out; pass a larger --p, --length or --words, '
    'or a smaller --held_out'
  )


def split_windows(texts: list[str], length: int) -> tuple[list[str], list[str]]:
  """Windows (training, held-out) of different texts, of which a sixth is held
  out; no window is in both."""
  mixed = random.Random(0).sample(texts, len(texts))
  cut = len(mixed) // 6
  train = windows(mixed[cut:], length)
  known = set(train)
  others = [w for w in windows(mixed[:cut], length) if w not in known]
  return train, others


def spelling(
  p: float = 0.3,
  length: int = 10,
  words: int = 50,
  reward: Literal['edit_distance', 'exact_prefix', 'chrf'] = 'edit_distance',
  num_texts: int = 20_000,
  text: str | None = None,
  held_out: int | None = None,
) -> Task:
  """Correct spelling of a few words.

  Args:
    p: Probability that a character is replaced by another.
    length: Characters of a text.
    words: Number of the most frequent words, of which texts consist.
    reward: Metric whose growth pays each token.
    num_texts: Training texts, drawn with their noise.
    text: File of plain text to take the words of; default: the language
      reference of this Python.
  """
  from jaxrl_tok.rewards import potentials
  from jaxrl_tok.step import device_rewards

  if not 0 <= p <= 1:
    raise ValueError(f'--p {p:g} is no probability; give 0 to 1')
  check_counts(length=length, words=words, num_texts=num_texts)
  potential = getattr(potentials, reward)('answer')
  right = potentials.edit_distance('answer', split='outcome')
  train, held = split_windows(phrases(read_words(text), words), length)
  if not train or not held:
    raise ValueError(
      f'--words {words} and --length {length} leave {len(train)} texts to '
      f'train on and {len(held)} to hold out; pass more words, or a smaller '
      'length'
    )

  def exact(completions, answer, **columns) -> float:
    return sum(map(str.__eq__, completions, answer)) / len(answer)

  def cer(completions, answer, **columns) -> float:
    return 1 - sum(right(completions=completions, answer=answer)) / len(answer)

  count = held_out or 512
  tests = draw(train, p, count, seed=1)
  records = draw(train, p, num_texts, {r['prompt'] for r in tests})
  unseen = Evaluation(
    'unseen', draw(held, p, count), right, metrics=(cer, exact)
  )
  on_device = device_rewards.edit_tokens if reward == 'edit_distance' else None
  return Task(
    records,
    potential,
    held_out=tests,
    eval_rewards=right,
    metrics=(cer, exact),
    evaluations=(unseen,),
    answers='answer',
    device_rewards=on_device,
    description=(
      f'{len(train):,} texts of {length} characters, each replaced with '
      f'probability {p:g}; {len(held)} others held out'
    ),
    reward_unit='%',
  )


def run(argv=None):
  return main(spelling, argv, **SETTINGS)


if __name__ == '__main__':
  run()
