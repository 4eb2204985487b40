"""Which baseline, and which aggregation, make the best gradient of a step?

  python -m experiments.studies.gradient_lab

The arithmetic policy, held fixed after its warm start: once where a third of
its samples are right, once where three quarters are. On the same samples of
8 prompts x 8 completions, every baseline under every aggregation:

1. A reference: the gradient of 24,576 other completions, by the default method.
   A linear value is fit to their returns.
2. The gradient of every sampled token, by vmap; with the algorithm's own
   advantages and weights they make all methods' estimates at once.
3. How noisy, how biased, and how near to the reference the estimates are.

It writes gradient_lab.json and gradient_lab.svg. On 2 CPU cores: 2 minutes 20
with the warm starts. With seed 0, the variance is to the default's
(leave_one_out, seq_mean_token_sum) 0.80 and 0.80 with no baseline, 0.88 and
0.94 with the mean reward, 1.73 and 1.24 with greedy completions; 0.90 and 0.87
under seq_mean_token_mean.
"""

import dataclasses
from typing import TypeVar

import tyro

from jaxrl_tok.run import settings as flag_layer

Kind = TypeVar('Kind')
Unread = tyro.conf.Suppress[tyro.conf.Fixed[Kind]]  # has no effect: no flags


@dataclasses.dataclass(frozen=True)
class LabFlags:
  """What is measured, and how often."""

  levels: tuple[float, ...] = (0.4, 0.9)
  """Policies: the warm start ends at this share of held-out problems."""
  blocks: int = 10
  """Blocks of 8 batches of a step's size, whose gradients are compared."""
  reference_blocks: int = 48
  """Other blocks, that the reference gradient is the mean of."""
  digits: int = 2
  """Digits of each operand."""
  num_problems: int = 20_000
  """Problems that prompts are drawn from."""
  seed: int = 0
  """Seed of the warm start, the prompts and the samples."""
  output_dir: str | None = None
  """Directory of the results; default runs/gradient_lab-TIME."""


@dataclasses.dataclass(frozen=True)
class Flags:
  lab: LabFlags
  warm_start: flag_layer.WarmStartFlags
  size: flag_layer.SizeFlags
  sampling: flag_layer.SamplingFlags
  model: Unread[flag_layer.ModelFlags]
  algorithm: Unread[flag_layer.AlgorithmFlags]

  @property
  def run(self) -> flag_layer.RunFlags:
    return flag_layer.RunFlags(self.lab.output_dir, self.lab.seed)


DEFAULTS = Flags(
  LabFlags(),
  flag_layer.WarmStartFlags(warm_start_check_every=20),
  flag_layer.SizeFlags(),
  flag_layer.SamplingFlags(
    num_prompts=8, num_generations=8, max_completion_length=5
  ),
  flag_layer.ModelFlags(),
  flag_layer.AlgorithmFlags(),
)


def check(flags: Flags) -> None:
  """What only this experiment can refuse."""
  f = flags.lab
  for name, least in (('blocks', 2), ('reference_blocks', 2)):
    if getattr(f, name) < least:
      flag_layer.fail(f'--{name} {getattr(f, name)} must be at least {least}')
  if not 1 <= f.digits <= 9:
    flag_layer.fail(f'--digits {f.digits} must be in 1..9')
  if not f.levels or not all(0 <= level <= 1 for level in f.levels):
    flag_layer.fail(f'--levels {f.levels} must be one or more in [0, 1]')
  if (
    flags.warm_start.warm_start_stop_at
    != DEFAULTS.warm_start.warm_start_stop_at
  ):
    flag_layer.fail('--warm_start_stop_at has no effect here; pass --levels')
  if flags.sampling.num_generations < 2:
    flag_layer.fail(
      'groups of one cannot be compared; pass --num_generations 2 or more'
    )


def main(argv=None) -> dict:
  flags = flag_layer.parse(
    DEFAULTS, 'python -m experiments.studies.gradient_lab', argv, __doc__
  )
  check(flags)

  from experiments.studies.gradient_lab import experiment

  return experiment.run(flags)


if __name__ == '__main__':
  main()
