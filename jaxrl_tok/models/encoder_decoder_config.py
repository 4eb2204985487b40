"""Sizes and choices of an encoder-decoder (encoder_decoder.py)."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class StackConfig:
  """Sizes and choices of the layers of one side, encoder or decoder."""

  num_layers: int  # L
  d_model: int  # D
  num_heads: int  # N
  head_dim: int  # H
  d_ff: int  # F
  norm: str = 'layer'  # as TransformerConfig's
  norm_eps: float = 1e-5
  pre_norm: bool = False  # x + f(norm(x)); False: norm(x + f(x))
  bias: bool = True  # of every matrix
  activation: str = 'gelu'  # a name in blocks.ACTIVATIONS
  gated: bool = False
  attention_scale: float | None = None  # None: 1 / sqrt(H)

  def __post_init__(self):
    for name in ('num_layers', 'num_heads', 'd_ff'):
      size = getattr(self, name)
      if type(size) is not int or size < 1:
        raise ValueError(f'{name} {size!r} is not a number above zero')

  @property
  def mlp_bias(self) -> bool:
    return self.bias


@dataclasses.dataclass(frozen=True)
class Buckets:
  """Relative positions: a distance belongs to a bucket, which has a bias for
  each head. The nearest have one each, others lie on a logarithmic scale, and
  those from max_distance on share the last. T5, arXiv:1910.10683."""

  count: int
  max_distance: int

  def __post_init__(self):
    if self.count < 4 or self.max_distance <= self.count // 2:
      raise ValueError(
        f'{self.count} buckets up to distance {self.max_distance} are no '
        'relative positions; at least 4, for a distance above half as many'
      )


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
  """Sizes and choices of an encoder-decoder."""

  vocab_size: int  # V, of both sides
  encoder: StackConfig
  decoder: StackConfig
  start_tokens: tuple  # the decoder's own first tokens, no actions
  # learned, sinusoidal (both added to embeddings) or Buckets (to scores)
  positions: str | Buckets = 'learned'
  # learned or sinusoidal positions that each side has; None: any number
  num_positions: int | None = None
  position_offset: int = 0  # rows of a learned table before position 0
  embedding_scale: float = 1.0
  embedding_norm: bool = False  # normalizes embeddings, positions added
  final_norm: bool = False  # normalizes each side's last residual
  logit_scale: float = 1.0
  logit_bias: bool = False  # added to logits; never trained
  tie_embeddings: bool = True  # head and embeddings are one matrix
  lm_head: bool = True
  value_head: bool = False

  def __post_init__(self):
    if not self.start_tokens:
      raise ValueError(
        'decoder_start_token_id is missing, with which the decoder begins; add '
        'it to config.json or generation_config.json'
      )
    for token in self.start_tokens:
      if type(token) is not int or not 0 <= token < self.vocab_size:
        raise ValueError(
          f'the decoder begins with {token!r}, which is no id below '
          f'{self.vocab_size}; correct decoder_start_token_id or '
          'forced_bos_token_id'
        )
    if not self.lm_head:
      raise ValueError(
        'a classifier that is an encoder-decoder is not supported; pass a '
        'decoder'
      )

  @property
  def d_model(self) -> int:
    return self.encoder.d_model

  @property
  def max_length(self) -> int:
    """Largest number of tokens of a prompt and its completion together: that of
    either side, which keeps both within it."""
    return self.num_positions or 32_768
