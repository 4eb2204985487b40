"""Chats: messages become the text that the model's template writes, with the
run's variables and date."""

import datetime
import json
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from jaxrl_tok import Task, data, main, rewards
from jaxrl_tok.data.chat import Chat, date_codes, render
from jaxrl_tok.run import api, build, flags, inputs, prepare, record
from jaxrl_tok.run.begin import saved_settings
from jaxrl_tok.run.task import Caller

GOLDEN = Path(__file__).parent / 'golden/families'
USER = {'role': 'user', 'content': 'hi'}
CHATML = (
  '{%- for m in messages %}<{{ m.role }}>{{ m.content }}'
  '{%- for c in m.tool_calls or [] %}[{{ c.function | tojson }}]{% endfor %}'
  '<end>\n{% endfor %}'
  '{%- for t in tools or [] %}({{ t.name }}){% endfor %}'
  '{% if add_generation_prompt %}<assistant>'
  '{% if enable_thinking is defined and not enable_thinking %}<think></think>'
  '{% endif %}{% endif %}'
)
DATED = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"


@pytest.fixture
def tokenizer():
  found = data.byte_tokenizer()
  found.chat_template = CHATML
  return found


def text_of(tokenizer, messages, chat=Chat(), tools=None) -> str:  # noqa: B008
  """Text of the ids that a policy is given."""
  (ids,) = data.encode_prompts(tokenizer, [messages], chat=chat, tools=[tools])
  return tokenizer.decode(ids)


# --- the end of a conversation


@pytest.mark.parametrize(
  ('content', 'template'),
  [
    ('so far', CHATML),
    ('so far ', CHATML),
    (
      [{'type': 'text', 'text': 'so '}, {'type': 'text', 'text': 'far'}],
      CHATML,
    ),
    ('so far', CHATML.replace('m.content', 'm.content | trim')),
  ],
)
def test_a_last_message_of_the_assistant_is_continued(
  tokenizer, content, template
):
  tokenizer.chat_template = template
  text = text_of(tokenizer, [USER, {'role': 'assistant', 'content': content}])
  trailing = ' ' if content == 'so far ' else ''
  assert text == '<user>hi<end>\n<assistant>so far' + trailing


@pytest.mark.parametrize('role', ['user', 'system', 'developer', 'tool'])
def test_after_any_other_message_the_assistants_turn_is_opened(tokenizer, role):
  assert text_of(tokenizer, [USER, {'role': role, 'content': 'x'}]) == (
    f'<user>hi<end>\n<{role}>x<end>\n<assistant>'
  )


@pytest.mark.parametrize('content', ['', ' \n', []])
def test_an_empty_last_message_is_the_turn_opened(tokenizer, content):
  talk = [USER, {'role': 'assistant', 'content': content}]
  assert text_of(tokenizer, talk) == '<user>hi<end>\n<assistant>'


def test_earlier_messages_of_the_assistant_are_closed(tokenizer):
  talk = [USER, {'role': 'assistant', 'content': 'yes'}, USER]
  assert text_of(tokenizer, talk) == (
    '<user>hi<end>\n<assistant>yes<end>\n<user>hi<end>\n<assistant>'
  )


# --- messages

CALL = {'type': 'function', 'function': {'name': 'f', 'arguments': {'x': 1}}}
CALLED = {'role': 'assistant', 'content': None, 'tool_calls': [CALL]}
ANSWERED = {'role': 'tool', 'content': [{'type': 'text', 'text': '7'}]}


def test_tool_calls_without_content_are_rendered(tokenizer):
  talk = [USER, CALLED, ANSWERED]
  records = data.open_records([{'prompt': talk, 'tools': [{'name': 'f'}]}])
  found = data.prompt_set(records, tokenizer, 258)
  batch, _ = found.batch(records)
  assert tokenizer.decode(batch.tokens[0]) == (
    '<user>hi<end>\n<assistant>[{"name": "f", "arguments": {"x": 1}}]<end>\n'
    '<tool>7<end>\n(f)<assistant>'
  )
  assert records[0]['prompt'] == talk  # rewards read the data's own


def test_arrow_gives_messages_no_fields_that_they_had_not(tokenizer, tmp_path):
  import pyarrow as pa
  import pyarrow.parquet as pq

  other = {'name': 'g', 'arguments': {'y': 2}}
  talk = [USER, CALLED, ANSWERED | {'content': '7'}]
  talk[1:1] = [{'role': 'assistant', 'tool_calls': [{'function': other}]}]
  records = [{'prompt': talk, 'n': None}, {'prompt': [USER], 'n': None}]
  pq.write_table(pa.Table.from_pylist(records), tmp_path / 'x.parquet')
  found = data.open_records(tmp_path / 'x.parquet')
  assert '"arguments": {"y": 2}' in text_of(tokenizer, found[0]['prompt'])
  assert found[1] == records[1]
  plain = [m if m['role'] != 'assistant' else drop(m) for m in talk]
  same = data.open_records([{'prompt': plain}, records[1]])
  assert found.hashes.tolist() == same.hashes.tolist()


def drop(message: dict) -> dict:
  return {k: v for k, v in message.items() if v is not None}


def test_tools_are_a_list_or_json(tokenizer):
  for tools in ([{'name': 'g'}], '[{"name": "g"}]'):
    records = [{'prompt': [USER], 'tools': tools}]
    found = data.prompt_set(records, tokenizer, 258)
    assert tokenizer.decode(found.ids[0]).endswith('(g)<assistant>')
  records = [{'prompt': [USER]}, {'prompt': [USER, USER], 'tools': 'hammer'}]
  with pytest.raises(
    ValueError, match=r'record 1 .*"tools" is no list of JSON'
  ):
    data.prompt_set(records, tokenizer, 258)
  # text is no chat: its column `tools` is for the rewards
  data.prompt_set([{'prompt': 'x', 'tools': 'hammer'}], tokenizer, 258)


@pytest.mark.parametrize(
  ('message', 'says'),
  [
    ({'role': 'user', 'content': None}, 'only beside tool_calls may content'),
    ({'role': 'user'}, 'only beside tool_calls may content be null'),
    (
      {'role': 'user', 'content': [{'type': 'image', 'url': 'x'}]},
      "a part of type 'image'; give parts",
    ),
    (
      {'role': 'user', 'content': [{'type': 'text', 'text': 3}]},
      "a part of type 'text'; give",
    ),
    ({'role': 'user', 'content': ['x']}, 'a part of type None'),
    (
      {'role': 'narrator', 'content': 'x'},
      "unknown role 'narrator'; use system",
    ),
    ({**CALLED, 'tool_calls': 'f()'}, "tool_calls 'f()' is no list of objects"),
    (
      CALLED,
      'ends with tool calls of the assistant, which await an answer; add',
    ),
  ],
)
def test_messages_that_cannot_be_completed_are_named(message, says):
  with pytest.raises(ValueError, match=r'^record 1 of the data: ') as e:
    data.open_records([{'prompt': 'x'}, {'prompt': [USER, message]}])
  assert says in str(e.value)
  assert '\n' not in str(e.value)


def test_named_templates_of_which_none_is_the_default_are_named(tokenizer):
  tokenizer.chat_template = {'rag': 'R', 'tool_use': 'T'}
  says = r'^the model has no chat template named default.*: rag, tool_use\);'
  with pytest.raises(ValueError, match=says):
    render(tokenizer, [USER], Chat())
  assert render(tokenizer, [USER], Chat(), [{'name': 'f'}]) == 'T'
  tokenizer.chat_template |= {'default': 'D'}
  assert render(tokenizer, [USER], Chat()) == 'D'


def test_a_template_that_raises_is_one_line(tokenizer):
  tokenizer.chat_template = '{{ raise_exception("no\n" * 900) }}'
  with pytest.raises(ValueError, match='refuses the messages') as e:
    render(tokenizer, [USER], Chat())
  assert '\n' not in str(e.value)
  assert len(str(e.value)) < 400


# --- variables and the date


def test_variables_reach_the_template(tokenizer):
  assert text_of(tokenizer, [USER]).endswith('<assistant>')
  quiet = Chat({'enable_thinking': False})
  assert text_of(tokenizer, [USER], quiet).endswith('<think></think>')


@pytest.mark.parametrize(
  ('chat', 'says'),
  [
    (Chat({'enable_thinkin': False}), 'template does not read it; correct the'),
    (
      Chat({'messages': []}),
      "cannot set 'messages', which each prompt decides",
    ),
    (Chat({}, '2026-01-02'), '--chat_date has no effect: the chat template'),
  ],
)
def test_variables_that_nothing_reads_are_refused(tokenizer, chat, says):
  with pytest.raises(ValueError, match='--chat_') as e:
    data.prompt_set([{'prompt': [USER]}], tokenizer, 258, chat=chat)
  assert says in str(e.value)
  plain = data.byte_tokenizer()
  with pytest.raises(
    ValueError, match='the tokenizer has no chat template; le'
  ):
    data.prompt_set([{'prompt': 'x'}], plain, 258, chat=Chat({'a': 1}))


@pytest.mark.parametrize(
  'head', ['', '\n', '  {% set x = 1 %}\n', '{#- a #}\n ']
)
def test_the_date_is_the_one_given_and_nothing_else_changes(tokenizer, head):
  chat = Chat({}, '2024-07-04')
  tokenizer.chat_template = head + DATED.replace('%b', '%B, %A, %-d %%')
  want = '04 July, Thursday, 4 % 2024: hi'
  assert text_of(tokenizer, [USER], chat).strip() == want
  tokenizer.chat_template = (
    head + '{% if strftime_now is defined %}yes{% endif %}'
  )
  assert text_of(tokenizer, [USER], chat) == text_of(tokenizer, [USER])


def test_every_code_of_strftime_is_known(tokenizer):
  codes = date_codes('2024-07-04')
  assert codes['%Y-%m-%d'[:2]] == '2024'
  asked = ' '.join(c for c in codes if '-' not in c)
  tokenizer.chat_template = "{{ strftime_now('" + asked + "') }}"
  want = ' '.join(codes[c] for c in asked.split())
  assert text_of(tokenizer, [USER], Chat({}, '2024-07-04')) == want


@pytest.mark.parametrize(
  ('flag', 'value', 'says'),
  [
    ('chat_template_kwargs', '{"a": ', 'is no JSON object; pass one such as'),
    ('chat_template_kwargs', '[1]', 'is no JSON object; pass one such as'),
    ('chat_date', '4 July', "--chat_date '4 July' is no date; pass it as YYYY"),
  ],
)
def test_flags_of_chats_that_cannot_be_are_refused(flag, value, says):
  with pytest.raises(ValueError, match='--chat') as e:
    flags.settings_of({flag: value})
  assert says in str(e.value)


def test_variables_of_a_library_call_are_a_dict():
  given = api.sort_arguments({'chat_template_kwargs': {'think': False}})
  assert given.words == {'chat_template_kwargs': '{"think": false}'}


def test_special_tokens_are_kept_for_the_rewards_of_chats(tokenizer):
  seen = []

  def reward(completions, **columns):
    seen.extend(completions)
    return [0.0] * len(completions)

  hi = data.text_ids(tokenizer, 'hi')
  tokens = np.array([[*hi, 256, 257], [*hi, 256, *hi[:1]]])
  for keep in (False, True):
    score = rewards.make_scorer(
      {'reward': reward},
      lambda ids, **more: data.decode_all(tokenizer, ids, **more),
      [257],
      keep_special_tokens=keep,
    )
    score(tokens, tokens >= 0, [{'prompt': [USER]}])
  said = [message[0]['content'] for message in seen]
  assert said == ['hi', 'hih', 'hi<pad>', 'hi<pad>h']


# --- a run


@pytest.fixture(scope='module')
def dated_model(tmp_path_factory):
  """Directory of a model whose chat template asks for the date."""
  at = tmp_path_factory.mktemp('dated') / 'model'
  shutil.copytree(GOLDEN / 'llama', at)
  (at / 'chat_template.jinja').write_text(DATED + '{{ mood }}')
  return at


def on_day(monkeypatch, day: str):
  """Lets a run begin on a day."""
  date = types.SimpleNamespace(today=lambda: datetime.date.fromisoformat(day))
  monkeypatch.setattr(inputs, 'datetime', types.SimpleNamespace(date=date))


def test_a_resumed_run_renders_the_prompts_of_its_first_day(
  dated_model, tmp_path, monkeypatch
):
  records = [
    {'prompt': [{'role': 'user', 'content': f'{i}'}]} for i in range(9)
  ]
  task = Task(records, lambda completions, **_: [0.0] * len(completions))
  settings = {
    'model': str(dated_model),
    'num_prompts': 2,
    'held_out': 1,
    'mesh': 'data=1',
    'chat_template_kwargs': '{"mood": "!"}',
    'stop_token': ('7', '<eos>'),
    'output_dir': str(tmp_path / 'run'),
  }
  devices = jax.local_devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *args: devices)

  def begin(day: str, **more):
    on_day(monkeypatch, day)
    found = flags.settings_of(settings | more)
    caller = Caller('dated', 'python dated')
    return prepare.prepare(task, found, build.Own(), caller, {})

  first, run = begin('2024-07-04'), tmp_path / 'run'
  run.mkdir()
  record.write_run_files(first, run)
  assert yaml.safe_load((run / 'config.yaml').read_text())['chat_date'] == (
    '2024-07-04'
  )
  text = first.model.tokenizer.decode(first.data.ids[0])
  assert text == '04 Jul 2024: 0!'
  assert first.model.end_tokens == (257, 7)
  described = (run / 'model/generation_config.json').read_text()
  assert json.loads(described)['eos_token_id'] == [257, 7]
  again = begin('2024-07-05', resume='auto')
  assert saved_settings(again) == saved_settings(first) | {'resume': 'auto'}
  for a, b in zip(first.data.ids, again.data.ids, strict=True):
    assert a.tolist() == b.tolist()
  other = begin('2024-07-05')
  assert other.model.tokenizer.decode(other.data.ids[0]) == '05 Jul 2024: 0!'


@pytest.mark.parametrize(
  ('flag', 'value'),
  [('--chat_template_kwargs', '{"mood": "x"}'), ('--chat_date', '2026-01-02')],
)
def test_choices_of_no_chat_are_refused(dated_model, capsys, flag, value):
  task = Task([{'prompt': f'{i}'} for i in range(9)], lambda **_: [])
  with pytest.raises(SystemExit):
    main(task, [flag, value, '--model', str(dated_model)])
  said = capsys.readouterr().err
  assert f'{flag} has no effect: no prompt is a list of messages' in said
