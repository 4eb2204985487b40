"""Laws of whole steps in one program: the same numbers, and no host inside."""

import concurrent.futures
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import END, OTHER_END, changed, random_prompts
from safetensors.numpy import load_file
from test_train import assert_same_run, cache, flags, rows  # noqa: F401

from experiments import arithmetic, warm_start
from jaxrl_tok import algorithms, data, device_rewards, rewards
from jaxrl_tok.sampler import make_sampler
from jaxrl_tok.steps import Table, make_steps
from jaxrl_tok.types import Prompts, Rollout
from jaxrl_tok.update import init_state, make_update

# --- in one call and one after another --------------------------------------

INDEX_3xC = np.array([[0, 3, 5, 6], [2, 1, 4, 0], [6, 5, 3, 2]], np.int32)
# all that an update leaves to the next, and two rollouts a step
ALGORITHM = algorithms.remax(
  kl='reverse',
  beta=0.3,
  kl_target=0.01,
  kl_horizon=24.0,
  reference_every=2,
  epochs=2,
  mini_batches=2,
)


@device_rewards.on_device
def small(rollout, target, **columns):
  """For every token: 1 where it is below the prompt's target, else 0."""
  return (rollout.tokens < target[:, None]).astype(jnp.float32)


@device_rewards.on_device
def ended(rollout, **columns):
  """An outcome: whether the completion ended by itself."""
  ends = (rollout.tokens == END) | (rollout.tokens == OTHER_END)
  return jnp.any(ends & rollout.mask, axis=1)


def compiled(jobs: dict) -> dict:
  """{name: (function, args)} -> {name: its program}, made side by side."""

  def build(job):
    return jax.jit(job[0]).lower(*job[1]).compile()

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return dict(zip(jobs, pool.map(build, jobs.values())))


@pytest.fixture(scope='module')
def both(tiny):
  """Three steps in one call, and the same three one after another."""
  optimizer, rule = optax.adam(0.03), tiny.rule
  greedy = changed(tiny.config, samples_per_prompt=1, greedy=True)
  greedy = make_sampler(tiny.policy, greedy)

  def of_weights(sample):
    return lambda weights, *args: sample(tiny.policy.join(*weights), *args)

  score = device_rewards.make_scorer([small, ended], [0.5, 2.0])
  update = make_update(tiny.policy, ALGORITHM, optimizer)
  state = init_state(ALGORITHM, optimizer, tiny.params, jax.random.key(3))
  targets = np.arange(2, 9, dtype=np.int32)
  table = Table(*random_prompts(C=7), {'target': targets})
  table, index = jax.device_put((table, INDEX_3xC))
  steps = make_steps(of_weights(tiny.sample), score, update, of_weights(greedy))
  reward = jnp.zeros(tiny.rollout.logp.shape)
  jobs = {
    'steps': (steps, (state, None, table, index, rule)),
    'greedy': (greedy, (state.params, state.key, tiny.prompts, rule)),
    'update': (update, (state, tiny.rollout, reward, rule, jnp.zeros(4))),
  }

  def build(job):
    return jax.jit(job[0]).lower(*job[1]).compile()

  with concurrent.futures.ThreadPoolExecutor() as pool:
    run = dict(zip(jobs, pool.map(build, jobs.values())))
  with jax.transfer_guard('disallow'):
    together = run['steps'](state, None, table, index, rule)
  alone, found = state, []
  for number, index_C in enumerate(INDEX_3xC):
    prompts = Prompts(table.tokens[index_C], table.length[index_C])
    columns = {'target': table.columns['target'][index_C]}
    args = alone.params, jax.random.fold_in(alone.key, number), prompts, rule
    rollout, best = tiny.sample(*args), run['greedy'](*args)
    reward, means = score(None, rollout, columns)
    greedy_reward = score(None, best, columns)[0].sum(1)
    alone, metrics, advantage = run['update'](
      alone, rollout, reward, rule, greedy_reward
    )
    found.append(metrics | means)
  return types.SimpleNamespace(
    start=state,
    together=together,
    alone=(alone, found, (rollout, reward, advantage)),
    text=run['steps'].as_text(),
  )


def assert_close(a, b, tolerance=1e-5):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_allclose(x, y, tolerance, tolerance)


def test_steps_in_one_call_are_the_steps(both):
  state, metrics, last = both.together
  alone, found, (rollout, reward, advantage) = both.alone
  for name in ('tokens', 'mask'):
    np.testing.assert_array_equal(
      getattr(last.rollout, name), getattr(rollout, name)
    )
  assert_close(tuple(last), (rollout, reward, advantage))
  assert metrics.keys() == found[0].keys()
  assert {'rewards/small/mean', 'rewards/ended/mean'} <= metrics.keys()
  for name, values_3 in metrics.items():
    np.testing.assert_allclose(
      values_3, [float(m[name]) for m in found], 1e-4, 1e-5, err_msg=name
    )
  assert_close(state, alone)
  assert int(state.step) == 3
  moved = jax.tree.map(
    lambda x, y: float(jnp.abs(x - y).max()), state.params, both.start.params
  )
  assert min(jax.tree.leaves(moved)) > 1e-3


def host_parts(text: str) -> set[str]:
  """Operations of a compiled program that the host takes part in."""
  names = 'infeed|outfeed|send|recv|send-done|recv-done'
  found = set(re.findall(rf'\s({names})\(', text))
  calls = re.findall(r'custom_call_target="([^"]*)"', text)
  return found | {c for c in calls if 'callback' in c or 'host' in c.lower()}


def test_the_host_takes_no_part(both):
  assert host_parts(both.text) == set()


def test_the_host_would_be_seen():
  def asks(x):
    jax.debug.callback(lambda x: None, x)
    return jax.pure_callback(np.sin, x, x)

  program = jax.jit(asks).lower(jnp.float32(1)).compile()
  assert host_parts(program.as_text())
  with (
    pytest.raises(Exception, match='Disallowed host-to-device'),
    jax.transfer_guard('disallow'),
  ):
    jax.jit(jnp.sin)(np.float32(1))


# --- a whole run -------------------------------------------------------------


@pytest.fixture(scope='module')
def runs(cache, tmp_path_factory):  # noqa: F811
  """run(name, flags): the directory of a run, three calls of two steps."""
  home = tmp_path_factory.mktemp('runs')

  def run(name, **more):
    arithmetic.main(flags(home / name, **{'steps_per_call': 2, **more}))
    return home / name

  return types.SimpleNamespace(run=run, whole=run('whole'))


def test_a_run_of_calls_is_the_run_of_steps(runs):
  host = runs.run('host', steps_per_call=0)
  for name in ('metrics', 'samples'):
    want, found = (rows(d / f'{name}.jsonl') for d in (host, runs.whole))
    for a, b in zip(found, want, strict=True):
      if 'rewards/exact_match/mean' in b:
        a['rewards/exact_match/mean'] = a.pop('rewards/exact_tokens/mean')
      a.pop('sampler_logp_gap', 0), b.pop('sampler_logp_gap', 0)
      assert a.keys() == b.keys()
      for key, value in b.items():
        numbers = isinstance(value, float) or (
          isinstance(value, list) and isinstance(value[0], float)
        )
        close = pytest.approx(value, rel=1e-4, abs=1e-5) if numbers else value
        assert a[key] == close, key
  want, found = (
    load_file(d / 'export/model.safetensors') for d in (host, runs.whole)
  )
  assert found.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(found[name], want[name], 1e-5, 1e-5)


def test_resumed_between_calls_is_never_stopped(runs):
  runs.run('parts', max_steps=2)
  assert_same_run(runs.run('parts', resume='auto'), runs.whole)


def test_without_device_rewards_it_is_refused(tmp_path, capsys):
  pytest.importorskip('reasoning_gym')
  from experiments import reasoning

  given = '--steps_per_call=5 --num_problems=20 --eval_prompts=5'
  with pytest.raises(SystemExit) as stopped:
    reasoning.main([*given.split(), f'--output_dir={tmp_path / "run"}'])
  assert stopped.value.code == 2
  said = capsys.readouterr().err.strip()
  assert 'no reward that is a JAX function; pass --steps_per_call 0' in said
  assert '\n' not in said
  assert not (tmp_path / 'run').exists()


# --- rewards on the device ---------------------------------------------------

T = 6
TOKENIZER = data.byte_tokenizer()
END_TOKEN, PAD_TOKEN = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
HOST = rewards.exact_match, rewards.digits
DEVICE = device_rewards.exact_tokens, device_rewards.digit_tokens


def as_rollout(texts: list[str], prompts: int) -> Rollout:
  """Completions as a sampler returns them; one of T characters is cut."""
  tokens = np.full((len(texts), T), PAD_TOKEN, np.int32)
  mask = np.zeros((len(texts), T), bool)
  for b, text in enumerate(texts):
    row = [*TOKENIZER(text)['input_ids'], END_TOKEN][:T]
    tokens[b, : len(row)] = row
    mask[b, : len(row)] = True
  C = Prompts(np.ones((prompts, 1), np.int32), np.ones(prompts, np.int32))
  return Rollout(C, tokens, mask, np.zeros(mask.shape, np.float32), None)


def columns_of(answers: list[str]) -> dict:
  """What warm_start.answers makes of them."""
  model = types.SimpleNamespace(
    tokenizer=TOKENIZER, end_tokens=(END_TOKEN,), pad_token=PAD_TOKEN
  )
  sampling = types.SimpleNamespace(max_completion_length=T)
  run = types.SimpleNamespace(flags=types.SimpleNamespace(sampling=sampling))
  context = types.SimpleNamespace(experiment=run, model=model)
  return warm_start.answers(context, [{'answer': a} for a in answers])


def completions(rng, answer: str) -> list[str]:
  """A right one, an empty one, near, short, long and cut ones."""

  def digits(n):
    return ''.join(rng.choice(list('0123456789'), n))

  place = rng.integers(len(answer))
  return [
    answer,
    '',
    answer[:place] + digits(1) + answer[place + 1 :],
    answer[:place],
    digits(rng.integers(1, T)),
    answer + digits(1),
    (answer + digits(T))[:T],
    digits(T),
  ]


def test_rewards_are_those_of_the_host():
  rng = np.random.default_rng(0)
  answers = [str(n) for n in rng.integers(0, 100_000, 40)]
  texts = [text for a in answers for text in completions(rng, a)]
  rollout = as_rollout(texts, len(answers))
  records = [{'prompt': '?', 'answer': a} for a in answers]
  columns = columns_of(answers)
  seen = set()
  for share, (host, device) in enumerate(zip(HOST, DEVICE), 1):
    on_host = rewards.make_scorer(
      [host], lambda ids: data.decode_all(TOKENIZER, ids), [END_TOKEN], [share]
    )
    want = on_host(rollout.tokens, rollout.mask, records)
    assert want.completions == texts
    found, means = device_rewards.make_scorer([device], [share])(
      None, rollout, columns
    )
    np.testing.assert_allclose(found, want.reward, 1e-6)
    (mean,), (wanted,) = means.values(), want.metrics.values()
    assert float(mean) == pytest.approx(wanted)
    seen |= {round(float(x), 2) for x in want.reward.sum(1) / share}
  assert len(seen) > 5, 'want all shares of an answer'


def test_the_host_forgives_a_space():
  rollout = as_rollout(['42', ' 42', '42 '], 1)
  found = device_rewards.exact_tokens(
    rollout, **{k: np.repeat(v, 3, 0) for k, v in columns_of(['42']).items()}
  )
  assert found.tolist() == [1, 0, 0]
  said = rewards.exact_match([''] * 3, ['42', ' 42', '42 '], ['42'] * 3)
  assert said == [1, 1, 1]


def test_a_scorer_sums_what_its_functions_say():
  """Two prompts of two rows each; an outcome, token rewards and a model."""
  mask = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
  C = Prompts(np.ones((2, 1), np.int32), np.ones(2, np.int32))
  rollout = Rollout(C, mask.astype(np.int32), mask, np.zeros((4, 3)), None)

  def outcome(rollout, scale, **columns):
    return scale * jnp.arange(4)

  def each(rollout, scale, **columns):
    return jnp.ones((4, 3))  # also where nothing was chosen

  def model(params, rollout):
    return params * jnp.eye(4, 3)

  score = device_rewards.make_scorer([outcome, each], [1, 0.5], model, 10)
  total, means = score(3.0, rollout, {'scale': np.array([1, 2])})
  np.testing.assert_array_equal(
    total, [[30.5, 0.5, 0.5], [0.5, 31.5, 0], [4.5, 0, 0], [0.5, 0.5, 6.5]]
  )
  assert {k: float(v) for k, v in means.items()} == {
    'rewards/outcome/mean': (0 + 1 + 4 + 6) / 4,
    'rewards/each/mean': (3 + 2 + 1 + 3) / 4,
    'rewards/reward_model/mean': 3.0 * 2 / 4,
  }
  alone, _ = device_rewards.make_scorer([each])(None, rollout, {'scale': mask})
  np.testing.assert_array_equal(alone, mask)
