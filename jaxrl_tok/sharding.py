"""Placement of arrays on devices: the mesh, and each array's axes on it.

1. `make_mesh('data=-1,fsdp=1,tensor=1')` lays out the devices; those of several
   slices so that only `data` crosses the network between them.
2. `tree_shardings(mesh, tree, rules)` matches regexes against the path of
   every leaf. The path of an optimizer moment contains that of its parameter,
   so one rule places both.
3. `born_sharded(make, mesh, rules)` creates a state on its devices: none of
   them ever holds all of it.
4. `put_rows` splits host arrays by prompt over `data` and `fsdp`; those of a
   process are its own rows (processes.py).
"""

import functools
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrl_tok.mesh_spec import AXES, mesh_sizes

ROWS = ('data', 'fsdp')  # the mesh axes that split a batch


def split_cpu(devices: int) -> None:
  """Makes a CPU look like several devices to jax.

  Small operations are faster when each core works on rows of its own than
  when all cores share every operation. A count in XLA_FLAGS takes precedence.

  Raises ValueError when jax has counted its devices already.
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


def make_mesh(spec: str, devices=None) -> jax.sharding.Mesh:
  """Mesh data x fsdp x tensor with Auto axes over the devices.

  Raises ValueError when the product of the sizes is not the device count, or
  slices cannot share them.
  """
  devices = jax.devices() if devices is None else devices
  sizes = mesh_sizes(spec, len(devices))
  types = (AxisType.Auto,) * len(AXES)
  if num_slices(devices) > 1 and devices[0].platform == 'tpu':
    return jax.sharding.Mesh(device_order(sizes, devices), AXES, types)
  return jax.make_mesh(
    tuple(sizes.values()), AXES, axis_types=types, devices=devices
  )


def num_slices(devices) -> int:
  """Number of slices that the devices are of: parts of TPU pods, or hosts of
  others, joined by a slower network."""
  return len({getattr(device, 'slice_index', 0) for device in devices})


def device_order(sizes: dict, devices) -> np.ndarray:
  """Devices of several slices [data, fsdp, tensor]: data crosses the network
  between slices, fsdp only where data is too small for that.

  Raises ValueError where tensor would have to.
  """
  from jax.experimental import mesh_utils

  slices = num_slices(devices)
  over = {'data': math.gcd(sizes['data'], slices)}
  over['fsdp'] = slices // over['data']
  if sizes['fsdp'] % over['fsdp']:
    raise ValueError(
      f'--mesh data={sizes["data"]},fsdp={sizes["fsdp"]} cannot be shared by '
      f'{slices} slices; pass a data that {slices} divides, or --mesh auto'
    )
  between = [over.get(axis, 1) for axis in AXES]
  inside = [sizes[axis] // n for axis, n in zip(AXES, between)]
  return mesh_utils.create_hybrid_device_mesh(inside, between, devices)


def platform() -> str:
  """Platform that computes, 'cpu', 'gpu' or 'tpu', also inside jit: of the
  mesh (jax.set_mesh), whose devices may be absent, else of this machine."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
  """Kind of the devices of platform(), as jax names it: 'TPU v5 lite'."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  device = jax.local_devices()[0] if device is None else device
  return device.device_kind


def row_shards(mesh: jax.sharding.Mesh) -> int:
  """Number of parts that the mesh splits the rows of a batch into."""
  return num_shards(mesh, ROWS)


def num_shards(mesh, axes) -> int:
  """Number of parts that an entry of a PartitionSpec splits a dimension into:
  an axis name, several, or None."""
  names = axes if isinstance(axes, tuple) else (axes,)
  return math.prod(mesh.shape[name] for name in names if name is not None)


def path_name(path) -> str:
  """Path of a leaf as text: 'params/layers/attention/qkv'."""
  return '/'.join(
    str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k))))
    for k in path
  )


# paths of our stacks: those of networks, 'layers/attention/qkv', and those of
# adapters, 'model.layers.*.self_attn.q_proj/a'
STACKED = r'(^|/)layers/(\w*attention|mlp|experts|\w+_norm)/|\.\*\.'


def is_stacked(path: str) -> bool:
  """Tells whether the leaf of this path has a leading axis of layers."""
  return re.search(STACKED, path) is not None


def _fit(spec: PartitionSpec, shape, mesh) -> PartitionSpec:
  """Drops axes of a spec that do not divide their dimension, which is then
  replicated."""
  if len(spec) > len(shape):  # a scalar beside the moments, say
    return PartitionSpec()
  axes = []
  for dim, axis in zip(shape, spec):
    axes.append(axis if dim % num_shards(mesh, axis) == 0 else None)
  return PartitionSpec(*axes)


def tree_shardings(mesh, tree, rules):
  """NamedSharding of every leaf, by the first rule whose regex its path
  contains; replicated without one.

  tree: arrays or ShapeDtypeStructs.
  """

  def one(path, leaf):
    name = path_name(path)
    for pattern, spec in rules:
      if re.search(pattern, name):
        return NamedSharding(mesh, _fit(spec, leaf.shape, mesh))
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree_util.tree_map_with_path(one, tree)


def sharded_structs(mesh, tree, rules):
  """ShapeDtypeStructs of a tree of arrays or structs, placed by rules."""
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    tree,
    tree_shardings(mesh, tree, rules),
  )


def born_sharded(make, mesh, rules, *args, compiler_options=None):
  """Runs make(*args) so that each device creates its own part of every leaf.

  compiler_options: passed to jax.jit.

  Returns (tree, shardings).
  """
  shapes = jax.eval_shape(make, *args)
  shardings = tree_shardings(mesh, shapes, rules)
  make = jax.jit(
    make, out_shardings=shardings, compiler_options=compiler_options
  )
  return make(*args), shardings


def put_rows(mesh, tree):
  """Splits host arrays [C, ...] by row over data and fsdp; of several processes
  each gives the rows that lie on its devices."""
  sharding = NamedSharding(mesh, PartitionSpec(ROWS))
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
    tree,
  )


def put_whole(mesh, tree):
  """Splits host arrays [C, ...] by row, which every process has all of."""
  sharding = NamedSharding(mesh, PartitionSpec(ROWS))
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(
      np.shape(x), sharding, np.asarray(x).__getitem__
    ),
    tree,
  )


def put_replicated(mesh, tree):
  """Copies host values to every device."""
  sharding = NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
    tree,
  )


def constrain_rows(x: jax.Array) -> jax.Array:
  """Constrains dimension 0, inside jit, to be split as the rows of a batch.

  One call per block stops the partitioner from replicating activations.
  Without a mesh (jax.set_mesh) it returns x.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or rows_are_own():
    return x
  spec = PartitionSpec(ROWS, *(None,) * (x.ndim - 1))
  return jax.lax.with_sharding_constraint(x, spec)


def constrain_caches(caches):
  """Constrains dimension 0 of arrays [B, ...], inside jit, as constrain_rows;
  the others stay as they are, so that no cache that is split over tensor is
  gathered."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return caches

  def one(x):
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS, *free))

  return jax.tree.map(one, caches)


def constrain(x: jax.Array, *spec) -> jax.Array:
  """Constrains, inside jit, how x lies on the mesh. Axes that do not divide
  their dimension are dropped. Without a mesh it returns x."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  fitted = _fit(PartitionSpec(*spec), x.shape, mesh)
  return jax.lax.with_sharding_constraint(x, fitted)


def on_whole_cpu() -> bool:
  """Tells, inside jit, whether a CPU computes and each of its devices holds all
  of every matrix."""
  mesh = jax.sharding.get_abstract_mesh()
  split = not mesh.empty and mesh.shape['fsdp'] * mesh.shape['tensor'] > 1
  return platform() == 'cpu' and not split


def on_each_device(function, spec, *args):
  """Calls function on every device with its own part of args, for operations
  that the partitioner cannot split.

  spec: axes of every argument and of the result; those that do not divide
    their dimension are dropped.

  Without a mesh it is function(*args).
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or rows_are_own():
    return function(*args)
  specs = tuple(_fit(PartitionSpec(*spec), x.shape, mesh) for x in args)
  split = jax.shard_map(
    function,
    in_specs=specs,
    out_specs=specs[0],
    check_vma=False,
  )
  return split(*args)


def rows_are_own() -> bool:
  """Tells, inside jit, whether a device sees its own rows only, as inside of
  on_own_rows; it then holds all of the heads that it gathers, too."""
  return 'fsdp' in jax.sharding.get_abstract_mesh().manual_axes


def split_axes(tree, rules) -> dict[str, int]:
  """Axes {path: axis} that rules split over fsdp, of the leaves where they do;
  {} without a mesh, and beside tensor, whose parts the partitioner would gather
  with those of fsdp: it then places all collectives itself."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.shape['fsdp'] == 1 or mesh.shape['tensor'] > 1:
    return {}
  placed = tree_shardings(mesh, tree, rules)
  specs = {
    path_name(path): list(place.spec)
    for path, place in jax.tree_util.tree_leaves_with_path(placed)
  }
  return {k: spec.index('fsdp') for k, spec in specs.items() if 'fsdp' in spec}


def on_own_rows(function, whole, rows, axes: dict):
  """Calls function(whole, rows) on every device with its rows, split over data
  and fsdp, and its part of `whole`, which gather_own makes whole. A loop in the
  function has no collective but those of tensor and what it gathers itself;
  gradients of `whole` are summed where it is gathered.

  Args:
    function: (whole, rows) -> arrays of rows.
    whole, rows: trees of arrays.
    axes: split_axes of `whole`.

  Without a mesh, and where the devices cannot share the rows equally, it is
  function(whole, rows).
  """
  mesh = jax.sharding.get_abstract_mesh()
  shards = 1 if mesh.empty else num_shards(mesh, ROWS)
  if shards == 1 or any(x.shape[0] % shards for x in jax.tree.leaves(rows)):
    return function(whole, rows)

  def held(path, x):
    axis = axes.get(path_name(path))
    return PartitionSpec(*(() if axis is None else (*(None,) * axis, 'fsdp')))

  call = jax.shard_map(
    function,
    in_specs=(
      jax.tree_util.tree_map_with_path(held, whole),
      PartitionSpec(ROWS),
    ),
    out_specs=PartitionSpec(ROWS),
    axis_names=set(ROWS),
    check_vma=False,
  )
  return call(whole, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_own(x, axis, dtype):
  parts = jax.lax.all_gather(x.astype(dtype), 'fsdp', axis=axis, tiled=True)
  return parts.astype(x.dtype)


def _gather_own_forward(x, axis, dtype):
  return _gather_own(x, axis, dtype), None


def _gather_own_backward(axis, dtype, _, gradient):
  parts = jax.sharding.get_abstract_mesh().shape['fsdp']
  before, after = gradient.shape[:axis], gradient.shape[axis + 1 :]
  size = gradient.shape[axis] // parts
  split = gradient.reshape(*before, parts, size, *after)
  # a TPU scatters along the outermost axis in memory, which this makes it; it
  # would sum all of the gradient otherwise
  flat = jnp.moveaxis(split, axis, 0).reshape(parts, -1)
  own = jax.lax.psum_scatter(flat, 'fsdp')
  return (own.reshape(*before, size, *after),)


_gather_own.defvjp(_gather_own_forward, _gather_own_backward)


def gather_own(tree, axes: dict, dtypes: dict | None = None, stacked: int = 0):
  """Gathers parts over fsdp, inside of on_own_rows, once for all their uses;
  their gradients, of their own dtype, are summed once.

  Args:
    axes: split_axes of the tree, or of its stacks of layers.
    dtypes: {path: dtype} that they travel as; None: their own.
    stacked: 1 for a layer out of its stacks.
  """
  if not axes or not rows_are_own():
    return tree

  def one(path, x):
    name = path_name(path)
    if name not in axes:
      return x
    dtype = x.dtype if dtypes is None else dtypes[name]
    return _gather_own(x, axes[name] - stacked, dtype)

  return jax.tree_util.tree_map_with_path(one, tree)


def lookup_own(table: jax.Array, ids: jax.Array, dtype) -> jax.Array:
  """Rows [R, t, D] of a table that fsdp splits along D, [V, D / fsdp] here, for
  own ids [R, t], inside of on_own_rows: each device looks up its part of D for
  the ids of all, and they exchange the results."""
  ids = jax.lax.all_gather(ids, 'fsdp', tiled=True)
  found = table.astype(dtype)[ids]
  return jax.lax.all_to_all(found, 'fsdp', 0, 2, tiled=True)


def rules_of_rollout(rules) -> tuple:
  """Rules of the parameters that a token loop reads: split over tensor only."""
  return tuple(
    (pattern, PartitionSpec(*(a if a == 'tensor' else None for a in spec)))
    for pattern, spec in rules
  )


def gathered_for_rollout(params, rules):
  """Gathers params over fsdp, inside jit, once before a token loop.

  Without it decoding would gather the split weights again for every token.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return params
  shardings = tree_shardings(mesh, params, rules_of_rollout(rules))
  return jax.tree.map(
    lambda x, s: jax.lax.with_sharding_constraint(x, s.spec), params, shardings
  )
