"""Hugging Face directories of a model: in, out, and back in, bitwise.

1. `open_model` reads everything but the weights' bytes and checks it all:
   configuration, tensor names and shapes, tokenizer, end and pad ids.
2. `read_params` (weights.py) brings the bytes straight to their devices.
3. `save` writes the names, shapes and configuration keys that it came with;
   files of the tokenizer are copied.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import jinja2

from jaxrl_tok import processes
from jaxrl_tok.hub import families, fetch, gguf
from jaxrl_tok.hub.model import Model
from jaxrl_tok.hub.seq2seq_families import with_generation
from jaxrl_tok.hub.tokenizer import (
  GENERATION,
  has_tokenizer,
  listed,
  name_class,
  pad_notes,
  read_tokenizer,
  special_tokens,
)
from jaxrl_tok.hub.tokenizer_settings import read_if_there, read_json
from jaxrl_tok.hub.weights import (
  SHARD_BYTES,
  check_tensors,
  stored_tensors,
  write_weights,
)
from jaxrl_tok.report import mirror

CARD = Path(__file__).with_name('card.md.jinja')


def versions() -> dict[str, str]:
  """{package: version} of the packages that a result depends on."""
  names = ('jaxrl_tok', 'jax', 'flax', 'optax', 'orbax-checkpoint')
  return {name: metadata.version(name) for name in names}


# --- reading -----------------------------------------------------------------


def open_model(
  model: str | Path,
  revision: str | None = None,
  value_head: bool = False,
  weights: bool = True,
  tokenizer: Callable | None = None,
) -> Model:
  """Reads and checks a directory, a GGUF file or a hub id of a supported
  family.

  Args:
    model: directory with config.json, safetensors and tokenizer files; a GGUF
      file; pip:PACKAGE that holds one; or hub id.
    revision: a branch, tag or commit of the hub.
    value_head: give it one where it has none (a critic from a policy).
    weights: False: a directory that may be without them.
    tokenizer: () -> tokenizer of a directory that has none; None: refuse it.

  Raises ValueError, FileNotFoundError or ConnectionError, in one line with the
  cure, for an unknown architecture, a pickle, missing, extra, misshapen or
  truncated weights, code of its own, a tokenizer of another model.
  """
  place = fetch.locate(str(model), revision, weights=False)
  directory = gguf.read(place).directory if place.is_file() else place
  if not (directory / 'config.json').is_file():
    files = sorted(filter(fetch.is_gguf, directory.glob('*')))
    cure = (
      f'pass --model {files[0]}'
      if files
      else 'pass --model a directory or hub id of a supported family: '
      f'{", ".join(families.FAMILIES)}'
    )
    raise FileNotFoundError(
      f'{directory} is no model directory (no config.json); {cure}'
    )
  hf_config = read_json(directory / 'config.json')
  try:
    generation = read_if_there(directory / GENERATION)
    config = families.read_config(with_generation(hf_config, generation))
    if tokenizer is None or has_tokenizer(directory):
      tokenizer, notes = read_tokenizer(directory, config.vocab_size)
    else:
      tokenizer, notes = tokenizer(), ('no tokenizer files: texts are bytes',)
    ends, pad = special_tokens(
      directory, hf_config, tokenizer, config.vocab_size
    )
    found = Model(
      config,
      hf_config,
      tokenizer,
      ends,
      pad,
      str(model),
      directory,
      notes=(*notes, *pad_notes(tokenizer, pad, ends)),
    )
    if value_head and not config.value_head:
      found = found.with_value_head()
    if weights:
      stored = stored_tensors(fetch.locate(str(model), revision))
      found = found._replace(tensors=check_tensors(found, stored))
  except ValueError as e:
    said = str(e)
    here = said.startswith((str(directory), str(place)))
    raise ValueError(said if here else f'{place}: {said}') from None
  return found


# --- writing -----------------------------------------------------------------


def write_description(out: Path, model: Model, dtype: str | None = None):
  """Writes config.json, generation_config.json and the tokenizer."""
  hf_config = dict(model.hf_config)
  if dtype:
    old = 'torch_dtype' in hf_config and 'dtype' not in hf_config
    hf_config['torch_dtype' if old else 'dtype'] = dtype
  files = {'config.json': hf_config}
  ends = list(map(int, model.end_tokens))
  eos = {'eos_token_id': ends if len(ends) > 1 else ends[0]}
  if model.directory is None:
    pad = hf_config.get('pad_token_id', int(model.pad_token))
    ids = eos | {'pad_token_id': pad}
    hf_config |= ids
    if model.config.lm_head:
      files[GENERATION] = {**ids, 'do_sample': True}
    model.tokenizer.save_pretrained(out)
  else:
    for pattern in fetch.COMPANIONS:
      for file in model.directory.glob(pattern):
        copy = out / file.relative_to(model.directory)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    generation = read_if_there(model.directory / GENERATION)
    used = (generation or hf_config).get('eos_token_id')
    if model.config.lm_head and set(listed(used)) != set(ends):
      files[GENERATION] = generation | eos  # whoever samples ends as we did
  for name, content in files.items():
    (out / name).write_text(json.dumps(content, indent=2) + '\n')


def write_card(out: Path, card: dict | None, library='transformers') -> None:
  """Writes README.md, the model card. Fields as in `save`."""
  fields = {
    'title': out.name.removesuffix('.partial'),
    'base_model': None,
    'data': 'not recorded',
    'algorithm': 'not recorded',
    'metrics': {},
    'kind': 'policy',
    'auto_tokenizer': True,
    **(card or {}),
  }
  template = jinja2.Template(CARD.read_text(), keep_trailing_newline=True)
  text = template.render(
    versions=versions(),
    library=library,
    on_hub=fetch.is_hub_id(str(fields['base_model'])),
    **fields,
  )
  (out / 'README.md').write_text(text)


@contextlib.contextmanager
def atomic_directory(out: str | Path, replace: bool = False):
  """Yields a directory to write to, which becomes `out` whole or not at all.

  replace: an `out` that is there goes when the new one is whole.
  """
  mirror.check_local(out, 'the directory')
  out = Path(out)
  if out.exists() and not replace:
    raise FileExistsError(f'{out} exists; give another directory')
  part = out.with_name(out.name + '.partial')
  shutil.rmtree(part, ignore_errors=True)  # a save that was killed left it
  part.mkdir(parents=True)
  try:
    yield part
    shutil.rmtree(out, ignore_errors=True)
    os.replace(part, out)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def save(
  out: str | Path,
  model: Model,
  params,
  card: dict | None = None,
  shard_bytes: int = SHARD_BYTES,
  replace: bool = False,
  part_of: Callable | None = None,
) -> Path:
  """Writes the directory; it appears whole or not at all.

  Args:
    card: title, base_model, data, algorithm, kind (text) and metrics (a dict).
    part_of: as write_weights takes it.

  Every process must call it; process 0 writes.
  """
  if not processes.is_main():
    write_weights(None, model, params, shard_bytes, part_of)
    return Path(out)
  with atomic_directory(out, replace) as part:
    write_weights(part, model, params, shard_bytes, part_of)
    widest = jnp.result_type(*(x.dtype for x in jax.tree.leaves(params)))
    write_description(part, model, str(widest))
    write_card(part, {**(card or {}), 'auto_tokenizer': name_class(part)})
  return Path(out)
