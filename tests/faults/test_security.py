"""Fault 25 and security: planted keys are in no output, nothing runs code from
a file. Nothing is compiled here."""

import ast
import contextlib
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_tok.data import open_records
from jaxrl_tok.report.files import atomic_write, redact, to_line
from jaxrl_tok.report.logger import Logger
from jaxrl_tok.rewards import load_rewards
from jaxrl_tok.run import flags

PACKAGE = Path(__file__).parent.parent.parent / 'jaxrl_tok'
# processes of our own, which only read what this program sends them
OWN_PIPES = ('rewards/worker_main.py', 'rewards/isolated.py')


@given(
  name=st.sampled_from(
    ['HF_TOKEN', 'OPENAI_API_KEY', 'db_password', 'A_SECRET']
  ),
  key=st.text('abcXYZ0189-_', min_size=8, max_size=40),
  text=st.lists(st.sampled_from(['a', ' ', '\n', 'KEY', '{}']), max_size=5),
)
def test_25_a_planted_key_is_redacted_everywhere(name, key, text):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv(name, key)
    said = redact(key.join(['', *text, '']))
    assert key not in said
    assert f'[{name}]' in said


def test_25_planted_keys_are_in_no_output(tmp_path, monkeypatch, capsys):
  """Rows, files, warnings and errors. Paths and short words are no keys."""
  key = 'sk-planted-0123456789'
  monkeypatch.setenv('MY_API_KEY', key)
  monkeypatch.setenv('KEY_FILE', '/home/me/keys')
  monkeypatch.setenv('TOKENIZERS_PARALLELISM', 'true')
  row = to_line({'step': 1, 'said': f'Bearer {key}', 'path': '/home/me/keys'})
  assert key not in row
  assert '/home/me/keys' in row
  file = atomic_write(tmp_path / 'command.txt', f'run --key {key} true\n')
  assert file.read_text() == 'run --key [MY_API_KEY] true\n'
  Logger(tmp_path).warn(f'reward judge raised HTTPError: {key}')
  error = ValueError(f'{key} is no address')
  error.add_note(f'asked with {key}')
  flags.show_fault(error)
  found = capsys.readouterr()
  assert key not in found.out + found.err
  assert found.err == (
    'error: [MY_API_KEY] is no address; asked with [MY_API_KEY]\n'
  )


CALLS = {  # methods that do, by the names of their modules
  'load': ('pickle', 'marshal', 'torch', 'joblib', 'yaml', 'dill', 'shelve'),
  'loads': ('pickle', 'marshal', 'dill', 'cloudpickle'),
  'unsafe_load': ('yaml',),
  'full_load': ('yaml',),
  'system': ('os',),
}


def runs_code(node: ast.Call) -> bool:
  """Tells calls that run code which a file holds."""
  f = node.func
  trusts = any(
    k.arg in ('trust_remote_code', 'allow_pickle', 'shell')
    and getattr(k.value, 'value', True)
    for k in node.keywords
  )
  if isinstance(f, ast.Name):
    return trusts or f.id in ('eval', 'exec')
  owner = getattr(getattr(f, 'value', None), 'id', '')
  return trusts or owner in CALLS.get(getattr(f, 'attr', ''), ())


@pytest.mark.parametrize(
  ('code', 'found'),
  [
    ('pickle.load(f)', True),
    ('yaml.load(f)', True),
    ('eval(x)', True),
    ('np.load(f, allow_pickle=True)', True),
    ('f(x, trust_remote_code=True)', True),
    ('m.f(x, trust_remote_code=y)', True),
    ('subprocess.run(x, shell=True)', True),
    ('yaml.safe_load(f)', False),
    ('json.loads(f)', False),
    ('model.eval()', False),
  ],
)
def test_calls_that_run_code_are_known(code, found):
  assert runs_code(ast.parse(code).body[0].value) == found


def test_no_file_of_ours_runs_code_of_a_file():
  for path in PACKAGE.rglob('*.py'):
    calls = list(ast.walk(ast.parse(path.read_text())))
    bad = [n.lineno for n in calls if isinstance(n, ast.Call) and runs_code(n)]
    name = path.relative_to(PACKAGE).as_posix()
    assert not bad or name in OWN_PIPES, (name, bad)


class Poison:
  """Writes a file when it is unpickled."""

  def __init__(self, file):
    self.file = file

  def __reduce__(self):
    return Path.touch, (self.file,)


@pytest.mark.parametrize('name', ['data.pkl', 'data.jsonl', 'data.parquet'])
def test_24_a_poisoned_pickle_never_fires(tmp_path, name):
  import pickle

  fired, file = tmp_path / 'fired', tmp_path / name
  file.write_bytes(pickle.dumps([Poison(fired)]))
  with pytest.raises((ValueError, OSError)) as e:
    open_records(str(file))
  assert '\n' not in str(e.value)
  assert not fired.exists()


def test_a_file_of_rewards_is_said(tmp_path):
  """By the experiment that runs it, before anything else."""
  from experiments.text import text

  file = tmp_path / 'mine.py'
  file.write_text('def one(completions):\n  return [1.0] * len(completions)\n')
  with contextlib.redirect_stdout(io.StringIO()) as said:
    text('data.jsonl', (f'{file}:one',))
  assert said.getvalue() == f'{file} was run for its rewards\n'
  assert load_rewards([f'{file}:one=0.5'])['one'][1] == 0.5
