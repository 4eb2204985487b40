"""Runs with an environment: guess a number of 1 to 8, by higher and lower."""

import dataclasses
import random
import shutil

import jax
import numpy as np
import pytest

from jaxrl_tok import Task, on_device, train
from jaxrl_tok.run.settings import Settings, with_values
from jaxrl_tok.run.turns import check_turns

pytestmark = pytest.mark.usefixtures('few_programs')

SMALL = {
  'd_model': 16,
  'num_layers': 1,
  'num_heads': 2,
  'num_kv_heads': 1,
  'd_ff': 32,
  'num_prompts': 8,
  'num_generations': 2,
  'max_completion_length': 2,
  'max_turns': 3,
  'max_episode_length': 16,
  'length_buckets': 1,
  'report_to': 'none',
  'eval_every': 2,
  'save_every': 2,
  'max_steps': 4,
  'log_kl': False,
  'audit': False,
}


class Guess:
  """1 for the number, 0.1 for another one, -0.1 for what is no number."""

  def reset(self, seed, example):
    self.number = random.Random(seed).randint(1, 8)
    return 'go ', {}

  def step(self, action):
    guess = int(action) if action in tuple('12345678') else None
    if guess is None:
      return '? ', -0.1, False, False, {'success': False}
    over = guess == self.number
    said = '<' if guess > self.number else '>'
    return said, 1.0 if over else 0.1, over, False, {'success': over}


def even(completions, **columns):
  return [float(len(c) % 2 == 0) for c in completions]


RECORDS = [{'prompt': 'guess' + ' ' * i} for i in range(20)]
TASK = Task(RECORDS, even, held_out=4, environment=Guess)


def run(out, devices=1, **settings):
  """A run by PPO, discounted by turn."""
  how = {'algorithm': 'ppo', 'discount': 'turn', 'gamma': 0.9}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda *args: jax.local_devices()[:devices])
    return train(TASK, output_dir=out, **SMALL | how | settings)


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
  return run(tmp_path_factory.mktemp('turns') / 'run')


def phase(result, name):
  return [row for row in result.metrics if row['phase'] == name]


def test_metrics_tell_how_episodes_went(ran):
  for row in phase(ran, 'train'):
    ended = [v for k, v in row.items() if k.startswith('ended/')]
    assert sum(ended) == pytest.approx(1)
    assert 1 <= row['turns'] <= 3
    assert row['sampler_logp_gap'] < 1e-5
    cut = row['completions/clipped_ratio']
    assert cut == pytest.approx(1 - row['ended/terminated'])
    names = [k for k in row if k.startswith('rewards/')]
    assert {'rewards/environment/mean', 'rewards/even/mean'} <= set(names)
  last = phase(ran, 'eval')[-1]
  assert last['eval/turns'] >= 1
  assert last['eval/mismatch/logp_gap_max'] < 1e-5
  assert 'eval/success' in last


def test_samples_hold_the_episodes(ran):
  held_out = [row for row in ran.samples if row['split'] == 'after']
  assert len(held_out) == 4
  for row in held_out:
    first, *turns = row['turns']
    assert first == {'observation': 'go '}
    paid = sum(turn['reward'] for turn in turns)
    even = row['components']['even']
    assert row['reward'] == pytest.approx(paid + even, abs=1e-5)
    assert row['ended_by'] in ('terminated', 'max_turns')
  credit = [row for row in ran.samples if row['split'] == 'train']
  for row in credit:
    assert len(row['chosen']) == len(row['tokens']) == len(row['advantage'])
    assert row['chosen'][:3] == [False] * 3
    assert row['chosen'][-1]
    assert ''.join(row['tokens'][:3]) == 'go '
    seen = [a for a, on in zip(row['advantage'], row['chosen']) if not on]
    assert not any(seen)
  page = ran.report.path.read_text()
  assert 'class="seen"' in page
  assert 'class="gain"' in page
  assert 'turn 1, reward' in page


def test_the_policy_is_evaluated_on_another_game(ran):
  class Silent(Guess):
    def reset(self, seed, example):
      super().reset(seed, example)
      return '', {}

  other = dataclasses.replace(TASK, environment=Silent, rewards=None)
  found = ran.evaluate(other)
  assert found['eval/turns'] >= 1
  assert 'rewards' not in str(found)


def test_a_resumed_run_is_bitwise_the_same(ran, tmp_path):
  shutil.copytree(ran.run_dir, tmp_path / 'run')
  again = run(tmp_path / 'run', resume='2')
  same = jax.tree.map(
    lambda a, b: np.array_equal(a, b), again.state.params, ran.state.params
  )
  assert all(jax.tree.leaves(same))
  names = 'reward', 'turns', 'entropy', 'ended/terminated'
  for a, b in zip(phase(again, 'train'), phase(ran, 'train'), strict=True):
    assert [a[n] for n in names] == [b[n] for n in names]


def test_four_devices_play_the_same_episodes(ran, tmp_path):
  found = run(tmp_path / 'run', 4, mesh='data=2,fsdp=2', max_steps=2)
  for a, b in zip(phase(found, 'train'), phase(ran, 'train')[:2], strict=True):
    assert a['turns'] == b['turns']
    for name in ('reward', 'entropy', 'grad_norm', 'advantage_std'):
      assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name


# --- what cannot be, before jax


@on_device
def of_device(rollout):
  return rollout.mask.sum(1)


@pytest.mark.parametrize(
  ('settings', 'fact'),
  [
    ({'steps_per_call': 2}, '--steps_per_call'),
    ({'ahead': True}, '--ahead'),
    ({'algorithm': 'remax'}, 'a greedy baseline'),
    ({'overlong_buffer': 2}, '--overlong_buffer'),
    ({'credit_split': 'outcome'}, '--credit_split'),
    ({'reward_model': 'x'}, '--reward_model'),
    (
      {'max_episode_length': 3, 'max_completion_length': 4},
      '--max_episode_length 3',
    ),
  ],
  ids=lambda x: x if isinstance(x, str) else '',
)
def test_what_turns_cannot_go_with_is_one_line(settings, fact):
  with pytest.raises(ValueError, match=fact) as e:
    check_turns(TASK, with_values(Settings(), settings))
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  ('changes', 'settings', 'fact'),
  [
    ({'environment': None}, {'max_turns': 4}, '--max_turns has no effect'),
    ({'environment': None}, {'discount': 'turn'}, '--discount has no effect'),
    ({'environment': Guess()}, {}, 'the environment is a Guess'),
  ],
)
def test_tasks_that_cannot_be_are_one_line(changes, settings, fact):
  task = dataclasses.replace(TASK, **changes)
  with pytest.raises(ValueError, match=fact) as e:
    check_turns(task, with_values(Settings(), settings))
  assert '\n' not in str(e.value)


def test_a_reward_on_the_device_is_refused(tmp_path):
  task = dataclasses.replace(TASK, rewards=of_device)
  with pytest.raises(ValueError, match='@on_device reward of_device'):
    train(task, output_dir=tmp_path / 'run', **SMALL)
