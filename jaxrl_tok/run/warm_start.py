"""Supervised warm start on (prompt, answer) records, cached on disk.

The loss is the negative log-prob of the answer's tokens, its end token
included, through the same `evaluate` that reinforcement learning uses. The
cache holds saved policies under ~/.cache/jaxrl_tok (or XDG_CACHE_HOME), keyed
by everything that decides the outcome.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrl_tok
from jaxrl_tok import data, sharding
from jaxrl_tok.credit import losses
from jaxrl_tok.evaluation import held_out_reward
from jaxrl_tok.hub import directory as hf
from jaxrl_tok.policy import evaluate
from jaxrl_tok.run.cache import user_cache
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.types import Prompts, Rollout

# for a program that runs once, for milliseconds
QUICKLY = {'xla_backend_optimization_level': 0}


def cache_dir(context, flags) -> Path:
  """Where the warm start of these settings is kept."""
  experiment, rule = context.experiment, jax.device_get(context.rule)
  never = () if rule.forbidden is None else np.flatnonzero(rule.forbidden)
  recipe = {
    'version': jaxrl_tok.__version__,
    'jax': jax.__version__,
    'flags': dataclasses.asdict(flags),
    'seed': experiment.flags.run.seed,
    'length': experiment.flags.sampling.max_completion_length,
    'dtype': str(context.policy.dtype),
    'model': context.model.described,
    # what evaluate and greedy completions read of the rule
    'temperature': rule.temperature.item(),
    'end_tokens': rule.end_tokens.tolist(),
    'forbidden': list(map(int, never)),
    'data': hashlib.sha256(
      json.dumps(
        [experiment.train_records, experiment.held_out_records],
        sort_keys=True,
        default=str,
      ).encode()
    ).hexdigest(),
  }
  text = json.dumps(recipe, sort_keys=True).encode()
  key = hashlib.sha256(text).hexdigest()[:16]
  return user_cache() / f'{experiment.name}-{key}'


def targets(records, context) -> tuple[np.ndarray, np.ndarray]:
  """Answers as (tokens int32 [n, T], mask bool [n, T]), the end included."""
  T = context.experiment.flags.sampling.max_completion_length
  tokenizer, end = context.model.tokenizer, context.model.end_tokens[0]
  tokens = np.full((len(records), T), context.model.pad_token, np.int32)
  mask = np.zeros((len(records), T), bool)
  for i, record in enumerate(records):
    ids = tokenizer(str(record['answer']), add_special_tokens=False)[
      'input_ids'
    ]
    row = [*ids, end]
    tokens[i, : len(row)] = row
    mask[i, : len(row)] = True
  return tokens, mask


def answers(context, records) -> dict:
  """The columns that rewards on the device read."""
  tokens, mask = targets(records, context)
  return {'answer': tokens, 'answer_mask': mask}


def make_step(context, optimizer):
  """step(params, opt_state, Prompts, tokens, mask) -> (..., loss), pure."""

  def step(params, opt_state, prompts, tokens, mask):
    rollout = Rollout(prompts, tokens, mask, jnp.zeros(tokens.shape), None)

    def loss(params):
      stats = evaluate(context.policy, params, rollout, context.rule)
      return -jnp.sum(stats.logp * losses.token_mean(mask))

    value, grads = jax.value_and_grad(loss)(params)
    changes, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, changes), opt_state, value

  return step


def learn(context, flags):
  """Trains from random weights until `stop_at` held-out, or `max_steps`."""
  experiment, policy, logger = (
    context.experiment,
    context.policy,
    context.logger,
  )
  seed = experiment.flags.run.seed
  schedule = optax.warmup_cosine_decay_schedule(
    0.0,
    flags.warm_start_learning_rate,
    min(50, flags.warm_start_max_steps // 4),
    flags.warm_start_max_steps,
    0.1 * flags.warm_start_learning_rate,
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0)
  )
  tokens, mask = targets(context.data.examples, context)

  def init(key):
    params = policy.init(key)
    return params, optimizer.init(params)

  (params, opt_state), _ = sharding.born_sharded(
    init,
    context.mesh,
    policy.partition_rules,
    jax.random.key(seed),
    compiler_options=QUICKLY,
  )
  step = jax.jit(make_step(context, optimizer), donate_argnums=(0, 1))
  greedy = SamplerConfig(
    1, tokens.shape[1], context.model.pad_token, greedy=True
  )
  sample = jax.jit(make_sampler(policy, greedy))
  judge = context.scorer(experiment.judge_functions)

  def batch(number):
    index = data.record_indices(
      len(tokens),
      seed,
      number * flags.warm_start_batch_size,
      flags.warm_start_batch_size,
    )
    prompts = Prompts(context.data.tokens[index], context.data.length[index])
    return sharding.put_rows(
      context.mesh, (prompts, tokens[index], mask[index])
    )

  def accuracy(params):
    found, _ = held_out_reward(
      sample, judge, params, context.held_out, context.rule, context.eval_batch
    )
    return found['eval/reward']

  with logger.doing('compiling the warm start'):
    step = step.lower(params, opt_state, *batch(0)).compile()
    score = accuracy(params)
  with logger.bar('warm start', flags.warm_start_max_steps) as show:
    for number in range(flags.warm_start_max_steps):
      params, opt_state, loss = step(params, opt_state, *batch(number))
      done = number + 1
      if (
        done % flags.warm_start_check_every
        and done < flags.warm_start_max_steps
      ):
        continue
      score = accuracy(params)
      logger.metrics('warm_start', done, {'loss': loss, 'eval/reward': score})
      show(done, f'loss {float(loss):.3f}  held-out {score:.3f}')
      if score >= flags.warm_start_stop_at:
        break
  # a critic begins with the updates
  params = {k: v for k, v in params.items() if k != 'value_head'}
  return params, done, score


def warm_start(context, flags):
  """Parameters that the warm start ends with, from the cache if it has them."""
  where = cache_dir(context, flags)
  if flags.cache and where.is_dir():
    try:
      params = hf.read_params(hf.open_model(where), context.mesh)
      context.logger.say(f'warm start from {where} (--no_cache makes it anew)')
      return params
    except (ValueError, OSError) as e:
      context.logger.warn(f'{e}; the warm start is made anew')
      shutil.rmtree(where, ignore_errors=True)
  params, steps, score = learn(context, flags)
  context.logger.say(f'warm start: {steps} steps, held-out {score:.3f}')
  if flags.cache and jax.process_index() == 0:
    keep(context, params, where)
  return params


def keep(context, params, where: Path) -> None:
  """Saves them; runs side by side may, and what cannot be kept is a warning."""
  own = where.with_name(f'{where.name}.{os.getpid()}')
  card = {'title': 'warm start', 'data': context.experiment.data}
  try:
    hf.save(own, context.model, params, card)
    os.replace(own, where)
  except OSError as e:
    if not where.is_dir():  # else another run was first
      context.logger.warn(f'the warm start cannot be kept: {e}')
  finally:
    shutil.rmtree(own, ignore_errors=True)
