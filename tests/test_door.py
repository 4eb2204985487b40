"""The user's door: train and main of a Task, its Result, and refusals."""

import json
import os
import runpy
import shlex
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
import yaml

import jaxrl_tok
from jaxrl_tok import Evaluation, Task, on_device
from jaxrl_tok.credit import advantages, algorithms
from jaxrl_tok.hub.directory import open_model
from jaxrl_tok.models.transformer import make_policy

pytestmark = pytest.mark.usefixtures('one_device', 'few_programs')

TINY = {
  'd_model': 16,
  'num_layers': 1,
  'num_heads': 2,
  'num_kv_heads': 1,
  'd_ff': 16,
  'num_prompts': 8,
  'num_generations': 2,
  'max_completion_length': 4,
  'max_steps': 2,
  'eval_every': 2,
  'length_buckets': 1,
  'report_to': 'none',
}


def records(start: int, count: int) -> list[dict]:
  return [
    {'prompt': f'{i:03d}', 'letter': 97 + i % 3, 'word': f'w{i}'}
    for i in range(start, start + count)
  ]


def one_record(seed, index):
  return records(index, 1)[0]


def short(completions, **columns):
  return [-len(c) for c in completions]


def named(completions, word):
  return [float(w in c) for w, c in zip(word, completions)]


def distinct(prompts, completions, **columns):
  return {'distinct': len(set(completions)), 'seen': len(completions)}


def words(settings: dict) -> list[str]:
  return [f'--{name}={value}' for name, value in settings.items()]


# --- a run


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
  """Trains by a library call, beside a foreign command line: (Task, Result)."""
  task = Task(
    records(0, 40), {short: 1.0, named: 0.5}, held_out=8, metrics=[distinct]
  )
  others = [
    Evaluation(
      'sampled',
      records(500, 6),
      rewards=named,
      every=1,
      samples=3,
      greedy=False,
      metrics=[distinct],
    ),
    Evaluation('more', records(600, 5), every=0),
  ]
  out, argv = tmp_path_factory.mktemp('runs') / 'run', sys.argv
  sys.argv = ['program', '--quantum', '7']
  try:
    result = jaxrl_tok.train(
      task, output_dir=out, evaluations=others, held_out=8, **TINY
    )
  finally:
    sys.argv = argv
  return task, result


def phases(result, phase) -> list[dict]:
  return [row for row in result.metrics if row['phase'] == phase]


def test_a_result_has_metrics_and_samples(ran):
  _, result = ran
  assert [row['step'] for row in phases(result, 'train')] == [1, 2]
  for row in phases(result, 'train'):
    both = row['rewards/short/mean'] + 0.5 * row['rewards/named/mean']
    assert row['reward'] == pytest.approx(both, rel=1e-5)
  splits = {row['split'] for row in result.samples}
  assert splits == {'before', 'train', 'after'}
  assert result.report.path.name == 'report.html'
  assert 'held-out after' in repr(result)
  assert result.run_dir.name == 'run'


def test_evaluations_are_a_list(ran):
  """Evaluations differ in data, rewards, metrics, samples and steps."""
  _, result = ran
  found = {}
  for row in phases(result, 'eval'):
    for name, value in row.items():
      if name.startswith('eval/'):
        found.setdefault(name, {})[row['step']] = value
  assert set(found['eval/reward']) == {0, 2}
  assert set(found['eval/sampled/reward']) == {0, 1, 2}
  assert set(found['eval/more/reward']) == {0, 2}  # before, and at the end
  assert set(found['eval/seen'].values()) == {8}
  assert set(found['eval/sampled/seen'].values()) == {6 * 3}
  assert 'eval/more/seen' not in found
  assert min(found['eval/sampled/distinct'].values()) > 6  # sampled
  assert all(0 <= x <= 1 for x in found['eval/sampled/reward'].values())
  assert all(x < 0 for x in found['eval/more/reward'].values())


def test_a_result_generates_and_evaluates(ran):
  task, result = ran
  once = result.generate(['000', '0001', '2'])
  assert once == result.generate(['000', '0001', '2'])
  sampled = [result.generate(['000'], greedy=False, seed=s) for s in range(4)]
  assert len({x for (x,) in sampled}) > 1
  found = result.evaluate(task)
  (last,) = (
    row
    for row in phases(result, 'eval')
    if row['step'] == 2 and 'eval/reward' in row
  )
  assert found['eval/reward'] == pytest.approx(last['eval/reward'])
  assert found['eval/seen'] == 8
  after = [r for r in result.samples if r['split'] == 'after']
  after = [r for r in after if r['evaluation'] == 'held_out']
  prompts = [r['prompt'] for r in after]
  assert result.generate(prompts) == [r['completion'] for r in after]


def test_a_result_is_exported(ran, tmp_path):
  task, result = ran
  out = result.export(tmp_path / 'policy')
  assert (
    open_model(out).vocab_size
    == open_model(result.run_dir / 'export').vocab_size
  )
  with pytest.raises(ValueError, match='a policy or a model, not both'):
    jaxrl_tok.train(task, model=out, policy=make_tiny_policy())


def test_a_signal_is_an_exception_of_a_library_call(tmp_path):
  calls = []

  def stopping(completions, **columns):
    calls.append(1)
    if len(calls) == 3:  # 1 before, then steps 1 and 2
      os.kill(os.getpid(), signal.SIGTERM)
    return [0.0] * len(completions)

  task = Task(records(0, 40), {'short': stopping}, held_out=8)
  given = TINY | {'max_steps': 50, 'output_dir': tmp_path / 'run'}
  with pytest.raises(jaxrl_tok.Interrupted, match='stopped by a signal'):
    jaxrl_tok.train(task, **given)
  assert list((tmp_path / 'run/checkpoints').iterdir())
  calls.clear()
  given['output_dir'] = tmp_path / 'other'
  with pytest.raises(SystemExit) as stopped:
    jaxrl_tok.main(task, [], **given)
  assert stopped.value.code == 75


# --- rewards on the device


@on_device
def letters(rollout, letter):
  """Share of the tokens that are the prompt's letter, or near it."""
  near = jnp.abs(rollout.tokens - letter[:, None]) < 60
  return (near & rollout.mask).astype(jnp.float32) / rollout.mask.shape[1]


@pytest.mark.parametrize('steps_per_call', [0, 10])
def test_a_device_reward_with_a_column_is_learnt(tmp_path, steps_per_call):
  result = jaxrl_tok.train(
    Task(records(0, 40), letters, held_out=8),
    output_dir=tmp_path / 'run',
    steps_per_call=steps_per_call,
    **TINY
    | {
      'max_steps': 40,
      'eval_every': 20,
      'save_every': 0,
      'learning_rate': 0.02,
      'num_generations': 8,
    },
  )
  held_out = [row['eval/reward'] for row in phases(result, 'eval')]
  assert len(held_out) == 3
  assert held_out[-1] > held_out[0] + 0.2
  steps = phases(result, 'train')
  assert [row['step'] for row in steps] == list(range(1, 41))
  assert all('rewards/letters/mean' in row for row in steps)
  # the KL to the reference is measured with each evaluation
  assert [row['step'] for row in steps if 'kl' in row] == [20, 40]


def test_replayed_groups_are_of_any_prompt_length(tmp_path):
  """A buffer of one length, batches of two."""
  mixed = records(0, 60)
  mixed[::12] = [r | {'prompt': r['prompt'] * 20} for r in mixed[::12]]
  result = jaxrl_tok.train(
    Task(mixed, short, held_out=8),
    output_dir=tmp_path / 'run',
    replay_groups=8,
    importance_cap=2.0,
    **TINY | {'max_steps': 5},
  )
  config = yaml.safe_load((result.run_dir / 'config.yaml').read_text())
  assert config['prompt_lengths'] == [3, 60]
  steps = phases(result, 'train')
  assert [row['step'] for row in steps] == [1, 2, 3, 4, 5]
  assert steps[0]['frac_not_valid'] == 0.5  # the buffer is empty
  assert steps[1]['frac_not_valid'] == 0


# --- parts of one's own


def power(stats, trajectory, exponent=1.0):
  return -trajectory.advantage * stats.logp, {'power': stats.logp * exponent}


def test_parts_of_an_algorithm_may_be_values(tmp_path):
  def per_row(mask, valid):
    return mask / mask.shape[0]

  def credit(inputs, carries):
    above = inputs.reward - inputs.reward.mean()
    return jnp.where(inputs.mask, above, 0.0)

  result = jaxrl_tok.train(
    Task(records(0, 40), short, held_out=8),
    output_dir=tmp_path / 'run',
    loss=power,
    aggregation=per_row,
    credit=credit,
    optimizer=optax.sgd(0.1),
    **TINY | {'max_steps': 1},
  )
  (row,) = phases(result, 'train')
  assert 'power' in row
  assert 'learning_rate' not in row  # the optimizer is not ours
  config = yaml.safe_load((result.run_dir / 'config.yaml').read_text())
  found = config['algorithm_resolved']
  assert found['loss'] == 'power'
  assert found['aggregate'] == 'per_row'


def make_tiny_policy():
  from conftest import CONFIG, changed

  return make_policy(changed(CONFIG, vocab_size=258, layers=CONFIG.layers[:1]))


def flat_logits(policy):
  return policy._replace(
    logits=lambda params, hidden: policy.logits(params, hidden).reshape(-1)
  )


REFUSALS = {
  'no reward': (Task(records(0, 40), None), {}, 'a Task needs a reward'),
  'empty': (Task(records(0, 40), []), {}, 'a Task needs a reward'),
  'no Task': ([{'prompt': 'a'}], {}, 'a run needs a Task, and this is a list'),
  'a column': (
    Task(records(0, 40), lambda completions, wrod: []),
    {},
    'asks for wrod, which is no column of the data',
  ),
  'no argument': (
    Task(records(0, 40), lambda: None),
    {},
    'takes none of the arguments of a reward function',
  ),
  'by position': (
    Task(records(0, 40), eval('lambda completions, /: []')),
    {},
    'by position only',
  ),
  'evaluation': (
    Task(records(0, 40), short),
    {'evaluations': [Evaluation('x', records(0, 3), lambda lost: [])]},
    'asks for lost, which is no column',
  ),
  'two names': (
    Task(records(0, 40), short),
    {'evaluations': [Evaluation('x', records(0, 3))] * 2},
    'two evaluations are named x',
  ),
  'an endless evaluation': (
    Task(records(0, 40), short),
    {'evaluations': [Evaluation('x', one_record)]},
    'of the evaluation x is endless; give a finite number of records',
  ),
  'an evaluation named train': (
    Task(records(0, 40), short),
    {'evaluations': [Evaluation('train', records(0, 3))]},
    "an evaluation is named train, as the step's own batch; rename it",
  ),
  'greedy samples': (
    Task(records(0, 40), short),
    {'evaluations': [Evaluation('x', records(0, 3), samples=8)]},
    'are all the same; pass greedy=False, or samples=1',
  ),
  'no samples': (
    Task(records(0, 40), short),
    {'evaluations': [Evaluation('x', records(0, 3), samples=0)]},
    'the evaluation x has samples=0; give 1 or more',
  ),
  'between calls': (
    Task(records(0, 40), letters),
    {
      'evaluations': [Evaluation('x', records(0, 3), every=3)],
      'steps_per_call': 2,
      'save_every': 0,
    },
    'every=3 of the evaluation x must be a multiple of --steps_per_call 2',
  ),
  'a maker of an algorithm': (
    Task(records(0, 40), short),
    {'algorithm': algorithms.grpo},
    'algorithm is a function, not a jaxrl_tok.Algorithm; call its maker',
  ),
  'a maker of an optimizer': (
    Task(records(0, 40), short),
    {'optimizer': optax.adam},
    'optimizer is a function, not an optax.GradientTransformation; call its',
  ),
  'a loss': (
    Task(records(0, 40), short),
    {'loss': lambda stats, trajectory: stats.logp.sum()},
    'gave rank 0, float32 [], expected [T] of float with T=4',
  ),
  'a credit': (
    Task(records(0, 40), short),
    {'credit': lambda inputs, carries: inputs.reward.sum()},
    'gave rank 0, float32 [], expected [B, T] of float with B=16, T=4',
  ),
  'an evaluation of JAX': (
    Task(
      records(0, 40),
      short,
      eval_rewards=on_device(lambda rollout: rollout.mask[:, :2]),
    ),
    {},
    'it must return an array',
  ),
  'micro-batches': (
    Task(records(0, 40), short),
    {'algorithm': algorithms.grpo(mini_batches=4), 'micro_batch': 16},
    '--micro_batch 16 must divide the 4 completions of a mini-batch',
  ),
  "the critic's rate": (
    Task(records(0, 40), short),
    {
      'algorithm': 'a2c',
      'optimizer': optax.sgd(0.1),
      'critic_learning_rate': 0.1,
    },
    '--critic_learning_rate has no effect: optimizer is a value of your own',
  ),
  'on the host': (
    Task(records(0, 40), short),
    {'steps_per_call': 2, 'save_every': 0},
    'and short is none; pass --steps_per_call 0, or mark it @on_device',
  ),
  'critic': (
    Task(records(0, 40), short),
    {'algorithm': algorithms.ppo(max_length=4), 'policy': 'tiny'},
    'needs a critic, and the policy has no value',
  ),
  'critic by name': (
    Task(records(0, 40), short),
    {'algorithm': 'a2c', 'policy': 'tiny'},
    'a2c needs a critic, and the policy has no value',
  ),
  'rank': (
    Task(records(0, 40), short),
    {'policy': 'flat'},
    'policy.logits gave rank 1',
  ),
  'a reward of JAX': (
    Task(records(0, 40), on_device(lambda rollout: rollout.mask[:, :2])),
    {},
    'it must return an array',
  ),
  'vocabulary': (
    Task(records(0, 40), short),
    {'policy': 'small'},
    'the tokenizer has 258 ids and the policy a vocab_size of 11',
  ),
  'group': (
    Task(records(0, 40), short),
    {'algorithm': algorithms.grpo(), 'num_generations': 1},
    'grpo compares the samples of a prompt and needs 2',
  ),
  'changes': (
    Task(records(0, 40), short),
    {'algorithm': algorithms.grpo(), 'baseline': advantages.ema(0.5)},
    'baseline would change an algorithm that is given as a value',
  ),
}


def own(settings: dict) -> dict:
  """Settings whose policy is named by a word."""
  if 'policy' not in settings:
    return TINY | settings
  made = make_tiny_policy()
  sizes = 'd_model', 'num_layers', 'num_heads', 'num_kv_heads', 'd_ff'
  policy = {
    'tiny': made,
    'flat': flat_logits(made),
    'small': made._replace(vocab_size=11),
  }[settings['policy']]
  kept = {k: v for k, v in TINY.items() if k not in sizes}
  return kept | settings | {'policy': policy}


@pytest.mark.parametrize('name', REFUSALS)
def test_what_cannot_be_is_one_line(name, tmp_path, capsys):
  """A ValueError of train, exit 2 of main; no run begins."""
  task, settings, fact = REFUSALS[name]
  settings = own(settings) | {'output_dir': tmp_path / 'run'}
  with pytest.raises(ValueError) as refused:  # noqa: PT011
    jaxrl_tok.train(task, **settings)
  assert fact in str(refused.value)
  assert '\n' not in str(refused.value)
  assert not (tmp_path / 'run').exists()
  capsys.readouterr()
  if isinstance(task, Task):
    with pytest.raises(SystemExit) as stopped:
      jaxrl_tok.main(task, [], **settings)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said == f'error: {refused.value}\n'


# --- stopped and resumed


def test_an_evaluation_at_the_end_is_logged_where_a_run_ends_early(tmp_path):
  result = jaxrl_tok.train(
    Task(records(0, 40), short, held_out=8),
    output_dir=tmp_path / 'run',
    evaluations=Evaluation('last', records(500, 3), every=0),
    stop_at_reward=-100.0,
    **TINY | {'max_steps': 4, 'eval_every': 1},
  )
  found = [
    (row['step'], name)
    for row in phases(result, 'eval')
    for name in ('eval/reward', 'eval/last/reward')
    if name in row
  ]
  names = 'eval/reward', 'eval/last/reward'
  assert found == [(step, name) for step in (0, 1) for name in names]


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
  """Directory of a run of 3 steps with a replay buffer of 16 groups."""
  out = tmp_path_factory.mktemp('runs') / 'run'
  task = Task(records(0, 40), short, held_out=8)
  settings = {'max_steps': 3, 'replay_groups': 8, 'importance_cap': 2.0}
  jaxrl_tok.train(task, output_dir=out, replay_capacity=16, **TINY | settings)
  return out


@pytest.mark.parametrize(
  ('settings', 'fact'),
  [
    ({}, 'is of a run with other collectors; resume with the --ahead'),
    (
      {'replay_groups': 8, 'importance_cap': 2.0, 'replay_capacity': 64},
      'holds 16 groups; pass --replay_capacity 16',
    ),
  ],
)
def test_another_collector_cannot_go_on(stopped, settings, fact):
  with pytest.raises(ValueError, match=fact) as refused:
    jaxrl_tok.train(
      Task(records(0, 40), short, held_out=8),
      output_dir=stopped,
      resume='auto',
      allow_change='settings',
      **TINY | {'max_steps': 6} | settings,
    )
  assert '\n' not in str(refused.value)


def test_calls_of_several_steps_go_on_from_a_multiple(tmp_path):
  task = Task(records(0, 40), letters, held_out=8)
  out = {'output_dir': tmp_path / 'run', 'save_every': 0}
  jaxrl_tok.train(task, **out, **TINY | {'max_steps': 3, 'eval_every': 0})
  with pytest.raises(ValueError, match='cannot go on from step 3'):
    jaxrl_tok.train(
      task, **out, resume='auto', steps_per_call=2, **TINY | {'max_steps': 8}
    )


def test_a_run_without_a_checkpoint_begins_anew(tmp_path):
  """The rows that it left are not those of the run that takes its place."""

  def stops(completions, trainer_state):
    if trainer_state.global_step == 1:
      raise RuntimeError('no more')
    return short(completions)

  out = {'output_dir': tmp_path / 'run', 'save_every': 0}
  with pytest.raises(ValueError, match='no more'):
    jaxrl_tok.train(
      Task(records(0, 40), {'short': stops}, held_out=8), **out, **TINY
    )
  assert (tmp_path / 'run' / 'metrics.jsonl').read_text()
  result = jaxrl_tok.train(
    Task(records(0, 40), short, held_out=8),
    **out,
    resume='auto',
    allow_change='rewards',
    **TINY,
  )
  assert [row['step'] for row in phases(result, 'train')] == [1, 2]
  assert [row['step'] for row in phases(result, 'eval')] == [0, 2]


def test_columns_are_renamed_for_a_later_evaluation_too(tmp_path):
  task = Task(
    [{'asked': r['prompt']} for r in records(0, 40)], short, held_out=8
  )
  result = jaxrl_tok.train(
    task, output_dir=tmp_path / 'run', rename=['asked=prompt'], **TINY
  )
  last = phases(result, 'eval')[-1]
  assert result.evaluate(task)['eval/reward'] == last['eval/reward']


# --- commands

COUPLETS = """
from jaxrl_tok import Task, main
def rhymes(prompts, completions, rhymes_with, **columns):
  return [float(c.endswith(w)) for c, w in zip(completions, rhymes_with)]
if __name__ == '__main__':
  main(Task('couplets.jsonl', rhymes, held_out=8), num_generations=2)
"""


def execute(command: list[str], monkeypatch) -> None:
  """Runs a python command in this process, as Python would."""
  assert command[0] == 'python'
  if command[1] == '-m':
    monkeypatch.setattr(sys, 'argv', command[2:])
    monkeypatch.delitem(sys.modules, command[2], raising=False)
    runpy.run_module(command[2], run_name='__main__', alter_sys=True)
  else:
    monkeypatch.setattr(sys, 'argv', command[1:])
    runpy.run_path(command[1], run_name='__main__')


def losses_of(run: Path) -> list:
  rows = map(json.loads, (run / 'metrics.jsonl').read_text().splitlines())
  return [r['entropy'] for r in rows if r['phase'] == 'train']


@pytest.mark.parametrize('kind', ['file', 'module'])
def test_command_txt_repeats_the_run(kind, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  settings = {k: v for k, v in TINY.items() if k != 'num_generations'}
  if kind == 'file':
    Path('my couplets.py').write_text(COUPLETS)
    lines = [
      json.dumps({'prompt': f'{i:03d}', 'rhymes_with': 'a'}) for i in range(40)
    ]
    Path('couplets.jsonl').write_text('\n'.join(lines))
    command = ['python', 'my couplets.py']
  else:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    command = ['python', '-m', 'experiments.arithmetic', '--num_generations=2']
    command += ['--digits=1', '--num_problems=200', '--held_out=8']
    command += ['--warm_start_max_steps=1']
  command += [*words(settings), '--output_dir=run']
  execute(command, monkeypatch)
  said = Path('run/command.txt').read_text()
  assert shlex.split(said) == command
  Path('run').rename('first')
  execute(shlex.split(said), monkeypatch)
  assert losses_of(Path('run')) == losses_of(Path('first'))
  assert len(losses_of(Path('run'))) == 2
  config = yaml.safe_load(Path('run/config.yaml').read_text())
  name = 'my couplets' if kind == 'file' else 'arithmetic'
  assert config['experiment'] == name


def test_no_prompt_length_compiles_later(tmp_path, few_programs):
  """Two lengths, the longer one met late: its programs were there before."""
  mixed, compiled, at_step = records(0, 80), [], []
  few_programs.clear()  # this run compiles its own
  mixed[::40] = [r | {'prompt': r['prompt'] * 30} for r in mixed[::40]]
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if 'compile' in name else None
  )

  def counted(prompts, completions, **columns):
    at_step.append((max(map(len, prompts)), len(compiled)))
    return [float(len(c)) for c in completions]

  result = jaxrl_tok.train(
    Task(mixed, counted, held_out=8, eval_rewards=short),
    output_dir=tmp_path / 'run',
    **TINY | {'max_steps': 24, 'eval_every': 12, 'save_every': 0},
  )
  config = yaml.safe_load((result.run_dir / 'config.yaml').read_text())
  assert len(config['prompt_lengths']) == 2
  lengths, counts = zip(*at_step)
  assert set(lengths[:3]) == {3}
  assert 90 in lengths[3:]
  assert counts[0] > 0
  assert counts[2] == counts[-1]
