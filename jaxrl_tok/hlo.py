"""Communication of a compiled program, read from its text (HLO).

  for c in collectives(compiled.as_text()):
    c.kind, c.moved, c.times, c.where

A collective is counted as often as the loops around it turn. Bytes are those
that one device receives, n devices in a group:

  all-gather          (n - 1) / n of the result
  all-reduce          2 (n - 1) / n of it, as a reduce-scatter and an all-gather
  reduce-scatter      (n - 1) times the result
  all-to-all          (n - 1) / n of the result
  collective-permute  the result

Imports no jax.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
WIDTH = {'pred': 1, 's4': 0.5, 'u4': 0.5, 'token': 0, 'opaque': 0}
SHARE: dict[str, Callable] = {
  'all-gather': lambda n: (n - 1) / n,
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'reduce-scatter': lambda n: n - 1,
  'all-to-all': lambda n: (n - 1) / n,
  'collective-permute': lambda n: 1,
}
# a TPU's reduce-scatter: an all-reduce fused with the slice of its result
SCATTER = 'all-reduce-scatter'
_HEADER = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
_LINE = re.compile(r'(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$')
_ARRAY = re.compile(r'\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]')
_CALLEE = re.compile(
  r'(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)'
  r'|(?:branch_computations|called_computations)=\{([^}]*)\}'
)


class Collective(NamedTuple):
  """Collective of a program."""

  kind: str
  moved: float  # bytes that a device receives each time
  times: float  # turns of the loops around it
  shapes: tuple  # of its results: ((dtype, (sizes)), ...)
  where: tuple  # names of the loops around it, the outermost first
  name: str  # op_name, as jax named it

  @property
  def total(self) -> float:
    """Bytes that a device receives in a run of the program."""
    return self.moved * self.times


class _Op(NamedTuple):
  name: str
  type: str
  kind: str
  rest: str  # operands and attributes


def computations(text: str) -> tuple[dict, str]:
  """Splits a program into ({computation: its operations}, the first to run)."""
  found, entry, inside = {}, '', None
  for line in text.splitlines():
    if start := _HEADER.match(line):
      inside = start[2]
      found[inside] = []
      entry = inside if start[1] else entry
    elif inside and (m := _LINE.match(line.strip())):
      found[inside].append(_Op(*m.groups()))
  return found, entry


def shapes_of(kind: str, text: str) -> tuple:
  """Shapes ((dtype, sizes), ...) of a collective's result; one that starts has
  its operand's beside it."""
  arrays = [
    (m[1], tuple(int(n) for n in m[2].split(',') if n))
    for m in _ARRAY.finditer(text)
  ]
  if kind == 'all-gather-start':
    return tuple(arrays[len(arrays) // 2 :])
  if kind == 'collective-permute-start':
    return tuple(arrays[1:2])
  return tuple(arrays)


def num_bytes(shapes: tuple) -> float:
  """Bytes of arrays."""

  def width(dtype):
    if dtype in WIDTH:
      return WIDTH[dtype]
    return int(re.match(r'[a-z]+(\d+)', dtype)[1]) / 8

  return sum(width(dtype) * math.prod(sizes) for dtype, sizes in shapes)


def group_size(attributes: str) -> int:
  """Number of devices in a group of a collective; all forms of the text."""
  if m := re.search(r'replica_groups=\[(\d+),(\d+)\]', attributes):
    return int(m[2])
  if m := re.search(r'replica_groups=\{\{([\d,]+)\}', attributes):
    return len(m[1].split(','))
  if m := re.search(r'replica_groups=mesh\[(.*?)\] \{(.*?)\}', attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", m[1]))
    return math.prod(int(sizes[a]) for a in re.findall(r"'(\w+)'", m[2]))
  return 1


def turns_of(op: _Op, found: dict) -> float | None:
  """Turns of a loop; None: they depend on data."""
  if m := re.search(r'known_trip_count"?:\{"n":"?(\d+)', op.rest):
    return int(m[1])
  condition = re.search(r'condition=%?([\w.\-]+)', op.rest)
  body = found.get(condition[1], []) if condition else []
  compares = [x for x in body if x.kind == 'compare']
  limits = {
    x.name: int(m[1])
    for x in body
    if x.kind == 'constant' and (m := re.match(r'(\d+)\)', x.rest))
  }
  if len(compares) != 1 or 'direction=LT' not in compares[0].rest:
    return None
  named = re.findall(r'%([\w.\-]+)', compares[0].rest.partition(')')[0])
  limit = next((limits[n] for n in named if n in limits), None)
  counters = [
    int(m[1])
    for x in body
    if x.name in named and (m := re.search(r'index=(\d+)', x.rest))
  ]
  if limit is None or len(counters) != 1:
    return limit
  return -(-limit // step_of(op, counters[0], found))


def step_of(op: _Op, counter: int, found: dict) -> int:
  """Step of a loop's counter, an element of its tuple: 2 where the compiler has
  unrolled it once."""
  name = re.search(r'body=%?([\w.\-]+)', op.rest)[1]
  body = {x.name: x for x in found.get(name, ())}
  root = next((x for x in reversed(body.values()) if x.kind == 'tuple'), None)
  operands = re.findall(r'%([\w.\-]+)', root.rest) if root else []
  new = body.get(operands[counter]) if counter < len(operands) else None
  if new is None or new.kind != 'add':
    return 1
  steps = [
    int(m[1])
    for name in re.findall(r'%([\w.\-]+)', new.rest.partition(')')[0])
    if name in body and (m := re.match(r'(\d+)\)', body[name].rest))
    if body[name].kind == 'constant'
  ]
  return steps[0] if len(steps) == 1 and steps[0] > 0 else 1


def collectives(text: str, turns: list | None = None) -> list[Collective]:
  """Lists the collectives of a compiled program.

  Args:
    text: compiled.as_text().
    turns: of the loops with collectives whose own turns depend on data, in the
      order of the program; None: once each.
  """
  found, entry = computations(text)
  given, listed, known = list(turns or ()), {}, {}

  @functools.cache
  def has_one(name):
    return any(
      op.kind.removesuffix('-start') in KINDS
      or any(has_one(callee) for callee in callees(op))
      for op in found.get(name, ())
    )

  def callees(op):
    for m in _CALLEE.finditer(op.rest):
      yield from re.findall(r'[\w.\-]+', m[1] or m[2])

  def visit(name, times, where, fused=False):
    for op in found.get(name, ()):
      kind = op.kind.removesuffix('-start')
      if kind in KINDS:
        shapes, n = shapes_of(op.kind, op.type), group_size(op.rest)
        moved = num_bytes(shapes) * SHARE[kind](n)
        if fused and name.startswith(SCATTER):
          kind, moved = 'reduce-scatter', moved / 2
        said = re.search(r'op_name="([^"]*)"', op.rest)
        said = said[1] if said else op.name
        new = Collective(kind, moved, times, shapes, where, said)
        # one that is fused with other work is there in several pieces of one
        # channel, some of them in loops of that work
        channel = re.search(r'channel_id=(\d+)', op.rest)
        key = (channel and channel[1], shapes) if fused else (name, op.name)
        if key not in listed or len(where) < len(listed[key].where):
          listed[key] = new
      for callee in callees(op):
        if op.kind != 'while':
          visit(callee, times, where, fused or op.kind == 'fusion')
        elif has_one(callee):
          visit(callee, times * turns_here(op), (*where, op.name))

  def turns_here(op):
    if op.name not in known:
      n = turns_of(op, found)
      known[op.name] = (given.pop(0) if given else 1) if n is None else n
    return known[op.name]

  visit(entry, 1, ())
  return list(listed.values())


def total_by_kind(listed: list[Collective]) -> dict[str, float]:
  """Bytes that a device receives, {kind: bytes}, the most first."""
  found = {}
  for c in listed:
    found[c.kind] = found.get(c.kind, 0.0) + c.total
  return dict(sorted(found.items(), key=lambda pair: -pair[1]))
