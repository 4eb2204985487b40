"""Comparison of answers by math-verify, as workers of math_equal make it."""

import functools


def as_latex(answer: str) -> str:
  """The answer as mathematics: between $ where it is bare."""
  marked = any(mark in answer for mark in ('$', r'\(', r'\[', r'\boxed'))
  return answer if marked else f'${answer}$'


@functools.lru_cache(10_000)
def read(text: str) -> list:
  """Reads a text by math-verify: [expression, its text], or []."""
  from math_verify import parse

  return parse(text, parsing_timeout=None)


def equal(question: tuple[list[str], str]) -> bool | None:
  """Tells whether the answer that a text gives is one of the right ones, of a
  question (right answers, text); None where math-verify reads none of them."""
  answers, text = question
  found = [read(as_latex(a)) for a in answers]
  found = [gold for gold in found if gold]
  if not found:
    return None
  try:
    said = read(text)
    return any(same(gold, said) for gold in found)
  except (MemoryError, RecursionError):
    return False


def same(gold: list, said: list) -> bool:
  """math-verify's verdict. Of two polynomials their difference, multiplied out,
  says it in a thirtieth of the time that simplifying takes."""
  from math_verify import verify
  from sympy import expand

  if is_polynomial(gold) and is_polynomial(said):
    # what was read is not evaluated: 6 * 2 is no 12 yet
    return expand(gold[0].doit() - said[0].doit()) == 0
  return verify(gold, said, timeout_seconds=None)


def is_polynomial(found: list) -> bool:
  """Tells whether an answer is one polynomial of some variable, exact, whose
  powers are quickly multiplied out."""
  import sympy

  if len(found) != 2 or not isinstance(found[0], sympy.Expr):
    return False

  def is_small(power) -> bool:
    least = -1 if power.base.is_Number else 0
    return bool(power.exp.is_Integer) and least <= power.exp <= 8

  value = found[0]
  variables = value.free_symbols
  return (
    bool(variables)
    and not value.has(sympy.Float)
    and all(map(is_small, value.atoms(sympy.Pow)))
    and bool(value.is_polynomial(*variables))
  )
