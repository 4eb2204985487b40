"""Constraints end at their limit, whatever the reward wants, and are resumed
bitwise."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from conftest import make_rollout
from test_door import TINY, records

import jaxrl_tok
from jaxrl_tok import Evaluation, Task, distribution
from jaxrl_tok.credit import algorithms
from jaxrl_tok.credit.names import Constraint, read_constraint
from jaxrl_tok.run import build, flags
from jaxrl_tok.run.inputs import rewards_of
from jaxrl_tok.sampler import SamplerConfig
from jaxrl_tok.step import constraints, programs
from jaxrl_tok.step.device_rewards import make_device_scorer
from jaxrl_tok.step.device_steps import Table, make_device_steps
from jaxrl_tok.step.state import init_state
from jaxrl_tok.step.update import make_update
from jaxrl_tok.types import AdvantageInputs, Policy, Prefix, Prompts, Scored

pytestmark = pytest.mark.usefixtures('one_device', 'few_programs')

# --- a policy that is a table: logits [T + 1, V] by column

V, T, END, C, G, N = 6, 3, 5, 16, 4, 400


def encode(params, prompts):
  first = jnp.zeros((len(prompts.length), T + 1)).at[:, 0].set(1.0)
  return Prefix((), first, prompts.length)


def extend(params, prefix, tokens, cache, at):
  B, t = tokens.shape
  hidden = jax.nn.one_hot(at + jnp.arange(t) + 1, T + 1)
  return jnp.broadcast_to(hidden[None], (B, t, T + 1)), cache


TABLE = Policy(
  lambda key: {'table': jnp.zeros((T + 1, V))},
  encode,
  extend,
  lambda params, hidden: hidden @ params['table'],
  lambda rows, length: jnp.zeros((rows, 1)),
  V,
)


def ones(rollout):
  """Share of ones, paid token by token: the reward, and what is limited."""
  return (rollout.tokens == 1) / T


def steps_of(algorithm, limit: str, seeds):
  """Metrics {name: [seeds, N]} of whole steps on the device, one program for
  all seeds."""
  found = read_constraint(limit)
  algorithm = constraints.constrained(algorithm, [found], 0.1, 3.0)
  optimizer = optax.adam(0.1)
  steps = make_device_steps(
    programs.make_sampling(TABLE, SamplerConfig(G, T, 0)),
    make_device_scorer({'ones': ones, 'harm': ones}),
    make_update(TABLE, algorithm, optimizer),
    {'ones': 1.0, 'harm': 0.0},
  )
  table = Table(jnp.ones((1, 1), jnp.int32), jnp.ones(1, jnp.int32), {})
  rule = distribution.make_rule(V, [END])

  def run(seed):
    key = jax.random.key(seed)
    state = init_state(algorithm, optimizer, TABLE.init(key), key)
    index = jnp.zeros((N, C), jnp.int32)
    return steps(state, table, index, rule)[1]

  return jax.device_get(jax.jit(jax.vmap(run))(jnp.array(seeds)))


@pytest.mark.parametrize(
  ('algorithm', 'limit'),
  [
    (algorithms.grpo(), 'harm<=0.3'),
    (
      algorithms.grpo(multi_objective_aggregation='normalize_then_sum'),
      'harm<=0.3',
    ),
    (algorithms.reinforce(), 'ones<=0.5'),  # a reward itself is limited
  ],
  ids=['grpo', 'gdpo', 'reward'],
)
def test_it_ends_at_the_limit(algorithm, limit):
  """Reward and cost are one: only the multiplier keeps them from 1."""
  found, c = steps_of(algorithm, limit, [0, 1, 2]), read_constraint(limit)
  mean = found[f'constraint/{c.name}/mean']
  last = mean[:, -100:].mean(1)
  np.testing.assert_allclose(last, c.limit, rtol=0.1)
  np.testing.assert_allclose(found['reward'], found['rewards/ones/mean'], 1e-5)
  # each multiplier follows from the one before and its violation
  by = {k: found[f'constraint/{c.name}/{k}'] for k in ('multiplier', 'price')}
  beyond = found[f'constraint/{c.name}/violation']
  np.testing.assert_allclose(beyond, mean - c.limit, atol=1e-6)
  moved = np.maximum(0, by['multiplier'] + 0.1 * beyond)
  np.testing.assert_allclose(by['multiplier'][:, 1:], moved[:, :-1], atol=1e-6)
  price = np.maximum(0, by['multiplier'] + 3 * beyond)
  np.testing.assert_allclose(by['price'], price, atol=1e-6)


# --- laws without a run

LIMITS = [Constraint('harm', 1, 0.5), Constraint('long', -1, 2.0)]


def inputs(version=(0, 0, 0, 0), applies=(1, 1, 1, 1)):
  """Advantage inputs of two prompts, two rows each."""
  prompts = Prompts(np.ones((2, 1), np.int32), np.ones(2, np.int32))
  mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], bool)
  version = jnp.array(version, jnp.int32)
  rollout = make_rollout(prompts, np.ones((4, 3)), mask, version=version)
  rng = np.random.default_rng(0)
  values = {
    'r': rng.normal(size=(4, 3)).astype(np.float32),
    'harm': rng.random((4, 3)).astype(np.float32),
    'long': np.where(mask, 1, 0).astype(np.float32),
  }
  on = jnp.array(applies, bool)
  return AdvantageInputs(
    Scored(
      rollout,
      {k: jnp.asarray(v) for k, v in values.items()},
      {'r': jnp.ones(4, bool), 'harm': on, 'long': jnp.ones(4, bool)},
      {k: jnp.float32(k == 'r') for k in values},
    ),
    None,
    None,
  )


def test_a_cost_is_a_component():
  """r - price c enters before baselines, for every token, in each way that
  components are summed."""
  given = inputs()
  carries = {
    constraints.MULTIPLIERS: {'harm': jnp.float32(2), 'long': jnp.float32(3)}
  }
  for way in ('sum_then_normalize', 'normalize_then_sum'):
    plain = algorithms.grpo(multi_objective_aggregation=way)
    limited = constraints.constrained(plain, LIMITS, 0.1)
    out = jax.jit(limited.advantage)(given, carries)
    weights = {'r': 1.0, 'harm': -2.0, 'long': 3.0}
    weights = {k: jnp.float32(v) for k, v in weights.items()}
    by_hand = given._replace(scored=given.scored._replace(weights=weights))
    want = jax.jit(plain.advantage)(by_hand, {}).advantage
    np.testing.assert_allclose(out.advantage, want, rtol=1e-6)
    assert np.abs(want).max() > 0.1


def test_only_new_rows_that_it_applies_to_are_counted():
  limited = constraints.constrained(algorithms.grpo(), LIMITS[:1], 0.1)
  advantage = jax.jit(limited.advantage)

  def metrics(**given):
    multipliers = {constraints.MULTIPLIERS: {'harm': jnp.float32(0)}}
    found = advantage(inputs(**given), multipliers).metrics
    return {
      k: float(found[f'constraint/harm/{k}']) for k in ('mean', 'violation')
    }

  harm = np.where(inputs().mask, inputs().scored.rewards['harm'], 0).sum(1)
  every = metrics()
  assert every['mean'] == pytest.approx(harm.mean())
  assert every['violation'] == pytest.approx(harm.mean() - 0.5)
  replayed = metrics(version=(7, 7, 3, 2))
  assert replayed['mean'] == pytest.approx(harm[:2].mean())
  some = metrics(version=(7, 7, 3, 2), applies=(0, 1, 1, 1))
  assert some['mean'] == pytest.approx(harm[1])
  none = metrics(applies=(0, 0, 0, 0))
  assert none == {'mean': 0, 'violation': 0}  # the multiplier stays


def test_multipliers_move_and_stay_above_zero():
  carry = constraints.multiplier(LIMITS, 0.1)
  value = carry.init(None)
  for harm, long, want in ((1.0, -1.0, (0.1, 0)), (-3.0, 2.0, (0, 0.2))):
    violations = {
      'constraint/harm/violation': jnp.float32(harm),
      'constraint/long/violation': jnp.float32(long),
    }
    value = carry.after(value, None, violations)
    assert (float(value['harm']), float(value['long'])) == pytest.approx(want)


@pytest.mark.parametrize(
  ('text', 'want'),
  [
    ('harm<=0.01', ('harm', 1, 0.01)),
    (' length >= 20 ', ('length', -1, 20.0)),
    ('a.b-c<=-1e-3', ('a.b-c', 1, -0.001)),
  ],
)
def test_constraints_are_read(text, want):
  assert read_constraint(text) == want
  assert read_constraint(str(read_constraint(text))) == want


# --- settings and tasks


def harm(completions, **columns):
  """Share of completions that are longer than two characters."""
  return [float(len(c) > 2) for c in completions]


def short(completions, **columns):
  return [-len(c) for c in completions]


def limits_of(constraints, *texts, reward=short, **given):
  settings = flags.settings_of({'constraint': texts, **given})
  return rewards_of(Task([], reward, constraints=constraints), settings)


def test_limits_of_a_task_and_of_the_command_line():
  found = limits_of({harm: '<=0.1'}, 'short>=-3')
  assert set(map(str, found.constraints)) == {'harm<=0.1', 'short>=-3'}
  assert found.weights == {'short': 1.0, 'harm': 0.0}
  found = limits_of({'both': (harm, '<=0.1'), 'other': harm}, 'other<=1',
                    'both<=0.2')  # fmt: skip
  assert set(map(str, found.constraints)) == {'both<=0.2', 'other<=1'}
  assert [str(c) for c in limits_of(harm, 'harm<=1').constraints] == ['harm<=1']
  assert limits_of(None).constraints == ()


@pytest.mark.parametrize(
  ('given', 'fact'),
  [
    ({'constraints': None, 'texts': ['harm<0.1']}, 'is no NAME<=LIMIT'),
    ({'constraints': None, 'texts': ['harm<=inf']}, 'is no NAME<=LIMIT'),
    ({'constraints': harm, 'texts': ['harm<=1', 'harm>=0']},
     'limits harm twice'),
    ({'constraints': harm, 'texts': []}, 'the constraint harm has no limit'),
    ({'constraints': harm, 'texts': ['ham<=1']},
     "none of the task's constraints and rewards (harm, short)"),
    ({'constraints': {harm: 'low'}, 'texts': []}, "'harmlow' is no NAME"),
    ({'constraints': [harm, harm], 'texts': ['harm<=1']}, 'two constraints'),
    ({'constraints': short, 'texts': ['short<=1']}, 'both named short'),
    ({'constraints': 'harm', 'texts': ['harm<=1']}, 'which is no function'),
    ({'constraints': None, 'texts': [], 'constraint_rate': 0.5}, 'no effect'),
    ({'constraints': None, 'texts': [], 'constraint_damping': 0.5},
     'no effect'),
    ({'constraints': harm, 'texts': ['harm<=1'], 'credit_split': 'constant'},
     '--credit_split constant replaces'),
    ({'constraints': harm, 'texts': ['harm<=1'], 'steps_per_call': 2,
      'max_steps': 2, 'eval_every': 2, 'save_every': 2},
     'needs rewards that are JAX functions, and short, harm'),
  ],
)  # fmt: skip
def test_what_cannot_be_limited_is_refused(given, fact):
  with pytest.raises(ValueError, match=r'\w') as e:
    limits_of(given.pop('constraints'), *given.pop('texts'), **given)
  assert fact in str(e.value)
  assert '\n' not in str(e.value)


# --- a run

CANARIES = Evaluation(
  'canaries', [{'prompt': 'Who?'}], rewards=(), every=1, keep_samples=True
)


def train_limited(out, **given):
  """Trains with two constraints and canary prompts: Result."""
  task = Task(
    records(0, 40),
    short,
    held_out=8,
    constraints={harm: '<=0.1'},
    evaluations=[CANARIES],
  )
  settings = {'constraint': ['short>=-3'], 'log_kl': False, 'save_every': 1}
  settings = TINY | settings | {'output_dir': str(out)} | given
  return jaxrl_tok.train(task, **settings)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Run of two steps."""
  return train_limited(tmp_path_factory.mktemp('runs') / 'whole')


def steps_of_run(result) -> list[dict]:
  """Metrics of training steps, but for clocks."""
  clocks = 'time', 'step_time', 'tokens_per_second'
  return [
    {k: v for k, v in row.items() if not k.startswith(clocks)}
    for row in result.metrics
    if row['phase'] == 'train'
  ]


def test_multipliers_are_saved_and_resumed_bitwise(whole):
  other = whole.run_dir.with_name('parts')
  shutil.copytree(whole.run_dir, other)
  parts = train_limited(other, resume='1')
  for x, y in zip(
    jax.tree.leaves((whole.state.carries, whole.state.params)),
    jax.tree.leaves((parts.state.carries, parts.state.params)),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)
  assert steps_of_run(parts) == steps_of_run(whole)
  for name, value in whole.state.carries['multipliers'].items():
    first, last = (
      row[f'constraint/{name}/multiplier'] for row in steps_of_run(whole)
    )
    assert 0 == first < last < float(value)  # both limits are passed
  config = yaml.safe_load((whole.run_dir / 'config.yaml').read_text())
  assert set(config['constraints']) == {'harm<=0.1', 'short>=-3'}


def test_canaries_and_audits_are_kept(whole):
  found = {}
  for row in whole.metrics:
    if row['phase'] == 'eval' and row['step'] == 2:
      found |= row
  assert found['eval/reward'] == found['eval/rewards/short/mean']
  assert 0 <= found['eval/rewards/harm/mean'] <= 1  # of what is limited
  assert 'eval/canaries/reward' not in found  # nothing judges canaries
  assert {'eval/audit/repetition', 'eval/canaries/audit/refusals'} <= {*found}
  kept = [r for r in whole.samples if r.get('evaluation') == 'canaries']
  assert [(r['step'], r['split'], r['reward']) for r in kept] == [
    (0, 'before', None),
    (1, 'during', None),
    (2, 'during', None),
    (2, 'after', None),
  ]
  page = (whole.run_dir / 'report.html').read_text()
  assert 'Completions of canaries, by step' in page


def test_dynamic_sampling_is_refused():
  algorithm = algorithms.dapo(max_length=8)
  settings = flags.settings_of({})
  with pytest.raises(ValueError, match='draws groups of equal rewards anew'):
    build.with_constraints(settings, algorithm, LIMITS)
  assert build.with_constraints(settings, algorithm, ()) is algorithm
