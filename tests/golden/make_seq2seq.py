"""Makes tests/golden/seq2seq: tiny encoder-decoders with torch's outputs.

Each fixture is a Hugging Face directory of a small model with random weights,
saved by save_pretrained, with a byte tokenizer that ends a prompt as the
family's own does, and expected.npz:

* `prompts` [2, 12] and `length` [2]: what the encoder reads, the second padded;
* `decoder` [2, 12]: what the decoder reads, the start and forced tokens first,
  of which there are `first`;
* `logits` [2, 12, V] of one full forward, with `length` as attention mask;
* `greedy` [2, 10]: what generate writes after the start and forced tokens; pad
  and ids without a token are suppressed, and one row ends by itself.

All of it is float32 on the CPU with eager attention. A seed is passed over as
in make_families.py, which this file needs, and all that it needs. To rebuild
everything:

  python tests/golden/make_seq2seq.py

or only some: python tests/golden/make_seq2seq.py t5 bart
"""

import json
import math
import re
import shutil
import sys

import make_families as families
import torch
import transformers
from make_families import BYTES, EOS, EPS, NEW, PAD, VOCAB, BadSeed
from tokenizers.processors import TemplateProcessing

ROOT = families.ROOT.with_name('seq2seq')
BOS, ENGLISH, ROMANIAN, USED = 258, 259, 260, 261
SPECIAL = {'<eos>': EOS, '<s>': BOS, 'en_XX': ENGLISH, 'ro_RO': ROMANIAN}
ROWS, LENGTH, SHORT = 2, 12, 7

COMMON = {'vocab_size': VOCAB, 'pad_token_id': PAD, 'eos_token_id': EOS}
# Two layers read and three write; sizes differ wherever a family lets them.
T5 = COMMON | {
  'd_model': 18,
  'd_kv': 5,
  'd_ff': 28,
  'num_layers': 2,
  'num_decoder_layers': 3,
  'num_heads': 3,
  # distances from 2 up share buckets, and those from 9 up are one
  'relative_attention_num_buckets': 8,
  'relative_attention_max_distance': 9,
  'layer_norm_epsilon': EPS,
  'decoder_start_token_id': PAD,
}
BART = COMMON | {
  'd_model': 12,
  'encoder_layers': 2,
  'decoder_layers': 3,
  'encoder_attention_heads': 3,
  'decoder_attention_heads': 4,
  'encoder_ffn_dim': 28,
  'decoder_ffn_dim': 20,
  'max_position_embeddings': 40,
  'forced_eos_token_id': EOS,
}

# Name -> (class of the model, what its configuration is made with, forced first
# token, what the tokenizer writes around a prompt).
MODELS = {
  't5': ('T5ForConditionalGeneration', T5, None, '$A <eos>'),
  't5_gated': (
    'T5ForConditionalGeneration',
    T5 | {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False},
    None,
    '$A <eos>',
  ),
  'bart': (
    'BartForConditionalGeneration',
    BART | {'bos_token_id': BOS, 'decoder_start_token_id': EOS},
    BOS,
    '<s> $A <eos>',
  ),
  'mbart': (
    'MBartForConditionalGeneration',
    BART
    | {
      'bos_token_id': BOS,
      'decoder_start_token_id': EOS,
      'activation_function': 'relu',
      'scale_embedding': True,
    },
    ROMANIAN,
    '$A <eos> en_XX',
  ),
  'marian': (
    'MarianMTModel',
    BART
    | {
      'decoder_start_token_id': PAD,
      'activation_function': 'swish',
      'scale_embedding': True,
    },
    None,
    '$A <eos>',
  ),
}

# The first pattern found in a parameter's name gives the standard deviation of
# what the matrix puts out for inputs of standard deviation one.
GAINS = [
  (r'lm_head', 2.5),
  (r'[qk]_proj', 2.5),  # what is attended to changes from token to token
  (r'out_proj', 0.8),
  (r'fc2', 3.0),
  (r'Attention\.o\.', 1.5),
  (r'\.wo\.', 8.0),
  (r'', 1.0),
]


def random_parameter(name, shape, tied, rng):
  """Draws a parameter in place of its initial value."""
  normal = torch.randn(shape, generator=rng)
  if 'relative_attention_bias' in name:
    return 0.8 * normal
  if name.endswith('bias'):
    return 0.3 * normal
  if 'embed_positions' in name:
    return normal
  if re.search(r'layer_?norm', name):
    return 1 + 0.3 * normal
  if 'shared' in name:
    # T5 divides by the root of its width what a tied head reads
    return normal * {'t5': 1.0, 'bart': 2.5 / math.sqrt(shape[-1])}[tied]
  gain = next(gain for pattern, gain in GAINS if re.search(pattern, name))
  return normal * gain / math.sqrt(shape[-1])


def build_network(class_name, options, rng):
  """Builds a network with random weights; a T5 of version 1.1 has a head of its
  own, which transformers 5 ties until it reads the files."""
  model_class = getattr(transformers, class_name)
  given = {k: v for k, v in options.items() if 'forced' not in k}
  config = model_class.config_class(**given)
  model = model_class._from_config(config, **families.STOCK)
  if options.get('tie_word_embeddings') is False:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
  tied = 't5' if class_name.startswith('T5') else 'bart'
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if not (tied == 'bart' and parameter.requires_grad is False):
        parameter.copy_(random_parameter(name, parameter.shape, tied, rng))
    if tied == 'bart':
      bias = model.final_logits_bias
      bias.copy_(0.5 * torch.randn(bias.shape, generator=rng))
      bias[:, EOS] = 4.0  # one row is to end by itself
  return model.eval()


def greedy(model, prompts, mask, forced):
  """Runs generate -> (new tokens [2, NEW] after the first ones, first)."""
  first = 1 + (forced is not None)
  text = model.generate(
    prompts,
    attention_mask=mask,
    do_sample=False,
    num_beams=1,
    use_cache=False,  # as deep as the encoder in transformers 5.23
    max_new_tokens=first + NEW + 2,
    suppress_tokens=[PAD, *range(USED, VOCAB)],
  )
  text = torch.nn.functional.pad(text, (0, NEW), value=PAD)
  logits = model(prompts, attention_mask=mask, decoder_input_ids=text).logits
  logits = logits[:, first - 1 : first - 1 + NEW].clone()
  logits[..., [PAD, *range(USED, VOCAB)]] = -math.inf
  new = text[:, first : first + NEW]
  written = new != PAD
  families.check_gap(logits[written])
  assert (logits.argmax(-1) == new)[written].all()
  lengths = sorted(written.sum(1).tolist())
  if not 3 <= lengths[0] < lengths[1] == NEW:
    raise BadSeed
  if min(len(set(row)) for row in new.tolist()) < 3:
    raise BadSeed
  return new, first


def build_model(class_name, options, forced, template, seed):
  """Builds a model with random weights, tokens for it, and its outputs."""
  rng = torch.Generator().manual_seed(seed)
  model = build_network(class_name, options, rng)
  start = options['decoder_start_token_id']
  described = {k: v for k, v in options.items() if k.endswith('_token_id')} | {
    'forced_bos_token_id': forced
  }
  model.generation_config = transformers.GenerationConfig(**described)
  prompts = torch.randint(1, BYTES, (ROWS, LENGTH), generator=rng)
  length = torch.tensor([LENGTH, SHORT])
  mask = (torch.arange(LENGTH)[None] < length[:, None]).long()
  prompts = torch.where(mask == 1, prompts, PAD)
  with torch.no_grad():
    new, first = greedy(model, prompts, mask, forced)
    decoder = torch.randint(1, BYTES, (ROWS, LENGTH), generator=rng)
    decoder[:, :first] = torch.tensor([start, forced or 0])[:first]
    logits = model(
      prompts, attention_mask=mask, decoder_input_ids=decoder
    ).logits
  return model, {
    'prompts': prompts,
    'length': length,
    'decoder': decoder,
    'first': torch.tensor(first),
    'logits': logits,
    'greedy': new,
  }


def save_tokenizer(folder, template):
  """Writes the byte tokenizer with the family's special tokens."""
  tokenizer = families.byte_tokenizer()
  tokenizer.add_special_tokens(
    {'bos_token': '<s>', 'extra_special_tokens': ['en_XX', 'ro_RO']}
  )
  backend = tokenizer.backend_tokenizer
  assert all(backend.token_to_id(text) == i for text, i in SPECIAL.items())
  backend.post_processor = TemplateProcessing(
    single=template,
    special_tokens=[(t, i) for t, i in SPECIAL.items() if t in template],
  )
  tokenizer.save_pretrained(folder)
  path = folder / 'tokenizer.json'
  text = json.dumps(
    json.loads(path.read_text('utf-8')),
    ensure_ascii=False,
    separators=(',', ':'),
  )
  path.write_text(text + '\n', 'utf-8')


def save_config(folder, options):
  """Writes config.json as the hub has it: transformers 5 reads, but does not
  write, that the head of a T5 of version 1.1 is its own."""
  path = folder / 'config.json'
  config = json.loads(path.read_text())
  if options.get('tie_word_embeddings') is False:
    config.pop('scale_decoder_outputs')
    config['tie_word_embeddings'] = False
  config['decoder_start_token_id'] = options['decoder_start_token_id']
  path.write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')


def check_model(folder, model, expected):
  """The files alone give the same outputs."""
  loaded = type(model).from_pretrained(folder, **families.STOCK).eval()
  mask = torch.arange(LENGTH)[None] < expected['length'][:, None]
  with torch.no_grad():
    logits = loaded(
      expected['prompts'],
      attention_mask=mask.long(),
      decoder_input_ids=expected['decoder'],
    ).logits
  torch.testing.assert_close(logits, expected['logits'], rtol=0, atol=1e-5)


def make(name):
  folder = ROOT / name
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  _, options, _, template = MODELS[name]
  seed, model, expected = families.first_good(build_model, *MODELS[name])
  model.save_pretrained(folder)
  save_config(folder, options)
  save_tokenizer(folder, template)
  check_model(folder, model, expected)
  families.save_expected(folder, expected)
  size = families.check_folder(folder)
  print(f'{name}: seed {seed}, {size} bytes', flush=True)


def main():
  torch.set_num_threads(1)
  transformers.utils.logging.disable_progress_bar()
  for name in sys.argv[1:] or MODELS:
    make(name)


if __name__ == '__main__':
  main()
