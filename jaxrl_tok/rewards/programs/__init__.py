"""Programs in a subset of Python, run by an interpreter of our own."""

from jaxrl_tok.rewards.programs.interpreter import Outcome, run
from jaxrl_tok.rewards.programs.values import (
  Budget,
  BudgetError,
  LanguageError,
)

__all__ = ['Budget', 'BudgetError', 'LanguageError', 'Outcome', 'run']
