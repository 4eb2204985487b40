"""Targets of --target: accelerators that need not be here, and their rates.

  v5e:16x16   a slice of 256 TPU v5e chips
  gpu:8       8 GPUs (H100 SXM)

Rates are those of the makers' data sheets, per chip: no program reaches all of
one. Imports no jax, so that the flag is checked before jax is imported.
"""

import math
import re
from typing import NamedTuple

TPU_PAGES = 'docs.cloud.google.com/tpu/docs, system architecture'
GPU_PAGES = 'nvidia.com, H100 SXM data sheet'


class Chip(NamedTuple):
  """Accelerator by its data sheet."""

  kinds: tuple  # beginnings of jax's device_kind
  topology: str  # libtpu's name; '': not compiled by libtpu
  axes: tuple  # numbers of dimensions that a slice may have
  memory: int  # bytes of HBM
  peak: float  # FLOP/s in bfloat16
  bandwidth: float  # bytes/s of HBM
  link: float  # bytes/s into a chip, over all links of its slice together
  source: str


GIB = 2**30
CHIPS = {
  'v4': Chip(
    ('TPU v4',), 'v4', (3,), 32 * GIB, 275e12, 1.2e12, 300e9, TPU_PAGES
  ),
  'v5e': Chip(
    ('TPU v5 lite', 'TPU v5e'),
    'v5e',
    (2,),
    16 * GIB,
    197e12,
    819e9,
    200e9,
    TPU_PAGES,
  ),
  'v5p': Chip(
    ('TPU v5', 'TPU v5p'),
    'v5p',
    (3,),
    95 * GIB,
    459e12,
    2.765e12,
    600e9,
    TPU_PAGES,
  ),
  'v6e': Chip(
    ('TPU v6 lite', 'TPU v6e'),
    'v6e',
    (2,),
    32 * GIB,
    918e12,
    1.6e12,
    400e9,
    TPU_PAGES,
  ),
  'gpu': Chip(
    ('NVIDIA H100',),
    '',
    (1,),
    80 * GIB,
    989e12,
    3.35e12,
    450e9,
    GPU_PAGES,
  ),
}


class Target(NamedTuple):
  """Devices that a program is compiled for."""

  name: str  # 'v5e:16x16'
  chip: Chip
  count: int  # devices

  @property
  def is_tpu(self) -> bool:
    return bool(self.chip.topology)

  @property
  def topology(self) -> str:
    """Name of the slice for libtpu."""
    return f'{self.chip.topology}:{self.name.partition(":")[2]}'


def parse_target(text: str) -> Target:
  """Parses 'v5e:16x16'. Raises ValueError for another generation, or a shape
  that it does not have."""
  name, _, shape = text.partition(':')
  chip = CHIPS.get(name)
  if chip is None or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape):
    raise ValueError(
      f'--target {text!r} is none of v4:2x2x4, v5e:4x4, v5p:4x4x4, v6e:4x4, '
      'gpu:8 or another shape of these; pass one'
    )
  sizes = [int(size) for size in shape.split('x')]
  if len(sizes) not in chip.axes:
    raise ValueError(
      f'--target {text} has {len(sizes)} dimensions, and a slice of {name} has '
      f'{chip.axes[0]}; pass --target {name}:{"x".join(["4"] * chip.axes[0])}'
    )
  return Target(text, chip, math.prod(sizes))


def chip_of(kind: str) -> Chip | None:
  """Chip of jax's device_kind; None: not in the table."""
  found = [
    (len(start), chip)
    for chip in CHIPS.values()
    for start in chip.kinds
    if kind.startswith(start)
  ]
  return max(found, key=lambda pair: pair[0])[1] if found else None
