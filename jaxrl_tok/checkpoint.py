"""Checkpoints of TrainState and of a run's progress, by Orbax.

A checkpoint {run}/checkpoints/{step}/ holds `state` (parameters, optimizer,
key, carries), `cursor` (the collector's place in the data) and `meta`, a
JSON of the run's progress, its settings and the shape of every leaf. Saving is
asynchronous: the next step goes on while the files are written.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_tok import processes
from jaxrl_tok.report import mirror
from jaxrl_tok.sharding import is_stacked, path_name
from jaxrl_tok.types import TrainState

FORMAT = 5
LAYERED = 4  # the format before stacks, which is read as well


class Kept:
  """Policy of Orbax: the newest checkpoints stay, and the best one."""

  def __init__(self, newest: int, best: Callable[[], int | None]):
    self.newest, self.best = newest, best

  def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
    old, best = len(checkpoints) - self.newest, self.best()
    return [i >= old or c.step == best for i, c in enumerate(checkpoints)]


def open_checkpoints(
  run_dir: str | Path,
  keep: int | None = None,
  best: Callable[[], int | None] = lambda: None,
) -> ocp.CheckpointManager:
  """Opens the checkpoints of a run; the newest `keep` of them stay, and that of
  the step best(). None: opens them to be read only."""
  options = {'read_only': True}
  if keep is not None:
    options = {
      'preservation_policy': Kept(keep, best),
      'enable_async_checkpointing': True,
    }
  return ocp.CheckpointManager(
    mirror.checkpoints(run_dir),
    options=ocp.CheckpointManagerOptions(**options),
  )


def _leaves(state) -> dict[str, str]:
  """Describes every leaf: {path: 'dtype[shape]'}."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {path_name(p): f'{x.dtype}{list(x.shape)}' for p, x in leaves}


def save(
  manager: ocp.CheckpointManager,
  state: TrainState,
  cursor: dict,
  progress: dict,
  settings: dict,
) -> None:
  """Saves asynchronously; `wait` or `close` the manager to finish.

  Frozen parameters are not written: the model's files still have them.
  """
  state = state.replace(frozen=None)
  meta = {
    'format': FORMAT,
    'progress': progress,
    'settings': settings,
    'leaves': _leaves(state),
  }
  step = int(state.step)
  cursor = jax.tree.map(np.asarray, processes.whole(cursor))
  saved = manager.save(
    step,
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      cursor=ocp.args.StandardSave(cursor),
      meta=ocp.args.JsonSave(meta),
    ),
  )
  if not saved:  # Orbax raises nothing here
    raise FileExistsError(
      f'checkpoint {step} was not saved: {manager.directory} already has '
      f'step {manager.latest_step()}; pass --resume auto or another output_dir'
    )


def best_step(manager: ocp.CheckpointManager) -> int | None:
  """Step of the best evaluation, by the newest checkpoint; None without."""
  steps = sorted(manager.all_steps())
  if not steps:
    return None
  only = ocp.args.Composite(meta=ocp.args.JsonRestore())
  return manager.restore(steps[-1], args=only).meta['progress'].get('best_step')


def saved_steps(run_dir: str | Path) -> list[int]:
  """Steps of a run's checkpoints on disk, ascending."""
  place = mirror.checkpoints(run_dir)
  if not isinstance(place, Path):  # a bucket, where half of one has its name
    return sorted(ocp.utils.checkpoint_steps(place))
  found = place.glob('[0-9]*')
  return sorted(int(p.name) for p in found if p.name.isdecimal())


def drop_after(manager: ocp.CheckpointManager, step: int) -> list[int]:
  """Deletes the checkpoints after a step, which a run resumed there makes
  anew; returns their steps."""
  later = [s for s in sorted(manager.all_steps()) if s > step]
  for s in later:
    manager.delete(s)
  return later


def choose_step(manager: ocp.CheckpointManager, resume: str) -> int | None:
  """Chooses the step that --resume auto|STEP names; None if auto finds none."""
  steps = sorted(manager.all_steps())
  if resume == 'auto':
    return steps[-1] if steps else None
  if int(resume) not in steps:
    listed = ', '.join(map(str, steps)) or 'none'
    raise ValueError(
      f'no checkpoint of step {resume} in {manager.directory}; '
      f'there are: {listed}'
    )
  return int(resume)


def restore(
  manager: ocp.CheckpointManager, step: int, like: TrainState
) -> tuple[TrainState, dict, dict]:
  """Restores (state, cursor, meta) of a step, with the shardings of `like`;
  frozen parameters are None. `like` may hold ShapeDtypeStructs.

  Raises ValueError when the checkpoint's leaves are not those of `like`, as of
  another model, optimizer or algorithm.
  """
  meta = manager.restore(
    step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
  ).meta
  if meta['format'] not in (LAYERED, FORMAT):
    raise ValueError(
      f'checkpoint {step} has format {meta["format"]} and this version reads '
      f'{LAYERED} and {FORMAT}; resume with the version that wrote it, or pass '
      'another output_dir'
    )
  like, have = like.replace(frozen=None), meta['leaves']
  was_layered = meta['format'] == LAYERED
  stored = layered(like, have) if was_layered else like
  want = _leaves(stored)
  for name in sorted(want.keys() | have.keys()):
    if want.get(name) != have.get(name):
      raise ValueError(
        f'checkpoint {step} has {name} {have.get(name, "missing")} and this '
        f'run {want.get(name, "no such leaf")}; resume with the flags that '
        'the run was started with (config.yaml)'
      )
  shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, stored)
  found = manager.restore(
    step,
    args=ocp.args.Composite(
      state=ocp.args.StandardRestore(shapes),
      cursor=ocp.args.StandardRestore(),
    ),
  )
  state = found.state
  if was_layered:
    state = stacked(state, like)
  return state, found.cursor, meta


# --- the format before stacks -------------------------------------------------
#
#   format 4   layer_0/mlp/down, layer_1/mlp/down; model.layers.0.mlp.up_proj/a
#   format 5   layers/mlp/down [L, ...];           model.layers.*.mlp.up_proj/a
#
# Moments and carries follow their parameters.


def _names(name: str, saved: Iterable[str]) -> list[str]:
  """Lists the names in format 4, by layer, that a stack's name in a tree of
  parameters stands for: saved paths end with them."""
  pattern = re.sub(
    r'(^|/)layers/', r'\1layer_(\\d+)/', re.escape(name), count=1
  )
  pattern = pattern.replace(r'\.\*\.', r'\.(\d+)\.')
  found = (re.fullmatch(f'(.*/)?({pattern})', path) for path in saved)
  found = {(int(match[3]), match[2]) for match in found if match}
  return [name for _, name in sorted(found)]


def _has_stacks(node) -> bool:
  return isinstance(node, dict) and (
    'layers' in node or any(is_stacked(f'{key}/') for key in node)
  )


def _of_a_layer(stack):
  """Shape and placing of one layer's part of a stack; a node without arrays
  (optax.MaskedNode) stays."""
  if not hasattr(stack, 'shape'):
    return stack
  place = stack.sharding
  if isinstance(place, NamedSharding):
    place = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
  return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=place)


def layered(state, saved: Iterable[str]):
  """Replaces stacks by the leaves of format 4.

  Args:
    state: TrainState of arrays or ShapeDtypeStructs.
    saved: paths of the leaves in the checkpoint.
  """

  def split(node):
    if not _has_stacks(node):
      return node
    found = {}
    for name, x in flax.traverse_util.flatten_dict(node, sep='/').items():
      names = _names(name, saved) if is_stacked(name) else None
      found |= (
        {name: x} if names is None else dict.fromkeys(names, _of_a_layer(x))
      )
    return flax.traverse_util.unflatten_dict(found, sep='/')

  return jax.tree.map(split, state, is_leaf=_has_stacks)


def stacked(state, like):
  """Stacks the leaves of format 4, as `layered` named them.

  like: TrainState of the shapes and placings to give it.
  """

  def joined(node, old):
    if not _has_stacks(node):
      return old
    old, found = flax.traverse_util.flatten_dict(old, sep='/'), {}
    for name, x in flax.traverse_util.flatten_dict(node, sep='/').items():
      found[name] = old.get(name, x)
      if is_stacked(name) and hasattr(x, 'shape'):
        join = jax.jit(lambda *rows: jnp.stack(rows), out_shardings=x.sharding)
        found[name] = join(*(old[k] for k in _names(name, old)))
    return flax.traverse_util.unflatten_dict(found, sep='/')

  return jax.tree.map(joined, like, state, is_leaf=_has_stacks)
