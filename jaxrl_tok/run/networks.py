"""Networks of a run: policy, critic, and those that keep less of a pass."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxrl_tok import sharding
from jaxrl_tok.models import kernels, stack
from jaxrl_tok.models.mask_policy import masked_policy
from jaxrl_tok.run import models
from jaxrl_tok.run.settings import Settings


class MadeNetworks(NamedTuple):
  """Networks of a run."""

  policy: Any
  critic: Any  # Policy of a separate critic, or None
  dtype: str  # compute dtype
  remats: dict  # {remat: (policy, critic)}, see shapes.Networks


def make_networks(
  settings: Settings, model, trainable, algorithm
) -> MadeNetworks:
  """Makes the networks of a run for the mesh of jax.set_mesh, without one for
  this machine."""
  f, learned = settings.model, algorithm.value_loss is not None
  cpu = sharding.platform() == 'cpu' and settings.run.target is None
  dtype = f.dtype
  if dtype == 'auto':
    dtype = 'float32' if cpu else 'bfloat16'

  def with_remat(remat: str) -> tuple:
    if isinstance(model, models.OwnModel):
      policy, critic = model.policy, None
    else:
      scan = {'auto': None, 'true': True, 'false': False}[f.scan_layers]
      how = jnp.dtype(dtype), remat, kernels.choose(f.attention), scan
      with_value = model.with_value_head()
      shared = learned and settings.algorithm.critic == 'shared'
      policy = (with_value if shared else model).make_policy(*how)
      critic = with_value.make_policy(*how) if learned and not shared else None
    policy = policy._replace(merge_params=trainable.merge)
    if 'mask_policy' in algorithm.carries:
      policy = masked_policy(policy)
    return policy, critic

  first = 'none' if f.remat == 'auto' else f.remat
  tried = () if cpu or isinstance(model, models.OwnModel) else stack.REMAT
  remats = {name: with_remat(name) for name in tried if f.remat == 'auto'}
  return MadeNetworks(*with_remat(first), dtype, remats)
