"""Checkpoints of TrainState and of a run's progress, by Orbax.

A checkpoint {run}/checkpoints/{step}/ holds `state` (parameters, optimizer,
key, carries), `cursor` (the collector's place in the data) and `meta`, a
JSON of the run's progress, its settings and the shape of every leaf. Saving is
asynchronous: the next step goes on while the files are written.
"""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxrl_tok.sharding import path_name
from jaxrl_tok.types import TrainState

FORMAT = 4


def open_checkpoints(
  run_dir: str | Path, keep: int | None = None
) -> ocp.CheckpointManager:
  """Opens the checkpoints of a run; the newest `keep` of them stay. None: opens
  them to be read only."""
  options = {'read_only': True}
  if keep is not None:
    options = {'max_to_keep': keep, 'enable_async_checkpointing': True}
  return ocp.CheckpointManager(
    Path(run_dir).absolute() / 'checkpoints',
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
  cursor = jax.tree.map(np.asarray, jax.device_get(cursor))
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


def saved_steps(run_dir: str | Path) -> list[int]:
  """Steps of a run's checkpoints on disk, ascending."""
  found = (Path(run_dir) / 'checkpoints').glob('[0-9]*')
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
  if meta['format'] != FORMAT:
    raise ValueError(
      f'checkpoint {step} has format {meta["format"]} and this version reads '
      f'{FORMAT}; resume with the version that wrote it, or pass another '
      'output_dir'
    )
  like = like.replace(frozen=None)
  want, have = _leaves(like), meta['leaves']
  for name in sorted(want.keys() | have.keys()):
    if want.get(name) != have.get(name):
      raise ValueError(
        f'checkpoint {step} has {name} {have.get(name, "missing")} and this '
        f'run {want.get(name, "no such leaf")}; resume with the flags that '
        'the run was started with (config.yaml)'
      )
  shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
  found = manager.restore(
    step,
    args=ocp.args.Composite(
      state=ocp.args.StandardRestore(shapes),
      cursor=ocp.args.StandardRestore(),
    ),
  )
  return found.state, found.cursor, meta
