"""A warm start is a policy, made once for all that begins the same way."""

import jax
import numpy as np
import pytest
from test_train import flags

from experiments import arithmetic
from jaxrl_tok.run import build, cache, launch
from jaxrl_tok.run import warm_start as module


@pytest.fixture
def context_of(tmp_path, monkeypatch):
  """context_of(flag=value ...) of arithmetic, with a cache of its own."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))

  def prepare(**given):
    seen = []
    monkeypatch.setattr(launch, 'run', seen.append)
    arithmetic.main(flags(tmp_path / 'run', num_problems=50, **given))
    return launch.prepare(seen[0], build.make_algorithm(seen[0].flags))

  return prepare


def test_where_a_critic_is_to_come_the_policy_is_kept(context_of, monkeypatch):
  """And read again as it was."""
  context = context_of(
    algorithm='a2c', warm_start_max_steps=1, warm_start_check_every=1
  )
  assert context.policy.value is not None
  begin = context.experiment.flags.warm_start
  with jax.set_mesh(context.mesh):
    made = module.warm_start(context, begin)
    monkeypatch.setattr(module, 'learn', None)  # nothing is learnt again
    read = module.warm_start(context, begin)
  assert 'value_head' not in made
  jax.tree.map(np.testing.assert_array_equal, read, made)


def test_a_cached_one_is_of_the_same_distribution(context_of):
  """Temperature is part of the policy that learned it; what only sampling and
  the updates read is not."""

  def where(**given):
    context = context_of(**given)
    return module.cache_dir(context, context.experiment.flags.warm_start)

  plain = where()
  assert where(temperature=1.3) != plain
  assert where(algorithm='nlpo', learning_rate=0.1) == plain


def test_what_cannot_be_kept_is_a_warning(context_of, tmp_path, capsys):
  context = context_of()
  where = tmp_path / 'file' / 'warm'
  where.parent.write_text('no directory')
  module.keep(context, {}, where)
  assert 'the warm start cannot be kept' in capsys.readouterr().out


def test_another_run_may_be_first(context_of, tmp_path):
  """Its warm start stays, and nothing is left over."""
  context = context_of()
  params = jax.jit(context.policy.init)(jax.random.key(0))
  where = tmp_path / 'kept' / 'warm'
  where.mkdir(parents=True)
  (where / 'first').touch()
  module.keep(context, params, where)
  assert [p.name for p in where.parent.iterdir()] == ['warm']
  assert (where / 'first').exists()


@pytest.fixture
def no_programs(monkeypatch):
  """As users begin: no directory of programs was named."""
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
