"""Placement of a run: its devices, which a dry run may lack, and the mesh that
--mesh auto chooses for them."""

import contextlib
import os

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_tok import mesh_spec, processes, sharding
from jaxrl_tok.run import build
from jaxrl_tok.run.settings import Settings
from jaxrl_tok.step import memory
from jaxrl_tok.step.state import make_state
from jaxrl_tok.targets import Target, chip_of, parse_target


def target_of(settings: Settings) -> Target | None:
  """Devices of --target; None: those of this machine."""
  name = settings.run.target
  return None if name is None else parse_target(name)


def find_devices(settings: Settings) -> list:
  """Finds the run's devices, once its processes are joined; those of a --target
  can be compiled for, no more.

  Raises ValueError, in one line.
  """
  target = target_of(settings)
  if target is None:
    sharding.split_cpu(settings.model.cpu_devices)
    processes.start(**vars(settings.process))
    return jax.devices()
  return absent_tpus(target) if target.is_tpu else stand_ins(target)


def absent_tpus(target: Target) -> list:
  """TPUs that libtpu compiles for, on any machine."""
  from jax.experimental import topologies

  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # asks no metadata server
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  jax.config.update('jax_platforms', os.environ['JAX_PLATFORMS'])
  # a v4 chip has two cores; jax sees one device in a slice, not two
  options = {'chip_config_name': 'megacore'} if target.name[:2] == 'v4' else {}
  try:
    return topologies.get_topology_desc(
      platform='tpu', topology_name=target.topology, **options
    ).devices
  except Exception as e:  # RuntimeError without libtpu; its own for a shape
    said = ' '.join(str(e).split())[:160]
    raise ValueError(
      f'--target {target.name} cannot be compiled for ({said}); pip install '
      "'jaxrl_tok[tpu]' for libtpu, or pass a shape that is made"
    ) from None


def stand_ins(target: Target) -> list:
  """CPU devices in place of absent GPUs, for which only their own compiler
  compiles."""
  with contextlib.suppress(ValueError):  # jax has counted its devices: enough?
    sharding.split_cpu(target.count)
  devices = jax.devices('cpu')
  if len(devices) < target.count:
    raise ValueError(
      f'--target {target.name} needs {target.count} devices to stand in and '
      f'there are {len(devices)}; start a new process without XLA_FLAGS'
    )
  return devices[: target.count]


def memory_of(settings: Settings, device) -> int | None:
  """Bytes of a device's memory, by the target's table, the device itself, or
  the table for its kind; None: a CPU, or not known."""
  target = target_of(settings)
  if target is not None:
    return target.chip.memory
  if device.platform == 'cpu':
    return None
  stats, chip = device.memory_stats() or {}, chip_of(device.device_kind)
  return stats.get('bytes_limit', chip and chip.memory)


def replicated(settings: Settings, mesh, tree):
  """Copies host values to every device; to absent ones, as structs."""
  if settings.run.target is None:
    return sharding.put_replicated(mesh, tree)
  place = NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
  )


# --- the mesh ----------------------------------------------------------------


def sizes_to_split(model) -> tuple:
  """Sizes that tensor must divide: key/value heads, and experts or F; () of a
  network that is not ours."""
  config = getattr(model, 'config', None)
  stacks = [getattr(config, name, None) for name in ('encoder', 'decoder')]
  found = []
  for c in filter(None, stacks if any(stacks) else [config]):
    heads = getattr(c, 'num_kv_heads', None) or c.num_heads
    found += [heads, getattr(c, 'num_experts', 0) or c.d_ff]
  return tuple(found)


def numbers_of_prompts(settings: Settings, model, task, passes) -> tuple:
  """Numbers of prompts that the devices of data x fsdp have to share."""
  sampling, micro = settings.sampling, settings.model.micro_batch
  G, more = sampling.num_generations, sampling.replay_groups
  found = [(sampling.num_prompts + more) // passes.mini_batches]
  found += [sampling.num_prompts, more] if more else []
  found += [micro // G] if micro not in ('auto', 0) else []
  starts = task.answers and model.directory is None and model.hf_config
  found += [settings.warm_start.warm_start_batch_size] if starts else []
  return tuple(found)


def choose(settings: Settings, task, made: tuple, devices, T: int) -> tuple:
  """Chooses the mesh of --mesh auto: (mesh, why).

  made: (model, networks.MadeNetworks, algorithm, optimizer, trainable).

  Raises ValueError where the devices cannot share the batch.
  """
  model, networks, algorithm, optimizer, trainable = made
  policy, critic = networks.policy, networks.critic
  state = make_state(
    policy,
    build.with_log_kl(settings, algorithm),
    optimizer,
    sharding.make_mesh(mesh_spec.DEFAULT, devices),
    settings.run.seed,
    *trainable.structs(),
    critic,
  )

  def cast(params, fixed):
    return policy.cast_params(policy.merge_params(params, fixed))

  target = target_of(settings)
  C, G = settings.sampling.num_prompts, settings.sampling.num_generations
  weights = jax.eval_shape(cast, *state.policy_params)
  cache = jax.eval_shape(lambda: policy.init_cache(C * G, T))
  sizes, why = mesh_spec.choose_mesh(
    mesh_spec.Need(
      len(devices),
      memory_of(settings, devices[0]),
      memory.num_bytes(state),
      memory.num_bytes(weights),
      memory.num_bytes(cache),
      numbers_of_prompts(settings, model, task, algorithm.passes),
      sizes_to_split(model),
      sharding.num_slices(devices),
      devices[0].device_kind if target is None else target.name,
    )
  )
  return sharding.make_mesh(mesh_spec.format_mesh(sizes), devices), why
