r"""REINFORCE on tokens learns to write formulas, judged as mathematics.

  pip install -e '.[rewards]'
  python -m experiments.formulas

A prompt is "the product of half of z and x:", and $\frac{z}{2}x$, $xz/2$ and
every equal formula are right: math-verify decides (--reward exact asks for the
one text of the data). A tiny decoder of words learns 5,000 of them by
supervision, each in one of its ways at random, until 40 % of 128 other ones are
right; then it learns from a reward of 1 or 0.

On 2 CPU cores: 3 to 4 minutes, three runs at a time. The held-out share of
right formulas goes from 47 to 72 %, 45 to 59 % and 46 to 69 % in 150 steps with
seeds 0, 1 and 2.

Parsing takes math-verify some 10 ms of a processor a formula, so that every
pair of completion and answer is asked for once. A reward of equality does not
say which of the equal formulas is meant: a copy would be right if prompts were
formulas ("expand (x+1)^2" is answered by itself); that is why they are words.
"""

import functools
import random
from collections.abc import Callable
from typing import Literal, NamedTuple

from jaxrl_tok import Task, main
from jaxrl_tok.data import check_counts, draw_different, word_tokenizer

LETTERS = 'xyz'


class Formula(NamedTuple):
  """Formula in words, and in LaTeX as one of its ways to be written."""

  words: str
  latex: str
  loose: bool = False  # a factor or a power needs it in brackets

  def tight(self) -> str:
    return f'({self.latex})' if self.loose else self.latex


def leaf(rng: random.Random) -> Formula:
  """A letter, or a number from 2 to 9."""
  word = (
    rng.choice(LETTERS) if rng.random() < 0.6 else str(rng.randrange(2, 10))
  )
  return Formula(word, word)


def plus(a: Formula, b: Formula, rng: random.Random) -> Formula:
  first, second = rng.sample((a, b), 2)
  latex = f'{first.latex}+{second.latex}'
  return Formula(f'the sum of {a.words} and {b.words}', latex, True)


def minus(a: Formula, b: Formula, rng: random.Random) -> Formula:
  words = f'the difference of {a.words} and {b.words}'
  return Formula(words, f'{a.latex}-{b.tight()}', True)


def times(a: Formula, b: Formula, rng: random.Random) -> Formula:
  first, second = (f.tight() for f in rng.sample((a, b), 2))
  # 2 3 is 23, and 2 1/2 is 2 + 1/2
  apart = second[0].isdigit() or (first[-1].isdigit() and second[0] == '\\')
  latex = first + r'\cdot ' * apart + second
  return Formula(f'the product of {a.words} and {b.words}', latex)


def square(a: Formula, rng: random.Random) -> Formula:
  inside = a.latex if len(a.latex) == 1 else f'({a.latex})'
  return Formula(f'the square of {a.words}', f'{inside}^2')


def half(a: Formula, rng: random.Random) -> Formula:
  latex, loose = f'\\frac{{{a.latex}}}{{2}}', False
  if rng.random() < 0.5:
    latex, loose = f'{a.tight()}/2', True
  return Formula(f'half of {a.words}', latex, loose)


ONE, TWO = (square, half), (plus, minus, times)


def formula(rng: random.Random, depth: int) -> Formula:
  """Draws a formula of operations inside each other, `depth` at most."""
  if depth == 0:
    return leaf(rng)
  first = formula(rng, depth - 1)
  if rng.random() < 0.3:
    return rng.choice(ONE)(first, rng)
  second = formula(rng, rng.randrange(depth))
  return rng.choice(TWO)(*rng.sample((first, second), 2), rng)


def problems(depth: int, num_train: int, num_held_out: int, seed: int = 0):
  """Problems {'prompt', 'answer'}, all different: (training, held-out)."""
  rng = random.Random(seed)

  def draw() -> tuple | None:
    one = formula(rng, depth)
    has_letter = any(letter in one.latex for letter in LETTERS)
    return (one.words, f'${one.latex}$') if has_letter else None

  flags = f'--depth {depth}, --num_problems {num_train}'
  found = draw_different(draw, num_train + num_held_out, flags)
  records = [{'prompt': f'{k}:', 'answer': v} for k, v in found.items()]
  return records[num_held_out:], records[:num_held_out]


def remembered(judge: Callable) -> Callable:
  """The reward of `judge`, asked once for each pair of completion and answer,
  and not at all where they are one text."""
  known = {}

  def reward(completions, answer, log_metric=None):
    pairs = list(zip(completions, answer))
    new = [p for p in dict.fromkeys(pairs) if p[0] != p[1] and p not in known]
    if new:
      texts, answers = map(list, zip(*new))
      found = judge(completions=texts, answer=answers, log_metric=log_metric)
      known.update(zip(new, found))
    return [1.0 if c == a else known[c, a] for c, a in pairs]

  reward.__name__ = judge.__name__
  return reward


def formulas(
  depth: int = 2,
  num_problems: int = 5000,
  reward: Literal['math_equal', 'exact'] = 'math_equal',
  held_out: int | None = None,
) -> Task:
  """Formulas in words, to be written in LaTeX.

  Args:
    depth: Operations inside each other, at most.
    num_problems: Training problems.
    reward: Reward: 1 for a formula that is equal as mathematics (math_equal),
      or for the one that the data has (exact).
  """
  from jaxrl_tok import rewards

  check_counts(depth=depth, num_problems=num_problems)
  train, tests = problems(depth, num_problems, held_out or 128)
  equal = remembered(rewards.math_equal(workers=2))
  texts = [r['prompt'] + r['answer'] for r in train + tests]
  return Task(
    train,
    {'math_equal': equal, 'exact': rewards.exact()}[reward],
    held_out=tests,
    eval_rewards=equal,
    answers='answer',
    tokenizer=functools.partial(word_tokenizer, texts),
    description=(
      f'{len(train):,} formulas in words, of {depth} operations inside each '
      f'other at most; {len(tests)} others held out'
    ),
    reward_unit='%',
  )


def run(argv=None):
  return main(
    formulas,
    argv,
    max_steps=150,
    num_prompts=16,
    num_generations=16,
    learning_rate=1e-3,
    lr_schedule='linear',
    entropy_coef=0.01,
    length_buckets=1,
    warm_start_check_every=10,
    eval_every=50,
    save_every=0,
  )


if __name__ == '__main__':
  run()
