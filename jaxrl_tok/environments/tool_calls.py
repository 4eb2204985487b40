"""Tool calls in a policy's text, in the formats that models are taught.

  'hermes'  <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>
            (Hermes 2 and 3, Qwen 2.5 and 3)
  'qwen'    the same, or Qwen 3 Coder's
            <tool_call><function=add><parameter=a>1</parameter></function>
            </tool_call>
  'llama3'  {"name": "add", "parameters": {"a": 1}}, after <|python_tag|> or
            not, several with ';' between them (Llama 3.1);
            <function=add>{"a": 1}</function>; [add(a=1)] (Llama 3.2)

A text is never run: JSON and literals of Python are read.
"""

import ast
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

TAGGED = re.compile(r'<tool_call>(.*?)(?:</tool_call>|\Z)', re.S)
CODER = re.compile(r'\s*<function=([^>\s]+)>(.*?)(?:</function>)?\s*', re.S)
PARAMETER = re.compile(r'<parameter=([^>\s]+)>(.*?)</parameter>', re.S)
FUNCTION = re.compile(r'<function=([^>\s]+)>(.*?)</function>', re.S)
PYTHON_TAG = '<|python_tag|>'


class Call(NamedTuple):
  """Call of a tool."""

  name: str
  arguments: dict
  error: str = ''  # why it cannot be read; then the others are empty


def unreadable(why: str) -> Call:
  return Call('', {}, f'the call cannot be read: {why}')


def from_json(text: str, *names: str) -> Call:
  """Call of a JSON object with a name, and arguments under one of `names`."""
  try:
    return from_object(json.loads(text), *names)
  except ValueError as e:
    return unreadable(f'it is no JSON ({e})')


def from_object(found, *names: str) -> Call:
  if not isinstance(found, dict) or not isinstance(found.get('name'), str):
    return unreadable(f'write {{"name": ..., "{names[0]}": {{...}}}}')
  arguments: Any = next((found[n] for n in names if n in found), {})
  if isinstance(arguments, str):  # JSON in JSON
    try:
      arguments = json.loads(arguments)
    except ValueError as e:
      return unreadable(f'its {names[0]} are no JSON ({e})')
  if not isinstance(arguments, dict):
    return unreadable(f'its {names[0]} are no object')
  return Call(found['name'], arguments)


def hermes_calls(text: str) -> list[Call]:
  """Calls in <tool_call> tags, each an object of JSON."""
  return [
    from_json(inside, 'arguments', 'parameters')
    for inside in TAGGED.findall(text)
  ]


def as_value(text: str):
  """Value of a parameter: JSON, or the text itself."""
  text = text.removeprefix('\n').removesuffix('\n')
  try:
    return json.loads(text)
  except ValueError:
    return text


def qwen_calls(text: str) -> list[Call]:
  """Calls in <tool_call> tags, of JSON or of tags."""
  found = []
  for inside in TAGGED.findall(text):
    coder = CODER.fullmatch(inside)
    if coder:
      values = {k: as_value(v) for k, v in PARAMETER.findall(coder[2])}
      found.append(Call(coder[1], values))
    else:
      found.append(from_json(inside, 'arguments', 'parameters'))
  return found


def llama3_calls(text: str) -> list[Call]:
  """Calls that are all of a text, or in <function> tags."""
  tagged = [
    from_object({'name': name, 'parameters': inside}, 'parameters')
    for name, inside in FUNCTION.findall(text)
  ]
  text = text.strip()
  said = text.removeprefix(PYTHON_TAG).strip()
  if tagged or not (said.startswith(('{', '[')) or said != text):
    return tagged
  if said.startswith('['):
    return python_calls(said)
  if '"name"' not in said and said == text:
    return []  # an object that is an answer
  decoder, calls = json.JSONDecoder(), []
  while said:
    try:
      found, end = decoder.raw_decode(said)
    except ValueError as e:
      return [*calls, unreadable(f'it is no JSON ({e})')]
    calls.append(from_object(found, 'parameters', 'arguments'))
    said = said[end:].lstrip(' \n;')
  return calls


def python_calls(text: str) -> list[Call]:
  """Calls of Python's form in a list: [add(a=1, b=2)], arguments by name, their
  values literals. A text of another form has none."""
  try:
    found = ast.parse(text, mode='eval').body
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return []
  nodes = getattr(found, 'elts', [])
  if not nodes or not all(isinstance(node, ast.Call) for node in nodes):
    return []
  return [read_call(node) for node in nodes]


def read_call(node: ast.Call) -> Call:
  if node.args or any(keyword.arg is None for keyword in node.keywords):
    return unreadable('pass its arguments by name')
  try:
    values = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
  except ValueError:
    return unreadable('its arguments are no literals')
  return Call(ast.unparse(node.func), values)


FORMATS: dict[str, Callable[[str], list[Call]]] = {
  'hermes': hermes_calls,
  'qwen': qwen_calls,
  'llama3': llama3_calls,
}


def parse_calls(text: str, form: str = 'hermes') -> list[Call]:
  """Calls in a text, in their order; none: it is an answer. A call that cannot
  be read has an error. Raises ValueError for an unknown format."""
  check_format(form)
  return FORMATS[form](text)


def check_format(form: str) -> None:
  if form not in FORMATS:
    raise ValueError(
      f'{form!r} is no format of tool calls; use {", ".join(FORMATS)}'
    )
