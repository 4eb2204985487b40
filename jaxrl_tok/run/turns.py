"""Turns: settings of tasks with an environment, checked. Imports no jax."""

import dataclasses

from jaxrl_tok.run.settings import Settings, TurnSettings
from jaxrl_tok.run.task import Task


def check_turns(task: Task, settings: Settings) -> None:
  """Refuses settings of turns without an environment, and what cannot go with
  one. Raises ValueError, in one line."""
  if task.environment is None:
    defaults = TurnSettings()
    for field in dataclasses.fields(TurnSettings):
      name = field.name
      if getattr(settings.turns, name) != getattr(defaults, name):
        raise ValueError(
          f'--{name} has no effect: the task has no environment; leave it out, '
          'or give Task(environment=...)'
        )
    return
  if not callable(task.environment):
    raise ValueError(
      f'the environment is a {type(task.environment).__name__}; give a '
      'function that makes one, its class or environments.maze()'
    )
  run, algorithm = settings.run, settings.algorithm
  rules = (
    (
      run.steps_per_call,
      '--steps_per_call: an environment answers on the host; leave it out',
    ),
    (
      settings.sampling.ahead,
      '--ahead: turns are sampled by one policy, and the update changes it; '
      'leave it out',
    ),
    (
      algorithm.baseline == 'greedy' or algorithm.algorithm == 'remax',
      'a greedy baseline: it is of one completion, not of an episode; pass '
      '--baseline leave_one_out',
    ),
    (
      algorithm.overlong_buffer,
      '--overlong_buffer: it counts the tokens of one completion; pass 0',
    ),
    (
      algorithm.credit_split != 'potential',
      '--credit_split: it splits rewards of one completion; leave it out',
    ),
    (
      settings.model.reward_model,
      '--reward_model: it reads one completion; leave it out',
    ),
  )
  for refused, text in rules:
    if refused:
      raise ValueError(f'episodes of several turns cannot go with {text}')
  T, length = settings.sampling.max_completion_length, max_length(settings)
  if T is not None and length < T:
    raise ValueError(
      f'--max_episode_length {length} is less than a turn of '
      f'--max_completion_length {T}; pass --max_episode_length '
      f'{2 * settings.turns.max_turns * T}'
    )


def max_length(settings: Settings, turn_length: int | None = None) -> int:
  """Tokens of an episode at most: as given, else twice all its turns."""
  given, turns = settings.turns.max_episode_length, settings.turns.max_turns
  T = turn_length or settings.sampling.max_completion_length or 1
  return given or 2 * turns * T
