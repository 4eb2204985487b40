"""Fetching from the Hugging Face hub, and uploading to it.

Only the files that are read are fetched: configuration, tokenizer, and
safetensors. huggingface_hub is imported when a hub id is asked for; its
HF_HUB_OFFLINE, HF_HOME and HF_ENDPOINT hold, and for reading its login. An
upload needs a token in the environment.
"""

import errno
import json
import os
import re
import threading
from pathlib import Path

from jaxrl_tok.hub import packages

HUB_ID = r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*'
SHARD = r'[\w-][\w.-]*\.safetensors'  # file name: no path, no pattern
TIMEOUT = 3  # seconds until the hub counts as out of reach
INDEX, SINGLE = 'model.safetensors.index.json', 'model.safetensors'
GGUF, MAGIC = '.gguf', b'GGUF'  # ending, first bytes
# files that go with the weights, and are copied as they are
COMPANIONS = (
  'generation_config.json',
  'tokenizer*.json',
  'tokenizer.model',
  'spiece.model',
  'sentencepiece.bpe.model',
  '*.spm',
  'vocab.json',
  'vocab.txt',
  'merges.txt',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.j*',
  'additional_chat_templates/*.jinja',
)


def is_gguf(file: Path) -> bool:
  """Tells whether a file is of GGUF, by its ending or its first bytes."""
  if not file.is_file():
    return False
  if file.suffix.lower() == GGUF:
    return True
  try:
    with open(file, 'rb') as opened:
      return opened.read(len(MAGIC)) == MAGIC
  except OSError:  # not ours to read
    return False


def is_hub_id(model: str) -> bool:
  """Tells whether it can only be an id: owner/name, and no file here."""
  named = re.fullmatch(HUB_ID, model) and not model.lower().endswith(GGUF)
  return bool(named) and not Path(model).exists()


def locate(
  model: str, revision: str | None = None, weights: bool = True
) -> Path:
  """Finds the directory or the GGUF file of a model, and fetches what is a hub
  id.

  Args:
    model: directory, GGUF file, pip:PACKAGE that holds one, or hub id.
    revision: a branch, tag or commit of the hub.
    weights: False: all other files.

  Raises FileNotFoundError or ConnectionError, in one line, with the argument
  to pass instead.
  """
  if model.startswith(packages.SCHEME):
    return packages.model_file(model)
  path = Path(model).expanduser()
  if path.is_dir() or is_gguf(path):
    return path
  if path.suffix.lower() == GGUF:
    raise FileNotFoundError(f'{model} is not there; pass --model a GGUF file')
  if not is_hub_id(model):
    raise FileNotFoundError(
      f'{model} is no directory and no hub id; pass --model a directory with '
      'config.json and model.safetensors, a .gguf file, or an id such as '
      'Qwen/Qwen2.5-0.5B-Instruct'
    )
  wanted = ['config.json', INDEX, *COMPANIONS]
  found = _fetch(model, revision, wanted, needed=wanted[:1])
  if not weights:
    return found
  index, shards = found / INDEX, [SINGLE]
  if index.is_file():
    shards = sorted(set(weight_map(index).values()))
  return _fetch(model, revision or found.name, shards, needed=shards)


def commit_of(directory: Path | None) -> str | None:
  """Commit of a directory that was fetched; None for any other."""
  fetched = directory is not None and directory.parent.name == 'snapshots'
  return directory.name if fetched else None


def _fetch(model: str, revision, patterns: list[str], needed: list[str]):
  """Fetches files from the hub, or else finds them in its cache, which must
  have those that are needed -> their directory."""
  import huggingface_hub as hub
  from huggingface_hub import constants, errors

  def snapshot(**options):
    return Path(
      hub.snapshot_download(
        model, revision=revision, allow_patterns=patterns, **options
      )
    )

  if constants.HF_HUB_OFFLINE:
    why = 'HF_HUB_OFFLINE is set'
  else:
    try:
      _ask(hub.HfApi().model_info, model, revision=revision, timeout=TIMEOUT)
      return snapshot(etag_timeout=TIMEOUT)
    except errors.RevisionNotFoundError:
      raise FileNotFoundError(
        f'{model} has no revision {revision}; look at '
        f'https://huggingface.co/{model}/refs'
      ) from None
    except errors.RepositoryNotFoundError:
      raise FileNotFoundError(
        f'{model} is not on the hub, or is private or gated; check the id, '
        'and set HF_TOKEN where it needs one'
      ) from None
    except Exception as e:  # any fault of the network becomes one line
      if getattr(e, 'errno', None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        raise OSError(f'{model} cannot be stored: {e}') from None
      why = f'the hub cannot be reached ({type(e).__name__})'
  try:
    found = snapshot(local_files_only=True)
    missing = [name for name in needed if not (found / name).is_file()]
  except errors.LocalEntryNotFoundError:
    missing = needed
  if missing:
    raise ConnectionError(
      f'{model} is not in the local cache and {why}; pass --model a local '
      'directory'
    )
  return found


def _ask(question, *args, **options):
  """Calls question(...). Raises TimeoutError after a while: looking up a name
  has no timeout of its own."""
  answers, faults = [], []

  def ask():
    try:
      answers.append(question(*args, **options))
    except Exception as e:
      faults.append(e)

  asking = threading.Thread(target=ask, daemon=True)
  asking.start()
  asking.join(TIMEOUT + 1)
  if faults:
    raise faults[0]
  if not answers:
    raise TimeoutError(f'no answer in {TIMEOUT + 1} s')
  return answers[0]


def weight_map(index: Path) -> dict[str, str]:
  """Reads a shard index, {tensor: file}. Raises ValueError for files outside
  its directory."""
  try:
    found = json.loads(index.read_text('utf-8-sig'))['weight_map']
    files = found.values()
  except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
    raise ValueError(f'{index}: no shard index; fetch it again') from None
  for file in files:
    if not isinstance(file, str) or not re.fullmatch(SHARD, file):
      raise ValueError(
        f'{index} points to {file!r}, which is no safetensors file beside it; '
        'it is not to be trusted'
      )
  return found


def push_token() -> str:
  """Reads the token of the environment. Raises ValueError without one."""
  token = os.environ.get('HF_TOKEN')
  if not token:
    raise ValueError(
      '--push_to_hub needs a token with write access in the environment; set '
      'HF_TOKEN'
    )
  return token


def push(directory: str | Path, repository: str) -> str:
  """Uploads a directory to a model repository, made private where there is
  none.

  Returns its address. Raises ConnectionError, in one line, for any fault of
  the hub or the network.
  """
  import huggingface_hub as hub

  api = hub.HfApi(token=push_token())
  try:
    url = api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=str(directory))
  except Exception as e:
    said = ' '.join(str(e).split())[:200]
    raise ConnectionError(
      f'nothing was uploaded to {repository} ({said}); it is in {directory}'
    ) from None
  return str(url)
