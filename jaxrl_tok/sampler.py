"""Sampling completions: encode the prompts, then scan token by token.

1. Cast the parameters to the compute dtype and undo their fsdp split, once.
2. `encode` reads the C prompts; the first token is drawn from its hidden
   state, for all B = C*G rows.
3. A `while_loop` runs chunks while any row lives; a chunk is a `scan` of
   steps of known length, so that nothing asks the device whether to go on
   between tokens. The cache grows between loops, as a step reads all of it;
   where half of the rows are done, the others can move together into arrays
   of half the rows.
4. A step: `extend` by the last token (its keys and values go into the cache
   at one column), logits, the sampling rule, one draw, its log-prob.

Row b's uniform number for token t comes from fold_in(fold_in(key, b), t): a
row's sample does not depend on the other rows, on T or on the devices.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_tok import distribution
from jaxrl_tok.sharding import constrain_rows, gathered_for_rollout
from jaxrl_tok.types import Policy, Prompts, Rollout, SamplingRule


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """What is compiled in; temperature, ends and the rest are traced.

  truncate: whether top-k, top-p or min-p are applied (and `kept` recorded).
  greedy: the most likely token; the distribution is then that one token, so
    its log-prob is 0 and `kept` is 1.
  chunk: tokens between two looks at how many rows still live.
  stages: lengths that the cache has on its way to T, equally far apart; each
    is a program of its own. None: one for every STAGE tokens, four at most.
  compact_levels: how often the live rows may move into half as many; each is a
    program of its own, so it pays for long completions of varied length.
  """

  samples_per_prompt: int  # G
  max_completion_length: int  # T
  pad_token: int = 0
  truncate: bool = False
  greedy: bool = False
  chunk: int = 8
  stages: int | None = None
  compact_levels: int = 0


STAGE = 32  # tokens; a cache that much shorter is not worth a program


def stage_ends(config: SamplerConfig) -> list[int]:
  """How many chunks are done at the end of each stage; the last is all."""
  columns = config.max_completion_length - 1  # every token but the last
  chunks = -(-columns // config.chunk)
  stages = config.stages
  if stages is None:
    stages = min(4, -(-columns // STAGE)) or 1
  ends = {-(-chunks * (i + 1) // stages) for i in range(stages)}
  return sorted(ends - {0})


def grow_cache(cache, shapes):
  """The cache, each array filled up with zeros to its shape."""
  return jax.tree.map(
    lambda x, new: jnp.pad(x, [(0, n - m) for m, n in zip(x.shape, new.shape)]),
    cache,
    shapes,
  )


def uniforms(keys: jax.Array, times: jax.Array) -> jax.Array:
  """A number in [0, 1) for every time and row: keys [B] -> [t, B]."""

  def one(key, t):
    return jax.random.uniform(jax.random.fold_in(key, t))

  return jax.vmap(jax.vmap(one, (0, None)), (None, 0))(keys, times)


def gather_rows(rows: tuple, carry: tuple, live: jax.Array) -> tuple:
  """The same of some of the rows, each with a prompt of its own.

  rows: (Prefix, keys [B]); carry: (chunks done, (cache, token, done) of [B,
  ...], tables of [columns, B]).
  """
  (prefix, keys), (index, steps, tables) = rows, carry
  G = keys.shape[0] // prefix.length.shape[0]
  prefix = jax.tree.map(lambda x: x[live // G], prefix)
  steps = jax.tree.map(lambda x: x[live], steps)
  tables = jax.tree.map(lambda table: table[:, live], tables)
  return (prefix, keys[live]), (index, steps, tables)


def scatter_rows(carry: tuple, inner: tuple, live: jax.Array) -> tuple:
  """The carry, with what its rows `live` have become."""
  (_, steps, tables), (index, inner_steps, inner_tables) = carry, inner
  steps = jax.tree.map(lambda x, y: x.at[live].set(y), steps, inner_steps)
  tables = jax.tree.map(lambda x, y: x.at[:, live].set(y), tables, inner_tables)
  return index, steps, tables


def make_sampler(policy: Policy, config: SamplerConfig) -> Callable:
  """Returns sample(params, key, Prompts, SamplingRule) -> Rollout, pure."""
  G, T = config.samples_per_prompt, config.max_completion_length
  chunk = max(1, min(config.chunk, T - 1))
  ends = stage_ends(dataclasses.replace(config, chunk=chunk))
  columns = ends[-1] * chunk if ends else 0

  def sample_token(params, hidden, uniform, rule: SamplingRule):
    """hidden [B, D], uniform [B] -> token, log-prob, kept, each [B]."""
    logits = policy.logits(params, hidden)
    logits = distribution.shape_logits(logits, rule)
    num_kept = jnp.zeros(logits.shape[:1], jnp.int32)
    # the most likely token survives every truncation but another policy's
    ranked = policy.ranking is not None
    if ranked or (config.truncate and not config.greedy):
      order = policy.ranking(params, hidden) if ranked else logits
      order = distribution.shape_logits(order, rule) if ranked else order
      keep, num_kept = distribution.truncate(order, rule)
      logits = jnp.where(keep, logits, distribution.NEVER)
    if config.greedy:
      token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
      return token, jnp.zeros(token.shape), jnp.ones_like(token)
    token = distribution.draw(logits, uniform)
    return token, distribution.log_prob(logits, token), num_kept

  def record(sampled, done, rule):
    """Masks a picked token by `done` -> (column of the rollout, done)."""
    token, logp, num_kept = sampled
    column = (
      jnp.where(done, config.pad_token, token),
      ~done,
      jnp.where(done, 0.0, logp),
      jnp.where(done, 0, num_kept),
    )
    ended = jnp.any(token[:, None] == rule.end_tokens[None], axis=-1)
    return column, done | ended

  def sample(params, key, prompts: Prompts, rule: SamplingRule) -> Rollout:
    params = jax.tree.map(lambda x: x.astype(policy.dtype), params)
    params = gathered_for_rollout(params, policy.partition_rules)
    B = prompts.tokens.shape[0] * G
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))

    def step(prefix, carry, column):
      (cache, token, done), (t, uniform_B) = carry, column
      hidden, cache = policy.extend(
        params, prefix, token[:, None], cache, t - 1
      )
      sampled = sample_token(params, hidden[:, 0], uniform_B, rule)
      column, done = record(sampled, done, rule)
      return (cache, column[0], done), column

    def run_chunk(rows, carry):
      (prefix, keys), (index, steps, tables) = rows, carry
      times = 1 + index * chunk + jnp.arange(chunk)
      steps, columns_tB = jax.lax.scan(
        functools.partial(step, prefix), steps, (times, uniforms(keys, times))
      )
      tables = jax.tree.map(
        lambda table, new: jax.lax.dynamic_update_slice(
          table, new, (index * chunk, 0)
        ),
        tables,
        columns_tB,
      )
      return index + 1, steps, tables

    def run_to(end, rows, carry, compact_levels):
      """The carry after `end` chunks, or when no row lives."""
      narrow = rows[1].shape[0] // 2 if compact_levels else 0

      def goes_on(carry):
        index, (_, _, done), _ = carry
        return (index < end) & (jnp.sum(~done) > narrow)

      body = functools.partial(run_chunk, rows)
      carry = jax.lax.while_loop(goes_on, body, carry)
      if not narrow:
        return carry

      def move(carry):
        _, (_, _, done), _ = carry
        live = jnp.argsort(done, stable=True)[:narrow]
        inner = run_to(end, *gather_rows(rows, carry, live), compact_levels - 1)
        return scatter_rows(carry, inner, live)

      return jax.lax.cond(carry[0] < end, move, lambda carry: carry, carry)

    prefix = policy.encode(params, prompts)
    hidden = constrain_rows(jnp.repeat(prefix.hidden, G, axis=0))
    (uniform_B,) = uniforms(row_keys, jnp.zeros(1, jnp.int32))
    sampled = sample_token(params, hidden, uniform_B, rule)
    first, done = record(sampled, jnp.zeros((B,), bool), rule)
    fills = (config.pad_token, False, 0.0, 0)
    tables = tuple(
      jnp.full((columns, B), value, x.dtype) for value, x in zip(fills, first)
    )
    cache, index, token = policy.init_cache(B, 0), jnp.int32(0), first[0]
    for end in ends:
      shapes = jax.eval_shape(lambda end=end: policy.init_cache(B, end * chunk))
      cache = jax.tree.map(constrain_rows, grow_cache(cache, shapes))
      carry = index, (cache, token, done), tables
      carry = run_to(end, (prefix, row_keys), carry, config.compact_levels)
      index, (cache, token, done), tables = carry
    tokens, mask, logp, num_kept = (
      constrain_rows(jnp.concatenate([a[None], b])[:T].T)
      for a, b in zip(first, tables)
    )
    counted = config.truncate or config.greedy
    return Rollout(prompts, tokens, mask, logp, num_kept if counted else None)

  return sample
