"""A model as a Hugging Face directory: in, out, and back in, bitwise.

1. `open_model` reads everything but the weights' bytes and checks it all:
   configuration, tensor names and shapes, tokenizer, end and pad ids.
2. `read_params` reads each tensor once, in pieces, into one of our parameters
   and places that on its devices by its sharding: beyond what is placed, host
   memory holds one parameter and one piece.
3. `save` writes the same names, shapes and configuration keys; what belongs to
   the tokenizer is copied.

  python -m jaxrl_tok.models.hf export RUN_DIR OUT_DIR [--step N]
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import os
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jinja2
import numpy as np

from jaxrl_tok import sharding
from jaxrl_tok.models import families, hub, lora
from jaxrl_tok.models.transformer import (
  PARTITION_RULES,
  TransformerConfig,
  make_policy,
)

# tokenizers are all that we want of it; it advises on torch at import
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')

CARD = Path(__file__).with_name('card.md.jinja')
READ_BYTES = 16 * 2**20  # of a tensor, at a time
SHARD_BYTES = 5 * 10**9  # of a file
DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
VALUE_HEAD = 'v_head.weight'
GENERIC = 'PreTrainedTokenizerFast', 'TokenizersBackend'
VOCABULARIES = 'tokenizer.json', 'tokenizer.model', 'vocab.json', 'vocab.txt'


class Model(NamedTuple):
  """A model as its directory describes it, without its weights."""

  config: TransformerConfig
  described: dict  # config.json
  tokenizer: Any
  end_tokens: tuple
  pad_token: int
  origin: str  # hub id or directory; 'random weights'
  directory: Path | None = None  # None: random weights
  tensors: dict = {}  # noqa: RUF012  {name: Stored}; read only

  @property
  def family(self) -> families.Family:
    return families.family_of(self.described)


class Stored(NamedTuple):
  """A tensor in a file."""

  file: Path
  name: str  # in the file; some files leave out the family's first word
  shape: tuple
  dtype: str


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


@contextlib.contextmanager
def _opened(file: Path):
  from safetensors import SafetensorError, safe_open

  try:
    with safe_open(file, 'np') as opened:
      yield opened
  except SafetensorError as e:
    raise ValueError(f'{file} is damaged: {e}; fetch it again') from None


def _stored_tensors(directory: Path) -> dict[str, Stored]:
  """The tensors of model.safetensors, or of the shards that an index names."""
  single, index = directory / hub.SINGLE, directory / hub.INDEX
  if single.is_file():
    files = [single]
  elif index.is_file():
    files = sorted(directory / f for f in set(hub.weight_map(index).values()))
  else:
    raise FileNotFoundError(
      f'{directory} has no {hub.SINGLE} and no {hub.INDEX}; convert the '
      'weights to safetensors (pickles are never read)'
    )
  found = {}
  for file in files:
    if not file.is_file():
      raise FileNotFoundError(
        f'{index} names {file.name}, which is missing; fetch it again'
      )
    with _opened(file) as opened:
      for name in opened.keys():  # noqa: SIM118  it is no dict
        part = opened.get_slice(name)
        dtype = part.get_dtype()
        found[name] = Stored(file, name, tuple(part.get_shape()), dtype)
  return found


def _check_tensors(model: Model, stored: dict) -> dict[str, Stored]:
  """{the family's name: Stored} of what the decoder needs; else ValueError.

  A missing value head is no fault: it begins at zero.
  """
  family, base = model.family, model.family.names['base']
  if not any(name.startswith(base) for name in stored):
    # some files hold the decoder without its head, one level up
    heads = (family.names['head'], 'score', 'v_head')
    stored = {
      name if name.startswith(heads) else base + name: s
      for name, s in stored.items()
    }
  found, missing, wrong = {}, [], []
  for weight in families.weights(model.config, family):
    for name, shape in weight.tensors:
      if name not in stored:
        missing.append(name)
      elif stored[name].shape != shape:
        wrong.append(f'{name} is {list(stored[name].shape)}, not {list(shape)}')
      elif stored[name].dtype not in DTYPES:
        wrong.append(
          f'{name} is {stored[name].dtype}, not {" or ".join(DTYPES)}'
        )
      else:
        found[name] = stored[name]
  missing = [name for name in missing if name != VALUE_HEAD]
  if missing:
    raise ValueError(
      f'weights are missing: {_some(missing)}; use the files of one model'
    )
  if wrong:
    raise ValueError(
      f'weights do not fit config.json: {_some(wrong)}; use the files of one '
      'model'
    )
  spare = {VALUE_HEAD}
  if model.config.tie_embeddings:  # some files repeat the tied head
    spare.add(f'{family.names["head"]}.weight')
  extra = [
    name
    for name in stored.keys() - found.keys() - spare
    if not re.search(family.buffers, name)
  ]
  if extra:
    raise ValueError(
      f'weights of no use: {_some(sorted(extra))}; use the files of one model'
    )
  return found


def _some(names: list) -> str:
  rest = f' and {len(names) - 5} more' if len(names) > 5 else ''
  return ', '.join(names[:5]) + rest


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
      'no end token in generation_config.json, config.json or the tokenizer; '
      'add eos_token_id'
    )
  pad = first('pad_token_id', tokenizer.pad_token_id)
  return ends, ends[0] if pad is None else pad


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
  described = _read_json(directory / 'config.json')
  try:
    config = families.read_config(described)
    if value_head and not config.value_head:
      described = described | {'jaxrl_tok_value_head': True}
      config = dataclasses.replace(config, value_head=True)
    tokenizer = _read_tokenizer(directory, config.vocab_size)
    ends, pad = special_tokens(directory, described, tokenizer)
    for name, ids in (('end', ends), ('pad', (pad,))):
      for i in ids:
        if type(i) is not int or not 0 <= i < config.vocab_size:
          raise ValueError(
            f'{name} token {i!r} is none of the {config.vocab_size} ids of the '
            'model; correct it in generation_config.json or config.json'
          )
    found = Model(
      config, described, tokenizer, ends, pad, str(model), directory
    )
    if weights:
      stored = _stored_tensors(hub.locate(str(model), revision))
      found = found._replace(tensors=_check_tensors(found, stored))
  except ValueError as e:
    said = str(e)
    here = said.startswith(str(directory))
    raise ValueError(said if here else f'{directory}: {said}') from None
  return found


# --- in: the bytes -----------------------------------------------------------


def param_structs(model: Model, dtype: str | None = None):
  """ShapeDtypeStructs of the decoder's parameters.

  dtype: None: the file's, or float32 where it does not have them.
  """
  shapes = jax.eval_shape(make_policy(model.config).init, jax.random.key(0))
  flat = flax.traverse_util.flatten_dict(shapes, sep='/')
  for weight in families.weights(model.config, model.family):
    stored = model.tensors.get(weight.tensors[0][0])
    theirs = DTYPES[stored.dtype] if stored else 'float32'
    struct = jax.ShapeDtypeStruct(flat[weight.path].shape, dtype or theirs)
    flat[weight.path] = struct
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def _fill(part, views: tuple) -> None:
  """Reads a tensor of a file into views of a parameter, piece by piece."""
  row, row_size = 0, math.prod(part.get_shape()[1:])
  for view in views:
    rows = view[0].size // row_size  # of the file, in one of the view's
    step = max(1, READ_BYTES // view[0].nbytes)
    for i in range(0, len(view), step):
      piece = view[i : i + step]
      end = row + len(piece) * rows
      piece[...] = part[row:end].reshape(piece.shape)
      row = end


def _read_weight(model: Model, weight, struct, files: dict) -> np.ndarray:
  array = np.zeros(struct.shape, struct.dtype)
  for (name, _), views in zip(weight.tensors, weight.views(array)):
    stored = model.tensors.get(name)
    if stored:  # else a value head that the file does not have: zero
      _fill(files[stored.file].get_slice(stored.name), views)
  return array


def read_params(
  model: Model, mesh=None, dtype: str | None = None, rules=PARTITION_RULES
):
  """Parameters of the decoder, each placed on `mesh` by `rules` as it is read.

  Args:
    mesh: None: the first device.
    dtype: of the parameters; None: the file's.
  """
  structs = param_structs(model, dtype)
  mesh = mesh or sharding.make_mesh('data=1', jax.devices()[:1])
  places = sharding.tree_shardings(mesh, structs, rules)
  structs, places = (
    flax.traverse_util.flatten_dict(t, sep='/') for t in (structs, places)
  )
  flat = {}
  with contextlib.ExitStack() as stack:
    files = {
      file: stack.enter_context(_opened(file))
      for file in {stored.file for stored in model.tensors.values()}
    }
    for weight in families.weights(model.config, model.family):
      array = _read_weight(model, weight, structs[weight.path], files)
      flat[weight.path] = jax.block_until_ready(
        jax.make_array_from_callback(
          array.shape, places[weight.path], array.__getitem__
        )
      )
      del array
      gc.collect(0)  # jax lets go of what it has copied when Python collects
  return flax.traverse_util.unflatten_dict(flat, sep='/')


# --- out ---------------------------------------------------------------------


def _flattened(views: tuple, shape: tuple, dtype) -> np.ndarray:
  """The tensor of the file whose parts the views are."""
  out, at = np.empty(math.prod(shape), dtype), 0
  for view in views:
    out[at : at + view.size].reshape(view.shape)[...] = view
    at += view.size
  return out.reshape(shape)


def _on_host(leaf) -> np.ndarray:
  """Read through another jax.Array of the same buffers: what jax reads back of
  an array it keeps as long as that."""
  if isinstance(leaf, jax.Array):
    leaf = jax.make_array_from_single_device_arrays(
      leaf.shape, leaf.sharding, [s.data for s in leaf.addressable_shards]
    )
  return np.asarray(leaf)


def _tensors_of(weight, array: np.ndarray, model: Model) -> dict:
  found = {}
  for (name, shape), views in zip(weight.tensors, weight.views(array)):
    stored = model.tensors.get(name)  # under the name it came with
    name = stored.name if stored else name
    found[name] = _flattened(views, shape, array.dtype)
  return found


def _write_weights(out: Path, model: Model, params, shard_bytes: int) -> None:
  """model.safetensors, or shards of about shard_bytes and their index; the
  tensors of one shard at a time are on the host."""
  from safetensors.numpy import save_file

  flat = flax.traverse_util.flatten_dict(params, sep='/')
  shards, size = [[]], 0
  for weight in families.weights(model.config, model.family):
    leaf = flat.pop(weight.path)
    if shards[-1] and size + leaf.nbytes > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append((weight, leaf))
    size += leaf.nbytes
  if flat:
    raise ValueError(f'no place in the file for {", ".join(sorted(flat))}')
  index, total = {}, 0
  for number, shard in enumerate(shards, 1):
    file = hub.SINGLE
    if len(shards) > 1:
      file = f'model-{number:05}-of-{len(shards):05}.safetensors'
    content = {}
    for weight, leaf in shard:
      total += leaf.nbytes
      content |= _tensors_of(weight, _on_host(leaf), model)
      gc.collect(0)  # of what jax read
    save_file(content, out / file, metadata={'format': 'pt'})
    index |= dict.fromkeys(content, file)
  if len(shards) > 1:
    described = {'metadata': {'total_size': total}, 'weight_map': index}
    (out / hub.INDEX).write_text(json.dumps(described, indent=2) + '\n')


def write_description(out: Path, model: Model, dtype: str | None = None):
  """config.json, generation_config.json and the tokenizer: all but weights."""
  described = dict(model.described)
  if dtype:
    old = 'torch_dtype' in described and 'dtype' not in described
    described['torch_dtype' if old else 'dtype'] = dtype
  files = {'config.json': described}
  if model.directory is None:
    ends = list(map(int, model.end_tokens))
    ids = {
      'eos_token_id': ends if len(ends) > 1 else ends[0],
      'pad_token_id': int(model.pad_token),
    }
    described |= ids
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
  text = template.render(versions=versions(), library=library, **fields)
  (out / 'README.md').write_text(text)


@contextlib.contextmanager
def appearing(out: str | Path):
  """Yields a directory to write to, which becomes `out` whole or not at all."""
  out = Path(out)
  if out.exists():
    raise FileExistsError(f'{out} exists; give another directory')
  part = out.with_name(out.name + '.partial')
  shutil.rmtree(part, ignore_errors=True)  # of a save that was killed
  part.mkdir(parents=True)
  try:
    yield part
    os.replace(part, out)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def save(
  out: str | Path,
  model: Model,
  params,
  card: dict | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> Path:
  """Writes the directory; it appears whole or not at all.

  card: title, base_model, data, algorithm (text) and metrics (a dict).
  """
  with appearing(out) as part:
    _write_weights(part, model, params, shard_bytes)
    dtype = str(jax.tree.leaves(params)[0].dtype)
    write_description(part, model, dtype)
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
  restored = manager.restore(
    step,
    args=ocp.args.Composite(
      state=ocp.args.PyTreeRestore(
        tree,
        restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
        partial_restore=True,
      )
    ),
  )
  return step, restored.state['params']


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
  if not (run_dir / 'model').is_dir():
    raise FileNotFoundError(f'{run_dir} has no model; give a newer run')
  model = open_model(run_dir / 'model', weights=False)
  adapter = None
  if flags.get('lora_adapter'):
    adapter = lora.load_config(flags['lora_adapter'])
  elif flags.get('lora_rank'):
    adapter = lora.LoraConfig(
      flags['lora_rank'], flags['lora_alpha'], tuple(flags['lora_targets'])
    )
  asked = flags['param_dtype']
  dtype = None if asked == 'auto' else asked
  if adapter is None:
    like = param_structs(model, dtype or 'float32')
    step, params = _restored_params(run_dir, step, like)
  else:
    model = open_model(flags['model'], flags['model_commit'])
    modules = lora.targeted(model.config, model.family, adapter.targets)
    like = jax.eval_shape(
      lambda key: lora.init(modules, adapter.rank, key), jax.random.key(0)
    )
    step, adapters = _restored_params(run_dir, step, like)
    join = lora.make_join(model.config, model.family, adapter.scale)
    params = jax.jit(join)(adapters, read_params(model, dtype=dtype))
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
    'python -m jaxrl_tok.models.hf', description=export_run.__doc__
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
