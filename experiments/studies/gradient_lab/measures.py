"""Noise and bias of gradient estimates, from their products.

Only products of the estimates with each other and with a reference are kept:
nothing of the parameters' size crosses from one block to the next.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.studies.gradient_lab.methods import (
  DEFAULT,
  REWARDS,
  SUM,
  Method,
)


class Rows(NamedTuple):
  """K reported methods, each against a reference, and its anchor: a method
  whose mean is known to be `share` of that reference."""

  method: np.ndarray  # [K]
  anchor: np.ndarray  # [K]
  reference: np.ndarray  # [K] of REWARDS
  share: np.ndarray  # [K] of the anchor


def make_rows(methods: list, C: int, G: int) -> Rows:
  """Rows of every method, the default first; an outcome of digits has their
  gradient, and theirs is one of the exact reward, too."""
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
  found = [row(m, m.reward.removesuffix('_outcome')) for m in ordered]
  found.append(row(methods[-1], 'exact'))
  return Rows(*map(np.array, zip(*found)))


def products(found_MxW, reference_RxW, rows: Rows) -> dict:
  """Products of one batch's estimates, for each row's pair (method, anchor):
  with each other [K, 2, 2] and with the reference [K, 2], and the method's
  with the reference by its own norm [K]."""
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


class Sums(NamedTuple):
  """Sums of `products` over the batches of each block."""

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
  """Numbers of every row, {name: [K]}, g being its reference.

  The estimates of a method are scaled by the s for which their mean lies as
  far along g as g: <s mean, g> = |g|^2. Then

    variance  E |s (estimate - mean)|^2 / |g|^2
    needed    variance / the default's: completions for the same precision
    bias      |s mean - g|^2 / |g|^2
    mean_cosine  cosine of the mean with g: 1 / sqrt(1 + bias)
    cosine    that of one batch's estimate with g, the mean over batches
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
  """Numbers with standard errors {name: ([K], [K])}, by the jackknife over
  blocks; the reference counts as exact."""
  J = len(sums.count)
  found = measure(sums, rows, square_R)
  without = [measure(sums, rows, square_R, 1 - row) for row in np.eye(J)]
  return {
    name: (value, np.sqrt((J - 1) * np.var([w[name] for w in without], axis=0)))
    for name, value in found.items()
  }
