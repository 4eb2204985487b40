"""Rewards on the host: functions of text, and their way into a [B, T] array.

A reward function has TRL's signature; every column of the data arrives as a
list with one entry a completion:

  def reward(prompts, completions, completion_ids=None, **columns):
    return [...]  # a float each, None where it does not apply,
                  # or a list each: one reward for every token

It gets the arguments that it names, of ARGUMENTS and the columns; `async def`
functions wait side by side.

  functions.py   names, weights, arguments: what can be called
  calls.py       plain functions, then coroutines side by side
  scoring.py     values, logs, metrics: a rollout -> HostScores
  combine.py     gated, product: rewards of rewards
  adapters.py    verl, Tunix, reasoning-gym, verifiers
  load.py        FILE:NAME=WEIGHT of a command line
  text.py        sentiment, repetition; metrics of prose
  programs/      code by its unit tests, in an interpreter of our own

Nothing here imports jax: reward functions may run in other processes.
"""

from jaxrl_tok.rewards.adapters import (
  from_reasoning_gym,
  from_tunix,
  from_verifiers,
  from_verl,
)
from jaxrl_tok.rewards.arithmetic import digits, exact_match
from jaxrl_tok.rewards.combine import gated, product
from jaxrl_tok.rewards.functions import (
  ARGUMENTS,
  RewardError,
  accepted,
  check_functions,
  get_name,
  name_rewards,
  unwrap,
  user_traceback,
)
from jaxrl_tok.rewards.load import load_reward, load_rewards
from jaxrl_tok.rewards.programs import code_failures, passes_tests
from jaxrl_tok.rewards.scoring import (
  ON_ERROR,
  HostScores,
  TrainerState,
  lift,
  make_scorer,
)
from jaxrl_tok.rewards.text import (
  distinct,
  no_repetition,
  perplexity,
  sentiment,
)

__all__ = [
  'ARGUMENTS',
  'ON_ERROR',
  'HostScores',
  'RewardError',
  'TrainerState',
  'accepted',
  'check_functions',
  'code_failures',
  'digits',
  'distinct',
  'exact_match',
  'from_reasoning_gym',
  'from_tunix',
  'from_verifiers',
  'from_verl',
  'gated',
  'get_name',
  'lift',
  'load_reward',
  'load_rewards',
  'make_scorer',
  'name_rewards',
  'no_repetition',
  'passes_tests',
  'perplexity',
  'product',
  'sentiment',
  'unwrap',
  'user_traceback',
]
