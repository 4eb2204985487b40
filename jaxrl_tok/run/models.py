"""Models of a run: read from a directory, random, or a user's own policy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_tok import processes, sharding
from jaxrl_tok.data.tokenizers import stop_ids
from jaxrl_tok.hub import adapters, families
from jaxrl_tok.hub.directory import atomic_directory, open_model
from jaxrl_tok.hub.fetch import is_hub_id
from jaxrl_tok.hub.model import Model
from jaxrl_tok.hub.trainable import Trainable, adapted, full, random_params
from jaxrl_tok.models.lora import LoraConfig
from jaxrl_tok.run.settings import Settings, SizeSettings
from jaxrl_tok.types import Policy, first_argument


class OwnModel(NamedTuple):
  """Policy of the user's own, with the fields of a Model."""

  policy: Policy
  tokenizer: Any
  end_tokens: tuple
  pad_token: int
  origin: str = 'a policy of your own'
  directory: None = None
  tensors: dict = {}  # noqa: RUF012
  hf_config: None = None
  notes: tuple = ()

  @property
  def vocab_size(self) -> int:
    return self.policy.vocab_size

  @property
  def max_length(self) -> int | None:
    return self.policy.max_length

  @property
  def is_classifier(self) -> bool:
    return False

  @property
  def is_encoder_decoder(self) -> bool:
    return False


def own_model(policy: Policy, tokenizer) -> OwnModel:
  """Makes an OwnModel. Raises ValueError for a tokenizer with more ids than the
  policy's vocab_size, or without an end token."""
  if len(tokenizer) > policy.vocab_size:
    raise ValueError(
      f'the tokenizer has {len(tokenizer)} ids and the policy a vocab_size of '
      f'{policy.vocab_size}; give it one row for each id'
    )
  end = tokenizer.eos_token_id
  if end is None:
    raise ValueError('the tokenizer has no end token; set its eos_token')
  pad = tokenizer.pad_token_id
  return OwnModel(policy, tokenizer, (end,), end if pad is None else pad)


def own_trainable(model: OwnModel, seed: int) -> Trainable:
  """Trainable of a user's own policy: all parameters, random at first. `save`
  writes them by their paths to params.safetensors, beside the tokenizer."""
  policy = model.policy

  def save(out, trained, frozen, card=None, dtype='float32', replace=False):
    from safetensors.numpy import save_file

    leaves = jax.tree_util.tree_leaves_with_path(processes.whole(trained))
    tensors = {
      sharding.path_name(path): np.ascontiguousarray(x) for path, x in leaves
    }
    if not processes.is_main():
      return Path(out)
    with atomic_directory(out, replace) as part:
      save_file(tensors, part / 'params.safetensors')
      model.tokenizer.save_pretrained(part)
      described = {'card': card, 'vocab_size': policy.vocab_size}
      (part / 'policy.json').write_text(json.dumps(described, indent=2) + '\n')
    return Path(out)

  def export(run_dir, trained, frozen, card, dtype='float32') -> Path:
    out = Path(run_dir) / 'export'
    return save(out, trained, frozen, card, replace=True)

  return Trainable(
    structs=lambda: (jax.eval_shape(policy.init, jax.random.key(0)), None),
    init=policy.init,
    load=lambda mesh: (random_params(policy, mesh, seed), None),
    load_frozen=lambda mesh: None,
    merge=first_argument,
    save=save,
    export=export,
  )


def random_model(size: SizeSettings, tokenizer) -> Model:
  """Makes a decoder of the given size in Qwen2's layout, without weights."""
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
  return Model(
    families.read_config(hf_config),
    hf_config,
    tokenizer,
    (tokenizer.eos_token_id,),
    tokenizer.pad_token_id,
    'random weights',
  )


def open_shapes(
  model: str, revision: str | None, tokenizer: Callable | None
) -> Model:
  """Opens a model for its shapes: weights need not be there, nor a tokenizer,
  if there is a tokenizer() to take its place."""
  path = Path(model).expanduser()
  absent = path.is_dir() and not any(path.glob('*.safetensors'))
  weights = not absent and not is_hub_id(model)
  return open_model(model, revision, weights=weights, tokenizer=tokenizer)


def make_model(settings: Settings, policy: Policy | None, tokenizer: Callable):
  """Makes the model: that of --model, a random one of the settings' size, or
  the user's own policy. tokenizer: () -> tokenizer, where no model has one."""
  model = settings.model
  if policy is not None:
    if model.model is not None:
      raise ValueError('give a policy or a model, not both')
    found = own_model(policy, tokenizer())
  elif model.model is None:
    found = random_model(settings.size, tokenizer())
  elif settings.run.dry_run:
    found = open_shapes(model.model, model.revision, tokenizer)
  else:
    found = open_model(model.model, model.revision)
  if found.is_classifier:
    raise ValueError(
      f'--model {found.origin} is a classifier, which writes nothing; pass it '
      'as --reward_model'
    )
  stops = stop_ids(
    found.tokenizer, settings.sampling.stop_token, found.vocab_size
  )
  ends = dict.fromkeys([*found.end_tokens, *stops])  # each once, in this order
  return found._replace(end_tokens=tuple(ends))


def lora_config(settings: Settings) -> LoraConfig | None:
  """Configuration of the adapters, from the settings or --lora_adapter."""
  f = settings.model
  if f.lora_adapter:
    return adapters.load_config(f.lora_adapter)
  if f.lora_rank:
    return LoraConfig(f.lora_rank, f.lora_alpha, f.lora_targets)
  return None


def make_trainable(settings: Settings, model) -> Trainable:
  """Makes the trainable parameters of the model: all, or adapters."""
  f, seed = settings.model, settings.run.seed
  if isinstance(model, OwnModel):
    return own_trainable(model, seed)
  config = lora_config(settings)
  dtype = None if f.param_dtype == 'auto' else f.param_dtype
  if config is None:
    return full(model, dtype or 'float32', seed)
  quantized = f.quantize == 'int8'
  return adapted(model, config, dtype, seed, f.lora_adapter, quantized)


def make_reward_model(
  settings: Settings, policy: Model, P: int, T: int
) -> Model | None:
  """Opens the classifier of --reward_model, which reads the policy's tokens:
  prompts of P and completions of T."""
  name = settings.model.reward_model
  if name is None:
    return None
  if settings.run.dry_run:
    model = open_shapes(name, None, None)
  else:
    model = open_model(name)
  if not model.is_classifier:
    raise ValueError(
      f'--reward_model {model.origin} is no classifier '
      '(...ForSequenceClassification of one label)'
    )
  if policy.is_encoder_decoder:
    raise ValueError(
      f'--reward_model {model.origin} reads a prompt and its completion as one '
      f'text, which those of {policy.origin}, an encoder-decoder, are not; '
      'give the task a reward function'
    )
  if model.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
    raise ValueError(
      f'--reward_model {model.origin} has another tokenizer than the policy, '
      'whose tokens it would read; use one of the same family'
    )
  check_context(model, P, T)
  return model


def check_context(model, P: int, T: int) -> None:
  """Refuses prompts and completions that do not fit the model's context; each
  side of an encoder-decoder has its own."""
  if model.is_encoder_decoder:
    check_positions(model.config, P, T)
    return
  if model.max_length is not None and model.max_length < P + T:
    raise ValueError(
      f'prompts of {P} and completions of {T} tokens are more than the '
      f'context of {model.max_length}; pass a smaller '
      '--max_completion_length or shorter prompts'
    )


def check_positions(config, P: int, T: int) -> None:
  """Refuses prompts and completions that an encoder-decoder has no positions
  for."""
  positions = config.num_positions
  if positions is None:
    return
  for name, wanted, most, more in (
    ('prompt', P, positions, ' --long_prompts cut_right'),
    ('completion', T, positions - len(config.start_tokens), ''),
  ):
    if wanted > most:
      raise ValueError(
        f'{name}s of {wanted} tokens are more than the {most} that the model '
        f'has positions for; pass --max_{name}_length {most}{more}'
      )


def forbidden_tokens(model) -> np.ndarray | None:
  """Forbidden ids bool [V], never sampled: rows without a token, and padding
  that is no end token. None when there are none."""
  V = model.vocab_size
  forbidden = np.ones(V, bool)
  ids = np.fromiter(model.tokenizer.get_vocab().values(), int)
  forbidden[ids[ids < V]] = False
  forbidden[list(model.end_tokens)] = False  # with or without a token
  if model.pad_token not in model.end_tokens and model.pad_token < V:
    forbidden[model.pad_token] = True
  return forbidden if forbidden.any() else None
