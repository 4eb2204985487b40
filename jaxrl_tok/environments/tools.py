"""Tools: Python functions that a policy calls in its own format.

  def add(a: int, b: int) -> int:
    '''Adds two numbers.

    Args:
      a: The first number.
      b: The second one.
    '''
    return a + b

  Task(with_tools(records, [add]), exact(), environment=tools([add]))

1. `tool_schemas` reads signatures and docstrings; the chat template writes them
   into the prompt (the column `tools`, see with_tools).
2. A turn with calls is answered by their results, an exception by its text.
3. A turn without a call is the answer, and ends the episode; `judge` scores it.

Functions run in this process: give a policy none that can do harm. toolbox.py
has two, `calculate` and `lookup`; there is none for a shell.
"""

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxrl_tok.environments.protocol import Maker
from jaxrl_tok.environments.tool_calls import Call, check_format, parse_calls
from jaxrl_tok.rewards.calls import describe_error, run_together
from jaxrl_tok.rewards.functions import check_callable, get_name, shorten

# types of Python by their names in a JSON schema
TYPES: dict[str, Any] = {
  'string': str,
  'integer': int,
  'number': (int, float),
  'boolean': bool,
  'array': list,
  'object': dict,
}
LONGEST = 2000  # characters of a result


# --- schemas -----------------------------------------------------------------


def tool_schema(function: Callable) -> dict:
  """JSON schema of a function, from its type hints and its docstring in
  Google's style, as chat templates take it. Raises ValueError."""
  from transformers.utils import get_json_schema

  try:
    return get_json_schema(function)
  except Exception as e:
    raise ValueError(
      f'the tool {get_name(function)} has no schema ({shorten(e)}); give each '
      'argument a type and a line under "Args:" in its docstring'
    ) from None


def tool_schemas(functions: Iterable[Callable]) -> list[dict]:
  """Schemas of functions, for the column `tools`."""
  return [tool_schema(f) for f in functions]


def with_tools(
  records: Iterable[dict], functions: Iterable[Callable]
) -> list[dict]:
  """Records with the column `tools`, which the chat template is given."""
  schemas = tool_schemas(functions)
  return [record | {'tools': schemas} for record in records]


# --- calls -------------------------------------------------------------------


def check_arguments(schema: dict, arguments: dict) -> str:
  """Fault of a call's arguments in words; '' where there is none."""
  wanted = schema['function']['parameters']
  known = wanted.get('properties', {})
  for name in wanted.get('required', ()):
    if name not in arguments:
      return f'the argument {name} is missing'
  for name, value in arguments.items():
    if name not in known:
      names = ', '.join(known) or 'none'
      return f'there is no argument {name}; there are: {names}'
    kind, choices = known[name].get('type'), known[name].get('enum')
    if choices and value not in choices:
      return f'the argument {name} is one of {", ".join(map(str, choices))}'
    if not is_of(value, kind) and not (value is None and nullable(known[name])):
      return f'the argument {name} is no {kind}'
  return ''


def nullable(schema: dict) -> bool:
  return bool(schema.get('nullable'))


def is_of(value, kind) -> bool:
  """Tells whether a value has a type of JSON schema; an unknown one fits."""
  kinds = [kind] if isinstance(kind, str) else list(kind or ())
  if not kinds or any(k not in TYPES for k in kinds):
    return True
  if isinstance(value, bool):
    return 'boolean' in kinds
  return any(isinstance(value, TYPES[k]) for k in kinds)


def as_text(value) -> str:
  """Text of a result: itself, or JSON."""
  if isinstance(value, str):
    text = value
  else:
    try:
      text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
      text = str(value)
  return text if len(text) <= LONGEST else f'{text[:LONGEST]}…'


def answer(call: Call, functions: dict[str, Callable], schemas: dict) -> str:
  """Result of a call as text; 'Error: ...' where it fails."""
  if call.error:
    return f'Error: {call.error}'
  if call.name not in functions:
    names = ', '.join(functions)
    return f'Error: there is no tool {call.name}; there are: {names}'
  fault = check_arguments(schemas[call.name], call.arguments)
  if fault:
    return f'Error: {fault}'
  try:
    return as_text(result(functions[call.name], call.arguments))
  except Exception as e:
    return f'Error: {describe_error(e)}'


def result(function: Callable, arguments: dict):
  """Value of a function, plain or async."""
  value = function(**arguments)
  if inspect.isawaitable(value):
    (value,) = run_together([value])
    if isinstance(value, BaseException):
      raise value
  return value


# --- the environment ---------------------------------------------------------


class Tools:
  """Episode with tools; see the module."""

  name = 'tools'

  def __init__(
    self,
    functions: dict[str, Callable],
    schemas: dict[str, dict],
    form: str = 'hermes',
    judge: Callable | None = None,
    cost: float = 0.0,
  ):
    self.functions, self.schemas, self.form = functions, schemas, form
    self.judge, self.cost = judge, cost

  def reset(self, seed: int, example: dict) -> tuple:
    self.example = example
    self.chat = not isinstance(example['prompt'], str)
    return '', {}

  def step(self, action: str) -> tuple:
    calls = parse_calls(action, self.form)
    if not calls:
      reward = 0.0 if self.judge is None else self.judge(action, self.example)
      return '', reward, True, False, {'success': reward > 0}
    said = [(c.name, answer(c, self.functions, self.schemas)) for c in calls]
    return as_observation(said, self.chat), -self.cost, False, False, {}


def as_observation(said: list[tuple[str, str]], chat: bool) -> str | list:
  """Results (name of the tool, text) as messages, or as text after a prompt of
  text."""
  if chat:
    return [
      {'role': 'tool', 'name': name or 'unknown', 'content': text}
      for name, text in said
    ]
  return ''.join(
    f'<tool_response>\n{text}\n</tool_response>\n' for _, text in said
  )


def tools(
  functions: Sequence[Callable],
  form: str = 'hermes',
  judge: Callable | None = None,
  cost: float = 0.0,
) -> Maker:
  """Maker of episodes in which a policy may call functions.

  Args:
    functions: typed functions with docstrings.
    form: format of the calls: 'hermes', 'qwen' or 'llama3', as the model was
      taught.
    judge: (answer, example) -> reward of the turn that calls nothing; None: 0,
      where the task's own rewards judge the episode.
    cost: taken from the reward of each turn with calls.
  """
  check_format(form)
  named = by_name(functions)
  schemas = {name: tool_schema(f) for name, f in named.items()}
  return functools.partial(Tools, named, schemas, form, judge, cost)


def by_name(functions: Sequence[Callable]) -> dict[str, Callable]:
  """Functions by their names. Raises ValueError for two of one name."""
  found = {}
  for function in functions:
    check_callable(function, 'a tool')
    if (name := get_name(function)) in found:
      raise ValueError(f'two tools have the name {name}; rename one')
    found[name] = function
  if not found:
    raise ValueError('there is no tool; give one function or more')
  return found
