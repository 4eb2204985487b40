"""Rewards that are JAX functions of a Rollout: no text, no host."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_tok import masked
from jaxrl_tok.types import Policy, Rollout


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
