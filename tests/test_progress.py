"""Best evaluation: which it is, what a resumed run knows of it."""

import dataclasses
import json
import math

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxrl_tok.progress import (
  LoopConfig,
  Progress,
  after_evaluation,
  from_saved,
  known_best,
  stop_reason,
)

values = st.lists(
  st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan, math.inf]), max_size=8
)


def evaluated(progress, steps, config):
  """Progress after evaluations {step: value}; None where it stopped."""
  for step, value in steps:
    progress = dataclasses.replace(progress, step=step)
    progress = after_evaluation(progress, {config.best_metric: value}, config)
    if stop_reason(progress, config):
      return progress, True
  return progress, False


@hypothesis.given(values, st.integers(0, 8), st.sampled_from(['max', 'min']))
def test_a_resumed_run_has_the_best_of_one_that_never_stopped(found, cut, mode):
  config = LoopConfig(99, patience=2, best_metric='eval/x', best_mode=mode)
  start, steps = Progress(best_metric='eval/x'), list(enumerate(found, 1))
  whole, over = evaluated(start, steps, config)
  half, stopped = evaluated(start, steps[:cut], config)
  saved = json.loads(json.dumps(dataclasses.asdict(half)))
  again, line = known_best(from_saved(saved), config, [])
  assert line is None
  if not stopped:
    assert evaluated(again, steps[cut:], config) == (whole, over)
  known = [v for v in found if math.isfinite(v)]
  if not over and known:
    assert whole.best_value == {'max': max, 'min': min}[mode](known)
    assert found[whole.best_step - 1] == whole.best_value
    first = found.index(whole.best_value)  # of equal ones
    assert whole.best_step == first + 1
    assert whole.evals_since_best == len(found) - whole.best_step


def test_other_evaluations_change_nothing():
  progress = after_evaluation(Progress(), {'eval/hard/reward': 1}, LoopConfig())
  assert progress == Progress()
  held_out = after_evaluation(
    Progress(), {'eval/reward': 1.0}, LoopConfig(best_metric='eval/x')
  )
  assert held_out == Progress(eval_reward=1.0)


def test_a_best_without_its_checkpoint_is_forgotten():
  best = Progress(
    step=9, best_value=0.5, best_step=4, evals_since_best=2, eval_reward=0.1
  )
  for keep, saved, kept in (
    (False, [], True),
    (True, [4, 9], True),
    (True, [9], False),
  ):
    found, line = known_best(best, LoopConfig(keep_best=keep), saved)
    assert (found == best) == kept == (line is None)
  assert (found.best_value, found.best_step, found.evals_since_best) == (
    *(None, None, 0),
  )
  other, line = known_best(best, LoopConfig(best_metric='eval/bleu'), [4])
  assert 'eval/reward is forgotten; eval/bleu counts now' in line
  assert (other.best_value, other.best_metric) == (None, 'eval/bleu')
  assert other.eval_reward == 0.1


def test_checkpoints_of_older_versions_are_read():
  old = {'step': 4, 'num_tokens': 7, 'best_reward': 0.5, 'evals_since_best': 1}
  found = from_saved(old)
  assert found == Progress(
    step=4, num_tokens=7, best_value=0.5, evals_since_best=1, evaluated=4
  )
  assert from_saved(dataclasses.asdict(found)) == found


@pytest.mark.parametrize(
  ('metric', 'words'),
  [('eval/reward', 'held-out reward'), ('eval/bleu', 'eval/bleu')],
)
def test_patience_names_its_metric(metric, words):
  config = LoopConfig(patience=2, best_metric=metric)
  line = stop_reason(Progress(evals_since_best=2), config)
  assert line == f'no better {words} in 2 evaluations'
