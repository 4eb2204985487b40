"""Off-policy batches: groups replayed from earlier steps, sampling ahead.

The algorithm must know how far the policy has moved since: V-trace, truncated
importance weights (importance_cap), or a ratio to the sampler's log-probs
(Passes.old_logp = 'sampler'). Rollout.version dates each row, in updates.
"""

import time
from collections.abc import Callable
from concurrent import futures

import jax
import numpy as np

from jaxrl_tok import processes
from jaxrl_tok.sharding import put_whole
from jaxrl_tok.step.collectors import (
  ROUNDS,
  Batch,
  Collector,
  Pending,
  padded_prompts,
  place,
  token_rewards,
)
from jaxrl_tok.types import Scored, TrainState


def to_leaves(tree) -> dict:
  """Flattens a record to {'000': array, ...}, its leaves in order, for a
  cursor."""
  return {f'{i:03d}': x for i, x in enumerate(jax.tree.leaves(tree))}


def from_leaves(leaves: dict, like):
  """Rebuilds a record from `to_leaves`, with the structure of `like`."""
  found = [leaves[name] for name in sorted(leaves)]
  return jax.tree.unflatten(jax.tree.structure(like), found)


def is_by_group(x) -> bool:
  """Tells leaves of Scored with an axis of prompts or rows from weights."""
  return np.ndim(x) > 0


def write_buffer(buffer: dict | None, new: Scored, into, capacity: int) -> dict:
  """Writes the groups of `new` at places `into`, int [C], of the buffer."""
  C, written = len(new.rollout.prompts.length), {}
  for name, x in to_leaves(new).items():
    if not is_by_group(x):
      written[name] = x
      continue
    groups = x.reshape(C, -1, *x.shape[1:])
    old = None if buffer is None else buffer[name]
    if old is None:
      old = np.zeros((capacity, *groups.shape[1:]), x.dtype)
    written[name] = old.copy()
    written[name][into] = groups
  return written


def read_buffer(buffer: dict, places: np.ndarray, like: Scored) -> Scored:
  """Reads groups at places int [n] of the buffer, as a record like `like`."""

  def rows(name, x):
    if not is_by_group(x):
      return x
    found = buffer[name][places]
    return found.reshape(-1, *x.shape[1:])

  leaves = to_leaves(like)
  return from_leaves({n: rows(n, x) for n, x in leaves.items()}, like)


def only_finite(scored: Scored) -> Scored:
  """Makes rows not valid whose log-probs or rewards are not finite, as
  finite.py has it, on the host: replayed, they would spoil every later
  batch."""
  numbers = scored.rollout.logp, token_rewards(scored)
  with np.errstate(over='ignore', invalid='ignore'):
    sizes = [np.square(x).sum(1) for x in numbers]
  fine = np.isfinite(sizes).all(axis=0)
  applies = {name: on & fine for name, on in scored.applies.items()}
  return scored._replace(applies=applies)


def not_valid(scored: Scored, groups: np.ndarray) -> Scored:
  """Groups int [n] of a record, with rows that are not valid."""
  C = len(scored.rollout.prompts.length)
  buffer = write_buffer(None, scored, np.arange(C), C)
  found = read_buffer(buffer, groups, scored)
  none = {name: np.zeros_like(on) for name, on in found.applies.items()}
  return found._replace(applies=none)


def replayed(
  collector: Collector,
  capacity: int,
  groups: int,
  examples: Callable,
  prompt_length: int,
  seed: int = 0,
) -> Collector:
  """Experience replay: each batch ends with `groups` groups of earlier steps.

  The buffer holds the last `capacity` groups and lives in the cursor. While it
  is empty, the added rows are not valid, so they change nothing; nor are rows
  with numbers that are not finite. Metrics of the batch, replay/age aside, are
  of the new groups: the old ones were counted in the step that sampled them.

  Args:
    examples: positions int64 [n] -> their records.
    prompt_length: P of all batches, the largest bucket of the data.
    seed: seed of the draws from the buffer.
  """

  def start(state: TrainState, key, cursor: dict) -> Pending:
    pending = collector.start(state, key, cursor['inner'])
    return pending._replace(started=(*pending.started, cursor))

  def finish(pending: Pending):
    outer, count = pending.started[-1], int(pending.started[-1]['count'])
    pending = pending._replace(started=pending.started[:-1])
    batch, inner = collector.finish(pending)
    (new,) = padded_prompts([batch.scored], prompt_length)
    C, now = len(batch.positions), int(pending.version)
    into = (count + np.arange(C)) % capacity
    drawn = np.random.default_rng((seed, now)).integers(
      0, min(max(count, 1), capacity), groups
    )
    if count:
      old = read_buffer(outer['buffer'], drawn, new)
      positions = outer['positions'][drawn]
    else:
      some = np.arange(groups) % C
      old, positions = not_valid(new, some), batch.positions[some]
    held = outer.get('positions', np.zeros(capacity, np.int64)).copy()
    held[into] = batch.positions
    cursor = {
      'inner': inner,
      'buffer': write_buffer(
        outer.get('buffer'), only_finite(new), into, capacity
      ),
      'positions': held,
      'count': np.int64(count + C),
    }
    both = jax.tree.map(
      lambda x, y: np.concatenate([x, y]) if is_by_group(x) else x, new, old
    )
    age = now - old.rollout.version if count else np.zeros(1)
    positions = np.concatenate([batch.positions, positions])
    batch = batch._replace(
      scored=place(both),
      examples=own_examples(batch, positions, examples),
      positions=positions,
      metrics=batch.metrics | {'replay/age': float(age.mean())},
    )
    return batch, cursor

  def init() -> dict:
    return {'inner': collector.init(), 'count': np.int64(0)}

  return Collector(init, start, finish)


def own_examples(batch: Batch, positions, examples: Callable) -> list:
  """Records of a batch with groups added to it: those of this process."""
  if processes.count() == 1:
    return batch.examples + examples(positions[len(batch.positions) :])
  mesh = jax.sharding.get_mesh()
  return examples(positions[processes.own_rows(mesh, len(positions))])


def ahead(collector: Collector) -> Collector:
  """Sampling one step ahead: while a batch is scored on the host and learnt
  from, the device samples the next one by the policy before the update. The
  metric time/device_idle are the seconds of time/score that were longer: the
  device had nothing to do.

  collector: single_turn, whose pending batch holds arrays alone.
  """

  def bare(pending: Pending) -> Pending:
    # the update donates the state, its step included
    version = pending.rollout.version
    return pending._replace(
      version=version, started=(), cursor={}, examples=None
    )

  aside = futures.ThreadPoolExecutor(1)

  def start(state: TrainState, key, cursor: dict) -> Pending:
    inner, held = cursor['inner'], cursor.get('pending')
    if held is None:  # the first step: nothing was sampled before
      first = jax.random.fold_in(key, ROUNDS)
      ready = collector.start(state, first, inner)
      inner = ready.cursor
    following = collector.start(state, key, inner)
    if held is not None:
      ready = place_pending(from_leaves(held, bare(following)))
    after = {
      'inner': following.cursor,
      'pending': to_leaves(bare(following)),
    }
    # the step that it is learnt in, not the one that it was sampled in
    return ready._replace(
      started=(state, key), version=state.step, cursor=after
    )

  def finish(pending: Pending):
    sampled = aside.submit(time_of, pending.cursor['pending'])
    batch, cursor = collector.finish(pending)
    idle, most = 0.0, batch.metrics['time/score']
    if sampled.done() and not sampled.exception():
      idle = min(max(time.monotonic() - sampled.result(), 0.0), most)
    metrics = batch.metrics | {'time/device_idle': idle}
    return batch._replace(metrics=metrics), cursor

  return Collector(lambda: {'inner': collector.init()}, start, finish)


def time_of(arrays: dict) -> float:
  """Time at which the devices had made arrays."""
  jax.block_until_ready(arrays)
  return time.monotonic()


def place_pending(pending: Pending) -> Pending:
  """Places a pending batch on the devices; a resumed run has it on the host."""
  mesh = jax.sharding.get_mesh()

  def one(x):
    return x if isinstance(x, jax.Array) else put_whole(mesh, x)

  names = 'rollout', 'device', 'greedy', 'greedy_device'
  placed = {n: jax.tree.map(one, getattr(pending, n)) for n in names}
  return pending._replace(**placed)
