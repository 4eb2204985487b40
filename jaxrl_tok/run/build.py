"""Flags turned into values: optimizer, algorithm, model, state.

The tables here are the only places where a user's word names a function.
"""

import jax
import jax.numpy as jnp
import optax

from jaxrl_tok import sharding
from jaxrl_tok.credit import advantages, algorithms, losses
from jaxrl_tok.run import settings as flag_layer
from jaxrl_tok.step import update
from jaxrl_tok.types import Algorithm, Policy, TrainState

ALGORITHMS = {name: getattr(algorithms, name) for name in flag_layer.ALGORITHMS}
CREDITS = {
  'returns': advantages.returns,
  'gae': advantages.gae,
  'vtrace': advantages.vtrace,
}

BASELINES = {
  'none': lambda f: advantages.no_baseline(),
  'batch_mean': lambda f: advantages.batch_mean(),
  'group_mean': lambda f: advantages.group_mean(),
  'leave_one_out': lambda f: advantages.leave_one_out(),
  'ema': lambda f: advantages.ema(f.ema_decay),
  'greedy': lambda f: advantages.greedy(),
}
SCALES = {'none': None, 'group_std': advantages.group_std}
LOSSES = {
  'reinforce': losses.reinforce,
  'clip': losses.clip,
  'sequence_clip': losses.sequence_clip,
  'gspo': losses.gspo,
  'cispo': losses.cispo,
}
AGGREGATIONS = {
  'token_mean': losses.token_mean,
  'seq_mean_token_mean': losses.seq_mean_token_mean,
  'seq_mean_token_sum': losses.seq_mean_token_sum,
  'seq_mean_token_sum_norm': losses.seq_mean_token_sum_norm,
}
# a choice of algorithms.compose: what the flag's word is of
WORDS = {'credit': CREDITS, 'scale': SCALES, 'loss': LOSSES}
NUMBERS = (
  'gamma',
  'gae_lambda',
  'rho_bar',
  'c_bar',
  'bootstrap_truncated',
  'whiten',
  'overlong_buffer',
  'dynamic_sampling_rounds',
  'clip_low',
  'clip_high',
  'ratio_cap',
  'ratio_floor',
  'entropy_coef',
  'recompute_logp',
  'epochs',
  'mini_batches',
  'kl',
  'beta',
  'kl_horizon',
  'ref_sync_steps',
  'mask_sync_steps',
  'critic_warmup_steps',
  'value_coef',
)
# the same, where 0 on the command line turns the choice off
LIMITS = (
  'advantage_clip',
  'dual_clip',
  'importance_cap',
  'max_update_kl',
  'kl_target',
  'value_clip',
)
SCHEDULES = {
  'constant': lambda peak, steps: optax.constant_schedule(peak),
  'linear': lambda peak, steps: optax.linear_schedule(peak, peak / 10, steps),
  'cosine': lambda peak, steps: optax.cosine_decay_schedule(peak, steps, 0.1),
}


def make_optimizer(flags, algorithm: Algorithm):
  """(optax chain of TrainState.trained, schedule of the learning rate by
  step). An update makes `passes` optimizer steps; the schedule counts those.
  A critic has its own learning rate, moments and norm of gradients."""
  f, passes = flags.optimizer, algorithm.passes
  steps, warmup = flags.run.max_steps, f.lr_warmup_steps

  def schedule_to(peak):
    schedule = SCHEDULES[f.lr_schedule](peak, max(steps - warmup, 1) * passes)
    if warmup:
      rise = optax.linear_schedule(0.0, peak, warmup * passes)
      schedule = optax.join_schedules([rise, schedule], [warmup * passes])
    return schedule

  def chain(schedule):
    return optax.chain(
      optax.clip_by_global_norm(f.max_grad_norm),
      optax.adamw(schedule, b2=f.adam_b2, weight_decay=f.weight_decay),
    )

  schedule = schedule_to(f.learning_rate)
  optimizer = chain(schedule)
  if algorithm.value_loss is not None:
    rate = flags.algorithm.critic_learning_rate or f.learning_rate
    both = {'policy': optimizer, 'critic': chain(schedule_to(rate))}
    optimizer = optax.multi_transform(both, update.param_labels)
  return optimizer, lambda step: schedule(step * passes)


def make_algorithm(flags) -> Algorithm:
  """The Algorithm that the flags name. Raises ValueError for what cannot be."""
  f, sampling = flags.algorithm, flags.sampling
  given = {n: getattr(f, n) for n in NUMBERS}
  given |= {n: words.get(getattr(f, n)) for n, words in WORDS.items()}
  changes = {n: v for n, v in given.items() if v is not None}
  changes |= {
    n: getattr(f, n) or None for n in LIMITS if getattr(f, n) is not None
  }
  if f.scale == 'none':
    changes['scale'] = None
  if f.aggregation is not None:
    changes['aggregate'] = AGGREGATIONS[f.aggregation]
  if f.baseline is not None:
    changes['baseline'] = BASELINES[f.baseline](f)
  elif f.algorithm == 'reinforce' and sampling.num_generations == 1:
    changes['baseline'] = BASELINES['ema'](f)
  make = ALGORITHMS[f.algorithm]
  algorithm = make(max_length=sampling.max_completion_length, **changes)
  G = sampling.num_generations
  if algorithm.min_group > G:
    raise ValueError(
      f'{algorithm.name} compares the samples of a prompt and needs '
      f'{algorithm.min_group}; pass --num_generations {algorithm.min_group} or '
      'more, or --baseline ema --scale none'
    )
  if algorithm.value_loss is not None and f.critic == 'none':
    raise ValueError(
      f'{algorithm.name} needs a critic; pass --critic shared or separate'
    )
  adapted = flags.model.lora_rank or flags.model.lora_adapter
  if adapted and algorithm.value_loss is not None and f.critic == 'shared':
    raise ValueError(
      'adapters leave no value head to train; pass --critic separate'
    )
  if adapted and algorithm.ref_sync_steps:
    raise ValueError(
      'the reference of adapters is their base, which stays; leave '
      '--ref_sync_steps out'
    )
  for name in () if algorithm.value_loss else ('critic_learning_rate',):
    if getattr(f, name) is not None:
      raise ValueError(
        f'--{name} has no effect: {algorithm.name} has no critic'
      )
  if algorithm.mask_sync_steps and not sampling.truncates:
    raise ValueError(
      f'{algorithm.name} masks by the sampling rule, which keeps every token; '
      'pass --top_p 0.9'
    )
  return algorithm


def with_value_head(policy: Policy, params):
  """params with a value head of zeros, if `policy` has one and they do not."""
  if policy.value is None or 'value_head' in params:
    return params
  shapes = jax.eval_shape(policy.init, jax.random.key(0))['value_head']
  head = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return params | {'value_head': head}


def make_state(
  policy: Policy,
  algorithm: Algorithm,
  optimizer,
  mesh,
  seed: int,
  params=None,
  frozen=None,
  keep_reference: bool = False,
  critic: Policy | None = None,
  reference_dtype=None,
) -> TrainState:
  """TrainState around params (None: random ones) and what is frozen, born
  where it will live. Takes over what it is given; of ShapeDtypeStructs it
  makes a state of them. A critic of its own begins as the policy, its value
  head at zero."""
  rules, key = policy.partition_rules, jax.random.key(seed)

  def make(params, frozen, key):
    params = policy.init(key) if params is None else params
    own = None
    if critic is not None:
      begin = params if frozen is None else frozen
      begin = jax.tree.map(lambda x: jnp.array(x, jnp.float32), begin)
      own = with_value_head(critic, begin)
    if frozen is None:
      params = with_value_head(policy, params)
    return update.init_state(
      algorithm,
      optimizer,
      params,
      key,
      keep_reference,
      frozen,
      own,
      reference_dtype,
    )

  given = params, frozen
  shapes = jax.eval_shape(make, *given, key)
  placed = sharding.tree_shardings(mesh, shapes, rules)
  leaves = jax.tree.leaves(given)
  if leaves and isinstance(leaves[0], jax.ShapeDtypeStruct):
    return jax.tree.map(
      lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p),
      shapes,
      placed,
    )
  if leaves:
    where = sharding.tree_shardings(mesh, given, rules)
    given = jax.device_put(given, where)
  make = jax.jit(make, out_shardings=placed, donate_argnums=(0, 1))
  return make(*given, key)
