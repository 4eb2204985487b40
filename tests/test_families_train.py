"""Training of every family's fixture by an experiment, also sharded; a
classifier is a reward."""

import jax
import numpy as np
import pytest
from conftest import DECODER_FAMILIES, FOUR, GOLDEN, ONE

from jaxrl_tok.hub.directory import open_model
from jaxrl_tok.hub.weights import read_params
from jaxrl_tok.run import models

pytestmark = pytest.mark.usefixtures('few_programs')


def leaves(directory):
  tree = read_params(open_model(directory))
  return [np.asarray(x) for x in jax.tree.leaves(tree)]


REWARD = [
  f'--reward_model={GOLDEN / "llama_classifier"}',
  '--reward_model_weight=2',
]


# families whose blocks differ most; the others by hand
OFTEN = 'gpt2', 'gemma3_text', 'qwen3_moe'


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow)
    for name in DECODER_FAMILIES
  ],
)
def test_it_learns_over_four_devices(name, train_fixture):
  run, rows = train_fixture(name, FOUR)
  assert [row['step'] for row in rows] == [1, 2]
  for row in rows:
    assert row['reward'] == pytest.approx(row['rewards/late_letters/mean'])
    assert row['grad_norm'] > 0
    assert row['sampler_logp_gap'] < 1e-4
  before, after = leaves(GOLDEN / name), leaves(run / 'export')
  assert all(np.isfinite(x).all() for x in after)
  moved = [not np.array_equal(a, b) for a, b in zip(before, after)]
  assert np.mean(moved) > 0.9  # an expert that nobody chose may stay


def test_a_classifier_is_a_reward(train_fixture):
  _, rows = train_fixture('qwen3', FOUR, *REWARD)
  assert len(rows) == 2
  for row in rows:
    model = row['rewards/reward_model/mean']
    assert model != 0
    both = row['rewards/late_letters/mean'] + 2 * model
    np.testing.assert_allclose(row['reward'], both, rtol=1e-5)


def test_one_device_is_four(train_fixture):
  name = 'qwen3_moe'  # whose experts are split over tensor
  _, one = train_fixture(name, ONE, out='one')
  _, four = train_fixture(name, FOUR, out='four')
  for a, b in zip(one, four, strict=True):
    assert a['completions/mean_length'] == b['completions/mean_length']
    for key in ('reward', 'entropy', 'grad_norm'):
      np.testing.assert_allclose(a[key], b[key], rtol=1e-3)


def test_a_classifier_is_no_policy(train_fixture, capsys):
  with pytest.raises(SystemExit):
    train_fixture('llama_classifier', ONE)
  assert 'pass it as --reward_model' in capsys.readouterr().err


def test_an_end_without_a_token_may_be_sampled():
  model = open_model(GOLDEN / 'qwen3')
  forbidden = models.forbidden_tokens(model._replace(end_tokens=(257, 260)))
  assert np.flatnonzero(forbidden).tolist() == [256, 258, 259, 261, 262, 263]


@pytest.mark.parametrize(
  ('model', 'fact'),
  [('qwen3', 'is no classifier'), ('nowhere', 'no directory and no hub id')],
)
def test_what_is_no_reward_model_is_refused(model, fact, train_fixture, capsys):
  with pytest.raises(SystemExit):
    train_fixture('qwen3', ONE, f'--reward_model={GOLDEN / model}')
  assert fact in capsys.readouterr().err
