"""Micro-batches of the gradient, and what its passes keep (remat), chosen by
the device's memory.

CPUs are faster with micro-batches whose arrays stay in the last cache;
accelerators are faster with few micro-batches, as long as they fit.
"""

import math
from pathlib import Path

import jax

from jaxrl_tok.policy import evaluate
from jaxrl_tok.sharding import ROWS, num_shards
from jaxrl_tok.types import Policy, Rollout, SamplingRule

USUAL_CACHE = 16 * 2**20  # bytes, where the system reports none
KEPT_FREE = 0.1  # of an accelerator's memory, for what XLA does not count


def num_bytes(tree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def bytes_a_prompt(
  policy: Policy,
  weights: tuple,
  rollout: Rollout,
  rule: SamplingRule,
  num_shards: int = 1,
) -> int:
  """Bytes that one prompt's completions hold for the backward pass, by shapes
  alone: arrays may be ShapeDtypeStructs.

  Args:
    weights: (trained, frozen), as Policy.merge_params takes them.
    num_shards: devices that share a batch; its prompts are a multiple of it.
  """
  params, fixed = weights
  G = rollout.tokens.shape[0] // rollout.prompts.length.shape[0]

  def bytes_of(num_prompts):
    def rows(x, count):
      return jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype)

    prompts = jax.tree.map(lambda x: rows(x, num_prompts), rollout.prompts)
    part = jax.tree.map(lambda x: rows(x, num_prompts * G), rollout)
    part = part._replace(prompts=prompts)

    def backward(params, fixed, part, rule):
      def logp(params):
        return evaluate(
          policy, policy.merge_params(params, fixed), part, rule
        ).logp

      return jax.vjp(logp, params)[1]

    return num_bytes(jax.eval_shape(backward, params, fixed, part, rule))

  # the difference is without what does not depend on the rows
  return (bytes_of(2 * num_shards) - bytes_of(num_shards)) // num_shards


def last_cache() -> int:
  """Bytes of the CPU's last cache."""
  found = Path('/sys/devices/system/cpu/cpu0/cache').glob('index*/size')
  sizes = [path.read_text().strip() for path in found]
  units = {'K': 2**10, 'M': 2**20}
  known = [int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units]
  return max(known, default=USUAL_CACHE)


def bytes_on_a_device(tree) -> int:
  """Bytes on one device of arrays, or ShapeDtypeStructs, on a mesh."""

  def one(x):
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

  return sum(map(one, jax.tree.leaves(tree)))


def limit(device) -> int | None:
  """Bytes of an accelerator's memory for arrays; None: not reported."""
  stats = device.memory_stats() or {}
  known = 'bytes_limit' in stats and device.platform != 'cpu'
  return int((1 - KEPT_FREE) * stats['bytes_limit']) if known else None


def budget(
  device, state=(), num_shards: int = 1, most: int | None = None
) -> int | None:
  """Bytes for a pass's arrays beside the state, on one device; None: not
  reported. The devices of a CPU share its cache.

  most: bytes for all arrays; None: as the device reports.
  """
  if device.platform == 'cpu' and most is None:
    return last_cache() // num_shards
  most = limit(device) if most is None else most
  return None if most is None else max(most - bytes_on_a_device(state), 0)


def divisions(
  num_prompts: int, each: int, most: int | None, num_shards: int = 1
) -> list[int]:
  """Numbers of parts that the prompts may divide into, the fewest first.

  `num_shards` devices can share each part, and its bytes (`each` a prompt) are
  at most `most` on a device. If no part fits, the smallest is returned."""
  found = [
    n
    for n in range(1, num_prompts + 1)
    if num_prompts % n == 0 and num_prompts // n % num_shards == 0
  ]
  fitting = [
    n
    for n in found
    if most is None or num_prompts // n // num_shards * each <= most
  ]
  return fitting or found[-1:]


def fits(compiled, most: int | None) -> bool:
  """Checks that a compiled program's arrays are `most` bytes on a device; None:
  no limit."""
  return most is None or program_bytes(compiled) <= most


def program_bytes(compiled) -> int:
  """Bytes on a device that a compiled program's arrays take at once."""
  need = compiled.memory_analysis()
  return (
    need.argument_size_in_bytes
    + need.output_size_in_bytes
    + need.temp_size_in_bytes
    - need.alias_size_in_bytes
  )


def first_that_fits(
  functions: list, args: tuple, most: int | None, options=None
):
  """Compiles the first jitted function whose program fits, else the last one.
  Some compilers refuse a program that does not fit.

  Args:
    most: bytes on a device for all arrays; None: no limit.
    options: XLA's, {name: value}.
  """
  *larger, last = functions
  for function in larger:
    try:
      compiled = function.lower(*args).compile(options)
    except jax.errors.JaxRuntimeError as e:
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      continue
    if fits(compiled, most):
      return compiled
  return last.lower(*args).compile(options)


def ways(
  policies: dict,
  state,
  rollout: Rollout,
  rule: SamplingRule,
  num_prompts: int,
  mesh,
  wanted: int | None = None,
  most: int | None = None,
) -> list[tuple]:
  """Ways (remat, number of parts) to compute a gradient of num_prompts, the
  fastest first: those whose arrays, by shapes, a device holds beside the state.

  Args:
    policies: {remat: policy}, the fastest first.
    wanted: number of parts; None: those that fit.
    most: bytes of a device; None: as it reports.
  """
  shards = num_shards(mesh, ROWS)
  left = budget(mesh.local_devices[0], state, shards, most)
  found = {}
  for remat, policy in policies.items():
    each = bytes_a_prompt(policy, state.policy_params, rollout, rule, shards)
    parts = [wanted]
    if wanted is None:
      parts = divisions(num_prompts, each, left, shards)
    need = num_prompts // parts[0] // shards * each
    if left is None or need <= left or remat == list(policies)[-1]:
      found[remat] = parts
  return in_order(found, by_parts=mesh.shape['fsdp'] > 1)


def in_order(found: dict, by_parts: bool) -> list[tuple]:
  """Ways of {remat: numbers of parts}, the fastest first.

  Parts cost nothing where a device holds all parameters; otherwise each
  gathers them again, and computing a block twice is tried before (by_parts).
  """
  order = list(found)
  listed = [(remat, parts) for remat in found for parts in found[remat]]
  if by_parts:
    listed.sort(key=lambda way: (way[1], order.index(way[0])))
  return listed
