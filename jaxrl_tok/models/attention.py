"""Attention of completions to a prompt that they share, and rotary positions.

Letters beyond types.py's: M = N/K query heads for each key/value head, S keys
of the completion, t tokens looked at now. Queries are [B, K, M, t, H] and
keys and values [B, K, S, H]: the layout whose products need no transpose of
the large side. Softmax is in float32.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that 0 * MASKED is 0


def rope_angles(positions: jax.Array, head_dim: int, theta: float):
  """(cos, sin), each float32 [..., H/2], of int positions [...].

  angle_j = position * theta^(-2j/H). RoFormer, arXiv:2104.09864.
  """
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  speed = jnp.expand_dims(theta**-exponent, tuple(range(positions.ndim)))
  angles = positions[..., None].astype(jnp.float32) * speed
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Turns the pairs (x_j, x_{j + H/2}) by their angle (the Hugging Face order).

  x [..., H], cos and sin broadcastable to [..., H/2].
  """
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x.dtype)


def causal_attention(q, k, v):
  """Attention among the tokens of right-padded prompts.

  q [C, K, M, P, H], k and v [C, K, P, H] -> [C, K, M, P, H]. Padding is after
  every real token, so the causal mask alone hides it.
  """
  P = q.shape[3]
  scores_CKMtP = jnp.einsum(
    'ckmth,ckph->ckmtp', q, k, preferred_element_type=jnp.float32
  )
  causal_PxP = jnp.tril(jnp.ones((P, P), bool))
  scores_CKMtP = jnp.where(
    causal_PxP[None, None, None], scores_CKMtP * q.shape[-1] ** -0.5, MASKED
  )
  weights = jax.nn.softmax(scores_CKMtP, axis=-1).astype(v.dtype)
  return jnp.einsum('ckmtp,ckph->ckmth', weights, v)


def shared_prefix_attention(q, prefix, prefix_length, suffix, at):
  """One softmax over [prompt | completion], the prompt read once per group.

  The G rows of a prompt stand as extra queries in one matrix product with its
  keys, so the prefix is neither copied G times nor joined to the suffix:

    out = (e_p V_p + e_s V_s) / (sum e_p + sum e_s),  e = exp(score - max)

  Args:
    q: [B, K, M, t, H], the tokens at completion columns at .. at + t - 1.
    prefix: (k, v), each [C, K, P, H].
    prefix_length: int32 [C]; prompt keys from there on are padding.
    suffix: (k, v), each [B, K, S, H]; column s is seen by column c when s <= c.
    at: int32 [], the completion column of the first query.

  Returns: [B, K, M, t, H].
  """
  (kp, vp), (ks, vs) = prefix, suffix
  B, K, M, t, H = q.shape
  C, P, S = kp.shape[0], kp.shape[2], ks.shape[2]
  G = B // C
  q = q * H**-0.5
  q_CKGMtH = q.reshape(C, G, K, M, t, H).swapaxes(1, 2)
  scores_p = jnp.einsum(
    'ckgmth,ckph->ckgmtp', q_CKGMtH, kp, preferred_element_type=jnp.float32
  )
  scores_s = jnp.einsum(
    'bkmth,bksh->bkmts', q, ks, preferred_element_type=jnp.float32
  )
  seen_CxP = jnp.arange(P)[None] < prefix_length[:, None]
  scores_p = jnp.where(seen_CxP[:, None, None, None, None], scores_p, MASKED)
  seen_txS = jnp.arange(S)[None] <= at + jnp.arange(t)[:, None]
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
