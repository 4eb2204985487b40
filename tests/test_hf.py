"""A policy survives its Hugging Face directory, and the directory is Qwen2's.

The NumPy forward pass below is written from Qwen2's definition, knows nothing
of our parameters and reads only the files.
"""

import dataclasses
import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl_tok import data
from jaxrl_tok.models import families, hf
from jaxrl_tok.models.transformer import TransformerConfig, make_policy
from jaxrl_tok.types import Prompts

# axes of different sizes: one in the wrong place has the wrong size
V, D, L, N, K, H, F = 263, 60, 2, 6, 2, 10, 37
PLAIN = TransformerConfig(
  vocab_size=V,
  d_model=D,
  num_layers=L,
  num_heads=N,
  num_kv_heads=K,
  head_dim=H,
  d_ff=F,
  rope_theta=123_456.0,
  norm_eps=3e-4,
  qkv_bias=True,
)
CONFIGS = {
  'untied': PLAIN,
  'tied': dataclasses.replace(PLAIN, tie_embeddings=True),
  'value': dataclasses.replace(PLAIN, value_head=True),
  'tied_value': dataclasses.replace(
    PLAIN, tie_embeddings=True, value_head=True
  ),
}
CARD = {
  'title': 'sums policy',
  'base_model': 'some/base',
  'data': '17 sums, <b>é</b>',
  'algorithm': 'reinforce with baseline',
  'metrics': {'held-out after': '97.5%', 'steps': 7},
}


@functools.cache
def shapes_of(config):
  return jax.eval_shape(make_policy(config).init, jax.random.key(0))


def random_params(config, dtype=np.float32):
  """No leaf at its initial value: zeros and ones would hide mistakes."""
  rng = np.random.default_rng(7)

  def draw(path, leaf):
    scale = 0.3 if leaf.ndim > 1 else 1.0
    mean = 1.0 if 'scale' in jax.tree_util.keystr(path) else 0.0
    return (mean + scale * rng.normal(size=leaf.shape)).astype(dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes_of(config))


def save(path, config, params, ends=(257,), pad=256, card=None):
  tokenizer = data.byte_tokenizer()
  tokenizer.chat_template = '{{ messages[0].content }}'
  return hf.save(path, config, params, tokenizer, ends, pad, card)


@pytest.fixture(scope='module', params=CONFIGS)
def saved(request, tmp_path_factory):
  """(config, parameters, their directory)."""
  config = CONFIGS[request.param]
  params = random_params(config)
  out = tmp_path_factory.mktemp('hf') / 'policy'
  assert save(out, config, params, card=CARD) == out
  return config, params, out


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A directory without faults, never changed."""
  out = tmp_path_factory.mktemp('whole') / 'policy'
  return save(out, CONFIGS['tied'], random_params(CONFIGS['tied']))


@pytest.fixture
def copy(whole, tmp_path):
  """A directory to break."""
  return shutil.copytree(whole, tmp_path / 'policy')


def same_bits(a, b):
  a, b = np.asarray(a), np.asarray(b)
  return (
    a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
  )


def edit_config(directory, drop=(), **changes):
  path = directory / 'config.json'
  found = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({k: v for k, v in found.items() if k not in drop}))


def edit_tensors(directory, edit):
  path = directory / 'model.safetensors'
  tensors = load_file(path)
  edit(tensors)
  save_file(
    {k: np.ascontiguousarray(v) for k, v in tensors.items()},
    path,
    metadata={'format': 'pt'},
  )


# --- out and back in


def test_what_is_loaded_is_what_was_saved(saved):
  config, params, out = saved
  loaded = hf.load(out, shapes_of)
  assert loaded.config == config
  assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
  assert all(jax.tree.leaves(jax.tree.map(same_bits, loaded.params, params)))
  assert loaded.end_tokens == (257,)
  assert loaded.pad_token == 256


@pytest.mark.parametrize('dtype', [jnp.bfloat16, np.float16])
def test_half_precision_survives_bitwise(tmp_path, dtype):
  config = CONFIGS['tied_value']
  params = jax.tree.map(jnp.asarray, random_params(config, dtype))
  out = save(tmp_path / 'policy', config, params)
  loaded = hf.load(out, shapes_of)
  assert all(jax.tree.leaves(jax.tree.map(same_bits, loaded.params, params)))
  name = json.loads((out / 'config.json').read_text())['dtype']
  assert name == jnp.dtype(dtype).name


def test_what_is_saved_again_is_the_same_file(whole, tmp_path):
  loaded = hf.load(whole, shapes_of)
  again = hf.save(tmp_path / 'again', *loaded)
  for name in ('model.safetensors', 'config.json', 'generation_config.json'):
    assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_the_tokenizer_survives(whole):
  before, after = data.byte_tokenizer(), hf.load(whole, shapes_of).tokenizer
  text = ' né  €\U0001f600\x00\r\n . ,'
  assert after(text)['input_ids'] == before(text)['input_ids']
  assert data.decode_all(after, [before(text)['input_ids']]) == [text]
  assert (after.eos_token, after.pad_token) == ('<eos>', '<pad>')
  assert after.chat_template == '{{ messages[0].content }}'


def test_only_files_that_run_no_code_are_written(saved):
  out = saved[2]
  names = {p.name for p in out.iterdir()}
  assert {
    'model.safetensors',
    'config.json',
    'generation_config.json',
    'tokenizer.json',
    'README.md',
  } <= names
  allowed = {'.safetensors', '.json', '.md', '.txt', '.jinja'}
  assert {p.suffix for p in out.iterdir()} <= allowed
  assert all(p.is_file() for p in out.iterdir())
  assert [p.name for p in out.parent.iterdir()] == [out.name]  # no leftovers


def test_an_existing_directory_is_not_touched(tmp_path):
  (tmp_path / 'model.safetensors').write_text('precious')
  config = CONFIGS['tied']
  with pytest.raises(FileExistsError, match='give another directory'):
    save(tmp_path, config, random_params(config))
  assert (tmp_path / 'model.safetensors').read_text() == 'precious'
  assert len(list(tmp_path.iterdir())) == 1


def test_a_parameter_without_a_place_is_named(tmp_path):
  params = random_params(PLAIN) | {'extra': {'kernel': np.zeros(3)}}
  with pytest.raises(ValueError, match='no place in the file for extra/kernel'):
    save(tmp_path / 'policy', PLAIN, params)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  'change', [{'qkv_bias': False}, {'qk_norm': True}, {'head_dim': 12}]
)
def test_a_decoder_that_qwen2_cannot_say_is_refused(change):
  config = dataclasses.replace(PLAIN, **change)
  with pytest.raises(ValueError, match='the Qwen2 layout'):
    families.FAMILIES['qwen2'].write(config)


def test_the_model_card_says_what_it_is(saved):
  import importlib.metadata

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


def test_a_model_card_without_fields_invents_nothing(whole):
  card = (whole / 'README.md').read_text()
  assert 'base_model:' not in card
  assert '| base model | none: trained from random weights |' in card
  assert '| data | not recorded |' in card
  assert '# policy\n' in card


# --- the file's layout


def test_names_and_shapes_are_qwen2s(saved):
  config, _, out = saved
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
  if not config.tie_embeddings:
    expected['lm_head.weight'] = (263, 60)
  if config.value_head:
    expected['v_head.weight'] = (1, 60)
  tensors = load_file(out / 'model.safetensors')
  assert {name: x.shape for name, x in tensors.items()} == expected


def test_projections_are_the_parts_of_our_fused_parameter(saved):
  _, params, out = saved
  tensors = load_file(out / 'model.safetensors')
  x_D = np.random.default_rng(0).normal(size=D)
  for i in range(L):
    ours = params[f'layer_{i}']['attention']
    fused = np.einsum('d,dkmh->kmh', x_D, ours['qkv']) + ours['qkv_bias']
    theirs = {
      c: tensors[f'model.layers.{i}.self_attn.{c}_proj.weight'] @ x_D
      + tensors[f'model.layers.{i}.self_attn.{c}_proj.bias']
      for c in 'qkv'
    }
    for head in range(N):  # query head n reads key head n // (N / K)
      np.testing.assert_allclose(
        theirs['q'].reshape(N, H)[head],
        fused[head // (N // K), head % (N // K)],
        atol=1e-5,
      )
    for head in range(K):
      for c, place in (('k', -2), ('v', -1)):
        np.testing.assert_allclose(
          theirs[c].reshape(K, H)[head], fused[head, place], atol=1e-5
        )


def test_config_json_is_a_qwen2_config(saved):
  from transformers import AutoConfig, GenerationConfig, Qwen2Config

  config, _, out = saved
  found = AutoConfig.from_pretrained(out, local_files_only=True)
  assert type(found) is Qwen2Config
  assert found.architectures == ['Qwen2ForCausalLM']
  assert found.vocab_size == V
  assert found.hidden_size == D
  assert found.num_hidden_layers == L
  assert found.num_attention_heads == N
  assert found.num_key_value_heads == K
  assert found.hidden_size // found.num_attention_heads == H
  assert found.intermediate_size == F
  assert found.rope_parameters['rope_theta'] == 123_456.0
  assert found.rope_parameters['rope_type'] == 'default'
  assert found.rms_norm_eps == 3e-4
  assert found.tie_word_embeddings == config.tie_embeddings
  assert found.hidden_act == 'silu'
  assert not found.use_sliding_window
  assert found.eos_token_id == 257
  assert found.pad_token_id == 256
  generation = GenerationConfig.from_pretrained(out, local_files_only=True)
  assert generation.eos_token_id == 257
  assert generation.pad_token_id == 256
  assert generation.do_sample


# --- Qwen2 in NumPy float64, from its definition


class Qwen2:
  """logits of every position of one sequence, from the files alone."""

  def __init__(self, directory):
    self.c = json.loads((directory / 'config.json').read_text())
    self.w = {
      name: x.astype(np.float64)
      for name, x in load_file(directory / 'model.safetensors').items()
    }

  def norm(self, x, name):
    mean_square = (x * x).mean(-1, keepdims=True)
    return x / np.sqrt(mean_square + self.c['rms_norm_eps']) * self.w[name]

  def linear(self, x, name):
    y = x @ self.w[f'{name}.weight'].T
    return y + self.w.get(f'{name}.bias', 0.0)

  def rope(self, x_TxH):
    T, H = x_TxH.shape
    out = np.empty_like(x_TxH)
    for t in range(T):
      for j in range(H // 2):
        angle = t * self.c['rope_theta'] ** (-2 * j / H)
        a, b = x_TxH[t, j], x_TxH[t, j + H // 2]
        out[t, j] = a * math.cos(angle) - b * math.sin(angle)
        out[t, j + H // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out

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
  config, _, out = saved
  loaded = hf.load(out, shapes_of)
  policy = make_policy(config)
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
  at_prompt, after, value = ours(loaded.params, Prompts(starts, length), rest)
  close = {'atol': 1e-4, 'rtol': 1e-4}
  np.testing.assert_allclose(at_prompt, logits[:P], **close)
  for p, n in enumerate(length):
    np.testing.assert_allclose(after[p], logits[n : n + T], **close)
    if config.value_head:
      expected = hidden[n : n + T] @ theirs.w['v_head.weight'][0]
      np.testing.assert_allclose(value[p], expected, **close)


# --- faults, each by name


def fault(directory, kind=ValueError) -> str:
  with pytest.raises(kind) as e:
    hf.load(directory, shapes_of)
  assert str(directory) in str(e.value)
  assert '\n' not in str(e.value)
  return str(e.value)


def test_missing_weights_are_named(copy):
  name = 'model.layers.1.self_attn.k_proj.bias'
  edit_tensors(copy, lambda tensors: tensors.pop(name))
  assert f'weights are missing: {name}' in fault(copy)


def test_weights_of_no_use_are_named(copy):
  name = 'model.layers.2.mlp.up_proj.weight'  # of a layer that is not there
  edit_tensors(copy, lambda tensors: tensors.update({name: np.ones((2, 2))}))
  assert f'weights of no use: {name}' in fault(copy)


@pytest.mark.parametrize(
  ('name', 'shape', 'want'),
  [
    ('model.layers.0.self_attn.k_proj.weight', (60, 20), '[20, 60]'),
    ('model.layers.1.self_attn.v_proj.weight', (19, 60), '[20, 60]'),
    ('model.layers.1.self_attn.q_proj.weight', (3600,), '[60, 60]'),
    ('model.layers.0.self_attn.q_proj.bias', (6, 10), '[60]'),
    ('model.layers.0.self_attn.o_proj.weight', (60, 61), '[60, 60]'),
    ('model.layers.0.mlp.gate_proj.weight', (38, 60), '[37, 60]'),
    ('model.layers.0.mlp.down_proj.weight', (37, 60), '[60, 37]'),
    ('model.layers.0.input_layernorm.weight', (1, 60), '[60]'),
    ('model.embed_tokens.weight', (264, 60), '[263, 60]'),
  ],
)
def test_misshapen_weights_are_named(copy, name, shape, want):
  wrong = np.zeros(shape, np.float32)
  edit_tensors(copy, lambda tensors: tensors.update({name: wrong}))
  assert f'{name} is {list(shape)}, not {want}' in fault(copy)


def test_a_repeated_tied_head_is_passed_over(copy):
  def repeat(tensors):
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']

  edit_tensors(copy, repeat)
  assert 'head' not in hf.load(copy, shapes_of).params


@pytest.mark.parametrize('kept', [0, 4, 100, -1])
def test_a_truncated_file_is_named(copy, kept):
  path = copy / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:kept])
  said = fault(copy)
  assert f'{path} is damaged' in said
  assert 'fetch it again' in said


def test_a_pickle_is_never_read(copy):
  path = copy / 'model.safetensors'
  path.rename(copy / 'pytorch_model.bin')
  assert 'pickles are never read' in fault(copy, FileNotFoundError)


@pytest.mark.parametrize('kind', ['llama', None, 'qwen3'])
def test_an_unknown_family_is_named(copy, kind):
  edit_config(copy, model_type=kind)
  said = fault(copy)
  assert f'model_type {kind!r} is not supported' in said
  assert 'supported: qwen2' in said


def test_code_of_its_own_is_never_run(copy):
  (copy / 'evil.py').write_text('raise SystemExit("ran")')
  edit_config(copy, auto_map={'AutoModelForCausalLM': 'evil.Evil'})
  assert 'auto_map' in fault(copy)


def test_no_config_json_is_said_with_the_cure(tmp_path, copy):
  (copy / 'config.json').unlink()
  for directory in (copy, tmp_path / 'nowhere'):
    said = fault(directory, FileNotFoundError)
    assert 'no config.json' in said
    assert 'pass --model' in said


def test_a_broken_config_json_is_named(copy):
  (copy / 'config.json').write_text('{"model_type": ')
  assert 'config.json: not JSON' in fault(copy)


@pytest.mark.parametrize('name', ['hidden_size', 'vocab_size'])
def test_a_size_that_config_json_lacks_is_named(copy, name):
  edit_config(copy, drop=[name])
  assert f"config.json has no '{name}'" in fault(copy)


@pytest.mark.parametrize(
  ('change', 'says'),
  [
    ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, 'rope scaling'),
    (
      {'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4}},
      'rope scaling yarn',
    ),
    ({'use_sliding_window': True}, 'use_sliding_window'),
    ({'hidden_act': 'gelu'}, 'hidden_act gelu'),
    ({'num_key_value_heads': 4}, 'num_heads 6 must be a multiple'),
  ],
)
def test_what_the_decoder_cannot_do_is_refused(copy, change, says):
  edit_config(copy, **change)
  assert says in fault(copy)


def test_old_configs_are_read(copy):
  # before transformers 5: rope_theta beside the sizes, rope_scaling null
  edit_config(copy, drop=['rope_parameters'], rope_scaling=None)
  assert hf.load(copy, shapes_of).config == CONFIGS['tied']


# --- end and pad


def test_an_end_id_beyond_the_vocabulary_is_named(copy):
  generation = {'eos_token_id': [257, V], 'pad_token_id': 256}
  path = copy / 'generation_config.json'
  path.write_text(json.dumps(generation))
  said = fault(copy)
  assert f'end token {V} is beyond the {V} rows' in said


@pytest.mark.parametrize(
  ('fields', 'fact'),
  [
    ({'eos_token_id': [257], 'pad_token_id': 999}, 'pad token 999 is beyond'),
    ({'eos_token_id': [], 'pad_token_id': 256}, 'no end token'),
  ],
)
def test_special_ids_that_cannot_be_are_named(copy, fields, fact):
  (copy / 'generation_config.json').write_text(json.dumps(fields))
  assert fact in fault(copy)


def test_a_config_that_is_no_object_is_named(copy):
  (copy / 'config.json').write_text('[1]')
  assert 'a list, not an object' in fault(copy)


def test_a_killed_save_leaves_nothing_behind(tmp_path):
  stale = tmp_path / 'policy.partial'
  stale.mkdir()
  (stale / 'pytorch_model.bin').write_text('stale')
  out = save(tmp_path / 'policy', PLAIN, random_params(PLAIN), (257,), 256)
  assert not (out / 'pytorch_model.bin').exists()


def test_several_end_ids_survive(tmp_path):
  out = save(tmp_path / 'policy', PLAIN, random_params(PLAIN), (5, 257), 5)
  loaded = hf.load(out, shapes_of)
  assert loaded.end_tokens == (5, 257)
  assert loaded.pad_token == 5


def test_where_end_and_pad_are_looked_for(copy):
  def ids():
    loaded = hf.load(copy, shapes_of)
    return loaded.end_tokens, loaded.pad_token

  path = copy / 'generation_config.json'
  path.write_text(json.dumps({'eos_token_id': [1, 2], 'pad_token_id': 3}))
  edit_config(copy, eos_token_id=4, pad_token_id=5)
  assert ids() == ((1, 2), 3)
  path.unlink()
  assert ids() == ((4,), 5)
  edit_config(copy, eos_token_id=None, drop=['pad_token_id'])
  assert ids() == ((257,), 256)  # the tokenizer's


def test_no_pad_is_the_end_and_no_end_is_refused(copy):
  path = copy / 'tokenizer_config.json'
  found = json.loads(path.read_text())
  (copy / 'generation_config.json').unlink()
  edit_config(copy, eos_token_id=7, drop=['pad_token_id'])
  path.write_text(json.dumps({**found, 'pad_token': None}))
  loaded = hf.load(copy, shapes_of)
  assert (loaded.end_tokens, loaded.pad_token) == ((7,), 7)
  edit_config(copy, drop=['eos_token_id'])
  path.write_text(json.dumps({**found, 'eos_token': None}))
  assert 'add eos_token_id' in fault(copy)
