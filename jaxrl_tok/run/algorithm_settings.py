"""Settings of the algorithm: an alias, and every choice of it; without jax."""

import dataclasses
from typing import Literal

from jaxrl_tok.credit.names import (
  AGGREGATIONS,
  ALGORITHMS,
  BASELINES,
  CREDITS,
  LOSSES,
  SCALES,
)

# other defaults that an algorithm has: NLPO masks by the sampling rule
OF_ALGORITHM = {'nlpo': {'top_p': 0.9}}


@dataclasses.dataclass(frozen=True)
class AlgorithmSettings:
  """The algorithm: an alias, and what is changed of it. None: the alias's own
  choice (--print_config shows it)."""

  algorithm: Literal[ALGORITHMS] = 'reinforce'
  """The alias."""
  compat: Literal['none', 'trl', 'verl', 'openrlhf', 'tunix'] = 'none'
  """Another system's published defaults for it, and its known traps."""
  credit: Literal[CREDITS] | None = None
  """Returns minus a baseline, or by a learned value: GAE, V-trace."""
  baseline: Literal[BASELINES] | None = None
  """Subtracted from returns; reinforce: leave_one_out, with one sample ema."""
  ema_decay: float = 0.9
  """Decay of the ema baseline."""
  scale: Literal[SCALES] | None = None
  """Divides returns minus the baseline."""
  gamma: float | None = None
  """Discount of token rewards."""
  gae_lambda: float | None = None
  """Lambda of GAE and V-trace."""
  rho_bar: float | None = None
  """V-trace's cap of the weight of a temporal difference."""
  c_bar: float | None = None
  """V-trace's cap of the weight that carries errors back."""
  bootstrap_truncated: bool | None = None
  """A completion that was cut has the value of the state after it, not 0."""
  whiten: bool | None = None
  """Whiten the advantage over the batch's chosen tokens."""
  advantage_clip: float | None = None
  """Clip the advantage to +- this; 0: do not."""
  overlong_buffer: int | None = None
  """Tokens before the limit in which completions are punished; 0: none."""
  dynamic_sampling_rounds: int | None = None
  """Rollouts at most until each group's rewards differ; 0: take the first."""
  loss: Literal[LOSSES] | None = None
  """-A log p, or with a ratio: PPO's clip, of sequences, GSPO's, CISPO's."""
  clip_low: float | None = None
  """The ratio is clipped below 1 - this."""
  clip_high: float | None = None
  """The ratio is clipped above 1 + this."""
  dual_clip: float | None = None
  """Where A < 0 the loss is at most this times -A; 0: no limit."""
  ratio_cap: float | None = None
  """CISPO's largest ratio, an absolute number."""
  ratio_floor: float | None = None
  """CISPO's smallest ratio."""
  aggregation: Literal[AGGREGATIONS] | None = None
  """How token losses become one number."""
  entropy_coef: float | None = None
  """The entropy's weight in the loss."""
  importance_cap: float | None = None
  """Weigh tokens by the ratio of policy and sampler up to this; 0: do not."""
  recompute_logp: bool | None = None
  """Take old log-probs from a pass of the policy, not from the sampler."""
  epochs: int | None = None
  """Times that an update goes through a rollout."""
  mini_batches: int | None = None
  """Optimizer steps in an epoch, each on a share of the prompts."""
  max_update_kl: float | None = None
  """An update stops before the policy moves so far (nats a token); 0: never."""
  kl: str | None = None
  """KL to the reference, by its effect: none, reward, reverse or forward."""
  beta: float | None = None
  """Coefficient of the KL."""
  kl_target: float | None = None
  """Adapt the coefficient towards this KL (nats a token); 0: do not."""
  kl_horizon: float | None = None
  """Completions in which it may change by about its own size."""
  ref_sync_steps: int | None = None
  """Steps between copies of the policy into the reference; 0: never."""
  reference_dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'
  """Dtype of the reference's parameters; auto: as the policy's."""
  log_kl: bool = True
  """Measure the KL to the starting policy at each evaluation; keeps a copy."""
  mask_sync_steps: int | None = None
  """Steps between copies of the policy into NLPO's mask policy."""
  critic: Literal['shared', 'separate', 'none'] = 'shared'
  """A value head on the policy, or a network, where one is needed."""
  critic_learning_rate: float | None = None
  """Learning rate of the value head or critic; default: learning_rate."""
  critic_warmup_steps: int | None = None
  """First steps in which only the critic (shared: its head) learns."""
  value_coef: float | None = None
  """Weight of the value's squared error."""
  value_clip: float | None = None
  """Values move at most so far in an update; 0: freely."""
