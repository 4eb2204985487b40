"""The experiment of stories: its prompts, rewards and audit, and a tiny run."""

import dataclasses
import itertools
import json
import math
import shutil
import socket
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, make_rollout, random_prompts
from hypothesis import given
from hypothesis import strategies as st

from experiments import stories
from jaxrl_tok import Task, rewards, train
from jaxrl_tok.policy import evaluate
from jaxrl_tok.rewards.text import ngrams, words_of
from jaxrl_tok.step.device_rewards import ends
from jaxrl_tok.step.reference import make_reference_logp

pytestmark = pytest.mark.usefixtures('one_device')

TEMPLATE = '{{ messages[0].content[-8:] }}'  # few tokens for a tiny model
WORDS = st.lists(st.sampled_from(['ab', 'c', 'd', "it's"]), max_size=9)


# --- prompts


def test_held_out_prompts_share_nothing_with_training():
  task = stories.stories()
  train, held_out = (
    [r['prompt'][0]['content'] for r in records]
    for records in (task.train, task.held_out)
  )
  assert (len(set(train)), len(set(held_out))) == (4096, 64)
  for words in (stories.WHO, stories.WHAT, stories.WHERE):
    assert len(set(words)) == len(words) == 20
    for part in words[stories.TRAINED :]:
      assert not any(f' {part}' in p.replace('.', ' ') for p in train)
    for part in words[: stories.TRAINED]:
      assert not any(f'{part} ' in p.replace('.', ' ') for p in held_out)
  assert (
    'Write a story about a baker who lost a key in a harbour town. Use simple '
    'words and only two sentences.'
  ) in train
  assert stories.stories().held_out == task.held_out


# --- rewards


def test_sentiment_needs_no_network(monkeypatch):
  def refuse(*args, **kwargs):
    raise OSError('no network')

  monkeypatch.setattr(socket, 'socket', refuse)
  monkeypatch.setattr(socket, 'create_connection', refuse)
  texts = ['A happy king smiled.', 'A king sat.', 'A sad king wept alone.']
  messages = [[{'role': 'assistant', 'content': t}] for t in texts]
  score = rewards.sentiment()
  happy, plain, sad = score(prompts=texts, completions=texts)
  assert 1 > happy > plain == 0 > sad > -1
  assert score(prompts=texts, completions=messages) == [happy, plain, sad]


def test_a_missing_package_is_one_line(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'vaderSentiment.vaderSentiment', None)
  with pytest.raises(SystemExit) as stopped:
    stories.run([f'--model={GOLDEN / "llama"}'])
  assert stopped.value.code == 2
  assert capsys.readouterr().err == (
    "error: vaderSentiment is not installed; run pip install -e '.[rewards]'\n"
  )


@given(WORDS)
def test_no_repetition_is_a_share_of_pairs(words):
  def share(words):
    return rewards.no_repetition([' '.join(words)])[0]

  assert 0 <= share(words) <= 1
  assert share([w.upper() + ',' for w in words]) == share(words)
  pairs = list(itertools.pairwise(words))
  if len(set(words)) == len(words) > 0:
    assert share(words) == 1
  if len(words) > 1:
    # said twice, no pair but the one in the middle is new
    twice = words * 2
    assert share(twice) <= (len(set(pairs)) + 1) / (2 * len(pairs) + 1)


def test_repetition_by_hand():
  found = rewards.no_repetition(['so happy and so happy', '', 'oh', 'a a a a'])
  assert found == [0.75, 0, 1, 1 / 3]
  assert words_of("It's 3 o’clock, señor_x!") == [
    *("it's", '3', 'o’clock', 'señor', 'x')
  ]
  assert ngrams([1, 2, 3], 2) == [(1, 2), (2, 3)]
  assert ngrams([1], 2) == []


@pytest.mark.parametrize(('least', 'want'), [(0, [1, 0, 1]), (3, [0, 0, 1])])
def test_an_end_counts_after_some_tokens(least, want):
  mask = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1]], bool)
  rollout = make_rollout(
    random_prompts(C=3), np.zeros((3, 3), np.int32), mask, -1.0 * mask
  )
  rollout = rollout._replace(ended=jnp.array([True, False, True]))
  assert ends(rollout, min_tokens=least).tolist() == want


# --- audit


def test_distinct_falls_where_stories_are_alike():
  found = rewards.distinct(['a b c', 'a b d'])
  assert found == {'distinct_1': 4 / 6, 'distinct_2': 3 / 4, 'distinct_3': 1}
  assert set(rewards.distinct(['a b c'] * 4).values()) == {1 / 4}
  assert set(rewards.distinct(['', '']).values()) == {0}


@given(st.integers(2, 50_000), st.lists(st.integers(1, 5), min_size=1))
def test_perplexity_of_a_uniform_policy_is_its_vocabulary(V, lengths):
  logps = [[-math.log(V)] * n for n in lengths]
  assert rewards.perplexity(logps) == pytest.approx(V)


def test_log_probs_are_of_the_reference(tiny):
  """Neither of the policy that sampled nor of kept tokens alone."""
  other = jax.tree.map(lambda x: x * 1.5, tiny.params)
  rollout = tiny.rollout._replace(num_kept=jnp.ones_like(tiny.rollout.tokens))
  measure = jax.jit(make_reference_logp(tiny.policy, None))
  found = measure((other, None), rollout, tiny.rule)
  plain = rollout._replace(num_kept=None)
  want = jax.jit(lambda p: evaluate(tiny.policy, p, plain, tiny.rule))(other)
  np.testing.assert_allclose(found, want.logp, rtol=1e-5, atol=1e-6)
  assert float(jnp.abs(found - tiny.rollout.logp).max()) > 0.1


def test_a_metric_of_no_reference_is_refused():
  task = Task(
    [{'prompt': f'{i}'} for i in range(20)],
    rewards.no_repetition,
    metrics=(rewards.perplexity,),
  )
  with pytest.raises(ValueError, match='perplexity reads log-probs') as e:
    train(task, log_kl=False)
  assert '\n' not in str(e.value)


# --- a run


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
  """Tiny run of random weights, which change by nothing: (Result, page)."""
  place = tmp_path_factory.mktemp('stories')
  model = shutil.copytree(GOLDEN / 'qwen2', place / 'model')
  (model / 'chat_template.jinja').write_text(TEMPLATE)
  words = (
    f'--model {model} --lora_rank 2 --learning_rate 1e-20 --max_steps 2 '
    '--eval_every 1 --held_out 6 --num_prompts 8 --num_generations 2 '
    '--max_completion_length 8 --min_tokens 2 --ends 0.25 '
    '--report_to none '
    f'--output_dir {place / "run"}'
  )
  result = stories.run(words.split())
  return result, (place / 'run' / 'report.html').read_text()


def test_the_audit_is_beside_the_reward(ran):
  result, page = ran
  rows = [row for row in result.metrics if row['phase'] == 'eval']
  assert [row['step'] for row in rows] == [0, 1, 2]
  for row in rows:
    parts = [f'eval/rewards/{n}/mean' for n in ('sentiment', 'no_repetition')]
    total = sum(row[name] for name in parts)
    total += 0.25 * row['eval/rewards/ends/mean']
    assert row['eval/reward'] == pytest.approx(total, abs=1e-5)
    for name in ('distinct_1', 'distinct_2', 'distinct_3'):
      assert 0 <= row[f'eval/{name}'] <= 1
    assert row['eval/perplexity'] > 1
    assert {'eval/mean_length', 'eval/clipped_ratio'} <= row.keys()
  # sampled with a key of its step, from weights that are those of the start
  assert len({row['eval/perplexity'] for row in rows}) == 3
  steps = [row for row in result.metrics if row['phase'] == 'train']
  assert all('kl' in row for row in steps)
  for heading in ('perplexity', 'distinct 2', 'mean length', 'sentiment'):
    assert f'<figcaption>{heading}<span>' in page
  assert page.count('before and after') == 1


def test_a_result_is_audited_by_the_same_numbers(ran):
  """Evaluated anew at step 0, by other programs."""
  result, _ = ran
  (first,) = [r for r in result.metrics if r.get('step') == 0]
  task = stories.stories(ends=0.25, min_tokens=2)
  task = dataclasses.replace(task, held_out=task.held_out[:6])
  found = result.evaluate(task)
  for name in ('eval/perplexity', 'eval/distinct_2', 'eval/reward'):
    assert found[name] == pytest.approx(first[name], rel=1e-4)


def test_samples_show_each_reward(ran):
  result, _ = ran
  for split, count in (('before', 6), ('after', 6), ('train', 16)):
    rows = [row for row in result.samples if row['split'] == split]
    assert len(rows) == count
    for row in rows:
      assert row['components'].keys() == {'sentiment', 'no_repetition', 'ends'}
  assert json.dumps(result.samples[0]['prompt']).count('user') == 1


def test_help_names_the_weights(capsys):
  with pytest.raises(SystemExit) as stopped:
    stories.run(['--help'])
  assert stopped.value.code == 0
  said = capsys.readouterr().out
  for name in ('--sentiment', '--no_repetition', '--ends', '--min_tokens'):
    assert name in said
