"""What a run says: JSONL and TensorBoard files, and the console.

metrics.jsonl has a row for each step and phase, {"step", "time", "phase",
...}; samples.jsonl a row for each recorded completion. The console shows a
live line with an ETA on a terminal and plain lines elsewhere. Only process 0
writes or speaks.
"""

import contextlib
import json
import math
import os
import time
from pathlib import Path

import rich.console
import rich.progress
import rich.text

PLAIN_EVERY = 5.0  # seconds between plain progress lines
REPORTS = ('tensorboard', 'none')


def duration(seconds: float) -> str:
  """75.2 -> '1:15'; 3723 -> '1:02:03'."""
  seconds = round(seconds)
  hours, minutes = seconds // 3600, seconds // 60 % 60
  head = f'{hours}:{minutes:02d}' if hours else f'{minutes}'
  return f'{head}:{seconds % 60:02d}'


def _stays(row: dict, step: int) -> bool:
  """Whether a resume from `step` keeps a row. A warm start counts steps of
  its own; what was said 'after' the run is said again."""
  if row.get('phase') == 'warm_start':
    return True
  return row['step'] <= step and row.get('split') != 'after'


def trim_jsonl(path: Path, step: int) -> None:
  """Drops the rows after a step, and an unfinished last line: a resumed run
  writes them again."""
  if not path.exists():
    return
  kept = []
  # split('\n'): splitlines would also cut at U+2028 and U+0085 in a sample
  lines = path.read_text(encoding='utf-8', errors='replace').split('\n')
  for line in lines:
    with contextlib.suppress(json.JSONDecodeError):
      if _stays(json.loads(line), step):
        kept.append(line + '\n')
  part = path.with_suffix('.partial')
  part.write_text(''.join(kept), encoding='utf-8')
  os.replace(part, path)


class Logger:
  """Files under run_dir (None: console only) and the console.

  Args:
    run_dir: the run's directory; made if missing.
    report_to: 'tensorboard' or 'none'.
    resume_step: rows after it are dropped from the files; None for a new run.
    speak: False on every process but 0: nothing is written or said.
  """

  def __init__(
    self,
    run_dir: str | Path | None = None,
    report_to: str = 'none',
    resume_step: int | None = None,
    is_main: bool = True,
  ):
    self.console = rich.console.Console(
      quiet=not is_main, soft_wrap=True, emoji=False
    )
    self._started = time.monotonic()
    self._files = {}
    self._board = None
    if run_dir is None or not is_main:
      return
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in ('metrics', 'samples'):
      path = run_dir / f'{name}.jsonl'
      if resume_step is not None:
        trim_jsonl(path, resume_step)
      self._files[name] = open(  # noqa: SIM115
        path, 'a', buffering=1, encoding='utf-8'
      )
    if report_to == 'tensorboard':
      from tensorboardX import SummaryWriter

      self._board = SummaryWriter(str(run_dir / 'tb'))

  def metrics(self, phase: str, step: int, values: dict) -> None:
    """One row; phase is 'warm_start', 'train' or 'eval'."""
    row = {
      'step': step,
      'time': round(time.monotonic() - self._started, 3),
      'phase': phase,
    }
    values = {k: float(v) for k, v in values.items()}
    self._write('metrics', {**row, **values})
    if self._board is not None:
      prefix = 'warm_start/' if phase == 'warm_start' else ''
      for name, value in values.items():
        self._board.add_scalar(prefix + name, value, step)

  def samples(self, rows: list[dict]) -> None:
    """Recorded completions, each with its step and split."""
    for row in rows:
      self._write('samples', row)

  def _write(self, name: str, row: dict) -> None:
    if name in self._files:
      self._files[name].write(json.dumps(row, ensure_ascii=False) + '\n')

  def say(self, text: str, style: str | None = None) -> None:
    """A line; text is data, never markup."""
    self.console.print(text, style=style, markup=False, highlight=False)

  def warn(self, text: str) -> None:
    self.say(f'warning: {text}', style='yellow')

  @contextlib.contextmanager
  def doing(self, what: str):
    """Says what is going on while it does, and how long it took."""
    begun = time.monotonic()
    if self.console.is_terminal:
      with self.console.status(rich.text.Text(f'{what} ...')):
        yield
    else:
      self.say(f'{what} ...')
      yield
    self.say(f'{what}: {time.monotonic() - begun:.1f} s')

  @contextlib.contextmanager
  def bar(self, name: str, total: int, start: int = 0):
    """Yields show(done, text): a live line, or plain ones, with an ETA."""
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
          self.say(f'{name} {done}/{total}  {text}  ETA {duration(left(done))}')

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
    for file in self._files.values():
      file.close()
    if self._board is not None:
      self._board.close()
