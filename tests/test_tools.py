"""Tools: schemas, formats of calls, what a call may do."""

import json
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok.environments import (
  Call,
  Stepper,
  calculate,
  lookup,
  parse_calls,
  tool_schemas,
  tools,
  with_tools,
)
from jaxrl_tok.environments.toolbox import LONGEST

# texts as the models' documents show them: of Nous Research's Hermes, of Qwen,
# and of Llama 3.1 and 3.2
FIXTURES = (
  (
    'hermes',
    '<tool_call>\n{"name": "get_stock", "arguments": {"symbol": "TSLA"}}\n'
    '</tool_call>',
    [Call('get_stock', {'symbol': 'TSLA'})],
  ),
  (
    'hermes',
    'Let me see.\n<tool_call>\n{"arguments": {"a": 1}, "name": "f"}\n'
    '</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
    [Call('f', {'a': 1}), Call('g', {})],
  ),
  (
    'qwen',
    '<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": '
    '{"location": "Paris", "days": 2}}\n</tool_call>',
    [Call('weather', {'location': 'Paris', 'days': 2})],
  ),
  (
    'qwen',
    '<tool_call>\n<function=square>\n<parameter=number>\n12\n</parameter>\n'
    '<parameter=note>\nas "text"\nof two lines\n</parameter>\n</function>\n'
    '</tool_call>',
    [Call('square', {'number': 12, 'note': 'as "text"\nof two lines'})],
  ),
  (
    'llama3',
    '{"name": "get_population", "parameters": {"country": "France"}}',
    [Call('get_population', {'country': 'France'})],
  ),
  (
    'llama3',
    '<|python_tag|>{"name": "f", "parameters": {"x": "1; 2"}}; '
    '{"name": "g", "parameters": {}}',
    [Call('f', {'x': '1; 2'}), Call('g', {})],
  ),
  (
    'llama3',
    '<function=search>{"query": "NYSE"}</function>',
    [Call('search', {'query': 'NYSE'})],
  ),
  (
    'llama3',
    "[get_user(user_id=7890, special='black'), ping()]",
    [Call('get_user', {'user_id': 7890, 'special': 'black'}), Call('ping', {})],
  ),
)
ANSWERS = (
  ('hermes', 'It is 12.'),
  ('qwen', '{"name": "f", "arguments": {}}'),
  ('llama3', 'The set {1, 2}.'),
  ('llama3', '[1, 2, 3]'),
  ('llama3', '[1, 2'),
  ('llama3', '{"answer": 3}'),
)
BROKEN = (
  ('hermes', '<tool_call>{"name": "f", </tool_call>', 'it is no JSON'),
  ('hermes', '<tool_call>{"name": "f"', 'it is no JSON'),
  ('hermes', '<tool_call>[1]</tool_call>', 'write {"name"'),
  ('hermes', '<tool_call>{"name": 3}</tool_call>', 'write {"name"'),
  ('qwen', '<tool_call>{"name": "f", "arguments": 3}</tool_call>', 'no object'),
  ('qwen', '<tool_call>{"name": "f", "arguments": "{"}</tool_call>', 'no JSON'),
  ('llama3', '<|python_tag|>print(1)', 'it is no JSON'),
  ('llama3', '{"name": "f", "parameters": {"a"}}', 'it is no JSON'),
  ('llama3', '[f(1)]', 'by name'),
  ('llama3', '[f(a=g(1))]', 'no literals'),
  ('llama3', '[f(**a)]', 'by name'),
)


def add(a: int, b: int = 2) -> int:
  """Adds two numbers.

  Args:
    a: The first number.
    b: The second one.
  """
  return a + b


def pick(color: Literal['red', 'green'], share: float, deep: list[int]) -> dict:
  """Picks a color.

  Args:
    color: Its name.
    share: How much of it.
    deep: Numbers.
  """
  return {'color': color, 'share': share, 'deep': deep}


async def later(text: str) -> str:
  """Says a text later.

  Args:
    text: Text to say.
  """
  if text == 'fail':
    raise KeyError(text)
  return text.upper()


@pytest.mark.parametrize(('form', 'text', 'calls'), FIXTURES)
def test_calls_are_read_in_the_formats_of_models(form, text, calls):
  assert parse_calls(text, form) == calls


@pytest.mark.parametrize(('form', 'text'), ANSWERS)
def test_other_texts_are_answers(form, text):
  assert parse_calls(text, form) == []


@pytest.mark.parametrize(('form', 'text', 'said'), BROKEN)
def test_calls_that_cannot_be_read_say_why(form, text, said):
  (call,) = parse_calls(text, form)
  assert call.name == ''
  assert said in call.error
  assert '\n' not in call.error


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.text(max_size=5),
  lambda inside: (
    st.lists(inside, max_size=3)
    | st.dictionaries(st.text(max_size=5), inside, max_size=3)
  ),
  max_leaves=5,
)


@settings(max_examples=25, deadline=None)
@given(
  st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=3), max_size=2),
  st.floats(0, 1),
)
def test_what_a_model_writes_is_read_back(arguments, cut):
  """Any JSON; the text of a call is read or refused, and never raises."""
  calls = [Call(f'f{i}', a) for i, a in enumerate(arguments)]
  for form, key in (('hermes', 'arguments'), ('llama3', 'parameters')):
    texts = [json.dumps({'name': c.name, key: c.arguments}) for c in calls]
    if form == 'hermes':
      text = ''.join(f'<tool_call>\n{t}\n</tool_call>' for t in texts)
    else:
      text = '; '.join(texts)
    if not any('<tool_call>' in t or '<function=' in t for t in texts):
      assert parse_calls(text, form) == calls
    parse_calls(text[: int(cut * len(text))], form)


def test_schemas_are_what_chat_templates_take():
  assert tool_schemas([add]) == [
    {
      'type': 'function',
      'function': {
        'name': 'add',
        'description': 'Adds two numbers.',
        'parameters': {
          'type': 'object',
          'properties': {
            'a': {'type': 'integer', 'description': 'The first number.'},
            'b': {'type': 'integer', 'description': 'The second one.'},
          },
          'required': ['a'],
        },
        'return': {'type': 'integer'},
      },
    }
  ]
  (record,) = with_tools([{'prompt': 'a'}], [add, calculate])
  assert [t['function']['name'] for t in record['tools']] == [
    'add',
    'calculate',
  ]

  def bare(x):
    return x

  for wrong, said in ((bare, 'has no schema'), ('add', 'a tool is')):
    with pytest.raises(ValueError, match=said) as e:
      tools([wrong])
    assert '\n' not in str(e.value)
  with pytest.raises(ValueError, match='two tools have the name add'):
    tools([add, add])
  with pytest.raises(ValueError, match='there is no tool'):
    tools([])
  with pytest.raises(ValueError, match='hermes, qwen, llama3'):
    tools([add], 'xml')


def call(name: str, **arguments) -> str:
  text = json.dumps({'name': name, 'arguments': arguments})
  return f'<tool_call>{text}</tool_call>'


@pytest.mark.parametrize(
  ('action', 'said'),
  [
    (call('add', a=1), '3'),
    (call('add', a=1, b=-1), '0'),
    (call('add'), 'Error: the argument a is missing'),
    (call('add', a='1'), 'Error: the argument a is no integer'),
    (call('add', a=True), 'Error: the argument a is no integer'),
    (call('add', a=1, c=1), 'Error: there is no argument c; there are: a, b'),
    (call('sub', a=1), 'Error: there is no tool sub; there are: add, pick'),
    (
      call('pick', color='red', share=1, deep=[1]),
      '{"color": "red", "share": 1, "deep": [1]}',
    ),
    (
      call('pick', color='blue', share=1, deep=[]),
      'Error: the argument color is one of red, green',
    ),
    (
      call('pick', color='red', share=[], deep=[]),
      'Error: the argument share is no number',
    ),
    (call('later', text='a'), 'A'),
    (call('later', text='fail'), "Error: KeyError: 'fail'"),
    ('<tool_call>', 'Error: the call cannot be read'),
  ],
)
def test_results_and_errors_come_back_as_text(action, said):
  episode = tools([add, pick, later])()
  episode.reset(0, {'prompt': [{'role': 'user', 'content': 'a'}]})
  observation, reward, terminated, truncated, _ = episode.step(action)
  assert (reward, terminated, truncated) == (0, False, False)
  (message,) = observation
  assert message['role'] == 'tool'
  assert message['content'].startswith(said)
  episode.reset(0, {'prompt': 'a'})
  assert said in episode.step(action)[0]


def test_an_answer_ends_the_episode_and_is_judged():
  def judge(answer, example):
    return float(answer == example['answer'])

  make = tools([add], judge=judge, cost=0.25)
  with Stepper(make) as stepper:
    stepper.reset([0, 1], [{'prompt': 'a', 'answer': '3'}] * 2)
    turns = stepper.step({0: call('add', a=1), 1: '4'})
    assert (turns[0].reward, turns[0].ended) == (-0.25, '')
    assert (turns[1].reward, turns[1].ended) == (0.0, 'terminated')
    turns = stepper.step({0: '3'})
    assert (turns[0].reward, turns[0].info) == (1.0, {'success': True})


@pytest.mark.parametrize(
  ('expression', 'value'),
  [
    ('2 + 3 * 4', '14'),
    ('(12 + 7.5) * 3 ** 2', '175.5'),
    ('7 / 2', '3.5'),
    ('-7 // 2', '-4'),
    ('4821 * 377 + 92', '1817609'),
    ('1e3', '1000'),
    ('0.1 + 0.2', '0.3'),
  ],
)
def test_calculate(expression, value):
  assert calculate(expression) == value


@pytest.mark.parametrize(
  'expression',
  [
    *('1 / 0', '2 +', '', 'x', '9 ** 9 ** 9', '"a" * 3', '1; 2', '[1]', 'True'),
    *('__import__("os").system("true")', '().__class__', 'open("/etc/passwd")'),
    *('1' * (LONGEST + 1), '(' * 90 + '1' + ')' * 89, '1e999', '"a"*10**9'),
    '1\nimport os',
  ],
)
def test_calculate_runs_nothing_else(expression):
  with pytest.raises(ValueError, match=r'[a-z]') as e:
    calculate(expression)
  assert '\n' not in str(e.value)


def test_lookup():
  find = lookup({'Paris': 'the capital of France'})
  assert find(name=' paris ') == 'the capital of France'
  assert find('Rome') == 'nothing is known about Rome'
  assert tool_schemas([find])[0]['function']['name'] == 'lookup'
