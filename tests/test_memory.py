"""How large a pass of the gradient is, and how many columns it pays for."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, changed
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_tok import distribution
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.sharding import make_mesh
from jaxrl_tok.step import memory
from jaxrl_tok.step.programs import lengths_of
from jaxrl_tok.train import update_for
from jaxrl_tok.types import Prompts, Rollout

GIB = 2**30


def kept(G=4, T=16, remat='none', **changes) -> int:
  """Bytes a prompt, of shapes alone."""
  C, P, shape = 3, 8, jax.ShapeDtypeStruct
  policy = make_policy(changed(CONFIG, **changes), remat=remat)
  rollout = Rollout(
    Prompts(shape((C, P), jnp.int32), shape((C,), jnp.int32)),
    shape((C * G, T), jnp.int32),
    shape((C * G, T), bool),
    shape((C * G, T), jnp.float32),
    None,
  )
  params = jax.eval_shape(policy.init, jax.random.key(0))
  rule = distribution.make_rule(11, [])
  return memory.bytes_a_prompt(policy, (params, None), rollout, rule)


def test_bytes_grow_with_the_completions_and_the_layers():
  one = kept()
  assert 1.5 * one < kept(G=8) < 2 * one
  assert 1.5 * one < kept(layers=CONFIG.layers * 2) < 2 * one
  assert one > 4 * 16 * CONFIG.d_ff * 4 * CONFIG.num_layers  # one array a block


def test_remat_keeps_less():
  none, dots, full = (kept(remat=remat) for remat in ('none', 'dots', 'full'))
  assert full < 0.7 * dots
  assert dots < 0.7 * none


@pytest.mark.parametrize(
  ('prompts', 'most', 'ways', 'parts'),
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
  assert memory.fits(program(6 * GIB), gpu)
  assert not memory.fits(program(7 * GIB), gpu)
  assert memory.fits(program(7 * GIB), device('cpu', bytes_limit=GIB))


def test_the_first_program_that_fits_is_taken():
  """One that the compiler refuses for its size is passed over."""
  gpu, compiled = device('gpu', bytes_limit=10), []

  def function(need, fault=None):
    def compile():
      compiled.append(need)
      if fault:
        raise jax.errors.JaxRuntimeError(fault)
      names = 'argument', 'output', 'alias', 'temp'
      sizes = {f'{name}_size_in_bytes': 0 for name in names}
      sizes['temp_size_in_bytes'] = need
      found = types.SimpleNamespace(**sizes)
      return types.SimpleNamespace(need=need, memory_analysis=lambda: found)

    return types.SimpleNamespace(
      lower=lambda: types.SimpleNamespace(compile=compile)
    )

  full = function(40, 'RESOURCE_EXHAUSTED: out of memory')
  some = [full, function(20), function(8), function(4)]
  assert memory.first_that_fits(some, (), gpu).need == 8
  assert compiled == [40, 20, 8]
  assert memory.first_that_fits([full, function(20)], (), gpu).need == 20
  with pytest.raises(jax.errors.JaxRuntimeError, match='another fault'):
    memory.first_that_fits([function(1, 'another fault'), *some], (), gpu)


@pytest.mark.parametrize(('longest', 'T'), [(1, 4), (4, 4), (5, 8), (16, 16)])
def test_an_update_holds_the_longest_completion(longest, T):
  mask = np.arange(16) < np.array([[1], [longest], [1]])
  assert update_for({8: 8, 4: 4, 16: 16}, mask) == T


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
def test_lengths_of_an_update(T, count, lengths):
  assert lengths_of(T, count) == lengths
