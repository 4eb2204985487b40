"""Records of a run on disk: config.yaml, command.txt, env.json, model/."""

import contextlib
import fcntl
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

import jax
import yaml

from jaxrl_tok import data, processes, sharding
from jaxrl_tok.credit import compose
from jaxrl_tok.hub import directory, fetch
from jaxrl_tok.hub.weights import fingerprint
from jaxrl_tok.report import mirror
from jaxrl_tok.report.files import atomic_write
from jaxrl_tok.rewards.functions import describe_weights, get_name
from jaxrl_tok.run import models
from jaxrl_tok.run.optimizer import peak_learning_rate
from jaxrl_tok.run.prepare import Setup
from jaxrl_tok.run.settings import RunSettings, flatten


def claim_output_dir(
  run: RunSettings, name: str, resumable: bool = True
) -> Path:
  """Makes the run's directory, which process 0 names; of a bucket, the local
  one that stands for it. Raises ValueError or OSError for one that is not
  empty, or cannot be written."""
  given = run.output_dir
  if given is None:
    given = processes.main_only(lambda: str(fresh_directory(name)))
  given = processes.from_main(str(given))
  if not resumable:
    mirror.check_local(given, '--output_dir')
  path = mirror.local(given)
  processes.main_only(lambda: claim(path, run, resumable))
  return path


def fresh_directory(name: str) -> Path:
  """Makes runs/NAME-TIME; of two runs that begin in one second the second gets
  a number."""
  base = f'{name}-{time.strftime("%Y%m%d-%H%M%S")}'
  for number in range(1, 1000):
    path = Path('runs') / (base if number == 1 else f'{base}-{number}')
    try:
      path.mkdir(parents=True)
      return path
    except FileExistsError:
      continue
    except OSError as e:
      raise ValueError(
        f'{path} cannot be made: {e.strerror}; give an --output_dir'
      ) from None
  raise ValueError(f'runs/{base} and 999 more are taken; give an --output_dir')


@contextlib.contextmanager
def locked(path: Path):
  """Context in which no other run may have a directory; that ends with the
  process, however it ends.

  Raises ValueError, in one line, where another run has it. A file system
  without locks has none here either.
  """
  held = os.open(path, os.O_RDONLY) if processes.is_main() else None

  def lock():
    try:
      if held is not None:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(
        f'another run is in {mirror.name_of(path)}; wait until it has ended, '
        'or give another --output_dir'
      ) from None
    except OSError:
      return  # as some network file systems

  if held is not None:
    _held.add(held)
  try:
    processes.main_only(lock)
    yield
  finally:
    if held in _held:  # else a child, which has closed it
      _held.discard(held)
      os.close(held)


_held = set()  # descriptors of the locks


def let_go() -> None:
  """Closes the locks in a forked child, which may outlive the run."""
  for held in _held:
    os.close(held)
  _held.clear()


os.register_at_fork(after_in_child=let_go)


def claim(path: Path, run: RunSettings, resumable: bool) -> None:
  """Makes a run's directory; see claim_output_dir."""
  if path.exists() and not path.is_dir():
    raise ValueError(f'--output_dir {path} is a file; give a directory')
  if run.resume == 'never' and path.is_dir() and any(path.iterdir()):
    cure = 'pass --resume auto to go on with it, or ' if resumable else 'give '
    raise ValueError(
      f'--output_dir {mirror.name_of(path)} is not empty; {cure}another '
      'directory'
    )
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe = path / '.writable'
    probe.touch()
    probe.unlink()
    mirror.probe(path)
  except OSError as e:
    if e.strerror is None:  # a bucket's, which says it all
      raise
    raise ValueError(
      f'--output_dir {path} cannot be written: {e.strerror}; give another'
    ) from None


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
    **directory.versions(),
    'commit': (commit and commit.stdout.strip()) or None,
    'platform': platform.platform(),
    'backend': jax.default_backend(),
    'devices': [str(d) for d in jax.devices()],
    'processes': jax.process_count(),
  }


def describe_data(setup: Setup) -> str:
  """Describes the data: in the task's words, or by its source."""
  if setup.task.description:
    return setup.task.description
  n, held_out = setup.data.num_records, setup.evaluations[0].data.num_records
  count = 'endless' if n is None else f'{n:,}'
  return f'{setup.data.records.name}: {count} records; {held_out:,} held out'


def adapter_of(setup: Setup) -> dict | None:
  """Configuration of the adapters; None: all of the model is trained."""
  config = models.lora_config(setup.settings)
  if config is None:
    return None
  return {
    'rank': config.rank,
    'alpha': config.alpha,
    'targets': list(config.targets),
  }


def environment_of(setup: Setup) -> dict:
  """{'environment': its name}; {} without one."""
  make = setup.task.environment
  return {} if make is None else {'environment': get_name(make)}


def signatures(setup: Setup) -> dict:
  """{'signatures': {name: text}} of rewards and metrics that have one, as those
  of sacrebleu; {} without any."""
  functions = {get_name(f): f for f in setup.task.metrics}
  functions |= setup.rewards.host
  found = {
    name: function.signature
    for name, function in functions.items()
    if isinstance(getattr(function, 'signature', None), str)
  }
  return {'signatures': found} if found else {}


def settings_of_run(setup: Setup) -> dict:
  """Settings, model and data that decide the run, for config.yaml."""
  own = isinstance(setup.model, models.OwnModel)
  return {
    'experiment': setup.caller.name,
    'task_function': setup.caller.task,
    'task_flags': setup.task_flags,
    **setup.task_flags,
    **flatten(setup.settings),
    'max_completion_length': setup.config.max_completion_length,
    'learning_rate': peak_learning_rate(setup.settings),
    'algorithm_resolved': compose.described(setup.algorithm),
    'rewards': describe_weights(setup.rewards.weights),
    'constraints': list(map(str, setup.rewards.constraints)),
    **environment_of(setup),
    **signatures(setup),
    'reward_unit': setup.task.reward_unit,
    'compute_dtype': setup.dtype,
    'model_origin': setup.model.origin,
    'model_commit': fetch.commit_of(setup.model.directory),
    'model_fingerprint': None if own else fingerprint(setup.model),
    'value_head': setup.policy.value is not None,
    'adapter': adapter_of(setup),
    'model_config': setup.model.hf_config,
    'mesh_resolved': dict(setup.mesh.shape),
    'mesh_reason': setup.mesh_reason,
    'prompt_lengths': list(setup.data.buckets),
    'data': describe_data(setup),
    'data_fingerprint': data.data_fingerprint(setup.data.records),
  }


def to_yaml(found: dict) -> str:
  """Writes YAML of plain values: tuples as lists, other types as text."""
  plain = json.loads(json.dumps(found, default=str))
  return yaml.safe_dump(plain, sort_keys=False)


def write_run_files(setup: Setup, run_dir: Path) -> None:
  """Writes config.yaml, command.txt, env.json, and the model without its
  weights."""
  atomic_write(run_dir / 'config.yaml', to_yaml(settings_of_run(setup)))
  atomic_write(run_dir / 'command.txt', setup.caller.command + '\n')
  described = json.dumps(environment(), indent=2) + '\n'
  atomic_write(run_dir / 'env.json', described)
  if isinstance(setup.model, models.OwnModel):
    return
  # a checkpoint can then be exported even without the --model
  with directory.atomic_directory(run_dir / 'model', replace=True) as part:
    directory.write_description(part, setup.model)


def print_config(setup: Setup, state) -> None:
  """Prints every setting, the size of the state (of structs) and where each
  parameter lies."""
  message = setup.logger.message
  message(to_yaml(settings_of_run(setup)).rstrip())

  def weight(tree):
    leaves = jax.tree.leaves(tree)
    count = sum(x.size for x in leaves)
    return f'{count:,} in {sum(x.size * x.dtype.itemsize for x in leaves):,}'

  message(f'trained parameters: {weight(state.params)} bytes')
  if state.frozen is not None:
    message(f'frozen parameters: {weight(state.frozen)} bytes')
  if state.critic is not None:
    message(f'critic parameters: {weight(state.critic)} bytes')
  message(f'optimizer state: {weight(state.opt_state)} bytes')
  message(f'mesh: {dict(setup.mesh.shape)}')
  for tree in (state.params, state.frozen):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      name, spec = sharding.path_name(path), tuple(leaf.sharding.spec)
      message(f'  {name} {list(leaf.shape)} {leaf.dtype} {spec}')
