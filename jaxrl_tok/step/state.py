"""TrainState before the first update."""

import jax
import jax.numpy as jnp
import optax

from jaxrl_tok import sharding
from jaxrl_tok.models import quantize
from jaxrl_tok.types import Algorithm, Policy, TrainState


def step_key(state: TrainState) -> jax.Array:
  """Key of the next step: fold_in(state.key, state.step)."""
  return _fold_in(state.key, state.step)


_fold_in = jax.jit(jax.random.fold_in)


def carries_of(algorithm: Algorithm, frozen) -> dict:
  """Carries {name: Carry} of a run; a frozen base is its own reference."""
  carries = algorithm.carries
  if frozen is not None:
    carries = {k: v for k, v in carries.items() if k != 'reference'}
  return carries


def init_state(
  algorithm: Algorithm,
  optimizer: optax.GradientTransformation,
  params,
  key: jax.Array,
  frozen=None,
  critic=None,
) -> TrainState:
  """TrainState of parameters, before the first update.

  Args:
    params: parameters of the policy that the optimizer changes.
    frozen: those that it does not change (Policy.merge_params), or None.
    critic: parameters of a separate critic, or None.
  """
  carries = carries_of(algorithm, frozen)
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optimizer.init((params, critic)),
    key=key,
    carries={name: carry.init(params) for name, carry in carries.items()},
    critic=critic,
    frozen=frozen,
    skipped=jnp.int32(0),
  )


def with_value_head(policy: Policy, params):
  """Adds a value head of zeros to params that lack the policy's."""
  if policy.value is None:
    return params
  shapes = jax.eval_shape(policy.init, jax.random.key(0))
  if not isinstance(params, dict) or not shapes.keys() - params.keys():
    return params
  head = jax.tree.map(
    lambda s: jnp.zeros(s.shape, s.dtype), shapes['value_head']
  )
  return params | {'value_head': head}


def make_state(
  policy: Policy,
  algorithm: Algorithm,
  optimizer: optax.GradientTransformation,
  mesh,
  seed: int,
  params=None,
  frozen=None,
  critic: Policy | None = None,
) -> TrainState:
  """TrainState created on its devices; of ShapeDtypeStructs, a state of them.

  Args:
    params: parameters to start from; None: random ones.
    frozen: parameters that no update changes.
    critic: network of a separate critic, which begins as the policy with a
      value head of zeros.
  """
  rules, key = policy.partition_rules, jax.random.key(seed)

  def make(params, frozen, key):
    params = policy.init(key) if params is None else params
    critic_params = None
    if critic is not None:
      begin = params
      if frozen is not None:  # it may be int8, which nothing trains
        begin = quantize.dequantize_params(frozen)
      begin = jax.tree.map(lambda x: jnp.array(x, jnp.float32), begin)
      critic_params = with_value_head(critic, begin)
    if frozen is None:
      params = with_value_head(policy, params)
    return init_state(algorithm, optimizer, params, key, frozen, critic_params)

  given = params, frozen
  shapes = jax.eval_shape(make, *given, key)
  leaves = jax.tree.leaves(given)
  if leaves and isinstance(leaves[0], jax.ShapeDtypeStruct):
    return sharding.sharded_structs(mesh, shapes, rules)
  if leaves:
    where = sharding.tree_shardings(mesh, given, rules)
    given = jax.device_put(given, where)
  placed = sharding.tree_shardings(mesh, shapes, rules)
  make = jax.jit(make, out_shardings=placed, donate_argnums=(0, 1))
  return make(*given, key)
