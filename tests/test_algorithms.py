"""Aliases and their choices: what is resolved, and what is refused."""

import numpy as np
import pytest

from experiments import arithmetic
from jaxrl_tok.credit import advantages, algorithms, losses
from jaxrl_tok.run import build
from jaxrl_tok.run import settings as flag_layer

ALIASES = build.ALGORITHMS


def made(*argv):
  """The Algorithm of a command line of experiments.arithmetic."""
  flags = flag_layer.parse(
    arithmetic.DEFAULTS, 'python -m experiments.arithmetic', list(argv)
  )
  return build.make_algorithm(flag_layer.fit_completion_length(flags, ['123']))


@pytest.mark.parametrize('name', ALIASES)
def test_every_alias_is_a_flag_and_says_what_it_is_made_of(name):
  algorithm = made('--algorithm', name)
  assert algorithm.name == name
  said = algorithms.described(algorithm)
  assert said['max_length'] == 4
  assert all(
    v is None or isinstance(v, str | int | float | bool) for v in said.values()
  )
  assert 'arXiv' in ALIASES[name].__doc__


def test_the_presets_are_those_of_their_papers():
  """The table of the design, by the words of --print_config."""

  def words(name, *fields):
    said = algorithms.described(ALIASES[name](max_length=10))
    return tuple(said.get(field) for field in fields)

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


def test_every_choice_can_be_changed():
  algorithm = made(
    *('--algorithm', 'grpo', '--clip_high', '0.28', '--epochs', '2'),
    *('--aggregation', 'token_mean', '--scale', 'none', '--kl', 'forward'),
    *('--beta', '0.04', '--dual_clip', '3', '--whiten', 'True'),
  )
  said = algorithms.described(algorithm)
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
  }
  assert {k: said[k] for k in want} == want
  assert algorithm.kl.form == 'forward'
  assert algorithm.passes == 2


def test_a_part_that_is_replaced_brings_its_own_numbers():
  found = algorithms.dapo(max_length=10, loss=losses.gspo).settings
  assert (found['clip_low'], found['clip_high']) == (3e-4, 4e-4)
  found = algorithms.ppo(credit=advantages.vtrace).settings
  assert found['gae_lambda'] == 1.0
  assert found['value_clip'] == 0.2  # the critic's, not the credit's


def test_zero_turns_a_limit_off():
  assert (
    made('--algorithm', 'ppo', '--value_clip', '0').settings['value_clip']
    is None
  )


def test_one_sample_a_prompt_has_an_average_for_a_baseline():
  algorithm = made('--num_generations', '1')
  assert algorithms.described(algorithm)['baseline'] == 'ema 0.9'


@pytest.mark.parametrize(
  ('argv', 'said'),
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
    ('--credit returns --algorithm ppo', 'needs a baseline'),
    ('--algorithm nlpo --top_p 1', 'pass --top_p 0.9'),
    ('--overlong_buffer 9', 'more than a completion'),
  ],
)
def test_what_cannot_be_is_one_line(argv, said):
  with pytest.raises(ValueError, match=said) as e:
    made(*argv.split())
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  ('argv', 'said'),
  [
    ('--gamma 1.5', 'must be in [0, 1]'),
    ('--algorithm ppo --gae_lambda -0.1', 'must be in [0, 1]'),
    ('--clip_low 1', 'must be in [0, 1)'),
    ('--kl k1 --beta 1', 'gradient of exactly 0'),
    ('--kl magic --beta 1', 'none of none, reward, reverse, forward'),
    ('--mini_batches 3', 'pass --num_prompts 129'),
    ('--mini_batches 2 --micro_batch 1024', 'of a mini-batch'),
    ('--steps_per_call 7', 'pass --max_steps 602'),
    (
      '--algorithm dapo --dynamic_sampling_rounds 3 --steps_per_call 50',
      'pass --dynamic_sampling_rounds 0',
    ),
  ],
)
def test_what_is_certain_before_jax_is_refused_there(capsys, argv, said):
  with pytest.raises(SystemExit):
    made(*argv.split())
  line = capsys.readouterr().err
  assert said in line
  assert line.count('\n') == 1


def test_python_callers_are_told_the_same():
  with pytest.raises(ValueError, match='at least 2 samples'):
    advantages.leave_one_out().apply(np.zeros((3, 1, 2)), (), None)
  with pytest.raises(ValueError, match='outside'):
    algorithms.reinforce(gamma=1.5)
  with pytest.raises(ValueError, match='give max_length'):
    algorithms.dr_grpo()
  with pytest.raises(ValueError, match='gradient of exactly 0'):
    algorithms.reinforce(kl='k1', beta=1.0)
