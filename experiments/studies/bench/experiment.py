"""Runs benchmarks, shows and writes their results."""

import dataclasses
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import jax
import rich.console
import rich.table

from experiments.studies.bench import (
  decode,
  learn,
  networks,
  pictures,
  startup,
)
from experiments.studies.bench.sizes import SIZES
from experiments.studies.bench.timing import Row, Work
from jaxrl_tok.report.files import atomic_write
from jaxrl_tok.run.record import claim_output_dir
from jaxrl_tok.run.settings import RunSettings

BENCHES = {
  'decode': decode.decode,
  'group': decode.group,
  'ragged': decode.ragged,
  'logp': learn.logp,
  'step': learn.step,
  'startup': startup.startup,
}
# benchmarks that a peer can do
PEERS = {'hf': ('decode',), 'trl': ('step',), 'tunix': ('decode', 'step')}
PROMPT_LENGTH = {'step': 64}  # others 32


USUAL_SIZES = 'nano', 'small'


def work_of(flags, bench: str, name: str, show, model=None) -> Work:
  """Work of a benchmark at a size, or with an opened model, with the peers that
  can do it."""
  pythons = flags.peer_python
  if len(pythons) == 1:
    pythons *= len(flags.peer)
  peers = dict(zip(flags.peer, pythons))
  return Work(
    name,
    SIZES[name] if model is None else networks.size_of(model),
    flags.dtype,
    flags.rows,
    flags.prompt_length or PROMPT_LENGTH.get(bench, 32),
    flags.completion_length or (64 if model is None else 32),
    flags.rounds,
    {peer: path for peer, path in peers.items() if bench in PEERS[peer]},
    show,
    flags.profile,
    model,
    peer_dtypes=flags.peer_dtype or ('float32', 'bfloat16'),
  )


def machine() -> dict:
  """Device, cores and versions."""
  device = jax.devices()[0]
  return {
    'device': device.device_kind,
    'backend': jax.default_backend(),
    'cores': os.cpu_count(),
    'platform': platform.platform(),
    'python': platform.python_version(),
    'versions': {
      name: importlib.metadata.version(name) for name in ('jax', 'jaxlib')
    },
  }


def table(rows: list[Row]) -> rich.table.Table:
  """Table of medians, and of their ratios to the first of each block."""
  shown = rich.table.Table('', 'who', 's', 'tokens/s', 'time', '')
  for column in shown.columns[:2]:
    column.no_wrap = True
  for column in shown.columns[2:5]:
    column.justify = 'right'
  first = {}
  for row in rows:
    key = f'{row.bench} {row.size}'
    if key not in first:
      first[key] = row
      shown.add_section()
    shown.add_row(
      key,
      row.who,
      f'{row.median:.3g}',
      f'{row.tokens / row.median:,.0f}' if row.tokens else '',
      f'{row.median / first[key].median:.2f}x',
      format_notes(row.notes),
    )
  return shown


UNITS = {  # note: its words
  'ms_a_step': lambda x: f'{x:.2f} ms/step',
  'share_of_ceiling': lambda x: f'{x:.0%} of ceiling',
  'temporary_bytes': lambda x: f'{x / 1e6:,.0f} MB',
  'rollout': lambda x: f'rollout {x:.2g}',
  'update': lambda x: f'update {x:.2g}',
}


def format_notes(notes: dict) -> str:
  """Formats notes that are numbers, with their units."""
  return ', '.join(UNITS[k](v) for k, v in notes.items() if k in UNITS)


def jobs_of(flags) -> list[tuple[str, str]]:
  """Jobs (benchmark, size) in the order in which they run, each once; startup
  has one size."""
  named = BENCHES if 'all' in flags.what else dict.fromkeys(flags.what)
  sizes = list(dict.fromkeys(flags.size or USUAL_SIZES))
  if flags.model:
    sizes = [Path(flags.model).name]
  return [
    (bench, size)
    for bench in named
    for size in (sizes if bench != 'startup' else sizes[:1])
  ]


def write(run_dir: Path, flags, found: list[Row]) -> None:
  """Writes bench.json, and roofline.svg of the decode steps that there are."""
  record = {
    'machine': machine(),
    'flags': dataclasses.asdict(flags),
    'rows': [row._asdict() | {'median': row.median} for row in found],
  }
  atomic_write(run_dir / 'bench.json', json.dumps(record, indent=2) + '\n')
  decoded = [row for row in found if 'flops_a_step' in row.notes]
  if decoded:
    atomic_write(run_dir / 'roofline.svg', pictures.roofline(decoded) + '\n')


def run(flags) -> list[Row]:
  """Runs all jobs; a failing one loses no results of others. Raises ValueError
  or OSError."""
  if flags.peer and jax.default_backend() != 'cpu':
    raise ValueError(
      f'the peers run on the CPU, and jax here on {jax.default_backend()}; set '
      'JAX_PLATFORMS=cpu'
    )
  model = networks.open_decoder(flags.model) if flags.model else None
  place = RunSettings(output_dir=flags.output_dir)
  run_dir = claim_output_dir(place, 'bench', resumable=False)
  console, found = rich.console.Console(), []

  def show(text):
    console.print(f'  {text}', highlight=False)

  try:
    with networks.directory_for_peers(model, bool(flags.peer)) as directory:
      for bench, name in jobs_of(flags):
        console.print(f'{bench} {name} ...', highlight=False)
        work = work_of(flags, bench, name, show, model)
        found += BENCHES[bench](work._replace(directory=directory))
        write(run_dir, flags, found)
  finally:
    if found:
      console.print(table(found))
    console.print(f'results: {run_dir}{os.sep}', highlight=False)
  return found
