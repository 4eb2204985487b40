"""Rewards of code by its unit tests, run by the interpreter of the subset."""

import ast
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxrl_tok.rewards.adapters import get_text
from jaxrl_tok.rewards.functions import make_signature
from jaxrl_tok.rewards.programs import compare, keys
from jaxrl_tok.rewards.programs.interpreter import (
  KINDS,
  execute,
  make_machine,
)
from jaxrl_tok.rewards.programs.values import Budget, BudgetError, Instance

FENCE = re.compile(r'^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```', re.M | re.S)
OPEN = re.compile(r'^[ \t]*```[ \t]*(?:python|py)[^\n]*\n(.*)\Z', re.M | re.S)
FOUND = '_result'  # the global that a call's result is left in


class TestReport(NamedTuple):
  """Ends of a completion's tests."""

  __test__ = False  # pytest collects classes named Test

  passed: int
  kinds: list  # 'passed', 'failed' or the kind of an Outcome, for each test
  errors: list  # one line for each test, '' where it passed

  @property
  def share(self) -> float:
    return self.passed / len(self.kinds)


def extract_code(text: str) -> str:
  """Code of a completion: its last block fenced by ```python (or by ```), one
  that is not closed included; without a block the whole text."""
  blocks = FENCE.findall(text)
  rest = FENCE.sub('', text)
  cut = OPEN.search(rest)
  if cut:
    return cut[1]
  for languages in (('python', 'py'), ('',)):
    found = [code for name, code in blocks if name.lower() in languages]
    if found:
      return found[-1]
  return text


def run_tests(
  code: str,
  tests,
  budget: Budget | None = None,
  prefix: str = '',
  classes=(),
) -> TestReport:
  """Runs code, then each of its tests with a whole budget of its own.

  Args:
    code: the completion's program.
    tests: lines or blocks of Python with assert, or pairs (call, expected): the
      text of an expression, and data of JSON.
    budget: of the code, and of each test.
    prefix: source before the code, as imports, or the head that was completed.
    classes: names of classes of the code that the tests are about.

  A test sees the names that code and the tests before it left; names of
  built-in functions are the built-in ones in it, whatever the code binds. In
  the test's own lines an object of a class of the code equals objects of the
  code alone; the other special methods end the test as 'failed' (ObjectError),
  but for a call, an item, and operators between such objects.
  """
  vm = make_machine(budget or Budget())
  vm.akin_classes.update(classes)
  outcome = execute(vm, prefix + code)
  kinds, errors = [], []
  for test in tests:
    if outcome.kind != 'ok':
      kind, error = outcome.kind, outcome.error
    else:
      vm.refill()
      kind, error = _run_test(vm, test)
    kinds.append(kind)
    errors.append(error)
  return TestReport(kinds.count('passed'), kinds, errors)


def _run_test(vm, test) -> tuple[str, str]:
  """(kind, error) of one test."""
  if isinstance(test, str):
    outcome = execute(vm, test, test=True)
    if outcome.kind == 'ok':
      return 'passed', ''
    if outcome.exception == 'AssertionError':
      return 'failed', outcome.error
    return outcome.kind, outcome.error
  call, expected = test
  outcome = execute(vm, f'{FOUND} = (\n{call}\n)', test=True)
  if outcome.kind != 'ok':
    return outcome.kind, outcome.error
  found = vm.globals.pop(FOUND, None)
  try:
    if matches(vm, found, expected):
      return 'passed', ''
    shown = compare.to_repr(vm, found)[:80]
  except BudgetError as e:
    return 'budget', f'BudgetError: {e}'
  except Exception as e:  # of a __repr__ of the program
    return 'failed', ' '.join(f'{type(e).__name__}: {e}'.split())[:200]
  return 'failed', f'{shown} is not {str(expected)[:80]}'


def matches(vm, found, expected, depth: int = 0) -> bool:
  """Whether a result is the expected data: numbers by value, but True is not 1;
  a tuple is a list, as JSON has no tuples; an object of a class is nothing."""
  vm.spend(1)
  if depth > keys.DEPTH:
    raise BudgetError(f'a result nested deeper than {keys.DEPTH}')
  if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
    return len(found) == len(expected) and all(
      matches(vm, a, b, depth + 1) for a, b in zip(found, expected)
    )
  if isinstance(found, dict) and isinstance(expected, dict):
    return len(found) == len(expected) and all(
      not isinstance(k, Instance)
      and k in expected
      and matches(vm, v, expected[k], depth + 1)
      for k, v in found.items()
    )
  if isinstance(found, bool) or isinstance(expected, bool):
    return found is expected
  plain = (int, float, str, type(None), set, frozenset)
  if not isinstance(found, plain) or not isinstance(expected, plain):
    return False
  return compare.equal(vm, found, expected)


# --- the reward and the metric


def passes_tests(
  column: str = 'tests',
  *,
  all_or_nothing: bool = False,
  prefix: str | None = None,
  budget: Budget | None = None,
  classes: Sequence[str] = (),
) -> Callable:
  """Reward: share of the unit tests that a completion's code passes, 0 to 1.

    r = (tests that pass) / (tests)        or [all pass], 0 or 1

  Code is the last ```python block of a completion, or all of it. It is run by
  an interpreter of a Python subset (see jaxrl_tok.rewards.programs), never by
  Python: no sandbox is needed. Code that does not parse, uses what the subset
  has not, raises, or runs out of its budget before the tests earns 0. Where
  the column is None, the reward does not apply.

  Args:
    column: column of the data with the tests: a list of texts with assert, of
      pairs [call, expected], or one text whose assert lines are the tests.
    all_or_nothing: pays 1 for all tests, else 0.
    prefix: column with source that comes before the code, as the head of the
      function that the prompt shows.
    budget: limits of the code, and of each of its tests.
    classes: names of classes that the tests are about, as Stack for 'assert
      len(Stack()) == 0': their special methods are used in the tests.

  # {'tests': ['assert add(2, 3) == 5', ['add(1, -1)', 0]]}
  # 'def add(a, b):\\n  return a + b' -> 1.0

  Failure modes, as a policy games it: it writes out the answers to tests that
  it has seen (if x == 3: return 7), so test inputs that no prompt shows; it
  returns a constant (return True), which a share pays for, all_or_nothing less;
  it swallows exceptions and returns a default. An assert that compares nothing
  (assert f(x)) passes for any object that is true.

  Three doors are shut. In a test's own lines the names of built-in functions
  are the built-in ones, whatever the code defines (so no tested function may
  have such a name). There, an object of the code's classes equals objects of
  the code alone, and any other special method (operators, <, in, iteration,
  len, bool, abs, str) with another value ends the test as failed, so that no
  object poses as the answer; the code's own functions use such objects freely.
  Functions of modules take no attributes.

  These stay open: a method that a test calls on a result (f(x).startswith('a'))
  is the code's, and so is an item (f(x)[0]) and all that objects of the code
  say among themselves (P(1) == P(2)); classes opens all of it for the classes
  that it names. Names other than built-in ones, as imports of prefix, helpers
  of an earlier test, or a variable that a test keeps its expected value in, may
  be bound anew by the code, and a list that a test passes may be changed:
  import in the test itself, and compare with data that is written out. A loop
  over a result that is empty checks nothing (all(... for x in f()), zip).

  Cost: a program that never ends takes 1,000,000 steps, about half a second of
  a core; 64 such completions 30 s. Budget(steps=100_000) is enough for most
  solutions of a page.
  """

  def score(report: TestReport | None) -> float | None:
    if report is None:
      return None
    if all_or_nothing:
      return float(report.passed == len(report.kinds))
    return report.share

  def reward(completions, **columns) -> list[float | None]:
    found = _reports(completions, columns, column, prefix, budget, classes)
    return [score(report) for report in found]

  name = 'passes_all_tests' if all_or_nothing else 'passes_tests'
  return _named(reward, name, column, prefix)


def code_failures(
  column: str = 'tests',
  *,
  prefix: str | None = None,
  budget: Budget | None = None,
  classes: Sequence[str] = (),
) -> Callable:
  """Metric: shares of the tests of all completions that end in each way.

  code/passed, code/failed (an assert, or another result), code/syntax,
  code/language (outside of the subset), code/budget, code/exception; they sum
  to 1. code/all is the share of completions that pass every test. A policy
  that learns to write loops without end shows in code/budget.
  """

  def failures(completions, **columns) -> dict[str, float]:
    found = _reports(completions, columns, column, prefix, budget, classes)
    found = [report for report in found if report is not None]
    counts = Counter(kind for report in found for kind in report.kinds)
    whole = sum(report.passed == len(report.kinds) for report in found)
    total = max(sum(counts.values()), 1)
    shares = {
      f'code/{kind}': counts[kind] / total
      for kind in ('passed', 'failed', *KINDS[1:])
    }
    return shares | {'code/all': whole / max(len(found), 1)}

  return _named(failures, 'code_failures', column, prefix)


def _named(function: Callable, name: str, column: str, prefix) -> Callable:
  """The function with a name, and a signature that names its columns."""
  required = ['completions', column, *([prefix] if prefix else [])]
  function.__name__ = function.__qualname__ = name
  function.__signature__ = make_signature(required, any_name=False)
  return function


def _reports(completions, columns: dict, column: str, prefix, budget, classes):
  """A TestReport for each completion; None where its tests are None."""
  for row, completion in enumerate(completions):
    tests = columns[column][row]
    if tests is None:
      yield None
      continue
    head = (columns[prefix][row] or '') if prefix else ''
    code = extract_code(get_text(completion))
    yield run_tests(code, read_tests(tests, column), budget, head, classes)


def read_tests(value, column: str = 'tests') -> list:
  """Tests of a record: a list as it is, a text as its statements, of which the
  ones without an assert come before each test. Raises ValueError."""
  if isinstance(value, str):
    value = _split_tests(value, column)
  if not isinstance(value, list | tuple) or not value:
    raise ValueError(
      f'column {column} has {str(value)[:40]!r}, which holds no tests; give a '
      'list of assert lines or of [call, expected] pairs'
    )
  for test in value:
    pair = isinstance(test, list | tuple) and len(test) == 2
    if not isinstance(test, str) and not (pair and isinstance(test[0], str)):
      raise ValueError(
        f'column {column} has the test {str(test)[:40]!r}; give an assert line '
        'or a pair [call, expected]'
      )
  return list(value)


def _split_tests(text: str, column: str) -> list[str]:
  try:
    nodes = ast.parse(text).body
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    raise ValueError(
      f'column {column} has {text[:40]!r}, which is no Python; give assert '
      'lines'
    ) from None
  setup, tests = [], []
  for node in nodes:
    source = ast.get_source_segment(text, node)
    if isinstance(node, ast.Assert):
      tests.append('\n'.join([*setup, source]))
    else:
      setup.append(source)
  return tests
