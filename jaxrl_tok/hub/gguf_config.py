"""config.json of a GGUF file, made from its metadata.

llama.cpp writes a model's sizes under `ARCHITECTURE.key`; a function for each
architecture turns them into the keys of Hugging Face's family. A value that
our network does not have is refused, never dropped.
"""

import math
from collections.abc import Callable

import numpy as np

from jaxrl_tok.hub import families
from jaxrl_tok.models.rope import make_rope

# numbers that change the mathematics in a way that no family here has
REFUSED = (
  'attention.clamp_kqv',
  'attention.max_alibi_bias',
  'attention.scale',
  'attention.temperature_scale',
  'embedding_scale',
  'expert_count',
  'logit_scale',
  'residual_scale',
)
# values that are none: {name: type}
NO_NUMBERS = {
  'rope.scaling.type': str,
  'attention.sliding_window_pattern': list,
}
# layers of Gemma's 27B models, whose attention is scaled by D / N
GEMMA_27B = {'gemma2': 46, 'gemma3': 62}
LONG = 'rope_factors_long.weight'


def _reader(meta: dict) -> Callable:
  """get(name, default) of the architecture's numbers; a list that is equal for
  all layers is its number. Raises ValueError for a number that is missing, and
  for anything that is none, save the names in NO_NUMBERS."""
  prefix = meta['general.architecture']

  def get(name, *default):
    value = meta.get(f'{prefix}.{name}', *default[:1])
    if value is None:
      if default:
        return None
      raise ValueError(f'no {prefix}.{name} in the metadata; convert it again')
    if isinstance(value, NO_NUMBERS.get(name, ())):
      return value
    if isinstance(value, list) and value and value == value[:1] * len(value):
      value = value[0]
    if not isinstance(value, int | float):
      raise ValueError(
        f'{prefix}.{name} is {str(value)[:40]}, not one number; use the '
        'Hugging Face directory of the model'
      )
    return value

  return get


# --- rotary positions --------------------------------------------------------


def _llama3(factors, theta: float, head_dim: int) -> dict:
  """Recovers Llama 3.1's numbers from the factors that divide frequencies.

  A pair of w turns per original context keeps the share (w - 1) / (4 - 1) of
  its frequency, cut to [0, 1]; a pair on that ramp gives the context. Raises
  ValueError for factors of any other rule.
  """
  factors = np.asarray(factors, np.float64)
  factor = float(factors.max())
  speed = theta ** -(np.arange(0, head_dim, 2) / head_dim)
  found = {'rope_type': 'llama3', 'factor': float(str(np.float32(factor)))}
  found |= {'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
  context = 8192
  if factors.shape == speed.shape and factor > 1:
    keep = (1 / factors - 1 / factor) / (1 - 1 / factor)
    ramp = (keep > 1e-3) & (keep < 1 - 1e-3)
    if ramp.any():
      turns = 1 + 3 * keep[ramp]
      context = round(float(np.median(2 * math.pi * turns / speed[ramp])))
  found['original_max_position_embeddings'] = context
  rope = make_rope(found | {'rope_theta': theta}, head_dim)
  ours = np.array(rope.frequencies)
  if factors.shape != speed.shape or not np.allclose(
    ours * factors, speed, rtol=1e-3, atol=0
  ):
    raise ValueError(
      "rope_freqs.weight holds other factors than Llama 3.1's rule gives; use "
      'the Hugging Face directory of the model'
    )
  return found


def _rope(get: Callable, factors, head_dim: int, theta: float = 1e4) -> dict:
  """rope_theta and, for a stretched context, rope_scaling."""
  theta = get('rope.freq_base', theta)
  found = {'rope_theta': theta}
  kind = get('rope.scaling.type', 'none')
  factor = get('rope.scaling.factor', get('rope.scale_linear', 1.0))
  if factors is not None:
    if np.ptp(factors) or factors[0] != 1:
      found['rope_scaling'] = _llama3(factors, theta, head_dim)
  elif kind == 'yarn':
    size = get('rope.scaling.yarn_attn_factor', 1.0)
    deep = get('rope.scaling.yarn_log_multiplier', 0.0)
    scaling = {
      'rope_type': 'yarn',
      'factor': factor,
      'original_max_position_embeddings': get(
        'rope.scaling.original_context_length'
      ),
      'beta_fast': get('rope.scaling.yarn_beta_fast', 32.0),
      'beta_slow': get('rope.scaling.yarn_beta_slow', 1.0),
    }
    if deep:
      scaling |= {'mscale': 1.0, 'mscale_all_dim': deep}
    elif size != 1:
      scaling['attention_factor'] = size * (0.1 * math.log(factor) + 1)
    found['rope_scaling'] = scaling
  elif kind not in ('none', 'linear'):
    raise ValueError(
      f'rope scaling {kind!r} is not supported; supported: none, linear, yarn '
      "and Llama 3.1's rope_freqs.weight"
    )
  elif factor != 1:
    found['rope_scaling'] = {'rope_type': 'linear', 'factor': factor}
  return found


# --- architectures -----------------------------------------------------------


def _decoder(get: Callable, factors, **own) -> dict:
  """Keys that all families with rotary positions share; `own` replaces."""
  D, N = get('embedding_length'), get('attention.head_count')
  for size in (D, N):
    if type(size) is not int or size < 1:
      raise ValueError(
        f'embedding_length {D} and head_count {N} must be numbers above zero; '
        'convert it again'
      )
  H = get('attention.key_length', D // N)
  if get('attention.value_length', H) != H:
    raise ValueError(
      f'key_length {H} and value_length {get("attention.value_length")} '
      'differ, which is not supported'
    )
  found = {
    'hidden_size': D,
    'intermediate_size': get('feed_forward_length'),
    'num_hidden_layers': get('block_count'),
    'num_attention_heads': N,
    'num_key_value_heads': get('attention.head_count_kv', N),
    'head_dim': H,
    'max_position_embeddings': get('context_length'),
    'rms_norm_eps': get('attention.layer_norm_rms_epsilon'),
    'hidden_act': 'silu',
  }
  return found | _rope(get, factors, H) | own


def _no_window(get: Callable) -> None:
  window = get('attention.sliding_window', 0)
  if window:
    raise ValueError(
      f'attention.sliding_window {window} is not supported in this '
      'architecture; use the Hugging Face directory of the model'
    )


def _llama(get: Callable, shapes: dict, factors) -> dict:
  """Llama, and Mistral where it has a window: they differ in no other way."""
  window = get('attention.sliding_window', 0)
  if window:
    own = {'model_type': 'mistral', 'sliding_window': window}
  else:
    own = {
      'model_type': 'llama',
      'attention_bias': 'blk.0.attn_q.bias' in shapes,
      'mlp_bias': 'blk.0.ffn_up.bias' in shapes,
    }
  return _decoder(get, factors, **own)


def _qwen2(get: Callable, shapes: dict, factors) -> dict:
  _no_window(get)
  return _decoder(get, factors, model_type='qwen2', use_sliding_window=False)


def _qwen3(get: Callable, shapes: dict, factors) -> dict:
  _no_window(get)
  return _decoder(get, factors, model_type='qwen3', use_sliding_window=False)


def _olmo2(get: Callable, shapes: dict, factors) -> dict:
  _no_window(get)  # Olmo 3's files say olmo2
  return _decoder(get, factors, model_type='olmo2')


def _gemma(get: Callable, factors, arch: str, period: int, window) -> dict:
  """Keys of both Gemmas; window None: every layer sees all."""
  found = _decoder(get, factors, hidden_activation='gelu_pytorch_tanh')
  del found['hidden_act']
  L = found['num_hidden_layers']
  pattern = get('attention.sliding_window_pattern', period)
  if isinstance(pattern, int):  # the last layer of each period sees all
    pattern = [(i + 1) % max(pattern, 1) != 0 for i in range(L)]
  kinds = np.where(pattern, 'sliding_attention', 'full_attention').tolist()
  if window is None:
    kinds = ['full_attention'] * L
  scalar = found['head_dim']
  if GEMMA_27B[arch] == L:
    scalar = found['hidden_size'] // found['num_attention_heads']
  return found | {
    'query_pre_attn_scalar': scalar,
    'sliding_window': window,
    'layer_types': kinds,
    'attn_logit_softcapping': None,
    'final_logit_softcapping': get('final_logit_softcapping', None),
  }


def _gemma2(get: Callable, shapes: dict, factors) -> dict:
  window = get('attention.sliding_window', 4096)
  return _gemma(get, factors, 'gemma2', 2, window) | {
    'model_type': 'gemma2',
    'attn_logit_softcapping': get('attn_logit_softcapping', 50.0),
    'final_logit_softcapping': get('final_logit_softcapping', 30.0),
  }


def _gemma3(get: Callable, shapes: dict, factors) -> dict:
  window = get('attention.sliding_window', 0) or None
  return _gemma(get, factors, 'gemma3', 6, window) | {
    'model_type': 'gemma3_text',
    'rope_theta': get('rope.freq_base', 1e6),
    'rope_local_base_freq': get('rope.freq_base_swa', 1e4),
  }


def _phi3(get: Callable, shapes: dict, factors) -> dict:
  if LONG in shapes:
    raise ValueError(
      "rope scaling 'longrope' is not supported: a token's angle depends on "
      'the length at hand; use the short-context model'
    )
  found = _decoder(get, factors, model_type='phi3')
  context, H = found['max_position_embeddings'], found['head_dim']
  return found | {
    'original_max_position_embeddings': get(
      'rope.scaling.original_context_length', context
    ),
    'partial_rotary_factor': get('rope.dimension_count', H) / H,
    'sliding_window': get('attention.sliding_window', 0) or None,
  }


def _gpt2(get: Callable, shapes: dict, factors) -> dict:
  return {
    'model_type': 'gpt2',
    'n_embd': get('embedding_length'),
    'n_layer': get('block_count'),
    'n_head': get('attention.head_count'),
    'n_inner': get('feed_forward_length'),
    'n_positions': get('context_length'),
    'layer_norm_epsilon': get('attention.layer_norm_epsilon'),
    'activation_function': 'gelu_new',
  }


ARCHITECTURES = {  # general.architecture -> (get, shapes, factors) -> keys
  'llama': _llama,
  'qwen2': _qwen2,
  'qwen3': _qwen3,
  'gemma2': _gemma2,
  'gemma3': _gemma3,
  'phi3': _phi3,
  'gpt2': _gpt2,
  'olmo2': _olmo2,
}


def check_architecture(meta: dict) -> None:
  arch = meta.get('general.architecture')
  if arch not in ARCHITECTURES:
    raise ValueError(
      f'GGUF architecture {arch!r} is not supported; supported: '
      f'{", ".join(ARCHITECTURES)}'
    )


def make_config(meta: dict, shapes: dict, factors=None) -> dict:
  """Metadata of a GGUF file -> config.json.

  Args:
    shapes: {tensor: shape}.
    factors: rope_freqs.weight, where the file has it.

  Raises ValueError, in one line, for a value that is missing or not supported.
  """
  check_architecture(meta)
  get = _reader(meta)
  for name in REFUSED:
    if get(name, None) not in (None, 0, 1):
      raise ValueError(
        f'{name} {get(name)} is not supported in this architecture; use '
        'another model'
      )
  if 'token_embd.weight' not in shapes:
    raise ValueError('no token_embd.weight; the file holds no whole model')
  layers = get('block_count')
  if type(layers) is not int or not 0 < layers <= len(shapes):
    raise ValueError(
      f'block_count {layers} does not fit a file of {len(shapes)} tensors; '
      'fetch it again'
    )
  found = ARCHITECTURES[meta['general.architecture']](get, shapes, factors)
  family = families.FAMILIES[found['model_type']]
  ids = {
    f'{ours}_token_id': meta.get(f'tokenizer.ggml.{theirs}_token_id')
    for ours, theirs in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding'))
  }
  return {
    'architectures': [family.hf_class],
    **found,
    'vocab_size': shapes['token_embd.weight'][0],
    'tie_word_embeddings': 'output.weight' not in shapes,
    **ids,
  }
