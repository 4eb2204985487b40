"""Answers of mathematics, compared by math-verify in processes of their own."""

import importlib.util
from collections.abc import Callable

from jaxrl_tok.rewards.adapters import get_text
from jaxrl_tok.rewards.build import as_texts, missing, named
from jaxrl_tok.rewards.math_worker import equal
from jaxrl_tok.rewards.workers import Answer, Failure, Limits, Workers


def math_equal(
  column: str = 'answer', deadline: float = 5.0, workers: int = 1
) -> Callable:
  r"""Reward: 1 where a completion's answer equals the right one as mathematics,
  else 0; None where the right one cannot be read.

  math-verify reads the last \boxed{} or LaTeX formula of the text, else its
  last number, and compares with sympy: 1/2 is \frac{2}{4} and 0.5. An answer
  that is not decided in time is 0, and the metric `math_timeouts` counts it.

  Several \boxed{} are taken for a set of answers, so that guesses side by side
  are wrong. An equation is compared by its right side.

  Args:
    column: column of the data with the answer: LaTeX, bare or between $; or a
      list of answers.
    deadline: seconds of a processor for a completion; by the clock, on a
      machine that does other work, at most ten times as many. A worker that
      is stopped at it, or whose memory a power of powers fills, is started
      anew by the next question, which then takes seconds more.
    workers: processes, of about 100 MB each, that compare side by side.

  Raises ValueError where math-verify is missing.
  """
  if importlib.util.find_spec('math_verify') is None:
    raise missing('math-verify')
  if deadline <= 0 or workers < 1:
    raise ValueError(
      f'math_equal in {deadline} seconds by {workers} workers; pass a deadline '
      'above 0 and 1 worker or more'
    )
  # a busy machine changes no answer: time counts by the processor
  limits = Limits(10 * deadline, cpu=deadline)
  comparing = Workers(equal, limits, workers, 'math_equal')

  def reward(completions, log_metric=None, **given) -> list[float | None]:
    rows = [
      None if answer is None else (as_texts(answer, column), get_text(c))
      for c, answer in zip(completions, given[column])
    ]
    asked = [row for row in rows if row is not None]
    answers = comparing.ask(asked)
    if log_metric is not None:
      failed = sum(isinstance(a, Failure) for a in answers)
      log_metric('math_timeouts', failed)
    found = iter(answers)
    return [None if row is None else _value(next(found)) for row in rows]

  reward.own_worker = True  # --reward_workers leave it there
  return named(reward, 'math_equal', ['completions', column], ('log_metric',))


def _value(answer: Answer | Failure) -> float | None:
  """Reward of an answer: 0 without one in time, None where it says so."""
  if isinstance(answer, Failure):
    return 0.0
  return None if answer.value is None else float(answer.value)
