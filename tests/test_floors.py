"""A file imports only from floors below its own; rewards/ has no jax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / 'jaxrl_tok'
FLOORS = {
  '__init__': 0,
  'types': 0,
  'masked': 0,
  'sharding': 0,
  'logger': 0,
  'charts': 0,
  'rewards': 0,
  'report': 1,
  'groups': 1,
  'distribution': 1,
  'data': 1,
  'models': 1,
  'policy': 2,
  'sampler': 2,
  'advantages': 2,
  'losses': 2,
  'device_rewards': 2,
  'mask_policy': 2,
  'algorithms': 3,
  'update': 3,
  'checkpoint': 3,
  'evaluation': 3,
  'collect': 3,
  'steps': 3,
  'memory': 3,
  'parts': 4,
  'train': 5,
}
# inside models/: attention <- transformer <- layout <- weights <- hf
MODEL_FLOORS = {
  '__init__': 0,
  'attention': 0,
  'rope': 0,
  'experts': 0,
  'kernels': 0,
  'hub': 0,
  'transformer': 1,
  'layout': 2,
  'families': 3,
  'lora': 3,
  'weights': 4,
  'hf': 5,
}
FILES = sorted(PACKAGE.rglob('*.py'))


def imported(path: Path) -> list[list[str]]:
  """['policy'], ['models', 'hf'], ...: what it imports of the package, also
  inside functions."""
  found = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      found += [f'{node.module}.{alias.name}' for alias in node.names]
  ours = [name.split('.')[1:] for name in found if name.startswith('jaxrl_tok')]
  assert not any(name.startswith('experiments') for name in found), path
  return [name for name in ours if name]


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_imports_go_down(path):
  parts = path.relative_to(PACKAGE).with_suffix('').parts
  for name in imported(path):
    if name[0] == parts[0] == 'models':
      assert MODEL_FLOORS[name[1]] < MODEL_FLOORS[parts[1]], (path, name)
    elif name[0] == parts[0]:
      assert parts[0] == 'rewards', (path, name)
    elif name[0] in FLOORS:
      assert FLOORS[name[0]] < FLOORS[parts[0]], (path, name)


def test_every_file_has_a_floor():
  names = {p.relative_to(PACKAGE).parts[0].removesuffix('.py') for p in FILES}
  assert names == set(FLOORS)


def test_rewards_and_report_import_no_jax():
  code = (
    'import sys, jaxrl_tok.rewards, jaxrl_tok.report, jaxrl_tok.logger;'
    'sys.exit("jax" in sys.modules)'
  )
  assert (
    subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
  )


def test_experiments_flags_import_no_jax():
  code = (
    'import sys, experiments.flags, experiments.arithmetic;'
    'sys.exit("jax" in sys.modules)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], check=False, cwd=PACKAGE.parent
  )
  assert done.returncode == 0
