"""Samples of one policy, and statistics of their gradients.

`find_reference` makes the reference and learns the value from many samples;
`find_estimates` compares the methods' estimates on others.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies.gradient_lab.measures import (
  Rows,
  make_rows,
  products,
  summed,
)
from experiments.studies.gradient_lab.methods import (
  DEFAULT,
  REWARDS,
  Samples,
  estimates,
  make_methods,
  token_weights,
  whole_gradient,
)
from jaxrl_tok.data import record_indices
from jaxrl_tok.policy import completion_hidden, values
from jaxrl_tok.run.prepare import Setup
from jaxrl_tok.sampler import make_sampler
from jaxrl_tok.step.device_rewards import make_device_scorer
from jaxrl_tok.step.device_steps import Table
from jaxrl_tok.step.groups import split_groups
from jaxrl_tok.types import Greedy, Policy, Prompts, SamplingRule

BATCHES = 8  # batches of a step's size in a block, which is sampled at once
PENALTY = 1e-4  # ridge regression's, in mean squares of a hidden state


class Lab(NamedTuple):
  """Values that the programs below read."""

  policy: Policy  # with a value head
  sample: Callable
  greedy: Callable  # one greedy completion a prompt
  rule: SamplingRule
  methods: list
  rows: Rows
  table: Table  # prompts, with the columns that rewards read
  C: int
  seed: int


def make_lab(setup: Setup) -> Lab:
  """The lab of a prepared arithmetic."""
  s = setup.settings.sampling
  model, config = setup.model.with_value_head(), setup.config
  # jacrev maps over cotangents alone, which cuDNN's gradient does not take
  policy = model.make_policy(jnp.dtype(setup.dtype), attention='xla')
  methods = make_methods(config.max_completion_length)
  return Lab(
    policy,
    make_sampler(policy, config.sampler),
    make_sampler(policy, config.greedy),
    jax.device_get(setup.rule),
    methods,
    make_rows(methods, s.num_prompts, s.num_generations),
    Table(*setup.data.table()),
    s.num_prompts,
    setup.settings.run.seed,
  )


def block_at(lab: Lab, number: int) -> tuple:
  """Inputs of a block: (key, Prompts, columns)."""
  count = BATCHES * lab.C
  key = jax.random.fold_in(jax.random.key(lab.seed), number)
  records = len(lab.table.length)
  index = record_indices(records, lab.seed, number * count, count)
  rows = jax.tree.map(lambda x: x[index], lab.table)
  return key, Prompts(rows.tokens, rows.length), rows.columns


def with_value(params: dict, head_D) -> dict:
  """Replaces the value head of params."""
  head = jax.tree.map(
    lambda x: jnp.asarray(head_D, x.dtype).reshape(x.shape),
    params['value_head'],
  )
  return params | {'value_head': head}


def make_draw(lab: Lab) -> Callable:
  """Returns draw(params, key, Prompts, columns) -> Samples: new completions,
  with every reward."""
  score = make_device_scorer(REWARDS)

  def draw(params, key, prompts, columns):
    rollout = lab.sample(params, key, prompts, lab.rule)
    likely = lab.greedy(params, key, prompts, lab.rule)
    rewards, _ = score(None, rollout, columns)
    greedy, _ = score(None, likely, columns)
    return Samples(
      rollout,
      rewards,
      {name: Greedy(reward, likely.mask) for name, reward in greedy.items()},
      values(lab.policy, params, rollout),
    )

  return draw


class Reference(NamedTuple):
  """Reference numbers, from many samples that no method is compared on."""

  gradient: jax.Array  # [R, W] of each reward, by the default method
  square: np.ndarray  # [R] squared norms of it, the noise's share taken out
  agrees: np.ndarray  # [R] cosine of it with the true one, so estimated
  head: np.ndarray  # [D] of the learned value
  explained: float  # share of the returns' variance that this V explains
  reward: float


def make_reference(lab: Lab) -> Callable:
  """Returns reference(params, Samples) -> (gradient [R, W], sums of the
  regression of returns on hidden states)."""
  chosen = [m for m in lab.methods if (m.baseline, m.aggregation) == DEFAULT]

  def reference(params, samples: Samples):
    rollout, reward = samples.rollout, samples.rewards['exact'].sum(1)
    gradient_RxW = jax.lax.map(
      lambda w: whole_gradient(lab.policy, params, rollout, lab.rule, w),
      token_weights(chosen, samples, {}),
    )
    mask = rollout.mask
    x = completion_hidden(lab.policy, params, rollout)
    x = jnp.where(mask[..., None], x, 0.0)
    y = jnp.where(mask, reward[:, None], 0.0)
    sums = {
      'xx': jnp.einsum('btd,bte->de', x, x),
      'xy': jnp.einsum('btd,bt->d', x, y),
      'yy': jnp.sum(y**2),
      'y': jnp.sum(y),
      'tokens': jnp.sum(mask),
      'reward': jnp.mean(reward),
    }
    return gradient_RxW, sums

  return reference


def ridge(xx, xy) -> np.ndarray:
  """Ridge regression, (X'X + penalty I)^-1 X'y: [D]."""
  D = len(xy)
  return np.linalg.solve(xx + PENALTY * np.trace(xx) / D * np.eye(D), xy)


def find_reference(
  lab: Lab, programs, params, blocks: int, logger
) -> Reference:
  """Reference of the first blocks. Raises ValueError where no sample earned a
  reward."""
  total, squares, sums = 0.0, 0.0, {}
  with logger.bar('reference', blocks) as show:
    for i in range(blocks):
      drawn = programs.draw(params, *block_at(lab, i))
      gradient, more = jax.device_get(programs.reference(params, drawn))
      gradient = gradient.astype(np.float64)
      total = total + gradient
      squares = squares + np.sum(gradient**2, axis=1)
      for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value.astype(np.float64)
      show(i + 1, f'reward {sums["reward"] / (i + 1):.3f}')
  mean = total / blocks
  square = np.sum(mean**2, axis=1)
  variance = (squares - blocks * square) / (blocks - 1)
  real = np.maximum(square - variance / blocks, 0.01 * square)
  if not real.min() > 0:
    raise ValueError('no sample earned a reward; pass higher --levels')
  head = ridge(sums['xx'], sums['xy'])
  error = sums['yy'] - 2 * head @ sums['xy'] + head @ sums['xx'] @ head
  spread = sums['yy'] - sums['y'] ** 2 / sums['tokens']
  return Reference(
    jnp.asarray(mean, jnp.float32),
    real,
    np.sqrt(real / square),
    head,
    float(1 - error / spread),
    float(sums['reward'] / blocks),
  )


def make_estimates(lab: Lab) -> Callable:
  """Returns run(params, reference [R, W], mean reward, Samples) -> (sum of the
  block's estimates [M, W], `products` and facts of its samples, each
  [BATCHES, ...])."""

  def of_batch(params, reference_RxW, mean_reward, samples: Samples):
    rollout, reward = samples.rollout, samples.rewards['exact'].sum(1)
    carries = {'ema_baseline': mean_reward}
    weights = token_weights(lab.methods, samples, carries)
    found_MxW, score_B = estimates(
      lab.policy, params, rollout, lab.rule, weights
    )
    B, T = rollout.mask.shape
    groups = reward.reshape(lab.C, -1)
    facts = {
      'reward': jnp.mean(reward),
      'groups_without_variance': jnp.mean(groups.max(1) == groups.min(1)),
      'lengths': jnp.bincount(rollout.mask.sum(1), length=T + 1) / B,
      'cut': 1 - jnp.mean(rollout.ended),
      'score': jnp.mean(score_B),
      'reward_times_score': jnp.mean(reward * score_B),
    }
    return found_MxW, products(found_MxW, reference_RxW, lab.rows), facts

  def run(params, reference_RxW, mean_reward, samples: Samples):
    def add(total, part):
      found, *more = of_batch(params, reference_RxW, mean_reward, part)
      return total + found, more

    M, W = len(lab.methods), reference_RxW.shape[1]
    parts = split_groups(samples, BATCHES, BATCHES * lab.C)
    total, (found, facts) = jax.lax.scan(add, jnp.zeros((M, W)), parts)
    return total, found, facts

  return run


def find_estimates(
  lab: Lab, programs, params, reference: Reference, numbers, logger
) -> tuple:
  """Finds (sums over the blocks of the estimates, facts of their samples)."""
  totals, found, facts = [], [], []
  with logger.bar('estimates', len(numbers)) as show:
    for number in numbers:
      drawn = programs.draw(params, *block_at(lab, number))
      mean_reward = jnp.float32(reference.reward)
      given = params, reference.gradient, mean_reward, drawn
      for kept, new in zip((totals, found, facts), programs.estimates(*given)):
        kept.append(jax.device_get(new))
      reward = np.mean([x['reward'] for x in facts])
      show(len(facts), f'reward {reward:.3f}')
  mean = jax.tree.map(lambda *x: np.mean(x, axis=(0, 1)).tolist(), *facts)
  return summed(found, np.stack(totals), lab.rows), mean
