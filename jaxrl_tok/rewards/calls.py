"""Calls of user functions: plain ones, then coroutines side by side; those that
fail by the network once more."""

import asyncio
import functools
import inspect
import os
import threading
import time
import urllib.error
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

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


# seconds before a call that failed by the network is made again
BACK_OFF = (1.0, 2.0, 4.0)
# errors of the network that are no OSError: those of httpx and its users
OF_NETWORK = (
  *('ConnectError', 'ReadError', 'ConnectTimeout', 'ReadTimeout'),
  *('RemoteDisconnected', 'RemoteProtocolError', 'IncompleteRead'),
  *('APIConnectionError', 'APITimeoutError', 'RateLimitError'),
  'InternalServerError',
)


def is_of_network(e) -> bool:
  """Tells whether a value is an exception that another try may not have: a
  connection, a time-out, a server that is too busy (429, 5xx)."""
  if isinstance(e, urllib.error.HTTPError):
    return e.code == 429 or e.code >= 500
  if isinstance(e, urllib.error.URLError | ConnectionError | TimeoutError):
    return True
  return isinstance(e, Exception) and any(
    kind.__name__ in OF_NETWORK for kind in type(e).__mro__
  )


def call_all(
  calls: dict[str, Callable],
  first_only: bool = True,
  aside: Collection[str] = (),
  wait: Callable = time.sleep,
) -> dict:
  """Calls functions without arguments: {name: values, or an exception}. Those
  that fail by the network are called again, with BACK_OFF.

  first_only: calls nothing more after an exception.
  aside: names of those that only wait; they do it side by side.
  """
  found = call_once(calls, first_only, aside)
  for seconds in BACK_OFF:
    if not any(map(is_of_network, found.values())):
      break
    wait(seconds)
    left = {
      name: call
      for name, call in calls.items()
      if name not in found or is_of_network(found[name])
    }
    found |= call_once(left, first_only, aside)
  return {name: found[name] for name in calls if name in found}


def call_once(
  calls: dict[str, Callable], first_only: bool, aside: Collection[str]
) -> dict:
  """Calls functions once each, see call_all: those that wait begin first, then
  the plain ones, then coroutines together."""
  results, failed = {}, False
  waiting = [name for name in calls if name in aside]
  with ThreadPoolExecutor(len(waiting) or 1) as pool:
    begun = {name: pool.submit(settled, calls[name]) for name in waiting}
    for name, call in calls.items():
      if name in begun:
        continue
      results[name] = settled(call)
      failed = isinstance(results[name], BaseException)
      if failed and first_only:
        break
    results |= {name: future.result() for name, future in begun.items()}
  coroutines = {k: v for k, v in results.items() if inspect.isawaitable(v)}
  if coroutines and not (failed and first_only):
    results |= zip(coroutines, run_together(list(coroutines.values())))
  for awaitable in coroutines.values():
    if inspect.iscoroutine(awaitable):
      awaitable.close()  # no warning where it was never awaited
  return results


def settled(call: Callable):
  """Value of a call, or the exception that it raises."""
  try:
    return call()
  except (Exception, SystemExit) as e:
    return e


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
