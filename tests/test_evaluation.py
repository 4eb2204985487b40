"""Evaluations: every held-out prompt once, and credit token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_rollout, make_scored, random_prompts
from test_collectors import BOTH, SCORER, C, G, T, device, prompts_of, sample

from jaxrl_tok import sharding
from jaxrl_tok.evaluation import (
  Due,
  corpus_metrics,
  credit_rows,
  due,
  evaluate_held_out,
  reads_reference,
  resampled_metrics,
)
from jaxrl_tok.step.collectors import Batch, TokenCounts
from jaxrl_tok.step.device_steps import StepBatch
from jaxrl_tok.types import TrainState

N = 10  # prompts: two batches of four, and half of one


def evaluated(scorer, cut=(), whole=False, **more):
  """Evaluates: (metrics, rows); the last samples of some prompts are cut."""
  data, keys = prompts_of([i % 2 == 0 for i in range(N)]), jax.random.key(1)
  state = TrainState(jnp.int32(3), {}, (), keys, {})

  def completions(number, prompts):
    rollout = sample(state, jax.random.fold_in(keys, number), prompts)
    short = (rollout.tokens[:, 1] == 0)[:, None] & (np.arange(T)[None] == T - 1)
    over = jnp.isin(rollout.tokens[:, 0], jnp.array(cut), invert=True)
    return rollout._replace(mask=rollout.mask & ~short, ended=over)

  with jax.set_mesh(sharding.make_mesh('data=2', jax.devices()[:2])):
    found = evaluate_held_out(completions, scorer, data, C, 4, 7, **more)
  return found if whole else (found.metrics, found.rows)


def test_every_prompt_is_judged_once():
  metrics, rows = evaluated(SCORER, cut=[2, 5])
  numbers = [int(row['prompt'].split()[0]) for row in rows]
  assert numbers == np.repeat(np.arange(N), G).tolist()
  for i, row in enumerate(rows):
    number, g, *_ = map(int, row['completion'].split('-'))
    assert (number, g) == (i // G, i % G)
    # g where the prompt's rewards vary, else 1; nothing on the token that was
    # not chosen; no reward applies to prompt 7, which is in no mean
    want = 2.0 * (g if number % 2 == 0 else 1) * (g > 0)
    assert row['reward'] == (None if number == 7 else want)
  rewards = [row['reward'] for row in rows if row['reward'] is not None]
  assert len(rewards) == (N - 1) * G
  assert metrics['eval/reward'] == pytest.approx(np.mean(rewards))
  assert metrics['eval/mean_length'] == pytest.approx(T - 1 / G)
  assert metrics['eval/clipped_ratio'] == pytest.approx(2 / N)


def test_rewards_on_the_device_read_their_columns():
  scorer = BOTH._replace(device=device)
  _, rows = evaluated(scorer)
  _, alone = evaluated(SCORER)
  for number, (both, host) in enumerate(zip(rows, alone)):
    target = (number // G) % 2 == 0
    assert both['reward'] == (host['reward'] or 0) + 0.5 * target


def test_several_rewards_have_a_mean_and_a_component_each():
  metrics, rows = evaluated(BOTH._replace(device=device))
  parts = [row['components'] for row in rows]
  weights = BOTH.weights
  for row, part in zip(rows, parts):
    both = sum(weights[name] * value for name, value in part.items())
    assert row['reward'] == pytest.approx(both)
  names = {name for part in parts for name in part}
  assert len(names) == 2
  for name in names:
    values = [part[name] for part in parts if name in part]
    found = metrics[f'eval/rewards/{name}/mean']
    assert found == pytest.approx(np.mean(values))
  assert min(map(len, parts)) == 1  # the host's does not apply to prompt 7
  alone, rows = evaluated(SCORER)
  assert not [name for name in alone if 'rewards/' in name]
  assert 'components' not in rows[0]


def test_log_probs_under_the_reference_are_of_chosen_tokens():
  seen = []

  def spy(ref_logps, completions):
    assert len(ref_logps) == len(completions) == N * G
    seen.extend(map(len, ref_logps))
    return float(np.mean(np.concatenate(ref_logps)))

  def halved(rollout):
    return jnp.where(rollout.mask, -0.5, 9.0)

  metrics, _ = evaluated(SCORER, metrics=(spy,), reference=halved)
  assert metrics['eval/spy'] == -0.5
  assert np.mean(seen) == pytest.approx(metrics['eval/mean_length'])
  assert set(seen) == {T - 1, T}
  assert reads_reference([spy]) == 'spy'
  assert reads_reference([lambda completions, **columns: 0]) is None


def test_corpus_metrics_see_all_completions():
  def spread(prompts, completions, varies, **columns):
    assert len(prompts) == len(completions) == len(varies) == N * G
    return {'distinct': len(set(completions)), 'varying': np.mean(varies)}

  def count(completions, **columns):
    return len(completions)

  metrics, _ = evaluated(SCORER, metrics=(spread, count), name='other')
  assert metrics['eval/other/distinct'] == N * G
  assert metrics['eval/other/varying'] == pytest.approx(0.5)
  assert metrics['eval/other/count'] == N * G
  assert 'eval/reward' not in metrics
  assert corpus_metrics((), [{'prompt': 'a'}], ['b']) == {}


def test_a_metric_of_each_completion_is_a_mean_and_in_its_row():
  """As a reward function's list; None is left out."""

  def halves(completions, **columns):
    return [None if i % 4 else i / 2 for i in range(len(completions))]

  def both(completions):
    return {'one': 2.0, 'each': [1.0] * len(completions)}

  metrics, rows = evaluated(SCORER, metrics=(halves, both))
  known = [i / 2 for i in range(0, N * G, 4)]
  assert metrics['eval/halves'] == pytest.approx(np.mean(known))
  assert (metrics['eval/one'], metrics['eval/each']) == (2, 1)
  for i, row in enumerate(rows):
    want = {'halves': None if i % 4 else i / 2, 'each': 1.0}
    assert row['metrics'] == want
  with pytest.raises(ValueError, match='2 numbers for 1 completions'):
    corpus_metrics([lambda completions: [1, 2]], [{'prompt': 'a'}], ['b'])


def test_the_reward_has_an_interval():
  metrics, rows = evaluated(SCORER)
  assert metrics['eval/reward_low'] < metrics['eval/reward']
  assert metrics['eval/reward'] < metrics['eval/reward_high']
  again, _ = evaluated(SCORER)
  assert metrics == again
  assert {'index', 'length', 'ended'} <= rows[0].keys()


def test_metrics_of_sums_are_resampled_by_prompt():
  """All completions of a prompt are drawn together; others are left alone."""

  def letters(completions, ref_logps):
    return 0.0

  def statistics(completions, ref_logps):
    assert len(completions) == len(ref_logps) == N * G
    rows = [[float(i // G), 1.0] for i in range(N * G)]
    return [None, *rows[1:]], lambda sums: {'letters': sums[1], 'mean': sums[0]}

  letters.statistics = statistics

  def once(completions, **columns):
    return 1.0

  def flat(rollout):
    return jnp.zeros(rollout.mask.shape)

  given = {'metrics': (letters, once), 'reference': flat, 'whole': True}
  found = evaluated(SCORER, **given)
  samples = resampled_metrics((letters, once), found, 50)
  assert list(samples) == ['letters', 'mean']
  times = N * G - samples['letters']  # the first prompt has one fewer
  assert times.mean() == pytest.approx(1, abs=0.4)
  assert set(samples['mean'] % G) == {0}
  again = resampled_metrics((letters, once), found, 50)
  assert (samples['mean'] == again['mean']).all()


def test_credit_of_the_largest_advantages():
  mask = np.array([[1, 1, 0]] * 4 + [[1, 0, 1]] * 4, bool)
  rollout = make_rollout(
    random_prompts(C=4), np.arange(24).reshape(8, 3), mask, -1.0 * mask
  )
  applies = np.array([1, 0, 1, 1, 1, 1, 1, 1], bool)
  scored = make_scored(rollout, np.full((8, 3), 0.5), None, applies, 3.0)
  advantage = (
    np.where(mask, 1.0, 0) * np.array([1, 1, 0, 2, 9, 0, 3, 3])[:, None]
  )
  batch = Batch(
    None,
    [{'prompt': f'p{c}', 'answer': c} for c in range(4)],
    np.arange(4),
    {},
    TokenCounts(4, 16, 4),
    {'note': list('abcdef')},  # of new rows; replayed ones have none
  )

  def decode(ids):
    return [' '.join(map(str, row)) for row in ids]

  rows = credit_rows(StepBatch(scored, advantage), batch, decode, prompts=3)
  assert [row['prompt'] for row in rows] == ['p2', 'p2', 'p3', 'p3', 'p1', 'p1']
  assert rows[0] == {
    'prompt': 'p2',
    'answer': '2',
    'completion': '12 14',
    'reward': 3.0,
    'components': {'reward': 1.0},
    'tokens': ['12', '14'],
    'logp': [-1.0, -1.0],
    'rewards': [1.5, 1.5],
    'advantage': [9.0, 9.0],
    'extra': {'note': 'e'},
  }
  assert 'extra' not in rows[2]
  last = credit_rows(StepBatch(scored, advantage), batch, decode)[-1]
  assert (last['prompt'], last['components'], last['reward']) == ('p0', {}, 0)


def test_evaluations_are_due_by_step_and_at_the_end():
  every = [Due('a', 2, None), Due('b', 5, None), Due('c', 0, None)]

  def names(step):
    return [e.name for e in due(every, step, 12)]

  assert [names(k) for k in (1, 2, 5, 10, 12)] == [
    [],
    ['a'],
    ['b'],
    ['a', 'b'],
    ['a', 'b', 'c'],
  ]


def test_a_metric_gets_what_it_names_and_has_a_name_of_its_own():
  examples = [{'prompt': 'a', 'word': 'b'}, {'prompt': 'c'}]

  def longest(completions):
    return max(map(len, completions))

  def words(prompts, word):
    return len(prompts) + word.count('b')

  found = corpus_metrics([longest, words], examples, ['xx', 'y'])
  assert found == {'longest': 2.0, 'words': 3.0}

  def reward(completions):
    return 100.0

  for metrics in ([reward], [longest, longest]):
    with pytest.raises(ValueError, match='which is there already'):
      corpus_metrics(metrics, examples, ['xx', 'y'])
