"""Records that flow from prompt to parameter update.

Each arrow is one function of a batch:

  Prompts -sample-> Rollout -score-> Scored -advantage-> Trajectory
          -loss-> one number a token -aggregate-> gradient -> TrainState

Data travels in records, which are pytrees; functions are arguments. The
records of functions below (Policy, Carry, Algorithm) are values that a user
makes and passes; nothing that flows holds one.

Letters: C prompts, G samples a prompt, B = C*G rows (the G rows of one prompt
are consecutive), P prompt length, T new tokens, V vocabulary, D model width,
F feed-forward width, N query heads, K key/value heads, H head size, L layers.
Every [B, T] array is aligned with the token that it describes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp


class Prompts(NamedTuple):
  """C prompts, right-padded.

  # tokens [7 3 9 0 0]  length 3
  """

  tokens: jax.Array  # int32 [C, P]
  length: jax.Array  # int32 [C]     1..P
  inputs: dict = {}  # noqa: RUF012  {name: [C, ...]} that encode also reads


class Prefix(NamedTuple):
  """Memory of a policy after its prompts: each is read once, not G times."""

  kv: Any  # per layer (k, v), [C, K, H, P] and [C, K, P, H]
  hidden: jax.Array  # [C, D] at the last real prompt token
  length: jax.Array  # int32 [C]


class StopRule(NamedTuple):
  """Automaton of the stop texts: a completion begins in state 0, a token moves
  state s to next_state[s, kind[token]], and the last state ends it."""

  kind: jax.Array  # int32 [V]  tokens of a kind move every state alike
  next_state: jax.Array  # int32 [states, kinds]


class SamplingRule(NamedTuple):
  """Rule that makes a distribution over tokens from logits; all of it traced.

  The rule is part of the policy: the distribution that is sampled is trained.
  """

  temperature: jax.Array  # float32 []
  top_k: jax.Array  # int32 []      V or more: keeps every token
  top_p: jax.Array  # float32 []    1: keeps every token
  min_p: jax.Array  # float32 []    0: keeps every token
  end_tokens: jax.Array  # int32 [E]  any of them ends a completion
  forbidden: jax.Array | None  # bool [V]  never sampled
  stop: StopRule | None = None  # the text that a token completes ends it, too


class Rollout(NamedTuple):
  """Completions of prompts, as the sampler recorded them.

  # tokens [4 2 EOS pad pad]  mask [1 1 1 0 0]  ended

  An episode of several turns is one completion, its turns and observations
  without gaps; the mask is False where an environment wrote.

  # tokens [4 EOS o o 7 EOS]  mask [1 1 0 0 1 1]  turn [0 0 0 0 1 1]
  """

  prompts: Prompts
  tokens: jax.Array  # int32   [B, T]  pad after the end token
  mask: jax.Array  # bool    [B, T]  True where the policy chose the token
  logp: jax.Array  # float32 [B, T]  as sampled from; 0 off-mask
  num_kept: jax.Array | None  # int32 [B, T]  tokens kept by the rule, or None
  ended: jax.Array  # bool [B]  ended by itself, not cut at column T
  version: jax.Array  # int32 [B]  updates that the sampling policy had had
  # int32 [B, T]  number of a chosen token's turn, from 0; None: one turn
  turn: jax.Array | None = None
  # int32 [B, T]  seat that chose a token, in a game of several; None: one
  seat: jax.Array | None = None


class Greedy(NamedTuple):
  """Greedy completion of each prompt, that a baseline reads."""

  reward: jax.Array  # float32 [C, T]  NaN where no reward applies to it
  mask: jax.Array  # bool [C, T]


class Scored(NamedTuple):
  """Rollout with its rewards: all that an update is given. A pytree, so it can
  be queued, replayed, sharded, saved and inspected."""

  rollout: Rollout
  rewards: dict  # {name: float32 [B, T]}  an outcome: on the last chosen token
  applies: dict  # {name: bool [B]}  False: the reward does not apply
  weights: dict  # {name: float32 []}
  greedy: Greedy | None = None

  @property
  def valid(self) -> jax.Array:
    """Rows bool [B] that some reward applies to."""
    return jnp.any(jnp.stack(list(self.applies.values())), axis=0)

  @property
  def reward(self) -> jax.Array:
    """Weighted sum float32 [B, T] of the rewards that apply."""
    total = jnp.zeros(self.rollout.mask.shape, jnp.float32)
    for name, reward in self.rewards.items():
      on = self.applies[name][:, None] & self.rollout.mask
      total += self.weights[name] * jnp.where(on, reward, 0.0)
    return total


class TokenStats(NamedTuple):
  """Statistics of a rollout's tokens under the current policy."""

  logp: jax.Array  # float32 [B, T]
  entropy: jax.Array  # float32 [B, T]  nats
  value: jax.Array | None  # float32 [B, T]


class AdvantageInputs(NamedTuple):
  """Inputs of Algorithm.advantage: a whole batch.

  `reward` is what a credit adds up. Statistics that divide are taken of
  `task_reward`, which no KL is taken from.
  """

  scored: Scored
  value: jax.Array | None  # float32 [B, T+1]  before token t; T: after the last
  log_change: jax.Array | None  # float32 [B, T]  l_old - l_roll
  kl_penalty: jax.Array | None = None  # float32 [B, T]  of a KL in the reward

  @property
  def rollout(self) -> Rollout:
    return self.scored.rollout

  @property
  def valid(self) -> jax.Array:
    """Rows bool [B] that some reward applies to."""
    return self.scored.valid

  @property
  def mask(self) -> jax.Array:
    """Mask bool [B, T] of the chosen tokens of valid rows."""
    return self.rollout.mask & self.valid[:, None]

  @property
  def task_reward(self) -> jax.Array:
    """Weighted sum float32 [B, T] of the rewards that apply."""
    return self.scored.reward

  @property
  def reward(self) -> jax.Array:
    """Task's reward less the KL's penalty, float32 [B, T]."""
    if self.kl_penalty is None:
      return self.task_reward
    return self.task_reward - self.kl_penalty


class Advantage(NamedTuple):
  """Advantage of every token, 0 off-mask and in rows that are not valid."""

  advantage: jax.Array  # float32 [B, T]
  value_target: jax.Array | None = None  # float32 [B, T], where a V is learnt
  metrics: dict = {}  # noqa: RUF012  {name: []}, for the log and the carries
  learns: jax.Array | None = None  # bool [B]  rows in the loss; None: all

  def rows(self, valid: jax.Array) -> jax.Array:
    """Valid rows bool [B] that are learnt from."""
    return valid if self.learns is None else valid & self.learns


class Trajectory(NamedTuple):
  """Inputs of a loss; the update vmaps over rows (then prompts is None)."""

  rollout: Rollout  # its mask holds the chosen tokens of rows learnt from
  reward: jax.Array  # float32 [B, T]
  advantage: jax.Array  # float32 [B, T]
  value_target: jax.Array | None  # float32 [B, T]
  ref_logp: jax.Array | None  # float32 [B, T]  of the reference policy
  old_logp: jax.Array | None  # float32 [B, T]  l_old; None: the current one
  old_value: jax.Array | None  # float32 [B, T]


def first_argument(params, frozen=None):
  """Returns params: merge_params where nothing is frozen."""
  return params


class Policy(NamedTuple):
  """Network as a value: pure functions, and no other access to it.

  A network of one's own needs the first six fields. `encode` reads prompts
  [C, P]; `extend` reads completion tokens [B, t], B = C*G, after them: without
  a cache all at once from column 0, with one the next t tokens from column
  `at`, whose memory it writes and returns.
  """

  init: Callable  # key -> params
  encode: Callable  # (params, Prompts) -> Prefix
  # (params, Prefix, tokens [B, t], cache | None, at)
  #   -> (hidden [B, t, D], cache)
  extend: Callable
  logits: Callable  # (params, hidden [..., D]) -> float32 [..., V]
  # (rows B, length T) -> cache of B rows: leaves [B, ...], zero at first; an
  # axis that depends on T is grown with zeros as completions get longer
  init_cache: Callable
  vocab_size: int
  value: Callable | None = None  # (params, hidden [..., D]) -> float32 [...]
  partition_rules: tuple = ()  # ((path regex, PartitionSpec), ...)
  # (encode, extend, function that stands for these two): (params, Prompts,
  # tokens [B, t]) -> (hidden [C, D] of encode, hidden [B, t, D] of extend
  # without a cache), in one pass over the layers, so that weights that devices
  # share are gathered once; None, and where a policy has another encode or
  # extend: encode, then extend
  read: tuple | None = None
  # (encode, extend, function that goes on after both): (Prefix of B rows, cache
  # and hidden [B, t, D] that extend gave from column 0 on, count int32 [B]) ->
  # Prefix after the first `count` of those tokens; its prompts must have t
  # columns to spare. None, and where a policy has another encode or extend:
  # each turn of an episode reads its transcript anew
  append: tuple | None = None
  # (trained, frozen) -> the params of the functions above
  merge_params: Callable = first_argument
  # params -> the same numbers that its functions compute with, cast once a
  # rollout, in a form that a token loop reads without copies; it must change no
  # result
  cast_params: Callable = first_argument
  # Prefix -> the same values, in a form that a token loop reads without copies
  split_prefix: Callable = first_argument
  # (params, hidden) -> logits [..., V] by whose order tokens are truncated;
  # None: its own
  rank_logits: Callable | None = None
  max_length: int | None = None  # prompt and completion; None: any


class Carry(NamedTuple):
  """Value of TrainState that changes after each update, beside the parameters:
  an EMA, the KL's coefficient, a reference that follows, a multiplier."""

  init: Callable  # params -> value, a pytree of arrays
  # (value, state after the update, metrics of the update) -> value
  after: Callable


class KL(NamedTuple):
  """KL to the reference, by its effect (losses.KL_FORMS). Coefficient and
  reference are the carries 'kl_coef' and 'reference'."""

  form: str
  beta: float  # the coefficient, or the first one where it adapts


class Passes(NamedTuple):
  """Passes of an update over its rollout."""

  epochs: int = 1  # passes over all of it
  mini_batches: int = 1  # optimizer steps in an epoch
  max_update_kl: float | None = None  # no further step beyond KL(old || new)
  # l_old: 'current' (one step a rollout: no pass of its own), 'sampler', or
  # 'recomputed' by a pass of the policy
  old_logp: str = 'current'
  critic_warmup_steps: int = 0  # steps in which only the critic learns

  @property
  def count(self) -> int:
    """Optimizer steps in an update."""
    return self.epochs * self.mini_batches


class Algorithm(NamedTuple):
  """Credit, loss and aggregation: mathematics only. `algorithms` has the
  field's presets and composes others; any value of one's own will do."""

  name: str
  # (AdvantageInputs, {name: carry}) -> Advantage
  advantage: Callable
  # ONE sequence: (TokenStats [T], Trajectory [T]) -> (loss [T], {name: [T]})
  loss: Callable
  # (mask [B, T], valid [B]) -> weight [B, T] of each token's loss
  aggregate: Callable
  value_loss: Callable | None = None  # ONE sequence -> [T]; None: no critic
  kl: KL | None = None
  carries: dict = {}  # noqa: RUF012  {name: Carry}
  passes: Passes = Passes()  # by its paper; an update may make others
  # the loss is constant for a group whose advantages are all 0, so that its
  # gradient need not be taken
  flat_without_advantage: bool = False
  greedy: bool = False  # reads Scored.greedy
  min_group: int = 1  # samples a prompt that it needs
  dynamic_sampling_rounds: int = 0  # see collectors.dynamic
  settings: dict = {}  # noqa: RUF012  the choices that it was composed of


@flax.struct.dataclass
class TrainState:
  """State of training, saved by Orbax: what the next update starts from."""

  step: jax.Array  # int32 []  updates done
  params: Any  # what the optimizer changes of the policy
  opt_state: Any
  key: jax.Array  # never advances: a step's key is fold_in(key, step)
  carries: dict  # {name: value}, see Carry
  critic: Any = None  # parameters of a critic of its own
  frozen: Any = None  # parameters that no update changes: the base of adapters
  skipped: Any = None  # int32 []  updates in a row that were not finite

  @property
  def trained(self) -> tuple:
    """Parameters (policy, critic) that the optimizer changes."""
    return self.params, self.critic

  @property
  def policy_params(self) -> tuple:
    """Arguments of Policy.merge_params for the current policy."""
    return self.params, self.fixed

  @property
  def reference_params(self) -> tuple:
    """Arguments of Policy.merge_params for the reference: a copy that is
    carried, or the frozen base without adapters (None)."""
    return self.carries.get('reference'), self.fixed

  @property
  def fixed(self):
    """Second argument of Policy.merge_params."""
    if 'mask_policy' in self.carries:
      return self.frozen, self.carries['mask_policy']
    return self.frozen
