"""Hugging Face decoder families: config.json and weight names, both ways.

One entry a family. A `Weight` says which tensors of the file make one of our
parameters: `pack` joins them, `unpack` takes them apart again, and each undoes
the other bitwise.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxrl_tok.models.transformer import TransformerConfig


class Weight(NamedTuple):
  path: str  # of our parameter, 'layer_0/attention/qkv'
  names: tuple  # of the file's tensors
  pack: Callable  # (*tensors) -> parameter
  unpack: Callable  # parameter -> tuple of tensors


class Family(NamedTuple):
  architecture: str  # config.json's architectures[0]
  model_type: str  # config.json's model_type
  read: Callable  # config.json as dict -> TransformerConfig
  write: Callable  # TransformerConfig -> dict
  weights: Callable  # TransformerConfig -> list[Weight]


def same(path: str, name: str) -> Weight:
  """A parameter stored as it is."""
  return Weight(path, (name,), lambda x: x, lambda x: (x,))


def transposed(path: str, name: str) -> Weight:
  """A matrix that the file stores as [out, in]."""
  return Weight(path, (name,), lambda x: x.T, lambda x: (x.T,))


def _decoder_weights(c: TransformerConfig) -> list[Weight]:
  """The names that llama made common, with Qwen2's biases."""
  D, K, H = c.d_model, c.num_kv_heads, c.head_dim
  M = c.num_heads // K

  def pack_qkv(q, k, v):  # each [heads * H, D]
    q = q.reshape(K, M, H, D)
    k, v = k.reshape(K, 1, H, D), v.reshape(K, 1, H, D)
    return np.moveaxis(np.concatenate([q, k, v], 1), -1, 0)

  def unpack_qkv(qkv):  # [D, K, M + 2, H]
    x = np.moveaxis(qkv, 0, -1)
    parts = x[:, :M], x[:, M], x[:, M + 1]
    return tuple(p.reshape(-1, D) for p in parts)

  def pack_bias(q, k, v):  # each [heads * H]
    parts = q.reshape(K, M, H), k.reshape(K, 1, H), v.reshape(K, 1, H)
    return np.concatenate(parts, 1)

  def unpack_bias(x):  # [K, M + 2, H]
    return tuple(p.reshape(-1) for p in (x[:, :M], x[:, M], x[:, M + 1]))

  weights = [same('embed/embedding', 'model.embed_tokens.weight')]
  for i in range(c.num_layers):
    ours, theirs = f'layer_{i}/', f'model.layers.{i}.'
    qkv = [theirs + f'self_attn.{x}_proj.' for x in 'qkv']
    weights += [
      same(ours + 'attention_norm/scale', theirs + 'input_layernorm.weight'),
      same(ours + 'mlp_norm/scale', theirs + 'post_attention_layernorm.weight'),
      Weight(
        ours + 'attention/qkv',
        tuple(n + 'weight' for n in qkv),
        pack_qkv,
        unpack_qkv,
      ),
      Weight(
        ours + 'attention/out',
        (theirs + 'self_attn.o_proj.weight',),
        lambda x: x.T.reshape(K, M, H, D),
        lambda x: (x.reshape(-1, D).T,),
      ),
      Weight(
        ours + 'mlp/gate_up',
        (theirs + 'mlp.gate_proj.weight', theirs + 'mlp.up_proj.weight'),
        lambda gate, up: np.stack([gate.T, up.T], axis=1),
        lambda x: (x[:, 0].T, x[:, 1].T),
      ),
      transposed(ours + 'mlp/down', theirs + 'mlp.down_proj.weight'),
    ]
    if c.qkv_bias:
      weights.append(
        Weight(
          ours + 'attention/qkv_bias',
          tuple(n + 'bias' for n in qkv),
          pack_bias,
          unpack_bias,
        )
      )
  weights.append(same('norm/scale', 'model.norm.weight'))
  if not c.tie_embeddings:
    weights.append(transposed('head/kernel', 'lm_head.weight'))
  if c.value_head:  # ours; stock transformers passes over it
    weights.append(transposed('value_head/kernel', 'v_head.weight'))
  return weights


def _read_qwen2(j: dict) -> TransformerConfig:
  rope = j.get('rope_parameters') or {}
  kind = rope.get('rope_type', 'default')
  if kind != 'default' or j.get('rope_scaling'):
    raise ValueError(
      f'rope scaling {j.get("rope_scaling") or kind} is not supported yet'
    )
  if j.get('use_sliding_window'):
    raise ValueError('use_sliding_window is not supported yet')
  if j.get('hidden_act', 'silu') != 'silu':
    raise ValueError(
      f'hidden_act {j["hidden_act"]} is not supported; only silu'
    )
  heads = j['num_attention_heads']
  return TransformerConfig(
    vocab_size=j['vocab_size'],
    d_model=j['hidden_size'],
    num_layers=j['num_hidden_layers'],
    num_heads=heads,
    num_kv_heads=j.get('num_key_value_heads', heads),
    head_dim=j.get('head_dim') or j['hidden_size'] // heads,
    d_ff=j['intermediate_size'],
    rope_theta=rope.get('rope_theta', j.get('rope_theta', 10_000.0)),
    norm_eps=j.get('rms_norm_eps', 1e-6),
    tie_embeddings=j.get('tie_word_embeddings', False),
    qkv_bias=True,
    value_head=j.get('jaxrl_tok_value_head', False),
  )


def _write_qwen2(c: TransformerConfig) -> dict:
  if not c.qkv_bias or c.qk_norm or c.head_dim * c.num_heads != c.d_model:
    raise ValueError(
      'the Qwen2 layout holds decoders with qkv_bias, without qk_norm and '
      f'with num_heads * head_dim = d_model; this one is {c}'
    )
  return {
    'hidden_act': 'silu',
    'hidden_size': c.d_model,
    'intermediate_size': c.d_ff,
    'num_attention_heads': c.num_heads,
    'num_hidden_layers': c.num_layers,
    'num_key_value_heads': c.num_kv_heads,
    'rms_norm_eps': c.norm_eps,
    'rope_theta': c.rope_theta,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': c.rope_theta},
    'tie_word_embeddings': c.tie_embeddings,
    'use_sliding_window': False,
    'vocab_size': c.vocab_size,
    **({'jaxrl_tok_value_head': True} if c.value_head else {}),
  }


FAMILIES = {
  'qwen2': Family(
    'Qwen2ForCausalLM', 'qwen2', _read_qwen2, _write_qwen2, _decoder_weights
  ),
}


def family_of(config_json: dict, where: str) -> Family:
  """The entry for a config.json, or ValueError with the families there are."""
  kind = config_json.get('model_type')
  if kind not in FAMILIES:
    raise ValueError(
      f'{where}: model_type {kind!r} is not supported; '
      f'supported: {", ".join(FAMILIES)}'
    )
  return FAMILIES[kind]
