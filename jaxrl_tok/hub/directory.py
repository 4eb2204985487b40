"""A model as a Hugging Face directory: in, out, and back in, bitwise.

1. `open_model` reads everything but the weights' bytes and checks it all:
   configuration, tensor names and shapes, tokenizer, end and pad ids.
2. `read_params` (weights.py) brings the bytes straight to their devices.
3. `save` writes the same names, shapes and configuration keys; what belongs to
   the tokenizer is copied.

  python -m jaxrl_tok.hub.directory export RUN_DIR OUT_DIR [--step N]
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import jinja2

from jaxrl_tok.hub import families, lora
from jaxrl_tok.hub import fetch as hub
from jaxrl_tok.hub.weights import (
  SHARD_BYTES,
  Model,
  check_tensors,
  param_structs,
  read_params,
  stored_tensors,
  write_weights,
)

# tokenizers are all that we want of it; it advises on torch at import
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')

CARD = Path(__file__).with_name('card.md.jinja')
GENERIC = 'PreTrainedTokenizerFast', 'TokenizersBackend'
VOCABULARIES = 'tokenizer.json', 'tokenizer.model', 'vocab.json', 'vocab.txt'


def versions() -> dict[str, str]:
  names = ('jaxrl_tok', 'jax', 'flax', 'optax', 'orbax-checkpoint')
  return {name: metadata.version(name) for name in names}


# --- in: everything but the bytes --------------------------------------------


def _read_json(path: Path) -> dict:
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
  from transformers import AutoTokenizer, PreTrainedTokenizerFast

  # without any, transformers makes an empty tokenizer of some families
  if not any((directory / name).is_file() for name in VOCABULARIES):
    raise ValueError(
      f'no tokenizer files ({", ".join(VOCABULARIES)}); put those of the model '
      'there'
    )
  settings = directory / 'tokenizer_config.json'
  named = settings.is_file() and _read_json(settings).get('tokenizer_class')
  # of some families AutoTokenizer takes a class that rewrites tokenizer.json,
  # even where the generic one is named
  kind = PreTrainedTokenizerFast if named in GENERIC else AutoTokenizer
  try:
    tokenizer = kind.from_pretrained(
      directory, local_files_only=True, trust_remote_code=False
    )
  except Exception as e:  # of many kinds, with pages of advice
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
  tokenizer's. A pad that is missing or no row of the model is the first end:
  the mask is recorded, so pad may equal end. ValueError for an end that is no
  row."""
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


def with_value_head(model: Model) -> Model:
  """The model with a value head: of a policy, a critic."""
  return model._replace(
    config=dataclasses.replace(model.config, value_head=True),
    hf_config=model.hf_config | {'jaxrl_tok_value_head': True},
  )


def open_model(
  model: str | Path,
  revision: str | None = None,
  value_head: bool = False,
  weights: bool = True,
) -> Model:
  """Reads and checks a directory or a hub id of a supported family.

  Args:
    model: directory with config.json, safetensors and tokenizer files, or id.
    revision: of the hub: a branch, tag or commit.
    value_head: give it one where it has none (a critic from a policy).
    weights: False: a directory that may be without them.

  Raises ValueError, FileNotFoundError or ConnectionError, in one line with the
  cure, for an unknown architecture, a pickle, missing, extra, misshapen or
  truncated weights, code of its own, a tokenizer of another model.
  """
  directory = hub.locate(str(model), revision, weights=False)
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
      found = with_value_head(found)
    if weights:
      stored = stored_tensors(hub.locate(str(model), revision))
      found = found._replace(tensors=check_tensors(found, stored))
  except ValueError as e:
    said = str(e)
    here = said.startswith(str(directory))
    raise ValueError(said if here else f'{directory}: {said}') from None
  return found


# --- out ---------------------------------------------------------------------


def write_description(out: Path, model: Model, dtype: str | None = None):
  """config.json, generation_config.json and the tokenizer: all but weights."""
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
    for pattern in hub.COMPANIONS:
      for file in model.directory.glob(pattern):
        shutil.copyfile(file, out / file.name)
  for name, content in files.items():
    (out / name).write_text(json.dumps(content, indent=2) + '\n')


def write_card(out: Path, card: dict | None, library='transformers') -> None:
  """README.md: the model card. Fields as in `save`."""
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
    on_hub=hub.is_hub_id(str(fields['base_model'])),
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
  shutil.rmtree(part, ignore_errors=True)  # of a save that was killed
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


# --- a run's checkpoint, later -----------------------------------------------


def _restored_params(run_dir: Path, step: int | None, like):
  """(step, the `params` of a checkpoint), on the first device."""
  import orbax.checkpoint as ocp

  manager = ocp.CheckpointManager(
    run_dir.absolute() / 'checkpoints',
    options=ocp.CheckpointManagerOptions(read_only=True),
  )
  steps = sorted(manager.all_steps())
  if not steps or (step is not None and step not in steps):
    raise ValueError(
      f'{run_dir} has no checkpoint{"" if step is None else f" of step {step}"}'
      f'; there are: {", ".join(map(str, steps)) or "none"}'
    )
  step = steps[-1] if step is None else step
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  tree = {
    'params': jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like
    )
  }
  restoring = ocp.args.PyTreeRestore(
    tree,
    restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
    partial_restore=True,
  )
  try:
    found = manager.restore(step, args=ocp.args.Composite(state=restoring))
  except Exception as e:  # of many kinds, with pages of advice
    said = ' '.join(str(e).split())[:200]
    raise ValueError(
      f'checkpoint {step} of {run_dir} cannot be read ({said}); pass another '
      f'--step of {", ".join(map(str, steps))}'
    ) from None
  return step, found.state['params']


def _model_of_run(run_dir: Path, flags: dict) -> Model:
  """The model that a run began with, or else what the run kept of it."""
  if flags['model'] is not None:
    try:  # it knows the names that its tensors came with
      return open_model(flags['model'], flags['model_commit'])
    except (ValueError, OSError):
      if flags['adapter'] is not None:
        raise
  if not (run_dir / 'model').is_dir():
    raise FileNotFoundError(f'{run_dir} has no model; give a newer run')
  return open_model(run_dir / 'model', weights=False)


# what config.yaml must say of a run
RUN_SETTINGS = (
  'model',
  'model_commit',
  'adapter',
  'param_dtype',
  'compute_dtype',
  'data',
  'algorithm',
  'value_head',
)


def export_run(
  run_dir: str | Path, out: str | Path, step: int | None = None
) -> Path:
  """A checkpoint of a run as a Hugging Face directory.

  Adapters are joined to the model that the run began with, which must still
  be where it was. step: None: the newest.
  """
  import yaml

  run_dir = Path(run_dir)
  file = run_dir / 'config.yaml'
  if not file.is_file():
    raise FileNotFoundError(f'{run_dir} is no run directory (no config.yaml)')
  if Path(out).exists():
    raise FileExistsError(f'{out} exists; give another directory')
  try:
    flags = dict(yaml.safe_load(file.read_text()))
  except (yaml.YAMLError, TypeError, ValueError):
    raise ValueError(f'{file}: no flags of a run; give its directory') from None
  missing = [name for name in RUN_SETTINGS if name not in flags]
  if missing:
    raise ValueError(f'{file} has no {", ".join(missing)}; give a newer run')
  model = _model_of_run(run_dir, flags)
  if flags['value_head'] and not model.config.value_head:
    model = with_value_head(model)
  asked = flags['param_dtype']
  dtype = None if asked == 'auto' else asked
  if flags['adapter'] is None:
    like = param_structs(model, dtype or 'float32')
    step, params = _restored_params(run_dir, step, like)
  else:
    adapter = lora.LoraConfig(**flags['adapter'])
    modules = lora.targeted(model.config, model.family, adapter.targets)
    like = jax.eval_shape(
      lambda key: lora.init(modules, adapter.rank, key), jax.random.key(0)
    )
    step, adapters = _restored_params(run_dir, step, like)
    merge_params = lora.make_merge_params(
      model.config, model.family, adapter.scale, flags['compute_dtype']
    )
    params = jax.jit(merge_params)(adapters, read_params(model, dtype=dtype))
  card = {
    'title': Path(out).name,
    'base_model': flags['model'],
    'data': flags['data'],
    'algorithm': flags['algorithm'],
    'metrics': {'steps': step},
  }
  return save(out, model, params, card)


def main(argv=None) -> None:
  parser = argparse.ArgumentParser(
    'python -m jaxrl_tok.hub.directory', description=export_run.__doc__
  )
  parser.add_argument('command', choices=['export'])
  parser.add_argument('run_dir')
  parser.add_argument('out_dir')
  parser.add_argument('--step', type=int, help='default: the newest')
  parser.add_argument('--push_to_hub', metavar='OWNER/NAME')
  given = parser.parse_args(argv)
  try:
    if given.push_to_hub:
      hub.push_token()
    print(export_run(given.run_dir, given.out_dir, given.step))
    if given.push_to_hub:
      print(hub.push(given.out_dir, given.push_to_hub))
  except (ValueError, OSError) as e:
    print(f'error: {e}', file=sys.stderr)
    raise SystemExit(2) from None


if __name__ == '__main__':
  main()
