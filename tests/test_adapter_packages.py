"""Adapters with the packages themselves, by hand, where they are installed:

pip install gymnasium textarena reasoning-gym stable-baselines3 openenv-core
pytest -m slow tests/test_adapter_packages.py
"""

import functools
import threading
import warnings

import pytest
from test_adapters import tokens_of

from jaxrl_tok import environments
from jaxrl_tok.environments import Stepper
from jaxrl_tok.environments.play import play

pytestmark = pytest.mark.slow


def test_stable_baselines_takes_our_tokens():
  """check_env warns of nothing, and PPO's steps change its policy."""
  checker = pytest.importorskip('stable_baselines3.common.env_checker')
  import torch
  from stable_baselines3 import PPO

  torch.set_num_threads(1)
  _, env = tokens_of(2)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    checker.check_env(env)
  model = PPO('MultiInputPolicy', env, n_steps=64, batch_size=32, seed=0)
  before = [p.detach().clone() for p in model.policy.parameters()]
  model.learn(128)
  assert model.num_timesteps == 128
  pairs = zip(model.policy.parameters(), before)
  changed = sum(not bool((p == q).all()) for p, q in pairs)
  assert changed
  print(f'PPO of stable-baselines3: 128 tokens, {changed} arrays changed')


def test_a_game_of_textarena_is_played():
  """Guess the number by halving; equal seeds are equal games."""
  pytest.importorskip('textarena')

  def halve(example, seen, said):
    low, high = 1, 20
    for action, text in zip(said, seen[1:]):
      guess = int(action.strip('[]'))
      low, high = (guess + 1, high) if 'higher' in text else (low, guess - 1)
    return f'[{(low + high) // 2}]'

  make = environments.from_textarena('GuessTheNumber-v0')
  first, second = (play(make, halve, [{}] * 8, seed=3) for _ in range(2))
  assert [p.actions for p in first] == [p.actions for p in second]
  assert all(p.total == 1 and p.ended == 'terminated' for p in first)
  with Stepper(make) as stepper:  # side by side
    turns = stepper.reset(list(range(3, 11)), [{}] * 8)
    assert all('Guess The Number' in t.observation for t in turns)
    said = {i: [] for i in range(8)}
    seen = {i: [t.observation] for i, t in enumerate(turns)}
    live = set(range(8))
    while live:
      actions = {i: halve({}, seen[i], said[i]) for i in sorted(live)}
      for i, turn in stepper.step(actions).items():
        said[i].append(actions[i])
        seen[i].append(turn.observation)
        live -= {i} if turn.ended else set()
  assert [said[i] for i in range(8)] == [p.actions for p in first]
  print('TextArena: guesses', [len(p.actions) for p in first])


def test_two_seats_of_textarena():
  pytest.importorskip('textarena')
  make = environments.from_textarena('TicTacToe-v0', num_players=2)
  moves = ['[0]', '[3]', '[1]', '[4]', '[2]']
  (played,) = play(make, lambda e, seen, said: moves[len(said)], [{}])
  assert played.info['rewards'] == {0: 1.0, 1: -1.0}
  assert [i.get('seat') for i in played.infos] == [0, 1, 0, 1, 0, None]
  print('TextArena: TicTacToe, rewards by seat', played.info['rewards'])


def test_a_data_set_of_reasoning_gym():
  reasoning_gym = pytest.importorskip('reasoning_gym')
  data = reasoning_gym.create_dataset('basic_arithmetic', size=5, seed=1)
  played = play(
    environments.from_reasoning_gym(data),
    lambda example, seen, said: example['entry']['answer'],
    environments.reasoning_gym_examples(data),
  )
  assert [p.rewards for p in played] == [[1.0]] * 5
  print('reasoning-gym:', played[0].example['prompt'], played[0].actions)


def test_a_server_of_openenv():
  """A server of openenv-core in this process, and its client."""
  core = pytest.importorskip('openenv.core')
  import uvicorn
  from openenv.core.env_server.http_server import create_app
  from openenv.core.env_server.interfaces import Environment
  from openenv.core.env_server.types import Action, Observation, State

  class Said(Action):
    message: str

  class Heard(Observation):
    text: str = ''

  class Echoes(Environment):
    def __init__(self):
      super().__init__()
      self.count = 0

    def reset(self, seed=None, **kwargs):
      self.count = 0
      return Heard(text=f'seed {seed}', done=False, reward=None)

    def step(self, action, **kwargs):
      self.count += 1
      done = self.count == 2
      return Heard(text=action.message, done=done, reward=float(done))

    @property
    def state(self):
      return State(step_count=self.count)

  app = create_app(Echoes, Said, Heard)
  server = uvicorn.Server(uvicorn.Config(app, port=8765, log_level='error'))
  threading.Thread(target=server.run, daemon=True).start()
  while not server.started:
    pass
  client = functools.partial(
    core.GenericEnvClient, base_url='http://localhost:8765'
  )
  make = environments.from_openenv(
    client, lambda text: {'message': text}, lambda seen: seen['text']
  )
  (played,) = play(make, lambda *_: 'hello', [{}], seed=4)
  assert played.observations == ['seed 4', 'hello', 'hello']
  assert played.rewards == [0.0, 1.0]
  server.should_exit = True
  print('OpenEnv:', played.observations)
