"""What a run's steps are made of: their functions, compiled side by side."""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_tok.data import PromptSet
from jaxrl_tok.evaluation import make_reference_kl
from jaxrl_tok.models.mask_policy import masked_policy
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.sharding import ROWS, row_shards
from jaxrl_tok.step import memory
from jaxrl_tok.step.device_steps import Table, make_steps
from jaxrl_tok.step.update import make_update, shortened
from jaxrl_tok.types import Algorithm, Policy, Prompts, SamplingRule, TrainState

SHORTEST = 32  # tokens; less is computed faster than compiled


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """When things happen. 0 means never."""

  seed: int = 0
  num_prompts: int = 32  # C
  max_steps: int = 1000
  eval_every: int = 50
  eval_batch: int = 512  # held-out prompts at a time
  save_every: int = 0  # and always at the end
  stop_at_reward: float | None = None  # held-out, greedy
  patience: int = 0  # evaluations without a better one
  log_kl: bool = True  # at each evaluation, where there is a reference
  steps_per_call: int = 0  # one program of so many whole steps
  dynamic_sampling_rounds: int = 0  # see collect.py


class Parts(NamedTuple):
  """The step's functions, those of the device compiled."""

  greedy: Callable  # (state.weights, key, Prompts, rule) -> Rollout
  score: Callable  # (tokens, mask, examples) -> rewards.Scores
  judge: Callable  # the same, for held-out data
  decode: Callable  # lists of ids -> texts
  # step by step
  sample: Callable | None = None  # (weights, key, Prompts, rule) -> Rollout
  # {T: see make_update}; of a rollout that is over by column T
  updates: dict | None = None
  greedy_prompts: Callable | None = None  # greedy, of training prompts
  # (Rollout, {column: [C, ...]}) -> (reward [B, T], {name: mean})
  device_score: Callable | None = None
  # or many in a call: (state, Table, index [n, C], rule)
  steps: Callable | None = None  # -> (state, metrics [n], steps.Last)
  reference_kl: Callable | None = (
    None  # (reference weights, rollout, rule) -> KL
  )


def lengths_of(T: int, count: int) -> list[int]:
  """Lengths that an update is compiled for: T, and at most `count` - 1 more,
  each half the one before and none below SHORTEST tokens."""
  lengths = [T]
  while len(lengths) < count and lengths[-1] >= 2 * SHORTEST:
    lengths.append(-(-lengths[-1] // 2))
  return sorted(lengths)


def compile_parts(
  policy: Policy,
  algorithm: Algorithm,
  optimizer,
  sampler: SamplerConfig,
  config: LoopConfig,
  state: TrainState,
  rule: SamplingRule,
  data: PromptSet,
  held_out_length: int,
  micro_batches: int | None = 1,
  length_buckets: int = 1,
  logits_chunk: int | None = None,
  device_score: tuple | None = None,
  critic: Policy | None = None,
) -> dict[str, Callable]:
  """Compiles what Parts wants of the device, side by side.

  Args:
    state: or ShapeDtypeStructs of it, with their shardings.
    held_out_length: P of the held-out prompts.
    micro_batches: passes of a mini-batch's gradient; None: see memory.py.
    length_buckets: see lengths_of.
    device_score: (device_rewards.make_scorer's function, its params).
    critic: where it is no head on the policy.

  Must run under jax.set_mesh. Nothing is compiled after this for these shapes.
  """
  mesh = jax.sharding.get_mesh()
  rows = NamedSharding(mesh, PartitionSpec(ROWS))
  whole = NamedSharding(mesh, PartitionSpec())

  def array(*shape, dtype=np.int32, sharding=rows):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def like(x, count, sharding=rows):  # `count` rows of x
    return array(count, *x.shape[1:], dtype=x.dtype, sharding=sharding)

  C, E = config.num_prompts, config.eval_batch
  prompts = Prompts(like(data.tokens, C), array(C))
  held_out = Prompts(array(E, held_out_length), array(E))
  if algorithm.mask_sync_steps:
    policy = masked_policy(policy)
  one = dataclasses.replace(
    sampler, samples_per_prompt=1, greedy=True, truncate=False
  )

  def sampling(config):
    sample = make_sampler(policy, config)
    return lambda weights, *args: sample(policy.merge_params(*weights), *args)

  sample, greedy = sampling(sampler), sampling(one)
  sampled = jax.eval_shape(sample, state.weights, state.key, prompts, rule)
  rollout = jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), sampled)
  reward = array(*rollout.logp.shape, dtype=np.float32)
  T, num_shards, device = (
    rollout.tokens.shape[1],
    row_shards(mesh),
    mesh.devices.flat[0],
  )
  divisions = [micro_batches]
  if micro_batches is None:
    each = memory.bytes_a_prompt(
      policy, state.weights, rollout, rule, num_shards
    )
    most = memory.budget(device, state, num_shards)
    divisions = memory.divisions(
      C // algorithm.mini_batches, each, most, num_shards
    )

  def updating(parts, length=T):
    update = make_update(
      policy, algorithm, optimizer, parts, logits_chunk, critic
    )
    return update if length == T else shortened(update, length)

  # the state comes out placed as it went in: no compilation at step 2
  placed = jax.tree.map(lambda x: x.sharding, state)
  score, score_params = device_score or (None, None)
  look = state.weights, state.key
  greedy_job = jax.jit(greedy, out_shardings=rows)
  # {name: (functions, the first of which fits is wanted, arguments)}
  jobs = {'greedy': ([greedy_job], (*look, held_out, rule))}
  if config.steps_per_call:
    best = greedy if algorithm.greedy else None
    n = len(data.examples)
    columns = {k: like(v, n, whole) for k, v in data.columns.items()}
    table = Table(
      like(data.tokens, n, whole), array(n, sharding=whole), columns
    )
    index = array(config.steps_per_call, C, sharding=whole)
    jobs['steps'] = (
      [
        jax.jit(
          make_steps(sample, score, updating(n), best),
          donate_argnums=0,
          out_shardings=(placed, whole, rows),
        )
        for n in divisions
      ],
      (state, score_params, table, index, rule),
    )
  else:
    sample_job = jax.jit(sample, out_shardings=rows)
    jobs['sample'] = [sample_job], (*look, prompts, rule)
    greedy_reward = None
    if algorithm.greedy:
      greedy_reward = array(C, dtype=np.float32)
      jobs['greedy_prompts'] = [greedy_job], (*look, prompts, rule)
    for length in lengths_of(T, length_buckets):
      jobs['update', length] = (
        [
          jax.jit(
            updating(n, length),
            donate_argnums=0,
            out_shardings=(placed, whole, rows),
          )
          for n in divisions
        ],
        (state, rollout, reward, rule, greedy_reward),
      )
    if score is not None:
      columns = {k: like(v, C) for k, v in data.columns.items()}
      score_job = jax.jit(score, out_shardings=(rows, whole))
      jobs['device_score'] = [score_job], (score_params, rollout, columns)
  # at every step where the algorithm has a KL of its own
  if config.log_kl and algorithm.kl is None:
    reference_kl = jax.jit(
      make_reference_kl(policy, logits_chunk), out_shardings=whole
    )
    jobs['drift'] = [reference_kl], (state.reference_weights, rollout, rule)

  def build(job):
    with jax.set_mesh(mesh):  # it is of the thread
      return memory.first_that_fits(*job, device)

  # a compilation uses about two cores by itself
  threads = max(1, (os.cpu_count() or 2) // 2)
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    built = dict(zip(jobs, pool.map(build, jobs.values())))
  if not config.steps_per_call:
    lengths = lengths_of(T, length_buckets)
    built['updates'] = {n: built.pop(('update', n)) for n in lengths}
  if 'device_score' in built:
    compiled = built['device_score']
    built['device_score'] = functools.partial(compiled, score_params)
  if 'steps' in built:
    many = built['steps']
    built['steps'] = lambda state, *args: many(state, score_params, *args)
  return built
