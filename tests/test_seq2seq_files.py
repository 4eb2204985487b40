"""Files of encoder-decoders: embeddings under other names, parameters that may
be missing; adapters beside their matrices."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SEQ2SEQ
from safetensors.numpy import load_file, save_file

from jaxrl_tok import sharding
from jaxrl_tok.hub import families
from jaxrl_tok.hub.directory import open_model, save
from jaxrl_tok.hub.trainable import adapted
from jaxrl_tok.hub.weights import read_params
from jaxrl_tok.models import lora
from jaxrl_tok.step.optimizer import matrix_axes
from jaxrl_tok.types import Prompts

MESH = sharding.make_mesh('data=1', jax.devices()[:1])
COPIES = 'model.encoder.embed_tokens.weight', 'lm_head.weight'


def with_copies(tensors):
  return tensors | dict.fromkeys(COPIES, tensors['model.shared.weight'])


def without_shared(tensors):
  table = tensors.pop('model.shared.weight')
  return tensors | dict.fromkeys(COPIES, table)


def without_bias(tensors):
  tensors.pop('final_logits_bias')
  return tensors


def of_the_inner_model(tensors):
  """facebook/bart-base has neither the first word nor the bias."""
  tensors = without_bias(tensors)
  return {name.removeprefix('model.'): x for name, x in tensors.items()}


WAYS = {f.__name__: f for f in (with_copies, without_shared, without_bias)}
WAYS['of_the_inner_model'] = of_the_inner_model


def rewritten(folder, out, change, **settings):
  """Copies a fixture with other tensors and settings of config.json."""
  shutil.copytree(folder, out)
  file = out / 'model.safetensors'
  save_file(change(load_file(file)), file, metadata={'format': 'pt'})
  config = json.loads((out / 'config.json').read_text())
  (out / 'config.json').write_text(json.dumps(config | settings))
  return out


@pytest.mark.parametrize('name', WAYS)
def test_files_come_out_under_the_names_they_had(name, tmp_path):
  settings = {}
  if name == 'of_the_inner_model':
    settings['architectures'] = ['BartModel']
  folder = rewritten(SEQ2SEQ / 'bart', tmp_path / 'in', WAYS[name], **settings)
  model, plain = open_model(folder), read_params(open_model(SEQ2SEQ / 'bart'))
  params = read_params(model)
  bias = params['logit_bias']['bias']
  if 'shared' not in name and name != 'with_copies':
    assert not bias.any()
    plain['logit_bias'] = params['logit_bias']
  jax.tree.map(np.testing.assert_array_equal, params, plain)
  before = load_file(folder / 'model.safetensors')
  after = load_file(save(tmp_path / 'out', model, params) / 'model.safetensors')
  assert before.keys() == after.keys()
  for key, x in before.items():
    np.testing.assert_array_equal(after[key], x)


def test_other_tensors_are_still_missing(tmp_path):
  def change(tensors):
    tensors.pop('model.decoder.layers.1.fc1.bias')
    return tensors

  folder = rewritten(SEQ2SEQ / 'bart', tmp_path / 'in', change)
  with pytest.raises(ValueError, match=r'missing: model.decoder.layers.1.fc1'):
    open_model(folder)


def test_random_weights_have_a_place_for_all_in_the_files(tmp_path):
  model = open_model(SEQ2SEQ / 'marian')._replace(tensors={})
  params = read_params(open_model(SEQ2SEQ / 'marian'))
  out = save(tmp_path / 'out', model, params)
  assert load_file(out / 'model.safetensors').keys() == (
    load_file(SEQ2SEQ / 'marian/model.safetensors').keys()
  )


# --- configurations


def test_a_t5_is_of_version_1_where_its_head_is_the_embeddings():
  """transformers 5 writes the difference under another name."""
  config = json.loads((SEQ2SEQ / 't5/config.json').read_text())
  config.pop('tie_word_embeddings', None)
  config.pop('scale_decoder_outputs', None)
  first = families.read_config(config)
  later = families.read_config(config | {'tie_word_embeddings': False})
  again = families.read_config(
    config | {'tie_word_embeddings': True, 'scale_decoder_outputs': False}
  )
  D = first.d_model
  assert (first.tie_embeddings, first.logit_scale) == (True, D**-0.5)
  assert (later.tie_embeddings, later.logit_scale) == (False, 1)
  assert later == again


def test_mt5_is_a_t5_with_a_head_of_its_own():
  config = json.loads((SEQ2SEQ / 't5_gated/config.json').read_text())
  theirs = {'model_type': 'mt5', 'architectures': None}
  assert families.read_config(config | theirs) == families.read_config(config)


FAULTS = {
  'no start': (
    'mbart',
    {'decoder_start_token_id': None},
    'decoder_start_token_id is missing',
  ),
  'forced': ('bart', {'forced_bos_token_id': 999}, 'begins with 999'),
  'two tables': (
    'marian',
    {'share_encoder_decoder_embeddings': False},
    'share_encoder_decoder_embeddings False is not supported',
  ),
  'heads': ('bart', {'encoder_attention_heads': 5}, 'must be a multiple of'),
  'no heads': ('bart', {'decoder_attention_heads': 0}, 'must be a multiple of'),
  'buckets': (
    't5',
    {'relative_attention_num_buckets': 2},
    'are no relative positions',
  ),
  'layers': ('bart', {'decoder_layers': 0}, 'num_layers 0 is not'),
  'activation': ('t5', {'dense_act_fn': 'tanh'}, "activation 'tanh'"),
  'classifier': (
    'bart',
    {'architectures': ['BartForSequenceClassification'], 'num_labels': 1},
    'a classifier that is an encoder-decoder is not supported',
  ),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_of_config_is_one_line(name):
  folder, changes, said = FAULTS[name]
  config = json.loads((SEQ2SEQ / folder / 'config.json').read_text())
  with pytest.raises(ValueError, match=said) as caught:
    families.read_config(config | changes)
  assert '\n' not in str(caught.value)


# --- adapters


@functools.cache
def opened(name: str):
  """A fixture with adapters of rank 2: (model, Trainable, adapters, base)."""
  model = open_model(SEQ2SEQ / name)
  trainable = adapted(model, lora.LoraConfig(2, 6.0))
  return model, trainable, *trainable.load(MESH)


def logits_of(policy, params, name):
  with np.load(SEQ2SEQ / name / 'expected.npz') as file:
    prompts = Prompts(file['prompts'], file['length'])
    tokens = file['decoder'][:, int(file['first']) :]
  prefix = policy.encode(params, prompts)
  hidden, _ = policy.extend(params, prefix, tokens, None, 0)
  return policy.logits(params, hidden)


@pytest.mark.parametrize('name', ['t5_gated', 'bart'])
def test_adapters_are_beside_every_matrix_of_both_sides(name):
  model, trainable, adapters, base = opened(name)
  policy, rng = model.make_policy(), np.random.default_rng(0)
  random = {
    module: {
      'a': sides['a'],
      'b': 0.1 * rng.normal(size=sides['b'].shape).astype(np.float32),
    }
    for module, sides in adapters.items()
  }

  def run(adapters, base):
    return logits_of(policy, trainable.merge(adapters, base), name)

  @jax.jit
  def beside(adapters, base):
    """Gradient of a loss by the adapters, and the logits."""

    def loss(adapters):
      logits = run(adapters, base)
      return (logits**2).sum(), logits

    return jax.grad(loss, has_aux=True)(adapters)

  plain = jax.jit(functools.partial(run, None))
  want = plain(base)
  np.testing.assert_allclose(beside(adapters, base)[1], want, atol=3e-5)
  gradient, got = beside(random, base)
  assert np.abs(got - want).max() > 0.1
  mappings = model.param_mappings
  modules = lora.targeted(mappings, ['all-linear'])
  full = jax.jit(lora.make_full_params(mappings, modules, 3.0))(random, base)
  np.testing.assert_allclose(got, plain(full), atol=1e-4)
  for module, sides in gradient.items():
    for g in sides.values():  # of each layer
      assert np.abs(g).max((1, 2)).min() > 1e-6, module
  L = model.config.decoder.num_layers
  across = {n: x for n, x in adapters.items() if 'encdec' in n.lower()}
  across |= {n: x for n, x in adapters.items() if 'encoder_attn' in n}
  assert len(across) == 4
  assert {len(sides['a']) for sides in across.values()} == {L}


def test_adapters_are_saved_as_those_of_two_sides(tmp_path):
  model, trainable, adapters, base = opened('bart')
  trainable.export(tmp_path, adapters, base, None)
  config = json.loads((tmp_path / 'adapter/adapter_config.json').read_text())
  assert config['task_type'] == 'SEQ_2_SEQ_LM'
  again = adapted(
    model, lora.LoraConfig(2, 6.0), directory=tmp_path / 'adapter'
  )
  jax.tree.map(np.testing.assert_array_equal, again.load(MESH)[0], adapters)
  exported = read_params(open_model(tmp_path / 'export'))
  jax.tree.map(np.testing.assert_array_equal, exported, base)


def test_muon_takes_each_head_across():
  policy = open_model(SEQ2SEQ / 'bart').make_policy()
  shapes = jax.eval_shape(policy.init, jax.random.key(0))
  found = {}
  for path, x in jax.tree_util.tree_leaves_with_path(shapes):
    name = sharding.path_name(path)
    found[name] = matrix_axes(name, jnp.ndim(x))
  base = 'decoder/layers/cross_attention/'
  axes = {
    name: (found[base + name].reduction_axis, found[base + name].output_axis)
    for name in ('q', 'kv', 'out')
  }
  assert axes == {
    'q': ((1,), (3,)),
    'kv': ((1,), (4,)),
    'out': ((1, 2, 3), (4,)),
  }
  for name in ('embed/embedding', 'logit_bias/bias', f'{base}q_bias'):
    assert found[name] is None
