"""Flags turned into values: optimizer, algorithm, model, state.

The tables here are the only places where a user's word names a function.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments import flags as flag_layer
from jaxrl_tok import advantages, algorithms, losses, sharding, update
from jaxrl_tok.models import hf
from jaxrl_tok.models.transformer import TransformerConfig, make_policy
from jaxrl_tok.types import Algorithm, Policy, TrainState

BASELINES = {
  'none': lambda f: advantages.no_baseline(),
  'batch_mean': lambda f: advantages.batch_mean(),
  'group_mean': lambda f: advantages.group_mean(),
  'leave_one_out': lambda f: advantages.leave_one_out(),
  'ema': lambda f: advantages.ema(f.ema_decay),
}
AGGREGATIONS = {
  'token_mean': lambda T: losses.token_mean,
  'seq_mean_token_mean': lambda T: losses.seq_mean_token_mean,
  'seq_mean_token_sum': lambda T: losses.seq_mean_token_sum,
  'seq_mean_token_sum_norm': losses.seq_mean_token_sum_norm,
}
SCHEDULES = {
  'constant': lambda peak, steps: optax.constant_schedule(peak),
  'linear': lambda peak, steps: optax.linear_schedule(peak, peak / 10, steps),
  'cosine': lambda peak, steps: optax.cosine_decay_schedule(peak, steps, 0.1),
}


class Model(NamedTuple):
  """A policy to start from. `params` None: random weights."""

  config: TransformerConfig
  params: Any
  tokenizer: Any
  end_tokens: tuple
  pad_token: int
  origin: str


def decoder_config(
  size: flag_layer.SizeFlags, vocab_size: int
) -> TransformerConfig:
  """A decoder of the given size that the Qwen2 layout can hold."""
  if size.d_model % size.num_heads:
    raise ValueError(
      f'--d_model {size.d_model} must be divisible by --num_heads '
      f'{size.num_heads}'
    )
  return TransformerConfig(
    vocab_size=vocab_size,
    d_model=size.d_model,
    num_layers=size.num_layers,
    num_heads=size.num_heads,
    num_kv_heads=size.num_kv_heads,
    head_dim=size.d_model // size.num_heads,
    d_ff=size.d_ff,
    tie_embeddings=True,
    qkv_bias=True,
  )


def make_model(
  directory: str | None, size: flag_layer.SizeFlags, tokenizer: Callable
) -> Model:
  """The policy saved in a directory, or a random one of the given size."""
  if directory is None:
    made = tokenizer()
    config = decoder_config(size, len(made))
    ends, pad = (made.eos_token_id,), made.pad_token_id
    return Model(config, None, made, ends, pad, 'random weights')

  def shapes(config):
    return jax.eval_shape(make_policy(config).init, jax.random.key(0))

  return Model(*hf.load(directory, shapes), directory)


def make_optimizer(f: flag_layer.AlgorithmFlags, max_steps: int):
  """(optax chain, schedule of the learning rate)."""
  later = SCHEDULES[f.lr_schedule](
    f.learning_rate, max(max_steps - f.lr_warmup_steps, 1)
  )
  schedule = later
  if f.lr_warmup_steps:
    rise = optax.linear_schedule(0.0, f.learning_rate, f.lr_warmup_steps)
    schedule = optax.join_schedules([rise, later], [f.lr_warmup_steps])
  chain = optax.chain(
    optax.clip_by_global_norm(f.max_grad_norm),
    optax.adamw(schedule, b2=f.adam_b2, weight_decay=f.weight_decay),
  )
  return chain, schedule


def make_algorithm(
  f: flag_layer.AlgorithmFlags, sampling: flag_layer.SamplingFlags
) -> Algorithm:
  """The Algorithm that the flags name."""
  word = f.baseline
  if word == 'auto':
    word = 'leave_one_out' if sampling.num_generations > 1 else 'ema'
  return algorithms.reinforce(
    BASELINES[word](f),
    aggregate=AGGREGATIONS[f.aggregation](sampling.max_completion_length),
    gamma=f.gamma,
    kl=f.kl,
    beta=f.beta,
  )


def forbidden_tokens(model: Model) -> np.ndarray | None:
  """bool [V] of ids that no completion may hold: rows without a token, and
  padding where it ends nothing. None when there are none."""
  V = model.config.vocab_size
  forbidden = np.arange(V) >= len(model.tokenizer)
  if model.pad_token not in model.end_tokens and model.pad_token < V:
    forbidden[model.pad_token] = True
  return forbidden if forbidden.any() else None


def make_state(
  policy: Policy,
  algorithm: Algorithm,
  optimizer,
  mesh,
  seed: int,
  params=None,
  keep_reference: bool = False,
) -> TrainState:
  """TrainState around params (None: random ones), born where it will live."""
  rules, key = policy.partition_rules, jax.random.key(seed)

  def make(params, key):
    params = policy.init(key) if params is None else params
    return update.init_state(algorithm, optimizer, params, key, keep_reference)

  if params is not None:
    placed = sharding.tree_shardings(mesh, params, rules)
    params = jax.device_put(params, placed)
  return sharding.born_sharded(make, mesh, rules, params, key)[0]
