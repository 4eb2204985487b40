"""Rewards on the host: functions of text, and their way into a [B, T] array.

A reward function has TRL's signature; every column of the data arrives as a
list with one entry a completion:

  def reward(prompts, completions, completion_ids=None, **columns):
    return [...]  # a float each, None where it does not apply,
                  # or a list each: one reward for every token

Nothing here imports jax: reward functions may run in other processes.
"""

from jaxrl_tok.rewards.arithmetic import digits, exact_match
from jaxrl_tok.rewards.scoring import Scores, lift, make_scorer

__all__ = ['Scores', 'digits', 'exact_match', 'lift', 'make_scorer']
