"""Benchmarks of the sampler: decode, group and ragged.

decode  tokens a second, also at twice the length
group   savings of a shared prompt
ragged  savings of moving the rows that still run together
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.studies.bench import ceilings, networks, sizes
from experiments.studies.bench.timing import (
  Row,
  Work,
  compiled,
  in_turn,
  once,
  with_peers,
)
from jaxrl_tok import distribution, sharding
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.types import Policy, Prefix, Prompts


def random_prompts(size: sizes.Size, C: int, P: int) -> Prompts:
  """C prompts of exactly P random tokens."""
  tokens = np.random.default_rng(0).integers(0, size.vocab_size, (C, P))
  return Prompts(jnp.asarray(tokens, jnp.int32), jnp.full((C,), P, jnp.int32))


def row_mesh(C: int) -> jax.sharding.Mesh:
  """Mesh of as many devices as can share C prompts."""
  devices = jax.devices()
  n = max(n for n in range(1, len(devices) + 1) if C % n == 0)
  return sharding.make_mesh(f'data={n}', devices[:n])


def sampling(work: Work, C: int, G: int):
  """Compiles a sampler: (it, its arguments); nothing ends a completion."""
  policy, params = networks.make_network(
    work.size, work.model, work.dtype, adapters=False
  )
  prompts = random_prompts(work.size, C, work.prompt_length)
  rule = distribution.make_rule(work.size.vocab_size, [])
  config, mesh = SamplerConfig(G, work.completion_length), row_mesh(C)
  by_row = NamedSharding(mesh, PartitionSpec(sharding.ROWS))
  with jax.set_mesh(mesh):
    whole = params[0], jax.random.key(1), rule
    params, key, rule = jax.device_put(
      whole, NamedSharding(mesh, PartitionSpec())
    )
    args = params, key, jax.device_put(prompts, by_row), rule
    sample = jax.jit(make_sampler(policy, config), out_shardings=by_row)
    return compiled(sample, *args), args


def contender(work: Work, C: int, G: int):
  """Contender that samples once a round."""
  sample, args = sampling(work, C, G)
  return lambda: once(lambda: sample(*args))


LONGER = 'jaxrl_tok, twice as long'


def decode(work: Work) -> list[Row]:
  """Samples after B different prompts, of a model 8 each after B / 8; every row
  runs to T. Random weights run to 2T, too."""
  B, T = work.rows, work.completion_length
  G = 1 if work.model is None else 8
  own = {'jaxrl_tok': contender(work, B // G, G)}
  if work.model is None:
    twice = work._replace(completion_length=2 * T)
    own[LONGER] = contender(twice, B, 1)
  seconds, versions = with_peers(work, 'decode', B // G, G, own)
  width = jnp.dtype(work.dtype).itemsize
  P, size = work.prompt_length, work.size
  flops, moved = ceilings.decode_step(size, B // G, G, P, T, width)
  most = ceilings.measure(size, B, work.dtype, int(moved))
  work.show(
    f'this machine: products {most.matmul / 1e9:.0f} GFLOP/s, of these shapes '
    f'{most.skinny / 1e9:.0f}; copies {most.copy / 1e9:.0f} GB/s; an operation '
    f'{1e6 * most.operation:.1f} us'
  )
  prompts = (
    2 * B // G * P * (sizes.num_weights(size) - size.d_model * size.vocab_size)
  )
  least = prompts / most.matmul + T * max(
    flops / most.matmul, moved / most.copy
  )
  found = []
  for who, times in seconds.items():
    if who == LONGER:
      found.append(Row('decode', work.name, who, times, 2 * B * T, {}))
      continue
    row = Row('decode', work.name, who, times, B * T, {})
    # a step's share of reading the prompts is in it
    row.notes['ms_a_step'] = 1e3 * row.median / T
    if who in versions:
      row.notes['versions'] = versions[who]
    else:
      row.notes.update(
        share_of_ceiling=least / row.median,
        flops_a_step=flops + prompts / T,
        bytes_a_step=moved,
        **most._asdict(),
      )
    found.append(row)
  return found


def group(work: Work) -> list[Row]:
  """Samples as many completions of prompts that G share, or one each."""
  found, alone = [], contender(work, work.rows, 1)
  for G in (8, 16):
    C, tokens = work.rows // G, work.rows * work.completion_length
    own = {f'shared by {G}': contender(work, C, G), 'each its own': alone}
    for who, times in in_turn(own, work).items():
      name = f'{work.name} G={G}'
      found.append(Row('group', name, who, times, tokens, {}))
  return found


MEAN_TO_MAX, COMPACT_LEVELS = 0.4, 3


def ragged_lengths(B: int, T: int) -> np.ndarray:
  """Lognormal lengths up to T whose mean is 0.4 of it: int [B]."""
  z = np.random.default_rng(0).normal(size=B)
  low, high = 0.0, 10.0
  for _ in range(50):
    spread = (low + high) / 2
    x = np.exp(spread * (z - z.max()))
    low, high = (spread, high) if x.mean() > MEAN_TO_MAX else (low, spread)
  return np.maximum(np.round(T * x), 1).astype(int)


def ending(policy: Policy, length_C: jax.Array, end: int) -> Policy:
  """Makes a policy whose completion of prompt c ends after length_C[c] tokens.
  The prompt remembers its length, a hidden state that the end is due."""

  def encode(params, prompts):
    prefix = policy.encode(params, prompts)
    due = (length_C == 1)[:, None].astype(prefix.hidden.dtype)
    hidden = jnp.concatenate([prefix.hidden, due], axis=1)
    return Prefix((prefix.kv, length_C), hidden, prefix.length)

  def extend(params, prefix, tokens, cache, at):
    kv, length = prefix.kv
    prefix = prefix._replace(kv=kv)
    hidden, cache = policy.extend(params, prefix, tokens, cache, at)
    columns = at + 1 + jnp.arange(tokens.shape[1])  # that it draws next
    rows = jnp.repeat(length, len(tokens) // len(length))
    due = (rows[:, None] == columns[None] + 1)[..., None].astype(hidden.dtype)
    return jnp.concatenate([hidden, due], axis=2), cache

  def logits(params, hidden):
    plain = policy.logits(params, hidden[..., :-1])
    is_end = jnp.arange(policy.vocab_size) == end
    allowed = is_end[None] == (hidden[..., -1:] > 0.5)
    return jnp.where(allowed, plain, distribution.NEVER)

  return policy._replace(encode=encode, extend=extend, logits=logits)


def ragged(work: Work) -> list[Row]:
  """Useful tokens a second with early exit and fewer rows, and without."""
  B, T, end = work.rows, work.completion_length, 0
  length = ragged_lengths(B, T)
  policy = make_policy(sizes.make_config(work.size), jnp.dtype(work.dtype))
  params = jax.jit(policy.init)(jax.random.key(0))
  policy = ending(policy, jnp.asarray(length, jnp.int32), end)
  prompts = random_prompts(work.size, B, work.prompt_length)
  args = params, jax.random.key(1), prompts
  rule = distribution.make_rule(work.size.vocab_size, [end])
  # the longest row runs to T, so without compact_levels nothing ends early
  plain = SamplerConfig(1, T)
  own = {}
  for who, config in {
    f'early exit, {COMPACT_LEVELS} compact levels': SamplerConfig(
      1, T, compact_levels=COMPACT_LEVELS
    ),
    'every row to the end': plain,
  }.items():
    sample = compiled(jax.jit(make_sampler(policy, config)), *args, rule)
    found = np.asarray(sample(*args, rule).mask.sum(1))
    if (found != length).any():
      raise ValueError(f'{who}: {found} tokens where {length} were asked for')
    own[who] = lambda call=sample: once(lambda: call(*args, rule))
  seconds = in_turn(own, work)
  return [
    Row('ragged', work.name, who, times, int(length.sum()), {})
    for who, times in seconds.items()
  ]
