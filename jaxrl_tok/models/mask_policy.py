"""NLPO's policy: tokens are drawn from the current policy, among those that a
slow copy of it finds likely. arXiv:2210.01241.

  pi(v | s) = p(v | s) / sum of p over S(s)   for v in S(s), else 0
  S(s) = the sampling rule's set (top-p 0.9, say) under the slow copy

It is a Policy of two: parameters, prefixes, hidden states and caches are pairs.
The sampler records how many tokens each set kept, and evaluating keeps as many
of the slow copy's most likely ones, so that log-probs are those drawn from.
"""

import jax
import jax.numpy as jnp

from jaxrl_tok.types import Policy, Prefix


def masked_policy(policy: Policy) -> Policy:
  """Pairs the policy with a slow copy of it that ranks its tokens.

  Its merge_params takes (params, (frozen, slow)); slow has the structure of
  params.
  """

  def merge_params(params, fixed):
    frozen, slow = fixed
    return tuple(policy.merge_params(p, frozen) for p in (params, slow))

  def cast_params(params):
    return tuple(map(policy.cast_params, params))

  def encode(params, prompts):
    own, slow = (policy.encode(p, prompts) for p in params)
    hidden = jnp.concatenate([own.hidden, slow.hidden], axis=-1)
    return Prefix((own.kv, slow.kv), hidden, prompts.length)

  def split_prefix(prefix):
    halves = (prefix._replace(kv=kv) for kv in prefix.kv)
    kv = tuple(policy.split_prefix(half).kv for half in halves)
    return prefix._replace(kv=kv)

  def extend(params, prefix, tokens, cache, at):
    halves = jnp.split(prefix.hidden, 2, axis=-1)
    caches = (None, None) if cache is None else cache
    out = [
      policy.extend(p, Prefix(kv, half, prefix.length), tokens, old, at)
      for p, kv, half, old in zip(params, prefix.kv, halves, caches)
    ]
    hidden = jnp.concatenate([h for h, _ in out], axis=-1)
    return hidden, None if cache is None else tuple(new for _, new in out)

  def on_half(function, i):
    """Calls the function with one copy's parameters and hidden states."""
    return lambda params, hidden: function(
      params[i], jnp.split(hidden, 2, axis=-1)[i]
    )

  rank_logits = on_half(policy.logits, 1)
  return policy._replace(
    encode=encode,
    extend=extend,
    logits=on_half(policy.logits, 0),
    value=None if policy.value is None else on_half(policy.value, 0),
    init_cache=lambda *sizes: (policy.init_cache(*sizes),) * 2,
    merge_params=merge_params,
    cast_params=cast_params,
    split_prefix=split_prefix,
    rank_logits=lambda params, hidden: jax.lax.stop_gradient(
      rank_logits(params, hidden)
    ),
  )
