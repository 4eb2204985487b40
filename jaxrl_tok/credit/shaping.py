"""Shaping: changes of rewards before an advantage, and of advantages after."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_tok import masked
from jaxrl_tok.credit.advantages import in_company
from jaxrl_tok.types import Advantage, AdvantageInputs

SEATS = 2  # of a game in which one policy plays all


def by_seat(advantage: Callable) -> Callable:
  """An advantage of each seat by itself, in a game of several: its tokens, its
  rewards and its returns alone, as if what the others say were observed. A
  rollout without seats has one."""

  def of_seats(inputs: AdvantageInputs, carries: dict):
    rollout = inputs.rollout
    if rollout.seat is None:
      return advantage(inputs, carries)
    parts = []
    for seat in range(SEATS):
      on = rollout.mask & (rollout.seat == seat)
      scored = inputs.scored._replace(
        rollout=rollout._replace(mask=on, seat=None)
      )
      out = advantage(inputs._replace(scored=scored), carries)
      out = out if isinstance(out, Advantage) else Advantage(out)
      target = out.value_target
      parts.append(
        Advantage(
          masked.fill(out.advantage, on),
          None if target is None else masked.fill(target, on),
          out.metrics,
        )
      )
    return Advantage(
      sum(part.advantage for part in parts),
      None
      if parts[0].value_target is None
      else sum(part.value_target for part in parts),
      jax.tree.map(lambda *x: sum(x) / SEATS, *(p.metrics for p in parts)),
    )

  return of_seats


def overlong_penalty(
  mask: jax.Array, max_length: int, buffer: int
) -> jax.Array:
  """DAPO's soft punishment of long completions, in **tokens**, float32 [T] on
  the last chosen one of one sequence. With n chosen tokens it is

    0                              n <= max_length - buffer
    (max_length - buffer - n) / buffer  up to -1 at max_length

  arXiv:2503.14476.
  """
  over = jnp.sum(mask) - (max_length - buffer)
  penalty = -jnp.clip(over / buffer, 0.0, 1.0)
  return jnp.where(masked.last_chosen(mask), penalty, 0.0)


PENALTY = 'overlong penalty'  # its name among the rewards


def shaped(advantage: Callable, max_length: int, buffer: int) -> Callable:
  """An advantage with overlong_penalty among its rewards, of weight 1, in every
  valid row: it enters before the normalisation, as in DAPO. The sum of the
  rewards has it in sum_then_normalize; it is normalised by itself, as any other
  reward, in normalize_then_sum."""

  def with_penalty(inputs: AdvantageInputs, carries: dict) -> Advantage:
    scored = inputs.scored
    if PENALTY in scored.rewards:
      raise ValueError(f'a reward is named {PENALTY!r}; rename it')
    penalty = jax.vmap(overlong_penalty, (0, None, None))(
      inputs.mask, max_length, buffer
    )
    scored = scored._replace(
      rewards=scored.rewards | {PENALTY: penalty},
      applies=scored.applies | {PENALTY: inputs.valid},
      weights=scored.weights | {PENALTY: jnp.float32(1)},
    )
    return advantage(inputs._replace(scored=scored), carries)

  return with_penalty


def finished(
  advantage: Callable, whiten: bool, limit: float | None, size: int = 1
) -> Callable:
  """An advantage, whitened over the batch's chosen tokens (ddof 0) and clipped
  to [-limit, limit]; the value target stays as it is.

  Rows of groups with fewer than `size` valid rows are not whitened: they have
  no advantage.
  """

  def finish(inputs: AdvantageInputs, carries: dict) -> Advantage:
    out = advantage(inputs, carries)
    found = out.advantage
    if whiten:
      C = inputs.rollout.prompts.length.shape[0]
      rows = in_company(inputs.valid, C, size)
      found = masked.whiten(found, inputs.mask & rows[:, None])
    if limit is not None:
      found = jnp.clip(found, -limit, limit)
    return out._replace(advantage=found)

  return finish


def without_truncated(advantage: Callable) -> Callable:
  """An advantage whose completions that were cut are not learnt from.

  They stay in the others' baselines, scales and whitening, and in the number of
  rows of an aggregation by sequence; their tokens leave the loss, its KL and
  entropy, the critic's loss and every count of tokens. TRL's
  mask_truncated_completions; DAPO's overlong filtering, arXiv:2503.14476.
  """

  def ended_only(inputs: AdvantageInputs, carries: dict) -> Advantage:
    out = advantage(inputs, carries)
    ended = inputs.rollout.ended
    cut = inputs.valid & ~ended
    return out._replace(
      advantage=masked.fill(out.advantage, ended[:, None]),
      learns=ended,
      metrics=out.metrics | {'completions/masked_ratio': cut.mean()},
    )

  return ended_only
