"""run(source) -> Outcome: a program of the subset, within a budget."""

import builtins as python
from typing import NamedTuple

from jaxrl_tok.rewards.programs.builtins import BUILTINS
from jaxrl_tok.rewards.programs.compare import to_str
from jaxrl_tok.rewards.programs.compiler import compile_source
from jaxrl_tok.rewards.programs.library import MODULES, module_code
from jaxrl_tok.rewards.programs.machine import Machine
from jaxrl_tok.rewards.programs.methods import METHODS
from jaxrl_tok.rewards.programs.values import (
  Budget,
  BudgetError,
  LanguageError,
  ObjectError,
  Raised,
)

KINDS = ('ok', 'syntax', 'language', 'budget', 'exception')
# names of Python that are refused rather than undefined
REFUSED = frozenset(dir(python)) - BUILTINS.keys()


ALWAYS_BUILTIN = frozenset(BUILTINS)


class Outcome(NamedTuple):
  """End of a program."""

  kind: str  # one of KINDS
  error: str  # '' or one line, as 'ZeroDivisionError: division by zero'
  exception: str  # name of the class of an exception that nothing caught
  namespace: dict  # {name: value} of the module
  output: str  # printed
  steps: int  # used of the budget
  memory: int  # bytes made


def make_machine(budget: Budget) -> Machine:
  """An interpreter with the whitelisted names."""
  vm = Machine(budget, BUILTINS, METHODS, MODULES, module_code, REFUSED)
  vm.globals['__name__'] = 'program'
  return vm


def execute(vm: Machine, source: str, test: bool = False) -> Outcome:
  """Runs a source in an interpreter that others may have run in before.

  test: names of built-in functions are the built-in ones, whatever the source
    before bound, and its objects meet other values only where they are akin
    (see Objects.special); where they do not, the kind is 'failed'.
  """
  kind, error, exception = 'ok', '', ''
  try:
    builtin = ALWAYS_BUILTIN if test else frozenset()
    vm.run(compile_source(source, vm.budget, builtin, test))
  except SyntaxError as e:
    kind, error = 'syntax', f'SyntaxError: {e.msg}'
  except BudgetError as e:
    kind, error = 'budget', f'BudgetError: {e}'
  except (RecursionError, MemoryError) as e:
    kind, error = 'budget', f'BudgetError: {type(e).__name__} of the host'
  except LanguageError as e:
    kind, error = 'language', f'LanguageError: {e}'
  except ObjectError as e:
    kind, error = 'failed', f'ObjectError: {e}'
  except Raised as e:
    exception = e.value.cls.name
    kind, error = 'exception', f'{exception}: {_message(vm, e.value)}'
  vm.frames.clear()
  return Outcome(
    kind,
    ' '.join(error.split())[:200].removesuffix(':'),
    exception,
    vm.globals,
    ''.join(vm.printed),
    vm.budget.steps - vm.steps,
    vm.budget.memory - vm.memory,
  )


def _message(vm: Machine, value) -> str:
  try:
    return to_str(vm, value)[:200]
  except Exception:  # its own __str__ raises
    return ''


def run(source: str, budget: Budget | None = None) -> Outcome:
  """Runs a program of the Python subset; nothing that it does raises.

  # run('x = 6 * 7').namespace['x'] -> 42
  # run('while True: pass').kind -> 'budget'
  """
  return execute(make_machine(budget or Budget()), source)
