"""The comparison reads runs as they are, and makes only those that lack."""

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from experiments.studies import compare


def leave_run(out, row, seed, accuracy: dict) -> None:
  """Leaves a finished run whose held-out accuracy is accuracy[step]."""
  where = compare.directory(compare.Flags(output_dir=str(out)), row, seed)
  (where / 'export').mkdir(parents=True)
  rows = [
    {'phase': 'warm_start', 'step': 5, 'eval/reward': 0.9},
    {'phase': 'eval', 'step': 0, 'eval/reward': accuracy[0]},
  ]
  for step in range(1, max(accuracy) + 1):
    totals = {'sampled_tokens': 1000 * step, 'reward_calls': 100 * step}
    rows.append({'phase': 'train', 'step': step, **totals})
    if step in accuracy:
      rows.append({'phase': 'eval', 'step': step, 'eval/kl': 0.1})
      rows.append(
        {'phase': 'eval', 'step': step, 'eval/reward': accuracy[step]}
      )
  lines = '\n'.join(map(json.dumps, rows))
  (where / 'metrics.jsonl').write_text(lines + '\n{"phase": "tra')


def test_the_table_is_of_the_runs(tmp_path, monkeypatch):
  """Steps and tokens are those of the first evaluation at 80 % or more."""
  leave_run(tmp_path, 'grpo', 0, {0: 0.4, 10: 0.7, 20: 0.8, 30: 0.96})
  leave_run(tmp_path, 'grpo', 1, {0: 0.4, 10: 0.9, 20: 0.98})
  leave_run(tmp_path, 'reinforce, token rewards', 0, {0: 0.4, 10: 0.5})
  leave_run(tmp_path, 'reinforce, token rewards', 1, {0: 0.4, 10: 0.8})
  monkeypatch.setattr(compare.subprocess, 'run', None)  # nothing is missing
  rows = 'grpo', 'reinforce, token rewards'
  compare.main(
    ['--rows', *rows, '--seeds', '0', '1', f'--output_dir={tmp_path}']
  )
  _, _, *lines = (tmp_path / 'compare.md').read_text().splitlines()
  assert lines == [
    '| grpo | 97.0 ± 1.4 % | 80.0 ± 14.1 % | 15 ± 7 | 15 ± 7 | 1.5 ± 0.7 |',
    '| reinforce, token rewards | 65.0 ± 21.2 % | 65.0 ± 21.2 % '
    '| 10 (1 never) | 10 (1 never) | 1.0 (1 never) |',
  ]
  found = json.loads((tmp_path / 'compare.json').read_text())
  assert [run['curve'][-1][0] for run in found['grpo']] == [30, 20]
  page = ElementTree.parse(tmp_path / 'compare.svg').getroot()
  dots = [x for x in page.iter() if x.tag.endswith('circle')]
  assert len(dots) == 3
  assert '1 of 2 never' in ' '.join(page.itertext())


@pytest.mark.parametrize(
  ('given', 'fact'),
  [
    ('--sedes 0', 'did you mean --seeds?'),
    ('--rows grop', "'grop' is none of"),
    ('--jobs 0', 'must be at least 1'),
    ('--seeds x', '--seeds'),
    ('--seeds 1 1', 'must be different'),
    ('--rows', '--rows'),
    ('--rows reuse ahead', 'must be different'),
  ],
)
def test_flags_that_cannot_be_are_one_line(tmp_path, capsys, given, fact):
  with pytest.raises(SystemExit) as stopped:
    compare.main([*given.split(), f'--output_dir={tmp_path / "out"}'])
  assert stopped.value.code == 2
  error = capsys.readouterr().err.strip()
  assert fact in error
  assert '\n' not in error
  assert not (tmp_path / 'out').exists()


def test_a_run_that_fails_is_one_line(tmp_path, capsys):
  """The line has its own error, and names its log."""
  given = '--rows grpo --seeds 0 --more --learning_rate=-1'
  with pytest.raises(SystemExit):
    compare.main([f'--output_dir={tmp_path}', *given.split()])
  error = capsys.readouterr().err.strip()
  assert '--learning_rate -1.0 must be above 0' in error
  assert str(tmp_path / 'grpo-0.log') in error
  assert '\n' not in error


def test_a_run_that_lacks_is_made_by_its_command(tmp_path, monkeypatch):
  """Flags of the row, then those of --more; what a killed run left goes."""
  where = tmp_path / 'reinforce-token_rewards-3'
  where.mkdir()
  (where / 'rest').touch()
  commands = []

  def run(command, **how):
    commands.append(command)
    assert not where.exists()
    leave_run(tmp_path, 'reinforce, token rewards', 3, {0: 0.4, 10: 0.96})
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(compare.subprocess, 'run', run)
  given = ['--seeds', '3', f'--output_dir={tmp_path}', '--more', '--top_k=5']
  row = 'reinforce, token rewards'
  found = compare.main(['--rows', row, *given])
  curve = [(0, 0, 0.4), (10, 10_000, 0.96)]
  assert found == {row: [compare.Outcome(10, 10_000, 1000, curve)]}
  ((program, *command),) = commands
  assert program == sys.executable
  assert command == [
    *('-m', 'experiments.arithmetic', '--algorithm', 'reinforce'),
    *('--reward', 'digits', '--seed=3', f'--output_dir={where}'),
    *('--eval_every=10', '--save_every=0', '--no_log_kl'),
    *('--report_to=none', '--top_k=5'),
  ]
