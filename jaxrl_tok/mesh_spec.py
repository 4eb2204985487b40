"""Grammar of --mesh: 'data=-1,fsdp=2,tensor=1', or auto, which chooses.

Imports no jax, so that the flag is checked before jax is imported.
"""

import math
import re
from typing import NamedTuple

AUTO = 'auto'
AXES = ('data', 'fsdp', 'tensor')
DEFAULT = 'data=-1,fsdp=1,tensor=1'  # every device for data


def parse_mesh(spec: str) -> dict[str, int]:
  """Sizes by axis: 'data=-1,fsdp=2' -> {'data': -1, 'fsdp': 2, 'tensor': 1}.

  Raises ValueError on an unknown axis, an impossible size, an axis given twice,
  or two sizes of -1.
  """
  sizes = {}
  for part in spec.split(','):
    name, _, size = (word.strip() for word in part.partition('='))
    if name not in AXES or not re.fullmatch(r'-1|[1-9]\d*', size):
      raise ValueError(
        f'--mesh part {part!r} is not axis=size; '
        f'pass --mesh {DEFAULT} (one size may be -1), or --mesh auto'
      )
    if name in sizes:
      raise ValueError(
        f'--mesh {spec!r} has axis {name} twice; give it one size'
      )
    sizes[name] = int(size)
  sizes = {axis: sizes.get(axis, 1) for axis in AXES}
  if list(sizes.values()).count(-1) > 1:
    raise ValueError(f'--mesh {spec!r} has two sizes of -1; give all but one')
  return sizes


def mesh_sizes(spec: str, num_devices: int) -> dict[str, int]:
  """Sizes by axis on so many devices: -1 takes those that are left.

  Raises ValueError when their product is not the number of devices.
  """
  sizes = parse_mesh(spec)
  known = math.prod(size for size in sizes.values() if size != -1)
  left = max(num_devices // known, 1)
  sizes = {axis: left if size == -1 else size for axis, size in sizes.items()}
  product = math.prod(sizes.values())
  if product != num_devices:
    shape = ' x '.join(f'{axis}={size}' for axis, size in sizes.items())
    raise ValueError(
      f'--mesh {shape} needs {product} devices and there are {num_devices}; '
      'pass --mesh data=-1 to use them all for data'
    )
  return sizes


# --- auto --------------------------------------------------------------------

GIB = 2**30
STATE_SHARE = 0.6  # of a device's memory, for the state; the rest is work's
MOST_SHARE = 0.9  # of it, for the state and all that the rollout holds


class Need(NamedTuple):
  """Sizes that a mesh is chosen by. Bytes are of the whole run, not of one
  device."""

  devices: int
  memory: int | None  # bytes of a device; None: not known
  state: int  # parameters, optimizer state and their copies
  weights: int  # in the compute dtype: the sampler's, whole but for tensor
  cache: int  # keys and values of all rows
  prompts: tuple  # numbers of prompts that data x fsdp must divide
  split: tuple  # sizes that tensor must divide: heads, F; (): none may be split
  slices: int = 1  # parts of a pod that only a slow network joins
  kind: str = 'devices'


def bytes_with(need: Need, fsdp: int, tensor: int) -> tuple[float, float]:
  """Bytes on a device (of the state, of a rollout beside it)."""
  state = need.state / (fsdp * tensor)
  return state, need.weights / tensor + need.cache / need.devices


def meshes_of(need: Need) -> list[dict]:
  """Meshes that split nothing that cannot be split, the simplest first."""
  n, found = need.devices // need.slices, []
  for tensor in range(1, n + 1):
    heads = all(size % tensor == 0 for size in need.split or (1,))
    rows = need.devices // tensor
    if n % tensor or not heads or any(C % rows for C in need.prompts):
      continue
    for fsdp in range(1, n // tensor + 1):
      if (n // tensor) % fsdp == 0:
        sizes = rows // fsdp, fsdp, tensor
        found.append(dict(zip(AXES, sizes)))
  return found


def choose_mesh(need: Need) -> tuple[dict, str]:
  """Chooses the sizes by axis, and says why in one line.

  fsdp is the smallest at which the state takes STATE_SHARE of a device's
  memory, tensor the smallest at which a rollout fits beside it, data the rest:
  both cost communication that data does not. Rows and heads are never split
  unequally, and fsdp and tensor stay inside of a slice. Where nothing fits it
  is the mesh with the fewest bytes on a device.

  Raises ValueError where the devices cannot share the prompts equally.
  """
  meshes = meshes_of(need)
  if not meshes:
    C = max(need.prompts)
    raise ValueError(
      f'{need.devices} devices cannot share {C} prompts equally; pass '
      f'--num_prompts {-(-C // need.devices) * need.devices}, or fewer devices'
    )
  at = f'on {need.devices} {need.kind}'
  if need.memory is None:
    sizes = meshes[0]
    return sizes, f'{format_mesh(sizes)} {at}: their memory is not known'

  def fits(sizes):
    state, rollout = bytes_with(need, sizes['fsdp'], sizes['tensor'])
    small = state <= STATE_SHARE * need.memory
    return small and state + rollout <= MOST_SHARE * need.memory

  def load(sizes):
    return sum(bytes_with(need, sizes['fsdp'], sizes['tensor']))

  fitting = [sizes for sizes in meshes if fits(sizes)]
  sizes = fitting[0] if fitting else min(meshes, key=load)
  state, rollout = bytes_with(need, sizes['fsdp'], sizes['tensor'])
  why = (
    f'{format_mesh(sizes)} {at} of {need.memory / GIB:.1f} GiB: the state of '
    f'{need.state / GIB:.2f} GiB is {state / GIB:.2f} on each, a rollout '
    f'{rollout / GIB:.2f} more'
  )
  if not fitting:
    why += '; more than there is: take more devices, or adapters (--lora_rank)'
  return sizes, why


def format_mesh(sizes: dict) -> str:
  """Sizes by axis as --mesh takes them: 'data=4,fsdp=2,tensor=1'."""
  return ','.join(f'{axis}={size}' for axis, size in sizes.items())
