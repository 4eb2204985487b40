"""The models of a run: what the flags name, read, adapted and exported.

Functions that take a Context (launch.py) need a prepared experiment; the
others are used to prepare one.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxrl_tok.hub import directory as hf
from jaxrl_tok.hub import families, lora
from jaxrl_tok.hub import fetch as hub
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.run import settings as flag_layer
from jaxrl_tok.step import device_rewards


def random_model(size: flag_layer.SizeFlags, tokenizer) -> hf.Model:
  """A decoder of the given size in Qwen2's layout, without weights yet."""
  if size.d_model % size.num_heads:
    raise ValueError(
      f'--d_model {size.d_model} must be divisible by --num_heads '
      f'{size.num_heads}'
    )
  hf_config = {
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
    families.read_config(hf_config),
    hf_config,
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


def make_model(flags, tokenizer: Callable) -> hf.Model:
  """The model that --model names, or a random one of the flags' size."""
  if flags.model.model is None:
    return random_model(flags.size, tokenizer())
  model = hf.open_model(flags.model.model, flags.model.revision)
  if not model.config.lm_head:
    raise ValueError(
      f'--model {model.origin} is a classifier, which writes nothing; pass it '
      'as --reward_model'
    )
  return model


def make_reward_model(flags, policy: hf.Model, P: int) -> hf.Model | None:
  """The classifier that --reward_model names. It reads the policy's tokens."""
  if flags.model.reward_model is None:
    return None
  model = hf.open_model(flags.model.reward_model)
  if model.config.lm_head:
    raise ValueError(
      f'--reward_model {model.origin} is no classifier '
      '(...ForSequenceClassification of one label)'
    )
  if model.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
    raise ValueError(
      f'--reward_model {model.origin} has another tokenizer than the policy, '
      'whose tokens it would read; use one of the same family'
    )
  check_context(model, P, flags.sampling.max_completion_length)
  return model


def check_context(model: hf.Model, P: int, T: int) -> None:
  """Refuses prompts and completions that do not fit the model's context."""
  if model.config.max_length < P + T:
    raise ValueError(
      f'prompts of {P} and completions of {T} tokens are more than the '
      f'context of {model.config.max_length}; pass a smaller '
      '--max_completion_length or shorter prompts'
    )


def forbidden_tokens(model: hf.Model) -> np.ndarray | None:
  """bool [V] of ids that no completion may hold: rows without a token, and
  padding where it ends nothing. None when there are none."""
  V = model.config.vocab_size
  forbidden = np.ones(V, bool)
  ids = np.fromiter(model.tokenizer.get_vocab().values(), int)
  forbidden[ids[ids < V]] = False
  forbidden[list(model.end_tokens)] = False  # with or without a token
  if model.pad_token not in model.end_tokens and model.pad_token < V:
    forbidden[model.pad_token] = True
  return forbidden if forbidden.any() else None


def structs(context) -> tuple:
  """ShapeDtypeStructs of (what is trained, what is frozen)."""
  model, adapter = context.model, context.adapter
  dtype = param_dtype(context.experiment.flags.model)
  base = hf.param_structs(model, dtype)
  if adapter is None:
    return base, None
  return jax.eval_shape(lambda: new_adapters(context)), base


def new_adapters(context) -> dict:
  model, adapter = context.model, context.adapter
  modules = lora.targeted(model.config, model.family, adapter.targets)
  key = jax.random.key(context.experiment.flags.run.seed)
  return lora.init(modules, adapter.rank, key)


def read_base(context):
  """The parameters of --model, placed."""
  dtype = param_dtype(context.experiment.flags.model)
  with context.logger.doing(f'reading {context.model.origin}'):
    return hf.read_params(context.model, context.mesh, dtype)


def first_weights(context) -> tuple:
  """(what is trained, what is frozen) at step 0; None: random weights."""
  model, adapter = context.model, context.adapter
  if model.directory is None:
    warm_start = context.experiment.warm_start
    return (warm_start(context) if warm_start else None), None
  if adapter is None:
    return read_base(context), None
  where = context.experiment.flags.model.lora_adapter
  if where is None:
    return jax.jit(lambda: new_adapters(context))(), read_base(context)
  try:
    adapters = lora.load(where, adapter, model.config, model.family)
  except (ValueError, OSError) as e:
    flag_layer.fail(e)
  return adapters, read_base(context)


def split_rewards(context) -> tuple:
  """((functions, weights) on the host, the same on the device)."""
  functions = context.reward_functions
  weights = context.experiment.reward_weights or [1.0] * len(functions)
  found = ([], []), ([], [])
  for function, weight in zip(functions, weights):
    side = found[device_rewards.is_on_device(function)]
    side[0].append(function)
    side[1].append(weight)
  return found


def device_score(context) -> tuple | None:
  """(function, parameters) of the rewards on the device: functions of JAX,
  and the reward model, read and placed. None without any."""
  _, (functions, weights) = split_rewards(context)
  model, params, scorer = context.reward_model, None, None
  if model is None and not functions:
    return None
  if model is not None:
    with context.logger.doing(f'reading {model.origin}'):
      params = hf.read_params(model, context.mesh)
    kernel = context.experiment.flags.model.attention
    policy = make_policy(model.config, context.policy.dtype, attention=kernel)
    scorer = device_rewards.reward_model(policy)
  share = context.experiment.flags.model.reward_model_weight
  score = device_rewards.make_scorer(functions, weights, scorer, share)
  return score, params


def export(context, run_dir: Path, state, summary) -> Path:
  """Writes export/, and for adapters adapter/; uploads where asked."""
  experiment, model = context.experiment, context.model
  flags, out = experiment.flags, run_dir / 'export'
  card = {
    'title': f'{experiment.name} policy',
    'base_model': None if model.directory is None else model.origin,
    'data': experiment.data,
    'algorithm': flags.algorithm.algorithm,
    'metrics': summary,
  }
  params = state.params
  if context.adapter is not None:
    beside = run_dir / 'adapter'
    lora.save(beside, context.adapter, params, model.family, model.origin)
    hf.write_card(beside, card, library='peft')
    params = jax.jit(context.policy.merge_params)(params, state.frozen)
  if 'value_head' in params and not model.config.value_head:
    model = hf.with_value_head(model)
  hf.save(out, model, params, card, replace=True)  # a resumed run's earlier one
  if flags.run.push_to_hub and jax.process_index() == 0:
    upload(context, out, flags.run.push_to_hub)
  return out


def upload(context, out: Path, repository: str) -> None:
  """Pushes a directory to the hub; what fails there loses nothing here."""
  logger = context.logger
  try:
    with logger.doing(f'uploading to {repository}'):
      logger.say(hub.push(out, repository))
  except ConnectionError as e:
    logger.warn(e)
