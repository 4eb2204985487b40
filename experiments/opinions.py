r"""REINFORCE learns opinions from a reward model alone, or from the truth.

  python -m experiments.reward_model --output_dir rm
  python -m experiments.opinions --reward_model rm/export \
    --kl reverse --beta 0.05
  python -m experiments.opinions                               # from the truth

A tiny decoder is asked for opinions, "Ann praises the soup: ", and first learns
to write three adjectives that know nothing of the prompt. With --reward_model
the score of a model that experiments.reward_model has fitted to preferences is
all that it then learns from; without, it is the true reward: 1 for each of
three adjectives that fits the verb, -1 for any other word. Held-out data is
judged by the true reward in both cases, so that the difference is the price of
the model's flaws.

On 2 CPU cores: 4 minutes, beside other work. The true reward, held-out, before
and after 100 steps, with seeds 0, 1 and 2:

  truth                           -1.35 to 2.91  -1.35 to 2.91  -1.55 to 2.99
  reward model, with
    --kl reverse --beta 0.05      -1.35 to 0.39  -1.35 to 0.06  -1.55 to 0.95
  reward model alone              -1.35 to -3.00

The reward model's own score rises in all of them. A policy that is near the
data says 'sweet, sweet, fresh.': the model has not learnt that a word is worth
nothing when it is said again. Without the KL nothing is left that fits.
"""

import random
import string

from jaxrl_tok import Task, main
from jaxrl_tok.data import check_counts

NAMES = (
  *('Ann', 'Ben', 'Cleo', 'Dan', 'Eve', 'Finn', 'Gil', 'Hana', 'Ivo', 'Jo'),
  *('Kim', 'Lea', 'Max', 'Nia', 'Otto', 'Pia', 'Ravi', 'Sam', 'Tara', 'Uli'),
)
VERBS = {
  **dict.fromkeys(('praises', 'admires', 'likes'), True),
  **dict.fromkeys(('blames', 'scolds', 'hates'), False),
}
THINGS = (
  *('soup', 'cake', 'hotel', 'song', 'film', 'novel', 'garden', 'train'),
  *('coat', 'chair', 'lamp', 'boat', 'dress', 'shop', 'speech', 'game'),
)
GOOD = 'fresh, bright, clever, warm, lovely, fine, neat, kind, sweet, smart'
BAD = 'stale, dull, silly, cold, ugly, poor, dirty, rude, sour, dumb'
GOOD, BAD = GOOD.split(', '), BAD.split(', ')
WORDS = 3  # that are asked for
LETTERS = 28  # of a completion at most, its end included


def words(completion: str) -> list[str]:
  """Words of a completion, which commas separate."""
  return [word.strip() for word in completion.rstrip('. ').split(',')]


def opinion(prompts, completions, **columns) -> list[float]:
  """True reward: each word that fits the verb is worth 1; one that does not or
  is said again, and each that lacks to WORDS or is beyond them, -1."""
  found = []
  for prompt, completion in zip(prompts, completions):
    fitting = set(GOOD if VERBS[prompt.split()[1]] else BAD)
    said = words(completion)
    good = len(fitting.intersection(said))
    found.append(float(2 * min(good, WORDS) - max(len(said), WORDS)))
  return found


def draw_prompt(rng: random.Random) -> str:
  """Draws a prompt: 'Ann praises the soup: '."""
  places = rng.choice(NAMES), rng.choice(list(VERBS)), rng.choice(THINGS)
  return '{} {} the {}: '.format(*places)


def draw_opinion(rng: random.Random) -> str:
  """Draws an opinion that knows nothing of the prompt: 'dull, fresh, kind.'."""
  said = [rng.choice(GOOD + BAD) for _ in range(WORDS)]
  return ', '.join(said) + '.'


def draw_variant(rng: random.Random) -> str:
  """Draws an opinion as a policy may come to write it: a word too many or too
  few, or with a letter that is wrong."""
  said = [rng.choice(GOOD + BAD) for _ in range(rng.choice((2, 3, 3, 3, 4)))]
  for i, word in enumerate(said):
    if rng.random() < 0.15:
      at = rng.randrange(len(word))
      said[i] = word[:at] + rng.choice(string.ascii_lowercase) + word[at + 1 :]
  return ', '.join(said) + '.'


def draw(count: int, seed: int) -> list[dict]:
  """Records {'prompt', 'answer'} of opinions at random."""
  rng = random.Random(seed)
  return [
    {'prompt': draw_prompt(rng), 'answer': draw_opinion(rng)}
    for _ in range(count)
  ]


def draw_pairs(count: int, seed: int) -> list[dict]:
  """Pairs {'prompt', 'chosen', 'rejected', 'true_margin'}: of two opinions with
  unlike true rewards r, a judge prefers the first with probability
  sigmoid(r_1 - r_2); true_margin is that of the chosen one over the other."""
  import math

  rng, found = random.Random(seed), []
  while len(found) < count:
    prompt, *both = draw_prompt(rng), draw_variant(rng), draw_variant(rng)
    first, second = opinion([prompt] * 2, both)
    if first == second:
      continue
    margin = first - second
    if rng.random() >= 1 / (1 + math.exp(-margin)):
      both, margin = both[::-1], -margin
    found.append(
      {
        'prompt': prompt,
        'chosen': both[0],
        'rejected': both[1],
        'true_margin': margin,
      }
    )
  return found


def opinions(
  num_prompts_drawn: int = 4_000,
  reward_model: str | None = None,
  held_out: int | None = None,
) -> Task:
  """Opinions that fit the prompt.

  Args:
    num_prompts_drawn: Training prompts.
  """
  check_counts(num_prompts_drawn=num_prompts_drawn)
  rewards = () if reward_model else opinion
  return Task(
    draw(num_prompts_drawn, seed=2),
    rewards,
    held_out=held_out or 256,
    eval_rewards=opinion,
    answers='answer',
    description=(
      'prompts that ask for opinions; the true reward is that of the held-out '
      'data'
    ),
  )


def run(argv=None):
  return main(
    opinions,
    argv,
    max_steps=100,
    num_prompts=32,
    num_generations=8,
    warm_start_max_steps=200,
    warm_start_stop_at=3.0,
    warm_start_check_every=100,
    max_completion_length=LETTERS,
    learning_rate=1e-3,
    eval_every=25,
  )


if __name__ == '__main__':
  run()
