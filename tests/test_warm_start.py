"""A warm start is a policy, made once for all that begins the same way."""

import dataclasses

import jax
import numpy as np
import pytest
from test_train import flags as tiny

from experiments import arithmetic
from jaxrl_tok import data, environments
from jaxrl_tok.run import cache, flags, warm_start
from jaxrl_tok.run.build import Own
from jaxrl_tok.run.prepare import prepare
from jaxrl_tok.run.settings import Settings
from jaxrl_tok.run.task import Caller, Task

pytestmark = pytest.mark.usefixtures('one_device', 'few_programs')


@pytest.fixture
def setup_of(tmp_path, monkeypatch):
  """Fixture setup_of(flag=value ...) of arithmetic, with its own cache."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))

  def make(**given):
    argv = tiny(tmp_path / 'run', num_problems=50, **given)
    found = flags.parse(Settings(), arithmetic.arithmetic, 'x', argv)
    task = arithmetic.arithmetic(**found.own)
    return prepare(
      task, found.settings, Own(), Caller('arithmetic', 'x'), found.own
    )

  return make


def test_where_a_critic_is_to_come_the_policy_is_kept(setup_of, capsys):
  """Policies are read again as they were."""
  setup = setup_of(
    algorithm='a2c', warm_start_max_steps=1, warm_start_check_every=1
  )
  assert setup.policy.value is not None
  with jax.set_mesh(setup.mesh):
    made = warm_start.warm_start(setup)
    assert 'supervised start: 1 steps' in capsys.readouterr().out
    read = warm_start.warm_start(setup)
  said = capsys.readouterr().out
  assert said.startswith('supervised start from ')
  assert 'steps' not in said  # nothing is learnt again
  assert 'value_head' not in made
  jax.tree.map(np.testing.assert_array_equal, read, made)


def test_a_slow_copy_begins_with_the_updates(setup_of):
  """NLPO's policy is two; the start is the one that any algorithm has."""
  given = {'warm_start_max_steps': 1, 'warm_start_check_every': 1}
  made = []
  for algorithm in ('nlpo', 'ppo'):
    setup = setup_of(algorithm=algorithm, top_p=0.9, **given)
    with jax.set_mesh(setup.mesh):
      made.append(warm_start.learn(setup)[0])
  jax.tree.map(np.testing.assert_array_equal, *made)


def endless(answer):
  """Setup of endless records whose answers are `answer`(index)."""

  def record(seed, index):
    found = {'prompt': f'{index}=', 'answer': answer(index)}
    return {k: v for k, v in found.items() if v is not None}

  def right(completions, answer):
    return [float(c == a) for c, a in zip(completions, answer)]

  settings = flags.settings_of(
    {
      'd_model': 16,
      'num_heads': 2,
      'num_kv_heads': 1,
      'd_ff': 16,
      'held_out': 4,
      'max_completion_length': 4,
      'warm_start_batch_size': 8,
      'warm_start_max_steps': 2,
    }
  )
  task = Task(record, right, answers='answer')
  return prepare(task, settings, Own(), Caller('endless', 'x'), {})


def test_endless_records_are_learnt_and_kept(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  setup = endless(lambda i: str(i % 100))
  with jax.set_mesh(setup.mesh):
    made = warm_start.warm_start(setup)
    read = warm_start.warm_start(setup)
  jax.tree.map(np.testing.assert_array_equal, read, made)
  assert warm_start.cache_dir(setup).is_dir()


@pytest.mark.parametrize(
  ('later', 'fact'),
  [
    (None, "the record of prompt '3=' has no 'answer' that is text"),
    ('12345', 'cannot hold the answer .*; pass --max_completion_length 6'),
  ],
)
def test_an_endless_answer_that_cannot_be_learnt_is_named(later, fact):
  setup = endless(lambda i: later if i == 3 else 'a')
  with (
    jax.set_mesh(setup.mesh),
    pytest.raises(ValueError, match=fact) as refused,
  ):
    warm_start.batch_at(setup, 0)
  assert '\n' not in str(refused.value)


def test_batches_are_shared_by_the_devices(setup_of, all_devices):
  with pytest.raises(ValueError, match='pass --warm_start_batch_size 16'):
    setup_of(warm_start_batch_size=9)


def test_a_damaged_one_is_made_anew(setup_of, capsys):
  setup = setup_of(warm_start_max_steps=1, warm_start_check_every=1)
  with jax.set_mesh(setup.mesh):
    made = warm_start.warm_start(setup)
    (weights,) = warm_start.cache_dir(setup).glob('*.safetensors')
    weights.write_bytes(weights.read_bytes()[:100])
    again = warm_start.warm_start(setup)
  assert 'the supervised start is made anew' in capsys.readouterr().out
  jax.tree.map(np.testing.assert_array_equal, again, made)


def test_a_cached_one_is_of_the_same_distribution(setup_of):
  """Temperature is part of the policy that learned it; what only sampling and
  the updates read is not."""

  def where(**given):
    return warm_start.cache_dir(setup_of(**given))

  plain = where()
  assert where() == plain
  assert where(temperature=1.3) != plain
  assert where(seed=1) != plain
  assert where(warm_start_learning_rate=0.5) != plain
  assert where(algorithm='nlpo', learning_rate=0.1) == plain


def test_a_cached_one_is_of_the_same_tokenizer(setup_of):
  """Two with equally many ids give the same text other ids."""
  setup = setup_of()
  found = set()
  for texts in (['ab ab', 'ab'], ['ba ba', 'ba']):
    model = setup.model._replace(tokenizer=data.bpe_tokenizer(texts, 259))
    found.add(warm_start.cache_dir(setup._replace(model=model)))
  assert len(model.tokenizer) == 259
  assert len(found) == 2


def test_a_cached_one_is_of_turns_of_the_same_length(setup_of):
  """A demonstrated turn is cut at its length."""
  setup = setup_of()
  task = dataclasses.replace(setup.task, environment=environments.maze())
  found = set()
  for length in (1, 2, 2):
    config = dataclasses.replace(setup.config, turn_length=length)
    played = setup._replace(task=task, world=..., config=config)
    found.add(warm_start.cache_dir(played))
  assert len(found) == 2


def test_what_cannot_be_kept_is_a_warning(setup_of, tmp_path, capsys):
  where = tmp_path / 'file' / 'warm'
  where.parent.write_text('no directory')
  warm_start.save_start(setup_of(), {}, where)
  assert 'the supervised start cannot be kept' in capsys.readouterr().out


def test_another_run_may_be_first(setup_of, tmp_path):
  """Warm start of the first run stays, and nothing is left over."""
  setup = setup_of()
  params = jax.jit(setup.policy.init)(jax.random.key(0))
  where = tmp_path / 'kept' / 'warm'
  where.mkdir(parents=True)
  (where / 'first').touch()
  warm_start.save_start(setup, params, where)
  assert [p.name for p in where.parent.iterdir()] == ['warm']
  assert (where / 'first').exists()


@pytest.fixture
def no_programs(monkeypatch):
  """Leaves out the directory of compiled programs, as users begin."""
  names = (
    'jax_compilation_cache_dir',
    'jax_persistent_cache_min_compile_time_secs',
  )
  kept = {name: getattr(jax.config, name) for name in names}
  jax.config.update(names[0], None)
  yield
  for name, value in kept.items():
    jax.config.update(name, value)


def test_programs_are_kept_by_version_and_processor(
  no_programs, tmp_path, monkeypatch
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  cache.keep_programs()
  (place,) = (tmp_path / 'jaxrl_tok' / 'programs').iterdir()
  assert jax.config.jax_compilation_cache_dir == str(place)
  assert place.name.startswith(jax.__version__)
  assert place.stat().st_mode & 0o077 == 0
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'other'))
  cache.keep_programs()  # a place that was named is kept
  assert jax.config.jax_compilation_cache_dir == str(place)


def test_a_home_that_cannot_be_written_keeps_none(
  no_programs, tmp_path, monkeypatch
):
  (tmp_path / 'file').touch()
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  cache.keep_programs()
  assert jax.config.jax_compilation_cache_dir is None
