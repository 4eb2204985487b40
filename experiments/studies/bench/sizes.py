"""Sizes that are benchmarked, and the decoder of a size."""

from typing import NamedTuple


class Size(NamedTuple):
  """A decoder of Llama's kind: RMSNorm, RoPE, SwiGLU, an untied head."""

  d_model: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  d_ff: int
  vocab_size: int


SIZES = {
  'nano': Size(128, 4, 4, 2, 32, 384, 512),
  'small': Size(192, 4, 6, 2, 32, 512, 2048),
  'medium': Size(512, 8, 8, 4, 64, 1536, 8192),
  'qwen2.5-0.5b': Size(896, 24, 14, 2, 64, 4864, 151_936),
  'qwen3-0.6b': Size(1024, 28, 16, 8, 128, 3072, 151_936),
  'qwen3-1.7b': Size(2048, 28, 16, 8, 128, 6144, 151_936),
}


def make_config(size: Size):
  """TransformerConfig of a size."""
  from jaxrl_tok.models.rope import make_rope
  from jaxrl_tok.models.transformer import Layer, TransformerConfig

  turn = make_rope({'rope_type': 'default', 'rope_theta': 1e4}, size.head_dim)
  return TransformerConfig(
    vocab_size=size.vocab_size,
    d_model=size.d_model,
    num_heads=size.num_heads,
    num_kv_heads=size.num_kv_heads,
    head_dim=size.head_dim,
    d_ff=size.d_ff,
    layers=(Layer(turn),) * size.num_layers,
  )


def num_weights(size: Size) -> int:
  """Weights of the matrices that every token is multiplied with, head
  included."""
  N, K, H = size.num_heads, size.num_kv_heads, size.head_dim
  attention = size.d_model * H * (2 * N + 2 * K)
  block = attention + 3 * size.d_model * size.d_ff
  return size.num_layers * block + size.d_model * size.vocab_size
