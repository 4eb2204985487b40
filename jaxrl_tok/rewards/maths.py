"""Answers of mathematics, compared by math-verify in processes of their own."""

import importlib.util
import queue
from collections.abc import Callable
from pathlib import Path

from jaxrl_tok.rewards.adapters import get_text
from jaxrl_tok.rewards.build import as_texts, missing, named
from jaxrl_tok.rewards.worker import Worker, ask_all

WORKER = Path(__file__).with_name('math_worker.py')


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
  idle = queue.SimpleQueue()
  for _ in range(workers):
    idle.put(Worker(WORKER, str(deadline)))

  def reward(completions, log_metric=None, **given) -> list[float | None]:
    rows = [
      None if answer is None else (as_texts(answer, column), get_text(c))
      for c, answer in zip(completions, given[column])
    ]
    asked = [row for row in rows if row is not None]
    answers = ask_all(idle, [{'answers': a, 'text': t} for a, t in asked])
    if log_metric is not None:
      log_metric('math_timeouts', sum(a is None for a in answers))
    found = iter(answers)
    return [None if row is None else _value(next(found)) for row in rows]

  return named(reward, 'math_equal', ['completions', column], ('log_metric',))


def _value(answer: dict | None) -> float | None:
  """Reward of an answer: 0 without one in time, None where it says so."""
  if answer is None:
    return 0.0
  return None if answer['equal'] is None else float(answer['equal'])
