"""Programs of turns: a turn of some rows, after transcripts of some length."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.sharding import row_shards
from jaxrl_tok.step.compile import Job
from jaxrl_tok.step.episodes import (
  make_turn,
  row_counts,
  transcript_lengths,
)
from jaxrl_tok.types import Policy, Prompts, Rollout, TrainState


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


def turn_jobs(
  run: Any, rows: int, prompt_length: int, sampler: SamplerConfig
) -> dict:
  """Jobs {name: Job} of the turns of so many rows; see episodes.py.

  run: the arguments of all of programs.py's jobs.
  """
  config, shapes, sampler = run.config, run.shapes, one_each(sampler)
  turn = jax.jit(
    make_turn(make_sampling(run.networks.policy, sampler)),
    out_shardings=shapes.rows,
  )
  jobs, scalar = {}, shapes.array(sharding=shapes.whole)
  for R in row_counts(rows, row_shards(shapes.rows.mesh)):
    for P in transcript_lengths(
      prompt_length, config.max_completion_length, config.length_buckets
    ):
      args = (
        *(run.state.policy_params, run.state.key, shapes.array(R), scalar),
        *(shapes.prompts(R, P), run.networks.rule),
      )
      jobs['turn', sampler, R, P] = Job([turn], args)
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


def bound_turn(networks: Any, compiled: dict, sampler: SamplerConfig):
  """Returns turn(state, key, rows, number, Prompts) -> Rollout.

  networks: shapes.Networks, with the rule.
  compiled: programs by (sampler, rows, length of transcripts).
  """
  sampler = one_each(sampler)

  def turn(state: TrainState, key, rows, number, prompts: Prompts) -> Rollout:
    run = compiled[(sampler, *prompts.tokens.shape)]
    return run(state.policy_params, key, rows, number, prompts, networks.rule)

  return turn
