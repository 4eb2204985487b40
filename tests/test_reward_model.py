"""Reward models: fitted to pairs, exported, paid by sequence or by token."""

import dataclasses
import json
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
  CONFIG,
  DECODER_FAMILIES,
  GOLDEN,
  changed,
  make_rollout,
  random_prompts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxrl_tok
from experiments import opinions, reward_model
from jaxrl_tok import sharding
from jaxrl_tok.hub.directory import open_model
from jaxrl_tok.hub.families import classifier_name
from jaxrl_tok.hub.trainable import adapted, full, with_head
from jaxrl_tok.hub.weights import read_params
from jaxrl_tok.models.lora import LoraConfig
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.step.device_rewards import by_token, on_last
from jaxrl_tok.step.device_rewards import reward_model as make_reward
from jaxrl_tok.step.supervised import pair_loss
from jaxrl_tok.types import Prompts

pytestmark = pytest.mark.usefixtures('few_programs')

# --- by token

JITTED = jax.jit(on_last), jax.jit(by_token)


@settings(max_examples=30)
@given(
  st.lists(
    st.tuples(st.floats(-9, 9, width=32), st.booleans()), min_size=4, max_size=4
  )
)
def test_changes_sum_to_the_score(row):
  scores, mask = (np.array([x]) for x in zip(*row))
  whole, each = (f(scores.astype(np.float32), mask) for f in JITTED)
  assert not np.asarray(each)[~mask].any()
  assert float(each.sum()) == pytest.approx(float(whole.sum()), abs=1e-5)


def test_changes_by_hand():
  scores = jnp.array([[3.0, 5.0, 4.0, 9.0], [3.0, 5.0, 4.0, 9.0]])
  mask = jnp.array([[1, 1, 1, 0], [0, 1, 0, 1]], bool)
  found = by_token(scores, mask)
  assert found.tolist() == [[3, 2, -1, 0], [0, 5, 0, 4]]


CLASSIFIER = make_policy(changed(CONFIG, lm_head=False, value_head=True))


@pytest.fixture(scope='module')
def classifier():
  """Parameters of a classifier with a score of its own."""
  params = jax.jit(CLASSIFIER.init)(jax.random.key(0))
  head = jax.random.normal(jax.random.key(1), (1, 16))
  return params | {'value_head': {'embedding': head}}


def rollout(C=2, G=2, T=5, P=4):
  prompts = random_prompts(C, P)
  tokens = np.random.default_rng(1).integers(1, 9, (C * G, T))
  length = np.array([1, 3, 4, 5])
  return make_rollout(prompts, tokens, np.arange(T) < length[:, None])


def test_rewards_by_token_of_a_network(classifier):
  """They sum to the score; batch-mates and padding change nothing."""
  found = rollout()
  rewards = {
    by: jax.jit(make_reward(CLASSIFIER, by)) for by in ('sequence', 'token')
  }
  whole, each = (f(classifier, found) for f in rewards.values())
  np.testing.assert_allclose(each.sum(1), whole.sum(1), atol=1e-5)
  assert np.count_nonzero(each) == found.mask.sum()
  assert np.count_nonzero(whole) == len(found.mask)
  # the second prompt and its rows alone, in wider arrays of other padding
  prompts = found.prompts
  wide = Prompts(
    np.pad(prompts.tokens[1:], ((0, 0), (0, 3)), constant_values=7),
    prompts.length[1:],
  )
  mask = np.pad(found.mask[2:], ((0, 0), (0, 2)))
  tokens = np.pad(found.tokens[2:], ((0, 0), (0, 2)), constant_values=8)
  tokens = np.where(mask, tokens, 8)
  alone = rewards['token'](classifier, make_rollout(wide, tokens, mask))
  np.testing.assert_allclose(alone[:, :5], each[2:], atol=1e-5)
  assert not alone[:, 5:].any()


def test_the_loss_by_hand(classifier):
  found = rollout()
  by_token = jax.jit(make_reward(CLASSIFIER, 'token'))
  each = np.asarray(by_token(classifier, found))
  scores = each.sum(1)
  margin = np.array([0.0, 0.5], np.float32)
  chosen, rejected = scores.reshape(2, 2).T
  want = np.log1p(np.exp(margin - chosen + rejected)).mean()
  batch = found.prompts, found.tokens, found.mask, margin
  loss = jax.jit(pair_loss(CLASSIFIER))(classifier, None, *batch)
  assert float(loss) == pytest.approx(want, rel=1e-5)
  want += 0.1 * ((chosen + rejected) ** 2).mean()
  gaps = np.cumsum(each, axis=1) - scores[:, None]
  want += 0.3 * (gaps[np.asarray(found.mask)] ** 2).mean()
  loss = jax.jit(pair_loss(CLASSIFIER, 0.1, 0.3))(classifier, None, *batch)
  assert float(loss) == pytest.approx(want, rel=1e-5)


# --- from a model that writes


def test_a_trunk_becomes_a_classifier(tmp_path):
  """Everything but the head is the model's; the score begins at 0. Adapters
  and the head are trained side by side, and written as one model."""
  model = open_model(GOLDEN / 'llama')
  found = model.as_classifier()
  assert found.as_classifier() is found
  mesh = sharding.make_mesh('data=1', jax.devices()[:1])
  trunk, (params, frozen) = read_params(model), full(found).load(mesh)
  assert frozen is None
  assert not params.pop('value_head')['embedding'].any()
  trunk.pop('head', None)
  jax.tree.map(np.testing.assert_array_equal, params, trunk)
  beside = with_head(adapted(found, LoraConfig(2, 4.0, ('all-linear',))))
  trained, frozen = beside.load(mesh)
  assert jax.tree.structure(beside.structs()[0]) == jax.tree.structure(trained)
  assert not trained['value_head']['embedding'].any()
  trained['value_head'] = jax.tree.map(jnp.ones_like, trained['value_head'])
  written = beside.save(tmp_path / 'out', trained, frozen)
  again = open_model(written)
  assert again.is_classifier
  assert again.hf_config['architectures'][0].endswith('Classification')
  read = read_params(again)
  assert np.asarray(read['value_head']['embedding'] == 1).all()
  np.testing.assert_array_equal(
    read['embed']['embedding'], trunk['embed']['embedding']
  )


def test_classes_of_every_family():
  for name in DECODER_FAMILIES:
    kind = classifier_name({'model_type': name})
    assert kind.endswith('ForSequenceClassification')
  assert classifier_name({'model_type': 'gemma3_text'}).startswith('Gemma3Text')


def test_the_padding_of_a_classifier_ends_no_text():
  """transformers scores the last token that is no padding."""
  model = open_model(GOLDEN / 'llama')
  same = model._replace(pad_token=model.end_tokens[0]).as_classifier()
  others = set(model.tokenizer.all_special_ids) - set(model.end_tokens)
  if others:
    assert same.hf_config['pad_token_id'] in others
  other = model._replace(pad_token=7).as_classifier()
  assert other.hf_config['pad_token_id'] == 7


# --- the experiment

SMALL = [
  '--d_model=32',
  '--d_ff=64',
  '--num_heads=2',
  '--num_kv_heads=1',
  '--num_layers=1',
  '--report_to=none',
]


def letters(count: int, seed: int) -> list[dict]:
  """Pairs of letters: after + an a is worth 1 and a b -1, after - the
  opposite; the preference is drawn, as that of experiments.opinions."""
  rng, found = random.Random(seed), []
  while len(found) < count:
    sign = rng.choice((1, -1))
    both = [''.join(rng.choices('abc', k=3)) for _ in range(2)]
    values = [sign * (x.count('a') - x.count('b')) for x in both]
    margin = values[0] - values[1]
    if rng.random() >= 1 / (1 + math.exp(-margin)):
      both, margin = both[::-1], -margin
    if both[0] != both[1]:
      prompt = f'{rng.randrange(1000)}{"-+"[sign > 0]}'
      row = prompt, *both, margin
      names = 'prompt', 'chosen', 'rejected', 'true_margin'
      found.append(dict(zip(names, row)))
  return found


@pytest.fixture(scope='module')
def one_device():
  """Leaves one of the fake devices."""
  devices = jax.local_devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda *args: devices)
    yield


@pytest.fixture(scope='module')
def fitted(tmp_path_factory, one_device):
  """Reward model of letters, in a size of seconds."""
  home = tmp_path_factory.mktemp('rm')
  lines = map(json.dumps, letters(900, 0))
  (home / 'pairs.jsonl').write_text('\n'.join(lines))
  argv = '--max_steps=100 --eval_every=50 --num_prompts=32 '
  argv += f'--learning_rate=0.01 --data={home / "pairs.jsonl"} '
  argv += f'--held_out_pairs=100 --output_dir={home / "run"}'
  return reward_model.run([*argv.split(), *SMALL])


def test_it_learns_nearly_what_can_be_known(fitted):
  found = fitted.metrics
  assert found['truth/accuracy'] - found['accuracy'] < 0.06
  assert found['truth/log_loss'] < found['log_loss'] < 0.6 < math.log(2)
  assert found['accuracy_low'] < found['accuracy'] < found['accuracy_high']
  said = json.loads((fitted.out.parent / 'reward_model.json').read_text())
  assert said['metrics'] == found
  pairs = [row['pairs'] for row in said['reliability']]
  assert sum(pairs) == said['held_out_pairs'] == 100


def test_the_directory_is_a_classifiers(fitted):
  """Names and keys as transformers has them; our own reads them again."""
  from safetensors.numpy import load_file

  config = json.loads((fitted.out / 'config.json').read_text())
  assert config['architectures'] == ['Qwen2ForSequenceClassification']
  assert len(config['id2label']) == 1
  assert config['pad_token_id'] not in (None, config['eos_token_id'])
  tensors = load_file(fitted.out / 'model.safetensors')
  assert tensors['score.weight'].shape == (1, 32)
  assert 'lm_head.weight' not in tensors
  assert not (fitted.out / 'generation_config.json').exists()
  model = open_model(fitted.out)
  assert model.is_classifier
  pair = {'prompt': '7+', 'chosen': 'aab'}
  ids = [model.tokenizer(pair[k])['input_ids'] for k in ('prompt', 'chosen')]
  prompts = Prompts(np.array([ids[0]]), np.array([len(ids[0])], np.int32))
  tokens = np.array([ids[1]])
  found = make_rollout(prompts, tokens, np.ones_like(tokens, bool))
  reward = jax.jit(make_reward(model.make_policy()))
  score = float(reward(read_params(model), found).sum())
  assert score != 0
  assert math.isfinite(score)


def test_a_model_is_the_only_reward(fitted, tmp_path, capsys):
  """Credit by token sums to the score; without a reward function, warm start
  and evaluations are judged by the model, too; its weights may be int8 without
  any adapters."""
  task = opinions.opinions(50, reward_model=str(fitted.out), held_out=8)
  result = jaxrl_tok.train(
    dataclasses.replace(task, eval_rewards=None),
    reward_model=str(fitted.out),
    reward_model_by='token',
    quantize='int8',
    output_dir=str(tmp_path / 'run'),
    d_model=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    d_ff=16,
    num_prompts=4,
    num_generations=2,
    max_steps=1,
    eval_every=1,
    length_buckets=1,
    log_kl=False,
    cache=False,
    warm_start_max_steps=1,
    report_to='none',
  )
  (row,) = (r for r in result.metrics if r['phase'] == 'train')
  assert row['reward'] == pytest.approx(row['rewards/reward_model/mean'])
  tokens = [r for r in result.samples if 'tokens' in r]
  assert any(np.count_nonzero(r['rewards']) > 3 for r in tokens)
  for r in tokens:
    assert r['reward'] == pytest.approx(sum(r['rewards']), abs=1e-4)
  evals = [r for r in result.metrics if r['phase'] == 'eval']
  assert all(r['eval/reward'] != 0 for r in evals)
  config = (result.run_dir / 'config.yaml').read_text()
  assert 'reward_model_by: token' in config


def test_opinions_and_their_truth(fitted, capsys):
  assert opinions.opinion(
    ['Ann praises the soup: ', 'Ben hates the film: ', 'Jo likes the cake: '],
    ['fresh, kind.', 'dull, rude, cold.', 'kind, kind, x, sweet'],
  ) == [2 * 2 - 3, 3, 2 * 2 - 4]
  pairs = opinions.draw_pairs(400, 0)
  assert pairs == opinions.draw_pairs(400, 0)
  right = [(p['true_margin'] > 0) + (p['true_margin'] == 0) / 2 for p in pairs]
  assert 0.6 < sum(right) / 400 < 0.95
  opinions.run([f'--reward_model={fitted.out}', '--print_config'])
  said = capsys.readouterr().out
  assert 'reward_model: 1.0' in said
  with pytest.raises(SystemExit):
    reward_model.run(['--optimizer=sgd'])
  assert 'fitted by Adam' in capsys.readouterr().err
  with pytest.raises(SystemExit):
    opinions.run(['--reward_model_by=token'])
  assert 'has no effect without a --reward_model' in capsys.readouterr().err
