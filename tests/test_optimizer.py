"""Optimizer steps: AdamW's numbers, decay by name, one clock, and changes that
arrive however small they are."""

import functools
import re
from typing import get_args, get_type_hints

import flax.traverse_util
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GOLDEN, make_rollout, random_prompts
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_tok import sharding
from jaxrl_tok.credit import algorithms
from jaxrl_tok.hub.directory import open_model
from jaxrl_tok.hub.weights import param_structs
from jaxrl_tok.models import lora
from jaxrl_tok.run import flags
from jaxrl_tok.run.build import Own
from jaxrl_tok.run.optimizer import make_optimizer
from jaxrl_tok.run.settings import OptimizerSettings, Settings, with_values
from jaxrl_tok.step import optimizer as parts
from jaxrl_tok.step.guard import make_optimizer_step
from jaxrl_tok.step.passes import make_passes
from jaxrl_tok.step.state import init_state
from jaxrl_tok.types import Passes, Trajectory

GRPO = algorithms.grpo(max_length=8)
PPO = algorithms.ppo(max_length=8)
FAMILIES = sorted(p.name for p in GOLDEN.iterdir() if '_' not in p.name)
FAMILIES += ['qwen3_moe', 'gpt_neox', 'gemma3_text']


def made(algorithm=GRPO, **values):
  """Optimizer of settings by name."""
  settings = with_values(Settings(), values)
  return make_optimizer(settings, Own(), algorithm)


def policy_only(**leaves):
  """TrainState.trained of these parameters, without a critic."""
  return {k: jnp.asarray(x) for k, x in leaves.items()}, None


@functools.cache
def stepper(optimizer):
  """Jitted (trained, state, gradients) -> (trained, state) of an optimizer."""

  @jax.jit
  def step(trained, state, grads):
    changes, state = optimizer.update(grads, state, trained)
    return optax.apply_updates(trained, changes), state

  return step


def run(optimizer, trained, grads: list):
  """Parameters after each step on these gradients, and the last state."""
  state, found = optimizer.init(trained), []
  for g in grads:
    trained, state = stepper(optimizer)(trained, state, g)
    found.append(trained)
  return found, state


def clocks(opt_state) -> list:
  leaves = jax.tree.leaves(
    opt_state, is_leaf=lambda x: isinstance(x, parts.Clock)
  )
  return [x for x in leaves if isinstance(x, parts.Clock)]


# --- AdamW -------------------------------------------------------------------


def adamw_float64(params, grads, rate, b2, weight_decay, norm, decayed):
  """AdamW as torch writes it, after clip_grad_norm_, in float64 NumPy."""
  params = {k: np.float64(x) for k, x in params.items()}
  m, v = ({k: np.zeros_like(x) for k, x in params.items()} for _ in range(2))
  for t, g in enumerate(grads, 1):
    size = np.sqrt(sum((np.float64(x) ** 2).sum() for x in g.values()))
    factor = min(1.0, norm / size)
    for k in params:
      gk = factor * np.float64(g[k])
      if k in decayed:
        params[k] = params[k] * (1 - rate[t - 1] * weight_decay)
      m[k] = 0.9 * m[k] + 0.1 * gk
      v[k] = b2 * v[k] + (1 - b2) * gk**2
      m_hat, v_hat = m[k] / (1 - 0.9**t), v[k] / (1 - b2**t)
      params[k] = params[k] - rate[t - 1] * m_hat / (np.sqrt(v_hat) + 1e-8)
  return params


@pytest.mark.parametrize('decay_all', [False, True])
def test_twenty_steps_are_those_of_adamw(decay_all):
  rng = np.random.default_rng(0)
  shapes = {
    'layer_0/attention/qkv': (4, 2, 3, 2),
    'layer_0/attention_norm/scale': (4,),
    'layer_0/attention/qkv_bias': (2, 3, 2),
    'embed/embedding': (11, 4),
  }
  params = {k: rng.normal(size=s).astype('f') for k, s in shapes.items()}
  grads = [
    {k: rng.normal(size=s).astype('f') * 0.9**t for k, s in shapes.items()}
    for t in range(20)
  ]
  optimizer = made(
    learning_rate=0.01,
    lr_schedule='linear',
    min_lr_ratio=0.0,
    lr_warmup_steps=4,
    max_steps=20,
    adam_b2=0.99,
    weight_decay=0.3,
    weight_decay_all=decay_all,
    max_grad_norm=4.0,
  )
  got, _ = run(optimizer, policy_only(**params), [(g, None) for g in grads])
  # a rise of four steps, then Hugging Face's linear: (20 - step) / (20 - 4)
  rate = [0.01 * (t + 1) / 4 for t in range(4)]
  rate += [0.01 * (20 - t) / 16 for t in range(4, 20)]
  decayed = {'layer_0/attention/qkv', 'embed/embedding'}
  decayed = shapes.keys() if decay_all else decayed
  want = adamw_float64(params, grads, rate, 0.99, 0.3, 4.0, decayed)
  for k, x in want.items():
    np.testing.assert_allclose(got[-1][0][k], x, rtol=0, atol=1e-6)


def test_no_norm_is_no_clip():
  """max_grad_norm 0: a gradient of 1e4 moves SGD by 1e4."""
  start, g = policy_only(w=np.zeros((2, 2), 'f')), np.full((2, 2), 1e4, 'f')
  for norm, moved in ((0.0, 1e4), (1.0, 0.5)):
    sgd = made(optimizer='sgd', learning_rate=1.0, max_grad_norm=norm)
    got, _ = run(sgd, start, [({'w': g}, None)])
    np.testing.assert_allclose(got[0][0]['w'], -moved, rtol=1e-6)


# --- weight decay by name ----------------------------------------------------


def decays_in_transformers(name: str) -> bool:
  """Hugging Face's rule for a tensor of a file; LayerNorms named ln_* are
  known there by their type."""
  patterns = r'bias', r'layernorm', r'rmsnorm', r'(?:^|\.)norm(?:$|\.)'
  patterns += r'_norm(?:$|\.)', r'(?:^|\.)ln_\w+\.'
  return not any(re.search(p, name.lower()) for p in patterns)


def shapes_of(name: str):
  """Parameters of a fixture as shapes, and its model."""
  model = open_model(GOLDEN / name)
  return param_structs(model, 'float32'), model


def flat(tree) -> dict:
  return flax.traverse_util.flatten_dict(tree, sep='/')


@pytest.mark.parametrize('name', FAMILIES)
def test_decay_is_hugging_faces_for_every_family(name):
  shapes, model = shapes_of(name)
  mask = flat(parts.decay_mask((shapes, None))[0])
  seen = set()
  for mapping in model.param_mappings:
    want = {decays_in_transformers(tensor) for tensor, _ in mapping.tensors}
    assert {mask[mapping.path]} == want, mapping.path
    seen |= want
  assert seen == {True, False}


def test_factors_of_adapters_and_value_heads_decay():
  _, model = shapes_of('qwen2')
  modules = lora.targeted(model.param_mappings, ('all-linear',))
  adapters = lora.init(modules, 2, jax.random.key(0))
  head = {'value_head': {'embedding': jnp.zeros((1, 4))}}
  assert all(jax.tree.leaves(parts.decay_mask((adapters, head))))


WORDS = ['kernel', 'w', 'embedding', 'qkv', 'normal', 'gate', 'recurrent']
NORMS = ['norm', 'input_norm', 'LayerNorm_0', 'RMSNorm_3', 'q_norm', 'a_norm_2']
PLACES = st.lists(st.sampled_from(['layer_0', 'gru', 'mlp', 'critic']))
SHAPES = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)


@hypothesis.settings(max_examples=100)
@hypothesis.given(
  place=PLACES,
  norm=st.sampled_from(NORMS),
  word=st.sampled_from(WORDS),
  shape=SHAPES,
)
def test_names_decide_what_decays(place, norm, word, shape):
  x = np.zeros(shape)
  for path, want in (
    ((word,), len(shape) > 1),
    ((f'{word}_bias',), False),
    (('bias',), False),
    ((norm, 'scale'), False),
  ):
    tree = functools.reduce(lambda t, k: {k: t}, reversed(path), x)
    tree = functools.reduce(lambda t, k: {k: t}, reversed(place), tree)
    assert jax.tree.leaves(parts.decay_mask((tree, None))) == [want]


@pytest.mark.parametrize('name', ['adamw', 'muon', 'adafactor', 'sgd'])
def test_decay_shrinks_by_rate_times_decay_where_it_should(name):
  """A gradient of 0 leaves the decay alone: x (1 - 0.1 * 0.5)."""
  leaves = {
    'kernel': np.ones((3, 4), 'f'),
    'embed': np.ones((3, 4), 'f'),
    'bias': np.ones((3, 4), 'f'),
    'norm': np.ones((4,), 'f'),
  }
  trained = policy_only(**leaves)
  zero = jax.tree.map(jnp.zeros_like, trained)
  for decay_all in (False, True):
    optimizer = made(
      optimizer=name,
      learning_rate=0.1,
      weight_decay=0.5,
      weight_decay_all=decay_all,
    )
    (after,), _ = run(optimizer, trained, [zero])
    for k, x in after[0].items():
      shrinks = decay_all or k in ('kernel', 'embed')
      np.testing.assert_allclose(x, 0.95 if shrinks else 1.0, rtol=1e-6)


# --- one clock ---------------------------------------------------------------


COUNTS = jnp.arange(402, dtype=jnp.int32)


@hypothesis.settings(max_examples=50)
@hypothesis.given(
  name=st.sampled_from(list(parts.SCHEDULES)),
  peak=st.floats(1e-6, 1e-1),
  steps=st.integers(1, 400),
  share=st.floats(0, 1),
  end=st.floats(0, 1),
)
def test_laws_of_the_learning_rate(name, peak, steps, share, end):
  """The first step learns, the peak is reached when the warm-up is over, all
  after it falls, and the last value is the end's share."""
  warmup = round(share * steps)
  rate = parts.make_schedule(name, peak, steps, warmup, end)
  found = np.asarray(rate(COUNTS), np.float64)[: steps + 2]
  first = peak / max(warmup, 1)
  np.testing.assert_allclose(found[0], first, rtol=1e-5)
  rise = peak * (np.arange(warmup) + 1) / max(warmup, 1)
  np.testing.assert_allclose(found[:warmup], rise, rtol=1e-5)
  np.testing.assert_allclose(found[max(warmup - 1, 0)], peak, rtol=1e-5)
  assert (np.diff(found[warmup:]) <= 1e-6 * peak).all()
  if warmup < steps:
    last = peak if name == 'constant' else end * peak
    np.testing.assert_allclose(found[steps:], last, rtol=1e-4, atol=1e-6 * peak)


C, G, T = 4, 2, 3
EPOCHS, STEPS = 2, 6


def toy_passes(passes: Passes, optimizer):
  """Jitted passes of a gradient of ones; a prompt's reward is its update_kl."""

  def gradient(trained, fixed, trajectory, valid):
    grads = jax.tree.map(jnp.ones_like, trained)
    kl = trajectory.reward.max()
    norm = optax.tree.norm(grads)
    return {'update_kl': kl, 'surrogate': kl, 'grad_norm': norm}, grads

  return jax.jit(make_passes(gradient, optimizer, passes))


def toy_batch(kl):
  """Trajectory whose prompts have these update_kl [C]."""
  tokens = np.ones((C * G, T), np.int32)
  rollout = make_rollout(random_prompts(C), tokens, tokens > 0)
  reward = jnp.repeat(jnp.asarray(kl, jnp.float32), G)[:, None] * tokens
  zero = jnp.zeros((C * G, T))
  return Trajectory(rollout, reward, zero, None, None, zero, None)


@functools.cache
def clocked():
  """Passes that stop early, of an optimizer that warms up and decays."""
  passes = Passes(EPOCHS, C, max_update_kl=0.5, old_logp='sampler')
  algorithm = GRPO._replace(passes=passes)
  values = {'learning_rate': 1.0, 'lr_schedule': 'linear', 'optimizer': 'sgd'}
  values |= {'lr_warmup_steps': 1, 'max_steps': STEPS, 'max_grad_norm': 0.0}
  optimizer = made(algorithm, **values)
  return optimizer, algorithm, toy_passes(passes, optimizer)


@hypothesis.settings(max_examples=20)
@hypothesis.given(
  far=st.lists(
    st.lists(st.booleans(), min_size=C, max_size=C), min_size=3, max_size=6
  )
)
def test_the_logged_rate_is_the_one_used(far):
  """Early stops make fewer steps than passes; the clock counts those made, and
  the parameters have moved by the sum of the rates that were logged for it."""
  optimizer, algorithm, passes = clocked()
  trained = policy_only(w=np.zeros((2, 2), 'f'))
  state = init_state(algorithm, optimizer, trained[0], jax.random.key(0))
  # 8 steps of rise; then a line to a tenth, 48 steps in all
  count = np.arange(STEPS * EPOCHS * C)
  rate = np.where(count < 8, (count + 1) / 8, 1 - 0.9 * (count - 8) / 40)
  total = 0
  for step, bits in enumerate(far):
    logged = parts.rate_metrics(state.opt_state)['learning_rate']
    np.testing.assert_allclose(logged, rate[total], rtol=1e-5)
    before = np.asarray(state.params['w'])
    batch, valid = toy_batch(np.array(bits)), np.ones(C * G, bool)
    (new, opt_state), metrics, _ = passes(state, None, batch, valid)
    count = int(metrics['passes'])
    assert count == EPOCHS * C if not any(bits) else count < C
    moved = before - np.asarray(new[0]['w'])
    want = rate[total : total + count].sum()
    np.testing.assert_allclose(moved, want, rtol=1e-4, atol=1e-6)
    total += count
    assert [int(c.count) for c in clocks(opt_state)] == [total]
    state = state.replace(
      step=jnp.int32(step + 1), params=new[0], opt_state=opt_state
    )


def test_the_policys_clock_waits_for_the_critic():
  """While the critic warms up the policy's moments and clock stay at 0, and its
  first step is that of a new AdamW; the critic learns from the first."""
  passes = Passes(2, 1, critic_warmup_steps=3, old_logp='sampler')
  algorithm = PPO._replace(passes=passes)
  values = {'learning_rate': 0.1, 'lr_warmup_steps': 2, 'max_steps': 9}
  optimizer = made(algorithm, **values, lr_schedule='linear', min_lr_ratio=0.0)
  trained = {'w': jnp.ones((2, 3))}, {'w': jnp.ones((2, 3))}
  apply = jax.jit(make_optimizer_step(optimizer, 3))
  state, grads = optimizer.init(trained), jax.tree.map(jnp.ones_like, trained)
  for call in range(6):
    after, state = apply((trained, state), grads, call // 2)
    np.testing.assert_array_equal(after[0]['w'], trained[0]['w'])
    assert (np.asarray(after[1]['w']) < trained[1]['w']).all()
    rate = parts.rate_metrics(state)['learning_rate']
    np.testing.assert_allclose(rate, 0.1 / 4, rtol=1e-6)
    assert parts.rate_metrics(state, learns=False) == {'learning_rate': 0.0}
    trained = after
  counts = sorted(int(c.count) for c in clocks(state))
  assert counts == [0, 6]
  after, state = apply((trained, state), grads, 3)
  np.testing.assert_allclose(after[0]['w'], 1 - 0.1 / 4, rtol=1e-6)
  for call in range(7, 18):
    after, state = apply((after, state), grads, call // 2)
  # six steps of two passes in which the policy learns: the line has ended
  rate = parts.rate_metrics(state)['learning_rate']
  np.testing.assert_allclose(rate, 0.0, atol=1e-7)


def test_an_optimizer_of_ones_own_tells_no_rate():
  state = optax.adamw(1e-3).init(policy_only(w=np.ones(2, 'f')))
  assert parts.rate_metrics(state) == {}


# --- small changes -----------------------------------------------------------

KEY = jax.random.key(1)
WEIGHTS = (0.02 * jax.random.normal(KEY, (256, 256))).astype(jnp.bfloat16)


def test_rounding_is_to_a_neighbour_and_right_in_expectation():
  x = 0.02 * jax.random.normal(KEY, (64,))
  keys = jax.random.bits(jax.random.key(2), (20_000, 2))
  found = jax.jit(jax.vmap(parts.round_stochastically, (None, 0)))(x, keys)
  found = np.asarray(found, np.float64)
  bits = np.asarray(x).view(np.uint32)
  toward_zero = (bits & 0xFFFF0000).view(np.float32)
  away = ((bits & 0xFFFF0000) + 0x10000).view(np.float32)
  assert ((found == toward_zero) | (found == away)).all()
  gap = np.abs(np.float64(away) - toward_zero)
  error = (found.mean(0) - np.asarray(x)) / gap
  assert np.abs(error).max() < 4 * 0.5 / 20_000**0.5


@hypothesis.settings(max_examples=50)
@hypothesis.given(
  st.floats(-1e38, 1e38).filter(lambda x: not 0 < abs(x) < 1e-37),
  st.tuples(*[st.integers(0, 2**32 - 1)] * 2),
)
def test_numbers_of_bfloat16_stay_as_they_are(number, words):
  numbers = np.array([number, np.nan, np.inf, -np.inf], np.float32)
  given = jnp.asarray(numbers).astype('bfloat16')
  given = given.astype(jnp.float32)
  kept = jax.jit(parts.round_stochastically)(given, np.uint32(words))
  np.testing.assert_array_equal(np.asarray(kept, np.float32), given)


def displacement(dtype, steps: int, **values):
  """Displacement of a large array, in float64; its gradients are mostly above
  0."""
  trained = policy_only(w=WEIGHTS.astype(dtype))
  keys = jax.random.split(jax.random.key(5), steps)
  grads = [
    ({'w': (1 + jax.random.normal(k, WEIGHTS.shape)).astype(dtype)}, None)
    for k in keys
  ]
  found, _ = run(made(**values), trained, grads)
  old, new = (np.asarray(x[0]['w'], np.float64) for x in (trained, found[-1]))
  return (old - new).ravel()


@pytest.mark.parametrize(
  ('name', 'rate', 'weight_decay'),
  [('adamw', 1e-6, 0.0), ('sgd', 1e-6, 10.0), ('muon', 5e-6, 10.0)],
)
def test_small_updates_arrive_in_bfloat16(name, rate, weight_decay):
  """Steps of about 1e-6 move bfloat16 weights as far as float32 ones, along
  their way; rounded to the nearest, they would move by a sixtieth."""
  values = {'optimizer': name, 'learning_rate': rate, 'max_grad_norm': 0.0}
  values |= {'weight_decay': weight_decay}
  want = displacement('float32', 20, **values)
  got = displacement('bfloat16', 20, **values)
  assert abs(got @ want / (want @ want) - 1) < 0.03
  if name != 'muon':  # whose displacement is about 0 on average
    assert abs(got.mean() / want.mean() - 1) < 0.02


def test_an_update_is_exactly_the_rounded_number():
  """apply_updates gives numbers that a second, empty update leaves alone, and
  that are neighbours of the float32 sum."""
  optimizer = parts.in_float32(optax.sgd(1e-6), seed=3)
  trained = policy_only(w=WEIGHTS)
  state = optimizer.init(trained)
  grads = {'w': jnp.ones(WEIGHTS.shape, jnp.bfloat16)}, None
  changes, state = jax.jit(optimizer.update)(grads, state, trained)
  assert changes[0]['w'].dtype == jnp.float32
  after = optax.apply_updates(trained, changes)
  assert after[0]['w'].dtype == jnp.bfloat16
  exact = WEIGHTS.astype(jnp.float32) + changes[0]['w']
  np.testing.assert_array_equal(
    np.asarray(exact), np.asarray(after[0]['w'].astype(jnp.float32))
  )
  bits = np.asarray(WEIGHTS.astype(jnp.float32) - 1e-6).view(np.uint32)
  low = (bits & 0xFFFF0000).view(np.float32)
  high = ((bits & 0xFFFF0000) + 0x10000).view(np.float32)
  assert ((exact == low) | (exact == high)).all()
  none = jax.tree.map(jnp.zeros_like, grads)
  changes, _ = jax.jit(optimizer.update)(none, state, after)
  assert not np.asarray(changes[0]['w']).any()


def test_rounding_is_a_function_of_seed_step_and_place():
  """A resumed run and a mesh of four devices have equal bits; another seed and
  another leaf have other ones."""
  values = {'learning_rate': 1e-6, 'moment_dtype': 'bfloat16'}
  leaves = {'a': WEIGHTS, 'b': WEIGHTS}
  trained = policy_only(**leaves)
  grads = jax.tree.map(jnp.ones_like, trained)
  optimizer = made(**values)
  found, state = run(optimizer, trained, [grads] * 3)
  a, b = (np.asarray(found[-1][0][k]) for k in 'ab')
  assert (a != b).any()
  other, _ = run(made(**values, seed=1), trained, [grads] * 3)
  assert (np.asarray(other[-1][0]['a']) != a).any()

  # resumed from host copies after the second step
  halfway, saved = jax.device_get(run(optimizer, trained, [grads] * 2))
  again, resumed = stepper(optimizer)(halfway[-1], saved, grads)
  np.testing.assert_array_equal(np.asarray(again[0]['a']), a)
  jax.tree.map(np.testing.assert_array_equal, *jax.device_get((resumed, state)))

  mesh = sharding.make_mesh('data=1,fsdp=2,tensor=2', jax.devices()[:4])
  where = NamedSharding(mesh, PartitionSpec('tensor', 'fsdp'))
  placed, pulled = jax.device_put((trained, grads), where)
  split, sharded = run(optimizer, placed, [pulled] * 3)
  np.testing.assert_array_equal(np.asarray(split[-1][0]['b']), b)
  jax.tree.map(np.testing.assert_array_equal, *jax.device_get((sharded, state)))


def test_a_critic_in_bfloat16_learns_alike():
  trained = {'w': WEIGHTS}, {'w': WEIGHTS}
  grads = jax.tree.map(jnp.ones_like, trained)
  optimizer = made(PPO, learning_rate=1e-6, critic_learning_rate=3e-6)
  found, _ = run(optimizer, trained, [grads] * 10)
  for new, rate in zip(found[-1], (1e-6, 3e-6)):
    moved = np.asarray(WEIGHTS, np.float64) - np.asarray(new['w'], np.float64)
    assert abs(moved.mean() / (10 * rate) - 1) < 0.02


def test_float16_is_refused_by_name():
  with pytest.raises(ValueError, match='0/w is float16, which holds no grad'):
    made().init(policy_only(w=np.ones((2, 2), np.float16)))


def test_second_moments_in_bfloat16_follow_a_fall():
  """Gradients a tenth as large: with b2 = 0.999 a second moment rounded to the
  nearest would never fall; rounded at random it is float32's, on average."""
  start = policy_only(w=np.zeros((32, 32), 'f'))

  def after(moment_dtype):
    optimizer = made(
      adam_b2=0.999, moment_dtype=moment_dtype, max_grad_norm=0.0
    )

    def body(state, i):
      key = jax.random.fold_in(KEY, i)
      size = jnp.where(i < 200, 1.0, 0.1)
      g = {'w': size * jax.random.normal(key, (32, 32))}, None
      return optimizer.update(g, state, start)[1], None

    scanned = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(2000))[0])
    state = scanned(optimizer.init(start))
    return optax.tree.get(state, 'nu')[0]['w']

  want, got = after('float32'), after('bfloat16')
  assert got.dtype == jnp.bfloat16
  share = np.asarray(got, np.float64) / np.asarray(want)
  assert abs(share.mean() - 1) < 0.02
  assert share.std() < 0.15


# --- muon, adafactor ---------------------------------------------------------


def matrices(path: str, x) -> np.ndarray:
  """A leaf as its hidden matrices [n, in, out], by hand; those of each layer
  of a stack."""
  x = np.asarray(x, np.float64)
  if path.startswith('layers/'):
    alone = path.removeprefix('layers/')
    return np.concatenate([matrices(f'-/{alone}', layer) for layer in x])
  D = x.shape[-1]
  if path.endswith('attention/qkv'):  # [D, K, M + 2, H]: one a head
    return np.moveaxis(x, 0, -2).reshape(-1, x.shape[0], D)
  if path.endswith('attention/out'):
    return x.reshape(1, -1, D)
  if path.endswith('mlp/gate_up'):
    return np.moveaxis(x, 1, 0)
  if path.endswith('experts/gate_up'):
    return np.moveaxis(x, 2, 1).reshape(-1, x.shape[1], D)
  return x.reshape(-1, *x.shape[-2:])


@pytest.mark.parametrize('name', ['qwen2', 'qwen3_moe'])
def test_muon_turns_every_hidden_matrix_into_an_orthogonal_one(name):
  """Singular values of a step are 0.2 sqrt(max(in, out)) times 0.6 to 1.3 (five
  Newton-Schulz iterations); embeddings, norms and biases get Adam's signs."""
  shapes, _ = shapes_of(name)
  keys = iter(jax.random.split(KEY, 500))
  grads = jax.tree.map(lambda s: jax.random.normal(next(keys), s.shape), shapes)
  optimizer = made(optimizer='muon', learning_rate=1.0, max_grad_norm=0.0)
  zero = jax.tree.map(jnp.zeros_like, grads)
  (after,), _ = run(optimizer, (zero, None), [(grads, None)])
  turned = set()
  for path, x in flat(after[0]).items():
    g = flat(grads)[path]
    if re.search(r'(norm/\w+|bias|embedding)$', path):
      np.testing.assert_allclose(x, -np.sign(g), rtol=1e-4)
      continue
    turned.add(path.split('/')[-1])
    for m in matrices(path, x):
      values = np.linalg.svd(m, compute_uv=False) / (0.2 * max(m.shape) ** 0.5)
      assert values.max() < 1.3, path
      assert np.median(values) > 0.6, path
  assert {'qkv', 'out', 'down'} <= turned


def test_muon_turns_factors_of_adapters():
  """Both factors of an adapter are hidden matrices, and other names of a
  user's own follow their axes."""
  keys = jax.random.split(KEY, 5)
  grads = {
    'model.layers.0.q_proj': {
      'a': jax.random.normal(keys[0], (3, 12)),
      'b': jax.random.normal(keys[1], (12, 3)),
    },
    'gru': {'w': jax.random.normal(keys[2], (6, 6))},
    'lm_head': jax.random.normal(keys[3], (6, 6)),
    'three': jax.random.normal(keys[4], (2, 3, 4)),
  }
  zero = jax.tree.map(jnp.zeros_like, grads)
  optimizer = made(optimizer='muon', learning_rate=1.0, max_grad_norm=0.0)
  (after,), _ = run(optimizer, (zero, None), [(grads, None)])
  for path, x in flat(after[0]).items():
    if path in ('lm_head', 'three'):
      np.testing.assert_allclose(x, -np.sign(flat(grads)[path]), rtol=1e-4)
    else:
      values = np.linalg.svd(x, compute_uv=False) / (0.2 * max(x.shape) ** 0.5)
      assert values.max() < 1.3
      assert np.median(values) > 0.6


def test_adafactor_moves_by_the_rate_and_holds_factors_alone():
  """A gradient of one size gives a step of the rate, whatever the parameters'
  size; its state is a row and a column for a matrix."""
  trained = policy_only(w=np.full((256, 128), 5.0, 'f'))
  optimizer = made(optimizer='adafactor', learning_rate=0.01)
  (after,), state = run(optimizer, trained, [({'w': trained[0]['w']}, None)])
  np.testing.assert_allclose(after[0]['w'], 5.0 - 0.01, rtol=1e-5)
  sizes = sorted(x.size for x in jax.tree.leaves(state))
  assert sizes[-2:] == [128, 256]


# --- flags -------------------------------------------------------------------


@pytest.mark.parametrize(
  ('values', 'line'),
  [
    (
      {'lr_warmup_steps': 11, 'max_steps': 10},
      '--lr_warmup_steps 11 is longer than the run of --max_steps 10; pass '
      '--lr_warmup_steps 10',
    ),
    (
      {'optimizer': 'sgd', 'adam_b2': 0.9},
      '--adam_b2 has no effect beside --optimizer sgd; leave it out',
    ),
    (
      {'optimizer': 'adafactor', 'moment_dtype': 'bfloat16'},
      '--moment_dtype has no effect beside --optimizer adafactor; leave it out',
    ),
    (
      {'min_lr_ratio': 0.5},
      '--min_lr_ratio has no effect beside a constant learning rate; leave it '
      'out',
    ),
    (
      {'weight_decay_all': True},
      '--weight_decay_all has no effect beside --weight_decay 0; leave it out',
    ),
    ({'optimizer': 'lion'}, "--optimizer 'lion' must be one of adamw, muon, "),
    ({'min_lr_ratio': 2.0}, '--min_lr_ratio 2.0 must be in [0, 1]'),
    (
      {'model': 'x', 'param_dtype': 'float16'},
      '--param_dtype float16 holds no gradient below 6e-8; pass bfloat16, or '
      'float32 with --dtype bfloat16',
    ),
  ],
)
def test_settings_of_no_use_are_refused(values, line):
  with pytest.raises(ValueError) as e:  # noqa: PT011
    flags.settings_of(values)
  assert str(e.value).startswith(line)
  assert '\n' not in str(e.value)


def test_flags_name_all_directions_and_schedules():
  kinds = get_type_hints(OptimizerSettings)
  assert get_args(kinds['optimizer']) == tuple(parts.DIRECTIONS)
  assert get_args(kinds['lr_schedule']) == tuple(parts.SCHEDULES)


def test_defaults_of_a_system_are_not_refused():
  """--compat's numbers for Adam do not forbid another optimizer."""
  found = flags.settings_of(
    {'compat': 'trl', 'algorithm': 'grpo', 'optimizer': 'sgd'}
  )
  assert found.optimizer.optimizer == 'sgd'


def test_a_warm_up_that_the_critics_leaves_no_room_for_is_refused():
  algorithm = PPO._replace(passes=Passes(critic_warmup_steps=8))
  line = '--lr_warmup_steps 3 after --critic_warmup_steps 8 is longer than'
  with pytest.raises(ValueError, match=line):
    made(algorithm, lr_warmup_steps=3, max_steps=10)
