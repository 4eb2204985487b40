"""Fetching asks the hub for no more than is read, and fails soon where the hub
is out of reach.

Tests use no network: the hub is a closed port, a server of this process, or a
cache that the test lays out.
"""

import http.server
import shutil
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from jaxrl_tok.hub import export, fetch
from jaxrl_tok.hub.directory import open_model

GOLDEN = Path(__file__).parent / 'golden/families'
COMMIT = 'a' * 40


@pytest.fixture
def cache(monkeypatch, tmp_path):
  """An empty cache; the hub is a port that nobody listens to."""
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
  monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
  monkeypatch.delenv('HF_TOKEN', raising=False)
  monkeypatch.setenv('no_proxy', '127.0.0.1')
  return tmp_path / 'hub'


@pytest.fixture
def answering(cache, monkeypatch):
  """Fixture answering(function of a request handler): the hub's answer."""
  servers = []

  class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
      pass  # who asked has gone

  def start(answer):
    class Handler(http.server.BaseHTTPRequestHandler):
      do_GET = do_HEAD = answer

      def log_message(self, *args):
        pass

    servers.append(Server(('127.0.0.1', 0), Handler))
    serve = servers[0].serve_forever
    threading.Thread(target=serve, args=(0.05,), daemon=True).start()
    address = f'http://127.0.0.1:{servers[0].server_port}'
    monkeypatch.setattr(constants, 'ENDPOINT', address)

  yield start
  for server in servers:
    server.shutdown()
    server.server_close()


def fault(kind=ConnectionError, model='some/model', revision=None):
  """Message of the fault, which must come within 5 seconds."""
  begun = time.monotonic()
  with pytest.raises(kind) as e:
    fetch.locate(model, revision)
  assert time.monotonic() - begun < 5
  assert type(e.value) is kind
  assert '\n' not in str(e.value)
  return str(e.value)


def put_in(cache, name):
  """Puts a fixture where huggingface_hub keeps some/model of `main`."""
  there = cache / 'models--some--model'
  shutil.copytree(GOLDEN / name, there / 'snapshots' / COMMIT)
  (there / 'refs').mkdir()
  (there / 'refs/main').write_text(COMMIT)
  return there / 'snapshots' / COMMIT


# --- out of reach


def silent(handler):
  time.sleep(5)


def trickling(handler):
  handler.send_response(200)
  handler.end_headers()
  for _ in range(20):
    handler.wfile.write(b' ')
    time.sleep(0.25)


def of_another_kind(handler):
  handler.send_response(200)
  handler.end_headers()
  handler.wfile.write(b'<html>sign in to this network</html>')


def failing(handler):
  handler.send_error(500)


def test_a_closed_port_is_one_line(cache):
  said = fault()
  assert 'some/model is not in the local cache and the hub cannot be re' in said
  assert said.endswith('; pass --model a local directory')


@pytest.mark.parametrize(
  'answer', [silent, trickling, of_another_kind, failing]
)
def test_a_hub_that_does_not_answer_is_one_line(answering, answer):
  answering(answer)
  said = fault()
  assert 'the hub cannot be reached' in said
  assert said.endswith('; pass --model a local directory')


@pytest.mark.parametrize(
  ('status', 'code', 'revision', 'says'),
  [
    (404, 'RepoNotFound', None, 'is not on the hub, or is private or gated'),
    (403, 'GatedRepo', None, 'set HF_TOKEN where it needs one'),
    (404, 'RevisionNotFound', 'v9', 'some/model has no revision v9; look at'),
  ],
)
def test_what_is_not_on_the_hub_is_said(
  answering, status, code, revision, says
):
  def answer(handler):
    handler.send_response(status)
    handler.send_header('X-Error-Code', code)
    handler.end_headers()

  answering(answer)
  assert says in fault(FileNotFoundError, revision=revision)


@pytest.mark.parametrize(
  'path',
  ['no/such/directory', '/no/such', './no', 'gpt2', 'some/model/', '~/x'],
)
def test_a_path_that_is_not_there_says_what_to_pass(cache, path):
  said = fault(FileNotFoundError, path)
  assert said.startswith(f'{path} is no directory and no hub id; pass --model')
  assert 'config.json and model.safetensors' in said


# --- the cache


def test_a_cached_model_is_opened_offline(cache, monkeypatch):
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  where = put_in(cache, 'qwen2')
  for revision in (None, 'main', COMMIT):
    found = open_model('some/model', revision)
    assert (found.directory, found.origin) == (where, 'some/model')
    assert len(found.tensors) == 38
  assert 'HF_HUB_OFFLINE is set; pass --model' in fault(revision='v9')
  assert 'HF_HUB_OFFLINE is set; pass --model' in fault(model='other/model')


def test_a_cached_model_is_opened_when_the_hub_is_out_of_reach(cache):
  where = put_in(cache, 'llama_linear')
  found = open_model('some/model')
  assert found.directory == where
  assert {s.file.parent for s in found.tensors.values()} == {where}


# --- what is fetched and what is sent


@pytest.mark.parametrize('name', ['qwen2', 'llama_linear'])
def test_only_what_is_read_is_asked_for_and_of_one_commit(
  cache, monkeypatch, name
):
  asked, where = [], put_in(cache, name)

  def snapshot_download(model, revision, allow_patterns, etag_timeout):
    assert model == 'some/model'
    asked.append((revision, set(allow_patterns)))
    return str(where)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  monkeypatch.setattr(huggingface_hub.HfApi, 'model_info', lambda *a, **b: 1)
  assert fetch.locate('some/model', weights=False) == where
  assert fetch.locate('some/model') == where
  about = {'config.json', fetch.INDEX, *fetch.COMPANIONS}
  assert not [p for p in about if '.safetensors' in p and p != fetch.INDEX]
  weights = {p.name for p in where.glob('*.safetensors')}
  assert asked == [(None, about)] * 2 + [(COMMIT, weights)]


def test_nothing_is_sent_without_a_token(cache, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(huggingface_hub, 'HfApi', None)  # is not even made
  with pytest.raises(ValueError, match='set HF_TOKEN'):
    fetch.push(tmp_path, 'me/policy')
  run = [str(tmp_path / 'run'), str(tmp_path / 'out')]
  with pytest.raises(SystemExit):
    export.main([*run, '--push_to_hub', 'me/policy'])
  said = capsys.readouterr().err
  assert said.startswith('error: --push_to_hub needs a token with write access')
  assert said.count('\n') == 1


def test_the_directory_is_sent_with_the_token_of_the_environment(
  cache, tmp_path, monkeypatch
):
  done = []

  class Api:
    def __init__(self, token):
      done.append(token)

    def create_repo(self, name, private, exist_ok):
      done.append((name, private, exist_ok))
      return f'https://hub/{name}'

    def upload_folder(self, repo_id, folder_path):
      done.append((repo_id, folder_path))

  monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
  monkeypatch.setenv('HF_TOKEN', 'hf_secret')
  assert fetch.push(tmp_path, 'me/policy') == 'https://hub/me/policy'
  sent = ('me/policy', str(tmp_path))
  assert done == ['hf_secret', ('me/policy', True, True), sent]


def test_an_upload_that_fails_is_one_line(tmp_path, monkeypatch):
  class Api:
    def __init__(self, token):
      pass

    def create_repo(self, name, private, exist_ok):
      raise RuntimeError('403\n\nno rights')

  monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
  monkeypatch.setenv('HF_TOKEN', 'hf_secret')
  with pytest.raises(ConnectionError) as e:
    fetch.push(tmp_path, 'me/policy')
  said = str(e.value)
  assert said.startswith('nothing was uploaded to me/policy (403 no rights)')
  assert said.endswith(f'it is in {tmp_path}')
  assert 'hf_secret' not in said
