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
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import jinja2

from jaxrl_tok.hub import families, fetch
from jaxrl_tok.hub.model import Model
from jaxrl_tok.hub.weights import (
  SHARD_BYTES,
  check_tensors,
  stored_tensors,
  write_weights,
)

# transformers is imported for its tokenizers; it advises on torch otherwise
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')

CARD = Path(__file__).with_name('card.md.jinja')
GENERIC = 'PreTrainedTokenizerFast', 'TokenizersBackend'
VOCABULARIES = 'tokenizer.json', 'tokenizer.model', 'vocab.json', 'vocab.txt'


def versions() -> dict[str, str]:
  """{package: version} of the packages that a result depends on."""
  names = ('jaxrl_tok', 'jax', 'flax', 'optax', 'orbax-checkpoint')
  return {name: metadata.version(name) for name in names}


# --- reading -----------------------------------------------------------------


def _read_json(path: Path) -> dict:
  """Reads a JSON object. Raises ValueError, in one line, for anything else."""
  try:
    found = json.loads(path.read_text())
  except (ValueError, RecursionError) as e:  # not UTF-8; too deep, too long
    raise ValueError(f'{path}: not JSON ({e}); fetch it again') from None
  if not isinstance(found, dict):
    raise ValueError(
      f'{path}: a {type(found).__name__}, not an object; fetch it again'
    )
  return found


def _read_tokenizer(directory: Path, vocab_size: int):
  """Reads the tokenizer, runs no code of its own. Raises ValueError, in one
  line, where there is none or it has more ids than the model has rows."""
  from transformers import AutoTokenizer, PreTrainedTokenizerFast

  # without any, transformers makes an empty tokenizer of some families
  if not any((directory / name).is_file() for name in VOCABULARIES):
    raise ValueError(
      f'no tokenizer files ({", ".join(VOCABULARIES)}); put those of the model '
      'there'
    )
  settings = directory / 'tokenizer_config.json'
  named = settings.is_file() and _read_json(settings).get('tokenizer_class')
  # for some families AutoTokenizer takes a class that rewrites tokenizer.json,
  # even where the generic one is named
  kind = PreTrainedTokenizerFast if named in GENERIC else AutoTokenizer
  try:
    tokenizer = kind.from_pretrained(
      directory, local_files_only=True, trust_remote_code=False
    )
  except Exception as e:  # many kinds, with pages of advice
    said = ' '.join(str(e).split())[:200]
    raise ValueError(
      f'no tokenizer could be read ({said}); put the tokenizer files of the '
      'model there'
    ) from None
  # ids of added tokens may lie beyond: a prompt that has one is refused
  if tokenizer.vocab_size > vocab_size:
    raise ValueError(
      f'the tokenizer has {tokenizer.vocab_size} ids and the model '
      f'{vocab_size} rows; use the tokenizer that belongs to the model'
    )
  return tokenizer


def special_tokens(
  directory: Path, hf_config: dict, tokenizer, vocab_size: int
):
  """(end ids, pad id): generation_config.json's, else config.json's, else the
  tokenizer's.

  A pad that is missing or no row of the model is the first end: the mask is
  recorded, so pad may equal end. Raises ValueError for an end that is no row.
  """
  file = directory / 'generation_config.json'
  generation = _read_json(file) if file.is_file() else {}

  def first(name, fallback):
    for source in (generation, hf_config):
      if source.get(name) is not None:
        return source[name]
    return fallback

  ends = first('eos_token_id', tokenizer.eos_token_id)
  ends = tuple(ends) if isinstance(ends, list) else (ends,)
  if not ends or None in ends:
    raise ValueError(
      'no end token in generation_config.json, config.json or the tokenizer; '
      'add eos_token_id'
    )
  pad = first('pad_token_id', tokenizer.pad_token_id)
  for i in ends:
    if not _is_row(i, vocab_size):
      raise ValueError(
        f'end token {i!r} is none of the {vocab_size} ids of the model; '
        'correct it in generation_config.json or config.json'
      )
  return ends, pad if _is_row(pad, vocab_size) else ends[0]


def _is_row(i, vocab_size: int) -> bool:
  return type(i) is int and 0 <= i < vocab_size


def open_model(
  model: str | Path,
  revision: str | None = None,
  value_head: bool = False,
  weights: bool = True,
) -> Model:
  """Reads and checks a directory or a hub id of a supported family.

  Args:
    model: directory with config.json, safetensors and tokenizer files, or id.
    revision: a branch, tag or commit of the hub.
    value_head: give it one where it has none (a critic from a policy).
    weights: False: a directory that may be without them.

  Raises ValueError, FileNotFoundError or ConnectionError, in one line with the
  cure, for an unknown architecture, a pickle, missing, extra, misshapen or
  truncated weights, code of its own, a tokenizer of another model.
  """
  directory = fetch.locate(str(model), revision, weights=False)
  if not (directory / 'config.json').is_file():
    raise FileNotFoundError(
      f'{directory} is no model directory (no config.json); '
      'pass --model a directory or hub id of a supported family: '
      f'{", ".join(families.FAMILIES)}'
    )
  hf_config = _read_json(directory / 'config.json')
  try:
    config = families.read_config(hf_config)
    tokenizer = _read_tokenizer(directory, config.vocab_size)
    ends, pad = special_tokens(
      directory, hf_config, tokenizer, config.vocab_size
    )
    found = Model(
      config, hf_config, tokenizer, ends, pad, str(model), directory
    )
    if value_head and not config.value_head:
      found = found.with_value_head()
    if weights:
      stored = stored_tensors(fetch.locate(str(model), revision))
      found = found._replace(tensors=check_tensors(found, stored))
  except ValueError as e:
    said = str(e)
    here = said.startswith(str(directory))
    raise ValueError(said if here else f'{directory}: {said}') from None
  return found


# --- writing -----------------------------------------------------------------


def write_description(out: Path, model: Model, dtype: str | None = None):
  """Writes config.json, generation_config.json and the tokenizer."""
  hf_config = dict(model.hf_config)
  if dtype:
    old = 'torch_dtype' in hf_config and 'dtype' not in hf_config
    hf_config['torch_dtype' if old else 'dtype'] = dtype
  files = {'config.json': hf_config}
  if model.directory is None:
    ends = list(map(int, model.end_tokens))
    ids = {
      'eos_token_id': ends if len(ends) > 1 else ends[0],
      'pad_token_id': int(model.pad_token),
    }
    hf_config |= ids
    files['generation_config.json'] = {**ids, 'do_sample': True}
    model.tokenizer.save_pretrained(out)
  else:
    for pattern in fetch.COMPANIONS:
      for file in model.directory.glob(pattern):
        shutil.copyfile(file, out / file.name)
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
) -> Path:
  """Writes the directory; it appears whole or not at all.

  card: title, base_model, data, algorithm (text) and metrics (a dict).
  """
  with atomic_directory(out, replace) as part:
    write_weights(part, model, params, shard_bytes)
    widest = jnp.result_type(*(x.dtype for x in jax.tree.leaves(params)))
    write_description(part, model, str(widest))
    write_card(part, card)
  return Path(out)
