"""Program of test_processes.py: runs by name, on one or several processes.

python process_runs.py OUT NAMES [--num_processes ... further flags]

NAMES: of RUNS, with commas. A run that is NAME:PROCESS:STEP:HOW is ended there
(see digits); the next one begins all the same, unless the process was killed.
"""

import os
import signal
import sys
from pathlib import Path

import jax
from few_programs import FewPrograms

from jaxrl_tok import Task, main

SIZE = {
  'd_model': 16,
  'num_layers': 1,
  'num_prompts': 8,
  'num_generations': 2,
  'max_completion_length': 4,
  'max_steps': 4,
  'eval_every': 2,
  'save_every': 2,
  'report_to': 'none',
}
RUNS = {
  'plain': {},
  'whole': {},  # plain, and never ended
  'fails': {},
  'supervised': {
    'algorithm': 'grpo',
    'ahead': True,
    'warm_start_max_steps': 8,
    'warm_start_batch_size': 16,
  },
  'groups': {'algorithm': 'dapo', 'replay_groups': 8},
  'turns': {
    'algorithm': 'ppo',
    'max_completion_length': 2,
    'max_turns': 3,
    'length_buckets': 1,
  },
  'tensor': {'mesh': 'data=1,fsdp=2,tensor=4', 'd_ff': 32, 'max_steps': 2},
}
NEVER = '-1 -1 -'
SIGNALS = {'term': signal.SIGTERM, 'kill': signal.SIGKILL}


def digits(prompts, completions, trainer_state, log_metric, **columns):
  """Share of digits. Where DIES is 'PROCESS STEP term|kill|raise' this run is
  ended there."""
  log_metric('longest', max(map(len, completions)))
  process, step, how = os.environ.get('DIES', NEVER).split()
  here = jax.process_index(), trainer_state.global_step
  if (int(process), int(step)) == here:
    if how == 'raise':
      raise KeyError('boom')
    os.kill(os.getpid(), SIGNALS[how])
  return [sum(map(str.isdigit, c)) / (1 + len(c)) for c in completions]


class Guess:
  """Guess a digit by higher and lower."""

  def reset(self, seed, example):
    self.number = seed % 10
    return '', {}

  def step(self, action):
    over = action == f'{self.number}'
    said = '<' if action > f'{self.number}' else '>'
    return said, float(over) + 0.1 * action.isdecimal(), over, False, {}


def task(name: str) -> Task:
  records = [
    {'prompt': f'{i}' + 'x' * (i % 3), 'answer': f'{i % 10}'} for i in range(60)
  ]
  answers = 'answer' if name == 'supervised' else None
  environment = Guess if name == 'turns' else None
  return Task(
    records, digits, held_out=11, answers=answers, environment=environment
  )


def run(out: Path, word: str, flags: list[str]) -> int:
  """Exit status of a run, also logged."""
  name, *dies = word.split(':')
  os.environ['DIES'] = ' '.join(dies) or NEVER
  given = '--output_dir', str(out / name), '--no_cache', *flags
  status = 0
  try:
    main(task(name), [*given], **SIZE | RUNS[name])
  except SystemExit as e:
    status = e.code
  print(f'{word} ended with {status}', flush=True)
  return status


if __name__ == '__main__':
  out, names, *flags = sys.argv[1:]
  few = FewPrograms()  # the runs are alike
  jax.jit, jax.eval_shape = few.jit, few.eval_shape
  for word in names.split(','):
    status = run(Path(out), word, flags)
  sys.exit(status)
