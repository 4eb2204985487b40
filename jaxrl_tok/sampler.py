"""Sampling completions: encode the prompts, then scan token by token.

1. Cast the parameters to the compute dtype and undo their fsdp split, once.
2. `encode` reads the C prompts; the first token is drawn from its hidden
   state, for all B = C*G rows.
3. A `while_loop` runs chunks while any row lives; a chunk is a `scan` of
   steps of known length, so that nothing asks the device whether to go on
   between tokens. The cache grows between loops, as a step reads all of it.
   Once half of the rows are done, the others can move together into arrays
   of half the rows.
4. A step: `extend` by the last token (its keys and values go into the cache
   at one column), logits, the sampling rule, one draw, its log-prob.

A row ends with an end token, or with the token that completes a stop text in
its decoded text: an automaton of one state a row, moved by each token
(data/stops.py makes it). Without stop texts none of it is compiled.

Row b's uniform number for token t comes from fold_in(fold_in(key, b), t): a
row's sample does not depend on the other rows, on T or on the devices.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_tok import distribution
from jaxrl_tok.policy import check_array, check_prompts
from jaxrl_tok.sharding import (
  constrain_caches,
  constrain_rows,
  gathered_for_rollout,
)
from jaxrl_tok.types import Policy, Prefix, Prompts, Rollout, SamplingRule

# Tokens: a cache that much shorter is worth a program of its own for 8 layers,
# whose cache has 16 arrays. Programs grow with the layers, and so must stages.
STAGE, ARRAYS = 32, 16


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """Choices that are compiled in; temperature, ends and the rest are traced.

  truncate: whether top-k, top-p or min-p are applied (and num_kept recorded).
  greedy: take the most likely token; the distribution is then that one token,
    so its log-prob is 0 and num_kept is 1.
  chunk: tokens between two counts of the rows that still live.
  stages: lengths that the cache has on its way to T, equally far apart; each
    is a program of its own. None: one for every 32 tokens, four at most, and
    fewer for networks of more than 8 layers, whose programs are large.
  compact_levels: times that the live rows may move into half as many; each is a
    program of its own, worth it for long completions of varied length.
  """

  samples_per_prompt: int  # G
  max_completion_length: int  # T
  pad_token: int = 0
  truncate: bool = False
  greedy: bool = False
  chunk: int = 8
  stages: int | None = None
  compact_levels: int = 0


class PromptRows(NamedTuple):
  """Prompts and keys of the rows, which a loop only reads."""

  prefix: Prefix  # of C prompts, each shared by keys.size / C rows
  keys: jax.Array  # [B]


class RowState(NamedTuple):
  """State of the rows after some tokens."""

  cache: Any  # leaves [B, ...]
  token: jax.Array  # int32 [B]  the last one drawn, not yet in the cache
  done: jax.Array  # bool [B]  an end was drawn before column T
  stop_state: jax.Array | None  # int32 [B]  see StopRule; None: no stop text


class Columns(NamedTuple):
  """Fields of a Rollout, for one token [B] or for many [columns, B]."""

  token: jax.Array  # int32
  mask: jax.Array  # bool
  logp: jax.Array  # float32
  num_kept: jax.Array  # int32


class SamplerCarry(NamedTuple):
  """Values that a chunk of steps changes."""

  index: jax.Array  # int32 []  chunks done
  rows: RowState
  tables: Columns  # [columns, B]  tokens 1 .. T - 1, and a chunk's excess


def stage_ends(config: SamplerConfig, arrays: int = 1) -> list[int]:
  """Number of chunks done at the end of each stage; the last is all.

  arrays: number of arrays in the policy's cache.
  """
  columns = config.max_completion_length - 1  # every token but the last
  chunks = -(-columns // config.chunk)
  stages = config.stages
  if stages is None:
    least = STAGE * max(1, -(-arrays // ARRAYS))
    stages = min(4, -(-columns // least)) or 1
  if stages < 1:
    raise ValueError(f'stages={stages} hold no token; give 1 or more')
  ends = {-(-chunks * (i + 1) // stages) for i in range(stages)}
  return sorted(ends - {0})


def grow_cache(cache, shapes):
  """Fills each array of the cache up with zeros to its shape."""
  return jax.tree.map(
    lambda x, new: jnp.pad(x, [(0, n - m) for m, n in zip(x.shape, new.shape)]),
    cache,
    shapes,
  )


def uniforms(keys: jax.Array, times: jax.Array) -> jax.Array:
  """Draws a number in [0, 1) for every time and row: keys [B] -> [t, B]."""

  def one(key, t):
    return jax.random.uniform(jax.random.fold_in(key, t))

  return jax.vmap(jax.vmap(one, (0, None)), (None, 0))(keys, times)


def gather_rows(
  prompt_rows: PromptRows, carry: SamplerCarry, live: jax.Array
) -> tuple[PromptRows, SamplerCarry]:
  """Gathers the rows `live` of both; each then has a prompt of its own."""
  prefix, keys = prompt_rows
  G = keys.shape[0] // prefix.length.shape[0]
  prefix = jax.tree.map(lambda x: x[live // G], prefix)
  rows = jax.tree.map(lambda x: x[live], carry.rows)
  tables = jax.tree.map(lambda table: table[:, live], carry.tables)
  return (
    PromptRows(prefix, keys[live]),
    SamplerCarry(carry.index, rows, tables),
  )


def scatter_rows(
  carry: SamplerCarry, inner: SamplerCarry, live: jax.Array
) -> SamplerCarry:
  """Scatters gathered rows back to the places `live`."""
  rows, tables = carry.rows, carry.tables
  rows = jax.tree.map(lambda x, y: x.at[live].set(y), rows, inner.rows)
  tables = jax.tree.map(lambda x, y: x.at[:, live].set(y), tables, inner.tables)
  return SamplerCarry(inner.index, rows, tables)


def sample_token(
  policy: Policy, config: SamplerConfig, params, hidden, uniform, rule
):
  """Samples by hidden [B, D], uniform [B]: token, log-prob, num_kept [B]."""
  B = hidden.shape[0]
  logits = policy.logits(params, hidden)
  check_array('policy.logits', logits, float, B=B, V=policy.vocab_size)
  logits = distribution.shape_logits(logits, rule)
  num_kept = jnp.zeros((B,), jnp.int32)
  # the most likely token survives every truncation but another policy's
  ranked = policy.rank_logits is not None
  if ranked or (config.truncate and not config.greedy):
    order = policy.rank_logits(params, hidden) if ranked else logits
    order = distribution.shape_logits(order, rule) if ranked else order
    keep, num_kept = distribution.truncate(order, rule)
    logits = jnp.where(keep, logits, distribution.NEVER)
  if config.greedy:
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return token, jnp.zeros(token.shape), jnp.ones_like(token)
  token = distribution.draw(logits, uniform)
  return token, distribution.log_prob(logits, token), num_kept


def record(
  config: SamplerConfig, sampled, done, stop_state, t, rule: SamplingRule
):
  """Masks a token drawn for column t by `done` -> (Columns [B], done,
  stop_state)."""
  token, logp, num_kept = sampled
  column = Columns(
    jnp.where(done, config.pad_token, token),
    ~done,
    jnp.where(done, 0.0, logp),
    jnp.where(done, 0, num_kept),
  )
  is_end = jnp.any(token[:, None] == rule.end_tokens[None], axis=-1)
  if rule.stop is not None:
    kind, next_state = rule.stop
    stop_state = next_state[stop_state, kind[token]]
    is_end |= stop_state == next_state.shape[0] - 1
  # an end drawn in a chunk's excess, beyond column T, ends nothing
  done |= is_end & (t < config.max_completion_length)
  return column, done, stop_state


def check_cache(new, old) -> None:
  """Raises ValueError, in one line, where extend changes the cache's kind."""
  try:
    chex.assert_trees_all_equal_shapes_and_dtypes(new, old)
  except AssertionError:
    shapes = (
      jax.tree.map(lambda x: f'{jnp.result_type(x)}{list(jnp.shape(x))}', cache)
      for cache in (new, old)
    )
    raise ValueError(
      'policy.extend returned the cache {}, expected the {} that it was '
      'given'.format(*shapes)
    ) from None


def make_step(policy: Policy, config: SamplerConfig, params, rule) -> Callable:
  """Returns step(prefix, RowState, (t, uniform [B])) -> (RowState, Columns)."""

  def step(prefix, rows, column):
    t, uniform_B = column
    B = rows.token.shape[0]
    hidden, cache = policy.extend(
      params, prefix, rows.token[:, None], rows.cache, t - 1
    )
    check_array("policy.extend's hidden state", hidden, None, B=B, t=1, D=None)
    check_cache(cache, rows.cache)
    sampled = sample_token(
      policy, config, params, hidden[:, 0], uniform_B, rule
    )
    column, done, stop_state = record(
      config, sampled, rows.done, rows.stop_state, t, rule
    )
    return RowState(cache, column.token, done, stop_state), column

  return step


def run_chunk(
  step: Callable, chunk: int, prompt_rows: PromptRows, carry: SamplerCarry
) -> SamplerCarry:
  """Draws the next `chunk` tokens of every row."""
  prefix, keys = prompt_rows
  times = 1 + carry.index * chunk + jnp.arange(chunk)
  rows, columns_txB = jax.lax.scan(
    functools.partial(step, prefix), carry.rows, (times, uniforms(keys, times))
  )
  tables = jax.tree.map(
    lambda table, new: jax.lax.dynamic_update_slice(
      table, new, (carry.index * chunk, 0)
    ),
    carry.tables,
    columns_txB,
  )
  return SamplerCarry(carry.index + 1, rows, tables)


def run_to(
  end: int,
  advance: Callable,
  prompt_rows: PromptRows,
  carry: SamplerCarry,
  compact_levels: int,
) -> SamplerCarry:
  """Runs advance(PromptRows, carry) -> carry until `end` chunks are done or no
  row lives."""
  narrow = prompt_rows.keys.shape[0] // 2 if compact_levels else 0

  def goes_on(carry):
    return (carry.index < end) & (jnp.sum(~carry.rows.done) > narrow)

  body = functools.partial(advance, prompt_rows)
  carry = jax.lax.while_loop(goes_on, body, carry)
  if not narrow:
    return carry

  def move(carry):
    live = jnp.argsort(carry.rows.done, stable=True)[:narrow]
    gathered = gather_rows(prompt_rows, carry, live)
    inner = run_to(end, advance, *gathered, compact_levels - 1)
    return scatter_rows(carry, inner, live)

  return jax.lax.cond(carry.index < end, move, lambda carry: carry, carry)


def begin(policy: Policy, params, prompts: Prompts):
  """Returns (Prefix, params) as a token loop reads them: prompts are encoded as
  evaluate does it, params cast and gathered once."""
  prefix = policy.encode(params, prompts)
  C = prompts.tokens.shape[0]
  check_array("policy.encode's hidden state", prefix.hidden, None, C=C, D=None)
  return policy.split_prefix(prefix), rollout_params(policy, params)


def rollout_params(policy: Policy, params):
  """Params as a token loop reads them: cast, and gathered over fsdp."""
  cast = policy.cast_params(params)
  return gathered_for_rollout(cast, policy.partition_rules)


def make_sampler(policy: Policy, config: SamplerConfig) -> Callable:
  """Returns sample(params, key, Prompts, SamplingRule, version=0) -> Rollout,
  pure; `version` counts the updates that params have had. key: one, or one for
  each of the B rows.

  Raises ValueError, in one line, for prompts or for a policy whose arrays have
  another rank, size or dtype than types.py has.
  """
  sample_after = make_sampler_after(policy, config)

  def sample(
    params, key, prompts: Prompts, rule: SamplingRule, version=0
  ) -> Rollout:
    check_prompts(prompts)
    prefix, params = begin(policy, params, prompts)
    found = sample_after(params, key, prefix, rule, version)
    return found._replace(prompts=prompts)

  return sample


def make_sampler_after(policy: Policy, config: SamplerConfig) -> Callable:
  """Returns sample(params, key, Prefix, SamplingRule, version=0) -> Rollout
  without its prompts: make_sampler's, with what `begin` returns."""
  G, T = config.samples_per_prompt, config.max_completion_length
  chunk = max(1, min(config.chunk, T - 1))
  cache = jax.eval_shape(lambda: policy.init_cache(1, 0))
  arrays = len(jax.tree.leaves(cache))
  ends = stage_ends(dataclasses.replace(config, chunk=chunk), arrays)
  fills = Columns(config.pad_token, False, 0.0, 0)

  def start(params, prefix, row_keys, rule):
    """Draws column 0."""
    C = prefix.hidden.shape[0]
    hidden = constrain_rows(jnp.repeat(prefix.hidden, G, axis=0))
    (uniform_B,) = uniforms(row_keys, jnp.zeros(1, jnp.int32))
    sampled = sample_token(policy, config, params, hidden, uniform_B, rule)
    done, stop_state = jnp.zeros((C * G,), bool), None
    if rule.stop is not None:
      stop_state = jnp.zeros((C * G,), jnp.int32)
    first, done, stop_state = record(config, sampled, done, stop_state, 0, rule)
    shape = (ends[-1] * chunk if ends else 0, C * G)
    tables = jax.tree.map(
      lambda value, x: jnp.full(shape, value, x.dtype), fills, first
    )
    cache = policy.init_cache(C * G, 0)
    rows = RowState(cache, first.token, done, stop_state)
    return first, SamplerCarry(jnp.int32(0), rows, tables)

  def sample(
    params, key, prefix: Prefix, rule: SamplingRule, version=0
  ) -> Rollout:
    B = prefix.length.shape[0] * G
    row_keys = key
    if not key.ndim:
      row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    first, carry = start(params, prefix, row_keys, rule)
    step = make_step(policy, config, params, rule)
    advance = functools.partial(run_chunk, step, chunk)
    for end in ends:
      shapes = jax.eval_shape(lambda end=end: policy.init_cache(B, end * chunk))
      cache = grow_cache(carry.rows.cache, shapes)
      cache = constrain_caches(cache)
      carry = carry._replace(rows=carry.rows._replace(cache=cache))
      prompt_rows = PromptRows(prefix, row_keys)
      carry = run_to(end, advance, prompt_rows, carry, config.compact_levels)
    tokens, mask, logp, num_kept = (
      constrain_rows(jnp.concatenate([a[None], b])[:T].T)
      for a, b in zip(first, carry.tables)
    )
    counted = config.truncate or config.greedy
    return Rollout(
      None,
      tokens,
      mask,
      logp,
      num_kept if counted else None,
      ended=constrain_rows(carry.rows.done),
      version=jnp.broadcast_to(jnp.asarray(version, jnp.int32), (B,)),
    )

  return sample
