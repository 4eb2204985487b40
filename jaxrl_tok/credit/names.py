"""Names of the algorithms and of their parts, readable without jax.

The settings refuse an unknown word before jax takes its seconds;
algorithms.py turns the words into the functions of these names.
"""

ALGORITHMS = (
  'reinforce',
  'rloo',
  'remax',
  'a2c',
  'ppo',
  'grpo',
  'dr_grpo',
  'dapo',
  'gspo',
  'cispo',
  'reinforce_pp',
  'reinforce_pp_baseline',
  'nlpo',
)
CREDITS = ('returns', 'gae', 'vtrace')
BASELINES = (
  'none',
  'batch_mean',
  'group_mean',
  'leave_one_out',
  'ema',
  'greedy',
)
CREDIT_SPLITS = ('potential', 'outcome', 'constant', 'shuffled')
SCALES = ('none', 'group_std', 'batch_std')
MULTI_OBJECTIVE = ('sum_then_normalize', 'normalize_then_sum')
LOSSES = ('reinforce', 'clip', 'sequence_clip', 'gspo', 'cispo')
AGGREGATIONS = (
  'token_mean',
  'seq_mean_token_mean',
  'seq_mean_token_sum',
  'seq_mean_token_sum_norm',
)

# level and rule of importance weights, named as in TRL
IMPORTANCE_MODES = (
  'token_truncate',
  'token_mask',
  'sequence_truncate',
  'sequence_mask',
)

# the KL to the reference, by the effect of its gradient
KL_NAMES = ('none', 'reward', 'reverse', 'forward')
K1_NAMES = ('k1', 'loss')
K1_REFUSAL = (
  'k1 in the loss pulls to no reference: its expected gradient on-policy is 0 '
  'for a sum over tokens, and for a mean over them makes completions longer; '
  'pass --kl reward, reverse or forward'
)


def check_kl(kl: str) -> None:
  """Raises ValueError for a KL that has no effect or is unknown."""
  if kl in K1_NAMES:
    raise ValueError(K1_REFUSAL)
  if kl not in KL_NAMES:
    raise ValueError(f'--kl {kl!r} is none of {", ".join(KL_NAMES)}')
