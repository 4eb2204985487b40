"""Meaning of the config.json of Hugging Face's families.

One entry a family: the architecture, a function that reads the configuration,
and a table of names (layout.py). transformers' own configuration classes
supply defaults and translate older keys.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from jaxrl_tok.hub import seq2seq_families as seq2seq
from jaxrl_tok.hub.architecture import (
  ENCODER_DECODER,
  TRANSFORMER,
  Architecture,
)
from jaxrl_tok.hub.config_fields import activation, refuse_unless
from jaxrl_tok.hub.layout import DECODER, GPT2, GPT_NEOX, POST_NORMED
from jaxrl_tok.hub.seq2seq_layout import BART, T5
from jaxrl_tok.models.blocks import Layer, TransformerConfig
from jaxrl_tok.models.rope import make_rope


class Family(NamedTuple):
  """Models whose config.json has one model_type."""

  hf_class: str  # config.json's architectures[0]
  example: str  # a hub id
  read: Callable  # transformers' configuration -> the architecture's
  names: dict = DECODER
  # how q, k and v are one tensor. None: they are three; 'rows': all of q, then
  # k, then v; 'heads': q k v of each head in turn; 'columns': rows, [in, out]
  fused: str | None = None
  transposed: bool = True  # matrices are stored [out, in]
  buffers: str = r'rotary_emb\.inv_freq$'  # of older files: no parameters
  architecture: Architecture = TRANSFORMER
  optional: str = r'$^'  # parameters that a file may lack: zeros
  also: tuple = ()  # other classes of config.json with these parameters


def _head_dim(j) -> int:
  return getattr(j, 'head_dim', None) or j.hidden_size // j.num_attention_heads


def _declared(j, name: str, default):
  """Reads a setting that the family has; another family's key is ignored."""
  known = {field.name for field in dataclasses.fields(j)}
  return getattr(j, name) if name in known else default


def _layers(j) -> tuple:
  """Reads rope_parameters, layer_types and no_rope_layers: a Layer each."""
  L, window = j.num_hidden_layers, _declared(j, 'sliding_window', None)
  if not _declared(j, 'use_sliding_window', True):
    window = None
  everywhere = 'sliding_attention' if window else 'full_attention'
  kinds = _declared(j, 'layer_types', None) or [everywhere] * L
  for kind in sorted(set(kinds) - {'sliding_attention', 'full_attention'}):
    raise ValueError(f'layer_types {kind} is not supported')
  ropes = j.rope_parameters
  if not isinstance(ropes.get(kinds[0]), dict):  # one for all kinds
    ropes = dict.fromkeys(kinds, ropes)
  made = {kind: make_rope(ropes[kind], _head_dim(j)) for kind in set(kinds)}
  turned = _declared(j, 'no_rope_layers', None) or [1] * L
  if len(turned) != L:
    raise ValueError(f'no_rope_layers has {len(turned)} layers, not {L}')
  return tuple(
    Layer(
      made[kind] if turn else None,
      window if kind == 'sliding_attention' else None,
    )
    for kind, turn in zip(kinds, turned, strict=True)
  )


def _read(j, **own) -> TransformerConfig:
  """Reads what all families with rotary positions share; `own` replaces."""
  if _declared(j, 'use_bidirectional_attention', None):
    raise ValueError('use_bidirectional_attention is not supported')
  N = j.num_attention_heads
  bias = _declared(j, 'attention_bias', False)
  name = getattr(j, 'hidden_activation', None) or j.hidden_act
  fields = {
    'vocab_size': j.vocab_size,
    'd_model': j.hidden_size,
    'num_heads': N,
    'num_kv_heads': getattr(j, 'num_key_value_heads', None) or N,
    'head_dim': _head_dim(j),
    'd_ff': j.intermediate_size,
    'layers': _layers(j),
    'max_length': j.max_position_embeddings,
    'norm_eps': getattr(j, 'rms_norm_eps', None),
    'qkv_bias': bias,
    'out_bias': bias,
    'mlp_bias': _declared(j, 'mlp_bias', False),
    'activation': activation(name),
    'tie_embeddings': j.tie_word_embeddings,
  }
  return TransformerConfig(**(fields | own))


def _read_gemma(j, **own) -> TransformerConfig:
  return _read(
    j,
    norm='rms_plus_one',
    post_norm=True,
    embedding_scale=j.hidden_size**0.5,
    attention_scale=j.query_pre_attn_scalar**-0.5,
    attention_cap=j.attn_logit_softcapping,
    logit_cap=j.final_logit_softcapping,
    **own,
  )


def _read_gpt2(j) -> TransformerConfig:
  refuse_unless(
    j,
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    add_cross_attention=False,
  )
  return TransformerConfig(
    vocab_size=j.vocab_size,
    d_model=j.n_embd,
    num_heads=j.n_head,
    num_kv_heads=j.n_head,
    head_dim=j.n_embd // j.n_head,
    d_ff=j.n_inner or 4 * j.n_embd,
    layers=(Layer(None),) * j.n_layer,
    max_length=j.n_positions,
    learned_positions=True,
    norm='layer',
    norm_eps=j.layer_norm_epsilon,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    activation=activation(j.activation_function),
    gated=False,
    tie_embeddings=j.tie_word_embeddings,
  )


def _read_gpt_neox(j) -> TransformerConfig:
  return _read(
    j,
    norm='layer',
    norm_eps=j.layer_norm_eps,
    parallel=j.use_parallel_residual,
    mlp_bias=True,
    gated=False,
  )


def _read_qwen3_moe(j) -> TransformerConfig:
  if j.num_experts_per_tok > j.num_experts:
    raise ValueError(
      f'num_experts_per_tok {j.num_experts_per_tok} is more than the '
      f'{j.num_experts} experts'
    )
  every, dense = j.decoder_sparse_step, j.mlp_only_layers
  return _read(
    j,
    qk_norm='head',
    layers=tuple(
      dataclasses.replace(layer, routed=i not in dense and (i + 1) % every == 0)
      for i, layer in enumerate(_layers(j))
    ),
    num_experts=j.num_experts,
    experts_per_token=j.num_experts_per_tok,
    expert_d_ff=j.moe_intermediate_size,
    normalize_experts=j.norm_topk_prob,
  )


T5_BUFFERS = r'EncDecAttention\.relative_attention_bias\.weight$'
BART_BUFFERS = r'(en|de)coder\.version$'
BART_OPTIONAL = r'^final_logits_bias$'
FAMILIES = {
  'llama': Family('LlamaForCausalLM', 'meta-llama/Llama-3.2-1B', _read),
  'mistral': Family(
    'MistralForCausalLM', 'mistralai/Mistral-7B-Instruct-v0.3', _read
  ),
  'qwen2': Family(
    'Qwen2ForCausalLM',
    'Qwen/Qwen2.5-0.5B-Instruct',
    lambda j: _read(j, qkv_bias=True),
  ),
  'qwen3': Family(
    'Qwen3ForCausalLM',
    'Qwen/Qwen3-0.6B',
    lambda j: _read(j, qk_norm='head'),
  ),
  'qwen3_moe': Family(
    'Qwen3MoeForCausalLM', 'Qwen/Qwen3-30B-A3B', _read_qwen3_moe
  ),
  'gemma2': Family(
    'Gemma2ForCausalLM', 'google/gemma-2-2b-it', _read_gemma, POST_NORMED
  ),
  'gemma3_text': Family(
    'Gemma3ForCausalLM',
    'google/gemma-3-1b-it',
    lambda j: _read_gemma(j, qk_norm='head'),
    POST_NORMED,
  ),
  'olmo2': Family(
    'Olmo2ForCausalLM',
    'allenai/OLMo-2-0425-1B',
    lambda j: _read(j, qk_norm='all', pre_norm=False, post_norm=True),
    POST_NORMED,
  ),
  'phi3': Family(
    'Phi3ForCausalLM',
    'microsoft/phi-4',
    _read,
    DECODER | {'qkv': 'self_attn.qkv_proj', 'gate_up': 'mlp.gate_up_proj'},
    fused='rows',
  ),
  'smollm3': Family('SmolLM3ForCausalLM', 'HuggingFaceTB/SmolLM3-3B', _read),
  'gpt2': Family(
    'GPT2LMHeadModel',
    'openai-community/gpt2',
    _read_gpt2,
    GPT2,
    fused='columns',
    transposed=False,
    buffers=r'attn\.(masked_)?bias$',
  ),
  'gpt_neox': Family(
    'GPTNeoXForCausalLM',
    'EleutherAI/pythia-70m',
    _read_gpt_neox,
    GPT_NEOX,
    fused='heads',
    buffers=r'attention\.(masked_)?bias$|rotary_emb\.inv_freq$',
  ),
  't5': Family(
    'T5ForConditionalGeneration',
    'google/flan-t5-small',
    seq2seq.read_t5,
    T5,
    buffers=T5_BUFFERS,
    architecture=ENCODER_DECODER,
    also=('T5WithLMHeadModel',),
  ),
  'mt5': Family(
    'MT5ForConditionalGeneration',
    'google/mt5-small',
    seq2seq.read_mt5,
    T5,
    buffers=T5_BUFFERS,
    architecture=ENCODER_DECODER,
  ),
  'bart': Family(
    'BartForConditionalGeneration',
    'facebook/bart-large-cnn',
    seq2seq.read_bart,
    BART,
    buffers=BART_BUFFERS,
    architecture=ENCODER_DECODER,
    optional=BART_OPTIONAL,
    also=('BartModel',),
  ),
  'mbart': Family(
    'MBartForConditionalGeneration',
    'facebook/mbart-large-en-ro',
    seq2seq.read_mbart,
    BART,
    buffers=BART_BUFFERS,
    architecture=ENCODER_DECODER,
    optional=BART_OPTIONAL,
  ),
  'marian': Family(
    'MarianMTModel',
    'Helsinki-NLP/opus-mt-en-de',
    seq2seq.read_marian,
    BART,
    buffers=BART_BUFFERS + r'|embed_positions\.weight$',
    architecture=ENCODER_DECODER,
    optional=BART_OPTIONAL,
  ),
}


def family_of(hf_config: dict) -> Family:
  """Looks up the family of a config.json. Raises ValueError, with the families
  there are, for any other model_type."""
  kind = hf_config.get('model_type')
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise ValueError(
      f'model_type {kind!r} is not supported; supported: {", ".join(FAMILIES)}'
    )
  return FAMILIES[kind]


REQUIRED = (
  'vocab_size',
  'hidden_size',
  'num_hidden_layers',
  'num_attention_heads',
)
SIZES = REQUIRED + (
  'num_key_value_heads',
  'head_dim',
  'intermediate_size',
  'max_position_embeddings',
  'query_pre_attn_scalar',
  'decoder_sparse_step',
  'moe_intermediate_size',
  'num_experts',
  'num_experts_per_tok',
)


def _check_sizes(hf_config: dict, theirs: dict) -> None:
  """Raises ValueError for a size that is missing or not above zero.

  theirs: {size: its name in this family}.
  """
  for size in SIZES:
    for name in (size, theirs.get(size, size)):
      found = hf_config.get(name)
      if found is None:
        continue
      if type(found) not in (int, float) or found <= 0:
        raise ValueError(
          f'config.json: {name} is {found!r}, not a number above zero'
        )
    if found is None and size in REQUIRED:
      raise ValueError(f'config.json has no {name!r}; fetch it again')


def _is_classifier(hf_config: dict, family: Family) -> bool:
  """Tells a classifier from a model that writes, by config.json's
  architectures; ValueError for any other."""
  name = hf_config.get('architectures') or family.hf_class
  if isinstance(name, list):
    name = name[0]
  classifier = str(name).endswith('ForSequenceClassification')
  if not classifier and name not in (family.hf_class, *family.also):
    raise ValueError(
      f'architecture {name} is not supported; supported: '
      f'{family.hf_class} and ForSequenceClassification of one label'
    )
  return classifier


def classifier_name(hf_config: dict) -> str:
  """Name of the family's class that scores a text."""
  from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES,
  )

  return NAMES[hf_config['model_type']]


def read_config(hf_config: dict):
  """config.json as a dict -> configuration of the family's architecture.

  Raises ValueError, in one line, for a key that is missing or not supported.
  """
  from transformers import CONFIG_MAPPING
  from transformers.utils import logging

  family = family_of(hf_config)
  if hf_config.get('auto_map'):
    raise ValueError(
      'config.json asks for code of its own (auto_map), which is never run; '
      f'remove auto_map where the weights are those of a {family.hf_class}'
    )
  if hf_config.get('quantization_config'):
    raise ValueError(
      'the weights are quantized (quantization_config); use the model they '
      'were made from'
    )
  kind = CONFIG_MAPPING[hf_config['model_type']]
  _check_sizes(hf_config, kind.attribute_map)
  classifier = _is_classifier(hf_config, family)
  said = logging.get_verbosity()
  logging.set_verbosity_error()  # advice on its own classes
  try:
    given = copy.deepcopy(hf_config)
    scaling = given.get('rope_scaling')
    if isinstance(scaling, dict) and 'type' in scaling:  # its older name, which
      scaling.setdefault('rope_type', scaling['type'])  # gemma3 passes over
    j = kind.from_dict(given)
    for name in seq2seq.START:  # settings of generation, which it drops
      setattr(j, name, given.get(name, getattr(j, name, None)))
    config = family.read(j)
  except Exception as e:  # its validators raise errors of many kinds
    raise ValueError(f'config.json: {" ".join(str(e).split())}') from None
  finally:
    logging.set_verbosity(said)
  if classifier:
    if j.num_labels != 1:
      raise ValueError(
        f'a classifier of {j.num_labels} labels is no reward model; it must '
        'have one'
      )
    config = dataclasses.replace(config, lm_head=False, value_head=True)
  elif hf_config.get('jaxrl_tok_value_head'):
    config = dataclasses.replace(config, value_head=True)
  return config
