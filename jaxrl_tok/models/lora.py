"""Low-rank adapters beside frozen matrices: y = x W + (alpha / r) (x A) B, and
only A and B are trained. arXiv:2106.09685.

Adapters are named by the matrices of the model's file, as PEFT stores them,
and stacked over the n layers that have one:

  model.layers.*.self_attn.q_proj   {'a': [n, r, in], 'b': [n, out, r]}

A forward pass needs them in the layout of our parameters, some of which hold
several of these matrices:

  qkv_lora  a [L, D, R]   b [L, R, K, M + 2, H]   R = r * adapted of q, k and v

`make_merge_params` adds such leaves to the tree of the base, for a rollout or
an update; the transformer multiplies by them in float32 whatever its compute
dtype is, so that no change of a weight is too small to count. No matrix of the
base is copied, and none has a gradient. `make_full_params` adds the products
to the matrices themselves, for an export.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp

from jaxrl_tok.models import quantize

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
    if not re.search(r'(^|/)layers/(\w*attention|mlp)/\w+$', mapping.path):
      continue
    for name, shape in mapping.tensors if mapping.in_axes else ():
      found[module_of(name)] = shape[::-1] if mapping.transposed else shape
  return found


def stack_of(module: str) -> str:
  """Name of the stack of a layer's module: its first number is the layer's."""
  return re.sub(r'\.\d+\.', '.*.', module, count=1)


def stacks_of(modules: Sequence[str]) -> dict[str, list[str]]:
  """{stack: its modules, in the order of their layers}."""
  found = {}
  for module in modules:
    found.setdefault(stack_of(module), []).append(module)
  return found


def by_module(adapters: dict, modules: Sequence[str]) -> dict:
  """Splits stacked adapters: {module: {'a': [r, in], 'b': [out, r]}}."""
  return {
    module: {side: x[i] for side, x in adapters[stack].items()}
    for stack, names in stacks_of(modules).items()
    for i, module in enumerate(names)
  }


def stacked(sides: dict) -> dict:
  """Stacks the adapters of modules; by_module undoes it."""
  return {
    stack: jax.tree.map(lambda *x: jnp.stack(x), *(sides[m] for m in names))
    for stack, names in stacks_of(sides).items()
  }


def targeted(mappings: Sequence, targets: Sequence[str]) -> dict:
  """{module: (number in, number out)} of the targets, in the model's order,
  whatever that of the targets: rows of a stack are its layers. Raises
  ValueError, with the names there are, for a target in which no module's name
  ends."""
  modules = adaptable(mappings)
  found = set()
  for target in targets:
    hit = {
      module
      for module in modules
      if target == ALL_LINEAR or f'.{module}'.endswith(f'.{target}')
    }
    if not hit:
      ends = sorted({module.rsplit('.', 1)[-1] for module in modules})
      raise ValueError(
        f'--lora_targets {target} is the name of no matrix; this model has '
        f'{", ".join(ends)}, or give {ALL_LINEAR}'
      )
    found |= hit
  return {module: modules[module] for module in modules if module in found}


def init(modules: dict, rank: int, key: jax.Array) -> dict:
  """Adapters that change nothing yet: A uniform in +- 1/sqrt(in), B zero."""
  number = {module: i for i, module in enumerate(modules)}

  def one(i, n_in):
    key_i, bound = jax.random.fold_in(key, i), n_in**-0.5
    return jax.random.uniform(key_i, (rank, n_in), minval=-bound, maxval=bound)

  def stack(names):
    n_in, n_out = modules[names[0]]
    numbers = jnp.array([number[name] for name in names])
    a = jax.vmap(functools.partial(one, n_in=n_in))(numbers)
    return {'a': a, 'b': jnp.zeros((len(names), n_out, rank))}

  return {name: stack(names) for name, names in stacks_of(modules).items()}


class Adapted(NamedTuple):
  """Parameter that holds matrices with adapters, in some of its layers."""

  mapping: Any  # ParamMapping of its first layer
  rows: int  # L, or n: layers that the parameter has
  # for each matrix of the file: (stack of its adapters, rows that have one)
  sides: tuple


def _adapted(mappings: Sequence, modules: dict) -> list[Adapted]:
  """Lists the parameters that hold matrices with an adapter.

  modules: those that have one.
  """
  layers = {}
  for mapping in mappings:
    if mapping.row is not None:
      layers.setdefault(mapping.path, []).append(mapping)
  found = []
  for stack in layers.values():
    sides = []
    for i in range(len(stack[0].tensors)):
      names = [module_of(mapping.tensors[i][0]) for mapping in stack]
      rows = [j for j, name in enumerate(names) if name in modules]
      if rows:
        sides.append((i, stack_of(names[0]), rows))
    if sides:
      found.append(Adapted(stack[0], len(stack), tuple(sides)))
  return found


def _factors(param: Adapted, adapters: dict, scale: float, shape: tuple):
  """{'a': [L, in, R], 'b': [L, R, *out axes]} of one of our parameters, with
  the scale in b; zeros for layers without an adapter.

  shape: the parameter's, in one layer.
  """
  mapping = param.mapping

  def in_all_layers(x, rows):
    if len(rows) == param.rows:
      return x
    return jnp.zeros((param.rows, *x.shape[1:]), x.dtype).at[rows].set(x)

  a_sides, b_sides = [], []
  for i, name, rows in param.sides:
    a, b = (in_all_layers(adapters[name][s], jnp.array(rows)) for s in 'ab')
    b = b if mapping.transposed else b.swapaxes(1, 2)

    def stored(x, i=i, shape=b.shape[1:]):  # ours -> the file's matrix
      views = [view.reshape(-1) for view in mapping.views(x)[i]]
      return jnp.concatenate(views).reshape(shape)

    # reading a matrix out is linear, and its transpose puts it back
    like = (a.shape[1], *shape[mapping.in_axes :])
    back = jax.linear_transpose(stored, jax.ShapeDtypeStruct(like, b.dtype))
    b_sides.append(jax.vmap(lambda b, back=back: back(b)[0])(b))
    a_sides.append(a.swapaxes(1, 2))
  a, b = jnp.concatenate(a_sides, axis=2), jnp.concatenate(b_sides, axis=1)
  return {'a': a, 'b': scale * b}


def make_merge_params(
  mappings: Sequence, modules: dict, scale: float
) -> Callable:
  """Returns merge_params(adapters, base) -> the base with leaves `*_lora`
  beside the matrices, pure; adapters None: the base.

  modules: those with an adapter, as `targeted` returns them.
  """
  adapted = _adapted(mappings, modules)

  def merge_params(adapters: dict | None, base):
    if adapters is None:
      return base
    flat = flax.traverse_util.flatten_dict(base, sep='/')
    for param in adapted:
      path = param.mapping.path
      shape = flat[path].shape[1:]
      for side, x in _factors(param, adapters, scale, shape).items():
        flat[f'{path}_lora/{side}'] = x
    return flax.traverse_util.unflatten_dict(flat, sep='/')

  return merge_params


def _with_product(leaf, factors: dict):
  """Adds a b to matrices [L, ...], in float32."""
  change = jnp.einsum(
    'lir,lr...->li...',
    factors['a'],
    factors['b'],
    precision=jax.lax.Precision.HIGHEST,
  )
  return leaf.astype(jnp.float32) + change.reshape(leaf.shape)


def make_full_part(mappings: Sequence, modules: dict, scale: float) -> Callable:
  """Returns full_part(path, row, adapters, base, dtype) -> W + scale B A of one
  parameter, pure: added in float32, then in the wider of the base's dtype and
  `dtype`; an int8 base is dequantized first.

  row: of a stack, one layer's; None: all of the parameter.
  """
  adapted = {p.mapping.path: p for p in _adapted(mappings, modules)}

  def full_part(path: str, row, adapters: dict, base, dtype='float32'):
    flat = flax.traverse_util.flatten_dict(base, sep='/')
    leaf, steps = flat[path], flat.get(path + quantize.SUFFIX)
    param = adapted.get(path)
    if param is None and steps is None:
      return leaf if row is None else leaf[row]
    wide = jnp.promote_types(leaf.dtype, dtype)
    factors = {}
    if param is not None:
      factors = _factors(param, adapters, scale, leaf.shape[1:])
    if row is not None:
      leaf, steps, factors = jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, row), (leaf, steps, factors)
      )
    if steps is not None:
      leaf = quantize.dequantize(leaf, steps, quantize.input_axes(path))
    full = _with_product(leaf, factors) if factors else leaf
    return (full if row is None else full[0]).astype(wide)

  return full_part


def make_full_params(
  mappings: Sequence, modules: dict, scale: float
) -> Callable:
  """Returns full_params(adapters, base, dtype): `make_full_part` of all
  parameters, pure."""
  full_part = make_full_part(mappings, modules, scale)

  def full_params(adapters: dict, base, dtype='float32'):
    flat = flax.traverse_util.flatten_dict(base, sep='/')
    return flax.traverse_util.unflatten_dict(
      {
        path: full_part(path, None, adapters, base, dtype)
        for path in flat
        if path.removesuffix(quantize.SUFFIX) not in flat.keys() - {path}
      },
      sep='/',
    )

  return full_params
