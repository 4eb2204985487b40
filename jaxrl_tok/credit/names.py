"""Names of the algorithms and of their parts, readable without jax.

The settings refuse an unknown word before jax takes its seconds;
algorithms.py turns the words into the functions of these names.
"""

import math
import re
from typing import NamedTuple

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
DISCOUNTS = ('token', 'turn')
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


class Constraint(NamedTuple):
  """Limit of the mean of a component of the reward, over completions:
  sign (mean - limit) <= 0."""

  name: str  # of the function
  sign: int  # 1: at most the limit; -1: at least
  limit: float

  def __str__(self) -> str:
    return f'{self.name}{"<=" if self.sign > 0 else ">="}{self.limit:g}'


def read_constraint(text: str) -> Constraint:
  """Constraint of its text, 'harm<=0.01' or 'length>=20'. Raises ValueError."""
  found = re.fullmatch(r'\s*([^<>=\s/]+)\s*(<=|>=)\s*(\S+)\s*', text)
  try:
    limit = float(found[3]) if found else math.nan
  except ValueError:
    limit = math.nan
  if not math.isfinite(limit):
    raise ValueError(
      f'--constraint {text!r} is no NAME<=LIMIT or NAME>=LIMIT; pass it as '
      "'harm<=0.01', in quotes"
    )
  return Constraint(found[1], 1 if found[2] == '<=' else -1, limit)


def check_kl(kl: str) -> None:
  """Raises ValueError for a KL that has no effect or is unknown."""
  if kl in K1_NAMES:
    raise ValueError(K1_REFUSAL)
  if kl not in KL_NAMES:
    raise ValueError(f'--kl {kl!r} is none of {", ".join(KL_NAMES)}')
