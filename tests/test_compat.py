"""Tables of --compat build an algorithm and give way to typed flags; each trap
is named once."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import advantage_inputs, make_rollout, random_prompts

from experiments import arithmetic
from jaxrl_tok import masked
from jaxrl_tok.credit import compose
from jaxrl_tok.credit.names import ALGORITHMS
from jaxrl_tok.run import build, compat, flags
from jaxrl_tok.run.optimizer import make_optimizer
from jaxrl_tok.run.settings import Settings, flatten
from jaxrl_tok.step.optimizer import make_schedule

ENTRIES = [(s, a) for s, table in compat.DEFAULTS.items() for a in table]
# a flag whose choice has another name
CHOICES = {'aggregation': 'aggregate'}


def parse(*argv):
  return flags.parse(Settings(), None, 'x', list(argv)).settings


def given(system, algorithm, *argv):
  return parse('--compat', system, '--algorithm', algorithm, *argv)


def warnings(*argv):
  return compat.warnings(flatten(given(*argv)))


def made(settings: Settings):
  return build.make_algorithm(settings, build.Own(), 20)


def refusal(capsys, *argv) -> str:
  with pytest.raises(SystemExit) as exited:
    parse(*argv)
  assert exited.value.code == 2
  said = capsys.readouterr().err
  assert said.startswith('error: ')
  assert said.count('\n') == 1
  return said


# --- the tables


@pytest.mark.parametrize(('system', 'algorithm'), ENTRIES)
def test_every_default_arrives(system, algorithm):
  settings = given(system, algorithm)
  algorithm_made = made(settings)
  make_optimizer(settings, build.Own(), algorithm_made)
  found, typed = compose.described(algorithm_made), flatten(settings)
  choices = build.choices_of(settings)
  for name, value in compat.DEFAULTS[system][algorithm].items():
    assert typed[name] == value
    name = CHOICES.get(name, name)
    if name in found:
      assert found[name] == (
        None if name == 'scale' and value == 'none' else value
      )
    else:  # of another group
      assert name not in choices
  assert settings.model == Settings().model
  assert settings.run == Settings().run


def test_the_tables_are_of_known_systems_algorithms_and_flags():
  names = flatten(Settings())
  assert set(compat.DEFAULTS) == set(compat.SYSTEMS)
  for system, algorithm in ENTRIES:
    assert algorithm in ALGORITHMS
    assert compat.DEFAULTS[system][algorithm].keys() <= names.keys()
  for table in (compat.TRAPS, compat.DIFFERS):
    for key, lines in table.items():
      system, algorithm = key
      for said in lines:
        assert set(said.flags) <= compat.DEFAULTS[system][algorithm].keys()
        assert '\n' not in said.line


def test_numbers_as_published():
  found = {
    key: made(given(*key))
    for key in (('trl', 'ppo'), ('trl', 'rloo'), ('verl', 'ppo'))
  }
  trl, rloo, verl = (x.settings for x in found.values())
  # 0.1 times a half; value_coef has no half
  assert (trl['gae_lambda'], trl['epochs'], trl['value_coef']) == (
    0.95,
    4,
    0.05,
  )
  assert found['trl', 'ppo'].passes.old_logp == 'sampler'
  assert given('trl', 'ppo').optimizer.max_grad_norm == 0
  assert given('verl', 'dapo').optimizer.weight_decay_all
  assert rloo['loss'].__name__ == 'sequence_clip'
  assert found['trl', 'rloo'].kl.form == 'reward'
  assert (verl['gae_lambda'], verl['dual_clip'], verl['beta']) == (1.0, 3.0, 0)
  assert found['verl', 'ppo'].kl is None
  assert found['verl', 'ppo'].passes.count == 4


# --- formulas of others, written again in NumPy, and ours


def rewards_of(R, T=3):
  """AdvantageInputs of outcomes R [C, G]: the completion's length varies."""
  C, G = R.shape
  lengths = 1 + np.arange(C * G) % T
  mask = np.arange(T)[None] < lengths[:, None]
  rollout = make_rollout(random_prompts(C), np.ones((C * G, T)), mask)
  last = np.asarray(masked.last_chosen(jnp.asarray(mask)))
  return advantage_inputs(rollout, np.where(last, R.reshape(-1, 1), 0)), mask


def advantage_of(settings: Settings, R):
  inputs, mask = rewards_of(R)
  advantage = made(settings).advantage(inputs, {}).advantage
  return np.asarray(advantage), mask


OUTCOMES = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)


@pytest.mark.parametrize(
  ('system', 'algorithm', 'flags', 'formula'),
  [
    (
      'trl',
      'grpo',
      ['--scale=batch_std'],
      lambda R, centred, spread: centred / (R.std(ddof=1) + 1e-4),
    ),
    (
      'trl',
      'dr_grpo',
      [],
      lambda R, centred, spread: centred / (spread + 1e-4),
    ),
    ('verl', 'dr_grpo', [], lambda R, centred, spread: centred),
    ('verl', 'rloo', [], lambda R, centred, spread: centred * 5 / 4),
    ('verl', 'grpo', [], lambda R, centred, spread: centred / (spread + 1e-6)),
    (
      'openrlhf',
      'grpo',
      ['--kl=none'],
      lambda R, centred, spread: centred / (spread + 1e-9),
    ),
  ],
)
def test_advantages_are_theirs(system, algorithm, flags, formula):
  """Up to the printed difference of what is added to a standard deviation."""
  argv = f'--num_generations={OUTCOMES.shape[1]}', *flags
  found, mask = advantage_of(given(system, algorithm, *argv), OUTCOMES)
  spread = OUTCOMES.std(1, ddof=1, keepdims=True)
  centred = OUTCOMES - OUTCOMES.mean(1, keepdims=True)
  want = np.where(mask, formula(OUTCOMES, centred, spread).reshape(-1, 1), 0)
  np.testing.assert_allclose(found, want, rtol=3e-4, atol=1e-5)


def test_whitening_differs_as_it_is_said():
  """TRL, verl, Tunix: (x - mean) rsqrt(var_(n-1) + 1e-8)."""
  lone = OUTCOMES.reshape(-1, 1)
  found, mask = advantage_of(given('verl', 'reinforce_pp'), lone)
  x = np.repeat(lone, mask.shape[1], 1)[mask].astype(np.float64)
  theirs = (x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-8)
  n = len(x)
  np.testing.assert_allclose(
    found[mask], theirs * np.sqrt(n / (n - 1)), rtol=1e-4, atol=1e-5
  )


def test_sums_over_longest_completions_are_divided_by_both():
  """verl since 0.7.1: sum over tokens / sequences that have one / length."""
  mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
  loss = np.arange(12.0).reshape(3, 4)
  settings = given('verl', 'dr_grpo', '--max_completion_length=4')
  aggregate = build.make_algorithm(settings, build.Own(), 4).aggregate
  weight = aggregate(jnp.asarray(mask), jnp.asarray(mask.any(1)))
  want = (loss * mask).sum() / 2 / 4
  assert float((weight * loss).sum()) == pytest.approx(want)


def schedule(settings: Settings, steps: int) -> list[float]:
  """Learning rates of a run's optimizer steps, as shares of the peak."""
  f = settings.optimizer
  rate = make_schedule(f.lr_schedule, 1.0, steps, 0, f.min_lr_ratio)
  return [float(rate(i)) for i in range(steps)]


def test_learning_rates_are_theirs():
  """transformers' linear, and its cosine_with_min_lr of OpenRLHF."""
  trl, open_rlhf = given('trl', 'grpo'), given('openrlhf', 'grpo')
  share = np.arange(8) / 8
  np.testing.assert_allclose(schedule(trl, 8), 1 - share, atol=1e-6)
  cosine = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * share))
  np.testing.assert_allclose(schedule(open_rlhf, 8), cosine, atol=1e-6)


# --- what the user types


def test_without_compat_nothing_changes():
  plain = flatten(Settings())
  assert flatten(parse()) == plain
  assert compat.defaults(plain) == {}
  assert compat.warnings(plain) == []


def test_typed_flags_win():
  argv = '--learning_rate 0.001 --clip_high 0.28 --num_generations 4 --beta 0'
  found = flatten(given('openrlhf', 'grpo', *argv.split(), '--kl=none'))
  assert found['learning_rate'] == 0.001
  assert found['clip_high'] == 0.28
  assert found['num_generations'] == 4
  assert (found['kl'], found['beta']) == ('none', 0)
  assert found['clip_low'] == 0.2
  assert found['lr_schedule'] == 'cosine'
  early = parse('--seed=1', '--beta=0.1', '--compat=trl', '--algorithm=rloo')
  assert (early.algorithm.kl, early.algorithm.beta) == ('reward', 0.1)


def test_a_part_that_is_replaced_brings_its_own_numbers():
  gspo = given('verl', 'grpo', '--loss=gspo')
  assert made(gspo).settings['clip_low'] == 3e-4
  vtrace = given('verl', 'ppo', '--credit=vtrace')
  assert made(vtrace).settings['value_coef'] == 0.5
  kept = given('verl', 'ppo', '--credit=gae', '--loss=clip')
  assert made(kept).settings['gae_lambda'] == 1.0
  no_kl = given('openrlhf', 'grpo', '--kl=none')
  assert made(no_kl).kl is None


@pytest.mark.parametrize(
  ('system', 'algorithm'), [('trl', 'reinforce'), ('tunix', 'cispo')]
)
def test_what_is_not_known_is_refused(capsys, system, algorithm):
  argv = '--compat', system, '--algorithm', algorithm
  line = refusal(capsys, *argv)
  assert f'--compat {system} has no defaults for {algorithm}' in line
  for known in compat.DEFAULTS[system]:
    assert known in line


# --- what is said


SEVERAL = '--mini_batches=2'
SAID_WHEN = [
  # a line's words, system, algorithm, flags that show it and that do not
  ('once a rollout', 'trl', 'ppo', [], ['--lr_schedule=constant']),
  ('once a rollout', 'trl', 'ppo', [], ['--epochs=1']),
  ('once a rollout', 'verl', 'dapo', [], ['--lr_warmup_steps=0']),
  ('its rate is 0', 'verl', 'dapo', [], ['--lr_warmup_steps=0']),
  ('not at all', 'trl', 'grpo', [SEVERAL], []),
  ('-20 and 20', 'tunix', 'grpo', [SEVERAL], []),
  ('mean at 10', 'verl', 'grpo', [], ['--mini_batches=1']),
  ('summed into one score', 'verl', 'rloo', [], None),
  ('order of the data', 'verl', 'ppo', [], ['--mini_batches=1']),
  ('max_grad_norm has no', 'trl', 'ppo', [], ['--max_grad_norm=1']),
  ('since then by both', 'verl', 'dr_grpo', [], ['--aggregation=token_mean']),
  ('[-10, 10] both', 'openrlhf', 'ppo', [], None),
  ('3 % of the steps', 'openrlhf', 'ppo', [], ['--lr_warmup_steps=2']),
  ('KL of its group', 'openrlhf', 'grpo', [], ['--kl=none']),
  ('sequence_mask', 'trl', 'grpo', [], ['--importance_cap=3']),
]


@pytest.mark.parametrize(
  ('words', 'system', 'algorithm', 'shown', 'hidden'), SAID_WHEN
)
def test_a_difference_is_said_where_there_is_one(
  words, system, algorithm, shown, hidden
):
  assert sum(words in x for x in warnings(system, algorithm, *shown)) == 1
  if hidden is not None:
    assert not any(words in x for x in warnings(system, algorithm, *hidden))


def test_a_trap_is_silent_where_the_user_left_it():
  (line,) = (x for x in warnings('trl', 'dr_grpo') if 'scale_rewards' in x)
  assert line.startswith('TRL ')
  left = warnings('trl', 'dr_grpo', '--scale', 'none')
  assert not any('scale_rewards' in x for x in left)
  meant = '--kl', 'reverse', '--beta', '0.04'
  for algorithm, effect in (
    ('grpo', 'makes completions longer'),
    ('rloo', 'makes completions longer'),
    ('dr_grpo', 'an expected gradient of 0'),
  ):
    assert any(effect in x for x in warnings('tunix', algorithm))
    assert not any('k1' in x for x in warnings('tunix', algorithm, *meant))


@pytest.mark.parametrize('system', compat.SYSTEMS)
def test_whole_vocabularies_are_named_where_sampling_cuts(system):
  found = flatten(given(system, 'grpo'))
  assert not any('whole vocabulary' in x for x in compat.warnings(found))
  for cut in ({'top_p': 0.9}, {'top_k': 5}, {'min_p': 0.1}):
    said = [x for x in compat.warnings(found | cut) if 'whole vocabulary' in x]
    assert len(said) == 1


def test_print_config_says_each_trap_once(capsys):
  argv = ['--compat=tunix', '--algorithm=ppo', '--top_p=0.9', '--print_config']
  arithmetic.run([*argv, '--num_problems=50', '--held_out=8'])
  said = capsys.readouterr().out
  lines = warnings('tunix', 'ppo', '--top_p=0.9')
  assert len(lines) == 5
  for line in lines:
    assert said.count(f'warning: {line}\n') == 1
  assert 'compat: tunix' in said
  assert 'value_clip: 0.2' in said
