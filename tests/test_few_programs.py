"""Functions share a program where a trace of them is the same, only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conftest import CONFIG, changed
from few_programs import FewPrograms

from jaxrl_tok.credit import algorithms
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.step.update import make_update


def adding(x, *, scale=1.0):
  return lambda y: scale * (x + y)


ADDED = {
  'a number': 1.0,
  'another': 2.0,
  'an integer': 1,
  'a truth': True,
  'zero': 0.0,
  'minus zero': -0.0,
  'an array': np.arange(3.0),
  'another type': np.arange(3),
  'other values': np.arange(3.0) + 1,
  'an array of jax': jnp.float32(1),
  'its type': jnp.int32(1),
  'text': 'one',
  'a tuple': (1.0,),
  'a function': adding(1.0),
  'another function': adding(2.0),
  'a named argument': adding(1.0, scale=2.0),
  'a part': functools.partial(adding, 1.0),
  'a record': CONFIG,
  'another record': changed(CONFIG, d_ff=24),
}


def test_what_a_function_holds_tells_it_apart():
  few = FewPrograms()
  keys = {name: few.key(adding(held), {}) for name, held in ADDED.items()}
  assert len(set(keys.values())) == len(keys)
  for name, held in ADDED.items():
    assert few.key(adding(held), {}) == keys[name]


def test_lists_of_other_functions_are_themselves():
  """A test may see in its own list what a trace has put there."""
  few, held = FewPrograms(), [1]
  assert few.key(adding(held), {}) == few.key(adding(held), {})
  assert few.key(adding([1]), {}) != few.key(adding([1]), {})
  assert few.key([1], {}, opened=True) == few.key([1], {}, opened=True)


def update_of(**options):
  policy = make_policy(CONFIG)
  optimizer = optax.adam(1e-3)
  return make_update(policy, algorithms.reinforce(**options), optimizer)


def test_makers_that_are_called_twice_have_one_program():
  few = FewPrograms()
  one = few.jit(update_of(), donate_argnums=0)
  assert few.jit(update_of(), donate_argnums=0) is one
  assert few.jit(update_of()) is not one
  assert few.jit(update_of(entropy_coef=0.1), donate_argnums=0) is not one
  few.clear()
  assert few.jit(update_of(), donate_argnums=0) is not one

  def sampler(**more):
    return make_sampler(make_policy(CONFIG), SamplerConfig(2, 4, **more))

  one = few.jit(sampler())
  assert few.jit(sampler()) is one
  assert few.jit(sampler(greedy=True)) is not one
  mine = adding(1.0)
  assert few.jit(mine) is not few.jit(mine)  # no function of the package
  assert few.eval_shape(mine, jnp.ones(2)).shape == (2,)
  assert jax.jit(mine)(1.0) == few.jit(mine)(1.0) == 2
