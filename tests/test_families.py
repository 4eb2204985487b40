"""Families give the logits that torch gave (tests/golden/families, made
by tests/golden/make_families.py), however its tokens are read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, PAD, SEQ2SEQ, make_rollout

from jaxrl_tok import distribution
from jaxrl_tok.hub import families
from jaxrl_tok.hub.directory import open_model
from jaxrl_tok.hub.tokenizer_settings import read_json
from jaxrl_tok.hub.weights import read_params
from jaxrl_tok.models import rope
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.step import device_rewards
from jaxrl_tok.types import Prompts

LORAS = sorted(p.name for p in GOLDEN.glob('*_lora'))
CLASSIFIERS = sorted(p.name for p in GOLDEN.glob('*_classifier'))
DECODERS = sorted(
  {p.name for p in GOLDEN.iterdir()} - set(LORAS) - set(CLASSIFIERS)
)
P, TOLERANCE = 7, 1e-4


@functools.cache
def opened(name: str):
  """Opens a fixture: (model, parameters, policy, expected)."""
  model = open_model(GOLDEN / name)
  params = read_params(model)
  with np.load(GOLDEN / name / 'expected.npz') as file:
    expected = dict(file)
  return model, params, model.make_policy(), expected


def test_every_family_has_a_fixture():
  folders = [*(GOLDEN / name for name in DECODERS), *SEQ2SEQ.iterdir()]
  kinds = {read_json(f / 'config.json')['model_type'] for f in folders}
  assert kinds | {'mt5'} == set(families.FAMILIES)  # a t5 of another name


def ends_of(tokens, length):
  """Prompts [n, P]: one sequence, cut at each of the lengths."""
  num_kept = np.arange(tokens.shape[0])[None] < length[:, None]
  return Prompts(jnp.where(num_kept, tokens[None], PAD), length)


def every_way(policy, sample, params, tokens, rule):
  """Logits of both sequences: by encode (at each length of the first), by
  extend from P tokens, by the cache one at a time; and the sampler's tokens."""
  S = tokens.shape[1]
  lengths = np.arange(1, S + 1, dtype=np.int32)
  encoded = policy.encode(params, ends_of(tokens[0], lengths)).hidden
  prompts = Prompts(
    jnp.pad(tokens[:, :P], ((0, 0), (0, 2))), np.full(2, P, np.int32)
  )
  prefix = policy.encode(params, prompts)
  rest = jnp.asarray(tokens[:, P:])
  extended, _ = policy.extend(params, prefix, rest, None, 0)

  def one(cache, t):
    token = jax.lax.dynamic_slice_in_dim(rest, t, 1, axis=1)
    hidden, cache = policy.extend(params, prefix, token, cache, t)
    return cache, hidden[:, 0]

  cache = policy.init_cache(2, S - P)
  _, cached = jax.lax.scan(one, cache, jnp.arange(S - P))
  drawn = sample(params, jax.random.key(0), prompts, rule)
  hidden = encoded, extended, jnp.moveaxis(cached, 0, 1)
  return [policy.logits(params, h) for h in hidden], drawn.tokens


@pytest.mark.parametrize('name', DECODERS)
def test_logits_are_torchs(name):
  model, params, policy, expected = opened(name)
  V = model.vocab_size
  rule = distribution.make_rule(V, [V - 1], forbidden=np.arange(V) >= 256)
  T = expected['greedy'].shape[1]
  sample = make_sampler(policy, SamplerConfig(1, T, PAD, greedy=True, chunk=3))
  run = jax.jit(functools.partial(every_way, policy, sample))
  (encoded, extended, cached), greedy = run(params, expected['tokens'], rule)
  want = expected['logits']
  for got, part in (
    (encoded, want[0]),
    (extended, want[:, P:]),
    (cached, want[:, P:]),
  ):
    np.testing.assert_allclose(got, part, atol=TOLERANCE, rtol=0)
  np.testing.assert_array_equal(greedy, expected['greedy'])


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_scores_are_torchs(name):
  model, params, policy, expected = opened(name)
  tokens, S = expected['tokens'], expected['tokens'].shape[1]
  assert model.is_classifier
  lengths = np.array([P, S], np.int32)  # the second completion is cut short
  mask = np.arange(S - P)[None] < (lengths - P + 1)[:, None]
  prompts = Prompts(tokens[:, :P], np.full(2, P, np.int32))
  rollout = make_rollout(prompts, tokens[:, P:], mask)
  reward = jax.jit(device_rewards.reward_model(policy))(params, rollout)
  want = np.zeros((2, S - P), np.float32)
  want[0, 0], want[1, -1] = expected['scores'][0, P], expected['scores'][1, -1]
  np.testing.assert_allclose(reward, want, atol=TOLERANCE, rtol=0)


def test_angles_are_the_same_from_a_table_or_not():
  """Long contexts hold no table in the program; the angles stay equal."""
  turned = rope.make_rope({'rope_theta': 1e4}, 8)._replace(magnitude=1.5)
  positions = np.array([[0, 3], [700, 999]], np.int32)
  look = jax.jit(rope.rope_angles, static_argnums=(1, 2))
  tables = look(positions, turned, 1000)
  computed = look(positions, turned, rope.LARGEST_TABLE)
  assert rope.LARGEST_TABLE > 1000 * 4
  for a, b in zip(tables, computed):
    assert a.shape == (2, 2, 4)
    np.testing.assert_allclose(a, b, atol=1e-4)
