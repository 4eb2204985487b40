"""Process of math_equal: python math_worker.py SECONDS

Reads lines {"answers": [...], "text": ...} and writes {"equal": true | false}
for each, or null where math-verify reads no answer of the data.
"""

import contextlib
import json
import resource
import signal
import sys

MEMORY = 4 << 30  # bytes that a comparison may take


def as_latex(answer: str) -> str:
  """The answer as mathematics: between $ where it is bare."""
  marked = any(mark in answer for mark in ('$', r'\(', r'\[', r'\boxed'))
  return answer if marked else f'${answer}$'


def equal(question: dict) -> bool | None:
  """Tells whether the answer that a text gives is one of the right ones."""
  from math_verify import parse, verify

  found = [
    parse(as_latex(a), parsing_timeout=None) for a in question['answers']
  ]
  found = [gold for gold in found if gold]
  if not found:
    return None
  said = parse(question['text'], parsing_timeout=None)
  return any(verify(gold, said, timeout_seconds=None) for gold in found)


def set_alarm(seconds: float) -> None:
  """Lets a signal end the process after seconds of its own time, or ten times
  as many by the clock; 0: never. A busy machine changes no answer."""
  signal.setitimer(signal.ITIMER_PROF, seconds)
  signal.setitimer(signal.ITIMER_REAL, 10 * seconds)


def main(seconds: float) -> None:
  """Answers questions until there are none."""
  with contextlib.suppress(OSError, ValueError):  # some systems have no limit
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  equal({'answers': ['1'], 'text': '$1$'})  # imports, and makes its parsers
  print('ready', flush=True)
  for line in sys.stdin:
    set_alarm(seconds)
    try:
      answer = equal(json.loads(line))
    except (MemoryError, RecursionError):
      answer = False
    set_alarm(0)
    print(json.dumps({'equal': answer}), flush=True)


if __name__ == '__main__':
  main(float(sys.argv[1]))
