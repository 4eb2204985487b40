"""What a run says of itself: its settings, its versions, its files.

A Context (launch.py) is a prepared experiment.
"""

import dataclasses
import json
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import yaml

from jaxrl_tok import sharding
from jaxrl_tok.credit import algorithms
from jaxrl_tok.hub import directory as hf
from jaxrl_tok.hub import fetch as hub
from jaxrl_tok.hub.weights import fingerprint
from jaxrl_tok.run import settings as flag_layer


def environment() -> dict:
  """Versions, commit and devices of this run."""
  git = shutil.which('git')
  commit = git and subprocess.run(
    [git, 'rev-parse', 'HEAD'],
    capture_output=True,
    text=True,
    cwd=Path(__file__).parent,
    check=False,
  )
  return {
    'python': platform.python_version(),
    **hf.versions(),
    'commit': (commit and commit.stdout.strip()) or None,
    'platform': platform.platform(),
    'backend': jax.default_backend(),
    'devices': [str(d) for d in jax.devices()],
  }


def settings(context, algorithm) -> dict:
  """Everything that decides the run, for config.yaml."""
  return {
    'experiment': context.experiment.name,
    **flag_layer.flat(context.experiment.flags),
    'algorithm_resolved': algorithms.described(algorithm),
    'compute_dtype': str(context.policy.dtype),
    'model_origin': context.model.origin,
    'model_commit': hub.commit_of(context.model.directory),
    'model_fingerprint': fingerprint(context.model),
    'value_head': context.policy.value is not None,
    'adapter': context.adapter and dataclasses.asdict(context.adapter),
    'model_config': context.model.described,
    'data': context.experiment.data,
  }


def write_run_files(context, algorithm, run_dir: Path) -> None:
  """config.yaml, command.txt and env.json."""
  config = yaml.safe_dump(settings(context, algorithm), sort_keys=False)
  (run_dir / 'config.yaml').write_text(config)
  module = f'experiments.{context.experiment.name}'
  command = shlex.join(['python', '-m', module, *sys.argv[1:]])
  (run_dir / 'command.txt').write_text(command + '\n')
  (run_dir / 'env.json').write_text(json.dumps(environment(), indent=2) + '\n')
  # with it, a checkpoint can be exported when the model has gone
  with hf.atomic_directory(run_dir / 'model', replace=True) as part:
    hf.write_description(part, context.model)


def print_config(context, algorithm, state) -> None:
  """Every setting, what the state (of structs) weighs and where each parameter
  lies."""
  say = context.logger.say
  say(yaml.safe_dump(settings(context, algorithm), sort_keys=False).rstrip())

  def weight(tree):
    leaves = jax.tree.leaves(tree)
    count = sum(x.size for x in leaves)
    return f'{count:,} in {sum(x.size * x.dtype.itemsize for x in leaves):,}'

  say(f'trained parameters: {weight(state.params)} bytes')
  if state.frozen is not None:
    say(f'frozen parameters: {weight(state.frozen)} bytes')
  if state.critic is not None:
    say(f'critic parameters: {weight(state.critic)} bytes')
  say(f'optimizer state: {weight(state.opt_state)} bytes')
  say(f'mesh: {dict(context.mesh.shape)}')
  for tree in state.weights:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      name, spec = sharding.path_name(path), tuple(leaf.sharding.spec)
      say(f'  {name} {list(leaf.shape)} {leaf.dtype} {spec}')
