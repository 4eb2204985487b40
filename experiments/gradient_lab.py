"""Which baseline, and which aggregation, make the best gradient of a step?

  python -m experiments.gradient_lab

The arithmetic policy, held fixed after its warm start: once where a third of
its samples are right, once where three quarters are. On the same samples of
8 prompts x 8 completions, every baseline under every aggregation:

1. A reference: the gradient of 24,576 other completions, by the default method.
   A linear value is fit to their returns.
2. The gradient of every sampled token, by vmap; with the algorithm's own
   advantages and weights they make all methods' estimates at once.
3. How noisy, how biased, and how near to the reference the estimates are.

It writes gradient_lab.json and gradient_lab.svg. On 2 CPU cores
that other work shared: 4 minutes, 4 1/2 with the warm starts; not yet measured
on a free machine. With seed 0, the variance is to
the default's (leave_one_out, seq_mean_token_sum) 0.81 and 0.80 with no
baseline, 0.89 and 0.94 with the mean reward, 1.76 and 1.24 with greedy
completions; 0.90 and 0.87 under seq_mean_token_mean.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import rich.table
import rich.text
import tyro
from markupsafe import escape

from experiments import arithmetic, build, launch, warm_start
from experiments import flags as flag_layer
from jaxrl_tok import advantages, algorithms, charts, data, device_rewards
from jaxrl_tok import rewards as host_rewards
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.policy import completion_hidden, evaluate, values
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.types import Algorithm, Policy, Rollout, SamplingRule, Scored
from jaxrl_tok.update import is_cut, split_groups

BATCHES = 8  # of a step's size in a block, which is sampled at once
PENALTY = 1e-4  # of the ridge regression, in mean squares of a hidden state
REWARDS = {
  'exact': device_rewards.exact_tokens,
  'digits': device_rewards.digit_tokens,
}
SUM = 'seq_mean_token_sum'  # the true gradient's aggregation
DEFAULT = 'leave_one_out', SUM  # algorithms.reinforce's

Kind = TypeVar('Kind')
Unread = tyro.conf.Suppress[tyro.conf.Fixed[Kind]]  # has no effect: no flags


@dataclasses.dataclass(frozen=True)
class LabFlags:
  """What is measured, and how often."""

  levels: tuple[float, ...] = (0.4, 0.9)
  """Policies: the warm start ends at this share of held-out problems."""
  blocks: int = 10
  """Blocks of 8 batches of a step's size, whose gradients are compared."""
  reference_blocks: int = 48
  """Other blocks, that the reference gradient is the mean of."""
  digits: int = 2
  """Digits of each operand."""
  num_problems: int = 20_000
  """Problems that prompts are drawn from."""
  seed: int = 0
  """Seed of the warm start, the prompts and the samples."""
  output_dir: str | None = None
  """Directory of the results; default runs/gradient_lab-TIME."""


@dataclasses.dataclass(frozen=True)
class Flags:
  lab: LabFlags
  warm_start: flag_layer.WarmStartFlags
  size: flag_layer.SizeFlags
  sampling: flag_layer.SamplingFlags
  model: Unread[flag_layer.ModelFlags]
  algorithm: Unread[flag_layer.AlgorithmFlags]

  @property
  def run(self) -> flag_layer.RunFlags:
    return flag_layer.RunFlags(self.lab.output_dir, self.lab.seed)


DEFAULTS = Flags(
  LabFlags(),
  flag_layer.WarmStartFlags(warm_start_check_every=20),
  flag_layer.SizeFlags(),
  flag_layer.SamplingFlags(
    num_prompts=8, num_generations=8, max_completion_length=5
  ),
  flag_layer.ModelFlags(),
  flag_layer.AlgorithmFlags(),
)


# --- methods: a credit under an aggregation ----------------------------------


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


class Rows(NamedTuple):
  """What is reported: K methods, each against a reference, and its anchor: a
  method whose mean is known to be `share` of that reference."""

  method: np.ndarray  # [K]
  anchor: np.ndarray  # [K]
  reference: np.ndarray  # [K] of REWARDS
  share: np.ndarray  # [K] of the anchor


def make_rows(methods: list, C: int, G: int) -> Rows:
  """The default first; every method, and the digits' gradient as one of the
  exact reward, too."""
  at = {m[:3]: i for i, m in enumerate(methods)}
  names = list(REWARDS)
  shares = {'group_mean': (G - 1) / G, 'batch_mean': (C * G - 1) / (C * G)}

  def row(m: Method, reference):
    baseline = m.baseline.split(' / ')[0]
    if m.reward != reference:
      baseline = DEFAULT[0]
    anchor = at[reference, baseline, SUM]
    share = shares.get(baseline, 1.0)
    return at[m[:3]], anchor, names.index(reference), share

  ordered = sorted(methods, key=lambda m: m[:3] != ('exact', *DEFAULT))
  found = [row(m, m.reward) for m in ordered]
  found.append(row(methods[-1], 'exact'))
  return Rows(*map(np.array, zip(*found)))


# --- gradients ---------------------------------------------------------------


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


# --- samples -----------------------------------------------------------------


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
  policy = make_policy(config, context.policy.dtype)
  sampler = SamplerConfig(
    s.num_generations,
    s.max_completion_length,
    model.pad_token,
    truncate=s.top_k > 0 or s.top_p < 1 or s.min_p > 0,
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


# --- far: the reference, and what is learned from the same samples -----------


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


# --- near: the batches that are compared -------------------------------------


def products(found_MxW, reference_RxW, rows: Rows) -> dict:
  """Of one batch's estimates and of each row's pair (method, anchor): their
  products with each other [K, 2, 2] and with the reference [K, 2], and the
  method's product with the reference by its own norm [K]."""
  both = found_MxW @ found_MxW.T
  dots = found_MxW @ reference_RxW.T
  pair = np.stack([rows.method, rows.anchor], axis=1)
  dot = dots[pair, rows.reference[:, None]]
  norm = jnp.sqrt(both[rows.method, rows.method])
  return {
    'pair': both[pair[:, :, None], pair[:, None, :]],
    'dot': dot,
    'cosine': dot[:, 0] / jnp.maximum(norm, 1e-30),
  }


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


class Sums(NamedTuple):
  """Of `products`, over the batches of each block."""

  count: np.ndarray  # [J]
  pair: np.ndarray  # [J, K, 2, 2]
  dot: np.ndarray  # [J, K, 2]
  cosine: np.ndarray  # [J, K]
  gram: np.ndarray  # [K, 2, 2, J, J]  of the blocks' summed estimates


def summed(found: list, totals_JxMxW: np.ndarray, rows: Rows) -> Sums:
  """Sums of the products [BATCHES, ...] of each block."""
  J = len(totals_JxMxW)

  def by_block(name):
    return np.stack([x[name].sum(0, dtype=np.float64) for x in found])

  gram = []
  for pair in zip(rows.method, rows.anchor):
    x_2JxW = np.swapaxes(totals_JxMxW[:, pair], 0, 1).reshape(2 * J, -1)
    gram.append((x_2JxW @ x_2JxW.T).reshape(2, J, 2, J).swapaxes(1, 2))
  return Sums(
    np.array([len(x['dot']) for x in found], float),
    by_block('pair'),
    by_block('dot'),
    by_block('cosine'),
    np.array(gram, np.float64),
  )


def measure(sums: Sums, rows: Rows, square_R, keep_J=None) -> dict:
  """The numbers of every row, {name: [K]}, g being its reference.

  The estimates of a method are scaled by the s for which their mean lies as
  far along g as g: <s mean, g> = |g|^2. Then

    variance  E |s (estimate - mean)|^2 / |g|^2
    needed    variance / the default's: completions for the same precision
    bias      |s mean - g|^2 / |g|^2
    mean_cosine  of the mean with g: 1 / sqrt(1 + bias)
    cosine    of one batch's estimate with g, the mean over batches
    ahead     cosine less the default's
    check     <mean of the anchor, g> / (share |g|^2): 1 but for chance

  The mean of a few thousand completions is noisy, so s and the bias are those
  of the difference to the anchor on the same samples; bias is without the
  part that noise adds, and may be just below 0 for it.
  """
  keep = np.ones(len(sums.count)) if keep_J is None else keep_J
  n, square = keep @ sums.count, square_R[rows.reference]
  mean = np.einsum('i,kxyij,j->kxy', keep, sums.gram, keep) / n**2
  each = np.einsum('j,jkxy->kxy', keep, sums.pair) / n
  covariance = (each - mean) * n / (n - 1)
  dot = np.einsum('j,jkx->kx', keep, sums.dot) / n
  length = rows.share * dot[:, 0] / dot[:, 1]  # of the mean, along g
  apart = np.stack([1 / length, -1 / rows.share], axis=1)
  bias = np.einsum('kx,kxy,ky->k', apart, mean - covariance / n, apart)
  bias = bias / square
  variance = covariance[:, 0, 0] / length**2 / square
  cosine = keep @ sums.cosine / n / np.sqrt(square)
  return {
    'variance': variance,
    'needed': variance / variance[0],
    'bias': bias,
    'mean_cosine': np.sign(length) / np.sqrt(1 + np.maximum(bias, 0)),
    'cosine': cosine,
    'ahead': cosine - cosine[0],
    'check': dot[:, 1] / rows.share / square,
  }


def with_errors(sums: Sums, rows: Rows, square_R) -> dict:
  """{name: (numbers [K], their standard errors [K])}, by the jackknife over
  blocks; the reference is taken as it is."""
  J = len(sums.count)
  found = measure(sums, rows, square_R)
  without = [measure(sums, rows, square_R, 1 - row) for row in np.eye(J)]
  return {
    name: (value, np.sqrt((J - 1) * np.var([w[name] for w in without], axis=0)))
    for name, value in found.items()
  }


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


# --- what is shown -----------------------------------------------------------


def described(lab: Lab, level: float, far: Far, facts: dict, found: dict):
  """All of one policy, for gradient_lab.json and the pictures of it."""
  right = facts['reward_times_score'] / max(facts['reward'], 1e-9)
  wrong = facts['score'] - facts['reward_times_score']
  names, rows = list(REWARDS), []
  for k, (method, _, reference, _) in enumerate(zip(*lab.rows)):
    m = lab.methods[method]
    row = {
      'reward': m.reward,
      'of': names[reference],
      'baseline': m.baseline,
      'aggregation': m.aggregation,
    }
    for name, (value, error) in found.items():
      row |= {name: float(value[k]), f'{name}_error': float(error[k])}
    rows.append(row)
  return {
    'level': level,
    **facts,
    'score_right': right,
    'score_wrong': wrong / max(1 - facts['reward'], 1e-9),
    'best_constant': facts['reward_times_score'] / facts['score'],
    'value_explains': far.explained,
    'reference': {
      name: {'norm': float(square**0.5), 'cosine_with_truth': float(agrees)}
      for name, square, agrees in zip(names, far.square, far.agrees)
    },
    'rows': rows,
  }


def in_words(policy: dict) -> str:
  """What a policy's samples are like."""
  lengths = ', '.join(
    f'{length} ({share:.1%})'
    for length, share in enumerate(policy['lengths'])
    if share >= 5e-4
  )
  return (
    f'{policy["reward"]:.1%} of samples right, '
    f'{policy["groups_without_variance"]:.0%} of groups without variance; '
    f'tokens {lengths}, {policy["cut"]:.1%} cut; squared score of right ones '
    f'{policy["score_right"]:.0f}, of wrong ones {policy["score_wrong"]:.0f}: '
    f'the best constant baseline is {policy["best_constant"]:.2f}; the '
    f'learned value explains {policy["value_explains"]:.1%} of the returns'
  )


def label(row: dict) -> str:
  """A row's name, aggregation apart."""
  if row['reward'] == 'exact':
    return row['baseline']
  whose = 'own' if row['of'] == row['reward'] else row['of']
  return f'{row["reward"]}, {whose} gradient'


LEGEND = (
  'variance: of one step, best scaled, / the squared reference; / default: '
  'completions for the same precision; cosine: of one step with the reference; '
  'mean: of the mean of all steps with it; ±: standard errors of the '
  'difference to the default'
)


def table(policy: dict) -> rich.table.Table:
  names = 'baseline', 'variance', '/ default', 'cosine', 'mean'
  found = rich.table.Table(*names)
  for column in found.columns[1:]:
    column.justify = 'right'
  for aggregation in DOTS:
    also = ' (and _norm)' if aggregation == SUM else ''
    found.add_section()
    found.add_row(rich.text.Text(f'{aggregation}{also}', 'bold'))
    for row in policy['rows']:
      if row['aggregation'] == aggregation:
        found.add_row(
          label(row),
          f'{row["variance"]:.1f}',
          f'{row["needed"]:.2f} ± {row["needed_error"]:.2f}',
          f'{row["cosine"]:.3f} ± {row["ahead_error"]:.3f}',
          f'{row["mean_cosine"]:.3f}',
        )
  return found


LEFT, PANEL, GAP, TOP, ROW = 160, 150, 42, 76, 24  # of the picture, in pixels
DOTS = {  # aggregation: (colour, pixels below the row's middle)
  SUM: (charts.BLUE, -5),
  'token_mean': (charts.ORANGE, 0),
  'seq_mean_token_mean': (charts.INK, 5),
}
PANELS = (  # number, its error, heading
  ('needed', 'needed_error', "← variance / default's"),
  ('cosine', 'ahead_error', 'cosine with the truth →'),
)


def picture(policies: list[dict]) -> str:
  """Dots for baselines (down) and aggregations (colours): two panels a policy.
  seq_mean_token_sum_norm, a constant times SUM, lies under SUM's."""
  names = list(dict.fromkeys(map(label, policies[0]['rows'])))
  bottom = TOP + ROW * len(names)
  width = LEFT + 2 * len(policies) * (PANEL + GAP)
  parts = key(LEFT)
  for i, name in enumerate(names):
    y = TOP + ROW * (i + 0.5)
    weight = 700 if name == DEFAULT[0] else 400
    parts += [
      charts.words(LEFT - 10, y + 4, name, 'end', font_weight=weight),
      line(f'M{LEFT},{y + ROW / 2:.1f}H{width - GAP}', 0.12),
    ]
  for i, policy in enumerate(policies):
    x = LEFT + 2 * i * (PANEL + GAP)
    said = f'{policy["reward"]:.0%} of samples right'
    parts.append(charts.words(x, 44, said, font_weight=600))
    for j, (name, error, heading) in enumerate(PANELS):
      at = x + j * (PANEL + GAP)
      parts.append(charts.words(at, 64, heading))
      parts += panel(policy['rows'], names, name, error, at, bottom)
  title = 'Noise of one policy gradient by baseline and aggregation'
  return charts.svg(''.join(parts), title, (width, bottom + 28))


def line(d: str, opacity: float = 0.22, **more) -> str:
  ink = {'class_': 'grid', 'stroke': charts.INK, 'stroke_opacity': opacity}
  return charts.tag('path', d=d, **ink, **more)


def key(x: float) -> list[str]:
  """Which colour is which aggregation."""
  parts = []
  for name, (colour, _) in DOTS.items():
    text = f'{name} (and _norm)' if name == SUM else name
    parts += [
      charts.tag('circle', cx=x + 4, cy=13, r=4, fill=colour),
      charts.words(x + 13, 17, text),
    ]
    x += 13 + 6.6 * len(text) + 22
  return parts


def panel(rows, names, name, error, left, bottom) -> list[str]:
  """Grid, the default's line, and a dot with its error for every row."""
  rows = [row for row in rows if row['aggregation'] in DOTS]
  ends = [row[name] + sign * row[error] for row in rows for sign in (-1, 1)]
  marks = charts.ticks(min(ends), max(ends), 4)
  low, high = marks[0], marks[-1]

  def place(value):
    return left + (value - low) / (high - low) * PANEL

  default = place(rows[0][name])
  parts = [line(f'M{default:.1f},{TOP}V{bottom}', 0.8, stroke_dasharray='3 3')]
  for mark in marks:
    parts += [
      line(f'M{place(mark):.1f},{TOP}V{bottom}'),
      charts.words(place(mark), bottom + 16, charts.figure(mark), 'middle'),
    ]
  for row in rows:
    colour, down = DOTS[row['aggregation']]
    y = TOP + ROW * (names.index(label(row)) + 0.5) + down
    said = (
      f'{label(row)}, {row["aggregation"]}: variance {row["variance"]:.1f} '
      f"|g|^2, {row['needed']:.2f} of the default's; cosine "
      f'{row["cosine"]:.3f}'
    )
    span = [place(row[name] + sign * row[error]) for sign in (-1, 1)]
    parts += [
      charts.tag(
        'path', d=f'M{span[0]:.1f},{y:.1f}H{span[1]:.1f}', stroke=colour
      ),
      charts.tag(
        'circle',
        charts.tag('title', str(escape(said))),
        cx=f'{place(row[name]):.1f}',
        cy=f'{y:.1f}',
        r=3.4,
        fill=colour,
      ),
    ]
  return parts


# --- the experiment ----------------------------------------------------------


def check(flags: Flags) -> None:
  """What only this experiment can refuse."""
  f = flags.lab
  for name, least in (('blocks', 2), ('reference_blocks', 2)):
    if getattr(f, name) < least:
      flag_layer.fail(f'--{name} {getattr(f, name)} must be at least {least}')
  if not 1 <= f.digits <= 9:
    flag_layer.fail(f'--digits {f.digits} must be in 1..9')
  if not f.levels or not all(0 <= level <= 1 for level in f.levels):
    flag_layer.fail(f'--levels {f.levels} must be one or more in [0, 1]')
  if (
    flags.warm_start.warm_start_stop_at
    != DEFAULTS.warm_start.warm_start_stop_at
  ):
    flag_layer.fail('--warm_start_stop_at has no effect here; pass --levels')
  if flags.sampling.num_generations < 2:
    flag_layer.fail(
      'groups of one cannot be compared; pass --num_generations 2 or more'
    )


def prepare(flags: Flags):
  """The arithmetic experiment's Context, with answers that are not padded
  with zeros, so that lengths differ."""
  f = flags.lab

  def records(found):
    return [r | {'answer': str(int(r['answer']))} for r in found]

  train, held_out = arithmetic.problems(
    f.digits, f.num_problems, flags.run.eval_prompts
  )
  train, held_out = records(train), records(held_out)
  answers = [record['answer'] for record in train + held_out]
  try:
    flags = flag_layer.fit_completion_length(flags, answers)
  except ValueError as e:
    flag_layer.fail(e)
  experiment = launch.Experiment(
    name='gradient_lab',
    flags=flags,
    tokenizer=data.byte_tokenizer,
    train_records=train,
    held_out_records=held_out,
    reward_functions=[host_rewards.exact_match],
    judge_functions=[host_rewards.exact_match],
    data=f'{len(train):,} additions and subtractions, answers not padded',
  )
  return launch.prepare(experiment, algorithms.reinforce())


def policy_at(context, lab: Lab, level: float) -> dict:
  """Parameters of the warm start that ends at a level, on one device."""
  flags = dataclasses.replace(
    context.experiment.flags.warm_start, warm_start_stop_at=level
  )
  with jax.set_mesh(context.mesh):
    params = warm_start.warm_start(context, flags)
  return build.with_value_head(lab.policy, jax.device_get(params))


class Programs(NamedTuple):
  """make_draw, make_far and make_near, compiled."""

  draw: Callable
  far: Callable
  near: Callable


def compiled(lab: Lab, params, logger) -> Programs:
  draw, far, near = (
    jax.jit(make(lab)) for make in (make_draw, make_far, make_near)
  )
  given = params, *block_at(lab, 0)
  scored = jax.eval_shape(draw, *given)
  W = sum(x.size for x in jax.tree.leaves(params))
  reference, reward = (
    jax.ShapeDtypeStruct(shape, jnp.float32)
    for shape in ((len(REWARDS), W), ())
  )
  with logger.doing('compiling the sampler, the reference and the estimates'):
    lowered = (
      draw.lower(*given),
      far.lower(params, scored),
      near.lower(params, reference, reward, scored),
    )
    with ThreadPoolExecutor(2) as both:  # cores: one compiles one at a time
      return Programs(*both.map(lambda one: one.compile(), lowered))


def main(argv=None) -> dict:
  flags = flag_layer.parse(
    DEFAULTS, 'python -m experiments.gradient_lab', argv, __doc__
  )
  check(flags)
  context = prepare(flags)
  run_dir = flag_layer.claim_output_dir(flags.run, 'gradient_lab')
  lab, logger, f = make_lab(context), context.logger, flags.lab
  policies, programs = [], None
  for level in f.levels:
    params = policy_at(context, lab, level)
    programs = programs or compiled(lab, params, logger)
    far = look_far(lab, programs, params, f.reference_blocks, logger)
    params = with_value(params, far.head)
    numbers = range(f.reference_blocks, f.reference_blocks + f.blocks)
    sums, facts = look_near(lab, programs, params, far, numbers, logger)
    found = with_errors(sums, lab.rows, far.square)
    policies.append(described(lab, level, far, facts, found))
    logger.console.print(table(policies[-1]))
    logger.say(in_words(policies[-1]))
  logger.say(LEGEND)
  result = {'flags': flag_layer.flat(flags), 'policies': policies}
  (run_dir / 'gradient_lab.json').write_text(json.dumps(result, indent=2))
  (run_dir / 'gradient_lab.svg').write_text(picture(policies))
  logger.say(f'results: {run_dir}{os.sep}')
  return result


if __name__ == '__main__':
  main()
