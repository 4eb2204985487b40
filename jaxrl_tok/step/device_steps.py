"""Steps on the device: many in one program, their rewards JAX functions.

A step is sample -> score -> update, by the functions of a step on the host;
`n` of them are one `scan` over the rows of a table that lies on the device.
The host does nothing in between: its log's numbers come back stacked.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_tok import processes
from jaxrl_tok.data import PromptSet, record_indices
from jaxrl_tok.sharding import constrain_rows, put_replicated
from jaxrl_tok.step.collectors import (
  Batch,
  Collector,
  TokenCounts,
  examples_at,
)
from jaxrl_tok.types import Greedy, Prompts, Scored, TrainState

GREEDY_TOKENS = 'completions/greedy_tokens'  # metric, of a greedy baseline


class Table(NamedTuple):
  """Prompts and columns of all the data, on the device."""

  tokens: jax.Array  # int32 [n, P]
  length: jax.Array  # int32 [n]
  columns: dict  # {name: [n, ...]}


class StepBatch(NamedTuple):
  """Batch of a step with its advantages, for samples that show credit."""

  scored: Scored
  advantage: jax.Array  # float32 [B, T]


def make_device_steps(
  sample: Callable,
  score: Callable,
  update: Callable,
  weights: dict,
  greedy: Callable | None = None,
  on_error: str = 'raise',
) -> Callable:
  """Returns steps(state, Table, index int32 [n, C], rule, reward params) ->
  (state, metrics {name: [n]}, StepBatch of the last step), pure.

  Args:
    sample: (policy_params, key, Prompts, rule, version) -> Rollout; greedy
      alike, where the algorithm wants it.
    score: see device_rewards.make_device_scorer.
    update: see update.make_update.
    weights: {reward: float}.
    on_error: see rewards.ON_ERROR; values that are not finite are counted in
      rewards/NAME/errors, and with raise are left to the host.
  """

  def scored_of(params, rollout, columns) -> tuple[Scored, dict]:
    rewards, applies = score(params, rollout, columns)
    numbers, errors = {}, {}
    for name, values in rewards.items():
      numbers[name] = jnp.float32(weights[name])
      failed = ~jnp.all(jnp.isfinite(values), axis=1)
      errors[f'rewards/{name}/errors'] = jnp.sum(failed.astype(jnp.float32))
      if on_error != 'raise':
        rewards = rewards | {name: jnp.where(failed[:, None], 0.0, values)}
      if on_error == 'mask':
        applies = applies | {name: applies[name] & ~failed}
    return Scored(rollout, rewards, applies, numbers), errors

  def steps(state: TrainState, table: Table, index, rule, params=None):
    def step(state, index_C):
      rows = jax.tree.map(lambda x: constrain_rows(x[index_C]), table)
      prompts = Prompts(rows.tokens, rows.length)
      key = jax.random.fold_in(state.key, state.step)
      given = state.policy_params, key, prompts, rule, state.step
      scored, errors = scored_of(params, sample(*given), rows.columns)
      if greedy is not None:
        best, _ = scored_of(params, greedy(*given), rows.columns)
        known = jnp.where(best.valid[:, None], best.reward, jnp.nan)
        scored = scored._replace(greedy=Greedy(known, best.rollout.mask))
        errors |= {GREEDY_TOKENS: best.rollout.mask.sum().astype(jnp.float32)}
      state, metrics, advantage = update(state, scored, rule)
      return state, metrics | errors, StepBatch(scored, advantage)

    def scanned(carry, index_C):
      state, metrics, last = step(carry[0], index_C)
      return (state, last), metrics

    shapes = jax.eval_shape(step, state, index[0])[2]
    last = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (state, last), metrics = jax.lax.scan(scanned, (state, last), index)
    return state, metrics, last

  return steps


def table_rows(
  data: PromptSet,
  lengths: np.ndarray,
  seed: int,
  num_prompts: int,
  steps: int,
  samples_per_prompt: int,
  greedy: bool = False,
) -> Collector:
  """Collector of indices: `finish` gives the rows of a Table for `steps` steps,
  which the update of make_device_steps samples, scores and learns from.

  Args:
    lengths: int [n] of the table's prompts.
    greedy: each prompt has a greedy completion, too, which is scored.
  """

  def start(state: TrainState, key, cursor: dict):
    position = int(cursor['position'])
    count = steps * num_prompts
    index = record_indices(data.num_records, seed, position, count)
    index = index.reshape(steps, num_prompts).astype(np.int32)
    placed = put_replicated(jax.sharding.get_mesh(), index)
    positions = np.arange(position, position + count)
    return placed, index, positions, {'position': np.int64(position + count)}

  def finish(pending):
    placed, index, positions, cursor = pending
    counts = TokenCounts(
      np.full(steps, num_prompts),
      None,
      lengths[index].sum(1) * samples_per_prompt,
      scored=num_prompts * (samples_per_prompt + greedy),
    )
    last = positions[-num_prompts:]
    own = processes.own_rows(jax.sharding.get_mesh(), num_prompts)
    examples = examples_at(data, seed, last[own])
    return Batch(placed, examples, last, {}, counts, {}), cursor

  return Collector(lambda: {'position': np.int64(0)}, start, finish)
