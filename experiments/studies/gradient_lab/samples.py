"""Samples of one policy, and what is looked at in them.

`look_far` makes the reference and learns the value from many samples;
`look_near` compares the methods' estimates on others.
"""

import dataclasses
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
  estimates,
  make_methods,
  token_weights,
  whole_gradient,
)
from jaxrl_tok import data
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.policy import completion_hidden, values
from jaxrl_tok.run import settings as flag_layer
from jaxrl_tok.run import warm_start
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.step import device_rewards
from jaxrl_tok.step.update import is_cut, split_groups
from jaxrl_tok.types import Policy, SamplingRule, Scored

BATCHES = 8  # of a step's size in a block, which is sampled at once
PENALTY = 1e-4  # of the ridge regression, in mean squares of a hidden state


class Lab(NamedTuple):
  """What the programs below close over."""

  policy: Policy  # with a value head
  sample: Callable
  most_likely: Callable  # one greedy completion a prompt
  rule: SamplingRule
  methods: list
  rows: Rows
  prompts: data.PromptSet  # with the columns that rewards read
  C: int
  seed: int


def make_lab(context) -> Lab:
  flags, model = context.experiment.flags, context.model
  s = flags.sampling
  config = dataclasses.replace(model.config, value_head=True)
  # jacrev maps over cotangents alone, which cuDNN's gradient does not take
  policy = make_policy(config, context.policy.dtype, attention='xla')
  sampler = SamplerConfig(
    s.num_generations,
    s.max_completion_length,
    model.pad_token,
    truncate=s.truncates,
    compact_levels=s.compact_levels,
  )
  greedy = dataclasses.replace(
    sampler, samples_per_prompt=1, truncate=False, greedy=True
  )
  methods = make_methods(flags.algorithm, s.max_completion_length)
  columns = warm_start.answers(context, context.experiment.train_records)
  return Lab(
    policy,
    make_sampler(policy, sampler),
    make_sampler(policy, greedy),
    jax.device_get(context.rule),
    methods,
    make_rows(methods, s.num_prompts, s.num_generations),
    context.data._replace(columns=columns),
    s.num_prompts,
    flags.run.seed,
  )


def block_at(lab: Lab, number: int) -> tuple:
  """(key, Prompts, columns) of a block."""
  count = BATCHES * lab.C
  key = jax.random.fold_in(jax.random.key(lab.seed), number)
  _, *rest = data.batch_at(lab.prompts, lab.seed, number * count, count)
  return key, *rest


def with_value(params: dict, head_D) -> dict:
  """params with this value head."""
  head = jax.tree.map(
    lambda x: jnp.asarray(head_D, x.dtype).reshape(x.shape),
    params['value_head'],
  )
  return params | {'value_head': head}


def make_draw(lab: Lab) -> Callable:
  """Returns draw(params, key, prompts, columns) -> {reward: Scored}: new
  completions of the prompts, the same for each reward."""
  score = {
    name: device_rewards.make_scorer([function])
    for name, function in REWARDS.items()
  }

  def draw(params, key, prompts, columns):
    rollout = lab.sample(params, key, prompts, lab.rule)
    likely = lab.most_likely(params, key, prompts, lab.rule)
    cut = is_cut(rollout, lab.rule)
    value = values(lab.policy, params, rollout)
    found = {}
    for name, by in score.items():
      reward, _ = by(params, rollout, columns)
      greedy_reward = by(params, likely, columns)[0].sum(1)
      found[name] = Scored(rollout, reward, cut, value, greedy_reward, None)
    return found

  return draw


class Far(NamedTuple):
  """What is known from many samples, none of which is among those compared."""

  gradient: jax.Array  # [R, W] of each reward, by the default method
  square: np.ndarray  # [R] squared norms of it, the noise's share taken out
  agrees: np.ndarray  # [R] cosine of it with the true one, so estimated
  head: np.ndarray  # [D] of the learned value
  explained: float  # share of the returns' variance that this V explains
  reward: float


def make_far(lab: Lab) -> Callable:
  """Returns far(params, {reward: Scored}) -> (gradient [R, W], sums of the
  regression of returns on hidden states)."""
  chosen = [m for m in lab.methods if (m.baseline, m.aggregation) == DEFAULT]

  def far(params, scored):
    rollout, reward = scored['exact'].rollout, scored['exact'].reward.sum(1)
    gradient_RxW = jax.lax.map(
      lambda w: whole_gradient(lab.policy, params, rollout, lab.rule, w),
      token_weights(chosen, scored, {}),
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

  return far


def ridge(xx, xy) -> np.ndarray:
  """(X'X + penalty I)^-1 X'y: [D]."""
  D = len(xy)
  return np.linalg.solve(xx + PENALTY * np.trace(xx) / D * np.eye(D), xy)


def look_far(lab: Lab, programs, params, blocks: int, logger) -> Far:
  """The first blocks."""
  total, squares, sums = 0.0, 0.0, {}
  with logger.bar('reference', blocks) as show:
    for i in range(blocks):
      scored = programs.draw(params, *block_at(lab, i))
      gradient, more = jax.device_get(programs.far(params, scored))
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
    flag_layer.fail('no sample earned a reward; pass higher --levels')
  head = ridge(sums['xx'], sums['xy'])
  error = sums['yy'] - 2 * head @ sums['xy'] + head @ sums['xx'] @ head
  spread = sums['yy'] - sums['y'] ** 2 / sums['tokens']
  return Far(
    jnp.asarray(mean, jnp.float32),
    real,
    np.sqrt(real / square),
    head,
    float(1 - error / spread),
    float(sums['reward'] / blocks),
  )


def make_near(lab: Lab) -> Callable:
  """Returns near(params, reference [R, W], mean reward, {reward: Scored}) ->
  (sum of the block's estimates [M, W], `products` and facts of its samples,
  each [BATCHES, ...])."""

  def of_batch(params, reference_RxW, mean_reward, scored):
    batch = scored['exact']
    rollout, reward = batch.rollout, batch.reward.sum(1)
    weights = token_weights(lab.methods, scored, {'ema': mean_reward})
    found_MxW, score_B = estimates(
      lab.policy, params, rollout, lab.rule, weights
    )
    B, T = rollout.mask.shape
    groups = reward.reshape(lab.C, -1)
    facts = {
      'reward': jnp.mean(reward),
      'groups_without_variance': jnp.mean(groups.max(1) == groups.min(1)),
      'lengths': jnp.bincount(rollout.mask.sum(1), length=T + 1) / B,
      'cut': jnp.mean(batch.cut),
      'score': jnp.mean(score_B),
      'reward_times_score': jnp.mean(reward * score_B),
    }
    return found_MxW, products(found_MxW, reference_RxW, lab.rows), facts

  def near(params, reference_RxW, mean_reward, scored):
    def add(total, part):
      found, *more = of_batch(params, reference_RxW, mean_reward, part)
      return total + found, more

    M, W = len(lab.methods), reference_RxW.shape[1]
    parts = split_groups(scored, BATCHES, BATCHES * lab.C)
    total, (found, facts) = jax.lax.scan(add, jnp.zeros((M, W)), parts)
    return total, found, facts

  return near


def look_near(lab: Lab, programs, params, far: Far, numbers, logger) -> tuple:
  """(Sums over the blocks of these numbers, facts of their samples)."""
  totals, found, facts = [], [], []
  with logger.bar('estimates', len(numbers)) as show:
    for number in numbers:
      scored = programs.draw(params, *block_at(lab, number))
      given = params, far.gradient, jnp.float32(far.reward), scored
      for kept, new in zip((totals, found, facts), programs.near(*given)):
        kept.append(jax.device_get(new))
      reward = np.mean([x['reward'] for x in facts])
      show(len(facts), f'reward {reward:.3f}')
  mean = jax.tree.map(lambda *x: np.mean(x, axis=(0, 1)).tolist(), *facts)
  return summed(found, np.stack(totals), lab.rows), mean
