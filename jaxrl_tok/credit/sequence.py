"""Credit of one sequence [T]: returns, GAE and V-trace, by the clock.

The clock ticks with the tokens that the policy chose: columns of a tool's or an
environment's text are skipped by discounts, by V and by baselines, so that a
batch without them has the same advantages. A reward that stands on such a
column does not count.

gamma and lambda are a number, or one for each token [T]: that of the step from
it to the next chosen one (`by_turn`).
"""

import chex
import jax
import jax.numpy as jnp

from jaxrl_tok import masked


def turn_ends(turn: jax.Array, mask: jax.Array) -> jax.Array:
  """Last chosen token of each turn, bool [T].

  # turn [0 0 0 1 1 1]  mask [1 1 0 1 1 0]  ->  [0 1 0 0 1 0]
  """
  number = to_clock(turn + 1, mask)  # 0 after the last chosen token
  return from_clock(number != jnp.append(number[1:], 0), mask)


def by_turn(value: float, turn: jax.Array, mask: jax.Array) -> jax.Array:
  """Discount or lambda [T] that counts turns: 1 from one token of a turn to
  its next, `value` from its last token on."""
  return jnp.where(turn_ends(turn, mask), jnp.float32(value), 1.0)


def turn_starts(returns: jax.Array, turn: jax.Array) -> jax.Array:
  """Returns [T] of a sequence by the clock, one for each turn: that of its
  first token; 0 after the last turn.

  turn: number of each token's turn by the clock, -1 after the last token.

  # G [3 3 1 0]  turn [0 0 1 -1]  ->  [3 1 0 0]
  """
  first = (turn >= 0) & (turn != jnp.append(-1, turn[:-1]))
  at = jnp.where(first, turn, len(turn))
  return jnp.zeros_like(returns).at[at].set(returns, mode='drop')


def per_token(value, mask: jax.Array) -> jax.Array:
  """Values [T] of a number, or of one for each token."""
  return jnp.broadcast_to(jnp.asarray(value, jnp.float32), mask.shape)


def reward_to_go(reward: jax.Array, mask: jax.Array, gamma) -> jax.Array:
  """Return [T] of one sequence, G_t = r_t + gamma G_{t'} with t' the next
  chosen token. A token that the policy did not choose carries G_{t'} across."""
  chex.assert_rank([reward, mask], 1)

  def back(later, now):
    r, chosen, gamma = now
    total = jnp.where(chosen, r + gamma * later, later)
    return total, total

  gained = masked.fill(reward.astype(jnp.float32), mask)
  steps = gained, mask, per_token(gamma, mask)
  return jax.lax.scan(back, jnp.float32(0), steps, reverse=True)[1]


def hold_last(returns: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns [T] of a sequence, with the last chosen token's held after it.

  # G [3 2 1 0 0]  mask [1 1 1 0 0]  ->  [3 2 1 1 1]
  """
  last = jnp.sum(masked.fill(returns, masked.last_chosen(mask)))
  over = jnp.cumsum(jnp.flip(mask)) == 0
  return jnp.where(jnp.flip(over), last, returns)


def to_clock(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Values of a sequence [T] by the clock: the chosen ones first, then 0.

  # x [5 6 7 8]  mask [1 0 1 1]  ->  [5 7 8 0]
  """
  at = jnp.where(mask, jnp.cumsum(mask) - 1, len(mask))
  return jnp.zeros_like(x).at[at].set(x, mode='drop')


def from_clock(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Undoes to_clock; 0 where not chosen.

  # x [5 7 8 0]  mask [1 0 1 1]  ->  [5 0 7 8]
  """
  at = jnp.maximum(jnp.cumsum(mask) - 1, 0)
  return masked.fill(x[at], mask)


def gae_advantage(
  reward: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  bootstrap: jax.Array,
  gamma,
  gae_lambda,
) -> jax.Array:
  """GAE [T] of one sequence.

  delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1}

  Reward, value, mask are [T]; bootstrap [] is V after the last chosen token. A
  token that the policy did not choose carries V and A across.
  arXiv:1506.02438.
  """
  chex.assert_rank([reward, value, mask, bootstrap], [1, 1, 1, 0])

  def back(later, now):
    r, v, chosen, gamma, lam = now
    value_later, advantage_later = later
    delta = r + gamma * value_later - v
    advantage = delta + gamma * lam * advantage_later
    kept = jnp.where(chosen, v, value_later)
    carried = jnp.where(chosen, advantage, advantage_later)
    return (kept, carried), jnp.where(chosen, advantage, 0.0)

  steps = (
    *(masked.fill(reward, mask), masked.fill(value, mask), mask),
    *(per_token(gamma, mask), per_token(gae_lambda, mask)),
  )
  start = bootstrap, jnp.float32(0)
  return jax.lax.scan(back, start, steps, reverse=True)[1]


def vtrace_advantage(
  reward: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  bootstrap: jax.Array,
  rho: jax.Array,
  gamma,
  gae_lambda,
  rho_bar: float,
  c_bar: float,
) -> tuple[jax.Array, jax.Array]:
  """V-trace: (advantage [T], value target [T]) of one off-policy sequence.

  e_t = min(rho_t, rho_bar) delta_t + gamma c_t e_{t+1}
  c_t = lambda min(rho_t, c_bar);  target v_t = e_t + V_t
  A_t = min(rho_t, 1) (r_t + gamma (lambda v_{t+1} + (1-lambda) V_{t+1}) - V_t)

  rho [T] is pi / mu. arXiv:1802.01561, in rlax's form (its lambda also mixes
  the targets in A). With rho = 1, the targets are GAE's.
  """
  chex.assert_rank([reward, value, mask, bootstrap, rho], [1, 1, 1, 0, 1])

  def back(later, now):
    r, v, ratio, chosen, gamma, lam = now
    value_later, target_later, error_later = later
    delta = r + gamma * value_later - v
    c = lam * jnp.minimum(ratio, c_bar)
    error = jnp.minimum(ratio, rho_bar) * delta + gamma * c * error_later
    mixed = lam * target_later + (1 - lam) * value_later
    advantage = jnp.minimum(ratio, 1.0) * (r + gamma * mixed - v)
    after = v, error + v, error
    carry = jax.tree.map(lambda x, y: jnp.where(chosen, x, y), after, later)
    out = advantage, error + v
    return carry, jax.tree.map(lambda x: jnp.where(chosen, x, 0.0), out)

  steps = (
    masked.fill(reward, mask),
    masked.fill(value, mask),
    masked.fill(rho, mask, 1.0),
    *(mask, per_token(gamma, mask), per_token(gae_lambda, mask)),
  )
  start = bootstrap, bootstrap, jnp.float32(0)
  return jax.lax.scan(back, start, steps, reverse=True)[1]
