"""Methods, a credit under an aggregation each, and their gradients.

A method's estimate is sum_bt w_bt grad l_bt, its weights the algorithm's own
advantages times its own aggregation. Gradients of the tokens are made once, and
all methods' estimates are one product with them.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_tok.credit import algorithms
from jaxrl_tok.credit.names import AGGREGATIONS, BASELINES
from jaxrl_tok.policy import evaluate
from jaxrl_tok.step.device_rewards import (
  digit_tokens,
  exact_tokens,
  on_device,
)
from jaxrl_tok.types import (
  AdvantageInputs,
  Algorithm,
  Policy,
  Rollout,
  Scored,
)


@on_device
def digit_outcome(rollout: Rollout, answer, answer_mask) -> jax.Array:
  """Digits of the answer as an outcome: the sum of digit_tokens [B]."""
  return digit_tokens(rollout, answer, answer_mask).sum(1)


# the last two have one expected gradient: credit by token, and their sum
REWARDS = {
  'exact': exact_tokens,
  'digits_outcome': digit_outcome,
  'digits': digit_tokens,
}
SUM = 'seq_mean_token_sum'  # the true gradient's aggregation
DEFAULT = 'leave_one_out', SUM  # algorithms.reinforce's


class Method(NamedTuple):
  """A credit under an aggregation."""

  reward: str
  baseline: str
  aggregation: str
  algorithm: Algorithm


class Samples(NamedTuple):
  """Completions of one policy, with their rewards and values."""

  rollout: Rollout
  rewards: dict  # {reward: float32 [B, T]}
  greedy: dict  # {reward: Greedy}
  value: jax.Array  # float32 [B, T + 1]


def make_methods(max_length: int) -> list[Method]:
  """Makes all baselines under all aggregations for the exact reward, and the
  default for the digits, as an outcome and by token."""
  credits = {name: {'baseline': name} for name in BASELINES}
  credits['value'] = {  # G_t - V_t: unbiased, as any V(s) is
    'credit': 'gae',
    'gae_lambda': 1.0,
    'bootstrap_truncated': False,
  }
  credits['group_mean / std'] = {
    'baseline': 'group_mean',
    'scale': 'group_std',
  }

  def one(reward, baseline, aggregation):
    algorithm = algorithms.reinforce(
      aggregate=aggregation, max_length=max_length, **credits[baseline]
    )
    return Method(reward, baseline, aggregation, algorithm)

  pairs = itertools.product(credits, AGGREGATIONS)
  return [
    *(one('exact', *pair) for pair in pairs),
    *(one(name, *DEFAULT) for name in REWARDS if name != 'exact'),
  ]


def inputs_of(samples: Samples, reward: str) -> AdvantageInputs:
  """Inputs of an advantage where this is the only reward."""
  everywhere = jnp.ones(samples.rollout.mask.shape[0], bool)
  scored = Scored(
    samples.rollout,
    {reward: samples.rewards[reward]},
    {reward: everywhere},
    {reward: jnp.float32(1)},
    samples.greedy[reward],
  )
  return AdvantageInputs(scored, samples.value, log_change=None)


def token_weights(methods: list, samples: Samples, carries: dict) -> jax.Array:
  """Weights w [M, B, T] of the estimates sum_bt w_bt grad l_bt: the algorithm's
  own advantage times its own aggregation.

  Args:
    carries: {name: value} of the baselines that remember.
  """
  inputs = {name: inputs_of(samples, name) for name in samples.rewards}
  advantage, found = {}, []
  for m in methods:
    credit = m.reward, m.baseline  # one credit under every aggregation
    given = inputs[m.reward]
    if credit not in advantage:
      advantage[credit] = m.algorithm.advantage(given, carries).advantage
    weight = m.algorithm.aggregate(given.mask, given.valid)
    found.append(weight * advantage[credit])
  return jnp.stack(found)


def flat(tree, front: int = 0) -> jax.Array:
  """Leaves [front..., ...] as one array [front..., W]."""
  leaves = jax.tree.leaves(tree)
  return jnp.concatenate(
    [x.reshape(*x.shape[:front], -1) for x in leaves], axis=-1
  )


def whole_gradient(policy: Policy, params, rollout, rule, weight_BxT):
  """Estimate sum_bt w_bt grad l_bt [W], in one backward pass of the batch."""

  def total(params):
    stats = evaluate(policy, params, rollout, rule)
    return jnp.sum(stats.logp * weight_BxT)

  return flat(jax.grad(total)(params))


def token_gradients(policy: Policy, params, rollout, rule) -> jax.Array:
  """Gradients grad l_bt of every token: [B, T, W]."""
  G = rollout.tokens.shape[0] // rollout.prompts.length.shape[0]
  prompts = jax.tree.map(lambda x: jnp.repeat(x, G, axis=0), rollout.prompts)

  def logp_T(params, row: Rollout):
    row = jax.tree.map(lambda x: x[None], row)
    return evaluate(policy, params, row, rule).logp[0]

  of_row = jax.vmap(jax.jacrev(logp_T), (None, 0))
  return flat(of_row(params, rollout._replace(prompts=prompts)), front=2)


def estimates(policy: Policy, params, rollout, rule, weight_MxBxT) -> tuple:
  """Estimates sum_bt w_mbt grad l_bt of all weights at once [M, W], and each
  row's squared score |sum_t grad l_bt|^2 [B]. The tokens' gradients are made
  once, those of one prompt at a time."""
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
