"""Laws of whole steps in one program: the numbers of steps on the host, and no
host inside."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import (
  CONFIG,
  END,
  OTHER_END,
  PAD,
  changed,
  random_prompts,
  sharpened,
)
from test_train import rows

from jaxrl_tok import checkpoint, data, distribution, rewards, sharding
from jaxrl_tok.credit import algorithms
from jaxrl_tok.evaluation import Due, credit_rows, evaluate_held_out
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.report.logger import Logger
from jaxrl_tok.sampler import SamplerConfig
from jaxrl_tok.step import programs
from jaxrl_tok.step.collectors import Scorer, single_turn
from jaxrl_tok.step.device_rewards import make_device_scorer, on_device
from jaxrl_tok.step.device_steps import Table, make_device_steps, table_rows
from jaxrl_tok.step.state import make_state
from jaxrl_tok.step.update import make_update
from jaxrl_tok.train import LoopConfig, Progress, train

# all that an update leaves to the next, and two rollouts a step
ALGORITHM = algorithms.remax(
  kl='reverse',
  beta=0.3,
  kl_target=0.01,
  kl_horizon=24.0,
  ref_sync_steps=3,
  epochs=2,
  mini_batches=2,
)
C, G, T, P, EVERY = 4, 3, 5, 6, 2
WEIGHTS = {'small': 0.5, 'ended': 2.0}
PLAIN = changed(CONFIG, layers=CONFIG.layers[:1], qkv_bias=False, qk_norm=None)
POLICY = make_policy(PLAIN)
RULE = distribution.make_rule(11, [END, OTHER_END])
OPTIMIZER = optax.adam(0.005)


@on_device
def small(rollout, target, **columns):
  """For every token: 1 where it is below the prompt's target, else 0."""
  return (rollout.tokens < target[:, None]).astype(jnp.float32)


@on_device
def ended(rollout, **columns):
  """An outcome: whether the completion ended by itself."""
  ends = (rollout.tokens == END) | (rollout.tokens == OTHER_END)
  return jnp.any(ends & rollout.mask, axis=1)


SCORE = make_device_scorer({'small': small, 'ended': ended})


def length(prompts, completions, completion_ids, **columns):
  return [float(len(ids)) for ids in completion_ids]


def decode(ids: list[list[int]]) -> list[str]:
  return [' '.join(map(str, row)) for row in ids]


def scorer(functions: dict, weights: dict, device=None) -> Scorer:
  host = rewards.make_scorer(functions, decode, (END, OTHER_END))
  return Scorer(host, device, weights, rewards.TrainerState)


class Numbers:
  """Tokenizer of prompts that are numbers."""

  def __call__(self, text: str) -> dict:
    return {'input_ids': [int(number) for number in text.split()]}


def prompt_set(count: int, seed: int) -> data.PromptSet:
  tokens, lengths, _ = random_prompts(C=count, P=P, seed=seed)
  records = [
    {
      'prompt': ' '.join(map(str, row[:n])),
      'answer': '-',
      'target': i % 9 + 1,
    }
    for i, (row, n) in enumerate(zip(tokens, lengths))
  ]

  def columns(records):
    return {'target': np.array([r['target'] for r in records], np.int32)}

  return data.prompt_set(records, Numbers(), 11, columns=columns)


def networks(rule=RULE) -> programs.Networks:
  return programs.Networks(
    POLICY,
    ALGORITHM,
    OPTIMIZER,
    rule,
    device_score=(SCORE, None),
    weights=WEIGHTS,
  )


class Runs:
  """Six steps on two devices, `n` of them in a call; 0: step by step."""

  def __init__(self, home):
    self.home, self.mesh = home, sharding.make_mesh('data=2', jax.devices()[:2])
    self.params = sharpened(jax.jit(POLICY.init)(jax.random.key(1)), 2.0)
    self.records, self.held_out = prompt_set(7, 0), prompt_set(4, 1)
    self.programs = {}

  def start(self):
    given = jax.tree.map(jnp.array, self.params)
    return make_state(POLICY, ALGORITHM, OPTIMIZER, self.mesh, 0, given)

  def compiled(self, n: int) -> programs.Programs:
    if n not in self.programs:
      config = programs.ProgramConfig(C, G, T, PAD, steps_per_call=n)
      shape = programs.EvaluationShape(4, P, config.greedy)
      rule = sharding.put_replicated(self.mesh, RULE)
      self.programs[n] = programs.compile_programs(
        networks(rule), config, self.start(), self.records, {'held_out': shape}
      )
    return self.programs[n]

  def collector(self, n: int, found: programs.Programs):
    if n:
      _, lengths, _ = self.records.table()
      return table_rows(self.records, lengths, 0, C, n, G, greedy=True)
    by = scorer({}, WEIGHTS, found.device_score)
    return single_turn(found.sample, by, self.records, 0, C, found.greedy)

  def evaluations(self, found: programs.Programs) -> list[Due]:
    judge = scorer({'length': length}, {'length': 1.0})

    def at(step, rows):
      return [{'step': step, **row} for row in rows]

    def own_batch(state, step, batch, last):
      return {}, at(step, credit_rows(last, batch, decode))

    def held_out(state, step, batch, last):
      def sample(number, prompts):
        return found.evaluations['held_out'](state, jax.random.key(0), prompts)

      metrics, rows, *_ = evaluate_held_out(
        sample,
        judge,
        self.held_out,
        4,
        P,
        step,
        mismatch=functools.partial(found.mismatch, state),
      )
      assert 0 < metrics['eval/mismatch/logp_gap_max'] < 1e-5
      return metrics, at(step, rows)

    return [Due('train', EVERY, own_batch), Due('held_out', EVERY, held_out)]

  def run(self, name: str, n: int, stop: int = 6, resume: bool = False):
    """Runs it: (the run's directory, its last state)."""
    with jax.set_mesh(self.mesh):
      return self.run_on_mesh(self.home / name, n, stop, resume)

  def run_on_mesh(self, out, n, stop, resume):
    found = self.compiled(n)
    collector, state = self.collector(n, found), self.start()
    cursor, progress = collector.init(), Progress()
    checkpoints = checkpoint.open_checkpoints(out, 3)
    if resume:
      last = checkpoint.restore_named(checkpoints, 'auto', state)
      state, cursor, meta = last
      progress = Progress(**meta['progress'])
    logger = Logger(out, resume_step=progress.step if resume else None)

    def save(state, cursor, progress):
      kept = dataclasses.asdict(progress)
      checkpoint.save(checkpoints, state, cursor, kept, {})

    state, *_ = train(
      state,
      cursor,
      progress,
      collector,
      found.update,
      self.evaluations(found),
      LoopConfig(stop, save_every=2),
      logger,
      save,
    )
    checkpoints.close()
    logger.close()
    return out, state


@pytest.fixture(scope='module')
def loop(tmp_path_factory):
  """loop.whole: a run of two steps a call; loop.run makes others."""
  runs = Runs(tmp_path_factory.mktemp('runs'))
  runs.whole = runs.run('whole', 2)
  return runs


def leaves(state) -> list:
  state = state.replace(key=jax.random.key_data(state.key))
  return [np.asarray(x) for x in jax.tree.leaves(state)]


def test_steps_in_one_call_are_the_steps(loop):
  (together, state), (alone, want) = loop.whole, loop.run('alone', 0)
  for name in ('metrics', 'samples'):
    found = [rows(d / f'{name}.jsonl') for d in (together, alone)]
    for a, b in zip(*found, strict=True):
      assert a.keys() == b.keys()
      for key, value in b.items():
        text = isinstance(value, str) or key == 'tokens'
        close = value if text else pytest.approx(value, rel=1e-4, abs=1e-5)
        assert a[key] == close, key
  for x, y in zip(leaves(state), leaves(want), strict=True):
    np.testing.assert_allclose(x, y, 1e-5, 1e-5)
  for x, y in zip(leaves(loop.start()), leaves(want)):
    assert x.ndim < 2 or np.abs(x - y).max() > 1e-3, 'nothing was learnt'


def test_what_is_logged_of_a_call(loop):
  found = rows(loop.whole[0] / 'metrics.jsonl')
  steps = [row for row in found if row['phase'] == 'train']
  assert [row['step'] for row in steps] == [1, 2, 3, 4, 5, 6]
  for row in steps:
    parts = row['rewards/small/mean'], row['rewards/ended/mean']
    assert row['reward'] == pytest.approx(0.5 * parts[0] + 2 * parts[1])
    assert row['sampler_logp_gap'] < 1e-5
  assert len({row['kl_coef'] for row in steps}) == 6
  assert [row['step'] for row in found if row['phase'] == 'eval'] == [2, 4, 6]


def test_resumed_between_calls_is_never_stopped(loop):
  loop.run('parts', 2, stop=2)
  (parts, state), (whole, want) = loop.run('parts', 2, resume=True), loop.whole
  for name in ('metrics.jsonl', 'samples.jsonl'):
    assert rows(parts / name) == rows(whole / name)
  for x, y in zip(leaves(state), leaves(want), strict=True):
    np.testing.assert_array_equal(x, y)


def host_parts(text: str) -> set[str]:
  """Operations of a compiled program that the host takes part in."""
  names = 'infeed|outfeed|send|recv|send-done|recv-done'
  found = set(re.findall(rf'\s({names})\(', text))
  calls = re.findall(r'custom_call_target="([^"]*)"', text)
  return found | {c for c in calls if 'callback' in c or 'host' in c.lower()}


def test_the_host_takes_no_part(loop):
  config = SamplerConfig(G, T, PAD)
  sample = programs.make_sampling(POLICY, config)
  greedy = dataclasses.replace(config, samples_per_prompt=1, greedy=True)
  best = programs.make_sampling(POLICY, greedy)
  update = make_update(POLICY, ALGORITHM, OPTIMIZER)
  steps = make_device_steps(sample, SCORE, update, WEIGHTS, best)
  table, index = Table(*loop.records.table()), np.zeros((2, C), np.int32)
  program = jax.jit(steps).lower(loop.start(), table, index, RULE).compile()
  assert host_parts(program.as_text()) == set()


def test_the_host_would_be_seen():
  def asks(x):
    jax.debug.callback(lambda x: None, x)
    return jax.pure_callback(np.sin, x, x)

  program = jax.jit(asks).lower(jnp.float32(1)).compile()
  assert host_parts(program.as_text())
  with (  # bound_steps makes each call under this guard
    pytest.raises(Exception, match='Disallowed host-to-device'),
    jax.transfer_guard('disallow'),
  ):
    jax.jit(jnp.sin)(np.float32(1))


def test_one_sample_a_prompt_is_scored_beside_the_greedy_one(loop):
  """Rollouts of one shape, of which the greedy one has num_kept."""
  config = programs.ProgramConfig(C, 1, T, PAD)
  with jax.set_mesh(loop.mesh):
    rule = sharding.put_replicated(loop.mesh, RULE)
    found = programs.compile_programs(
      networks(rule), config, loop.start(), loop.records, {}
    )
    collector = loop.collector(0, found)
    state = loop.start()
    pending = collector.start(state, state.key, collector.init())
    batch, _ = collector.finish(pending)
    scored = jax.device_get(batch.scored)
    columns = {'target': np.array([e['target'] for e in batch.examples])}
    want, _ = SCORE(None, scored.rollout, columns)
    np.testing.assert_array_equal(scored.rewards['small'], want['small'])
    step, metrics, _ = found.update(state, batch.scored)
    best, _ = SCORE(None, jax.device_get(pending.greedy), columns)
  sums = {name: np.asarray(reward).sum(1) for name, reward in best.items()}
  np.testing.assert_allclose(
    scored.greedy.reward.sum(1),
    0.5 * sums['small'] + 2 * sums['ended'],
    rtol=1e-6,
  )
  assert int(step.step) == 1
  assert np.isfinite(float(metrics['reward']))
