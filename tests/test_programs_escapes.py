"""No program leaves the language, and none outlives its budget."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from escaping_programs import (
  BOMBS,
  DUNDERS,
  HOST,
  NESTED,
  PRELUDE,
  REFUSED,
  VALUES,
  deep,
)

from jaxrl_tok.rewards.programs import Budget, run
from jaxrl_tok.rewards.programs.builtins import BUILTINS
from jaxrl_tok.rewards.programs.interpreter import KINDS
from jaxrl_tok.rewards.programs.library import MODULES
from jaxrl_tok.rewards.programs.methods import METHODS

SMALL = Budget(steps=100_000)


@pytest.mark.parametrize('value', VALUES)
def test_no_attribute_of_the_host_is_reached(value):
  for name in DUNDERS:
    for source in (f'({value}).{name}', f'({value}).{name} = 1'):
      assert run(PRELUDE + source, SMALL).kind == 'language', source
  for name in HOST:
    outcome = run(PRELUDE + f'({value}).{name}', SMALL)
    assert (outcome.kind, outcome.exception) in (
      ('language', ''),
      ('exception', 'AttributeError'),
    ), (value, name)


@pytest.mark.parametrize('source', REFUSED)
def test_what_the_subset_has_not_is_refused(source):
  outcome = run(PRELUDE + source, SMALL)
  assert outcome.kind == 'language', outcome.error
  assert outcome.error.startswith('LanguageError: ')


MISSING = (
  *('deque([1]) * 2', '2 * deque([1])', '+Counter("a")', '-Counter("a")'),
  *(
    'Counter("a") <= Counter("b")',
    'defaultdict(list) | {}',
    '{} | defaultdict()',
  ),
  *('OrderedDict() | {}', '{1: 2}.items() & {1}'),
  *('cached.cache_info()', 'copy.copy(iter([]))', 'copy.deepcopy(f())'),
  *('reversed(Row())', '"a".translate([1])', 'int.from_bytes([1])'),
)
LIBRARY = """
import copy, functools
from collections import Counter, OrderedDict, defaultdict, deque
@functools.cache
def cached(): return 1
def f(): yield 1
class Row:
  def __getitem__(self, i): return [1][i]
"""


@pytest.mark.parametrize('operation', MISSING)
def test_operations_that_the_subset_lacks_are_no_errors_of_the_code(operation):
  source = f'{LIBRARY}try:\n  {operation}\nexcept Exception: pass'
  assert run(source).kind == 'language'
  for wrong in ('[] + 1', '{} < {}', '-[]', '{} | []', 'deque() + []', '1 @ 2'):
    source = f'{LIBRARY}\n{wrong}'
    assert run(source).exception == 'TypeError', wrong


def test_a_program_cannot_catch_the_end_of_the_language_or_of_its_budget():
  for end in ('[0] * 10 ** 12', "getattr(1, '__class__')", 'import os'):
    source = f'try:\n  {end}\nexcept BaseException:\n  print(1)\nfinally:\n'
    outcome = run(source + '  print(2)', SMALL)
    assert outcome.kind in ('budget', 'language')
    assert outcome.output == ''


def test_whitelists_hold_values_of_the_language_alone():
  """Everything that a name, a method or a module gives is a value that the
  interpreter knows: no function or class of Python itself."""
  ours = ('Native', 'Class', 'Module', 'NotImplementedType', 'float', 'str')
  tables = [BUILTINS, *METHODS.values()]
  tables += [m.attrs for m in MODULES.values() if m.attrs is not None]
  for table in tables:
    for name, value in table.items():
      assert type(value).__name__ in ours, name


def test_tables_of_the_language_are_not_changed_by_a_program():
  for source in (
    *('ValueError.x = 1', 'int.x = 1', 'len.x = 1', '[].append.x = 1'),
    *('import math\nmath.pi = 3', 'object.x = 1', 'type.x = 1'),
  ):
    outcome = run(source, SMALL)
    assert outcome.exception in ('TypeError', 'AttributeError'), source
  run('len = 3\nimport math\nsetattr(math, "x", 1)', SMALL)
  assert run('print(len("abc"))').output == '3\n'


# a process with 1 GiB of address space, whose stack is its limit's
HARD = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
from jaxrl_tok.rewards.programs import Budget, run
budget = Budget(steps=100_000)
for source in json.load(sys.stdin):
  outcome = run(source, budget)
  found = outcome.kind, outcome.error, outcome.exception
  print(json.dumps(found), flush=True)
"""


def run_apart(sources: list[str]) -> list:
  """Kinds and errors of programs that are run in a process with limits."""
  done = subprocess.run(
    [sys.executable, '-c', HARD],
    check=False,
    cwd=Path(__file__).parent.parent,
    input=json.dumps(sources),
    capture_output=True,
    text=True,
  )
  found = [json.loads(line) for line in done.stdout.splitlines()]
  last = sources[min(len(found), len(sources) - 1)]
  assert (done.returncode, len(found)) == (0, len(sources)), (
    last[:200],
    done.stderr[-500:],
  )
  return found


def test_bombs_end_with_the_budget_and_spare_the_host():
  wrong = {
    source: found
    for source, found in zip(BOMBS, run_apart(BOMBS))
    if found[0] != 'budget'
  }
  assert wrong == {}


def test_nested_sources_are_refused_before_they_hurt():
  sources = [deep(p, n) for p in NESTED for n in (20, 99, 150, 1000, 20_000)]
  for source, (kind, error, _) in zip(sources, run_apart(sources)):
    if len(source) > Budget().source:
      assert kind == 'budget', source[:100]
    else:  # some are lists of equals, and run
      assert kind in KINDS, (error, source[:100])
  assert run(deep('(|1|)', 99)).kind == 'ok'
  assert run(deep('-|1|', 101)).kind == 'budget'


@pytest.mark.parametrize(
  ('source', 'field', 'says'),
  [
    ('while True: pass', 'steps', 'steps'),
    ('x = [0] * 1000', 'memory', 'bytes of memory'),
    ('def f(): f()\nf()', 'depth', 'nested deeper'),
    ("print('abcdefghij' * 9)", 'output', 'characters of output'),
    ('x = 2 ** 1000', 'int_bits', 'bits'),
    ('x = 1\n' * 30, 'source', 'characters'),
    ('x = ((((((((((((((1 + 1) + 1) + 1) + 1)))))))))))', 'nesting', 'nested'),
  ],
)
def test_every_field_of_a_budget_ends_a_program(source, field, says):
  value = {'nesting': 4}.get(field, 50)
  if field not in ('steps', 'depth'):  # these two end any budget
    assert run(source).kind == 'ok'
  outcome = run(source, Budget()._replace(**{field: value}))
  assert outcome.kind == 'budget'
  assert says in outcome.error
  assert '\n' not in outcome.error


def test_steps_are_counted_exactly_and_alike_every_time():
  source = 'x = 0\nfor i in range(100):\n  x += i\n'
  first, second = run(source), run(source)
  assert first.steps == second.steps
  assert run(source, Budget(steps=first.steps)).kind == 'ok'
  assert run(source, Budget(steps=first.steps - 1)).kind == 'budget'
