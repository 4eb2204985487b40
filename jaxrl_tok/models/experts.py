"""Routed experts: each token goes through the k feed-forwards that a router
chooses for it.

Tokens are sorted by expert, one grouped product (jax.lax.ragged_dot) for each
matrix does all the work, and its rows are put back in order: no token is
dropped and none waits for room, so a row's result does not depend on its
batch. A backend without a grouped kernel, as the CPU's, multiplies every token
with every expert and masks, E / k times the work. Over a mesh, each device of
`tensor` holds some of the experts and runs the tokens of its own rows that
chose one of them; their sums are added over `tensor`.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrl_tok.sharding import ROWS, row_shards, rows_are_own

PARTITION_RULES = (
  (r'experts/gate_up$', PartitionSpec('tensor', 'fsdp', None, None)),
  (r'experts/down$', PartitionSpec('tensor', None, 'fsdp')),
)


def route(logits: jax.Array, k: int, normalize: bool):
  """Chooses the k likeliest experts -> (weights, experts), [..., k] each.

  Weights are softmax(logits) of the chosen; `normalize` makes them sum to 1.
  """
  weight, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), k)
  if normalize:
    weight = weight / weight.sum(-1, keepdims=True)
  return weight, chosen


def apply_experts(x, weight, chosen, gate_up, down, activation, first=0):
  """Sums weight_i * down_i(activation(x gate_i) * x up_i) over the chosen
  experts first .. first + E - 1; other choices add nothing.

  Args:
    x: [n, D]; weight, chosen: [n, k].
    gate_up: [E, D, 2, F]; down: [E, F, D].
    first: int, number of the first expert here.

  Returns [n, D].
  """
  (n, D), k = x.shape, chosen.shape[1]
  E, F = gate_up.shape[0], down.shape[1]
  local = chosen.reshape(-1) - first
  here = (local >= 0) & (local < E)
  local = jnp.where(here, local, E)  # sorted to the end
  order = jnp.argsort(local)
  sizes = jnp.zeros((E,), jnp.int32).at[local].add(1, mode='drop')
  rows = x[order // k]
  y = jax.lax.ragged_dot(rows, gate_up.reshape(E, D, 2 * F), sizes)
  y = activation(y[:, :F]) * y[:, F:]
  y = jax.lax.ragged_dot(y, down, sizes)
  y = jnp.where(here[order][:, None], y, 0)  # beyond the groups: undefined
  y = y[jnp.argsort(order)].reshape(n, k, D)
  return jnp.einsum('nkd,nk->nd', y, weight.astype(y.dtype))


class Experts(nn.Module):
  """Mixture of E gated feed-forwards of width F, k of them a token."""

  num_experts: int
  experts_per_token: int
  d_ff: int
  normalize: bool
  activation: Callable
  kernel_init: Callable  # axes of the fan-in -> initializer

  @nn.compact
  def __call__(self, x):
    """x [B, t, D] -> [B, t, D]."""
    B, D = x.shape[0], x.shape[-1]
    E, F = self.num_experts, self.d_ff
    router = self.param('router', self.kernel_init(0), (D, E))
    gate_up = self.param('gate_up', self.kernel_init(1), (E, D, 2, F))
    down = self.param('down', self.kernel_init(1), (E, F, D))
    logits = jnp.einsum(
      'btd,de->bte',
      x,
      router.astype(x.dtype),
      preferred_element_type=jnp.float32,
    )
    weight, chosen = route(logits, self.experts_per_token, self.normalize)

    def mixture(x, weight, chosen, gate_up, down, first=0):
      k = chosen.shape[-1]
      y = apply_experts(
        x.reshape(-1, D),
        weight.reshape(-1, k),
        chosen.reshape(-1, k),
        gate_up,
        down,
        self.activation,
        first,
      )
      return y.reshape(x.shape)

    args = x, weight, chosen, gate_up.astype(x.dtype), down.astype(x.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or rows_are_own() or B % row_shards(mesh):
      return mixture(*args)
    num_shards = mesh.shape['tensor']
    split = E % num_shards == 0

    def on_device(*args):
      if not split:
        return mixture(*args)
      first = jax.lax.axis_index('tensor') * (E // num_shards)
      return jax.lax.psum(mixture(*args, first=first), 'tensor')

    rows = PartitionSpec(ROWS)
    held = PartitionSpec('tensor') if split else PartitionSpec()
    placed = functools.partial(
      jax.shard_map,
      in_specs=(rows, rows, rows, held, held),
      out_specs=rows,
      check_vma=False,
    )
    return placed(on_device)(*args)
