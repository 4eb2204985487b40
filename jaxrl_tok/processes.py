"""Processes of a run: each has devices, and rows of a batch, of its own.

All run one program, which must dispatch the same computations in the same
order. On the host each draws, tokenises and scores its own rows; small things
(numbers, texts, errors) go round through the coordination service that
jax.distributed keeps, beside the devices' work. With a single process every
function here is trivial.

  start       jax.distributed, as flags or the cluster say
  own_rows    which rows of a batch are here
  local       an array's rows that are here, on the host
  whole       all of an array on the host, of every process
  exchange    a value of each process, known to all
  together    what fails on one process fails on all
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_tok.sharding import ROWS

DAY = 24 * 60 * 60  # seconds that processes wait for a slow one; a dead one
# is noticed by its heartbeat
# variables that name the number of processes, by cluster
CLUSTERS = {
  'SLURM': 'SLURM_STEP_NUM_TASKS',
  'Open MPI': 'OMPI_COMM_WORLD_SIZE',
  'JAX_NUM_PROCESSES': 'JAX_NUM_PROCESSES',
}
HOSTS = 'TPU_WORKER_HOSTNAMES'  # of GKE and of a Cloud TPU slice
_numbers = itertools.count()


def has_tpu() -> bool:
  """Tells whether this machine has TPU chips, before jax is asked."""
  found = [*Path('/dev').glob('accel[0-9]*'), *Path('/dev/vfio').glob('[0-9]*')]
  return bool(found) and shutil.which('nvidia-smi') is None


def cluster_says() -> bool:
  """Tells whether the environment is that of several processes."""
  if os.environ.get('JAX_PLATFORMS', '').split(',')[0] not in ('', 'tpu'):
    hosts = False
  else:
    hosts = ',' in os.environ.get(HOSTS, '') or has_tpu()
  counts = (os.environ.get(name, '1') for name in CLUSTERS.values())
  return hosts or any(n.isdecimal() and int(n) > 1 for n in counts)


def start(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  start_timeout: int = 300,
  heartbeat_timeout: int = 60,
) -> None:
  """Joins the processes of a run, before jax counts its devices; does nothing
  for a single one.

  Args:
    coordinator_address: HOST:PORT of process 0; these three are found on Cloud
      TPU, GKE, SLURM and Open MPI.
    start_timeout: seconds to wait for the others.
    heartbeat_timeout: seconds without a sign of life after which a process is
      taken for dead, and the others end.

  Raises ValueError, in one line.
  """
  given = coordinator_address, num_processes, process_id
  if num_processes == 1 or jax.distributed.is_initialized():
    return
  if given == (None, None, None) and not cluster_says():
    return
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      initialization_timeout=start_timeout,
      heartbeat_timeout_seconds=heartbeat_timeout,
      shutdown_timeout_seconds=heartbeat_timeout,
    )
  except (ValueError, TypeError, RuntimeError) as e:
    said = ' '.join(str(e).split())[:200]
    raise ValueError(
      f'the processes cannot be joined ({said}); pass --coordinator_address '
      'HOST:PORT, --num_processes and --process_id, or --num_processes 1'
    ) from None


def count() -> int:
  """Number of processes; 1 before they are joined."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def is_main() -> bool:
  """Tells whether this is process 0, which writes and talks."""
  return count() == 1 or jax.process_index() == 0


# --- rows --------------------------------------------------------------------


def own_rows(mesh, count: int) -> np.ndarray:
  """Rows int [n], ascending, of a batch of `count` that lie on this process's
  devices."""
  place = NamedSharding(mesh, PartitionSpec(ROWS))
  found = place.addressable_devices_indices_map((count,)).values()
  ranges = sorted({where[0].indices(count)[:2] for where in found})
  return np.concatenate([np.arange(*each) for each in ranges])


def each_row_once(mesh, count: int) -> list[int]:
  """Processes that together have each row of a batch once: all, but where a
  tensor axis spans some, which then have equal rows."""
  place, rows = NamedSharding(mesh, PartitionSpec(ROWS)), {}
  for device, where in place.devices_indices_map((count,)).items():
    held = rows.setdefault(device.process_index, set())
    held.add(where[0].indices(count)[:2])
  first = {}
  for process, held in sorted(rows.items()):
    first.setdefault(frozenset(held), process)
  return sorted(first.values())


def _local(x):
  if not isinstance(x, jax.Array) or x.is_fully_addressable:
    return jax.device_get(x)
  if x.is_fully_replicated:
    return np.asarray(x.addressable_data(0))
  parts = {
    shard.index[0].indices(x.shape[0])[0]: shard.data
    for shard in x.addressable_shards
  }
  return np.concatenate([np.asarray(parts[at]) for at in sorted(parts)])


def local(tree):
  """Copies the rows that are here, or what is replicated, to the host."""
  if count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(_local, tree)


def whole(tree):
  """Copies all of every array to every process's host."""
  if count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(_whole, tree)


def _whole(x):
  if not isinstance(x, jax.Array) or x.is_fully_addressable:
    return jax.device_get(x)
  if not x.is_fully_replicated:
    place = NamedSharding(x.sharding.mesh, PartitionSpec())
    x = jax.jit(lambda x: x, out_shardings=place)(x)
  return np.asarray(x.addressable_data(0))


# --- agreement ---------------------------------------------------------------


def _client():
  # the key-value store has no public name; a collective of the devices would
  # wait for what they compute
  from jax._src import distributed

  return distributed.global_state.client


def _to_json(value: Any) -> bytes:
  # numbers of numpy have `tolist`
  return json.dumps(value, default=lambda x: x.tolist()).encode()


def exchange(value: Any) -> list:
  """Values of all processes, by process; of a single one, [value].

  value: plain JSON. Every process must call it, in the same order.
  """
  if count() == 1:
    return [value]
  client, number = _client(), next(_numbers)
  place, mine = f'jaxrl_tok/{number}/', jax.process_index()
  client.key_value_set_bytes(f'{place}{mine:08d}', _to_json(value))
  client.wait_at_barrier(f'jaxrl_tok-{number}', DAY * 1000)
  found = sorted(client.key_value_dir_get_bytes(place))
  if mine == 0 and number:  # all have read the one before
    client.key_value_delete(f'jaxrl_tok/{number - 1}/')
  return [json.loads(text) for _, text in found]


def from_main(value: Any) -> Any:
  """Value of process 0, on every process."""
  return exchange(value if is_main() else None)[0]


def on_any(flag: bool) -> bool:
  """Tells whether the flag is set on any process."""
  return any(exchange(bool(flag)))


def largest(number: int) -> int:
  """Largest number of any process."""
  return max(exchange(int(number)))


def together(do: Callable, shown: Callable = lambda value: None):
  """Calls do() on every process: (its value here, [shown(value) of each]).

  Where it raises an Exception on some process it raises one on every: its own
  there, elsewhere a ValueError that names the process. Such an error has an
  attribute `agreed`: all processes are at one place and may go on together, to
  save for instance.
  """
  if count() == 1:
    value = do()
    return value, [shown(value)]
  value = error = None
  try:
    value = do()
    told = {'value': shown(value)}
  except Exception as e:
    error = e
    told = {'error': f'{e}' or type(e).__name__}
  found = exchange(told)
  failed = [i for i, each in enumerate(found) if 'error' in each]
  if failed:
    if error is None:
      error = ValueError(f'process {failed[0]}: {found[failed[0]]["error"]}')
    error.agreed = True
    raise error
  return value, [each['value'] for each in found]


def main_only(do: Callable) -> Any:
  """Value of do(), called on process 0 alone and known to all; what it raises
  is raised on every process. Others wait until it is done."""
  _, found = together(lambda: do() if is_main() else None, lambda value: value)
  return found[0]


def is_agreed(error: BaseException) -> bool:
  """Tells whether every process has the error at the same place."""
  return count() == 1 or getattr(error, 'agreed', False)
