"""Constraints: limits of means, kept by Lagrange multipliers.

A constraint names a component c of the reward, a function's values, and says
mean(c) <= limit. With a multiplier lambda >= 0, which begins at 0,

  reward      r - price c                                      of every token
  price       max(0, lambda + damping (mean(c) - limit))
  multiplier  lambda <- max(0, lambda + rate (mean(c) - limit))  after an update

so that lambda grows while the limit is passed and falls while it is kept; for
mean(c) >= limit all signs of c and the limit turn. Gradient ascent on the
policy and descent on lambda; Altman, Constrained Markov Decision Processes,
1999; arXiv:1805.11074. Without damping, the price is lambda, and the mean
swings about the limit for ever where reward and cost are one; the damping, the
proportional part of arXiv:2007.03964, lets the swings die. The mean is that of
the policy as it samples, and a single step is no promise.

The cost is a component of weight -price (that of a reward which is limited,
too, is its own weight less the price), so it enters as rewards do, token by
token or as an outcome, before returns, baselines and scales:

  sum_then_normalize   A of (r - price c): lambda is in units of the reward.
                       Where the group's deviation divides (grpo), it is that of
                       r - price c, so that for a large price the gradient is
                       that of -c alone, at the usual size
  normalize_then_sum   w A(r) - price A(c), each divided by its own deviation:
                       lambda is in deviations of c
  gae, vtrace          the critic learns the value of r - price c
  greedy               the baseline is the greedy completion's r without the
                       cost: no bias, less help

A completion to which only a constraint applies is valid, and has reward 0. The
mean is that of the batch's newest rows, where replayed ones stand beside them.
Metrics of rewards are without the cost; frac_reward_zero_std is with it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxrl_tok import masked
from jaxrl_tok.credit.names import Constraint
from jaxrl_tok.step.metrics import reward_metrics
from jaxrl_tok.types import (
  Advantage,
  AdvantageInputs,
  Algorithm,
  Carry,
  Scored,
)

MULTIPLIERS = 'multipliers'  # the carry, {constraint: float32 []}


def metric(name: str, what: str) -> str:
  """Name of a constraint's metric."""
  return f'constraint/{name}/{what}'


def priced(
  scored: Scored, constraints: Sequence[Constraint], prices: dict
) -> Scored:
  """Scored whose weights have the prices {constraint: float32 []} in them."""
  weights = dict(scored.weights)
  for c in constraints:
    weights[c.name] = weights[c.name] - c.sign * prices[c.name]
  return scored._replace(weights=weights)


def mean_of_newest(scored: Scored, name: str) -> tuple[jax.Array, jax.Array]:
  """(mean of a component over the rows of the newest policy that it applies
  to, whether there is one)."""
  rollout = scored.rollout
  applies = scored.applies[name]
  newest = jnp.max(jnp.where(applies, rollout.version, -1))
  rows = applies & (rollout.version == newest)
  values = masked.total(scored.rewards[name], rollout.mask, axis=1)
  return masked.mean(values, rows), jnp.any(rows)


def constrained(
  algorithm: Algorithm,
  constraints: Sequence[Constraint],
  rate: float,
  damping: float = 0.0,
) -> Algorithm:
  """Algorithm that keeps the constraints.

  Its metrics are constraint/NAME/mean, .../violation, by which the mean is
  beyond the limit (below 0: it is kept; 0 where the function applies to no
  completion), .../multiplier and .../price, those of this update.
  """
  if not constraints:
    return algorithm

  def advantage(inputs: AdvantageInputs, carries: dict) -> Advantage:
    multipliers, found, prices = carries[MULTIPLIERS], {}, {}
    for c in constraints:
      mean, known = mean_of_newest(inputs.scored, c.name)
      beyond = jnp.where(known, c.sign * (mean - c.limit), 0.0)
      price = jnp.maximum(0.0, multipliers[c.name] + damping * beyond)
      found[metric(c.name, 'mean')] = mean
      found[metric(c.name, 'violation')] = beyond
      found[metric(c.name, 'multiplier')] = multipliers[c.name]
      prices[c.name] = found[metric(c.name, 'price')] = price
    scored = priced(inputs.scored, constraints, prices)
    equal = 'frac_reward_zero_std'
    found[equal] = reward_metrics(scored)[equal]
    out = algorithm.advantage(inputs._replace(scored=scored), carries)
    return out._replace(metrics=out.metrics | found)

  return algorithm._replace(
    advantage=advantage,
    carries=algorithm.carries | {MULTIPLIERS: multiplier(constraints, rate)},
  )


def multiplier(constraints: Sequence[Constraint], rate: float) -> Carry:
  """Carry of the multipliers {constraint: float32 []}."""

  def after(values: dict, state, metrics: dict) -> dict:
    moved = {
      name: value + rate * metrics[metric(name, 'violation')]
      for name, value in values.items()
    }
    return {name: jnp.maximum(value, 0.0) for name, value in moved.items()}

  names = [c.name for c in constraints]
  return Carry(lambda params: {name: jnp.float32(0) for name in names}, after)
