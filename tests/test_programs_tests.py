"""Unit tests as a reward: code of a completion, its tests, its score."""

import pytest

from jaxrl_tok import rewards
from jaxrl_tok.rewards.functions import check_functions
from jaxrl_tok.rewards.programs import Budget, extract_code, run_tests

ADD = 'def add(a, b):\n  return a + b\n'
TESTS = [
  'assert add(2, 3) == 5',
  ['add(1, -1)', 0],
  "assert add('a', 'b') == 'ab'",
]


def score(code: str, tests=TESTS, **settings):
  reward = rewards.passes_tests(**settings)
  return reward(completions=[code], tests=[tests])[0]


def test_the_share_of_tests_that_pass():
  assert score(ADD) == 1.0
  assert score('def add(a, b):\n  return 5') == pytest.approx(1 / 3)
  assert score('def add(a, b):\n  return 5', all_or_nothing=True) == 0.0
  assert score(ADD, all_or_nothing=True) == 1.0


@pytest.mark.parametrize(
  ('text', 'code'),
  [
    ('x = 1', 'x = 1'),
    ('Here:\n```python\nx = 1\n```\nDone.', 'x = 1\n'),
    ('```python\nx = 1\n```\nor\n```python\nx = 2\n```', 'x = 2\n'),
    ('```python\nx = 1\n```\nprints\n```\n1\n```', 'x = 1\n'),
    ('```\nx = 1\n```', 'x = 1\n'),
    ('```bash\nls\n```', '```bash\nls\n```'),
    ('```python\nx = 1\n```\nthen\n```python\nx = 3', 'x = 3'),
    ('```py\nx = 1\n```', 'x = 1\n'),
    ('```Python\nx = 1\n```', 'x = 1\n'),
    ('', ''),
  ],
)
def test_code_is_the_last_block_or_the_whole_text(text, code):
  assert extract_code(text) == code


def test_messages_and_missing_tests():
  reward = rewards.passes_tests()
  completions = [[{'role': 'assistant', 'content': f'```python\n{ADD}```'}]] * 2
  assert reward(completions=completions, tests=[TESTS, None]) == [1.0, None]


@pytest.mark.parametrize(
  ('code', 'kind'),
  [
    (ADD, 'passed'),
    ('def add(a, b):\n  return 0', 'failed'),
    ('def add(a, b) return', 'syntax'),
    ('import os\n' + ADD, 'language'),
    ('while True: pass', 'budget'),
    ('x = 1 / 0', 'exception'),
    ('', 'exception'),
  ],
)
def test_kinds_of_failures(code, kind):
  report = run_tests(code, TESTS[:1], Budget(steps=10_000))
  assert report.kinds == [kind]
  assert (report.errors[0] == '') == (kind == 'passed')
  assert '\n' not in report.errors[0]
  metric = rewards.code_failures(budget=Budget(steps=10_000))
  found = metric(completions=[code, ADD], tests=[TESTS[:1]] * 2)
  ends = {k: v for k, v in found.items() if k != 'code/all'}
  assert sum(ends.values()) == 1.0
  assert (
    found['code/passed'] == found['code/all'] == 0.5 + (kind == 'passed') / 2
  )
  assert kind == 'passed' or found[f'code/{kind}'] == 0.5


@pytest.mark.parametrize(
  ('result', 'expected', 'equal'),
  [
    *(('1', 1, True), ('1.0', 1, True), ('True', 1, False), ('1', True, False)),
    *(('(1, [2])', [1, [2]], True), ("{'a': (1,)}", {'a': [1]}, True)),
    *(('None', None, True), ("'1'", 1, False), ('{1, 2}', {2, 1}, True)),
    *(('[1]', [1, 2], False), ('0', None, False), ('[]', {}, False)),
    *(("{'a': 1}", {'b': 1}, False), ('[True]', [1], False)),
  ],
)
def test_results_are_compared_as_data(result, expected, equal):
  report = run_tests(f'def f():\n  return {result}', [['f()', expected]])
  assert report.passed == equal


# --- a policy that games the tests

EQUAL = """
class Any:
  def __eq__(self, other): return True
  def __ne__(self, other): return False
  def __hash__(self): return 1
  def __repr__(self): return '5'
def add(a, b): return {}
"""


@pytest.mark.parametrize(
  'result', ['Any()', '[Any()]', '{1: Any()}', '(Any(),)']
)
def test_an_object_that_equals_everything_passes_no_test(result):
  tests = [
    *(
      'assert add(2, 3) == 5',
      'assert 5 == add(2, 3)',
      'assert add(1, 2) in [3]',
    ),
    *('assert not add(1, 2) != 3', 'assert add(1, 2) == [3]'),
    *('assert add(1, 2) == {1: 3}', 'assert add(1, 2) == (3,)'),
    *(['add(2, 3)', 5], ['add(2, 3)', [5]], ['add(2, 3)', {1: 5}]),
  ]
  report = run_tests(EQUAL.format(result), tests)
  assert report.passed == 0, report.kinds


@pytest.mark.parametrize(
  'code',
  [
    'def abs(x): return 0\ndef add(a, b): return 9',
    'def sorted(x): return [1, 2]\ndef add(a, b): return 9',
    'def list(x): return [1, 2]\ndef add(a, b): return 9',
    'AssertionError = 1\ndef add(a, b): return 9',
    'def add(a, b): raise SystemExit',
    'def add(a, b): raise AssertionError',
    'def add(a, b): return add',
    '_result = 5\ndef add(a, b): return 9',
    'def add(a, b):\n  global _result\n  _result = 5\n  return 9',
  ],
)
def test_redefined_builtins_and_exits_pass_no_test(code):
  tests = [
    *(
      'assert abs(add(2, 3) - 5) < 1e-9',
      'assert sorted([add(0, 1), 2]) == [1, 2]',
    ),
    *('assert list((add(0, 1), 2)) == [1, 2]', ['add(2, 3)', 5]),
  ]
  assert run_tests(code, tests).passed == 0


def test_an_object_of_the_users_own_class_equals_another():
  code = (
    'class P:\n'
    '  def __init__(self, x): self.x = x\n'
    '  def __eq__(self, other): return self.x == other.x\n'
  )
  assert (
    run_tests(code, ['assert P(1) == P(1)', 'assert P(1) == P(2)']).passed == 1
  )


def test_each_test_has_a_budget_of_its_own():
  code = 'def f(n):\n  for i in range(n): pass\n  return n'
  budget = Budget(steps=2_000)
  tests = [['f(300)', 300]] * 5 + [['f(10 ** 9)', 1], ['f(1)', 1]]
  kinds = run_tests(code, tests, budget).kinds
  assert kinds == ['passed'] * 5 + ['budget', 'passed']


def test_state_of_one_test_reaches_the_next():
  code = 'seen = []\ndef f(x):\n  seen.append(x)\n  return len(seen)'
  assert run_tests(code, [['f(1)', 1], ['f(1)', 2]]).passed == 2


def test_a_prefix_comes_before_the_code():
  reward = rewards.passes_tests(prefix='head')
  found = reward(
    completions=['  return a + b', 'def add(a, b):\n  return 0'],
    tests=[TESTS, TESTS],
    head=['def add(a, b):\n', 'import math\n'],
  )
  assert found == [1.0, pytest.approx(1 / 3)]


def test_a_text_of_tests_is_split_at_its_asserts():
  text = (
    'x = 2\nassert add(x, 3) == 5\nfor i in range(3): x += i\nassert x == 5\n'
  )
  reward = rewards.passes_tests(column='checks')
  assert reward(completions=[ADD, 'add = max'], checks=[text] * 2) == [1.0, 0.5]


@pytest.mark.parametrize(
  'tests', [[], '', 3, 'x = 1', [['f()']], [3], 'assert (']
)
def test_records_without_tests_are_refused_in_one_line(tests):
  with pytest.raises(ValueError, match='column tests') as e:
    score(ADD, tests)
  assert '\n' not in str(e.value)


def test_a_missing_column_is_refused_before_the_run():
  functions = {'passes': rewards.passes_tests(column='checks')}
  with pytest.raises(ValueError, match='checks'):
    check_functions(functions, ['prompt', 'tests'])
  check_functions(functions, ['prompt', 'checks'])


def test_names():
  assert rewards.passes_tests().__name__ == 'passes_tests'
  assert (
    rewards.passes_tests(all_or_nothing=True).__name__ == 'passes_all_tests'
  )


# --- objects of the code in the code's own functions, and in a test's lines

MONEY = """
class M:
  def __init__(self, v): self.v = v
  def value(self, o): return o.v if isinstance(o, M) else o
  def __eq__(self, o): return self.v == self.value(o)
  def __ne__(self, o): return not self == o
  def __lt__(self, o): return self.v < self.value(o)
  def __add__(self, o): return M(self.v + self.value(o))
  def __hash__(self): return self.v
  def __len__(self): return self.v
  def __iter__(self): return iter([self.v])
  def __contains__(self, o): return o == self.v
  def __bool__(self): return self.v > 0
  def __str__(self): return str(self.v)
def f(x):
  m = M(x)
  uses = [m == 3, 3 == m, m < 4, 4 > m, m != 4, m in [3], 3 in m, bool(m)]
  uses += [len(m) == 3, sorted([M(2), m])[0] == 2, list(m) == [3], m + 1 == 4]
  uses += [str(m) == '3', f'{m}' == '3', {m: 1}[3] == 1, max(m, 2) == 3]
  return all(uses)
def key(items): return [m.v for m in sorted(items)]
"""


def test_the_codes_own_functions_use_its_objects_freely():
  tests = [
    'assert f(3)',
    ['f(3)', True],
    'assert [f(3)] == [True]',
  ]
  tests += ['assert all(map(f, [3, 3]))', 'assert key([M(2), M(1)]) == [1, 2]']
  report = run_tests(MONEY, tests)
  assert report.passed == len(tests), report.errors


def test_objects_of_the_code_meet_each_other_in_a_test():
  tests = [
    'assert M(1) == M(1)',
    'assert not M(1) != M(1)',
    'assert M(1) < M(2)',
  ]
  tests += ['assert M(1) + M(2) == M(3)', 'assert M(1) != None', 'assert M(1)']
  tests += [
    'assert {M(1)} == {M(1)}',
    'assert sorted([M(2), M(1)]) == [M(1), M(2)]',
  ]
  tests += ['class N:\n  def __eq__(self, o): return True\nassert N() == 3']
  report = run_tests(MONEY, tests)
  assert [k for k in report.kinds if k != 'passed'] == ['failed'], report.errors
  assert '__bool__' in ''.join(report.errors)


def test_tested_classes_are_used_by_their_special_methods():
  tests = ['assert M(3) == 3', 'assert 3 != M(4)', 'assert len(M(2)) == 2']
  tests += [
    "assert str(M(2)) == '2'",
    'assert 2 in M(2)',
    'assert list(M(1)) == [1]',
  ]
  report = run_tests(MONEY, tests, classes=['M'])
  assert report.passed == len(tests), report.errors
  assert score(MONEY, tests, classes=['M']) == 1.0
  assert score(MONEY, tests) == pytest.approx(1 / 6)  # 3 != M(4), as any


RESULTS = {
  'True': 'eq lt le gt ge contains bool',
  '0': """
    sub rsub mod rmod and rand add radd mul rmul truediv rtruediv floordiv or
    rfloordiv pow rpow ror xor rxor iadd isub imul abs len hash
  """,
  'self': 'neg pos',
  "'5'": 'str repr',
  'iter([])': 'iter',
}
POSING = 'class Any:\n' + ''.join(
  f'  def __{name}__(self, *args): return {result}\n'
  for result, names in RESULTS.items()
  for name in names.split()
)
POSING += 'def f(*args): return Any()\n'
POSES = (
  *('abs(f(2) - 1.41) < 1e-6', 'abs(1.41 - f(2)) < 1e-6', 'f(2) % 3 == 0'),
  *('f(2) & 1 == 0', 'f(2) * 2 == 0', '2 * f(2) == 0', 'f(2) + 1 == 0'),
  *('3 in f(2)', 'not f(2) - 1', 'abs(f(2)) == 0', 'abs(-f(2)) == 0'),
  *('all(a == b for a, b in zip(f(2), [1]))', 'list(f(2)) == []'),
  *('sum(f(2)) == 0', 'len(f(2)) == 0', "str(f(2)) == '5'", 'f(2) < 3'),
  *("f'{f(2)}' == '5'", "'%s' % f(2) == '5'", "'{}'.format(f(2)) == '5'"),
  *('f(2) == 5', '5 == f(2)', 'f(2) in [5]', '5 in {f(2)}', '{f(2)} == {0}'),
  *('max(f(2), 3) == 3', 'sorted([f(2), 3])', 'not f(2)', 'bool(f(2))'),
  *('f(2)', 'f(2) and 1', '(lambda x: x == 5)(f(2))', 'any(f() for i in [1])'),
  *('[x for x in [0] if f(2)] == [0]', 'f(2) | 1 == 0', 'f(2) ** 2 == 0'),
  *('next(iter(f(2)), 0) == 0', 'dict(f(2)) == {}', '[*f(2)] == []'),
  *('{**{f(2): 1}} == {0: 1}', 'repr(f(2)) == "5"', 'set(f(2)) == set()'),
  *('list(filter(None, [f(2)])) != []', 'list(map(str, [f(2)])) == ["5"]'),
)  # fmt: skip


@pytest.mark.parametrize('test', POSES)
def test_an_object_poses_as_no_value(test):
  report = run_tests(POSING, [f'assert {test}'])
  assert report.kinds == ['failed'], report.errors
  compared = any(o in test for o in ('== 5', '5 ==', 'in [5]', 'in {', '== {'))
  assert 'ObjectError: the test uses __' in report.errors[0] or compared


@pytest.mark.parametrize(
  'test',
  [
    'import operator\nassert operator.eq(f(2), 5)',
    'import operator\nassert operator.sub(f(2), 5) == 0',
    'import itertools\nassert list(itertools.chain(f(2))) == []',
    'from functools import reduce as r\nassert not r(max, [1, f()])',
    'try:\n  ok = f(2) < 3\nexcept BaseException: ok = True\nassert ok',
    'import itertools\nassert list(itertools.compress([1], [f()])) == [1]',
  ],
)
def test_functions_of_modules_are_as_strict_as_the_test(test):
  assert run_tests(POSING, [test]).kinds == ['failed']


@pytest.mark.parametrize(
  'code',
  [
    'import itertools\nitertools.chain.from_iterable = lambda *a: [1]',
    'import itertools\nsetattr(itertools.chain, "from_iterable", 1)',
    'import functools\nfunctools.wraps.x = 1',
    'import math\nmath.sqrt = abs',
    'import math\nmath.sqrt.x = 1',
  ],
)
def test_functions_of_modules_are_not_changed(code):
  guarded = code.replace('\n', '\n  ')
  guarded = f'try:\n  {guarded}\n  changed = 1\nexcept Exception: changed = 0'
  test = 'from itertools import chain\n'
  test += 'assert list(chain.from_iterable([[2]])) == [2]'
  report = run_tests(guarded, [test, ['changed', 0]])
  assert report.passed == 2, report.errors
