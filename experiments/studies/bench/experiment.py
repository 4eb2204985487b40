"""Runs the benchmarks, and tells what came."""

import importlib.metadata
import json
import os
import platform

import jax
import rich.console
import rich.table

from experiments.studies.bench import decode, learn, pictures, startup
from experiments.studies.bench.sizes import SIZES
from experiments.studies.bench.timing import Row, Work
from jaxrl_tok.run import settings as flag_layer

BENCHES = {
  'decode': decode.decode,
  'group': decode.group,
  'ragged': decode.ragged,
  'logp': learn.logp,
  'step': learn.step,
  'startup': startup.startup,
}
# which of them a peer can do
PEERS = {'hf': ('decode',), 'trl': ('step',), 'tunix': ('decode', 'step')}
PROMPT_LENGTH = {'step': 64}  # others 32


def work_of(flags, bench: str, name: str, show) -> Work:
  pythons = flags.peer_python
  if len(pythons) == 1:
    pythons *= len(flags.peer)
  peers = dict(zip(flags.peer, pythons))
  return Work(
    name,
    SIZES[name],
    flags.dtype,
    flags.rows,
    flags.prompt_length or PROMPT_LENGTH.get(bench, 32),
    flags.completion_length,
    flags.rounds,
    {peer: path for peer, path in peers.items() if bench in PEERS[peer]},
    show,
    flags.profile,
  )


def machine() -> dict:
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
  """Medians, and how many times as long as the first of each block."""
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
      said(row.notes),
    )
  return shown


UNITS = {  # note: how it is said
  'ms_a_step': lambda x: f'{x:.2f} ms/step',
  'share_of_ceiling': lambda x: f'{x:.0%} of ceiling',
  'temporary_bytes': lambda x: f'{x / 1e6:,.0f} MB',
  'rollout': lambda x: f'rollout {x:.2g}',
  'update': lambda x: f'update {x:.2g}',
}


def said(notes: dict) -> str:
  return ', '.join(UNITS[k](v) for k, v in notes.items() if k in UNITS)


def run(flags) -> list[Row]:
  if flags.peer and jax.default_backend() != 'cpu':
    flag_layer.fail(
      f'the peers run on the CPU, and jax here on {jax.default_backend()}; set '
      'JAX_PLATFORMS=cpu'
    )
  place = flag_layer.RunFlags(output_dir=flags.output_dir)
  run_dir = flag_layer.claim_output_dir(place, 'bench')
  console = rich.console.Console()

  def show(text):
    console.print(f'  {text}', highlight=False)

  benches = BENCHES if flags.what == 'all' else [flags.what]
  found, fault = [], None
  jobs = [
    (bench, name)
    for bench in benches
    for name in (flags.size if bench != 'startup' else flags.size[:1])
  ]
  for bench, name in jobs:
    console.print(f'{bench} {name} ...', highlight=False)
    try:
      found += BENCHES[bench](work_of(flags, bench, name, show))
    except (ValueError, OSError) as e:
      fault = e
      break
    told = {
      'machine': machine(),
      'flags': flag_layer.flat(flags),
      'rows': [row._asdict() | {'median': row.median} for row in found],
    }
    (run_dir / 'bench.json').write_text(json.dumps(told, indent=2) + '\n')
  if found:
    console.print(table(found))
  decoded = [row for row in found if 'flops_a_step' in row.notes]
  if decoded:
    (run_dir / 'roofline.svg').write_text(pictures.roofline(decoded) + '\n')
  console.print(f'results: {run_dir}{os.sep}', highlight=False)
  if fault:
    flag_layer.fail(fault)
  return found
