"""Trainable: which parameters of a model an optimizer changes, how they are
read, and how they become a directory again.

`full` trains all of a model, `adapted` low-rank adapters beside a frozen base
(models/lora.py). Whoever trains calls a Trainable's functions and need not know
which it is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_tok import processes, sharding
from jaxrl_tok.finite import check_finite
from jaxrl_tok.hub import adapters as peft
from jaxrl_tok.hub.directory import atomic_directory, save, write_card
from jaxrl_tok.hub.model import Model
from jaxrl_tok.hub.weights import SHARD_BYTES, param_structs, read_params
from jaxrl_tok.models import lora
from jaxrl_tok.types import Policy, first_argument

HEAD = 'value_head'  # parameter of a classifier's score
QUANTIZED_SHARD_BYTES = 10**9  # of a file, where memory is short


class Trainable(NamedTuple):
  """Functions of (trained, frozen) parameters; frozen None: there are none."""

  structs: Callable  # () -> (trained, frozen) as ShapeDtypeStructs
  init: Callable  # key -> trained parameters that nobody has trained, traced
  load: Callable  # mesh -> (trained, frozen), read and placed
  load_frozen: Callable  # mesh -> frozen: the part that no checkpoint holds
  merge: Callable  # (trained, frozen) -> params: Policy.merge_params
  # (out, trained, frozen, card, dtype='float32', replace=False) -> out: a
  # model directory of its own; `dtype` as in lora.make_full_params
  save: Callable
  # (run_dir, trained, frozen, card, dtype) -> run_dir/export, written anew;
  # adapters also as run_dir/adapter
  export: Callable


def check_export(trained) -> None:
  """Refuses to write parameters that are not finite."""
  check_finite(trained, 'the policy', 'export an earlier checkpoint')


def random_params(policy: Policy, mesh, seed: int):
  """Parameters that nobody has trained, placed."""
  rules, key = policy.partition_rules, jax.random.key(seed)
  return sharding.born_sharded(policy.init, mesh, rules, key)[0]


def full(
  model: Model, param_dtype: str | None = 'float32', seed: int = 0
) -> Trainable:
  """Trains all parameters.

  Args:
    param_dtype: None: that of the files.
    seed: makes the weights of a model that has no files.
  """
  policy = model.make_policy(attention='xla')

  def load(mesh):
    if model.directory is not None:
      return read_params(model, mesh, param_dtype), None
    return random_params(policy, mesh, seed), None

  def save_as(
    out, trained, frozen, card=None, dtype='float32', replace=False
  ) -> Path:
    check_export(trained)
    # a shared critic's head, which the model began without
    headed = 'value_head' in trained and not model.config.value_head
    described = model.with_value_head() if headed else model
    return save(out, described, trained, card, replace=replace)

  def export(run_dir, trained, frozen, card, dtype='float32') -> Path:
    out = Path(run_dir) / 'export'
    return save_as(out, trained, frozen, card, dtype, replace=True)

  return Trainable(
    structs=lambda: (param_structs(model, param_dtype), None),
    init=policy.init,
    load=load,
    load_frozen=lambda mesh: None,
    merge=first_argument,
    save=save_as,
    export=export,
  )


def adapted(
  model: Model,
  config: lora.LoraConfig,
  param_dtype: str | None = None,
  seed: int = 0,
  directory: str | Path | None = None,
  quantized: bool = False,
) -> Trainable:
  """Trains adapters; the model stays as it is.

  Args:
    config: rank, scale and the matrices that have one; with `directory`,
      adapters.load_config(directory).
    param_dtype: of the frozen base; None: that of its files.
    seed: makes new adapters.
    directory: with adapters to begin from, as PEFT stores them.
    quantized: hold the base's matrices in int8 (models/quantize.py).

  Raises ValueError, in one line, for a target that is no matrix of the model.
  """
  mappings = model.param_mappings
  modules = lora.targeted(mappings, config.targets)
  full_params = lora.make_full_params(mappings, modules, config.scale)
  full_part = jax.jit(
    lora.make_full_part(mappings, modules, config.scale),
    static_argnames=('path', 'dtype'),
  )

  def init(key):
    return lora.init(modules, config.rank, key)

  def load_frozen(mesh):
    return read_params(model, mesh, param_dtype, quantized)

  def load(mesh):
    if directory is None:
      trained = jax.jit(init)(jax.random.key(seed))
    else:
      trained = lora.stacked(peft.load(directory, config, mappings))
    return sharding.put_replicated(mesh, trained), load_frozen(mesh)

  def structs():
    shapes = jax.eval_shape(init, jax.random.key(0))
    return shapes, param_structs(model, param_dtype, quantized)

  def save_as(
    out, trained, frozen, card=None, dtype='float32', replace=False
  ) -> Path:
    check_export(trained)
    shapes = jax.eval_shape(
      lambda *trees: full_params(*trees, dtype), trained, frozen
    )

    def part_of(mapping):  # one at a time: all may be more than memory
      path, row = mapping.path, mapping.row
      return full_part(path, row, trained, frozen, dtype=dtype)

    size = QUANTIZED_SHARD_BYTES if quantized else SHARD_BYTES
    return save(out, model, shapes, card, size, replace, part_of)

  def export(run_dir, trained, frozen, card, dtype='float32') -> Path:
    check_export(trained)
    run_dir, family = Path(run_dir), model.family
    task = family.architecture.peft_task
    alone = processes.whole(lora.by_module(trained, modules))
    if processes.is_main():
      with atomic_directory(run_dir / 'adapter', replace=True) as part:
        peft.save(part, config, alone, model.origin, family.transposed, task)
        write_card(part, card, library='peft')
    out = run_dir / 'export'
    return save_as(out, trained, frozen, card, dtype, replace=True)

  return Trainable(
    structs=structs,
    init=init,
    load=load,
    load_frozen=load_frozen,
    merge=lora.make_merge_params(mappings, modules, config.scale),
    save=save_as,
    export=export,
  )


def with_head(adapters: Trainable) -> Trainable:
  """Trains the head of a classifier beside its adapters: trained parameters are
  {'adapters': ..., HEAD: ...}. `export` writes the merged model alone."""

  def split(trained, frozen):
    return {'adapters': trained, HEAD: frozen[HEAD]}, frozen

  def merge(trained, frozen):
    params = adapters.merge(trained['adapters'], frozen)
    return params | {HEAD: trained[HEAD]}

  def save_as(out, trained, frozen, *args, **more) -> Path:
    frozen = frozen | {HEAD: trained[HEAD]}
    return adapters.save(out, trained['adapters'], frozen, *args, **more)

  def export(run_dir, trained, frozen, card, dtype='float32') -> Path:
    out = Path(run_dir) / 'export'
    return save_as(out, trained, frozen, card, dtype, replace=True)

  def load(mesh):
    trained, frozen = split(*adapters.load(mesh))
    # an array of its own: a step takes the memory of what is trained
    return jax.tree.map(jnp.copy, trained), frozen

  return Trainable(
    structs=lambda: split(*adapters.structs()),
    init=adapters.init,
    load=load,
    load_frozen=adapters.load_frozen,
    merge=merge,
    save=save_as,
    export=export,
  )
