"""Notebooks of tpu/ run from the first cell to the last, small, on CPU."""

import ast
import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from conftest import GOLDEN
from IPython.core.inputtransformer2 import TransformerManager

pytestmark = pytest.mark.usefixtures('one_device', 'few_programs')

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'tpu').glob('*.ipynb'))
LONGEST = 20  # lines of a cell


@pytest.fixture
def clone(tmp_path, monkeypatch):
  """A clone, whose runs are kept apart from this one's."""
  for name in ('pyproject.toml', 'experiments', 'jaxrl_tok'):
    (tmp_path / name).symlink_to(ROOT / name)
  (tmp_path / 'tpu').mkdir()
  monkeypatch.setenv('NOTEBOOK_SMALL', '1')
  monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '1')
  return tmp_path


def problems(clone: Path) -> str:
  """Flags of a made-up GSM8K and a tiny model for it."""
  model = shutil.copytree(GOLDEN / 'qwen2', clone / 'model')
  template = '{{ messages[0].content[:2] }}'
  (model / 'chat_template.jinja').write_text(template)
  for name, first in (('train', 1), ('test', 9)):
    rows = [
      {'question': f'{first}{n} + 1?', 'answer': f'#### {first}{n + 1}'}
      for n in range(8)
    ]
    (clone / name).with_suffix('.jsonl').write_text(
      '\n'.join(map(json.dumps, rows))
    )
  return (
    '--model=model --data=train.jsonl --held_out_data=test.jsonl '
    '--output_dir=runs/gsm8k --max_steps=1 --num_prompts=2 --num_generations=2 '
    '--max_completion_length=4 --length_buckets=1 --held_out=4'
  )


def outputs(notebook) -> str:
  """Text of all outputs of a notebook."""
  found = []
  for cell in notebook.cells:
    for output in cell.get('outputs', ()):
      data = output.get('data', {})
      found += [output.get('text', ''), *map(str, data.values())]
  return '\n'.join(found)


def run_in_kernel(notebook, clone, monkeypatch) -> str:
  """Text of all outputs; a kernel has an event loop of its own."""
  where = {'metadata': {'path': str(clone / 'tpu')}}
  nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
  return outputs(notebook)


def run_here(notebook, clone, monkeypatch) -> str:
  """Text of all outputs, without the start of a kernel."""
  monkeypatch.chdir(clone / 'tpu')
  monkeypatch.setattr(sys, 'path', [*sys.path])
  space, shown = {'__name__': 'notebook'}, io.StringIO()
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      code = TransformerManager().transform_cell(cell.source)
      body = ast.parse(code).body
      last = body.pop() if isinstance(body[-1], ast.Expr) else None
      with contextlib.redirect_stdout(shown):
        exec(compile(ast.Module(body, []), '<cell>', 'exec'), space)
        if last is not None:
          code = compile(ast.Expression(last.value), '<cell>', 'eval')
          value = eval(code, space)
          print(repr(value), getattr(value, '_repr_html_', str)())
  return shown.getvalue()


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_the_first_cell_to_the_last(
  path, clone, monkeypatch
):
  monkeypatch.setenv('NOTEBOOK_FLAGS', problems(clone))
  notebook = nbformat.read(path, as_version=4)
  run = run_in_kernel if path.stem == 'own_reward' else run_here
  shown = run(notebook, clone, monkeypatch)
  assert 'steps: ' in shown
  assert '<html' in shown or 'srcdoc' in shown, 'the report is not shown'
  reports = list((clone / 'runs').glob('*/report.html'))
  assert len(reports) == 1


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_has_no_outputs(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert notebook.cells[0].source.startswith('# ')
  for cell in cells:
    assert cell.outputs == []
    assert cell.execution_count is None
    lines = cell.source.splitlines()
    assert len(lines) <= LONGEST, cell.source
  assert all(cell.source.strip() for cell in notebook.cells)
