"""Attention of many tokens at once by an accelerator's own kernel.

A kernel keeps no scores: memory grows with the tokens, not with their square.

1. `choose` turns a user's word into a kernel that this machine has.
2. `fitting` tells, where arrays meet, whether that kernel takes them and pays.
3. `cudnn` and `splash` have the arguments and, to rounding, the result of
   attention.causal_attention.
4. `by_row` makes completions on shared prompts into such self-attention.

Letters as in attention.py.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_tok.sharding import ROWS, device_kind, on_each_device, platform

NEEDS = {'cudnn': 'a GPU, Ampere or newer, with cuDNN', 'splash': 'a TPU'}
LEAST = 128  # tokens; fewer are one block of a kernel, whose scores are few


def choose(name: str) -> str:
  """Turns 'auto' into the backend's own kernel, 'xla' where it has none.

  Raises ValueError for a kernel that this backend does not have.
  """
  if name == 'auto':
    return next((kernel for kernel in NEEDS if available(kernel)), 'xla')
  if name not in ('xla', *NEEDS):
    raise ValueError(
      f'attention {name!r} is none of auto, xla, {", ".join(NEEDS)}'
    )
  if name != 'xla' and not available(name):
    raise ValueError(
      f'--attention {name} needs {NEEDS[name]}, and jax here runs on '
      f'{device_kind()}; pass --attention auto'
    )
  return name


def available(kernel: str) -> bool:
  """Tells whether the backend, or the mesh's (sharding.platform), has the
  kernel."""
  if kernel == 'splash':  # Mosaic needs a newer generation
    old = device_kind().startswith(('TPU v2', 'TPU v3'))
    return platform() == 'tpu' and not old
  if platform() != 'gpu':
    return False
  shapes = (1, 1, 1, LEAST, 64), (1, 1, 64, LEAST), (1, 1, LEAST, 64)
  qkv = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
  try:
    jax.eval_shape(functools.partial(cudnn, scale=1.0), *qkv)
  except RuntimeError:  # jax finds no cuDNN, or one too old for the device
    return False
  return float(jax.local_devices()[0].compute_capability) >= 8


def fitting(name: str, q, cap: float | None, P: int = 0) -> Callable | None:
  """Looks the kernel up; None where XLA has to do it or does it as well.

  q [.., T, H] are the queries, P the keys in front of their own. A kernel then
  computes (P + T)^2 / 2 pairs and XLA (P + T) T, so that long prompts of short
  completions stay with XLA: at P = 3 T a kernel has twice the work.
  """
  T, H = q.shape[-2:]
  if P + T < LEAST or P > 3 * T:
    return None
  if name == 'cudnn':
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return cudnn if half and cap is None and H % 8 == 0 and H <= 128 else None
  if name == 'splash' and q.dtype in (jnp.float32, jnp.bfloat16):
    return splash
  return None


def within(window: int | None, length: int) -> int | None:
  """Window of attention, None when it hides nothing."""
  return None if window is None or window >= length else window


def cudnn(q, k, v, scale, cap=None, window=None):
  """Computes causal_attention, cap None, by cuDNN's FlashAttention,
  arXiv:2307.08691."""
  assert cap is None, 'cuDNN has no cap'
  B, K, M, S, H = q.shape
  window = within(window, S)
  out_BxSxNxH = jax.nn.dot_product_attention(
    q.reshape(B, K * M, S, H).swapaxes(1, 2),
    jnp.moveaxis(k, 3, 1),
    v.swapaxes(1, 2),
    scale=scale,
    is_causal=True,
    local_window_size=None if window is None else (window - 1, 0),
    implementation='cudnn',
  )
  return out_BxSxNxH.swapaxes(1, 2).reshape(q.shape)


def splash(q, k, v, scale, cap=None, window=None, interpret=False):
  """Computes causal_attention by Pallas' splash attention, each device its rows
  and heads: a partitioner cannot split a kernel. interpret: without a TPU."""
  whole = functools.partial(
    _splash, scale=scale, cap=cap, window=window, interpret=interpret
  )
  return on_each_device(whole, (ROWS, 'tensor'), q, k.swapaxes(2, 3), v)


def blocks(length: int) -> tuple[int, int]:
  """Pads a length to whole blocks -> (padded length, length of a block).

  # 100 -> 128, 128    300 -> 384, 384    600 -> 768, 256    900 -> 1024, 512
  """
  unit = 128 if length <= 512 else 256
  padded = -(-length // unit) * unit
  return padded, padded if padded <= 512 else 256 if padded % 512 else 512


def _splash(q, k, v, scale, cap, window, interpret):
  """Runs the kernel: q [B, K, M, S, H], k and v [B, K, S, H] -> q's shape."""
  from jax.experimental.pallas.ops.tpu import splash_attention as ops

  B, K, M, S, H = q.shape
  length, block = blocks(S)
  window, square = within(window, S), (length, length)
  if window is None:
    mask = ops.CausalMask(square)
  else:
    mask = ops.LocalMask(square, (window - 1, 0), 0)
  names = 'q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv', 'kv_dkv_compute'
  sizes = {f'block_{name}': block for name in (*names, 'q_dq', 'kv_dq')}
  kernel = ops.make_splash_mha(
    ops.MultiHeadMask([mask] * (K * M)),
    block_sizes=ops.BlockSizes(**sizes),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=cap,
    interpret=interpret,
  )
  q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel does not
  tail = [(0, 0), (0, 0), (0, length - S), (0, 0)]  # hidden: it comes after
  heads = q.reshape(B, K * M, S, H), k, v
  out = jax.vmap(kernel)(*(jnp.pad(x, tail) for x in heads))
  return out[:, :, :S].reshape(B, K, M, S, H)


def by_row(
  attend, q, prefix, prefix_length, suffix, scale, cap=None, window=None
):
  """Computes shared_prefix_attention without a cache, as self-attention of
  whole rows.

  Real tokens of a row's prompt and its completion stand end to end, so that
  the causal mask alone hides the rest and a window counts positions. Queries
  of the prompt are zeros, and their results are dropped.

  # prompt of 2, P = 3, T = 2    keys     p p s s .
  #                              queries  0 0 q q 0

  Args:
    attend: as causal_attention is.
    q, prefix, prefix_length, suffix: as shared_prefix_attention's, S = T.

  Returns: [B, K, M, T, H].
  """
  (kp, vp), (ks, vs) = prefix, suffix
  B, K, M, T, H = q.shape
  P, G = kp.shape[3], B // kp.shape[0]
  start_B = jnp.repeat(prefix_length, G)

  def write(rows, new, axis):
    def one(row, new, start):
      return jax.lax.dynamic_update_slice_in_dim(row, new, start, axis - 1)

    return jax.vmap(one)(rows, new, start_B)

  def end_to_end(front, back, axis):
    tail = [(0, T if a == axis else 0) for a in range(4)]
    return write(jnp.repeat(jnp.pad(front, tail), G, axis=0), back, axis)

  def read(row, start):
    return jax.lax.dynamic_slice_in_dim(row, start, T, axis=2)

  out = attend(
    write(jnp.zeros((B, K, M, P + T, H), q.dtype), q, 3),
    end_to_end(kp, ks, 3),
    end_to_end(vp, vs, 2),
    scale,
    cap,
    window,
  )
  return jax.vmap(read)(out, start_B)
