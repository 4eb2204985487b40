"""Encoder-decoders give the logits that torch gave and write what transformers'
generate wrote (tests/golden/seq2seq, made by tests/golden/make_seq2seq.py);
their files come out as they went in."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SEQ2SEQ
from safetensors.numpy import load_file

from jaxrl_tok import distribution
from jaxrl_tok.hub.directory import open_model, save
from jaxrl_tok.hub.weights import read_params
from jaxrl_tok.run.models import forbidden_tokens
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.types import Prompts

NAMES = sorted(p.name for p in SEQ2SEQ.iterdir())
TOLERANCE = 1e-4


@functools.cache
def opened(name: str):
  """Opens a fixture: (model, parameters, expected)."""
  model = open_model(SEQ2SEQ / name)
  with np.load(SEQ2SEQ / name / 'expected.npz') as file:
    expected = dict(file)
  return model, read_params(model), expected


def every_way(policy, sample, params, prompts, tokens, rule):
  """Logits of a completion: before its first token, after all of them at once,
  after one at a time; and the sampler's rollout."""
  prefix = policy.encode(params, prompts)
  whole, _ = policy.extend(params, prefix, tokens, None, 0)

  def one(cache, t):
    token = jax.lax.dynamic_slice_in_dim(tokens, t, 1, axis=1)
    hidden, cache = policy.extend(params, prefix, token, cache, t)
    return cache, hidden[:, 0]

  T = tokens.shape[1]
  _, steps = jax.lax.scan(one, policy.init_cache(2, T), jnp.arange(T))
  hidden = prefix.hidden[:, None], whole, jnp.moveaxis(steps, 0, 1)
  rollout = sample(params, jax.random.key(0), prompts, rule)
  return [policy.logits(params, h) for h in hidden], rollout


@pytest.mark.parametrize('name', NAMES)
def test_logits_and_greedy_tokens_are_torchs(name):
  model, params, expected = opened(name)
  policy, first = model.make_policy(), int(expected['first'])
  assert model.is_encoder_decoder
  np.testing.assert_array_equal(
    expected['decoder'][:, :first], [model.config.start_tokens] * 2
  )
  T = expected['greedy'].shape[1]
  rule = distribution.make_rule(
    model.vocab_size, model.end_tokens, forbidden=forbidden_tokens(model)
  )
  config = SamplerConfig(1, T, model.pad_token, greedy=True, chunk=3)
  run = jax.jit(
    functools.partial(every_way, policy, make_sampler(policy, config))
  )
  prompts = Prompts(expected['prompts'], expected['length'])
  logits, rollout = run(params, prompts, expected['decoder'][:, first:], rule)
  want = expected['logits']
  for got, part in zip(
    logits, (want[:, first - 1 : first], want[:, first:], want[:, first:])
  ):
    np.testing.assert_allclose(got, part, atol=TOLERANCE, rtol=0)
  np.testing.assert_array_equal(rollout.tokens, expected['greedy'])
  assert rollout.ended.tolist() == (expected['greedy'] == 257).any(1).tolist()
  assert sum(rollout.ended.tolist()) == 1


@pytest.mark.parametrize('name', NAMES)
def test_padding_of_a_prompt_changes_nothing(name):
  model, params, expected = opened(name)
  policy = model.make_policy()
  encode = jax.jit(lambda p: policy.encode(params, p).hidden)
  tokens, length = expected['prompts'], expected['length']
  other = np.where(np.arange(12) < length[:, None], tokens, 7)
  assert (other != tokens).any()
  np.testing.assert_array_equal(
    encode(Prompts(tokens, length)), encode(Prompts(other, length))
  )


@pytest.mark.parametrize('name', NAMES)
def test_files_come_out_as_they_went_in(name, tmp_path):
  model, params, _ = opened(name)
  out = save(tmp_path / 'out', model, params)
  before = load_file(SEQ2SEQ / name / 'model.safetensors')
  after = load_file(out / 'model.safetensors')
  assert before.keys() == after.keys()
  for key, value in before.items():
    assert value.dtype == after[key].dtype
    assert value.shape == after[key].shape
    assert value.tobytes() == after[key].tobytes(), key
  configs = [
    json.loads((at / 'config.json').read_text()) for at in (SEQ2SEQ / name, out)
  ]
  assert configs[0] == configs[1]
  for file in ('tokenizer.json', 'generation_config.json'):
    assert (out / file).read_bytes() == (SEQ2SEQ / name / file).read_bytes()
  again = open_model(out)
  assert again.config == model.config
  assert again.end_tokens == model.end_tokens
