"""Calls of user functions: plain ones, then coroutines side by side."""

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import Callable

from jaxrl_tok.rewards.functions import RewardError, raised_by_us, shorten


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
  """A loop of its own thread, which lives as long as the process: clients
  that functions keep between batches stay bound to an open loop."""
  loop = asyncio.new_event_loop()
  threading.Thread(
    target=loop.run_forever, name='async-rewards', daemon=True
  ).start()
  return loop


def run_together(awaitables: list) -> list:
  """Results of awaitables that wait side by side; an exception is a result.
  Works where the caller's thread runs a loop already, as in a notebook."""

  async def settle(awaitable):
    try:
      return await awaitable
    except (Exception, SystemExit) as e:  # an exit would end the loop's thread
      return e

  async def gather():
    waiting = map(settle, awaitables)
    return await asyncio.gather(*waiting, return_exceptions=True)

  future = asyncio.run_coroutine_threadsafe(gather(), _event_loop(os.getpid()))
  try:
    return future.result()
  except BaseException:  # Ctrl-C
    future.cancel()
    raise


def call_all(calls: dict[str, Callable], first_only: bool = True) -> dict:
  """Calls functions without arguments: {name: values, or an exception}.
  Coroutines are awaited together after the plain functions.

  first_only: calls nothing more after an exception.
  """
  results, failed = {}, False
  for name, call in calls.items():
    try:
      results[name] = call()
    except (Exception, SystemExit) as e:
      results[name], failed = e, True
      if first_only:
        break
  waiting = {k: v for k, v in results.items() if inspect.isawaitable(v)}
  if waiting and not (failed and first_only):
    results |= zip(waiting, run_together(list(waiting.values())))
  for awaitable in waiting.values():
    if inspect.iscoroutine(awaitable):
      awaitable.close()  # no warning where it was never awaited
  return results


def describe_error(e: BaseException) -> str:
  """Kind and text of an exception on one line."""
  return f'{type(e).__name__}: {shorten(e)}'.removesuffix(': ')


def as_reward_error(
  function: str, e: BaseException, samples: list, cure: str
) -> Exception:
  """The exception as one line that names function and sample; one of ours as it
  is.

  Args:
    function: its kind and name.
    samples: completions, see quote_samples.
  """
  if raised_by_us(e):
    return e
  error = RewardError(
    f'{function} raised {describe_error(e)} on {len(samples)} completions, '
    f'the first {samples[0]}; {cure}'
  )
  error.__cause__ = e
  return error
