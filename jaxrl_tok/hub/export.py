"""Export of a run's checkpoint as a Hugging Face directory.

python -m jaxrl_tok.hub.export RUN_DIR OUT_DIR [--step N|best]
"""

import argparse
import sys
from pathlib import Path

import jax

from jaxrl_tok import sharding
from jaxrl_tok.checkpoint import (
  best_step,
  check_digests,
  open_checkpoints,
  read_meta,
)
from jaxrl_tok.hub import fetch
from jaxrl_tok.hub.directory import open_model
from jaxrl_tok.hub.model import Model
from jaxrl_tok.hub.trainable import Trainable, adapted, full
from jaxrl_tok.models.lora import LoraConfig
from jaxrl_tok.report import mirror

# settings of config.yaml that an export reads
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


def read_settings(run_dir: Path) -> dict:
  """Reads config.yaml. Raises ValueError or FileNotFoundError, in one line,
  where it is missing or not a run's."""
  import yaml

  file = run_dir / 'config.yaml'
  if not file.is_file():
    raise FileNotFoundError(f'{run_dir} is no run directory (no config.yaml)')
  try:
    found = dict(yaml.safe_load(file.read_text()))
  except (yaml.YAMLError, TypeError, ValueError):
    raise ValueError(f'{file}: no flags of a run; give its directory') from None
  missing = [name for name in RUN_SETTINGS if name not in found]
  if missing:
    raise ValueError(f'{file} has no {", ".join(missing)}; give a newer run')
  return found


def _model_of_run(run_dir: Path, settings: dict) -> Model:
  """Opens the model that a run began with, or else its copy in the run."""
  if settings['model'] is not None:
    try:  # it knows the names that its tensors came with
      return open_model(settings['model'], settings['model_commit'])
    except (ValueError, OSError):
      if settings['adapter'] is not None:
        raise
  if not (run_dir / 'model').is_dir():
    raise FileNotFoundError(f'{run_dir} has no model; give a newer run')
  return open_model(run_dir / 'model', weights=False)


def trainable_of_run(model: Model, settings: dict) -> Trainable:
  """Makes the Trainable that the settings of a run name."""
  asked = settings['param_dtype']
  dtype = None if asked == 'auto' else asked
  if settings['adapter'] is not None:
    config = LoraConfig(**settings['adapter'])
    quantized = settings.get('quantize') == 'int8'  # older runs have none
    return adapted(model, config, dtype, quantized=quantized)
  if settings['value_head'] and not model.config.value_head:
    model = model.with_value_head()
  return full(model, dtype or 'float32')


def _restored_params(run_dir: Path, step: int | str | None, like, mesh):
  """(step, the `params` of a checkpoint), replicated over the mesh."""
  import orbax.checkpoint as ocp

  manager = open_checkpoints(run_dir)
  steps = sorted(manager.all_steps())
  if step == 'best':
    step = best_step(manager)
    if step not in steps:
      raise ValueError(
        f'{run_dir} has no checkpoint of a best evaluation; it keeps one with '
        '--best_metric'
      )
  if not steps or (step is not None and step not in steps):
    raise ValueError(
      f'{run_dir} has no checkpoint{"" if step is None else f" of step {step}"}'
      f'; there are: {", ".join(map(str, steps)) or "none"}'
    )
  step = steps[-1] if step is None else step
  places = sharding.tree_shardings(mesh, like, ())
  tree = {
    'params': jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      like,
      places,
    )
  }
  restoring = ocp.args.PyTreeRestore(
    tree,
    restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
    partial_restore=True,
  )
  try:
    found = manager.restore(step, args=ocp.args.Composite(state=restoring))
  except Exception as e:  # many kinds, with pages of advice
    said = ' '.join(str(e).split())[:200]
    raise ValueError(
      f'checkpoint {step} of {run_dir} cannot be read ({said}); pass another '
      f'--step of {", ".join(map(str, steps))}'
    ) from None
  params = found.state['params']
  check_digests(
    step, params, read_meta(manager, step).get('digests'), 'params/'
  )
  return step, params


def export_run(
  run_dir: str | Path, out: str | Path, step: int | str | None = None
) -> Path:
  """Writes a checkpoint of a run, which may be in a bucket, as a local Hugging
  Face directory.

  Adapters are merged with the model that the run began with, which must still
  be where it was. step: 'best', or None: the newest.
  """
  mirror.check_address(run_dir, 'RUN_DIR')
  mirror.check_local(out, 'OUT_DIR')
  run_dir = mirror.local(run_dir)
  settings = read_settings(run_dir)
  if Path(out).exists():
    raise FileExistsError(f'{out} exists; give another directory')
  trainable = trainable_of_run(_model_of_run(run_dir, settings), settings)
  mesh = sharding.make_mesh('data=1', jax.devices()[:1])
  step, trained = _restored_params(run_dir, step, trainable.structs()[0], mesh)
  card = {
    'title': Path(out).name,
    'base_model': settings['model'],
    'data': settings['data'],
    'algorithm': settings['algorithm'],
    'metrics': {'steps': step},
  }
  frozen, dtype = trainable.load_frozen(mesh), settings['compute_dtype']
  return trainable.save(out, trained, frozen, card, dtype)


def main(argv=None) -> None:
  """Reads the command line, exports, and uploads where asked."""
  parser = argparse.ArgumentParser(
    'python -m jaxrl_tok.hub.export', description=export_run.__doc__
  )
  parser.add_argument('run_dir')
  parser.add_argument('out_dir')
  parser.add_argument(
    '--step',
    type=lambda word: word if word == 'best' else int(word),
    metavar='N|best',
    help='default: the newest',
  )
  parser.add_argument('--push_to_hub', metavar='OWNER/NAME')
  given = parser.parse_args(argv)
  try:
    if given.push_to_hub:
      fetch.push_token()
    print(export_run(given.run_dir, given.out_dir, given.step))
    if given.push_to_hub:
      print(fetch.push(given.out_dir, given.push_to_hub))
  except (ValueError, OSError) as e:
    print(f'error: {e}', file=sys.stderr)
    raise SystemExit(2) from None


if __name__ == '__main__':
  main()
