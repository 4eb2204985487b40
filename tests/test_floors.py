"""A file imports only from floors below its own; words need no jax."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / 'jaxrl_tok'
# a room imports from rooms of lower floors only
FLOORS = {
  'types': 0,
  'masked': 0,
  'mesh_spec': 0,
  'targets': 0,
  'hlo': 0,
  'rewards': 0,
  'report': 0,
  'sharding': 1,
  'distribution': 1,
  'digest': 2,
  'processes': 2,
  'data': 1,
  'environments': 2,
  'models': 3,
  'policy': 3,
  'finite': 3,
  'checkpoint': 3,
  'sampler': 4,
  'hub': 4,
  'credit': 4,
  'step': 5,
  'progress': 0,
  'supervise': 0,
  'watch': 0,
  'evaluation': 6,
  'train': 7,
  'run': 8,
  'env': 9,
}
# inside models/: a network of parts
MODEL_FLOORS = {
  '__init__': 0,
  'attention': 0,
  'rope': 0,
  'experts': 0,
  'kernels': 0,
  'lora': 1,
  'stack': 0,
  'quantize': 0,
  'encoder_decoder_config': 0,
  'relative_positions': 1,
  'blocks': 1,
  'encoder_decoder_blocks': 2,
  'transformer': 2,
  'encoder_decoder': 3,
  'mask_policy': 1,
}
# names of jaxrl_tok/__init__.py, which imports the rooms when they are used
OF_PACKAGE = {'__version__', 'Interrupted'}
# what is read before jax is
WITHOUT_JAX = (
  'jaxrl_tok',
  'jaxrl_tok.mesh_spec',
  'jaxrl_tok.targets',
  'jaxrl_tok.hlo',
  'jaxrl_tok.rewards',
  'jaxrl_tok.data',
  'jaxrl_tok.environments',
  'jaxrl_tok.credit.names',
  'jaxrl_tok.progress',
  'jaxrl_tok.supervise',
  'jaxrl_tok.watch',
  'jaxrl_tok.report.charts',
  'jaxrl_tok.report.evaluated',
  'jaxrl_tok.report.evaluation_page',
  'jaxrl_tok.report.figures',
  'jaxrl_tok.report.files',
  'jaxrl_tok.report.logger',
  'jaxrl_tok.report.mirror',
  'jaxrl_tok.report.page',
  'jaxrl_tok.run.task',
  'jaxrl_tok.run.turns',
  'jaxrl_tok.run.settings',
  'jaxrl_tok.run.algorithm_settings',
  'jaxrl_tok.run.flags',
  'jaxrl_tok.run.compat',
  'jaxrl_tok.run.api',
  'jaxrl_tok.data.pairs',
  'jaxrl_tok.report.goodhart',
  *(
    f'experiments.{path.stem}'
    for path in (PACKAGE.parent / 'experiments').glob('*.py')
    if path.stem != '__init__'
  ),
)
FILES = sorted(
  p for p in PACKAGE.rglob('*.py') if p.parent != PACKAGE
) + sorted(p for p in PACKAGE.glob('*.py') if p.stem != '__init__')


def parts_of(path: Path) -> tuple[str, ...]:
  return path.relative_to(PACKAGE).with_suffix('').parts


def all_imports(path: Path) -> list[str]:
  """Dotted names of everything that a file imports, also inside functions."""
  found = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      found += [f'{node.module}.{alias.name}' for alias in node.names]
  return found


def imported(path: Path) -> list[list[str]]:
  """Imports of the package in a file: ['policy'], ['models', 'rope'], ..."""
  found = [x.split('.')[1:] for x in all_imports(path) if ours(x)]
  return [name for name in found if name and name[0] not in OF_PACKAGE]


def ours(name: str) -> bool:
  return name.split('.')[0] == 'jaxrl_tok'


@pytest.mark.parametrize('path', FILES, ids=lambda p: '/'.join(parts_of(p)))
def test_imports_go_down(path):
  parts = parts_of(path)
  for name in imported(path):
    if name[0] == parts[0] == 'models':
      assert MODEL_FLOORS[name[1]] < MODEL_FLOORS[parts[1]], name
    elif name[0] != parts[0]:
      assert FLOORS[name[0]] < FLOORS[parts[0]], name
  roots = {name.split('.')[0] for name in all_imports(path)}
  assert not roots & {'experiments', 'tests'}


def test_no_room_imports_in_a_circle():
  """Imports inside functions count, too."""
  names = {parts_of(path) for path in FILES}
  graph = {}
  for path in FILES:
    found = [file_of(tuple(name), names) for name in imported(path)]
    graph[parts_of(path)] = {x for x in found if x in names}
  order = list(graphlib.TopologicalSorter(graph).static_order())
  assert len(order) == len(names)


def file_of(name: tuple, names: set) -> tuple:
  """The file that an imported name is in."""
  while name:
    for path in (name, (*name, '__init__')):
      if path in names:
        return path
    name = name[:-1]
  return ('__init__',)


def test_every_file_has_a_floor():
  names = {parts_of(path)[0] for path in FILES}
  assert names == set(FLOORS)
  models = {p[1] for p in map(parts_of, FILES) if p[0] == 'models'}
  assert models == set(MODEL_FLOORS)


@pytest.mark.parametrize('room', ['rewards', 'environments', 'report'])
def test_the_host_side_never_imports_jax(room):
  for path in (PACKAGE / room).rglob('*.py'):
    roots = {name.split('.')[0] for name in all_imports(path)}
    assert not roots & {'jax', 'jaxlib', 'flax', 'optax', 'chex'}, path


def test_words_are_read_without_jax():
  code = (
    'import importlib, sys\n'
    f'for name in {WITHOUT_JAX!r}:\n'
    '  importlib.import_module(name)\n'
    '  slow = {"jax", "flax", "transformers", "datasets"} & set(sys.modules)\n'
    '  assert not slow, (name, slow)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    check=False,
    cwd=PACKAGE.parent,
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stderr) == (0, '')
