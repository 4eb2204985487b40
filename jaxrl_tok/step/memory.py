"""Micro-batches of the gradient, chosen by the device's memory.

CPUs are faster with micro-batches whose arrays stay in the last cache;
accelerators are faster with few micro-batches, as long as they fit.
"""

import math
from pathlib import Path

import jax

from jaxrl_tok.policy import evaluate
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


def budget(device, state=(), num_shards: int = 1) -> int | None:
  """Bytes for a pass's arrays beside the state, on one device; None: not
  reported. The devices of a CPU share its cache."""
  if device.platform == 'cpu':
    return last_cache() // num_shards
  most = limit(device)
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


def fits(compiled, device) -> bool:
  """Checks that a compiled program's arrays fit an accelerator's memory."""
  most = limit(device)
  if most is None:
    return True
  need = compiled.memory_analysis()
  total = (
    need.argument_size_in_bytes
    + need.output_size_in_bytes
    + need.temp_size_in_bytes
    - need.alias_size_in_bytes
  )
  return total <= most


def first_that_fits(functions: list, args: tuple, device, options=None):
  """Compiles the first jitted function whose program fits, else the last one.
  Some compilers refuse a program that does not fit. options: XLA's, {name:
  value}."""
  *larger, last = functions
  for function in larger:
    try:
      compiled = function.lower(*args).compile(options)
    except jax.errors.JaxRuntimeError as e:
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      continue
    if fits(compiled, device):
      return compiled
  return last.lower(*args).compile(options)
