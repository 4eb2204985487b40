"""Which baseline and which aggregation make the best gradient of one step?

  python -m experiments.gradient_lab
"""

import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.table

from experiments import arithmetic, build, launch, models, warm_start
from experiments import flags as flag_layer
from jaxrl_tok import advantages, algorithms, data, device_rewards, masked
from jaxrl_tok import rewards as host_rewards
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.policy import completion_hidden, evaluate, values
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.types import Algorithm, Policy, Rollout, SamplingRule, Scored
from jaxrl_tok.update import is_cut

BLOCKS = 16  # of batches; leaving one out at a time gives standard errors
FAR = 8  # times as many prompts in a batch of the reference


@dataclasses.dataclass(frozen=True)
class LabFlags:
  """The problems and what is measured on them."""

  digits: int = 2
  num_problems: int = 20_000
  batches: int = 128
  reference_batches: int = 64
  seed: int = 0
  output_dir: str | None = None


@dataclasses.dataclass(frozen=True)
class Flags:
  lab: LabFlags
  warm_start: flag_layer.WarmStartFlags
  size: flag_layer.SizeFlags
  sampling: flag_layer.SamplingFlags

  model = flag_layer.ModelFlags()
  algorithm = flag_layer.AlgorithmFlags()

  @property
  def run(self) -> flag_layer.RunFlags:
    return flag_layer.RunFlags(self.lab.output_dir, self.lab.seed)


DEFAULTS = Flags(
  LabFlags(),
  flag_layer.WarmStartFlags(),
  flag_layer.SizeFlags(),
  flag_layer.SamplingFlags(
    num_prompts=8, num_generations=8, max_completion_length=6
  ),
)


def unpadded(record: dict) -> dict:
  return record | {'answer': str(int(record['answer']))}


class Method(NamedTuple):
  reward: str
  baseline: str
  aggregation: str
  algorithm: Algorithm


def make_methods(f: flag_layer.AlgorithmFlags, max_length: int):
  credits = {n: {'baseline': make(f)} for n, make in build.BASELINES.items()}
  credits['value'] = {
    'credit': advantages.gae,
    'gae_lambda': 1.0,
    'bootstrap_truncated': False,
  }
  credits['group_mean / std'] = {
    'baseline': advantages.group_mean(),
    'scale': advantages.group_std,
  }
  found = [
    Method(
      'exact',
      name,
      aggregation,
      algorithms.reinforce(
        aggregate=aggregate, max_length=max_length, **credit
      ),
    )
    for aggregation, aggregate in build.AGGREGATIONS.items()
    for name, credit in credits.items()
  ]
  default = algorithms.reinforce()
  return [
    *found,
    Method('digits', 'leave_one_out', 'seq_mean_token_sum', default),
  ]


def token_weights(methods, scored: dict, carries) -> jax.Array:
  found = []
  for method, carry in zip(methods, carries):
    batch = scored[method.reward]
    advantage, _, _ = method.algorithm.advantage(batch, carry)
    found.append(method.algorithm.aggregate(batch.rollout.mask) * advantage)
  return jnp.stack(found)


def flatten(tree, front: int = 1):
  leaves = jax.tree.leaves(tree)
  return jnp.concatenate(
    [x.reshape(*x.shape[:front], -1) for x in leaves], axis=-1
  )


def pulled(policy, params, rollout, rule, weights_MxBxT):
  def logp(params):
    return evaluate(policy, params, rollout, rule).logp

  _, pull = jax.vjp(logp, params)
  return flatten(jax.vmap(pull)(weights_MxBxT))


def estimates(policy, params, rollout, rule, weights_MxBxT, rows=16):
  M, B, T = weights_MxBxT.shape
  G = B // rollout.prompts.length.shape[0]
  rows = min(rows, B)

  def logp_T(params, row):
    row = jax.tree.map(lambda x: x[None], row)
    return evaluate(policy, params, row, rule).logp[0]

  prompts = jax.tree.map(lambda x: jnp.repeat(x, G, axis=0), rollout.prompts)
  each = rollout._replace(prompts=prompts)

  def step(total, part):
    rollout, weights_MxbxT = part
    grads = jax.vmap(jax.jacrev(logp_T), (None, 0))(params, rollout)
    grads_bTxW = flatten(grads, 2).reshape(rows * T, -1)
    return total + weights_MxbxT.reshape(M, -1) @ grads_bTxW, None

  parts = jax.tree.map(
    lambda x: x.reshape(B // rows, rows, *x.shape[1:]), each
  )
  weights = jnp.moveaxis(weights_MxBxT.reshape(M, -1, rows, T), 1, 0)
  zero = jnp.zeros((M, sum(x.size for x in jax.tree.leaves(params))))
  return jax.lax.scan(step, zero, (parts, weights))[0]
