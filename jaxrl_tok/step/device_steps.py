"""Whole steps in one program, where every reward is a JAX function.

A step is sample -> score -> update; `n` of them are one `scan` over the rows of
a table that lies on the device. The host does nothing in between: what it
would log comes back stacked.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_tok.sharding import constrain_rows
from jaxrl_tok.types import Prompts, Rollout, SamplingRule, TrainState


class Table(NamedTuple):
  """All prompts and columns of the data, on the device."""

  tokens: jax.Array  # int32 [n, P]
  length: jax.Array  # int32 [n]
  columns: dict  # {name: [n, ...]}


class Last(NamedTuple):
  """The last step's batch, for what looks at one."""

  rollout: Rollout
  reward: jax.Array  # [B, T]
  advantage: jax.Array  # [B, T]


def make_steps(
  sample: Callable,
  score: Callable,
  update: Callable,
  greedy: Callable | None = None,
) -> Callable:
  """Returns steps(state, reward params, Table, index int32 [n, C], rule) ->
  (state, metrics {name: [n]}, Last), pure.

  Args:
    sample: (state.weights, key, Prompts, rule) -> Rollout; greedy the same.
    score: see device_rewards.make_scorer.
    update: see update.make_update.
    greedy: one completion of each prompt, where the algorithm wants it.
  """

  def steps(state: TrainState, params, table: Table, index, rule: SamplingRule):
    def step(state, index_C):
      rows = jax.tree.map(lambda x: constrain_rows(x[index_C]), table)
      prompts = Prompts(rows.tokens, rows.length)
      key = jax.random.fold_in(state.key, state.step)
      rollout = sample(state.weights, key, prompts, rule)
      reward, means = score(params, rollout, rows.columns)
      greedy_reward = None
      if greedy is not None:
        best = greedy(state.weights, key, prompts, rule)
        greedy_reward = score(params, best, rows.columns)[0].sum(1)
      state, metrics, advantage = update(
        state, rollout, reward, rule, greedy_reward
      )
      return state, metrics | means, Last(rollout, reward, advantage)

    def scanned(carry, index_C):
      state, metrics, last = step(carry[0], index_C)
      return (state, last), metrics

    shapes = jax.eval_shape(step, state, index[0])[2]
    last = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (state, last), metrics = jax.lax.scan(scanned, (state, last), index)
    return state, metrics, last

  return steps
