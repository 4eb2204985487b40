"""Programs in a subset of Python, run by an interpreter of our own.

  run('x = sum(range(5))').namespace['x']     # 10
  passes_tests(column='tests')                # a reward for code
  code_failures(column='tests')               # a metric: how tests end

No program is given to Python. Read it in this order:

  compiler.py expressions.py scopes.py    syntax tree -> instructions
  ops.py control.py                       what an instruction does
  machine.py objects.py                   frames, calls, exceptions, attributes
  operators.py lookup.py compare.py keys.py formats.py   counted before done
  builtins.py iterators.py methods.py text_methods.py    whitelists
  library.py library_sources.py copies.py                modules
  interpreter.py unit_tests.py            run, passes_tests

Frames are the machine's own, so that recursion of a program uses none of the
host's. A program sees the values, functions and methods of the whitelists and
no attribute of the host. It ends by itself, by an exception, or by the end of
its Budget: steps, bytes made, calls inside calls, characters printed.

The language: numbers, strings, lists, tuples, dicts, sets, slices, functions
(defaults, * and **, closures, nonlocal, lambda, decorators), classes with one
base, properties and special methods, generators, comprehensions, f-strings,
unpacking, :=, try, raise, assert; imports from math, itertools, functools,
collections, heapq, bisect, operator, string, copy and typing. Not in it: with,
match, async, bytes, complex numbers, other modules, names with two underscores
around them (special methods may be defined, __name__ read), input, open, eval.
A program that uses one of these ends with kind 'language'.

Known differences from CPython: annotations are not evaluated; texts of
functions and objects show no address; recursion is bounded by the Budget, not
by RecursionError; a generator that is dropped runs no finally; throw and close
are left out; sets of numbers, and of tuples of numbers, have CPython's order,
and other sets that of their sorted members, in every process; sum, max and
sorted read an iterator to its end before they
compare; integers end at Budget.int_bits.
"""

from jaxrl_tok.rewards.programs.interpreter import Outcome, run
from jaxrl_tok.rewards.programs.unit_tests import (
  TestReport,
  code_failures,
  extract_code,
  passes_tests,
  run_tests,
)
from jaxrl_tok.rewards.programs.values import (
  Budget,
  BudgetError,
  LanguageError,
)

__all__ = [
  'Budget',
  'BudgetError',
  'LanguageError',
  'Outcome',
  'TestReport',
  'code_failures',
  'extract_code',
  'passes_tests',
  'run',
  'run_tests',
]
