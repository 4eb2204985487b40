"""Stacked layers: one leaf [L, ...] for a parameter of all L layers.

A stack holds few, large leaves, so that checkpoints, optimizers and programs
do not grow with the number of layers. A layer may lack a parameter that others
have, as a feed-forward beside experts: a leaf then has a row for each layer
that has it, in their order.

`run_layers` runs the layers on a residual. Stacks are scanned: one body is
compiled for all layers, or one for each of a period of them where layers of
several kinds alternate (Gemma 3: five local, one global). Parameters that
`split` has made a tuple of, one tree a layer, are looped over; a token loop
needs those, which would otherwise copy a layer out of its stack at every token.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def partition_rules(rules: Sequence) -> tuple:
  """Makes rules (path regex, PartitionSpec) of one layer's leaves into rules of
  their stacks, whose layers are not split, and of split layers."""
  stacked = [
    (f'layers/{pattern}', PartitionSpec(None, *spec)) for pattern, spec in rules
  ]
  alone = [(rf'layers/\d+/{pattern}', spec) for pattern, spec in rules]
  return *stacked, *alone


class Segment(NamedTuple):
  """Layers start .. start + repeats * len(kinds) - 1, periodic in `kinds`."""

  start: int
  kinds: tuple
  repeats: int


class Stacks(NamedTuple):
  """Values of the layers as a scan returns them: for each segment a tuple, one
  for each kind of its period, of trees [repeats, ...]."""

  parts: tuple

  def split(self) -> tuple:
    """A tree for each layer, in order."""
    return tuple(
      jax.tree.map(lambda x, i=i: x[i], tree)
      for part in self.parts
      for i in range(jax.tree.leaves(part)[0].shape[0])
      for tree in part
    )


def segments(layers: Sequence) -> tuple[Segment, ...]:
  """Splits layers into periodic runs: the shortest period of all of them and
  its beginning once more, or else runs of equal layers.

  # a b a b a -> (a b) x 2, (a) x 1      a a b b b -> (a) x 2, (b) x 3
  """
  layers, L = tuple(layers), len(layers)
  for p in range(1, L // 2 + 1):
    if all(layers[i] == layers[i - p] for i in range(p, L)):
      rest = L // p * p
      tail = (Segment(rest, layers[rest:], 1),) if rest < L else ()
      return Segment(0, layers[:p], L // p), *tail
  runs, start = [], 0
  for kind, run in itertools.groupby(layers):
    runs.append(Segment(start, (kind,), len(list(run))))
    start += runs[-1].repeats
  return tuple(runs)


def stack_layers(trees: Sequence):
  """Stacks the trees of L layers, each leaf over the layers that have it."""
  rows = {}
  for tree in trees:
    for path, x in flax.traverse_util.flatten_dict(tree).items():
      rows.setdefault(path, []).append(x)
  return flax.traverse_util.unflatten_dict(
    {path: jnp.stack(xs) for path, xs in rows.items()}
  )


def everywhere(kind, path: tuple) -> bool:
  """Says that every layer has every parameter."""
  return True


def _pick(flat: dict, rows: Callable):
  """Tree of one layer: leaf[rows(path)], where rows gives no None."""
  found = {path: rows(path) for path in flat}
  return flax.traverse_util.unflatten_dict(
    {path: flat[path][i] for path, i in found.items() if i is not None}
  )


def _row(layers: Sequence, i: int, path: tuple, has: Callable) -> int | None:
  """Row of layer i in the stack of a leaf; None where it lacks the leaf."""
  if not has(layers[i], path):
    return None
  return sum(has(kind, path) for kind in layers[:i])


def split(params, layers: Sequence, has: Callable = everywhere) -> tuple:
  """Splits stacks into a tree for each layer.

  Args:
    layers: kinds of the L layers.
    has: (kind, path of a leaf as a tuple) -> whether such a layer has it.
  """
  flat = flax.traverse_util.flatten_dict(params)
  return tuple(
    _pick(flat, lambda path, i=i: _row(layers, i, path, has))
    for i in range(len(layers))
  )


def _scan(step, segment: Segment, layers, flat: dict, has, x, given):
  """Scans one segment -> (x, outputs [repeats, ...] for each kind)."""
  n, kinds = segment.repeats, segment.kinds
  rows = {}
  for path, leaf in flat.items():
    first = sum(has(kind, path) for kind in layers[: segment.start])
    count = sum(has(kind, path) for kind in kinds)  # in one period
    used = leaf[first : first + n * count]
    if count:
      rows[path] = used.reshape(n, count, *leaf.shape[1:])

  def body(x, of_period):
    rows, given = of_period
    out = []
    for j, kind in enumerate(kinds):
      weights = _pick(rows, lambda path, j=j: _row(kinds, j, path, has))
      x, new = step(kind, weights, x, None if given is None else given[j])
      out.append(new)
    return x, tuple(out)

  return jax.lax.scan(body, x, (rows, given))


def run_layers(
  step: Callable,
  layers: Sequence,
  params,
  x: jax.Array,
  given: Any = None,
  scan: bool = True,
  has: Callable = everywhere,
):
  """Runs x through the layers.

  Args:
    step: (kind, weights of one layer, x, given of that layer or None) ->
      (x, output).
    layers: kinds of the L layers, hashable.
    params: stacks, or what `split` made of them.
    given: outputs of an earlier run, or a sequence with a value for each layer.
    scan: scan stacks; False: loop over the layers. Values in a sequence and
      split parameters are always looped over.
    has: as for `split`.

  Returns: (x, outputs): Stacks of a scan, or a tuple with one for each layer.
  """
  sequence = given is not None and not isinstance(given, Stacks)
  if scan and not sequence and not isinstance(params, tuple):
    flat, parts = flax.traverse_util.flatten_dict(params), []
    for i, segment in enumerate(segments(layers)):
      own = None if given is None else given.parts[i]
      x, out = _scan(step, segment, layers, flat, has, x, own)
      parts.append(out)
    return x, Stacks(tuple(parts))
  if not isinstance(params, tuple):
    params = split(params, layers, has)
  if isinstance(given, Stacks):
    given = given.split()
  outputs = []
  for i, kind in enumerate(layers):
    x, out = step(kind, params[i], x, None if given is None else given[i])
    outputs.append(out)
  return x, tuple(outputs)
