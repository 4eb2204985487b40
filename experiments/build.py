"""Flags turned into values: optimizer, algorithm, model, state.

The tables here are the only places where a user's word names a function.
"""

import jax
import optax

from experiments import flags as flag_layer
from jaxrl_tok import advantages, algorithms, losses, sharding, update
from jaxrl_tok.types import Algorithm, Policy, TrainState

BASELINES = {
  'none': lambda f: advantages.no_baseline(),
  'batch_mean': lambda f: advantages.batch_mean(),
  'group_mean': lambda f: advantages.group_mean(),
  'leave_one_out': lambda f: advantages.leave_one_out(),
  'ema': lambda f: advantages.ema(f.ema_decay),
}
AGGREGATIONS = {
  'token_mean': lambda T: losses.token_mean,
  'seq_mean_token_mean': lambda T: losses.seq_mean_token_mean,
  'seq_mean_token_sum': lambda T: losses.seq_mean_token_sum,
  'seq_mean_token_sum_norm': losses.seq_mean_token_sum_norm,
}
SCHEDULES = {
  'constant': lambda peak, steps: optax.constant_schedule(peak),
  'linear': lambda peak, steps: optax.linear_schedule(peak, peak / 10, steps),
  'cosine': lambda peak, steps: optax.cosine_decay_schedule(peak, steps, 0.1),
}


def make_optimizer(f: flag_layer.AlgorithmFlags, max_steps: int):
  """(optax chain, schedule of the learning rate)."""
  later = SCHEDULES[f.lr_schedule](
    f.learning_rate, max(max_steps - f.lr_warmup_steps, 1)
  )
  schedule = later
  if f.lr_warmup_steps:
    rise = optax.linear_schedule(0.0, f.learning_rate, f.lr_warmup_steps)
    schedule = optax.join_schedules([rise, later], [f.lr_warmup_steps])
  chain = optax.chain(
    optax.clip_by_global_norm(f.max_grad_norm),
    optax.adamw(schedule, b2=f.adam_b2, weight_decay=f.weight_decay),
  )
  return chain, schedule


def make_algorithm(
  f: flag_layer.AlgorithmFlags, sampling: flag_layer.SamplingFlags
) -> Algorithm:
  """The Algorithm that the flags name."""
  word = f.baseline
  if word == 'auto':
    word = 'leave_one_out' if sampling.num_generations > 1 else 'ema'
  return algorithms.reinforce(
    BASELINES[word](f),
    aggregate=AGGREGATIONS[f.aggregation](sampling.max_completion_length),
    gamma=f.gamma,
    kl=f.kl,
    beta=f.beta,
  )


def make_state(
  policy: Policy,
  algorithm: Algorithm,
  optimizer,
  mesh,
  seed: int,
  params=None,
  frozen=None,
  keep_reference: bool = False,
) -> TrainState:
  """TrainState around params (None: random ones) and what is frozen, born
  where it will live. Takes over what it is given; of ShapeDtypeStructs it
  makes a state of them."""
  rules, key = policy.partition_rules, jax.random.key(seed)

  def make(params, frozen, key):
    params = policy.init(key) if params is None else params
    return update.init_state(
      algorithm, optimizer, params, key, keep_reference, frozen
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
    given = jax.device_put(given, (placed.params, placed.frozen))
  make = jax.jit(make, out_shardings=placed, donate_argnums=(0, 1))
  return make(*given, key)
