"""Refusals of unreadable directories: one line with the fact and the cure.

Each fault is made in a copy of a directory that torch saved (golden/families).
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl_tok import data
from jaxrl_tok.hub import families
from jaxrl_tok.hub.directory import open_model
from jaxrl_tok.hub.weights import read_params

GOLDEN = Path(__file__).parent / 'golden/families'


@pytest.fixture
def broken(tmp_path):
  """Fixture broken(name, **changes of config.json) -> a directory to break."""

  def copy(name='llama', drop=(), **changes):
    out = shutil.copytree(GOLDEN / name, tmp_path / name)
    path = out / 'config.json'
    found = json.loads(path.read_text()) | changes
    num_kept = {k: v for k, v in found.items() if k not in drop}
    path.write_text(json.dumps(num_kept))
    return out

  return copy


def edit_tensors(directory, **changes):
  """Changes tensors {name: array, or None to leave it out} of a file."""
  path = directory / 'model.safetensors'
  found = load_file(path) | changes
  save_file({k: v for k, v in found.items() if v is not None}, path)


def assert_fault(directory, *facts, kind=ValueError):
  with pytest.raises(kind) as e:
    open_model(directory)
  said = str(e.value)
  assert type(e.value) is kind
  assert '\n' not in said
  assert said.startswith(str(directory))
  for fact in facts:
    assert fact in said


# --- config.json

LABELS = {'0': 'good', '1': 'bad', '2': 'unsure'}
ONLY_LLAMA = 'supported: LlamaForCausalLM and ForSequenceClassification of one'
LONG = {'short_factor': [1.0] * 4, 'long_factor': [1.0] * 4, 'factor': 2.0}


@pytest.mark.parametrize('kind', ['mamba', 'gemma3', None, 5, ['llama']])
def test_an_unknown_family_is_named_with_those_there_are(broken, kind):
  said = f'model_type {kind!r} is not supported; supported: '
  assert_fault(broken(model_type=kind), said + ', '.join(families.FAMILIES))


@pytest.mark.parametrize(
  ('name', 'changes', 'says'),
  [
    ('llama', {'architectures': ['LlamaForTokenClassification']}, ONLY_LLAMA),
    ('llama', {'architectures': [7]}, 'architecture 7 is not supported; supp'),
    ('llama_classifier', {'id2label': LABELS}, 'classifier of 3 labels is no'),
    ('llama', {'auto_map': {'AutoConfig': 'evil.Evil'}}, '(auto_map), which i'),
    ('llama', {'quantization_config': {'bits': 4}}, 'use the model they were'),
    ('llama', {'hidden_act': 'tanh'}, "activation 'tanh' is not supported; su"),
    ('gpt2', {'activation_function': 'tanh'}, "activation 'tanh' is not suppo"),
    ('llama', {'num_key_value_heads': 3}, 'must be a multiple of num_kv_head'),
    ('llama', {'head_dim': 7}, 'head_dim'),
    ('llama', {'hidden_size': 'wide'}, "hidden_size is 'wide', not a number"),
    ('llama', {'vocab_size': 264.5}, 'vocab_size'),
    ('llama', {'num_hidden_layers': 0}, 'num_hidden_layers is 0, not a numbe'),
    ('llama', {'attention_bias': 'no'}, 'attention_bias'),
    ('gpt2', {'n_head': -3}, 'n_head is -3, not a number above zero'),
    ('qwen3_moe', {'num_experts_per_tok': 5}, 'is more than the 4 experts'),
    ('qwen3', {'layer_types': ['linear_attention'] * 2}, 'linear_attention i'),
    ('smollm3', {'no_rope_layers': [1]}, 'no_rope_layers has 1 layers, not 4'),
    ('gemma3_text', {'use_bidirectional_attention': True}, 'is not supported'),
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'only False'),
  ],
)
def test_what_the_decoder_cannot_do_is_refused(broken, name, changes, says):
  assert_fault(broken(name, **changes), says)


@pytest.mark.parametrize(
  ('rope', 'says'),
  [
    ({'rope_type': 'dynamic', 'factor': 2.0}, "rope scaling 'dynamic' is not"),
    ({'rope_type': 'longrope', **LONG}, "'longrope' is not supported; support"),
    ({'rope_type': 'ntk-by-parts'}, 'supported: default, linear, llama3, yarn'),
    ({'rope_type': 'linear'}, 'factor'),
    ({'rope_type': 'linear', 'factor': 0}, 'has numbers that cannot be'),
    ({'rope_type': 'linear', 'factor': 'two'}, "'factor': 'two'"),
    ({'rope_theta': None}, "'rope_theta': None"),
    ({'rope_theta': -1.0}, "'rope_theta': -1.0"),
  ],
)
def test_rotary_positions_that_cannot_be_are_named(broken, rope, says):
  plain = {'rope_type': 'default', 'rope_theta': 100.0}
  assert_fault(broken(rope_parameters=plain | rope), says)


def test_an_older_name_of_a_scaling_is_refused_by_it(broken):
  old = {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}
  directory = broken(drop=['rope_parameters'], rope_theta=100.0, **old)
  assert_fault(directory, "rope scaling 'dynamic' is not supported")


@pytest.mark.parametrize(
  ('name', 'size'),
  [
    ('llama', 'vocab_size'),
    ('llama', 'hidden_size'),
    ('llama', 'num_attention_heads'),
    ('gpt2', 'n_layer'),
    ('gpt2', 'n_head'),
  ],
)
def test_a_size_that_config_json_lacks_is_named(broken, name, size):
  assert_fault(
    broken(name, drop=[size]), f"config.json has no '{size}'; fetch it aga"
  )


@pytest.mark.parametrize('file', ['config.json', 'generation_config.json'])
@pytest.mark.parametrize(
  ('content', 'says'),
  [
    (b'{"model_type": ', 'not JSON'),
    (b'', 'not JSON'),
    (b'\xff\xfe', 'not JSON'),
    (b'[' * 100_000, 'not JSON'),
    (b'{"n": ' + b'1' * 5000 + b'}', 'not JSON'),
    (b'[1]', 'a list, not an object'),
  ],
  ids=['cut', 'empty', 'no text', 'deep', 'long', 'a list'],
)
def test_a_file_that_is_no_object_is_named(broken, file, content, says):
  directory = broken()
  (directory / file).write_bytes(content)
  assert_fault(directory, f'{file}: {says}', 'fetch it again')


@pytest.mark.parametrize(
  'file',
  ['config.json', 'generation_config.json', 'model.safetensors.index.json'],
)
def test_a_byte_order_mark_is_passed_over(broken, file):
  directory = broken('llama_linear')
  want = open_model(directory)
  (directory / file).write_text((directory / file).read_text(), 'utf-8-sig')
  found = open_model(directory)
  assert found.config == want.config
  assert found.end_tokens == want.end_tokens
  assert found.tensors == want.tensors


def test_no_config_json_is_said_with_what_to_pass(broken, tmp_path):
  directory = broken()
  (directory / 'config.json').unlink()
  assert_fault(directory, 'no config.json', '--model', kind=FileNotFoundError)
  nowhere = tmp_path / 'nowhere'
  assert_fault(nowhere, 'config.json', 'pass --model', kind=FileNotFoundError)


# --- the weights

NORM = 'model.norm.weight'


def test_weights_that_are_missing_or_too_many_are_named(broken):
  directory, other = broken(), 'model.layers.2.mlp.up_proj.weight'
  edit_tensors(directory, **{NORM: None})
  assert_fault(
    directory, f'weights are missing: {NORM}; use the files of one model'
  )
  edit_tensors(directory, **{NORM: np.ones(24, 'f'), other: np.ones(2, 'f')})
  assert_fault(
    directory, f'weights of no use: {other}; use the files of one model'
  )
  save_file({'x': np.ones(2, 'f')}, directory / 'model.safetensors')
  assert_fault(
    directory, 'model.embed_tokens.weight', 'and 30 more; use the files'
  )


@pytest.mark.parametrize(
  ('name', 'shape', 'want'),
  [
    ('model.layers.0.self_attn.k_proj.weight', (24, 16), '[16, 24]'),
    ('model.layers.1.self_attn.v_proj.weight', (15, 24), '[16, 24]'),
    ('model.layers.1.self_attn.q_proj.weight', (768,), '[32, 24]'),
    ('model.layers.0.self_attn.q_proj.bias', (4, 8), '[32]'),
    ('model.layers.0.mlp.down_proj.weight', (28, 24), '[24, 28]'),
    ('model.layers.0.input_layernorm.weight', (1, 24), '[24]'),
    ('model.norm.weight', (), '[24]'),
    ('model.embed_tokens.weight', (265, 24), '[264, 24]'),
  ],
)
def test_misshapen_weights_are_named(broken, name, shape, want):
  directory = broken()
  edit_tensors(directory, **{name: np.zeros(shape, np.float32)})
  assert_fault(
    directory, f'{name} is {list(shape)}, not {want}; use the files of'
  )


@pytest.mark.parametrize('dtype', ['int8', 'float64', 'bool'])
def test_a_dtype_that_is_no_weights_is_named(broken, dtype):
  directory = broken()
  edit_tensors(directory, **{NORM: np.ones(24, dtype)})
  theirs = {'int8': 'I8', 'float64': 'F64', 'bool': 'BOOL'}[dtype]
  assert_fault(directory, f'{NORM} is {theirs}, not F32 or BF16 or F16')


def test_a_repeated_tied_head_and_rotary_buffers_are_passed_over(broken):
  directory = broken('qwen2')
  table = load_file(directory / 'model.safetensors')[
    'model.embed_tokens.weight'
  ]
  buffer = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  edit_tensors(directory, **{'lm_head.weight': table, buffer: np.ones(2, 'f')})
  assert 'head' not in read_params(open_model(directory))


@pytest.mark.parametrize('size', [0, 4, 8, 100, 5000, 90_000, -1])
@pytest.mark.parametrize(
  ('name', 'file'),
  [
    ('llama', 'model.safetensors'),
    ('llama_linear', 'model-00002-of-00003.safetensors'),
  ],
)
def test_a_truncated_file_is_named(broken, name, file, size):
  path = broken(name) / file
  whole = path.read_bytes()
  path.write_bytes(whole[: min(size, len(whole) - 1)])
  assert_fault(path.parent, f'{file} is damaged', 'fetch it again')


def test_a_missing_shard_is_named(broken):
  directory = broken('llama_linear')
  (directory / 'model-00002-of-00003.safetensors').unlink()
  said = 'index.json names model-00002-of-00003.safetensors, which is missing'
  assert_fault(directory, said, 'fetch it again', kind=FileNotFoundError)


@pytest.mark.parametrize(
  'file',
  ['../x.safetensors', '/etc/x', 'a/x.safetensors', '..', '', 5, '*', 'x.bin'],
)
def test_an_index_that_points_elsewhere_is_not_followed(broken, file):
  directory = broken('llama_linear')
  save_file({NORM: np.ones(24, 'f')}, directory.parent / 'x.safetensors')
  index = directory / 'model.safetensors.index.json'
  found = json.loads(index.read_text())
  found['weight_map'][NORM] = file
  index.write_text(json.dumps(found))
  assert_fault(directory, f'points to {file!r}', 'it is not to be trusted')


@pytest.mark.parametrize(
  'content', ['{"weight', '[]', '{}', '{"weight_map": ["a"]}', '\xff']
)
def test_an_index_that_is_none_is_named(broken, content):
  directory = broken('llama_linear')
  index = directory / 'model.safetensors.index.json'
  index.write_bytes(content.encode('latin-1'))
  assert_fault(directory, 'index.json: no shard index; fetch it again')


def test_a_pickle_is_never_read(broken):
  path = broken() / 'model.safetensors'
  path.rename(path.parent / 'pytorch_model.bin')
  said = 'convert the weights to safetensors (pickles are never read)'
  assert_fault(path.parent, said, kind=FileNotFoundError)


# --- the tokenizer, end and pad


@pytest.mark.parametrize('name', ['llama', 'qwen2', 'gpt2', 'gemma2'])
def test_missing_tokenizer_files_are_said(broken, name):
  directory = broken(name)
  (directory / 'tokenizer.json').unlink()
  assert_fault(directory, 'no tokenizer files', 'put those of the model there')
  (directory / 'tokenizer_config.json').unlink()
  assert_fault(directory, 'no tokenizer files', 'put those of the model there')


@pytest.mark.parametrize('content', ['{"a": ', '{}', '[1]'])
def test_a_broken_tokenizer_is_said(broken, content):
  directory = broken()
  (directory / 'tokenizer.json').write_text(content)
  assert_fault(
    directory, 'no tokenizer could be read', 'put the tokenizer files'
  )


def test_a_tokenizers_own_code_is_never_run(broken, tmp_path):
  directory = broken()
  ran = tmp_path / 'ran'
  (directory / 'evil.py').write_text(f'open({str(ran)!r}, "w")')
  evil = {'auto_map': {'AutoTokenizer': ['evil.Evil', None]}}
  evil |= {'tokenizer_class': 'Evil', 'eos_token': '<eos>'}
  (directory / 'tokenizer_config.json').write_text(json.dumps(evil))
  assert data.prompt_ids(open_model(directory).tokenizer, 'no <eos>')[-1] == 257
  (directory / 'tokenizer.json').rename(directory / 'vocab.json')
  assert_fault(directory, 'no tokenizer could be read')
  assert not ran.exists()


def test_a_tokenizer_of_another_model_is_refused(broken):
  said = 'the tokenizer has 256 ids and the model 255 rows; use the tokenizer'
  assert_fault(broken(vocab_size=255), said)


@pytest.mark.parametrize(
  ('fields', 'fact'),
  [
    ({'eos_token_id': [257, 264]}, 'end token 264 is none of the 264 ids'),
    ({'eos_token_id': -1}, 'end token -1 is none of the 264 ids'),
    ({'eos_token_id': 'stop'}, "end token 'stop' is none of the 264 ids"),
    ({'eos_token_id': 1.5}, 'end token 1.5 is none of the 264 ids'),
  ],
)
def test_special_ids_that_cannot_be_are_named(broken, fields, fact):
  directory = broken()
  (directory / 'generation_config.json').write_text(json.dumps(fields))
  assert_fault(directory, fact, 'generation_config.json')


@pytest.mark.parametrize('pad', [-1, 999, [256], 1.5])
def test_a_pad_that_is_no_row_is_the_end(broken, pad):
  directory = broken()
  fields = {'eos_token_id': [7, 257], 'pad_token_id': pad}
  (directory / 'generation_config.json').write_text(json.dumps(fields))
  assert open_model(directory).pad_token == 7


@pytest.mark.parametrize(('text', 'said'), [('a', 1), ('<', 0)])
def test_23_a_pad_that_is_a_word_is_said(broken, text, said):
  """It would silently be sampled never."""
  directory = broken()
  tokenizer = open_model(directory).tokenizer
  (pad,) = tokenizer.encode(text, add_special_tokens=False)
  fields = {'eos_token_id': [7, 257], 'pad_token_id': pad}
  (directory / 'generation_config.json').write_text(json.dumps(fields))
  notes = [note for note in open_model(directory).notes if 'the pad' in note]
  line = (
    f"the pad token {pad} is the text 'a', which is then never sampled; give "
    'pad_token_id a token of its own, or an end token, in '
    'generation_config.json'
  )
  assert notes == [line] * said
