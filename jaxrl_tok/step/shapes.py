"""Sizes, choices and functions that a run's programs are compiled for."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_tok.sampler import SamplerConfig
from jaxrl_tok.sharding import ROWS
from jaxrl_tok.types import (
  Algorithm,
  Greedy,
  Policy,
  Prompts,
  Rollout,
  SamplingRule,
  Scored,
)

SHORTEST = 32  # tokens; less is computed faster than compiled


@dataclasses.dataclass(frozen=True)
class ProgramConfig:
  """Sizes and choices that programs are compiled for."""

  num_prompts: int = 32  # C
  samples_per_prompt: int = 16  # G
  max_completion_length: int = 32  # T
  pad_token: int = 0
  truncate: bool = False
  compact_levels: int = 0
  micro_batches: int | None = 1  # passes of a gradient; None: see memory.py
  memory: int | None = None  # bytes of a device; None: as it reports
  length_buckets: int = 1  # see completion_lengths
  logits_chunk: int | None = None
  steps_per_call: int = 0  # steps of one program; 0: step by step
  replay_groups: int = 0  # groups of earlier steps in a batch
  reference_kl: bool = False  # measured for the log
  reward_on_error: str = 'raise'  # of rewards on the device
  turn_length: int | None = None  # tokens of a turn; None: there are no turns
  seats: int = 1  # that the policy plays

  @property
  def sampler(self) -> SamplerConfig:
    return SamplerConfig(
      self.samples_per_prompt,
      self.turn_length or self.max_completion_length,
      self.pad_token,
      truncate=self.truncate,
      compact_levels=self.compact_levels,
    )

  @property
  def greedy(self) -> SamplerConfig:
    return dataclasses.replace(
      self.sampler, samples_per_prompt=1, greedy=True, truncate=False
    )


class Networks(NamedTuple):
  """Functions that programs are made of."""

  policy: Policy
  algorithm: Algorithm
  optimizer: object  # optax
  rule: SamplingRule
  critic: Policy | None = None
  # (function of device_rewards.make_device_scorer, its params), None: no
  # reward on the device
  device_score: tuple | None = None
  weights: dict = {}  # noqa: RUF012  {reward: float}, host and device
  # {remat: (policy, critic) that keeps less for the backward pass}, the fastest
  # first: tried where memory is short
  remats: dict = {}  # noqa: RUF012
  remat: str = 'none'  # of policy and critic


class EvaluationShape(NamedTuple):
  """Sizes of an evaluation's program."""

  num_prompts: int  # at a time
  prompt_length: int
  sampler: SamplerConfig
  # (function of make_device_scorer, its params); None: host rewards alone
  device_score: tuple | None = None
  columns: dict = {}  # noqa: RUF012  arrays [n, ...] that those rewards read
  reference: bool = False  # log-probs under the reference are measured


def completion_lengths(T: int, count: int) -> list[int]:
  """Lengths that an update is compiled for, ascending: T and each half the one
  before, `count` at most, none below SHORTEST."""
  found = [T]
  while len(found) < count and found[-1] >= 2 * SHORTEST:
    found.append(-(-found[-1] // 2))
  return found[::-1]


class Shapes(NamedTuple):
  """ShapeDtypeStructs of a run's arrays, with their shardings."""

  rows: NamedSharding
  whole: NamedSharding

  def array(self, *shape, dtype=np.int32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or self.rows)

  def like(self, x, count: int, sharding=None):
    """Struct of `count` rows of x."""
    return self.array(count, *x.shape[1:], dtype=x.dtype, sharding=sharding)

  def prompts(self, count: int, length: int, inputs=()) -> Prompts:
    inputs = {k: self.like(v, count) for k, v in dict(inputs).items()}
    return Prompts(self.array(count, length), self.array(count), inputs)

  def scored(self, rollout: Rollout, names, greedy: bool, C: int) -> Scored:
    B, T = rollout.tokens.shape
    f32 = np.float32
    return Scored(
      rollout,
      {n: self.array(B, T, dtype=f32) for n in names},
      {n: self.array(B, dtype=bool) for n in names},
      {n: self.array(dtype=f32, sharding=self.whole) for n in names},
      Greedy(self.array(C, T, dtype=f32), self.array(C, T, dtype=bool))
      if greedy
      else None,
    )


def mesh_shapes() -> Shapes:
  """Shapes on the mesh of jax.set_mesh."""
  mesh = jax.sharding.get_mesh()
  return Shapes(
    NamedSharding(mesh, PartitionSpec(ROWS)),
    NamedSharding(mesh, PartitionSpec()),
  )


def rollout_size(rollout: Rollout) -> tuple:
  """Shapes of rollouts that one program takes: (C, P, B, T)."""
  return *rollout.prompts.tokens.shape, *rollout.tokens.shape


def rollout_kind(rollout: Rollout) -> tuple:
  """Shape of rollouts that one program takes: (P, B, has num_kept)."""
  P, B = rollout.prompts.tokens.shape[1], rollout.tokens.shape[0]
  return P, B, rollout.num_kept is not None
