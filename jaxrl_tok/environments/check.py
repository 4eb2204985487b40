"""Checks of what an environment returns, one line each."""

import math
import numbers
from typing import Any

from jaxrl_tok.data.chat import check_message
from jaxrl_tok.rewards.functions import shorten

RESET = 'observation, info'
STEP = 'observation, reward, terminated, truncated, info'


def check_reset(found, where: str) -> tuple:
  """(observation, info) of a reset. Raises ValueError."""
  observation, info = as_tuple(found, RESET, f'reset of {where}')
  return as_observation(observation, where), as_info(info, where)


def check_step(found, where: str) -> tuple:
  """(observation, reward, terminated, truncated, info) of a step. Raises
  ValueError."""
  found = as_tuple(found, STEP, f'step of {where}')
  observation, reward, terminated, truncated, info = found
  return (
    as_observation(observation, where),
    as_reward(reward, where),
    as_flag(terminated, 'terminated', where),
    as_flag(truncated, 'truncated', where),
    as_info(info, where),
  )


def as_tuple(found, names: str, where: str) -> tuple:
  count = names.count(',') + 1
  if not isinstance(found, tuple | list):
    raise ValueError(
      f'{where} returned {shorten(repr(found))}; return {count} values: {names}'
    )
  if len(found) != count:
    raise ValueError(
      f'{where} returned {len(found)} values; return {count}: {names}'
    )
  return tuple(found)


def as_observation(observation, where: str):
  if isinstance(observation, str):
    return observation
  if not isinstance(observation, list):
    raise ValueError(
      f'the observation of {where} is {shorten(repr(observation))}; return '
      'text, or a list of messages'
    )
  for message in observation:
    check_message(message, f'the observation of {where}')
  return observation


def as_reward(reward, where: str) -> float:
  value: Any = reward
  if hasattr(value, 'item') and getattr(value, 'size', 1) == 1:
    value = value.item()  # of numpy and jax
  number = isinstance(value, numbers.Real)
  if not number or not math.isfinite(value):
    raise ValueError(
      f'the reward of {where} is {shorten(repr(reward))}; return a finite '
      'number, 0 where there is none'
    )
  return float(value)


def as_flag(flag, name: str, where: str) -> bool:
  value = flag.item() if hasattr(flag, 'item') else flag
  if not isinstance(value, bool | int) or value not in (0, 1):
    raise ValueError(
      f'{name} of {where} is {shorten(repr(flag))}; return True or False'
    )
  return bool(value)


def as_info(info, where: str) -> dict:
  if not isinstance(info, dict):
    raise ValueError(
      f'info of {where} is {shorten(repr(info))}; return a dict, {{}} where '
      'there is nothing to tell'
    )
  seats = info.get('rewards')
  if seats is None:
    return info
  if not isinstance(seats, dict):
    raise ValueError(
      f"info['rewards'] of {where} is {shorten(repr(seats))}; return "
      '{seat: number}'
    )
  rewards = {
    seat: as_reward(reward, f'seat {seat} of {where}')
    for seat, reward in seats.items()
  }
  return info | {'rewards': rewards}
