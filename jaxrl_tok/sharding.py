"""A mesh, and which axis of which parameter lies on it.

1. `make_mesh('data=-1,fsdp=1,tensor=1')` lays out the devices.
2. `tree_shardings(mesh, tree, rules)` matches regexes against the path of
   every leaf. Optimizer moments carry the path of their parameter, so one
   rule places both.
3. `born_sharded(make, mesh, rules)` creates a state directly where it will
   live: no device ever holds the whole of it.
4. `put_rows` places host arrays by prompt over `data` and `fsdp`.
"""

import os
import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXES = ('data', 'fsdp', 'tensor')
ROWS = ('data', 'fsdp')  # the mesh axes that split a batch


def split_cpu(devices: int) -> None:
  """Makes so many devices of a CPU, before jax looks at it. Of a small model's
  operations, each core does its own rows' faster than all cores do all rows'
  one after the other. XLA_FLAGS that say how many go first.

  Raises ValueError where jax has looked already.
  """
  flag = 'xla_force_host_platform_device_count'
  if devices == 1 or flag in os.environ.get('XLA_FLAGS', ''):
    return
  if devices == jax.config.jax_num_cpu_devices:
    return
  try:
    jax.config.update('jax_num_cpu_devices', devices)
  except RuntimeError:
    raise ValueError(
      f'--cpu_devices {devices} comes after jax has counted its devices; '
      'start a new process'
    ) from None


def parse_mesh(spec: str) -> dict[str, int]:
  """'data=-1,fsdp=2' -> {'data': -1, 'fsdp': 2, 'tensor': 1}.

  Raises ValueError on an axis or a size that cannot be; at most one is -1.
  """
  sizes = {}
  for part in spec.split(','):
    name, _, size = (word.strip() for word in part.partition('='))
    if name not in AXES or not re.fullmatch(r'-1|[1-9]\d*', size):
      raise ValueError(
        f'mesh part {part!r} is not axis=size; '
        'pass --mesh data=-1,fsdp=1,tensor=1 (one size may be -1)'
      )
    if name in sizes:
      raise ValueError(f'mesh axis {name} is given twice in {spec!r}')
    sizes[name] = int(size)
  sizes = {axis: sizes.get(axis, 1) for axis in AXES}
  if list(sizes.values()).count(-1) > 1:
    raise ValueError(f'mesh {spec!r} has two sizes of -1; give all but one')
  return sizes


def make_mesh(spec: str, devices=None) -> jax.sharding.Mesh:
  """A data x fsdp x tensor mesh with Auto axes over the devices.

  Raises ValueError when the product of the sizes is not the device count.
  """
  devices = jax.devices() if devices is None else devices
  sizes = parse_mesh(spec)
  known = int(np.prod([n for n in sizes.values() if n != -1]))
  for name, size in sizes.items():
    if size == -1:
      sizes[name] = max(len(devices) // known, 1)
  product = int(np.prod(list(sizes.values())))
  if product != len(devices):
    shape = ' x '.join(f'{k}={v}' for k, v in sizes.items())
    raise ValueError(
      f'mesh {shape} needs {product} devices and there are {len(devices)}; '
      'pass --mesh data=-1 to use them all for data'
    )
  return jax.make_mesh(
    tuple(sizes.values()),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices,
  )


def row_shards(mesh: jax.sharding.Mesh) -> int:
  """How many ways a batch is split."""
  return int(np.prod([mesh.shape[a] for a in ROWS]))


def path_name(path) -> str:
  """A leaf's path as 'params/layer_0/attention/qkv'."""
  return '/'.join(
    str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k))))
    for k in path
  )


def _fit(spec: PartitionSpec, shape, mesh) -> PartitionSpec:
  """Drops the axes that do not divide a dimension: it is then replicated."""
  if len(spec) > len(shape):  # a scalar beside the moments, say
    return PartitionSpec()
  axes = []
  for dim, axis in zip(shape, spec):
    names = axis if isinstance(axis, tuple) else (axis,)
    num_shards = int(np.prod([mesh.shape[n] for n in names if n is not None]))
    axes.append(axis if dim % num_shards == 0 else None)
  return PartitionSpec(*axes)


def tree_shardings(mesh, tree, rules):
  """NamedSharding of every leaf: the first rule whose regex is found in its
  path, replicated when none is. `tree` holds arrays or ShapeDtypeStructs."""

  def one(path, leaf):
    name = path_name(path)
    for pattern, spec in rules:
      if re.search(pattern, name):
        return NamedSharding(mesh, _fit(spec, leaf.shape, mesh))
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree_util.tree_map_with_path(one, tree)


def born_sharded(make, mesh, rules, *args, compiler_options=None):
  """Runs `make(*args)` so that every leaf is created on its own devices.

  compiler_options: of jax.jit.

  Returns (tree, shardings).
  """
  shapes = jax.eval_shape(make, *args)
  shardings = tree_shardings(mesh, shapes, rules)
  make = jax.jit(
    make, out_shardings=shardings, compiler_options=compiler_options
  )
  return make(*args), shardings


def put_rows(mesh, tree):
  """Host arrays [C, ...] -> global arrays split by row over data and fsdp."""
  sharding = NamedSharding(mesh, PartitionSpec(ROWS))
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
    tree,
  )


def put_replicated(mesh, tree):
  """Host values -> global arrays that every device holds whole."""
  sharding = NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
    tree,
  )


def constrain_rows(x: jax.Array) -> jax.Array:
  """Says inside jit that dimension 0 is split as a batch is.

  One of these per block stops the partitioner from replicating activations.
  Without a mesh (jax.set_mesh) it does nothing.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  spec = PartitionSpec(ROWS, *(None,) * (x.ndim - 1))
  return jax.lax.with_sharding_constraint(x, spec)


def constrain(x: jax.Array, *spec) -> jax.Array:
  """Says inside jit how x lies on the mesh; axes that do not divide a
  dimension are dropped. Without a mesh it does nothing."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  fitted = _fit(PartitionSpec(*spec), x.shape, mesh)
  return jax.lax.with_sharding_constraint(x, fitted)


def on_each_device(function, spec, *args):
  """function(*args) by every device of its own part of them, for what the
  partitioner cannot split; args and result lie as spec says, axes that do not
  divide a dimension dropped. Without a mesh it is the plain call."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return function(*args)
  specs = tuple(_fit(PartitionSpec(*spec), x.shape, mesh) for x in args)
  split = jax.shard_map(
    function, in_specs=specs, out_specs=specs[0], check_vma=False
  )
  return split(*args)


def gathered_for_rollout(params, rules):
  """Undoes the fsdp split of params inside jit, once, before a token loop.

  Decoding with weights split over fsdp would gather them again each token.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return params
  kept = tuple(
    (pattern, PartitionSpec(*(a if a == 'tensor' else None for a in spec)))
    for pattern, spec in rules
  )
  shardings = tree_shardings(mesh, params, kept)
  return jax.tree.map(
    lambda x, s: jax.lax.with_sharding_constraint(x, s.spec), params, shardings
  )
