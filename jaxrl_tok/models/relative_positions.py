"""Relative positions as biases of attention's scores. T5, arXiv:1910.10683.

  # key - query   -3 -2 -1  0  1  2     keys after the query have buckets of
  # bucket         3  2  1  0  5  6     their own where they are seen at all

A bucket has a bias for each head, which all layers of a stack share.
"""

import math

import jax.numpy as jnp
import numpy as np

from jaxrl_tok.models.encoder_decoder_config import Buckets


def bucket_of(buckets: Buckets, distance, both_sides: bool) -> np.ndarray:
  """Buckets int32 of distances key - query.

  With n buckets for a side, distances below n/2 have one each; a larger d has

    n/2 + floor(log(d / (n/2)) / log(max_distance / (n/2)) * n/2), at most n - 1

  both_sides: keys after the query are seen: they have the second half.
  """
  distance = np.asarray(distance)
  n = buckets.count // 2 if both_sides else buckets.count
  offset = np.where(distance > 0, n, 0) if both_sides else 0
  away = np.abs(distance) if both_sides else np.maximum(-distance, 0)
  exact = n // 2
  # in float32: a border that is a power of two lies where it was trained
  far = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact))
  far = far / np.float32(math.log(buckets.max_distance / exact))
  far = exact + (far * np.float32(n - exact)).astype(np.int32)
  near = np.where(away < exact, away, np.minimum(far, n - 1))
  return (offset + near).astype(np.int32)


def score_bias(
  embedding, buckets: Buckets, query, key, both_sides: bool = False
):
  """Biases float32 [N, 1, queries, keys] of scores.

  Args:
    embedding: [count, N], of each bucket and head.
    query, key: positions, int32 [queries] and [keys], traced or not.
    both_sides: as for `bucket_of`.
  """
  # one row for each distance that is told apart, and no logarithm at run time
  most = buckets.max_distance
  row_of = bucket_of(buckets, np.arange(-most, most + 1), both_sides)
  rows = embedding.astype(jnp.float32)[row_of]
  distance = jnp.clip(key[None] - query[:, None], -most, most)
  return jnp.moveaxis(rows[distance + most], 2, 0)[:, None]
