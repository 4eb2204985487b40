"""Checks of settings, before jax is imported: types, ranges, and what does not
fit together. Every fault is one line: the fact and the cure."""

import dataclasses
import datetime
import json
import math
import re
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from jaxrl_tok import mesh_spec, targets
from jaxrl_tok.credit.names import check_kl, read_constraint
from jaxrl_tok.report import mirror
from jaxrl_tok.run import compat
from jaxrl_tok.run.algorithm_settings import OF_ALGORITHM
from jaxrl_tok.run.settings import (
  CHANGES,
  DataSettings,
  ModelSettings,
  RunSettings,
  Settings,
  flatten,
)


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
    return f'one of {", ".join(map(str, get_args(kind)))}'
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
    'mini_batches length_buckets cpu_devices replay_capacity max_turns '
    'max_episode_length environment_workers divergence_steps',
  ),
  (
    lambda x: x > 0,
    'above 0',
    'temperature learning_rate warm_start_learning_rate lora_alpha kl_horizon '
    'critic_learning_rate rho_bar c_bar ratio_cap constraint_rate '
    'turn_deadline reward_timeout',
  ),
  (lambda x: 0 < x <= 1, 'in (0, 1]', 'top_p'),
  (lambda x: 0 <= x <= 1, 'in [0, 1]', 'min_p gamma gae_lambda min_lr_ratio'),
  (lambda x: 0 <= x < 1, 'in [0, 1)', 'ema_decay adam_b2 clip_low'),
  (lambda x: 0 <= x < 2**32, 'in 0..4294967295', 'seed'),
  (
    lambda x: x >= 0,
    '0 or more',
    'top_k compact_levels beta micro_batch eval_every save_every patience '
    'max_nonfinite lr_warmup_steps max_grad_norm weight_decay lora_rank '
    'steps_per_call clip_high dual_clip ratio_floor advantage_clip '
    'importance_cap kl_target max_update_kl value_clip value_coef entropy_coef '
    'critic_warmup_steps overlong_buffer dynamic_sampling_rounds '
    'ref_sync_steps mask_sync_steps replay_groups constraint_damping '
    'reward_workers reward_memory max_kl min_entropy max_grad_ratio '
    'step_timeout',
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
  check_constraints(settings)
  check_chat_settings(settings.data)
  if settings.sampling.stop:
    from jaxrl_tok.data.stops import check_texts

    check_texts(settings.sampling.stop)
  for pair in settings.data.rename:
    if not re.fullmatch(r'[^=]+=[^=]+', pair):
      raise ValueError(f'--rename {pair!r} is not old=new')


def check_constraints(settings: Settings) -> None:
  """Refuses constraints that cannot be read, or that limit one name twice."""
  names = [read_constraint(text).name for text in settings.algorithm.constraint]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(
        f'--constraint limits {name} twice; give the function two names, '
        f"Task(constraints={{'{name}_least': {name}, '{name}_most': {name}}})"
      )


def check_chat_settings(data: DataSettings) -> None:
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
  """Refuses steps that a call does not divide, and places that cannot be."""
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
  limits = run.max_kl, run.min_entropy, run.max_grad_ratio
  for name in ('divergence_steps', 'on_divergence'):
    changed = getattr(run, name) != getattr(RunSettings, name)
    if changed and not any(limits):
      raise ValueError(
        f'--{name} is of a limit, and there is none; pass --max_kl, '
        '--min_entropy or --max_grad_ratio, or leave it out'
      )
  for name in ('reward_timeout', 'reward_memory'):
    changed = getattr(run, name) != getattr(RunSettings, name)
    if changed and not run.reward_workers:
      raise ValueError(
        f'--{name} is of --reward_workers, and there are none; pass '
        '--reward_workers 2, or leave it out'
      )
  if run.best_metric is None and run.best_mode != 'max':
    raise ValueError(
      f'--best_mode {run.best_mode} is of a --best_metric, and there is none; '
      'pass --best_metric eval/reward, or leave it out'
    )
  if run.best_metric is not None and not run.best_metric.startswith('eval/'):
    raise ValueError(
      f'--best_metric {run.best_metric} is no metric of an evaluation; their '
      'names begin with eval/, as eval/reward'
    )
  if run.target is not None:
    targets.parse_target(run.target)
    if not run.dry_run:
      raise ValueError(
        f'--target {run.target} is of a --dry_run; a run takes the devices '
        'that are here: leave it out'
      )
  if not re.fullmatch(r'never|auto|\d+', run.resume):
    raise ValueError(f'--resume {run.resume!r} is none of never, auto, a step')
  check_allowed(run)
  if run.output_dir == '':
    raise ValueError('--output_dir is empty; name a directory, or leave it out')
  mirror.check_address(run.output_dir)
  if run.resume != 'never' and run.output_dir is None:
    raise ValueError('--resume needs the --output_dir of the run to go on with')
  if run.push_to_hub:
    fetch.push_token()
    if not re.fullmatch(fetch.HUB_ID, run.push_to_hub):
      raise ValueError(f'--push_to_hub {run.push_to_hub!r} is no OWNER/NAME')


def check_allowed(run: RunSettings) -> None:
  """Refuses words of --allow_change that are none, or that nothing reads."""
  for word in run.allowed:
    if word not in CHANGES:
      raise ValueError(
        f'--allow_change {word!r} is none of {", ".join(CHANGES)}'
      )
  if run.allowed and run.resume == 'never':
    raise ValueError(
      '--allow_change is of a run that goes on; pass --resume auto, or leave '
      'it out'
    )


def check_model(settings: Settings) -> None:
  """Refuses models that are not there, and settings that need another one."""
  from jaxrl_tok.hub import fetch

  model = settings.model
  if model.mesh != mesh_spec.AUTO:
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
  if model.quantize != 'none' and not (adapted or model.reward_model):
    raise ValueError(
      f'--quantize {model.quantize} holds weights that nothing trains, and '
      'without LoRA or a --reward_model there are none; pass --lora_rank 16'
    )
  if model.quantize != 'none' and model.param_dtype != 'auto':
    raise ValueError(
      f'--param_dtype {model.param_dtype} and --quantize {model.quantize} both '
      'say how the base is stored; leave one out'
    )
  for name in ('reward_model_weight', 'reward_model_by'):
    changed = getattr(model, name) != getattr(ModelSettings, name)
    if changed and not model.reward_model:
      raise ValueError(
        f'--{name} has no effect without a --reward_model; leave it out'
      )
  if model.lora_adapter and not Path(model.lora_adapter).is_dir():
    raise ValueError(f'--lora_adapter {model.lora_adapter} is no directory')
  if model.model:  # before the slow import of jax
    fetch.locate(model.model, model.revision, weights=False)
  if model.reward_model:
    fetch.locate(model.reward_model, weights=False)


def check_warm_up(settings: Settings, waits: int = 0) -> None:
  """Refuses a warm-up that is longer than the run, less the `waits` steps at
  first in which the critic learns alone."""
  steps, warmup = settings.run.max_steps, settings.optimizer.lr_warmup_steps
  if warmup and waits + warmup > steps:
    after = f' after --critic_warmup_steps {waits}' if waits else ''
    raise ValueError(
      f'--lr_warmup_steps {warmup}{after} is longer than the run of '
      f'--max_steps {steps}; pass --lr_warmup_steps {max(steps - waits, 0)}'
    )


def check_optimizer(settings: Settings) -> None:
  """Refuses settings without an effect on the optimizer, and a warm-up that is
  longer than the run."""
  f, defaults = settings.optimizer, algorithm_defaults(settings)
  check_warm_up(settings)
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
  sampling = settings.sampling
  chosen = {
    '--steps_per_call': settings.run.steps_per_call,
    '--dynamic_sampling_rounds': settings.algorithm.dynamic_sampling_rounds,
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
  C = sampling.num_prompts + sampling.replay_groups
  if C % parts:
    fit = -(-C // parts) * parts - sampling.replay_groups
    raise ValueError(
      f'--mini_batches {parts} must divide the {C} prompts of a step; pass '
      f'--num_prompts {fit}'
    )
  check_micro_batch(settings, parts)


def check_micro_batch(settings: Settings, parts: int) -> None:
  """Refuses micro-batches that do not divide a mini-batch, one of the `parts`
  of a step, into whole groups."""
  sampling, micro = settings.sampling, settings.model.micro_batch
  C = sampling.num_prompts + sampling.replay_groups
  G = sampling.num_generations
  rows = C * G // parts
  if micro not in ('auto', 0) and (micro % G or rows % micro):
    sizes = [n * G for n in range(1, C // parts + 1) if C // parts % n == 0]
    raise ValueError(
      f'--micro_batch {micro} must divide the {rows} completions of a '
      f'{"mini-batch" if parts > 1 else "step"} into whole groups of {G}; pass '
      f'--micro_batch {min(sizes, key=lambda n: abs(n - micro))}'
    )


def algorithm_defaults(settings: Settings) -> dict:
  """Defaults that an algorithm, or --compat, changes."""
  changed = OF_ALGORITHM.get(settings.algorithm.algorithm, {})
  return changed | compat.defaults(flatten(settings))
