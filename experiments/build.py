"""Flags turned into values: optimizer, algorithm, model, state.

The tables here are the only places where a user's word names a function.
"""

import jax
import numpy as np
import optax

from experiments import flags as flag_layer
from jaxrl_tok import advantages, algorithms, losses, sharding, update
from jaxrl_tok.models import families, hf, lora
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


def random_model(size: flag_layer.SizeFlags, tokenizer) -> hf.Model:
  """A decoder of the given size in Qwen2's layout, without weights yet."""
  if size.d_model % size.num_heads:
    raise ValueError(
      f'--d_model {size.d_model} must be divisible by --num_heads '
      f'{size.num_heads}'
    )
  described = {
    'architectures': ['Qwen2ForCausalLM'],
    'model_type': 'qwen2',
    'hidden_act': 'silu',
    'hidden_size': size.d_model,
    'intermediate_size': size.d_ff,
    'max_position_embeddings': 32_768,
    'num_attention_heads': size.num_heads,
    'num_hidden_layers': size.num_layers,
    'num_key_value_heads': size.num_kv_heads,
    'rms_norm_eps': 1e-6,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 10_000.0},
    'rope_theta': 10_000.0,
    'tie_word_embeddings': True,
    'use_sliding_window': False,
    'vocab_size': len(tokenizer),
  }
  return hf.Model(
    families.read_config(described),
    described,
    tokenizer,
    (tokenizer.eos_token_id,),
    tokenizer.pad_token_id,
    'random weights',
  )


def lora_config(f: flag_layer.ModelFlags) -> lora.LoraConfig | None:
  """What the flags, or the adapter that they name, say of adapters."""
  if f.lora_adapter:
    return lora.load_config(f.lora_adapter)
  if f.lora_rank:
    return lora.LoraConfig(f.lora_rank, f.lora_alpha, f.lora_targets)
  return None


def param_dtype(f: flag_layer.ModelFlags) -> str | None:
  """Of the parameters that are read; None: as in the file. What is trained is
  float32 unless asked, what is frozen as it came."""
  if f.param_dtype != 'auto':
    return f.param_dtype
  return None if f.lora_rank or f.lora_adapter else 'float32'


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


def forbidden_tokens(model: hf.Model) -> np.ndarray | None:
  """bool [V] of ids that no completion may hold: rows without a token, and
  padding where it ends nothing. None when there are none."""
  V = model.config.vocab_size
  forbidden = np.ones(V, bool)
  ids = np.fromiter(model.tokenizer.get_vocab().values(), int)
  forbidden[ids[ids < V]] = False
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
  frozen=None,
  keep_reference: bool = False,
) -> TrainState:
  """TrainState around params (None: random ones) and what is frozen, born
  where it will live. Takes over what it is given; of ShapeDtypeStructs it
  makes a state of them."""
  rules, key = policy.partition_rules, jax.random.key(seed)

  def make(params, frozen, key):
    params = policy.init(key) if params is None else params
    return update.init_state(
      algorithm, optimizer, params, key, keep_reference, frozen
    )

  given = params, frozen
  shapes = jax.eval_shape(make, *given, key)
  placed = sharding.tree_shardings(mesh, shapes, rules)
  leaves = jax.tree.leaves(given)
  if leaves and isinstance(leaves[0], jax.ShapeDtypeStruct):
    return jax.tree.map(
      lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p),
      shapes,
      placed,
    )
  if leaves:
    given = jax.device_put(given, (placed.params, placed.frozen))
  make = jax.jit(make, out_shardings=placed, donate_argnums=(0, 1))
  return make(*given, key)
