"""Adapters: environments of other libraries, in their own form.

Stand-ins here; test_adapter_packages.py asks the packages themselves.
"""

import asyncio
import random
import sys
from typing import NamedTuple

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from jaxrl_tok import environments
from jaxrl_tok.data import byte_tokenizer
from jaxrl_tok.environments import Stepper
from jaxrl_tok.environments.play import play


def one_line(e) -> str:
  assert '\n' not in str(e.value)
  return str(e.value)


# --- Gymnasium ---------------------------------------------------------------


class Echo(gymnasium.Env):
  """Says what it hears and a number; three words end it."""

  action_space = gymnasium.spaces.Text(100)
  observation_space = gymnasium.spaces.Text(100)

  def reset(self, *, seed=None, options=None):
    super().reset(seed=seed)
    self.words = (options or {}).get('words', 3)
    return f'say {self.np_random.integers(100)}', {}

  def step(self, action):
    self.words -= 1
    text = f'{action} {self.np_random.integers(100)}'
    return text, 1.0, self.words == 0, False, {}


class Numbers(gymnasium.Env):
  """Two actions, an array to see."""

  action_space = gymnasium.spaces.Discrete(2)
  observation_space = gymnasium.spaces.Box(0, 9, (2,))

  def reset(self, *, seed=None, options=None):
    super().reset(seed=seed)
    return np.zeros(2, np.float32), {}

  def step(self, action):
    found = np.full(2, action, np.float32)
    return found, np.float32(action), np.bool_(action == 1), False, {}


def test_a_gymnasium_environment_of_text():
  examples = [{'prompt': 'a'}] * 2 + [{'prompt': 'a', 'options': {'words': 1}}]
  with Stepper(environments.from_gymnasium(Echo)) as stepper:
    first = stepper.reset([3, 3, 4], examples)
    assert first[0].observation == first[1].observation != first[2].observation
    turns = stepper.step({0: 'hi', 1: 'hi', 2: 'hi'})
  assert turns[0].observation == turns[1].observation
  assert turns[0].observation.startswith('hi ')
  assert [t.ended for t in turns.values()] == ['', '', 'terminated']


def test_other_spaces_of_gymnasium_need_functions():
  with (
    pytest.raises(
      ValueError, match=r'action_space of Numbers is Discrete'
    ) as e,
    Stepper(environments.from_gymnasium(Numbers)) as stepper,
  ):
    stepper.reset([0], [{}])
  assert 'from_gymnasium(act=...)' in one_line(e)
  make = environments.from_gymnasium(
    Numbers, int, lambda found: ' '.join(map(str, found))
  )
  with Stepper(make) as stepper:
    assert stepper.reset([0], [{}])[0].observation == '0.0 0.0'
    turn = stepper.step({0: '1'})[0]
  assert (turn.observation, turn.reward, turn.ended) == (
    '1.0 1.0',
    1.0,
    'terminated',
  )


# --- TextArena ---------------------------------------------------------------


class Arena:
  """Two dice of the process's generators, as TextArena draws them."""

  def reset(self, num_players, seed=None):
    random.seed(seed)
    self.players, self.turns = num_players, 0

  def get_observation(self):
    said = (0, 'mine', 'action'), (-1, f'{random.random()}', 'message')
    return self.turns % self.players, said

  def step(self, action):
    random.random()
    self.turns += 1
    return self.turns == 3, {'reason': action}

  def close(self):
    return {0: 1, 1: -1}, {'turns': self.turns}


def roll(seeds, order):
  make = environments.from_textarena(Arena, num_players=2)
  with Stepper(make, workers=1) as stepper:
    found = [[t.observation] for t in stepper.reset(seeds, [{}] * len(seeds))]
    for row in order:
      found[row].append(stepper.step({row: 'a'})[row].observation)
  return found


def test_games_of_textarena_share_no_generator():
  """Episodes do not depend on those that are played between their turns, and
  leave the process's own generators as they were."""
  random.seed(5)
  np.random.seed(5)
  before = random.getstate(), np.random.get_state()[1].tolist()
  mixed = roll([1, 2], [0, 1, 1, 0])
  assert mixed == [roll([1], [0, 0])[0], roll([2], [0, 0])[0]]
  assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_seats_and_rewards_of_textarena():
  (played,) = play(
    environments.from_textarena(Arena, num_players=2),
    lambda example, seen, said: 'a',
    [{}],
  )
  assert [i.get('seat') for i in played.infos] == [0, 1, 0, None]
  assert played.rewards == [0, 0, 1.0]
  assert played.info['rewards'] == {0: 1.0, 1: -1.0}
  assert played.info['success'] is True


def test_a_history_of_textarena_is_read_once():
  episode = environments.from_textarena(Arena)()
  episode.seen = ''
  assert episode.text('a\n') == 'a\n'
  assert episode.text('a\nb\n') == 'b\n'


# --- OpenEnv, TRL, LMRL-Gym, reasoning-gym -----------------------------------


class Result(NamedTuple):
  """StepResult of OpenEnv."""

  observation: object
  reward: float | None
  done: bool


class Client:
  """Synchronous client of OpenEnv."""

  closed = 0

  def sync(self):
    return self

  def connect(self):
    self.steps = 0

  def reset(self, **kwargs):
    return Result({'text': f'seed {kwargs["seed"]}'}, None, False)

  def step(self, action):
    self.steps += 1
    done = self.steps == 2
    return Result({'text': action['message']}, 1.0 if done else None, done)

  def close(self):
    Client.closed += 1


def test_a_client_of_openenv():
  make = environments.from_openenv(
    Client, lambda text: {'message': text}, lambda seen: seen['text']
  )
  (played,) = play(make, lambda *_: 'hello', [{}], seed=4)
  assert played.observations == ['seed 4', 'hello', 'hello']
  assert played.rewards == [0.0, 1.0]
  with Stepper(make) as stepper:
    stepper.reset([0], [{}])
  assert Client.closed == 2
  with pytest.raises(ValueError, match='a function that makes one') as e:
    environments.from_openenv('http://localhost', str)
  one_line(e)


class Counter:
  """Class for TRL's environment_factory."""

  def reset(self, **columns) -> str:
    self.value = 0
    return f'Reach {columns["target"]}.'

  def increment(self, step: int) -> int:
    """Adds a step to the counter.

    Args:
      step: How much to add.
    """
    self.value += step
    return self.value

  def _hidden(self):
    raise AssertionError

  def get_reward(self) -> float:
    return self.value / 10


class Slow(Counter):
  """Counter whose reward is a coroutine."""

  async def get_reward(self) -> float:
    await asyncio.sleep(0)
    return 0.5


CALL = '<tool_call>{"name": "increment", "arguments": {"step": 4}}</tool_call>'


def test_a_class_of_trl_runs_unchanged():
  examples = [{'prompt': [{'role': 'user', 'content': 'Count.'}], 'target': 8}]
  says = (CALL, CALL, 'done')
  for factory, reward in ((Counter, 0.8), (Slow, 0.5)):
    (played,) = play(
      environments.from_trl(factory),
      lambda example, seen, said: says[len(said)],
      examples,
    )
    assert played.observations == [
      'Reach 8.',
      [{'role': 'tool', 'name': 'increment', 'content': '4'}],
      [{'role': 'tool', 'name': 'increment', 'content': '8'}],
      '',
    ]
    assert played.rewards == [0, 0, reward]
  tools = environments.trl_tools(Counter)
  assert [t.__name__ for t in tools] == ['increment']
  (record,) = environments.with_tools(examples, tools)
  assert list(record['tools'][0]['function']['parameters']['properties']) == [
    'step'
  ]
  with pytest.raises(ValueError, match='has no reset'):
    environments.from_trl(object)
  with pytest.raises(ValueError, match='is no class'):
    environments.from_trl('Counter')


class Text(NamedTuple):
  """Text of LMRL-Gym."""

  text: str
  is_action: bool


class History:
  """TextEnv of LMRL-Gym that keeps the last two parts of a history."""

  def reset(self, seed=None, options=None):
    return (Text(f'start {seed}\n', False),)

  def step(self, history):
    assert history[-1] == Text('move up\n', True)
    parts = (*history, Text('a\n', False), Text('b\n', False))
    return parts[-3:], -1.0, len(history) > 3

  def close(self):
    pass


def test_histories_of_lmrl_gym():
  (played,) = play(
    environments.from_lmrl(History), lambda *_: 'move up', [{}], seed=2
  )
  assert played.observations == ['start 2\n', 'a\nb\n', 'a\nb\n']
  assert played.rewards == [-1, -1]


class Questions(list):
  """Data set of reasoning-gym."""

  def score_answer(self, answer, entry):
    return 1.0 if answer == entry['answer'] else 0.01


def test_questions_of_reasoning_gym():
  data = Questions(
    {'question': f'{i} + 1 =', 'answer': str(i + 1)} for i in range(3)
  )
  make = environments.from_reasoning_gym(data)
  examples = environments.reasoning_gym_examples(data)
  assert examples[0]['prompt'] == '0 + 1 ='
  played = play(make, lambda e, seen, said: e['entry']['answer'], examples)
  assert [p.rewards for p in played] == [[1.0]] * 3
  (wrong,) = play(make, lambda *_: 'no', examples[:1])
  assert (wrong.total, wrong.info) == (0.01, {'success': False})


@pytest.mark.parametrize(
  ('call', 'package'),
  [
    (lambda: environments.from_gymnasium('A-v0'), 'gymnasium'),
    (lambda: environments.from_textarena('A-v0'), 'textarena'),
    (lambda: environments.token_env(None, [], len, 4), 'gymnasium'),
  ],
)
def test_a_missing_package_is_told_in_a_line(call, package, monkeypatch):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ValueError, match=f'pip install {package}') as e:
    call()
  one_line(e)


# --- our token environment ---------------------------------------------------


def ends_with_a(prompts, completions, **columns):
  return [float(text.endswith('a')) for text in completions]


def lengths(completion_ids, **columns):
  return [[0.5] * len(ids) for ids in completion_ids]


def tokens_of(length=3, rewards=ends_with_a):
  tokenizer = byte_tokenizer()
  records = [{'prompt': 'abc'}, {'prompt': 'z'}]
  return tokenizer, environments.token_env(tokenizer, records, rewards, length)


def test_our_token_environment_is_one_of_gymnasium(recwarn):
  _, env = tokens_of()
  check_env(env, skip_render_check=True)
  assert [str(w.message) for w in recwarn] == []


def test_a_completion_is_an_episode_of_tokens():
  tokenizer, env = tokens_of(4, {ends_with_a: 2.0, lengths: 1.0})
  a, b = tokenizer.encode('ab')
  seen, _ = env.reset(seed=0, options={'record': 1})
  assert seen['mask'].tolist() == [1, 0, 0, 0, 0, 0, 0]
  assert env.step(b)[1:4] == (0.0, False, False)
  seen, *rest, _ = env.step(a)
  assert rest == [0.0, False, False]
  assert seen['tokens'].tolist()[:3] == [*tokenizer.encode('z'), b, a]
  assert env.step(tokenizer.eos_token_id)[1:4] == (2.0 + 1.5, True, False)
  assert env.text() == 'ba'
  env.reset(options={'record': 0})
  for _ in range(4):
    found = env.step(b)
  assert found[1:4] == (2.0, False, True)
  tokenizer.eos_token = None
  with pytest.raises(ValueError, match='no end token'):
    environments.token_env(tokenizer, [{'prompt': 'a'}], ends_with_a, 4)
