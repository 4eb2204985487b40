"""The experiment of spelling: its texts, its noise, a tiny run; and the study
of dense credit on it."""

import json
import random
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import spelling
from experiments.studies import credit
from jaxrl_tok.credit.names import CREDIT_SPLITS
from jaxrl_tok.rewards.splits import make_split
from jaxrl_tok.types import Prompts, Rollout

pytestmark = pytest.mark.usefixtures('one_device', 'few_programs')

TINY = [
  *('--words=50', '--num_texts=64', '--held_out=16', '--d_model=16'),
  *('--num_layers=1', '--num_heads=2', '--num_kv_heads=1', '--d_ff=16'),
  *('--num_prompts=8', '--num_generations=4', '--warm_start_max_steps=2'),
  *('--warm_start_check_every=2', '--warm_start_batch_size=8', '--no_cache'),
]


# --- texts


def test_texts_are_runs_of_common_words(tmp_path):
  file = tmp_path / 'text'
  file.write_text('The cat, "the" dog!\n\nThe cat sat: the cat.')
  words = spelling.read_words(str(file))
  assert ' '.join(words) == 'the cat , the dog ! the cat sat : the cat .'
  assert spelling.phrases(words, 2) == ['the cat', 'the']
  assert spelling.windows(['the cat the', 'the'], 5) == ['the c', 'cat t']
  assert spelling.windows(['the cat'], 4) == []  # 'the ' ends with a space


def test_text_is_installed_with_python():
  words = spelling.read_words()
  assert len(words) > 20_000
  assert {'the', 'object', 'class'} <= set(words)


def test_no_held_out_text_is_trained_on():
  texts = spelling.phrases(spelling.read_words(), 200)
  train, held_out = spelling.split_windows(texts, 10)
  assert 200 < len(held_out) < len(train) / 3
  assert not set(train) & set(held_out)
  assert {len(w) for w in (*train, *held_out)} == {10}


@given(st.text(spelling.LETTERS, max_size=20), st.integers(0, 99))
def test_noise_replaces_characters(text, seed):
  def noisy(p):
    return spelling.corrupted(random.Random(seed), text, p)

  assert noisy(0.0) == text
  assert len(noisy(1.0)) == len(text)
  assert not any(a == b for a, b in zip(noisy(1.0), text))


def test_noise_has_its_share():
  text = spelling.corrupted(random.Random(0), 'a' * 10_000, 0.3)
  assert text.count('a') == pytest.approx(7000, abs=150)


def test_a_share_of_characters_is_right():
  task = spelling.spelling(words=50, num_texts=2, held_out=2)
  cer, exact = task.metrics
  known, unseen = (
    {r['answer'] for r in records}
    for records in (task.train, task.evaluations[0].data)
  )
  assert not known & unseen
  given = {
    'completions': ['abcdefghij', 'abcdefg'],
    'answer': ['abcdefghij'] * 2,
  }
  assert cer(**given) == pytest.approx(0.15)
  assert exact(**given) == 0.5
  assert task.eval_rewards(**given) == pytest.approx([1, 0.7])


@pytest.mark.parametrize(
  ('given', 'fact'),
  [
    ({'p': 1.5}, '--p 1.5'),
    ({'length': 0}, '--length 0'),
    (
      {'p': 0, 'words': 20, 'held_out': 5000},
      'nearly all prompts are held out',
    ),
    ({'words': 1}, '--words 1'),
    ({'text': 'nowhere'}, 'nowhere'),
  ],
)
def test_flags_that_cannot_be_are_one_line(given, fact):
  with pytest.raises((ValueError, OSError), match=fact) as e:
    spelling.spelling(**given)
  assert '\n' not in str(e.value)


# --- splits on the device


def test_splits_are_those_of_the_host():
  rng = np.random.default_rng(0)
  lengths = np.array([1, 4, 6, 6])
  mask = np.arange(6) < lengths[:, None]
  reward = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
  found = credit.all_splits(reward, mask, jax.random.key(0))
  assert set(found) == set(CREDIT_SPLITS) == set(credit.SPLITS)
  yes = np.ones(4, bool)
  for name, device in found.items():
    host, _ = make_split(name)({'r': reward}, {'r': yes}, {'r': yes}, mask, 0)
    if name == 'shuffled':  # another order of each row's numbers
      host, device = np.sort(host['r']), np.sort(device)
      np.testing.assert_array_equal(host, device)
      assert (np.asarray(found[name]) != reward).any(1).sum() >= 2
    else:
      np.testing.assert_allclose(device, host['r'], atol=1e-6)


def test_each_run_has_its_split():
  mask = np.ones((2, 3), bool)
  zeros = np.zeros((2, 3), np.float32)
  rollout = Rollout(
    Prompts(np.ones((1, 1), np.int32), np.ones(1, np.int32)),
    *(mask.astype(np.int32), mask, zeros, None),
    *(np.ones(2, bool), np.zeros(2, np.int32)),
  )
  reward = np.array([[1, 2, 3], [0, 0, 4]], np.float32)

  def score(params, rollout, columns):
    return {'r': reward}, {'r': np.ones(2, bool)}

  for number, split in enumerate(credit.SPLITS):
    by = credit.with_split(score, np.int32(number), jax.random.key(1))
    found, _ = by(None, rollout, {})
    want = {
      'potential': reward,
      'outcome': [[0, 0, 6], [0, 0, 4]],
      'constant': [[0, 0, 1], [0, 0, 1]],
    }
    if split in want:
      np.testing.assert_array_equal(found['r'], want[split])
    else:
      np.testing.assert_array_equal(np.sort(found['r']), np.sort(reward))


# --- the study


def run_of(row, split, seed, cer, rate=1e-3) -> credit.Run:
  return credit.Run(row, split, seed, rate, [0.3, cer], [0.1, 1 - cer], [1.0])


def test_the_table_is_of_last_numbers():
  runs = [
    run_of('grpo', split, seed, cer + 0.02 * seed)
    for split, cer in (('outcome', 0.2), ('potential', 0.1))
    for seed in (0, 1)
  ]
  header, line = credit.table(credit.by_row(runs, tuned=True))
  assert header[2:] == ('outcome', 'potential', 'potential - outcome')
  # Student's t of one degree of freedom, 12.7
  assert line == (
    *('grpo', '30.0 ± 0.0', '21.0 ± 12.7', '11.0 ± 12.7', '-10.0 ± 0.0'),
  )
  groups = credit.by_row(
    [*runs, run_of('grpo', 'outcome', 0, 0.5, 1e-2)], False
  )
  assert list(groups) == ['grpo, 0.001', 'grpo, 0.01']
  page = ElementTree.fromstring(credit.picture(groups))
  dots = [x for x in page.iter() if x.tag.endswith('circle')]
  assert len(dots) >= 2 * 3  # and those of the key


@pytest.fixture(scope='module')
def studied(tmp_path_factory):
  """Study of one row, in two calls."""
  out = tmp_path_factory.mktemp('credit') / 'out'
  argv = [*TINY, '--max_steps=2', '--eval_every=1', f'--output_dir={out}']
  argv += ['--rows', 'grpo', '--seeds', '0']
  return argv, out, credit.main(argv)


def test_runs_that_are_there_are_not_made_again(studied, monkeypatch):
  argv, out, runs = studied
  assert [r.split for r in runs] == list(credit.SPLITS)
  first = {(tuple(r.cer[:1]), r.exact[0]) for r in runs}
  assert len(first) == 1
  assert all(len(r.cer) == 3 and len(r.entropy) == 2 for r in runs)
  monkeypatch.setattr(credit, 'grow', None)
  again = credit.main(argv)
  assert [r._asdict() for r in again] == [r._asdict() for r in runs]
  found = json.loads((out / 'credit.json').read_text())
  assert len(found['runs']) == 4
  assert (out / 'credit.md').read_text().startswith('| estimator | before |')
  with pytest.raises(SystemExit):
    credit.main([*argv, '--p=0.2'])
