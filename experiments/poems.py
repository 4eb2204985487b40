r"""REINFORCE on tokens learns to write verse: rhyme, metre, and no copying.

  pip install -e '.[verse]'
  python -m experiments.poems

A prompt is the first line of a quatrain, in iambic pentameter, and the policy
writes the other three. A tiny decoder of words learns a grammar of lines, by
supervision on lines drawn at random, which hardly rhyme and are seldom in
metre; then it learns from the weighted sum of

  --rhyme 3            share of the two rhymes AABB, by sound
  --metre 1            agreement of the four lines with iambic pentameter
  --grammar 1          share of the words that lie in lines of the grammar
  --no_copy 1          share of the word triples that the first line has not
  --no_repetition 1    share of the word pairs that are new in the poem

On 2 CPU cores: 2 to 3 minutes, beside other work. Held-out reward, of 7, goes
from 3.62 to 5.55, 3.67 to 5.28 and 3.65 to 5.41 in 250 steps with seeds 0, 1
and 2. With seed 0, rhyme goes from 0.06 to 0.55, metre from 0.73 to 0.97 and
grammar from 0.75 to 1.00, and distinct-2, which no reward sees, falls from 0.39
to 0.07: the policy ends all lines in one rhyme, "noon, tune, moon", which
rhymes with itself in every poem, and seldom listens to the first line.
"""

import functools
import random
from collections.abc import Callable

from jaxrl_tok import Task, main
from jaxrl_tok.data import check_counts, draw_different, word_tokenizer

# words of the grammar; a line of it is seldom in metre
WORDS = {
  'Adj': """silver golden quiet lonely weary gentle hollow frozen ancient bitter
    serene divine remote absurd old cold pale bright dark wild enormous
    forgotten beautiful""",
  'Noun': """river shadow garden window meadow mountain fountain flower tower
    piano umbrella volcano machine hotel month silence""",
  'End': """moon tune noon balloon night light sight kite day way bay parade
    shade rain train lane plain sea tree bee star car guitar stone bone throne
    snow crow bow sky eye pie heart art cart door floor shore flower tower
    mountain fountain""",
  'Verb': """sings waits sleeps burns dreams begins returns replies appears
    wanders whispers listens shivers lingers remembers imagines""",
  'Prep': 'in by near on beneath above beside behind upon before under over',
}
RULES = '\n'.join(
  [
    "S -> 'the' Adj N Verb Prep 'the' End",
    "S -> 'the' N Verb Prep 'the' Adj End",
    'N -> Noun | End',
    *(
      f'{kind} -> ' + ' | '.join(f"'{word}'" for word in words.split())
      for kind, words in WORDS.items()
    ),
  ]
)
REQUEST = (
  'Write the next three lines of this poem. Lines one and two rhyme, and lines '
  'three and four; each is in iambic pentameter. Write nothing else.\n\n{}'
)


def line(rng: random.Random) -> str:
  """Draws a line of the grammar."""
  has = {kind: rng.choice(words.split()) for kind, words in WORDS.items()}
  noun = rng.choice(f'{WORDS["Noun"]} {WORDS["End"]}'.split())
  if rng.random() < 0.5:
    words = 'the', has['Adj'], noun, has['Verb'], has['Prep'], 'the', has['End']
  else:
    words = 'the', noun, has['Verb'], has['Prep'], 'the', has['Adj'], has['End']
  return ' '.join(words)


def poems_of(count: int, in_metre: Callable, seed: int = 0) -> list[dict]:
  """Records of different opening lines, all in metre, with three lines of the
  grammar at random as what a supervised start learns."""
  rng = random.Random(seed)

  def draw() -> tuple | None:
    opening = line(rng)
    if in_metre(completions=[opening]) != [1]:
      return None
    return opening, '\n'.join(line(rng) for _ in range(3))

  found = draw_different(draw, count, '--num_openings')
  return [
    {'prompt': f'{k}\n', 'opening': k, 'answer': v} for k, v in found.items()
  ]


def of_poem(reward: Callable) -> Callable:
  """The reward of the opening line and a completion, as one poem."""
  from jaxrl_tok.rewards.adapters import get_text

  def judge(completions, opening):
    texts = [f'{o}\n{get_text(c)}' for c, o in zip(completions, opening)]
    return reward(completions=texts)

  judge.__name__ = reward.__name__
  return judge


def poems(
  rhyme: float = 3.0,
  metre: float = 1.0,
  grammar: float = 1.0,
  no_copy: float = 1.0,
  no_repetition: float = 1.0,
  num_openings: int = 2000,
  held_out: int | None = None,
  model: str | None = None,
) -> Task:
  """Quatrains of a given first line, by a mixture of rewards.

  Args:
    rhyme: Weight of the share of rhymes AABB.
    metre: Weight of the agreement with iambic pentameter.
    grammar: Weight of the share of words in lines of the grammar; without
      --model.
    no_copy: Weight of the share of word triples that the first line has not.
    no_repetition: Weight of the share of new word pairs.
    num_openings: First lines to learn from.
  """
  from jaxrl_tok import rewards

  check_counts(num_openings=num_openings)
  iambic = rewards.IAMBIC_PENTAMETER
  count = held_out or 128
  records = poems_of(num_openings + count, rewards.metre(iambic))
  texts = [r['prompt'] + r['answer'] for r in records]
  weights = {
    of_poem(rewards.rhyme('AABB')): rhyme,
    of_poem(rewards.metre(*[iambic] * 4)): metre,
    rewards.grammar(RULES): grammar,
    rewards.no_copy(3, column='opening'): no_copy,
    of_poem(rewards.no_repetition): no_repetition,
  }
  if model is not None:
    weights = {f: w for f, w in weights.items() if f.__name__ != 'grammar'}
    for r in records:
      text = REQUEST.format(r['opening'])
      r['prompt'] = [{'role': 'user', 'content': text}]
  return Task(
    records[count:],
    weights,
    held_out=records[:count],
    metrics=(rewards.distinct,),
    greedy=False,
    answers='answer',
    tokenizer=functools.partial(word_tokenizer, texts),
    description=(
      f'{num_openings:,} first lines in iambic pentameter; {count} others held '
      'out'
    ),
  )


def run(argv=None):
  return main(
    poems,
    argv,
    max_steps=250,
    num_prompts=16,
    num_generations=16,
    learning_rate=3e-3,
    lr_schedule='linear',
    entropy_coef=0.01,
    max_completion_length=28,  # three lines have 24 tokens
    length_buckets=1,
    warm_start_stop_at=10.0,
    warm_start_check_every=100,
    warm_start_max_steps=100,
    eval_every=50,
    save_every=0,
  )


if __name__ == '__main__':
  run()
