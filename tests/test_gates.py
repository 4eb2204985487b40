"""Gates of speed that need no clock: what the compiled programs do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, END, PAD, changed, random_prompts

from jaxrl_tok import distribution
from jaxrl_tok.models.encoder_decoder import (
  make_policy as encoder_decoder_policy,
)
from jaxrl_tok.models.encoder_decoder_config import (
  Buckets,
  EncoderDecoderConfig,
  StackConfig,
)
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.types import Prompts

# wider than its neighbours, so that each array is known by its size
POLICY = make_policy(
  changed(CONFIG, d_model=64, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=96)
)
C, G, P, T = 2, 4, 8, 65  # T - 1 = 64 columns, in two stages


def computations(text: str) -> dict[str, list[str]]:
  """Computations {name: instructions} of an optimised program's text."""
  found, name = {}, None
  for line in text.splitlines():
    header = re.match(r'(?:ENTRY )?%?([\w.\-]+) .*\{$', line.strip())
    if header and ' = ' not in line.split('{')[0]:
      name = header[1]
      found[name] = []
    elif ' = ' in line and name is not None:
      found[name].append(line.strip())
  return found


def inside_loops(text: str) -> list[str]:
  """Instructions that a while loop's body runs, however deep."""
  program = computations(text)
  waiting = re.findall(r'body=%?([\w.\-]+)', text)
  seen = set()
  while waiting:
    name = waiting.pop()
    if name in seen or name not in program:
      continue
    seen.add(name)
    for line in program[name]:
      called = r'(?:calls|to_apply|body)=%?([\w.\-]+)'
      waiting += re.findall(called, line)
  return [line for name in seen for line in program[name]]


def size_of(instruction: str) -> int:
  """Elements of the largest array that an instruction makes."""
  made = instruction.split(' = ')[1].split('(%')[0]
  shapes = re.findall(r'\w+\[([\d,]*)\]', made)
  return max(int(np.prod([int(n) for n in s.split(',') if n])) for s in shapes)


def moves(text: str, least: int) -> list[str]:
  """Copies and transposes of `least` or more elements inside loops."""
  return [
    line
    for line in inside_loops(text)
    if re.search(r'(?:^| )(?:copy|transpose)\(', line)
    and size_of(line) >= least
  ]


def encoder_decoder():
  """An encoder-decoder of POLICY's width, with T5's positions."""
  side = StackConfig(2, 64, num_heads=2, head_dim=16, d_ff=96)
  positions = Buckets(8, 9)
  return encoder_decoder_policy(
    EncoderDecoderConfig(11, side, side, (0,), positions=positions)
  )


@pytest.fixture(scope='module', params=['decoder', 'encoder-decoder'])
def sampler_text(request):
  config = SamplerConfig(G, T, PAD)
  policy = POLICY if request.param == 'decoder' else encoder_decoder()
  params = jax.eval_shape(policy.init, jax.random.key(0))
  rule = distribution.make_rule(11, [END])
  prompts = random_prompts(C, P)
  sample = jax.jit(make_sampler(policy, config))
  return (
    sample.lower(params, jax.random.key(0), prompts, rule).compile().as_text()
  )


def test_the_cache_is_written_in_place(sampler_text):
  """Copies and transposes in a step are smaller than a layer's cache."""
  one_cache = C * G * 2 * (T - 1) // 2 * 16  # of the first stage
  assert any(
    'dynamic-update-slice' in line and size_of(line) >= one_cache
    for line in inside_loops(sampler_text)
  )
  assert moves(sampler_text, one_cache) == []


def test_a_copied_cache_would_be_seen():
  def step(carry, t):
    buffer, total = carry
    new = jax.lax.dynamic_update_slice(buffer, jnp.ones((1, 64)), (t, 0))
    # both the old and the new are needed: one must be a copy
    return (new, total + jnp.sum(buffer * new.T)), None

  def loop(buffer):
    return jax.lax.scan(step, (buffer, 0.0), jnp.arange(64))[0]

  text = jax.jit(loop).lower(jnp.zeros((64, 64))).compile().as_text()
  assert moves(text, 64 * 64)


def test_a_step_reads_what_it_must():
  """Weights, the caches and the prompts' keys: at most half as much again."""
  rows, length = 4, 512
  config = changed(
    CONFIG, d_model=256, num_heads=4, num_kv_heads=2, head_dim=64, d_ff=512
  )
  policy = make_policy(changed(config, vocab_size=1024))
  params = jax.eval_shape(
    lambda key: policy.cast_params(policy.init(key)), jax.random.key(0)
  )
  cache = jax.eval_shape(lambda: policy.init_cache(rows, length))
  prompts = Prompts(jnp.zeros((1, P), jnp.int32), jnp.full((1,), P))
  prefix = jax.eval_shape(policy.encode, params, prompts)

  def step(params, prefix, cache, token, at):
    hidden, cache = policy.extend(params, prefix, token, cache, at)
    return policy.logits(params, hidden[:, 0]), cache

  tokens = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
  at = jax.ShapeDtypeStruct((), jnp.int32)
  given = params, prefix, cache, tokens, at
  compiled = jax.jit(step, donate_argnums=2).lower(*given).compile()
  accessed = compiled.cost_analysis()['bytes accessed']

  def total(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

  must = total(params) - total(params['embed']) + total((cache, prefix.kv))
  assert must < accessed <= 1.5 * must
