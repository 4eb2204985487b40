"""Log of a run: JSONL and TensorBoard files, and the console.

metrics.jsonl has a row for each step and phase, {"step", "time", "phase",
name: number}; samples.jsonl has a row for each recorded completion. Names of an
evaluation are eval/reward, or eval/NAME/reward where there are several. Numbers
that are not finite are null. The console shows a live line with an ETA on a
terminal, and plain lines elsewhere. Only process 0 writes.
"""

import contextlib
import math
import time
from pathlib import Path

import rich.console
import rich.progress
import rich.text

from jaxrl_tok.report import disk, mirror
from jaxrl_tok.report.console import Stream
from jaxrl_tok.report.files import (
  atomic_write,
  last_of,
  number,
  numbered_lines,
  parse_row,
  redact,
  to_line,
)

PLAIN_EVERY = 5.0  # seconds between plain progress lines


def duration(seconds: float) -> str:
  """Clock time: 75.2 -> '1:15'; 3723 -> '1:02:03'."""
  seconds = round(seconds)
  hours, minutes = seconds // 3600, seconds // 60 % 60
  head = f'{hours}:{minutes:02d}' if hours else f'{minutes}'
  return f'{head}:{seconds % 60:02d}'


def is_kept(row: dict, step: int, evaluated: int) -> bool:
  """Whether a resume from `step` keeps a row. The steps of a warm start are
  numbered apart; the rows 'after' a run are written again, and those of
  evaluations after the step `evaluated`."""
  if row.get('phase') == 'warm_start':
    return True
  if row.get('phase') == 'eval':
    step = min(step, evaluated)
  return number(row['step']) <= step and row.get('split') != 'after'


def trim_jsonl(path: Path, step: int, evaluated: int | None = None) -> int:
  """Drops the rows after a step, which a resumed run writes again.

  Returns the number of lines that were no row, which are dropped as well. The
  unfinished last line of a killed run does not count.
  """
  if not path.is_file():
    return 0
  evaluated = step if evaluated is None else evaluated
  num_skipped = 0

  def kept_lines():
    nonlocal num_skipped
    for _, line in numbered_lines(path):
      row = parse_row(line)
      if row is None:
        num_skipped += line.endswith('\n')
      elif is_kept(row, step, evaluated):
        yield line if line.endswith('\n') else line + '\n'

  atomic_write(path, kept_lines())
  return num_skipped


class Logger:
  """Writes the files of a run and talks on the console.

  Args:
    run_dir: directory of the run, made if missing. None: console only.
    report_to: 'tensorboard' or 'none'.
    resume_step: rows after it are dropped from the files. None: a new run.
    is_main: False on every process but 0, which neither writes nor prints.
    evaluated: step whose evaluations were the last to be complete; None:
      resume_step.

  Attributes:
    earlier: seconds that the run had taken when it was stopped, by the rows
      that stay: the column `time` goes on from there.
  """

  def __init__(
    self,
    run_dir: str | Path | None = None,
    report_to: str = 'none',
    resume_step: int | None = None,
    is_main: bool = True,
    evaluated: int | None = None,
  ):
    self._stream = Stream()
    self.console = rich.console.Console(
      file=self._stream, quiet=not is_main, soft_wrap=True, emoji=False
    )
    self._started = time.monotonic()
    self.earlier = 0.0
    self._said = set()
    self._files = {}
    self._board = None
    self._run_dir = None
    if run_dir is None or not is_main:
      return
    self._run_dir = run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in ('metrics', 'samples'):
      path = run_dir / f'{name}.jsonl'
      if resume_step is not None:
        num_skipped = trim_jsonl(path, resume_step, evaluated)
        if num_skipped:
          self.warn(f'{path}: {num_skipped} lines that are no rows are dropped')
        self.earlier = max(self.earlier, last_of(path, 'time') or 0.0)
      # a lone surrogate becomes \uXXXX, which is its JSON
      self._files[name] = open(  # noqa: SIM115
        path, 'a', 1, encoding='utf-8', errors='backslashreplace'
      )
    if report_to == 'tensorboard':
      from tensorboardX import SummaryWriter

      board, after = run_dir / 'tb', (resume_step or 0) + 1
      purged = after if resume_step is not None else 0
      self._board = SummaryWriter(
        str(board), purge_step=purged if board.is_dir() else None
      )

  def metrics(self, phase: str, step: int, values: dict) -> None:
    """Writes one row; phase is 'warm_start', 'train' or 'eval'."""
    spent = round(self.earlier + time.monotonic() - self._started, 3)
    values = {
      name: None if value is None else float(value)
      for name, value in values.items()
    }
    row = {'step': step, 'time': spent, 'phase': phase, **values}
    self._write('metrics', row)
    if self._board is not None:
      prefix = 'warm_start/' if phase == 'warm_start' else ''
      for name, value in values.items():
        if value is not None and math.isfinite(value):
          self._board.add_scalar(prefix + name, value, step)
    self._push(mirror.EVERY)

  def _push(self, every: float = 0.0) -> None:
    """Copies the files to the run's bucket, if it has one; what fails is tried
    again before the next checkpoint, where it ends the run."""
    try:
      if self._run_dir is not None:
        mirror.push(self._run_dir, every)
    except OSError as e:
      self.warn(f'{e}; the files are in {self._run_dir}')

  def samples(self, rows: list[dict]) -> None:
    """Writes recorded completions, each with its step and split."""
    for row in rows:
      self._write('samples', row)

  def _write(self, name: str, row: dict) -> None:
    if name not in self._files:
      return
    try:
      with disk.writing(f'{name}.jsonl', self._run_dir):
        self._files[name].write(to_line(row))
    except OSError:
      file = self._files.pop(name)  # its buffer would fail again
      with contextlib.suppress(OSError):
        file.close()
      raise

  @property
  def lost(self) -> str | None:
    """Why the console cannot be written any more; None while it can."""
    return self._stream.lost

  def message(self, text: str, style: str | None = None) -> None:
    """Prints a line, without secrets. Its text is data, never markup."""
    self.console.print(
      redact(str(text)), style=style, markup=False, highlight=False
    )

  def warn(self, text: str) -> None:
    """Prints a warning."""
    self.message(f'warning: {text}', style='yellow')

  def warn_once(self, kind: str, text: str) -> None:
    """Prints the first warning of a kind."""
    if kind not in self._said:
      self._said.add(kind)
      self.warn(text)

  @contextlib.contextmanager
  def doing(self, task: str):
    """Prints a task's name when it starts and its seconds when it ends."""
    begun = time.monotonic()
    if self.console.is_terminal:
      with self.console.status(rich.text.Text(f'{task} ...')):
        yield
    else:
      self.message(f'{task} ...')
      yield
    self.message(f'{task}: {time.monotonic() - begun:.1f} s')

  @contextlib.contextmanager
  def bar(self, name: str, total: int, start: int = 0):
    """Yields show(done, text), which draws progress with an ETA: a live line
    on a terminal, a plain one every few seconds elsewhere."""
    begun = time.monotonic()

    def left(done):
      spent = time.monotonic() - begun
      return spent / max(done - start, 1) * (total - done)

    if not self.console.is_terminal:
      shown = -math.inf

      def show(done, text):
        nonlocal shown
        now = time.monotonic()
        if now - shown >= PLAIN_EVERY or done == total:
          shown = now
          self.message(
            f'{name} {done}/{total}  {text}  ETA {duration(left(done))}'
          )

      yield show
      return
    columns = (
      rich.progress.TextColumn('{task.description}', 'bold', markup=False),
      rich.progress.BarColumn(bar_width=20),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TextColumn('{task.fields[text]}', markup=False),
      rich.progress.TextColumn('ETA {task.fields[left]}'),
    )
    with rich.progress.Progress(*columns, console=self.console) as progress:
      task = progress.add_task(
        name, total=total, completed=start, text='', left='...'
      )

      def show(done, text):
        progress.update(
          task, completed=done, text=text, left=duration(left(done))
        )

      yield show

  def close(self) -> None:
    """Closes the files, and copies them to a bucket; the console stays."""
    for file in self._files.values():
      file.close()
    if self._board is not None:
      self._board.close()
    self._push()
