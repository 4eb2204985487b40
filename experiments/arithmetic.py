"""REINFORCE on tokens learns two-operand addition and subtraction.

  python -m experiments.arithmetic

A tiny decoder is warm-started by supervision until it is right on some of the
held-out problems, and then learns the rest from reward alone: 1 for an exact
answer, 0 otherwise (--reward digits: one reward for every token).

TIME-AND-NUMBERS
"""

import dataclasses
import random
from typing import Literal

from experiments import flags as flag_layer

OPERATORS = '+-'


@dataclasses.dataclass(frozen=True)
class TaskFlags:
  """The problems and their reward."""

  digits: int = 2
  """Digits of each operand."""
  num_problems: int = 20_000
  """Training problems."""
  reward: Literal['exact', 'digits'] = 'exact'
  """exact: 1 for the right answer; digits: a share for each right token."""


@dataclasses.dataclass(frozen=True)
class Flags:
  task: TaskFlags
  warm_start: flag_layer.WarmStartFlags
  size: flag_layer.SizeFlags
  run: flag_layer.RunFlags
  model: flag_layer.ModelFlags
  sampling: flag_layer.SamplingFlags
  algorithm: flag_layer.AlgorithmFlags


DEFAULTS = Flags(
  TaskFlags(),
  flag_layer.WarmStartFlags(),
  flag_layer.SizeFlags(),
  flag_layer.RunFlags(max_steps=800, stop_at_reward=0.97),
  flag_layer.ModelFlags(),
  flag_layer.SamplingFlags(
    num_prompts=64, num_generations=8, max_completion_length=None
  ),
  flag_layer.AlgorithmFlags(learning_rate=1.5e-3, lr_schedule='linear'),
)


def problem(rng: random.Random, digits: int) -> dict:
  """{'prompt': '47-12=', 'answer': '035'}.

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
  """(training, held-out) problems; no prompt is in both, and the held-out
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


def check(flags: Flags) -> None:
  """What only this experiment can refuse."""
  task, T = flags.task, flags.sampling.max_completion_length
  if not 1 <= task.digits <= 9:
    flag_layer.fail(f'--digits {task.digits} must be in 1..9')
  if task.digits + 2 > T:
    flag_layer.fail(
      f'--max_completion_length {T} cannot hold an answer of '
      f'{task.digits + 1} digits and the end; pass '
      f'--max_completion_length {task.digits + 2}'
    )


def main(argv=None) -> dict:
  flags = flag_layer.parse(
    DEFAULTS, 'python -m experiments.arithmetic', argv, __doc__
  )
  if flags.sampling.max_completion_length is None:
    length = flags.task.digits + 2  # the answer's places and the end token
    sampling = dataclasses.replace(flags.sampling, max_completion_length=length)
    flags = dataclasses.replace(flags, sampling=sampling)
  check(flags)

  from experiments import launch, warm_start
  from jaxrl_tok import data, rewards

  task = flags.task
  train, held_out = problems(
    task.digits, task.num_problems, flags.run.eval_prompts
  )
  functions = {'exact': rewards.exact_match, 'digits': rewards.digits}
  return launch.run(
    launch.Experiment(
      name='arithmetic',
      flags=flags,
      tokenizer=data.byte_tokenizer,
      train_records=train,
      held_out_records=held_out,
      reward_functions=[functions[task.reward]],
      judge_functions=[rewards.exact_match],
      data=(
        f'{len(train):,} generated additions and subtractions of '
        f'{task.digits}-digit numbers; {len(held_out)} others held out'
      ),
      warm_start=lambda context: warm_start.warm_start(
        context, flags.warm_start
      ),
    )
  )


if __name__ == '__main__':
  main()
