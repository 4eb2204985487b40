"""Methods, a credit under an aggregation each, and their gradients.

A method's estimate is sum_bt w_bt grad l_bt, its weights the algorithm's own
advantages times its own aggregation. So the gradients of the tokens are made
once, and all methods' estimates are one product with them.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments import arithmetic
from jaxrl_tok.credit import advantages, algorithms
from jaxrl_tok.policy import evaluate
from jaxrl_tok.run import build
from jaxrl_tok.run import settings as flag_layer
from jaxrl_tok.types import Algorithm, Policy, Rollout

REWARDS = {
  name: on_device
  for name, (_, on_device) in arithmetic.reward_functions().items()
}
SUM = 'seq_mean_token_sum'  # the true gradient's aggregation
DEFAULT = 'leave_one_out', SUM  # algorithms.reinforce's


class Method(NamedTuple):
  reward: str
  baseline: str
  aggregation: str
  algorithm: Algorithm


def make_methods(f: flag_layer.AlgorithmFlags, max_length: int) -> list:
  """Every baseline under every aggregation for the exact reward, and the
  default for the digits."""
  credits = {n: {'baseline': make(f)} for n, make in build.BASELINES.items()}
  credits['value'] = {  # G_t - V_t: unbiased, as any V(s) is
    'credit': advantages.gae,
    'gae_lambda': 1.0,
    'bootstrap_truncated': False,
  }
  credits['group_mean / std'] = {
    'baseline': advantages.group_mean(),
    'scale': advantages.group_std,
  }

  def one(reward, baseline, aggregation):
    algorithm = algorithms.reinforce(
      aggregate=build.AGGREGATIONS[aggregation],
      max_length=max_length,
      **credits[baseline],
    )
    return Method(reward, baseline, aggregation, algorithm)

  pairs = itertools.product(credits, build.AGGREGATIONS)
  return [*(one('exact', *pair) for pair in pairs), one('digits', *DEFAULT)]


def token_weights(methods, scored: dict, carry_of: dict) -> jax.Array:
  """w [M, B, T] of the estimates sum_bt w_bt grad l_bt: the algorithm's own
  advantage times its own aggregation.

  Args:
    scored: {reward: Scored} of one batch.
    carry_of: {baseline: what it remembers}, of those that do.
  """
  advantage, found = {}, []
  for m in methods:
    credit = m.reward, m.baseline  # the same under every aggregation
    if credit not in advantage:
      advantage[credit], _, _ = m.algorithm.advantage(
        scored[m.reward], carry_of.get(m.baseline, ())
      )
    mask = scored[m.reward].rollout.mask
    found.append(m.algorithm.aggregate(mask) * advantage[credit])
  return jnp.stack(found)


def flat(tree, front: int = 0) -> jax.Array:
  """A tree of [front..., ...] as one array [front..., W]."""
  leaves = jax.tree.leaves(tree)
  return jnp.concatenate(
    [x.reshape(*x.shape[:front], -1) for x in leaves], axis=-1
  )


def whole_gradient(policy: Policy, params, rollout, rule, weight_BxT):
  """sum_bt w_bt grad l_bt [W], in one backward pass of the batch."""

  def total(params):
    stats = evaluate(policy, params, rollout, rule)
    return jnp.sum(stats.logp * weight_BxT)

  return flat(jax.grad(total)(params))


def token_gradients(policy: Policy, params, rollout, rule) -> jax.Array:
  """grad l_bt for every token: [B, T, W]."""
  G = rollout.tokens.shape[0] // rollout.prompts.length.shape[0]
  prompts = jax.tree.map(lambda x: jnp.repeat(x, G, axis=0), rollout.prompts)

  def logp_T(params, row: Rollout):
    row = jax.tree.map(lambda x: x[None], row)
    return evaluate(policy, params, row, rule).logp[0]

  of_row = jax.vmap(jax.jacrev(logp_T), (None, 0))
  return flat(of_row(params, rollout._replace(prompts=prompts)), front=2)


def estimates(policy: Policy, params, rollout, rule, weight_MxBxT) -> tuple:
  """sum_bt w_mbt grad l_bt for all weights at once [M, W], and each row's
  squared score |sum_t grad l_bt|^2 [B]. The tokens' gradients are made once,
  those of one prompt at a time."""
  M, B, T = weight_MxBxT.shape
  C = rollout.prompts.length.shape[0]
  zero = jnp.zeros((M, sum(x.size for x in jax.tree.leaves(params))))

  def add(total, part):
    group, weight_GxTxM = part
    grads = token_gradients(policy, params, group, rule)
    square_G = jnp.sum(grads.sum(1) ** 2, axis=1)
    return total + jnp.einsum('gtm,gtw->mw', weight_GxTxM, grads), square_G

  groups = jax.tree.map(lambda x: x.reshape(C, -1, *x.shape[1:]), rollout)
  weights = jnp.moveaxis(weight_MxBxT, 0, -1).reshape(C, B // C, T, M)
  groups = groups._replace(
    prompts=jax.tree.map(lambda x: x[:, None], rollout.prompts)
  )
  found_MxW, square_CxG = jax.lax.scan(add, zero, (groups, weights))
  return found_MxW, square_CxG.reshape(B)
