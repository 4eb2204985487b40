"""Places of a file's tensors inside the parameters of an encoder-decoder.

As layout.py; the file's modules have names of their own on each side.
"""

from jaxrl_tok.hub.layout import ParamMapping, in_rows, matrix, vector
from jaxrl_tok.models.encoder_decoder_config import (
  Buckets,
  EncoderDecoderConfig,
  StackConfig,
)

# --- names: ours -> the file's ----------------------------------------------

_T5_SIDE = {
  'layer': 'block.{}.',
  'attention': 'layer.0.SelfAttention.',
  'attention_norm': 'layer.0.layer_norm',
  'position_bias': 'block.0.layer.0.SelfAttention.relative_attention_bias',
  'norm': 'final_layer_norm',
  'q': 'q',
  'k': 'k',
  'v': 'v',
  'out': 'o',
  'gate_up': ('wi_0', 'wi_1'),
  'up': 'wi',
  'down': 'wo',
}
_T5_ENCODER = _T5_SIDE | {
  'mlp': 'layer.1.DenseReluDense.',
  'mlp_norm': 'layer.1.layer_norm',
}
_T5_DECODER = _T5_SIDE | {
  'cross_attention': 'layer.1.EncDecAttention.',
  'cross_attention_norm': 'layer.1.layer_norm',
  'mlp': 'layer.2.DenseReluDense.',
  'mlp_norm': 'layer.2.layer_norm',
}
T5 = {
  'base': '',
  'embed': 'shared',
  'head': 'lm_head',
  # other names of the embeddings, under which some files repeat them
  'copies': ('encoder.embed_tokens', 'decoder.embed_tokens'),
  'encoder': _T5_ENCODER,
  'decoder': _T5_DECODER,
}
_BART_SIDE = {
  'layer': 'layers.{}.',
  'attention': 'self_attn.',
  'attention_norm': 'self_attn_layer_norm',
  'cross_attention': 'encoder_attn.',
  'cross_attention_norm': 'encoder_attn_layer_norm',
  'mlp': '',
  'mlp_norm': 'final_layer_norm',
  'embed_norm': 'layernorm_embedding',
  'positions': 'embed_positions',
  'norm': 'layer_norm',
  'q': 'q_proj',
  'k': 'k_proj',
  'v': 'v_proj',
  'out': 'out_proj',
  'up': 'fc1',
  'down': 'fc2',
}
BART = {
  'base': 'model.',
  'embed': 'shared',
  'head': 'lm_head',
  'logit_bias': 'final_logits_bias',
  'copies': ('model.encoder.embed_tokens', 'model.decoder.embed_tokens'),
  'encoder': _BART_SIDE,
  'decoder': _BART_SIDE,
}


# --- parameters --------------------------------------------------------------


def _norm(c: StackConfig, path: str, name: str):
  yield vector(f'{path}/scale', f'{name}.weight', c.d_model)
  if c.norm == 'layer':
    yield vector(f'{path}/bias', f'{name}.bias', c.d_model)


def _heads(c: StackConfig, path: str, names: tuple):
  """Matrix [D, N, H] of one tensor, or [D, N, n, H] of n of them; its bias."""
  D, NH, n = c.d_model, c.num_heads * c.head_dim, len(names)

  def parts(x):  # [N, H] or [N, n, H], and then D, where it is the matrix
    return ((x,),) if n == 1 else tuple((x[:, i],) for i in range(n))

  def views(x):
    return parts(x.transpose(*range(1, x.ndim), 0))

  tensors = tuple((f'{name}.weight', (NH, D)) for name in names)
  yield ParamMapping(path, tensors, views, in_axes=1)
  if c.bias:
    tensors = tuple((f'{name}.bias', (NH,)) for name in names)
    yield ParamMapping(f'{path}_bias', tensors, parts)


def _output(c: StackConfig, path: str, name: str, n_in: int, in_axes=1):
  """Matrix [.., D] that writes to the residual, and its bias."""
  D = c.d_model
  yield matrix(path, f'{name}.weight', n_in, D, True, in_axes)
  if c.bias:
    yield vector(f'{path}_bias', f'{name}.bias', D)


def _attention(c: StackConfig, names: dict, part: str, path: str, base: str):
  q, k, v, out = (base + names[part] + names[n] for n in ('q', 'k', 'v', 'out'))
  path = f'{path}/{part}'
  if part == 'attention':
    yield from _heads(c, f'{path}/qkv', (q, k, v))
  else:
    yield from _heads(c, f'{path}/q', (q,))
    yield from _heads(c, f'{path}/kv', (k, v))
  n_in = c.num_heads * c.head_dim
  yield from _output(c, f'{path}/out', out, n_in, in_axes=3)


def _feed_forward(c: StackConfig, names: dict, path: str, base: str):
  base, D, F = base + names['mlp'], c.d_model, c.d_ff
  if c.gated:
    yield ParamMapping(
      f'{path}/mlp/gate_up',
      tuple((f'{base}{name}.weight', (F, D)) for name in names['gate_up']),
      lambda x: ((x[:, 0].T,), (x[:, 1].T,)),
      in_axes=1,
    )
  else:
    up = base + names['up']
    yield matrix(f'{path}/mlp/up', f'{up}.weight', D, F, True)
    if c.bias:
      yield vector(f'{path}/mlp/up_bias', f'{up}.bias', F)
  down = base + names['down']
  yield from _output(c, f'{path}/mlp/down', down, F)


def _layer(c: StackConfig, side: str, names: dict, base: str):
  attentions = ['attention']
  if side == 'decoder':
    attentions.append('cross_attention')
  path = f'{side}/layers'
  for part in (*attentions, 'mlp'):
    norm = f'{part}_norm'
    yield from _norm(c, f'{path}/{norm}', base + names[norm])
  for part in attentions:
    yield from _attention(c, names, part, path, base)
  yield from _feed_forward(c, names, path, base)


def _side(c: EncoderDecoderConfig, family, side: str):
  own, names = getattr(c, side), family.names[side]
  base = f'{family.names["base"]}{side}.'
  if isinstance(c.positions, Buckets):
    name, shape = names['position_bias'], (c.positions.count, own.num_heads)
    path = f'{side}/position_bias/embedding'
    yield matrix(path, f'{base}{name}.weight', *shape, False)
  if c.positions == 'learned':
    rows, name = c.position_offset + c.num_positions, names['positions']
    path = f'{side}/positions/embedding'
    yield matrix(path, f'{base}{name}.weight', rows, c.d_model, False)
  for name, there in (
    ('embed_norm', c.embedding_norm),
    ('norm', c.final_norm),
  ):
    if there:
      yield from _norm(own, f'{side}/{name}', base + names[name])
  layers = range(own.num_layers)
  base = base + names['layer']
  yield from in_rows(_layer(own, side, names, base.format(i)) for i in layers)


def param_mappings(c: EncoderDecoderConfig, family) -> list[ParamMapping]:
  """Places of all parameters of an encoder-decoder in a family's file.

  family: has names (families.Family).
  """
  names, V = family.names, c.vocab_size

  def table(path, name, rows):
    path = f'{path}/embedding'
    return matrix(path, f'{name}.weight', rows, c.d_model, False)

  found = [table('embed', names['base'] + names['embed'], V)]
  found += _side(c, family, 'encoder')
  found += _side(c, family, 'decoder')
  if c.logit_bias:
    tensor = names['logit_bias'], (1, V)
    path = 'logit_bias/bias'
    found.append(ParamMapping(path, (tensor,), lambda x: ((x[None],),)))
  if not c.tie_embeddings:
    found.append(table('head', names['head'], V))
  if c.value_head:  # our own: transformers skips it
    found.append(table('value_head', 'v_head', 1))
  return found
