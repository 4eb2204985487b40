"""TrainState whole, and where the run stood, saved by Orbax.

A checkpoint {run}/checkpoints/{step}/ holds `state` (parameters, optimizer,
key, the algorithm's carry, the reference) and `meta`, a JSON of the run's
progress, its flags and the shape of every leaf. Saving is asynchronous: the
next step goes on while the files are written.
"""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from jaxrl_tok.sharding import path_name
from jaxrl_tok.types import TrainState

FORMAT = 2


def open_checkpoints(run_dir: str | Path, keep: int) -> ocp.CheckpointManager:
  """The checkpoints of a run; the newest `keep` of them stay."""
  return ocp.CheckpointManager(
    Path(run_dir).absolute() / 'checkpoints',
    options=ocp.CheckpointManagerOptions(
      max_to_keep=keep, enable_async_checkpointing=True
    ),
  )


def _leaves(state) -> dict[str, str]:
  """{path: 'dtype[shape]'} of every leaf."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {path_name(p): f'{x.dtype}{list(x.shape)}' for p, x in leaves}


def save(
  manager: ocp.CheckpointManager, state: TrainState, progress: dict, flags: dict
) -> None:
  """Starts writing; `wait` or `close` the manager to be sure of it.

  What is frozen is not written: it is where it was read from.
  """
  state = state.replace(frozen=None)
  meta = {
    'format': FORMAT,
    'progress': progress,
    'flags': flags,
    'leaves': _leaves(state),
  }
  step = int(state.step)
  saved = manager.save(
    step,
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
    ),
  )
  if not saved:  # Orbax says so only by its return value
    raise RuntimeError(
      f'checkpoint {step} was not saved: {manager.directory} already has '
      f'step {manager.latest_step()}; pass --resume auto or another output_dir'
    )


def choose_step(manager: ocp.CheckpointManager, resume: str) -> int | None:
  """The step that --resume auto|STEP names; None when auto finds none."""
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
) -> tuple[TrainState, dict]:
  """(state, meta) of a step, placed as the state `like` is, but for what is
  frozen: that is None. `like` may hold ShapeDtypeStructs.

  Raises ValueError when the checkpoint's leaves are not those of `like`: it
  was made with another model, optimizer or algorithm.
  """
  meta = manager.restore(
    step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
  ).meta
  if meta['format'] != FORMAT:
    raise ValueError(
      f'checkpoint {step} has format {meta["format"]}; this version reads '
      f'{FORMAT}'
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
  state = manager.restore(
    step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
  ).state
  return state, meta
