"""Checkpoints of TrainState and of a run's progress, by Orbax.

A checkpoint {run}/checkpoints/{step}/ holds `state` (parameters, optimizer,
key, carries), `cursor` (the collector's place in the data) and `meta`, a
JSON of the run's progress, its settings, and the shape and digest of every
leaf. Saving is asynchronous: the next step goes on while the files are written.

Files that changed on the disk are found when they are read: each leaf is
compared with its digest, and `meta` with its own (BadCheckpoint).
"""

import atexit
import contextlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_tok import digest, processes
from jaxrl_tok.report import mirror
from jaxrl_tok.sharding import is_stacked, path_name
from jaxrl_tok.types import TrainState

FORMAT = 6
UNVERIFIED = 5  # the format before digests, which is read as well
LAYERED = 4  # and the one before stacks
PARTIAL = '.orbax-checkpoint-tmp'  # in the name of one that was being written
GLOB = '*?['  # characters of patterns, by which Orbax looks for files


class NotResumed(ValueError):
  """Run that cannot go on from its checkpoints, and has changed nothing."""


class BadCheckpoint(NotResumed):
  """Checkpoint whose files are missing, torn or changed.

  reason: why, in a few words.
  """

  def __init__(self, step: int, reason: str):
    super().__init__(f'checkpoint {step} is bad: {reason}')
    self.step, self.reason = step, reason


class Kept:
  """Policy of Orbax: the newest checkpoints stay, and those of the steps
  others()."""

  def __init__(self, newest: int, others: Callable[[], Collection[int]]):
    self.newest, self.others = newest, others

  def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
    old, others = len(checkpoints) - self.newest, self.others()
    return [i >= old or c.step in others for i, c in enumerate(checkpoints)]


def _without_patterns(place):
  """Path to a directory that has no character of a pattern: a link to it where
  its own has one, for Orbax would not find the files."""
  if not isinstance(place, Path) or not set(GLOB) & set(str(place)):
    return place
  home = Path(tempfile.mkdtemp(prefix='jaxrl_tok-link-'))
  atexit.register(shutil.rmtree, home, ignore_errors=True)
  link = home / 'checkpoints'
  link.symlink_to(place, target_is_directory=True)
  return link


def open_checkpoints(
  run_dir: str | Path,
  keep: int | None = None,
  others: Callable[[], Collection[int]] = tuple,
) -> ocp.CheckpointManager:
  """Opens the checkpoints of a run; the newest `keep` of them stay, and those
  of the steps others(). None: opens them to be read only."""
  # pages of advice and tracebacks, of errors that are raised as well
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  options = {'read_only': True}
  if keep is not None:
    options = {
      'preservation_policy': Kept(keep, others),
      'enable_async_checkpointing': True,
    }
  place = mirror.checkpoints(run_dir)
  if keep is not None and isinstance(place, Path):
    place.mkdir(parents=True, exist_ok=True)  # a link cannot be made one
  return ocp.CheckpointManager(
    _without_patterns(place),
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

  Frozen parameters are not written: the model's files still have them. Raises
  ValueError for parameters that are not finite, which are never written.
  """
  state, step = state.replace(frozen=None), int(state.step)
  lanes = digest.lanes(state)
  for name, value in lanes.items():
    if name.startswith(('params/', 'critic/')) and not value[digest.FINITE]:
      raise ValueError(
        f'the state after step {step} has {name} with numbers that are not '
        'finite, and is not saved; lower --learning_rate'
      )
  cursor = jax.tree.map(np.asarray, processes.whole(cursor))
  meta = {
    'format': FORMAT,
    'progress': progress,
    'settings': settings,
    'leaves': _leaves(state),
    'digests': digest.to_text(lanes),
    'cursor': digest.to_text(digest.lanes(cursor)),
  }
  meta = json.loads(json.dumps(meta))  # as it is read again
  saved = manager.save(
    step,
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      cursor=ocp.args.StandardSave(cursor),
      meta=ocp.args.JsonSave(meta | {'digest': digest.of_json(meta)}),
    ),
  )
  if not saved:  # Orbax raises nothing here
    raise FileExistsError(
      f'checkpoint {step} was not saved: {manager.directory} already has '
      f'step {manager.latest_step()}; pass --resume auto or another output_dir'
    )


# --- which ones are there -----------------------------------------------------


def best_step(manager: ocp.CheckpointManager) -> int | None:
  """Step of the best evaluation, by the newest checkpoint that can be read;
  None without."""
  for step in sorted(manager.all_steps(), reverse=True):
    with contextlib.suppress(BadCheckpoint):
      return read_meta(manager, step)['progress'].get('best_step')
  return None


def saved_steps(run_dir: str | Path) -> list[int]:
  """Steps of a run's checkpoints on disk, ascending."""
  place = mirror.checkpoints(run_dir)
  if not isinstance(place, Path):  # a bucket, where half of one has its name
    return sorted(ocp.utils.checkpoint_steps(place))
  if not place.is_dir():
    return []
  return sorted(int(p.name) for p in place.iterdir() if p.name.isdecimal())


def drop_partial(run_dir: str | Path) -> list[str]:
  """Deletes checkpoints that a killed run was writing; returns their names."""
  place = mirror.checkpoints(run_dir)
  if not isinstance(place, Path) or not place.is_dir():
    return []  # Orbax knows those of a bucket
  found = sorted(p for p in place.iterdir() if PARTIAL in p.name)
  for path in found:
    shutil.rmtree(path, ignore_errors=True)
  return [path.name for path in found]


def drop_after(manager: ocp.CheckpointManager, step: int) -> list[int]:
  """Deletes the checkpoints after a step, which a run resumed there makes
  anew; returns their steps."""
  later = [s for s in sorted(manager.all_steps()) if s > step]
  for s in later:
    manager.delete(s)
  return later


def _listed(steps: Iterable[int]) -> str:
  return ', '.join(map(str, steps)) or 'none'


def restore_named(
  manager: ocp.CheckpointManager,
  resume: str,
  like: TrainState,
  say: Callable[[str], None] = print,
) -> tuple[TrainState, dict, dict] | None:
  """Restores the checkpoint that --resume auto|STEP names: see `restore`.

  auto: the newest one that is whole; says in one line each why others are
  passed over. None where there is none at all.

  Raises ValueError, in one line, for a step that is not there or bad (it names
  the good ones), and where every checkpoint is bad.
  """
  steps = sorted(manager.all_steps(), reverse=True)
  if resume != 'auto':
    return _restore_step(manager, int(resume), like, steps)
  reasons = []
  for step in steps:
    try:
      return restore(manager, step, like)
    except BadCheckpoint as e:
      say(f'{e}; it is passed over')
      reasons.append(f'{step} ({e.reason})')
  if not reasons:
    return None
  raise NotResumed(
    f'every checkpoint in {manager.directory} is bad: {", ".join(reasons)}; '
    'bring back a good one, or begin again in another --output_dir'
  )


def _restore_step(
  manager: ocp.CheckpointManager, step: int, like: TrainState, steps: list[int]
) -> tuple[TrainState, dict, dict]:
  """Restores one step; its error names the good ones among `steps`."""
  if step not in steps:
    raise NotResumed(
      f'no checkpoint of step {step} in {manager.directory}; '
      f'there are: {_listed(reversed(steps))}'
    )
  try:
    return restore(manager, step, like)
  except BadCheckpoint as e:
    bad, good = e, []
  for other in sorted(set(steps) - {step}):
    with contextlib.suppress(ValueError):
      restore(manager, other, like)
      good.append(other)
  raise BadCheckpoint(
    step,
    f'{bad.reason}; good ones: {_listed(good)}'
    + ('; pass --resume auto, or one of them' if good else ''),
  )


# --- one of them --------------------------------------------------------------


@contextlib.contextmanager
def _reading(step: int, what: str):
  """Turns what a broken file may raise into BadCheckpoint, on every process."""
  try:
    yield
  except (BadCheckpoint, jax.errors.JaxRuntimeError):
    raise  # the last: a device without memory, of which no file is guilty
  except Exception as e:  # of many kinds, with pages of advice
    said = ' '.join(str(e).split()) or type(e).__name__
    raise BadCheckpoint(step, f'{what} cannot be read ({said[:100]})') from None


def read_meta(manager: ocp.CheckpointManager, step: int) -> dict:
  """Reads `meta` of a checkpoint. Raises BadCheckpoint where it is missing or
  not what was saved, ValueError for another version's."""

  def read():
    place = manager.directory / str(step)
    file = place / 'meta' / 'metadata'
    with _reading(step, 'meta'):
      if not any(place.iterdir()):
        raise BadCheckpoint(step, 'its directory is empty')
      if not file.exists():
        raise BadCheckpoint(step, 'meta is missing')
      return json.loads(file.read_text())

  meta, _ = processes.together(read)
  kind = meta.get('format') if isinstance(meta, dict) else None
  if not isinstance(kind, int) or (kind >= FORMAT and 'digest' not in meta):
    raise BadCheckpoint(step, 'meta is not what was saved')
  if 'digest' in meta and meta.pop('digest') != digest.of_json(meta):
    raise BadCheckpoint(step, 'meta is not what was saved')
  if kind not in (LAYERED, UNVERIFIED, FORMAT):
    raise NotResumed(
      f'checkpoint {step} has format {kind} and this version reads '
      f'{LAYERED} to {FORMAT}; resume with the version that wrote it, or pass '
      'another output_dir'
    )
  return meta


def check_digests(step: int, tree, saved: dict | None, owner: str = '') -> None:
  """Compares the leaves of a tree with their digests; nothing for a format
  without any. owner: prefix of their names, as 'params/'.

  Raises BadCheckpoint, which names the first that differs.
  """
  if saved is None:
    return
  for name, found in digest.to_text(digest.lanes(tree)).items():
    if saved.get(owner + name) != found:
      raise BadCheckpoint(step, f'{owner}{name} is not what was saved')


def restore(
  manager: ocp.CheckpointManager, step: int, like: TrainState
) -> tuple[TrainState, dict, dict]:
  """Restores (state, cursor, meta) of a step, with the shardings of `like`;
  frozen parameters are None. `like` may hold ShapeDtypeStructs.

  Raises BadCheckpoint for files that are not what was saved, and ValueError
  when the leaves are not those of `like`, as of another model, optimizer or
  algorithm.
  """
  meta = read_meta(manager, step)
  like, have = like.replace(frozen=None), meta['leaves']
  was_layered = meta['format'] == LAYERED
  stored = layered(like, have) if was_layered else like
  want = _leaves(stored)
  for name in sorted(want.keys() | have.keys()):
    if want.get(name) != have.get(name):
      raise NotResumed(
        f'checkpoint {step} has {name} {have.get(name, "missing")} and this '
        f'run {want.get(name, "no such leaf")}; resume with the flags that '
        'the run was started with (config.yaml)'
      )
  shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, stored)

  def read():
    with _reading(step, 'it'):
      return manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(shapes),
          cursor=ocp.args.StandardRestore(),
        ),
      )

  found, _ = processes.together(read)
  state = found.state
  check_digests(step, state, meta.get('digests'))
  _check_cursor(step, found.cursor, meta.get('cursor'))
  if was_layered:
    state = stacked(state, like)
  return state, found.cursor, meta


def _check_cursor(step: int, cursor, saved: dict | None) -> None:
  """Compares the cursor with its digests."""
  if saved is None:
    return
  found = digest.to_text(digest.lanes(cursor))
  if found != saved:
    name = min(n for n in found | saved if found.get(n) != saved.get(n))
    raise BadCheckpoint(step, f'cursor/{name} is not what was saved')


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
