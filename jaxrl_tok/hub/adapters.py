"""Adapters as PEFT stores them: adapter_config.json and
adapter_model.safetensors.

Their names are those of the model's modules (models/lora.py). Settings of PEFT
that are not supported here are refused by name.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxrl_tok.models.lora import ALL_LINEAR, LoraConfig, targeted

CONFIG_FILE, WEIGHTS_FILE = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'


def _tensor(module: str, side: str) -> str:
  """Name of A or B in the file."""
  return f'{PREFIX}{module}.lora_{side.upper()}.weight'


def save(
  out: str | Path,
  lora: LoraConfig,
  adapters: dict,
  base_model: str,
  transposed: bool = True,
  task: str = 'CAUSAL_LM',
) -> Path:
  """Writes both files.

  Args:
    base_model: directory or hub id of the model that they adapt.
    transposed: the model's file stores matrices [out, in].
    task: PEFT's name of what the model does.
  """
  from safetensors.numpy import save_file

  out = Path(out)
  out.mkdir(parents=True, exist_ok=True)
  targets = list(lora.targets)
  settings = {
    'peft_type': 'LORA',
    'task_type': task,
    'base_model_name_or_path': base_model,
    'r': lora.rank,
    'lora_alpha': lora.alpha,
    'lora_dropout': 0.0,
    'target_modules': ALL_LINEAR if targets == [ALL_LINEAR] else targets,
    'fan_in_fan_out': not transposed,
    'bias': 'none',
    'inference_mode': True,
  }
  tensors = {
    _tensor(module, side): np.asarray(jax.device_get(x))
    for module, sides in adapters.items()
    for side, x in sides.items()
  }
  save_file(tensors, out / WEIGHTS_FILE, metadata={'format': 'pt'})
  (out / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + '\n')
  return out


# settings of PEFT that are not supported: {setting: its plain value}
PLAIN = {
  'bias': 'none',
  'use_dora': False,
  'use_rslora': False,
  'rank_pattern': {},
  'alpha_pattern': {},
  'modules_to_save': None,
  'layers_to_transform': None,
  'trainable_token_indices': None,
  'target_parameters': None,
}


def load_config(directory: str | Path) -> LoraConfig:
  """Reads adapter_config.json. Raises ValueError for a setting that is not
  supported."""
  file = Path(directory) / CONFIG_FILE
  try:
    found = json.loads(file.read_text('utf-8-sig'))
    kind, rank = found['peft_type'], found['r']
    alpha, targets = found['lora_alpha'], found['target_modules']
  except FileNotFoundError:
    raise FileNotFoundError(
      f'{directory} has no {CONFIG_FILE}; give a directory that PEFT or '
      'jaxrl_tok saved an adapter to'
    ) from None
  except (json.JSONDecodeError, KeyError, TypeError) as e:
    raise ValueError(f'{file} is no adapter configuration: {e}') from None
  if kind != 'LORA':
    raise ValueError(f'{file}: peft_type {kind} is not supported; only LORA')
  for name, plain in PLAIN.items():
    if (found.get(name) or plain) != plain:
      raise ValueError(f'{file}: {name} {found[name]} is not supported')
  if isinstance(targets, str) and targets != ALL_LINEAR:
    raise ValueError(
      f'{file}: target_modules {targets!r} is a pattern; list the modules'
    )
  targets = [targets] if isinstance(targets, str) else targets
  if not isinstance(targets, list) or not all(
    isinstance(target, str) for target in targets
  ):
    raise ValueError(f'{file}: target_modules {targets!r} is no list of names')
  for name, number, kinds in (
    ('r', rank, (int,)),
    ('lora_alpha', alpha, (int, float)),
  ):
    if type(number) not in kinds or number <= 0:
      raise ValueError(f'{file}: {name} {number!r} is no number above zero')
  return LoraConfig(rank, alpha, tuple(sorted(targets)))


def load(directory: str | Path, lora: LoraConfig, mappings: Sequence) -> dict:
  """Reads adapters as float32 arrays {module: {'a', 'b'}}.

  mappings: the model's ParamMapping records. Raises ValueError or
  FileNotFoundError, in one line, with the names that do not fit.
  """
  from safetensors import SafetensorError
  from safetensors.numpy import load_file

  file = Path(directory) / WEIGHTS_FILE
  if not file.is_file():
    raise FileNotFoundError(
      f'{directory} has no {WEIGHTS_FILE} (pickles are never read)'
    )
  try:
    tensors = load_file(file)
  except SafetensorError as e:
    raise ValueError(f'{file} is damaged: {e}; fetch it again') from None
  adapters, wrong = {}, []
  for module, (n_in, n_out) in targeted(mappings, lora.targets).items():
    adapters[module] = {}
    for side, shape in (('a', (lora.rank, n_in)), ('b', (n_out, lora.rank))):
      name = _tensor(module, side)
      x = tensors.pop(name, None)
      if x is None or x.shape != shape:
        has = 'missing' if x is None else list(x.shape)
        wrong.append(f'{name} is {has}, not {list(shape)}')
      else:
        adapters[module][side] = x.astype(np.float32)
  wrong += [f'{name} is of no use' for name in tensors]
  if wrong:
    raise ValueError(
      f'{file} does not fit the model: {", ".join(wrong[:5])}; use the base '
      'that it was trained on'
    )
  return adapters
