"""Reward functions of other trainers give here what they give there."""

import asyncio

import numpy as np
import pytest

from jaxrl_tok.rewards import (
  check_functions,
  from_reasoning_gym,
  from_tunix,
  from_verifiers,
  from_verl,
  make_scorer,
  name_rewards,
)

MASK = np.ones((4, 2), bool)


def score(function, examples):
  """HostScores of completions 'c0', 'c1', 'c2', 'c3', of two prompts."""
  functions, _ = name_rewards(function)
  check_functions(functions, list(examples[0]))

  def decode(ids):
    return [f'c{i[0]}' for i in ids]

  tokens = np.array([[b, 0] for b in range(4)])
  return make_scorer(functions, decode, [9])(tokens, MASK, examples)


def outcomes(scores) -> dict:
  return {k: r.sum(1).tolist() for k, r in scores.rewards.items()}


def as_chat(examples):
  return [
    {**e, 'prompt': [{'role': 'user', 'content': e['prompt']}]}
    for e in examples
  ]


# --- verl


VERL = [
  {
    'prompt': 'p',
    'data_source': 'openai/gsm8k',
    'reward_model': {'style': 'rule', 'ground_truth': 'c1'},
    'extra_info': {'index': 7},
  },
  {
    'prompt': 'q',
    'data_source': 'math',
    'reward_model': {'style': 'rule', 'ground_truth': 'c2'},
    'extra_info': None,
  },
]


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
  assert extra_info['num_turns'] is None
  share = 1.0 if data_source == 'math' else 0.5
  return share * (solution_str == ground_truth) + extra_info.get('index', 0)


def test_verl_gets_its_four_arguments():
  want = {'compute_score': [7.0, 7.5, 1.0, 0.0]}
  assert outcomes(score(from_verl(compute_score), VERL)) == want
  assert outcomes(score(from_verl(compute_score), as_chat(VERL))) == want


def test_verl_may_return_dicts_and_wait():
  async def compute_score(data_source, solution_str, ground_truth, extra_info):
    await asyncio.sleep(0)
    if solution_str == 'c3':
      return 0.25
    right = solution_str == ground_truth
    return {'score': float(right), 'acc': right, 'pred': solution_str}

  scores = score(from_verl(compute_score), VERL)
  assert outcomes(scores) == {'compute_score': [0.0, 1.0, 1.0, 0.25]}
  assert scores.extra == {
    'acc': [False, True, True, None],
    'pred': ['c0', 'c1', 'c2', None],
  }


def test_verl_asks_for_its_columns():
  with pytest.raises(ValueError, match='compute_score asks for data_source'):
    score(from_verl(compute_score), [{'prompt': 'p', 'answer': 'a'}])


# --- Tunix and MaxText


def test_tunix_gets_its_mode_and_texts():
  seen = []

  def check_answer(prompts, completions, answer, mode, **kargs):
    seen.append((mode, prompts, sorted(kargs)))
    return np.array([c == a for c, a in zip(completions, answer)], float)

  data = [{'prompt': 'p', 'answer': 'c1'}, {'prompt': 'q', 'answer': 'c2'}]
  want = {'check_answer': [0.0, 1.0, 1.0, 0.0]}
  assert outcomes(score(from_tunix(check_answer), data)) == want
  chat = as_chat(data)
  assert outcomes(score(from_tunix(check_answer, mode='eval'), chat)) == want
  assert [mode for mode, *_ in seen] == ['train', 'eval']
  assert seen[0][1] == ['p', 'p', 'q', 'q']


def test_maxtext_gets_its_config():
  def match_format(prompts, completions, tmvp_config, **kargs):
    return [float(c.startswith(tmvp_config['start'])) for c in completions]

  def plain(completions):
    return [1.0] * len(completions)

  data = [{'prompt': 'p'}, {'prompt': 'q'}]
  adapted = from_tunix(match_format, tmvp_config={'start': 'c'})
  assert outcomes(score(adapted, data)) == {'match_format': [1.0] * 4}
  assert outcomes(score(from_tunix(plain), data)) == {'plain': [1.0] * 4}
  with pytest.raises(ValueError, match='match_format asks for tmvp_config'):
    score(from_tunix(match_format), data)


# --- reasoning-gym


def test_reasoning_gym_scores_by_its_entry():
  def score_answer(answer, entry):
    return 1.0 if answer == entry['answer'] else entry['metadata']['share']

  entries = [
    {'question': 'p', 'answer': 'c1', 'metadata': {'share': 0.25}},
    {'question': 'q', 'answer': 'c2', 'metadata': {'share': 0.5}},
  ]
  data = [{'prompt': e['question'], 'entry': e} for e in entries]
  want = {'score_answer': [0.25, 1.0, 1.0, 0.5]}
  assert outcomes(score(from_reasoning_gym(score_answer), data)) == want
  renamed = [{'prompt': 'p', 'problem': e} for e in entries]
  by_column = from_reasoning_gym(score_answer, column='problem')
  assert outcomes(score(by_column, renamed)) == want
  with pytest.raises(ValueError, match='score_answer asks for entry'):
    score(from_reasoning_gym(score_answer), renamed)


def test_reasoning_gym_itself():
  reasoning_gym = pytest.importorskip('reasoning_gym')
  dataset = reasoning_gym.create_dataset('chain_sum', size=2, seed=1)
  data = [{'prompt': e['question'], 'entry': e} for e in dataset]
  reward = from_reasoning_gym(dataset.score_answer)
  found = reward(
    completions=[dataset[0]['answer'], 'no number'],
    entry=[d['entry'] for d in data],
  )
  assert found == [1.0, dataset.score_answer('no number', dataset[1])]
  assert found[1] < 1


# --- verifiers


VERIFIERS = [
  {'prompt': 'p', 'answer': 'c1', 'info': {'share': 0.5}},
  {'prompt': 'q', 'answer': 'c2', 'info': {'share': 0.25}},
]


def test_a_rubric_function_gets_its_arguments_by_name():
  def correct(completion, answer, info, **kwargs):
    assert kwargs['task'] == 'default'
    assert kwargs['state']['turn'] == 1
    assert kwargs['state']['answer'] == answer
    return 1.0 if completion == answer else info['share']

  scores = score(from_verifiers(correct), VERIFIERS)
  assert outcomes(scores) == {'correct': [0.5, 1.0, 1.0, 0.25]}


def test_a_rubric_function_may_read_messages_and_a_parser():
  async def parsed(prompt, completion, parser, task):
    await asyncio.sleep(0)
    assert task == 'default'
    return parser(completion[-1]['content']) + len(prompt)

  reward = from_verifiers(parsed, parser=lambda text: int(text[1:]))
  scores = score(reward, as_chat([{'prompt': 'p'}, {'prompt': 'q'}]))
  assert outcomes(scores) == {'parsed': [1.0, 2.0, 3.0, 4.0]}
  with pytest.raises(ValueError, match='parsed asks for parser'):
    score(from_verifiers(parsed), VERIFIERS)


def test_a_rubric_function_without_columns_gets_empty_ones():
  def empty(answer, info, state):
    return float((answer, info, state['task']) == ('', {}, 'default'))

  scores = score(from_verifiers(empty), [{'prompt': 'p'}, {'prompt': 'q'}])
  assert outcomes(scores) == {'empty': [1.0] * 4}
