"""A warm start is a policy, made once for all that begins the same way."""

import jax
import numpy as np
import pytest
from test_train import flags

from experiments import arithmetic, build, launch
from experiments.warm_start import cache_dir, warm_start


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


def test_where_a_critic_is_to_come_the_policy_is_kept(context_of):
  """And read again as it was."""
  context = context_of(
    algorithm='a2c', warm_start_max_steps=1, warm_start_check_every=1
  )
  assert context.policy.value is not None
  begin = context.experiment.flags.warm_start
  with jax.set_mesh(context.mesh):
    made, read = (warm_start(context, begin) for _ in range(2))
  assert 'value_head' not in made
  jax.tree.map(np.testing.assert_array_equal, read, made)


def test_a_cached_one_is_of_the_same_distribution(context_of):
  """Temperature is part of the policy that learned it; what only sampling and
  the updates read is not."""

  def where(**given):
    context = context_of(**given)
    return cache_dir(context, context.experiment.flags.warm_start)

  plain = where()
  assert where(temperature=1.3) != plain
  assert where(algorithm='nlpo', learning_rate=0.1) == plain
