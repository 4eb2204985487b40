"""Flags: settings on the command line, checked before jax is imported.

tyro turns the groups of Settings, and the parameters of a task's function, into
flags (--learning-rate and --learning_rate both work). Every fault is one line:
the fact and the cure.
"""

import contextlib
import dataclasses
import datetime
import functools
import inspect
import io
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import (
  Annotated,
  Any,
  Literal,
  NamedTuple,
  Union,
  get_args,
  get_origin,
  get_type_hints,
)

import docstring_parser
import tyro

from jaxrl_tok import mesh_spec
from jaxrl_tok.credit.names import check_kl
from jaxrl_tok.run import compat
from jaxrl_tok.run.algorithm_settings import OF_ALGORITHM
from jaxrl_tok.run.settings import (
  Settings,
  check_names,
  flatten,
  suggest,
  with_values,
)


class Parsed(NamedTuple):
  """A command line, read and checked."""

  settings: Settings
  own: dict  # arguments of the task's function
  typed: frozenset  # names of the flags that argv gives


def fail(message) -> None:
  """Prints one line on stderr, an error's notes included, and exits with status
  2."""
  notes = getattr(message, '__notes__', ())
  lines = [str(message), *(n for n in notes if '\n' not in n)]  # not jax's
  print(f'error: {"; ".join(lines)}', file=sys.stderr)
  raise SystemExit(2)


# --- from a function's parameters to flags -----------------------------------


def own_flags(function: Callable) -> tuple[list, list[str]]:
  """Turns a function's parameters into flags: (dataclass fields of those that
  are flags of its own, names of those that are settings and get their value).

  A parameter's type and default are the flag's; its line under Args in the
  docstring is the flag's help. A list or tuple is a flag that is repeated.
  """
  known = flatten(Settings()).keys()
  hints = get_type_hints(function)
  text = docstring_parser.parse(inspect.getdoc(function) or '')
  helps = {p.arg_name: p.description for p in text.params}
  fields, shared = [], []
  for p in inspect.signature(function).parameters.values():
    if p.name in known:
      shared.append(p.name)
      continue
    if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
      raise ValueError(
        f'{function.__name__} takes *{p.name}; name each of its flags'
      )
    kind = hints.get(p.name, str)
    if get_origin(kind) in (list, tuple):
      kind = tyro.conf.UseAppendAction[kind]
    words = ' '.join((helps.get(p.name) or '').split())
    flag = Annotated[kind, tyro.conf.arg(help=words)] if words else kind
    default = dataclasses.MISSING if p.default is p.empty else p.default
    fields.append((p.name, flag, dataclasses.field(default=default)))
  return fields, shared


def unused_flags(settings: Settings, names) -> set[str]:
  """Names of flags among `names`; a group's name stands for all its flags."""
  found = set(names)
  for field in dataclasses.fields(settings):
    if field.name in found:
      found |= flatten(getattr(settings, field.name)).keys()
  return found


def hide(settings: Settings, names) -> Settings:
  """Hides settings of these names from the command line."""

  def hidden(group):
    fields = [
      (
        f.name,
        tyro.conf.Suppress[tyro.conf.Fixed[f.type]],
        dataclasses.field(default=getattr(group, f.name)),
      )
      for f in dataclasses.fields(group)
      if f.name in names
    ]
    if not fields:
      return group
    own = type(group)
    kind = dataclasses.make_dataclass(
      own.__name__, fields, bases=(own,), frozen=True
    )
    kind.__doc__ = own.__doc__
    return kind(**vars(group))

  groups = {
    field.name: hidden(getattr(settings, field.name))
    for field in dataclasses.fields(settings)
  }
  return dataclasses.replace(settings, **groups)


def _with_own(settings: Settings, fields: list):
  """Returns (type, default) of all flags: a task's own, then the groups."""
  groups = [
    (f.name, type(group), dataclasses.field(default=group))
    for f in dataclasses.fields(settings)
    for group in [getattr(settings, f.name)]
  ]
  needed = any(f[2].default is dataclasses.MISSING for f in fields)
  if fields:
    group = dataclasses.make_dataclass('TaskFlags', fields, frozen=True)
    group.__doc__ = 'The task.'
    first = 'task', group
    if not needed:
      first = *first, dataclasses.field(default=group())
    groups = [first, *groups]
  kind = dataclasses.make_dataclass('Flags', groups, frozen=True)
  return kind, None if needed else kind()


# --- reading -----------------------------------------------------------------


def names_typed(argv: list[str]) -> list[str]:
  """Names of the flags in argv, as settings spell them."""
  found = (re.match(r'--([^=]+)', word) for word in argv)
  return [m[1].replace('-', '_') for m in found if m]


def check_spelling(known, argv: list[str]) -> None:
  """Refuses a misspelt flag in one line, where tyro would draw a box."""
  names = {*known, 'help'}
  names |= {f'no_{name}' for name in names}
  for word in argv:
    for name in names_typed([word]):
      if name not in names:
        cure = suggest(name, known)
        cure = re.sub(r'(mean|called) (\w+)', r'\1 --\2', cure)
        fail(f'unknown flag {word.split("=")[0]}; {cure}')


def check_given_once(settings: Settings, argv: list[str]) -> None:
  """Refuses a flag of several texts that is repeated: the last would win."""
  lists = {k for k, v in flatten(settings).items() if isinstance(v, tuple)}
  names = names_typed(argv)
  for name in sorted(lists & {n for n in names if names.count(n) > 1}):
    fail(f'--{name} is given twice; write all its texts after one --{name}')


def _names(kind) -> set[str]:
  """Names of a dataclass' flags, those of its groups included."""
  names = set()
  for field in dataclasses.fields(kind):
    inner = field.type
    if dataclasses.is_dataclass(inner):
      names |= _names(inner)
    elif tyro.conf.Suppress not in get_args(inner):
      names.add(field.name)
  return names


def cli(kind, default, prog: str, argv: list[str], description: str | None):
  """Reads argv with tyro, its faults in one line."""
  check_spelling(_names(kind), argv)
  read = functools.partial(
    tyro.cli,
    kind,
    args=argv,
    default=default,
    description=description,
    prog=prog,
    use_underscores=True,
    config=(tyro.conf.OmitArgPrefixes,),
  )
  if any(word in ('-h', '--help') for word in argv):
    return read()
  output = io.StringIO()
  try:
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
      return read()
  except SystemExit:
    # tyro draws a box of several lines; the fact in it is the second sentence
    words = re.sub(r'[\u2500-\u257f]+|-{5,}', ' ', output.getvalue())
    words = re.split(r'Argument helptext|For full helptext', words)[0]
    words = ' '.join(words.split()).rstrip('.')
    fail(f'{words}; --help lists the flags')


def parse(
  settings: Settings,
  function: Callable | None,
  prog: str,
  argv: list[str],
  description: str | None = None,
  unused: Sequence[str] = (),
) -> Parsed:
  """Parses argv into settings; a fault exits with one line.

  Args:
    settings: defaults.
    function: a function whose parameters are flags, too (see own_flags).
    prog: the command, for --help.
    unused: flags, or groups of them, that would have no effect: left out.
  """
  try:
    fields, shared = own_flags(function) if function else ([], [])
  except ValueError as e:
    fail(e)
  unused = unused_flags(settings, unused)
  for name in names_typed(argv):
    if name.removeprefix('no_') in unused:
      fail(
        f'--{name} has no effect here; leave it out (--help lists the flags)'
      )
  check_given_once(settings, argv)
  fields = [field for field in fields if field[0] not in unused]
  settings = hide(settings, unused)

  def read(settings: Settings):
    kind, default = _with_own(settings, fields)
    found = cli(kind, default, prog, argv, description)
    groups = [f.name for f in dataclasses.fields(settings)]
    values = {name: getattr(found, name) for name in groups}
    task = getattr(found, 'task', None)
    own = {name: getattr(task, name) for name, *_ in fields}
    return type(settings)(**values), own

  found, own = read(settings)
  try:
    changed = algorithm_defaults(found)
    if changed:  # argv's values replace them
      found, own = read(with_values(settings, changed))
    check(found)
  except (ValueError, OSError) as e:
    fail(e)
  own |= {name: flatten(found)[name] for name in shared}
  return Parsed(found, own, frozenset(names_typed(argv)))


def algorithm_defaults(settings: Settings) -> dict:
  """Defaults that an algorithm, or --compat, changes."""
  changed = OF_ALGORITHM.get(settings.algorithm.algorithm, {})
  return changed | compat.defaults(flatten(settings))


def settings_of(values: dict[str, Any]) -> Settings:
  """Settings of a library call: `values` over the defaults. Raises ValueError
  for a name that is no setting and for values that cannot be."""
  check_names(values, flatten(Settings()).keys())
  first = with_values(Settings(), values)
  check_kinds(first)
  found = with_values(Settings(), algorithm_defaults(first) | values)
  check(found)
  return found


# --- checks ------------------------------------------------------------------


def is_of_kind(value, kind) -> bool:
  """Tells whether a value has the type of a setting."""
  origin = get_origin(kind)
  if origin is Literal:
    return value in get_args(kind)
  if origin in (Union, UnionType):
    return any(is_of_kind(value, k) for k in get_args(kind))
  if origin is tuple:
    return isinstance(value, tuple) and all(isinstance(x, str) for x in value)
  if kind in (int, float) and isinstance(value, bool):
    return False
  return isinstance(value, (int, float) if kind is float else kind)


def kind_in_words(kind) -> str:
  """Type of a setting for a message: int or None, one of a, b."""
  origin = get_origin(kind)
  if origin is Literal:
    return f'one of {", ".join(get_args(kind))}'
  if origin in (Union, UnionType):
    return ' or '.join(map(kind_in_words, get_args(kind)))
  names = {tuple: 'a list of texts', type(None): 'None', str: 'text'}
  return names.get(origin or kind, getattr(kind, '__name__', str(kind)))


def check_kinds(settings) -> None:
  """Refuses values of another type than their setting's."""
  for name, kind in get_type_hints(type(settings)).items():
    value = getattr(settings, name)
    if dataclasses.is_dataclass(value):
      check_kinds(value)
    elif not is_of_kind(value, kind):
      raise ValueError(f'--{name} {value!r} must be {kind_in_words(kind)}')


RANGES = (
  (
    lambda x: x >= 1,
    'at least 1',
    'num_prompts num_generations max_prompt_length max_completion_length '
    'max_steps held_out keep d_model num_layers num_heads num_kv_heads d_ff '
    'warm_start_max_steps warm_start_batch_size warm_start_check_every epochs '
    'mini_batches length_buckets cpu_devices replay_capacity',
  ),
  (
    lambda x: x > 0,
    'above 0',
    'temperature learning_rate warm_start_learning_rate lora_alpha kl_horizon '
    'critic_learning_rate rho_bar c_bar ratio_cap',
  ),
  (lambda x: 0 < x <= 1, 'in (0, 1]', 'top_p'),
  (lambda x: 0 <= x <= 1, 'in [0, 1]', 'min_p gamma gae_lambda min_lr_ratio'),
  (lambda x: 0 <= x < 1, 'in [0, 1)', 'ema_decay adam_b2 clip_low'),
  (lambda x: 0 <= x < 2**32, 'in 0..4294967295', 'seed'),
  (
    lambda x: x >= 0,
    '0 or more',
    'top_k compact_levels beta micro_batch eval_every save_every patience '
    'max_nonfinite '
    'lr_warmup_steps max_grad_norm weight_decay lora_rank steps_per_call '
    'clip_high dual_clip ratio_floor advantage_clip importance_cap kl_target '
    'max_update_kl value_clip value_coef entropy_coef critic_warmup_steps '
    'overlong_buffer dynamic_sampling_rounds ref_sync_steps mask_sync_steps '
    'replay_groups',
  ),
)


def check_numbers(settings) -> None:
  """Refuses numbers that are not finite or outside their range."""
  ranges = {
    name: (fine, text) for fine, text, names in RANGES for name in names.split()
  }
  for name, value in flatten(settings).items():
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError(f'--{name} {value} must be a finite number')
    fine, text = ranges.get(name, (lambda x: True, ''))
    if isinstance(value, int | float) and not fine(value):
      raise ValueError(f'--{name} {value} must be {text}')


def check(settings: Settings) -> None:
  """Refuses impossible values, and values that do not fit each other. Raises
  ValueError or OSError; imports no jax."""
  check_numbers(settings)
  check_run(settings)
  check_model(settings)
  check_optimizer(settings)
  check_collectors(settings)
  check_batches(settings)
  if settings.algorithm.kl is not None:
    check_kl(settings.algorithm.kl)
  check_chat(settings.data)
  if settings.sampling.stop:
    from jaxrl_tok.data.stops import check_texts

    check_texts(settings.sampling.stop)
  for pair in settings.data.rename:
    if not re.fullmatch(r'[^=]+=[^=]+', pair):
      raise ValueError(f'--rename {pair!r} is not old=new')


def check_chat(data) -> None:
  """Refuses variables of a chat template and a date that are none."""
  try:
    found = json.loads(data.chat_template_kwargs)
  except ValueError:
    found = None
  if not isinstance(found, dict):
    raise ValueError(
      f'--chat_template_kwargs {data.chat_template_kwargs!r} is no JSON '
      'object; pass one such as {"enable_thinking": false}'
    )
  if data.chat_date is None:
    return
  try:
    datetime.date.fromisoformat(data.chat_date)
  except ValueError:
    raise ValueError(
      f'--chat_date {data.chat_date!r} is no date; pass it as YYYY-MM-DD'
    ) from None


def check_run(settings: Settings) -> None:
  from jaxrl_tok.hub import fetch

  run = settings.run
  n = run.steps_per_call
  for name in ('max_steps', 'eval_every', 'save_every') if n else ():
    if getattr(run, name) % n:
      fit = -(-getattr(run, name) // n) * n
      raise ValueError(
        f'--{name} {getattr(run, name)} must be a multiple of --steps_per_call '
        f'{n}; pass --{name} {fit}'
      )
  if not re.fullmatch(r'never|auto|\d+', run.resume):
    raise ValueError(f'--resume {run.resume!r} is none of never, auto, a step')
  if run.resume != 'never' and run.output_dir is None:
    raise ValueError('--resume needs the --output_dir of the run to go on with')
  if run.push_to_hub:
    fetch.push_token()
    if not re.fullmatch(fetch.HUB_ID, run.push_to_hub):
      raise ValueError(f'--push_to_hub {run.push_to_hub!r} is no OWNER/NAME')


def check_model(settings: Settings) -> None:
  from jaxrl_tok.hub import fetch

  model = settings.model
  mesh_spec.parse_mesh(model.mesh)
  if (model.lora_rank or model.lora_adapter) and not model.model:
    raise ValueError('LoRA adapts a model that there is; pass --model')
  if model.lora_rank and model.lora_adapter:
    raise ValueError('--lora_adapter says its rank; pass it or --lora_rank')
  if model.revision and not fetch.is_hub_id(model.model or ''):
    raise ValueError('--revision is of a hub id; pass --model OWNER/NAME')
  if model.param_dtype != 'auto' and not model.model:
    raise ValueError('--param_dtype is how a --model is read; pass --model')
  adapted = model.lora_rank or model.lora_adapter
  if model.param_dtype == 'float16' and not adapted:
    raise ValueError(
      '--param_dtype float16 holds no gradient below 6e-8; pass bfloat16, or '
      'float32 with --dtype bfloat16'
    )
  if model.lora_adapter and not Path(model.lora_adapter).is_dir():
    raise ValueError(f'--lora_adapter {model.lora_adapter} is no directory')
  if model.model:  # before the slow import of jax
    fetch.locate(model.model, model.revision, weights=False)
  if model.reward_model:
    fetch.locate(model.reward_model, weights=False)


def check_optimizer(settings: Settings) -> None:
  """Refuses settings without an effect on the optimizer, and a warm-up that is
  longer than the run."""
  f, defaults = settings.optimizer, algorithm_defaults(settings)
  steps, warmup = settings.run.max_steps, f.lr_warmup_steps
  if warmup > steps:
    raise ValueError(
      f'--lr_warmup_steps {warmup} is longer than the run of --max_steps '
      f'{steps}; pass --lr_warmup_steps {steps}'
    )
  adams = f.optimizer in ('adamw', 'muon')
  unused = {
    'min_lr_ratio': (f.lr_schedule == 'constant', 'a constant learning rate'),
    'adam_b2': (not adams, f'--optimizer {f.optimizer}'),
    'moment_dtype': (not adams, f'--optimizer {f.optimizer}'),
    'weight_decay_all': (not f.weight_decay, '--weight_decay 0'),
  }
  untouched = vars(type(f)()) | defaults
  for name, (refused, beside) in unused.items():
    if refused and getattr(f, name) != untouched[name]:
      raise ValueError(f'--{name} has no effect beside {beside}; leave it out')


def check_collectors(settings: Settings) -> None:
  """Refuses collectors that cannot wrap each other."""
  sampling, rounds = settings.sampling, settings.algorithm
  rounds = rounds.dynamic_sampling_rounds
  chosen = {
    '--steps_per_call': settings.run.steps_per_call,
    '--dynamic_sampling_rounds': rounds,
    '--replay_groups': sampling.replay_groups,
    '--ahead': sampling.ahead,
  }
  wrong = (
    ('--steps_per_call', '--dynamic_sampling_rounds'),
    ('--steps_per_call', '--replay_groups'),
    ('--steps_per_call', '--ahead'),
    ('--ahead', '--dynamic_sampling_rounds'),
    ('--ahead', '--replay_groups'),
  )
  for one, other in wrong:
    if chosen[one] and chosen[other]:
      raise ValueError(f'{one} and {other} exclude each other; leave one out')
  if sampling.replay_groups > sampling.replay_capacity:
    raise ValueError(
      f'--replay_groups {sampling.replay_groups} is more than the buffer '
      f'holds; pass --replay_capacity {sampling.replay_groups} or more'
    )


def check_batches(settings: Settings) -> None:
  """Refuses mini-batches and micro-batches that would split groups."""
  sampling, parts = settings.sampling, settings.algorithm.mini_batches or 1
  micro = settings.model.micro_batch
  micro = 0 if micro == 'auto' else micro
  C = sampling.num_prompts + sampling.replay_groups
  G = sampling.num_generations
  if C % parts:
    fit = -(-C // parts) * parts - sampling.replay_groups
    raise ValueError(
      f'--mini_batches {parts} must divide the {C} prompts of a step; pass '
      f'--num_prompts {fit}'
    )
  rows = C * G // parts
  if micro and (micro % G or rows % micro):
    sizes = [n * G for n in range(1, C // parts + 1) if C // parts % n == 0]
    raise ValueError(
      f'--micro_batch {micro} must divide the {rows} completions of a '
      f'{"mini-batch" if parts > 1 else "step"} into whole groups of {G}; pass '
      f'--micro_batch {min(sizes, key=lambda n: abs(n - micro))}'
    )
