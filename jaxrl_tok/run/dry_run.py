"""Dry run: a step of the run, compiled and accounted for, never run.

1. `measure` compiles the sampler, the update and what else a step has, for the
   devices of the mesh, which may be absent, and reads the programs.
2. `Report` has the numbers; `lines` puts them into words, `verdict` tells
   whether they fit a device and what to change.

Bytes are those of one device, as the compiler has laid them out. Seconds are
bounds: FLOPs, bytes and communication over the rates of targets.py, which no
program reaches.
"""

import dataclasses
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_tok import hlo, sharding
from jaxrl_tok.hub.weights import param_structs
from jaxrl_tok.report.logger import duration
from jaxrl_tok.run import placement
from jaxrl_tok.run.begin import measures_kl, new_state, with_log_kl
from jaxrl_tok.run.prepare import Setup
from jaxrl_tok.sampler import stage_ends
from jaxrl_tok.step import memory, work
from jaxrl_tok.step.compile import Job, usual_options
from jaxrl_tok.step.programs import step_jobs
from jaxrl_tok.step.shapes import Networks
from jaxrl_tok.step.turn_programs import chunk_of
from jaxrl_tok.targets import Chip, chip_of
from jaxrl_tok.types import Prompts

# share of the memory that programs may take: XLA and its runtime want some, too
USABLE = 1 - memory.KEPT_FREE
# part of a step -> its name in the report
NAMES = {
  'sample': 'rollout',
  'greedy': 'greedy rollout',
  'read': 'transcripts, anew',
  'append': 'what is new in them',
  'turn': 'longest turn',
  'reference_kl': 'KL to the reference',
}
TOKEN_LOOPS = 'sample', 'greedy', 'turn'
ROLLOUTS = *TOKEN_LOOPS, 'read', 'append'  # they read the weights alone
FLOPS = 'FLOP kFLOP MFLOP GFLOP TFLOP PFLOP'


class Program(NamedTuple):
  """Program of a step; numbers are of one device and one run of it."""

  name: str
  how: str  # micro-batches and remat of an update
  seconds: float  # to compile
  bytes: int  # that its arrays take at once
  temporary: int  # of them, those in between
  flops: float
  collectives: tuple  # of hlo.Collective
  fault: str = ''  # of the compiler, where it gave up

  @property
  def moved(self) -> dict:
    """Bytes {kind of collective: received by a device}."""
    return hlo.total_by_kind(self.collectives)


class Report(NamedTuple):
  """Numbers of a dry run."""

  devices: str  # '8 x TPU v5 lite'
  count: int
  mesh: dict  # {axis: size}
  batch: dict  # letters: C, G, P, T
  parameters: int
  state: dict  # {part of the state: bytes on a device}
  rollout: dict  # {weights, cache, prompts: bytes on a device}
  other: int  # bytes on a device of a reward model
  programs: tuple  # of Program
  memory: int | None  # bytes of a device
  chip: Chip | None  # its rates; None: not in the table
  stand_in: bool  # compiled for CPU devices in place of absent GPUs
  # (turns of an episode at most, tokens of a turn); None: there are no turns
  turns: tuple[int, int] | None = None

  @property
  def length_flag(self) -> str:
    """Flag of the length that an update is of."""
    return f'--max_{"completion" if self.turns is None else "episode"}_length'


# --- measuring ---------------------------------------------------------------


def while_turns(setup: Setup, parts: int) -> dict:
  """Turns {program: [...]} of the loops that end by data, at their most: a
  rollout's stages, and the micro-batches of an update."""
  config = setup.config.sampler
  chunk = max(1, min(config.chunk, config.max_completion_length - 1))
  cache = jax.eval_shape(lambda: setup.policy.init_cache(1, 0))
  ends = stage_ends(
    dataclasses.replace(config, chunk=chunk), len(jax.tree.leaves(cache))
  )
  stages = [end - begin for begin, end in zip([0, *ends], ends)]
  return dict.fromkeys(TOKEN_LOOPS, stages) | {'update': [parts, 0]}


def compile_way(name: str, how: str, function, job: Job, turns) -> Program:
  """Compiles one function of a job. turns: see work.flops."""
  mesh, began = jax.sharding.get_mesh(), time.monotonic()
  platform = mesh.devices.flat[0].platform
  options = usual_options(platform) if job.options is None else job.options
  traced = function.trace(*job.args)
  flops = work.flops(traced.jaxpr, turns) / mesh.size
  try:
    compiled = traced.lower().compile(options)
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    said, seconds = ' '.join(str(e).split())[:200], time.monotonic() - began
    return Program(name, how, seconds, 0, 0, flops, (), said)
  return Program(
    name,
    how,
    time.monotonic() - began,
    memory.program_bytes(compiled),
    compiled.memory_analysis().temp_size_in_bytes,
    flops,
    tuple(hlo.collectives(compiled.as_text(), turns)),
  )


def compile_job(setup: Setup, name: str, job: Job, most: int | None) -> Program:
  """Compiles the first way that fits, else the last one."""
  ways = job.ways or [('', 1)] * len(job.functions)
  for function, (how, parts) in zip(job.functions, ways):
    turns = while_turns(setup, parts).get(name)
    program = compile_way(name, how, function, job, turns)
    fits = most is None or program.bytes <= most
    if fits and not program.fault:
      return program
  return program


def bytes_of_state(state) -> dict:
  """Bytes {part of the state: on a device}."""
  parts = {
    'parameters': state.params,
    'frozen parameters': state.frozen,
    'critic': state.critic,
    'optimizer': state.opt_state,
    'reference and other copies': state.carries,
  }
  found = {name: memory.bytes_on_a_device(x) for name, x in parts.items()}
  return {name: count for name, count in found.items() if count}


def bytes_of_rollout(setup: Setup, state, P: int) -> dict:
  """Bytes {what: on a device} that a rollout reads at every token: the weights
  in the compute dtype, the cache at its longest, keys and values of prompts; of
  a turn each row's transcript is a prompt."""
  policy, config, mesh = setup.policy, setup.config, setup.mesh
  C, G = config.num_prompts, config.samples_per_prompt
  T, prompts = config.sampler.max_completion_length, C
  if config.turn_length is not None:
    P += config.max_completion_length - 1 + chunk_of(policy, config.sampler)
    prompts = C * G
  rows, heads = sharding.row_shards(mesh), mesh.shape['tensor']

  def begin(policy_params):
    params = policy.merge_params(*policy_params)
    tokens = jnp.zeros((prompts, P), jnp.int32)
    given = Prompts(tokens, jnp.ones(prompts, jnp.int32))
    return policy.cast_params(params), policy.encode(params, given)

  weights, prefix = jax.eval_shape(begin, state.policy_params)
  rules = sharding.rules_of_rollout(policy.partition_rules)
  placed = sharding.sharded_structs(mesh, weights, rules)
  cache = jax.eval_shape(lambda: policy.init_cache(C * G, T))
  split = placement.sizes_to_split(setup.model)[:1]
  heads = heads if split and split[0] % heads == 0 else 1
  return {
    'weights': memory.bytes_on_a_device(placed),
    'cache': memory.num_bytes(cache) // (rows * heads),
    'prompts': memory.num_bytes(prefix.kv) // (rows * heads),
  }


def measure(setup: Setup) -> Report:
  """Compiles and accounts for a step. Must run under jax.set_mesh."""
  mesh, settings = setup.mesh, setup.settings
  P = settings.data.max_prompt_length or setup.data.buckets[-1]
  device = mesh.devices.flat[0]
  most = placement.memory_of(settings, device)
  usable = None if most is None else int(USABLE * most)
  state = new_state(setup, *setup.trainable.structs())
  networks = Networks(
    setup.policy,
    with_log_kl(setup),
    setup.optimizer,
    setup.rule,
    setup.critic,
    weights=setup.rewards.weights,
    remats=setup.remats,
    remat=settings.model.remat.replace('auto', 'none'),
  )
  config = dataclasses.replace(
    setup.config, memory=usable, reference_kl=measures_kl(setup)
  )
  programs = []
  for name, job in step_jobs(networks, config, state, P).items():
    shown = NAMES.get(name, name)
    with setup.logger.doing(f'compiling: {shown}'):
      programs.append(compile_job(setup, name, job, usable))
  target, sampling = placement.target_of(settings), settings.sampling
  batch = {
    'C': sampling.num_prompts,
    'G': sampling.num_generations,
    'P': P,
    'T': config.max_completion_length,
  }
  return Report(
    f'{mesh.size} x {device.device_kind if target is None else target.name}',
    mesh.size,
    dict(mesh.shape),
    batch,
    sum(x.size for x in jax.tree.leaves((state.params, state.frozen))),
    bytes_of_state(state),
    bytes_of_rollout(setup, state, P),
    bytes_of_reward_model(setup),
    tuple(programs),
    most,
    chip_of(device.device_kind) if target is None else target.chip,
    target is not None and not target.is_tpu,
    config.turn_length and (settings.turns.max_turns, config.turn_length),
  )


def bytes_of_reward_model(setup: Setup) -> int:
  """Bytes on a device of the --reward_model's parameters."""
  model = setup.reward_model
  if model is None:
    return 0
  structs = param_structs(
    model, quantized=setup.settings.model.quantize == 'int8'
  )
  rules = model.make_policy(attention='xla').partition_rules
  placed = sharding.sharded_structs(setup.mesh, structs, rules)
  return memory.bytes_on_a_device(placed)


# --- words -------------------------------------------------------------------


def needed(report: Report, program: Program) -> int:
  """Bytes on a device while a program runs: its own, and what of the state it
  does not read."""
  beside = 0
  if program.name in ROLLOUTS:
    read = ('parameters', 'frozen parameters')
    beside = sum(n for k, n in report.state.items() if k not in read)
  return program.bytes + beside + report.other


def least_seconds(report: Report, program: Program) -> dict:
  """Seconds {what bounds them: at least} of a program; {} without rates."""
  chip = report.chip
  if chip is None:
    return {}
  found = {
    'products': program.flops / chip.peak,
    'network': sum(program.moved.values()) / chip.link,
  }
  if program.name in TOKEN_LOOPS:
    T, r = report.batch['T'], report.rollout
    T = T if report.turns is None else report.turns[1]
    read = r['weights'] + r['cache'] / 2 + r['prompts']
    found['memory'] = T * read / chip.bandwidth
  return found


def readable(count: float, units: str = 'B kB MB GB', base: int = 1000) -> str:
  """Number with a unit: 1500 -> '1.5 kB'."""
  names = units.split()
  power = 0
  while count >= base and power < len(names) - 1:
    count, power = count / base, power + 1
  return f'{count:.3g} {names[power]}'


def gib(count: float) -> str:
  return readable(count, 'B KiB MiB GiB', 1024)


def seconds_of(x: float) -> str:
  return f'{x:.3f} s' if x >= 0.001 else f'{1000 * x:.3f} ms'


def verdict(report: Report) -> tuple[bool, str]:
  """(Whether every program fits, the sentence that tells and advises)."""
  failed = [p for p in report.programs if p.fault]
  if failed:
    return False, (
      f'does not fit: {NAMES.get(failed[0].name, failed[0].name)}: '
      f'{failed[0].fault}; {advice(report, failed[0])}'
    )
  worst = max(report.programs, key=lambda p: needed(report, p))
  need, name = needed(report, worst), NAMES.get(worst.name, worst.name)
  if report.memory is None:
    return True, f'needs {gib(need)} a device ({name}); its memory is not known'
  of = (
    f'{gib(need)} of {gib(report.memory)} a device, of which '
    f'{USABLE:.0%} are used ({name})'
  )
  if need <= USABLE * report.memory:
    return True, f'fits: {of}'
  return False, f'does not fit: {of}; {advice(report, worst)}'


def advice(report: Report, program: Program) -> str:
  """Change that saves most of what a program takes."""
  state, rows = sum(report.state.values()), report.batch['C']
  most = report.memory or 0
  spread = report.mesh['fsdp'] * report.mesh['tensor']
  if state > 0.6 * most and spread < report.count:
    return 'pass --mesh auto, or more of fsdp: the state is most of it'
  if state > 0.6 * most:
    return (
      'take more devices, --lora_rank 16, --moment_dtype bfloat16 or '
      '--no_log_kl: the state is most of it'
    )
  if program.name == 'update':
    return (
      'pass --remat full and --micro_batch '
      f'{report.batch["G"]}, or a smaller {report.length_flag}'
    )
  if report.rollout['weights'] > 0.3 * most:
    return "pass --mesh with more of tensor: the rollout's weights are most"
  return (
    f'pass fewer than --num_prompts {rows}, or a smaller '
    f'{report.length_flag}: the cache is most of it'
  )


def lines(report: Report) -> list[str]:
  """Report in words."""
  b, mesh = report.batch, report.mesh
  axes = ', '.join(f'{axis} {size}' for axis, size in mesh.items())
  done = 'completions'
  if report.turns is not None:
    done = 'episodes of {} turns (of {} tokens) at most'.format(*report.turns)
  found = [
    f'dry run on {report.devices}: mesh {axes}',
    f'a step: {b["C"]} prompts x {b["G"]} {done}, {b["P"]} + {b["T"]} tokens',
    f'parameters: {report.parameters:,}',
    f'state: {gib(sum(report.state.values()))} a device ('
    + ', '.join(f'{name} {gib(n)}' for name, n in report.state.items())
    + ')',
    'rollout reads: '
    + ', '.join(f'{name} {gib(n)}' for name, n in report.rollout.items())
    + ' a device',
  ]
  if report.other:
    found.append(f'reward model: {gib(report.other)} a device')
  for p in report.programs:
    name = NAMES.get(p.name, p.name)
    how = f' ({p.how})' if p.how else ''
    found.append(f'{name}{how}: compiled in {duration(p.seconds)}')
    if p.fault:
      continue
    moved = ', '.join(f'{k} {readable(n)}' for k, n in p.moved.items())
    found += [
      f'  memory: {gib(needed(report, p))} a device, {gib(p.temporary)} of it '
      'temporary',
      f'  products: {readable(p.flops, FLOPS)} a device',
      f'  network: {moved or "nothing"} into a device',
    ]
    bounds = least_seconds(report, p)
    if bounds:
      found.append(
        '  at least: '
        + ', '.join(f'{k} {seconds_of(s)}' for k, s in bounds.items())
      )
  if report.chip is not None:
    c = report.chip
    found.append(
      f'rates: {c.peak / 1e12:.0f} TFLOP/s (bfloat16), HBM '
      f'{c.bandwidth / 1e9:.0f} GB/s, links {c.link / 1e9:.0f} GB/s into a '
      f'chip ({c.source})'
    )
  if report.stand_in:
    found.append(
      'GPUs are absent: memory and communication are of the same program '
      'compiled for CPU devices'
    )
  return [*found, verdict(report)[1]]


def run(setup: Setup) -> Report:
  """Measures a step and prints the report. Nothing is written."""
  with jax.set_mesh(setup.mesh):
    report = measure(setup)
  for line in lines(report):
    setup.logger.message(line)
  return report
