"""Environments that were written for others, a line each:

  from_gymnasium('MyText-v0')                     Text spaces, or act= describe=
  from_textarena('GuessTheNumber-v0')             one player, or seats
  from_openenv(lambda: EchoEnv(url), act)         a client of OpenEnv
  from_trl(MyEnv)                                 TRL's environment_factory
  from_lmrl(lambda: setup_maze_env(...))          LMRL-Gym's histories of text
  from_reasoning_gym(dataset)                     one turn, scored

Each gives a maker. No package is imported before it is used, and none is a
dependency of ours. What reset observes is read after the prompt of the example.
"""

import contextlib
import functools
import importlib
import inspect
import random
import threading
from collections.abc import Callable, Iterable
from typing import Any

from jaxrl_tok.environments.protocol import Maker
from jaxrl_tok.environments.tool_calls import check_format, parse_calls
from jaxrl_tok.environments.tools import (
  answer,
  as_observation,
  by_name,
  result,
  tool_schema,
)
from jaxrl_tok.rewards.functions import get_name, shorten


def need(module: str, package: str):
  """Module of an optional package. Raises ValueError where it is missing."""
  try:
    return importlib.import_module(module)
  except ImportError:
    raise ValueError(
      f'{module} is not installed; run pip install {package}'
    ) from None


# --- Gymnasium ---------------------------------------------------------------


class GymnasiumText:
  """Episode of a gymnasium.Env."""

  def __init__(self, make: Callable, act: Callable, describe: Callable):
    self.env, self.act, self.describe = make(), act, describe
    self.name = type(getattr(self.env, 'unwrapped', self.env)).__name__
    for given, space, argument, form in (
      (act, 'action_space', 'act', 'text -> action'),
      (describe, 'observation_space', 'describe', 'observation -> text'),
    ):
      kind = type(getattr(self.env, space)).__name__
      if given is None and kind != 'Text':
        raise ValueError(
          f'the {space} of {self.name} is {kind}, not Text; pass '
          f'from_gymnasium({argument}=...), a function {form}'
        )

  def reset(self, seed: int, example: dict) -> tuple:
    options = example.get('options')
    observation, info = self.env.reset(seed=seed, options=options)
    return self.text(observation), info

  def step(self, action: str) -> tuple:
    chosen = action if self.act is None else self.act(action)
    observation, reward, terminated, truncated, info = self.env.step(chosen)
    return self.text(observation), reward, terminated, truncated, info

  def text(self, observation) -> Any:
    return observation if self.describe is None else self.describe(observation)

  def close(self) -> None:
    self.env.close()


def from_gymnasium(
  make: str | Callable,
  act: Callable | None = None,
  describe: Callable | None = None,
  **settings,
) -> Maker:
  """Maker of episodes of a gymnasium.Env.

  Args:
    make: its id, or a function that makes one.
    act: text -> action; None: the text, for a Text space.
    describe: observation -> text; None: itself, from a Text space.
    settings: of gymnasium.make.

  A record's column `options` is given to reset.
  """
  if isinstance(make, str):
    gymnasium = need('gymnasium', 'gymnasium')
    make = functools.partial(gymnasium.make, make, **settings)
  return functools.partial(GymnasiumText, make, act, describe)


# --- TextArena ---------------------------------------------------------------

# TextArena draws from the modules random and numpy.random, which all threads
# share: one call at a time, between the states of its own episode
SHARED_RANDOM = threading.Lock()


class RandomState:
  """State of the process's generators, of one episode."""

  def __init__(self, seed: int):
    self.state, self.seed = None, seed

  @contextlib.contextmanager
  def own(self):
    """Draws from this state; that of the process is as it was, afterwards."""
    import numpy as np

    with SHARED_RANDOM:
      before = random.getstate(), np.random.get_state()
      if self.state is None:
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)
      else:
        random.setstate(self.state[0])
        np.random.set_state(self.state[1])
      try:
        yield
      finally:
        self.state = random.getstate(), np.random.get_state()
        random.setstate(before[0])
        np.random.set_state(before[1])


class TextArena:
  """Episode of TextArena."""

  def __init__(self, make: Callable, num_players: int):
    self.make, self.num_players = make, num_players

  def reset(self, seed: int, example: dict) -> tuple:
    self.random, self.seen = RandomState(seed), ''
    with self.random.own():
      self.env = self.make()
      self.name = type(getattr(self.env, 'env', self.env)).__name__
      self.env.reset(num_players=self.num_players, seed=seed)
      seat, observation = self.env.get_observation()
    self.seat = seat
    return self.text(observation), self.seats(seat)

  def step(self, action: str) -> tuple:
    seat = self.seat
    with self.random.own():
      done, info = self.env.step(action)
      if done:
        rewards, more = self.env.close()
      else:
        self.seat, observation = self.env.get_observation()
    if not done:
      return self.text(observation), 0.0, False, False, self.seats(self.seat)
    paid = {int(k): float(v) for k, v in (rewards or {}).items()}
    reward = paid.get(seat, 0.0)
    told = {'success': reward >= 1, 'game': more or info}
    if self.num_players > 1:
      told['rewards'] = paid
    return '', reward, True, False, told

  def seats(self, seat: int) -> dict:
    return {'seat': seat} if self.num_players > 1 else {}

  def text(self, observation) -> str:
    """New text of an observation: messages of others, or what was added to a
    history."""
    if isinstance(observation, str):
      new = observation.removeprefix(self.seen)
      self.seen = observation
      return new
    return ''.join(
      f'{message}\n' for sender, message, *_ in observation if sender < 0
    )


def from_textarena(
  make: str | Callable, num_players: int = 1, **settings
) -> Maker:
  """Maker of episodes of a game of TextArena.

  Args:
    make: its id, such as 'GuessTheNumber-v0', of which the form without
      wrappers is played ('-raw'), so that a turn observes what is new; or a
      function that makes one.
    num_players: seats, all played by the policy, in one transcript: what
      TextArena tells one player alone is read by all. Rewards come by seat.
    settings: of textarena.make.

  Its games draw from the generators of the process, so that its calls run one
  at a time; a call that hangs stops the others of its process, too: pass
  processes=True to the Stepper where one may.
  """
  if isinstance(make, str):
    textarena = need('textarena', 'textarena')
    name = make if make.endswith(('-raw', '-train')) else f'{make}-raw'
    make = functools.partial(textarena.make, name, **settings)
  return functools.partial(TextArena, make, num_players)


# --- OpenEnv -----------------------------------------------------------------


class OpenEnv:
  """Episode of a client of OpenEnv."""

  def __init__(self, make: Callable, act: Callable, describe: Callable):
    client = make()
    self.name = type(client).__name__
    self.client = client.sync() if hasattr(client, 'sync') else client
    self.act, self.describe = act, describe

  def reset(self, seed: int, example: dict) -> tuple:
    if hasattr(self.client, 'connect'):
      self.client.connect()
    found = self.client.reset(seed=seed, **example.get('options', {}))
    return self.describe(found.observation), {}

  def step(self, action: str) -> tuple:
    found = self.client.step(self.act(action))
    reward = 0.0 if found.reward is None else found.reward
    return self.describe(found.observation), reward, found.done, False, {}

  def close(self) -> None:
    self.client.close()


def from_openenv(
  make: Callable, act: Callable, describe: Callable = str
) -> Maker:
  """Maker of episodes of a client of OpenEnv, over its synchronous side.

  Args:
    make: makes a client, such as lambda: EchoEnv(base_url='http://...').
    act: text -> its action, such as lambda text: EchoAction(message=text).
    describe: its observation -> text.

  A record's column `options`, a dict, is given to reset, beside the seed. A
  step without a reward pays 0.
  """
  if isinstance(make, str):
    raise ValueError(
      f'from_openenv({make!r}) needs a client; pass a function that makes one, '
      'such as lambda: EchoEnv(base_url=...)'
    )
  return functools.partial(OpenEnv, make, act, describe)


# --- TRL ---------------------------------------------------------------------

OF_TRL = 'reset', 'get_reward'


def trl_methods(environment) -> list[Callable]:
  """Public methods of an environment of TRL, which are its tools."""
  return [
    getattr(environment, name)
    for name, _ in inspect.getmembers(type(environment), inspect.isfunction)
    if name not in OF_TRL and not name.startswith('_')
  ]


def trl_tools(factory: Callable) -> list[Callable]:
  """Tools of an environment_factory, for with_tools."""
  return trl_methods(factory())


class TRL:
  """Episode of a class of TRL."""

  def __init__(self, factory: Callable, schemas: dict, form: str):
    self.environment = factory()
    self.name, self.schemas, self.form = get_name(factory), schemas, form

  def reset(self, seed: int, example: dict) -> tuple:
    self.chat = not isinstance(example['prompt'], str)
    self.functions = by_name(trl_methods(self.environment))
    observation = self.environment.reset(**example)
    if isinstance(observation, list):  # parts of a message
      observation = ''.join(part.get('text', '') for part in observation)
    return observation or '', {}

  def step(self, action: str) -> tuple:
    calls = parse_calls(action, self.form)
    if not calls:
      get_reward = getattr(self.environment, 'get_reward', None)
      reward = 0.0 if get_reward is None else result(get_reward, {})
      return '', reward, True, False, {}
    said = [(c.name, answer(c, self.functions, self.schemas)) for c in calls]
    return as_observation(said, self.chat), 0.0, False, False, {}


def from_trl(factory: Callable, form: str = 'hermes') -> Maker:
  """Maker of episodes of a class for TRL's environment_factory (1.16).

  Its public methods are tools, its get_reward, plain or async, is the reward of
  the turn that calls none, which ends the episode; an episode that is cut off
  by a limit is paid nothing. reset gets the record's columns by name; what it
  returns is a message of the user after the prompt (in TRL a part of the last
  one).

  Args:
    factory: the class.
    form: format of calls, see tools.

  with_tools(records, trl_tools(factory)) writes its tools into the prompts.
  """
  check_format(form)
  if not callable(factory):
    raise ValueError(
      f'{shorten(repr(factory))} is no class for an environment_factory; pass '
      'the class itself'
    )
  environment = factory()
  if not callable(getattr(environment, 'reset', None)):
    raise ValueError(
      f'{get_name(factory)} has no reset; TRL needs one, (self, **columns)'
    )
  schemas = {
    name: tool_schema(f)
    for name, f in by_name(trl_methods(environment)).items()
  }
  return functools.partial(TRL, factory, schemas, form)


# --- LMRL-Gym ----------------------------------------------------------------


class LMRL:
  """Episode of a TextEnv of LMRL-Gym."""

  def __init__(self, make: Callable, end: str):
    self.env, self.end = make(), end
    self.name = type(self.env).__name__

  def reset(self, seed: int, example: dict) -> tuple:
    options = example.get('options')
    self.history = tuple(self.env.reset(seed=seed, options=options))
    return self.latest(), {}

  def step(self, action: str) -> tuple:
    text = type(self.history[-1])  # its own class: Text(text, is_action)
    said = text(action.removesuffix(self.end) + self.end, True)
    found = self.env.step((*self.history, said))
    self.history, reward, done = tuple(found[0]), found[1], found[2]
    return self.latest(), reward, done, False, {}

  def latest(self) -> str:
    """Text after the last action of the history."""
    texts = []
    for part in reversed(self.history):
      if part.is_action:
        break
      texts.append(part.text)
    return ''.join(reversed(texts))

  def close(self) -> None:
    self.env.close()


def from_lmrl(make: Callable, end: str = '\n') -> Maker:
  """Maker of episodes of a TextEnv of LMRL-Gym: history in, history out.

  Args:
    make: makes one.
    end: text at the end of every action, as its environments expect it.

  A record's column `options` is given to reset.
  """
  return functools.partial(LMRL, make, end)


# --- reasoning-gym -----------------------------------------------------------


class ReasoningGym:
  """Question of reasoning-gym: an episode of one turn."""

  name = 'reasoning_gym'

  def __init__(self, score_answer: Callable):
    self.score_answer = score_answer

  def reset(self, seed: int, example: dict) -> tuple:
    self.entry = example['entry']
    return '', {}

  def step(self, action: str) -> tuple:
    reward = float(self.score_answer(answer=action.strip(), entry=self.entry))
    return '', reward, True, False, {'success': reward >= 1}


def from_reasoning_gym(dataset) -> Maker:
  """Maker of episodes of one turn, scored by a data set of reasoning-gym."""
  return functools.partial(ReasoningGym, dataset.score_answer)


def reasoning_gym_examples(dataset: Iterable[dict]) -> list[dict]:
  """Records {'prompt', 'entry'} of a data set of reasoning-gym."""
  return [{'prompt': e['question'], 'entry': e} for e in dataset]
