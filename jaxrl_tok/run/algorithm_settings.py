"""Settings of the algorithm: an alias, and its choices; without jax."""

import dataclasses
from typing import Literal

from jaxrl_tok.credit.names import (
  AGGREGATIONS,
  ALGORITHMS,
  BASELINES,
  CREDIT_SPLITS,
  CREDITS,
  IMPORTANCE_MODES,
  LOSSES,
  MULTI_OBJECTIVE,
  SCALES,
)

# defaults that an algorithm changes: NLPO masks by the sampling rule
OF_ALGORITHM = {'nlpo': {'top_p': 0.9}}


@dataclasses.dataclass(frozen=True)
class AlgorithmSettings:
  """The algorithm: an alias, and changes to it. None: the alias's own choice
  (--print_config shows it)."""

  algorithm: Literal[ALGORITHMS] = 'reinforce'
  """Alias of the algorithm."""
  compat: Literal['none', 'trl', 'verl', 'openrlhf', 'tunix'] = 'none'
  """Defaults that another system publishes for the algorithm; warns of its
  known traps."""
  credit: Literal[CREDITS] | None = None
  """Advantage: returns minus a baseline, or by a learned value (GAE,
  V-trace)."""
  credit_split: Literal[CREDIT_SPLITS] = 'potential'
  """Split of rewards that are a list with a number for each token, while
  training: as given (potential), their sum on the last token (outcome), or as
  controls 1 on the last token whatever the text (constant) and the numbers in
  random order (shuffled)."""
  baseline: Literal[BASELINES] | None = None
  """Baseline, subtracted from returns; reinforce: leave_one_out, with one
  sample a prompt ema."""
  ema_decay: float = 0.9
  """Decay of the ema baseline."""
  scale: Literal[SCALES] | None = None
  """Scale, which divides returns minus the baseline: the standard deviation of
  the group's rewards or of the batch's."""
  multi_objective_aggregation: Literal[MULTI_OBJECTIVE] | None = None
  """Normalisation of several rewards: of their sum, or of each in its group,
  then of the sum over the batch (GDPO)."""
  gamma: float | None = None
  """Discount of token rewards."""
  gae_lambda: float | None = None
  """Lambda of GAE and V-trace."""
  rho_bar: float | None = None
  """Cap of V-trace's weight of a temporal difference."""
  c_bar: float | None = None
  """Cap of V-trace's weight that carries errors back."""
  bootstrap_truncated: bool | None = None
  """Bootstrap a completion that was cut with the value of its last state, not
  with 0."""
  whiten: bool | None = None
  """Whiten the advantage over the batch's chosen tokens."""
  advantage_clip: float | None = None
  """Clip the advantage to +- this; 0: no clip."""
  overlong_buffer: int | None = None
  """Tokens before max_completion_length in which a growing penalty is taken
  from the reward, before it is normalised (with normalize_then_sum it is a
  reward of its own); 0: none."""
  mask_truncated_completions: bool | None = None
  """Learn from no completion that was cut; the baselines of the others still
  count it."""
  dynamic_sampling_rounds: int | None = None
  """Rollouts at most to find groups whose rewards differ (DAPO); 0: no dynamic
  sampling."""
  loss: Literal[LOSSES] | None = None
  """Loss of a token: -A log p (reinforce), or with a ratio: PPO's clip, PPO's
  clip of the sequence's ratio, GSPO's, CISPO's."""
  clip_low: float | None = None
  """Clip the ratio below 1 - this."""
  clip_high: float | None = None
  """Clip the ratio above 1 + this."""
  dual_clip: float | None = None
  """Limit of the loss where A < 0, this times -A; 0: no limit."""
  ratio_cap: float | None = None
  """Cap of CISPO's ratio, an absolute number."""
  ratio_floor: float | None = None
  """Floor of CISPO's ratio."""
  aggregation: Literal[AGGREGATIONS] | None = None
  """Aggregation of token losses to one number."""
  entropy_coef: float | None = None
  """Weight of the entropy bonus in the loss."""
  importance_cap: float | None = None
  """Cap of importance weights, the ratio of policy and sampler; 0: no
  weights."""
  importance_mode: Literal[IMPORTANCE_MODES] | None = None
  """Level and rule of importance weights: the ratio of a token or of a
  sequence, truncated at the cap or masked (0) above it; default:
  token_truncate."""
  recompute_logp: bool | None = None
  """Take old log-probs from a pass of the policy, not from the sampler."""
  epochs: int | None = None
  """Passes of an update over its rollout."""
  mini_batches: int | None = None
  """Optimizer steps in an epoch, each on a share of the prompts."""
  max_update_kl: float | None = None
  """Stop an update once the policy has moved further than this (KL, nats a
  token); 0: never."""
  kl: str | None = None
  """KL to the reference, by its effect: none, reward, reverse or forward."""
  beta: float | None = None
  """Coefficient of the KL."""
  kl_target: float | None = None
  """Adapt beta towards this KL (nats a token); 0: beta is constant."""
  kl_horizon: float | None = None
  """Completions in which the adaptive beta may change by about its own size."""
  ref_sync_steps: int | None = None
  """Steps between copies of the policy into the reference; 0: never."""
  reference_dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'
  """Dtype of the reference's parameters; auto: as the policy's."""
  log_kl: bool = True
  """Measure the KL to the starting policy at each evaluation; holds a copy of
  its parameters."""
  constraint: tuple[str, ...] = ()
  """Limits of means, as 'harm<=0.01' 'length>=20': names of the task's
  constraints or rewards. Each function's value times a multiplier, which grows
  while the limit is passed, is taken from the reward."""
  constraint_rate: float = 0.1
  """Change of a multiplier in a step, for each unit that the mean is beyond its
  limit."""
  constraint_damping: float = 3.0
  """Price added to a multiplier for each unit that the mean is beyond its
  limit, so that it does not swing about it; 0: none."""
  mask_sync_steps: int | None = None
  """Steps between copies of the policy into NLPO's mask policy."""
  critic: Literal['shared', 'separate', 'none'] = 'shared'
  """Critic, for algorithms that need one: a value head on the policy (shared)
  or a network (separate)."""
  critic_learning_rate: float | None = None
  """Learning rate of the value head or critic; default: learning_rate."""
  critic_warmup_steps: int | None = None
  """Steps at first in which only the critic (shared: its head) learns."""
  value_coef: float | None = None
  """Weight of the value's squared error."""
  value_clip: float | None = None
  """Clip the change of a value in an update to +- this; 0: no clip."""
