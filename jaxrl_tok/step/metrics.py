"""Metrics of a step's batch: rewards, lengths, values."""

import jax
import jax.numpy as jnp

from jaxrl_tok import masked
from jaxrl_tok.types import Rollout, Scored


def reward_metrics(scored: Scored) -> dict:
  """Statistics of each row's summed reward, over valid rows; TRL's names.

  reward_std is the mean, over groups with a valid row, of the standard
  deviation (ddof 1) in the group; with one sample a prompt, that of the batch.
  """
  C = scored.rollout.prompts.length.shape[0]
  valid_CxG = scored.valid.reshape(C, -1)
  rows_CxG = scored.reward.sum(1).reshape(C, -1)
  alone = rows_CxG.shape[1] == 1
  groups, on = (rows_CxG.T, valid_CxG.T) if alone else (rows_CxG, valid_CxG)
  std = jax.vmap(lambda x, m: jnp.sqrt(masked.var(x, m, ddof=1)))(groups, on)
  some = jnp.any(on, axis=1)
  found = {
    'reward': masked.mean(rows_CxG, valid_CxG),
    'reward_std': masked.mean(std, some),
    'frac_reward_zero_std': masked.mean(std < 1e-6, some),
    'frac_not_valid': 1.0 - valid_CxG.mean(),
  }
  for name, reward in scored.rewards.items():
    rows = masked.total(reward, scored.rollout.mask, axis=1)
    found[f'rewards/{name}/mean'] = masked.mean(rows, scored.applies[name])
  return found


def length_metrics(rollout: Rollout) -> dict:
  """Lengths in tokens, and the share of completions that were cut."""
  lengths = rollout.mask.sum(1).astype(jnp.float32)
  return {
    'completions/tokens': lengths.sum(),
    'completions/mean_length': lengths.mean(),
    'completions/min_length': lengths.min(),
    'completions/max_length': lengths.max(),
    'completions/clipped_ratio': 1.0 - rollout.ended.mean(),
  }


def value_metrics(value, target, mask) -> dict:
  """Explained variance of the critic, 1 - var(target - V) / var(target) over
  chosen tokens; 0 where the targets do not vary."""
  spread = masked.var(target, mask)
  left = masked.var(target - value, mask)
  known = jnp.where(spread > 0, 1 - left / jnp.maximum(spread, 1e-12), 0.0)
  return {'explained_variance': known, 'value': masked.mean(value, mask)}
