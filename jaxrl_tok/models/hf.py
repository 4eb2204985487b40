"""A policy as a Hugging Face directory, out and back in, bitwise.

model.safetensors        weights, under the family's names
config.json              sizes
generation_config.json   end and pad ids
tokenizer files          as transformers saves them
README.md                the model card
"""

import json
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import flax.traverse_util
import jax
import jinja2
import numpy as np

from jaxrl_tok.models import families
from jaxrl_tok.models.transformer import TransformerConfig

# tokenizers are all that we want of it; it advises on torch at import
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')

CARD = jinja2.Template(
  """---
library_name: transformers
tags: [jaxrl_tok, reinforcement-learning]
{%- if base_model %}
base_model: {{ base_model }}
{%- endif %}
---

# {{ title }}

A policy trained with [jaxrl_tok]: reinforcement learning of language models
on tokens.

| | |
|---|---|
| base model | {{ base_model or 'none: trained from random weights' }} |
| data | {{ data }} |
| algorithm | {{ algorithm }} |
{%- for name, value in metrics.items() %}
| {{ name }} | {{ value }} |
{%- endfor %}
{%- for name, value in versions.items() %}
| {{ name }} | {{ value }} |
{%- endfor %}

## Limits and safety

The policy was optimised for one reward on one distribution of prompts. It may
exploit flaws of that reward, has learnt nothing about other prompts, and has
not been examined for harmful output. Judge it on your own data before use.
""",
  keep_trailing_newline=True,
)


class Loaded(NamedTuple):
  config: TransformerConfig
  params: dict  # numpy, as in the file
  tokenizer: object
  end_tokens: tuple
  pad_token: int


def versions() -> dict[str, str]:
  names = ('jaxrl_tok', 'jax', 'flax', 'optax', 'orbax-checkpoint')
  return {name: metadata.version(name) for name in names}


def to_tensors(config: TransformerConfig, params, family) -> dict:
  """Our parameters -> {name in the file: contiguous numpy array}."""
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  tensors = {}
  for weight in family.weights(config):
    array = np.asarray(jax.device_get(flat.pop(weight.path)))
    for name, tensor in zip(weight.names, weight.unpack(array)):
      tensors[name] = np.ascontiguousarray(tensor)
  if flat:
    raise ValueError(f'no place in the file for {", ".join(sorted(flat))}')
  return tensors


def from_tensors(config: TransformerConfig, tensors: dict, family, shapes):
  """{name: array} -> parameters of the given shapes; every fault by name."""
  tensors = dict(tensors)
  flat = {}
  for weight in family.weights(config):
    missing = [name for name in weight.names if name not in tensors]
    if missing:
      raise ValueError(f'weights are missing: {", ".join(missing)}')
    parts = [tensors.pop(name) for name in weight.names]
    # in the file's shapes: a reshape would take a transposed k_proj
    wanted = weight.unpack(np.empty(shapes[weight.path].shape, bool))
    wrong = [
      f'{name} is {list(part.shape)}, not {list(want.shape)}'
      for name, part, want in zip(weight.names, parts, wanted)
      if part.shape != want.shape
    ]
    if wrong:
      raise ValueError(
        f'weights do not fit config.json: {", ".join(wrong)}; use the files '
        'of one model'
      )
    flat[weight.path] = weight.pack(*parts)
  if config.tie_embeddings:  # some files repeat the tied head
    tensors.pop('lm_head.weight', None)
  if tensors:
    raise ValueError(f'weights of no use: {", ".join(sorted(tensors))}')
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def save(
  out: str | Path,
  config: TransformerConfig,
  params,
  tokenizer,
  end_tokens,
  pad_token: int,
  card: dict | None = None,
  family: str = 'qwen2',
) -> Path:
  """Writes the directory; it appears whole or not at all.

  card: title, base_model, data, algorithm (text) and metrics (a dict).
  """
  from safetensors.numpy import save_file

  out = Path(out)
  if out.exists():
    raise FileExistsError(f'{out} exists; give another directory')
  entry = families.FAMILIES[family]
  tensors = to_tensors(config, params, entry)
  part = out.with_name(out.name + '.partial')
  shutil.rmtree(part, ignore_errors=True)  # of a save that was killed
  part.mkdir(parents=True)
  save_file(tensors, part / 'model.safetensors', metadata={'format': 'pt'})
  dtype = str(next(iter(tensors.values())).dtype)
  ends = list(map(int, end_tokens))
  described = {
    'architectures': [entry.architecture],
    'model_type': entry.model_type,
    'dtype': dtype,
    'eos_token_id': ends if len(ends) > 1 else ends[0],
    'pad_token_id': int(pad_token),
    **entry.write(config),
  }
  generation = {k: described[k] for k in ('eos_token_id', 'pad_token_id')}
  generation['do_sample'] = True
  for name, content in (
    ('config.json', described),
    ('generation_config.json', generation),
  ):
    (part / name).write_text(json.dumps(content, indent=2) + '\n')
  tokenizer.save_pretrained(part)
  fields = {
    'title': out.name,
    'base_model': None,
    'data': 'not recorded',
    'algorithm': 'not recorded',
    'metrics': {},
    **(card or {}),
  }
  (part / 'README.md').write_text(CARD.render(versions=versions(), **fields))
  os.replace(part, out)
  return out


def _read_json(path: Path) -> dict:
  try:
    found = json.loads(path.read_text())
  except json.JSONDecodeError as e:
    raise ValueError(f'{path}: not JSON ({e.msg}, line {e.lineno})') from None
  if not isinstance(found, dict):
    raise ValueError(f'{path}: a {type(found).__name__}, not an object')
  return found


def load(directory: str | Path, shapes_of) -> Loaded:
  """Reads a directory that holds a supported family.

  Args:
    directory: with config.json, model.safetensors and tokenizer files.
    shapes_of: TransformerConfig -> parameter shapes, to check against.

  Raises ValueError or FileNotFoundError, with the cure, for an unknown
  architecture, a pickle, missing, extra, misshapen or truncated weights.
  """
  from safetensors import SafetensorError
  from safetensors.numpy import load_file
  from transformers import AutoTokenizer

  directory = Path(directory)
  if not (directory / 'config.json').is_file():
    raise FileNotFoundError(
      f'{directory} is no model directory (no config.json); '
      'pass --model a directory that save made, or a Qwen2 download'
    )
  described = _read_json(directory / 'config.json')
  if described.get('auto_map'):
    raise ValueError(
      f'{directory}: config.json asks for code of its own (auto_map), which '
      'is never run'
    )
  family = families.family_of(described, str(directory))
  try:
    config = family.read(described)
  except KeyError as e:
    raise ValueError(f'{directory}: config.json has no {e}') from None
  except ValueError as e:
    raise ValueError(f'{directory}: {e}') from None
  file = directory / 'model.safetensors'
  if not file.is_file():
    raise FileNotFoundError(
      f'{directory} has no model.safetensors; convert the weights to a single '
      'safetensors file (pickles are never read)'
    )
  try:
    tensors = load_file(file)
  except SafetensorError as e:
    raise ValueError(f'{file} is damaged: {e}; fetch it again') from None
  shapes = flax.traverse_util.flatten_dict(shapes_of(config), sep='/')
  try:
    params = from_tensors(config, tensors, family, shapes)
  except ValueError as e:
    raise ValueError(f'{directory}: {e}') from None
  tokenizer = AutoTokenizer.from_pretrained(
    directory, local_files_only=True, trust_remote_code=False
  )
  ends, pad = special_tokens(directory, described, tokenizer)
  for name, ids in (('end', ends), ('pad', (pad,))):
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
      raise ValueError(
        f'{directory}: {name} token {max(ids)} is beyond the '
        f'{config.vocab_size} rows of the model'
      )
  return Loaded(config, params, tokenizer, ends, pad)


def special_tokens(directory: Path, described: dict, tokenizer):
  """(end ids, pad id): generation_config.json's, else config.json's, else the
  tokenizer's. A missing pad is the first end: the mask is recorded, so pad
  may equal end."""
  file = directory / 'generation_config.json'
  generation = _read_json(file) if file.is_file() else {}

  def first(name, fallback):
    for source in (generation, described):
      if source.get(name) is not None:
        return source[name]
    return fallback

  ends = first('eos_token_id', tokenizer.eos_token_id)
  ends = tuple(ends) if isinstance(ends, list) else (ends,)
  if not ends or None in ends:
    raise ValueError(
      f'{directory}: no end token in generation_config.json, config.json or '
      'the tokenizer; add eos_token_id'
    )
  pad = first('pad_token_id', tokenizer.pad_token_id)
  return ends, ends[0] if pad is None else pad
