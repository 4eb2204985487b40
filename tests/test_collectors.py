"""Collectors, with rollouts and rewards that a test makes.

Prompt i is the token i, once or four times; its completion g is [i, g, a random
number]. Half of the prompts have samples whose rewards differ.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_rollout, make_scored

from jaxrl_tok import checkpoint, data, rewards, sharding
from jaxrl_tok.step.collectors import (
  Scorer,
  dynamic,
  has_reward_variance,
  single_turn,
)
from jaxrl_tok.step.off_policy import ahead, replayed
from jaxrl_tok.types import Prompts, TrainState

C, G, T, N = 4, 3, 3, 40


class Numbers:
  """Tokenizer of prompts that are numbers."""

  def __call__(self, text: str) -> dict:
    return {'input_ids': [int(number) for number in text.split()]}


def prompts_of(varies) -> data.PromptSet:
  """Prompts of P 1 and 4; `varies`: of each, whether its rewards differ."""
  records = [
    {'prompt': ' '.join([str(i)] * (1 + 3 * (i % 5 == 0))), 'varies': bool(v)}
    for i, v in enumerate(varies)
  ]

  def columns(records):
    return {'target': np.array([r['varies'] for r in records], np.float32)}

  found = data.prompt_set(records, Numbers(), 1000, columns=columns)
  return dataclasses.replace(found, buckets=(1, 4))


@jax.jit
def sample(state: TrainState, key, prompts):
  number = jnp.repeat(prompts.tokens[:, 0], G)
  noise = jax.random.randint(key, (C * G,), 0, 10**6)
  tokens = jnp.stack([number, jnp.arange(C * G) % G, noise], axis=1)
  version = jnp.broadcast_to(state.step, C * G)
  mask = jnp.ones((C * G, T), bool)
  return make_rollout(prompts, tokens, mask, -1.0 * tokens, version=version)


@jax.jit
def greedy(state: TrainState, key, prompts):
  """Samples one completion a prompt: [i, 1, 0]."""
  tokens = jnp.stack([prompts.tokens[:, 0], jnp.ones(C), jnp.zeros(C)], axis=1)
  return make_rollout(prompts, tokens, jnp.ones((C, T), bool))


def host(tokens, mask, examples, trainer_state) -> rewards.HostScores:
  """g where the samples of the prompt vary, else 1; none for prompt 7."""
  each = len(tokens) // len(examples)
  vary = np.repeat([e['varies'] for e in examples], each)
  reward = np.zeros(tokens.shape, np.float32)
  reward[:, -1] = np.where(vary, tokens[:, 1], 1.0)
  texts = ['-'.join(map(str, row)) for row in tokens.tolist()]
  metrics = {'seen_step': trainer_state.global_step}
  extra = {'number': tokens[:, 0].tolist()}
  applies = {'host': tokens[:, 0] != 7}
  return rewards.HostScores({'host': reward}, applies, texts, metrics, extra)


@jax.jit
def device(rollout, columns):
  """The prompt's target on the first token."""
  each = rollout.mask.shape[0] // C
  target = jnp.repeat(columns['target'], each)[:, None]
  on = jnp.ones(rollout.mask.shape[0], bool)
  return {'device': jnp.eye(1, T) * target}, {'device': on}


SCORER = Scorer(host, None, {'host': 2.0}, rewards.TrainerState)
BOTH = Scorer(host, device, {'host': 2.0, 'device': 0.5}, rewards.TrainerState)
HALF = [i % 2 == 0 for i in range(N)]
# every third prompt in the order of the data
THIRD = np.isin(np.arange(N), data.record_indices(N, 0, 0, N)[1::3])


def collector_of(varies=HALF, scorer=SCORER, **more):
  return single_turn(sample, scorer, prompts_of(varies), 0, C, **more)


class Step(NamedTuple):
  """A step's batch, on the host, and the cursor after it."""

  batch: object
  cursor: dict


def collect(collector, steps=1, first=0, cursor=None) -> list[Step]:
  """Batches of `steps` steps; no update but that the step counts on."""
  mesh = sharding.make_mesh('data=2', jax.devices()[:2])
  found = []
  with jax.set_mesh(mesh):
    cursor = collector.init() if cursor is None else cursor
    for k in range(first, first + steps):
      key = jax.random.key(5)
      state = TrainState(jnp.int32(k), {}, (), key, {})
      key = jax.random.fold_in(key, k)
      pending = collector.start(state, key, cursor)
      batch, cursor = collector.finish(pending)
      scored = jax.device_get(batch.scored)
      found.append(Step(batch._replace(scored=scored), cursor))
      state.step.delete()  # as an update does, which takes the state's memory
  return found


def numbers(batch) -> list[int]:
  """The prompts of a batch."""
  return batch.scored.rollout.prompts.tokens[:, 0].tolist()


def order(position: int, count: int) -> list[int]:
  return data.record_indices(N, 0, position, count).tolist()


def check_groups(batch):
  """Checks that a group is one prompt's, with its record, tokens, rewards."""
  scored, rollout = batch.scored, batch.scored.rollout
  assert numbers(batch) == [int(e['prompt'].split()[0]) for e in batch.examples]
  assert numbers(batch) == [order(p, 1)[0] for p in batch.positions.tolist()]
  for c, example in enumerate(batch.examples):
    rows, number = slice(c * G, c * G + G), numbers(batch)[c]
    assert rollout.prompts.length[c] == len(example['prompt'].split())
    assert (rollout.tokens[rows, 0] == number).all()
    assert rollout.tokens[rows, 1].tolist() == list(range(G))
    np.testing.assert_array_equal(rollout.logp[rows], -rollout.tokens[rows])
    if 'number' in batch.extra and c < len(batch.extra['number']) // G:
      assert batch.extra['number'][rows] == [number] * G
    if scored.valid[rows].all():
      want = np.arange(G) if example['varies'] else np.ones(G)
      found = scored.rewards['host'][rows].sum(1)
      np.testing.assert_array_equal(found, want)


def assert_same_batches(found, want):
  """Bitwise, their records and metrics too; times are their own."""
  for a, b in zip(found, want, strict=True):
    for x, y in zip(
      jax.tree.leaves(a.batch.scored),
      jax.tree.leaves(b.batch.scored),
      strict=True,
    ):
      np.testing.assert_array_equal(x, y)
    assert a.batch.examples == b.batch.examples
    assert a.batch.positions.tolist() == b.batch.positions.tolist()
    one, other = (
      {k: v for k, v in s.batch.metrics.items() if not k.startswith('time/')}
      for s in (a, b)
    )
    assert one == other
    assert a.batch.counts == b.batch.counts


def saved_and_restored(cursor: dict, home) -> dict:
  """The cursor of a checkpoint."""
  state = TrainState(
    jnp.int32(3), {'w': jnp.ones(2)}, (), jax.random.key(0), {}
  )
  with checkpoint.open_checkpoints(home, 1) as manager:
    checkpoint.save(manager, state, cursor, {}, {})
  with checkpoint.open_checkpoints(home) as manager:
    return checkpoint.restore(manager, 3, state)[1]


# --- single_turn -------------------------------------------------------------


def test_batches_follow_the_order_of_the_data():
  steps = collect(collector_of(), 3)
  taken = [n for step in steps for n in numbers(step.batch)]
  assert taken == order(0, 3 * C)
  for k, (batch, cursor) in enumerate(steps):
    check_groups(batch)
    assert int(cursor['position']) == (k + 1) * C
    assert batch.metrics['seen_step'] == k
    length = batch.scored.rollout.prompts.length
    assert batch.counts == (C, C * G * T, length.sum() * G, 0, C * G)
    assert (batch.scored.rollout.version == k).all()
  noise = [step.batch.scored.rollout.tokens[:, 2].tolist() for step in steps]
  assert len(set(map(tuple, noise))) == 3, 'a key was used twice'


def test_host_and_device_rewards_stand_side_by_side():
  ((batch, _),) = collect(collector_of(scorer=BOTH))
  scored = batch.scored
  vary = np.repeat([e['varies'] for e in batch.examples], G)
  assert scored.rewards.keys() == {'host', 'device'}
  assert scored.weights == {'host': 2.0, 'device': 0.5}
  want = np.stack(
    [0.5 * vary, 0 * vary, 2 * np.where(vary, np.arange(12) % G, 1)], 1
  )
  on = scored.applies['host'][:, None] | (np.arange(T) < 2)
  np.testing.assert_allclose(scored.reward, np.where(on, want, 0))


def test_a_reward_may_apply_to_some_rows():
  (batch, _), *_ = collect(collector_of(), 10)[order(0, N).index(7) // C :]
  assert 7 in numbers(batch)
  want = np.repeat([n != 7 for n in numbers(batch)], G)
  np.testing.assert_array_equal(batch.scored.valid, want)
  assert (batch.scored.reward[~want] == 0).all()


# --- dynamic -----------------------------------------------------------------


def test_groups_without_variance_are_drawn_anew():
  ((batch, cursor),) = collect(dynamic(collector_of(THIRD), 10))
  want = [i for i in order(0, N) if THIRD[i] and i != 7][:C]
  assert numbers(batch) == want
  check_groups(batch)
  rounds = batch.metrics['dynamic_sampling/rounds']
  assert rounds > 1
  assert batch.metrics['dynamic_sampling/missing'] == 0
  assert batch.counts.prompts == rounds * C
  assert batch.counts.generated == rounds * C * G * T
  assert int(cursor['position']) == rounds * C
  alone = collect(collector_of(THIRD))[0].batch.scored.rollout.tokens
  first = [n for n in numbers(batch) if n in alone[:, 0]]
  assert first, 'want a group of the first round'
  for n in first:  # the first round is the step's own key
    rows = batch.scored.rollout.tokens
    np.testing.assert_array_equal(
      rows[rows[:, 0] == n], alone[alone[:, 0] == n]
    )
  noise = batch.scored.rollout.tokens[:, 2]
  assert len(set(noise.tolist())) == C * G, 'a key was used twice'


def test_variance_is_of_the_rows_that_are_valid():
  """Weighted sums over components, in groups of three."""
  prompts = Prompts(jnp.ones((4, 1), jnp.int32), jnp.ones(4, jnp.int32))
  rollout = make_rollout(prompts, np.ones((12, 1)), np.ones((12, 1)))
  a = np.array([1, 1, 1, 0, 1, 5, 2, 2, 7, 0, 9, 1.0])
  b = np.array([0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0.0])
  valid = np.array([1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1], bool)
  one = make_scored(rollout, a[:, None], applies=valid)
  assert has_reward_variance(one).tolist() == [False, True, False, True]
  two = one._replace(
    rewards=one.rewards | {'b': b[:, None]},
    applies=one.applies | {'b': valid},
    weights=one.weights | {'b': np.float32(1)},
  )
  # the second group's components make up for each other
  assert has_reward_variance(two).tolist() == [False, False, False, True]
  half = two._replace(weights={'reward': np.float32(0), 'b': np.float32(1)})
  assert has_reward_variance(half).tolist() == [False, True, False, False]
  none = make_scored(rollout, a[:, None], applies=np.zeros(12, bool))
  assert not has_reward_variance(none).any()
  # each by itself: b differs in the second group, and applies to one row of it
  each = [has_reward_variance(x, True).tolist() for x in (two, half, none)]
  assert each[:2] == [[False, True, False, True], [False, True, False, False]]
  assert each[2] == [False] * 4
  on = two.applies | {'b': valid & (np.arange(12) != 3)}
  alone = half._replace(applies=on)
  assert not has_reward_variance(alone, True).any()
  # rows 3, 8 and 9 ended, of which 3 alone is valid
  ended = rollout._replace(ended=np.isin(np.arange(12), (3, 8, 9)))
  found = has_reward_variance(one._replace(rollout=ended), ended_only=True)
  assert found.tolist() == [False, True, False, False]


@pytest.mark.parametrize('reward', [1e5, 1234.567, 1e-9])
def test_variance_begins_with_the_last_bit(reward):
  prompts = Prompts(jnp.ones((2, 1), jnp.int32), jnp.ones(2, jnp.int32))
  rollout = make_rollout(prompts, np.ones((6, 1)), np.ones((6, 1)))
  rows = np.full((6, 1), reward, np.float32)
  rows[4] = np.nextafter(rows[4], np.float32(0))
  scored = make_scored(rollout, rows)
  assert has_reward_variance(scored).tolist() == [False, True]


def test_after_the_last_round_the_rest_is_filled():
  varies = [i == 7 for i in range(N)]  # to whose rows no reward applies
  ((batch, _),) = collect(dynamic(collector_of(varies), 3))
  assert batch.metrics['dynamic_sampling/rounds'] == 3
  assert batch.metrics['dynamic_sampling/missing'] == C
  assert batch.metrics['dynamic_sampling/varied'] == 0
  assert batch.counts.prompts == 3 * C
  assert numbers(batch) == order(0, C)
  check_groups(batch)


def test_counts_are_of_all_rounds():
  """Completions of prompt 7 fail; numbers that functions log are averaged."""
  each = []

  def failing(tokens, mask, examples, trainer_state):
    found = host(tokens, mask, examples, trainer_state)
    each.append(float((~found.applies['host']).sum()))
    count = {'rewards/host/errors': each[-1], 'size': 1.0 * len(each)}
    return found._replace(metrics=count)

  scorer = SCORER._replace(host=failing)
  plain = collector_of([False] * N, scorer=scorer)
  ((batch, _),) = collect(dynamic(plain, N // C))
  assert len(each) > 1
  assert batch.metrics['rewards/host/errors'] == sum(each) > 0
  assert batch.metrics['size'] == (1 + len(each)) / 2


def test_a_full_first_round_is_not_touched():
  plain = collector_of([i != 7 for i in range(N)])
  found = collect(dynamic(plain, 10))
  want = collect(plain)
  assert found[0].batch.metrics['dynamic_sampling/varied'] == 1
  bare = {k: v for k, v in found[0].batch.metrics.items() if 'dyn' not in k}
  assert_same_batches(
    [Step(found[0].batch._replace(metrics=bare), found[0].cursor)], want
  )


def greedy_outcome(batch) -> np.ndarray:
  """Outcomes [C] of the greedy completions."""
  return np.asarray(batch.scored.greedy.reward).sum(1)


def test_greedy_rewards_go_with_their_prompts():
  ((batch, _),) = collect(
    dynamic(collector_of(THIRD, greedy=greedy, scorer=BOTH), 10)
  )
  assert batch.metrics['dynamic_sampling/rounds'] > 1
  assert all(e['varies'] for e in batch.examples)
  # 2 * (g = 1) of the host, 0.5 * target of the device
  np.testing.assert_array_equal(greedy_outcome(batch), [2.5] * C)


def test_a_greedy_completion_without_a_reward_is_no_zero():
  step = order(0, N).index(7) // C
  batch, _ = collect(collector_of(greedy=greedy), step + 1)[step]
  numbered = np.array(numbers(batch)) == 7
  assert numbered.sum() == 1
  want = np.where(numbered, np.nan, 2.0)
  np.testing.assert_array_equal(greedy_outcome(batch), want)


def test_greedy_rewards_are_of_each_prompt():
  ((batch, _),) = collect(collector_of(greedy=greedy, scorer=BOTH))
  target = np.array([e['varies'] for e in batch.examples])
  counts = np.array([n != 7 for n in numbers(batch)])
  want = 2.0 * counts + 0.5 * target
  np.testing.assert_array_equal(greedy_outcome(batch), want)


# --- replayed ----------------------------------------------------------------

CAPACITY, OLD = 10, 4


def with_replay(collector):
  records = prompts_of(HALF).records

  def examples(positions):
    return records.read(data_numbers(positions))

  return replayed(collector, CAPACITY, OLD, examples, prompt_length=4)


def data_numbers(positions):
  return [order(int(p), 1)[0] for p in positions]


def test_the_first_step_has_nothing_to_replay():
  """Rows added to the first batch have the usual shape, and no reward."""
  ((batch, _),) = collect(with_replay(collector_of()))
  scored = batch.scored
  assert len(scored.rollout.tokens) == (C + OLD) * G
  new = np.repeat([n != 7 for n in numbers(batch)[:C]], G)
  assert scored.valid.tolist() == [*new.tolist(), *[False] * (OLD * G)]
  assert (scored.reward[C * G :] == 0).all()
  assert numbers(batch)[:C] == order(0, C)
  check_groups(batch)


def test_replayed_groups_are_those_of_earlier_steps():
  plain = collect(collector_of(), 12)
  steps = collect(with_replay(collector_of()), 12)
  made = {}  # what the collector inside made, by prompt
  drawn, age = [], []
  for k, ((batch, _), (new, _)) in enumerate(zip(steps, plain)):
    scored, inner = batch.scored, new.scored
    check_groups(batch)
    assert scored.rollout.prompts.tokens.shape == (C + OLD, 4)
    assert numbers(batch)[:C] == numbers(new)
    np.testing.assert_array_equal(
      scored.rollout.tokens[: C * G], inner.rollout.tokens
    )
    assert (scored.rollout.version[: C * G] == k).all()
    if k:
      versions = scored.rollout.version[C * G :]
      mean = batch.metrics['replay/age']
      assert mean == pytest.approx(np.mean(k - versions))
      recent = list(made)[-CAPACITY:]
      for c in range(C, C + OLD):
        rows = slice(c * G, c * G + G)
        position = int(batch.positions[c])
        assert position in recent, 'older than the buffer'
        drawn.append(position)
        age.append(k - int(scored.rollout.version[c * G]))
        old = jax.tree.map(lambda x, rows=rows: x[rows], row_parts(scored))
        assert_same(old, made[position])
    for c, position in enumerate(new.positions.tolist()):
      rows = slice(c * G, c * G + G)
      made[position] = jax.tree.map(
        lambda x, rows=rows: x[rows], row_parts(inner)
      )
  assert min(age) >= 1
  assert max(age) > 1
  assert len(set(drawn)) > len(drawn) / 2, 'the same groups again and again'


def row_parts(scored):
  """Leaves [B, ...] of a record."""
  rollout = scored.rollout
  rows = rollout.tokens, rollout.mask, rollout.logp, rollout.version
  return *rows, rollout.ended, scored.rewards, scored.applies


def assert_same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def test_counts_are_of_the_new_groups():
  plain, more = (
    collect(collector_of(), 2),
    collect(with_replay(collector_of()), 2),
  )
  assert [s.batch.counts for s in more] == [s.batch.counts for s in plain]


# --- ahead -------------------------------------------------------------------


def test_ahead_a_batch_was_sampled_before_the_update():
  steps = collect(ahead(collector_of()), 4)
  taken = [n for step in steps for n in numbers(step.batch)]
  assert taken == order(0, 4 * C)
  versions = [s.batch.scored.rollout.version.tolist() for s in steps]
  assert versions == [[k] * C * G for k in (0, 0, 1, 2)]
  assert [s.batch.metrics['seen_step'] for s in steps] == [0, 1, 2, 3]
  noise = [s.batch.scored.rollout.tokens[:, 2].tolist() for s in steps]
  assert len(set(map(tuple, noise))) == 4, 'a key was used twice'
  for step in steps:
    check_groups(step.batch)


def test_ahead_samples_by_the_step_that_it_is_dispatched_in():
  """Batch k + 1 is what the collector inside samples in step k."""
  plain, early = collect(collector_of(), 3), collect(ahead(collector_of()), 4)
  for k in range(3):
    inner = plain[k].batch.scored.rollout.tokens[:, 2]
    outer = early[k + 1].batch.scored.rollout.tokens[:, 2]
    np.testing.assert_array_equal(inner, outer)


# --- a resume ----------------------------------------------------------------

KINDS = {
  'single_turn': lambda: collector_of(scorer=BOTH, greedy=greedy),
  'dynamic': lambda: dynamic(collector_of(), 3),
  'replayed': lambda: with_replay(collector_of(scorer=BOTH, greedy=greedy)),
  'ahead': lambda: ahead(collector_of(scorer=BOTH, greedy=greedy)),
  'replayed dynamic': lambda: with_replay(dynamic(collector_of(), 3)),
  'replayed ahead': lambda: with_replay(ahead(collector_of())),
}


@pytest.mark.parametrize('stop', [1, 3])
@pytest.mark.parametrize('kind', KINDS)
def test_a_resumed_collector_was_never_stopped(tmp_path, kind, stop):
  whole = collect(KINDS[kind](), 5)
  cursor = saved_and_restored(whole[stop - 1].cursor, tmp_path)
  rest = collect(KINDS[kind](), 5 - stop, stop, cursor)
  assert_same_batches(rest, whole[stop:])


@pytest.mark.parametrize('kind', KINDS)
def test_a_cursor_is_numbers_and_arrays(kind):
  """On the host it says all: nothing is left on the device or in Python."""
  whole = collect(KINDS[kind](), 4)
  cursor = jax.tree.map(np.asarray, jax.device_get(whole[1].cursor))
  assert_same_batches(collect(KINDS[kind](), 2, 2, cursor), whole[2:])


# --- numbers that are not finite ---------------------------------------------


def spoilt(rollout, columns):
  """Rewards of the device: NaN for the second sample of prompt order 0."""
  rewards, applies = device(rollout, columns)
  bad = jnp.arange(rollout.mask.shape[0]) == 1
  value = jnp.where(bad[:, None], jnp.nan, rewards['device'] + 1.0)
  return {'device': value}, applies


@pytest.mark.parametrize('on_error', ['mask', 'zero'])
def test_device_rewards_that_are_not_finite_are_masked_or_zero(on_error):
  warned = []
  scorer = Scorer(
    lambda *given: host(*given)._replace(rewards={}, applies={}),
    jax.jit(spoilt),
    {'device': 1.0},
    rewards.TrainerState,
    on_error,
    lambda name, text: warned.append(text),
  )
  (step,) = collect(collector_of(scorer=scorer))
  scored = step.batch.scored
  failed = np.arange(C * G) == 1
  value = scored.rewards['device']
  assert np.isfinite(value).all()
  np.testing.assert_array_equal(value[failed], 0)
  assert (value[~failed] >= 1).all()
  want = ~failed if on_error == 'mask' else np.ones(C * G, bool)
  np.testing.assert_array_equal(scored.applies['device'], want)
  assert step.batch.metrics['rewards/device/errors'] == 1
  (text,) = warned
  assert text.startswith('@on_device reward device gave nan for completion 1 (')
  assert 'or pass' not in text, 'advises what is passed already'


def test_device_rewards_that_are_not_finite_are_refused():
  scorer = BOTH._replace(device=jax.jit(spoilt))
  with pytest.raises(ValueError, match='device gave nan for completion 1') as e:
    collect(collector_of(scorer=scorer))
  assert '\n' not in str(e.value)
  assert str(e.value).endswith('; or pass --reward_on_error mask')


def test_what_is_not_finite_is_not_replayed():
  """A row whose reward or log-prob is not finite is not valid in the buffer;
  the others stay."""

  def huge(tokens, mask, examples, trainer_state):
    found = host(tokens, mask, examples, trainer_state)
    found.rewards['host'][2] = 3e38
    return found

  collector = collector_of(scorer=SCORER._replace(host=huge))
  examples = [{'prompt': '1', 'varies': True}]
  collector = replayed(collector, C, C, lambda p: examples * len(p), 4)
  steps = collect(collector, 2)
  new, old = np.split(steps[1].batch.scored.applies['host'], 2)
  numbers = steps[1].batch.scored.rollout.prompts.tokens[:, 0]
  assert new[2]  # this step's own: its update is skipped
  rewards_of = steps[1].batch.scored.rewards['host'][C * G :]
  bad = rewards_of.sum(1) > 1e38
  assert not old[bad].any()
  seven = np.repeat(numbers[C:], G) == 7  # no reward applies to it
  assert old[~bad & ~seven].all()
