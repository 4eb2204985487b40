"""Adapters: PEFT's files, PEFT's numbers, and a base that stays as it is."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest
import yaml
from conftest import FOUR, GOLDEN, ONE, random_prompts
from safetensors.numpy import load_file
from test_families import LORAS, TOLERANCE

from jaxrl_tok import distribution, sharding
from jaxrl_tok.credit import advantages, algorithms
from jaxrl_tok.hub import directory as hf
from jaxrl_tok.hub import lora
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.run import build
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.step.update import make_update
from jaxrl_tok.types import Prompts


def adapted(name: str):
  """(model, base, adapter configuration, adapters) of a *_lora fixture."""
  model = hf.open_model(GOLDEN / name.removesuffix('_lora'))
  config = lora.load_config(GOLDEN / name)
  adapters = lora.load(GOLDEN / name, config, model.config, model.family)
  return model, hf.read_params(model), config, adapters


def same_bits(a, b) -> bool:
  same = jax.tree.map(
    lambda x, y: bytes(np.asarray(x)) == bytes(np.asarray(y)), a, b
  )
  return all(jax.tree.leaves(same))


def sums(base: dict, adapter, scale: float, transposed: bool) -> dict:
  """The files' tensors, base + scale B A, in float64 NumPy."""
  sides = load_file(adapter / lora.WEIGHTS_FILE)
  found = {}
  for name, x in base.items():
    found[name] = x.astype(np.float64)
    module = lora.PREFIX + name.removesuffix('.weight')
    if name.endswith('.weight') and f'{module}.lora_A.weight' in sides:
      a, b = (
        sides[f'{module}.lora_{s}.weight'].astype(np.float64) for s in 'AB'
      )
      found[name] = found[name] + scale * (b @ a if transposed else (b @ a).T)
  return found


@pytest.mark.parametrize('name', LORAS)
def test_logits_are_pefts(name):
  model, base, config, adapters = adapted(name)
  policy = make_policy(model.config)
  merge_params = lora.make_merge_params(
    model.config, model.family, config.scale
  )
  with np.load(GOLDEN / name / 'expected.npz') as file:
    tokens, want = file['tokens'], file['logits']

  def run(adapters, base):
    params = merge_params(adapters, base)
    prompts = Prompts(tokens[:, :1], np.ones(2, np.int32))
    prefix = policy.encode(params, prompts)
    hidden, _ = policy.extend(params, prefix, tokens[:, 1:], None, 0)
    return policy.logits(params, hidden)

  got = jax.jit(run)(adapters, base)
  np.testing.assert_allclose(got, want[:, 1:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize('name', LORAS)
def test_the_join_is_the_sum_in_the_file(name, tmp_path):
  model, base, config, adapters = adapted(name)
  merge_params = lora.make_merge_params(
    model.config, model.family, config.scale
  )
  out = hf.save(
    tmp_path / 'joined', model, jax.jit(merge_params)(adapters, base)
  )
  before = load_file(model.directory / 'model.safetensors')
  want = sums(before, GOLDEN / name, config.scale, model.family.transposed)
  got = load_file(out / 'model.safetensors')
  assert got.keys() == want.keys()
  for key, x in got.items():
    np.testing.assert_allclose(x, want[key], atol=1e-6)


@pytest.mark.parametrize('name', LORAS)
def test_what_is_loaded_is_saved_again(name, tmp_path):
  model, _, config, adapters = adapted(name)
  out = lora.save(tmp_path, config, adapters, model.family, '../x')
  tensors = [load_file(d / lora.WEIGHTS_FILE) for d in (out, GOLDEN / name)]
  assert tensors[0].keys() == tensors[1].keys()
  assert same_bits(*tensors)
  ours, theirs = (
    json.loads((d / lora.CONFIG_FILE).read_text()) for d in (out, GOLDEN / name)
  )
  for key in ('r', 'lora_alpha', 'fan_in_fan_out', 'peft_type', 'bias'):
    assert ours[key] == theirs[key]
  assert sorted(ours['target_modules']) == sorted(theirs['target_modules'])
  assert lora.load_config(out) == config


def test_new_adapters_change_nothing():
  model, base, config, _ = adapted('qwen2_lora')
  modules = lora.targeted(model.config, model.family, (lora.EVERYTHING,))
  assert len(modules) == 7 * model.config.num_layers
  adapters = lora.init(modules, config.rank, jax.random.key(0))
  merge_params = lora.make_merge_params(
    model.config, model.family, config.scale
  )
  assert same_bits(jax.jit(merge_params)(adapters, base), base)


@pytest.mark.parametrize('compute', ['float32', 'bfloat16'])
def test_a_small_change_of_a_bfloat16_base_counts_in_float32(compute, tmp_path):
  model, _, config, adapters = adapted('qwen2_lora')
  base = hf.read_params(model, dtype='bfloat16')
  small = jax.tree.map(lambda x: x * 0.01, adapters)  # B A: 1e-4 of it
  merge_params = lora.make_merge_params(
    model.config, model.family, config.scale, compute
  )
  joined = jax.jit(merge_params)(small, base)
  module = 'model.layers.0.self_attn.o_proj'
  delta = config.scale * small[module]['b'] @ small[module]['a']
  shape = joined['layer_0']['attention']['out'].shape
  before, after = (
    np.asarray(p['layer_0']['attention']['out'], np.float64)
    for p in (base, joined)
  )
  tolerance = 1e-7 if compute == 'float32' else 0.01
  want = before + delta.T.reshape(shape)
  np.testing.assert_allclose(after, want, rtol=0, atol=tolerance)
  assert joined['layer_0']['attention']['out'].dtype == compute
  assert joined['embed']['embedding'].dtype == 'bfloat16'  # untouched
  out = hf.save(tmp_path / 'joined', model, joined)
  hf_config = json.loads((out / 'config.json').read_text())
  assert hf_config['dtype'] == compute  # the widest: nothing is cast away


def test_only_adapters_learn():
  model, base, config, adapters = adapted('qwen2_lora')
  kept = jax.tree.map(np.array, base)
  policy = make_policy(model.config)._replace(
    merge_params=lora.make_merge_params(
      model.config, model.family, config.scale
    )
  )
  algorithm = algorithms.reinforce(
    advantages.leave_one_out(), kl='reverse', beta=0.1
  )
  optimizer = optax.adam(1e-2)
  state = build.make_state(
    policy,
    algorithm,
    optimizer,
    sharding.make_mesh('data=1', jax.devices()[:1]),
    0,
    jax.tree.map(np.copy, adapters),
    base,
    keep_reference=True,
  )
  assert state.reference is None  # the base is it: no second copy
  trained = sum(x.size for x in jax.tree.leaves(state.params))
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state))
  assert moments == 2 * trained + 1  # and Adam's count
  rule = distribution.make_rule(264, [257])
  prompts = random_prompts()
  sample = make_sampler(policy, SamplerConfig(2, 4))
  rollout = jax.jit(sample)(
    policy.merge_params(*state.weights), state.key, prompts, rule
  )
  update = jax.jit(make_update(policy, algorithm, optimizer))
  reward = np.random.default_rng(0).normal(size=rollout.mask.shape)
  after, metrics, _ = update(state, rollout, reward.astype(np.float32), rule)
  assert metrics['sampler_logp_gap'] < 1e-5
  assert metrics['kl'] > 1e-3  # the adapters are not the base
  assert same_bits(after.frozen, kept)
  moved = jax.tree.map(np.array_equal, after.params, adapters)
  assert not any(jax.tree.leaves(moved))


LORA = (
  '--lora_rank=2 --lora_targets q_proj down_proj --kl=reverse --beta=0.01 '
  '--lr_schedule=constant'
)


def test_a_run_resumes_and_exports(train_fixture, tmp_path, capsys):
  flags = [*LORA.split(), '--save_every=2']
  run, rows = train_fixture('qwen2', FOUR, *flags)
  assert len(rows) == 3
  resume = '--resume=auto'
  (tmp_path / 'cut/model').mkdir(parents=True)  # killed before its first save
  halted, _ = train_fixture(
    'qwen2', FOUR, *flags, '--max_steps=2', resume, out='cut'
  )
  shutil.rmtree(halted / 'export')
  train_fixture('qwen2', FOUR, *flags, resume, out='cut')
  files = [d / 'adapter' / lora.WEIGHTS_FILE for d in (run, halted)]
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
  hf.main(['export', str(run), str(later)])
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
  assert 'is not what the run began with' in capsys.readouterr().err


def test_print_config_says_what_is_trained(train_fixture, capsys):
  with pytest.raises(FileNotFoundError):  # nothing is run or written
    train_fixture('qwen2', ONE, *LORA.split(), '--print_config')
  said = capsys.readouterr().out
  model = hf.open_model(GOLDEN / 'qwen2')
  modules = lora.targeted(
    model.config, model.family, ('q_proj', 'down_proj')
  ).values()
  trained = sum(2 * (n_in + n_out) for n_in, n_out in modules)
  assert f'trained parameters: {trained:,} in {4 * trained:,} bytes' in said
  state = 4 * (2 * trained + 2)  # two moments, Adam's count, the schedule's
  assert f'optimizer state: {2 * trained + 2:,} in {state:,} bytes' in said
  assert 'frozen parameters: ' in said


# --- bad input


def edited(tmp_path, **changes):
  out = shutil.copytree(GOLDEN / 'qwen2_lora', tmp_path / 'adapter')
  found = json.loads((out / lora.CONFIG_FILE).read_text()) | changes
  (out / lora.CONFIG_FILE).write_text(json.dumps(found))
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
  model = hf.open_model(GOLDEN / 'qwen2')
  out = edited(tmp_path, **changes)
  with pytest.raises(ValueError) as raised:  # noqa: PT011
    lora.load(out, lora.load_config(out), model.config, model.family)
  assert fact in str(raised.value)
  assert '\n' not in str(raised.value)


def test_missing_and_broken_files_are_named(tmp_path):
  model = hf.open_model(GOLDEN / 'qwen2')
  with pytest.raises(FileNotFoundError, match='give a directory that PEFT'):
    lora.load_config(tmp_path)
  out = edited(tmp_path)
  config = lora.load_config(out)
  file = out / lora.WEIGHTS_FILE
  file.write_bytes(file.read_bytes()[:100])
  with pytest.raises(ValueError, match='is damaged'):
    lora.load(out, config, model.config, model.family)
  file.rename(out / 'adapter_model.bin')
  with pytest.raises(FileNotFoundError, match='pickles are never read'):
    lora.load(out, config, model.config, model.family)
  (out / lora.CONFIG_FILE).write_text('{')
  with pytest.raises(ValueError, match='no adapter configuration'):
    lora.load_config(out)


def test_experts_have_no_adapters():
  model = hf.open_model(GOLDEN / 'qwen3_moe')
  modules = lora.targeted(model.config, model.family, (lora.EVERYTHING,))
  assert modules
  assert not any('experts' in m or m.endswith('mlp.gate') for m in modules)
