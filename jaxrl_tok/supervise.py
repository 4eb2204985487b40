"""Supervisor: starts a run again when its process was killed.

  python -m jaxrl_tok.supervise -- python -m experiments.arithmetic \\
    --output_dir runs/sums

A run that ends with one of STATUSES goes on from its newest good checkpoint
(--resume auto), after a pause that doubles from try to try. Every other status
is the supervisor's own: 0 done, 1 and 2 a fault that another try would repeat.
A signal to the supervisor is passed on to the run, once, which saves and ends.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

# exit statuses that another try may mend: {status: what happened}
STATUSES = {
  75: 'stopped, its state is saved',
  134: 'aborted',
  137: 'killed, as where memory runs out',
  143: 'terminated',
}
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class Plan(NamedTuple):
  """How often, and after which pauses, a run is started again."""

  restarts: int = 10  # in a row, of runs that were short
  wait: float = 5.0  # seconds before the first; doubled for each more
  longest_wait: float = 300.0
  lasting: float = 600.0  # seconds after which a run does not count as short


class Child:
  """Process of the run; signals that come to this process go on to it."""

  def __init__(self):
    self.asked = False  # to end
    self._process = None

  def note(self, number: int, frame) -> None:
    self.asked = True
    if self._process is not None and self._process.poll() is None:
      self._process.send_signal(number)

  def run(self, command: Sequence[str]) -> int:
    """Runs a command to its end: its exit status, as a shell has it."""
    # of a session of its own: a terminal's Ctrl-C would come to it twice
    self._process = subprocess.Popen(command, start_new_session=True)
    if self.asked:
      self._process.terminate()
    status = self._process.wait()
    return 128 - status if status < 0 else status


def resumed(command: Sequence[str]) -> list[str]:
  """The command of a restart: with --resume auto, in place of another one."""
  words, left = [], list(command)
  while left:
    word = left.pop(0)
    if word == '--resume':
      left = left[1:]
    elif not word.startswith('--resume='):
      words.append(word)
  return [*words, '--resume=auto']


def supervise(
  command: Sequence[str],
  plan: Plan,
  run: Callable[[Sequence[str]], int],
  asked: Callable[[], bool] = lambda: False,
  say: Callable[[str], None] = print,
  sleep: Callable[[float], None] = time.sleep,
  clock: Callable[[], float] = time.monotonic,
) -> int:
  """Runs a command until it ends with a status that no restart mends, or
  restarts are used up; returns its last status.

  Args:
    run: command -> exit status.
    asked: tells whether this process was asked to end: no restart then.
  """
  short = 0
  while True:
    begun = clock()
    status = run(command)
    lasted = clock() - begun
    happened = f'the run ended with {status} after {lasted:.0f} s'
    if status not in STATUSES:
      say(f'{happened}: {"done" if status == 0 else "not restarted"}')
      return status
    happened += f' ({STATUSES[status]})'
    if asked():
      say(f'{happened}: not restarted, as a signal came')
      return status
    short = 0 if lasted >= plan.lasting else short
    if short == plan.restarts:
      say(f'{happened}: given up after {short} restarts')
      return status
    wait = min(plan.wait * 2**short, plan.longest_wait)
    short += 1
    say(f'{happened}: restart {short} of {plan.restarts} in {wait:g} s')
    sleep(wait)
    if asked():
      say('no restart, as a signal came')
      return status
    command = resumed(command)


def log(text: str) -> None:
  """Prints a line with the time, on standard error."""
  now = time.strftime('%Y-%m-%d %H:%M:%S')
  print(f'{now} supervise: {text}', file=sys.stderr, flush=True)


def fail(text: str) -> None:
  """Prints one line on standard error, and exits with status 2."""
  print(f'error: {text}', file=sys.stderr)
  raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> None:
  """Reads the command line and supervises; exits with the run's last status."""
  argv = sys.argv[1:] if argv is None else list(argv)
  at = argv.index('--') if '--' in argv else len(argv)
  parser = argparse.ArgumentParser(
    'python -m jaxrl_tok.supervise',
    usage='%(prog)s [FLAGS] -- python -m experiments.NAME --output_dir DIR ...',
    description=__doc__.partition('\n')[0],
  )
  helps = {
    'restarts': 'restarts in a row at most',
    'wait': 'seconds before the first restart; doubled for each more',
    'longest_wait': 'seconds before a restart at most',
    'lasting': 'seconds of a run after which restarts are counted anew',
  }
  for name, value in Plan()._asdict().items():
    parser.add_argument(
      f'--{name}',
      type=type(value),
      default=value,
      help=f'{helps[name]} (default {value:g})',
    )
  plan, command = Plan(**vars(parser.parse_args(argv[:at]))), argv[at + 1 :]
  if not command:
    fail('no command; write it after --')
  if not any(w.split('=')[0] == '--output_dir' for w in command):
    fail(
      'the run has no --output_dir, and a restart would not find its '
      'checkpoints; give it one'
    )
  child = Child()
  for number in SIGNALS:
    if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, child.note)

  def sleep(seconds: float) -> None:
    end = time.monotonic() + seconds
    while not child.asked and time.monotonic() < end:
      time.sleep(min(0.2, seconds))

  try:
    status = supervise(
      command, plan, child.run, lambda: child.asked, log, sleep
    )
  except OSError as e:
    fail(f'{command[0]} does not start: {e.strerror}')
  raise SystemExit(status)


if __name__ == '__main__':
  main()
