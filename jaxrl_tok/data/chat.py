"""Chat: messages become the text that a model's template writes.

1. `check_messages` refuses messages that no template of text can write.
2. `render` continues a last message of the assistant; after any other message
   it opens the assistant's turn.

Messages are those of OpenAI's and Hugging Face's chats: a role, and content,
which is text, a list of parts of text, or None beside tool calls.
"""

import contextlib
import datetime
import json
import re
from typing import NamedTuple

ROLES = (
  'system',
  'developer',
  'user',
  'assistant',
  'model',
  'tool',
  'function',
  'ipython',
  'observation',
)
WRITERS = 'assistant', 'model'  # roles that the policy writes
# fields beside which a message may have no content
INSTEAD = 'tool_calls', 'reasoning_content', 'thinking', 'reasoning'
# arguments of apply_chat_template that are chosen here
TAKEN = (
  *('conversation', 'messages', 'tools', 'chat_template', 'tokenize'),
  *('add_generation_prompt', 'continue_final_message', 'padding', 'truncation'),
  *('max_length', 'return_tensors', 'return_dict', 'tokenizer_kwargs'),
  *('return_assistant_tokens_mask', 'sanitize_control_tokens', 'strftime_now'),
)


class Chat(NamedTuple):
  """Choices that every prompt of messages is rendered with."""

  kwargs: dict = {}  # noqa: RUF012  variables of the template
  date: str | None = None  # YYYY-MM-DD, as strftime_now has it; None: today
  # whether the assistant's turn is opened after the messages; False: an
  # observation may follow them
  opened: bool = True


# --- messages ----------------------------------------------------------------


def check_content(message: dict, where: str) -> None:
  """Refuses content that is not text."""
  content = message.get('content')
  if isinstance(content, str):
    return
  if content is None and any(message.get(name) for name in INSTEAD):
    return
  if not isinstance(content, list):
    raise ValueError(
      f'{where}: a message is {{"role": ..., "content": text}}, not '
      f'{message!r}; only beside tool_calls may content be null'
    )
  for part in content:
    kind = part.get('type') if isinstance(part, dict) else None
    if kind != 'text' or not isinstance(part.get('text'), str):
      raise ValueError(
        f'{where}: a message has a part of type {kind!r}; give parts '
        '{"type": "text", "text": ...} alone, a policy of tokens reads text'
      )


def check_message(message, where: str) -> None:
  """Refuses what is no message."""
  if not isinstance(message, dict):
    raise ValueError(
      f'{where}: a message is {{"role": ..., "content": text}}, not {message!r}'
    )
  check_content(message, where)
  if message.get('role') not in ROLES:
    raise ValueError(
      f'{where}: unknown role {message.get("role")!r}; use {", ".join(ROLES)}'
    )
  calls = message.get('tool_calls')
  if calls is not None and (
    not isinstance(calls, list) or not all(isinstance(c, dict) for c in calls)
  ):
    raise ValueError(
      f'{where}: tool_calls {calls!r} is no list of objects; give '
      '[{"type": "function", "function": {"name": ..., "arguments": ...}}]'
    )


def check_messages(messages: list, where: str) -> None:
  """Refuses messages that cannot be rendered and then completed."""
  for message in messages:
    check_message(message, where)
  last = messages[-1] if messages else {}
  if last.get('role') in WRITERS and last.get('tool_calls'):
    raise ValueError(
      f'{where}: the conversation ends with tool calls of the assistant, which '
      "await an answer; add the tool's message"
    )


def without_nulls(value):
  """Value without the None fields of its objects. A column of Arrow gives every
  object the fields of all, None where it had none."""
  if isinstance(value, dict):
    return {k: without_nulls(v) for k, v in value.items() if v is not None}
  if isinstance(value, list):
    return [without_nulls(v) for v in value]
  return value


def content_text(content) -> str:
  """Text of a message's content: parts are joined; None is empty."""
  if isinstance(content, list):
    return ''.join(part['text'] for part in content)
  return content or ''


def plain_messages(messages: list[dict]) -> list[dict]:
  """Messages whose content is text, if they have any."""
  return [
    message
    if not isinstance(message.get('content'), list)
    else message | {'content': content_text(message['content'])}
    for message in messages
  ]


def tools_of(record: dict):
  """Tools of a record: its column `tools`, JSON schemas of functions in a list
  or in JSON. None without any."""
  tools = record.get('tools')
  if isinstance(tools, str):
    with contextlib.suppress(ValueError):  # then it is no list
      tools = json.loads(tools)
  if not tools:
    return None
  if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
    raise ValueError(
      'the column "tools" is no list of JSON schemas, which a chat template is '
      'given; correct it, or rename the column'
    )
  return tools


# --- the template ------------------------------------------------------------


def template_text(tokenizer) -> str:
  """Text of all chat templates of a tokenizer; empty without any."""
  found = getattr(tokenizer, 'chat_template', None) or ''
  return found if isinstance(found, str) else '\n'.join(found.values())


def asks_date(tokenizer) -> bool:
  """Tells whether a chat template asks for the date."""
  return 'strftime_now' in template_text(tokenizer)


def check_chat(tokenizer, chat: Chat) -> None:
  """Refuses choices that the tokenizer's template does not read."""
  text = template_text(tokenizer)
  if chat.kwargs and not text:
    raise ValueError(
      '--chat_template_kwargs has no effect: the tokenizer has no chat '
      'template; leave it out'
    )
  for name in chat.kwargs:
    if name in TAKEN:
      raise ValueError(
        f'--chat_template_kwargs cannot set {name!r}, which each prompt '
        'decides; leave it out'
      )
    if not re.search(rf'\b{re.escape(name)}\b', text):
      raise ValueError(
        f'--chat_template_kwargs {name!r} has no effect: the chat template '
        'does not read it; correct the name, or leave it out'
      )
  if chat.date is not None and not asks_date(tokenizer):
    raise ValueError(
      '--chat_date has no effect: the chat template asks for no date; leave it '
      'out'
    )


# `strftime_now` of a template, written in its own language: transformers takes
# no function from outside, and its own one is today's. It reads the format
# letter by letter; `date_codes` has {'%d': '26', ...}.
STRFTIME = (
  '{% macro strftime_now(format) %}{% set at = namespace(code="") %}'
  '{% for letter in format %}'
  '{% if at.code %}{% set at.code = at.code + letter %}'
  '{% if at.code in jaxrl_tok_date_codes %}'
  '{{ jaxrl_tok_date_codes[at.code] }}{% set at.code = "" %}{% endif %}'
  '{% elif letter == "%" %}{% set at.code = letter %}'
  '{% else %}{{ letter }}{% endif %}'
  '{% endfor %}{% endmacro %}\n'  # a newline after a block is left out
)
CODES = 'aAwdbBmyYHIMSpfzZjUWcxXGuVDFTReh%'


def date_codes(date: str) -> dict[str, str]:
  """{'%d': '26', '%-d': '6', ...} of a date, its time 00:00."""
  day = datetime.datetime.fromisoformat(date)
  codes = [f'%{flag}{code}' for flag in ('', '-') for code in CODES]
  return {code: day.strftime(code) for code in codes}


def dated(tokenizer, chat: Chat, tools) -> dict:
  """Arguments of apply_chat_template that fix the date."""
  if chat.date is None:
    return {}
  template = tokenizer.get_chat_template(tools=tools)
  if 'strftime_now' not in template:
    return {}
  return {
    'chat_template': STRFTIME + template,
    'jaxrl_tok_date_codes': date_codes(chat.date),
  }


def check_default(tokenizer, tools) -> None:
  """Refuses several named templates of which none is to be taken."""
  found = tokenizer.chat_template
  if isinstance(found, str) or 'default' in found:
    return
  if not (tools and 'tool_use' in found):
    raise ValueError(
      'the model has no chat template named default, which the prompt needs '
      f'(there are: {", ".join(found)}); name one of them default'
    )


def render(tokenizer, messages: list[dict], chat: Chat, tools=None) -> str:
  """Text of messages, to be completed by the policy.

  A last message of the assistant is continued where its text ends; after any
  other one the assistant's turn is opened, unless chat.opened is False: then
  the messages are written as they are. Raises ValueError, in one line,
  where the tokenizer has no template or the template refuses the messages.
  """
  if not template_text(tokenizer):
    raise ValueError(
      'the prompt is a list of messages and the tokenizer has no chat '
      'template; give prompts as text, or a model with a template'
    )
  check_default(tokenizer, tools)
  messages = plain_messages(messages)
  continued = chat.opened and messages[-1]['role'] in WRITERS
  if continued and not content_text(messages[-1].get('content')).strip():
    messages, continued = messages[:-1], False  # nothing to continue
  try:
    return tokenizer.apply_chat_template(
      messages,
      tools=tools,
      tokenize=False,
      add_generation_prompt=chat.opened and not continued,
      continue_final_message=continued,
      **dated(tokenizer, chat, tools),
      **chat.kwargs,
    )
  except Exception as e:  # a template raises what it likes
    said = ' '.join(str(e).split()) or type(e).__name__
    raise ValueError(
      f'the chat template refuses the messages ({said[:200]}); use the roles, '
      'in the order, that the model knows'
    ) from None
