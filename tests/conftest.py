"""Eight fake CPU devices, strict rank promotion, and one tiny policy."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
os.environ['TRANSFORMERS_NO_ADVISORY_WARNINGS'] = '1'
# tests compile much and compute little: half the time, the same programs
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0'

import dataclasses
import types

import jax
import numpy as np
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')

from jaxrl_tok import distribution
from jaxrl_tok.models.rope import make_rope
from jaxrl_tok.models.transformer import Layer, TransformerConfig, make_policy
from jaxrl_tok.policy import evaluate
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.types import Prompts

CONFIG = TransformerConfig(
  vocab_size=11,
  d_model=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  d_ff=20,
  layers=(Layer(make_rope({'rope_theta': 10_000.0}, 6)),) * 2,
  qkv_bias=True,
  qk_norm='head',
)
PAD, END, OTHER_END = 0, 10, 9


def random_prompts(C=4, P=6, V=11, seed=0) -> Prompts:
  """Ragged: the first is of length 1, the last is full."""
  rng = np.random.default_rng(seed)
  length = np.linspace(1, P, C).round().astype(np.int32)
  tokens = rng.integers(1, V - 2, (C, P)).astype(np.int32)
  return Prompts(np.where(np.arange(P) < length[:, None], tokens, PAD), length)


def sharpened(params, scale=4.0):
  """Random weights give near-uniform tokens; these have opinions."""
  return jax.tree.map(lambda x: x * scale if x.ndim == 2 else x, params)


@pytest.fixture(scope='session')
def tiny():
  """policy, params, prompts (C=4, P=6), rule (two ends), G, T, rollout."""
  policy = make_policy(CONFIG)
  params = sharpened(jax.jit(policy.init)(jax.random.key(1)))
  prompts = random_prompts()
  rule = distribution.make_rule(11, [END, OTHER_END])
  config = SamplerConfig(3, 9, PAD, chunk=3)
  sample = jax.jit(make_sampler(policy, config))
  rollout = sample(params, jax.random.key(7), prompts, rule)
  lengths = np.asarray(rollout.mask.sum(1))
  assert lengths.min() < lengths.max() == 9, 'want ended and cut rows'
  return types.SimpleNamespace(
    policy=policy,
    params=params,
    prompts=prompts,
    rule=rule,
    config=config,
    sample=sample,
    rollout=rollout,
    G=3,
    T=9,
  )


# jitted: running operation by operation would compile each of them
look = jax.jit(evaluate, static_argnums=0, static_argnames='chunk')


@pytest.fixture(scope='session')
def reward(tiny):
  """One random reward for each chosen token."""
  rng = np.random.default_rng(3)
  noise = rng.normal(size=tiny.rollout.tokens.shape).astype(np.float32)
  return np.where(np.asarray(tiny.rollout.mask), noise, 0)


def changed(record, **fields):
  """A copy of a dataclass or NamedTuple with other fields."""
  if dataclasses.is_dataclass(record):
    return dataclasses.replace(record, **fields)
  return record._replace(**fields)
