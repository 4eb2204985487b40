"""Weights of a model: from its files straight to the devices, and back.

Each tensor is read once, in pieces, into one of our parameters, or one layer's
row of it, and that is placed on its devices by its sharding: beyond what is
placed, host memory holds one such part and one piece. Tensors are written under
the names that they came with.
"""

import contextlib
import functools
import gc
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_tok import processes, sharding
from jaxrl_tok.hub import fetch, gguf
from jaxrl_tok.hub.model import Model, TensorInfo
from jaxrl_tok.models import quantize

READ_BYTES = 16 * 2**20  # of a tensor, at a time
SHARD_BYTES = 5 * 10**9  # of a file
DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
VALUE_HEAD = 'v_head.weight'


@contextlib.contextmanager
def _opened(file: Path):
  from safetensors import SafetensorError, safe_open

  if fetch.is_gguf(file):
    yield gguf.read(file)
    return
  try:
    with safe_open(file, 'np') as opened:
      yield opened
  except SafetensorError as e:
    raise ValueError(f'{file} is damaged: {e}; fetch it again') from None


def stored_tensors(directory: Path) -> dict[str, TensorInfo]:
  """Lists the tensors of model.safetensors, of the shards of an index, or of a
  GGUF file."""
  single, index = directory / fetch.SINGLE, directory / fetch.INDEX
  if directory.is_file():
    files = [directory]
  elif single.is_file():
    files = [single]
  elif index.is_file():
    files = sorted(directory / f for f in set(fetch.weight_map(index).values()))
  else:
    raise FileNotFoundError(
      f'{directory} has no {fetch.SINGLE} and no {fetch.INDEX}; convert the '
      'weights to safetensors (pickles are never read)'
    )
  found = {}
  for file in files:
    if not file.is_file():
      raise FileNotFoundError(
        f'{index} names {file.name}, which is missing; fetch it again'
      )
    with _opened(file) as opened:
      for name in opened.keys():  # noqa: SIM118  it is no dict
        part = opened.get_slice(name)
        dtype = part.get_dtype()
        found[name] = TensorInfo(file, name, tuple(part.get_shape()), dtype)
  return found


def fingerprint(model: Model) -> str | None:
  """Hashes names, sizes, and the first and last MiB of the weight files, to
  tell one set from another. None for random weights."""
  if not model.tensors:
    return None
  digest, edge = hashlib.sha256(), 2**20
  for file in sorted({stored.file for stored in model.tensors.values()}):
    size = file.stat().st_size
    digest.update(f'{file.name} {size}'.encode())
    with open(file, 'rb') as opened:
      digest.update(opened.read(edge))
      opened.seek(max(0, size - edge))
      digest.update(opened.read())
  return digest.hexdigest()


def copies(model: Model) -> dict[str, str]:
  """{name under which some files repeat a tensor: the tensor's name}: those of
  the embeddings, and a head that is tied to them."""
  names = model.family.names
  found = list(names.get('copies', ()))
  if model.config.tie_embeddings:
    found.append(names['head'])
  embeddings = f'{names["base"]}{names["embed"]}.weight'
  return {f'{name}.weight': embeddings for name in found}


def check_tensors(model: Model, stored: dict) -> dict[str, TensorInfo]:
  """{the family's name: TensorInfo} of the tensors that the model needs.

  Raises ValueError for tensors that are missing, misshapen or too many. A
  value head or an optional tensor may be missing: it begins at zero.
  """
  family, base = model.family, model.family.names['base']
  stored = dict(stored)
  if not any(name.startswith(base) for name in stored):
    # some files hold the decoder without its head, one level up
    heads = (family.names['head'], 'score', 'v_head')
    stored = {
      name if name.startswith(heads) else base + name: s
      for name, s in stored.items()
    }
  repeated = copies(model)
  for copy, name in repeated.items():  # some files have no other
    if copy in stored:
      stored.setdefault(name, stored[copy])
  found, missing, wrong = {}, [], []
  for mapping in model.param_mappings:
    for name, shape in mapping.tensors:
      if name not in stored:
        missing.append(name)
      elif stored[name].shape != shape:
        wrong.append(f'{name} is {list(stored[name].shape)}, not {list(shape)}')
      elif stored[name].dtype not in DTYPES:
        wrong.append(
          f'{name} is {stored[name].dtype}, not {" or ".join(DTYPES)}'
        )
      else:
        found[name] = stored[name]
  missing = [
    name
    for name in missing
    if name != VALUE_HEAD and not re.search(family.optional, name)
  ]
  if missing:
    raise ValueError(
      f'weights are missing: {_some(missing)}; use the files of one model'
    )
  if wrong:
    raise ValueError(
      f'weights do not fit config.json: {_some(wrong)}; use the files of one '
      'model'
    )
  found |= {copy: stored[copy] for copy in repeated if copy in stored}
  extra = [
    name
    for name in stored.keys() - found.keys() - {VALUE_HEAD}
    if not re.search(family.buffers, name)
  ]
  if extra:
    raise ValueError(
      f'weights of no use: {_some(sorted(extra))}; use the files of one model'
    )
  return found


def _some(names: list) -> str:
  """Lists the first names, and the number of the others."""
  rest = f' and {len(names) - 5} more' if len(names) > 5 else ''
  return ', '.join(names[:5]) + rest


def param_structs(
  model: Model, dtype: str | None = None, quantized: bool = False
):
  """ShapeDtypeStructs of the model's parameters.

  Args:
    dtype: None: the file's, or float32 where it does not have them; without
      files config.json's.
    quantized: those of matrices are int8, with scales beside them.
  """
  policy = model.make_policy(attention='xla')
  shapes = jax.eval_shape(policy.init, jax.random.key(0))
  flat, kinds = flax.traverse_util.flatten_dict(shapes, sep='/'), {}
  absent = 'float32'
  if model.directory is not None and not model.tensors:
    named = model.hf_config.get('dtype') or model.hf_config.get('torch_dtype')
    absent = named or absent
  for mapping in model.param_mappings:
    stored = [model.tensors.get(name) for name, _ in mapping.tensors]
    found = kinds.setdefault(mapping.path, set())
    found |= {DTYPES[s.dtype] if s else absent for s in stored}
  for path, found in kinds.items():
    theirs = found.pop() if len(found) == 1 else 'float32'  # loses nothing
    flat[path] = jax.ShapeDtypeStruct(flat[path].shape, dtype or theirs)
  tree = flax.traverse_util.unflatten_dict(flat, sep='/')
  return quantize.structs(tree) if quantized else tree


def _fill(part, views: tuple) -> None:
  """Reads a tensor of a file into views of a parameter, piece by piece."""
  row, row_size = 0, math.prod(part.get_shape()[1:])
  for view in views:
    rows = view[0].size // row_size  # of the file, in one of the view's
    step = max(1, READ_BYTES // view[0].nbytes)
    for i in range(0, len(view), step):
      piece = view[i : i + step]
      end = row + len(piece) * rows
      piece[...] = part[row:end].reshape(piece.shape)
      row = end


def _read_param(model: Model, mapping, struct, files: dict) -> np.ndarray:
  """Reads one parameter, or a row of a stack; zeros for what the files may
  lack."""
  stacked = mapping.row is not None
  array = np.zeros(struct.shape[stacked:], struct.dtype)
  for (name, _), views in zip(mapping.tensors, mapping.views(array)):
    stored = model.tensors.get(name)
    if stored:
      _fill(files[stored.file].get_slice(stored.name), views)
  return array


@functools.partial(jax.jit, donate_argnums=0)
def _put_row(stack, row, x):
  return jax.lax.dynamic_update_index_in_dim(stack, x, row, 0)


def _place(array: np.ndarray, place: NamedSharding) -> jax.Array:
  """Copies an array of the host to its devices."""
  return jax.block_until_ready(
    jax.make_array_from_callback(array.shape, place, array.__getitem__)
  )


def _place_row(stack, struct, row: int, array, place: NamedSharding):
  """Copies an array to a row of a stack on its devices, in place; stack None:
  a new one."""
  if stack is None:
    zeros = functools.partial(jnp.zeros, struct.shape, struct.dtype)
    stack = jax.jit(zeros, out_shardings=place)()
  alone = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
  return jax.block_until_ready(_put_row(stack, row, _place(array, alone)))


def _quantized(mapping, array: np.ndarray) -> dict:
  """{path: array} of a parameter in int8 and its scale, or as it is."""
  axes = quantize.input_axes(mapping.path)
  if axes is None:
    return {mapping.path: array}
  try:
    q, scale = quantize.quantize(array, axes)
  except ValueError as e:
    raise ValueError(f'{mapping.tensors[0][0]}: {e}') from None
  return {mapping.path: q, mapping.path + quantize.SUFFIX: scale}


def read_params(
  model: Model, mesh=None, dtype: str | None = None, quantized: bool = False
):
  """Reads the parameters, each layer's placed on `mesh` by the partition rules
  of its network before the next is read.

  Args:
    mesh: None: the first device.
    dtype: of the parameters; None: the file's.
    quantized: hold matrices as int8 (quantize.py), each layer's made when it is
      read.
  """
  read = flax.traverse_util.flatten_dict(param_structs(model, dtype), sep='/')
  structs = param_structs(model, dtype, quantized)
  rules = model.make_policy(attention='xla').partition_rules
  mesh = mesh or sharding.make_mesh('data=1', jax.devices()[:1])
  places = sharding.tree_shardings(mesh, structs, rules)
  structs, places = (
    flax.traverse_util.flatten_dict(t, sep='/') for t in (structs, places)
  )
  flat = {}
  with contextlib.ExitStack() as stack:
    files = {
      file: stack.enter_context(_opened(file))
      for file in {stored.file for stored in model.tensors.values()}
    }
    for mapping in model.param_mappings:
      row = mapping.row
      array = _read_param(model, mapping, read[mapping.path], files)
      parts = _quantized(mapping, array) if quantized else {mapping.path: array}
      for path, part in parts.items():
        struct, place = structs[path], places[path]
        if row is None:
          flat[path] = _place(part, place)
        else:
          flat[path] = _place_row(flat.get(path), struct, row, part, place)
      del array, parts, part
      gc.collect(0)  # jax lets go of what it has copied when Python collects
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def _flattened(views: tuple, shape: tuple, dtype) -> np.ndarray:
  """Joins the views of a parameter to the tensor of the file."""
  out, at = np.empty(math.prod(shape), dtype), 0
  for view in views:
    out[at : at + view.size].reshape(view.shape)[...] = view
    at += view.size
  return out.reshape(shape)


def _on_host(leaf) -> np.ndarray:
  """Copies an array to the host through another jax.Array of its buffers: jax
  keeps a copy as long as the array that it was read through."""
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    return processes.whole(leaf)
  if isinstance(leaf, jax.Array):
    leaf = jax.make_array_from_single_device_arrays(
      leaf.shape, leaf.sharding, [s.data for s in leaf.addressable_shards]
    )
  return np.asarray(leaf)


def _tensors_of(mapping, array: np.ndarray, model: Model) -> dict:
  """{name in the file: tensor} of one parameter."""
  found = {}
  for (name, shape), views in zip(mapping.tensors, mapping.views(array)):
    stored = model.tensors.get(name)  # under the name it came with
    name = stored.name if stored else name
    found[name] = _flattened(views, shape, array.dtype)
  for copy in copies(model) if mapping.path == 'embed/embedding' else ():
    if copy in model.tensors:  # it came repeated
      found[model.tensors[copy].name] = array
  return found


def _num_bytes(mapping, flat: dict) -> int:
  leaf = flat[mapping.path]
  rows = 1 if mapping.row is None else leaf.shape[0]
  return leaf.size * leaf.dtype.itemsize // rows


def _is_written(model: Model, mapping) -> bool:
  """Tells whether a parameter has a place in the files: an optional one that
  they came without has none."""
  optional = model.family.optional
  return not model.tensors or any(
    name in model.tensors or not re.search(optional, name)
    for name, _ in mapping.tensors
  )


def write_weights(
  out: Path | None,
  model: Model,
  params,
  shard_bytes: int,
  part_of: Callable | None = None,
) -> None:
  """model.safetensors, or shards of about shard_bytes and their index; the
  tensors of one shard at a time are on the host.

  Args:
    out: None: write nothing, on a process that others read its part from.
    part_of: ParamMapping -> array, its parameter or row of one; params may then
      be structs. None: those of params.
  """
  from safetensors.numpy import save_file

  flat = flax.traverse_util.flatten_dict(params, sep='/')
  shards, size = [[]], 0
  for mapping in model.param_mappings:
    if not _is_written(model, mapping):
      continue
    nbytes = _num_bytes(mapping, flat)
    if shards[-1] and size + nbytes > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(mapping)
    size += nbytes
  part_of = part_of or (lambda mapping: mapping.part(flat[mapping.path]))
  rest = flat.keys() - {mapping.path for mapping in model.param_mappings}
  if rest:
    raise ValueError(f'no place in the file for {", ".join(sorted(rest))}')
  index, total = {}, 0
  for number, shard in enumerate(shards, 1):
    file = fetch.SINGLE
    if len(shards) > 1:
      file = f'model-{number:05}-of-{len(shards):05}.safetensors'
    content = {}
    for mapping in shard:
      total += _num_bytes(mapping, flat)
      part = part_of(mapping)
      content |= _tensors_of(mapping, _on_host(part), model)
      gc.collect(0)  # of what jax read
    if out is not None:
      save_file(content, out / file, metadata={'format': 'pt'})
    index |= dict.fromkeys(content, file)
  if len(shards) > 1 and out is not None:
    content = {'metadata': {'total_size': total}, 'weight_map': index}
    (out / fetch.INDEX).write_text(json.dumps(content, indent=2) + '\n')
