"""GGUF files are the Hugging Face directories that they were made from.

`convert` writes a file as llama.cpp's converter does, from a directory of
golden/families; names of tensors come from the gguf package, not from us.
"""

import json
import shutil
from pathlib import Path

import gguf as ggml
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from conftest import GOLDEN, ONE
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from safetensors.numpy import load_file

from jaxrl_tok import data
from jaxrl_tok.hub import fetch, gguf, gguf_config, packages
from jaxrl_tok.hub.directory import open_model, save
from jaxrl_tok.hub.weights import read_params

# changes of config.json to what a file can say, and numbers of a file
FAMILIES = {
  'llama': ('llama', {}, {}),
  'llama_linear': ('llama', {}, {}),
  'llama_yarn': ('llama', {}, {}),
  'mistral': ('llama', {}, {'attention.sliding_window': 5}),
  'qwen2': (
    'qwen2',
    {'use_sliding_window': False, 'layer_types': ['full_attention'] * 3},
    {},
  ),
  'qwen3': ('qwen3', {}, {}),
  'gemma2': (
    'gemma2',
    {'query_pre_attn_scalar': 6},
    {
      'attention.sliding_window': 5,
      'attn_logit_softcapping': 5.0,
      'final_logit_softcapping': 4.0,
    },
  ),
  'gemma3_text': (
    'gemma3',
    {'query_pre_attn_scalar': 6},
    {'attention.sliding_window': 4, 'rope.freq_base_swa': 20.0},
  ),
  'phi3': (
    'phi3',
    {},
    {
      'attention.sliding_window': 5,
      'rope.dimension_count': 4,
      'rope.scaling.original_context_length': 4096,
    },
  ),
  'gpt2': ('gpt2', {}, {}),
  'olmo2': ('olmo2', {}, {}),
}
SIZES = {  # ours -> llama.cpp's
  'hidden_size': 'embedding_length',
  'n_embd': 'embedding_length',
  'intermediate_size': 'feed_forward_length',
  'n_inner': 'feed_forward_length',
  'num_hidden_layers': 'block_count',
  'n_layer': 'block_count',
  'num_attention_heads': 'attention.head_count',
  'n_head': 'attention.head_count',
  'num_key_value_heads': 'attention.head_count_kv',
  'head_dim': 'attention.key_length',
  'max_position_embeddings': 'context_length',
  'n_positions': 'context_length',
  'rms_norm_eps': 'attention.layer_norm_rms_epsilon',
  'layer_norm_epsilon': 'attention.layer_norm_epsilon',
}
TEMPLATE = (
  '{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}'
  '{% if add_generation_prompt %}assistant: {% endif %}'
)
TEXTS = ('Hello,  world! 1234', "don't", 'naïve ½ 日本\n\n x', '', ' a<eos>b')


# --- a converter -------------------------------------------------------------


def rope_values(config: dict) -> dict:
  """Numbers of rotary positions, as llama.cpp's converter writes them."""
  rope = config.get('rope_parameters') or {}
  rope = rope.get('full_attention', rope)
  found = {'rope.freq_base': rope['rope_theta']} if rope else {}
  if rope.get('rope_type') in ('linear', 'yarn'):
    found |= {
      'rope.scaling.type': rope['rope_type'],
      'rope.scaling.factor': rope['factor'],
    }
  if rope.get('rope_type') == 'yarn':
    found |= {
      'rope.scaling.original_context_length': 8,
      'rope.scaling.yarn_beta_fast': rope['beta_fast'],
      'rope.scaling.yarn_beta_slow': rope['beta_slow'],
    }
  return found


def llama3_factors(config: dict):
  """rope_freqs.weight of Llama 3.1's rule; None for any other."""
  rope = config.get('rope_parameters') or {}
  if rope.get('rope_type') != 'llama3':
    return None
  H, found = config['head_dim'], []
  for j in range(0, H, 2):
    wavelength = 2 * np.pi * rope['rope_theta'] ** (j / H)
    turns = rope['original_max_position_embeddings'] / wavelength
    low, high = rope['low_freq_factor'], rope['high_freq_factor']
    smooth = (turns - low) / (high - low)
    ramp = 1 / ((1 - smooth) / rope['factor'] + smooth)
    found.append(1 if turns > high else rope['factor'] if turns < low else ramp)
  return np.array(found, np.float32)


def permuted(weights, heads: int):
  """Rows of q or k in llama.cpp's order of rotary pairs."""
  shape = heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]
  return weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)


def converted(name: str, x, arch: str, config: dict):
  """Tensor of a directory as the file has it."""
  if arch == 'llama' and '.q_proj.' in name:
    return permuted(x, config['num_attention_heads'])
  if arch == 'llama' and '.k_proj.' in name:
    return permuted(x, config['num_key_value_heads'])
  if arch in ('gemma2', 'gemma3') and name.endswith('norm.weight'):
    return x + 1
  if arch == 'gpt2' and x.ndim == 2 and '.c_' in name:
    return x.T
  return x


def byte_vocabulary(directory: Path, rows: int) -> dict:
  """Metadata of the fixtures' tokenizer: bytes, <pad>, <eos>, and one token
  that no text becomes, for the merges."""
  found = json.loads((directory / 'tokenizer.json').read_text())
  tokens = sorted(found['model']['vocab'], key=found['model']['vocab'].get)
  tokens = [*tokens[:256], '<pad>', '<eos>', 'ÿÿ']
  types = [1] * 256 + [3, 3, 1] + [5] * (rows - 259)
  return {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'gpt-2',
    'tokenizer.ggml.tokens': [
      *tokens,
      *(f'[PAD{i}]' for i in range(259, rows)),
    ],
    'tokenizer.ggml.token_type': types,
    'tokenizer.ggml.merges': ['ÿ ÿ'],
    'tokenizer.ggml.eos_token_id': 257,
    'tokenizer.ggml.padding_token_id': 256,
    'tokenizer.chat_template': TEMPLATE,
  }


def add_value(writer, key: str, value) -> None:
  """Adds a value; an array's kind is its first element's."""
  if isinstance(value, list):
    return writer.add_array(key, value)
  kinds = {bool: 'bool', int: 'uint32', float: 'float32', str: 'string'}
  return getattr(writer, f'add_{kinds[type(value)]}')(key, value)


def write(path: Path, arch: str, values: dict, tensors: dict, kinds=None):
  """Writes a GGUF file. values: None leaves one out; kinds: {tensor: Kind},
  F32 for any other."""
  writer = ggml.GGUFWriter(path, arch)
  for key, value in values.items():
    if value is not None and key != 'general.architecture':
      add_value(writer, key, value)
  for name, x in tensors.items():
    kind = (kinds or {}).get(name, Kind.F32)
    x = quants.quantize(np.ascontiguousarray(x, np.float32), kind)
    writer.add_tensor(name, x, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def contents(directory: Path, arch: str, more=None) -> tuple[dict, dict]:
  """(values, tensors) of the file that a directory becomes."""
  config = json.loads((directory / 'config.json').read_text())
  sizes = {theirs: config.get(ours) for ours, theirs in SIZES.items()}
  sizes = {
    SIZES[ours]: config[ours] for ours in SIZES if config.get(ours) is not None
  }
  sizes |= rope_values(config) | (more or {})
  values = {f'{arch}.{name}': value for name, value in sizes.items()}
  values |= byte_vocabulary(directory, config['vocab_size'])
  number = next(i for i, n in ggml.MODEL_ARCH_NAMES.items() if n == arch)
  names = ggml.get_tensor_name_map(number, sizes['block_count'])
  tensors = {}
  for file in sorted(directory.glob('*.safetensors')):
    for name, x in load_file(file).items():
      theirs = names.get_name(name, try_suffixes=('.weight', '.bias'))
      tensors[theirs] = converted(name, x, arch, config)
  factors = llama3_factors(config)
  if factors is not None:
    tensors['rope_freqs.weight'] = factors
  return values, tensors


def edited(name: str, out: Path, **changes) -> Path:
  """A copy of a fixture with another config.json."""
  directory = shutil.copytree(GOLDEN / name, out)
  config = json.loads((directory / 'config.json').read_text()) | changes
  (directory / 'config.json').write_text(json.dumps(config))
  return directory


@pytest.fixture
def made(tmp_path):
  """Fixture made(fixture's name) -> (directory, its GGUF file)."""

  def make(name):
    arch, changes, more = FAMILIES[name]
    directory = edited(name, tmp_path / name, **changes)
    file = tmp_path / f'{name}.gguf'
    write(file, arch, *contents(directory, arch, more))
    return directory, file

  return make


# --- families ----------------------------------------------------------------


def assert_equal_trees(a, b, atol=0.0):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    np.testing.assert_allclose(x, y, rtol=0, atol=atol)


@pytest.mark.parametrize('name', FAMILIES)
def test_a_file_is_the_model_that_it_was_made_from(made, name, tmp_path):
  """Network, parameters, logits, ids and ends; and the export of it."""
  directory, file = made(name)
  want, got = open_model(directory), open_model(file)
  assert got.config == want.config
  assert got.end_tokens == want.end_tokens
  assert got.pad_token == want.pad_token
  theirs, ours = read_params(want), read_params(got)
  # 1 + scale was rounded where the family's norms have it
  assert_equal_trees(theirs, ours, 1e-6 if name.startswith('gemma') else 0)
  tokens = np.load(directory / 'expected.npz')['tokens']
  prompts = data_prompts(tokens)
  policy = want.make_policy()

  @jax.jit
  def logits(params):
    return policy.logits(params, policy.encode(params, prompts).hidden)

  np.testing.assert_allclose(logits(ours), logits(theirs), rtol=0, atol=1e-6)
  back = open_model(save(tmp_path / 'export', got, ours))
  assert back.config == got.config
  assert back.end_tokens == got.end_tokens
  assert back.pad_token == got.pad_token
  assert back.tokenizer.chat_template == TEMPLATE
  assert_equal_trees(ours, read_params(back))
  for model in (want, back):
    ids = [data.prompt_ids(model.tokenizer, text) for text in TEXTS]
    assert ids == [data.prompt_ids(got.tokenizer, text) for text in TEXTS]


def data_prompts(tokens):
  from jaxrl_tok.types import Prompts

  length = np.full(len(tokens), tokens.shape[1], np.int32)
  return Prompts(tokens, length)
