"""Bounds of log-ratios before exp: nothing overflows, and a gradient that a
clip holds, or that has no advantage, is exactly 0.

Four tokens are drawn from anything that float32 log-probs may be, and repeated
to a completion of 2000 tokens.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok.credit import algorithms, compose, losses, names
from jaxrl_tok.credit.losses import MAX_LOG_RATIO, bounded
from jaxrl_tok.step.passes import total_loss
from jaxrl_tok.types import TokenStats, Trajectory

T, K = 2000, 4  # tokens, and different ones of them
BETA = 0.1
KLS = ('none', 'reverse', 'forward')


def floats(low, high):
  low, high = (float(np.float32(x)) for x in (low, high))
  return st.floats(low, high, width=32, allow_subnormal=False)


def lists(element):
  return st.lists(element, min_size=K, max_size=K)


# differences of 1e4 and of nearly nothing
logps = st.one_of(floats(-1e4, 0), floats(-3, 0), st.sampled_from([0.0, -1e4]))
sizes = st.sampled_from([0.0, 1e-30, 1.0, 1e30])
advantages = st.one_of(
  floats(-1e30, 1e30), sizes, sizes.map(lambda x: -x), floats(-2, 2)
)
values = st.one_of(floats(-1e12, 1e12), floats(-1, 1))
batches = st.fixed_dictionaries(
  {name: lists(logps) for name in ('l', 'l_old', 'l_ref', 'l_roll')}
  | {name: lists(values) for name in ('V', 'V_old', 'target')}
  | {'A': lists(advantages), 'mask': lists(st.booleans())}
)


def tiled(batch: dict) -> dict:
  """Arrays [1, T] of the drawn tokens, repeated."""
  found = {k: np.tile(np.asarray(x), T // K)[None] for k, x in batch.items()}
  mask = found.pop('mask').astype(bool)
  return {k: x.astype(np.float32) for k, x in found.items()} | {'mask': mask}


def records(batch: dict, l, V, learned: bool):
  """TokenStats and Trajectory [1, T], off-policy."""
  rollout = make_rollout(None, jnp.zeros((1, T)), batch['mask'])
  trajectory = Trajectory(
    rollout._replace(logp=jnp.asarray(batch['l_roll'])),
    None,
    batch['A'],
    batch['target'] if learned else None,
    batch['l_ref'],
    batch['l_old'],
    batch['V_old'] if learned else None,
  )
  return TokenStats(l, jnp.zeros((1, T)), V if learned else None), trajectory


@functools.cache
def slopes(name: str, kl: str, mode: str | None, learned: bool):
  """Jitted batch -> ((loss, metrics), gradients by l and by V), of the sum over
  tokens: nothing divides what might overflow."""
  algorithm = algorithms.reinforce(
    loss=name,
    kl=kl,
    beta=BETA if kl != 'none' else 0.0,
    importance_cap=mode and 2.0,
    importance_mode=mode,
  )
  if learned:
    algorithm = algorithm._replace(value_loss=losses.value_error(0.5, 0.2))

  def loss(l, V, batch):
    stats, trajectory = records(batch, l, V, learned)
    weight = batch['mask'].astype(jnp.float32)
    return total_loss(algorithm, stats, trajectory, weight, weight, BETA)

  grad = jax.value_and_grad(loss, (0, 1), has_aux=True)
  return jax.jit(lambda batch: grad(batch['l'], batch['V'], batch))


def assert_finite(tree):
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    assert np.isfinite(np.asarray(x)).all(), jax.tree_util.keystr(path)


@pytest.mark.parametrize('name', names.LOSSES)
@settings(max_examples=30, deadline=None)
@given(batch=batches)
def test_every_number_is_finite(name, batch):
  """Losses x KL forms x importance modes x value loss; and what a gradient of
  the parameters is made of, the square of the sum of slopes by log-probs, for
  advantages of any usual size."""
  batch = tiled(batch)
  modes = (None, *names.IMPORTANCE_MODES)
  if name == 'sequence_clip':
    modes = [m for m in modes if m is None or 'sequence' in m]
  # every mode and every KL, and not all pairs of them
  pairs = [*itertools.product(KLS, modes[:1]), *((KLS[2], m) for m in modes)]
  usual = np.abs(batch['A']).max() <= 1e6
  for kl, mode in dict.fromkeys(pairs):
    found = slopes(name, kl, mode, False)(batch)
    assert_finite(found)
    if usual:
      assert_finite(jnp.square(jnp.abs(found[1][0]).sum()))


@pytest.mark.parametrize('name', names.LOSSES)
@pytest.mark.parametrize('other', [-3e38, -1e38, 1e38, 3e38])
def test_changes_of_any_size_are_finite(name, other):
  """Log-ratios as large as float32 has them, at a log-prob of 0."""
  batch = dict.fromkeys(('V', 'V_old', 'target', 'l'), [0.0] * K)
  batch |= dict.fromkeys(('l_old', 'l_ref', 'l_roll'), [other, 0.0] * (K // 2))
  mask = [True] * K
  for A in (1.0, 0.0, -1.0):
    found = tiled(batch | {'A': [A] * K, 'mask': mask})
    for kl, mode in (('reverse', None), ('forward', 'sequence_truncate')):
      assert_finite(slopes(name, kl, mode, False)(found))


@settings(max_examples=30, deadline=None)
@given(batch=batches)
def test_value_loss_is_finite(batch):
  batch = tiled(batch)
  found = slopes('clip', 'none', None, True)(batch)
  assert_finite(found)
  V, old, target = (
    batch[k].astype(np.float64) for k in ('V', 'V_old', 'target')
  )
  by_V = np.asarray(found[1][1])
  move = V - old
  held = np.abs(move) > 0.2 * (1 + 1e-3) + 1e-6 * np.abs(old)
  far = (old + np.clip(move, -0.2, 0.2) - target) ** 2
  held &= far > (V - target) ** 2 * (1 + 1e-3)
  assert (by_V[held] == 0).all()
  assert (by_V[~batch['mask']] == 0).all()


def held_by(name: str, batch: dict, low=0.2, high=0.2):
  """Two masks [1, T], in float64: certainly held by the clip, certainly not;
  a token within rounding of a border is in neither."""
  mask = batch['mask']
  change = np.where(mask, batch['l'].astype(float) - batch['l_old'], 0)
  A = batch['A']
  if name == 'sequence_clip':
    change = np.broadcast_to(change.sum(), change.shape)
    A = A[:, mask.argmax()] if mask.any() else A * 0
  elif name == 'gspo':
    mean = change.sum() / max(mask.sum(), 1)
    change, (low, high) = np.broadcast_to(mean, change.shape), (3e-4, 4e-4)
  rounding = 1e-5 + 1e-6 * np.abs(change)
  if name != 'clip':  # a sum of numbers up to 1e4
    rounding = rounding + T * 1e-2
  above, below = np.log1p(high), np.log1p(-low)
  held = (change > above + rounding) & (A > 0)
  held |= (change < below - rounding) & (A < 0)
  free = (change < above - rounding) | (A < 0)
  free &= (change > below + rounding) | (A > 0)
  return held & mask, free & mask


@pytest.mark.parametrize('name', names.LOSSES)
@settings(max_examples=50, deadline=None)
@given(batch=batches)
def test_held_tokens_and_tokens_without_advantage_have_no_gradient(name, batch):
  batch = tiled(batch)
  by_l = np.asarray(slopes(name, 'none', None, False)(batch)[1][0])
  assert (by_l[~batch['mask']] == 0).all()
  if name == 'sequence_clip':  # one advantage a sequence, its first token's
    batch['A'] = np.full((1, T), batch['A'][0, batch['mask'].argmax()])
  assert (by_l[batch['A'] == 0] == 0).all()
  if name in ('clip', 'sequence_clip', 'gspo'):
    held, free = held_by(name, batch)
    assert (by_l[held] == 0).all()
  if name == 'clip':  # what is free pulls against its advantage
    some = free & (np.abs(batch['A']) >= 0.1)
    some &= batch['l'] - batch['l_old'] > -30  # where exp is no 0
    assert (np.sign(by_l) == -np.sign(batch['A']))[some].all()


@settings(max_examples=100, deadline=None)
@given(x=floats(-1e4, MAX_LOG_RATIO))
def test_values_inside_the_bound_are_untouched(x):
  """Bit for bit, gradients too."""
  x = jnp.float32(x)
  assert jnp.exp(bounded(x)) == jnp.exp(x)
  slope = jax.grad(lambda x: jnp.exp(bounded(x)))(x)
  assert slope == jax.grad(jnp.exp)(x)
  value, slope = jax.value_and_grad(losses.k3)(-x)
  want, want_slope = jax.value_and_grad(lambda d: jnp.exp(-d) + d - 1)(-x)
  assert (value, slope) == (want, want_slope)


def test_beyond_the_bound_the_pull_is_that_at_it():
  d = jnp.array([-MAX_LOG_RATIO, -90.0, -1e4, -3e38])
  slope = jax.vmap(jax.grad(losses.k3))(d)
  np.testing.assert_allclose(slope, 1 - np.exp(10.0), rtol=1e-6)
  np.testing.assert_allclose(losses.k3(d), np.exp(10.0) - 11, rtol=1e-6)


def alone(l, old, A):
  """TokenStats and Trajectory of one sequence, off-policy."""
  l, old = jnp.atleast_1d(l), jnp.atleast_1d(jnp.float32(old))
  rollout = make_rollout(None, jnp.zeros(l.shape), jnp.ones((*l.shape,)))
  A = jnp.full(l.shape, A, jnp.float32)
  trajectory = Trajectory(rollout, None, A, None, None, old, None)
  return TokenStats(l, jnp.zeros(l.shape), None), trajectory


@pytest.mark.parametrize('A', [1.5, -1.5])
@pytest.mark.parametrize('n', [1, 3])
@pytest.mark.parametrize('low', [0.0, 0.2])
@pytest.mark.parametrize('high', [0.0, 0.2])
@pytest.mark.parametrize('name', ['clip', 'sequence_clip', 'gspo'])
def test_on_policy_a_clip_is_the_policy_gradient(name, low, high, n, A):
  """A ratio of 1 is not held, also by a bound of 0, where maximum and clip are
  tied."""
  l = jnp.full(n, -0.5)
  loss = compose.LOSSES[name](low, high)

  def total(l):
    return loss(*alone(l, jnp.full(n, -0.5), A))[0].sum()

  np.testing.assert_allclose(jax.grad(total)(l), -A, rtol=1e-6)


def test_ties_at_the_dual_clip_and_the_value_clip_are_not_held():
  old, l = jnp.float32(-2), jnp.float32(-0.9)
  rho = float(jnp.exp(l - old))

  def total(l, c):
    return losses.clip(dual_clip=c)(*alone(l, old, -1.0))[0].sum()

  slope = jax.grad(total)
  assert slope(l, rho) == pytest.approx(rho)
  assert slope(l, rho * 1.001) == pytest.approx(rho)
  assert slope(l, rho * 0.999) == 0

  def value_loss(V, c, old=1.0, target=0.25):
    stats, trajectory = alone(l, old, 1.0)
    one = functools.partial(jnp.full, (1,))
    trajectory = trajectory._replace(
      value_target=one(target), old_value=one(old)
    )
    found = losses.value_error(0.5, c)(stats._replace(value=V), trajectory)
    return found.sum()

  for c in (None, 0.0, 0.2):
    assert jax.grad(value_loss)(jnp.ones(1), c) == pytest.approx(0.75)
  # further from the target than the clip allows, and nearer
  assert jax.grad(value_loss)(jnp.full(1, 0.7), 0.2) == 0
  assert jax.grad(value_loss)(jnp.full(1, 1.3), 0.2) == pytest.approx(1.05)


@pytest.mark.parametrize('A', [1.0, 0.0, -1.0])
def test_the_ratio_of_a_long_sequence(A):
  """400 tokens, each 0.25 likelier: held, without an advantage, or pushed
  back."""
  old = jnp.full(400, -0.75)

  def total(l):
    return losses.sequence_clip()(*alone(l, old, A))[0].sum()

  value, slope = jax.value_and_grad(total)(old + 0.25)
  want = {1.0: -1.2, 0.0: 0.0, -1.0: np.exp(10.0)}[A]
  assert value == pytest.approx(want)
  np.testing.assert_allclose(slope, want if A < 0 else 0, rtol=1e-6)
