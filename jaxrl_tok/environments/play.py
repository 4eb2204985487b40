"""Play: episodes of scripted players, their scores and their transcripts.

A player is a function of what has been seen:

  player(example, observations, actions) -> action

`observations` are that of reset and those after each of `actions`; a player
reads of the example what a policy reads, its prompt.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from jaxrl_tok.environments.check import check_reset, check_step
from jaxrl_tok.environments.protocol import Maker, close, name_of

Player = Callable[[dict, list, list], str]


class Played(NamedTuple):
  """Episode that was played."""

  example: dict
  observations: list  # that of reset, and one after each action
  actions: list
  rewards: list  # one for each action
  ended: str  # 'terminated', 'truncated', or '' where it was left
  info: dict  # the last one
  infos: list = []  # noqa: RUF012  that of reset, and one after each action

  @property
  def total(self) -> float:
    """Sum of the rewards."""
    return sum(self.rewards)


def play(
  make: Maker,
  player: Player,
  examples: Iterable[dict],
  seed: int = 0,
  max_turns: int = 1000,
) -> list[Played]:
  """Episodes of a player, one for each example, with seeds from `seed` on."""
  found = []
  for i, example in enumerate(examples):
    environment = make()
    try:
      found.append(play_one(environment, player, example, seed + i, max_turns))
    finally:
      close(environment)
  return found


def play_one(
  environment, player: Player, example: dict, seed: int, max_turns: int
) -> Played:
  """Episode of a player."""
  where = f'environment {name_of(environment)}'
  observation, info = check_reset(environment.reset(seed, example), where)
  seen, said, rewards, ended = [observation], [], [], ''
  infos = [info]
  while not ended and len(said) < max_turns:
    action = player(example, list(seen), list(said))
    found = check_step(environment.step(action), where)
    observation, reward, terminated, truncated, info = found
    said.append(action)
    seen.append(observation)
    rewards.append(reward)
    infos.append(info)
    ended = 'terminated' if terminated else 'truncated' if truncated else ''
  return Played(example, seen, said, rewards, ended, info, infos)


def random_player(actions: Sequence[str], seed: int = 0) -> Player:
  """Player that takes any of some actions; a walk of its own in each
  episode."""
  rng = random.Random(seed)

  def player(example, observations, said) -> str:
    return rng.choice(actions)

  return player


def noisy(player: Player, actions: Sequence[str], share: float, seed: int = 0):
  """Player that takes any action in a share of its turns."""
  if not 0 <= share <= 1:
    raise ValueError(f'a noise of {share:g}; it is a share in [0, 1] of turns')
  rng = random.Random(seed)

  def mixed(example, observations, said) -> str:
    if rng.random() < share:
      return rng.choice(actions)
    return player(example, observations, said)

  return mixed


def demonstration(played: Played) -> list[dict]:
  """Turns of an episode for Task.answers, as samples.jsonl has them:
  [{'observation': ...}, {'action': ..., 'observation': ...}, ...]."""
  first, *seen = played.observations
  turns = zip(played.actions, seen)
  return [
    {'observation': first},
    *({'action': a, 'observation': o} for a, o in turns),
  ]


SHOWN = 'shown'  # column of the demonstrations


def demonstrations(
  examples: Sequence[dict], make: Maker, player: Player, times: int
) -> list[dict]:
  """Records of each example `times` times, each with an episode of the player
  under SHOWN, for Task.answers: a warm start imitates them."""
  if times < 0:
    raise ValueError(f'{times} demonstrations of each example; 0 or more')
  return [
    played.example | {SHOWN: demonstration(played), 'episode': f'shown {i}'}
    for i, played in enumerate(play(make, player, list(examples) * times))
  ]
