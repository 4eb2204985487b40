"""GGUF files, llama.cpp's: read as a Hugging Face directory, without torch.

1. `parse` reads the metadata and the table of tensors, and checks that the
   file is whole.
2. `read` makes the small files of a directory of it (config.json, tokenizer)
   and gives its tensors the names, shapes and layout of Hugging Face's.
3. Rows of a tensor are dequantized when they are asked for; the bytes stay in
   the file until then.
"""

import dataclasses
import functools
import json
import math
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrl_tok.hub import families, fetch, gguf_config, gguf_tokenizer

VERSIONS = 2, 3
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), 'BbHhIif?Qqd'))
STRING, ARRAY = 8, 9
FACTORS = 'rope_freqs.weight'
FAULTS = (  # of reading what is no header
  *(ValueError, struct.error, RecursionError),
  *(TypeError, ZeroDivisionError, MemoryError),
)
KEPT = {'F32', 'F16', 'BF16'}  # dtypes that safetensors has, too

# names of modules: a family's (layout.py) -> llama.cpp's
NAMES = {
  'embed': 'token_embd',
  'positions': 'position_embd',
  'norm': 'output_norm',
  'head': 'output',
  'attention_norm': 'blk.{}.attn_norm',
  'attention_post_norm': 'blk.{}.post_attention_norm',
  'mlp_norm': 'blk.{}.ffn_norm',
  'mlp_post_norm': 'blk.{}.post_ffw_norm',
  'q': 'blk.{}.attn_q',
  'k': 'blk.{}.attn_k',
  'v': 'blk.{}.attn_v',
  'qkv': 'blk.{}.attn_qkv',
  'q_norm': 'blk.{}.attn_q_norm',
  'k_norm': 'blk.{}.attn_k_norm',
  'out': 'blk.{}.attn_output',
  'gate': 'blk.{}.ffn_gate',
  'up': 'blk.{}.ffn_up',
  'down': 'blk.{}.ffn_down',
}


# --- the file ----------------------------------------------------------------


class Stored(NamedTuple):
  """Tensor as the file holds it."""

  kind: int  # ggml's number of the quantization
  shape: tuple  # rows first
  start: int  # byte of the file


class _Cursor:
  """Reads the header, from one byte to the next."""

  def __init__(self, buffer):
    self.buffer, self.at = buffer, 0

  def scalar(self, code: str):
    code = '<' + code
    value = struct.unpack(code, self.take(struct.calcsize(code)))[0]
    # shortest decimal: 1e-05, not 9.999999747378752e-06
    return float(str(np.float32(value))) if code == '<f' else value

  def take(self, size: int) -> memoryview:
    if size > len(self.buffer) - self.at:
      raise ValueError('it ends early')
    self.at += size
    return self.buffer[self.at - size : self.at]

  def string(self) -> str:
    return str(self.take(self.scalar('Q')), 'utf-8')

  def value(self, kind: int):
    if kind == STRING:
      return self.string()
    if kind == ARRAY:
      kind, count = self.scalar('I'), self.scalar('Q')
      if kind not in SCALARS:
        return [self.value(kind) for _ in range(count)]
      dtype = np.dtype('<' + SCALARS[kind])
      return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
    if kind not in SCALARS:
      raise ValueError(f'it has a value of kind {kind}')
    return self.scalar(SCALARS[kind])


def _header(buffer) -> tuple[dict, dict[str, Stored]]:
  cursor = _Cursor(buffer)
  if bytes(cursor.take(4)) != fetch.MAGIC:
    raise ValueError('it does not begin with GGUF')
  version = cursor.scalar('I')
  if version not in VERSIONS:
    raise ValueError(f'version {version} is none of {VERSIONS}')
  num_tensors, num_values = cursor.scalar('Q'), cursor.scalar('Q')
  meta = {}
  for _ in range(num_values):
    key = cursor.string()
    meta[key] = cursor.value(cursor.scalar('I'))
  tensors = {}
  for _ in range(num_tensors):
    name = cursor.string()
    shape = [cursor.scalar('Q') for _ in range(cursor.scalar('I'))]
    kind, offset = cursor.scalar('I'), cursor.scalar('Q')
    tensors[name] = Stored(kind, tuple(reversed(shape)), offset)
  step = meta.get('general.alignment', 32)
  base = -(-cursor.at // step) * step
  return meta, {
    name: stored._replace(start=base + stored.start)
    for name, stored in tensors.items()
  }


def parse(path: Path) -> tuple[dict, dict[str, Stored]]:
  """Reads (metadata, {tensor: Stored}) of a GGUF file.

  Raises ValueError, in one line, for a file that is damaged, cut short, one
  part of several, or quantized in an unknown way.
  """
  data = np.memmap(path, mode='r') if path.stat().st_size else b''
  swapped = [fetch.MAGIC + version.to_bytes(4, 'big') for version in VERSIONS]
  if bytes(data[:8]) in swapped:
    raise ValueError(
      f'{path} is big-endian; make it little-endian (gguf-convert-endian '
      f'{path.name} little)'
    )
  try:
    meta, tensors = _header(memoryview(data))
  except FAULTS as e:
    raise ValueError(
      f'{path} is damaged or no GGUF file ({e}); fetch it again'
    ) from None
  parts = meta.get('split.count', 1)
  if parts != 1:
    raise ValueError(
      f'{path} is one of {parts} parts; join them (llama-gguf-split --merge)'
    )
  for name, stored in tensors.items():
    end = stored.start + math.prod(_bytes_shape(name, stored))
    if end > len(data):
      raise ValueError(
        f'{path} is cut short: {name} ends at byte {end:,} of {len(data):,}; '
        'fetch it again'
      )
  return meta, tensors


def _bytes_shape(name: str, stored: Stored) -> tuple:
  """Shape of a tensor's bytes: rows are whole numbers of blocks."""
  from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

  known = stored.kind in list(GGMLQuantizationType)
  kind = GGMLQuantizationType(stored.kind) if known else None
  if kind is None or not _readable(kind):
    raise ValueError(
      f'{name} is quantized as {kind.name if known else stored.kind}, which '
      'is not supported; use a file of F16, Q8_0 or a K-quantization'
    )
  block, size = GGML_QUANT_SIZES[kind]
  *rows, width = stored.shape or (1,)
  if width % block:
    raise ValueError(
      f'{name} is {list(stored.shape)}, whose rows are no multiple of '
      f"{kind.name}'s {block}; convert it again"
    )
  return (*rows, width // block * size)


@functools.cache
def _readable(kind) -> bool:
  """Tells whether the gguf package dequantizes this kind."""
  from gguf import GGML_QUANT_SIZES, quants

  try:
    block = np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8)
    return quants.dequantize(block, kind).dtype == np.float32
  except (NotImplementedError, KeyError):
    return False


# --- tensors -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Tensor as Hugging Face's file would hold it; a slice of it reads rows.

  heads: llama.cpp interleaves the halves of each head of q and k, for its
  order of rotary pairs; undone here. shift: added (Gemma's norms are stored
  as 1 + scale). transposed: the file has [out, in] and the family [in, out].
  """

  data: np.ndarray  # uint8 [rows, bytes], of the file
  kind: int
  shape: tuple
  heads: int = 0
  shift: float = 0.0
  transposed: bool = False

  def get_shape(self) -> tuple:
    return self.shape[::-1] if self.transposed else self.shape

  def get_dtype(self) -> str:
    from gguf import GGMLQuantizationType

    name = GGMLQuantizationType(self.kind).name
    return name if name in KEPT else 'F32'

  def __getitem__(self, rows: slice) -> np.ndarray:
    from gguf import GGMLQuantizationType, quants

    order, where = slice(None), rows
    if self.heads:
      order = np.arange(self.shape[0]).reshape(self.heads, -1, 2)
      order = order.swapaxes(1, 2).reshape(-1)
      where = order[rows]
    kind = GGMLQuantizationType(self.kind)
    if self.transposed or len(self.shape) == 1:  # blocks lie across our rows
      whole = quants.dequantize(self.data, kind)
      found = (whole.T if self.transposed else whole)[order][rows]
    else:
      found = quants.dequantize(self.data[where], kind)
    return found + np.float32(self.shift) if self.shift else found


def tensor_names(family: families.Family, num_layers: int) -> dict:
  """{name in GGUF, without .weight: (module's key, name in the family)}."""
  names = family.names
  fused = {'up'} if 'gate_up' in names else set()
  found = {}
  for key, theirs in NAMES.items():
    ours = names.get('gate_up' if key in fused else key)
    if ours is None:
      continue
    if key == 'head':
      found[theirs] = key, ours
    elif '{}' not in theirs:
      found[theirs] = key, names['base'] + ours
    else:
      layer = names['base'] + names['layer']
      for i in range(num_layers):
        found[theirs.format(i)] = key, layer.format(i) + ours
  return found


def _adjustments(hf_config: dict, key: str, is_matrix: bool) -> dict:
  """Fields of a Tensor that undo what llama.cpp's converter did."""
  kind = hf_config['model_type']
  if kind in ('llama', 'mistral') and key in ('q', 'k'):
    heads = 'num_attention_heads' if key == 'q' else 'num_key_value_heads'
    return {'heads': hf_config[heads]}
  if kind in ('gemma2', 'gemma3_text') and key.endswith('norm'):
    return {'shift': -1.0}
  matrices = ('qkv', 'out', 'up', 'down')
  return {'transposed': kind == 'gpt2' and is_matrix and key in matrices}


def _tensors(path: Path, stored: dict, hf_config: dict) -> dict[str, Tensor]:
  """{Hugging Face's name: Tensor}. Raises ValueError for an unknown one."""
  family = families.family_of(hf_config)
  L = hf_config.get('num_hidden_layers') or hf_config['n_layer']
  known = tensor_names(family, L)
  data, found = np.asarray(np.memmap(path, mode='r')), {}
  for name, s in stored.items():
    module, _, leaf = name.rpartition('.')
    if name == FACTORS:
      continue
    if module not in known or leaf not in ('weight', 'bias'):
      raise ValueError(
        f'tensor {name} has no place in a {hf_config["model_type"]} model; use '
        'another file of the model'
      )
    key, ours = known[module]
    shape = _bytes_shape(name, s)
    rows = data[s.start : s.start + math.prod(shape)].reshape(shape)
    adjust = _adjustments(hf_config, key, leaf == 'weight')
    found[f'{ours}.{leaf}'] = Tensor(rows, s.kind, s.shape, **adjust)
  return found


# --- as a directory ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class File:
  """GGUF file as Hugging Face would have it."""

  directory: Path  # config.json, generation_config.json, tokenizer
  tensors: dict  # {Hugging Face's name: Tensor}
  lifetime: tempfile.TemporaryDirectory

  def keys(self):
    return self.tensors.keys()

  def get_slice(self, name: str) -> Tensor:
    return self.tensors[name]


def _factors(path: Path, stored: dict):
  if FACTORS not in stored:
    return None
  s = stored[FACTORS]
  data = np.memmap(path, mode='r')[s.start :][: math.prod(s.shape) * 4]
  return Tensor(data, s.kind, s.shape)[:]


@functools.cache
def _read(path: Path, version: tuple) -> File:
  try:
    meta, stored = parse(path)
    shapes = {name: s.shape for name, s in stored.items()}
    hf_config = gguf_config.make_config(meta, shapes, _factors(path, stored))
    families.read_config(hf_config)
    tensors = _tensors(path, stored, hf_config)
    lifetime = tempfile.TemporaryDirectory(prefix='jaxrl_tok-')
    out = Path(lifetime.name)
    ids = gguf_tokenizer.write(out, meta)
  except ValueError as e:
    said = str(e)
    here = said.startswith(str(path))
    raise ValueError(said if here else f'{path}: {said}') from None
  for name, content in (
    ('config.json', hf_config),
    ('generation_config.json', ids),
  ):
    (out / name).write_text(json.dumps(content, indent=2) + '\n')
  return File(out, tensors, lifetime)


def read(path: Path) -> File:
  """Reads a GGUF file, once in a process; the weights' bytes stay in it."""
  path = Path(path).resolve()
  about = path.stat()
  return _read(path, (about.st_mtime_ns, about.st_size))
