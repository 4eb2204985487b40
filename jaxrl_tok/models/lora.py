"""Low-rank adapters beside frozen matrices: y = x W + (alpha / r) (x A) B, and
only A and B are trained. arXiv:2106.09685.

Adapters are named and shaped as PEFT stores them, by the matrices of the
model's file: {module: {'a': [r, in], 'b': [out, r]}}. A forward pass needs them
in the layout of our parameters, some of which hold several of these matrices:

  qkv_lora  a [D, R]   b [R, K, M + 2, H]    R = r * adapted of q, k and v

`make_merge_params` adds such leaves to the tree of the base, for a rollout or
an update; the transformer multiplies by them in float32 whatever its compute
dtype is, so that no change of a weight is too small to count. No matrix of the
base is copied, and none has a gradient. `make_full_params` adds the products
to the matrices themselves, for an export.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import flax.traverse_util
import jax
import jax.numpy as jnp

ALL_LINEAR = 'all-linear'


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """targets: ends of module names, as q_proj or mlp.c_fc; or 'all-linear'."""

  rank: int
  alpha: float
  targets: tuple = (ALL_LINEAR,)

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


def module_of(tensor: str) -> str:
  """Name of the module whose weight a tensor of the file is."""
  return tensor.removesuffix('.weight')


def adaptable(mappings: Sequence) -> dict:
  """{module: (number in, number out)} of the matrices that may have an
  adapter: those of the blocks, except experts and their routers.

  mappings: a model's ParamMapping records.
  """
  found = {}
  for mapping in mappings:
    if not re.fullmatch(r'layer_\d+/(attention|mlp)/\w+', mapping.path):
      continue
    for name, shape in mapping.tensors if mapping.in_axes else ():
      found[module_of(name)] = shape[::-1] if mapping.transposed else shape
  return found


def targeted(mappings: Sequence, targets: Sequence[str]) -> dict:
  """{module: (number in, number out)} of the targets. Raises ValueError, with
  the names there are, for a target in which no module's name ends."""
  modules = adaptable(mappings)
  found = {}
  for target in targets:
    hit = {
      module: sizes
      for module, sizes in modules.items()
      if target == ALL_LINEAR or f'.{module}'.endswith(f'.{target}')
    }
    if not hit:
      ends = sorted({module.rsplit('.', 1)[-1] for module in modules})
      raise ValueError(
        f'--lora_targets {target} is the name of no matrix; this model has '
        f'{", ".join(ends)}, or give {ALL_LINEAR}'
      )
    found |= hit
  return found


def init(modules: dict, rank: int, key: jax.Array) -> dict:
  """Adapters that change nothing yet: A uniform in +- 1/sqrt(in), B zero."""

  def one(i, n_in, n_out):
    bound = n_in**-0.5
    a = jax.random.uniform(
      jax.random.fold_in(key, i), (rank, n_in), minval=-bound, maxval=bound
    )
    return {'a': a, 'b': jnp.zeros((n_out, rank))}

  return {m: one(i, *sizes) for i, (m, sizes) in enumerate(modules.items())}


def _adapted(mappings: Sequence, adapters: dict):
  """Mappings of the parameters that hold a matrix with an adapter."""
  for mapping in mappings:
    if any(module_of(name) in adapters for name, _ in mapping.tensors):
      yield mapping


def _factors(mapping, adapters: dict, scale: float, shape: tuple) -> dict:
  """{'a': [in, R], 'b': [R, *out axes]} of one of our parameters of this
  shape, with the scale in b."""
  a_sides, b_sides = [], []
  for i, (name, _) in enumerate(mapping.tensors):
    sides = adapters.get(module_of(name))
    if sides is None:
      continue
    b = sides['b'] if mapping.transposed else sides['b'].T

    def stored(x, i=i, shape=b.shape):  # ours -> the file's matrix
      views = [view.reshape(-1) for view in mapping.views(x)[i]]
      return jnp.concatenate(views).reshape(shape)

    # reading a matrix out is linear, and its transpose puts it back
    rows = sides['a'].shape[0], *shape[mapping.in_axes :]
    like = jax.ShapeDtypeStruct(rows, b.dtype)
    b_sides += jax.linear_transpose(stored, like)(b)
    a_sides.append(sides['a'].T)
  a, b = jnp.concatenate(a_sides, axis=1), jnp.concatenate(b_sides)
  return {'a': a, 'b': scale * b}


def make_merge_params(mappings: Sequence, scale: float) -> Callable:
  """Returns merge_params(adapters, base) -> the base with leaves `*_lora`
  beside the matrices, pure; adapters None: the base."""

  def merge_params(adapters: dict | None, base):
    if adapters is None:
      return base
    flat = flax.traverse_util.flatten_dict(base, sep='/')
    for mapping in _adapted(mappings, adapters):
      shape = flat[mapping.path].shape
      for side, x in _factors(mapping, adapters, scale, shape).items():
        flat[f'{mapping.path}_lora/{side}'] = x
    return flax.traverse_util.unflatten_dict(flat, sep='/')

  return merge_params


def make_full_params(mappings: Sequence, scale: float) -> Callable:
  """Returns full_params(adapters, base, dtype) -> W + scale B A, pure: added
  in float32, then in the wider of the base's dtype and `dtype`."""

  def full_params(adapters: dict, base, dtype='float32'):
    flat = flax.traverse_util.flatten_dict(base, sep='/')
    for mapping in _adapted(mappings, adapters):
      leaf = flat[mapping.path]
      factors = _factors(mapping, adapters, scale, leaf.shape)
      change = jnp.tensordot(
        factors['a'], factors['b'], 1, precision=jax.lax.Precision.HIGHEST
      )
      total = leaf.astype(jnp.float32) + change.reshape(leaf.shape)
      flat[mapping.path] = total.astype(jnp.promote_types(leaf.dtype, dtype))
    return flax.traverse_util.unflatten_dict(flat, sep='/')

  return full_params
