"""How fast it is, beside other trainers on the same work.

  python -m experiments.studies.bench decode --size nano small
  python -m experiments.studies.bench step --peer trl --peer_python ~/trl/bin/python
  python -m experiments.studies.bench all

  decode   tokens a second of the sampler (64 prompts of 32 tokens, 64 new ones,
           and 128)
  group    the same of prompts that 8 or 16 completions share
  ragged   completions that end at different times
  logp     log-probs and their gradient, in chunks or whole: seconds, memory
  step     a whole GRPO step of 8 x 8 completions, 64 tokens after 64
  startup  from the start of the process to the first step, caches cold and warm

Weights are random and nothing ends a completion. Contenders take turns, round
by round, after a warm-up; the number is the median, and what compares is the
ratio. What the machine can do at most is measured in the same run.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro

from experiments.studies.bench.sizes import SIZES
from jaxrl_tok.run import settings as flag_layer


@dataclasses.dataclass(frozen=True)
class Flags:
  """What is measured."""

  what: tyro.conf.Positional[
    Literal['decode', 'group', 'ragged', 'logp', 'step', 'startup', 'all']
  ] = 'all'
  """The benchmark."""
  size: tuple[Literal[tuple(SIZES)], ...] = ('nano', 'small')
  """Decoders of random weights."""
  rows: int = 64
  """Completions (B)."""
  prompt_length: int | None = None
  """Tokens of a prompt (P); default 32, of a step 64."""
  completion_length: int = 64
  """New tokens (T)."""
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  """Ours; peers are tried in each of theirs."""
  cpu_devices: int = 1
  """Devices that a CPU is split into, which share the prompts of decode and
  group."""
  rounds: int = 5
  """Of each contender; the median counts."""
  peer: tuple[Literal['hf', 'trl', 'tunix'], ...] = ()
  """Others on the same work, where they can do it."""
  peer_python: tuple[str, ...] = ()
  """Interpreters that have them: one for all, or one each."""
  profile: str | None = None
  """Directory for a trace (jax.profiler) of one more round, which is not
  counted."""
  output_dir: str | None = None
  """Of bench.json and roofline.svg; default runs/bench-TIME."""


COUNTS = (
  'rows',
  'rounds',
  'cpu_devices',
  'completion_length',
  'prompt_length',
)


def check(flags: Flags) -> None:
  for name in COUNTS:
    value = getattr(flags, name)
    if value is not None and value < 1:
      flag_layer.fail(f'--{name} {value} must be at least 1')
  if flags.rows % 16:
    fit = -(-flags.rows // 16) * 16
    flag_layer.fail(
      f'--rows {flags.rows} must be whole groups of 16; pass --rows {fit}'
    )
  if len(set(flags.peer)) < len(flags.peer):
    flag_layer.fail('--peer names one twice; give each once')
  if flags.peer and flags.profile:
    flag_layer.fail('--profile is of our own part; pass it without --peer')
  given, wanted = len(flags.peer_python), len(flags.peer)
  if given != wanted and not (given == 1 and wanted):
    flag_layer.fail(
      f'--peer_python must be one interpreter, or one for each of the '
      f'{wanted} peers; {given} given'
    )
  for path in flags.peer_python:
    if not Path(path).is_file():
      flag_layer.fail(f'--peer_python {path} is no file')


def main(argv=None) -> list:
  argv = sys.argv[1:] if argv is None else argv
  flags = flag_layer.cli(
    Flags(), 'python -m experiments.studies.bench', argv, __doc__
  )
  check(flags)

  from experiments.studies.bench import experiment
  from jaxrl_tok import sharding

  try:
    sharding.split_cpu(flags.cpu_devices)
  except ValueError as e:
    flag_layer.fail(e)
  return experiment.run(flags)


if __name__ == '__main__':
  main()
