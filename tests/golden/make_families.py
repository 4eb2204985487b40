"""Makes tests/golden/families: tiny checkpoints with torch's outputs.

Each fixture is a Hugging Face directory of a small model with random weights,
saved by save_pretrained, with the repository's byte tokenizer and expected.npz:

* a decoder: `tokens` [2, 20], the `logits` [2, 20, V] of one full forward, and
  `greedy` [2, 10], the greedy continuation of the first 7 tokens of each row
  over byte ids only (ids from 256 up are left out of the argmax);
* a classifier: `tokens` and the `scores` [2, 20] of its head at every position;
* an adapter: `tokens` and the `logits` of its base fixture with the adapter.

All of it is float32 on the CPU with eager attention and nothing padded. Every
parameter is drawn from a seeded generator, so none has its initial value, and
a seed is passed over where a choice (the best token, the experts of a token)
is so close that rounding could turn it, or a continuation has under 4 tokens.

Needs torch 2.13.0, transformers 5.23.0, peft 0.21, safetensors and numpy, but
neither jax nor the package. To rebuild everything:

  python tests/golden/make_families.py

or only some: python tests/golden/make_families.py llama gpt2
"""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).parent / 'families'
MAX_BYTES = 150_000
BYTES, PAD, EOS, VOCAB = 256, 256, 257, 264
ROWS, LENGTH, PROMPT, NEW = 2, 20, 7, 10
EPS = 3e-3  # large enough for a wrong one to be seen in the logits
MIN_GAP = 2e-3

COMMON = {
  'vocab_size': VOCAB,
  'pad_token_id': PAD,
  'eos_token_id': EOS,
  'bos_token_id': None,
}
# Four heads over two of keys and values; head_dim, where a family has it, is
# not hidden_size / num_attention_heads.
LLAMA = COMMON | {
  'hidden_size': 24,
  'intermediate_size': 28,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 128,
  'rms_norm_eps': EPS,
  'tie_word_embeddings': False,
}
SIX_HEADS = LLAMA | {'num_attention_heads': 6}
GEMMA = LLAMA | {
  'hidden_size': 20,
  'intermediate_size': 18,
  'head_dim': 6,
  'sliding_window': 5,
  'tie_word_embeddings': True,
}
GPT2 = COMMON | {
  'n_embd': 24,
  'n_inner': 35,
  'n_layer': 2,
  'n_head': 4,
  'n_positions': 128,
  'layer_norm_epsilon': EPS,
}
GPT_NEOX = COMMON | {
  'hidden_size': 24,
  'intermediate_size': 28,
  'num_hidden_layers': 2,
  'num_attention_heads': 3,
  'max_position_embeddings': 128,
  'layer_norm_eps': EPS,
  'tie_word_embeddings': False,
}
QWEN3_MOE = LLAMA | {
  'hidden_size': 20,
  'intermediate_size': 18,
  'head_dim': 6,
  'num_experts': 4,
  'num_experts_per_tok': 2,
  'moe_intermediate_size': 10,
}


def rope(theta, kind='default', **parameters):
  return {'rope_type': kind, 'rope_theta': theta} | parameters


# Name -> (class of the model, what its configuration is made with).
MODELS = {
  'llama': (
    'LlamaForCausalLM',
    LLAMA
    | {
      'head_dim': 8,
      'attention_bias': True,
      'mlp_bias': True,
      # Wavelengths 6, 15, 34 and 80: one kept (below 32 / 4), one between, two
      # (above 32 / 1) stretched.
      'rope_parameters': rope(
        30.0,
        'llama3',
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
      ),
    },
  ),
  'llama_linear': (
    'LlamaForCausalLM',
    LLAMA
    | {
      'head_dim': 8,
      'tie_word_embeddings': True,
      'rope_parameters': rope(100.0, 'linear', factor=2.5),
    },
  ),
  'llama_yarn': (
    'LlamaForCausalLM',
    LLAMA
    | {
      'head_dim': 8,
      'max_position_embeddings': 32,
      # The ramp over the four frequencies is 0, 0, 1/2, 1.
      'rope_parameters': rope(
        30.0,
        'yarn',
        factor=4.0,
        original_max_position_embeddings=8,
        beta_fast=0.45,
        beta_slow=0.1,
      ),
    },
  ),
  'mistral': (
    'MistralForCausalLM',
    SIX_HEADS
    | {'head_dim': 6, 'sliding_window': 5, 'rope_parameters': rope(100.0)},
  ),
  'qwen2': (
    'Qwen2ForCausalLM',
    SIX_HEADS
    | {
      'num_hidden_layers': 3,
      'use_sliding_window': True,
      'sliding_window': 6,
      'max_window_layers': 1,
      'tie_word_embeddings': True,
      'rope_parameters': rope(50.0),
    },
  ),
  'qwen3': (
    'Qwen3ForCausalLM',
    LLAMA | {'head_dim': 8, 'rope_parameters': rope(200.0)},
  ),
  'gemma2': (
    'Gemma2ForCausalLM',
    GEMMA
    | {
      'num_hidden_layers': 3,
      'query_pre_attn_scalar': 5,
      'attn_logit_softcapping': 5.0,
      'final_logit_softcapping': 4.0,
      'rope_parameters': rope(100.0),
    },
  ),
  'gemma3_text': (
    'Gemma3ForCausalLM',
    GEMMA
    | {
      'num_hidden_layers': 7,
      'query_pre_attn_scalar': 3,
      'sliding_window': 4,
      'rope_parameters': {
        'sliding_attention': rope(20.0),
        'full_attention': rope(1000.0, 'linear', factor=8.0),
      },
    },
  ),
  'gpt2': ('GPT2LMHeadModel', GPT2),
  'gpt_neox': (
    'GPTNeoXForCausalLM',
    GPT_NEOX | {'rope_parameters': rope(50.0, partial_rotary_factor=0.5)},
  ),
  'gpt_neox_serial': (
    'GPTNeoXForCausalLM',
    GPT_NEOX
    | {
      'hidden_size': 20,
      'num_attention_heads': 2,
      'use_parallel_residual': False,
      'attention_bias': False,
      'rope_parameters': rope(50.0, partial_rotary_factor=0.4),
    },
  ),
  'olmo2': ('Olmo2ForCausalLM', SIX_HEADS | {'rope_parameters': rope(50.0)}),
  'phi3': (
    'Phi3ForCausalLM',
    LLAMA
    | {
      'sliding_window': 5,
      # Four of a head's six features turn.
      'rope_parameters': rope(50.0, partial_rotary_factor=0.75),
    },
  ),
  'smollm3': (
    'SmolLM3ForCausalLM',
    LLAMA
    | {
      'num_hidden_layers': 4,
      'no_rope_layers': [1, 0, 1, 0],
      'tie_word_embeddings': True,
      'rope_parameters': rope(50.0),
    },
  ),
  'qwen3_moe': (
    'Qwen3MoeForCausalLM',
    QWEN3_MOE
    | {
      'num_hidden_layers': 3,
      'mlp_only_layers': [1],
      'norm_topk_prob': True,
      'rope_parameters': rope(100.0),
    },
  ),
  'qwen3_moe_raw': (
    'Qwen3MoeForCausalLM',
    QWEN3_MOE
    | {
      'num_hidden_layers': 1,
      'norm_topk_prob': False,
      'rope_parameters': rope(100.0),
    },
  ),
  'llama_classifier': (
    'LlamaForSequenceClassification',
    LLAMA | {'num_labels': 1, 'rope_parameters': rope(100.0)},
  ),
  'gpt2_classifier': (
    'GPT2ForSequenceClassification',
    GPT2 | {'num_labels': 1},
  ),
  'gemma3_text_classifier': (
    'Gemma3TextForSequenceClassification',
    GEMMA
    | {
      'num_hidden_layers': 3,
      'query_pre_attn_scalar': 3,
      'num_labels': 1,
      'layer_types': [
        'sliding_attention',
        'full_attention',
        'sliding_attention',
      ],
      'rope_parameters': {
        'sliding_attention': rope(20.0),
        'full_attention': rope(1000.0),
      },
    },
  ),
}

SHARD_SIZE = {'llama_linear': '25KB'}

# Name -> (the fixture it adapts, target modules, fan_in_fan_out).
ADAPTERS = {
  'qwen2_lora': (
    'qwen2',
    ['q_proj', 'v_proj', 'o_proj', 'gate_proj', 'down_proj'],
    False,
  ),
  'phi3_lora': ('phi3', ['qkv_proj', 'down_proj'], False),
  'gpt2_lora': ('gpt2', ['c_attn', 'mlp.c_fc'], True),
}

# The first pattern found in a parameter's name gives the standard deviation of
# what the matrix puts out for inputs of standard deviation one.
GAINS = [
  (r'[qk]_proj|c_attn|query_key_value|qkv_proj', 1.4),  # scores of about 2
  (r'lm_head|embed_out|score', 2.5),
  (r'mlp\.gate\.weight', 2.0),  # the router
  (r'o_proj|down_proj|c_proj|dense', 1.5),
  (r'', 1.0),
]


# How every model is made and loaded.
STOCK = {
  'attn_implementation': 'eager',
  'experts_implementation': 'eager',
  'dtype': torch.float32,
}


class BadSeed(Exception):
  """Rounding could turn a choice of this model, or it repeats itself."""


def random_parameter(name, shape, config, rng):
  """Draws a parameter in place of its initial value."""
  normal = torch.randn(shape, generator=rng)
  if name.endswith('bias'):
    return 0.3 * normal
  if re.search(r'norm|ln_', name):
    if 'gemma' in config.model_type:
      return 0.3 * normal  # one is added to it
    sharp = re.search(r'[qk]_norm', name)
    return (1.4 if sharp else 1.0) * (1 + 0.3 * normal)
  if re.search(r'wpe|lora_B', name):
    return 0.3 * normal
  if re.search(r'embed_tokens|embed_in|wte', name):
    if not config.tie_word_embeddings:
      return normal
    # It is the head too. Gemma's embedding is scaled by the root of its width,
    # and a larger one would have every token predict itself.
    scale = 1.5 if 'gemma' in config.model_type else 2.5
    return normal * scale / math.sqrt(shape[-1])
  gain = next(gain for pattern, gain in GAINS if re.search(pattern, name))
  # GPT-2's layers keep [in, out].
  transposed = re.search(r'c_(attn|proj|fc)\.weight', name)
  return normal * gain / math.sqrt(shape[0 if transposed else -1])


def randomise(model, rng, pattern=''):
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if re.search(pattern, name):
        parameter.copy_(
          random_parameter(name, parameter.shape, model.config, rng)
        )
  return model.eval()


def random_tokens(rng):
  return torch.randint(1, BYTES, (ROWS, LENGTH), generator=rng)


def check_gap(values, k=1):
  """Refuses values whose k-th and next along the last axis nearly tie."""
  top = values.topk(k + 1).values
  if (top[..., k - 1] - top[..., k]).min() <= MIN_GAP:
    raise BadSeed


def watch_routers(model):
  """Has every sparse layer check that no token's experts nearly tie."""
  for module in model.modules():
    if type(module).__name__.endswith('Router'):
      module.register_forward_hook(
        lambda module, _, output: check_gap(
          output[0].float(), model.config.num_experts_per_tok
        )
      )


def greedy(model, tokens):
  """Continues each prompt with the best byte, one full forward a token."""
  for _ in range(NEW):
    logits = model(tokens, use_cache=False).logits[:, -1].clone()
    logits[:, BYTES:] = -math.inf
    check_gap(logits)
    tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
  new = tokens[:, -NEW:]
  if min(len(set(row)) for row in new.tolist()) < 4:
    raise BadSeed
  return new


def expect_decoder(model, tokens):
  return {
    'logits': model(tokens, use_cache=False).logits,
    'greedy': greedy(model, tokens[:, :PROMPT]),
  }


def expect_classifier(model, tokens):
  hidden = model.base_model(tokens, use_cache=False).last_hidden_state
  scores = model.score(hidden)[..., 0]
  pooled = model(tokens, use_cache=False).logits[:, 0]
  torch.testing.assert_close(pooled, scores[:, -1], rtol=0, atol=0)
  return {'scores': scores}


def build_model(class_name, options, seed):
  """Builds a model with random weights, tokens for it, and its outputs."""
  model_class = getattr(transformers, class_name)
  config = model_class.config_class(**options)
  rng = torch.Generator().manual_seed(seed)
  model = model_class._from_config(config, **STOCK)
  randomise(model, rng)
  watch_routers(model)
  tokens = random_tokens(rng)
  is_classifier = 'Classification' in class_name
  expect = expect_classifier if is_classifier else expect_decoder
  with torch.no_grad():
    return model, {'tokens': tokens} | expect(model, tokens)


def load_base(name):
  return transformers.AutoModelForCausalLM.from_pretrained(
    ROOT / name, **STOCK
  ).eval()


def build_adapter(base, targets, fan_in_fan_out, seed):
  """A base fixture with a random adapter, tokens, and the sum's logits."""
  model = load_base(base)
  rng = torch.Generator().manual_seed(seed)
  tokens = random_tokens(rng)
  with torch.no_grad():
    before = model(tokens, use_cache=False).logits
  config = peft.LoraConfig(
    r=3,
    lora_alpha=6,
    target_modules=targets,
    fan_in_fan_out=fan_in_fan_out,
    task_type='CAUSAL_LM',
  )
  model = randomise(peft.get_peft_model(model, config), rng, 'lora_')
  config.base_model_name_or_path = f'../{base}'
  with torch.no_grad():
    logits = model(tokens, use_cache=False).logits
  assert (logits - before).abs().max() > 1, 'the adapter does little'
  return model, {'tokens': tokens, 'logits': logits}


def byte_tokenizer():
  """Makes the tokenizer of jaxrl_tok.data.byte_tokenizer, without jax."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {symbol: i for i, symbol in enumerate(alphabet)}
  tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(['<pad>', '<eos>'])
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token='<pad>',
    eos_token='<eos>',
    clean_up_tokenization_spaces=False,
  )


def save_tokenizer(folder):
  """Writes the tokenizer's files, tokenizer.json on one line."""
  tokenizer = byte_tokenizer()
  assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id) == (
    258,
    PAD,
    EOS,
  )
  tokenizer.save_pretrained(folder)
  path = folder / 'tokenizer.json'
  text = json.dumps(
    json.loads(path.read_text('utf-8')),
    ensure_ascii=False,
    separators=(',', ':'),
  )
  path.write_text(text + '\n', 'utf-8')


def save_expected(folder, expected):
  arrays = {
    name: value.numpy().astype(
      np.float32 if value.is_floating_point() else np.int32
    )
    for name, value in expected.items()
  }
  np.savez_compressed(folder / 'expected.npz', **arrays)


def save_adapter(model, folder):
  """Saves an adapter as peft does, its target modules in a fixed order."""
  model.save_pretrained(folder, save_embedding_layers=False)
  (folder / 'README.md').unlink()
  path = folder / 'adapter_config.json'
  config = json.loads(path.read_text())
  config['target_modules'].sort()
  path.write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')


def check_model(folder, model, tokens):
  """The files alone give the same outputs."""
  loaded = type(model).from_pretrained(folder, **STOCK)
  with torch.no_grad():
    torch.testing.assert_close(
      loaded.eval()(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5
    )
  if folder.name in SHARD_SIZE:
    assert len(list(folder.glob('*.safetensors'))) >= 3


def check_adapter(folder, base, expected):
  """The files on top of the base's give the same logits."""
  model = peft.PeftModel.from_pretrained(load_base(base), folder)
  with torch.no_grad():
    logits = model.eval()(expected['tokens']).logits
  torch.testing.assert_close(logits, expected['logits'], rtol=0, atol=1e-5)


def check_folder(folder):
  for path in folder.iterdir():
    path.chmod(0o644)
  for path in folder.glob('*.json'):
    text = path.read_text('utf-8')
    assert not re.search(r'/(tmp|home|work|root|usr)\b', text), path
  size = sum(path.stat().st_size for path in folder.iterdir())
  assert size < MAX_BYTES, f'{folder.name}: {size} bytes'
  return size


def first_good(build, *args):
  """The first seed that does, and what is built with it."""
  for seed in range(1000):
    try:
      return seed, *build(*args, seed)
    except BadSeed:
      continue
  raise RuntimeError('no seed will do')


def make(name):
  folder = ROOT / name
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  if name in MODELS:
    seed, model, expected = first_good(build_model, *MODELS[name])
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE.get(name, '1GB'))
    save_tokenizer(folder)
    check_model(folder, model, expected['tokens'])
  else:
    seed, model, expected = first_good(build_adapter, *ADAPTERS[name])
    save_adapter(model, folder)
    check_adapter(folder, ADAPTERS[name][0], expected)
  save_expected(folder, expected)
  print(f'{name}: seed {seed}, {check_folder(folder)} bytes', flush=True)


def main():
  torch.set_num_threads(1)
  transformers.utils.logging.disable_progress_bar()
  for name in sys.argv[1:] or [*MODELS, *ADAPTERS]:
    make(name)


if __name__ == '__main__':
  main()
