"""Eight fake CPU devices, strict rank promotion, and one tiny policy."""

import atexit
import gc
import importlib.metadata
import os
import shutil
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
os.environ['TRANSFORMERS_NO_ADVISORY_WARNINGS'] = '1'
# tests compile much and compute little: a fraction of the time, and the same
# HLO (jaxlib 0.11 and later has one emitter alone)
FLAGS = ['--xla_backend_optimization_level=0']
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  FLAGS.append('--xla_cpu_use_fusion_emitters=false')
  FLAGS.append('--xla_cpu_parallel_codegen_split_count=1')
os.environ['XLA_FLAGS'] = ' '.join(FLAGS)
# and much of it again: one cache for all of a session's processes, then gone
CACHE = 'JAX_COMPILATION_CACHE_DIR'
if CACHE not in os.environ:
  os.environ[CACHE] = tempfile.mkdtemp(prefix='jaxrl_tok-tests-')
  atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import dataclasses
import json
import types
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from few_programs import FewPrograms

jax.config.update('jax_numpy_rank_promotion', 'raise')
hypothesis.settings.register_profile('same', derandomize=True, deadline=None)
hypothesis.settings.load_profile('same')

from jaxrl_tok import Task, distribution, main
from jaxrl_tok.hub.architecture import TRANSFORMER
from jaxrl_tok.hub.families import FAMILIES
from jaxrl_tok.models.rope import make_rope
from jaxrl_tok.models.transformer import Layer, TransformerConfig, make_policy
from jaxrl_tok.policy import evaluate
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.sharding import is_stacked, path_name
from jaxrl_tok.types import (
  AdvantageInputs,
  Greedy,
  Policy,
  Prefix,
  Prompts,
  Rollout,
  Scored,
)

CONFIG = TransformerConfig(
  vocab_size=11,
  d_model=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  d_ff=20,
  layers=(Layer(make_rope({'rope_theta': 10_000.0}, 6)),) * 2,
  qkv_bias=True,
  qk_norm='head',
)
ONE_LAYER = dataclasses.replace(CONFIG, layers=CONFIG.layers[:1])
PAD, END, OTHER_END = 0, 10, 9
GOLDEN = Path(__file__).parent / 'golden/families'  # directories torch made
DECODER_FAMILIES = [
  name
  for name, family in FAMILIES.items()
  if family.architecture is TRANSFORMER
]
SEQ2SEQ = GOLDEN.with_name('seq2seq')  # and encoder-decoders
ONE, FOUR = 'data=1', 'data=1,fsdp=2,tensor=2'  # meshes for train_fixture
# the collector took a sixth of a trace's time: it read every module again
gc.freeze()
gc.set_threshold(50_000, 20, 10)

LONG = (  # minutes or more; each is one worker's
  *('processes', 'runs', 'seq2seq_train', 'train', 'lora', 'door'),
  *('encoder_decoder', 'golden', 'texts'),
)


def pytest_collection_modifyitems(items):
  """Long files first, so that no worker waits for one at the end."""
  order = {f'test_{name}.py': i for i, name in enumerate(LONG)}
  items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


def random_prompts(C=4, P=6, V=11, seed=0) -> Prompts:
  """Ragged: the first is of length 1, the last is full."""
  rng = np.random.default_rng(seed)
  length = np.linspace(1, P, C).round().astype(np.int32)
  tokens = rng.integers(1, V - 2, (C, P)).astype(np.int32)
  return Prompts(np.where(np.arange(P) < length[:, None], tokens, PAD), length)


def sharpened(params, scale=4.0):
  """Random weights give near-uniform tokens; these have opinions."""

  def one(path, x):
    of_layers = is_stacked(path_name(path))
    return x * scale if x.ndim - of_layers == 2 else x

  return jax.tree_util.tree_map_with_path(one, params)


def recurrent(vocab_size=11, width=8) -> Policy:
  """h' = tanh(h W + embed(token)): its cache is h, whatever T is. It
  compiles in a fraction of a transformer's time."""

  def init(key):
    embed, mix = jax.random.split(key)
    return {
      'embed': jax.random.normal(embed, (vocab_size, width)),
      'mix': jax.random.normal(mix, (width, width)),
      'value': jnp.full(width, 0.2),
    }

  def run(params, hidden, tokens):  # [R, D], [R, t] -> [R, t, D]
    def one(hidden, token):
      hidden = jnp.tanh(hidden @ params['mix'] + params['embed'][token])
      return hidden, hidden

    return jnp.moveaxis(jax.lax.scan(one, hidden, tokens.T)[1], 0, 1)

  def encode(params, prompts):
    start = prompts.inputs.get('start', jnp.zeros((len(prompts.tokens), width)))
    states = run(params, start, prompts.tokens)
    last = (prompts.length - 1)[:, None, None]
    hidden = jnp.take_along_axis(states, last, axis=1)[:, 0]
    return Prefix((), hidden, prompts.length)

  def extend(params, prefix, tokens, cache, at):
    G = len(tokens) // len(prefix.hidden)
    hidden = jnp.repeat(prefix.hidden, G, axis=0)
    if cache is not None:
      hidden = jnp.where(at == 0, hidden, cache)
    states = run(params, hidden, tokens)
    return states, None if cache is None else states[:, -1]

  return Policy(
    init=init,
    encode=encode,
    extend=extend,
    logits=lambda params, hidden: hidden @ params['embed'].T,
    init_cache=lambda rows, length: jnp.zeros((rows, width)),
    vocab_size=vocab_size,
    value=lambda params, hidden: hidden @ params['value'],
  )


def make_tiny(config=CONFIG):
  """policy, params, prompts (C=4, P=6), rule (two ends), G, T, rollout."""
  policy = make_policy(config)
  params = sharpened(jax.jit(policy.init)(jax.random.key(1)))
  prompts = random_prompts()
  rule = distribution.make_rule(11, [END, OTHER_END])
  config = SamplerConfig(3, 9, PAD, chunk=3)
  sample = jax.jit(make_sampler(policy, config))
  rollout = sample(params, jax.random.key(7), prompts, rule)
  lengths = np.asarray(rollout.mask.sum(1))
  assert lengths.min() < lengths.max() == 9, 'want ended and cut rows'
  return types.SimpleNamespace(
    policy=policy,
    params=params,
    prompts=prompts,
    rule=rule,
    config=config,
    sample=sample,
    rollout=rollout,
    G=3,
    T=9,
  )


@pytest.fixture(scope='session')
def tiny():
  """make_tiny of one layer: test_policy and the families have laws of more."""
  return make_tiny(ONE_LAYER)


# jitted: running operation by operation would compile each of them
look = jax.jit(evaluate, static_argnums=0, static_argnames='chunk')


def random_reward(rollout) -> np.ndarray:
  """Random reward for each chosen token."""
  rng = np.random.default_rng(3)
  noise = rng.normal(size=rollout.tokens.shape).astype(np.float32)
  return np.where(np.asarray(rollout.mask), noise, 0)


def make_rollout(prompts, tokens, mask, logp=None, **fields) -> Rollout:
  """A rollout whose rows ended by themselves, sampled by version 0."""
  mask = jnp.asarray(mask, bool)
  defaults = {
    'num_kept': None,
    'ended': jnp.ones(mask.shape[0], bool),
    'version': jnp.zeros(mask.shape[0], jnp.int32),
  }
  tokens = jnp.asarray(tokens, jnp.int32)
  logp = jnp.zeros(mask.shape) if logp is None else jnp.asarray(logp)
  return Rollout(prompts, tokens, mask, logp, **{**defaults, **fields})


def make_scored(
  rollout, reward, greedy=None, applies=None, weight=1.0
) -> Scored:
  """A rollout with one reward [B, T]; applies None: to every row. greedy: the
  greedy completions, or their outcomes [C]."""
  if greedy is not None and not isinstance(greedy, Greedy):
    greedy = greedy_outcomes(greedy, rollout.mask.shape[1])
  if applies is None:
    applies = jnp.ones(rollout.mask.shape[0], bool)
  return Scored(
    rollout,
    {'reward': jnp.asarray(reward, jnp.float32)},
    {'reward': jnp.asarray(applies)},
    {'reward': jnp.float32(weight)},
    greedy,
  )


def greedy_outcomes(reward_C, T: int) -> Greedy:
  """Greedy completions of one token, with their outcomes."""
  reward = jnp.asarray(reward_C, jnp.float32)[:, None]
  first = jnp.broadcast_to(jnp.arange(T) == 0, (reward.shape[0], T))
  return Greedy(jnp.where(first | jnp.isnan(reward), reward, 0.0), first)


def advantage_inputs(
  rollout, reward, value=None, log_change=None, **more
) -> AdvantageInputs:
  """An advantage's inputs, without a KL in the reward. more: of
  make_scored."""
  scored = make_scored(rollout, reward, **more)
  return AdvantageInputs(scored, value, log_change)


def changed(record, **fields):
  """A copy of a dataclass or NamedTuple with other fields."""
  if dataclasses.is_dataclass(record):
    return dataclasses.replace(record, **fields)
  return record._replace(**fields)


def late_letters(completions, completion_ids, **columns) -> list[float]:
  """A reward that random text earns: the mean id of its tokens."""
  return [float(np.mean(ids)) / 256 for ids in completion_ids]


@pytest.fixture(scope='module')
def one_device():
  """Runs of a module take one device, not eight: fewer compile faster."""
  one = jax.local_devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda *args: one)
    yield


@pytest.fixture(scope='module')
def few_programs():
  """Runs of a module that are alike have programs in common."""
  few = FewPrograms()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'jit', few.jit)
    patch.setattr(jax, 'eval_shape', few.eval_shape)
    yield few
  few.clear()
  gc.collect()  # compiled programs lie in cycles, which it seldom sees


@pytest.fixture
def all_devices(monkeypatch, one_device):
  """Undoes one_device for a test."""
  monkeypatch.setattr(jax, 'devices', lambda *args: jax.local_devices())


@pytest.fixture
def train_fixture(tmp_path, monkeypatch):
  """Fixture train(fixture's name, mesh, *flags) -> (run directory, its train
  rows): a small run on made-up records, by late_letters."""
  records = [{'prompt': f'{i} and {i * i}:'} for i in range(20)]
  short = {
    'num_prompts': 8,
    'num_generations': 2,
    'held_out': 4,
    'max_steps': 2,
    'eval_every': 0,
    'report_to': 'none',
    'baseline': 'none',
    'max_completion_length': 3,
    'length_buckets': 1,
    'log_kl': False,
  }

  def train(name, mesh, *flags, out='run'):
    devices = jax.local_devices()[: 1 if mesh == ONE else 4]
    monkeypatch.setattr(jax, 'devices', lambda *args: devices)
    run = tmp_path / out
    given = f'--model={GOLDEN / name} --output_dir={run} --mesh={mesh}'
    task = Task(records, late_letters)
    main(task, [*given.split(), *flags], **short)
    lines = (run / 'metrics.jsonl').read_text().splitlines()
    rows = map(json.loads, lines)
    return run, [row for row in rows if row['phase'] == 'train']

  return train
