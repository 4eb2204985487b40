"""Meaning of the config.json of encoder-decoders: transformers' T5Config,
MT5Config, BartConfig, MBartConfig and MarianConfig.

An encoder-decoder's completions begin after `start_tokens`: the token that its
decoder starts with, then the first one that generation forces (BART's <s>, the
target language of mBART). Both are read from generation_config.json, or else
from config.json.
"""

from jaxrl_tok.hub.config_fields import activation, refuse_unless
from jaxrl_tok.models.encoder_decoder_config import (
  Buckets,
  EncoderDecoderConfig,
  StackConfig,
)

START = ('decoder_start_token_id', 'forced_bos_token_id')


def with_generation(hf_config: dict, generation: dict | None) -> dict:
  """Adds the first tokens of a generation_config.json, which come before
  those of config.json."""
  given = {name: (generation or {}).get(name) for name in START}
  return hf_config | {k: v for k, v in given.items() if v is not None}


def _start_tokens(j, default: int | None = None) -> tuple:
  """Reads decoder_start_token_id and forced_bos_token_id."""
  start, forced = (getattr(j, name, None) for name in START)
  if start is None:
    start = default
  return tuple(token for token in (start, forced) if token is not None)


def _read_t5(j, tied: bool) -> EncoderDecoderConfig:
  refuse_unless(j, is_encoder_decoder=True)
  shared = {
    'd_model': j.d_model,
    'num_heads': j.num_heads,
    'head_dim': j.d_kv,
    'd_ff': j.d_ff,
    'norm': 'rms',
    'norm_eps': j.layer_norm_epsilon,
    'pre_norm': True,
    'bias': False,
    'activation': activation(j.dense_act_fn),
    'gated': j.is_gated_act,
    'attention_scale': 1.0,
  }
  return EncoderDecoderConfig(
    vocab_size=j.vocab_size,
    encoder=StackConfig(j.num_layers, **shared),
    decoder=StackConfig(j.num_decoder_layers, **shared),
    start_tokens=_start_tokens(j, j.pad_token_id),
    positions=Buckets(
      j.relative_attention_num_buckets, j.relative_attention_max_distance
    ),
    final_norm=True,
    logit_scale=j.d_model**-0.5 if tied else 1.0,
    tie_embeddings=tied,
  )


def read_t5(j) -> EncoderDecoderConfig:
  """Reads v1.0, whose head is the embeddings and scaled, and v1.1 and flan,
  whose head is a matrix of its own. The file's tie_word_embeddings, which
  transformers reads as scale_decoder_outputs, tells them apart."""
  return _read_t5(j, j.scale_decoder_outputs)


def read_mt5(j) -> EncoderDecoderConfig:
  """Reads mT5, built as T5 v1.1."""
  return _read_t5(j, tied=False)


def _read_bart(j, **own) -> EncoderDecoderConfig:
  """Reads what BART, mBART and Marian share; `own` replaces."""
  refuse_unless(j, is_encoder_decoder=True)

  def side(name: str) -> StackConfig:
    N = getattr(j, f'{name}_attention_heads')
    if N < 1 or j.d_model % N:
      raise ValueError(
        f'd_model {j.d_model} must be a multiple of {name}_attention_heads {N}'
      )
    return StackConfig(
      num_layers=getattr(j, f'{name}_layers'),
      d_model=j.d_model,
      num_heads=N,
      head_dim=j.d_model // N,
      d_ff=getattr(j, f'{name}_ffn_dim'),
      activation=activation(j.activation_function),
      pre_norm=own.get('final_norm', False),
    )

  fields = {
    'vocab_size': j.vocab_size,
    'encoder': side('encoder'),
    'decoder': side('decoder'),
    'start_tokens': _start_tokens(j),
    'num_positions': j.max_position_embeddings,
    'embedding_scale': j.d_model**0.5 if j.scale_embedding else 1.0,
    'logit_bias': True,
    'tie_embeddings': j.tie_word_embeddings,
  }
  return EncoderDecoderConfig(**(fields | own))


def read_bart(j) -> EncoderDecoderConfig:
  return _read_bart(j, position_offset=2, embedding_norm=True)


def read_mbart(j) -> EncoderDecoderConfig:
  """Reads mBART: BART with norms before the layers, and after the last."""
  return _read_bart(j, position_offset=2, embedding_norm=True, final_norm=True)


def read_marian(j) -> EncoderDecoderConfig:
  refuse_unless(j, share_encoder_decoder_embeddings=True)
  return _read_bart(j, positions='sinusoidal')
