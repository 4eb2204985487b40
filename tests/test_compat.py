"""Tables of --compat build an algorithm and give way to typed flags; each trap
is named once."""

import pytest

from experiments import arithmetic
from jaxrl_tok.credit import algorithms
from jaxrl_tok.credit.names import ALGORITHMS
from jaxrl_tok.run import build, compat, flags
from jaxrl_tok.run.optimizer import make_optimizer
from jaxrl_tok.run.settings import Settings, flatten

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
  found, typed = algorithms.described(algorithm_made), flatten(settings)
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
  assert rloo['loss'].__name__ == 'sequence_clip'
  assert found['trl', 'rloo'].kl.form == 'reward'
  assert (verl['gae_lambda'], verl['dual_clip'], verl['beta']) == (1.0, 3.0, 0)
  assert found['verl', 'ppo'].kl is None
  assert found['verl', 'ppo'].passes.count == 4


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
