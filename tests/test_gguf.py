"""GGUF files are the Hugging Face directories that they were made from.

`convert` writes a file as llama.cpp's converter does, from a directory of
golden/families; names of tensors come from the gguf package, not from us.
"""

import json
import shutil
from pathlib import Path

import gguf as ggml
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from conftest import GOLDEN
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from safetensors.numpy import load_file

from jaxrl_tok import data
from jaxrl_tok.hub import fetch, gguf, gguf_config
from jaxrl_tok.hub.directory import open_model, save
from jaxrl_tok.hub.weights import read_params
from jaxrl_tok.types import Prompts

# changes of config.json to what a file can say, and numbers of a file
FAMILIES = {
  'llama': ('llama', {}, {}),
  'llama_linear': ('llama', {}, {}),
  'llama_yarn': ('llama', {}, {}),
  'mistral': ('llama', {}, {'attention.sliding_window': 5}),
  'qwen2': (
    'qwen2',
    {'use_sliding_window': False, 'layer_types': ['full_attention'] * 3},
    {},
  ),
  'qwen3': ('qwen3', {}, {}),
  'gemma2': (
    'gemma2',
    {'query_pre_attn_scalar': 6},
    {
      'attention.sliding_window': 5,
      'attn_logit_softcapping': 5.0,
      'final_logit_softcapping': 4.0,
    },
  ),
  'gemma3_text': (
    'gemma3',
    {'query_pre_attn_scalar': 6},
    {'attention.sliding_window': 4, 'rope.freq_base_swa': 20.0},
  ),
  'phi3': (
    'phi3',
    {},
    {
      'attention.sliding_window': 5,
      'rope.dimension_count': 4,
      'rope.scaling.original_context_length': 4096,
    },
  ),
  'gpt2': ('gpt2', {}, {}),
  'olmo2': ('olmo2', {}, {}),
}
SIZES = {  # ours -> llama.cpp's
  'hidden_size': 'embedding_length',
  'n_embd': 'embedding_length',
  'intermediate_size': 'feed_forward_length',
  'n_inner': 'feed_forward_length',
  'num_hidden_layers': 'block_count',
  'n_layer': 'block_count',
  'num_attention_heads': 'attention.head_count',
  'n_head': 'attention.head_count',
  'num_key_value_heads': 'attention.head_count_kv',
  'head_dim': 'attention.key_length',
  'max_position_embeddings': 'context_length',
  'n_positions': 'context_length',
  'rms_norm_eps': 'attention.layer_norm_rms_epsilon',
  'layer_norm_epsilon': 'attention.layer_norm_epsilon',
}
TEMPLATE = (
  '{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}'
  '{% if add_generation_prompt %}assistant: {% endif %}'
)
TEXTS = ('Hello,  world! 1234', "don't", 'naïve ½ 日本\n\n x', '', ' a<eos>b')


# --- a converter -------------------------------------------------------------


def rope_values(config: dict) -> dict:
  """Numbers of rotary positions, as llama.cpp's converter writes them."""
  rope = config.get('rope_parameters') or {}
  rope = rope.get('full_attention', rope)
  found = {'rope.freq_base': rope['rope_theta']} if rope else {}
  if rope.get('rope_type') in ('linear', 'yarn'):
    found |= {
      'rope.scaling.type': rope['rope_type'],
      'rope.scaling.factor': rope['factor'],
    }
  if rope.get('rope_type') == 'yarn':
    found |= {
      'rope.scaling.original_context_length': 8,
      'rope.scaling.yarn_beta_fast': rope['beta_fast'],
      'rope.scaling.yarn_beta_slow': rope['beta_slow'],
    }
  return found


def llama3_factors(config: dict):
  """rope_freqs.weight of Llama 3.1's rule; None for any other."""
  rope = config.get('rope_parameters') or {}
  if rope.get('rope_type') != 'llama3':
    return None
  H, found = config['head_dim'], []
  for j in range(0, H, 2):
    wavelength = 2 * np.pi * rope['rope_theta'] ** (j / H)
    turns = rope['original_max_position_embeddings'] / wavelength
    low, high = rope['low_freq_factor'], rope['high_freq_factor']
    smooth = (turns - low) / (high - low)
    ramp = 1 / ((1 - smooth) / rope['factor'] + smooth)
    found.append(1 if turns > high else rope['factor'] if turns < low else ramp)
  return np.array(found, np.float32)


def permuted(weights, heads: int):
  """Rows of q or k in llama.cpp's order of rotary pairs."""
  shape = heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]
  return weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)


def converted(name: str, x, arch: str, config: dict):
  """Tensor of a directory as the file has it."""
  if arch == 'llama' and '.q_proj.' in name:
    return permuted(x, config['num_attention_heads'])
  if arch == 'llama' and '.k_proj.' in name:
    return permuted(x, config['num_key_value_heads'])
  if arch in ('gemma2', 'gemma3') and name.endswith('norm.weight'):
    return x + 1
  if arch == 'gpt2' and x.ndim == 2 and '.c_' in name:
    return x.T
  return x


def byte_vocabulary(directory: Path, rows: int) -> dict:
  """Metadata of the fixtures' tokenizer: bytes, <pad>, <eos>, and one token
  that no text becomes, for the merges."""
  found = json.loads((directory / 'tokenizer.json').read_text())
  tokens = sorted(found['model']['vocab'], key=found['model']['vocab'].get)
  tokens = [*tokens[:256], '<pad>', '<eos>', 'ÿÿ']
  types = [1] * 256 + [3, 3, 1] + [5] * (rows - 259)
  return {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'gpt-2',
    'tokenizer.ggml.tokens': [
      *tokens,
      *(f'[PAD{i}]' for i in range(259, rows)),
    ],
    'tokenizer.ggml.token_type': types,
    'tokenizer.ggml.merges': ['ÿ ÿ'],
    'tokenizer.ggml.eos_token_id': 257,
    'tokenizer.ggml.padding_token_id': 256,
    'tokenizer.chat_template': TEMPLATE,
  }


def add_value(writer, key: str, value) -> None:
  """Adds a value; an array's kind is its first element's."""
  if isinstance(value, list):
    return writer.add_array(key, value)
  kinds = {bool: 'bool', int: 'uint32', float: 'float32', str: 'string'}
  return getattr(writer, f'add_{kinds[type(value)]}')(key, value)


def write(path: Path, arch: str, values: dict, tensors: dict, kinds=None):
  """Writes a GGUF file. values: None leaves one out; kinds: {tensor: Kind},
  F32 for any other."""
  writer = ggml.GGUFWriter(path, arch)
  for key, value in values.items():
    if value is not None and key != 'general.architecture':
      add_value(writer, key, value)
  for name, x in tensors.items():
    kind = (kinds or {}).get(name, Kind.F32)
    if x.dtype != np.uint8:  # blocks as they are
      x = quants.quantize(np.ascontiguousarray(x, np.float32), kind)
    writer.add_tensor(name, x, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def contents(directory: Path, arch: str, more=None) -> tuple[dict, dict]:
  """(values, tensors) of the file that a directory becomes."""
  config = json.loads((directory / 'config.json').read_text())
  sizes = {
    SIZES[ours]: config[ours] for ours in SIZES if config.get(ours) is not None
  }
  sizes |= rope_values(config) | (more or {})
  values = {f'{arch}.{name}': value for name, value in sizes.items()}
  values |= byte_vocabulary(directory, config['vocab_size'])
  number = next(i for i, n in ggml.MODEL_ARCH_NAMES.items() if n == arch)
  names = ggml.get_tensor_name_map(number, sizes['block_count'])
  tensors = {}
  for file in sorted(directory.glob('*.safetensors')):
    for name, x in load_file(file).items():
      theirs = names.get_name(name, try_suffixes=('.weight', '.bias'))
      tensors[theirs] = converted(name, x, arch, config)
  factors = llama3_factors(config)
  if factors is not None:
    tensors['rope_freqs.weight'] = factors
  return values, tensors


def edited(name: str, out: Path, **changes) -> Path:
  """A copy of a fixture with another config.json."""
  directory = shutil.copytree(GOLDEN / name, out)
  config = json.loads((directory / 'config.json').read_text()) | changes
  (directory / 'config.json').write_text(json.dumps(config))
  return directory


@pytest.fixture
def made(tmp_path):
  """Fixture made(fixture's name) -> (directory, its GGUF file)."""

  def make(name):
    arch, changes, more = FAMILIES[name]
    directory = edited(name, tmp_path / name, **changes)
    file = tmp_path / f'{name}.gguf'
    write(file, arch, *contents(directory, arch, more))
    return directory, file

  return make


# --- families ----------------------------------------------------------------


def assert_equal_trees(a, b, atol=0.0):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    np.testing.assert_allclose(x, y, rtol=0, atol=atol)


@pytest.mark.parametrize('name', FAMILIES)
def test_a_file_is_the_model_that_it_was_made_from(made, name, tmp_path):
  """Network, parameters, logits, ids and ends; and the export of it."""
  directory, file = made(name)
  want, got = open_model(directory), open_model(file)
  assert got.config == want.config
  assert got.end_tokens == want.end_tokens
  assert got.pad_token == want.pad_token
  theirs, ours = read_params(want), read_params(got)
  # 1 + scale was rounded where the family's norms have it
  assert_equal_trees(theirs, ours, 1e-6 if name.startswith('gemma') else 0)
  tokens = np.load(directory / 'expected.npz')['tokens']
  length = np.full(len(tokens), tokens.shape[1], np.int32)
  prompts = Prompts(tokens, length)
  policy = want.make_policy()

  @jax.jit
  def logits(params):
    return policy.logits(params, policy.encode(params, prompts).hidden)

  np.testing.assert_allclose(logits(ours), logits(theirs), rtol=0, atol=1e-6)
  back = open_model(save(tmp_path / 'export', got, ours))
  assert back.config == got.config
  assert back.end_tokens == got.end_tokens
  assert back.pad_token == got.pad_token
  assert back.tokenizer.chat_template == TEMPLATE
  assert_equal_trees(ours, read_params(back))
  for model in (want, back):
    ids = [data.prompt_ids(model.tokenizer, text) for text in TEXTS]
    assert ids == [data.prompt_ids(got.tokenizer, text) for text in TEXTS]


# --- quantized tensors -------------------------------------------------------

WIDE = {  # Llama whose rows are whole blocks of every kind
  'embedding_length': 256,
  'feed_forward_length': 512,
  'block_count': 1,
  'attention.head_count': 8,
  'attention.head_count_kv': 2,
  'context_length': 64,
  'attention.layer_norm_rms_epsilon': 1e-5,
  'rope.freq_base': 1e4,
}
WIDE_SHAPES = {
  'token_embd.weight': (264, 256),
  'output_norm.weight': (256,),
  'blk.0.attn_norm.weight': (256,),
  'blk.0.ffn_norm.weight': (256,),
  'blk.0.attn_q.weight': (256, 256),
  'blk.0.attn_k.weight': (64, 256),
  'blk.0.attn_v.weight': (64, 256),
  'blk.0.attn_output.weight': (256, 256),
  'blk.0.ffn_gate.weight': (512, 256),
  'blk.0.ffn_up.weight': (512, 256),
  'blk.0.ffn_down.weight': (256, 512),
}
KINDS = (
  *('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1'),
  *('Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K', 'IQ4_NL', 'IQ4_XS'),
)


def wide_values(**more) -> dict:
  values = {f'llama.{k}': v for k, v in (WIDE | more).items()}
  return values | byte_vocabulary(GOLDEN / 'llama', 264)


def blocks(rng, shape: tuple, kind) -> np.ndarray:
  """Random weights, quantized; random bytes for kinds that the gguf package
  reads alone."""
  try:
    return quants.quantize(rng.normal(size=shape).astype(np.float32), kind)
  except NotImplementedError:
    block, size = ggml.GGML_QUANT_SIZES[kind]
    rows = (*shape[:-1], shape[-1] // block * size)
    return rng.integers(0, 0x7C, rows, np.uint8)  # scales are finite


def quantized(path: Path, kind, rng) -> dict:
  """Writes the wide Llama, its matrices of one kind -> {tensor: blocks}."""
  stored = {
    name: blocks(rng, shape, kind if len(shape) > 1 else Kind.F32)
    for name, shape in WIDE_SHAPES.items()
  }
  kinds = {name: kind for name, s in WIDE_SHAPES.items() if len(s) > 1}
  raw = {name: x.view(np.uint8) for name, x in stored.items()}
  write(path, 'llama', wide_values(), raw, kinds)
  return stored


@pytest.mark.parametrize('name', KINDS)
def test_rows_are_those_of_the_gguf_package(name, tmp_path):
  """Rows of every kind, in any pieces; q and k in Hugging Face's order."""
  kind, rng = Kind[name], np.random.default_rng(0)
  stored = quantized(tmp_path / 'a.gguf', kind, rng)
  file = gguf.read(tmp_path / 'a.gguf')
  layer = 'model.layers.0.'
  for theirs, ours, heads in (
    ('token_embd', 'model.embed_tokens', 0),
    ('blk.0.attn_q', f'{layer}self_attn.q_proj', 8),
    ('blk.0.attn_k', f'{layer}self_attn.k_proj', 2),
    ('blk.0.ffn_down', f'{layer}mlp.down_proj', 0),
  ):
    want = quants.dequantize(stored[f'{theirs}.weight'], kind)
    if heads:  # the halves of each head were interleaved
      want = want.reshape(heads, -1, 2, want.shape[1]).swapaxes(1, 2)
      want = want.reshape(-1, want.shape[-1])
    found = file.get_slice(f'{ours}.weight')
    assert found.get_shape() == want.shape
    assert found.get_dtype() == (name if name in gguf.KEPT else 'F32')
    for rows in (slice(None), slice(3, 20), slice(40, 1000)):
      np.testing.assert_array_equal(found[rows], want[rows])


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [('Q4_0', 'float32'), ('F16', 'float16'), ('BF16', 'bfloat16')],
)
def test_parameters_are_the_dequantized_tensors(name, dtype, tmp_path):
  rng = np.random.default_rng(1)
  stored = quantized(tmp_path / 'a.gguf', Kind[name], rng)
  params = read_params(open_model(tmp_path / 'a.gguf'))
  (down,) = params['layers']['mlp']['down']
  want = quants.dequantize(stored['blk.0.ffn_down.weight'], Kind[name]).T
  assert down.dtype == dtype
  np.testing.assert_array_equal(down, want.astype(down.dtype))
  as_asked = read_params(open_model(tmp_path / 'a.gguf'), dtype='float32')
  (down,) = as_asked['layers']['mlp']['down']
  np.testing.assert_array_equal(down, want)


# --- the reader --------------------------------------------------------------

SCALARS = st.one_of(
  st.booleans(),
  st.integers(0, 2**32 - 1),
  st.floats(width=32, allow_nan=False),
  st.text(st.characters(codec='utf-8'), max_size=9),
)
LISTS = st.one_of(
  st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
  st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=5),
  st.lists(st.text(st.characters(codec='utf-8'), max_size=9), min_size=1),
  st.lists(st.booleans(), min_size=1, max_size=5),
)
KEYS = st.text('abc.xyz', min_size=1, max_size=9)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
  st.dictionaries(KEYS, st.one_of(SCALARS, LISTS), max_size=6),
  st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), max_size=4),
)
def test_the_header_is_as_the_gguf_package_reads_it(
  tmp_path_factory, values, shapes
):
  path = tmp_path_factory.mktemp('header') / 'a.gguf'
  rng = np.random.default_rng(0)
  tensors = {str(i): rng.normal(size=s) for i, s in enumerate(shapes)}
  write(path, 'llama', values, tensors)
  meta, stored = gguf.parse(path)
  reader = ggml.GGUFReader(path)
  want = {k: v for k, v in reader.fields.items() if not k.startswith('GGUF.')}
  assert meta.keys() == want.keys()
  for key, field in want.items():
    found = field.contents()
    # ours is the shortest decimal of the same float32
    alike = np.float32 if isinstance(found, float) else lambda x: x
    assert alike(meta[key]) == alike(found)
  assert list(stored) == [t.name for t in reader.tensors]
  for t, s in zip(reader.tensors, stored.values()):
    assert s.shape == tuple(reversed(t.shape.tolist()))
    assert (s.kind, s.start) == (t.tensor_type, t.data_offset)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Bytes of a file of the llama fixture."""
  path = tmp_path_factory.mktemp('whole') / 'a.gguf'
  write(path, 'llama', *contents(GOLDEN / 'llama', 'llama'))
  return path.read_bytes()


def fault(path) -> str:
  """Message of the fault, one line that names the file."""
  with pytest.raises(ValueError, match=r'.') as e:
    open_model(path)
  assert type(e.value) is ValueError
  assert '\n' not in str(e.value)
  assert str(e.value).startswith(str(path))
  return str(e.value)


@pytest.mark.parametrize('share', [0.0, 1e-4, 0.01, 0.1, 0.3, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_one_line(whole, share, tmp_path):
  path = tmp_path / 'a.gguf'
  path.write_bytes(whole[: int(len(whole) * share)])
  assert 'fetch it again' in fault(path)


def test_a_file_that_is_cut_anywhere_in_its_header_ends_early(whole, tmp_path):
  path = tmp_path / 'a.gguf'
  for size in (0, 3, 5, 7, 9, 23, 25, 31, 33, 40, 57, 100, 1000, 3001):
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r'it ends early\); fetch it again$'):
      gguf.parse(path)


@pytest.mark.parametrize('version', [2, 3])
def test_a_big_endian_file_is_named(whole, version, tmp_path):
  path = tmp_path / 'a.gguf'
  path.write_bytes(whole[:4] + version.to_bytes(4, 'big') + whole[8:])
  cure = 'make it little-endian (gguf-convert-endian a.gguf little)'
  assert fault(path) == f'{path} is big-endian; {cure}'


@pytest.mark.parametrize('name', ['m.bin', 'M.GGUF', 'm'])
def test_a_file_is_known_by_its_first_bytes(whole, name, tmp_path):
  (tmp_path / 'a.gguf').write_bytes(whole)
  want = read_params(open_model(tmp_path / 'a.gguf'))
  (tmp_path / 'a.gguf').rename(tmp_path / name)
  assert_equal_trees(read_params(open_model(tmp_path / name)), want)
  with pytest.raises(FileNotFoundError, match=f'pass --model .*/{name}$'):
    open_model(tmp_path)


def test_a_file_of_other_first_bytes_is_no_model(tmp_path):
  (tmp_path / 'm.bin').write_bytes(b'GGML' * 9)
  with pytest.raises(FileNotFoundError, match='pass --model a directory'):
    open_model(tmp_path / 'm.bin')


def refusal(path) -> str | None:
  """Message of a file that is refused; None: it is read."""
  try:
    open_model(path)
  except ValueError as e:
    return str(e)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
  st.lists(
    st.tuples(st.integers(0, 6000), st.integers(0, 255)),
    min_size=1,
    max_size=4,
  )
)
def test_no_byte_breaks_the_reader(tmp_path_factory, whole, changes):
  """Damage is read, or refused in one line; nothing else is raised."""
  damaged = bytearray(whole)
  for at, byte in changes:
    damaged[at] = byte
  path = tmp_path_factory.mktemp('damaged') / 'a.gguf'
  path.write_bytes(damaged)
  said = refusal(path)
  assert said is None or (said.startswith(str(path)) and '\n' not in said)


# --- refusals ----------------------------------------------------------------


@pytest.fixture
def changed(tmp_path):
  """Fixture changed(values, tensors): a file of the llama fixture with other
  values (None: without it) and tensors."""

  def make(values=(), tensors=(), arch='llama', kinds=None):
    own, theirs = contents(GOLDEN / 'llama', 'llama')
    if arch != 'llama':
      own = {k.replace('llama.', f'{arch}.'): v for k, v in own.items()}
    theirs |= dict(tensors)
    kept = {k: v for k, v in theirs.items() if v is not None}
    path = tmp_path / 'a.gguf'
    write(path, arch, own | dict(values), kept, kinds)
    return path

  return make


def test_an_unknown_architecture_is_named_with_those_there_are(changed):
  said = "GGUF architecture 'mamba' is not supported; supported: llama, qwen2"
  assert said in fault(changed(arch='mamba'))


T, G = 'tokenizer.ggml', 'tokenizer.ggml.'


@pytest.mark.parametrize(
  ('values', 'says'),
  [
    ({f'{T}.pre': 'viking'}, "(tokenizer.ggml.pre) 'viking' is not supported"),
    ({f'{T}.pre': None}, '(tokenizer.ggml.pre) None is not supported'),
    ({f'{T}.model': 'bert'}, "tokenizer 'bert' is not supported; supported:"),
    ({f'{T}.tokens': None}, 'no tokenizer.ggml.tokens'),
    ({f'{T}.tokens': ['a', 'b']}, 'is no list of 2 tokens'),
    ({f'{T}.tokens': ['a'] * 264}, "token 'a' has two ids"),
    ({f'{T}.merges': ['ÿ ÿÿÿ']}, 'no tokenizer ('),
    ({f'{T}.merges': None}, 'no tokenizer.ggml.merges'),
    ({f'{T}.add_bos_token': True}, 'there is no bos token'),
    ({f'{T}.eos_token_id': None}, 'no end token'),
    ({'llama.block_count': None}, 'no llama.block_count in the metadata'),
    ({'llama.block_count': 3}, 'weights are missing: model.layers.2.'),
    ({'llama.block_count': 1}, 'tensor blk.1.'),
    ({'llama.block_count': 10**9}, 'block_count 1000000000 does not fit a'),
    ({'llama.block_count': 0}, 'block_count 0 does not fit a file of'),
    ({'llama.block_count': 2.0}, 'block_count 2.0 does not fit a file of'),
    ({'llama.block_count': 'two'}, 'block_count is two, not one number'),
    ({'llama.attention.head_count_kv': [1, 2]}, '[1, 2], not one number'),
    ({'llama.attention.head_count': 0}, 'numbers above zero'),
    ({'llama.attention.value_length': 4}, 'key_length 8 and value_length 4'),
    ({'llama.embedding_length': 32}, 'weights do not fit config.json'),
    ({'llama.expert_count': 8}, 'expert_count 8 is not supported'),
    ({'llama.logit_scale': 0.5}, 'logit_scale 0.5 is not supported'),
    ({'llama.rope.scaling.type': 'longrope'}, 'rope_freqs.weight holds'),
    ({'split.count': 2}, 'is one of 2 parts; join them'),
  ],
)
def test_values_that_cannot_be_are_one_line(changed, values, says):
  tensors = {}
  if 'longrope' in values.values():  # factors of no rule
    tensors['rope_freqs.weight'] = np.float32([1, 3, 2, 4])
  assert says in fault(changed(values, tensors))


@pytest.mark.parametrize(
  ('arch', 'values', 'says'),
  [
    ('qwen2', {'attention.sliding_window': 4}, 'sliding_window 4 is not supp'),
    ('olmo2', {'attention.sliding_window': 4}, 'sliding_window 4 is not supp'),
    ('qwen3', {'rope.scaling.type': 'longrope'}, "'longrope' is not supported"),
    ('phi3', {}, "'longrope' is not supported: a token's angle depends on"),
  ],
)
def test_numbers_of_another_architecture_are_refused(arch, values, says):
  meta = {f'{arch}.{k}': v for k, v in (WIDE | values).items()}
  meta['general.architecture'] = arch
  shapes = {'token_embd.weight': (264, 256)}
  if arch == 'phi3':
    shapes['rope_factors_long.weight'] = (16,)
  with pytest.raises(ValueError, match=r'.') as e:
    gguf_config.make_config(meta, shapes)
  assert says in str(e.value)


@pytest.mark.parametrize(
  ('tensors', 'says'),
  [
    (
      {'blk.0.ffn_gate_inp.weight': np.ones((2, 24))},
      'has no place in a llama',
    ),
    ({'mystery': np.ones(3)}, 'tensor mystery has no place in a llama model'),
    ({'blk.0.attn_q.weight': None}, 'are missing: model.layers.0.self_attn.q'),
    ({'token_embd.weight': None}, 'no token_embd.weight'),
    ({'blk.0.attn_q.weight': np.ones((32, 20))}, 'is [32, 20], not [32, 24]'),
    ({'blk.0.attn_q.weight': np.ones((31, 24))}, 'is [31, 24], not [32, 24]'),
    ({'blk.0.attn_norm.weight': np.ones(5)}, 'is [5], not [24]'),
    ({'output_norm.bias': np.ones(24)}, 'weights of no use: model.norm.bias'),
  ],
)
def test_tensors_that_do_not_fit_are_one_line(changed, tensors, says):
  assert says in fault(changed(tensors=tensors))


def test_a_kind_that_nobody_dequantizes_is_named(changed):
  name = 'blk.0.attn_v.weight'
  raw = {name: np.zeros((16, 24 * 2), np.uint8)}
  said = fault(changed(tensors=raw, kinds={name: Kind.I16}))
  assert f'{name} is quantized as I16, which is not supported; use' in said


def test_a_gguf_file_that_is_not_there_is_no_hub_id(tmp_path):
  assert not fetch.is_hub_id('models/llama.gguf')
  with pytest.raises(FileNotFoundError, match='pass --model a GGUF file'):
    open_model('models/llama.gguf')


def test_a_directory_that_holds_a_gguf_file_names_it(changed, tmp_path):
  path = changed()
  with pytest.raises(FileNotFoundError, match=f'; pass --model {path}$'):
    open_model(tmp_path)


# --- configuration -----------------------------------------------------------


def config_of(arch, shapes=None, factors=None, **values) -> dict:
  meta = {f'{arch}.{k}': v for k, v in (WIDE | values).items()}
  shapes = {'token_embd.weight': (264, 256), **(shapes or {})}
  shapes |= {f'blk.{i}.attn_q.weight': (256, 256) for i in range(62)}
  meta['general.architecture'] = arch
  return gguf_config.make_config(meta, shapes, factors)


@pytest.mark.parametrize('factor', [8.0, 32.0])
def test_factors_of_llama3_give_back_its_numbers(factor):
  rope = {'rope_type': 'llama3', 'rope_theta': 5e5, 'factor': factor}
  rope |= {'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
  rope['original_max_position_embeddings'] = 8192
  config = {'head_dim': 64, 'rope_parameters': rope}
  more = {'rope.freq_base': 5e5, 'attention.key_length': 64}
  found = config_of('llama', factors=llama3_factors(config), **more)
  del rope['rope_theta']
  assert found['rope_scaling'] == rope


def test_factors_of_one_are_no_scaling():
  assert 'rope_scaling' not in config_of('llama', factors=np.ones(16))


def test_gemma_of_27b_scales_its_attention_by_width_and_heads():
  assert config_of('gemma2', block_count=46)['query_pre_attn_scalar'] == 32
  more = {'attention.key_length': 64}
  for layers, want in ((62, 32), (34, 64)):
    found = config_of('gemma3', block_count=layers, **more)
    assert found['query_pre_attn_scalar'] == want


def test_layers_of_a_window_are_a_period_or_a_list():
  more = {'attention.sliding_window': 8, 'block_count': 7}
  kinds = config_of('gemma3', **more)['layer_types']
  assert [kind[0] for kind in kinds] == list('sssssfs')
  name = 'attention.sliding_window_pattern'
  for pattern, want in (
    (3, 'ssfssfs'),
    ([True, False] * 3 + [True], 'sfsfsfs'),
  ):
    kinds = config_of('gemma3', **more, **{name: pattern})['layer_types']
    assert [kind[0] for kind in kinds] == list(want)


def test_yarn_of_another_magnitude():
  more = {'rope.scaling.type': 'yarn', 'rope.scaling.factor': 4.0}
  more['rope.scaling.original_context_length'] = 16
  found = config_of('qwen2', **more, **{'rope.scaling.yarn_attn_factor': 2.0})
  want = 2 * (0.1 * np.log(4) + 1)
  np.testing.assert_allclose(found['rope_scaling']['attention_factor'], want)
  found = config_of(
    'llama', **more, **{'rope.scaling.yarn_log_multiplier': 1.0}
  )
  assert found['rope_scaling']['mscale_all_dim'] == 1.0
