"""Metrics of a step's batch: rewards, lengths, values.

Names that TRL also logs mean what they mean in its GRPOTrainer, read in 1.16:

  reward, reward_std            mean and standard deviation (ddof 1) over all
                                rows of the batch that a reward applies to
  rewards/NAME/mean, .../std    alike for one reward, where it applies
  frac_reward_zero_std          share of groups whose rewards are all equal
  completions/mean_length       tokens of a completion, also min and max
  completions/mean_terminated_length   alike of completions that ended
  completions/clipped_ratio     share of completions cut before their end
  num_tokens                    tokens so far, a prompt's for each completion
  entropy, kl, clip_ratio/*     credit/losses.py
  grad_norm                     before it is clipped

Known differences: a standard deviation of fewer than two rows is 0 (NaN
there); frac_reward_zero_std compares rewards exactly (there by isclose), and
by group also where the batch scales; step_time is of a rollout and all its
passes (there of one pass); learning_rate is the one used (there the next).
"""

import jax
import jax.numpy as jnp

from jaxrl_tok import masked
from jaxrl_tok.types import Rollout, Scored


def std(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Standard deviation, sqrt(sum (x - mean)^2 / (n - 1)); 0 where n < 2."""
  return jnp.sqrt(masked.var(x, mask, ddof=1))


def reward_metrics(scored: Scored) -> dict:
  """Statistics of each row's summed reward, over valid rows.

  reward_group_std is the mean of the groups' standard deviations, over groups
  with two valid rows. With one sample a prompt, the batch is the group.
  """
  C = scored.rollout.prompts.length.shape[0]
  valid_CxG = scored.valid.reshape(C, -1)
  rows_CxG = scored.reward.sum(1).reshape(C, -1)
  alone = rows_CxG.shape[1] == 1
  groups, on = (rows_CxG.T, valid_CxG.T) if alone else (rows_CxG, valid_CxG)
  found = {
    'reward': masked.mean(rows_CxG, valid_CxG),
    'reward_std': std(rows_CxG, valid_CxG),
    'reward_group_std': masked.mean(jax.vmap(std)(groups, on), on.sum(1) > 1),
    'frac_reward_zero_std': masked.mean(
      masked.all_equal(groups, on, axis=1), jnp.any(on, axis=1)
    ),
    'frac_not_valid': 1.0 - valid_CxG.mean(),
  }
  for name, reward in scored.rewards.items():
    rows = masked.total(reward, scored.rollout.mask, axis=1)
    found[f'rewards/{name}/mean'] = masked.mean(rows, scored.applies[name])
    found[f'rewards/{name}/std'] = std(rows, scored.applies[name])
  return found


def length_metrics(rollout: Rollout) -> dict:
  """Lengths in tokens of all completions and of those that ended, and the
  share of completions that were cut; 0 where none ended."""
  lengths, ended = rollout.mask.sum(1).astype(jnp.float32), rollout.ended
  some = jnp.any(ended)
  shortest = masked.fill(lengths, ended, jnp.inf).min()
  return {
    'completions/tokens': lengths.sum(),
    'completions/mean_length': lengths.mean(),
    'completions/min_length': lengths.min(),
    'completions/max_length': lengths.max(),
    'completions/mean_terminated_length': masked.mean(lengths, ended),
    'completions/min_terminated_length': masked.fill(shortest, some),
    'completions/max_terminated_length': masked.fill(lengths, ended).max(),
    'completions/clipped_ratio': 1.0 - ended.mean(),
  }


def value_metrics(value, target, mask) -> dict:
  """Explained variance of the critic, 1 - var(target - V) / var(target) over
  chosen tokens; 0 where the targets do not vary."""
  spread = masked.var(target, mask)
  left = masked.var(target - value, mask)
  known = jnp.where(spread > 0, 1 - left / jnp.maximum(spread, 1e-12), 0.0)
  return {'explained_variance': known, 'value': masked.mean(value, mask)}
