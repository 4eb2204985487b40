"""Rewards of an endpoint: against a server of the test on this machine."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxrl_tok import rewards
from jaxrl_tok.rewards import Endpoint


@pytest.fixture
def server(monkeypatch):
  """A server whose `reply(path, question)` gives (status, body, headers), and
  that notes requests in `seen`."""
  monkeypatch.setenv('no_proxy', '*')

  class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
      size = int(self.headers['Content-Length'])
      question = json.loads(self.rfile.read(size))
      with httpd.lock:
        httpd.seen.append((self.path, question, dict(self.headers)))
      status, body, headers = httpd.reply(self.path, question)
      self.send_response(status)
      for name, value in headers.items():
        self.send_header(name, value)
      self.end_headers()
      for piece in [body] if isinstance(body, bytes) else body:
        try:
          self.wfile.write(piece)
        except OSError:  # the client has gone
          return

    def log_message(self, *args):
      pass

  httpd = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  httpd.seen, httpd.lock = [], threading.Lock()
  httpd.url = f'http://127.0.0.1:{httpd.server_port}/v1'
  thread = threading.Thread(target=httpd.serve_forever, daemon=True)
  thread.start()
  yield httpd
  httpd.shutdown()
  httpd.server_close()
  thread.join()


def answer(value):
  return 200, json.dumps(value).encode(), {'Content-Type': 'application/json'}


def says(text):
  return answer({'choices': [{'message': {'content': text}}]})


def embedding(path, question):
  """Counts of a, b and c in the text."""
  vector = [question['input'].count(c) for c in 'abc']
  return answer({'data': [{'embedding': vector}]})


def judged(reward, completions, **given):
  """Values of a reward, called in this process, and what it logs."""
  logged = {}
  values = reward.function(
    prompts=given.pop('prompts', ['Q'] * len(completions)),
    completions=completions,
    log_metric=logged.__setitem__,
    **given,
  )
  return values, logged


# --- similarity


def test_similarity_is_the_cosine(server):
  server.reply = embedding
  reward = rewards.similarity(Endpoint(server.url, 'small', key='k'))
  values, logged = judged_similarity(
    reward,
    ['aab', [{'role': 'assistant', 'content': 'a'}], 'b', 'a'],
    ['ab', 'a', ['c', 'bb'], None],
  )
  assert values[:3] == pytest.approx([3 / (5 * 2) ** 0.5, 1, 1])
  assert values[3] is None
  assert logged == {'similarity_failed': 0}
  paths, questions, headers = zip(*server.seen)
  assert set(paths) == {'/v1/embeddings'}
  assert {q['model'] for q in questions} == {'small'}
  assert {h['Authorization'] for h in headers} == {'Bearer k'}
  texts = sorted(q['input'] for q in questions)
  assert texts == ['a', 'aab', 'ab', 'b', 'bb', 'c']  # each once


def judged_similarity(reward, completions, references):
  logged = {}
  values = reward.function(
    completions=completions,
    reference=references,
    log_metric=logged.__setitem__,
  )
  return values, logged


def test_a_text_without_an_embedding_has_no_similarity(server):
  server.reply = embedding
  reward = rewards.similarity(Endpoint(server.url, tries=1))
  values, logged = judged_similarity(reward, ['a', 'x', 'a'], ['a', 'a', 'x'])
  assert values == [1, None, None]
  assert logged == {'similarity_failed': 1}


def test_no_reference_asks_nothing(server):
  reward = rewards.similarity(Endpoint(server.url))
  assert judged_similarity(reward, ['a'], [None])[0] == [None]
  assert server.seen == []


# --- judge


@pytest.mark.parametrize(
  ('said', 'grade'),
  [
    ('7', 0.7),
    ('Grade: 7/10', 0.7),
    ('8 out of 10.', 0.8),
    ('First 3 points are good. 9.5', 0.95),
    ('10', 1),
    ('0', 0),
  ],
)
def test_grades_are_read(server, said, grade):
  server.reply = lambda path, question: says(said)
  reward = rewards.judge(Endpoint(server.url, 'big'))
  assert judged(reward, ['text'])[0] == [pytest.approx(grade)]


def test_a_judge_is_asked_in_a_worker(server):
  """With its lock, and the answers that it keeps."""
  server.reply = lambda path, question: says('7')
  reward, logged = rewards.judge(Endpoint(server.url, 'big', key='k')), {}
  for _ in range(2):
    values = reward(
      prompts=['Q', 'R'],
      completions=['a', 'b'],
      log_metric=logged.__setitem__,
    )
    assert values == [0.7, 0.7]
  assert logged == {'judge_failed': 0}
  assert len(server.seen) == 2
  reward.workers.close()


def test_a_judge_reads_prompt_completion_and_columns(server):
  server.reply = lambda path, question: says('3')
  reward = rewards.judge(
    Endpoint(server.url, 'big'),
    'Facts: {facts}\nQ: {prompt}\nA: {completion}\n1 to 5',
    low=1,
    high=5,
    max_tokens=8,
  )
  rewards.check_functions({'judge': reward}, ['prompt', 'facts'])
  with pytest.raises(ValueError, match='asks for facts'):
    rewards.check_functions({'judge': reward}, ['prompt'])
  values, logged = judged(
    reward,
    [[{'role': 'assistant', 'content': '{prompt} {facts}'}]],
    prompts=[[{'role': 'user', 'content': 'Why?'}]],
    facts=[['a', 'b']],
  )
  assert values == [0.5]
  assert logged == {'judge_failed': 0}
  ((path, question, headers),) = server.seen
  assert path == '/v1/chat/completions'
  assert question == {
    'model': 'big',
    'temperature': 0,
    'max_tokens': 8,
    'messages': [
      {
        'role': 'user',
        # what the completion writes in braces is not filled in
        'content': "Facts: ['a', 'b']\nQ: Why?\nA: {prompt} {facts}\n1 to 5",
      }
    ],
  }
  assert 'Authorization' not in headers


def test_equal_requests_are_sent_once(server, tmp_path):
  server.reply = lambda path, question: says('5')
  for _ in range(2):
    endpoint = Endpoint(server.url, 'big', cache=tmp_path / 'answers')
    reward = rewards.judge(endpoint)
    for _ in range(2):
      assert judged(reward, ['a', 'a', 'b'])[0] == [0.5] * 3
  assert len(server.seen) == 2
  assert len(list((tmp_path / 'answers').iterdir())) == 2
  wider = rewards.judge(endpoint, high=20)  # the answer is kept, not its value
  assert judged(wider, ['a'])[0] == [0.25]
  assert len(server.seen) == 2
  other = rewards.judge(Endpoint(server.url, 'other', cache=tmp_path))
  judged(other, ['a'])
  assert len(server.seen) == 3


def test_a_file_of_the_cache_that_is_cut_off_is_asked_again(server, tmp_path):
  server.reply = lambda path, question: says('5')
  judged(rewards.judge(Endpoint(server.url, cache=tmp_path)), ['a'])
  (file,) = tmp_path.iterdir()
  file.write_text('')
  reward = rewards.judge(Endpoint(server.url, cache=tmp_path))
  assert judged(reward, ['a'])[0] == [0.5]
  assert len(server.seen) == 2
  assert json.loads(file.read_text())['choices']


def only_for(text: str, other):
  """Replies with a grade where a question has the text, else with `other`."""

  def reply(path, question):
    said = question['messages'][0]['content']
    return says('5') if text in said else other

  return reply


@pytest.mark.parametrize(
  'other',
  [
    says('no idea'),
    says('11'),
    says(None),
    answer({'error': 'overloaded'}),
    answer([]),
    (200, b'<html>', {}),
    (200, b'', {}),
    (503, b'{}', {}),
    (302, b'', {'Location': 'http://127.0.0.1:9/'}),
  ],
)
def test_a_request_that_fails_does_not_apply(server, other):
  server.reply = only_for('good', other)
  reward = rewards.judge(Endpoint(server.url, tries=2, deadline=20))
  values, logged = judged(reward, ['good', 'bad'])
  assert values == [0.5, None]
  assert logged == {'judge_failed': 1}


def test_a_request_is_tried_again(server):
  replies = iter([(500, b'', {}), says('5'), says('6')])
  server.reply = lambda path, question: next(replies)
  assert judged(rewards.judge(Endpoint(server.url)), ['a'])[0] == [0.5]
  assert len(server.seen) == 2


def slowly(path, question):
  """An answer that arrives byte by byte, for ever."""

  def pieces():
    while True:
      time.sleep(0.02)
      yield b' '

  return 200, pieces(), {}


def test_a_deadline_ends_a_slow_answer(server):
  server.reply = slowly
  reward = rewards.judge(Endpoint(server.url, tries=1, deadline=0.3))
  with pytest.raises(ValueError, match='the deadline is over') as e:
    judged(reward, ['a', 'b'])
  said = str(e.value)
  assert said.startswith(f'{server.url} gave no answer to 2 requests of chat/')
  assert '\n' not in said


def test_no_server_is_one_line(monkeypatch):
  monkeypatch.setenv('no_proxy', '*')
  reward = rewards.judge(Endpoint('http://127.0.0.1:9/v1', tries=1))
  with pytest.raises(ValueError, match=r'refused.*start it') as e:
    judged(reward, ['a'])
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  ('settings', 'said'),
  [
    ({}, 'an Endpoint has no address; pass url=, as http://localhost:8000/v1'),
    ({'url': ''}, 'an Endpoint has no address'),
    ({'url': 'localhost:8000'}, 'localhost:8000 is no address'),
    ({'url': 'file:///etc/passwd'}, 'is no address'),
    ({'url': 'http://me:word@host/v1'}, 'holds a password; pass key='),
    ({'url': 'http://host', 'deadline': 0}, 'pass numbers above 0'),
    ({'url': 'http://host', 'tries': 0}, 'pass numbers above 0'),
    ({'url': 'http://host', 'workers': 0}, 'pass numbers above 0'),
  ],
)
def test_endpoints_that_cannot_be_are_one_line(settings, said):
  with pytest.raises(ValueError, match='pass') as e:
    Endpoint(**settings)
  assert said in str(e.value)
  assert '\n' not in str(e.value)
  assert 'word' not in str(e.value).replace('password', '')


def test_a_key_is_not_shown():
  assert 'secret' not in repr(Endpoint('http://host', key='secret'))


def test_a_question_has_the_completion():
  for question, low, high in (('{prompt}', 0, 1), ('{completion}', 1, 1)):
    with pytest.raises(ValueError, match='judge needs'):
      rewards.judge(Endpoint('http://host'), question, low, high)
