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

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrl_tok.sharding import platform
from jaxrl_tok.types import Prefix


def partition_rules(rules: Sequence) -> tuple:
  """Makes rules (path regex, PartitionSpec) of one layer's leaves into rules of
  their stacks, whose layers are not split, and of split layers."""
  stacked = [
    (f'layers/{pattern}', PartitionSpec(None, *spec)) for pattern, spec in rules
  ]
  alone = [(rf'layers/\d+/{pattern}', spec) for pattern, spec in rules]
  return *stacked, *alone


# arrays that a layer keeps for the backward pass; it computes the rest again
REMAT = {
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}
# without remat, a scan keeps products: it would copy all else into stacks
SCANNED = jax.checkpoint_policies.dots_saveable
# layers that a CPU scans; fewer run 10 to 30 % faster in a loop, which compiles
# as fast
SCAN_FROM = 8


def should_scan(scan_layers: bool | None, num_layers: int) -> bool:
  """Resolves the choice of a user; None: scan on accelerators, and on a CPU
  from SCAN_FROM layers on."""
  if scan_layers is not None:
    return scan_layers
  return num_layers >= SCAN_FROM or platform() != 'cpu'


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


def split_prefix(prefix: Prefix) -> Prefix:
  """Splits the keys and values of a scan into those of each layer."""
  kv = prefix.kv
  return prefix._replace(kv=kv.split() if isinstance(kv, Stacks) else kv)


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


def _scan(step, segment: Segment, layers, flat: dict, has, x, given, keep):
  """Scans one segment -> (x, outputs [repeats, ...] for each kind).

  keep: jax.checkpoint with its policy. A layer's weights are picked inside of
  it, so that the backward pass slices the stacks again: slices picked outside
  would be kept, all of them a copy of the stacks.
  """
  n, kinds = segment.repeats, segment.kinds
  rows = {}  # [n, ...], or [n, count, ...] where a period has several
  counts = {path: sum(has(kind, path) for kind in kinds) for path in flat}
  for path, leaf in flat.items():
    first = sum(has(kind, path) for kind in layers[: segment.start])
    used = leaf[first : first + n * counts[path]]
    if counts[path] > 1:
      used = used.reshape(n, counts[path], *leaf.shape[1:])
    if counts[path]:
      rows[path] = used

  @functools.partial(keep, static_argnums=0)
  def one(j, rows, x, given):
    weights = {
      path: leaf[_row(kinds, j, path, has)] if counts[path] > 1 else leaf
      for path, leaf in rows.items()
      if has(kinds[j], path)
    }
    weights = flax.traverse_util.unflatten_dict(weights)
    return step(kinds[j], weights, x, given, None)

  def body(x, of_period):
    rows, given = of_period
    out = []
    for j in range(len(kinds)):
      x, new = one(j, rows, x, None if given is None else given[j])
      out.append(new)
    return x, tuple(out)

  return jax.lax.scan(body, x, (rows, given))


def run_layers(
  step: Callable,
  layers: Sequence,
  params,
  x: jax.Array,
  given: Any = None,
  caches: Sequence | None = None,
  scan: bool = True,
  remat: str = 'none',
  has: Callable = everywhere,
):
  """Runs x through the layers.

  Args:
    step: (kind, weights, x, given, cache) of one layer -> (x, output).
    layers: kinds of the L layers, hashable.
    params: stacks, or what `split` made of them.
    given: outputs of an earlier run; None: step gets None.
    caches: a value for each layer; None: step gets None.
    scan: scan stacks; False: loop over the layers. Caches, split parameters and
      outputs of a loop are always looped over.
    remat: 'none', or the name in REMAT of what each layer keeps.
    has: as for `split`.

  Returns: (x, outputs): Stacks of a scan, or a tuple with one for each layer.
  """
  stacks = given is None or isinstance(given, Stacks)
  scan = scan and caches is None and stacks and not isinstance(params, tuple)
  keep = functools.partial(
    jax.checkpoint, policy=REMAT.get(remat, SCANNED), prevent_cse=not scan
  )
  if scan:
    flat, parts = flax.traverse_util.flatten_dict(params), []
    for i, segment in enumerate(segments(layers)):
      own = None if given is None else given.parts[i]
      x, out = _scan(step, segment, layers, flat, has, x, own, keep)
      parts.append(out)
    return x, Stacks(tuple(parts))
  if not isinstance(params, tuple):
    params = split(params, layers, has)
  if isinstance(given, Stacks):
    given = given.split()
  if remat != 'none':
    step = keep(step, static_argnums=0)
  outputs = []
  for i, kind in enumerate(layers):
    own, cache = (v if v is None else v[i] for v in (given, caches))
    x, out = step(kind, params[i], x, own, cache)
    outputs.append(out)
  return x, tuple(outputs)
