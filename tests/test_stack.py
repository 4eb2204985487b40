"""Stacked layers: a scan is a loop, for any order of kinds of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, changed, make_rollout, random_prompts
from hypothesis import example, given
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from jaxrl_tok import distribution
from jaxrl_tok.models import stack
from jaxrl_tok.models.rope import make_rope
from jaxrl_tok.models.transformer import Layer, make_policy
from jaxrl_tok.policy import evaluate
from jaxrl_tok.step.compile import AS_WRITTEN

KINDS = st.lists(st.sampled_from('abc'), min_size=1, max_size=9)


@given(KINDS)
@example(list('aaab' * 2 + 'aa'))  # a period, and its beginning once more
@example(list('abb'))
def test_segments_are_the_layers_in_order(layers):
  found = [kind for s in stack.segments(layers) for kind in s.kinds * s.repeats]
  assert found == layers
  starts = [s.start for s in stack.segments(layers)]
  sizes = [s.repeats * len(s.kinds) for s in stack.segments(layers)]
  assert starts == [sum(sizes[:i]) for i in range(len(sizes))]


def test_layers_of_gemma_are_two_bodies():
  kinds = (['local'] * 5 + ['global']) * 4 + ['local'] * 2
  assert [(len(s.kinds), s.repeats) for s in stack.segments(kinds)] == [
    (6, 4),
    (2, 1),
  ]
  assert len(stack.segments(['same'] * 32)) == 1


def has(kind, path):
  """Layers b have no `slope`; only they have a `shift`."""
  return path != ('slope',) if kind == 'b' else path != ('shift',)


def trees_of(layers):
  """A tree of parameters for each layer, all numbers different."""
  numbers = iter(np.arange(1.0, 100.0) / 7)
  return [
    {
      name: jnp.full((2,), next(numbers))
      for name in ('base', 'slope', 'shift')
      if has(kind, (name,))
    }
    for kind in layers
  ]


def step(kind, weights, x, given, cache):
  x = jnp.sin(x * weights.get('slope', 1.0) + weights['base'])
  x = x + weights.get('shift', 0.0) + {'a': 0.1, 'b': 0.2, 'c': 0.3}[kind]
  return (x if given is None else x * given['seen']), {'seen': jnp.cos(x)}


@pytest.mark.parametrize('layers', ['aaa', 'ababa', 'bba', 'acbacba'])
def test_a_scan_is_a_loop(layers):
  """Results, gradients, and outputs that a second run is given."""
  trees = trees_of(layers)
  stacks = stack.stack_layers(trees)
  rows = len([kind for kind in layers if kind != 'b'])
  assert stacks['slope'].shape[0] == rows
  split = stack.split(stacks, layers, has)
  jax.tree.map(np.testing.assert_array_equal, list(split), trees)

  def twice(params, scan):
    how = {'scan': scan, 'has': has}
    x, seen = stack.run_layers(step, layers, params, jnp.ones(2), **how)
    y, _ = stack.run_layers(step, layers, params, x, seen, **how)
    return y.sum(), seen.split() if isinstance(seen, stack.Stacks) else seen

  @jax.jit
  def look(stacks, split):
    run = jax.value_and_grad(twice, has_aux=True)
    return run(stacks, False), run(stacks, True), twice(split, True)[0]

  (looped, grads), (scanned, other), of_trees = look(stacks, split)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    (scanned, other, of_trees),
    (looped, grads, looped[0]),
  )


ROPE = make_rope({'rope_theta': 10_000.0}, 6)
MIXED = {
  'one kind': {'layers': (Layer(ROPE),) * 3},
  'windows': {
    'layers': (Layer(ROPE, window=2), Layer(None)) * 2 + (Layer(ROPE, 2),)
  },
  'experts': {
    'layers': (Layer(ROPE), Layer(ROPE, routed=True), Layer(ROPE, routed=True)),
    'num_experts': 3,
    'experts_per_token': 2,
    'expert_d_ff': 8,
  },
}


@pytest.mark.parametrize(
  ('name', 'remat'), [*((name, 'none') for name in MIXED), ('windows', 'full')]
)
def test_scanned_layers_change_nothing(name, remat):
  """Log-probs and their gradient, and the rollout's form of the parameters."""
  config = changed(CONFIG, **MIXED[name])
  rule = distribution.make_rule(11, [10])
  tokens = np.random.default_rng(0).integers(1, 9, (8, 5))
  rollout = make_rollout(random_prompts(4), tokens, tokens > 1)
  looped, scanned = (
    make_policy(config, remat=remat, scan_layers=scan) for scan in (False, True)
  )
  params = jax.jit(looped.init)(jax.random.key(0))

  @jax.jit
  def look(params):
    def loss(params, policy):
      logp = evaluate(policy, params, rollout, rule).logp
      return jnp.sum(jnp.exp(logp)), logp

    both = [
      jax.grad(lambda p, n=net: loss(p, n), has_aux=True)(params)
      for net in (looped, scanned)
    ]
    return *both, loss(scanned.cast_params(params), scanned)[1]

  (grads, want), (other, got), of_rollout = look(params)
  np.testing.assert_allclose(got, want, atol=1e-5)
  np.testing.assert_allclose(of_rollout, want, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), other, grads
  )


def test_bfloat16_is_rounded_in_a_scan_as_in_a_loop():
  """Equal bits, with the compiler's option that all programs of a run have."""
  rule = distribution.make_rule(11, [10])
  tokens = np.random.default_rng(0).integers(1, 9, (8, 5))
  rollout = make_rollout(random_prompts(4), tokens, tokens > 1)
  scanned = make_policy(CONFIG, jnp.bfloat16, scan_layers=True)
  params = jax.tree.map(lambda x: 4 * x, scanned.init(jax.random.key(0)))

  def both(params):
    split = scanned.cast_params(params)
    return [evaluate(scanned, p, rollout, rule).logp for p in (params, split)]

  a, b = jax.jit(both).lower(params).compile(AS_WRITTEN)(params)
  np.testing.assert_array_equal(a, b)
  a, b = jax.jit(both)(params)
  assert np.abs(a - b).max() > 1e-3, 'XLA has no need of the option'


def gradient_of_states(config):
  """Gradient of a rollout's log-probs over scanned layers, with respect to the
  embeddings of positions alone: (jaxpr, jitted, its arguments)."""
  policy = make_policy(config, scan_layers=True)
  params = jax.eval_shape(policy.init, jax.random.key(0))
  rule = distribution.make_rule(11, [10])
  tokens = np.ones((8, 5), np.int32)
  rollout = make_rollout(random_prompts(4), tokens, tokens > 0)

  def loss(positions, params):
    params = params | {'positions': positions}
    return evaluate(policy, params, rollout, rule).logp.sum()

  args = params['positions'], params
  return jax.make_jaxpr(jax.grad(loss))(*args), jax.jit(jax.grad(loss)), args


def outputs_of_scans(jaxpr) -> set:
  """Shapes that scans return, those inside of other equations included."""
  found = set()
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'scan':
      found |= {v.aval.shape for v in equation.outvars}
    for inner in jaxprs_in_params(equation.params):
      found |= outputs_of_scans(inner)
  return found


@pytest.mark.parametrize('period', [1, 2])
def test_the_backward_pass_keeps_no_copy_of_the_weights(period):
  """Scans return states and keys, no weights; and no matrix is transposed."""
  kinds = (Layer(None), Layer(None, window=2))[:period]
  sizes = {'d_ff': 28, 'learned_positions': True, 'layers': kinds * 8}
  config = changed(CONFIG, **sizes)
  jaxpr, gradient, args = gradient_of_states(config)
  shapes = outputs_of_scans(jaxpr.jaxpr)
  assert (8, 4, 6, 16) in shapes  # states that each layer reads
  matrices = (16, 2, 28), (28, 16)
  copies = {(8, *period, *m) for period in ((), (2,)) for m in matrices}
  assert not shapes & copies
  text = gradient.lower(*args).compile().as_text()
  assert '[16,56]' in text  # gate and up: one axis of outputs
  assert '[56,16]' not in text


def lines(L: int, scan: bool) -> int:
  """Lines of StableHLO of a gradient's program."""
  config = changed(CONFIG, layers=CONFIG.layers[:1] * L)
  policy = make_policy(config, scan_layers=scan)
  params = jax.eval_shape(policy.init, jax.random.key(0))
  rule = distribution.make_rule(11, [10])
  tokens = np.ones((8, 5), np.int32)
  rollout = make_rollout(random_prompts(4), tokens, tokens > 0)

  def loss(params):
    return evaluate(policy, params, rollout, rule).logp.sum()

  return jax.jit(jax.grad(loss)).lower(params).as_text().count('\n')


def test_a_program_does_not_grow_with_the_layers():
  few, many = lines(2, True), lines(32, True)
  assert many <= 1.1 * few
  assert lines(8, False) > 2 * few  # a loop does
