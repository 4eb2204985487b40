"""Hugging Face `generate`: seconds to sample T tokens for C x G rows.

Measured: one call of `generate`, prompts as tensors in, tokens out; it reads
the prompts, each G times as num_return_sequences repeats them first, and then
decodes. The model is a directory's, or a Llama of random weights, with sdpa
attention, in float32 or wholly in bfloat16; torch.inference_mode, the default
DynamicCache, plain sampling (temperature 1, no top-k, no top-p). No end token
is set, so there is no stopping rule to look at after each token and every row
runs to T.

  python hf_peer.py '{"bench": "decode", "size": {...}, "prompts": 64, ...}'
"""

import protocol

# isort: split
import torch
from transformers import (
  AutoModelForCausalLM,
  GenerationConfig,
  LlamaConfig,
  LlamaForCausalLM,
)


def make_model(job):
  if job['model']:
    model = AutoModelForCausalLM.from_pretrained(
      job['model'], dtype=torch.float32, attn_implementation='sdpa'
    )
    # the model's own choices would be filled in, its end token among them
    model.generation_config = GenerationConfig()
    model.config.eos_token_id = None
    return model
  size = job['size']
  config = LlamaConfig(
    vocab_size=size['vocab_size'],
    hidden_size=size['d_model'],
    intermediate_size=size['d_ff'],
    num_hidden_layers=size['num_layers'],
    num_attention_heads=size['num_heads'],
    num_key_value_heads=size['num_kv_heads'],
    head_dim=size['head_dim'],
    max_position_embeddings=job['prompt_length'] + job['completion_length'],
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    attn_implementation='sdpa',
  )
  return LlamaForCausalLM(config)


def main():
  job = protocol.read_job()
  protocol.check('bench of hf_peer', job['bench'], 'decode')
  torch.set_num_threads(job['threads'])
  torch.manual_seed(0)

  model = make_model(job).to(getattr(torch, job['dtype'])).eval()
  C, P = job['prompts'], job['prompt_length']
  G, T = job['samples'], job['completion_length']
  tokens_CxP = torch.randint(job['size']['vocab_size'], (C, P))
  mask_CxP = torch.ones_like(tokens_CxP)
  config = GenerationConfig(
    max_new_tokens=T,
    do_sample=True,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    num_return_sequences=G,
    pad_token_id=0,
  )

  with torch.inference_mode():
    for _ in protocol.rounds(['torch', 'transformers'], job):
      out_BxS = model.generate(
        tokens_CxP, attention_mask=mask_CxP, generation_config=config
      )
      protocol.check('generated shape', tuple(out_BxS.shape), (C * G, P + T))


if __name__ == '__main__':
  main()
