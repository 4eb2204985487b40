"""REINFORCE on tokens learns two-operand addition and subtraction.

  python -m experiments.arithmetic

A tiny decoder is warm-started by supervision until it is right on 40 % of the
held-out problems; it then learns the rest from reward alone: 1 for an exact
answer, 0 otherwise (--reward digits: one reward for every token).

On 2 CPU cores: one to two minutes, the first compilation included. Held-out
exact match with seeds 0, 1 and 2: 44 to 96 % in 350 steps, 40 to 96 % in 250,
42 to 95 % in 750. The run stops at 95 % (--stop_at_reward): eight of the seeds
0 to 8 do, in 250 to 750 steps; seed 5 ends at 87 % after all 800.

The bonus for entropy keeps a policy of so few tokens trying: without it
(--entropy_coef 0) seed 1 was at 93 and seed 2 at 89 % after 600 steps. A rate
of 3e-3 ended at 25 to 43 %.
"""

import random
from typing import Literal

from jaxrl_tok import Task, main

OPERATORS = '+-'


def problem(rng: random.Random, digits: int) -> dict:
  """Draws a problem {'prompt': '47-12=', 'answer': '035'}.

  Operands have exactly `digits` digits, both operators come equally often, no
  answer is negative, and answers are padded with zeros to digits + 1 places,
  so that each place of the answer is one token's job.
  """
  low = 10 ** (digits - 1) if digits > 1 else 0
  a, b = (rng.randrange(low, 10**digits) for _ in range(2))
  operator = rng.choice(OPERATORS)
  if operator == '-':
    a, b = max(a, b), min(a, b)
  answer = a + b if operator == '+' else a - b
  return {'prompt': f'{a}{operator}{b}=', 'answer': f'{answer:0{digits + 1}}'}


def problems(
  digits: int, num_train: int, num_held_out: int, seed: int = 0
) -> tuple[list[dict], list[dict]]:
  """Generates (training, held-out) problems without a common prompt; held-out
  ones are all different. At most a fifth of all problems is held out."""
  operands = 10**digits - (10 ** (digits - 1) if digits > 1 else 0)
  different = operands**2 + operands * (operands + 1) // 2
  num_held_out = min(num_held_out, different // 5)
  rng = random.Random(seed)
  held_out, train = {}, []
  while len(held_out) < num_held_out:
    found = problem(rng, digits)
    held_out.setdefault(found['prompt'], found)
  while len(train) < num_train:
    found = problem(rng, digits)
    if found['prompt'] not in held_out:
      train.append(found)
  return train, list(held_out.values())


def arithmetic(
  digits: int = 2,
  num_problems: int = 20_000,
  data: str | None = None,
  reward: Literal['exact', 'digits'] = 'exact',
  held_out: int | None = None,
) -> Task:
  """Addition and subtraction, or problems from a file.

  Args:
    digits: Digits of each operand.
    num_problems: Training problems.
    data: File (jsonl) of {"prompt", "answer"} to learn instead; its end is
      held out.
    reward: Reward: 1 for the right answer (exact), or a share for each right
      token (digits).
  """
  from jaxrl_tok import rewards
  from jaxrl_tok.data import check_counts
  from jaxrl_tok.step import device_rewards

  if not 1 <= digits <= 9:
    raise ValueError(f'--digits {digits} must be in 1..9')
  check_counts(num_problems=num_problems)
  on_host, on_device = {
    'exact': (rewards.exact_match, device_rewards.exact_tokens),
    'digits': (rewards.digits, device_rewards.digit_tokens),
  }[reward]
  train, count, words = data, held_out or 512, ''
  if data is None:
    train, count = problems(digits, num_problems, count)
    words = (
      f'{len(train):,} generated additions and subtractions of {digits}-digit '
      f'numbers; {len(count)} others held out'
    )
  return Task(
    train,
    on_host,
    held_out=count,
    eval_rewards=rewards.exact_match,
    answers='answer',
    device_rewards=on_device,
    description=words,
    reward_unit='%',
  )


def run(argv=None):
  return main(
    arithmetic,
    argv,
    max_steps=800,
    stop_at_reward=0.95,
    num_prompts=128,
    num_generations=8,
    learning_rate=1.5e-3,
    lr_schedule='linear',
    entropy_coef=0.01,
  )


if __name__ == '__main__':
  run()
