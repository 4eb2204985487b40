"""Laws of the sampler: what is sampled is what is evaluated, row by row."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
  END,
  ONE_LAYER,
  OTHER_END,
  PAD,
  changed,
  look,
  random_prompts,
  recurrent,
)

from jaxrl_tok import distribution
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.sampler import SamplerConfig, make_sampler, stage_ends
from jaxrl_tok.types import Prompts

FORBIDDEN = np.arange(11) % 4 == 0
RULES = {
  'plain': {},
  'temperature': {'temperature': 0.7},
  'hot': {'temperature': 1.8},
  'top_k': {'top_k': 3},
  'top_p': {'top_p': 0.8},
  'min_p': {'min_p': 0.1},
  'forbidden': {'forbidden': FORBIDDEN},
  'all': {
    'temperature': 1.3,
    'top_k': 8,
    'top_p': 0.9,
    'min_p': 0.02,
    'forbidden': FORBIDDEN,
  },
}


@pytest.fixture(scope='module')
def samplers(tiny):
  """truncate -> jitted sampler; the rules themselves are traced."""
  return {
    truncate: jax.jit(
      make_sampler(tiny.policy, changed(tiny.config, truncate=truncate))
    )
    for truncate in (False, True)
  }


@pytest.mark.parametrize('name', RULES)
def test_log_probs_are_those_of_evaluate(tiny, samplers, name):
  rule = distribution.make_rule(11, [END, OTHER_END], **RULES[name])
  cut = any(k in RULES[name] for k in ('top_k', 'top_p', 'min_p'))
  rollout = samplers[cut](tiny.params, jax.random.key(3), tiny.prompts, rule)
  stats = look(tiny.policy, tiny.params, rollout, rule)
  np.testing.assert_allclose(rollout.logp, stats.logp, atol=1e-5)
  mask = np.asarray(rollout.mask)
  assert (np.asarray(rollout.logp)[~mask] == 0).all()
  assert (np.asarray(stats.logp)[mask] <= 1e-6).all()
  if 'forbidden' in RULES[name]:
    assert not FORBIDDEN[np.asarray(rollout.tokens)[mask]].any()
  if cut:
    num_kept = np.asarray(rollout.num_kept)
    assert (num_kept[mask] >= 1).all()
    assert (num_kept[mask] < 11).any()


def test_one_compilation_serves_every_rule(tiny, samplers):
  for temperature, ends in ((1.0, [END, 3]), (0.5, [4, 5])):
    rule = distribution.make_rule(11, ends, temperature, top_p=0.9)
    samplers[True](tiny.params, jax.random.key(0), tiny.prompts, rule)
  before = samplers[True]._cache_size()
  rule = distribution.make_rule(11, [1, 2], 3.0, top_k=2, min_p=0.3)
  samplers[True](tiny.params, jax.random.key(9), tiny.prompts, rule)
  assert samplers[True]._cache_size() == before


def test_greedy_is_the_most_likely_token_and_certain(tiny):
  greedy = changed(tiny.config, greedy=True)
  sample = jax.jit(make_sampler(tiny.policy, greedy))
  rollout = sample(tiny.params, jax.random.key(0), tiny.prompts, tiny.rule)
  other = sample(tiny.params, jax.random.key(1), tiny.prompts, tiny.rule)
  np.testing.assert_array_equal(rollout.tokens, other.tokens)
  full = look(
    tiny.policy, tiny.params, rollout._replace(num_kept=None), tiny.rule
  )
  stats = look(tiny.policy, tiny.params, rollout, tiny.rule)
  assert (np.asarray(rollout.logp) == 0).all()
  np.testing.assert_allclose(stats.logp, 0, atol=1e-6)
  mask = np.asarray(rollout.mask)
  assert (np.exp(np.asarray(full.logp))[mask] >= 1 / 11).all()


def test_the_end_is_chosen_and_nothing_after_it(tiny):
  tokens, mask = map(np.asarray, (tiny.rollout.tokens, tiny.rollout.mask))
  ends = np.isin(tokens, [END, OTHER_END]) & mask
  for row_tokens, row_mask, row_ends in zip(tokens, mask, ends):
    n = row_mask.sum()
    assert row_mask[:n].all()
    assert (row_tokens[n:] == PAD).all()
    assert not row_ends[: n - 1].any()
    assert n == len(row_mask) or row_ends[n - 1]
  assert {END, OTHER_END} <= set(tokens[ends])


def test_ended_is_recorded_at_the_last_column_too(tiny):
  """Rows that end at column T - 1, and rows that go on to it without an end.

  # T = 3, all of whose tokens were drawn:  [4 2 EOS] ended   [4 2 3] not
  """
  T, at_end = 3, {True: 0, False: 0}
  config = changed(tiny.config, max_completion_length=T, chunk=8)
  sample = jax.jit(make_sampler(tiny.policy, config))
  for seed in range(8):
    args = tiny.params, jax.random.key(seed), tiny.prompts, tiny.rule
    rollout = sample(*args)
    tokens, mask = map(np.asarray, (rollout.tokens, rollout.mask))
    ended = np.asarray(rollout.ended)
    want = (np.isin(tokens, [END, OTHER_END]) & mask).any(1)
    np.testing.assert_array_equal(ended, want)
    for row in ended[mask[:, -1]]:
      at_end[bool(row)] += 1
  assert min(at_end.values()) > 0


def test_an_end_beyond_the_last_column_ends_nothing(tiny):
  """Chunks of 8 draw tokens beyond T, which are no part of the rollout."""
  long = changed(tiny.config, max_completion_length=9, chunk=8)
  short = changed(tiny.config, max_completion_length=2, chunk=8)
  longer, shorter = (
    jax.jit(make_sampler(tiny.policy, config))(
      tiny.params, jax.random.key(7), tiny.prompts, tiny.rule
    )
    for config in (long, short)
  )
  later = np.asarray(longer.ended) & (np.asarray(longer.mask).sum(1) > 2)
  assert later.any()
  assert not np.asarray(shorter.ended)[later].any()


def test_version_is_that_of_the_parameters(tiny):
  sample = jax.jit(make_sampler(tiny.policy, tiny.config))
  args = tiny.params, jax.random.key(7), tiny.prompts, tiny.rule
  rollout = sample(*args, jnp.int32(5))
  assert rollout.version.dtype == jnp.int32
  np.testing.assert_array_equal(rollout.version, np.full(12, 5))
  np.testing.assert_array_equal(tiny.rollout.version, np.zeros(12))


def test_pad_may_be_an_end_token(tiny):
  rule = distribution.make_rule(11, [PAD])
  rollout = tiny.sample(tiny.params, jax.random.key(2), tiny.prompts, rule)
  tokens, mask = map(np.asarray, (rollout.tokens, rollout.mask))
  ended = ~mask[:, -1]
  assert ended.any()
  lengths = mask.sum(1)
  assert (tokens[ended, lengths[ended] - 1] == PAD).all()


def test_padding_changes_nothing(tiny):
  wide = Prompts(
    np.pad(tiny.prompts.tokens, ((0, 0), (0, 5))), tiny.prompts.length
  )
  rollout = tiny.sample(tiny.params, jax.random.key(7), wide, tiny.rule)
  np.testing.assert_array_equal(rollout.tokens, tiny.rollout.tokens)
  np.testing.assert_allclose(rollout.logp, tiny.rollout.logp, atol=1e-5)


def test_what_stands_in_the_padding_changes_nothing(tiny):
  P = tiny.prompts.tokens.shape[1]
  real = np.arange(P) < tiny.prompts.length[:, None]
  other = Prompts(np.where(real, tiny.prompts.tokens, 5), tiny.prompts.length)
  rollout = tiny.sample(tiny.params, jax.random.key(7), other, tiny.rule)
  np.testing.assert_array_equal(rollout.tokens, tiny.rollout.tokens)


def test_other_rows_change_nothing(tiny):
  few = Prompts(tiny.prompts.tokens[:2], tiny.prompts.length[:2])
  rollout = tiny.sample(tiny.params, jax.random.key(7), few, tiny.rule)
  np.testing.assert_array_equal(rollout.tokens, tiny.rollout.tokens[:6])
  mates = random_prompts(seed=9).tokens.copy()
  mates[:2] = tiny.prompts.tokens[:2]
  other = Prompts(mates, tiny.prompts.length)
  rollout = tiny.sample(tiny.params, jax.random.key(7), other, tiny.rule)
  np.testing.assert_array_equal(rollout.tokens[:6], tiny.rollout.tokens[:6])
  np.testing.assert_allclose(rollout.logp[:6], tiny.rollout.logp[:6], atol=1e-5)


@pytest.mark.parametrize(
  ('T', 'chunk', 'stages'),
  [(1, 16, 1), (2, 16, 3), (5, 2, 2), (9, 16, None), (9, 1, 4)],
)
def test_length_chunk_and_stages_change_nothing(tiny, T, chunk, stages):
  config = changed(
    tiny.config, max_completion_length=T, chunk=chunk, stages=stages
  )
  sample = jax.jit(make_sampler(tiny.policy, config))
  rollout = sample(tiny.params, jax.random.key(7), tiny.prompts, tiny.rule)
  assert rollout.tokens.shape == (12, T)
  np.testing.assert_array_equal(rollout.tokens, tiny.rollout.tokens[:, :T])
  np.testing.assert_allclose(rollout.logp, tiny.rollout.logp[:, :T], atol=1e-5)


def test_moving_live_rows_together_changes_nothing(tiny, samplers):
  """Rows of all groups end anywhere; some of them run to T."""
  config = changed(
    tiny.config, compact_levels=3, truncate=True, chunk=1, stages=2
  )
  sample = jax.jit(make_sampler(tiny.policy, config))
  rule = distribution.make_rule(11, [END, OTHER_END, 3], top_k=9)
  moved = 0
  for seed in range(3):
    args = tiny.params, jax.random.key(seed), tiny.prompts, rule
    want, found = samplers[True](*args), sample(*args)
    np.testing.assert_array_equal(found.tokens, want.tokens)
    np.testing.assert_array_equal(found.mask, want.mask)
    np.testing.assert_allclose(found.logp, want.logp, atol=1e-5)
    np.testing.assert_array_equal(found.num_kept, want.num_kept)
    live = np.asarray(want.mask.sum(0))
    moved += (live[2:-1] <= 12 // 2).any() and live[-1] > 0
  assert moved  # into half the rows, and then went on


def test_live_rows_are_moved_only_when_half_are_done(tiny):
  """Width that extend sees: 12 rows, then 6, then 3."""
  widths = []

  def extend(params, prefix, tokens, cache, at):
    width = len(tokens)
    jax.debug.callback(lambda at: widths.append((int(at), width)), at)
    return tiny.policy.extend(params, prefix, tokens, cache, at)

  policy = tiny.policy._replace(extend=extend)
  config = changed(tiny.config, compact_levels=2, chunk=1)
  sample = jax.jit(make_sampler(policy, config))
  rollout = sample(tiny.params, jax.random.key(7), tiny.prompts, tiny.rule)
  jax.effects_barrier()
  live = np.asarray(rollout.mask.sum(0))[1:]  # whose token t is drawn
  want, width = [], 12
  for at, rows in enumerate(live[live > 0]):
    while width > 3 and rows <= width // 2:
      width //= 2
    want.append((at, width))
  assert sorted(widths) == want
  assert len({width for _, width in want}) > 1


def test_the_cache_grows_with_the_completion(tiny):
  """Columns of the cache at each token: the stages so far, not all of T."""
  seen = []

  def extend(params, prefix, tokens, cache, at):
    columns = cache[0][1].shape[2]
    jax.debug.callback(lambda at: seen.append((int(at), columns)), at)
    return tiny.policy.extend(params, prefix, tokens, cache, at)

  policy = tiny.policy._replace(extend=extend)
  config = changed(tiny.config, chunk=1, stages=3)
  sample = jax.jit(make_sampler(policy, config))
  sample(tiny.params, jax.random.key(7), tiny.prompts, tiny.rule)
  jax.effects_barrier()
  columns = [3, 3, 3, 6, 6, 6, 8, 8]
  assert sorted(seen) == list(enumerate(columns))


@pytest.mark.parametrize(
  ('T', 'layers', 'columns'),
  [
    *((1, 8, []), (9, 8, [8]), (33, 8, [32]), (65, 8, [32, 64])),
    *((129, 8, [32, 64, 96, 128]), (65, 9, [64]), (129, 9, [64, 128])),
    *((129, 32, [128]), (513, 32, [128, 256, 384, 512])),
  ],
)
def test_stages_of_the_cache(T, layers, columns):
  """Stages of complete chunks, four at most: one for every 32 tokens and each
  8 layers, which have two arrays each."""
  ends = stage_ends(SamplerConfig(1, T), 2 * layers)
  assert [8 * end for end in ends] == columns


def test_no_stage_is_refused(tiny):
  with pytest.raises(ValueError, match='stages=0 hold no token'):
    make_sampler(tiny.policy, changed(tiny.config, stages=0))


@pytest.mark.parametrize('inputs', [False, True])
def test_a_recurrent_policy_samples_what_it_evaluates(tiny, inputs):
  policy = recurrent()
  params = policy.init(jax.random.key(0))
  prompts = tiny.prompts
  if inputs:  # encode reads them; nobody rebuilds prompts without them
    start = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    prompts = prompts._replace(inputs={'start': start})
  for more in ({'chunk': 1, 'stages': 3}, {'chunk': 2, 'compact_levels': 2}):
    sample = jax.jit(make_sampler(policy, changed(tiny.config, **more)))
    rollout = sample(params, jax.random.key(1), prompts, tiny.rule)
    stats = look(policy, params, rollout, tiny.rule)
    np.testing.assert_allclose(rollout.logp, stats.logp, atol=1e-5)
    assert rollout.prompts.inputs.keys() == prompts.inputs.keys()
  assert np.asarray(rollout.ended).any()
  if inputs:
    plain = look(
      policy, params, rollout._replace(prompts=tiny.prompts), tiny.rule
    )
    assert np.abs(np.asarray(plain.logp) - np.asarray(stats.logp)).max() > 1e-2


# --- bad input


def with_axis(policy):
  return policy._replace(
    logits=lambda *args: policy.logits(*args)[..., None, :]
  )


FAULTS = {
  'logits of another rank': (
    with_axis,
    lambda prompts: prompts,
    r'^policy.logits gave rank 3, float32 \[12, 1, 11\], expected \[B, V\]',
  ),
  'logits of another vocabulary': (
    lambda policy: policy._replace(vocab_size=12),
    lambda prompts: prompts,
    r'^policy.logits gave rank 2, float32 \[12, 11\], expected \[B, V\] of '
    'float with B=12, V=12$',
  ),
  'a cache of another dtype': (
    lambda policy: policy._replace(
      init_cache=lambda rows, length: jnp.zeros((rows, 8), jnp.bfloat16)
    ),
    lambda prompts: prompts,
    r'^policy.extend returned the cache float32\[12, 8\], expected the '
    r'bfloat16\[12, 8\] that it was given$',
  ),
  'a hidden state without rows': (
    lambda policy: policy._replace(
      extend=lambda params, prefix, tokens, cache, at: (
        policy.extend(params, prefix, tokens, cache, at)[0][0],
        cache,
      )
    ),
    lambda prompts: prompts,
    "^policy.extend's hidden state gave rank 2",
  ),
  'float tokens': (
    lambda policy: policy,
    lambda prompts: prompts._replace(tokens=prompts.tokens.astype(np.float32)),
    r'^prompts.tokens gave rank 2, float32 \[4, 6\], expected \[C, P\] of int$',
  ),
  'one length': (
    lambda policy: policy,
    lambda prompts: prompts._replace(length=prompts.length[:1]),
    r'^prompts.length gave rank 1, int32 \[1\], expected \[C\] of int with C=',
  ),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_of_shape_is_one_line(tiny, name):
  change, change_prompts, line = FAULTS[name]
  policy = change(recurrent())
  sample = jax.jit(make_sampler(policy, tiny.config))
  params = policy.init(jax.random.key(0))
  with pytest.raises(ValueError) as fault:  # noqa: PT011  jax adds notes
    sample(params, jax.random.key(0), change_prompts(tiny.prompts), tiny.rule)
  assert re.search(line, str(fault.value))
  assert '\n' not in str(fault.value)


def test_samples_of_a_prompt_differ(tiny):
  rows = np.asarray(tiny.rollout.tokens).reshape(4, 3, -1)
  pairs = itertools.combinations(range(3), 2)
  assert all((rows[:, i] != rows[:, j]).any() for i, j in pairs)


def test_stops_when_every_row_has_ended(tiny):
  """Rows that all end at the first token: no extend runs, whatever T is."""
  steps = []

  def extend(*args):
    jax.debug.callback(lambda: steps.append(1))
    return tiny.policy.extend(*args)

  policy = tiny.policy._replace(extend=extend)
  sample = jax.jit(make_sampler(policy, tiny.config))
  rule = distribution.make_rule(11, range(11))
  rollout = sample(tiny.params, jax.random.key(0), tiny.prompts, rule)
  jax.effects_barrier()
  assert (np.asarray(rollout.mask.sum(1)) == 1).all()
  assert steps == []
  sample(tiny.params, jax.random.key(0), tiny.prompts, tiny.rule)
  jax.effects_barrier()
  assert len(steps) >= 8


@pytest.mark.parametrize('stored', ['float32', 'bfloat16'])
@pytest.mark.parametrize('compute', ['float32', 'bfloat16'])
def test_casting_once_changes_no_bit(tiny, stored, compute):
  """Parameters off the compute dtype's grid, norms and value head included."""
  config = changed(ONE_LAYER, value_head=True, norm='layer', mlp_bias=True)
  policy = make_policy(config, compute)
  noise = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(x + 0.3 * noise.normal(size=x.shape), stored),
    jax.jit(policy.init)(jax.random.key(0)),
  )
  cast = policy.cast_params(params)
  kept = cast['norm']['scale'], cast['value_head']['embedding']
  assert {x.dtype for x in kept} == {jnp.dtype(stored)}
  assert cast['embed']['embedding'].dtype == compute
  assert cast['layers'][0]['mlp']['down_bias'].dtype == compute

  @jax.jit
  def run(params):
    prefix = policy.encode(params, tiny.prompts)
    tokens = tiny.rollout.tokens
    hidden, _ = policy.extend(params, prefix, tokens, None, 0)
    logits = policy.logits(params, hidden)
    return prefix, hidden, logits, policy.value(params, hidden)

  for a, b in zip(*map(jax.tree.leaves, (run(params), run(cast)))):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_bfloat16_samples_and_evaluates_close(tiny):
  policy = make_policy(ONE_LAYER, jnp.bfloat16)
  sample = jax.jit(make_sampler(policy, tiny.config))
  rollout = sample(tiny.params, jax.random.key(7), tiny.prompts, tiny.rule)
  stats = look(policy, tiny.params, rollout, tiny.rule)
  assert rollout.logp.dtype == jnp.float32
  gap = np.abs(np.asarray(rollout.logp) - np.asarray(stats.logp))
  assert gap.max() < 0.3
  assert gap.mean() < 0.03
