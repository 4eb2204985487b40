"""Low-rank adapters: W + (alpha / r) B A in place of W, only A and B trained.
arXiv:2106.09685.

Adapters are named, shaped and stored as PEFT does it, by the tensors of the
model's file: {module: {'a': [r, in], 'b': [out, r]}}. `make_join` adds their
products to the base where the file's tensors lie in our parameters, once for
a rollout or an update: sampling costs what the base costs, what is sampled
from, trained and exported are the same joined matrices, and it serves every
family. What it costs is the memory of these matrices while they are used. They
have the wider of the base's and the compute dtype: in bfloat16, a change
counts once it has grown to the last bit of its weight.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_tok.hub import layout
from jaxrl_tok.models.transformer import TransformerConfig

EVERYTHING = 'all-linear'
CONFIG_FILE, WEIGHTS_FILE = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """targets: ends of module names, as q_proj or mlp.c_fc; or 'all-linear'."""

  rank: int
  alpha: float
  targets: tuple = (EVERYTHING,)

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


def adaptable(config: TransformerConfig, family: layout.Family) -> dict:
  """{module: (number in, number out)} of what may have an adapter: the blocks'
  matrices, except experts and their routers."""
  found = {}
  for weight in layout.weights(config, family):
    inner = re.fullmatch(r'layer_\d+/(attention|mlp)/\w+', weight.path)
    for name, shape in weight.tensors if inner else ():
      if len(shape) == 2:
        sizes = shape[::-1] if family.transposed else shape
        found[name.removesuffix('.weight')] = sizes
  return found


def targeted(
  config: TransformerConfig, family: layout.Family, targets: tuple
) -> dict:
  """{module: (number in, number out)} of the targets. Raises ValueError for a
  target that nothing ends in, with what there is."""
  modules = adaptable(config, family)
  found = {}
  for target in targets:
    end = f'.{target}'
    hit = {
      m: n
      for m, n in modules.items()
      if target == EVERYTHING or f'.{m}'.endswith(end)
    }
    if not hit:
      ends = sorted({m.rsplit('.', 1)[-1] for m in modules})
      raise ValueError(
        f'--lora_targets {target} is the name of no matrix; this model has '
        f'{", ".join(ends)}, or give {EVERYTHING}'
      )
    found |= hit
  return found


def init(modules: dict, rank: int, key: jax.Array) -> dict:
  """Adapters that change nothing yet: A uniform in +- 1/sqrt(in), B zero."""

  def one(i, n_in, n_out):
    bound = n_in**-0.5
    a = jax.random.uniform(
      jax.random.fold_in(key, i), (rank, n_in), minval=-bound, maxval=bound
    )
    return {'a': a, 'b': jnp.zeros((n_out, rank))}

  return {m: one(i, *sizes) for i, (m, sizes) in enumerate(modules.items())}


def make_merge_params(
  config: TransformerConfig,
  family: layout.Family,
  scale: float,
  dtype='float32',
) -> Callable:
  """Returns merge(adapters, base) -> parameters of the decoder, pure; adapters
  None: those of the base.

  dtype: the compute dtype.
  """
  weights = layout.weights(config, family)

  def merge(adapters: dict | None, base):
    if adapters is None:
      return base
    flat = flax.traverse_util.flatten_dict(base, sep='/')
    for weight in weights:
      modules = [name.removesuffix('.weight') for name, _ in weight.tensors]
      if not any(m in adapters for m in modules):
        continue

      def stored(x, weight=weight):  # ours -> the file's tensors, linear
        return tuple(
          jnp.concatenate([v.reshape(-1) for v in views]).reshape(shape)
          for views, (_, shape) in zip(weight.views(x), weight.tensors)
        )

      def delta(module, shape):
        if module not in adapters:
          return jnp.zeros(shape, jnp.float32)
        a, b = adapters[module]['a'], adapters[module]['b']
        return scale * (b @ a if family.transposed else (b @ a).T)

      leaf = flat[weight.path]
      like = jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
      deltas = tuple(
        delta(m, shape) for m, (_, shape) in zip(modules, weight.tensors)
      )
      # every number of ours is one of the file's: the transpose of reading it
      # out puts it back
      (added,) = jax.linear_transpose(stored, like)(deltas)
      joined = leaf.astype(jnp.float32) + added
      wider = jnp.promote_types(leaf.dtype, dtype)
      flat[weight.path] = joined.astype(wider)
    return flax.traverse_util.unflatten_dict(flat, sep='/')

  return merge


# --- PEFT's files ------------------------------------------------------------


def save(
  out: str | Path, lora: LoraConfig, adapters: dict, family, base_model: str
) -> Path:
  """Writes adapter_config.json and adapter_model.safetensors."""
  from safetensors.numpy import save_file

  out = Path(out)
  out.mkdir(parents=True, exist_ok=True)
  targets = list(lora.targets)
  hf_config = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base_model,
    'r': lora.rank,
    'lora_alpha': lora.alpha,
    'lora_dropout': 0.0,
    'target_modules': EVERYTHING if targets == [EVERYTHING] else targets,
    'fan_in_fan_out': not family.transposed,
    'bias': 'none',
    'inference_mode': True,
  }
  tensors = {
    f'{PREFIX}{module}.lora_{side.upper()}.weight': np.asarray(
      jax.device_get(x)
    )
    for module, sides in adapters.items()
    for side, x in sides.items()
  }
  save_file(tensors, out / WEIGHTS_FILE, metadata={'format': 'pt'})
  (out / CONFIG_FILE).write_text(json.dumps(hf_config, indent=2) + '\n')
  return out


# what PEFT can say and we do not do: {setting: its plain value}
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
  """adapter_config.json as a LoraConfig; ValueError for what we do not do."""
  file = Path(directory) / CONFIG_FILE
  try:
    found = json.loads(file.read_text())
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
  if isinstance(targets, str) and targets != EVERYTHING:
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


def load(
  directory: str | Path,
  lora: LoraConfig,
  config: TransformerConfig,
  family: layout.Family,
) -> dict:
  """Adapters as float32 arrays; every fault of the file by name."""
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
  for module, (n_in, n_out) in targeted(config, family, lora.targets).items():
    adapters[module] = {}
    for side, shape in (('a', (lora.rank, n_in)), ('b', (n_out, lora.rank))):
      name = f'{PREFIX}{module}.lora_{side.upper()}.weight'
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
