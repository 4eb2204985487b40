"""The records that flow from prompt to parameter update.

A batch goes this way, and each arrow is one function:

  Prompts -sample-> Rollout -score-> reward [B, T] -advantage-> Trajectory
          -loss-> one number a token -aggregate-> gradient -> TrainState

Letters: C prompts, G samples a prompt, B = C*G rows (the G rows of one prompt
are consecutive), P prompt length, T new tokens, V vocabulary, D model width,
F feed-forward width, N query heads, K key/value heads, H head size, L layers.
Every [B, T] array is aligned with the token that it describes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax


class Prompts(NamedTuple):
  """C prompts, right-padded.

  # tokens [7 3 9 0 0]  length 3
  """

  tokens: jax.Array  # int32 [C, P]
  length: jax.Array  # int32 [C]     1..P


class Prefix(NamedTuple):
  """What a policy remembers of its prompts: each is read once, not G times."""

  kv: tuple  # per layer (k, v), [C, K, H, P] and [C, K, P, H]
  hidden: jax.Array  # [C, D] at the last real prompt token
  length: jax.Array  # int32 [C]


class SamplingRule(NamedTuple):
  """How a distribution over tokens is made from logits; all of it is traced.

  It is part of the policy: what is sampled from is what is trained.
  """

  temperature: jax.Array  # float32 []
  top_k: jax.Array  # int32 []      V or more: keeps every token
  top_p: jax.Array  # float32 []    1: keeps every token
  min_p: jax.Array  # float32 []    0: keeps every token
  end_tokens: jax.Array  # int32 [E]  any of them ends a completion
  forbidden: jax.Array | None  # bool [V]  never sampled


class Rollout(NamedTuple):
  """What the sampler returns.

  # tokens [4 2 EOS pad pad]  mask [1 1 1 0 0]
  """

  prompts: Prompts
  tokens: jax.Array  # int32   [B, T]  pad after the end token
  mask: jax.Array  # bool    [B, T]  True where the policy chose the token
  logp: jax.Array  # float32 [B, T]  as sampled from; 0 off-mask
  num_kept: jax.Array | None  # int32 [B, T]  tokens that the rule kept, or None


class TokenStats(NamedTuple):
  """The current policy looking at a rollout."""

  logp: jax.Array  # float32 [B, T]
  entropy: jax.Array  # float32 [B, T]  nats
  value: jax.Array | None  # float32 [B, T]


class Scored(NamedTuple):
  """What an advantage is made of: a whole batch."""

  rollout: Rollout
  reward: jax.Array  # float32 [B, T]
  cut: jax.Array  # bool [B]  ran into column T without ending by itself
  value: jax.Array | None  # float32 [B, T+1]  before token t; T: after the last
  greedy_reward: jax.Array | None  # float32 [C]  of one greedy completion each
  log_change: jax.Array | None  # float32 [B, T]  l_old - l_roll


class Trajectory(NamedTuple):
  """What a loss sees; update.py vmaps over its rows (then prompts is None)."""

  rollout: Rollout
  reward: jax.Array  # float32 [B, T]  an outcome sits on the last chosen token
  advantage: jax.Array  # float32 [B, T]
  value_target: jax.Array | None  # float32 [B, T]
  ref_logp: jax.Array | None  # float32 [B, T]  of the reference policy
  old_logp: jax.Array | None  # float32 [B, T]  l_old; None: the current one
  old_value: jax.Array | None  # float32 [B, T]


class Policy(NamedTuple):
  """A model as a value: the only door to Flax."""

  init: Callable  # key -> params
  encode: Callable  # (params, Prompts) -> Prefix
  # (params, Prefix, tokens [B, t], cache | None, at)
  #   -> (hidden [B, t, D], cache)
  extend: Callable
  logits: Callable  # (params, hidden [..., D]) -> float32 [..., V]
  value: Callable | None  # (params, hidden [..., D]) -> float32 [...]
  # (rows, length) -> per layer (k, v), [B, K, H, T] and [B, K, T, H]
  init_cache: Callable
  partition_rules: tuple  # ((path regex, PartitionSpec), ...)
  # (what is trained, what is fixed) -> the params of the functions above
  merge_params: Callable
  vocab_size: int
  dtype: Any  # compute dtype; the sampler casts params to it once a rollout
  # (params, hidden) -> logits [..., V] by whose order tokens are truncated;
  # None: its own
  ranking: Callable | None = None


class KL(NamedTuple):
  """The pull to the reference: losses.KL_FORMS names its effects."""

  form: str
  beta: float  # its coefficient, or the first one where it adapts
  target: float | None  # nats a token that the coefficient is steered to
  horizon: float  # rows in which it may change by about its own size


class Algorithm(NamedTuple):
  """An alias, as optax.adam is: parts composed by name (algorithms.compose).

  `carry` is whatever the baseline remembers between updates; it lives in
  TrainState, so a resume is exact.
  """

  name: str
  settings: dict  # every choice that it was composed of
  init: Callable  # () -> carry
  # (Scored, carry)
  #   -> (advantage [B, T], value_target [B, T] | None, carry)
  advantage: Callable
  # ONE sequence: (TokenStats [T], Trajectory [T]) -> (loss [T], {name: [T]})
  loss: Callable
  value_loss: Callable | None  # the same -> [T]; None: no critic
  aggregate: Callable  # mask [B, T] -> weight [B, T] of each token's loss
  kl: KL | None
  epochs: int  # times that an update goes through a rollout
  mini_batches: int  # optimizer steps in an epoch
  max_update_kl: float | None  # an update stops before this KL(old || new)
  recompute_logp: bool  # l_old by a pass of its own, not the sampler's
  critic_warmup_steps: int  # steps in which only the critic learns
  ref_sync_steps: int  # steps between copies into the reference; 0: never
  mask_sync_steps: int  # the same of NLPO's mask policy; 0: there is none
  dynamic_sampling_rounds: (
    int  # rollouts at most, until all groups have variance
  )
  # the loss is constant for a group whose advantages are all 0: its gradient
  # need not be taken
  flat_without_advantage: bool
  greedy: bool  # whether a greedy completion of each prompt is wanted
  min_group: int  # samples a prompt that it needs

  @property
  def passes(self) -> int:
    """Optimizer steps in an update."""
    return self.epochs * self.mini_batches


@flax.struct.dataclass
class TrainState:
  """Everything that a resume needs; Orbax saves it whole."""

  step: jax.Array  # int32 []  updates done
  params: Any
  opt_state: Any
  key: jax.Array  # never advances: a step's key is fold_in(key, step)
  algorithm: Any  # the baseline's carry
  beta: jax.Array  # float32 []  coefficient of the KL
  reference: Any  # parameters of the reference policy, or None
  critic: Any = None  # parameters of a critic of its own
  mask_policy: Any = None  # the slow copy whose most likely tokens are allowed
  frozen: Any = None  # what no update changes: the base under adapters

  @property
  def trained(self) -> tuple:
    """What the optimizer changes."""
    return self.params, self.critic

  @property
  def fixed(self):
    """What Policy.merge_params makes parameters of, beside those trained."""
    if self.mask_policy is None:
      return self.frozen
    return self.frozen, self.mask_policy

  @property
  def weights(self) -> tuple:
    """What Policy.merge_params makes the current policy's parameters of."""
    return self.params, self.fixed

  @property
  def reference_weights(self) -> tuple:
    """The same for the reference. Adapters' reference is their base: joined
    with None, it needs no second copy."""
    return self.reference, self.fixed
