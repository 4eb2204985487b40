r"""REINFORCE on tokens learns to write programs that pass unit tests.

  python -m experiments.code

A prompt is a sentence, "the sum of the squares of the even numbers, plus 3:",
and the completion the expression after `return` of a function f(xs). It is run,
by the interpreter of jaxrl_tok.rewards.programs, on five random lists. A tiny
decoder of words learns 5,000 problems by supervision until 40 % of 256 other
problems are right; then it learns from the share of the tests that pass, and
sees no solution. A problem is right when all five tests pass.

On 2 CPU cores: 2 to 3 minutes, beside other work. The held-out share of right
problems goes from 46 to 90 %, 47 to 75 % (still rising) and 41 to 89 % in 200
steps with seeds 0, 1 and 2.

A share of the tests also pays for programs that are nearly right: where no
condition was asked for, the policy writes `if x%2==0`, which changes little on
a short list. The evaluation pays for all five tests or nothing, and so does
--all_or_nothing in training. code/failed, code/syntax and so on say how the
tests of the held-out programs end.

Problems of your own, in columns as MBPP's (the first test is shown in the
prompt, the others pay):

  python -m experiments.code \
    --data hub:google-research-datasets/mbpp@main:train \
    --model Qwen/Qwen2.5-0.5B-Instruct --algorithm grpo --learning_rate 1e-6 \
    --max_completion_length 256 --entropy_coef 0
"""

import functools
import random
from collections.abc import Callable
from typing import NamedTuple

from jaxrl_tok import Task, main
from jaxrl_tok.data import (
  check_counts,
  draw_different,
  open_records,
  word_tokenizer,
)
from jaxrl_tok.rewards.programs import Budget
from jaxrl_tok.rewards.programs.unit_tests import read_tests

HEAD = 'def f(xs):\n  return '
REQUEST = (
  'Write a Python function. {}\nYour code should pass this test:\n{}\nAnswer '
  'with the code in a block ```python.'
)
BUDGET = Budget(steps=20_000)  # of a program, and of each test


class Part(NamedTuple):
  """Part of a problem: in words, in Python, and as a function of (x, k)."""

  words: str
  source: str
  apply: Callable


WHICH = (
  Part('', '', lambda x, k: True),
  Part('even ', ' if x%2==0', lambda x, k: x % 2 == 0),
  Part('odd ', ' if x%2==1', lambda x, k: x % 2 == 1),
  Part('positive ', ' if x>0', lambda x, k: x > 0),
  Part('negative ', ' if x<0', lambda x, k: x < 0),
  Part('above {k}', ' if x>{k}', lambda x, k: x > k),
  Part('below {k}', ' if x<{k}', lambda x, k: x < k),
  Part('divisible by {k}', ' if x%{k}==0', lambda x, k: x % k == 0),
)
EACH = (
  Part('', 'x', lambda x, k: x),
  Part('the squares of ', 'x*x', lambda x, k: x * x),
  Part('the absolute values of ', 'abs(x)', lambda x, k: abs(x)),
  Part('the halves of ', 'x//2', lambda x, k: x // 2),
  Part('{k} times ', '{k}*x', lambda x, k: k * x),
  Part('{k} plus ', '{k}+x', lambda x, k: k + x),
  Part('{k} minus ', '{k}-x', lambda x, k: k - x),
)
RESULT = (
  Part('sum', 'sum({})', lambda ys, k: sum(ys)),
  Part('largest', 'max({})', lambda ys, k: max(ys)),
  Part('smallest', 'min({})', lambda ys, k: min(ys)),
  Part('count', 'len([{}])', lambda ys, k: len(ys)),
  Part('list', '[{}]', lambda ys, k: ys),
  Part('sorted list', 'sorted({})', lambda ys, k: sorted(ys)),
)
THEN = (
  Part('', '', lambda y, k: y),
  Part(', plus {k}', '+{k}', lambda y, k: y + k),
  Part(', minus {k}', '-{k}', lambda y, k: y - k),
  Part(', times {k}', '*{k}', lambda y, k: y * k),
)


def problem(rng: random.Random, form: str = '{}:') -> dict:
  """Draws a problem {'prompt', 'answer', 'head', 'tests'}.

  # 'the sum of the squares of the even numbers, plus 3'
  # 'sum(x*x for x in xs if x%2==0)+3'

  Tests are five pairs [call, expected] on random lists, of which the condition
  leaves some number. `form` is the prompt, with {} for the words.
  """
  which, each, result = map(rng.choice, (WHICH, EACH, RESULT))
  a, b, c = (rng.randrange(2, 10) for _ in range(3))
  then = THEN[0] if 'list' in result.words else rng.choice(THEN)
  kind = which.words.format(k=a)
  kind = f'numbers {kind}' if '{' in which.words else f'{kind}numbers'
  words = (
    f'the {result.words} of {each.words.format(k=b)}the {kind}'
    f'{then.words.format(k=c)}'
  )
  inside = f'{each.source.format(k=b)} for x in xs{which.source.format(k=a)}'
  tests = []
  while len(tests) < 5:
    xs = [rng.randrange(-20, 21) for _ in range(rng.randrange(2, 8))]
    ys = [each.apply(x, b) for x in xs if which.apply(x, a)]
    if ys:
      tests.append([f'f({xs})', then.apply(result.apply(ys, 0), c)])
  return {
    'prompt': form.format(words),
    'answer': result.source.format(inside) + then.source.format(k=c),
    'head': HEAD,
    'tests': tests,
  }


def problems(num_train: int, num_held_out: int, form: str = '{}:') -> tuple:
  """Problems that are all different: (training, held-out)."""
  rng = random.Random(0)

  def draw() -> tuple:
    one = problem(rng, form)
    return one['prompt'], one

  flags = f'--num_problems {num_train}'
  found = draw_different(draw, num_train + num_held_out, flags)
  records = list(found.values())
  return records[num_held_out:], records[:num_held_out]


def own_problems(source: str, text: str, tests: str) -> list[dict]:
  """Records of problems in columns such as MBPP's. The first test is shown, as
  it names the function; the others pay."""
  found = []
  for record in open_records(source, columns={text: 'prompt'}):
    shown, *hidden = read_tests(record.get(tests), tests)
    request = REQUEST.format(record['prompt'].strip(), shown)
    found.append(
      {
        'prompt': [{'role': 'user', 'content': request}],
        'head': f'{record.get("test_setup_code") or ""}\n',
        'tests': hidden or [shown],
      }
    )
  return found


def code(
  num_problems: int = 5000,
  all_or_nothing: bool = False,
  data: str | None = None,
  text_column: str = 'text',
  tests_column: str = 'test_list',
  held_out: int | None = None,
  model: str | None = None,
) -> Task:
  """Functions of a list of numbers, written from a sentence; or programs for
  problems of your own.

  Args:
    num_problems: Training problems that are generated.
    all_or_nothing: Pay for a program that passes all tests, not for a share.
    data: Problems of your own, for a --model: a jsonl or parquet file, or
      hub:OWNER/NAME@REVISION:SPLIT; its end is held out.
    text_column: Column of --data with a problem in words.
    tests_column: Column of --data with its tests, lines of assert.
  """
  from jaxrl_tok import rewards

  if data is not None and model is None:
    raise ValueError(
      '--data needs a policy that knows Python; pass --model, or leave out '
      '--data'
    )
  tests, count = None, held_out or 256
  if data is not None:
    train = own_problems(data, text_column, tests_column)
  else:
    check_counts(num_problems=num_problems)
    form = '{}:' if model is None else f'# {{}}\n{HEAD}'
    train, tests = problems(num_problems, count, form)
  texts = [r['prompt'] + r['answer'] for r in train] if tests else ()
  judge = functools.partial(rewards.passes_tests, prefix='head', budget=BUDGET)
  return Task(
    train,
    judge(all_or_nothing=all_or_nothing),
    held_out=tests or count,
    eval_rewards=judge(all_or_nothing=True),
    metrics=(rewards.code_failures(prefix='head', budget=BUDGET),),
    answers='answer' if tests else None,
    tokenizer=functools.partial(word_tokenizer, texts),
    description=f'{len(train):,} programming problems of {data or "its own"}',
    reward_unit='%',
  )


def run(argv=None):
  return main(
    code,
    argv,
    max_steps=200,
    num_prompts=32,
    num_generations=8,
    learning_rate=1e-3,
    lr_schedule='linear',
    entropy_coef=0.01,
    length_buckets=1,
    warm_start_check_every=5,
    eval_every=50,
    save_every=0,
  )


if __name__ == '__main__':
  run()
