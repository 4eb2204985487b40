"""Data and reward of the files beside this one."""

import random


def sums(seed, index):
  rng = random.Random(f'{seed} {index}')
  a, b = rng.randrange(10), rng.randrange(10)
  return {'prompt': f'{a}+{b}=', 'answer': str(a + b)}


def even(prompts, completions, **columns):
  return [sum(c in '02468' for c in t) / max(len(t), 1) for t in completions]


SETTINGS = {
  'max_completion_length': 6,
  'num_prompts': 8,
  'num_generations': 4,
  'learning_rate': 1e-2,
  'd_model': 16,
  'num_layers': 1,
  'num_heads': 2,
  'num_kv_heads': 1,
  'd_ff': 16,
}
