"""Laws of whole steps in one program: the same numbers, and no host inside."""

import dataclasses
import functools
import inspect
import re
import types

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
from test_train import flags, rows

from experiments import arithmetic
from jaxrl_tok import checkpoint, data, distribution, rewards, sharding, train
from jaxrl_tok.credit import algorithms
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.report.logger import Logger
from jaxrl_tok.run import build, launch, models, warm_start
from jaxrl_tok.sampler import SamplerConfig
from jaxrl_tok.step import device_rewards
from jaxrl_tok.step import programs as parts
from jaxrl_tok.types import Prompts, Rollout

# --- in one call and one after another ---------------------------------------

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


@device_rewards.on_device
def small(rollout, target, **columns):
  """For every token: 1 where it is below the prompt's target, else 0."""
  return (rollout.tokens < target[:, None]).astype(jnp.float32)


@device_rewards.on_device
def ended(rollout, **columns):
  """An outcome: whether the completion ended by itself."""
  ends = (rollout.tokens == END) | (rollout.tokens == OTHER_END)
  return jnp.any(ends & rollout.mask, axis=1)


def length(prompts, completions, completion_ids, **columns):
  return [float(len(ids)) for ids in completion_ids]


def decode(ids: list[list[int]]) -> list[str]:
  return [' '.join(map(str, row)) for row in ids]


def prompt_set(count: int, seed: int) -> data.PromptSet:
  prompts = random_prompts(C=count, seed=seed)
  targets = np.arange(count, dtype=np.int32) % 9 + 1
  examples = [{'prompt': str(i), 'answer': '-'} for i in range(count)]
  return data.PromptSet(examples, *prompts, {'target': targets})


@pytest.fixture(scope='module')
def loop(tmp_path_factory):
  """loop.run(name, steps a call): six steps on two devices; the run's
  directory and last state. loop.steps is the program of two steps."""
  plain = changed(
    CONFIG, layers=CONFIG.layers[:1], qkv_bias=False, qk_norm=None
  )
  policy = make_policy(plain)
  params = sharpened(jax.jit(policy.init)(jax.random.key(1)), 2.0)
  mesh = sharding.make_mesh('data=2', jax.devices()[:2])
  rule = sharding.put_replicated(
    mesh, distribution.make_rule(11, [END, OTHER_END])
  )
  optimizer, records, held_out = (
    optax.adam(0.005),
    prompt_set(7, 0),
    prompt_set(4, 1),
  )
  score = device_rewards.make_scorer([small, ended], [0.5, 2.0])
  ends = (END, OTHER_END)
  config = parts.LoopConfig(
    num_prompts=4, max_steps=6, eval_every=2, eval_batch=4, save_every=2
  )
  home = tmp_path_factory.mktemp('runs')

  def begin():
    given = jax.tree.map(jnp.array, params)
    return build.make_state(policy, ALGORITHM, optimizer, mesh, 0, given)

  def compiled(n):
    with jax.set_mesh(mesh):
      return parts.compile_parts(
        policy,
        ALGORITHM,
        optimizer,
        SamplerConfig(3, 5, PAD),
        dataclasses.replace(config, steps_per_call=n),
        begin(),
        rule,
        records,
        held_out.tokens.shape[1],
        device_score=(score, None),
      )

  programs = {n: compiled(n) for n in (0, 2)}
  # what is compiled there takes no greedy rollout
  programs[0]['device_score'] = functools.partial(jax.jit(score), None)

  def run(name, n, stop=6, resume=False):
    out, state, progress = home / name, begin(), train.Progress()
    checkpoints = checkpoint.open_checkpoints(out, 3)
    if resume:
      last = checkpoint.choose_step(checkpoints, 'auto')
      state, meta = checkpoint.restore(checkpoints, last, state)
      progress = train.Progress(**meta['progress'])
    logger = Logger(out, resume_step=progress.step if resume else None)

    def save(state, progress):
      checkpoint.save(checkpoints, state, dataclasses.asdict(progress), {})

    with jax.set_mesh(mesh):
      state, *_ = train.train(
        state,
        progress,
        parts.Parts(
          **programs[n],
          score=rewards.make_scorer([], decode, ends),
          judge=rewards.make_scorer([length], decode, ends),
          decode=decode,
        ),
        dataclasses.replace(config, steps_per_call=n, max_steps=stop),
        records,
        held_out,
        rule,
        logger,
        save,
        lambda step: 0.005,
      )
    checkpoints.close()
    logger.close()
    return out, state

  return types.SimpleNamespace(
    run=run,
    whole=run('whole', 2),
    start=begin(),
    steps=inspect.getclosurevars(programs[2]['steps']).nonlocals['many'],
  )


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
  for x, y in zip(leaves(loop.start), leaves(want)):
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
  assert host_parts(loop.steps.as_text()) == set()


def test_the_host_would_be_seen():
  def asks(x):
    jax.debug.callback(lambda x: None, x)
    return jax.pure_callback(np.sin, x, x)

  program = jax.jit(asks).lower(jnp.float32(1)).compile()
  assert host_parts(program.as_text())
  with (  # train.device_steps makes each call under this guard
    pytest.raises(Exception, match='Disallowed host-to-device'),
    jax.transfer_guard('disallow'),
  ):
    jax.jit(jnp.sin)(np.float32(1))


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


@pytest.mark.parametrize('reward', ['exact', 'digits'])
def test_an_experiment_brings_its_columns(tmp_path, monkeypatch, reward):
  """The answers themselves, taken for completions, are all right."""
  seen = []
  monkeypatch.setattr(launch, 'run', seen.append)
  given = {'steps_per_call': 2, 'reward': reward, 'num_problems': 50}
  arithmetic.main(flags(tmp_path / 'run', **given))
  algorithm = build.make_algorithm(seen[0].flags)
  context = launch.prepare(seen[0], algorithm)
  (host, _), (device, _) = models.split_rewards(context)
  assert (len(host), len(device)) == (0, 1)
  score, params = models.device_score(context)
  _, tokens, lengths, columns = context.data
  answer, mask = columns['answer'], columns['answer_mask']
  prompts = Prompts(tokens, lengths)
  rollout = Rollout(prompts, answer, mask, np.zeros(mask.shape), None)
  found, _ = score(params, rollout, columns)
  np.testing.assert_allclose(found.sum(1), np.ones(50), 1e-6)
  assert (np.asarray(found) > 0).sum() == {'exact': 50, 'digits': 150}[reward]


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
