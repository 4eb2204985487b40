"""Programs of turns: a turn of some rows, after transcripts of some length.

1. `read`    encodes whole transcripts, as prompts, with columns to spare.
2. `append`  extends them by the tokens that are new, whose keys and values are
   written into those columns.
3. `turn`    samples a turn after them.

A transcript of n turns is thus read about once, not n times.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxrl_tok.policy import belonging
from jaxrl_tok.sampler import (
  SamplerConfig,
  begin,
  make_sampler,
  make_sampler_after,
  rollout_params,
)
from jaxrl_tok.sharding import constrain_caches, row_shards
from jaxrl_tok.step.compile import Job
from jaxrl_tok.step.episodes import (
  TurnPrograms,
  row_counts,
  transcript_lengths,
)
from jaxrl_tok.types import Policy, Prefix, Prompts, Rollout, TrainState

LEAST, MOST = 8, 64  # tokens that are appended at a time


def make_sampling(policy: Policy, config: SamplerConfig) -> Callable:
  """Returns sample(policy_params, key, Prompts, rule, version) -> Rollout."""
  sample = make_sampler(policy, config)

  def run(policy_params: tuple, *args):
    return sample(policy.merge_params(*policy_params), *args)

  return run


def counts(sampler: SamplerConfig) -> bool:
  """Tells whether a sampler records num_kept."""
  return sampler.truncate or sampler.greedy


def one_each(sampler: SamplerConfig) -> SamplerConfig:
  """Sampler of a turn: a completion of each transcript."""
  return dataclasses.replace(sampler, samples_per_prompt=1)


def chunk_of(policy: Policy, sampler: SamplerConfig) -> int:
  """Number of tokens that are appended at a time: those of a turn and of as
  long an answer, in powers of two. 0 of a policy that cannot append."""
  if belonging(policy, policy.append) is None:
    return 0
  both = 2 * sampler.max_completion_length
  return min(MOST, max(LEAST, 1 << (both - 1).bit_length()))


# --- functions ----------------------------------------------------------------


def make_read(policy: Policy) -> Callable:
  """Returns read(policy_params, Prompts) -> Prefix, pure."""

  def read(policy_params: tuple, prompts: Prompts) -> Prefix:
    return begin(policy, policy.merge_params(*policy_params), prompts)[0]

  return read


def make_append(policy: Policy) -> Callable:
  """Returns append(policy_params, Prefix, tokens [R, N], count int32 [R]) ->
  Prefix after the first `count` of them, pure."""
  join = belonging(policy, policy.append)

  def append(policy_params: tuple, prefix: Prefix, tokens, count) -> Prefix:
    params = rollout_params(policy, policy.merge_params(*policy_params))
    cache = constrain_caches(policy.init_cache(*tokens.shape))
    hidden, cache = policy.extend(params, prefix, tokens, cache, 0)
    return join(prefix, cache, hidden, count)

  return append


def make_turn(policy: Policy, sampler: SamplerConfig) -> Callable:
  """Returns turn(policy_params, key, rows int32 [R], number int32 [], Prefix,
  rule) -> Rollout without its prompts, pure."""
  sample = make_sampler_after(policy, one_each(sampler))

  def turn(policy_params: tuple, key, rows, number, prefix: Prefix, rule):
    params = rollout_params(policy, policy.merge_params(*policy_params))
    key = jax.random.fold_in(key, number)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    return sample(params, keys, prefix, rule)

  return turn


def bind_turns(
  find: Callable, chunk: int, policy_params: tuple, key, rule
) -> TurnPrograms:
  """Binds the arguments that stay through a batch of episodes.

  find: (name, size of the transcripts [R, P]) -> one of the functions above,
    compiled.
  """

  def read(prompts: Prompts) -> tuple:
    size = prompts.tokens.shape
    return size, find('read', size)(policy_params, prompts)

  def append(memory: tuple, tokens, count) -> tuple:
    size, prefix = memory
    return size, find('append', size)(policy_params, prefix, tokens, count)

  def draw(rows, number, memory: tuple) -> Rollout:
    size, prefix = memory
    turn = find('turn', size)
    return turn(policy_params, key, rows, number, prefix, rule)

  return TurnPrograms(read, draw, append if chunk else None, chunk)


def jit_turns(policy: Policy, sampler: SamplerConfig) -> Callable:
  """Returns programs(policy_params, key, rule) -> TurnPrograms, each compiled
  when it is used."""
  chunk = chunk_of(policy, sampler)
  functions = {
    'read': jax.jit(make_read(policy)),
    'turn': jax.jit(make_turn(policy, sampler)),
  }
  if chunk:
    functions['append'] = jax.jit(make_append(policy), donate_argnums=1)
  return functools.partial(bind_turns, lambda name, _: functions[name], chunk)


# --- compiled beforehand ------------------------------------------------------


def turn_jobs(
  run: Any, rows: int, prompt_length: int, sampler: SamplerConfig
) -> dict:
  """Jobs {name: Job} of the turns of so many rows; see episodes.py.

  run: the arguments of all of programs.py's jobs.
  """
  config, shapes, policy = run.config, run.shapes, run.networks.policy
  params, scalar = run.state.policy_params, shapes.array(sharding=shapes.whole)
  chunk = chunk_of(policy, one_each(sampler))
  read, turn = (
    jax.jit(f, out_shardings=shapes.rows)
    for f in (make_read(policy), make_turn(policy, sampler))
  )
  jobs = {}
  for R in row_counts(rows, row_shards(shapes.rows.mesh)):
    for length in transcript_lengths(
      prompt_length, config.max_completion_length, config.length_buckets
    ):
      size = R, length + chunk
      given = params, shapes.prompts(*size)
      jobs['read', *size] = Job([read], given)
      prefix = jax.tree.map(
        lambda x: shapes.array(*x.shape, dtype=x.dtype),
        jax.eval_shape(read, *given),
      )
      ids = shapes.array(R, chunk), shapes.array(R)
      if chunk:
        append = jax.jit(
          make_append(policy), donate_argnums=1, out_shardings=shapes.rows
        )
        jobs['append', *size] = Job([append], (params, prefix, *ids))
      args = run.state.key, shapes.array(R), scalar, prefix, run.networks.rule
      jobs['turn', one_each(sampler), *size] = Job([turn], (params, *args))
  return jobs


def episode_rollout(
  shapes: Any,
  count: int,
  length: int,
  sampler: SamplerConfig,
  max_length: int,
  seats: int,
) -> Rollout:
  """Structs of the Rollout of `count` prompts' episodes, of max_length tokens.

  shapes: shapes.Shapes.
  """
  B, array = count * sampler.samples_per_prompt, shapes.array
  size = B, max_length
  return Rollout(
    shapes.prompts(count, length),
    array(*size),
    array(*size, dtype=bool),
    array(*size, dtype=np.float32),
    array(*size) if counts(sampler) else None,
    array(B, dtype=bool),
    array(B),
    turn=array(*size),
    seat=array(*size) if seats > 1 else None,
  )


def bound_turns(networks: Any, compiled: dict, sampler: SamplerConfig):
  """Returns programs(state, key) -> TurnPrograms.

  networks: shapes.Networks, with the rule.
  compiled: programs by the names of their jobs.
  """
  sampler = one_each(sampler)
  chunk = chunk_of(networks.policy, sampler)

  def find(name: str, size: tuple):
    return compiled[(name, *((sampler,) if name == 'turn' else ()), *size)]

  def programs(state: TrainState, key) -> TurnPrograms:
    return bind_turns(find, chunk, state.policy_params, key, networks.rule)

  return programs
