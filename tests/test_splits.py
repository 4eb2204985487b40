"""--credit_split: one reward for each token, in the field's controls."""

import json
from typing import get_type_hints

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jaxrl_tok import Task, main, on_device
from jaxrl_tok.credit.names import CREDIT_SPLITS
from jaxrl_tok.rewards import make_scorer, make_split, potentials
from jaxrl_tok.rewards.scoring import TrainerState
from jaxrl_tok.rewards.splits import SPLITS, place_last
from jaxrl_tok.run.algorithm_settings import AlgorithmSettings

pytestmark = pytest.mark.usefixtures('few_programs')

END = 9
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
# token rewards, an outcome (by_token False), one token, no token
REWARD = np.array(
  [[1, 2, -3, 5], [0, 0, 0, 4], [7, 0, 0, 0], [0, 0, 0, 0]], np.float32
)
BY_TOKEN = np.array([True, False, True, True])
APPLIES = np.array([True, True, True, True])


def split(how, step=3, seed=0, name='r', reward=REWARD, applies=APPLIES):
  found, metrics = make_split(how, seed)(
    {name: reward}, {name: BY_TOKEN}, {name: applies}, MASK, step
  )
  return found[name], metrics


def test_the_flag_has_the_words_of_the_table():
  assert set(CREDIT_SPLITS) == set(SPLITS)
  flag = get_type_hints(AlgorithmSettings)['credit_split']
  assert flag.__args__ == CREDIT_SPLITS
  assert AlgorithmSettings.credit_split == CREDIT_SPLITS[0] == 'potential'


def test_each_split_by_hand():
  np.testing.assert_array_equal(split('potential')[0], REWARD)
  found, metrics = split('outcome')
  np.testing.assert_array_equal(found[0], [0, 0, 0, 5])
  np.testing.assert_array_equal(found[1:], REWARD[1:])
  assert metrics == {}
  found, metrics = split('constant')
  np.testing.assert_array_equal(found[0], [0, 0, 0, 1])
  np.testing.assert_array_equal(found[1], REWARD[1])  # no list: as it is
  np.testing.assert_array_equal(found[2], [1, 0, 0, 0])
  # mean of the rows that are split: 5, 7 and, without a token, 0
  assert metrics == {'rewards/r/outcome': 4.0}
  found, _ = split('shuffled')
  assert sorted(found[0]) == [-3, 1, 2, 5]
  np.testing.assert_array_equal(found[1:], REWARD[1:])


def test_rows_that_a_reward_does_not_apply_to_are_no_controls():
  applies = np.array([False, True, True, True])
  found, metrics = split('constant', applies=applies)
  np.testing.assert_array_equal(found[0], REWARD[0])
  assert metrics == {'rewards/r/outcome': 3.5}


@given(st.data())
def test_sums_stay_and_credit_moves_over_chosen_tokens(data):
  B, T = 3, 6
  shape = st.lists(st.booleans(), min_size=T, max_size=T)
  mask = np.array([data.draw(shape) for _ in range(B)])
  rng = np.random.default_rng(data.draw(st.integers(0, 99)))
  reward = np.where(mask, rng.normal(size=(B, T)), 0).astype(np.float32)
  yes = np.ones(B, bool)
  for how in ('outcome', 'shuffled'):
    found, _ = make_split(how)({'r': reward}, {'r': yes}, {'r': yes}, mask, 0)
    assert found['r'].dtype == np.float32
    assert (found['r'][~mask] == 0).all()
    np.testing.assert_allclose(found['r'].sum(1), reward.sum(1), atol=1e-6)
    if how == 'shuffled':
      np.testing.assert_array_equal(np.sort(found['r']), np.sort(reward))
    else:
      assert (np.count_nonzero(found['r'], axis=1) <= 1).all()
  last = place_last(np.ones(B), mask)
  for row, on in zip(last, mask):
    assert row.sum() == on.any()
    assert not on.any() or row[np.flatnonzero(on)[-1]] == 1


def test_a_random_order_is_of_seed_step_and_name():
  """And of nothing else: other rows and other rewards do not move it."""
  wide = np.arange(400, dtype=np.float32).reshape(4, 100) + 1
  mask = np.ones((4, 100), bool)
  yes = np.ones(4, bool)

  def order(step=3, seed=0, name='r', mask=mask, rows=wide):
    given = {name: rows}, {name: yes}, {name: yes}, mask, step
    return make_split('shuffled', seed)(*given)[0][name]

  once = order()
  np.testing.assert_array_equal(order(), once)
  for other in (order(step=4), order(seed=1), order(name='s')):
    assert (other != once).any(1).all()
  assert (np.argsort(once[0]) != np.argsort(once[1])).any()
  shorter = mask.copy()
  shorter[0, 50:] = False
  np.testing.assert_array_equal(order(mask=shorter)[1:], once[1:])


def test_every_order_is_as_likely():
  counts = {}
  reward = np.tile(np.float32([1, 2, 3]), (6000, 1))
  yes, mask = np.ones(6000, bool), np.ones((6000, 3), bool)
  given = {'r': reward}, {'r': yes}, {'r': yes}, mask, 0
  for row in make_split('shuffled')(*given)[0]['r']:
    counts[tuple(row)] = counts.get(tuple(row), 0) + 1
  assert len(counts) == 6
  assert all(abs(n - 1000) < 150 for n in counts.values())  # five deviations


# --- in a scorer -------------------------------------------------------------

TOKENS = np.array([[0, 1, END], [2, 3, 4]])
CHOSEN = np.ones((2, 3), bool)
EXAMPLES = [{'prompt': 'p'}, {'prompt': 'q'}]


def decode(rows):
  return [''.join(chr(ord('a') + i) for i in row) for row in rows]


def scored(how, *functions, step=0):
  score = make_scorer(
    {f.__name__: f for f in functions}, decode, [END], split=make_split(how)
  )
  return score(TOKENS, CHOSEN, EXAMPLES, TrainerState(step))


def by_token(completion_ids):
  return [[1.0, 2.0, 3.0], np.array([4.0, 5.0, 6.0])]


def whole(completions):
  return [1.0, 2.0]


def test_a_users_own_lists_are_split_and_floats_are_not():
  found = scored('outcome', by_token, whole).rewards
  np.testing.assert_array_equal(found['by_token'], [[0, 0, 6], [0, 0, 15]])
  np.testing.assert_array_equal(found['whole'], [[0, 0, 1], [0, 0, 2]])
  scores = scored('constant', by_token, whole)
  np.testing.assert_array_equal(
    scores.rewards['by_token'], [[0, 0, 1], [0, 0, 1]]
  )
  assert scores.metrics == {'rewards/by_token/outcome': 10.5}


def test_a_split_without_effect_is_refused():
  for how in ('outcome', 'constant', 'shuffled'):
    with pytest.raises(ValueError, match=f'--credit_split {how} has no') as e:
      scored(how, whole)
    assert '\n' not in str(e.value)
    assert 'whole gives one number' in str(e.value)
  scored('potential', whole)

  def now_and_then(completions, trainer_state):
    """Lists at the first step only: the split has had its effect."""
    if trainer_state.global_step == 0:
      return [[1.0, 2.0, 3.0], 1.0]
    return [None, None] if trainer_state.global_step == 1 else [1.0, 1.0]

  score = make_scorer(
    {'f': now_and_then}, decode, [END], split=make_split('outcome')
  )
  for step in (0, 1, 2):
    score(TOKENS, CHOSEN, EXAMPLES, TrainerState(step))
  with pytest.raises(ValueError, match='has no effect'):
    scored('outcome', now_and_then, step=2)
  scored('outcome', now_and_then, step=1)  # no reward applies: not known yet


def test_a_split_waits_for_every_function():
  """A first batch without a reference for the potential stops no run; nor does
  a function that has never applied."""

  def seldom(completions, trainer_state):
    late = trainer_state.global_step > 1
    return [[1.0, 2.0, 3.0], None] if late else [None, None]

  for how in ('outcome', 'constant', 'shuffled'):
    functions = {'whole': whole, 'seldom': seldom}
    score = make_scorer(functions, decode, [END], split=make_split(how))
    for step in range(4):
      found = score(TOKENS, CHOSEN, EXAMPLES, TrainerState(step))
    assert found.rewards['seldom'].any()
    # none of these two will ever give one for each token
    score = make_scorer(
      {'whole': whole, 'other': whole}, decode, [END], split=make_split(how)
    )
    with pytest.raises(ValueError, match='whole, other gives one number'):
      score(TOKENS, CHOSEN, EXAMPLES)


# --- in a run ----------------------------------------------------------------

RECORDS = [{'prompt': f'{i}:', 'reference': 'ab cd'} for i in range(20)]
SMALL = {
  'd_model': 16,
  'num_layers': 1,
  'num_heads': 2,
  'num_kv_heads': 1,
  'd_ff': 16,
  'num_prompts': 4,
  'num_generations': 4,
  'held_out': 4,
  'max_steps': 4,
  'eval_every': 0,
  'save_every': 2,
  'max_completion_length': 8,
  'length_buckets': 1,
  'report_to': 'none',
  'log_kl': False,
}


@pytest.fixture(scope='module', autouse=True)
def _one_device():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda *args: jax.local_devices()[:1])
    yield


def run(out, how, *flags, reward=None) -> list[dict]:
  """Rows of metrics.jsonl of a small run."""
  task = Task(RECORDS, reward or potentials.edit_distance())
  argv = [f'--output_dir={out}', f'--credit_split={how}', *flags]
  main(task, argv, **SMALL)
  return rows_of(out)


def rows_of(out) -> list[dict]:
  lines = (out / 'metrics.jsonl').read_text().splitlines()
  clocks = ('time', 'step_time', 'tokens_per_second')
  return [
    {k: v for k, v in row.items() if k.split('/')[0] not in clocks}
    for row in map(json.loads, lines)
  ]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """{split: (directory, rows)} of a run each."""
  home, found = tmp_path_factory.mktemp('splits'), {}
  for how in CREDIT_SPLITS:
    found[how] = home / how, run(home / how, how)
  return found


def weights(out) -> dict:
  return load_file(out / 'export/model.safetensors')


def test_runs_differ_by_their_credit_alone(runs):
  """One start, one first batch, one sum of rewards; held-out rewards are the
  reward's own whatever is trained with."""
  first = {
    how: next(r for r in rows if r['phase'] == 'train')
    for how, (_, rows) in runs.items()
  }
  want = first['potential']
  for how in ('outcome', 'shuffled'):
    assert first[how]['reward'] == pytest.approx(want['reward'], abs=1e-5)
    assert first[how]['grad_norm'] != want['grad_norm']
  assert want['reward'] != 1
  assert first['constant']['reward'] == 1
  # leave_one_out leaves nothing of it
  assert first['constant']['grad_norm'] < 1e-6 < want['grad_norm']
  assert first['constant']['rewards/edit_distance/outcome'] == pytest.approx(
    want['reward'], abs=1e-5
  )
  before = {
    how: next(r for r in rows if r['phase'] == 'eval')['eval/reward']
    for how, (_, rows) in runs.items()
  }
  assert len(set(before.values())) == 1


def test_outcome_is_the_run_of_the_outcome_function(runs, tmp_path):
  reward = potentials.edit_distance().outcome
  rows = run(tmp_path / 'run', 'potential', reward=reward)
  for found, want in zip(rows, runs['outcome'][1], strict=True):
    assert found.keys() == want.keys()
    numbers = [
      {k: v for k, v in row.items() if k != 'phase'} for row in (found, want)
    ]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-5)


def test_a_shuffled_run_is_resumed_to_the_bit(runs, tmp_path):
  out = tmp_path / 'run'
  run(out, 'shuffled', '--max_steps=2')
  rows = run(out, 'shuffled', '--resume=auto')
  whole, want = runs['shuffled']
  trained = [[r for r in x if r['phase'] == 'train'] for x in (rows, want)]
  assert trained[0] == trained[1]
  one, two = weights(out), weights(whole)
  for name in one:
    np.testing.assert_array_equal(one[name], two[name])


def failed(capsys, *args, **more) -> str:
  with pytest.raises(SystemExit) as stopped:
    run(*args, **more)
  assert stopped.value.code == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len([line for line in lines if line.startswith('error: ')]) == 1
  return lines[-1]


def test_rewards_that_have_no_tokens_are_refused(tmp_path, capsys):
  @on_device
  def even(rollout, **columns):
    return (rollout.tokens[:, 0] % 2).astype('float32')

  of_texts = potentials.smoothed_bleu(split='outcome')
  for reward, kind in (
    (even, 'that are JAX functions'),
    (of_texts, 'of whole completions'),
  ):
    line = failed(capsys, tmp_path / 'a', 'shuffled', reward=reward)
    assert line == (
      f'error: --credit_split shuffled has no effect on rewards {kind}; leave '
      'it out, or pass a reward of rewards.potentials'
    )
    assert not (tmp_path / 'a').exists()  # before anything is written
  line = failed(capsys, tmp_path / 'b', 'constant', reward=lengths)
  assert 'error: --credit_split constant has no effect: lengths gives' in line


def lengths(completions, **columns):
  return [float(len(c)) for c in completions]


def test_another_split_is_no_word(capsys, tmp_path):
  with pytest.raises(SystemExit):
    run(tmp_path / 'run', 'dense')
  assert 'credit_split' in capsys.readouterr().err
