"""Groups, a prompt and its G samples: split, merged, taken together.

A batch's leaves are [C, ...] or [B, ...], the G rows of a prompt consecutive;
every part of it holds complete groups.
"""

import jax
import jax.numpy as jnp

from jaxrl_tok.sharding import constrain_rows


def split_rows(tree, parts: int):
  """Splits [R, ...] into [parts, R / parts, ...]; part m has rows m, m + parts,
  and so on.

  Strided, so that a batch split over devices stays on its devices.
  """
  return jax.tree.map(
    lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), tree
  )


def merge_rows(tree):
  """Undoes split_rows."""
  return jax.tree.map(
    lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree
  )


def split_groups(tree, parts: int, num_prompts: int):
  """Splits a tree of [C, ...] and [B, ...] leaves into parts of groups."""

  def one(x):  # a group's G rows move together
    return x.reshape(num_prompts, -1, *x.shape[1:])

  split = split_rows(jax.tree.map(one, tree), parts)
  return jax.tree.map(
    lambda x, y: y.reshape(parts, -1, *x.shape[1:]), tree, split
  )


def take_groups(tree, prompts, num_prompts: int):
  """Rows of the given prompts, from a tree of [C, ...] and [B, ...] leaves."""

  def one(x):
    groups = x.reshape(num_prompts, -1, *x.shape[1:])[prompts]
    return constrain_rows(groups.reshape(-1, *x.shape[1:]))

  return jax.tree.map(one, tree)
