"""Finite numbers: which tensor of an update or of a policy has others.

A tensor of numbers (log-probs, rewards, a gradient) counts as finite where its
norm, sqrt(sum x^2), is a finite float32. A NaN, an infinity and a number whose
square overflows (above about 1e19) all fail: nothing can be normalised by them.
"""

import jax
import jax.numpy as jnp

from jaxrl_tok.sharding import path_name


def squares(tree) -> list[jax.Array]:
  """Sums of squares float32 [] of the leaves, in the tree's order."""
  leaves = (jnp.asarray(x, jnp.float32) for x in jax.tree.leaves(tree))
  return [jnp.sum(jnp.square(x)) for x in leaves]


def are_finite(tree) -> list[jax.Array]:
  """Tells of each leaf, bool [], whether all its numbers are finite; leaves
  that are no floating-point numbers are."""
  return [
    jnp.all(jnp.isfinite(x))
    if jnp.issubdtype(x.dtype, jnp.inexact)
    else jnp.bool_(True)
    for x in jax.tree.leaves(tree)
  ]


def all_finite(tree) -> jax.Array:
  """Tells, bool [], whether all numbers of a tree are finite."""
  return jnp.all(jnp.stack([jnp.bool_(True), *are_finite(tree)]))


def check_finite(tree, owner: str, cure: str) -> None:
  """Refuses parameters that are not finite, by the first one's path.

  Raises ValueError, in one line: {owner} has {parameter} with numbers that are
  not finite; {cure}.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  found = jax.device_get([_is_finite(x) for _, x in leaves])
  for (path, _), fine in zip(leaves, found):
    if not fine:
      raise ValueError(
        f'{owner} has {path_name(path)} with numbers that are not finite; '
        f'{cure}'
      )


@jax.jit
def _is_finite(x) -> jax.Array:
  """Tells of one leaf; a program for each shape."""
  return all_finite(x)


# --- the first tensor of an update -------------------------------------------

SAMPLED, REWARD = "the sampler's log-probs", 'the reward'
# tensors of a batch, in the order in which they are computed
OF_BATCH = (
  SAMPLED,
  "the reference's log-probs",
  'the old log-probs',
  REWARD,
  'the values',
  'the value targets',
  'the advantage',
  'the loss',
)


def first_tensor(batch: list, grads, params) -> jax.Array:
  """Index int32 [] in tensor_names of the first tensor that is not finite; the
  gradient's largest leaf where the norm of all alone overflows.

  Args:
    batch: bool [] for each of OF_BATCH, True: finite.
    grads: gradient of TrainState.trained.
    params: TrainState.trained after the step.
  """
  sizes = jnp.stack(squares(grads))
  sizes = jnp.where(jnp.isfinite(sizes), sizes, jnp.inf)
  whole = jnp.isfinite(jnp.sum(sizes))
  faults = [
    *(jnp.where(fine, 0.0, jnp.inf) for fine in batch),
    *jnp.where(whole, 0.0, sizes),
    *(jnp.where(fine, 0.0, jnp.inf) for fine in are_finite(params)),
  ]
  return jnp.argmax(jnp.stack(faults)).astype(jnp.int32)


def tensor_names(trained: tuple) -> list[str]:
  """Names of the tensors of an update, for TrainState.trained: those of the
  batch, then of each leaf its gradient, then its new value."""
  paths = [p for p, _ in jax.tree_util.tree_leaves_with_path(trained)]
  owners = ('', 'critic ')
  leaves = [owners[p[0].idx] + path_name(p[1:]) for p in paths]
  return [
    *OF_BATCH,
    *(f'the gradient of {leaf}' for leaf in leaves),
    *(f'{leaf} after the step' for leaf in leaves),
  ]
