"""Programs mean here what they mean in CPython."""

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest
from generated_programs import program
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxrl_tok.rewards.programs import Budget, keys, run

pytestmark = pytest.mark.usefixtures('order_of_cpython')


@pytest.fixture(scope='module')
def order_of_cpython():
  """Sets in CPython's order, which differs from process to process; their own
  is in test_programs_costs.py."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(keys, 'in_order', lambda vm, items: items)
    patch.setattr(keys, 'pop', lambda vm, items: items.pop())
    yield


SOLUTIONS = Path(__file__).parent / 'programs' / 'solutions.txt'
CORPUS = dict(
  part.split('\n', 1)
  for part in re.split(r'^=== ', SOLUTIONS.read_text(), flags=re.M)[1:]
)
DATA = (int, float, str, bool, type(None), list, tuple, dict, set, frozenset)


def run_in_cpython(source: str) -> tuple[dict, str, str]:
  """(names, output, class of the exception) of a program."""
  names, out, error = {'__name__': 'program'}, io.StringIO(), ''
  with contextlib.redirect_stdout(out), warnings.catch_warnings():
    warnings.simplefilter('ignore')
    try:
      exec(compile(source, 'program', 'exec'), names)
    except Exception as e:
      error = f'{type(e).__name__}: {e}'.removesuffix(': ')
  return names, out.getvalue(), error


def plain(names: dict) -> dict:
  """Texts of the names that hold data."""
  return {k: repr(v) for k, v in names.items() if type(v) in DATA}


@pytest.mark.parametrize('name', CORPUS)
def test_solutions_print_what_cpython_prints(name):
  names, output, error = run_in_cpython(CORPUS[name])
  outcome = run(CORPUS[name])
  assert outcome.error == error
  assert outcome.output == output
  names.pop('__builtins__', None)  # none after a SyntaxError
  assert plain(outcome.namespace) == plain(names)


def test_the_corpus_is_large():
  assert len(CORPUS) >= 60


def compare_with_cpython(source: str) -> None:
  outcome = run(source, Budget(steps=20_000, memory=2**20, int_bits=2**12))
  assume(outcome.kind not in ('budget', 'language'))
  names, output, error = run_in_cpython(source)
  names.pop('__builtins__', None)  # none after a SyntaxError
  # a comprehension is a function of its own before 3.12, not after
  found, meant = (
    (f'{e.split(":")[0]}\n{text}'.replace('UnboundLocalError', 'NameError'))
    for e, text in ((outcome.error, outcome.output), (error, output))
  )
  assert found == meant, source
  assert plain(outcome.namespace) == plain(names), source


@settings(max_examples=400)
@given(st.integers(0, 2**32))
def test_generated_programs_mean_what_they_mean_in_cpython(seed):
  compare_with_cpython(program(seed))
