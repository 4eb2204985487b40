"""The generic experiment: any data and rewards of a user's own file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_door import TINY, words

from experiments import text

pytestmark = pytest.mark.usefixtures('one_device', 'few_programs')

REWARDS = """
def rhyme(prompts, completions, ending, **columns):
  return [float(c.endswith(e)) for c, e in zip(completions, ending)]

def short(completions):
  return [1 / (1 + len(c)) for c in completions]

number = 3
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
  """A directory of data and rewards, the current one."""
  monkeypatch.chdir(tmp_path)
  rows = [{'question': f'{i:03d}', 'ending': 'a'} for i in range(40)]
  (tmp_path / 'prompts.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (tmp_path / 'my_rewards.py').write_text(REWARDS)
  return tmp_path


def flags(*more, **changes) -> list[str]:
  given = TINY | {'held_out': 8, 'output_dir': 'run'} | changes
  return [
    '--data=prompts.jsonl',
    '--rename=question=prompt',
    *words(given),
    *more,
  ]


def refusal(capsys, *argv) -> str:
  with pytest.raises(SystemExit) as stopped:
    text.run(list(argv))
  assert stopped.value.code == 2
  assert not Path('run').exists()
  return capsys.readouterr().err


def test_several_rewards_are_weighed(files, capsys):
  rewards = '--reward my_rewards.py:rhyme --reward my_rewards.py:short=0.2'
  result = text.run(flags(*rewards.split()))
  assert 'my_rewards.py was run for its rewards' in capsys.readouterr().out
  config = yaml.safe_load(Path('run/config.yaml').read_text())
  assert config['rewards'] == {'rhyme': 1.0, 'short': 0.2}
  assert config['data'] == 'prompts.jsonl: 32 records; 8 held out'
  steps = [row for row in result.metrics if row['phase'] == 'train']
  assert len(steps) == 2
  for row in steps:
    both = row['rewards/rhyme/mean'] + 0.2 * row['rewards/short/mean']
    assert row['reward'] == pytest.approx(both, rel=1e-5)
  command = Path('run/command.txt').read_text()
  assert command.startswith('python -m experiments.text --data=prompts.jsonl')
  assert '--reward my_rewards.py:short=0.2' in command


def test_data_of_ones_own_may_be_held_out(files, capsys):
  lines = [json.dumps({'question': f'{i}!', 'ending': ''}) for i in range(8)]
  (files / 'later.jsonl').write_text('\n'.join(lines))
  argv = flags('--reward=my_rewards.py:rhyme', '--held_out_data=later.jsonl')
  text.run([*argv, '--print_config'])
  assert '40 records; 8 held out' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('reward', 'fact'),
  [
    ((), 'there is no reward; pass --reward FILE:FUNCTION'),
    (('my_rewards.py',), 'names no function; pass FILE:NAME'),
    (('lost.py:rhyme',), 'lost.py is no file'),
    (('my_rewards.py:ryme',), 'has no ryme; did you mean rhyme?'),
    (('my_rewards.py:number',), 'is 3, which is no function'),
    (('my_rewards.py:rhyme=much',), 'the weight of reward rhyme is'),
  ],
)
def test_a_reward_that_cannot_be_is_one_line(files, capsys, reward, fact):
  argv = flags(*(f'--reward={word}' for word in reward))
  said = refusal(capsys, *argv)
  assert said.startswith('error: ')
  assert fact in said
  assert said.count('\n') == 1


def test_data_is_needed(files, capsys):
  said = refusal(capsys, '--reward=my_rewards.py:rhyme')
  assert '--data' in said
  assert said.count('\n') == 1
  said = refusal(capsys, *flags('--reward=my_rewards.py:rhyme', '--data=x'))
  assert said == (
    'error: x: no such file; a data set of the hub is '
    'hub:OWNER/NAME@REVISION:SPLIT or hub:OWNER/NAME/CONFIG@REVISION:SPLIT\n'
  )


def test_a_file_that_does_not_import_shows_its_own_traceback(files):
  """Exit comes before jax is imported."""
  (files / 'broken.py').write_text('def f():\n  return undefined_name\n\nf()\n')
  argv = flags('--reward=broken.py:rhyme')
  code = (
    f'import sys; from experiments import text\n'
    f'try: text.run({argv!r})\n'
    f'finally: print("jax" in sys.modules)'
  )
  root = Path(text.__file__).parent.parent
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      f'import sys; sys.path.insert(0, {str(root)!r})\n{code}',
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert done.stdout == 'False\n'
  lines = done.stderr.splitlines()
  assert lines[0] == 'Traceback (most recent call last):'
  assert 'return undefined_name' in done.stderr
  assert 'jaxrl_tok' not in done.stderr
  assert lines[-1] == (
    "error: broken.py does not import (NameError: name 'undefined_name' is not "
    'defined); mend it'
  )


def test_limits_canaries_and_a_model_alone(files, capsys):
  found = text.text(
    'prompts.jsonl',
    ('my_rewards.py:rhyme',),
    limit=('my_rewards.py:short',),
    canaries='canaries.jsonl',
  )
  assert list(found.constraints) == ['short']
  (canaries,) = found.evaluations
  assert (canaries.data, canaries.rewards) == ('canaries.jsonl', ())
  assert canaries.keep_samples
  alone = text.text('prompts.jsonl', reward_model='directory')
  assert not alone.rewards
  assert not alone.constraints
  with pytest.raises(ValueError, match='or a --reward_model'):
    text.text('prompts.jsonl')
