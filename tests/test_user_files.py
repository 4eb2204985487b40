"""Files of a user, each a value of his own: trained, saved, resumed bitwise,
evaluated."""

import importlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.usefixtures('one_device', 'few_programs')

FILES = Path(__file__).parent / 'user_files'
OWN = sorted(path.stem for path in FILES.glob('own_*.py'))


def flags(out, steps, *more) -> list[str]:
  return [
    f'--output_dir={out}',
    f'--max_steps={steps}',
    '--save_every=2',
    '--eval_every=2',
    '--report_to=none',
    '--max_completion_length=6',
    *more,
  ]


def steps_of(out) -> list[dict]:
  """Train rows without their times."""
  rows = map(json.loads, (out / 'metrics.jsonl').read_text().splitlines())
  clocks = 'time', 'step_time', 'tokens_per_second'
  return [
    {
      k: v
      for k, v in row.items()
      if k not in clocks and not k.startswith('time/')
    }
    for row in rows
    if row['phase'] == 'train'
  ]


def weights(out) -> dict:
  (file,) = (out / 'export').glob('*.safetensors')
  return load_file(file)


@pytest.fixture(autouse=True)
def users_promote_ranks():
  """A user's code need not keep the suite's strictness."""
  jax.config.update('jax_numpy_rank_promotion', 'allow')
  yield
  jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.mark.parametrize('name', OWN)
def test_trained_saved_resumed_evaluated(name, tmp_path, monkeypatch):
  assert len((FILES / f'{name}.py').read_text().splitlines()) <= 60
  monkeypatch.syspath_prepend(str(FILES))
  run = importlib.import_module(name).run
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  result = run(flags(whole, 4))
  shutil.copytree(whole, parts)
  run(flags(parts, 4, '--resume=2'))
  rows = steps_of(whole)
  assert [row['step'] for row in rows] == [1, 2, 3, 4]
  assert steps_of(parts) == rows
  one, two = weights(whole), weights(parts)
  assert one.keys() == two.keys()
  for key in one:
    np.testing.assert_array_equal(one[key], two[key])
  held_out = [r for r in result.metrics if r['phase'] == 'eval']
  assert [r['step'] for r in held_out] == [0, 2, 4]
  assert all(np.isfinite(r['eval/reward']) for r in held_out)
  assert len(result.generate(['1+1=', '2+2='])) == 2
