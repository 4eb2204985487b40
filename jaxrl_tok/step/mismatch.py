"""Mismatch of sampler and gradient: two distributions that should be one.

The sampler reads tokens one at a time, into a cache, with parameters cast once;
the gradient reads a completion at once. Both are run here on equal tokens:

  sampler   encode -> extend(token 0, cache) -> extend(token 1, cache) ...
  gradient  encode -> extend(all tokens)

In float32 the two differ by rounding alone, about 1e-6 nats; in bfloat16 by
about 1e-2. More is a fault: a cache written at the wrong column, a kernel that
masks wrongly, a parameter that one side rounds. As importance ratios are taken
between the two, such a fault trains another policy than the one that samples.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_tok import distribution
from jaxrl_tok.policy import completion_hidden
from jaxrl_tok.sampler import begin, grow_cache
from jaxrl_tok.sharding import (
  constrain_caches,
  constrain_rows,
  row_shards,
)
from jaxrl_tok.types import Policy, Prompts, Rollout, SamplingRule

MISMATCH_ROWS = 16  # completions that are measured


def first_rows(rollout: Rollout, rows: int) -> Rollout:
  """Takes about `rows` rows: the first samples of the first prompts, of as many
  prompts as the mesh divides."""
  mesh = jax.sharding.get_abstract_mesh()
  shards = 1 if mesh.empty else row_shards(mesh)
  C, B = rollout.prompts.length.shape[0], rollout.tokens.shape[0]
  g = min(B // C, rows)
  c = min(C, max(1, rows // g // shards) * shards)

  def take(x):
    x = x.reshape(C, B // C, *x.shape[1:])[:c, :g]
    return constrain_rows(x.reshape(c * g, *x.shape[2:]))

  prompts = jax.tree.map(lambda x: constrain_rows(x[:c]), rollout.prompts)
  rest = rollout._replace(prompts=None)
  return jax.tree.map(take, rest)._replace(prompts=Prompts(*prompts))


def compare(logits, other, tokens) -> tuple:
  """Compares two distributions [B, V] -> (|log-prob gap| of tokens, KL(first
  || second), largest probability gap), each [B].

  KL = sum_v p_v d_v - p_v + q_v, d = log p - log q: no term is below 0, so that
  none cancels another.
  """
  logp, logq = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
  p, q, d = jnp.exp(logp), jnp.exp(logq), logp - logq
  gap = jnp.take_along_axis(d, tokens[:, None], axis=-1)[:, 0]
  near = d + jnp.expm1(-jnp.clip(d, -1.0, 1.0))  # exact where p and q are close
  terms = jnp.where(jnp.abs(d) < 1, p * near, p * d - p + q)
  return jnp.abs(gap), terms.sum(-1), jnp.max(jnp.abs(p - q), axis=-1)


def make_mismatch(policy: Policy, rows: int = MISMATCH_ROWS) -> Callable:
  """Returns mismatch(policy_params, Rollout, rule) -> {name: float32 []}, pure.

  Over chosen tokens of about `rows` rows, on the distribution without
  truncation, so that greedy completions can be measured:

    logp_gap_mean, logp_gap_max   |log p - log q| of the token, nats
    kl                            mean KL(p || q) over the vocabulary, nats
    prob_gap_max                  largest |p_v - q_v| of any token v

  p is the sampler's distribution, q the gradient's.
  """

  def mismatch(policy_params: tuple, rollout: Rollout, rule: SamplingRule):
    params = policy.merge_params(*policy_params)
    rollout = first_rows(rollout, rows)
    (B, T), mask = rollout.tokens.shape, rollout.mask
    whole_BxTxD = completion_hidden(policy, params, rollout)
    kind = whole_BxTxD.dtype
    prefix, cast = begin(policy, params, rollout.prompts)
    first = jnp.repeat(prefix.hidden, B // prefix.length.shape[0], axis=0)
    grown = jax.eval_shape(lambda: policy.init_cache(B, T))
    cache = grow_cache(policy.init_cache(B, 0), grown)  # as the sampler's is
    cache = constrain_caches(cache)

    def logits(params, hidden_BxD):
      return distribution.shape_logits(policy.logits(params, hidden_BxD), rule)

    def column(t, carry):
      hidden, cache, sums, largest = carry
      token_B, on_B, other = (
        jax.lax.dynamic_index_in_dim(x, t, 1, keepdims=False)
        for x in (rollout.tokens, mask, whole_BxTxD)
      )
      gap, kl, prob = (
        jnp.where(on_B, x, 0.0)
        for x in compare(logits(cast, hidden), logits(params, other), token_B)
      )
      sums += jnp.stack([gap.sum(), kl.sum()])
      largest = jnp.maximum(largest, jnp.stack([gap.max(), prob.max()]))
      hidden, cache = policy.extend(cast, prefix, token_B[:, None], cache, t)
      return hidden[:, 0].astype(kind), cache, sums, largest

    columns = jnp.max(jnp.where(mask, 1 + jnp.arange(T)[None], 0))
    start = first.astype(kind), cache, jnp.zeros(2), jnp.zeros(2)
    _, _, sums, largest = jax.lax.fori_loop(0, columns, column, start)
    gap, kl = sums / jnp.maximum(mask.sum(), 1)
    return {
      'logp_gap_mean': gap,
      'logp_gap_max': largest[0],
      'kl': kl,
      'prob_gap_max': largest[1],
    }

  return mismatch
