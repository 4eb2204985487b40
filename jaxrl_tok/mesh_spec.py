"""Grammar of --mesh: 'data=-1,fsdp=2,tensor=1'.

Imports no jax, so that the flag is checked before jax is imported.
"""

import math
import re

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
        f'pass --mesh {DEFAULT} (one size may be -1)'
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
