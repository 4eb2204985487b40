"""Faults 13 to 19 in whole runs: numbers that are not finite or beyond their
limits, rewards that fail. Nothing of what was learnt is lost, and the run ends
in one line."""

import functools
import json
import shutil
import threading

import jax
import jax.numpy as jnp
import misbehaving
import numpy as np
import optax
import pytest
from conftest import (
  CONFIG,
  END,
  GOLDEN,
  OTHER_END,
  PAD,
  changed,
  make_rollout,
  make_scored,
  random_prompts,
  sharpened,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxrl_tok import (
  Evaluation,
  Task,
  checkpoint,
  distribution,
  finite,
  main,
  on_device,
  sharding,
)
from jaxrl_tok.credit import algorithms
from jaxrl_tok.hub.directory import open_model
from jaxrl_tok.hub.trainable import full
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.run.launch import resume_note
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.step.collectors import Batch, TokenCounts
from jaxrl_tok.step.device_steps import Table, make_device_steps
from jaxrl_tok.step.guard import param_labels
from jaxrl_tok.step.state import init_state, with_value_head
from jaxrl_tok.step.update import FIRST, IN_A_ROW, make_update
from jaxrl_tok.train import (
  DeviceRewardError,
  LoopConfig,
  Moment,
  NotFinite,
  Progress,
  StepLog,
  rescue,
)
from jaxrl_tok.types import Carry, TrainState

pytestmark = pytest.mark.usefixtures('one_device', 'few_programs')

# --- one update --------------------------------------------------------------

C, G, T = 4, 2, 5
POLICY = make_policy(changed(CONFIG, layers=CONFIG.layers[:1]))
CRITIC = make_policy(changed(CONFIG, layers=CONFIG.layers[:1], value_head=True))
RULE = distribution.make_rule(11, [END, OTHER_END])


def adamw(rate=0.01):
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))


@pytest.fixture(scope='module')
def params():
  return sharpened(jax.jit(POLICY.init)(jax.random.key(1)), 3.0)


@pytest.fixture(scope='module')
def batch(params):
  """Scored of the policy, with a random reward for each token."""
  sample = make_sampler(POLICY, SamplerConfig(G, T, PAD))
  rollout = jax.jit(sample)(params, jax.random.key(3), random_prompts(C), RULE)
  noise = np.random.default_rng(0).normal(size=(C * G, T))
  return placed(make_scored(rollout, noise * rollout.mask))


def placed(tree):
  """Placed as an update's results are, so that all calls run one program."""
  return jax.device_put(tree, jax.devices()[0])


@pytest.fixture(scope='module')
def one_step(params):
  """One optimizer step an update, an EMA baseline, an adaptive KL and a
  reference that follows: (state, update)."""
  algorithm = algorithms.reinforce(
    'ema', kl='reverse', beta=0.1, kl_target=0.01, ref_sync_steps=1
  )
  state = init_state(algorithm, adamw(), params, jax.random.key(0))
  return placed(state), jax.jit(make_update(POLICY, algorithm, adamw()))


@pytest.fixture(scope='module')
def four_steps(params):
  """Four optimizer steps that stop early, and a critic of its own."""
  algorithm = algorithms.ppo(epochs=2, mini_batches=2, max_update_kl=5.0)
  rates = {'policy': adamw(), 'critic': adamw(0.1)}
  optimizer = optax.multi_transform(rates, param_labels)
  critic = jax.tree.map(jnp.copy, with_value_head(CRITIC, params))
  state = init_state(
    algorithm, optimizer, params, jax.random.key(0), critic=critic
  )
  update = make_update(POLICY, algorithm, optimizer, critic=CRITIC)
  return placed(state), jax.jit(update)


def with_numbers(scored, where: str, row: int, number: float):
  """Puts a number on the first token of a row."""
  at = np.zeros(scored.rollout.mask.shape, bool)
  at[row, 0] = True
  if where == 'logp':
    logp = jnp.where(at, number, scored.rollout.logp)
    return scored._replace(rollout=scored.rollout._replace(logp=logp))
  reward = jnp.where(at, number, scored.rewards['reward'])
  return scored._replace(rewards={'reward': reward})


def plain(state) -> list:
  """Leaves of a state, without step and count."""
  state = state.replace(key=jax.random.key_data(state.key), step=0, skipped=0)
  return jax.tree.leaves(state)


@settings(max_examples=12)
@given(
  st.sampled_from(['logp', 'reward']),
  st.integers(0, C * G - 1),
  st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -1e30, 3e38]),
  st.sampled_from(['one_step', 'four_steps']),
)
def test_an_update_that_is_not_finite_changes_its_count_alone(
  request, batch, where, row, number, steps
):
  state, update = request.getfixturevalue(steps)
  new, metrics, _ = update(state, with_numbers(batch, where, row, number), RULE)
  if steps == 'four_steps':  # a mini-batch of an epoch has it, the other not
    assert float(metrics['nonfinite_updates']) >= 1
    for leaf in plain(new):
      assert np.isfinite(leaf).all()
    return
  for a, b in zip(plain(new), plain(state), strict=True):
    np.testing.assert_array_equal(a, b)
  assert int(new.step) == int(state.step) + 1
  assert int(new.skipped) == int(metrics[IN_A_ROW]) == 1
  assert float(metrics['nonfinite_updates']) == 1
  named = finite.tensor_names(state.trained)[int(metrics[FIRST])]
  assert named == (finite.SAMPLED if where == 'logp' else finite.REWARD)
  gap = float(metrics['sampler_logp_gap'])
  assert np.isfinite(gap) == (where == 'reward' or bool(np.isfinite(number)))


def test_updates_are_counted_in_a_row(one_step, batch):
  state, update = one_step
  bad = with_numbers(batch, 'reward', 0, np.nan)
  found = []
  for scored in (bad, bad, batch, bad):
    state, metrics, _ = update(state, scored, RULE)
    found.append(int(state.skipped))
    assert set(metrics) >= {'nonfinite_updates', 'reward'}
  assert found == [1, 2, 0, 1]


def test_all_steps_of_an_update_are_skipped(four_steps, batch):
  state, update = four_steps
  reward = batch.rewards['reward'] * jnp.nan
  bad = batch._replace(rewards={'reward': reward})
  new, metrics, _ = update(state, bad, RULE)
  for a, b in zip(plain(new), plain(state), strict=True):
    np.testing.assert_array_equal(a, b)
  assert int(new.skipped) == 1
  assert float(metrics['passes']) == 0
  new, metrics, _ = update(new, batch, RULE)
  assert int(new.skipped) == 0
  assert float(metrics['nonfinite_updates']) == 0
  assert float(metrics['passes']) >= 1
  assert np.isfinite(float(metrics['grad_norm']))


def test_a_rate_that_overflows_the_parameters_moves_none(params, batch):
  """The gradient is finite, and the parameters would not be."""
  algorithm = algorithms.reinforce()
  sgd = optax.chain(optax.scale(-3e38), optax.scale(1e9))
  state = init_state(algorithm, sgd, params, jax.random.key(0))
  new, metrics, _ = jax.jit(make_update(POLICY, algorithm, sgd))(
    state, batch, RULE
  )
  for a, b in zip(plain(new), plain(state), strict=True):
    np.testing.assert_array_equal(a, b)
  assert np.isfinite(float(metrics['grad_norm']))
  named = finite.tensor_names(state.trained)[int(metrics[FIRST])]
  assert named.endswith(' after the step')


def test_a_gradient_is_named_by_its_first_leaf(params, batch):
  """A loss of the user's own that is finite, with a gradient of NaN."""

  def loss(stats, trajectory):
    return jnp.sqrt(0.0 * stats.logp), {}

  algorithm = algorithms.reinforce()._replace(loss=loss)
  state = init_state(algorithm, adamw(), params, jax.random.key(0))
  new, metrics, _ = jax.jit(make_update(POLICY, algorithm, adamw()))(
    state, batch, RULE
  )
  assert int(new.skipped) == 1
  paths = jax.tree_util.tree_leaves_with_path(params)
  first = sharding.path_name(paths[0][0])
  named = finite.tensor_names(state.trained)[int(metrics[FIRST])]
  assert named == f'the gradient of {first}'


def test_the_largest_leaf_is_named_where_the_norm_of_all_overflows():
  grads = {'a': jnp.full(4, 6e18), 'b': jnp.full(4, 8e18)}
  batch = [jnp.bool_(True)] * len(finite.OF_BATCH)
  index = int(finite.first_tensor(batch, grads, grads))
  assert index == len(finite.OF_BATCH) + 1


def test_a_carry_that_would_not_be_finite_keeps_its_value(params, batch):
  """Carries of one's own, in an update that is finite itself."""

  def after(value, state, metrics):
    return {'x': value['x'] + 1, 'y': jnp.log(-value['y'])}

  begin = {'x': jnp.float32(1), 'y': jnp.float32(1)}
  algorithm = algorithms.reinforce()
  algorithm = algorithm._replace(
    carries=algorithm.carries | {'own': Carry(lambda params: begin, after)}
  )
  state = init_state(algorithm, adamw(), params, jax.random.key(0))
  new, _, _ = jax.jit(make_update(POLICY, algorithm, adamw()))(
    state, batch, RULE
  )
  assert int(new.skipped) == 0
  assert {k: float(v) for k, v in new.carries['own'].items()} == {
    'x': 1.0,
    'y': 1.0,
  }


def test_a_skipped_update_needs_no_second_copy_of_the_state():
  """Memory of an update beside that of the same optimizer unguarded."""
  policy = make_policy(
    changed(CONFIG, layers=CONFIG.layers[:1], d_model=256, d_ff=512)
  )
  params = jax.eval_shape(policy.init, jax.random.key(0))
  size = sum(x.size * 4 for x in jax.tree.leaves(params))
  algorithm, optimizer = algorithms.reinforce(), adamw()
  make = functools.partial(init_state, algorithm, optimizer)
  state = jax.eval_shape(make, params, jax.random.key(0))
  prompts = random_prompts(2, 3)
  rollout = jax.eval_shape(
    make_sampler(policy, SamplerConfig(2, 2, PAD)),
    params,
    jax.random.key(0),
    prompts,
    RULE,
  )
  scored = jax.eval_shape(make_scored, rollout, rollout.logp)
  update = jax.jit(make_update(policy, algorithm, optimizer), donate_argnums=0)
  memory = update.lower(state, scored, RULE).compile().memory_analysis()
  # a gradient, and what the networks compute: 2.6 for this size; a selection
  # of every number needs 4 and more
  assert memory.temp_size_in_bytes < 3.2 * size


# --- steps on the device -----------------------------------------------------


@pytest.mark.parametrize('on_error', ['raise', 'mask', 'zero'])
def test_device_rewards_that_are_not_finite(on_error):
  """Rewards [nan, 1], [2, inf]; the update returns what it is given."""
  prompts = random_prompts(2, 3)
  table = Table(prompts.tokens, prompts.length, {})

  def sample(params, key, prompts, rule, version):
    mask = jnp.ones((4, 1), bool)
    return make_rollout(prompts, jnp.ones((4, 1)), mask)

  def score(params, rollout, columns):
    values = jnp.array([[jnp.nan], [1.0], [2.0], [jnp.inf]])
    return {'judge': values}, {'judge': jnp.array([True, True, False, True])}

  def update(state, scored, rule):
    found = {'sum': jnp.nansum(scored.reward), 'valid': scored.valid.sum()}
    return state.replace(step=state.step + 1), found, scored.reward

  state = TrainState(jnp.int32(0), {}, (), jax.random.key(0), {})
  steps = make_device_steps(
    sample, score, update, {'judge': 1.0}, on_error=on_error
  )
  _, metrics, _ = jax.jit(steps)(state, table, jnp.zeros((1, 2), int), RULE)
  assert float(metrics['rewards/judge/errors'][0]) == 2
  assert int(metrics['valid'][0]) == (1 if on_error == 'mask' else 3)
  total = float(metrics['sum'][0])
  assert total == (np.inf if on_error == 'raise' else 1.0)


# --- what is saved -----------------------------------------------------------


class Disk:
  """Records what is saved; a full one raises."""

  def __init__(self, full=False):
    self.steps, self.full = [], full

  def __call__(self, state, cursor, progress):
    if self.full:
      raise OSError('No space left on device')
    self.steps.append((int(state.step), int(state.skipped), cursor['position']))


def moment(params, step=7, **more):
  state = init_state(algorithms.reinforce(), adamw(), params, jax.random.key(0))
  state = state.replace(step=jnp.int32(step), skipped=jnp.int32(3))
  return Moment(state, {'position': 5}, Progress(step=7), **more)


def not_finite(first):
  return NotFinite('three', 4, first)


def test_only_what_is_whole_is_saved(params):
  error = RuntimeError('judge')
  disk = Disk()
  rescue(moment(params), 0, disk, error)
  assert disk.steps == [(7, 3, 5)]
  for at, begun in (
    (moment(params, step=8), 0),  # in the middle of a step
    (moment(params), 7),  # nothing was learnt
    (moment(params, saved=7), 0),  # it is there already
  ):
    rescue(at, begun, disk, error)
  rescue(moment(params), 0, disk, DeviceRewardError('judge'))
  at = moment(params)
  at.state.opt_state[1][0].count.delete()  # an update took its memory
  rescue(at, 0, disk, error)
  assert len(disk.steps) == 1
  assert not hasattr(error, '__notes__')
  rescue(moment(params), 0, Disk(full=True), error)
  (note,) = error.__notes__
  assert note == (
    'the state after step 7 cannot be saved (No space left on device)'
  )


def test_the_policy_of_updates_that_were_not_finite(params):
  """Saved where rewards are at fault; else only where there is no checkpoint,
  and never where it gives no log-probs. The count begins anew."""
  for first, saved, want in (
    (finite.REWARD, 2, True),
    ('the loss', None, True),
    ('the loss', 2, False),
    (finite.SAMPLED, None, False),
  ):
    disk = Disk()
    rescue(moment(params, saved=saved), 0, disk, not_finite(first))
    assert disk.steps == ([(7, 0, 5)] if want else []), (first, saved)


# --- runs --------------------------------------------------------------------

RECORDS = [{'prompt': f'{i} and {i * i}:'} for i in range(20)]
SMALL = {
  'num_prompts': 8,
  'num_generations': 2,
  'held_out': 4,
  'max_steps': 6,
  'eval_every': 0,
  'save_every': 0,
  'report_to': 'none',
  'max_completion_length': 3,
  'length_buckets': 1,
  'log_kl': False,
  'd_model': 16,
  'num_layers': 1,
  'num_heads': 2,
  'num_kv_heads': 1,
  'd_ff': 16,
  'mesh': 'data=1',
}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Directory of a run of six steps that nothing stopped."""
  out = tmp_path_factory.mktemp('runs') / 'whole'
  run(out, varied, '--save_every=2', '--keep=3')
  return out


def varied(completion_ids, **columns):
  return [len(set(ids)) + ids[0] / 300 for ids in completion_ids]


@on_device
def varied_on_device(rollout):
  return rollout.tokens[:, 0] / 100


def run(out, task, *flags, **more) -> list[dict]:
  """Runs a task; returns its train rows, where nothing is left to JSON that it
  cannot hold."""
  task = task if isinstance(task, Task) else Task(RECORDS, task)
  try:
    main(task, [f'--output_dir={out}', *flags], **SMALL | more)
  finally:
    text = (out / 'metrics.jsonl').read_text()
    assert 'NaN' not in text
    assert 'Infinity' not in text
  return train_rows(out)


def train_rows(out) -> list[dict]:
  lines = (out / 'metrics.jsonl').read_text().splitlines()
  return [row for row in map(json.loads, lines) if row['phase'] == 'train']


def failed(capsys, out, task, *flags, **more) -> str:
  """Runs a task that ends in one line, which is returned; nothing is
  exported."""
  with pytest.raises(SystemExit) as stopped:
    run(out, task, *flags, **more)
  return error_line(capsys, stopped.value, out)


def error_line(capsys, stopped: SystemExit, out) -> str:
  """Line that a run ended in; nothing is exported."""
  assert stopped.code == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert lines[-1].startswith('error: ')
  assert not (out / 'export').exists()
  return lines[-1]


def saved(out) -> list[int]:
  return sorted(int(p.name) for p in (out / 'checkpoints').iterdir())


LLAMA = (f'--model={GOLDEN / "llama"}', '--lora_rank=2')
MANY = {
  'plain': (varied, ()),
  'steps_per_call': (varied_on_device, ('--steps_per_call=2',)),
  'replay, several passes': (
    varied,
    (
      '--replay_groups=4',
      '--replay_capacity=8',
      '--loss=clip',
      '--epochs=2',
      '--mini_batches=2',
      '--max_update_kl=1e9',
    ),
  ),
  'ahead, critic': (
    varied,
    ('--ahead', '--algorithm=ppo', '--critic=separate'),
  ),
  'lora': (varied, LLAMA),
}


@pytest.mark.parametrize('kind', MANY)
def test_a_rate_of_1e9_ends_in_one_line_or_in_numbers(tmp_path, capsys, kind):
  """Parameters of 1e9 give log-probs of NaN. Adapters of 1e9 may give equal
  logits, by a norm that overflows: then all numbers are finite. Which of both
  they give is a matter of the order of sums."""
  reward, flags = MANY[kind]
  out, rate = tmp_path / 'run', {'learning_rate': 1e9, 'max_grad_norm': 1e9}
  try:
    rows = run(out, reward, *flags, **rate)
  except SystemExit as stopped:
    line = error_line(capsys, stopped, out)
  else:
    assert kind == 'lora'
    assert len(rows) == SMALL['max_steps']
    for row in rows:
      assert None not in row.values()
    return
  assert '3 updates in a row, up to step ' in line
  spoilt = (
    f'the first such tensor is {finite.SAMPLED}; lower --learn' in line
    or "and the policy's log-probs are not finite; lower --learn" in line
  )
  assert spoilt == line.endswith('; no good checkpoint is there: begin again')
  assert spoilt != ('is of the policy that they began from: go on' in line)
  rows = train_rows(out)
  assert sum(row['nonfinite_updates'] > 0 for row in rows) >= 3
  assert [row['step'] for row in rows] == list(range(1, len(rows) + 1))


@pytest.mark.parametrize(
  'flags',
  [
    ('--optimizer=sgd', '--learning_rate=1e30'),
    ('--learning_rate=1e12', '--max_grad_norm=1e9'),
    ('--learning_rate=1e12', '--max_grad_norm=1e9', '--max_nonfinite=0'),
  ],
  ids=['loss', 'sampler', 'to the end'],
)
def test_no_checkpoint_of_a_spoilt_policy_stays(tmp_path, capsys, flags):
  """The first update spoils it; step 1 is saved before that is known."""
  out = tmp_path / 'run'
  line = failed(capsys, out, varied, '--save_every=1', *flags)
  assert line.endswith(
    '; deleted checkpoints of that policy: 1; no good checkpoint is there: '
    'begin again'
  )
  assert 'lower --learning_rate;' in line
  assert 'mend the loss' not in line
  assert saved(out) == []
  rows = run(out, varied, '--resume=auto', max_steps=1)
  assert [row['step'] for row in rows] == [1]


def test_a_gap_that_is_not_finite_blames_the_policy():
  """A loss, or a reward, that is the first tensor; an update that is finite
  clears the blame."""
  names = list(finite.OF_BATCH)

  def blamed(first, *gaps):
    log = StepLog(
      Quiet(), lambda step, text: None, LoopConfig(max_nonfinite=3), names
    )
    numbers = {'reward': 0.0, 'entropy': 0.0, 'frac_reward_zero_std': 0.0}
    numbers |= {'completions/clipped_ratio': 0.0}
    progress, count = Progress(), 0
    for gap in gaps:
      count = 0 if gap is None else count + 1
      metrics = numbers | {
        IN_A_ROW: count,
        FIRST: names.index(first) if count else 0,
        'sampler_logp_gap': gap or 0.0,
      }
      batch = Batch(
        None, [], None, {'time/score': 0.0}, TokenCounts(1, 1, 1), {}
      )
      progress = log.hold(progress, batch, metrics)
      try:
        log.flush()
      except NotFinite as e:
        return e.by_policy, e.by_reward, e.since
    return log.spoilt

  nan, inf = float('nan'), float('inf')
  assert blamed('the loss', 0.1, 0.1, 0.1) == (False, False, 0)
  assert blamed('the loss', 0.1, nan, 0.1) == (True, False, 0)
  assert blamed('the loss', None, inf, 0.1, 0.1) == (True, False, 1)
  assert blamed(finite.REWARD, 0.1, 0.1, 0.1) == (False, True, 0)
  assert blamed(finite.REWARD, nan, 0.1, 0.1) == (True, False, 0)
  assert blamed(finite.SAMPLED, 0.1, 0.1, 0.1) == (True, False, 0)
  assert blamed('the loss', nan, None, 0.1) is False
  assert blamed('the loss', None, nan) is True


class Quiet:
  """Logger that writes nothing."""

  def metrics(self, *args):
    pass

  def warn(self, text):
    pass


@on_device
def not_a_number(rollout):
  return jnp.where(rollout.version == 3, jnp.nan, rollout.tokens[:, 0])


@pytest.mark.parametrize(
  ('every', 'want'),
  [
    ('2', 'the last good checkpoint is step 2: go on with '),
    ('0', 'no good checkpoint is there: begin again'),
  ],
)
def test_a_device_reward_that_fails_in_a_call_saves_nothing_after_it(
  tmp_path, capsys, every, want
):
  """Resumed, all steps of the call are made again."""
  out, more = tmp_path / 'run', ('--steps_per_call=2', f'--save_every={every}')
  line = failed(capsys, out, not_a_number, *more)
  assert 'completions of step 4 values that are not finite' in line
  assert want in line
  assert saved(out) == ([2] if every == '2' else [])
  if every == '2':
    assert 'steps after the last checkpoint are lost' in line
  again = '--resume=auto', '--allow_change=rewards'
  rows = run(out, varied_on_device, *more, *again)
  assert [row['step'] for row in rows] == [1, 2, 3, 4, 5, 6]
  assert [row['nonfinite_updates'] for row in rows] == [0.0] * 6


def huge(completion_ids, **columns):
  return [1e30 * (b % 2) for b in range(len(completion_ids))]


@on_device
def huge_on_device(rollout):
  return rollout.tokens[:, 0] * 1e30


@pytest.mark.parametrize(
  ('kind', 'reward'),
  [('plain', {'varied': huge}), ('steps_per_call', huge_on_device)],
  ids=['plain', 'steps_per_call'],
)
def test_rewards_of_1e30_end_in_one_line(tmp_path, capsys, kind, reward):
  """The policy has not changed, and is saved: smaller rewards go on."""
  right, flags = MANY[kind]
  out = tmp_path / 'run'
  line = failed(capsys, out, reward, *flags)
  step = 4 if kind == 'steps_per_call' else 3
  assert line == (
    'error: 3 updates in a row, up to step 3, were not finite and changed '
    'nothing; the first such tensor is the reward; make the rewards smaller; '
    f'the last good checkpoint is step {step}: go on with --output_dir {out} '
    '--resume auto --allow_change rewards'
  )
  assert saved(out) == [step]
  rows = run(out, right, *flags, '--resume=auto', '--allow_change=rewards')
  assert [row['step'] for row in rows] == [1, 2, 3, 4, 5, 6]
  bad = [row['nonfinite_updates'] for row in rows]
  assert bad == [1.0] * step + [0.0] * (6 - step)


def same_runs(a, b, rows_of_a=None) -> None:
  """Checks that two runs have the same rows, but for times, and weights."""
  found = []
  for rows in (rows_of_a or train_rows(a), train_rows(b)):
    clocks = ('time', 'step_time', 'tokens_per_second')
    found.append(
      [
        {k: v for k, v in r.items() if k.split('/')[0] not in clocks}
        for r in rows
      ]
    )
  assert found[0] == found[1]
  one, two = (load_file(x / 'export/model.safetensors') for x in (a, b))
  for name in one:
    np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.parametrize('ahead', [False, True])
def test_a_reward_that_raises_loses_nothing(whole, tmp_path, capsys, ahead):
  """Resumed, the run repeats the batch that failed, to the bit."""

  def fails(completion_ids, trainer_state, **columns):
    if trainer_state.global_step == 4:
      raise RuntimeError('the judge answered 503')
    return varied(completion_ids)

  out, flags = tmp_path / 'run', ()
  if ahead:
    whole, flags = tmp_path / 'whole', MANY['ahead, critic'][1]
    run(whole, varied, *flags)
  line = failed(capsys, out, {'varied': fails}, *flags)
  assert line.startswith(
    'error: reward varied raised RuntimeError: the judge answered 503 on 16 '
    'completions, the first '
  )
  assert " of prompt '" in line
  assert line.endswith(
    'mend it, return None where it does not apply, or pass --reward_on_error '
    'mask; the last good checkpoint is step 4: go on with --output_dir '
    f'{out} --resume auto --allow_change rewards'
  )
  assert saved(out) == [4]
  run(out, varied, *flags, '--resume=auto', '--allow_change=rewards')
  same_runs(out, whole)


def test_a_metric_that_raises_loses_nothing(tmp_path, capsys):
  """A metric of an evaluation; masked, it is left out."""
  calls = []

  def judged(completions):
    calls.append(1)
    if len(calls) > 1:
      raise KeyError('bleu')
    return 1.0

  later = Evaluation('later', RECORDS[:4], every=3, metrics=[judged])
  task = Task(RECORDS, varied, evaluations=[later])
  out = tmp_path / 'run'
  line = failed(capsys, out, task)
  assert "the metric judged raised KeyError: 'bleu' on 4 completions" in line
  assert line.endswith(
    f'mend it; the last good checkpoint is step 3: go on with --output_dir '
    f'{out} --resume auto --allow_change rewards'
  )
  assert saved(out) == [3]
  rows = run(out, task, '--resume=auto', '--reward_on_error=mask')
  assert [row['step'] for row in rows] == [1, 2, 3, 4, 5, 6]
  said = capsys.readouterr().out
  assert said.count('it is left out (--reward_on_error)') == 1


@pytest.fixture(scope='module')
def watched(tmp_path_factory):
  """Directory of a run with two evaluations that nothing stopped."""
  out = tmp_path_factory.mktemp('runs') / 'watched'
  run(out, watched_task(), *WATCHED)
  return out


WATCHED = ('--eval_every=2', '--patience=1', '--save_every=2')


def watched_task(failing=None) -> Task:
  """Task whose reward falls while it is trained: held-out evaluations, after
  each of which another one runs; its n-th call raises where n is `failing`."""
  calls = []

  def falling(completion_ids, trainer_state, **columns):
    step = trainer_state.global_step
    return [ids[0] / 300 - step for ids in completion_ids]

  def judged(completions):
    calls.append(1)
    if len(calls) == failing:
      raise KeyError('bleu')
    return float(sum(map(len, completions)))

  later = Evaluation('later', RECORDS[:4], metrics=[judged])
  return Task(RECORDS, {'varied': falling}, evaluations=[later])


@pytest.mark.parametrize(('call', 'step'), [(2, 2), (3, 4)])
def test_an_evaluation_that_raises_is_run_when_resumed(
  watched, tmp_path, capsys, call, step
):
  """Step 4 is the last: its evaluation is no better one.
  Resumed twice, nothing is counted or written twice."""
  out = tmp_path / 'run'
  line = failed(capsys, out, watched_task(call), *WATCHED)
  assert f'the last good checkpoint is step {step}: ' in line
  assert [r['step'] for r in eval_rows(out)][-1] <= step
  capsys.readouterr()
  for _ in range(2):
    run(out, watched_task(), *WATCHED, '--resume=auto')
    said = capsys.readouterr().out
    assert 'stopped at step 4: no better held-out reward in 1 eval' in said
    assert eval_rows(out) == eval_rows(watched)
    same_runs(out, watched)


def eval_rows(out) -> list[dict]:
  lines = (out / 'metrics.jsonl').read_text().splitlines()
  rows = [row for row in map(json.loads, lines) if row['phase'] == 'eval']
  return [{k: v for k, v in r.items() if k != 'time'} for r in rows]


def test_the_last_good_checkpoint_is_one_that_an_update_has_proven(tmp_path):
  """Updates of steps 5 to 7 were not finite; that of step 4 is the last that
  was, and step 4 is where they began."""

  def note(steps, first):
    out = tmp_path / '-'.join(['run', *map(str, steps)])
    for step in steps:
      (out / 'checkpoints' / str(step)).mkdir(parents=True, exist_ok=True)
    return resume_note(out, NotFinite('three', 4, first))

  for steps, first, want in (
    ((2, 3), 'the loss', 'good checkpoint is step 3: '),
    ((2, 4), 'the loss', 'good checkpoint is step 2: '),
    ((2, 4), finite.SAMPLED, 'good checkpoint is step 2: '),
    ((2, 7), finite.REWARD, 'good checkpoint is step 7: '),
    ((4,), 'the loss', 'checkpoint 4 is of the policy that they began from'),
    ((4,), finite.SAMPLED, 'no good checkpoint is there: begin again'),
    ((), 'the loss', 'no good checkpoint is there: begin again'),
  ):
    assert want in note(steps, first), (steps, first)
  assert note((2, 4), 'the loss').endswith('--resume 2 --allow_change settings')
  auto = note((2, 3), finite.REWARD)
  assert auto.endswith('--resume auto --allow_change rewards')


def test_a_full_disk_is_said_beside_the_error(tmp_path, capsys, monkeypatch):
  def full(*args):
    raise OSError(28, 'No space left on device')

  def fails(completion_ids, trainer_state, **columns):
    if trainer_state.global_step == 2:
      raise RuntimeError('the judge answered 503')
    return varied(completion_ids)

  monkeypatch.setattr(checkpoint, 'save', full)
  line = failed(capsys, tmp_path / 'run', {'varied': fails})
  assert 'the judge answered 503' in line
  assert 'the state after step 2 cannot be saved (the disk is full: ' in line


def test_an_earlier_checkpoint_is_gone_on_with(whole, tmp_path):
  """Later ones are made anew, as rows are."""
  out = tmp_path / 'run'
  shutil.copytree(whole, out)
  assert saved(out) == [2, 4, 6]
  run(out, varied, '--save_every=2', '--keep=3', '--resume=2')
  assert saved(out) == [2, 4, 6]
  same_runs(out, whole)


def test_a_model_that_is_not_finite_is_refused(tmp_path, capsys):
  """Refused before it is trained, and before it is exported."""
  model = open_model(GOLDEN / 'llama')
  trainable = full(model)
  params, _ = trainable.load(sharding.make_mesh('data=1'))
  spoilt = jax.tree.map(jnp.copy, params)
  spoilt['layers']['mlp']['down'] = spoilt['layers']['mlp']['down'] * jnp.nan
  with pytest.raises(ValueError, match='has layers/mlp/down with numbers'):
    trainable.save(tmp_path / 'out', spoilt, None)
  assert not (tmp_path / 'out').exists()
  where = tmp_path / 'model'
  shutil.copytree(GOLDEN / 'llama', where)
  tensors = load_file(where / 'model.safetensors')
  name = next(n for n in tensors if 'down_proj.weight' in n)
  save_file(
    tensors | {name: tensors[name] * np.nan}, where / 'model.safetensors'
  )
  line = failed(capsys, tmp_path / 'run', varied, f'--model={where}')
  assert line == (
    f'error: {where} has layers/mlp/down with numbers that are not finite; no '
    'update of it is finite: give another model'
  )


# --- rewards in workers, numbers beyond their limits --------------------------

WORKERS = ('--reward_workers=2', '--reward_timeout=30')


def test_19_a_reward_that_ends_its_process_loses_nothing(
  whole, tmp_path, capsys
):
  """One line that names function, completion and cure, after the state was
  saved; resumed, the run is that which nothing stopped."""
  out = tmp_path / 'run'
  task = {'varied': misbehaving.ends_at_step_2}
  line = failed(capsys, out, task, *WORKERS)
  assert line.startswith(
    'error: reward varied ended its process (exit code 0) on completion 0 ('
  )
  assert line.endswith(
    'mend it, return None where it does not apply, or pass --reward_on_error '
    'mask; the last good checkpoint is step 2: go on with --output_dir '
    f'{out} --resume auto --allow_change rewards'
  )
  assert saved(out) == [2]
  mended = '--allow_change=rewards'
  run(out, {'varied': misbehaving.varied}, '--resume=auto', mended, *WORKERS)
  rows = train_rows(out)
  for row in rows:
    assert row.pop('rewards/varied/killed') == 0
  same_runs(out, whole, rows)


def test_19_masked_completions_leave_the_loss(tmp_path):
  """The run goes on, and counts them."""
  task, mask = {'varied': misbehaving.ends_for_some}, '--reward_on_error=mask'
  rows = run(tmp_path / 'run', task, mask, *WORKERS)
  errors = [row['rewards/varied/errors'] for row in rows]
  assert 0 < errors[2] < 16
  assert rows[2]['frac_not_valid'] == errors[2] / 16
  assert rows[2]['rewards/varied/killed'] > errors[2]
  assert not any(errors[:2] + errors[3:])
  assert len(rows) == 6


def test_a_reward_that_cannot_be_sent_is_refused_first(tmp_path, capsys):
  """Before anything is compiled or written."""
  lock, out = threading.Lock(), tmp_path / 'run'

  def locked(completions, **columns):
    with lock:
      return [1.0] * len(completions)

  with pytest.raises(SystemExit) as stopped:
    main(Task(RECORDS, locked), [f'--output_dir={out}', *WORKERS], **SMALL)
  line = error_line(capsys, stopped.value, out)
  assert line.startswith('error: reward locked cannot be sent to a worker (')
  assert not out.exists()
  with pytest.raises(SystemExit) as stopped:
    main(
      Task(RECORDS, varied_on_device),
      [f'--output_dir={out}', *WORKERS],
      **SMALL,
    )
  assert error_line(capsys, stopped.value, out) == (
    'error: --reward_workers has no effect on rewards that are JAX functions; '
    'leave it out'
  )


def begun(whole, out):
  """Copy of six steps, whose entropy was above all limits."""
  shutil.copytree(whole, out)
  shutil.rmtree(out / 'export')
  rows = map(json.loads, (out / 'metrics.jsonl').read_text().splitlines())
  lines = [json.dumps(row | {'entropy': 200.0}) + '\n' for row in rows]
  (out / 'metrics.jsonl').write_text(''.join(lines))
  return out


def test_16_a_run_that_diverges_ends_with_status_1(whole, tmp_path, capsys):
  """Named: the last checkpoint before; no later one is kept."""
  out = begun(whole, tmp_path / 'run')
  more = ('--resume=auto', '--max_steps=12', '--min_entropy=100')
  with pytest.raises(SystemExit) as stopped:
    run(out, varied, '--save_every=1', '--keep=9', *more)
  assert stopped.value.code == 1
  line = capsys.readouterr().err.strip().splitlines()[-1]
  assert 'error: the run has diverged at step 9: entropy ' in line
  assert ' is below --min_entropy 100, in 3 steps in a row; lower --' in line
  assert line.endswith(
    f'the last good checkpoint is step 4: go on with --output_dir {out} '
    '--resume 4 --allow_change settings'
  )
  assert saved(out) == [2, 4, 6]


def test_16_a_run_that_diverges_is_rolled_back_once(whole, tmp_path, capsys):
  """With half the learning rate, which whoever resumes it keeps."""
  out = begun(whole, tmp_path / 'run')
  more = ('--max_steps=12', '--min_entropy=100', '--on_divergence=rollback')
  with pytest.raises(SystemExit) as stopped:
    run(out, varied, '--resume=auto', *more)
  assert stopped.value.code == 1
  found = capsys.readouterr()
  assert 'rolled back to step 4, with --learning_rate 0.0005 in' in found.out
  assert 'the last good checkpoint is step 2: ' in found.err
  rates = {row['step']: row['learning_rate'] for row in train_rows(out)}
  assert rates[4] == pytest.approx(1e-3)
  # an optimizer's state holds the rate of its next step
  assert rates[6] == rates[7] == pytest.approx(5e-4)
  rows = run(out, varied, '--resume=2', max_steps=4)
  assert rows[-1]['learning_rate'] == pytest.approx(5e-4)


def test_no_memory_is_one_line(tmp_path, capsys, monkeypatch):
  """One line is of a device without memory; other errors are shown whole."""
  from jaxrl_tok.run import launch

  def runs(setup):
    raise jax.errors.JaxRuntimeError(said)

  monkeypatch.setattr(launch, 'run', runs)
  said = 'RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n at x'
  with pytest.raises(SystemExit) as stopped:
    main(Task(RECORDS, varied), [], **SMALL)
  assert error_line(capsys, stopped.value, tmp_path).startswith(
    'error: no memory is left (RESOURCE_EXHAUSTED: Out of memory allocating 9 '
    'bytes. at x); pass a smaller --num_prompts, --num_generations or '
  )
  said = 'INTERNAL: x'
  with pytest.raises(jax.errors.JaxRuntimeError):
    main(Task(RECORDS, varied), [], **SMALL)
