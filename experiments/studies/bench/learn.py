"""Benchmarks of learning: step, a GRPO step; logp, chunks of log-probs."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.studies.bench import networks, sizes
from experiments.studies.bench.decode import random_prompts
from experiments.studies.bench.timing import (
  Row,
  Work,
  compiled,
  in_turn,
  once,
  with_peers,
)
from jaxrl_tok import distribution
from jaxrl_tok.credit import algorithms
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.policy import evaluate
from jaxrl_tok.sampler import SamplerConfig
from jaxrl_tok.step import memory
from jaxrl_tok.step.device_rewards import make_device_scorer, on_device
from jaxrl_tok.step.device_steps import Table, make_device_steps
from jaxrl_tok.step.programs import make_sampling
from jaxrl_tok.step.state import init_state, step_key
from jaxrl_tok.step.supervised import answers_as_rollout
from jaxrl_tok.step.update import make_update
from jaxrl_tok.types import Rollout, Scored

EVEN = 'even_share'  # the reward's name
LOGP_ROWS, LOGP_LENGTH = 8, 256
LOGP_VOCABULARIES = 2048, 32_768, 151_936  # of a decoder of one layer


class Step:
  """GRPO step of C x G completions, its reward the share of even tokens."""

  def __init__(self, work: Work, C: int, G: int):
    T = work.completion_length
    policy, params = networks.make_network(
      work.size, work.model, work.dtype, adapters=True
    )
    algorithm, optimizer = algorithms.grpo(), optax.adamw(1e-5)
    sample = make_sampling(policy, SamplerConfig(G, T))
    self.prompts = random_prompts(work.size, C, work.prompt_length)
    self.rule = distribution.make_rule(work.size.vocab_size, [])
    self.state = init_state(
      algorithm, optimizer, params[0], jax.random.key(1), params[1]
    )
    self.parts = {'rollout': [], 'score': [], 'update': []}
    given = self.sampling_arguments()
    self.sample = compiled(jax.jit(sample), *given)
    rollout = jax.eval_shape(sample, *given)
    each = memory.bytes_a_prompt(policy, params, rollout, self.rule)
    parts, *_ = memory.divisions(C, each, memory.budget(jax.devices()[0]))
    update = make_update(policy, algorithm, optimizer, parts)
    reward = jax.ShapeDtypeStruct((C * G, T), jnp.float32)
    given = self.state, as_scored(rollout, reward), self.rule
    self.update = compiled(jax.jit(update, donate_argnums=0), *given)
    score = make_device_scorer({EVEN: even_share})
    steps = make_device_steps(sample, score, update, {EVEN: 1.0})
    self.many = jax.jit(steps, donate_argnums=0)

  def sampling_arguments(self) -> tuple:
    """Arguments of the sampler for the next step."""
    state = self.state
    key = step_key(state)
    return state.policy_params, key, self.prompts, self.rule, state.step

  def host(self) -> float:
    """Seconds of a step with its reward on the host."""
    times = [time.perf_counter()]
    rollout = self.sample(*self.sampling_arguments())
    tokens = jax.device_get(rollout.tokens)
    times.append(time.perf_counter())
    reward = np.zeros(tokens.shape, np.float32)
    reward[:, -1] = [
      np.mean([t % 2 == 0 for t in row]) for row in tokens.tolist()
    ]
    times.append(time.perf_counter())
    scored = as_scored(rollout, reward)
    self.state, metrics, _ = self.update(self.state, scored, self.rule)
    jax.block_until_ready((self.state, metrics))
    times.append(time.perf_counter())
    for kept, seconds in zip(self.parts.values(), np.diff(times)):
      kept.append(seconds)
    return times[-1] - times[0]

  def compile_steps(self, n: int) -> Callable:
    """Returns steps(state) -> (state, metrics), n steps in one program; the
    state is donated."""
    C = len(self.prompts.length)
    table = Table(self.prompts.tokens, self.prompts.length, {})
    index = jnp.tile(jnp.arange(C), (n, 1))
    many = compiled(self.many, self.state, table, index, self.rule)
    return lambda state: many(state, table, index, self.rule)[:2]

  def on_device(self, n: int) -> Callable:
    """A contender of n steps in one program; its seconds are of one step."""
    steps, state = self.compile_steps(n), jax.tree.map(jnp.copy, self.state)

    def run() -> float:
      nonlocal state
      began = time.perf_counter()
      state, metrics = steps(state)
      jax.block_until_ready((state, metrics))
      return (time.perf_counter() - began) / n

    return run


def as_scored(rollout: Rollout, reward) -> Scored:
  """A rollout with one reward of the host [B, T], which applies to all rows."""
  B = len(rollout.mask)
  everywhere, weight = np.ones(B, bool), np.float32(1)
  return Scored(rollout, {EVEN: reward}, {EVEN: everywhere}, {EVEN: weight})


@on_device
def even_share(rollout: Rollout):
  """Share of even tokens [B], the host's reward as a JAX function."""
  return jnp.mean(rollout.tokens % 2 == 0, axis=1)


def step(work: Work) -> list[Row]:
  """Rollout, score and update; groups of 8."""
  G = 8
  C = work.rows // G
  one = Step(work, C, G)
  own, adapters = {'jaxrl_tok': one.host}, None
  if work.model is None:
    own['jaxrl_tok, one program'] = one.on_device(10)
  else:
    lora = networks.LORA
    adapters = {'rank': lora.rank, 'alpha': lora.alpha}
  seconds, versions = with_peers(work, 'step', C, G, own, adapters)
  tokens = work.rows * work.completion_length
  found = []
  for who, times in seconds.items():
    row = Row('step', work.name, who, times, tokens, {})
    if who == 'jaxrl_tok':
      row.notes.update(
        {k: float(np.median(v[1:])) for k, v in one.parts.items()}
      )
    elif who in versions:
      row.notes['versions'] = versions[who]
    found.append(row)
  return found


def logp(work: Work) -> list[Row]:
  """Times log-probs and their gradient, by chunks of tokens or all at once."""
  found = []
  for V in LOGP_VOCABULARIES:
    size = work.size._replace(num_layers=1, vocab_size=V)
    contenders, memory = chunked_and_whole(work._replace(size=size))
    for who, times in in_turn(contenders, work).items():
      notes = {'vocabulary': V, 'temporary_bytes': memory[who]}
      tokens, name = LOGP_ROWS * LOGP_LENGTH, f'{work.name} V={V}'
      found.append(Row('logp', name, who, times, tokens, notes))
  return found


def chunked_and_whole(work: Work):
  """Compiles both ways: ({who: contender}, {who: temporary bytes})."""
  B, T, V = LOGP_ROWS, LOGP_LENGTH, work.size.vocab_size
  policy = make_policy(sizes.make_config(work.size), jnp.dtype(work.dtype))
  params = jax.jit(policy.init)(jax.random.key(0))
  rng = np.random.default_rng(0)
  rollout = answers_as_rollout(
    random_prompts(work.size, B, work.prompt_length),
    jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
    jnp.ones((B, T), bool),
  )
  rule = distribution.make_rule(V, [])
  own, memory = {}, {}
  for who, chunk in (('chunked', None), ('whole', T)):

    def mean_logp(params, rollout, chunk=chunk):
      return evaluate(policy, params, rollout, rule, chunk).logp.mean()

    program = compiled(jax.jit(jax.grad(mean_logp)), params, rollout)
    memory[who] = program.memory_analysis().temp_size_in_bytes
    own[who] = lambda call=program: once(lambda: call(params, rollout))
  return own, memory
