"""Models survive their Hugging Face directory, and the directory is as
transformers would have written it.

Meaning of the files: test_hf_layout.py; refusals: test_hf_faults.py.
"""

import functools
import gc
import json
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from jaxrl_tok import checkpoint, sharding
from jaxrl_tok.data.tokenizers import byte_tokenizer, decode_all
from jaxrl_tok.hub import export, families, weights
from jaxrl_tok.hub.directory import (
  atomic_directory,
  open_model,
  save,
  write_description,
)
from jaxrl_tok.hub.model import Model
from jaxrl_tok.hub.trainable import full
from jaxrl_tok.hub.weights import param_structs, read_params
from jaxrl_tok.models import lora
from jaxrl_tok.models.transformer import PARTITION_RULES, make_policy
from jaxrl_tok.types import TrainState

GOLDEN = Path(__file__).parent / 'golden/families'
MODELS = sorted(p.name for p in GOLDEN.iterdir() if 'lora' not in p.name)
MESH = 'data=2,fsdp=2,tensor=2'
# axes of different sizes: one in the wrong place has the wrong size
V, D, L, N, K, H, F = 263, 60, 2, 6, 2, 10, 37
PLAIN = {
  'architectures': ['Qwen2ForCausalLM'],
  'model_type': 'qwen2',
  'hidden_size': D,
  'intermediate_size': F,
  'num_attention_heads': N,
  'num_hidden_layers': L,
  'num_key_value_heads': K,
  'rms_norm_eps': 3e-4,
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 123_456.0},
  'tie_word_embeddings': False,
  'vocab_size': V,
}
TIED, VALUE = {'tie_word_embeddings': True}, {'jaxrl_tok_value_head': True}
DESCRIBED = {
  'untied': PLAIN,
  'tied': PLAIN | TIED,
  'value': PLAIN | VALUE,
  'tied_value': PLAIN | TIED | VALUE,
}


def model_of(hf_config, ends=(257,), pad=256):
  tokenizer = byte_tokenizer()
  tokenizer.chat_template = '{{ messages[0].content }}'
  config = families.read_config(hf_config)
  return Model(config, hf_config, tokenizer, ends, pad, 'random weights')


@functools.cache
def shapes_of(config):
  return jax.eval_shape(make_policy(config).init, jax.random.key(0))


def random_params(model, dtype=np.float32):
  """Draws every leaf anew: initial zeros and ones would hide mistakes."""
  rng = np.random.default_rng(7)

  def draw(path, leaf):
    scale = 0.3 if leaf.ndim > 1 else 1.0
    mean = 1.0 if 'scale' in jax.tree_util.keystr(path) else 0.0
    return (mean + scale * rng.normal(size=leaf.shape)).astype(dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes_of(model.config))


@pytest.fixture(scope='module', params=DESCRIBED)
def saved(request, tmp_path_factory):
  """Saves a model: (model, parameters, their directory)."""
  model = model_of(DESCRIBED[request.param])
  params = random_params(model)
  out = tmp_path_factory.mktemp('hf') / 'policy'
  assert save(out, model, params) == out
  return model, params, out


def assert_same(a, b):
  """Compares trees bit for bit."""

  def one(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()

  jax.tree.map(one, a, b)


def tensors_of(directory):
  files = directory.glob('*.safetensors')
  return {k: v for file in files for k, v in load_file(file).items()}


def read_json(path):
  return json.loads(path.read_text())


# --- out and back in


def test_what_is_loaded_is_what_was_saved(saved):
  model, params, out = saved
  loaded = open_model(out)
  assert loaded.config == model.config
  assert (loaded.end_tokens, loaded.pad_token) == ((257,), 256)
  assert_same(read_params(loaded), params)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, np.float16])
def test_half_precision_survives_bitwise(tmp_path, dtype):
  model = model_of(DESCRIBED['tied_value'])
  params = jax.tree.map(jnp.asarray, random_params(model, dtype))
  out = save(tmp_path / 'policy', model, params)
  assert read_json(out / 'config.json')['dtype'] == jnp.dtype(dtype).name
  loaded = open_model(out)
  assert_same(read_params(loaded), params)
  wide = jax.tree.map(lambda x: np.asarray(x).astype(np.float32), params)
  assert_same(read_params(loaded, dtype='float32'), wide)


def test_a_dtype_that_is_asked_for_is_the_files_numbers_rounded():
  model = open_model(GOLDEN / 'llama')
  found = read_params(model, dtype='bfloat16')
  assert {x.dtype.name for x in jax.tree.leaves(found)} == {'bfloat16'}

  def rounded(x):  # to the nearest, ties to even
    bits = np.asarray(x).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)

  assert_same(
    jax.tree.map(lambda x: np.asarray(x).view(np.uint16), found),
    jax.tree.map(rounded, read_params(model)),
  )


@pytest.mark.parametrize('name', MODELS)
def test_what_torch_saved_is_saved_as_it_came(tmp_path, name):
  source, out = GOLDEN / name, tmp_path / 'out'
  model = open_model(source)
  assert model.config.value_head == ('classifier' in name)
  assert model.config.lm_head != model.config.value_head
  save(out, model, read_params(model))
  assert_same(tensors_of(out), tensors_of(source))
  num_kept = {p.name for p in source.glob('*.json') if 'index' not in p.name}
  assert num_kept == {p.name for p in out.glob('*.json')}
  assert read_json(out / 'config.json') == read_json(source / 'config.json')
  for file in num_kept - {'config.json'}:
    assert (out / file).read_bytes() == (source / file).read_bytes()


def test_shards_hold_what_their_index_says(tmp_path):
  model = open_model(GOLDEN / 'llama_linear')  # it is sharded
  params = read_params(model)
  out = save(tmp_path / 'out', model, params, shard_bytes=10_000)
  shards = {p.name: load_file(p) for p in out.glob('*.safetensors')}
  assert len(shards) == 5
  assert 'model.safetensors' not in shards
  index = read_json(out / 'model.safetensors.index.json')
  assert index['weight_map'] == {n: f for f, x in shards.items() for n in x}
  size = sum(x.nbytes for x in jax.tree.leaves(params))
  assert index['metadata']['total_size'] == size
  assert_same(tensors_of(out), tensors_of(GOLDEN / 'llama_linear'))
  assert_same(read_params(open_model(out)), params)


def test_what_is_saved_again_is_the_same_file(saved, tmp_path):
  loaded = open_model(saved[2])
  again = save(tmp_path / 'policy', loaded, read_params(loaded))
  for file in saved[2].iterdir():
    assert (again / file.name).read_bytes() == file.read_bytes()


def test_the_tokenizer_survives(saved):
  before, after = byte_tokenizer(), open_model(saved[2]).tokenizer
  text = ' né  €\U0001f600\x00\r\n . ,'
  assert after(text)['input_ids'] == before(text)['input_ids']
  assert decode_all(after, [before(text)['input_ids']]) == [text]
  assert (after.eos_token, after.pad_token) == ('<eos>', '<pad>')
  assert after.chat_template == '{{ messages[0].content }}'


def test_only_files_that_run_no_code_are_written(saved):
  assert {p.name for p in saved[2].iterdir()} == {
    'README.md',
    'chat_template.jinja',
    'config.json',
    'generation_config.json',
    'model.safetensors',
    'tokenizer.json',
    'tokenizer_config.json',
  }
  assert list(saved[2].parent.iterdir()) == [saved[2]]  # no leftovers


def test_a_save_that_cannot_be_leaves_what_was_there(tmp_path):
  model = model_of(PLAIN)
  params = random_params(model) | {'extra': {'kernel': np.zeros(3)}}
  with pytest.raises(ValueError, match='no place in the file for extra/kernel'):
    save(tmp_path / 'policy', model, params)
  assert list(tmp_path.iterdir()) == []
  (tmp_path / 'model.safetensors').write_text('precious')
  with pytest.raises(FileExistsError, match='give another directory'):
    save(tmp_path, model, random_params(model))
  assert (tmp_path / 'model.safetensors').read_text() == 'precious'
  assert len(list(tmp_path.iterdir())) == 1


def test_a_killed_save_leaves_nothing_behind(tmp_path):
  stale = tmp_path / 'policy.partial'
  stale.mkdir()
  (stale / 'pytorch_model.bin').write_text('stale')
  model = model_of(PLAIN)
  out = save(tmp_path / 'policy', model, random_params(model))
  assert not (out / 'pytorch_model.bin').exists()
  assert list(tmp_path.iterdir()) == [out]


# --- places and memory


@pytest.mark.parametrize('name', ['llama', 'qwen3_moe'])
def test_parameters_are_read_to_where_the_rules_put_them(tmp_path, name):
  model, mesh = open_model(GOLDEN / name), sharding.make_mesh(MESH)
  params, structs = read_params(model, mesh), param_structs(model)
  places = sharding.tree_shardings(mesh, structs, PARTITION_RULES)
  assert jax.tree.map(lambda x: x.sharding, params) == places
  leaves = jax.tree.leaves(params)
  assert any(len(set(x.sharding.spec) - {None}) == 2 for x in leaves)
  assert_same(params, read_params(model))
  out = save(tmp_path / 'out', model, params)
  assert_same(tensors_of(out), tensors_of(GOLDEN / name))


@pytest.fixture(scope='module')
def large(tmp_path_factory):
  """Two tensors of 30 MiB, and a parameter of 23 that is two of the file's."""
  sizes = {'vocab_size': 2**17, 'intermediate_size': 50_000}
  model = model_of(PLAIN | sizes | {'num_hidden_layers': 1})
  params = jax.tree.map(
    lambda s: np.ones(s.shape, np.float32), shapes_of(model.config)
  )
  return save(tmp_path_factory.mktemp('large') / 'policy', model, params)


def traced(function):
  """Traces a call: (its result, MiB held at most, MiB left)."""
  gc.collect()
  tracemalloc.start()
  found = function()
  most = tracemalloc.get_traced_memory()[1]
  gc.collect()
  left = tracemalloc.get_traced_memory()[0]
  tracemalloc.stop()
  return found, most / 2**20, left / 2**20


@pytest.mark.parametrize('spec', ['data=1', MESH])
@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_reading_holds_one_parameter_at_a_time(large, monkeypatch, spec, dtype):
  monkeypatch.setattr(weights, 'READ_BYTES', 2**20)
  mesh = sharding.make_mesh(spec, jax.devices()[: 8 if spec == MESH else 1])
  model = open_model(large)
  params, most, left = traced(lambda: read_params(model, mesh, dtype))
  largest = max(x.nbytes for x in jax.tree.leaves(params)) / 2**20
  assert largest == (30 if dtype is None else 15)
  # what is left is placed: a CPU's array may be the one that was filled
  assert most - left <= 1.2 * largest
  assert spec != MESH or left < 1


def test_saving_keeps_no_second_copy_on_the_host(large, tmp_path):
  model = open_model(large)
  params = read_params(model, sharding.make_mesh(MESH))
  out = tmp_path / 'out'
  size = 20 * 2**20  # each of the large ones has its shard
  _, most, left = traced(lambda: save(out, model, params, shard_bytes=size))
  assert left < 1
  assert most < 2.1 * 30  # a parameter, and as tensors of the file


# --- what is trained


def test_a_whole_model_is_trained_and_exported(tmp_path):
  model, mesh = open_model(GOLDEN / 'qwen2'), sharding.make_mesh(MESH)
  trainable = full(model, 'bfloat16')
  trained, frozen = trainable.load(mesh)
  assert frozen is trainable.load_frozen(mesh) is None
  assert trainable.merge(trained, frozen) is trained
  shapes, nothing = trainable.structs()
  assert nothing is None
  assert shapes == jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trained
  )
  (tmp_path / 'export').mkdir()  # a resumed run's earlier one
  for scale in (1, 2):
    new = jax.tree.map(lambda x, s=scale: x * s, trained)
    out = trainable.export(tmp_path, new, None, {'title': 'run policy'})
    assert_same(read_params(open_model(out)), jax.device_get(new))
  assert [p.name for p in tmp_path.iterdir()] == ['export']
  assert (out / 'README.md').read_text().count('# run policy\n') == 1


def test_a_shared_critics_head_is_exported(tmp_path):
  model = model_of(PLAIN)
  trained = random_params(model.with_value_head())
  out = full(model).export(tmp_path, trained, None, {})
  loaded = open_model(out)
  assert loaded.config.value_head
  assert_same(read_params(loaded), trained)


@pytest.mark.parametrize('spec', ['data=1', MESH])
def test_a_model_without_files_begins_at_random(spec):
  model = model_of(PLAIN)
  mesh = sharding.make_mesh(spec, jax.devices()[: 8 if spec == MESH else 1])
  trained, frozen = full(model, seed=5).load(mesh)
  assert frozen is None
  want = jax.jit(model.make_policy().init)(jax.random.key(5))
  assert_same(trained, want)
  assert trained['embed']['embedding'].sharding.mesh == mesh


# --- checkpoints of a run


def write_run(run_dir, model, trained, /, **flags):
  """Writes the files of a run that export reads. trained: {step: params}."""
  run_dir.mkdir()
  plain = {'model': None, 'model_commit': None, 'param_dtype': 'auto'}
  plain['compute_dtype'] = 'float32'
  plain |= {'data': 'own.jsonl', 'algorithm': 'reinforce', 'adapter': None}
  plain['value_head'] = False
  (run_dir / 'config.yaml').write_text(yaml.safe_dump(plain | flags))
  with atomic_directory(run_dir / 'model') as part:
    write_description(part, model)
  with checkpoint.open_checkpoints(run_dir, 2) as manager:
    for step, params in trained.items():
      key, params = jax.random.key(0), jax.tree.map(jnp.asarray, params)
      state = TrainState(jnp.int32(step), params, (), key, {})
      checkpoint.save(manager, state, {'next': np.int32(0)}, {}, {})
  return str(run_dir)


def test_a_runs_checkpoints_are_exported(tmp_path, capsys):
  model = model_of(PLAIN)
  old = random_params(model)
  new = jax.tree.map(lambda x: 2 * x, old)
  run = write_run(tmp_path / 'run', model, {3: old, 5: new})
  steps = {tmp_path / 'new': [], tmp_path / 'old': ['--step', '3']}
  for out, step in steps.items():
    export.main([run, str(out), *step])
    loaded = open_model(out)
    assert loaded.config == model.config
    assert_same(read_params(loaded), old if step else new)
    card = (out / 'README.md').read_text()
    assert f'| steps | {3 if step else 5} |' in card
    assert '| data | own.jsonl |' in card
  assert capsys.readouterr().out.split() == list(map(str, steps))
  for wrong, says in (
    ([run, tmp_path / 'new'], 'new exists; give another directory'),
    ([run, tmp_path / 'x', '--step', '7'], 'no checkpoint of step 7; there ar'),
    ([tmp_path, tmp_path / 'x'], 'is no run directory (no config.yaml)'),
    ([tmp_path / 'new', tmp_path / 'x'], 'is no run directory'),
  ):
    with pytest.raises(SystemExit) as e:
      export.main(list(map(str, wrong)))
    said = capsys.readouterr().err
    assert (e.value.code, said.count('\n')) == (2, 1)
    assert said.startswith('error: ')
    assert says in said
  assert not (tmp_path / 'x').exists()


def test_a_runs_adapters_are_exported_with_their_base(tmp_path):
  model, targets = open_model(GOLDEN / 'qwen2'), ['down_proj']
  modules = lora.targeted(model.param_mappings, targets)
  adapters = jax.tree.map(
    lambda x: x + 0.1, lora.init(modules, 2, jax.random.key(0))
  )
  run = write_run(
    tmp_path / 'run',
    model,
    {1: adapters},
    model=str(GOLDEN / 'qwen2'),
    adapter={'rank': 2, 'alpha': 16.0, 'targets': targets},
  )
  export.main([run, str(tmp_path / 'out')])
  base, found = tensors_of(GOLDEN / 'qwen2'), tensors_of(tmp_path / 'out')
  for module, x in lora.by_module(adapters, modules).items():
    base[f'{module}.weight'] += 8 * np.asarray(x['b']) @ np.asarray(x['a'])
  assert base.keys() == found.keys()
  for name, x in found.items():
    np.testing.assert_allclose(x, base[name], atol=1e-6)
