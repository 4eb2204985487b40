"""Episodes: what is sampled, observed and paid, row by row.

An action is the text of its ids, '3 4'; an observation is ids as text, too.
"""

import functools
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_collectors
from conftest import (
  END,
  OTHER_END,
  look,
  make_rollout,
  make_scored,
  random_prompts,
)

from jaxrl_tok import distribution, rewards, sharding
from jaxrl_tok.data.turns import Talk
from jaxrl_tok.environments import EpisodeError, Stepper
from jaxrl_tok.sampler import SamplerConfig
from jaxrl_tok.step import episodes
from jaxrl_tok.step.collectors import Scorer, dynamic, examples_at, score
from jaxrl_tok.step.episodes import Limits, Sizes, TurnPrograms, World
from jaxrl_tok.step.off_policy import replayed
from jaxrl_tok.step.turn_programs import jit_turns
from jaxrl_tok.step.turns import episode_metrics, turns, with_rewards
from jaxrl_tok.step.update import shortened

C, G, T = 4, 4, 24
SEEDS = 11, 16, 12, 15  # games of 1, 1, 2 turns, and one without an end
ENDS = {END, OTHER_END}


def ids_of(text):
  return [int(word) for word in text.split()]


def texts(rows):
  shown = [row[:-1] if row and row[-1] in ENDS else row for row in rows]
  return [' '.join(map(str, row)) for row in shown]


TALK = Talk(
  lambda example, first: ids_of(first),
  lambda example, first, observation, last: ids_of(observation),
  texts,
  ids_of,
)


class Counting:
  """Rewards the sum of an action's ids; answers with up to 3 ids, and ends
  after some turns, or where the action holds a 7."""

  def reset(self, seed, example):
    self.seed, self.random, self.left = seed, random.Random(seed), seed % 5
    return self.answer(), {}

  def answer(self):
    n = self.random.randint(0, 3)
    return ' '.join(str(self.random.randint(1, 8)) for _ in range(n))

  def step(self, action):
    self.left -= 1
    over = '7' in action.split()
    info = {'success': over}
    reward = float(sum(ids_of(action)))
    return self.answer(), reward, over, self.left == 0, info


def world_of(make, limits, **more):
  return World(Stepper(make, **more), TALK, limits)


def play(sample, world, seeds, count=C, samples=G, counted=False):
  prompts = random_prompts(count)
  examples = [{'prompt': f'{c}'} for c in range(count)]
  sizes = Sizes(count, samples, prompts.tokens.shape[1], counted)
  with jax.set_mesh(sharding.make_mesh('data=1', jax.devices()[:1])):
    return episodes.play(sample, world, sizes, examples, prompts, seeds, 3)


@pytest.fixture(scope='module')
def policy(tiny):
  """(policy, params, rule of the 6 likeliest tokens, TurnPrograms)."""
  rule = distribution.make_rule(11, sorted(ENDS), top_k=6)
  programs = jit_turns(tiny.policy, SamplerConfig(1, 4, truncate=True))
  programs = programs((tiny.params, None), jax.random.key(2), rule)
  return tiny.policy, tiny.params, rule, programs


@pytest.fixture(scope='module')
def played(policy):
  world = world_of(Counting, Limits(max_turns=4, max_length=T))
  return play(policy[3], world, SEEDS, counted=True)


def test_log_probs_of_the_packed_row_are_those_of_each_turn(policy, played):
  rollout = jax.device_get(played.rollout)
  found = look(policy[0], policy[1], rollout, policy[2])
  np.testing.assert_allclose(found.logp, rollout.logp, atol=1e-5)
  assert not rollout.logp[~rollout.mask].any()
  holes = np.diff(rollout.mask.astype(int), axis=1) > 0
  assert holes.sum() > 10, 'want observations between turns'


def test_a_row_is_what_was_said(played):
  """Turns and observations in order, without gaps; each reward on the last
  token of its turn."""
  rollout = jax.device_get(played.rollout)
  ends = set()
  for b, episode in enumerate(played.episodes):
    at, (first, *rest) = 0, episode.story
    seen = ids_of(first['observation'])
    for k, entry in enumerate(rest):
      row = rollout.tokens[b, at : at + len(seen)]
      assert row.tolist() == seen
      assert not rollout.mask[b, at : at + len(seen)].any()
      at += len(seen)
      n = (rollout.mask[b] & (rollout.turn[b] == k)).sum()
      turn = rollout.tokens[b, at : at + n].tolist()
      assert rollout.mask[b, at : at + n].all()
      cut = episode.ended == 'episode_length' and at + n == T
      assert cut or texts([turn]) == [entry['action']]
      at += n
      assert episode.reward[at - 1] == entry['reward']
      seen = ids_of(entry.get('observation', ''))
    assert rollout.mask[b].sum() == sum(episode.mask)
    assert not rollout.tokens[b, at:].any()
    paid = sum(entry['reward'] for entry in rest)
    assert sum(episode.reward) == pytest.approx(paid)
    assert rollout.ended[b] == (episode.ended == 'terminated')
    ends.add(episode.ended)
  assert {'terminated', 'truncated', 'max_turns'} <= ends
  assert rollout.version.tolist() == [3] * (C * G)


def test_a_group_plays_one_game(played):
  for c in range(C):
    group = played.episodes[c * G : (c + 1) * G]
    assert len({e.story[0]['observation'] for e in group}) == 1
  assert len({str(e.story[1:]) for e in group}) > 1


def test_an_episode_does_not_depend_on_the_others(policy, played, monkeypatch):
  """Live rows move together, or not: the episodes are those."""
  asked = []

  def draw(rows, *args):
    asked.append(len(rows))
    return policy[3].draw(rows, *args)

  world = world_of(Counting, Limits(max_turns=4, max_length=T))
  play(policy[3]._replace(draw=draw), world, SEEDS, counted=True)
  assert {4, 16} == set(asked)
  monkeypatch.setattr(episodes, 'row_counts', lambda rows, shards: [rows])
  again = play(policy[3], world, SEEDS, counted=True)
  assert [e.story for e in again.episodes] == [e.story for e in played.episodes]
  logp = again.rollout.logp, played.rollout.logp
  np.testing.assert_allclose(*logp, atol=1e-5)


@pytest.mark.parametrize('more', [{'append': None}, {'chunk': 3}])
def test_what_the_device_remembers_changes_nothing(
  policy, played, monkeypatch, more
):
  """Transcripts are read anew, or what is new in them by so many tokens, after
  few columns or after many."""
  programs, calls = policy[3]._replace(**more), []
  for name in ('read', 'append') if programs.append else ():
    whole = getattr(programs, name)

    def call(*args, name=name, whole=whole):
      calls.append(name)
      return whole(*args)

    programs = programs._replace(**{name: call})
  monkeypatch.setattr(episodes, 'SHORTEST', 8)
  buckets = 2 if programs.append else 1
  limits = Limits(max_turns=4, max_length=T, length_buckets=buckets)
  again = play(programs, world_of(Counting, limits), SEEDS, counted=True)
  assert [e.story for e in again.episodes] == [e.story for e in played.episodes]
  logp = again.rollout.logp, played.rollout.logp
  np.testing.assert_allclose(*logp, atol=1e-5)
  if programs.append:
    assert calls.count('append') > 1
    assert calls.count('read') > 1


# --- limits and failures, by turns that a test makes


def scripted(*turns, ended=True):
  """Sampler whose turn k is turns[k], for every row."""

  def sample(rows, number, prompts):
    ids = turns[int(number)]
    tokens = np.tile(np.array(ids, np.int32), (len(rows), 1))
    mask = np.ones(tokens.shape, bool)
    logp = np.full(tokens.shape, -0.5, np.float32)
    found = make_rollout(None, tokens, mask, logp)
    return found._replace(ended=np.full(len(rows), ended))

  return TurnPrograms(lambda prompts: prompts, sample)


def simple(make, *turns, ended=True, limits=None, **more):
  limits = limits or Limits(max_turns=3, max_length=8)
  world = world_of(make, limits, **more)
  return play(scripted(*turns, ended=ended), world, [0, 1], 2, 1)


class Echo:
  def reset(self, seed, example):
    self.seed = seed
    return '', {}

  def step(self, action):
    return action, 1.0, False, False, {}


@pytest.mark.parametrize(
  ('limits', 'ended', 'why', 'turns', 'tokens'),
  [
    (Limits(3, 30), True, 'max_turns', 3, [4, 5, 4, 5, 4, 5, 4, 5, 4, 5]),
    # the third turn is cut at column 6, and no more is asked of the game
    (Limits(9, 9), True, 'episode_length', 3, [4, 5, 4, 5, 4, 5, 4, 5, 4]),
    # no room for an observation and a token more
    (Limits(9, 4), True, 'episode_length', 1, [4, 5]),
    (Limits(9, 30, 'end'), False, 'turn_length', 1, [4, 5]),
    (Limits(1, 30, 'act'), False, 'max_turns', 1, [4, 5]),
  ],
)
def test_limits_end_an_episode(limits, ended, why, turns, tokens):
  found = simple(Echo, *[[4, 5]] * 9, ended=ended, limits=limits)
  for episode in found.episodes:
    assert (episode.ended, episode.turns) == (why, turns)
    assert episode.tokens == tokens
    cut = why == 'turn_length' or len(tokens) == 9
    assert sum(episode.reward) == turns - cut


class Pair(Echo):
  """Two seats take turns; at the end each gets another reward."""

  def reset(self, seed, example):
    self.count = 0
    return '3', {'seat': 0}

  def step(self, action):
    seat, self.count = self.count % 2, self.count + 1
    over = self.count == 3
    rewards = {0: 1.0, 1: -1.0} if over else {seat: 0.1}
    info = {'seat': 1 - seat, 'rewards': rewards}
    return '3', rewards[seat], over, False, info


def test_rewards_by_seat_stand_on_the_last_turn_of_each():
  found = simple(Pair, [4, 5], [6, 7], [8, 1], limits=Limits(5, 30, seats=2))
  for row, episode in enumerate(found.episodes):
    assert episode.tokens == [3, 4, 5, 3, 6, 7, 3, 8, 1]
    paid = {t: r for t, r in enumerate(episode.reward) if r}
    assert paid == pytest.approx({2: 0.1, 5: 0.1 - 1, 8: 1.0})
    seat = found.rollout.seat[row, : len(episode.tokens)]
    chosen = np.asarray(seat)[episode.mask].tolist()
    assert chosen == [0, 0, 1, 1, 0, 0]
    assert episode.numbers['reward/seat_1'] == pytest.approx(-0.9)
    assert [t['seat'] for t in episode.story[1:]] == [0, 1, 0]


def test_a_game_of_two_seats_asks_for_two():
  class Other(Pair):
    def reset(self, seed, example):
      super().reset(seed, example)
      return '3', {'seat': 1}

  with pytest.raises(ValueError, match='--seats 1'):
    simple(Other, [4, 5])


class Hangs(Echo):
  """Game of seed 1 hangs in its second turn."""

  def step(self, action):
    self.count = getattr(self, 'count', 0) + 1
    if self.seed == 1 and self.count == 2:
      time.sleep(5)
    return action, 1.0, False, self.count == 3, {}


def scored(found, on_error='raise'):
  """Score of episodes, and what was warned of."""
  warned = []
  functions = {'words': lambda completions, **columns: [1.0] * len(completions)}
  host = rewards.make_scorer(functions, texts, sorted(ENDS))
  scorer = Scorer(
    *(host, None, {'words': 1.0, 'environment': 1.0}, rewards.TrainerState),
    on_error,
    lambda name, text: warned.append(text),
  )
  mesh = sharding.make_mesh('data=1', jax.devices()[:1])
  examples = [{'prompt': f'{c}'} for c in range(2)]
  with jax.set_mesh(mesh):
    by = with_rewards(scorer, found, on_error)
    return score(by, found.rollout, ({}, {}), examples, 0), warned


def test_a_turn_that_hangs_is_ended_at_its_deadline():
  began = time.monotonic()
  found = simple(Hangs, *[[4, 5]] * 3, limits=Limits(5, 30), deadline=0.3)
  assert time.monotonic() - began < 4
  assert [e.ended for e in found.episodes] == ['truncated', 'deadline']
  assert episode_metrics(found.episodes)['ended/deadline'] == 0.5
  result, warned = scored(found)
  assert result.scored.reward.sum(1).tolist() == [4.0, 2.0]
  assert jnp.all(result.scored.valid)
  assert 'took longer than 0.3 s' in warned[0]
  assert result.extra['ended_by'] == ['truncated', 'deadline']


class Fails(Echo):
  def step(self, action):
    if self.seed == 1:
      raise KeyError('lost')
    return action, 1.0, True, False, {}


def test_an_environment_that_fails_is_one_line():
  with pytest.raises(EpisodeError, match="'lost'") as e:
    simple(Fails, [4])
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(('how', 'valid'), [('mask', False), ('zero', True)])
def test_an_environment_that_fails_may_be_masked(how, valid):
  found = simple(Fails, [4], on_error='end')
  result, warned = scored(found, how)
  assert result.scored.applies['environment'].tolist() == [True, valid]
  assert result.metrics['rewards/environment/errors'] == 1
  assert len(warned) == 1
  assert result.scored.reward.sum(1).tolist() == [2.0, 1.0]


class LateReset(Echo):
  def reset(self, seed, example):
    if seed == 1:
      time.sleep(5)
    return '', {}


def test_an_episode_that_never_began_is_not_valid():
  found = simple(LateReset, *[[4, 5]] * 3, limits=Limits(1, 30), deadline=0.3)
  result, _ = scored(found)
  assert result.scored.valid.tolist() == [True, False]
  assert not result.scored.rollout.mask[1].any()


def test_a_first_observation_that_is_too_long_is_refused():
  class Long(Echo):
    def reset(self, seed, example):
      return '1 2 3 4 5 6 7 8', {}

  with pytest.raises(ValueError, match='--max_episode_length 32'):
    simple(Long, [4])


def test_an_update_of_some_columns_takes_the_turns_along(played):
  seen = []

  def update(state, scored, rule):
    seen.append(scored.rollout)
    return state, {}, jnp.zeros(scored.rollout.mask.shape)

  rollout = played.rollout
  scored = make_scored(rollout, jnp.zeros(rollout.mask.shape))
  _, _, advantage = shortened(update, 12)(None, scored, None)
  assert advantage.shape == rollout.mask.shape
  assert seen[0].turn.shape == seen[0].mask.shape == (C * G, 12)


# --- the collector and its wrappers


class Lucky(Echo):
  """Pays by the row's first id and its seed; half of the games pay nothing."""

  def step(self, action):
    paid = float(ids_of(action)[0]) if self.seed % 2 else 1.0
    return '3', paid, False, False, {}


def by_row(rows, number, memory):
  """Turns [row + 1, 8]."""
  tokens = np.stack([np.asarray(rows) + 1, np.full(len(rows), 8)], 1)
  on = np.ones(tokens.shape, bool)
  found = make_rollout(None, tokens, on, -1.0 * tokens)
  return found._replace(ended=np.ones(len(rows), bool))


def collector_of():
  world = world_of(Lucky, Limits(max_turns=2, max_length=9))
  host = rewards.make_scorer({}, texts, sorted(ENDS))
  scorer = Scorer(host, None, {'environment': 1.0}, rewards.TrainerState)
  sizes = Sizes(test_collectors.C, 3, 4, False)
  prompts = test_collectors.prompts_of(test_collectors.HALF)
  programs = TurnPrograms(lambda prompts: prompts, by_row)
  return turns(lambda *_: programs, world, scorer, prompts, 0, sizes)


def with_replay(collector):
  examples = functools.partial(
    examples_at, test_collectors.prompts_of(test_collectors.HALF), 0
  )
  return replayed(collector, 8, 2, examples, 4)


@pytest.mark.parametrize('wrap', [lambda c: c, lambda c: dynamic(c, 3)])
def test_stories_go_with_their_rows(wrap):
  (step, *_) = test_collectors.collect(wrap(collector_of()))
  paid = step.batch.scored.reward.sum(1)
  told = [
    sum(t.get('reward', 0) for t in story)
    for story in step.batch.extra['turns']
  ]
  np.testing.assert_allclose(paid, told)
  assert step.batch.metrics['turns'] == 2
  tokens, mask = (
    np.asarray(getattr(step.batch.scored.rollout, k))
    for k in ('tokens', 'mask')
  )
  assert (tokens[:, 2] == 3).all()
  assert mask[0].tolist() == [True, True, False, True, True, *[False] * 4]


def test_games_without_variance_are_drawn_anew():
  (step, *_) = test_collectors.collect(dynamic(collector_of(), 8))
  rows = np.asarray(step.batch.scored.reward.sum(1)).reshape(-1, 3)
  assert (rows.max(1) > rows.min(1)).all()


def test_episodes_are_replayed_and_resumed(tmp_path):
  whole = test_collectors.collect(with_replay(collector_of()), 4)
  cursor = test_collectors.saved_and_restored(whole[1].cursor, tmp_path)
  rest = test_collectors.collect(with_replay(collector_of()), 2, 2, cursor)
  test_collectors.assert_same_batches(rest, whole[2:])
  assert whole[-1].batch.scored.rollout.turn.shape == (18, 9)
