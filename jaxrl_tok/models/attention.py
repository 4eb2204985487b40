"""Attention of completions to a prompt that they share.

Letters beyond types.py's: M = N/K query heads for each key/value head, S keys
of the completion, t tokens looked at now. Queries are [B, K, M, t, H], keys
[B, K, H, S] and values [B, K, S, H]: both products then run along the last axis
of their large side. Softmax is in float32.

Choices of the functions: `scale` multiplies the scores, `cap` then bounds them
(cap * tanh(score / cap)), and a query sees only the `window` last keys, its own
included. None: no bound, all keys. `bias` float32, [K, M, t, S] or what
broadcasts to it, is added to the scaled scores.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that 0 * MASKED is 0


def capped(scores: jax.Array, cap: float | None) -> jax.Array:
  """Bounds scores to (-cap, cap). Gemma 2, arXiv:2408.00118."""
  return scores if cap is None else cap * jnp.tanh(scores / cap)


def sees(query, key, window: int | None) -> jax.Array:
  """Mask of the keys that a query sees, from their positions, broadcast.

  # window 2, queries down, keys across   1 0 0
  #                                       1 1 0
  #                                       0 1 1
  """
  seen = key <= query
  return seen if window is None else seen & (query - key < window)


def _biased(scores, bias):
  """Adds a bias whose axes are those of the scores but the first."""
  return scores if bias is None else scores + bias[None]


def causal_attention(q, k, v, scale, cap=None, window=None, bias=None):
  """Attention among the tokens of right-padded prompts.

  q [C, K, M, P, H], k [C, K, H, P], v [C, K, P, H] -> [C, K, M, P, H]. Padding
  comes after every real token, so the causal mask alone hides it.
  """
  at = jnp.arange(q.shape[3])
  scores_CKMtP = jnp.einsum(
    'ckmth,ckhp->ckmtp', q, k, preferred_element_type=jnp.float32
  )
  seen_PxP = sees(at[:, None], at[None], window)
  scores_CKMtP = _biased(capped(scores_CKMtP * scale, cap), bias)
  scores_CKMtP = jnp.where(seen_PxP[None, None, None], scores_CKMtP, MASKED)
  weights = jax.nn.softmax(scores_CKMtP, axis=-1).astype(v.dtype)
  return jnp.einsum('ckmtp,ckph->ckmth', weights, v)


def prompt_attention(q, prompt, length, scale, bias=None):
  """Attention of every query to all keys of its prompt, before and after it.

  Rows of a prompt stand as extra queries in one product with its keys, as in
  `shared_prefix_attention`. An encoder's prompts attend to themselves (B = C);
  a decoder's rows attend to them across.

  Args:
    q: [B, K, M, t, H].
    prompt: (k, v), [C, K, H, P] and [C, K, P, H].
    length: int32 [C]; keys from there on are padding.

  Returns: [B, K, M, t, H].
  """
  (k, v), (B, K, M, t, H) = prompt, q.shape
  C, P = k.shape[0], k.shape[3]
  q_CKGMtH = q.reshape(C, B // C, K, M, t, H).swapaxes(1, 2)
  scores = jnp.einsum(
    'ckgmth,ckhp->ckgmtp', q_CKGMtH, k, preferred_element_type=jnp.float32
  )
  scores = _biased(scores * scale, None if bias is None else bias[:, None])
  seen_CxP = jnp.arange(P)[None] < length[:, None]
  scores = jnp.where(seen_CxP[:, None, None, None, None], scores, MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  mixed = jnp.einsum('ckgmtp,ckph->ckgmth', weights, v)
  return mixed.swapaxes(1, 2).reshape(q.shape)


def shared_prefix_attention(
  q,
  prefix,
  prefix_length,
  suffix,
  at,
  scale,
  cap=None,
  window=None,
  bias=(None, None),
):
  """One softmax over [prompt | completion], the prompt read once per group.

  Rows of a prompt, G of them, stand as extra queries in one matrix product with
  its keys, so the prefix is neither copied G times nor joined to the suffix:

    out = (e_p V_p + e_s V_s) / (sum e_p + sum e_s),  e = exp(score - max)

  Args:
    q: [B, K, M, t, H], the tokens at completion columns at .. at + t - 1.
    prefix: (k, v), [C, K, H, P] and [C, K, P, H].
    prefix_length: int32 [C]; prompt keys from there on are padding.
    suffix: (k, v), [B, K, H, S] and [B, K, S, H]; column s is seen by column c
      when s <= c.
    at: int32 [], the completion column of the first query.
    bias: of the prefix's scores and of the suffix's.

  Returns: [B, K, M, t, H].
  """
  (kp, vp), (ks, vs) = prefix, suffix
  B, K, M, t, H = q.shape
  C, P, S = kp.shape[0], kp.shape[3], ks.shape[3]
  G = B // C
  q_CKGMtH = q.reshape(C, G, K, M, t, H).swapaxes(1, 2)
  scores_p = jnp.einsum(
    'ckgmth,ckhp->ckgmtp', q_CKGMtH, kp, preferred_element_type=jnp.float32
  )
  scores_s = jnp.einsum(
    'bkmth,bkhs->bkmts', q, ks, preferred_element_type=jnp.float32
  )
  column_t, key_P = at + jnp.arange(t), jnp.arange(P)
  seen_Cx1xP = (key_P[None] < prefix_length[:, None])[:, None]
  if window is not None:  # position of a query: its prompt's length + column
    query_Cxt = prefix_length[:, None] + column_t[None]
    near = query_Cxt[..., None] - key_P[None, None] < window
    seen_Cx1xP = seen_Cx1xP & near
  seen_p = seen_Cx1xP[:, None, None, None]  # over K, G, M
  bias_p, bias_s = bias
  scores_p = capped(scores_p * scale, cap)
  scores_p = _biased(scores_p, None if bias_p is None else bias_p[:, None])
  scores_p = jnp.where(seen_p, scores_p, MASKED)
  seen_txS = sees(column_t[:, None], jnp.arange(S)[None], window)
  scores_s = _biased(capped(scores_s * scale, cap), bias_s)
  scores_s = jnp.where(seen_txS[None, None, None], scores_s, MASKED)

  def by_row(x_CKGMt):  # -> [B, K, M, t, ...]: small arrays only
    return x_CKGMt.swapaxes(1, 2).reshape(B, K, *x_CKGMt.shape[3:])

  def by_prompt(x_BKMt):
    return x_BKMt.reshape(C, G, K, M, t).swapaxes(1, 2)

  top = jnp.maximum(by_row(scores_p.max(-1)), scores_s.max(-1))
  top = jax.lax.stop_gradient(top)
  e_p = jnp.exp(scores_p - by_prompt(top)[..., None])
  e_s = jnp.exp(scores_s - top[..., None])
  norm = by_row(e_p.sum(-1)) + e_s.sum(-1)
  from_p = jnp.einsum(
    'ckgmtp,ckph->ckgmth',
    e_p.astype(vp.dtype),
    vp,
    preferred_element_type=jnp.float32,
  )
  from_s = jnp.einsum(
    'bkmts,bksh->bkmth',
    e_s.astype(vs.dtype),
    vs,
    preferred_element_type=jnp.float32,
  )
  return ((by_row(from_p) + from_s) / norm[..., None]).astype(q.dtype)
