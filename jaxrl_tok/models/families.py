"""Hugging Face decoder families: what their config.json means, and where the
file's tensors lie inside our parameters.

One entry a family: a function that reads the configuration and a table of
names. A `Weight` gives views of one of our parameters, in the file's order:
filled from the file they load it, read out they save it, so each way undoes
the other bitwise. transformers' own configuration classes supply defaults and
translate older keys.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from jaxrl_tok.models.rope import make_rope
from jaxrl_tok.models.transformer import Layer, TransformerConfig


class Weight(NamedTuple):
  """Where one of our parameters lies in the file.

  `views` maps the parameter to one tuple of views for each tensor; flattened
  and joined, they are the tensor.
  """

  path: str  # of our parameter, 'layer_0/attention/qkv'
  tensors: tuple  # of (name, shape) in the file
  views: Callable  # parameter -> tuple, one of views for each tensor


# --- names: ours -> the file's ----------------------------------------------

DECODER = {  # llama's names, which most share
  'base': 'model.',
  'layer': 'layers.{}.',
  'embed': 'embed_tokens',
  'norm': 'norm',
  'head': 'lm_head',
  'attention_norm': 'input_layernorm',
  'mlp_norm': 'post_attention_layernorm',
  'q': 'self_attn.q_proj',
  'k': 'self_attn.k_proj',
  'v': 'self_attn.v_proj',
  'q_norm': 'self_attn.q_norm',
  'k_norm': 'self_attn.k_norm',
  'out': 'self_attn.o_proj',
  'gate': 'mlp.gate_proj',
  'up': 'mlp.up_proj',
  'down': 'mlp.down_proj',
  'router': 'mlp.gate',
  'expert': 'mlp.experts.{}.{}_proj',
}
POST_NORMED = DECODER | {
  'attention_post_norm': 'post_attention_layernorm',
  'mlp_norm': 'pre_feedforward_layernorm',
  'mlp_post_norm': 'post_feedforward_layernorm',
}
GPT2 = {
  'base': 'transformer.',
  'layer': 'h.{}.',
  'embed': 'wte',
  'positions': 'wpe',
  'norm': 'ln_f',
  'head': 'lm_head',
  'attention_norm': 'ln_1',
  'mlp_norm': 'ln_2',
  'qkv': 'attn.c_attn',
  'out': 'attn.c_proj',
  'up': 'mlp.c_fc',
  'down': 'mlp.c_proj',
}
GPT_NEOX = {
  'base': 'gpt_neox.',
  'layer': 'layers.{}.',
  'embed': 'embed_in',
  'norm': 'final_layer_norm',
  'head': 'embed_out',
  'attention_norm': 'input_layernorm',
  'mlp_norm': 'post_attention_layernorm',
  'qkv': 'attention.query_key_value',
  'out': 'attention.dense',
  'up': 'mlp.dense_h_to_4h',
  'down': 'mlp.dense_4h_to_h',
}


class Family(NamedTuple):
  architecture: str  # config.json's architectures[0]
  example: str  # a hub id
  read: Callable  # transformers' configuration -> TransformerConfig
  names: dict = DECODER
  # how q, k and v are one tensor. None: they are three; 'rows': all of q, then
  # k, then v; 'heads': q k v of each head in turn; 'columns': rows, [in, out]
  fused: str | None = None
  transposed: bool = True  # matrices are stored [out, in]
  buffers: str = r'rotary_emb\.inv_freq$'  # of older files: no parameters


# --- weights -----------------------------------------------------------------


def _vector(path: str, name: str, *shape: int) -> Weight:
  """A parameter of ours, of any shape, that the file stores as a vector."""
  tensor = name, (math.prod(shape),)
  return Weight(path, (tensor,), lambda x: ((x,),))


def _matrix(path: str, name: str, n_in: int, n_out: int, transposed: bool):
  """A matrix of ours, [in, out] when its axes are joined."""
  shape = (n_out, n_in) if transposed else (n_in, n_out)

  def views(x):
    x = x.reshape(n_in, n_out)
    return ((x.T if transposed else x,),)

  return Weight(path, ((name, shape),), views)


def _norms(c: TransformerConfig, path: str, name: str):
  yield _vector(f'{path}/scale', f'{name}.weight', c.d_model)
  if c.norm == 'layer':
    yield _vector(f'{path}/bias', f'{name}.bias', c.d_model)


def _qkv(c: TransformerConfig, family: Family, path: str, base: str):
  """q/k/v [D, K, M + 2, H] and its bias [K, M + 2, H]."""
  D, N, K, H = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
  M, fused = N // K, family.fused

  def views(x):  # [K, M + 2, H] and then D, where it is the kernel
    parts = x[:, :M], x[:, M], x[:, M + 1]
    if fused == 'heads':
      return ((x,),)
    return (parts,) if fused else tuple((part,) for part in parts)

  def kernel_views(x):
    if fused == 'columns':  # K = N
      return ((x.transpose(0, 2, 1, 3),),)
    return views(x.transpose(1, 2, 3, 0))

  def bias_views(x):
    return ((x.swapaxes(0, 1),),) if fused == 'columns' else views(x)

  names = [base + family.names[n] for n in (('qkv',) if fused else 'qkv')]
  outs = ((N + 2 * K) * H,) if fused else (N * H, K * H, K * H)
  kernels = [
    (f'{name}.weight', (D, out) if fused == 'columns' else (out, D))
    for name, out in zip(names, outs)
  ]
  yield Weight(f'{path}/qkv', tuple(kernels), kernel_views)
  if c.qkv_bias:
    biases = [(f'{name}.bias', (out,)) for name, out in zip(names, outs)]
    yield Weight(f'{path}/qkv_bias', tuple(biases), bias_views)


def _attention(c: TransformerConfig, family: Family, i: int, base: str):
  path, names = f'layer_{i}/attention', family.names
  K, M, H = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
  yield from _qkv(c, family, path, base)
  if c.qk_norm:
    heads = (K * M, K) if c.qk_norm == 'all' else (1, 1)
    for name, n in zip(('q_norm', 'k_norm'), heads):
      theirs = f'{base}{names[name]}.weight'
      yield _vector(f'{path}/{name}/scale', theirs, n, H)
  out = base + names['out']
  yield _matrix(
    f'{path}/out', f'{out}.weight', K * M * H, c.d_model, family.transposed
  )
  if c.out_bias:
    yield _vector(f'{path}/out_bias', f'{out}.bias', c.d_model)


def _gate_up(c: TransformerConfig, family: Family, path: str, base: str):
  """gate/up [D, 2, F] and its bias [2, F]: two tensors, or one of all rows."""
  names, joined = family.names, 'gate_up' in family.names
  used = ['gate_up'] if joined else ['gate', 'up']
  rows = c.d_ff * (2 if joined else 1)

  def halves(*parts):
    return (parts,) if joined else tuple((part,) for part in parts)

  kernels = [(f'{base}{names[n]}.weight', (rows, c.d_model)) for n in used]
  yield Weight(
    f'{path}/gate_up',
    tuple(kernels),
    lambda x: halves(x[:, 0].T, x[:, 1].T),
  )
  if c.mlp_bias:
    biases = [(f'{base}{names[n]}.bias', (rows,)) for n in used]
    yield Weight(
      f'{path}/gate_up_bias', tuple(biases), lambda x: halves(x[0], x[1])
    )


def _feed_forward(c: TransformerConfig, family: Family, i: int, base: str):
  path, D, F = f'layer_{i}/mlp', c.d_model, c.d_ff
  if c.gated:
    yield from _gate_up(c, family, path, base)
  sides = [('down', F, D)] if c.gated else [('up', D, F), ('down', F, D)]
  for side, n_in, n_out in sides:
    name = base + family.names[side]
    yield _matrix(
      f'{path}/{side}', f'{name}.weight', n_in, n_out, family.transposed
    )
    if c.mlp_bias:
      yield _vector(f'{path}/{side}_bias', f'{name}.bias', n_out)


def _experts(c: TransformerConfig, family: Family, i: int, base: str):
  """Router [D, E], gate/up [E, D, 2, F], down [E, F, D]: a file has three
  tensors for each expert."""
  path, names = f'layer_{i}/experts', family.names
  D, E, F = c.d_model, c.num_experts, c.expert_d_ff
  router = f'{base}{names["router"]}.weight'
  yield _matrix(f'{path}/router', router, D, E, family.transposed)

  def tensor(e, side, *shape):
    return f'{base}{names["expert"].format(e, side)}.weight', shape

  yield Weight(
    f'{path}/gate_up',
    tuple(tensor(e, n, F, D) for e in range(E) for n in ('gate', 'up')),
    lambda x: tuple((x[e, :, j].T,) for e in range(E) for j in (0, 1)),
  )
  yield Weight(
    f'{path}/down',
    tuple(tensor(e, 'down', D, F) for e in range(E)),
    lambda x: tuple((x[e].T,) for e in range(E)),
  )


def _block(c: TransformerConfig, family: Family, i: int):
  names = family.names
  base = names['base'] + names['layer'].format(i)
  for norm, there in (('norm', c.pre_norm), ('post_norm', c.post_norm)):
    for part in ('attention', 'mlp') if there else ():
      name = f'{part}_{norm}'
      yield from _norms(c, f'layer_{i}/{name}', base + names[name])
  yield from _attention(c, family, i, base)
  inner = _experts if c.layers[i].routed else _feed_forward
  yield from inner(c, family, i, base)


def weights(c: TransformerConfig, family: Family) -> list[Weight]:
  """Every parameter of the decoder, and where it lies in the file."""
  names, V = family.names, c.vocab_size

  def table(path, name, rows):
    return _matrix(
      f'{path}/embedding', f'{name}.weight', rows, c.d_model, False
    )

  found = [table('embed', names['base'] + names['embed'], V)]
  if c.learned_positions:
    name = names['base'] + names['positions']
    found.append(table('positions', name, c.max_length))
  for i in range(c.num_layers):
    found += _block(c, family, i)
  found += _norms(c, 'norm', names['base'] + names['norm'])
  if c.lm_head and not c.tie_embeddings:
    found.append(table('head', names['head'], V))
  if c.value_head:  # a classifier's, or our own: transformers skips v_head
    found.append(table('value_head', 'v_head' if c.lm_head else 'score', 1))
  return found


# --- configurations ----------------------------------------------------------

ACTIVATIONS = {  # theirs -> ours
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
}


def _refuse_unless(j, **wanted) -> None:
  for name, value in wanted.items():
    found = getattr(j, name, value)
    if found != value:
      raise ValueError(f'{name} {found} is not supported; only {value}')


def _activation(name: str) -> str:
  if name not in ACTIVATIONS:
    raise ValueError(
      f'activation {name!r} is not supported; supported: '
      f'{", ".join(ACTIVATIONS)}'
    )
  return ACTIVATIONS[name]


def _head_dim(j) -> int:
  return getattr(j, 'head_dim', None) or j.hidden_size // j.num_attention_heads


def _layers(j) -> tuple:
  """What rope_parameters, layer_types and no_rope_layers say of each layer."""
  L, window = j.num_hidden_layers, getattr(j, 'sliding_window', None)
  if not getattr(j, 'use_sliding_window', True):
    window = None
  everywhere = 'sliding_attention' if window else 'full_attention'
  kinds = getattr(j, 'layer_types', None) or [everywhere] * L
  for kind in sorted(set(kinds) - {'sliding_attention', 'full_attention'}):
    raise ValueError(f'layer_types {kind} is not supported')
  ropes = j.rope_parameters
  if not isinstance(ropes.get(kinds[0]), dict):  # one for all kinds
    ropes = dict.fromkeys(kinds, ropes)
  made = {kind: make_rope(ropes[kind], _head_dim(j)) for kind in set(kinds)}
  turned = getattr(j, 'no_rope_layers', None) or [1] * L
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
  """What all families with rotary positions share, and what is `own`."""
  if getattr(j, 'use_bidirectional_attention', None):
    raise ValueError('use_bidirectional_attention is not supported')
  N = j.num_attention_heads
  bias = getattr(j, 'attention_bias', False)
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
    'mlp_bias': getattr(j, 'mlp_bias', False),
    'activation': _activation(name),
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
  _refuse_unless(
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
    activation=_activation(j.activation_function),
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
}


def family_of(described: dict) -> Family:
  """The entry for a config.json, or ValueError with the families there are."""
  kind = described.get('model_type')
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


def _check_sizes(described: dict, theirs: dict) -> None:
  """theirs: {a size: what this family calls it}."""
  for size in SIZES:
    for name in (size, theirs.get(size, size)):
      found = described.get(name)
      if found is None:
        continue
      if type(found) not in (int, float) or found <= 0:
        raise ValueError(
          f'config.json: {name} is {found!r}, not a number above zero'
        )
    if found is None and size in REQUIRED:
      raise ValueError(f'config.json has no {name!r}; fetch it again')


def read_config(described: dict) -> TransformerConfig:
  """config.json as a dict -> TransformerConfig.

  Raises ValueError, in one line, for what it lacks or we do not do.
  """
  from transformers import CONFIG_MAPPING
  from transformers.utils import logging

  family = family_of(described)
  if described.get('auto_map'):
    raise ValueError(
      'config.json asks for code of its own (auto_map), which is never run; '
      f'remove auto_map where the weights are those of a {family.architecture}'
    )
  if described.get('quantization_config'):
    raise ValueError(
      'the weights are quantized (quantization_config); use the model they '
      'were made from'
    )
  kind = CONFIG_MAPPING[described['model_type']]
  _check_sizes(described, kind.attribute_map)
  architecture = described.get('architectures') or family.architecture
  if isinstance(architecture, list):
    architecture = architecture[0]
  classifier = str(architecture).endswith('ForSequenceClassification')
  if not classifier and architecture != family.architecture:
    raise ValueError(
      f'architecture {architecture} is not supported; supported: '
      f'{family.architecture} and ForSequenceClassification of one label'
    )
  said = logging.get_verbosity()
  logging.set_verbosity_error()  # advice on its own classes
  try:
    given = copy.deepcopy(described)
    scaling = given.get('rope_scaling')
    if isinstance(scaling, dict) and 'type' in scaling:  # its older name, which
      scaling.setdefault('rope_type', scaling['type'])  # gemma3 passes over
    j = kind.from_dict(given)
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
  elif described.get('jaxrl_tok_value_head'):
    config = dataclasses.replace(config, value_head=True)
  return config
