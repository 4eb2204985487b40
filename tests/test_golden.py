"""Algorithms against their equations, written a second time.

golden/make_algorithms.py has the equations as loops in float64 and made
golden/algorithms.npz: for every preset x aggregation x KL form, and for the
options, the advantage, the loss and its gradients. Tokens that the policy did
not choose are garbage in the package's inputs here. After that come laws that
hold for any batch: garbage changes nothing, nothing is ever NaN, and a row
that is not valid might as well not be there.
"""

import json
from functools import cache
from itertools import groupby
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import advantage_inputs, make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok.credit import advantages, algorithms, losses, sequence
from jaxrl_tok.step.passes import total_loss
from jaxrl_tok.step.update import kl_penalty
from jaxrl_tok.types import Prompts, Rollout, Scored, TokenStats, Trajectory

GOLDEN = dict(np.load(Path(__file__).parent / 'golden/algorithms.npz'))
ROWS = {'all': np.ones(len(GOLDEN['mask']), bool), 'some': GOLDEN['some']}
CASES = [json.loads(case) for case in GOLDEN['cases']]
MASK = GOLDEN['mask']
T = MASK.shape[1]
TOKENS = 'l', 'l_old', 'l_roll', 'l_ref', 'H', 'V'
TOKENS = (*TOKENS, 'outcome', 'dense', 'second')
WIDTH = 8  # most cases that are alike: 2 rewards, 4 aggregations
GROUP_MEAN = (  # presets that take the mean of the prompt's rows
  algorithms.grpo,
  algorithms.dr_grpo,
  algorithms.dapo,
  algorithms.gspo,
  algorithms.cispo,
  algorithms.reinforce_pp_baseline,
)
LEAVE_ONE_OUT = (algorithms.reinforce, algorithms.rloo)
CRITIC = (algorithms.a2c, algorithms.ppo, algorithms.nlpo)
EQUAL_IS_ZERO = GROUP_MEAN + LEAVE_ONE_OUT + (algorithms.reinforce_pp,)
PRESETS = EQUAL_IS_ZERO + CRITIC + (algorithms.remax,)
BASELINES = {
  'none': advantages.no_baseline(),
  'batch_mean': advantages.batch_mean(),
  'ema': advantages.ema(0.9),
  'group_mean': advantages.group_mean(),
  'loo': advantages.leave_one_out(),
  'greedy': advantages.greedy(),
}
# the file's words -> the package's
CHOICES = {
  'lam': 'gae_lambda',
  'bootstrap': 'bootstrap_truncated',
  'several': 'multi_objective_aggregation',
  'mask_truncated': 'mask_truncated_completions',
}
VALUES = {
  'baseline': BASELINES.get,
  'credit': lambda name: getattr(advantages, name),
  'aggregate': lambda name: getattr(losses, name),
}


def by(presets):
  return pytest.mark.parametrize('preset', presets, ids=lambda p: p.__name__)


def chosen(batch) -> np.ndarray:
  """Tokens that the policy chose in valid rows."""
  return batch['mask'] & batch['valid'][:, None]


def spoiled(batch: dict, garbage) -> dict:
  """The batch with garbage in every entry that may not be read: tokens that
  the policy did not choose, and rows that are not valid."""
  mask = chosen(batch)
  out = {k: np.where(mask, batch[k], garbage) for k in TOKENS if k in batch}
  known = np.pad(mask, ((0, 0), (0, 1)))
  rows = np.flatnonzero(batch['cut'] & mask.any(1))
  known[rows, [np.flatnonzero(mask[b])[-1] + 1 for b in rows]] = True
  out['V_old'] = np.where(known, batch['V_old'], garbage)
  out = {k: x.astype(np.float32) for k, x in out.items()}
  return batch | out


def mixed_garbage(B):
  """Garbage [B, 1]: NaN and 1e30 in turn."""
  return np.where(np.arange(B) % 2, np.nan, 1e30)[:, None]


def rollout_of(batch, C) -> Rollout:
  prompts = Prompts(jnp.zeros((C, 1), jnp.int32), jnp.ones((C,), jnp.int32))
  mask, ended = batch['mask'], ~batch['cut']
  tokens = jnp.zeros(mask.shape, jnp.int32)
  return make_rollout(prompts, tokens, mask, batch['l_roll'], ended=ended)


def with_second(scored: Scored, batch) -> Scored:
  """Two rewards, each of which applies to rows of its own."""
  (name,) = scored.rewards
  first, second = GOLDEN['applies'] & batch['valid']
  return scored._replace(
    rewards=scored.rewards | {'second': batch['second']},
    applies={name: first, 'second': second},
    weights=scored.weights | {'second': jnp.float32(0.5)},
  )


def solve(
  algorithm,
  batch,
  reward,
  aggregate,
  ema_baseline=0.0,
  on_policy=False,
  several=False,
):
  """Steps of an update between the networks and the optimizer."""
  learned, kl = algorithm.value_loss is not None, algorithm.kl
  rollout = rollout_of(batch, batch['greedy'].shape[0])
  beta = 0.0 if kl is None else kl.beta
  inputs = advantage_inputs(
    rollout,
    reward,
    batch['V_old'] if learned else None,
    batch['l_old'] - batch['l_roll'],
    greedy=batch['greedy'] if algorithm.greedy else None,
    applies=batch['valid'],
  )
  if several:
    inputs = inputs._replace(scored=with_second(inputs.scored, batch))
  if kl is not None and kl.form == 'reward':
    penalty = kl_penalty(rollout, batch['l_ref'], beta)
    inputs = inputs._replace(kl_penalty=penalty)
  carries = {'ema_baseline': jnp.float32(ema_baseline)}
  credit = algorithm.advantage(inputs, carries)
  valid = inputs.valid
  mask = inputs.mask & credit.rows(valid)[:, None]
  trajectory = Trajectory(
    rollout._replace(mask=mask),
    inputs.reward,
    credit.advantage,
    credit.value_target,
    None if kl is None else batch['l_ref'],
    None if on_policy else batch['l_old'],
    batch['V_old'][:, :-1] if learned else None,
  )
  stats = TokenStats(batch['l'], batch['H'], batch['V'] if learned else None)
  weights = aggregate(mask, valid), losses.token_mean(mask, valid)

  def loss(stats):
    return total_loss(algorithm, stats, trajectory, *weights, beta)

  (total, metrics), slope = jax.value_and_grad(loss, has_aux=True)(stats)
  carry = None
  if 'ema_baseline' in algorithm.carries:
    ema = algorithm.carries['ema_baseline']
    carry = ema.after(
      carries['ema_baseline'], None, credit.metrics | {'rows': mask.shape[0]}
    )
  return {
    'loss': total,
    'advantage': credit.advantage,
    'target': credit.value_target,
    'carry': carry,
    'by_l': slope.logp,
    'by_H': slope.entropy,
    'by_V': slope.value,
    'kl': metrics.get('kl'),
  }


def make(case: dict):
  """The package's algorithm of one of the file's cases."""
  changes = {
    CHOICES.get(k, k): VALUES.get(k, lambda x: x)(x)
    for k, x in case.items()
    if k not in ('preset', 'reward', 'on_policy', 'rows')
  }
  changes['max_length'] = T
  if case['preset'] == 'dapo':
    changes['overlong_buffer'] = 2
  if 'importance_cap' in case:
    changes['recompute_logp'] = True
  return getattr(algorithms, case['preset'])(**changes)


def close(got, want, said, scale=1.0):
  off = np.abs(np.asarray(got) - want) / np.maximum(scale, np.abs(want))
  assert off.max() <= 1e-5, f'{said}: off by {off.max():.2g}'


@by(PRESETS)
def test_equations(preset):
  """Cases that differ in reward and aggregation only are one vmap."""

  def same(i):
    case = CASES[i]
    return {k: case[k] for k in sorted(case) if k not in shared}

  shared = ('reward', 'aggregate')
  ours = [i for i, c in enumerate(CASES) if c['preset'] == preset.__name__]
  ours.sort(key=lambda i: json.dumps(same(i)))
  for _, members in groupby(ours, same):
    solve_alike(list(members))


def solve_alike(members: list):
  """Compares the cases of those numbers; they share all but two words."""
  case = CASES[members[0]]
  valid = ROWS[case.get('rows', 'all')]
  batch = spoiled(GOLDEN | {'valid': valid}, mixed_garbage(len(MASK)))
  if 'several' in case:
    valid = valid & GOLDEN['applies'].any(0)
  learns = valid & ~(GOLDEN['cut'] & case.get('mask_truncated', False))
  made = [make(CASES[i]) for i in members]
  ema = case.get('baseline') == 'ema'
  rewards = [batch[CASES[i]['reward']] for i in members]
  on = MASK & learns[:, None]
  weights = [algorithm.aggregate(on, valid) for algorithm in made]

  def one(reward, weight):
    return solve(
      made[0],
      batch,
      reward,
      lambda mask, valid: weight,
      GOLDEN['carry_before'] if ema else 0.0,
      case.get('on_policy', False),
      'several' in case,
    )

  # operation by operation, for whole programs would be compiled to run once;
  # and of one width, so that each operation is compiled once
  rows = np.arange(WIDTH) % len(members)
  with jax.disable_jit():
    found = jax.vmap(one)(jnp.stack(rewards)[rows], jnp.stack(weights)[rows])
  found = {k: x for k, x in found.items() if x is not None}
  for n, i in enumerate(members):
    compare({k: x[n] for k, x in found.items() if k != 'carry'}, i, on)
    if ema:
      close(found['carry'][n], GOLDEN['carry'][i], case)


def compare(found: dict, i: int, on: np.ndarray):
  """Compares one case with the file's; gradients on their own scale. on: tokens
  that are learnt from."""
  for name, x in found.items():
    x, want, said = np.asarray(x), GOLDEN[name][i], f'{name} of {CASES[i]}'
    if name in ('loss', 'advantage'):
      close(x, want, said)
    elif name == 'kl':
      close(x[on].mean(), want, said)
    else:
      scale = np.clip(np.abs(want).max(), 1e-3, 1.0)
      close(x[MASK], want, said, scale)
      assert (x[~MASK] == 0).all(), said


def test_functions_of_one_sequence():
  """Returns, GAE and V-trace of the dense reward, row by row."""
  numbers = json.loads(str(GOLDEN['sequence']))
  batch = spoiled(GOLDEN | {'valid': ROWS['all']}, mixed_garbage(len(MASK)))
  gamma, lam = numbers['gamma'], numbers['lam']
  value, reward = batch['V_old'], batch['dense']
  log_rho = jnp.where(MASK, batch['l_old'] - batch['l_roll'], 0.0)
  last = jnp.where(batch['cut'], value[:, T], 0.0)
  given = reward, value[:, :T], MASK, last
  with jax.disable_jit():
    togo = jax.vmap(sequence.reward_to_go, (0, 0, None))(reward, MASK, gamma)
    gae = jax.vmap(sequence.gae_advantage, (0,) * 4 + (None,) * 2)(
      *given, gamma, lam
    )
    advantage, target = jax.vmap(
      sequence.vtrace_advantage, (0,) * 5 + (None,) * 4
    )(
      *(*given, jnp.exp(log_rho), gamma, lam),
      *(numbers['rho_bar'], numbers['c_bar']),
    )
  close(togo, GOLDEN['togo'], 'togo')
  close(gae, GOLDEN['gae_advantage'], 'GAE')
  gae_target = np.where(MASK, gae + value[:, :T], 0)
  close(gae_target, GOLDEN['gae_target'], "GAE's target")
  close(advantage, GOLDEN['vtrace_advantage'], 'V-trace')
  close(target, GOLDEN['vtrace_target'], "V-trace's target")


# --- laws that hold for any batch --------------------------------------------


@cache
def solver(preset):
  """Preset with all that may be added to it, and its `solve`, jitted."""
  several = preset in (algorithms.ppo, algorithms.nlpo)
  capped = {'importance_cap': 2.0, 'recompute_logp': several}
  if preset is algorithms.rloo:  # one ratio a sequence
    capped['importance_mode'] = 'sequence_mask'
  algorithm = preset(
    max_length=T,
    kl='forward',
    beta=0.1,
    entropy_coef=0.01,
    **capped,
  )
  return algorithm, jax.jit(
    lambda batch: solve(algorithm, batch, batch['outcome'], algorithm.aggregate)
  )


def random_batch(seed, mask, cut, G=3, valid=None) -> dict:
  rng = np.random.default_rng(seed)
  B = len(mask)
  batch = {k: rng.normal(size=mask.shape) for k in TOKENS if k != 'dense'}
  batch['V_old'] = rng.normal(size=(B, T + 1))
  batch['greedy'] = rng.normal(size=B // G)
  batch = {k: x.astype(np.float32) for k, x in batch.items()}
  valid = np.ones(B, bool) if valid is None else valid
  return batch | {'mask': mask, 'cut': cut, 'valid': valid}


def check_laws(preset, batch, garbage):
  """Finite, 0 where nothing was chosen, and garbage changes no bit."""
  _, run = solver(preset)
  clean, found = run(spoiled(batch, 0.0)), run(spoiled(batch, garbage))
  jax.tree.map(np.testing.assert_array_equal, found, clean)
  for name, x in found.items():
    if x is None:
      continue
    x = np.asarray(x)
    assert np.isfinite(x).all(), name
    if name in ('advantage', 'by_l', 'by_H', 'by_V'):
      assert (x[~chosen(batch)] == 0).all(), name
  if not chosen(batch).any():
    assert found['loss'] == 0
  return found


@by(PRESETS)
@settings(max_examples=15, deadline=None)
@given(
  share=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
  cut=st.sampled_from([0.0, 0.5, 1.0]),
  valid=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
  garbage=st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -1e30]),
  seed=st.integers(0, 1000),
)
def test_garbage_changes_nothing(preset, share, cut, valid, garbage, seed):
  rng = np.random.default_rng(seed)
  mask, cut = rng.random((12, T)) < share, rng.random(12) < cut
  valid = rng.random(12) < valid
  check_laws(preset, random_batch(seed, mask, cut, valid=valid), garbage)


@by(PRESETS)
@pytest.mark.parametrize('left_out', [(1,), (0, 3)])
def test_rows_that_are_not_valid_might_as_well_not_be_there(preset, left_out):
  """Group of five: loss, advantages and gradients of the others are those
  of a batch that never had the rows."""
  algorithm, run = solver(preset)
  rng = np.random.default_rng(5)
  mask, valid = rng.random((5, T)) < 0.7, np.ones(5, bool)
  valid[list(left_out)] = False
  cut = rng.random(5) < 0.5
  batch = random_batch(5, mask, cut, G=5, valid=valid)
  found = run(spoiled(batch, np.nan))
  others = {
    k: x if k == 'greedy' else x[valid] for k, x in spoiled(batch, 0.0).items()
  }
  with jax.disable_jit():
    want = solve(algorithm, others, others['outcome'], algorithm.aggregate)
  close(found['loss'], want['loss'], 'loss')
  for name in ('advantage', 'target', 'by_l', 'by_H', 'by_V', 'kl'):
    if want[name] is None:
      continue
    x, others_x = np.asarray(found[name]), np.asarray(want[name])
    assert np.abs(others_x).max() > 0, name
    close(x[valid], others_x, name)
    assert (x[~valid] == 0).all(), name


@by(PRESETS)
def test_a_group_of_one(preset):
  """Advantage 0 where a mean is the row itself; a std of one is no NaN."""
  batch = random_batch(0, np.ones((4, T), bool), np.ones(4, bool), G=1)
  if preset in LEAVE_ONE_OUT:
    with pytest.raises(ValueError, match='at least 2 samples'):
      check_laws(preset, batch, 0.0)
  else:
    advantage = check_laws(preset, batch, np.nan)['advantage']
    assert (advantage == 0).all() == (preset in GROUP_MEAN)


@pytest.mark.parametrize('reward', [0.0, 1.0, 0.1, -0.7, 3.3, 1e4])
@by(EQUAL_IS_ZERO)
def test_equal_rewards_have_no_advantage(preset, reward):
  """Rounding of a mean in float32 must not be divided by a std that is
  rounding too."""
  length = np.arange(12) % (T - 1) + 1  # none is long enough for a penalty
  mask = np.arange(T) < length[:, None]
  batch = random_batch(0, mask, np.zeros(12, bool))
  if preset is algorithms.reinforce_pp:  # whitens over all of the batch
    of_prompt = np.ones(4)
  else:
    of_prompt = np.array([1, 2, 0.3, 7])
  rows = reward * np.repeat(of_prompt, 3)[:, None]
  last = np.arange(T) == length[:, None] - 1
  batch['outcome'] = np.where(last, rows, 0).astype(np.float32)
  advantage = check_laws(preset, batch, np.nan)['advantage']
  assert np.abs(advantage).max() <= 1e-6 * max(1, np.abs(rows).max())
