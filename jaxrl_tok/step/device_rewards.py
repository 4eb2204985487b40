"""Rewards that are JAX functions of a Rollout: no text, no host.

  @on_device
  def short(rollout, **columns):
    return -rollout.mask.sum(1)  # [B], an outcome, or [B, T]: for every token

A column is what the data has for each row, [B, ...]. All rewards on the device
make rollout, reward and update one program (steps.py).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxrl_tok import masked
from jaxrl_tok.types import Policy, Rollout


def on_device(function: Callable) -> Callable:
  """Marks a reward function (rollout, **columns) -> [B] or [B, T] of JAX."""
  function.on_device = True
  return function


def is_on_device(function: Callable) -> bool:
  return getattr(function, 'on_device', False)


@on_device
def exact_tokens(rollout: Rollout, answer, **columns) -> jax.Array:
  """1 where the completion is the answer's tokens, its end included, else 0.

  answer int32 [B, T], padded as completions are; rewards.exact_match on the
  host also forgives spaces around it.
  """
  return jnp.all(rollout.tokens == answer, axis=1).astype(jnp.float32)


@on_device
def digit_tokens(rollout: Rollout, answer, answer_mask, **columns):
  """rewards.digits without text: each token of the answer in its place, its
  end included, earns one share; a right completion sums to 1."""
  right = (rollout.tokens == answer) & answer_mask & rollout.mask
  return right / masked.count(answer_mask, axis=1)[:, None]


def reward_model(model: Policy) -> Callable:
  """Returns reward(params, Rollout) -> float32 [B, T], pure: the score that a
  classifier of one label gives prompt and completion, on the last chosen token.

  # tokens [4 2 EOS pad]  score after  [. . s .]

  It reads the rollout's tokens as they are, so its tokenizer must be the
  policy's.
  """

  def reward(params, rollout: Rollout) -> jax.Array:
    prefix = model.encode(params, rollout.prompts)
    hidden, _ = model.extend(params, prefix, rollout.tokens, None, 0)
    score = model.value(params, hidden)
    return jnp.where(masked.last_chosen(rollout.mask), score, 0.0)

  return reward


def make_scorer(
  functions: Sequence[Callable],
  weights: Sequence[float] | None = None,
  model: Callable | None = None,
  model_weight: float = 1.0,
) -> Callable:
  """Returns score(params, Rollout, {column: [C, ...]}) -> (reward [B, T],
  {'rewards/{function}/mean': []}), pure: the weighted sum of the functions and
  of a reward_model's, whose parameters `params` are."""
  weights = [1.0] * len(functions) if weights is None else list(weights)

  def score(params, rollout: Rollout, columns: dict):
    B, C = rollout.mask.shape[0], rollout.prompts.length.shape[0]
    rows = {k: jnp.repeat(v, B // C, axis=0) for k, v in columns.items()}
    found = [
      (f.__name__, w, f(rollout, **rows)) for f, w in zip(functions, weights)
    ]
    if model is not None:
      found.append(('reward_model', model_weight, model(params, rollout)))
    total, means = jnp.zeros(rollout.mask.shape), {}
    for name, weight, reward in found:
      if reward.ndim == 1:
        last = masked.last_chosen(rollout.mask)
        reward = jnp.where(last, reward[:, None].astype(jnp.float32), 0.0)
      reward = masked.fill(reward.astype(jnp.float32), rollout.mask)
      means[f'rewards/{name}/mean'] = reward.sum(1).mean()
      total += weight * reward
    return total, means

  return score
