"""The loop: resume is never having stopped, nothing compiles after step 2."""

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import arithmetic
from jaxrl_tok import evaluation, rewards, train
from jaxrl_tok.hub import directory as hf
from jaxrl_tok.step import programs as parts

TINY = {
  'digits': 1,
  'd_model': 16,
  'num_layers': 1,
  'num_heads': 2,
  'num_kv_heads': 1,
  'd_ff': 16,
  'num_prompts': 8,
  'num_generations': 4,
  'eval_prompts': 16,
  'eval_every': 2,
  'save_every': 2,
  'max_steps': 6,
  'warm_start_max_steps': 80,
  'warm_start_check_every': 40,
  'warm_start_learning_rate': 0.01,
  'warm_start_batch_size': 32,
  'report_to': 'none',
  'lr_schedule': 'constant',
}


def flags(output_dir, **more) -> list[str]:
  given = {**TINY, 'output_dir': output_dir, **more}
  return [f'--{name}={value}' for name, value in given.items()]


def rows(path: Path, *, timed: bool = False) -> list[dict]:
  """Rows of a jsonl file; without the times, which never repeat, and the warm
  start, which the cache spares all runs but the first."""
  found = [json.loads(line) for line in path.read_text().splitlines()]
  found = [row for row in found if row.get('phase') != 'warm_start']
  clocks = ('time', 'step_time', 'tokens_per_second')
  return [
    {
      k: v
      for k, v in row.items()
      if timed or not (k in clocks or k.startswith('time/'))
    }
    for row in found
  ]


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
  """Runs of this file share one warm start."""
  home = tmp_path_factory.mktemp('cache')
  old = os.environ.get('XDG_CACHE_HOME')
  os.environ['XDG_CACHE_HOME'] = str(home)
  yield home
  if old is None:
    del os.environ['XDG_CACHE_HOME']
  else:
    os.environ['XDG_CACHE_HOME'] = old


@pytest.fixture(scope='session')
def whole(cache, tmp_path_factory):
  """A run of six steps that nothing stopped."""
  out = tmp_path_factory.mktemp('runs') / 'whole'
  summary = arithmetic.main(flags(out))
  return out, summary


def assert_same_run(a: Path, b: Path):
  for name in ('metrics.jsonl', 'samples.jsonl'):
    assert rows(a / name) == rows(b / name), name
  one, two = (load_file(x / 'export/model.safetensors') for x in (a, b))
  assert one.keys() == two.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], two[name])


def test_a_run_leaves_what_it_promises(whole):
  out, summary = whole
  names = {p.name for p in out.iterdir()}
  assert names == {
    'config.yaml',
    'command.txt',
    'env.json',
    'metrics.jsonl',
    'samples.jsonl',
    'checkpoints',
    'report.html',
    'reward.svg',
    'export',
    'model',
  }
  assert summary['steps'] == '6'
  found = rows(out / 'metrics.jsonl', timed=True)
  steps = [row for row in found if row['phase'] == 'train']
  assert [row['step'] for row in steps] == [1, 2, 3, 4, 5, 6]
  for row in steps:
    assert {
      'reward',
      'reward_std',
      'rewards/exact_match/mean',
      'frac_reward_zero_std',
      'surrogate',
      'entropy',
      'completions/mean_length',
      'completions/clipped_ratio',
      'num_tokens',
      'learning_rate',
      'grad_norm',
      'advantage_std',
      'sampler_logp_gap',
      'step_time',
      'time/rollout',
      'time/score',
      'time/update',
      'tokens_per_second',
    } <= row.keys()
    assert row['sampler_logp_gap'] < 1e-5
    assert row['reward'] == pytest.approx(row['rewards/exact_match/mean'])
  assert ['kl' in row for row in steps] == [False, True] * 3
  evals = [row['step'] for row in found if row['phase'] == 'eval']
  assert evals == [0, 2, 4, 6]
  splits = {row['split'] for row in rows(out / 'samples.jsonl')}
  assert splits == {'before', 'train', 'after'}
  sampled = [r for r in rows(out / 'samples.jsonl') if r['split'] == 'train']
  for row in sampled:
    assert len(row['tokens']) == len(row['logp']) == len(row['advantage'])
    assert sum(row['rewards']) == pytest.approx(row['reward'])


def test_stopped_and_resumed_is_never_stopped(whole, tmp_path):
  out = tmp_path / 'run'
  arithmetic.main(flags(out, max_steps=3, eval_every=2))
  # step 3 was the last then; a run that goes on does not evaluate there
  trimmed = [
    line
    for line in (out / 'metrics.jsonl').read_text().splitlines()
    if (row := json.loads(line))['step'] < 3 or row['phase'] == 'train'
  ]
  (out / 'metrics.jsonl').write_text('\n'.join(trimmed) + '\n')
  arithmetic.main(flags(out, resume='2'))
  assert_same_run(out, whole[0])


def test_a_signal_saves_and_the_run_goes_on(whole, tmp_path, monkeypatch):
  out, calls = tmp_path / 'run', []
  score = rewards.exact_match

  def exact_match(*args, **columns):
    calls.append(1)
    if len(calls) == 4 + 3:  # warm start cached; 1 before, then steps 1..3
      os.kill(os.getpid(), signal.SIGTERM)
    return score(*args, **columns)

  monkeypatch.setattr(rewards, 'exact_match', exact_match)
  with pytest.raises(SystemExit) as stopped:
    arithmetic.main(flags(out, save_every=0))
  assert stopped.value.code == 75
  monkeypatch.undo()
  steps = [
    row['step']
    for row in rows(out / 'metrics.jsonl')
    if row['phase'] == 'train'
  ]
  assert 1 < len(steps) < 6
  saved = [int(p.name) for p in (out / 'checkpoints').iterdir()]
  assert saved == steps[-1:]
  arithmetic.main(flags(out, resume='auto'))
  assert_same_run(out, whole[0])


def test_four_devices_and_micro_batches_reach_the_same(whole, tmp_path):
  """fsdp and tensor split, two micro-batches: the same tokens, and close."""
  out = tmp_path / 'run'
  arithmetic.main(
    flags(out, mesh='data=2,fsdp=2,tensor=2', micro_batch=16, max_steps=2)
  )
  want = [r for r in rows(whole[0] / 'metrics.jsonl') if r['step'] in (1, 2)]
  found = [r for r in rows(out / 'metrics.jsonl') if r['step'] in (1, 2)]
  for a, b in zip(found, want, strict=True):
    assert a.pop('phase') == b.pop('phase')
    a.pop('sampler_logp_gap', 0), b.pop('sampler_logp_gap', 0)
    assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_nothing_compiles_after_step_two(whole, tmp_path, monkeypatch, cache):
  seen, compiled = [], []
  score = rewards.exact_match
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if 'compile' in name else None
  )

  def exact_match(*args, **columns):
    seen.append(len(compiled))
    return score(*args, **columns)

  monkeypatch.setattr(rewards, 'exact_match', exact_match)
  arithmetic.main(flags(tmp_path / 'run', eval_every=1, max_steps=5))
  # one call before, then two a step: the rollout's and the evaluation's
  assert len(seen) >= 1 + 2 * 5
  assert seen[0] > 0
  assert seen[1 + 2 * 2] == seen[1 + 2 * 5 - 1]


def test_model_flag_starts_from_a_saved_policy(whole, tmp_path):
  saved = whole[0] / 'export'
  out = tmp_path / 'run'
  arithmetic.main(flags(out, model=saved, max_steps=1, learning_rate=1e-9))
  before = [
    r for r in rows(whole[0] / 'samples.jsonl') if r['split'] == 'after'
  ]
  again = [r for r in rows(out / 'samples.jsonl') if r['split'] == 'before']
  for a, b in zip(again, before, strict=True):
    assert a['completion'] == b['completion']
  card = (out / 'export/README.md').read_text()
  assert str(saved) in card


def test_the_export_is_the_policy(whole):
  out, _ = whole
  loaded = hf.read_params(hf.open_model(out / 'export'))
  kinds = {p.suffix for p in (out / 'export').iterdir()}
  assert kinds <= {'.safetensors', '.json', '.md', '.txt', '.jinja'}
  import orbax.checkpoint as ocp

  step = max(int(p.name) for p in (out / 'checkpoints').iterdir())
  saved = ocp.StandardCheckpointer().restore(
    out.absolute() / f'checkpoints/{step}/state'
  )
  jax.tree.map(np.testing.assert_array_equal, saved['params'], loaded)


def test_a_used_directory_is_refused_and_left_alone(whole, capsys):
  out, _ = whole
  before = {p: p.stat().st_mtime_ns for p in out.rglob('*')}
  with pytest.raises(SystemExit) as stopped:
    arithmetic.main(flags(out))
  assert stopped.value.code == 2
  said = capsys.readouterr().err.strip()
  assert '--resume auto' in said
  assert '\n' not in said
  assert before == {p: p.stat().st_mtime_ns for p in out.rglob('*')}


@pytest.mark.parametrize(
  ('given', 'fact'),
  [
    ({'num_prompts': 6}, 'devices of data x fsdp cannot share'),
    ({'compact_levels': 1}, 'pass --compact_levels 0'),
    ({'micro_batch': 16}, 'cannot share equally; pass --micro_batch 32'),
    ({'mesh': 'data=3'}, 'needs 3 devices and there are 8'),
    ({'max_prompt_length': 3}, 'more than max_prompt_length 3; pass'),
    ({'model': '/nonexistent'}, 'is no directory'),
    ({'max_completion_length': 2}, 'cannot hold an answer of 2 tokens'),
    ({'d_model': 15}, 'divisible by --num_heads'),
    ({'resume': 'auto', 'd_ff': 24}, 'resume with the flags'),
  ],
)
def test_what_cannot_be_is_one_line(whole, tmp_path, capsys, given, fact):
  out = whole[0] if 'resume' in given else tmp_path / 'run'
  with pytest.raises(SystemExit) as stopped:
    arithmetic.main(flags(out, **given))
  assert stopped.value.code == 2
  said = capsys.readouterr().err.strip()
  assert fact in said
  assert '\n' not in said
  if 'resume' not in given:
    assert not out.exists()


def test_print_config_trains_nothing(tmp_path, capsys):
  arithmetic.main([*flags(tmp_path / 'run'), '--print_config'])
  said = capsys.readouterr().out
  for fact in ('learning_rate: 0.0015', 'parameters: ', 'layer_0/mlp/gate_up'):
    assert fact in said
  assert not (tmp_path / 'run').exists()


def test_token_rewards_run_end_to_end(cache, tmp_path):
  out = tmp_path / 'run'
  arithmetic.main(flags(out, reward='digits', max_steps=2))
  sampled = [r for r in rows(out / 'samples.jsonl') if r['split'] == 'train']
  assert any(len(set(row['advantage'])) > 1 for row in sampled)
  steps = [r for r in rows(out / 'metrics.jsonl') if r['phase'] == 'train']
  assert 'rewards/digits/mean' in steps[0]


def test_ones_own_jsonl_is_learnt(cache, tmp_path):
  file = tmp_path / 'own.jsonl'
  lines = [
    json.dumps({'prompt': f'say {c}{c}', 'answer': c, 'note': 1})
    for c in 'abcdefghijklmnopqrst'
  ]
  file.write_text('\n'.join(lines))
  out = tmp_path / 'run'
  arithmetic.main(flags(out, data=file, max_steps=1))
  found = {r['answer'] for r in rows(out / 'samples.jsonl')}
  assert found <= set('abcdefghijklmnopqrst')
  assert {r['answer'] for r in rows(out / 'samples.jsonl')} & set('qrst')


@pytest.mark.parametrize(
  ('text', 'fact'),
  [
    ('{"prompt": "a", "answer": "b"}\n{"prompt"', 'own.jsonl:2: not JSON'),
    ('{"prompt": "", "answer": "b"}', 'own.jsonl:1: the prompt is empty'),
    ('{"prompt": "a"}', 'record 1 has no "answer"'),
    ('{"prompt": "a", "answer": "b"}', 'give 5 or more'),
    (None, 'is no file'),
  ],
)
def test_a_bad_jsonl_is_one_line(tmp_path, capsys, text, fact):
  file, out = tmp_path / 'own.jsonl', tmp_path / 'run'
  if text is not None:
    file.write_text(text)
  with pytest.raises(SystemExit) as stopped:
    arithmetic.main(flags(out, data=file))
  assert stopped.value.code == 2
  said = capsys.readouterr().err.strip()
  assert fact in said
  assert '\n' not in said
  assert not out.exists()


# --- the parts of the loop ---------------------------------------------------


def test_stop_reasons():
  config = parts.LoopConfig(max_steps=10, stop_at_reward=0.9, patience=3)
  go = train.Progress(step=5, eval_reward=0.8, evals_since_best=2)
  assert train.stop_reason(go, config) is None
  for change, word in (
    ({'step': 10}, 'max_steps'),
    ({'eval_reward': 0.95}, 'reached'),
    ({'evals_since_best': 3}, 'no better'),
  ):
    progress = train.Progress(**{**vars(go), **change})
    assert word in train.stop_reason(progress, config)


def test_warnings_name_the_cure():
  fine = {'frac_reward_zero_std': 0.5, 'completions/clipped_ratio': 0.5}
  assert train.warnings_of(fine) == {}
  bad = {'frac_reward_zero_std': 1.0, 'completions/clipped_ratio': 1.0}
  assert set(train.warnings_of(bad)) == {'variance', 'clipped'}


def test_problems_are_right_and_kept_apart():
  for digits in (1, 2, 3):
    problems, held_out = arithmetic.problems(digits, 300, 60)
    prompts = {p['prompt'] for p in held_out}
    assert len(prompts) == len(held_out)
    assert not prompts & {p['prompt'] for p in problems}
    for p in problems + held_out:
      assert len(p['answer']) == digits + 1
      a, sign, b = _split(p['prompt'])
      assert int(p['answer']) == (a + b if sign == '+' else a - b)
  again = arithmetic.problems(2, 300, 60)
  assert again == arithmetic.problems(2, 300, 60)


def _split(prompt):
  sign = '+' if '+' in prompt else '-'
  a, b = prompt.rstrip('=').split(sign)
  return int(a), sign, int(b)


def test_drift_is_zero_for_the_policy_itself(tiny):
  reference_kl = jax.jit(evaluation.make_reference_kl(tiny.policy))
  same = reference_kl((tiny.params, None), tiny.rollout, tiny.rule)
  assert float(same) == pytest.approx(0, abs=1e-6)
  other = jax.tree.map(lambda x: x * 1.2, tiny.params)
  assert float(reference_kl((other, None), tiny.rollout, tiny.rule)) > 1e-3
