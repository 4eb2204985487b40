"""Answers and forms, by values made by hand and by laws."""

import json
import time
from fractions import Fraction

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok import rewards
from jaxrl_tok.rewards import last_number, normal_form


def one(reward, text, **columns):
  (value,) = reward(completions=[text], **{k: [v] for k, v in columns.items()})
  return value


# --- exact


@pytest.mark.parametrize(
  ('text', 'form'),
  [
    ('  The Answer: "3.5". ', 'the answer 3.5'),
    ('(-5)', '-5'),
    ('5%', '5%'),
    ('.5', '.5'),
    ('$1,000.', '$1,000'),
    ('«Straße»', 'strasse'),
    ('ﬁne\n\tday!!!', 'fine day'),
    ('co-op', 'co-op'),
    ('...', ''),
  ],
)
def test_normal_forms(text, form):
  assert normal_form(text) == form
  assert normal_form(form) == form


def test_exact_by_hand():
  reward = rewards.exact()
  assert one(reward, ' Paris. ', answer='paris') == 1
  assert one(reward, 'It is Paris', answer='Paris') == 0
  assert one(reward, 'PARIS', answer=['Rome', 'Paris']) == 1
  assert one(reward, '5', answer=-5) == 0
  assert one(reward, '-5', answer=-5) == 1
  assert one(reward, 'The cat', answer='cat') == 0
  some = rewards.exact(ignore=('a', 'an', 'the'))
  assert one(some, 'The cat', answer='cat') == 1


# --- numbers


@pytest.mark.parametrize(
  ('text', 'number'),
  [
    ('12', 12),
    ('I have 3 and then 4.', 4),
    ('1,234.5 m', Fraction(2469, 2)),
    ('1,23', 23),
    ('1234,567', 567),
    ('-7', -7),
    ('−7 °C', -7),
    ('10-3', 3),
    ('x = -3', -3),
    ('.25', Fraction(1, 4)),
    ('1.5e3', 1500),
    ('2E-2', Fraction(1, 50)),
    ('$5.', 5),
    ('50%', 50),
    ('1/2', Fraction(1, 2)),
    ('-3/4 of it', Fraction(-3, 4)),
    ('1/0', 0),
    ('#### 72', 72),
    ('version 1.2.3', Fraction(6, 5)),
    ('A4 and b2', None),
    ('none', None),
    ('', None),
  ],
)
def test_last_numbers(text, number):
  assert last_number(text) == number


@settings(max_examples=200)
@given(st.integers(-(10**30), 10**30), st.text(alphabet='ab .\n', max_size=9))
def test_every_integer_is_read_as_it_is(n, words):
  assert last_number(f'{words} {n} {words}') == n
  assert last_number(f'{words} {n:,} {words}') == n


@settings(max_examples=200)
@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_every_float_is_read_as_it_is(x):
  assert float(last_number(repr(x))) == x


def test_numeric_by_hand():
  reward = rewards.numeric()
  assert one(reward, '6 * 12 = 72', answer='so\n#### 72') == 1
  assert one(reward, '72 or 73', answer=72) == 0
  assert one(reward, '72.0', answer=72) == 1
  assert one(reward, '0.5', answer='1/2') == 1
  assert one(reward, 'none', answer=0) == 0
  assert one(reward, '3', answer=['2', '3']) == 1
  near = rewards.numeric(tolerance=0.01)
  assert [one(near, t, answer=-100) for t in ('-101', '-101.1', '101')] == [
    1, 0, 0
  ]  # fmt: skip
  marked = rewards.numeric(after='####')
  assert one(marked, '#### 72 km in 3 h', answer=72) == 1
  assert one(marked, '72', answer=72) == 0
  assert one(marked, '#### 1 #### 72', answer=72) == 1
  with pytest.raises(
    ValueError, match=r"column answer holds 'x', which has no"
  ):
    one(reward, '1', answer='x')
  with pytest.raises(ValueError, match='tolerance'):
    rewards.numeric(tolerance=-1)


def test_long_texts_take_no_time():
  """Time is linear in spaces and stops, which a policy may repeat."""
  began = time.process_time()
  form, spaces = rewards.template(FORM), ' \n' * 50_000
  text = FORM.replace('{}', spaces + 'x' + spaces)
  assert [one(form, text), one(form, text + 'x')] == [1, 0]
  assert one(rewards.json_schema({}), f'```json{spaces}1{spaces}```') == 1
  assert one(rewards.json_schema({}), f'```{spaces}x{spaces}``') == 0
  one(rewards.readability(), 'a' + '.' * 100_000 + 'b')
  assert time.process_time() - began < 5


def test_long_numbers_take_no_time():
  began = time.process_time()
  for piece in ('9', '1/', '1,234', '-', '.5', '1e', '1/2'):
    last_number(piece * 20_000)
  last_number('1/' + '2' * 20_000 + '.5')
  assert time.process_time() - began < 5


# --- form


def test_regex_by_hand():
  assert one(rewards.regex(r'\d+ km'), 'about 12 km away') == 1
  assert one(rewards.regex(r'\d+ km', whole=True), 'about 12 km') == 0
  assert one(rewards.regex(r'\d+ km', whole=True), ' 12 km\n') == 1
  assert one(rewards.regex('a.b'), 'a\nb') == 1
  with pytest.raises(ValueError, match='no regular expression') as e:
    rewards.regex('(')
  assert '\n' not in str(e.value)


FORM = '<think>{}</think><answer>{}</answer>'


@pytest.mark.parametrize(
  ('text', 'value', 'share'),
  [
    ('<think>a</think><answer>b</answer>', 1, 1),
    (' <think>\na\n</think>\n\n<answer> b </answer>\n', 1, 1),
    ('<think></think><answer>b</answer>', 0, 4 / 5),
    ('<think>a</think> so <answer>b</answer>', 0, 4 / 5),
    ('<think>a</think><answer>b', 0, 3 / 5),
    ('<answer>b</answer><think>a</think>', 0, 2 / 5),
    ('<think><think>a</think><answer>b</answer>', 0, 3 / 5),
    ('b', 0, 0),
    ('', 0, 0),
  ],
)
def test_templates_by_hand(text, value, share):
  assert one(rewards.template(FORM), text) == value
  assert one(rewards.template(FORM, partial=True), text) == share


def test_a_template_may_end_in_any_text():
  reward = rewards.template('<think>{}</think>{}')
  assert one(reward, '<think>a</think> 5') == 1
  assert one(reward, '<think>a</think>') == 0
  assert one(reward, 'so <think>a</think> 5') == 0
  words = rewards.template('The answer is {}.')
  assert one(words, 'The  answer\nis this.') == 1
  assert one(words, 'The answer this is.') == 0
  assert one(rewards.template('{}####{}'), 'so #### 5') == 1
  assert one(rewards.template('{}####{}'), '#### 5') == 0
  for form in ('', '{}', 'text', '{}{}', 'a{}{}b'):
    with pytest.raises(ValueError, match='is no form'):
      rewards.template(form)


@settings(max_examples=100)
@given(st.text(max_size=20), st.text(max_size=20))
def test_a_filled_template_fits(a, b):
  filled = FORM.replace('{}', '{0}', 1).replace('{}', '{1}').format(a, b)
  fits = bool(a.strip() and b.strip()) and not {'<', '>'} & {*a, *b}
  if fits or not (a.strip() and b.strip()):
    assert one(rewards.template(FORM), filled) == fits


SCHEMA = {
  'type': 'object',
  'properties': {
    'name': {'type': 'string', 'minLength': 1},
    'age': {'$ref': '#/$defs/years'},
  },
  'required': ['name', 'age'],
  'additionalProperties': False,
  '$defs': {'years': {'type': 'integer', 'minimum': 0}},
}


@pytest.mark.parametrize(
  ('text', 'errors'),
  [
    ('{"name": "a", "age": 3}', 0),
    ('```json\n{"name": "a", "age": 3}\n```', 0),
    ('```\n{"name": "a", "age": 3}```', 0),
    ('{"name": "", "age": -1}', 2),
    ('{}', 2),
    ('3', 1),
    ('{"name": "a", "age": NaN}', None),
    ('here: {"name": "a", "age": 3}', None),
    ('[' * 100_000, None),
    ('', None),
  ],
)
def test_json_by_hand(text, errors):
  share = 0 if errors is None else 1 / (1 + errors)
  assert one(rewards.json_schema(SCHEMA), text) == (errors == 0)
  assert one(rewards.json_schema(SCHEMA, partial=True), text) == share


VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.text(max_size=4),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(['name', 'age', 'x']), inner, max_size=3)
  ),
  max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_json_is_what_the_library_accepts(value):
  validator = jsonschema.Draft202012Validator(SCHEMA)
  found = one(rewards.json_schema(SCHEMA), json.dumps(value))
  assert found == validator.is_valid(value)


def test_schemas_that_are_none_are_one_line(monkeypatch):
  with pytest.raises(ValueError, match='the JSON schema is none') as e:
    rewards.json_schema({'type': 'objekt'})
  assert '\n' not in str(e.value)

  def fetch(*args, **kwargs):
    raise AssertionError('a schema was fetched')

  monkeypatch.setattr('urllib.request.urlopen', fetch)
  remote = rewards.json_schema({'$ref': 'http://127.0.0.1:9/schema.json'})
  with pytest.raises(ValueError, match=r'refers to http://127.0.0.1:9') as e:
    one(remote, '{}')
  assert '\n' not in str(e.value)
