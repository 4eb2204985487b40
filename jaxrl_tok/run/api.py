"""API of a user: `train` from Python, `main` behind flags.

Nothing here imports jax before the command line has been read and checked.
"""

import contextlib
import dataclasses
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxrl_tok import Interrupted
from jaxrl_tok.report import disk
from jaxrl_tok.report.files import redact
from jaxrl_tok.run import flags
from jaxrl_tok.run.settings import (
  OptimizerSettings,
  Settings,
  SizeSettings,
  check_names,
  flatten,
  with_values,
)
from jaxrl_tok.run.task import Caller, Task
from jaxrl_tok.run.turns import check_turns
from jaxrl_tok.watch import TRY_AGAIN, Diverged

if TYPE_CHECKING:
  from jaxrl_tok.run.result import Result

# arguments that may be values of one's own: {name: as build.Own calls it}
VALUES = {
  'policy': 'policy',
  'optimizer': 'optimizer',
  'algorithm': 'algorithm',
  'credit': 'credit',
  'baseline': 'baseline',
  'loss': 'loss',
  'aggregation': 'aggregate',
}
# settings that a value replaces, beside the one of its name
REPLACED = {
  'policy': [
    *(f.name for f in dataclasses.fields(SizeSettings)),
    *('dtype', 'remat', 'attention', 'scan_layers'),
  ],
  'optimizer': [
    *(f.name for f in dataclasses.fields(OptimizerSettings)),
    'critic_learning_rate',
  ],
}


class Arguments(NamedTuple):
  """Arguments of `train` and `main`, sorted."""

  words: dict  # settings {name: value}
  own: dict  # values of the user's own, as build.Own takes them
  evaluations: tuple  # beside those of the task


def plain(value):
  """Converts a setting's value to a flag's: paths and objects to text, lists
  to tuples."""
  value = os.fspath(value) if isinstance(value, os.PathLike) else value
  value = json.dumps(value) if isinstance(value, dict) else value
  return tuple(value) if isinstance(value, list) else value


def sort_arguments(given: dict[str, Any]) -> Arguments:
  """Sorts arguments into settings (a word or None) and values of the user's
  own. Raises ValueError for a name that is neither."""
  given = dict(given)
  evaluations = given.pop('evaluations', None) or ()
  if not isinstance(evaluations, list | tuple):
    evaluations = (evaluations,)
  own = {
    VALUES[name]: value
    for name, value in given.items()
    if name in VALUES and value is not None and not isinstance(value, str)
  }
  words = {
    name: plain(value)
    for name, value in given.items()
    if VALUES.get(name) not in own and value is not None
  }
  if 'policy' in words:
    raise ValueError(
      f'policy {words["policy"]!r} is a word; give a value, a Policy'
    )
  check_names(words, {*flatten(Settings()), *VALUES})
  return Arguments(words, own, tuple(evaluations))


def check_replaced(own: dict, typed) -> None:
  """Refuses settings, by name, that a value of the user's own replaces."""
  for name, key in VALUES.items():
    ignored = {name, *REPLACED.get(name, ())} & set(typed)
    if key in own and ignored:
      raise ValueError(
        f'--{min(ignored)} has no effect: {name} is a value of your own; leave '
        'it out'
      )


# --- the calling program -----------------------------------------------------


def module_of(function: Callable | None) -> ModuleType:
  """Module of the experiment: the program itself, or that of the task's
  function where another program calls it with an argv."""
  name = '__main__' if function is None else function.__module__
  return sys.modules.get(name, sys.modules['__main__'])


def command_of(module: ModuleType) -> str:
  """Command that runs a module: python -m NAME, or python FILE."""
  spec = getattr(module, '__spec__', None)
  if spec is not None and spec.name != '__main__':
    return f'python -m {spec.name.removesuffix(".__main__")}'
  file = getattr(module, '__file__', None)
  if file and Path(sys.argv[0]).resolve() == Path(file).resolve():
    file = sys.argv[0]  # as it was typed
  return f'python {shlex.quote(file)}' if file else 'python'


def name_of(module: ModuleType) -> str:
  """Name of the experiment, for the run directory."""
  spec = getattr(module, '__spec__', None)
  if spec is not None and spec.name != '__main__':
    return spec.name.removesuffix('.__main__').rpartition('.')[2]
  file = getattr(module, '__file__', None)
  return Path(file).stem if file and Path(file).is_file() else 'run'


def task_of(module: ModuleType, function: Callable | None) -> str | None:
  """Name of the function that makes the task, MODULE:NAME or FILE:NAME; None
  without one, or where it is no name of the module."""
  name = getattr(function, '__name__', None)
  if name is None or getattr(module, name, None) is not function:
    return None
  spec, file = (
    getattr(module, '__spec__', None),
    getattr(module, '__file__', ''),
  )
  if spec is not None and spec.name != '__main__':
    return f'{spec.name}:{name}'
  return f'{Path(file).resolve()}:{name}' if file else None


# --- train, main -------------------------------------------------------------


def start(
  task: Task, settings: Settings, given: Arguments, caller, task_flags: dict
):
  """Prepares the run and runs it; imports jax."""
  if not isinstance(task, Task):
    raise ValueError(
      f'a run needs a Task, and this is a {type(task).__name__}; return '
      'Task(data, reward)'
    )
  check_turns(task, settings)
  from jaxrl_tok.run import launch
  from jaxrl_tok.run.build import Own
  from jaxrl_tok.run.prepare import prepare
  from jaxrl_tok.run.rollback import with_rollback

  evaluations = (*task.evaluations, *given.evaluations)
  task, own = dataclasses.replace(task, evaluations=evaluations), given.own

  def run(settings: Settings):
    made = prepare(
      task, with_rollback(settings), Own(**own), caller, task_flags
    )
    return launch.run(made)

  try:
    return run(settings)
  except Diverged as e:
    if e.settings is None:
      raise
    return run(e.settings)


def train(task: Task, **settings) -> 'Result':
  """Trains a policy on a task and returns the Result.

    train(Task('couplets.jsonl', rhymes), model='Qwen/Qwen2.5-0.5B-Instruct',
          max_steps=100, learning_rate=1e-5)

  Args:
    task: data and rewards.
    settings: every flag of `--help` by its name (max_steps, learning_rate,
      num_generations, ...), and values of one's own: algorithm (an Algorithm
      or an alias), policy (a Policy), optimizer (an optax transformation),
      credit, baseline, loss, aggregation (see credit/algorithms.py); and
      evaluations, Evaluation records beside the task's.

  Raises ValueError or OSError, in one line, for a wrong argument, model or
  data; Interrupted when a signal stopped the run, whose state is saved.
  """
  given = sort_arguments(settings)
  check_replaced(given.own, given.words)
  found = flags.settings_of(given.words)
  module = module_of(None)
  caller = Caller(name_of(module), command_of(module))
  return start(task, found, given, caller, {})


def wait_for_devices() -> None:
  """Waits for the arrays that devices are still making: a process that ends
  while they do may crash, and then its exit status says nothing."""
  jax = sys.modules.get('jax')
  for array in jax.live_arrays() if jax else ():
    if not array.is_deleted():
      with contextlib.suppress(Exception):  # an error that was raised already
        array.block_until_ready()


def fails_alone(error: Exception) -> bool:
  """Tells whether this process fails where others, which do not know, go on;
  they end when its heartbeat is missed."""
  processes = sys.modules.get('jaxrl_tok.processes')
  return processes is not None and not processes.is_agreed(error)


def out_of_memory(e: Exception) -> MemoryError | None:
  """One line in place of an error of a device, or of Python, that has no memory
  left; None for other errors."""
  text = ' '.join(str(e).split())
  of_device = type(e).__name__ == 'JaxRuntimeError'
  if not (
    isinstance(e, MemoryError) or 'RESOURCE_EXHAUSTED' in text * of_device
  ):
    return None
  line = MemoryError(
    f'no memory is left ({text[:100] or "MemoryError"}); pass a smaller '
    '--num_prompts, --num_generations or --micro_batch; --dry_run prints what '
    'a step needs'
  )
  for note in getattr(e, '__notes__', ()):
    line.add_note(note)
  return line


def main(
  task: Task | Callable, argv: list[str] | None = None, /, **defaults
) -> 'Result | None':
  """Trains behind flags, one for each setting, and returns the Result.

  Args:
    task: a Task, or a function that returns one; the function's parameters
      are flags of its own, and those named as settings get their value.
    argv: the command line; None: sys.argv.
    defaults: defaults of the flags, as the arguments of `train`.

  Returns None with --print_config and --dry_run. A fault is one line and exit
  status 2; a run that a signal or a full disk stopped exits with 75, and one
  that has diverged (--max_kl) with 1.
  """
  function = None if isinstance(task, Task) else task
  module = module_of(None if argv is None else function)
  argv = sys.argv[1:] if argv is None else list(argv)
  command = command_of(module)
  try:
    given = sort_arguments(defaults)
    settings = with_values(Settings(), given.words)
    flags.check_kinds(settings)
  except ValueError as e:
    flags.fail(e)
  parsed = flags.parse(
    settings,
    function,
    command,
    argv,
    inspect.getdoc(module),
  )
  caller = Caller(
    name_of(module),
    shlex.join([*shlex.split(command), *argv]),
    task_of(module, function),
  )
  try:
    check_replaced(given.own, {*given.words, *parsed.typed})
    found = function(**parsed.own) if function else task
    return start(found, parsed.settings, given, caller, parsed.own)
  except Interrupted:
    wait_for_devices()
    raise SystemExit(TRY_AGAIN) from None
  except (ValueError, OSError) as e:
    alone = fails_alone(e)
    if not alone:
      wait_for_devices()
    if text := getattr(e, 'traceback', ''):  # of the user's own code
      print(redact(text), file=sys.stderr)
    flags.show_fault(e)
    status = TRY_AGAIN if disk.is_full(e) else 2
    if alone:  # jax would wait for the other processes, which wait for it
      os._exit(status)
    raise SystemExit(getattr(e, 'status', status)) from None
  except Exception as e:
    line = None if fails_alone(e) else out_of_memory(e)
    if line is None:
      raise
    flags.show_fault(line)
    raise SystemExit(2) from None
