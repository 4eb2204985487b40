"""REINFORCE on tokens learns two-operand addition and subtraction.

  python -m experiments.arithmetic

A tiny decoder is warm-started by supervision until it is right on some of the
held-out problems, and then learns the rest from reward alone: 1 for an exact
answer, 0 otherwise (--reward digits: one reward for every token).

On 2 CPU cores: 1 minute 10, the first compilation included. With seed 0,
held-out exact match goes from 42 % to 95 % in 250 steps; it stops at 95 %
(--stop_at_reward).
"""

import dataclasses
import random
from pathlib import Path
from typing import Literal

from jaxrl_tok.run import settings as flag_layer

OPERATORS = '+-'


@dataclasses.dataclass(frozen=True)
class TaskFlags:
  """The problems and their reward."""

  digits: int = 2
  """Digits of each operand."""
  num_problems: int = 20_000
  """Training problems."""
  data: str | None = None
  """A jsonl of {"prompt", "answer"} to learn instead; its end is held out."""
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
  optimizer: flag_layer.OptimizerFlags


DEFAULTS = Flags(
  TaskFlags(),
  flag_layer.WarmStartFlags(),
  flag_layer.SizeFlags(),
  flag_layer.RunFlags(max_steps=600, stop_at_reward=0.95),
  flag_layer.ModelFlags(),
  flag_layer.SamplingFlags(
    num_prompts=128, num_generations=8, max_completion_length=None
  ),
  flag_layer.AlgorithmFlags(),
  flag_layer.OptimizerFlags(learning_rate=1.5e-3, lr_schedule='linear'),
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


def from_file(path: str, num_held_out: int) -> tuple[list[dict], list[dict]]:
  """(training, held-out) records of a jsonl; the last fifth at most is held
  out. Raises ValueError, naming the record, where one cannot be used."""
  from jaxrl_tok import data

  records = data.read_jsonl(path)
  for i, record in enumerate(records, 1):
    if not isinstance(record.get('answer'), str):
      raise ValueError(f'{path}: record {i} has no "answer" that is text')
  held_out = min(num_held_out, len(records) // 5)
  if not held_out:
    raise ValueError(
      f'{path} has {len(records)} records; give 5 or more, so that some can '
      'be held out'
    )
  return records[:-held_out], records[-held_out:]


def load(flags: Flags):
  """(flags with a completion length, training and held-out records, and what
  they are in words). Raises ValueError."""
  task, number = flags.task, flags.run.eval_prompts
  if task.data is None:
    train, held_out = problems(task.digits, task.num_problems, number)
    words = (
      f'{len(train):,} generated additions and subtractions of '
      f'{task.digits}-digit numbers; {len(held_out)} others held out'
    )
  else:
    train, held_out = from_file(task.data, number)
    words = f'{task.data}: {len(train):,} records; {len(held_out)} held out'
  answers = [record['answer'] for record in train + held_out]
  flags = flag_layer.fit_completion_length(flags, answers)
  return flags, train, held_out, words


def check(task: TaskFlags) -> None:
  """What only this experiment can refuse."""
  if not 1 <= task.digits <= 9:
    flag_layer.fail(f'--digits {task.digits} must be in 1..9')
  if task.data is not None and not Path(task.data).is_file():
    flag_layer.fail(f'--data {task.data} is no file')


def reward_functions() -> dict:
  """{--reward: (on the host, on the device)}."""
  from jaxrl_tok import rewards
  from jaxrl_tok.step import device_rewards

  return {
    'exact': (rewards.exact_match, device_rewards.exact_tokens),
    'digits': (rewards.digits, device_rewards.digit_tokens),
  }


def main(argv=None) -> dict:
  flags = flag_layer.parse(
    DEFAULTS, 'python -m experiments.arithmetic', argv, __doc__
  )
  check(flags.task)

  from jaxrl_tok import data, rewards
  from jaxrl_tok.run import launch, warm_start

  try:
    flags, train, held_out, words = load(flags)
  except ValueError as e:
    flag_layer.fail(e)
  on_host, on_device = reward_functions()[flags.task.reward]
  return launch.run(
    launch.Experiment(
      name='arithmetic',
      flags=flags,
      tokenizer=data.byte_tokenizer,
      train_records=train,
      held_out_records=held_out,
      reward_functions=[on_host],
      device_functions=[on_device],
      columns=warm_start.answers,
      judge_functions=[rewards.exact_match],
      data=words,
      warm_start=lambda context: warm_start.warm_start(
        context, flags.warm_start
      ),
    )
  )


if __name__ == '__main__':
  main()
