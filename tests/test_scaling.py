"""Weak scaling is computed from traced work and the chips' rates."""

import json

import pytest

from experiments.studies import scaling
from jaxrl_tok.targets import CHIPS

TINY = scaling.config_of(
  64, 128, 2, 4, 2, head_dim=16, vocab_size=256, tie_word_embeddings=True
)
FLAGS = scaling.Flags(4, 2, 8, 8)


@pytest.fixture(scope='module')
def work():
  return scaling.work_of(TINY, FLAGS)


def test_work_is_about_two_and_eight_flops_a_parameter_and_token(work):
  """Forward 2; forward, again and backward 8: attention and the last hidden
  states alone come on top."""
  table = 256 * 64
  blocks = work.parameters - table
  tokens, new = 8 + 2 * 8, 2 * 8
  least = 2 * (blocks * tokens + table * new)
  assert least < work.rollout < 1.3 * least
  assert 0.8 * 4 * least < work.update < 1.5 * 4 * least
  assert work.state == 12 * work.parameters


def test_more_chips_of_equal_load_communicate_and_compute_no_faster(work):
  steps = [scaling.step_on(2**i, work, CHIPS['v5e'], FLAGS) for i in range(9)]
  first = steps[0]
  assert first.network == 0
  assert first.tokens == first.exposed
  for s in steps[1:]:
    assert (s.rollout, s.update) == (first.rollout, first.update)
    assert s.network > 0
    assert s.exposed < s.tokens <= first.tokens


def test_a_model_that_does_not_fit_has_no_row(work, tmp_path, monkeypatch):
  monkeypatch.setattr(scaling, 'MODELS', {'tiny': (TINY, 'v5e')})
  out = tmp_path / 'out'
  lengths = ['--prompt_length=8', '--completion_length=8']
  scaling.main([*lengths, f'--output_dir={out}'])
  rows = json.loads((out / 'scaling.json').read_text())['tiny']
  assert [row['chips'] for row in rows] == [2**i for i in range(9)]
  assert (out / 'scaling.md').read_text().count('| tiny |') == 9
  assert 'computed' in (out / 'scaling.svg').read_text()
  large = work._replace(state=2**50)
  assert not scaling.fits(
    scaling.step_on(256, large, CHIPS['v5e'], FLAGS), CHIPS['v5e']
  )


def test_a_count_of_none_is_refused(capsys):
  with pytest.raises(SystemExit):
    scaling.main(['--prompts_a_chip', '0'])
  assert 'must be at least 1' in capsys.readouterr().err
