"""Fake Google Cloud Storage: its JSON API over HTTP, objects in memory.

gcsfs and tensorstore find it by the variables of `environment`.
"""

import email.parser
import email.policy
import http.server
import json
import re
import threading
import urllib.parse


class Store:
  """Objects {(bucket, name): (bytes, generation)}; where refuse(method, name)
  is true a request fails with 403."""

  def __init__(self):
    self.objects, self.uploads, self.generation = {}, {}, 0
    self.lock, self.refuse = threading.Lock(), lambda method, name: False

  def put(self, bucket: str, name: str, content: bytes) -> dict:
    with self.lock:
      self.generation += 1
      self.objects[bucket, name] = bytes(content), self.generation
    return self.described(bucket, name)

  def described(self, bucket: str, name: str) -> dict:
    content, generation = self.objects[bucket, name]
    return {
      'kind': 'storage#object',
      'bucket': bucket,
      'name': name,
      'size': str(len(content)),
      'generation': str(generation),
      'metageneration': '1',
      'updated': '2026-01-01T00:00:00.000Z',
      'timeCreated': '2026-01-01T00:00:00.000Z',
    }

  def names(self, bucket: str) -> list[str]:
    return sorted(name for b, name in list(self.objects) if b == bucket)


def listing(store: Store, bucket: str, query: dict) -> dict:
  prefix, delimiter = query.get('prefix', ''), query.get('delimiter', '')
  start, end = query.get('startOffset', ''), query.get('endOffset')
  items, prefixes = [], set()
  for name in store.names(bucket):
    inside = name.startswith(prefix) and name >= start
    if not inside or (end is not None and name >= end):
      continue
    rest = name[len(prefix) :]
    if delimiter and delimiter in rest:
      prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
    else:
      items.append(store.described(bucket, name))
  return {'items': items, 'prefixes': sorted(prefixes)}


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  store: Store

  def log_message(self, *args):
    """Says nothing."""

  def answer(self, status: int, content=b'', **headers):
    if isinstance(content, dict):
      content, headers['Content-Type'] = json.dumps(content).encode(), 'x/json'
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), str(value))
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    self.wfile.write(content)

  def body(self) -> bytes:
    if self.headers.get('Transfer-Encoding') == 'chunked':
      found = b''
      while size := int(self.rfile.readline(), 16):
        found += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
      return found
    return self.rfile.read(int(self.headers.get('Content-Length', 0)))

  def parsed(self):
    """(bucket, object or None, query) of the address."""
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    match = re.search(r'/b/([^/]+)(?:/o(?:/([^/]+))?)?', url.path)
    name = match[2] and urllib.parse.unquote(match[2])
    return match[1], name, query

  def refused(self, name) -> bool:
    if self.store.refuse(self.command, name):
      self.answer(403, {'error': {'code': 403, 'message': 'not yours'}})
      return True
    return False

  def do_GET(self):
    self.body()
    bucket, name, query = self.parsed()
    if self.refused(name):
      return
    if name is None:
      self.answer(200, listing(self.store, bucket, query))
      return
    if (bucket, name) not in self.store.objects:
      self.answer(404, {'error': {'code': 404, 'message': 'Not Found'}})
      return
    content, generation = self.store.objects[bucket, name]
    if query.get('alt') != 'media':
      self.answer(200, self.store.described(bucket, name))
    elif query.get('ifGenerationNotMatch') == str(generation):
      self.answer(304)
    else:
      status, extra = 200, {}
      if asked := re.fullmatch(
        r'bytes=(\d*)-(\d*)', self.headers.get('Range', '')
      ):
        first = int(asked[1] or max(len(content) - int(asked[2] or 0), 0))
        last = int(asked[2]) + 1 if asked[1] and asked[2] else len(content)
        total, content, status = len(content), content[first:last], 206
        extra['Content_Range'] = (
          f'bytes {first}-{first + len(content) - 1}/{total}'
        )
      self.answer(status, content, x_goog_generation=generation, **extra)

  def do_POST(self):
    bucket, name, query = self.parsed()
    if 'upload_id' in query:
      self.do_PUT()
      return
    content = self.body()
    kind = query.get('uploadType')
    if '/rewriteTo/' in self.path or '/copyTo/' in self.path:
      target = re.search(r'To/b/([^/]+)/o/([^/?]+)', self.path)
      whole = self.store.objects[bucket, name][0]
      put = self.store.put(target[1], urllib.parse.unquote(target[2]), whole)
      self.answer(200, {'done': True, 'resource': put})
      return
    if kind == 'multipart':
      head = f'Content-Type: {self.headers["Content-Type"]}\n\n'.encode()
      parser = email.parser.BytesParser(policy=email.policy.HTTP)
      first, _ = parser.parsebytes(head + content).iter_parts()
      name = json.loads(first.get_content())['name']
      # bytes as they are: the parser would change ends of lines
      edge = b'\n--' + self.headers.get_boundary().encode()
      start = content.index(b'\n\n', content.index(edge) + 1) + 2
      content = content[start : content.rindex(edge)]
    elif kind == 'resumable':
      name = query.get('name') or json.loads(content)['name']
    else:
      name = query.get('name', name)
    if self.refused(name):
      return
    if query.get('ifGenerationMatch') == '0' and (
      (bucket, name) in self.store.objects
    ):
      self.answer(412)
    elif kind == 'resumable':
      key = str(len(self.store.uploads))
      self.store.uploads[key] = name, b''
      host = self.headers['Host']
      self.answer(
        200, Location=f'http://{host}/upload/b/{bucket}/o?upload_id={key}'
      )
    else:
      self.answer(200, self.store.put(bucket, name, content))

  def do_PUT(self):
    content = self.body()
    bucket, _, query = self.parsed()
    name, before = self.store.uploads[query['upload_id']]
    content = before + content
    self.store.uploads[query['upload_id']] = name, content
    if self.headers.get('Content-Range', '').endswith('/*'):
      self.answer(308, Range=f'bytes=0-{len(content) - 1}')
    elif not self.refused(name):
      self.answer(200, self.store.put(bucket, name, content))

  def do_DELETE(self):
    self.body()
    bucket, name, _ = self.parsed()
    found = self.store.objects.pop((bucket, name), None)
    self.answer(204 if found else 404)


class Server:
  """Server on a free port, while it is entered."""

  def __init__(self):
    self.store = Store()
    handler = type('OfStore', (Handler,), {'store': self.store})
    self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)

  @property
  def environment(self) -> dict[str, str]:
    address = f'http://127.0.0.1:{self._server.server_port}'
    return {
      'STORAGE_EMULATOR_HOST': address,
      'TENSORSTORE_GCS_HTTP_URL': address,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'anyone',
      'FSSPEC_GCS_TOKEN': 'anon',
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    }

  def __enter__(self) -> 'Server':
    serve = self._server.serve_forever
    threading.Thread(target=serve, args=(0.01,), daemon=True).start()
    return self

  def __exit__(self, *error) -> None:
    self._server.shutdown()
    self._server.server_close()
