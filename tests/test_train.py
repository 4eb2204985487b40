"""The loop: resume is never having stopped, nothing compiles after step 2."""

import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import arithmetic
from jaxrl_tok import rewards
from jaxrl_tok.hub.directory import open_model
from jaxrl_tok.hub.export import export_run
from jaxrl_tok.hub.weights import read_params
from jaxrl_tok.run.record import claim_output_dir
from jaxrl_tok.run.settings import RunSettings
from jaxrl_tok.step.collectors import Batch, TokenCounts
from jaxrl_tok.step.programs import make_reference_kl
from jaxrl_tok.step.update import FIRST, IN_A_ROW
from jaxrl_tok.train import (
  LoopConfig,
  Progress,
  StepLog,
  find_warnings,
  stop_reason,
)

pytestmark = pytest.mark.usefixtures('one_device', 'few_programs')

TINY = {
  'digits': 1,
  'num_problems': 200,  # of 155 that are different
  'd_model': 16,
  'num_layers': 1,
  'num_heads': 2,
  'num_kv_heads': 1,
  'd_ff': 16,
  'num_prompts': 8,
  'num_generations': 4,
  'held_out': 16,
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
  return [
    f'--{name}' if value is True else f'--{name}={value}'
    for name, value in given.items()
  ]


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


@pytest.fixture(scope='module')
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


@pytest.fixture(scope='module')
def whole(cache, tmp_path_factory):
  """A run of six steps that nothing stopped."""
  out = tmp_path_factory.mktemp('runs') / 'whole'
  return out, arithmetic.run(flags(out))


def assert_same_run(a: Path, b: Path):
  for name in ('metrics.jsonl', 'samples.jsonl'):
    assert rows(a / name) == rows(b / name), name
  one, two = (load_file(x / 'export/model.safetensors') for x in (a, b))
  assert one.keys() == two.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], two[name])


def test_a_run_leaves_what_it_promises(whole):
  out, result = whole
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
  assert result.summary['steps'] == '6'
  found = rows(out / 'metrics.jsonl', timed=True)
  steps = [row for row in found if row['phase'] == 'train']
  assert [row['step'] for row in steps] == [1, 2, 3, 4, 5, 6]
  for row in steps:
    assert {
      'reward',
      'reward_std',
      'reward_group_std',
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
  counts = np.array([row['completions/tokens'] for row in steps]).cumsum()
  assert [row['sampled_tokens'] for row in steps] == counts.tolist()
  assert [row['reward_calls'] for row in steps] == [32 * k for k in range(1, 7)]
  evals = [row for row in found if row['phase'] == 'eval']
  assert [row['step'] for row in evals] == [0, 2, 4, 6]
  for row in evals:
    for name in ('logp_gap_mean', 'logp_gap_max', 'kl', 'prob_gap_max'):
      assert 0 <= row[f'eval/mismatch/{name}'] < 1e-5
  splits = {row['split'] for row in rows(out / 'samples.jsonl')}
  assert splits == {'before', 'train', 'after'}
  sampled = [r for r in rows(out / 'samples.jsonl') if r['split'] == 'train']
  for row in sampled:
    assert len(row['tokens']) == len(row['logp']) == len(row['advantage'])
    assert sum(row['rewards']) == pytest.approx(row['reward'])


def test_stopped_and_resumed_is_never_stopped(whole, tmp_path):
  out = tmp_path / 'run'
  arithmetic.run(flags(out, max_steps=3, eval_every=2))
  # step 3 was the last then; a run that goes on does not evaluate there
  trimmed = [
    line
    for line in (out / 'metrics.jsonl').read_text().splitlines()
    if (row := json.loads(line))['step'] < 3 or row['phase'] == 'train'
  ]
  (out / 'metrics.jsonl').write_text('\n'.join(trimmed) + '\n')
  arithmetic.run(flags(out, resume='2'))
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
    arithmetic.run(flags(out, save_every=0))
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
  arithmetic.run(flags(out, resume='auto', allow_change='rewards'))
  assert_same_run(out, whole[0])


@pytest.mark.parametrize(
  'given',
  [
    {'ahead': True, 'loss': 'clip'},
    {'replay_groups': 8, 'replay_capacity': 16, 'importance_cap': 2},
  ],
  ids=['ahead', 'replayed'],
)
def test_older_rollouts_are_resumed_to_the_bit(cache, tmp_path, request, given):
  if 'replay_groups' in given:  # a buffer that devices share
    request.getfixturevalue('all_devices')
  whole, halted = tmp_path / 'whole', tmp_path / 'halted'
  arithmetic.run(flags(whole, max_steps=4, **given))
  shutil.copytree(whole, halted)
  arithmetic.run(flags(halted, max_steps=4, resume='2', **given))
  assert_same_run(halted, whole)
  found = rows(whole / 'metrics.jsonl')
  steps = [row for row in found if row['phase'] == 'train']
  assert len(steps) == 4
  if 'ahead' in given:  # the policy has moved since it sampled
    gaps = [row['sampler_logp_gap'] for row in steps]
    assert gaps[0] < 1e-5 < gaps[2]
  else:
    ages = [row['replay/age'] for row in steps]
    assert ages[0] == 0 < ages[3]


def test_eight_devices_and_micro_batches_reach_the_same(
  whole, tmp_path, all_devices
):
  """fsdp and tensor split, two micro-batches: the same tokens, and close."""
  out = tmp_path / 'run'
  arithmetic.run(
    flags(out, mesh='data=2,fsdp=2,tensor=2', micro_batch=16, max_steps=2)
  )
  want = [r for r in rows(whole[0] / 'metrics.jsonl') if r['step'] in (1, 2)]
  found = [r for r in rows(out / 'metrics.jsonl') if r['step'] in (1, 2)]
  for a, b in zip(found, want, strict=True):
    assert a.pop('phase') == b.pop('phase')
    a.pop('sampler_logp_gap', 0), b.pop('sampler_logp_gap', 0)
    assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_nothing_compiles_after_step_two(
  whole, tmp_path, monkeypatch, cache, few_programs
):
  few_programs.clear()  # this run compiles its own
  seen, compiled = [], []
  score = rewards.exact_match
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if 'compile' in name else None
  )

  def exact_match(*args, **columns):
    seen.append(len(compiled))
    return score(*args, **columns)

  monkeypatch.setattr(rewards, 'exact_match', exact_match)
  arithmetic.run(flags(tmp_path / 'run', eval_every=1, max_steps=5))
  # one call before, then two a step: the rollout's and the evaluation's
  assert len(seen) >= 1 + 2 * 5
  assert seen[0] > 0
  assert seen[1 + 2 * 2] == seen[1 + 2 * 5 - 1]


def test_model_flag_starts_from_a_saved_policy(whole, tmp_path):
  saved = whole[0] / 'export'
  out = tmp_path / 'run'
  arithmetic.run(flags(out, model=saved, max_steps=1))
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
  loaded = read_params(open_model(out / 'export'))
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
    arithmetic.run(flags(out))
  assert stopped.value.code == 2
  said = capsys.readouterr().err.strip()
  assert '--resume auto' in said
  assert '\n' not in said
  assert before == {p: p.stat().st_mtime_ns for p in out.rglob('*')}


# --- the run's directory


def claim(path, **more):
  run = RunSettings(output_dir=path and str(path), **more)
  return claim_output_dir(run, 'sums')


def test_a_new_directory_is_made_and_left_empty(tmp_path):
  path = claim(tmp_path / 'a' / 'b')
  assert path == tmp_path / 'a' / 'b'
  assert list(path.iterdir()) == []
  assert claim(path) == path  # empty: nothing to lose


def test_the_default_directory_is_named_after_experiment_and_time(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  path = claim(None)
  assert path.is_dir()
  assert path.parts[0] == 'runs'
  assert path.name.startswith('sums-2')


@pytest.mark.parametrize('word', ['auto', '20'])
def test_a_resumed_run_has_its_directory_as_it_was(tmp_path, word):
  (tmp_path / 'metrics.jsonl').write_text('precious')
  assert claim(tmp_path, resume=word) == tmp_path
  assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']
  assert (tmp_path / 'metrics.jsonl').read_text() == 'precious'


def test_a_file_in_the_way_is_named(tmp_path):
  path = tmp_path / 'file'
  path.write_text('precious')
  with pytest.raises(ValueError) as e:  # noqa: PT011
    claim(path)
  assert str(e.value) == f'--output_dir {path} is a file; give a directory'
  with pytest.raises(ValueError, match='/under cannot be written: '):
    claim(path / 'under')
  assert path.read_text() == 'precious'


# --- the best checkpoint

BEST = {
  'best_metric': 'eval/mean_length',
  'best_mode': 'min',
  'export': 'best',
  'keep': 1,
}


def best_of(out: Path) -> int:
  """Step of the first evaluation with the fewest tokens, while training."""
  found = {
    row['step']: row['eval/mean_length']
    for row in rows(out / 'metrics.jsonl')
    if row['step'] and 'eval/mean_length' in row
  }
  return min(found, key=found.get)


def test_the_best_checkpoint_is_kept_exported_and_resumed(
  whole, tmp_path, monkeypatch
):
  out, halted, calls = tmp_path / 'whole', tmp_path / 'halted', []
  score = rewards.exact_match

  def exact_match(*args, **columns):
    calls.append(1)
    return score(*args, **columns)

  monkeypatch.setattr(rewards, 'exact_match', exact_match)
  result = arithmetic.run(flags(out, **BEST))
  monkeypatch.undo()
  best = best_of(out)
  assert {int(p.name) for p in (out / 'checkpoints').iterdir()} == {best, 6}
  # one before, six steps, three evaluations, and the best one's rows if it is
  # not the last: that of the last step is not made again
  assert len(calls) == 1 + 6 + 3 + (best < 6)
  label = 'exported, best by eval/mean_length (optimistic)'
  assert result.summary[label] == f'step {best}'
  after = [r for r in rows(out / 'samples.jsonl') if r['split'] == 'after']
  assert {r['step'] for r in after} == {best}
  export_run(out, tmp_path / 'by_step', 'best')
  one, two = (
    load_file(x / 'model.safetensors')
    for x in (out / 'export', tmp_path / 'by_step')
  )
  for name in one:
    np.testing.assert_array_equal(one[name], two[name])
  arithmetic.run(flags(halted, **BEST | {'max_steps': 4}))
  arithmetic.run(flags(halted, **BEST, resume='auto'))
  assert_same_run(halted, out)
  metas = [
    json.loads((x / 'checkpoints/6/meta/metadata').read_text())['progress']
    for x in (out, halted)
  ]
  assert metas[0] == metas[1]
  assert metas[0]['best_step'] == best


# --- refusals


@pytest.mark.parametrize(
  ('given', 'fact'),
  [
    ({'num_prompts': 6}, 'devices of data x fsdp cannot share'),
    ({'compact_levels': 1}, 'pass --compact_levels 0'),
    ({'micro_batch': 16}, 'cannot share equally; pass --micro_batch 32'),
    ({'replay_groups': 4, 'loss': 'clip'}, 'pass --replay_groups 8'),
    ({'ahead': True}, 'its loss has no ratio; pass'),
    ({'mesh': 'data=3'}, 'needs 3 devices and there are 8'),
    ({'max_prompt_length': 3}, 'more than max_prompt_length 3; pass'),
    ({'model': '/nonexistent'}, 'is no directory'),
    ({'best_metric': 'reward'}, 'their names begin with eval/'),
    ({'best_mode': 'min'}, 'is of a --best_metric, and there is none'),
    ({'export': 'best', 'eval_every': 0}, 'held_out is made after the last'),
    ({'max_completion_length': 2}, 'cannot hold an answer of 2 tokens'),
    ({'d_model': 15}, 'divisible by --num_heads'),
    ({'resume': 'auto', 'baseline': 'ema'}, 'resume with the flags'),
  ],
)
def test_what_cannot_be_is_one_line(
  whole, tmp_path, capsys, request, given, fact
):
  out = whole[0] if 'resume' in given else tmp_path / 'run'
  if 'resume' not in given:
    request.getfixturevalue('all_devices')
  with pytest.raises(SystemExit) as stopped:
    arithmetic.run(flags(out, **given))
  assert stopped.value.code == 2
  said = capsys.readouterr().err.strip()
  assert fact in said
  assert '\n' not in said
  if 'resume' not in given:
    assert not out.exists()


def test_print_config_trains_nothing(tmp_path, capsys):
  arithmetic.run([*flags(tmp_path / 'run'), '--print_config'])
  said = capsys.readouterr().out
  for fact in ('learning_rate: 0.0015', 'parameters: ', 'layers/mlp/gate_up'):
    assert fact in said
  assert not (tmp_path / 'run').exists()


def test_token_rewards_run_end_to_end(cache, tmp_path):
  out = tmp_path / 'run'
  arithmetic.run(flags(out, reward='digits', max_steps=2))
  sampled = [r for r in rows(out / 'samples.jsonl') if r['split'] == 'train']
  assert any(len(set(row['advantage'])) > 1 for row in sampled)
  steps = [r for r in rows(out / 'metrics.jsonl') if r['phase'] == 'train']
  assert 'rewards/digits/mean' in steps[0]


OWN = [chr(i) for i in range(40, 120)]


def test_ones_own_jsonl_is_learnt(cache, tmp_path):
  file = tmp_path / 'own.jsonl'
  lines = [  # as long as sums of one digit, so that no program is new
    json.dumps({'prompt': f'say{c}', 'answer': c * 2, 'note': 1})
    for c in OWN  # and as many held out
  ]
  file.write_text('\n'.join(lines))
  out = tmp_path / 'run'
  arithmetic.run(flags(out, data=file, max_steps=1))
  found = {r['answer'] for r in rows(out / 'samples.jsonl')}
  assert found <= {c * 2 for c in OWN}
  assert found & {c * 2 for c in OWN[-16:]}  # held out


FIVE = '\n'.join(f'{{"prompt": "{c}"}}' for c in 'abcde')


@pytest.mark.parametrize(
  ('text', 'fact'),
  [
    ('{"prompt": "a", "answer": "b"}\n{"prompt"', 'own.jsonl:2: not JSON'),
    ('{"prompt": "", "answer": "b"}', 'own.jsonl:1: the prompt is empty'),
    (FIVE, "own.jsonl:1: no 'answer' that is text"),
    ('{"prompt": "a", "answer": "b"}', 'give 5 or more'),
    (None, 'no such file'),
  ],
)
def test_a_bad_jsonl_is_one_line(tmp_path, capsys, text, fact):
  file, out = tmp_path / 'own.jsonl', tmp_path / 'run'
  if text is not None:
    file.write_text(text)
  with pytest.raises(SystemExit) as stopped:
    arithmetic.run(flags(out, data=file))
  assert stopped.value.code == 2
  said = capsys.readouterr().err.strip()
  assert fact in said
  assert '\n' not in said
  assert not out.exists()


# --- the parts of the loop ---------------------------------------------------


def test_stop_reasons():
  config = LoopConfig(max_steps=10, stop_at_reward=0.9, patience=3)
  go = Progress(step=5, eval_reward=0.8, evals_since_best=2)
  assert stop_reason(go, config) is None
  for change, word in (
    ({'step': 10}, 'max_steps'),
    ({'eval_reward': 0.95}, 'reached'),
    ({'evals_since_best': 3}, 'no better'),
  ):
    progress = Progress(**{**vars(go), **change})
    assert word in stop_reason(progress, config)


def test_warnings_name_the_cure():
  fine = {'frac_reward_zero_std': 0.5, 'completions/clipped_ratio': 0.5}
  assert find_warnings(fine) == {}
  bad = {'frac_reward_zero_std': 1.0, 'completions/clipped_ratio': 1.0}
  assert set(find_warnings(bad)) == {'variance', 'clipped'}


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
  reference_kl = jax.jit(make_reference_kl(tiny.policy, None))
  same = reference_kl((tiny.params, None), tiny.rollout, tiny.rule)
  assert float(same) == pytest.approx(0, abs=1e-6)
  other = jax.tree.map(lambda x: x * 1.2, tiny.params)
  assert float(reference_kl((other, None), tiny.rollout, tiny.rule)) > 1e-3


# --- the log of steps --------------------------------------------------------


class Rows:
  """Logger that keeps rows and warnings."""

  def __init__(self):
    self.rows, self.warned = [], []

  def metrics(self, phase, step, values):
    self.rows.append((step, values))

  def warn(self, text):
    self.warned.append(text)


def log_steps(rows, **config):
  """Logs rows of metrics, all steps of one call; returns the Logger, and the
  error that ended the run."""
  logger = Rows()
  names = ['the loss', 'the gradient of w', 'w after the step']
  config = LoopConfig(**config)
  log = StepLog(logger, lambda *given: None, config, names)
  usual = {
    'completions/tokens': 4.0,
    'completions/clipped_ratio': 0.0,
    'frac_reward_zero_std': 0.0,
    'reward': 1.0,
    'entropy': 1.0,
  }
  found = [usual | row for row in rows]
  stacked = {k: np.array([row[k] for row in found]) for k in found[0]}
  counts = TokenCounts(np.full(len(rows), 2), None, np.full(len(rows), 3))
  batch = Batch(None, [], None, {}, counts, {})
  progress = log.hold(Progress(), batch, stacked)
  n = len(rows)
  assert progress == Progress(n, 7 * n, sampled_tokens=4 * n)
  assert logger.rows == []  # the caller's progress comes first
  try:
    log.flush()
  except ValueError as e:
    log.drain()
    return logger, e
  return logger, None


def bad(in_a_row: int, first: int = 0) -> dict:
  found = {'nonfinite_updates': float(in_a_row > 0)}
  return found | {IN_A_ROW: in_a_row, FIRST: first}


def test_updates_in_a_row_that_are_not_finite_end_the_run():
  rows = [bad(0), bad(1, 1), bad(2, 2), bad(3), bad(0)]
  logger, error = log_steps(rows)
  assert str(error) == (
    '3 updates in a row, up to step 4, were not finite and changed nothing; '
    'the first such tensor is the gradient of w; lower --learning_rate, or '
    'mend the loss or the reward'
  )
  assert (error.since, error.by_reward, error.by_policy) == (1, False, False)
  assert [step for step, _ in logger.rows] == [1, 2, 3, 4, 5]  # none is lost
  for _, values in logger.rows:
    assert not {IN_A_ROW, FIRST} & values.keys()
    assert 'nonfinite_updates' in values
  (warned,) = logger.warned
  assert warned == (
    'step 2: an update was not finite and changed nothing; the first such '
    'tensor is the gradient of w; the metric nonfinite_updates counts them'
  )


@pytest.mark.parametrize('most', [0, 4])
def test_fewer_than_max_nonfinite_go_on(most):
  logger, error = log_steps([bad(1), bad(2), bad(3)], max_nonfinite=most)
  assert error is None
  assert len(logger.rows) == 3


def test_rewards_on_the_device_that_are_not_finite_end_many_steps():
  name = 'rewards/judge/errors'
  _, error = log_steps([bad(0) | {name: 0.0}, bad(1) | {name: 2.0}])
  assert str(error) == (
    '@on_device reward judge gave 2 completions of step 2 values that are not '
    'finite; mend it, or pass --reward_on_error mask'
  )
  logger, error = log_steps([bad(0) | {name: 2.0}], reward_on_error='mask')
  assert error is None
  assert logger.rows[0][1][name] == 2
  logger, error = log_steps([bad(0) | {name: 0.0}])
  assert name not in logger.rows[0][1]
