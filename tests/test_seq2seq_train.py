"""Encoder-decoders learn by the sampler, the losses and the loop of decoders;
what makes no sense with them is refused."""

import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import (
  FOUR,
  GOLDEN,
  ONE,
  SEQ2SEQ,
  late_letters,
  look,
  make_rollout,
)
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer

from jaxrl_tok import Task, data, distribution, train
from jaxrl_tok.hub.directory import open_model
from jaxrl_tok.hub.weights import read_params
from jaxrl_tok.run.models import check_positions
from jaxrl_tok.step.supervised import answer_loss, make_supervised_step

pytestmark = pytest.mark.usefixtures('few_programs')

NAMES = sorted(p.name for p in SEQ2SEQ.iterdir())
LORA = '--lora_rank=2', '--learning_rate=0.01'
LEARNS = '--baseline=group_mean', '--num_generations=4'
# of runs that have programs in common
ALIKE = (*LEARNS, '--lr_schedule=constant', '--learning_rate=0.003')


@pytest.fixture
def train_seq2seq(train_fixture):
  """train_fixture of an encoder-decoder's name; one device."""

  def run(name, *flags, mesh=ONE, out='run'):
    return train_fixture(f'../seq2seq/{name}', mesh, *flags, out=out)

  return run


def rewards(rows) -> tuple[float, float]:
  """Mean rewards of the first three and last ten steps."""
  found = [row['reward'] for row in rows]
  return np.mean(found[:3]), np.mean(found[-10:])


def weights(run):
  return load_file(run / 'export/model.safetensors')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=() if n in ('t5_gated', 'bart') else pytest.mark.slow)
    for n in NAMES
  ],
)
def test_reward_rises_in_100_steps(name, train_seq2seq):
  run, rows = train_seq2seq(name, *ALIKE, '--max_steps=100')
  first, last = rewards(rows)
  assert last > first + 0.2
  # sampler and gradient are one distribution, in every step
  assert max(row['sampler_logp_gap'] for row in rows) < 1e-4
  before = load_file(SEQ2SEQ / name / 'model.safetensors')
  after = weights(run)
  assert before.keys() == after.keys()
  for key, value in before.items():
    assert value.shape == after[key].shape
    moved = not np.array_equal(value, after[key])
    assert moved != (key == 'final_logits_bias'), key  # a buffer
  for read in (AutoConfig, AutoTokenizer):
    ours = read.from_pretrained(run / 'export', local_files_only=True)
    theirs = read.from_pretrained(SEQ2SEQ / name, local_files_only=True)
    assert type(ours) is type(theirs)
  assert ours('ab')['input_ids'] == theirs('ab')['input_ids']


@pytest.mark.parametrize(
  'name', ['t5_gated', pytest.param('bart', marks=pytest.mark.slow)]
)
def test_adapters_learn(name, train_seq2seq):
  run, rows = train_seq2seq(name, *LORA, *LEARNS, '--max_steps=40')
  first, last = rewards(rows)
  assert last > first + 0.1
  assert max(row['sampler_logp_gap'] for row in rows) < 1e-4
  before, after = load_file(SEQ2SEQ / name / 'model.safetensors'), weights(run)
  moved = {key for key in before if not np.array_equal(before[key], after[key])}
  assert before.keys() == after.keys()
  assert 0 < len(moved) < len(before)
  assert not any('shared' in key or 'norm' in key for key in moved)
  kept = load_file(run / 'adapter/adapter_model.safetensors')
  modules = {
    key.removeprefix('base_model.model.').split('.lora_')[0] for key in kept
  }
  assert {f'{module}.weight' for module in modules} == moved
  again = f'--lora_adapter={run / "adapter"}', '--learning_rate=0.01'
  _, rows = train_seq2seq(name, *again, *LEARNS, '--max_steps=1', out='again')
  assert rows[0]['reward'] > first


@pytest.fixture
def short_run(tmp_path, monkeypatch):
  """Fixture short_run(name, **settings) -> Result of train: two steps on
  made-up records, on one device."""
  one = jax.local_devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *args: one)
  records = [{'prompt': f'{i} and {i * i}:'} for i in range(12)]
  given = {
    'output_dir': str(tmp_path / 'run'),
    'max_steps': 2,
    'num_prompts': 4,
    'num_generations': 2,
    'max_completion_length': 3,
    'eval_every': 0,
    'report_to': 'none',
    'log_kl': False,
  }

  def run(name, **settings):
    task = Task(records, late_letters, held_out=4)
    return train(task, model=str(SEQ2SEQ / name), **(given | settings))

  return run


def check_critic(result, shared: bool):
  rows = [row for row in result.metrics if row['phase'] == 'train']
  assert len(rows) == 2
  for row in rows:
    assert row['grad_norm'] > 0
    assert row['value_loss'] > 0
  # a critic of its own is no part of what is exported
  out = result.run_dir / 'export'
  described = json.loads((out / 'config.json').read_text())
  assert ('jaxrl_tok_value_head' in described) == shared
  assert open_model(out).is_encoder_decoder


def test_a_critic_that_shares_the_network_learns(short_run):
  check_critic(short_run('t5', algorithm='a2c', critic='shared'), True)


def test_adapters_with_a_critic_are_evaluated_and_generate(short_run):
  result = short_run(
    'mbart', algorithm='a2c', critic='separate', lora_rank=2, eval_every=1
  )
  check_critic(result, False)
  metrics = [row for row in result.metrics if row['phase'] == 'eval']
  assert len(metrics) > 1
  assert all(row['eval/mismatch/kl'] < 1e-4 for row in metrics)
  texts = result.generate(['ab', 'abc', '0 and 0:'])
  assert len(texts) == 3
  # padding of the shorter prompts changes nothing
  assert result.generate(['ab']) == texts[:1]
  held_out = [{'prompt': 'ab'}, {'prompt': 'cd'}]
  found = result.evaluate(Task(held_out, late_letters, held_out=held_out))
  assert 0 < found['eval/reward'] < 1.1


def test_stopped_and_resumed_is_never_stopped(train_seq2seq, tmp_path):
  flags = '--save_every=1', *ALIKE
  whole, _ = train_seq2seq('bart', *flags, '--max_steps=3', out='whole')
  shutil.copytree(whole, tmp_path / 'cut')
  more = '--max_steps=3', '--resume=2'
  halted, rows = train_seq2seq('bart', *flags, *more, out='cut')
  assert [row['step'] for row in rows] == [1, 2, 3]
  want = weights(whole)
  for key, value in weights(halted).items():
    assert value.tobytes() == want[key].tobytes(), key


def test_one_device_is_four(train_seq2seq):
  _, one = train_seq2seq('t5_gated', *ALIKE, out='one')
  _, four = train_seq2seq('t5_gated', *ALIKE, mesh=FOUR, out='four')
  for a, b in zip(one, four, strict=True):
    assert a['completions/mean_length'] == b['completions/mean_length']
    for key in ('reward', 'entropy', 'grad_norm'):
      np.testing.assert_allclose(a[key], b[key], rtol=1e-3)


def test_a_supervised_step_lowers_the_loss():
  model = open_model(SEQ2SEQ / 't5')
  policy, params = model.make_policy(), read_params(model)
  texts = ['one', 'two', 'three', 'four']
  records = [{'prompt': text} for text in texts]
  found = data.prompt_set(
    records, model.tokenizer, model.vocab_size, whole=True
  )
  prompts, _ = found.batch(records)
  answers = [
    data.answer_ids(model.tokenizer, text[::-1], model.end_tokens)
    for text in texts
  ]
  tokens = np.full((4, 6), model.pad_token, np.int32)
  for row, ids in zip(tokens, answers):
    row[: len(ids)] = ids
  mask = tokens != model.pad_token
  rule = distribution.make_rule(model.vocab_size, model.end_tokens)
  optimizer = optax.adam(1e-2)
  loss_of = answer_loss(policy, rule)
  step = jax.jit(make_supervised_step(loss_of, optimizer))
  state, losses = (params, optimizer.init(params)), []
  for _ in range(60):
    *state, loss = step(*state, None, prompts, tokens, mask)
    losses.append(float(loss))
  assert losses[-1] < 0.2 * losses[0]
  stats = look(policy, state[0], make_rollout(prompts, tokens, mask), rule)
  assert float(jnp.exp(stats.logp)[mask].mean()) > 0.5


# --- refused


def refusal(capsys, call, *args, **kwargs) -> str:
  """Message of a run that ends with one line."""
  with pytest.raises(SystemExit) as e:
    call(*args, **kwargs)
  assert e.value.code == 2
  said = capsys.readouterr().err
  assert said.startswith('error: ')
  assert said.count('\n') == 1
  return said


def test_a_reward_model_reads_one_text(train_seq2seq, capsys):
  given = f'--reward_model={GOLDEN / "llama_classifier"}'
  said = refusal(capsys, train_seq2seq, 't5', given)
  assert 'an encoder-decoder, are not; give the task a reward function' in said


def test_an_encoder_decoder_is_no_reward_model(train_fixture, capsys):
  given = f'--reward_model={SEQ2SEQ / "t5"}'
  said = refusal(capsys, train_fixture, 'qwen3', ONE, given)
  assert 'is no classifier' in said


def test_each_side_has_its_own_length(train_seq2seq, capsys):
  said = refusal(capsys, train_seq2seq, 'bart', '--max_completion_length=39')
  assert 'completions of 39 tokens are more than the 38' in said
  assert '--max_completion_length 38' in said
  fits = types.SimpleNamespace(num_positions=40, start_tokens=(1, 2))
  check_positions(fits, 40, 38)
  with pytest.raises(ValueError, match='prompts of 41 tokens are more than'):
    check_positions(fits, 41, 38)
  # T5's positions are distances
  check_positions(open_model(SEQ2SEQ / 't5').config, 10_000, 10_000)


def test_messages_need_a_template(tmp_path):
  talks = [[{'role': 'user', 'content': f'hi {i}'}] for i in range(9)]
  task = Task([{'prompt': talk} for talk in talks], late_letters)
  with pytest.raises(ValueError, match='the tokenizer has no chat template'):
    train(task, model=str(SEQ2SEQ / 't5'), output_dir=str(tmp_path / 'run'))
