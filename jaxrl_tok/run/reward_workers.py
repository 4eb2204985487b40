"""Reward functions of a run, in workers where its settings ask for them."""

import contextlib
from collections.abc import Callable

from jaxrl_tok.rewards.functions import free_name
from jaxrl_tok.rewards.isolated import in_workers
from jaxrl_tok.rewards.workers import GIB, Limits
from jaxrl_tok.run.inputs import Rewards
from jaxrl_tok.run.settings import Settings


class RewardWorkers:
  """Workers of all reward functions of a run, training's and evaluations'.

  As a context it starts them, and ends them however the run ends.
  """

  def __init__(self, functions: dict[int, Callable], workers):
    self._functions, self._workers = functions, workers

  def take(self, functions: dict[str, Callable]) -> dict[str, Callable]:
    """The functions, those in workers in place of those that are called
    here."""
    return {k: self._functions.get(id(f), f) for k, f in functions.items()}

  def __enter__(self):
    if self._workers is not None:
      self._workers.__enter__()
    return self

  def __exit__(self, *error) -> None:
    if self._workers is not None:
      self._workers.close()


def make_reward_workers(
  settings: Settings, *judged: Rewards
) -> RewardWorkers | None:
  """Workers of the host's reward functions; None where none are asked for.
  Raises ValueError for a function that cannot be sent there."""
  run = settings.run
  if not run.reward_workers:
    return None
  named = {}  # a function of training and of evaluations is one
  for found in judged:
    for name, f in found.host.items():
      if all(f is not other for other in named.values()):
        named[free_name(name, named)] = f
  if not named:
    raise ValueError(
      '--reward_workers has no effect on rewards that are JAX functions; leave '
      'it out'
    )
  limits = Limits(run.reward_timeout, int(run.reward_memory * GIB))
  found, workers = in_workers(named, limits, run.reward_workers)
  return RewardWorkers({id(named[k]): f for k, f in found.items()}, workers)


def working(workers: RewardWorkers | None):
  """Context in which reward workers run."""
  return contextlib.nullcontext() if workers is None else workers
