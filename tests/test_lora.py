"""Adapters: PEFT's files, PEFT's numbers, and a base that stays as it is."""

import functools
import json
import math
import shutil
import types

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from conftest import (
  FOUR,
  GOLDEN,
  ONE,
  make_rollout,
  make_scored,
  random_prompts,
)
from safetensors.numpy import load_file
from test_families import LORAS, TOLERANCE
from test_hf import tensors_of

from jaxrl_tok import distribution, sharding
from jaxrl_tok.credit import advantages, algorithms
from jaxrl_tok.hub import adapters as peft
from jaxrl_tok.hub import export
from jaxrl_tok.hub.directory import open_model
from jaxrl_tok.hub.trainable import adapted
from jaxrl_tok.hub.weights import read_params
from jaxrl_tok.models import lora
from jaxrl_tok.models.blocks import project
from jaxrl_tok.policy import evaluate
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.step.state import make_state
from jaxrl_tok.step.update import make_update
from jaxrl_tok.types import Prompts

pytestmark = pytest.mark.usefixtures('few_programs')

MESH = sharding.make_mesh('data=1', jax.devices()[:1])


def opened(name: str, dtype: str | None = None):
  """Opens a *_lora fixture: (model, Trainable, adapters, base)."""
  model = open_model(GOLDEN / name.removesuffix('_lora'))
  config = peft.load_config(GOLDEN / name)
  trainable = adapted(model, config, dtype, directory=GOLDEN / name)
  return model, trainable, *trainable.load(MESH)


def mapped(model, config) -> tuple:
  """Arguments of make_full_params."""
  mappings = model.param_mappings
  return mappings, lora.targeted(mappings, config.targets), config.scale


def same_bits(a, b) -> bool:
  same = jax.tree.map(
    lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b
  )
  return all(jax.tree.leaves(same))


def sums(base: dict, adapter, scale: float, transposed: bool) -> dict:
  """Sums base + scale B A of the files' tensors, in float64 NumPy."""
  sides = load_file(adapter / peft.WEIGHTS_FILE)
  found = {}
  for name, x in base.items():
    found[name] = x.astype(np.float64)
    module = peft.PREFIX + name.removesuffix('.weight')
    if name.endswith('.weight') and f'{module}.lora_A.weight' in sides:
      a, b = (
        sides[f'{module}.lora_{s}.weight'].astype(np.float64) for s in 'AB'
      )
      found[name] = found[name] + scale * (b @ a if transposed else (b @ a).T)
  return found


def logits_of(policy, params, tokens):
  """Logits [B, T - 1, V] after the first token of each row."""
  prompts = Prompts(tokens[:, :1], np.ones(len(tokens), np.int32))
  prefix = policy.encode(params, prompts)
  hidden, _ = policy.extend(params, prefix, tokens[:, 1:], None, 0)
  return policy.logits(params, hidden)


@pytest.mark.parametrize('name', LORAS)
def test_logits_are_pefts(name):
  model, trainable, adapters, base = opened(name)
  policy = model.make_policy()
  with np.load(GOLDEN / name / 'expected.npz') as file:
    tokens, want = file['tokens'], file['logits']

  @jax.jit
  def run(adapters, base):
    return logits_of(policy, trainable.merge(adapters, base), tokens)

  got = run(adapters, base)
  np.testing.assert_allclose(got, want[:, 1:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize('name', LORAS)
def test_the_base_stays_as_it_is_beside_its_adapters(name):
  _, trainable, adapters, base = opened(name)
  assert trainable.merge(None, base) is base
  merged = jax.jit(trainable.merge)(adapters, base)
  found = flax.traverse_util.flatten_dict(merged, sep='/')
  kept = {k: v for k, v in found.items() if '_lora/' not in k}
  assert same_bits(kept, flax.traverse_util.flatten_dict(base, sep='/'))
  beside = [x for k, x in found.items() if '_lora/' in k]
  assert {x.dtype.name for x in beside} == {'float32'}
  depths = {len(x) for k, x in found.items() if '_lora/' in k}
  assert depths == {len(base['layers']['attention']['qkv'])}


@pytest.mark.parametrize('name', LORAS)
def test_the_export_is_the_sum_in_the_file(name, tmp_path):
  model, trainable, adapters, base = opened(name)
  config = peft.load_config(GOLDEN / name)
  out = trainable.export(tmp_path, adapters, base, {'title': 'sums'})
  before = load_file(model.directory / 'model.safetensors')
  want = sums(before, GOLDEN / name, config.scale, model.family.transposed)
  got = load_file(out / 'model.safetensors')
  assert out == tmp_path / 'export'
  assert got.keys() == want.keys()
  for key, x in got.items():
    np.testing.assert_allclose(x, want[key], atol=1e-6)


@pytest.mark.parametrize('name', LORAS)
def test_adapters_that_were_loaded_are_saved_again(name, tmp_path):
  _, trainable, adapters, base = opened(name)
  trainable.export(tmp_path, adapters, base, {'title': 'sums'})
  out = tmp_path / 'adapter'
  tensors = [load_file(d / peft.WEIGHTS_FILE) for d in (out, GOLDEN / name)]
  assert tensors[0].keys() == tensors[1].keys()
  assert same_bits(*tensors)
  ours, theirs = (
    json.loads((d / peft.CONFIG_FILE).read_text()) for d in (out, GOLDEN / name)
  )
  for key in ('r', 'lora_alpha', 'fan_in_fan_out', 'peft_type', 'bias'):
    assert ours[key] == theirs[key]
  assert sorted(ours['target_modules']) == sorted(theirs['target_modules'])
  assert peft.load_config(out) == peft.load_config(GOLDEN / name)
  assert (out / 'README.md').read_text().count('library_name: peft') == 1


@pytest.mark.parametrize('compute', ['float32', 'bfloat16'])
def test_new_adapters_change_nothing(compute):
  model = open_model(GOLDEN / 'qwen2')
  trainable = adapted(model, lora.LoraConfig(2, 16.0), seed=3)
  adapters, base = trainable.load(MESH)
  L = model.config.num_layers
  assert [x['a'].shape[0] for x in adapters.values()] == [L] * 7
  assert same_bits(adapters, jax.jit(trainable.init)(jax.random.key(3)))
  assert all(x['a'].any() and not x['b'].any() for x in adapters.values())
  policy = model.make_policy(compute)
  tokens = random_prompts(4, 9, 250).tokens

  @jax.jit
  def run(adapters, base):
    return logits_of(policy, trainable.merge(adapters, base), tokens)

  np.testing.assert_allclose(run(adapters, base), run(None, base), atol=1e-6)


@pytest.mark.parametrize('name', ['gpt_neox', 'qwen3_moe', 'gemma2', 'olmo2'])
def test_beside_the_matrices_is_inside_them(name, tmp_path):
  """Families without a fixture of PEFT's: q k v of each head in turn, routed
  layers, norms behind the products."""
  model = open_model(GOLDEN / name)
  trainable = adapted(model, lora.LoraConfig(3, 6.0))
  adapters, base = trainable.load(MESH)
  noise = np.random.default_rng(0)
  adapters = jax.tree.map(
    lambda x: 0.1 * noise.normal(size=x.shape).astype(np.float32), adapters
  )
  out = trainable.export(tmp_path, adapters, base, {'title': 'sums'})
  before = tensors_of(model.directory)
  want = sums(before, tmp_path / 'adapter', 2.0, model.family.transposed)
  for key, x in tensors_of(out).items():
    np.testing.assert_allclose(x, want[key], atol=1e-6)
  policy, exported = model.make_policy(), read_params(open_model(out))
  run = jax.jit(functools.partial(logits_of, policy))
  tokens = random_prompts(4, 9, 250).tokens
  beside = run(trainable.merge(adapters, base), tokens)
  np.testing.assert_allclose(beside, run(exported, tokens), atol=TOLERANCE)
  plain = np.asarray(run(base, tokens))
  assert np.abs(np.asarray(beside) - plain).max() > 0.1


# --- numbers


def shrunk(adapters, factor=0.1):
  """Adapters whose change of a weight is factor^2 of the fixture's."""
  return jax.tree.map(lambda x: x * factor, adapters)


def test_a_change_too_small_for_bfloat16_weights_counts():
  """Share of float32's change of the logits that bfloat16 has: all of it
  beside the matrices, little of it inside them."""
  model, trainable, adapters, base = opened('qwen2_lora')
  base = jax.tree.map(  # numbers of bfloat16, so that both dtypes have one base
    lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), base
  )
  config = peft.load_config(GOLDEN / 'qwen2_lora')
  small = shrunk(adapters, 0.015)
  full_params = lora.make_full_params(*mapped(model, config))
  tokens = random_prompts(128, 30, 250).tokens

  def change(params, compute):
    policy = model.make_policy(compute)
    run = jax.jit(lambda params: logits_of(policy, params, tokens))
    found = (run(p).astype(jnp.float32) for p in (params, base))
    return np.subtract(*map(np.asarray, found)).ravel().astype(np.float64)

  beside, inside = trainable.merge(small, base), full_params(small, base)
  rounded = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), inside
  )
  want = change(inside, 'float32')
  np.testing.assert_allclose(change(beside, 'float32'), want, atol=1e-4)
  share = {
    name: change(params, 'bfloat16') @ want / (want @ want)
    for name, params in (('beside', beside), ('inside', rounded))
  }
  assert abs(share['beside'] - 1) < 0.2
  assert abs(share['beside'] - 1) < 0.5 * abs(share['inside'] - 1)


def test_a_product_in_bfloat16_has_all_of_a_small_change():
  """Share of x A B = 2e-4 in bfloat16 products of size 1, over half a million
  of them: 1 beside the matrix, a sixth inside it. Rounding sums to the
  nearest keeps a mean because it falls anywhere between two numbers."""
  keys = jax.random.split(jax.random.key(0), 4)
  x = jax.random.normal(keys[0], (4, 1024, 64)).astype(jnp.bfloat16)
  w = jax.random.normal(keys[1], (64, 128)).astype(jnp.bfloat16) / 8
  a = jax.random.normal(keys[2], (64, 4)) / 8
  b = 1e-4 * jax.random.normal(keys[3], (4, 128))

  def product(w, **leaves):
    module = types.SimpleNamespace(
      get_variable=lambda kind, name: leaves.get(name),
    )
    y = project(module, 'w', x, w)
    assert y.dtype == jnp.bfloat16
    return np.asarray(y, np.float64)

  inside = (w.astype(jnp.float32) + a @ b).astype(jnp.bfloat16)
  want = np.asarray(x, np.float64) @ np.asarray(a @ b, np.float64)
  np.testing.assert_allclose(want.std(), 2e-4, rtol=0.2)
  plain = product(w)
  share = {
    name: float(np.vdot(y - plain, want) / np.vdot(want, want))
    for name, y in (
      ('beside', product(w, w_lora={'a': a, 'b': b})),
      ('inside', product(inside)),
    )
  }
  assert abs(share['beside'] - 1) < 0.08, share
  assert share['inside'] < 0.3, share


@pytest.mark.parametrize('compute', ['float32', 'bfloat16'])
def test_an_export_has_the_wider_dtype(compute, tmp_path):
  _, trainable, adapters, base = opened('qwen2_lora', 'bfloat16')
  small = shrunk(adapters)
  out = trainable.save(tmp_path / 'out', small, base, dtype=compute)
  model = open_model(out)
  assert model.hf_config['dtype'] == compute  # the widest: nothing is cast away
  found = load_file(out / 'model.safetensors')
  module = 'model.layers.0.self_attn.o_proj'
  scale = peft.load_config(GOLDEN / 'qwen2_lora').scale
  want = np.asarray(base['layers']['attention']['out'][0], np.float64)
  sides = small[lora.stack_of(module)]
  want = want.reshape(-1, want.shape[-1]).T + scale * np.asarray(
    sides['b'][0] @ sides['a'][0]
  )
  tolerance = 1e-7 if compute == 'float32' else 0.01
  got = found[f'{module}.weight']
  assert got.dtype == compute
  np.testing.assert_allclose(got.astype(float), want, rtol=0, atol=tolerance)
  assert found['model.embed_tokens.weight'].dtype == 'bfloat16'  # untouched


def test_log_probs_are_those_of_evaluate():
  model, trainable, adapters, base = opened('phi3_lora')
  policy = model.make_policy()._replace(merge_params=trainable.merge)
  rule = distribution.make_rule(model.vocab_size, [257])

  @jax.jit
  def both(adapters, base):
    params = policy.merge_params(adapters, base)
    sample = make_sampler(policy, SamplerConfig(2, 6))
    rollout = sample(params, jax.random.key(0), random_prompts(), rule)
    return rollout, evaluate(policy, params, rollout, rule)

  rollout, stats = both(adapters, base)
  np.testing.assert_allclose(rollout.logp, stats.logp, atol=1e-5)
  _, plain = both(None, base)
  assert np.abs(np.asarray(plain.logp - stats.logp)).max() > 1e-3


def test_a_mesh_and_remat_change_nothing():
  model, trainable, adapters, base = opened('phi3_lora')
  rule = distribution.make_rule(model.vocab_size, [257])
  prompts = random_prompts()
  tokens = np.random.default_rng(0).integers(0, 250, (8, 6)).astype(np.int32)
  rollout = make_rollout(prompts, tokens, tokens < 250)

  def grads(remat, adapters, base):
    policy = model.make_policy(remat=remat)

    def loss(adapters):
      params = trainable.merge(adapters, base)
      return evaluate(policy, params, rollout, rule).logp.sum()

    return jax.jit(jax.grad(loss))(adapters)

  want = grads('none', adapters, base)
  mesh = sharding.make_mesh('data=2,fsdp=2,tensor=2')
  with jax.set_mesh(mesh):
    found = grads('full', *trainable.load(mesh))
  for a, b in zip(*map(jax.tree.leaves, (found, want))):
    np.testing.assert_allclose(a, b, atol=1e-4 * (1 + np.abs(b).max()))


def products(jaxpr) -> list[tuple]:
  """Shapes of everything that a matrix product makes, however deep."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name in ('dot_general', 'ragged_dot_general'):
      found += [x.aval.shape for x in equation.outvars]
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          found += products(inner)
  return found


@pytest.mark.parametrize('name', LORAS)
def test_no_product_is_as_large_as_a_matrix_of_the_base(name):
  """Products make neither a merged copy nor a gradient of an adapted matrix.

  Batches of 3 x 50 tokens make no activation of a matrix's size either.
  """
  model, trainable, adapters, base = opened(name)
  policy = model.make_policy()
  rule = distribution.make_rule(model.vocab_size, [257])
  tokens = np.ones((3, 50), np.int32)
  prompts = Prompts(tokens[:, :7], np.full(3, 7, np.int32))
  rollout = make_rollout(prompts, tokens, tokens > 0)

  def loss(trained, base, merge):
    params = merge(trained, base)
    return evaluate(policy, params, rollout, rule, chunk=1).logp.sum()

  def made(merge, trained, base):
    gradient = jax.grad(functools.partial(loss, merge=merge))
    return products(jax.make_jaxpr(gradient)(trained, base).jaxpr)

  merged = jax.eval_shape(trainable.merge, adapters, base)
  flat = flax.traverse_util.flatten_dict(merged, sep='/')
  adapted = {path.split('_lora/')[0] for path in flat if '_lora/' in path}
  sizes = {math.prod(flat[path].shape[1:]) for path in adapted}  # of a layer
  assert not sizes & {
    int(np.prod(s)) for s in made(trainable.merge, adapters, base)
  }
  # the check sees a dense gradient, and a merged copy
  dense = made(lambda trained, base: trained, base, None)
  assert sizes <= {int(np.prod(s)) for s in dense}
  config = peft.load_config(GOLDEN / name)
  full_params = lora.make_full_params(*mapped(model, config))
  assert sizes <= {int(np.prod(s)) for s in made(full_params, adapters, base)}


def test_only_adapters_learn():
  model, trainable, adapters, base = opened('qwen2_lora')
  kept, begun = jax.tree.map(np.array, (base, adapters))
  policy = model.make_policy()._replace(merge_params=trainable.merge)
  algorithm = algorithms.reinforce(
    advantages.leave_one_out(), kl='reverse', beta=0.1
  )
  optimizer = optax.adam(1e-2)
  state = make_state(
    policy, algorithm, optimizer, MESH, 0, params=adapters, frozen=base
  )
  assert 'reference' not in state.carries  # the base is it: no second copy
  trained = sum(x.size for x in jax.tree.leaves(state.params))
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state))
  assert moments == 2 * trained + 1  # and Adam's count
  rule = distribution.make_rule(264, [257])
  prompts = random_prompts()
  sample = make_sampler(policy, SamplerConfig(2, 4))
  rollout = jax.jit(sample)(
    policy.merge_params(*state.policy_params), state.key, prompts, rule
  )
  update = jax.jit(make_update(policy, algorithm, optimizer))
  reward = np.random.default_rng(0).normal(size=rollout.mask.shape)
  after, metrics, _ = update(state, make_scored(rollout, reward), rule)
  assert metrics['sampler_logp_gap'] < 1e-5
  assert metrics['kl'] > 1e-3  # the adapters are not the base
  assert same_bits(after.frozen, kept)
  moved = jax.tree.map(np.array_equal, after.params, begun)
  assert not any(jax.tree.leaves(moved))


LORA = (
  '--lora_rank=2 --lora_targets q_proj down_proj --kl=reverse --beta=0.01 '
  '--lr_schedule=constant'
)


def test_a_run_resumes_and_exports(train_fixture, tmp_path, capsys):
  flags = [*LORA.split(), '--save_every=2', '--max_steps=3']
  run, rows = train_fixture('qwen2', FOUR, *flags)
  assert len(rows) == 3
  resume = '--resume=auto'
  (tmp_path / 'cut/model').mkdir(parents=True)  # killed before its first save
  halted, _ = train_fixture(
    'qwen2', FOUR, *flags, '--max_steps=2', resume, out='cut'
  )
  shutil.rmtree(halted / 'export')
  train_fixture('qwen2', FOUR, *flags, resume, out='cut')
  files = [d / 'adapter' / peft.WEIGHTS_FILE for d in (run, halted)]
  assert files[0].read_bytes() == files[1].read_bytes()

  before = load_file(GOLDEN / 'qwen2/model.safetensors')
  after = load_file(run / 'export/model.safetensors')
  want = sums(before, run / 'adapter', 16.0, transposed=True)
  for name, x in after.items():
    np.testing.assert_allclose(x, want[name], atol=1e-5)
    if not name.endswith(('q_proj.weight', 'down_proj.weight')):
      assert x.tobytes() == before[name].tobytes()
  assert (run / 'adapter/README.md').read_text().count('library_name: peft')

  later = tmp_path / 'later'
  export.main([str(run), str(later)])
  assert same_bits(load_file(later / 'model.safetensors'), after)

  again = f'--lora_adapter={run / "adapter"}'
  _, rows = train_fixture('qwen2', FOUR, again, '--max_steps=1', out='again')
  assert len(rows) == 1
  assert 'kl' not in rows[0]  # nobody asked: --no_log_kl

  config = yaml.safe_load((halted / 'config.yaml').read_text())
  config['model_fingerprint'] = 'of another'
  (halted / 'config.yaml').write_text(yaml.safe_dump(config))
  with pytest.raises(SystemExit):
    train_fixture('qwen2', FOUR, *flags, resume, out='cut')
  assert 'is not the model that the run began with' in capsys.readouterr().err


def test_print_config_says_what_is_trained(train_fixture, capsys):
  with pytest.raises(FileNotFoundError):  # nothing is run or written
    train_fixture('qwen2', ONE, *LORA.split(), '--print_config')
  said = capsys.readouterr().out
  model = open_model(GOLDEN / 'qwen2')
  modules = lora.targeted(
    model.param_mappings, ('q_proj', 'down_proj')
  ).values()
  trained = sum(2 * (n_in + n_out) for n_in, n_out in modules)
  assert f'trained parameters: {trained:,} in {4 * trained:,} bytes' in said
  # two moments; counts of Adam, the clock and the rounding; the rate
  state = 4 * (2 * trained + 4)
  assert f'optimizer state: {2 * trained + 4:,} in {state:,} bytes' in said
  assert 'frozen parameters: ' in said


def test_the_order_of_targets_moves_no_adapter():
  """Rows of a stack are layers in order, for files and for the forward pass."""
  model = open_model(GOLDEN / 'qwen2')
  mappings = model.param_mappings
  names = [m for m in lora.adaptable(mappings) if m.endswith('o_proj')]
  shuffled = [*reversed(names), 'o_proj', names[0]]
  modules = lora.targeted(mappings, shuffled)
  assert list(modules) == names == list(lora.targeted(mappings, ('o_proj',)))
  sides = {
    m: {
      'a': jnp.full((1, n_in), float(i)),
      'b': jnp.ones((n_out, 1)),
    }
    for i, (m, (n_in, n_out)) in enumerate(modules.items())
  }
  adapters = lora.stacked(sides)
  merged = lora.make_merge_params(mappings, modules, 1.0)(
    adapters, jax.eval_shape(model.make_policy().init, jax.random.key(0))
  )
  rows = merged['layers']['attention']['out_lora']['a']
  assert [float(row.max()) for row in rows] == [*range(len(names))]
  back = lora.by_module(adapters, modules)
  assert [float(back[m]['a'].max()) for m in names] == [*range(len(names))]


# --- bad input


def edited(tmp_path, **changes):
  out = shutil.copytree(GOLDEN / 'qwen2_lora', tmp_path / 'adapter')
  found = json.loads((out / peft.CONFIG_FILE).read_text()) | changes
  (out / peft.CONFIG_FILE).write_text(json.dumps(found))
  return out


@pytest.mark.parametrize(
  ('changes', 'fact'),
  [
    ({'peft_type': 'IA3'}, 'peft_type IA3 is not supported'),
    ({'use_dora': True}, 'use_dora True is not supported'),
    ({'use_rslora': True}, 'use_rslora True'),
    ({'rank_pattern': {'q_proj': 8}}, 'rank_pattern'),
    ({'modules_to_save': ['lm_head']}, 'modules_to_save'),
    ({'target_modules': '.*q_proj'}, 'is a pattern; list the modules'),
    ({'r': 4}, 'does not fit the model'),
    ({'r': 0}, 'r 0 is no number above zero'),
    ({'r': '3'}, "r '3' is no number above zero"),
    ({'lora_alpha': 'x'}, "lora_alpha 'x' is no number above zero"),
    ({'target_modules': None}, 'target_modules None is no list of names'),
    ({'target_modules': ['q_proj']}, 'is of no use'),
    (
      {'target_modules': ['k_proj', 'q_proj']},
      'k_proj.lora_A.weight is missing',
    ),
    ({'target_modules': ['c_attn']}, '--lora_targets c_attn is the name of no'),
  ],
)
def test_an_adapter_that_does_not_fit_is_named(changes, fact, tmp_path):
  model = open_model(GOLDEN / 'qwen2')
  out = edited(tmp_path, **changes)
  with pytest.raises(ValueError) as raised:  # noqa: PT011
    peft.load(out, peft.load_config(out), model.param_mappings)
  assert fact in str(raised.value)
  assert '\n' not in str(raised.value)


def test_missing_and_broken_files_are_named(tmp_path):
  model = open_model(GOLDEN / 'qwen2')
  with pytest.raises(FileNotFoundError, match='give a directory that PEFT'):
    peft.load_config(tmp_path)
  out = edited(tmp_path)
  config = peft.load_config(out)
  file = out / peft.WEIGHTS_FILE
  file.write_bytes(file.read_bytes()[:100])
  with pytest.raises(ValueError, match='is damaged'):
    peft.load(out, config, model.param_mappings)
  file.rename(out / 'adapter_model.bin')
  with pytest.raises(FileNotFoundError, match='pickles are never read'):
    peft.load(out, config, model.param_mappings)
  (out / peft.CONFIG_FILE).write_text('{')
  with pytest.raises(ValueError, match='no adapter configuration'):
    peft.load_config(out)


def test_experts_have_no_adapters():
  model = open_model(GOLDEN / 'qwen3_moe')
  modules = lora.targeted(model.param_mappings, (lora.ALL_LINEAR,))
  assert modules
  assert not any('experts' in m or m.endswith('mlp.gate') for m in modules)
