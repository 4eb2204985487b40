"""The supervisor starts a run again where another try may help."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jaxrl_tok import supervise
from jaxrl_tok.run.api import TRY_AGAIN

COMMAND = ['python', '-m', 'experiments.x', '--output_dir=a']


def supervised(statuses, lasting=1.0, plan=supervise.Plan(), asked_after=None):  # noqa: B008
  """(last status, commands, pauses, lines) of runs that end with statuses."""
  commands, pauses, lines, now = [], [], [], [0.0]
  left = iter(statuses)

  def run(command):
    commands.append(command)
    now[0] += lasting
    return next(left)

  status = supervise.supervise(
    COMMAND,
    plan,
    run,
    lambda: len(commands) == asked_after,
    lines.append,
    pauses.append,
    lambda: now[0],
  )
  return status, commands, pauses, lines


@pytest.mark.parametrize('status', [75, 134, 137, 143])
def test_a_run_that_was_killed_goes_on(status):
  last, commands, pauses, lines = supervised([status, status, 0])
  assert last == 0
  assert commands[0] == COMMAND
  assert commands[1] == commands[2] == [*COMMAND, '--resume=auto']
  assert pauses == [5, 10]
  assert len(lines) == 3
  assert lines[0].startswith(f'the run ended with {status} after 1 s (')
  assert lines[0].endswith('restart 1 of 10 in 5 s')
  assert lines[2] == 'the run ended with 0 after 1 s: done'


@pytest.mark.parametrize('status', [0, 1, 2, 127, 130])
def test_others_end_it(status):
  assert supervised([status])[0] == status


def test_it_knows_the_status_of_a_run_that_was_saved():
  assert TRY_AGAIN in supervise.STATUSES


def test_short_runs_are_given_up_and_long_ones_counted_anew():
  plan = supervise.Plan(restarts=3, wait=1, longest_wait=3)
  last, commands, pauses, lines = supervised([137] * 9, plan=plan)
  assert (last, len(commands), pauses) == (137, 4, [1, 2, 3])
  assert lines[-1].endswith('given up after 3 restarts')
  _, commands, pauses, _ = supervised([137] * 8 + [0], 700, plan)
  assert (len(commands), pauses) == (9, [1] * 8)


def test_a_signal_to_the_supervisor_ends_it():
  last, commands, _, lines = supervised([143, 75, 0], asked_after=2)
  assert (last, len(commands)) == (75, 2)
  assert lines[-1].endswith('not restarted, as a signal came')


@pytest.mark.parametrize(
  'words', [[], ['--resume', 'never'], ['--resume=40'], ['--resume=auto']]
)
def test_a_restart_resumes_the_newest(words):
  found = supervise.resumed(['x', *words, '--seed', '1'])
  assert found == ['x', '--seed', '1', '--resume=auto']


@pytest.mark.parametrize(
  ('argv', 'fact'),
  [
    (['--restarts', '2'], 'no command; write it after --'),
    (['--', 'python', '-m', 'x'], 'the run has no --output_dir, and'),
    (['--', '/no/such', '--output_dir=a'], '/no/such does not start: No such'),
  ],
)
def test_a_command_that_cannot_be_is_one_line(argv, fact, capsys):
  before = [signal.getsignal(s) for s in supervise.SIGNALS]
  with pytest.raises(SystemExit) as stopped:
    supervise.main(argv)
  for number, old in zip(supervise.SIGNALS, before):
    signal.signal(number, old)
  said = capsys.readouterr().err
  assert stopped.value.code == 2
  assert said.startswith(f'error: {fact}')
  assert said.count('\n') == 1


RUN = """
import signal, sys, time
print(sys.argv[1:], flush=True)
if '--resume=auto' not in sys.argv:
  signal.raise_signal(signal.SIGKILL)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print('ready', flush=True)
time.sleep(20)
"""


def test_processes():
  """Killed by -9 it is started again; a SIGTERM to the supervisor goes on to
  the run, and both end."""
  flags = '--wait', '0.01', '--', sys.executable, '-c', RUN, '--output_dir', 'a'
  command = [sys.executable, '-m', 'jaxrl_tok.supervise', *flags]
  with subprocess.Popen(
    command,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
  ) as process:
    lines = [process.stdout.readline().strip() for _ in range(3)]
    time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=30)
  assert lines[0] == "['--output_dir', 'a']"
  assert lines[1:] == ["['--output_dir', 'a', '--resume=auto']", 'ready']
  assert process.returncode == 75
  found = said.splitlines()
  assert 'ended with 137 after 0 s (killed, ' in found[0]
  assert found[1].endswith('not restarted, as a signal came')
  assert len(found) == 2
