"""Micro-batches by the device's memory, and columns of an update."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, changed, make_rollout, make_scored
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_tok import distribution
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.sharding import make_mesh
from jaxrl_tok.step import memory
from jaxrl_tok.step.programs import (
  Networks,
  bound_update,
  completion_lengths,
)
from jaxrl_tok.types import Prompts, Rollout

GIB = 2**30


def bytes_kept(G=4, T=16, remat='none', **changes) -> int:
  """Bytes a prompt, of shapes alone."""
  C, P, shape = 3, 8, jax.ShapeDtypeStruct
  policy = make_policy(changed(CONFIG, **changes), remat=remat)
  rollout = Rollout(
    Prompts(shape((C, P), jnp.int32), shape((C,), jnp.int32)),
    shape((C * G, T), jnp.int32),
    shape((C * G, T), bool),
    shape((C * G, T), jnp.float32),
    None,
    shape((C * G,), bool),
    shape((C * G,), jnp.int32),
  )
  params = jax.eval_shape(policy.init, jax.random.key(0))
  rule = distribution.make_rule(11, [])
  return memory.bytes_a_prompt(policy, (params, None), rollout, rule)


def test_bytes_grow_with_the_completions_and_the_layers():
  one = bytes_kept()
  assert 1.5 * one < bytes_kept(G=8) < 2 * one
  assert 1.5 * one < bytes_kept(layers=CONFIG.layers * 2) < 2 * one
  assert one > 4 * 16 * CONFIG.d_ff * 4 * CONFIG.num_layers  # one array a block


def test_remat_keeps_less():
  none, dots, full = (
    bytes_kept(remat=remat) for remat in ('none', 'dots', 'full')
  )
  assert full < 0.7 * dots
  assert dots < 0.7 * none


@pytest.mark.parametrize(
  ('prompts', 'most', 'num_shards', 'parts'),
  [
    (8, None, 1, [1, 2, 4, 8]),  # a device that does not say
    (8, 80, 1, [1, 2, 4, 8]),
    (8, 79, 1, [2, 4, 8]),
    (8, 20, 1, [4, 8]),
    (8, 9, 1, [8]),  # one prompt is too large: one prompt
    (6, 20, 1, [3, 6]),
    (8, 20, 2, [2, 4]),  # 4 prompts on 2 devices
    (8, 9, 4, [2]),
  ],
)
def test_parts_that_fit(prompts, most, num_shards, parts):
  assert memory.divisions(prompts, 10, most, num_shards) == parts


def device(platform, **stats):
  return types.SimpleNamespace(
    platform=platform, memory_stats=lambda: stats or None
  )


def test_what_a_pass_may_take():
  gpu = device('gpu', bytes_limit=10 * GIB)
  whole = NamedSharding(make_mesh('data=1', jax.devices()[:1]), PartitionSpec())
  state = jax.ShapeDtypeStruct((GIB,), jnp.float32, sharding=whole)
  assert memory.budget(gpu) == 9 * GIB
  assert memory.budget(gpu, [state]) == 5 * GIB
  assert memory.budget(gpu, [state] * 3) == 0
  assert memory.budget(device('tpu'), [state]) is None
  assert memory.budget(device('cpu'), [state], most=6 * GIB) == 2 * GIB
  assert memory.budget(device('cpu')) == memory.last_cache()
  assert memory.last_cache() >= 2**18


def test_what_fits_an_accelerator():
  def program(temporary):
    sizes = types.SimpleNamespace(
      argument_size_in_bytes=3 * GIB,
      output_size_in_bytes=2 * GIB,
      alias_size_in_bytes=2 * GIB,
      temp_size_in_bytes=temporary,
    )
    return types.SimpleNamespace(memory_analysis=lambda: sizes)

  gpu = device('gpu', bytes_limit=10 * GIB)
  most = memory.limit(gpu)
  assert memory.fits(program(6 * GIB), most)
  assert not memory.fits(program(7 * GIB), most)
  assert memory.limit(device('cpu', bytes_limit=GIB)) is None
  assert memory.fits(program(7 * GIB), None)


def test_the_first_program_that_fits_is_taken():
  """Programs that the compiler refuses for their size are passed over."""
  most = 9

  def function(need, fault=None):
    def compile(options=None):
      if fault:
        raise jax.errors.JaxRuntimeError(fault)
      names = 'argument', 'output', 'alias', 'temp'
      sizes = {f'{name}_size_in_bytes': 0 for name in names}
      sizes['temp_size_in_bytes'] = need
      found = types.SimpleNamespace(**sizes)
      return types.SimpleNamespace(
        need=need, options=options, memory_analysis=lambda: found
      )

    return types.SimpleNamespace(
      lower=lambda: types.SimpleNamespace(compile=compile)
    )

  full = function(40, 'RESOURCE_EXHAUSTED: out of memory')
  wrong = function(1, 'another fault')
  some = [full, function(20), function(8), wrong]  # which is not compiled
  assert memory.first_that_fits(some, (), most).need == 8
  assert memory.first_that_fits([full, function(20)], (), most).need == 20
  for functions in (some, [full, function(20)]):
    options = memory.first_that_fits(functions, (), most, {'level': 1}).options
    assert options == {'level': 1}
  with pytest.raises(jax.errors.JaxRuntimeError, match='another fault'):
    memory.first_that_fits([wrong, *some], (), most)


def test_ways_with_fewer_gathers_or_less_recomputation_first():
  found = {'none': [4, 8], 'full': [1, 2, 4]}
  assert memory.in_order(found, by_parts=False)[0] == ('none', 4)
  by_parts = memory.in_order(found, by_parts=True)
  assert by_parts[:3] == [('full', 1), ('full', 2), ('none', 4)]
  assert len(by_parts) == 5


def masks(*rows):
  """Masks [B, 16] of the chosen columns of each row."""
  return np.array([np.isin(np.arange(16), row) for row in rows])


@pytest.mark.parametrize(
  ('mask', 'T'),
  [
    (masks([]), 4),
    (masks([0]), 4),
    (masks([0, 1, 2, 3], [0]), 4),
    (masks([0], [0, 1, 2, 3, 4]), 8),
    (masks(range(16)), 16),
    (masks([0, 1, 12]), 16),  # two turns, and what was observed between them
    (masks([0, 7], [0, 1]), 8),
  ],
)
@pytest.mark.parametrize('P', [2, 3])
def test_an_update_pays_for_the_last_turn(mask, T, P):
  """The program of the batch's prompt length and the fewest columns."""

  def program(P, T):
    return lambda state, scored, rule: (state, {'of': (P, T)}, scored.reward)

  updates = {(p, t): program(p, t) for p in (3, 2) for t in (8, 4, 16)}
  prompts = Prompts(np.ones((len(mask), P), np.int32), np.ones(len(mask)))
  scored = make_scored(make_rollout(prompts, mask, mask), 1.0 * mask)
  networks = Networks(None, None, None, None)
  _, metrics, last = bound_update(networks, updates)(None, scored)
  assert metrics['of'] == (P, T)
  np.testing.assert_array_equal(last.advantage, mask)
  assert last.scored is scored


@pytest.mark.parametrize(
  ('T', 'count', 'lengths'),
  [
    (6, 2, [6]),
    (63, 2, [63]),
    (64, 2, [32, 64]),
    (64, 3, [32, 64]),
    (129, 3, [33, 65, 129]),
    (512, 1, [512]),
    (512, 2, [256, 512]),
  ],
)
def test_completion_lengths_an_update(T, count, lengths):
  assert completion_lengths(T, count) == lengths
