"""Layout of a directory that we wrote is Qwen2's, and configurations are read
as they are meant.

NumPy's forward pass below is written from Qwen2's definition, knows nothing of
our parameters and reads only the files.
"""

import importlib.metadata
import json
import math
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_hf import (
  DESCRIBED,
  GOLDEN,
  PLAIN,
  D,
  H,
  L,
  V,
  assert_same,
  model_of,
  random_params,
  read_json,
  tensors_of,
)

from jaxrl_tok.hub import families
from jaxrl_tok.hub.directory import open_model, save, write_card
from jaxrl_tok.hub.weights import read_params
from jaxrl_tok.types import Prompts

CARD = {
  'title': 'sums policy',
  'base_model': 'some/base',
  'data': '17 sums, <b>é</b>',
  'algorithm': 'reinforce with baseline',
  'metrics': {'held-out after': '97.5%', 'steps': 7},
}


@pytest.fixture(scope='module', params=DESCRIBED)
def saved(request, tmp_path_factory):
  """Saves a model: (model, parameters, their directory)."""
  model = model_of(DESCRIBED[request.param])
  params = random_params(model)
  out = tmp_path_factory.mktemp('hf') / 'policy'
  return model, params, save(out, model, params, CARD)


# --- the weights


def test_names_and_shapes_are_qwen2s(saved):
  model, _, out = saved
  expected = {
    'model.embed_tokens.weight': (263, 60),
    'model.norm.weight': (60,),
  }
  for i in range(2):
    expected |= {
      f'model.layers.{i}.input_layernorm.weight': (60,),
      f'model.layers.{i}.post_attention_layernorm.weight': (60,),
      f'model.layers.{i}.self_attn.q_proj.weight': (60, 60),
      f'model.layers.{i}.self_attn.q_proj.bias': (60,),
      f'model.layers.{i}.self_attn.k_proj.weight': (20, 60),
      f'model.layers.{i}.self_attn.k_proj.bias': (20,),
      f'model.layers.{i}.self_attn.v_proj.weight': (20, 60),
      f'model.layers.{i}.self_attn.v_proj.bias': (20,),
      f'model.layers.{i}.self_attn.o_proj.weight': (60, 60),
      f'model.layers.{i}.mlp.gate_proj.weight': (37, 60),
      f'model.layers.{i}.mlp.up_proj.weight': (37, 60),
      f'model.layers.{i}.mlp.down_proj.weight': (60, 37),
    }
  if not model.config.tie_embeddings:
    expected['lm_head.weight'] = (263, 60)
  if model.config.value_head:
    expected['v_head.weight'] = (1, 60)
  tensors = tensors_of(out)
  assert {name: x.shape for name, x in tensors.items()} == expected


def test_projections_are_the_parts_of_our_fused_parameter(saved):
  _, params, out = saved
  tensors = tensors_of(out)
  x_D = np.random.default_rng(0).normal(size=D)
  for i in range(L):
    ours = {name: x[i] for name, x in params['layers']['attention'].items()}
    fused = np.einsum('d,dkmh->kmh', x_D, ours['qkv']) + ours['qkv_bias']
    parts = {'q': fused[:, :-2], 'k': fused[:, -2], 'v': fused[:, -1]}
    for c, part in parts.items():  # query head n reads key head n // (N / K)
      name = f'model.layers.{i}.self_attn.{c}_proj'
      theirs = tensors[f'{name}.weight'] @ x_D + tensors[f'{name}.bias']
      np.testing.assert_allclose(theirs.reshape(part.shape), part, atol=1e-5)


def test_a_value_head_that_is_not_there_begins_at_zero(tmp_path):
  model = open_model(GOLDEN / 'qwen2', value_head=True)
  params = read_params(model)
  head = params.pop('value_head')['embedding']
  assert_same(head, np.zeros((1, 24), np.float32))
  assert_same(params, read_params(open_model(GOLDEN / 'qwen2')))
  params['value_head'] = {'embedding': head + 3}
  out = save(tmp_path / 'critic', model, params)
  assert_same(tensors_of(out)['v_head.weight'], head + 3)
  loaded = open_model(out)
  assert loaded.config == model.config
  assert loaded.config.value_head
  assert_same(read_params(loaded), params)


def test_names_without_the_familys_prefix_are_kept(tmp_path):
  # as in openai-community/gpt2: no 'transformer.', and the causal masks
  source = shutil.copytree(GOLDEN / 'gpt2', tmp_path / 'gpt2')
  named = tensors_of(source).items()
  bare = {name.removeprefix('transformer.'): x for name, x in named}
  masks = {f'h.{i}.attn.bias': np.ones((1, 1, 4, 4), np.float32) for i in '01'}
  save_file(bare | masks, source / 'model.safetensors')
  model = open_model(source)
  params = read_params(model)
  assert_same(params, read_params(open_model(GOLDEN / 'gpt2')))
  out = save(tmp_path / 'out', model, params)
  assert_same(tensors_of(out), bare)
  assert_same(read_params(open_model(out)), params)


# --- what is beside them


def test_config_json_is_the_qwen2_config_that_was_described(saved):
  from transformers import AutoConfig, GenerationConfig, Qwen2Config

  model, _, out = saved
  ids = {'eos_token_id': 257, 'pad_token_id': 256}
  wanted = model.hf_config | ids | {'dtype': 'float32'}
  assert read_json(out / 'config.json') == wanted
  found = AutoConfig.from_pretrained(out, local_files_only=True)
  assert type(found) is Qwen2Config
  for name in wanted.keys() - {'dtype'}:
    assert getattr(found, name) == wanted[name], name
  assert found.hidden_size // found.num_attention_heads == H
  generation = GenerationConfig.from_pretrained(out, local_files_only=True)
  assert {name: getattr(generation, name) for name in ids} == ids
  assert generation.do_sample


def test_the_model_card_says_what_it_is(saved):
  card = (saved[2] / 'README.md').read_text(encoding='utf-8')
  assert card.startswith('---\nlibrary_name: transformers\n')
  assert '\nbase_model: some/base\n' in card.split('---')[1]
  for row in (
    '# sums policy\n',
    '| base model | some/base |\n',
    '| data | 17 sums, <b>é</b> |\n',
    '| algorithm | reinforce with baseline |\n',
    '| held-out after | 97.5% |\n',
    '| steps | 7 |\n',
    '## Limits and safety\n',
  ):
    assert row in card
  for name in ('jaxrl_tok', 'jax', 'flax', 'optax', 'orbax-checkpoint'):
    assert f'| {name} | {importlib.metadata.version(name)} |\n' in card


def test_a_model_card_without_fields_invents_nothing(tmp_path):
  write_card(tmp_path, None)
  card = (tmp_path / 'README.md').read_text()
  assert 'base_model:' not in card
  assert '| base model | none: trained from random weights |' in card
  assert '| data | not recorded |' in card
  assert f'# {tmp_path.name}\n' in card


def test_several_end_ids_survive(tmp_path):
  model = model_of(PLAIN, (5, 257), 5)
  loaded = open_model(save(tmp_path / 'out', model, random_params(model)))
  assert (loaded.end_tokens, loaded.pad_token) == ((5, 257), 5)


def test_where_end_and_pad_are_looked_for(tmp_path):
  at = shutil.copytree(GOLDEN / 'qwen2', tmp_path / 'model')
  generation = at / 'generation_config.json'

  def ids():
    loaded = open_model(at)
    return loaded.end_tokens, loaded.pad_token

  def edit(file, **changes):
    num_kept = {k: v for k, v in (read_json(at / file) | changes).items() if v}
    (at / file).write_text(json.dumps(num_kept))

  generation.write_text('{"eos_token_id": [1, 2], "pad_token_id": 3}')
  edit('config.json', eos_token_id=4, pad_token_id=5)
  assert ids() == ((1, 2, 4, 257), 3)  # all of them, each once
  generation.write_text('{"eos_token_id": [6, 257]}')
  assert ids() == ((6, 257, 4), 5)
  generation.unlink()
  assert ids() == ((4, 257), 5)
  edit('config.json', eos_token_id=None, pad_token_id=None)
  assert ids() == ((257,), 256)  # the tokenizer's
  edit('tokenizer_config.json', pad_token=None)
  assert ids() == ((257,), 257)  # no pad: the end
  edit('tokenizer_config.json', eos_token=None)
  with pytest.raises(ValueError, match=r'no end token .*; add eos_token_id'):
    open_model(at)


LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 4.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
LOCAL = {'rope_local_base_freq': 20.0}


@pytest.mark.parametrize(
  ('name', 'theta', 'scaling', 'others'),
  [
    ('qwen2', 50.0, None, {}),
    ('llama', 30.0, LLAMA3, {}),
    ('llama_linear', 100.0, {'type': 'linear', 'factor': 2.5}, {}),
    ('gemma3_text', 1000.0, {'rope_type': 'linear', 'factor': 8.0}, LOCAL),
    ('gemma3_text', 1000.0, {'type': 'linear', 'factor': 8.0}, LOCAL),
    ('phi3', 50.0, None, {'partial_rotary_factor': 0.75}),
    ('gpt_neox', None, None, {'rotary_pct': 0.5, 'rotary_emb_base': 50}),
  ],
)
def test_older_names_of_the_rotary_numbers_are_read(
  name, theta, scaling, others
):
  hf_config = read_json(GOLDEN / name / 'config.json')
  wanted = families.read_config(hf_config)
  hf_config.pop('rope_parameters')
  assert families.read_config(hf_config) != wanted
  old = {'rope_theta': theta, 'rope_scaling': scaling} if theta else {}
  assert families.read_config(hf_config | old | others) == wanted


# --- Qwen2 in NumPy float64, from its definition


class Qwen2:
  """logits of every position of one sequence, from the files alone."""

  def __init__(self, directory):
    self.c = read_json(directory / 'config.json')
    self.w = {
      name: x.astype(np.float64) for name, x in tensors_of(directory).items()
    }

  def norm(self, x, name):
    mean_square = (x * x).mean(-1, keepdims=True)
    return x / np.sqrt(mean_square + self.c['rms_norm_eps']) * self.w[name]

  def linear(self, x, name):
    y = x @ self.w[f'{name}.weight'].T
    return y + self.w.get(f'{name}.bias', 0.0)

  def rope(self, x_TxH):
    T, H = x_TxH.shape
    theta = self.c['rope_parameters']['rope_theta']
    angle = np.outer(np.arange(T), theta ** (-2 * np.arange(H // 2) / H))
    a, b = np.split(x_TxH, 2, axis=1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)

  def attention(self, x, name):
    heads = self.c['num_attention_heads']
    group = heads // self.c['num_key_value_heads']
    T, H = len(x), self.c['hidden_size'] // heads
    q, k, v = (self.linear(x, f'{name}.{c}_proj') for c in 'qkv')
    mixed = []
    for n in range(heads):
      mine = slice(n * H, (n + 1) * H)
      shared = slice(n // group * H, (n // group + 1) * H)
      scores = self.rope(q[:, mine]) @ self.rope(k[:, shared]).T / math.sqrt(H)
      scores[np.triu_indices(T, 1)] = -np.inf
      e = np.exp(scores - scores.max(-1, keepdims=True))
      mixed.append(e / e.sum(-1, keepdims=True) @ v[:, shared])
    return self.linear(np.concatenate(mixed, -1), f'{name}.o_proj')

  def mlp(self, x, name):
    gate = self.linear(x, f'{name}.gate_proj')
    up = self.linear(x, f'{name}.up_proj')
    return self.linear(gate / (1 + np.exp(-gate)) * up, f'{name}.down_proj')

  def hidden(self, tokens):
    x = self.w['model.embed_tokens.weight'][tokens]
    for i in range(self.c['num_hidden_layers']):
      at = f'model.layers.{i}'
      x = x + self.attention(
        self.norm(x, f'{at}.input_layernorm.weight'), f'{at}.self_attn'
      )
      x = x + self.mlp(
        self.norm(x, f'{at}.post_attention_layernorm.weight'), f'{at}.mlp'
      )
    return self.norm(x, 'model.norm.weight')

  def head(self):
    tied = self.c['tie_word_embeddings']
    return self.w['model.embed_tokens.weight' if tied else 'lm_head.weight']


@pytest.mark.parametrize('saved', ['tied', 'value'], indirect=True)
def test_a_loaded_policy_is_qwen2_as_defined(saved):
  config, out = saved[0].config, saved[2]
  model = open_model(out)
  params, policy = read_params(model), model.make_policy()
  P, T = 7, 4
  tokens = np.random.default_rng(1).integers(0, V, P + T)
  theirs = Qwen2(out)
  hidden = theirs.hidden(tokens)
  logits = hidden @ theirs.head().T
  assert logits.std() > 0.5  # not flat: there is something to compare

  @jax.jit
  def ours(params, prompts, rest):
    prefix = policy.encode(params, prompts)
    after, _ = policy.extend(params, prefix, rest, None, 0)
    value = policy.value(params, after) if config.value_head else None
    return (
      policy.logits(params, prefix.hidden),
      policy.logits(params, after),
      value,
    )

  # prompt p is the first p + 1 tokens, padded; then the next T tokens
  length = np.arange(1, P + 1, dtype=np.int32)
  starts = np.where(np.arange(P)[None] < length[:, None], tokens[None, :P], 0)
  rest = np.stack([tokens[n : n + T] for n in length])
  at_prompt, after, value = ours(params, Prompts(starts, length), rest)
  close = {'atol': 1e-4, 'rtol': 1e-4}
  np.testing.assert_allclose(at_prompt, logits[:P], **close)
  for p, n in enumerate(length):
    np.testing.assert_allclose(after[p], logits[n : n + T], **close)
    if config.value_head:
      expected = hidden[n : n + T] @ theirs.w['v_head.weight'][0]
      np.testing.assert_allclose(value[p], expected, **close)


def test_a_tied_head_that_came_repeated_is_written_again(tmp_path):
  model = open_model(GOLDEN / 'llama_linear')
  name = 'model.embed_tokens.weight'
  single = save(tmp_path / 'single', model, read_params(model))
  tensors = load_file(single / 'model.safetensors')
  tensors['lm_head.weight'] = tensors[name].copy()
  save_file(tensors, single / 'model.safetensors', metadata={'format': 'pt'})
  again = open_model(single)
  params = jax.tree.map(lambda x: 2 * x, read_params(again))
  found = load_file(
    save(tmp_path / 'again', again, params) / 'model.safetensors'
  )
  assert found.keys() == tensors.keys()
  np.testing.assert_array_equal(found['lm_head.weight'], 2 * tensors[name])


@pytest.mark.parametrize(
  'foreign',
  [{'sliding_window': 4}, {'layer_types': ['sliding_attention'] * 2}],
)
def test_another_familys_settings_mean_nothing(foreign):
  hf_config = open_model(GOLDEN / 'llama').hf_config
  read = families.read_config
  assert read(hf_config | foreign) == read(hf_config)
