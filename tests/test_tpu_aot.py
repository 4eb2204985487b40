"""Steps of real sizes, compiled for TPU slices that are not here.

  pip install -e '.[tpu,test]' && pytest -m tpu_aot -n 0 -s

Minutes each: they are deselected by default. Shapes are Qwen3's; the step is
GRPO's, 32 prompts x 8 completions, 512 + 512 tokens.
"""

import json

import jax
import pytest
from conftest import late_letters

from jaxrl_tok import Task
from jaxrl_tok.run import dry_run, flags
from jaxrl_tok.run.build import Own
from jaxrl_tok.run.prepare import prepare
from jaxrl_tok.run.task import Caller

SIZES = {  # D, F, L, N, tied
  '0.6B': (1024, 3072, 28, 16, True),
  '1.7B': (2048, 6144, 28, 16, True),
  '8B': (4096, 12288, 36, 32, False),
}


def write_config(directory, size: str):
  """Writes config.json of a Qwen3 of that size, and nothing else."""
  D, F, L, N, tied = SIZES[size]
  config = {
    'architectures': ['Qwen3ForCausalLM'],
    'model_type': 'qwen3',
    'hidden_act': 'silu',
    'hidden_size': D,
    'intermediate_size': F,
    'num_hidden_layers': L,
    'num_attention_heads': N,
    'num_key_value_heads': 8,
    'head_dim': 128,
    'vocab_size': 151_936,
    'max_position_embeddings': 40_960,
    'rms_norm_eps': 1e-6,
    'rope_theta': 1e6,
    'tie_word_embeddings': tied,
    'attention_bias': False,
    'use_sliding_window': False,
    'eos_token_id': 151_645,
  }
  (directory / 'config.json').write_text(json.dumps(config))


def measured(directory, target: str, mesh: str, **more) -> dry_run.Report:
  """Report of a step with that model."""
  settings = flags.settings_of(
    {
      'model': str(directory),
      'dry_run': True,
      'target': target,
      'mesh': mesh,
      'num_prompts': 32,
      'num_generations': 8,
      'max_prompt_length': 512,
      'max_completion_length': 512,
      'algorithm': 'grpo',
      'log_kl': False,
      **more,
    }
  )
  records = [{'prompt': f'{i}'} for i in range(64)]
  task = Task(records, late_letters, held_out=8)

  setup = prepare(task, settings, Own(), Caller('aot', 'pytest'), {})
  with jax.set_mesh(setup.mesh):
    report = dry_run.measure(setup)
  print('\n'.join(dry_run.lines(report)))
  return report


def ideal(report: dry_run.Report) -> float:
  """Bytes into a device where parameters are gathered once forward and once
  backward, and gradients summed once, two bytes each (bfloat16)."""
  n, f = 2 * report.parameters, report.mesh['fsdp']
  d, t = report.mesh['data'], report.mesh['tensor']
  gathers = 3 * n / t * (f - 1) / f
  return gathers + 2 * n / (f * t) * (d - 1) / d


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
  ('target', 'size', 'mesh'),
  [
    ('v5e:2x4', '0.6B', 'fsdp=8'),
    ('v5e:4x4', '0.6B', 'data=2,fsdp=8'),
    ('v5e:4x4', '1.7B', 'fsdp=16'),
    ('v5e:2x4', '1.7B', 'fsdp=8'),
    ('v5p:4x4x4', '8B', 'data=2,fsdp=16,tensor=2'),
  ],
)
def test_a_step_fits_and_moves_little(tmp_path, target, size, mesh):
  write_config(tmp_path, size)
  report = measured(tmp_path, target, mesh)
  assert dry_run.verdict(report)[0]
  programs = {p.name: p for p in report.programs}
  moved = sum(programs['update'].moved.values())
  print(f'update moves {moved / ideal(report):.2f} of the ideal')
  if report.mesh['tensor'] == 1:  # which exchanges activations, too
    assert moved <= 1.3 * ideal(report)
  for c in programs['sample'].collectives:
    if 'while/body/while' in c.name:  # chunks of tokens, and their tokens
      # neither parameters nor a cache cross the network at a token
      assert c.moved < 2**20, c
