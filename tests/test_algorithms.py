"""Algorithms from Python values: presets, choices, parts of one's own, carries,
and rows that are not valid."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import advantage_inputs, make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok.credit import advantages, algorithms, compose, losses, names
from jaxrl_tok.run import build, flags
from jaxrl_tok.run.settings import Settings
from jaxrl_tok.types import (
  Advantage,
  Carry,
  Passes,
  Prompts,
  Rollout,
  TokenStats,
  Trajectory,
)

ALIASES = algorithms.ALIASES
C, G, T = 3, 4, 5
B = C * G


def inputs_of(mask, reward, valid=None, ended=True, value=None, greedy=None):
  """Inputs of an advantage: one reward, which applies where valid."""
  rows = len(mask)
  groups = C if rows == B else 1
  rollout = make_rollout(
    Prompts(jnp.zeros((groups, 1), int), jnp.ones((groups,), int)),
    np.zeros(mask.shape),
    mask,
    ended=jnp.broadcast_to(jnp.asarray(ended), (rows,)),
  )
  return advantage_inputs(
    rollout,
    reward,
    value,
    jnp.zeros(mask.shape),
    greedy=greedy,
    applies=valid,
  )


def prefixes(lengths):
  """Mask [B, T] of completions of these lengths."""
  return np.arange(T) < np.asarray(lengths)[:, None]


def outcomes(mask, R):
  """Rewards [B, T]: R [B] on each row's last chosen token."""
  last = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] * mask == 1
  return np.where(last, np.asarray(R)[:, None], 0.0)


# --- presets and choices -----------------------------------------------------


@pytest.mark.parametrize('name', names.ALGORITHMS)
def test_every_alias_is_found_and_described(name):
  algorithm = algorithms.by_name(name)(max_length=4)
  assert algorithm.name == name
  words = compose.described(algorithm)
  assert words['max_length'] == 4
  assert all(
    v is None or isinstance(v, str | int | float | bool) for v in words.values()
  )
  assert 'arXiv' in ALIASES[name].__doc__


def test_words_and_functions_have_one_place():
  assert tuple(ALIASES) == names.ALGORITHMS
  assert tuple(compose.CREDITS) == names.CREDITS
  assert tuple(compose.BASELINES) == names.BASELINES
  assert tuple(compose.SCALES) == names.SCALES
  assert tuple(compose.MULTI_OBJECTIVE) == names.MULTI_OBJECTIVE
  assert tuple(compose.LOSSES) == names.LOSSES
  assert tuple(compose.AGGREGATIONS) == names.AGGREGATIONS
  assert tuple(losses.KL_FORMS) == names.KL_NAMES


def test_presets_are_those_of_their_papers():
  """The design's table, by the words of --print_config."""

  def words(name, *fields):
    found = compose.described(ALIASES[name](max_length=10))
    return tuple(found.get(field) for field in fields)

  parts = 'credit', 'baseline', 'scale', 'loss', 'aggregate'
  clip = 'clip_low', 'clip_high'
  returns, group = 'returns', 'group_mean'
  assert words('reinforce', *parts) == (
    *(returns, 'leave_one_out', None, 'reinforce', 'seq_mean_token_sum'),
  )
  assert words('rloo', *parts, *clip) == (
    *(returns, 'leave_one_out', None, 'sequence_clip', 'seq_mean_token_sum'),
    *(0.2, 0.2),
  )
  assert words('remax', *parts)[1:4] == ('greedy', None, 'reinforce')
  assert words('a2c', 'gamma', 'gae_lambda', 'value_coef', 'whiten') == (
    *(0.99, 1.0, 0.5, False),
  )
  assert words('a2c', 'entropy_coef', 'loss', 'aggregate', 'epochs') == (
    *(0.0, 'reinforce', 'token_mean', 1),
  )
  for name in ('ppo', 'nlpo'):
    assert words(name, 'gamma', 'gae_lambda', 'whiten', *clip) == (
      *(1.0, 0.95, True, 0.2, 0.2),
    )
    assert words(name, 'value_clip', 'dual_clip', 'epochs', 'aggregate') == (
      *(0.2, None, 4, 'token_mean'),
    )
  assert words('nlpo', 'mask_sync_steps') == (2,)
  assert words('grpo', *parts, *clip) == (
    *(returns, group, 'group_std', 'clip', 'seq_mean_token_mean', 0.2, 0.2),
  )
  assert words('dr_grpo', *parts) == (
    *(returns, group, None, 'clip', 'seq_mean_token_sum_norm'),
  )
  assert words('dapo', *parts, *clip) == (
    *(returns, group, 'group_std', 'clip', 'token_mean', 0.2, 0.28),
  )
  assert words('dapo', 'dynamic_sampling_rounds', 'overlong_buffer') == (10, 2)
  assert words('gspo', *parts, *clip) == (
    *(returns, group, 'group_std', 'gspo', 'seq_mean_token_mean', 3e-4, 4e-4),
  )
  assert words('cispo', *parts, 'ratio_cap', 'ratio_floor') == (
    *(returns, group, 'group_std', 'cispo', 'token_mean', 5.0, 0.0),
  )
  pp = 'whiten', 'kl', 'beta', 'gamma', *clip, 'aggregate', 'baseline'
  numbers = True, 'reward', 0.01, 1.0, 0.2, 0.2, 'token_mean'
  assert words('reinforce_pp', *pp) == (*numbers, 'none')
  assert words('reinforce_pp_baseline', *pp) == (*numbers, group)


def test_every_choice_can_be_changed_by_word_or_by_value():
  numbers = {
    'clip_high': 0.28,
    'epochs': 2,
    'kl': 'forward',
    'beta': 0.04,
    'dual_clip': 3.0,
    'whiten': True,
  }
  by_word = {
    'aggregate': 'token_mean',
    'scale': 'none',
    'baseline': 'ema',
    'loss': 'clip',
  }
  by_value = {
    'aggregate': losses.token_mean,
    'scale': None,
    'baseline': advantages.ema(0.9),
    'loss': losses.clip,
  }
  want = numbers | {
    'clip_low': 0.2,
    'aggregate': 'token_mean',
    'scale': None,
    'baseline': 'ema 0.9',
    'loss': 'clip',
  }
  for changes in (by_word, by_value):
    algorithm = algorithms.grpo(**numbers, **changes)
    words = compose.described(algorithm)
    assert {k: words[k] for k in want} == want
    assert algorithm.kl == ('forward', 0.04)
    assert algorithm.passes.count == 2
    assert set(algorithm.carries) == {'ema_baseline', 'kl_coef', 'reference'}


def test_a_part_that_is_replaced_brings_its_own_numbers():
  found = algorithms.dapo(max_length=10, loss=losses.gspo).settings
  assert (found['clip_low'], found['clip_high']) == (3e-4, 4e-4)
  found = algorithms.ppo(credit=advantages.vtrace).settings
  assert found['gae_lambda'] == 1.0
  assert found['value_clip'] == 0.2  # the critic's, not the credit's


@pytest.mark.parametrize(
  ('make', 'want'),
  [
    (lambda: algorithms.grpo(), Passes()),
    (
      lambda: algorithms.grpo(mini_batches=2, max_update_kl=0.1),
      Passes(1, 2, 0.1, 'sampler'),
    ),
    (lambda: algorithms.ppo(), Passes(4, old_logp='sampler')),
    (
      lambda: algorithms.ppo(recompute_logp=True, critic_warmup_steps=3),
      Passes(4, old_logp='recomputed', critic_warmup_steps=3),
    ),
    (
      lambda: algorithms.a2c(credit='vtrace'),
      Passes(old_logp='recomputed'),
    ),
  ],
)
def test_passes(make, want):
  assert make().passes == want


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: ALIASES['reinforce'](gamma=1.5), r'gamma 1.5 is outside \[0, 1'),
    (lambda: algorithms.ppo(gae_lambda=-0.1), 'gae_lambda -0.1 is outside'),
    (lambda: algorithms.dr_grpo(), 'needs a max_length; give max_length'),
    (lambda: algorithms.grpo(overlong_buffer=2), 'give max_length'),
    (
      lambda: algorithms.grpo(overlong_buffer=9, max_length=4),
      'more than a completion of 4 tokens',
    ),
    (lambda: algorithms.grpo(kl='k1', beta=1.0), 'makes completions longer'),
    (lambda: algorithms.grpo(kl='loss', beta=1.0), 'makes completions longer'),
    (
      lambda: algorithms.grpo(kl='magic', beta=1.0),
      'none of none, reward, reverse, forward',
    ),
    (lambda: algorithms.grpo(kl='reverse'), 'has no effect; pass both'),
    (lambda: algorithms.grpo(beta=0.1), 'has no effect; pass both'),
    (lambda: algorithms.grpo(kl_target=0.1), 'pass --kl and --beta'),
    (lambda: algorithms.grpo(ref_sync_steps=5), 'without a KL'),
    (lambda: algorithms.grpo(max_update_kl=0.1), 'pass --epochs'),
    (
      lambda: algorithms.grpo(importance_cap=2.0, epochs=2),
      'pass --recompute_logp',
    ),
    (lambda: algorithms.rloo(importance_cap=2.0), 'one ratio a sequence'),
    (
      lambda: algorithms.rloo(importance_cap=2.0, importance_mode='token_mask'),
      'pass --importance_mode sequence_truncate',
    ),
    (
      lambda: algorithms.grpo(importance_mode='token_mask'),
      'no effect without weights; pass --importance_cap 2',
    ),
    (
      lambda: algorithms.grpo(importance_cap=2.0, importance_mode='row_mask'),
      "'row_mask' is none of token_truncate, token_mask",
    ),
    (
      lambda: algorithms.rloo(aggregate='token_mean'),
      'pass --aggregation seq_mean_token_sum',
    ),
    (lambda: algorithms.grpo(clip_low=0.0, clip_high=0.0), 'empty'),
    (lambda: algorithms.grpo(clip_low=1.0), 'empty or impossible'),
    (lambda: algorithms.cispo(ratio_floor=5.0), 'empty range'),
    (lambda: algorithms.ppo(dual_clip=0.9), 'must be above 1'),
    (
      lambda: algorithms.dr_grpo(
        max_length=4, multi_objective_aggregation='normalize_then_sum'
      ),
      'dr_grpo has none; pass --scale group_std',
    ),
    (
      lambda: algorithms.grpo(
        baseline='ema', multi_objective_aggregation='normalize_then_sum'
      ),
      'knows their sum alone; pass --baseline group_mean',
    ),
    (
      lambda: algorithms.remax(
        scale='batch_std', multi_objective_aggregation='normalize_then_sum'
      ),
      'knows their sum alone; pass --baseline group_mean',
    ),
    (
      lambda: algorithms.ppo(multi_objective_aggregation='normalize_then_sum'),
      'multi_objective_aggregation has no effect on ppo',
    ),
    (
      lambda: algorithms.grpo(multi_objective_aggregation='normalise_then_sum'),
      'did you mean normalize_then_sum',
    ),
    (
      lambda: algorithms.ppo(
        mask_truncated_completions=True, bootstrap_truncated=True
      ),
      'bootstrap_truncated has no effect on completions',
    ),
    (lambda: algorithms.ppo(credit='returns'), 'needs a baseline'),
    (lambda: algorithms.grpo(baseline=None), 'needs a baseline'),
    (
      lambda: algorithms.reinforce(clip_high=0.28),
      'clip_high has no effect on reinforce',
    ),
    (lambda: algorithms.ppo(baseline='ema'), 'baseline has no effect on ppo'),
    (lambda: algorithms.grpo(value_coef=1.0), 'value_coef has no effect on'),
    (lambda: algorithms.grpo(ratio_cap=2.0), 'ratio_cap has no effect on grpo'),
    (lambda: algorithms.by_name('grppo'), 'did you mean grpo'),
    (lambda: algorithms.grpo(loss='clop'), 'did you mean clip'),
    (lambda: algorithms.grpo(loss='xyz'), 'none of reinforce, clip'),
    (lambda: algorithms.grpo(loss=0.2), r'loss 0.2 is no function'),
    (
      lambda: algorithms.grpo(loss=lambda stats: stats.logp),
      r'needs a stats; .* function of \(stats, trajectory\)',
    ),
  ],
)
def test_choices_that_cannot_be_are_refused_in_one_line(make, message):
  with pytest.raises(ValueError, match=message) as e:
    make()
  assert '\n' not in str(e.value)


def test_leave_one_out_needs_two_samples():
  with pytest.raises(ValueError, match='at least 2 samples'):
    advantages.leave_one_out().apply(
      np.zeros((3, 1, 2)), np.ones((3, 1), bool), {}, None
    )


# --- from the command line ---------------------------------------------------


def made(*argv):
  """The Algorithm of a command line, for completions of 4 tokens."""
  parsed = flags.parse(Settings(), None, 'python -m couplets', list(argv))
  return build.make_algorithm(parsed.settings, build.Own(), 4)


@pytest.mark.parametrize('name', names.ALGORITHMS)
def test_every_alias_is_a_flag(name):
  algorithm = made('--algorithm', name)
  want = compose.described(ALIASES[name](max_length=4))
  assert compose.described(algorithm) == want


def test_every_choice_is_a_flag():
  algorithm = made(
    *('--algorithm', 'grpo', '--clip_high', '0.28', '--epochs', '2'),
    *('--aggregation', 'token_mean', '--scale', 'none', '--kl', 'forward'),
    *('--beta', '0.04', '--dual_clip', '3', '--whiten', 'True'),
    *('--reference_dtype', 'bfloat16', '--baseline', 'ema'),
    *('--ema_decay', '0.5', '--mask_truncated_completions', 'True'),
  )
  words = compose.described(algorithm)
  want = {
    'clip_high': 0.28,
    'clip_low': 0.2,
    'epochs': 2,
    'aggregate': 'token_mean',
    'scale': None,
    'kl': 'forward',
    'beta': 0.04,
    'dual_clip': 3.0,
    'whiten': True,
    'reference_dtype': 'bfloat16',
    'baseline': 'ema 0.5',
    'mask_truncated_completions': True,
    'multi_objective_aggregation': 'sum_then_normalize',
  }
  assert {k: words[k] for k in want} == want
  assert algorithm.kl.form == 'forward'
  assert algorithm.passes.count == 2


def test_several_rewards_are_normalised_by_flag():
  argv = '--multi_objective_aggregation normalize_then_sum --scale batch_std'
  words = compose.described(made('--algorithm', 'grpo', *argv.split()))
  assert words['multi_objective_aggregation'] == 'normalize_then_sum'
  assert words['scale'] == 'batch_std'


def test_the_deviation_of_the_batch_needs_no_group():
  argv = '--baseline ema --scale batch_std --num_generations 1'
  assert made(*argv.split()).min_group == 1


def test_zero_turns_a_limit_off():
  found = made('--algorithm', 'ppo', '--value_clip', '0')
  assert found.settings['value_clip'] is None


def test_one_sample_a_prompt_has_an_average_for_a_baseline():
  algorithm = made('--num_generations', '1')
  assert compose.described(algorithm)['baseline'] == 'ema 0.9'


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ('--baseline leave_one_out --num_generations 1', 'num_generations 2'),
    ('--algorithm grpo --num_generations 1', 'needs 2; pass --num_gener'),
    ('--algorithm dr_grpo --num_generations 1', 'needs 2; pass --num_gener'),
    ('--algorithm rloo --num_generations 1', 'needs 2; pass --num_gener'),
    ('--scale group_std --num_generations 1', 'needs 2; pass --num_gener'),
    ('--algorithm ppo --critic none', 'needs a critic; pass --critic shared'),
    ('--algorithm rloo --aggregation token_mean', 'seq_mean_token_sum'),
    ('--clip_high 0.28', 'clip_high has no effect on reinforce'),
    ('--algorithm ppo --baseline ema', 'baseline has no effect on ppo'),
    ('--algorithm grpo --value_coef 1', 'value_coef has no effect on grpo'),
    ('--critic_learning_rate 1', '--critic_learning_rate has no effect'),
    ('--algorithm grpo --ratio_cap 2', 'ratio_cap has no effect on grpo'),
    ('--algorithm grpo --clip_low 0 --clip_high 0', 'empty'),
    ('--algorithm cispo --ratio_floor 5', 'empty range'),
    ('--algorithm ppo --dual_clip 0.9', 'must be above 1'),
    ('--kl reverse', 'has no effect; pass both'),
    ('--beta 0.1', 'has no effect; pass both'),
    ('--kl_target 0.1', 'pass --kl and --beta'),
    ('--ref_sync_steps 5', 'without a KL'),
    ('--max_update_kl 0.1', 'pass --epochs'),
    ('--importance_cap 2 --epochs 2', 'pass --recompute_logp'),
    ('--algorithm rloo --importance_cap 2', 'one ratio a sequence'),
    ('--importance_mode token_mask', 'pass --importance_cap 2'),
    ('--credit returns --algorithm ppo', 'needs a baseline'),
    ('--algorithm nlpo --top_p 1', 'pass --top_p 0.9'),
    (
      '--multi_objective_aggregation normalize_then_sum',
      'reinforce has none; pass --scale group_std',
    ),
    ('--overlong_buffer 9', 'more than a completion'),
  ],
)
def test_flags_that_cannot_be_are_one_line(argv, message):
  with pytest.raises(ValueError, match=message) as e:
    made(*argv.split())
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ('--gamma 1.5', 'must be in [0, 1]'),
    ('--algorithm ppo --gae_lambda -0.1', 'must be in [0, 1]'),
    ('--clip_low 1', 'must be in [0, 1)'),
    ('--kl k1 --beta 1', 'makes completions longer'),
    ('--kl magic --beta 1', 'none of none, reward, reverse, forward'),
    ('--num_prompts 128 --mini_batches 3', 'pass --num_prompts 129'),
    ('--mini_batches 2 --micro_batch 1024', 'of a mini-batch'),
    ('--max_steps 600 --steps_per_call 7', 'pass --max_steps 602'),
    (
      '--algorithm dapo --dynamic_sampling_rounds 3 --steps_per_call 50',
      '--steps_per_call and --dynamic_sampling_rounds exclude each other',
    ),
  ],
)
def test_flags_that_are_certain_before_jax_are_refused_there(
  capsys, argv, message
):
  with pytest.raises(SystemExit):
    made(*argv.split())
  line = capsys.readouterr().err
  assert message in line
  assert line.count('\n') == 1


# --- parts of one's own ------------------------------------------------------


def sequence(seed=0):
  """Sequence of four chosen tokens: (TokenStats, Trajectory)."""
  rng = np.random.default_rng(seed)
  logp, old, logp_roll, A = rng.normal(size=(4, T)).astype(np.float32)
  mask = jnp.arange(T) < 4
  rollout = Rollout(
    *(None, jnp.zeros(T, int), mask, logp_roll, None, jnp.bool_(True), None)
  )
  trajectory = Trajectory(
    rollout, jnp.zeros(T), jnp.asarray(A), None, None, jnp.asarray(old), None
  )
  return TokenStats(jnp.asarray(logp), jnp.ones(T), None), trajectory


def powered(stats, trajectory, power=2.0):
  """A loss of one's own that returns its numbers alone."""
  ratio = jnp.exp(losses.log_change(stats, trajectory))
  return -trajectory.advantage * ratio**power


def with_its_metric(stats, trajectory, *, power=2.0):
  return powered(stats, trajectory, power), {'power': jnp.float32(power)}


def maker(power=2.0):
  """A maker of a loss: its parameters are choices."""
  return lambda stats, trajectory: powered(stats, trajectory, power)


class Powered:
  def __call__(self, stats, trajectory, power=2.0):
    return powered(stats, trajectory, power)


@pytest.mark.parametrize(
  ('loss', 'word'),
  [
    (powered, 'powered'),
    (with_its_metric, 'with_its_metric'),
    (maker, 'maker'),
    (Powered(), 'Powered'),
    (functools.partial(powered), 'powered'),
  ],
)
def test_own_loss(loss, word):
  stats, trajectory = sequence()
  ratio = np.exp(stats.logp - trajectory.old_logp)
  A, mask = (
    np.asarray(trajectory.advantage),
    np.asarray(trajectory.rollout.mask),
  )
  for changes, power in (({}, 2.0), ({'power': 3.0}, 3.0)):
    algorithm = algorithms.grpo(loss=loss, **changes)
    words = compose.described(algorithm)
    assert (words['loss'], words['power']) == (word, power)
    assert not algorithm.flat_without_advantage
    found, metrics = algorithm.loss(stats, trajectory)
    np.testing.assert_allclose(
      found[mask], (-A * ratio**power)[mask], rtol=1e-5
    )
    if loss is with_its_metric:  # one number of the sequence
      assert np.shape(metrics['power']) == ()
      assert metrics['power'] == power


def test_own_loss_is_weighed_like_any_other():
  stats, trajectory = sequence()
  plain, _ = algorithms.grpo(loss=powered).loss(stats, trajectory)
  weighed = algorithms.grpo(loss=powered, importance_cap=1.5, entropy_coef=0.1)
  found, metrics = weighed.loss(stats, trajectory)
  lag = np.exp(trajectory.old_logp - trajectory.rollout.logp)
  mask = np.asarray(trajectory.rollout.mask)
  want = np.asarray(plain) * np.minimum(lag, 1.5) - 0.1
  np.testing.assert_allclose(found[mask], want[mask], rtol=1e-5)
  np.testing.assert_allclose(
    np.asarray(metrics['importance_weight'])[mask],
    np.minimum(lag, 1.5)[mask],
    rtol=1e-5,
  )


def own_baseline(returns_CxGxT, valid_CxG):
  """The best valid return of a group."""
  best = jnp.where(valid_CxG[:, :, None], returns_CxGxT, -jnp.inf)
  return best.max(1, keepdims=True)


def test_own_baseline_scale_and_aggregation():
  rng = np.random.default_rng(1)
  mask, R = prefixes(rng.integers(1, T + 1, B)), rng.normal(size=B)
  valid = np.arange(B) % 5 != 1
  algorithm = algorithms.grpo(
    baseline=own_baseline,
    scale=lambda whole_CxG, valid_CxG: jnp.full((C, 1), 2.0),
    aggregate=lambda mask, valid, power=2.0: (
      mask / mask.sum(1, keepdims=True) ** power
    ),
    power=0.5,
  )
  assert compose.described(algorithm)['baseline'] == 'own_baseline'
  found = algorithm.advantage(inputs_of(mask, outcomes(mask, R), valid), {})
  best = np.where(valid, R, -np.inf).reshape(C, G).max(1).repeat(G)
  want = np.where(mask & valid[:, None], (R - best)[:, None] / 2, 0)
  np.testing.assert_allclose(found.advantage, want, atol=1e-6)
  weight = algorithm.aggregate(jnp.asarray(mask), jnp.asarray(valid))
  np.testing.assert_allclose(
    weight, mask / np.sqrt(mask.sum(1, keepdims=True)), rtol=1e-6
  )


def test_own_baseline_with_a_carry():
  last = Carry(
    lambda params: jnp.float32(0),
    lambda value, state, metrics: metrics['return_mean'],
  )
  baseline = advantages.Baseline(
    'mean of the batch before',
    lambda returns, valid, carries, greedy: carries['last'][None, None, None],
    {'last': last},
  )
  algorithm = algorithms.reinforce(baseline)
  mask = prefixes([2] * B)
  inputs = inputs_of(mask, outcomes(mask, np.arange(B)))
  out = algorithm.advantage(inputs, {'last': jnp.float32(1.5)})
  np.testing.assert_allclose(out.advantage[:, 0], np.arange(B) - 1.5)
  moved = algorithm.carries['last'].after(None, None, out.metrics)
  assert moved == pytest.approx(np.arange(B).mean())


def test_own_credit():
  mask = prefixes([3] * B)
  inputs = inputs_of(mask, np.ones((B, T)), valid=np.arange(B) != 2)
  double = algorithms.grpo(
    credit=lambda inputs, carries, factor=2.0: factor * inputs.reward + 1
  )
  found = double.advantage(inputs, {}).advantage
  np.testing.assert_array_equal(found, np.where(inputs.mask, 3.0, 0.0))

  def with_target(inputs, carries):
    return Advantage(inputs.reward, inputs.reward)

  critics = (
    algorithms.ppo(credit=with_target),
    algorithms.grpo(credit=with_target, value_coef=0.5),
  )
  for algorithm in critics:
    assert algorithm.value_loss is not None
    assert algorithm.advantage(inputs, {}).value_target is not None
  assert algorithms.grpo(credit=with_target).value_loss is None


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (
      lambda: algorithms.grpo(
        loss=lambda stats, trajectory: stats.logp.sum()
      ).loss(*sequence()),
      r'loss <lambda> gave rank 0.*expected \[T\]',
    ),
    (
      lambda: algorithms.grpo(
        aggregate=lambda mask, valid: jnp.ones(B)
      ).aggregate(jnp.ones((B, T), bool), jnp.ones(B, bool)),
      r'aggregation <lambda> gave rank 1.*expected \[B, T\]',
    ),
    (
      lambda: algorithms.reinforce(lambda returns, valid: 0.0).advantage(
        inputs_of(prefixes([2] * B), np.zeros((B, T))), {}
      ),
      r'baseline <lambda> gave rank 0.*expected \[C, G, T\]',
    ),
    (
      lambda: algorithms.grpo(
        credit=lambda inputs, carries: inputs.reward.sum(1)
      ).advantage(inputs_of(prefixes([2] * B), np.zeros((B, T))), {}),
      r'credit <lambda> gave rank 1.*expected \[B, T\]',
    ),
    (
      lambda: algorithms.ppo(
        credit=lambda inputs, carries: inputs.reward
      ).advantage(inputs_of(prefixes([2] * B), np.zeros((B, T))), {}),
      'gave a critic nothing to learn',
    ),
  ],
)
def test_own_parts_of_another_shape_are_refused_in_one_line(make, message):
  with pytest.raises(ValueError, match=message) as e:
    make()
  assert '\n' not in str(e.value)


# --- carries -----------------------------------------------------------------


def state_after(step, params=None):
  return types.SimpleNamespace(step=jnp.int32(step), params=params)


@pytest.mark.parametrize('kl', [0.0, 0.05, 0.1, 0.11, 3.0])
def test_kl_coefficient_adapts_in_proportion(kl):
  algorithm = algorithms.grpo(
    kl='reverse', beta=0.3, kl_target=0.1, kl_horizon=100.0
  )
  carry = algorithm.carries['kl_coef']
  beta = carry.init(None)
  assert beta == pytest.approx(0.3)
  found = carry.after(beta, None, {'kl': jnp.float32(kl), 'rows': 20})
  want = 0.3 * (1 + np.clip(kl / 0.1 - 1, -0.2, 0.2) * 20 / 100)
  assert found == pytest.approx(want, rel=1e-6)


def test_kl_coefficient_stays_without_a_target():
  carry = algorithms.grpo(kl='reverse', beta=0.3).carries['kl_coef']
  after = carry.after(carry.init(None), None, {'kl': 9.0, 'rows': 20})
  assert after == pytest.approx(0.3)


@pytest.mark.parametrize('every', [0, 1, 3])
def test_reference_follows_every_so_many_updates(every):
  algorithm = algorithms.grpo(
    kl='reverse', beta=0.3, ref_sync_steps=every, reference_dtype='bfloat16'
  )
  carry = algorithm.carries['reference']
  copy = carry.init({'w': jnp.full(2, 1.25)})
  held = 1.25
  for step in range(1, 8):
    copy = carry.after(copy, state_after(step, {'w': jnp.full(2, step)}), {})
    held = step if every and step % every == 0 else held
    assert copy['w'].dtype == jnp.bfloat16
    np.testing.assert_array_equal(copy['w'].astype(jnp.float32), held)


def test_copies_are_of_their_own():
  """The state is donated: a carry may not share the parameters' buffer."""
  params = {'w': jnp.arange(3.0)}
  for carry in (
    algorithms.nlpo().carries['mask_policy'],
    algorithms.reinforce_pp().carries['reference'],
  ):
    copy = carry.init(params)['w']
    assert copy.unsafe_buffer_pointer() != params['w'].unsafe_buffer_pointer()


def test_ema_moves_by_valid_rows_and_only_by_them():
  algorithm = algorithms.reinforce(advantages.ema(0.75))
  ema = algorithm.carries['ema_baseline']
  mask, R = prefixes([2] * B), np.arange(B)
  for valid in (R < 3, R < 0):
    inputs = inputs_of(mask, outcomes(mask, R), valid)
    out = algorithm.advantage(inputs, {'ema_baseline': jnp.float32(2)})
    metrics = out.metrics | {'rows': valid.sum()}  # as the update has it
    moved = ema.after(jnp.float32(2), None, metrics)
    want = 0.75 * 2 + 0.25 * R[valid].mean() if valid.any() else 2
    assert moved == pytest.approx(want)


# --- rows that are not valid, and rows that are cut --------------------------


# advantage of an outcome r among its group's, the others', the batch's
TEXTBOOK = {
  'none': lambda r, group, others, batch, greedy: r,
  'batch_mean': lambda r, group, others, batch, greedy: r - batch.mean(),
  'ema': lambda r, group, others, batch, greedy: r - 0.25,
  'greedy': lambda r, group, others, batch, greedy: r - greedy,
  'group_mean': lambda r, group, others, batch, greedy: r - group.mean(),
  'leave_one_out': lambda r, group, others, batch, greedy: (
    r - others.mean() if len(others) else 0
  ),
  'group_std': lambda r, group, others, batch, greedy: (
    (r - group.mean()) / (group.std(ddof=1) + 1e-4) if len(others) else 0
  ),
  'ema / std': lambda r, group, others, batch, greedy: (
    (r - 0.25) / (group.std(ddof=1) + 1e-4) if len(others) else 0
  ),
}


def numpy_advantage(kind, R, valid, greedy):
  """A [C, G] of outcomes R [C, G], over valid rows only."""
  A = np.zeros((C, G))
  for c, g in zip(*np.nonzero(valid)):
    others = np.delete(R[c], g)[np.delete(valid[c], g)]
    A[c, g] = TEXTBOOK[kind](
      R[c, g], R[c][valid[c]], others, R[valid], greedy[c]
    )
  return A


@functools.cache
def advantage_of(kind, whiten):
  if kind == 'group_std':
    algorithm = algorithms.grpo(whiten=whiten)
  elif kind == 'ema / std':
    algorithm = algorithms.grpo(whiten=whiten, baseline='ema')
  else:
    algorithm = algorithms.reinforce(kind, whiten=whiten)
  return jax.jit(algorithm.advantage)


@pytest.mark.parametrize('whiten', [False, True])
@pytest.mark.parametrize('kind', TEXTBOOK)
@settings(max_examples=25, deadline=None)
@given(bits=st.integers(0, 2**B - 1), seed=st.integers(0, 1000))
def test_rows_that_are_not_valid_are_in_no_statistic(kind, whiten, bits, seed):
  rng = np.random.default_rng(seed)
  valid = np.array([bits >> i & 1 for i in range(B)], bool)
  mask, R = prefixes(rng.integers(1, T + 1, B)), rng.normal(size=B) * 3
  greedy = rng.normal(size=C).astype(np.float32)
  inputs = inputs_of(mask, outcomes(mask, R), valid, greedy=greedy)
  carries = {'ema_baseline': jnp.float32(0.25)}
  found = np.asarray(advantage_of(kind, whiten)(inputs, carries).advantage)
  A = numpy_advantage(kind, R.reshape(C, G), valid.reshape(C, G), greedy)
  on = mask & valid[:, None]
  want = np.where(on, A.reshape(B)[:, None], 0)
  if kind in ('group_mean', 'leave_one_out', 'group_std', 'ema / std'):
    on &= np.repeat(valid.reshape(C, G).sum(1) > 1, G)[:, None]  # compared
  if whiten and on.any():
    spread = want[on].std() if np.ptp(want[on]) > 1e-9 else np.inf
    want = np.where(on, (want - want[on].mean()) / spread, 0)
  near = 2e-4 if whiten else 2e-5
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=near)
  assert (found[~on] == 0).all()


@pytest.mark.parametrize('credit', ['gae', 'vtrace'])
def test_a_cut_row_bootstraps_from_the_state_after_its_last_token(credit):
  """Also where it was cut before the last column, by an observation."""
  mask = np.array(
    [
      [1, 1, 0, 0, 0],  # cut after column 1
      [1, 1, 0, 0, 0],  # ended there
      [1, 0, 1, 1, 1],  # cut at T
      [0, 0, 0, 0, 0],  # cut before it chose a token
    ],
    bool,
  )
  ended = np.array([False, True, False, False])
  value = np.arange(4 * (T + 1), dtype=np.float32).reshape(4, T + 1)
  reward = np.ones((4, T), np.float32)
  inputs = inputs_of(mask, reward, ended=ended, value=jnp.asarray(value))
  gamma = 0.5
  for bootstrap in (True, False):
    algorithm = algorithms.a2c(
      credit=credit, bootstrap_truncated=bootstrap, gamma=gamma, gae_lambda=1.0
    )
    out = algorithm.advantage(inputs, {})
    after = [value[0, 2], 0, value[2, 5], 0] if bootstrap else np.zeros(4)
    for b in range(4):
      togo = after[b]
      for t in np.flatnonzero(mask[b])[::-1]:
        togo = 1 + gamma * togo
        assert out.value_target[b, t] == pytest.approx(togo)
        want = togo - value[b, t]
        assert out.advantage[b, t] == pytest.approx(want, abs=1e-5)


def test_aggregations_count_valid_rows():
  lengths = np.array([1, 3, 5, 2, 0])
  mask, valid = prefixes(lengths), np.array([1, 0, 1, 1, 1], bool)
  loss = np.random.default_rng(0).normal(size=mask.shape)
  sums = (loss * mask).sum(1)[valid]
  want = {
    'token_mean': sums.sum() / 8,
    'seq_mean_token_mean': (sums / np.array([1, 5, 2, 1])).sum() / 4,
    'seq_mean_token_sum': sums.sum() / 4,
    'seq_mean_token_sum_norm': sums.sum() / (4 * 8),
  }
  for word, value in want.items():
    algorithm = algorithms.grpo(aggregate=word, max_length=8)
    weight = np.asarray(algorithm.aggregate(jnp.asarray(mask), valid))
    assert (weight * loss).sum() == pytest.approx(value, abs=1e-6)
    assert (weight[~(mask & valid[:, None])] == 0).all()
    none = algorithm.aggregate(jnp.asarray(mask), np.zeros(5, bool))
    np.testing.assert_array_equal(none, 0)


def test_overlong_penalty_spares_rows_that_are_not_valid():
  algorithm = algorithms.reinforce(
    advantages.no_baseline(), overlong_buffer=2, max_length=T
  )
  mask, valid = prefixes([5, 4, 3, 5]), np.array([1, 1, 1, 0], bool)
  inputs = inputs_of(mask, np.zeros((4, T)), valid)
  found = algorithm.advantage(inputs, {}).advantage
  np.testing.assert_allclose(found[:, 0], [-1, -0.5, 0, 0])
