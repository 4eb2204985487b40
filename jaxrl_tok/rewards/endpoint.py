"""Endpoint of one's own that speaks OpenAI's protocol, over HTTP.

Nothing is called without an address. Answers are kept by request, so that an
equal request is not sent again.
"""

import contextlib
import dataclasses
import hashlib
import http.client
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxrl_tok.rewards.functions import shorten

LARGEST = 16 << 20  # bytes of an answer
KEPT = 1 << 12  # answers in memory


class Failed(Exception):
  """A request without an answer; the message is its reason."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """Address of an OpenAI-compatible endpoint, and how it is asked.

  Endpoint('http://localhost:8000/v1', 'qwen', deadline=20)

  Raises ValueError for a value that cannot be; sends nothing.
  """

  url: str | None = None
  model: str = ''
  key: str | None = dataclasses.field(default=None, repr=False)
  """Sent as the bearer token, and not recorded."""
  deadline: float = 30.0
  """Seconds for a request."""
  tries: int = 2
  """Requests until one fails for good."""
  workers: int = 8
  """Requests side by side."""
  cache: str | Path | None = None
  """Directory that keeps the answers; None: the process does, the last ones."""
  kept: dict = dataclasses.field(default_factory=dict, repr=False)
  lock: threading.Lock = dataclasses.field(
    default_factory=threading.Lock, repr=False
  )

  def __reduce__(self):  # on its way to a worker; neither lock nor answers go
    names = 'url', 'model', 'key', 'deadline', 'tries', 'workers', 'cache'
    return Endpoint, tuple(getattr(self, name) for name in names)

  def __post_init__(self):
    if not self.url:
      raise ValueError(
        'an Endpoint has no address; pass url=, as http://localhost:8000/v1'
      )
    parts = urllib.parse.urlsplit(self.url)
    if parts.scheme not in ('http', 'https') or not parts.hostname:
      raise ValueError(
        f'{shorten(self.url)} is no address; pass one as '
        'http://localhost:8000/v1'
      )
    if parts.username or parts.password:
      raise ValueError(
        f'the address of {parts.hostname} holds a password; pass key=, which '
        'is not recorded'
      )
    if self.deadline <= 0 or self.tries < 1 or self.workers < 1:
      raise ValueError(
        f'an Endpoint with deadline {self.deadline}, tries {self.tries} and '
        f'workers {self.workers}; pass numbers above 0'
      )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
  """Takes a redirection for an error: the key is for one address."""

  def redirect_request(self, *args):
    return None


def post(endpoint: Endpoint, path: str, body: bytes) -> bytes:
  """Answer to a request. Raises Failed."""
  headers = {'Content-Type': 'application/json'}
  if endpoint.key:
    headers['Authorization'] = f'Bearer {endpoint.key}'
  address = f'{endpoint.url.rstrip("/")}/{path}'
  request = urllib.request.Request(address, body, headers)
  end = time.monotonic() + endpoint.deadline
  opener = urllib.request.build_opener(_NoRedirect)
  try:
    with opener.open(request, timeout=endpoint.deadline) as response:
      return _read(response, end)
  except urllib.error.HTTPError as e:
    with contextlib.closing(e):
      raise Failed(shorten(f'HTTP {e.code} {e.reason}')) from None
  except (OSError, http.client.HTTPException) as e:
    raise Failed(shorten(getattr(e, 'reason', None) or e)) from None


def _read(response, end: float) -> bytes:
  """Bytes of an answer; a socket's timeout is for each of its pieces alone."""
  pieces, size = [], 0
  while piece := response.read1(1 << 16):
    pieces.append(piece)
    size += len(piece)
    if time.monotonic() > end:
      raise Failed('the deadline is over')
    if size > LARGEST:
      raise Failed(f'the answer has more than {LARGEST} bytes')
  return b''.join(pieces)


def ask(endpoint: Endpoint, path: str, body: bytes, read: Callable):
  """read(JSON) of the answer to a request; answers that can be read are kept.
  Raises Failed."""
  asked = f'{endpoint.url} {path}\n'.encode() + body
  name = hashlib.sha256(asked).hexdigest()
  file = endpoint.cache and Path(endpoint.cache).expanduser() / f'{name}.json'
  with endpoint.lock:
    answer = endpoint.kept.pop(name, None)
  if answer is None and file and file.exists():
    answer = file.read_bytes()
  try:
    value = _parse(answer or b'', read)
  except Failed:  # not kept, or a file that was cut off
    answer, value = _ask_anew(endpoint, path, body, read)
    if file:
      file.parent.mkdir(parents=True, exist_ok=True)
      own = file.with_suffix(f'.{threading.get_ident()}')
      own.write_bytes(answer)
      own.replace(file)
  with endpoint.lock:
    endpoint.kept[name] = answer
    while len(endpoint.kept) > KEPT:
      endpoint.kept.pop(next(iter(endpoint.kept)))
  return value


def _ask_anew(endpoint: Endpoint, path: str, body: bytes, read: Callable):
  """(answer, read(JSON)) of the first try that can be read."""
  for left in reversed(range(endpoint.tries)):
    try:
      answer = post(endpoint, path, body)
      return answer, _parse(answer, read)
    except Failed:
      if not left:
        raise


def _parse(answer: bytes, read: Callable):
  try:
    found = json.loads(answer)
  except (ValueError, RecursionError):
    raise Failed('the answer is no JSON') from None
  try:
    return read(found)
  except (LookupError, TypeError, ValueError):
    raise Failed('the answer has another form') from None


def ask_all(
  endpoint: Endpoint, path: str, questions: list[dict], read: Callable
) -> list:
  """Answers to questions, asked side by side: read(JSON), None where a request
  failed. Raises ValueError where all did."""
  bodies = [json.dumps(q, sort_keys=True).encode() for q in questions]
  unique, errors = list(dict.fromkeys(bodies)), []

  def one(body: bytes):
    try:
      return ask(endpoint, path, body, read)
    except Failed as e:
      errors.append(str(e))
      return None

  with ThreadPoolExecutor(endpoint.workers) as pool:
    found = dict(zip(unique, pool.map(one, unique)))
  if errors and len(errors) == len(unique):
    raise ValueError(
      f'{endpoint.url} gave no answer to {len(errors)} requests of {path} '
      f'({errors[0]}); start it, or give its address, model, or a longer '
      'deadline'
    )
  return [found[body] for body in bodies]
