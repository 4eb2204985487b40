"""Run that test_kills.py kills: PPO with epochs and mini-batches, a critic, an
adaptive KL and dynamic sampling.

  python tests/faults/kill_run.py --output_dir DIR --resume auto
"""

from jaxrl_tok import Task, main

RECORDS = [{'prompt': f'{i} and {i * i}:'} for i in range(40)]
SMALL = {
  'num_prompts': 4,
  'num_generations': 2,
  'held_out': 4,
  'max_steps': 200,
  'eval_every': 20,
  'save_every': 3,
  'report_to': 'none',
  'max_completion_length': 6,
  'length_buckets': 1,
  'd_model': 16,
  'num_layers': 1,
  'num_heads': 2,
  'num_kv_heads': 1,
  'd_ff': 16,
  'algorithm': 'ppo',
  'critic': 'separate',
  'epochs': 2,
  'mini_batches': 2,
  'kl': 'reverse',
  'beta': 0.1,
  'kl_target': 0.01,
  'dynamic_sampling_rounds': 3,
}


def letters(completion_ids, **columns):
  """Whether most tokens are letters: groups of equal rewards are common."""
  return [
    float(sum(97 <= i < 123 for i in ids) > len(ids) / 4)
    for ids in completion_ids
  ]


if __name__ == '__main__':
  main(Task(RECORDS, letters), None, **SMALL)
