"""The experiment: policies, programs, and what is told of them."""

import dataclasses
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments import arithmetic
from experiments.studies.gradient_lab import measures, pictures, samples
from experiments.studies.gradient_lab.methods import REWARDS
from jaxrl_tok import data
from jaxrl_tok import rewards as host_rewards
from jaxrl_tok.credit import algorithms
from jaxrl_tok.run import build, launch, warm_start
from jaxrl_tok.run import settings as flag_layer


def prepare(flags):
  """The arithmetic experiment's Context, with answers that are not padded
  with zeros, so that lengths differ."""
  f = flags.lab

  def records(found):
    return [r | {'answer': str(int(r['answer']))} for r in found]

  train, held_out = arithmetic.problems(
    f.digits, f.num_problems, flags.run.eval_prompts
  )
  train, held_out = records(train), records(held_out)
  answers = [record['answer'] for record in train + held_out]
  try:
    flags = flag_layer.fit_completion_length(flags, answers)
  except ValueError as e:
    flag_layer.fail(e)
  experiment = launch.Experiment(
    name='gradient_lab',
    flags=flags,
    tokenizer=data.byte_tokenizer,
    train_records=train,
    held_out_records=held_out,
    reward_functions=[host_rewards.exact_match],
    judge_functions=[host_rewards.exact_match],
    data=f'{len(train):,} additions and subtractions, answers not padded',
  )
  return launch.prepare(experiment, algorithms.reinforce())


def policy_at(context, lab: samples.Lab, level: float) -> dict:
  """Parameters of the warm start that ends at a level, on one device."""
  flags = dataclasses.replace(
    context.experiment.flags.warm_start, warm_start_stop_at=level
  )
  with jax.set_mesh(context.mesh):
    params = warm_start.warm_start(context, flags)
  return build.with_value_head(lab.policy, jax.device_get(params))


class Programs(NamedTuple):
  """make_draw, make_far and make_near, compiled."""

  draw: Callable
  far: Callable
  near: Callable


def compiled(lab: samples.Lab, params, logger) -> Programs:
  draw, far, near = (
    jax.jit(make(lab))
    for make in (samples.make_draw, samples.make_far, samples.make_near)
  )
  given = params, *samples.block_at(lab, 0)
  scored = jax.eval_shape(draw, *given)
  W = sum(x.size for x in jax.tree.leaves(params))
  reference, reward = (
    jax.ShapeDtypeStruct(shape, jnp.float32)
    for shape in ((len(REWARDS), W), ())
  )
  with logger.doing('compiling the sampler, the reference and the estimates'):
    lowered = (
      draw.lower(*given),
      far.lower(params, scored),
      near.lower(params, reference, reward, scored),
    )
    with ThreadPoolExecutor(2) as both:  # cores: one compiles one at a time
      return Programs(*both.map(lambda one: one.compile(), lowered))


def described(
  lab: samples.Lab, level: float, far: samples.Far, facts: dict, found: dict
):
  """All of one policy, for gradient_lab.json and the pictures of it."""
  right = facts['reward_times_score'] / max(facts['reward'], 1e-9)
  wrong = facts['score'] - facts['reward_times_score']
  names, rows = list(REWARDS), []
  for k, (method, _, reference, _) in enumerate(zip(*lab.rows)):
    m = lab.methods[method]
    row = {
      'reward': m.reward,
      'of': names[reference],
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
    'value_explains': far.explained,
    'reference': {
      name: {'norm': float(square**0.5), 'cosine_with_truth': float(agrees)}
      for name, square, agrees in zip(names, far.square, far.agrees)
    },
    'rows': rows,
  }


def in_words(policy: dict) -> str:
  """What a policy's samples are like."""
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


def run(flags) -> dict:
  """Every policy's numbers, shown and written."""
  context = prepare(flags)
  run_dir = flag_layer.claim_output_dir(flags.run, 'gradient_lab')
  lab, logger, f = samples.make_lab(context), context.logger, flags.lab
  policies, programs = [], None
  for level in f.levels:
    params = policy_at(context, lab, level)
    programs = programs or compiled(lab, params, logger)
    far = samples.look_far(lab, programs, params, f.reference_blocks, logger)
    params = samples.with_value(params, far.head)
    numbers = range(f.reference_blocks, f.reference_blocks + f.blocks)
    sums, facts = samples.look_near(lab, programs, params, far, numbers, logger)
    found = measures.with_errors(sums, lab.rows, far.square)
    policies.append(described(lab, level, far, facts, found))
    logger.console.print(pictures.table(policies[-1]))
    logger.say(in_words(policies[-1]))
  logger.say(pictures.LEGEND)
  result = {'flags': flag_layer.flat(flags), 'policies': policies}
  (run_dir / 'gradient_lab.json').write_text(json.dumps(result, indent=2))
  (run_dir / 'gradient_lab.svg').write_text(pictures.picture(policies))
  logger.say(f'results: {run_dir}{os.sep}')
  return result
