"""Supervised losses, and the step that lowers one.

  answer_loss   -log-prob of right answers: warm starts
  pair_loss     Bradley-Terry's of preferred completions: reward models

Log-probs are those of `evaluate`, scores those of device_rewards.score_tokens,
as in reinforcement learning.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxrl_tok import masked
from jaxrl_tok.credit import losses
from jaxrl_tok.policy import evaluate
from jaxrl_tok.step.device_rewards import score_tokens
from jaxrl_tok.types import Policy, Prompts, Rollout, SamplingRule


def answers_as_rollout(prompts: Prompts, tokens, mask) -> Rollout:
  """Answers [B, T] as completions of C prompts, B / C of each."""
  B = tokens.shape[0]
  return Rollout(
    prompts,
    tokens,
    mask,
    jnp.zeros(tokens.shape),
    None,
    jnp.ones(B, bool),
    jnp.zeros(B, jnp.int32),
  )


def make_supervised_step(
  loss: Callable, optimizer: optax.GradientTransformation
) -> Callable:
  """Returns step(trained, opt_state, frozen, *batch) -> (trained, opt_state,
  loss), pure.

  loss: (trained, frozen, *batch) -> float32 [].
  """

  def step(trained, opt_state, frozen, *batch):
    value, grads = jax.value_and_grad(loss)(trained, frozen, *batch)
    changes, opt_state = optimizer.update(grads, opt_state, trained)
    return optax.apply_updates(trained, changes), opt_state, value

  return step


def answer_loss(policy: Policy, rule: SamplingRule) -> Callable:
  """Returns loss(trained, frozen, Prompts, tokens [n, T], mask [n, T]): the
  mean of -log-prob over answer tokens, their end included."""

  def loss(trained, frozen, prompts: Prompts, tokens, mask):
    rollout = answers_as_rollout(prompts, tokens, mask)
    params = policy.merge_params(trained, frozen)
    stats = evaluate(policy, params, rollout, rule)
    weight = losses.token_mean(mask, rollout.ended)
    return -jnp.sum(stats.logp * weight)

  return loss


def pair_loss(
  model: Policy, center: float = 0.0, prefixes: float = 0.0
) -> Callable:
  """Returns loss(trained, frozen, Prompts, tokens [2n, T], mask [2n, T], margin
  [n]) of n prompts, the rows 2i and 2i + 1 their chosen and rejected
  completions:

    mean_i -log sigmoid(s_chosen - s_rejected - margin)
      + center mean_i (s_chosen + s_rejected)^2
      + prefixes mean_t (s_t - sg(s))^2

  s_t is the score after token t, s the one after the last: that of the
  completion. Bradley and Terry, Biometrika 39, 1952; margins as in
  arXiv:2307.09288, centring as in arXiv:2312.09244. The last term makes the
  score of a prefix the expected score of the completions that begin with it,
  so that the differences s_t - s_(t-1) are credit by token.
  """

  def loss(trained, frozen, prompts: Prompts, tokens, mask, margin):
    params = model.merge_params(trained, frozen)
    rollout = answers_as_rollout(prompts, tokens, mask)
    scores_BxT = score_tokens(model, params, rollout)
    last_B = masked.total(scores_BxT, masked.last_chosen(mask), axis=1)
    chosen, rejected = last_B.reshape(-1, 2).T
    total = jnp.mean(jax.nn.softplus(margin - chosen + rejected))
    total += center * jnp.mean((chosen + rejected) ** 2)
    whole_Bx1 = jax.lax.stop_gradient(last_B)[:, None]
    return total + prefixes * masked.mean((scores_BxT - whole_Bx1) ** 2, mask)

  return loss
