"""Weak scaling on paper: a GRPO step of Qwen3 from 1 to 256 chips.

  python -m experiments.studies.scaling
  python -m experiments.studies.scaling --prompts_a_chip 8 --output_dir scaling

1. `work_of` traces a rollout and a gradient of one prompt: FLOPs of all their
   products, and bytes of weights, state and cache, exactly as the programs have
   them. No array is made.
2. `step_on` takes the mesh that --mesh auto chooses for so many chips, and
   divides by the chips' rates (jaxrl_tok/targets.py): seconds that no program
   can beat. Communication is that of the programs by formula: parameters
   gathered once forward and once backward, gradients summed once, activations
   summed over tensor.
3. A table, scaling.json and scaling.svg.

Everything here is computed; nothing is measured on an accelerator. The formula
of communication is held against compiled programs by tests/test_tpu_aot.py, and
`--dry_run --target v5e:4x4` compiles one step of any run. A real step reaches a
third to a half of these rates.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import rich.console
import rich.table

from jaxrl_tok import distribution, mesh_spec, targets
from jaxrl_tok.hub import families
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.policy import evaluate
from jaxrl_tok.report.charts import COLOURS, Curve, chart
from jaxrl_tok.report.files import atomic_write
from jaxrl_tok.run import flags as flag_layer
from jaxrl_tok.run.record import claim_output_dir
from jaxrl_tok.run.settings import RunSettings
from jaxrl_tok.step import memory, work
from jaxrl_tok.types import Prompts, Rollout

PROG = 'python -m experiments.studies.scaling'
COMMON = {
  'architectures': ['Qwen3ForCausalLM'],
  'model_type': 'qwen3',
  'hidden_act': 'silu',
  'head_dim': 128,
  'vocab_size': 151_936,
  'max_position_embeddings': 40_960,
  'rms_norm_eps': 1e-6,
  'rope_theta': 1e6,
  'use_sliding_window': False,
  'attention_bias': False,
}


def config_of(D: int, F: int, L: int, N: int, K: int, **more) -> dict:
  """config.json of a Qwen3."""
  sizes = {
    'hidden_size': D,
    'intermediate_size': F,
    'num_hidden_layers': L,
    'num_attention_heads': N,
    'num_key_value_heads': K,
    'tie_word_embeddings': False,
  }
  return COMMON | sizes | more


ROUTED = {
  'architectures': ['Qwen3MoeForCausalLM'],
  'model_type': 'qwen3_moe',
  'num_experts': 128,
  'num_experts_per_tok': 8,
  'moe_intermediate_size': 768,
  'norm_topk_prob': True,
  'decoder_sparse_step': 1,
  'mlp_only_layers': [],
}
MODELS = {  # name: (config.json, chips)
  '0.6B': (
    config_of(1024, 3072, 28, 16, 8, tie_word_embeddings=True),
    'v5e',
  ),
  '8B': (config_of(4096, 12288, 36, 32, 8), 'v5p'),
  '30B-A3B': (config_of(2048, 6144, 48, 32, 4, **ROUTED), 'v5p'),
}


@dataclasses.dataclass(frozen=True)
class Flags:
  """Step whose scaling is computed."""

  prompts_a_chip: int = 4
  """Prompts for each chip."""
  num_generations: int = 8
  """Completions of each prompt."""
  prompt_length: int = 512
  """Tokens of a prompt."""
  completion_length: int = 512
  """Tokens of a completion."""
  output_dir: str | None = None
  """Directory of scaling.json, scaling.md and scaling.svg; default:
  runs/scaling-TIME."""


class Work(NamedTuple):
  """Work of a step for one prompt, and bytes that do not depend on it."""

  parameters: int
  state: int  # bytes of parameters and optimizer in float32
  weights: int  # bytes in bfloat16
  cache: int  # bytes for one prompt's completions, at their longest
  rollout: float  # FLOPs of a prompt
  update: float
  activations: int  # bytes that a pass sums over tensor, for one prompt
  split: tuple  # see mesh_spec.Need


class Step(NamedTuple):
  """Step on so many chips; seconds at least."""

  chips: int
  mesh: str
  state: float  # bytes on a chip
  rollout: float  # products or memory, the longer
  update: float  # products
  network: float  # all communication
  tokens: float  # new tokens a second and chip, communication hidden
  exposed: float  # alike, none of it hidden


def work_of(hf_config: dict, flags: Flags) -> Work:
  """Traces one prompt's rollout and gradient."""
  config = families.read_config(hf_config)
  G, P, T = flags.num_generations, flags.prompt_length, flags.completion_length
  policy = make_policy(config, jnp.bfloat16, 'full', 'xla', True)
  params = jax.eval_shape(policy.init, jax.random.key(0))
  rule = distribution.make_rule(config.vocab_size, [])
  shape = jax.ShapeDtypeStruct
  prompts = Prompts(shape((1, P), jnp.int32), shape((1,), jnp.int32))
  rollout = Rollout(
    prompts,
    shape((G, T), jnp.int32),
    shape((G, T), bool),
    shape((G, T), jnp.float32),
    None,
    shape((G,), bool),
    shape((G,), jnp.int32),
  )

  def loss(params, rollout):
    return evaluate(policy, params, rollout, rule).logp.sum()

  def decode(params, prompts, tokens, cache):
    cast, prefix = policy.cast_params(params), policy.encode(params, prompts)
    prefix = policy.split_prefix(prefix)
    hidden, _ = policy.extend(cast, prefix, tokens, cache, T // 2)
    return policy.logits(cast, hidden)

  def flops(f, *args):
    return work.flops(jax.jit(f).trace(*args).jaxpr)

  cache = jax.eval_shape(lambda: policy.init_cache(G, T))
  encode = flops(policy.encode, params, prompts)
  one = shape((G, 1), jnp.int32)
  token = flops(decode, params, prompts, one, cache) - encode
  cast = jax.eval_shape(policy.cast_params, params)
  count = sum(x.size for x in jax.tree.leaves(params))
  tokens, width = P + G * T, 2
  return Work(
    count,
    3 * 4 * count,
    memory.num_bytes(cast),
    memory.num_bytes(cache),
    encode + T * token,
    flops(jax.grad(loss), params, rollout),
    2 * config.num_layers * tokens * config.d_model * width,
    (config.num_kv_heads, config.num_experts or config.d_ff),
  )


def step_on(chips: int, w: Work, chip: targets.Chip, flags: Flags) -> Step:
  """Least seconds of a step on so many chips, on the mesh of --mesh auto."""
  C, T = flags.prompts_a_chip * chips, flags.completion_length
  sizes, _ = mesh_spec.choose_mesh(
    mesh_spec.Need(
      chips, chip.memory, w.state, w.weights, w.cache * C, (C,), w.split
    )
  )
  d, f, t = sizes.values()
  each = flags.prompts_a_chip * t  # prompts of a tensor group
  split, rest = (f - 1) / f, (d - 1) / d
  gathers = (3 + 2) * w.weights / t * split  # an update's; a rollout's two
  sums = 2 * w.weights / (f * t) * rest
  # forward, again, and backward; and token by token
  over_tensor = (3 + 1) * w.activations * each * 2 * (t - 1) / t
  moved = gathers + sums + over_tensor
  read = w.weights / t + w.cache * flags.prompts_a_chip / 2
  rollout = max(
    w.rollout * flags.prompts_a_chip / chip.peak, T * read / chip.bandwidth
  )
  update = w.update * flags.prompts_a_chip / chip.peak
  network = moved / chip.link
  new = flags.prompts_a_chip * flags.num_generations * T
  return Step(
    chips,
    mesh_spec.format_mesh(sizes),
    w.state / (f * t),
    rollout,
    update,
    network,
    new / max(rollout + update, network),
    new / (rollout + update + network),
  )


def fits(step: Step, chip: targets.Chip) -> bool:
  """Tells whether the state leaves room for work."""
  return step.state <= mesh_spec.STATE_SHARE * chip.memory


def table(found: dict) -> str:
  """Markdown of all steps that fit."""
  rows = [
    '| model | chips | data, fsdp, tensor | state, GiB a chip | rollout, s | '
    'update, s | network, s | new tokens/s and chip |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for name, (kind, steps) in found.items():
    for s in steps:
      mesh = ', '.join(part.partition('=')[2] for part in s.mesh.split(','))
      rows.append(
        f'| {name} | {s.chips} {kind} | {mesh} | {s.state / targets.GIB:.1f} | '
        f'{s.rollout:.2f} | {s.update:.2f} | {s.network:.3f} | '
        f'{s.exposed:,.0f} to {s.tokens:,.0f} |'
      )
  return '\n'.join(rows) + '\n'


def picture(found: dict) -> str:
  """Curves of tokens a second and chip over the number of chips."""
  curves = []
  for colour, (name, (kind, steps)) in zip(COLOURS, found.items()):
    x = [math.log2(s.chips) for s in steps]
    best = list(zip(x, [s.tokens for s in steps]))
    worst = list(zip(x, [s.exposed for s in steps]))
    band = worst, best
    curves.append(
      Curve(f'{name}, {kind}', worst, colour, dots=True, end=name, band=band)
    )
  return chart(
    curves,
    'New tokens a second and chip, computed',
    (760, 360),
    large=True,
    caption='log2 of the chips; band: communication hidden behind work or not',
    x_name='log2 chips',
  )


def run(flags: Flags) -> dict:
  """Computes, prints and writes everything."""
  found = {}
  for name, (hf_config, kind) in MODELS.items():
    w, chip = work_of(hf_config, flags), targets.CHIPS[kind]
    steps = [step_on(2**i, w, chip, flags) for i in range(9)]
    found[name] = kind, [s for s in steps if fits(s, chip)]
  place = RunSettings(output_dir=flags.output_dir)
  out: Path = claim_output_dir(place, 'scaling', resumable=False)
  listed = {
    name: [s._asdict() | {'kind': kind} for s in steps]
    for name, (kind, steps) in found.items()
  }
  atomic_write(out / 'scaling.json', json.dumps(listed, indent=2) + '\n')
  atomic_write(out / 'scaling.md', table(found))
  atomic_write(out / 'scaling.svg', picture(found) + '\n')
  console = rich.console.Console()
  console.print(table(found), highlight=False)
  console.print(f'results: {out}', highlight=False)
  return found


def main(argv=None) -> dict:
  """Computes the table; a fault is one line and exit status 2."""
  argv = sys.argv[1:] if argv is None else argv
  flags = flag_layer.cli(Flags, Flags(), PROG, argv, __doc__)
  try:
    for name in ('prompts_a_chip', 'num_generations', 'completion_length'):
      if getattr(flags, name) < 1:
        raise ValueError(f'--{name} {getattr(flags, name)} must be at least 1')
    return run(flags)
  except (ValueError, OSError) as e:
    flag_layer.fail(e)


if __name__ == '__main__':
  main()
