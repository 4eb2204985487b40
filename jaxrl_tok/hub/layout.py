"""Places of a file's tensors inside the transformer's parameters.

A `ParamMapping` gives views of one of our parameters, in the file's order:
filled from the file they load it, read out they save it, so each way undoes
the other bitwise. A family (families.py) differs by a table of names and by
how its file fuses and turns matrices.
"""

import collections
import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from jaxrl_tok.models.blocks import TransformerConfig


class ParamMapping(NamedTuple):
  """Place of one of our parameters in the file.

  `views` maps the parameter to one tuple of views for each tensor; flattened
  and joined, they are the tensor. It keeps to this with any number of rows in
  place of the input axes, which an adapter's factor [r, ...] needs.
  """

  path: str  # of our parameter, 'layers/attention/qkv'
  tensors: tuple  # of (name, shape) in the file
  views: Callable  # parameter -> tuple, one of views for each tensor
  in_axes: int = 0  # leading axes that a product sums over; 0: no such matrix
  transposed: bool = True  # the file's matrices are [out, in]
  row: int | None = None  # of a stack [L, ...], one layer's; None: no stack

  def part(self, x):
    """Part of the leaf at `path` that is this parameter."""
    return x if self.row is None else x[self.row]


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


# --- parameters --------------------------------------------------------------


def vector(path: str, name: str, *shape: int) -> ParamMapping:
  """Parameter of any shape that the file stores as a vector."""
  tensor = name, (math.prod(shape),)
  return ParamMapping(path, (tensor,), lambda x: ((x,),))


def matrix(
  path: str, name: str, n_in: int, n_out: int, transposed: bool, in_axes=1
):
  """Parameter that is one matrix [in, out] when its axes are joined."""
  shape = (n_out, n_in) if transposed else (n_in, n_out)

  def views(x):
    x = x.reshape(-1, n_out)
    return ((x.T if transposed else x,),)

  return ParamMapping(path, ((name, shape),), views, in_axes, transposed)


def _norms(c: TransformerConfig, path: str, name: str):
  yield vector(f'{path}/scale', f'{name}.weight', c.d_model)
  if c.norm == 'layer':
    yield vector(f'{path}/bias', f'{name}.bias', c.d_model)


def _qkv(c: TransformerConfig, family, path: str, base: str):
  """Kernel of q, k and v [D, K, M + 2, H] and its bias [K, M + 2, H]."""
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
  yield ParamMapping(
    f'{path}/qkv', tuple(kernels), kernel_views, 1, family.transposed
  )
  if c.qkv_bias:
    biases = [(f'{name}.bias', (out,)) for name, out in zip(names, outs)]
    yield ParamMapping(f'{path}/qkv_bias', tuple(biases), bias_views)


def _attention(c: TransformerConfig, family, base: str):
  path, names = 'layers/attention', family.names
  K, M, H = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
  yield from _qkv(c, family, path, base)
  if c.qk_norm:
    heads = (K * M, K) if c.qk_norm == 'all' else (1, 1)
    for name, n in zip(('q_norm', 'k_norm'), heads):
      theirs = f'{base}{names[name]}.weight'
      yield vector(f'{path}/{name}/scale', theirs, n, H)
  out = base + names['out']
  n_in, transposed = K * M * H, family.transposed
  yield matrix(
    f'{path}/out', f'{out}.weight', n_in, c.d_model, transposed, in_axes=3
  )
  if c.out_bias:
    yield vector(f'{path}/out_bias', f'{out}.bias', c.d_model)


def _gate_up(c: TransformerConfig, family, path: str, base: str):
  """Kernel of gate and up [D, 2, F] and its bias [2, F]: two tensors, or one of
  all rows."""
  names, joined = family.names, 'gate_up' in family.names
  used = ['gate_up'] if joined else ['gate', 'up']
  rows = c.d_ff * (2 if joined else 1)

  def halves(*parts):
    return (parts,) if joined else tuple((part,) for part in parts)

  kernels = [(f'{base}{names[n]}.weight', (rows, c.d_model)) for n in used]
  yield ParamMapping(
    f'{path}/gate_up',
    tuple(kernels),
    lambda x: halves(x[:, 0].T, x[:, 1].T),
    in_axes=1,
  )
  if c.mlp_bias:
    biases = [(f'{base}{names[n]}.bias', (rows,)) for n in used]
    yield ParamMapping(
      f'{path}/gate_up_bias', tuple(biases), lambda x: halves(x[0], x[1])
    )


def _feed_forward(c: TransformerConfig, family, base: str):
  path, D, F = 'layers/mlp', c.d_model, c.d_ff
  if c.gated:
    yield from _gate_up(c, family, path, base)
  sides = [('down', F, D)] if c.gated else [('up', D, F), ('down', F, D)]
  for side, n_in, n_out in sides:
    name = base + family.names[side]
    yield matrix(
      f'{path}/{side}', f'{name}.weight', n_in, n_out, family.transposed
    )
    if c.mlp_bias:
      yield vector(f'{path}/{side}_bias', f'{name}.bias', n_out)


def _experts(c: TransformerConfig, family, base: str):
  """Router [D, E], gate/up [E, D, 2, F], down [E, F, D]: a file has three
  tensors for each expert."""
  path, names = 'layers/experts', family.names
  D, E, F = c.d_model, c.num_experts, c.expert_d_ff
  router = f'{base}{names["router"]}.weight'
  yield matrix(f'{path}/router', router, D, E, family.transposed)

  def tensor(e, side, *shape):
    return f'{base}{names["expert"].format(e, side)}.weight', shape

  yield ParamMapping(
    f'{path}/gate_up',
    tuple(tensor(e, n, F, D) for e in range(E) for n in ('gate', 'up')),
    lambda x: tuple((x[e, :, j].T,) for e in range(E) for j in (0, 1)),
  )
  yield ParamMapping(
    f'{path}/down',
    tuple(tensor(e, 'down', D, F) for e in range(E)),
    lambda x: tuple((x[e].T,) for e in range(E)),
  )


def _block(c: TransformerConfig, family, i: int):
  names = family.names
  base = names['base'] + names['layer'].format(i)
  for norm, there in (('norm', c.pre_norm), ('post_norm', c.post_norm)):
    for part in ('attention', 'mlp') if there else ():
      name = f'{part}_{norm}'
      yield from _norms(c, f'layers/{name}', base + names[name])
  yield from _attention(c, family, base)
  inner = _experts if c.layers[i].routed else _feed_forward
  yield from inner(c, family, base)


def in_rows(layers: Iterable) -> list[ParamMapping]:
  """Numbers the mappings of each parameter by the layers that have it: rows of
  its stack."""
  found, rows = [], collections.Counter()
  for mapping in itertools.chain.from_iterable(layers):
    found.append(mapping._replace(row=rows[mapping.path]))
    rows[mapping.path] += 1
  return found


def param_mappings(c: TransformerConfig, family) -> list[ParamMapping]:
  """Places of all parameters of a transformer in a family's file.

  family: has names, fused and transposed (families.Family).
  """
  names, V = family.names, c.vocab_size

  def table(path, name, rows):
    return matrix(f'{path}/embedding', f'{name}.weight', rows, c.d_model, False)

  found = [table('embed', names['base'] + names['embed'], V)]
  if c.learned_positions:
    name = names['base'] + names['positions']
    found.append(table('positions', name, c.max_length))
  found += in_rows(_block(c, family, i) for i in range(c.num_layers))
  found += _norms(c, 'norm', names['base'] + names['norm'])
  if c.lm_head and not c.tie_embeddings:
    found.append(table('head', names['head'], V))
  if c.value_head:  # a classifier's, or our own: transformers skips v_head
    found.append(table('value_head', 'v_head' if c.lm_head else 'score', 1))
  return found
