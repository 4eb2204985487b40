"""Supervised learning of right answers, by -log-prob of their tokens. The
log-probs are those of `evaluate`, as in reinforcement learning."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxrl_tok.credit import losses
from jaxrl_tok.policy import evaluate
from jaxrl_tok.types import Policy, Prompts, Rollout, SamplingRule


def answers_as_rollout(prompts: Prompts, tokens, mask) -> Rollout:
  """Answers [n, T] as completions of the prompts, one each."""
  n = tokens.shape[0]
  return Rollout(
    prompts,
    tokens,
    mask,
    jnp.zeros(tokens.shape),
    None,
    jnp.ones(n, bool),
    jnp.zeros(n, jnp.int32),
  )


def make_supervised_step(
  policy: Policy, optimizer: optax.GradientTransformation, rule: SamplingRule
) -> Callable:
  """Returns step(params, opt_state, Prompts, tokens [n, T], mask [n, T]) ->
  (params, opt_state, loss), pure: the mean over answer tokens, their end
  included."""

  def step(params, opt_state, prompts: Prompts, tokens, mask):
    rollout = answers_as_rollout(prompts, tokens, mask)

    def loss(params):
      stats = evaluate(policy, params, rollout, rule)
      weight = losses.token_mean(mask, rollout.ended)
      return -jnp.sum(stats.logp * weight)

    value, grads = jax.value_and_grad(loss)(params)
    changes, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, changes), opt_state, value

  return step
