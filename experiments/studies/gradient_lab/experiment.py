"""Experiment of the lab: policies, programs, and the record of the numbers."""

import dataclasses
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.arithmetic import arithmetic
from experiments.studies.gradient_lab import measures, pictures, samples
from experiments.studies.gradient_lab.methods import REWARDS
from jaxrl_tok.report.files import atomic_write
from jaxrl_tok.run import warm_start
from jaxrl_tok.run.api import Caller
from jaxrl_tok.run.build import Own
from jaxrl_tok.run.prepare import Setup, prepare
from jaxrl_tok.run.record import claim_output_dir
from jaxrl_tok.run.settings import flatten, with_values
from jaxrl_tok.step.state import with_value_head


def prepare_lab(parsed, command: str) -> Setup:
  """Prepares arithmetic whose answers are not padded with zeros, so that
  lengths differ. Raises ValueError or OSError."""

  def unpadded(records):
    return [r | {'answer': str(int(r['answer']))} for r in records]

  task = arithmetic(**parsed.own)
  task = dataclasses.replace(
    task,
    train=unpadded(task.train),
    held_out=unpadded(task.held_out),
    description=f'{task.description}, answers not padded',
  )
  caller = Caller('gradient_lab', command)
  return prepare(task, parsed.settings, Own(), caller, parsed.own)


def policy_at(setup: Setup, lab: samples.Lab, level: float) -> dict:
  """Parameters of the warm start that ends at a level, on one device."""
  settings = with_values(setup.settings, {'warm_start_stop_at': level})
  with jax.set_mesh(setup.mesh):
    params = warm_start.warm_start(setup._replace(settings=settings))
  return with_value_head(lab.policy, jax.device_get(params))


class Programs(NamedTuple):
  """Compiled functions of samples.py."""

  draw: Callable
  reference: Callable
  estimates: Callable


def compile_programs(lab: samples.Lab, params, logger) -> Programs:
  """Programs for parameters of these shapes."""
  draw, reference, estimates = (
    jax.jit(make(lab))
    for make in (
      samples.make_draw,
      samples.make_reference,
      samples.make_estimates,
    )
  )
  given = params, *samples.block_at(lab, 0)
  drawn = jax.eval_shape(draw, *given)
  W = sum(x.size for x in jax.tree.leaves(params))
  gradient, reward = (
    jax.ShapeDtypeStruct(shape, jnp.float32)
    for shape in ((len(REWARDS), W), ())
  )
  with logger.doing('compiling the sampler, the reference and the estimates'):
    lowered = (
      draw.lower(*given),
      reference.lower(params, drawn),
      estimates.lower(params, gradient, reward, drawn),
    )
    with ThreadPoolExecutor(2) as both:  # cores: one compiles one at a time
      return Programs(*both.map(lambda one: one.compile(), lowered))


def describe(
  lab: samples.Lab,
  level: float,
  reference: samples.Reference,
  facts: dict,
  found: dict,
) -> dict:
  """Numbers of one policy, for gradient_lab.json and the pictures."""
  right = facts['reward_times_score'] / max(facts['reward'], 1e-9)
  wrong = facts['score'] - facts['reward_times_score']
  names, rows = list(REWARDS), []
  for k, (method, _, of, _) in enumerate(zip(*lab.rows)):
    m = lab.methods[method]
    row = {
      'reward': m.reward,
      'of': names[of],
      'baseline': m.baseline,
      'aggregation': m.aggregation,
    }
    for name, (value, error) in found.items():
      row |= {name: float(value[k]), f'{name}_error': float(error[k])}
    rows.append(row)
  return {
    'level': level,
    **facts,
    'score_right': right,
    'score_wrong': wrong / max(1 - facts['reward'], 1e-9),
    'best_constant': facts['reward_times_score'] / facts['score'],
    'value_explains': reference.explained,
    'reference': {
      name: {'norm': float(square**0.5), 'cosine_with_truth': float(agrees)}
      for name, square, agrees in zip(names, reference.square, reference.agrees)
    },
    'rows': rows,
  }


def in_words(policy: dict) -> str:
  """Facts of a policy's samples."""
  lengths = ', '.join(
    f'{length} ({share:.1%})'
    for length, share in enumerate(policy['lengths'])
    if share >= 5e-4
  )
  return (
    f'{policy["reward"]:.1%} of samples right, '
    f'{policy["groups_without_variance"]:.0%} of groups without variance; '
    f'tokens {lengths}, {policy["cut"]:.1%} cut; squared score of right ones '
    f'{policy["score_right"]:.0f}, of wrong ones {policy["score_wrong"]:.0f}: '
    f'the best constant baseline is {policy["best_constant"]:.2f}; the '
    f'learned value explains {policy["value_explains"]:.1%} of the returns'
  )


def write(run_dir: Path, result: dict) -> None:
  """Writes gradient_lab.json and gradient_lab.svg."""
  text = json.dumps(result, indent=2) + '\n'
  atomic_write(run_dir / 'gradient_lab.json', text)
  picture = pictures.picture(result['policies']) + '\n'
  atomic_write(run_dir / 'gradient_lab.svg', picture)


def run(setup: Setup) -> dict:
  """Numbers of every policy, shown and written. Raises ValueError."""
  f, logger = setup.settings.lab, setup.logger
  run_dir = claim_output_dir(
    setup.settings.run, 'gradient_lab', resumable=False
  )
  lab, policies, programs = samples.make_lab(setup), [], None
  for level in f.levels:
    params = policy_at(setup, lab, level)
    programs = programs or compile_programs(lab, params, logger)
    reference = samples.find_reference(
      lab, programs, params, f.reference_blocks, logger
    )
    params = samples.with_value(params, reference.head)
    numbers = range(f.reference_blocks, f.reference_blocks + f.blocks)
    sums, facts = samples.find_estimates(
      lab, programs, params, reference, numbers, logger
    )
    found = measures.with_errors(sums, lab.rows, reference.square)
    policies.append(describe(lab, level, reference, facts, found))
    logger.console.print(pictures.table(policies[-1]))
    logger.message(in_words(policies[-1]))
  logger.message(pictures.LEGEND)
  flags = setup.task_flags | flatten(setup.settings)
  result = {'flags': flags, 'policies': policies}
  write(run_dir, result)
  logger.message(f'results: {run_dir}{os.sep}')
  return result
