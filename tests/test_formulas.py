"""The experiment of formulas: words and LaTeX say one thing; a tiny run."""

import random
import re

import pytest

from experiments import formulas
from jaxrl_tok import rewards

pytest.importorskip('math_verify', reason='an extra; [test] installs it')
import sympy

pytestmark = pytest.mark.usefixtures('one_device')

OPERATIONS = {
  'sum': lambda a, b: a + b,
  'difference': lambda a, b: a - b,
  'product': lambda a, b: a * b,
  'square': lambda a: a**2,
  'half': lambda a: a / 2,
}


def read_words(words: list[str]):
  """Value of a formula in words, whose words are taken from the front."""
  word = words.pop(0)
  if word == 'the':
    word = words.pop(0)
  if word not in OPERATIONS:
    return sympy.Integer(word) if word.isdigit() else sympy.Symbol(word)
  words.pop(0)  # of
  found = [read_words(words)]
  if word in ('sum', 'difference', 'product'):
    words.pop(0)  # and
    found.append(read_words(words))
  return OPERATIONS[word](*found)


def test_latex_is_what_the_words_say():
  train, held_out = formulas.problems(2, 60, 20)
  assert len({r['prompt'] for r in train + held_out}) == 80
  right, wrong = [], []
  for record in random.Random(1).sample(train + held_out, 12):
    value = read_words(re.sub(':$', '', record['prompt']).split())
    right.append((record['answer'], sympy.latex(value)))
    wrong.append((record['answer'], sympy.latex(value + 1)))
  texts, answers = zip(*right, *wrong)
  found = rewards.math_equal()(completions=list(texts), answer=list(answers))
  assert found == [1] * 12 + [0] * 12


def test_a_judge_is_asked_once():
  asked = []

  def judge(completions, answer, log_metric):
    asked.extend(zip(completions, answer))
    return [float(len(c) == len(a)) for c, a in zip(completions, answer)]

  reward = formulas.remembered(judge)
  assert rewards.get_name(reward) == 'judge'
  texts, answers = ['a', 'b', 'b', 'cc'], ['a', 'a', 'a', 'a']
  for _ in range(2):
    assert reward(completions=texts, answer=answers) == [1, 1, 1, 0]
  assert asked == [('b', 'a'), ('cc', 'a')]


def test_runs_end_to_end(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  words = (
    '--num_problems=64 --d_model=16 --num_layers=1 --num_heads=2 '
    '--num_kv_heads=1 --d_ff=16 --length_buckets=1 '
    '--num_prompts=8 --num_generations=2 '
    '--held_out=8 --max_steps=2 --warm_start_max_steps=2 --report_to=none '
    '--reward=exact --depth=1 --warm_start_batch_size=8 '
    f'--output_dir={tmp_path / "run"}'
  )
  result = formulas.run(words.split())
  assert result.summary['steps'] == '2'
  assert {'rewards/exact/mean'} <= result.metrics[-2].keys()
