"""Flags: the words that users type, checked before jax is imported.

An experiment has one frozen dataclass of groups; tyro turns it into flags
(--learning-rate and --learning_rate both work). Every fault is one line: the
fact and the cure.
"""

import contextlib
import dataclasses
import difflib
import functools
import io
import math
import re
import sys
import time
from pathlib import Path
from typing import Literal

import tyro

from jaxrl_tok.hub import fetch as hub
from jaxrl_tok.run import compat
from jaxrl_tok.run.algorithm_settings import (
  OF_ALGORITHM,
)


@dataclasses.dataclass(frozen=True)
class RunFlags:
  """The run: where it writes, how long it lasts."""

  output_dir: str | None = None
  """Directory of the run; default runs/EXPERIMENT-TIME."""
  seed: int = 0
  """Seed of the data's order, the parameters and the sampling."""
  max_steps: int = 1000
  """Updates at most."""
  stop_at_reward: float | None = None
  """Stop when the held-out reward (greedy) reaches this."""
  patience: int = 0
  """Stop after so many evaluations without a better one; 0: never."""
  eval_every: int = 50
  """Steps between evaluations on held-out data; 0: never."""
  eval_prompts: int = 512
  """Held-out prompts."""
  save_every: int = 200
  """Steps between checkpoints; 0: only the last."""
  keep: int = 2
  """Checkpoints kept."""
  resume: str = 'never'
  """never, auto (go on from the newest checkpoint of output_dir) or a step."""
  push_to_hub: str | None = None
  """Upload the policy to this repository, new ones private (HF_TOKEN)."""
  steps_per_call: int = 0
  """Whole steps in one call of the device, its rewards JAX functions, too; 0:
  step by step, rewards on the host."""
  report_to: Literal['tensorboard', 'none'] = 'tensorboard'
  """Where metrics go beside metrics.jsonl."""
  print_config: bool = False
  """Print every setting, the parameters and their placement, and exit."""


@dataclasses.dataclass(frozen=True)
class ModelFlags:
  """The model and the machine."""

  model: str | None = None
  """Hugging Face directory or hub id to start from."""
  revision: str | None = None
  """Of the hub id: branch, tag or commit."""
  param_dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
  """Of the parameters; auto: float32, what LoRA freezes as in the file."""
  lora_rank: int = 0
  """Train adapters of this rank, not the model; 0: the model."""
  lora_alpha: float = 32.0
  """Adapters are multiplied by alpha / rank."""
  lora_targets: tuple[str, ...] = ('all-linear',)
  """Matrices with an adapter, by the ends of their names."""
  lora_adapter: str | None = None
  """PEFT directory to start from; it says rank, alpha and targets."""
  reward_model: str | None = None
  """Classifier of one label (directory or hub id): its score is added to the
  reward."""
  reward_model_weight: float = 1.0
  """Multiplies that score."""
  dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'
  """Compute dtype; auto: float32 on CPU, bfloat16 elsewhere."""
  remat: Literal['none', 'dots', 'full'] = 'none'
  """What the backward pass computes again, in each block: nothing; all but
  the products with matrices of weights; all. Less memory, more time."""
  attention: Literal['auto', 'xla', 'cudnn', 'splash'] = 'auto'
  """Of many tokens at once; auto: cudnn on GPU, splash on TPU, else xla."""
  cpu_devices: int = 1
  """Devices that a CPU is split into, each with its own rows and a copy of the
  weights: two on two cores sample faster, and learn no faster."""
  mesh: str = 'data=-1,fsdp=1,tensor=1'
  """Devices along each axis; -1: all that are left."""
  micro_batch: int | Literal['auto'] = 'auto'
  """Completions in one pass of the gradient; 0: all at once; auto: as many as
  the accelerator's memory or the CPU's last cache holds."""
  length_buckets: int = 2
  """Lengths that the update is compiled for, the longest completion allowed and
  each half the one before (down to 32 tokens): it pays for the shortest that
  holds a step's completions."""


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
  """Prompts and how completions are sampled."""

  num_prompts: int = 32
  """Prompts in a step (C)."""
  num_generations: int = 16
  """Completions of each prompt (G)."""
  max_prompt_length: int | None = None
  """Tokens in a prompt at most (P); default: the longest one."""
  max_completion_length: int | None = 32
  """Tokens in a completion at most (T), the end token included."""
  temperature: float = 1.0
  """Divides the logits; part of the policy that is trained."""
  top_k: int = 0
  """Keep the k most likely tokens; 0: all."""
  top_p: float = 1.0
  """Keep the most likely tokens that together reach this probability."""
  min_p: float = 0.0
  """Keep tokens of at least this share of the largest probability."""
  compact_levels: int = 0
  """How often rows that still run may move into arrays of half the rows, on one
  device, each with its prompt's keys: faster where lengths differ much and
  prompts are short, longer to compile."""

  @property
  def truncates(self) -> bool:
    return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclasses.dataclass(frozen=True)
class OptimizerFlags:
  """The optimizer."""

  learning_rate: float = 1e-3
  """Peak learning rate."""
  lr_schedule: Literal['constant', 'linear', 'cosine'] = 'constant'
  """After the warm-up; linear and cosine end at a tenth, at max_steps."""
  lr_warmup_steps: int = 0
  """Steps of linear warm-up."""
  adam_b2: float = 0.95
  """Decay of Adam's second moment."""
  weight_decay: float = 0.0
  """AdamW's weight decay."""
  max_grad_norm: float = 1.0
  """Gradients are scaled down to this global norm."""


@dataclasses.dataclass(frozen=True)
class SizeFlags:
  """The decoder, when no --model is given."""

  d_model: int = 64
  """Width (D)."""
  num_layers: int = 2
  """Blocks (L)."""
  num_heads: int = 4
  """Query heads (N)."""
  num_kv_heads: int = 2
  """Key/value heads (K)."""
  d_ff: int = 192
  """Feed-forward width (F)."""


@dataclasses.dataclass(frozen=True)
class WarmStartFlags:
  """The supervised warm start, when no --model is given."""

  warm_start_stop_at: float = 0.4
  """It ends when this share of held-out problems is right."""
  warm_start_max_steps: int = 1000
  """Steps at most."""
  warm_start_batch_size: int = 128
  """Problems in a step."""
  warm_start_learning_rate: float = 3e-3
  """Its peak learning rate (Adam, cosine)."""
  warm_start_check_every: int = 5
  """Steps between looks at the held-out problems."""
  cache: bool = True
  """Keep the result under ~/.cache/jaxrl_tok and use it next time."""


class FlagError(ValueError):
  """A flag's value cannot be; the message is the whole story."""


def fail(message) -> None:
  """One line on stderr, exit status 2."""
  print(f'error: {message}', file=sys.stderr)
  raise SystemExit(2)


def _names(kind) -> set[str]:
  names = set()
  for field in dataclasses.fields(kind):
    if dataclasses.is_dataclass(field.type):
      names |= _names(field.type)
    else:
      names.add(field.name)
  return names


def _check_spelling(kind, argv) -> None:
  """tyro would answer a misspelt flag with a box; one line is enough."""
  names = _names(kind) | {'help'}
  known = names | {f'no_{name}' for name in names}
  for word in argv:
    found = re.match(r'--([^=]+)', word)
    if found and found[1].replace('-', '_') not in known:
      name = found[1].replace('-', '_')
      near = difflib.get_close_matches(name, sorted(names), 1, 0.6)
      cure = f'did you mean --{near[0]}?' if near else '--help lists the flags'
      fail(f'unknown flag --{found[1]}; {cure}')


def parse(defaults, prog, argv=None, description=None):
  """argv -> `defaults` with what argv changes; a fault exits with one line.

  prog: the command, for --help.
  """
  argv = sys.argv[1:] if argv is None else argv
  flags = cli(defaults, prog, argv, description)
  try:
    changed = OF_ALGORITHM.get(flags.algorithm.algorithm, {})
    changed = changed | compat.defaults(flat(flags))
    if changed:  # what argv says is said over them
      defaults = with_values(defaults, changed)
      flags = cli(defaults, prog, argv, description)
    check_numbers(flags)
    check(flags.run, flags.model)
    check_algorithm(flags)
    parts = flags.algorithm.mini_batches or 1  # no alias has its own
    check_batches(flags.model, flags.sampling, parts)
  except (ValueError, OSError) as e:
    fail(e)
  return flags


def cli(defaults, prog, argv, description):
  """tyro's reading of argv, its faults in one line."""
  _check_spelling(type(defaults), argv)
  read = functools.partial(
    tyro.cli,
    type(defaults),
    args=argv,
    default=defaults,
    description=description,
    prog=prog,
    use_underscores=True,
    config=(tyro.conf.OmitArgPrefixes,),
  )
  if any(word in ('-h', '--help') for word in argv):
    return read()
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
      return read()
  except SystemExit:
    # tyro draws a box of several lines; the fact in it is the second sentence
    words = re.sub(r'[\u2500-\u257f]+|-{5,}', ' ', said.getvalue())
    words = re.split(r'Argument helptext|For full helptext', words)[0]
    words = ' '.join(words.split()).rstrip('.')
    fail(f'{words}; --help lists the flags')


def _ranges() -> dict[str, tuple]:
  """{flag: (whether a value is fine, what it must be)}."""
  rules = (
    (
      lambda x: x >= 1,
      'at least 1',
      'num_prompts num_generations max_prompt_length max_completion_length '
      'max_steps eval_prompts keep num_problems d_model num_layers num_heads '
      'num_kv_heads d_ff warm_start_max_steps warm_start_batch_size '
      'warm_start_check_every epochs mini_batches length_buckets '
      'cpu_devices',
    ),
    (
      lambda x: x > 0,
      'above 0',
      'temperature learning_rate max_grad_norm warm_start_learning_rate '
      'lora_alpha kl_horizon critic_learning_rate rho_bar c_bar ratio_cap',
    ),
    (lambda x: 0 < x <= 1, 'in (0, 1]', 'top_p'),
    (
      lambda x: 0 <= x <= 1,
      'in [0, 1]',
      'min_p gamma gae_lambda warm_start_stop_at',
    ),
    (lambda x: 0 <= x < 1, 'in [0, 1)', 'ema_decay adam_b2 clip_low'),
    (
      lambda x: x >= 0,
      '0 or more',
      'top_k compact_levels beta micro_batch eval_every save_every patience seed '
      'lr_warmup_steps weight_decay lora_rank steps_per_call clip_high '
      'dual_clip ratio_floor advantage_clip importance_cap kl_target '
      'max_update_kl value_clip value_coef entropy_coef critic_warmup_steps '
      'overlong_buffer dynamic_sampling_rounds ref_sync_steps mask_sync_steps',
    ),
  )
  return {
    name: (fine, said) for fine, said, names in rules for name in names.split()
  }


def check_numbers(flags) -> None:
  """Numbers are finite and in their range, in whatever group they are."""
  ranges = _ranges()
  for name, value in flat(flags).items():
    if isinstance(value, float) and not math.isfinite(value):
      raise FlagError(f'--{name} {value} must be a finite number')
    fine, said = ranges.get(name, (lambda x: True, ''))
    if isinstance(value, int | float) and not fine(value):
      raise FlagError(f'--{name} {value} must be {said}')


def check(run: RunFlags, model: ModelFlags) -> None:
  """Flags that must fit each other, and words. Raises FlagError."""
  n = run.steps_per_call
  for name in ('max_steps', 'eval_every', 'save_every') if n else ():
    if getattr(run, name) % n:
      fit = -(-getattr(run, name) // n) * n
      raise FlagError(
        f'--{name} {getattr(run, name)} must be a multiple of --steps_per_call '
        f'{n}; pass --{name} {fit}'
      )
  if not re.fullmatch(r'never|auto|\d+', run.resume):
    raise FlagError(f'--resume {run.resume!r} is none of never, auto, a step')
  if run.resume != 'never' and run.output_dir is None:
    raise FlagError('--resume needs the --output_dir of the run to go on with')
  for part in model.mesh.split(','):
    if not re.fullmatch(r'\s*(data|fsdp|tensor)=(-1|[1-9]\d*)\s*', part):
      raise FlagError(
        f'--mesh part {part!r} is not axis=size; '
        'pass --mesh data=-1,fsdp=1,tensor=1'
      )
  if (model.lora_rank or model.lora_adapter) and not model.model:
    raise FlagError('LoRA adapts a model that there is; pass --model')
  if model.lora_rank and model.lora_adapter:
    raise FlagError('--lora_adapter says its rank; pass it or --lora_rank')
  if model.revision and not hub.is_hub_id(model.model or ''):
    raise FlagError('--revision is of a hub id; pass --model OWNER/NAME')
  if model.param_dtype != 'auto' and not model.model:
    raise FlagError('--param_dtype is how a --model is read; pass --model')
  if model.lora_adapter and not Path(model.lora_adapter).is_dir():
    raise FlagError(f'--lora_adapter {model.lora_adapter} is no directory')
  if run.push_to_hub:
    hub.push_token()
    if not re.fullmatch(hub.HUB_ID, run.push_to_hub):
      raise FlagError(f'--push_to_hub {run.push_to_hub!r} is no OWNER/NAME')
  if model.model:  # before jax takes its seconds
    hub.locate(model.model, model.revision, weights=False)
  if model.reward_model:
    hub.locate(model.reward_model, weights=False)


def check_algorithm(flags) -> None:
  """What of the algorithm's flags is certain before jax is imported; the rest
  is algorithms.compose's."""
  f = flags.algorithm
  if f.kl in ('k1', 'loss'):
    raise FlagError(
      'k1 in the loss has an expected gradient of exactly 0 on-policy; pass '
      '--kl reward, reverse or forward'
    )
  if f.kl not in (None, 'none', 'reward', 'reverse', 'forward'):
    raise FlagError(f'--kl {f.kl!r} is none of none, reward, reverse, forward')
  if f.dynamic_sampling_rounds and flags.run.steps_per_call:
    raise FlagError(
      'resampling groups needs the host between rollouts; pass '
      '--dynamic_sampling_rounds 0 or --steps_per_call 0'
    )


def check_batches(model: ModelFlags, sampling: SamplingFlags, parts: int):
  """Mini-batches and micro-batches are of whole prompts. Raises FlagError."""
  C, G, micro = (
    sampling.num_prompts,
    sampling.num_generations,
    0 if model.micro_batch == 'auto' else model.micro_batch,
  )
  if C % parts:
    fit = -(-C // parts) * parts
    raise FlagError(
      f'--mini_batches {parts} must divide the {C} prompts of a step; pass '
      f'--num_prompts {fit}'
    )
  rows = C * G // parts
  if micro and (micro % G or rows % micro):
    raise FlagError(
      f'--micro_batch {micro} must divide the {rows} completions of a '
      f'{"mini-batch" if parts > 1 else "step"} into whole groups of {G}; pass '
      f'--micro_batch {_nearest_micro_batch(micro, C // parts, G)}'
    )


def fit_completion_length(flags, answers: list[str]):
  """flags with a max_completion_length that holds every answer and its end
  (bytes are tokens). Raises FlagError where a warm start could not learn an
  answer in the given one."""
  need = max(len(answer.encode()) for answer in answers) + 1
  given = flags.sampling.max_completion_length
  if given is None:
    sampling = dataclasses.replace(flags.sampling, max_completion_length=need)
    return dataclasses.replace(flags, sampling=sampling)
  if given < need and flags.model.model is None:
    raise FlagError(
      f'--max_completion_length {given} cannot hold an answer of {need - 1} '
      f'tokens and the end; pass --max_completion_length {need}'
    )
  return flags


def _nearest_micro_batch(wanted: int, C: int, G: int) -> int:
  sizes = [n * G for n in range(1, C + 1) if C % n == 0]
  return min(sizes, key=lambda n: abs(n - wanted))


def claim_output_dir(run: RunFlags, experiment: str) -> Path:
  """The run's directory, made and writable; refuses to overwrite a run."""
  name = f'{experiment}-{time.strftime("%Y%m%d-%H%M%S")}'
  path = Path(run.output_dir or Path('runs') / name)
  if path.exists() and not path.is_dir():
    fail(f'--output_dir {path} is a file; give a directory')
  if run.resume == 'never' and path.is_dir() and any(path.iterdir()):
    fail(
      f'--output_dir {path} is not empty; pass --resume auto to go on with it, '
      'or another directory'
    )
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe = path / '.writable'
    probe.touch()
    probe.unlink()
  except OSError as e:
    fail(f'--output_dir {path} cannot be written: {e.strerror}; give another')
  return path


def with_values(flags, values: dict):
  """flags with other values of the flags named, in whatever group they are."""
  changes = {}
  for field in dataclasses.fields(flags):
    value = getattr(flags, field.name)
    if dataclasses.is_dataclass(value):
      changes[field.name] = with_values(value, values)
    elif field.name in values:
      changes[field.name] = values[field.name]
  return dataclasses.replace(flags, **changes)


def flat(flags) -> dict:
  """{name: value} of every flag."""
  found = {}
  for field in dataclasses.fields(flags):
    value = getattr(flags, field.name)
    if dataclasses.is_dataclass(value):
      found |= flat(value)
    else:
      found[field.name] = value
  return found
