"""Collectors of a run, as its settings ask for them."""

import functools

from jaxrl_tok.credit.choices import normalizes_each
from jaxrl_tok.run.evaluations import sizes_of
from jaxrl_tok.run.prepare import Setup
from jaxrl_tok.step import off_policy
from jaxrl_tok.step.collectors import (
  Collector,
  dynamic,
  examples_at,
  has_reward_variance,
  single_turn,
)
from jaxrl_tok.step.device_steps import table_rows
from jaxrl_tok.step.programs import Programs
from jaxrl_tok.step.turns import turns


def make_collector(setup: Setup, programs: Programs) -> Collector:
  """Makes the collector that the settings ask for."""
  run, sampling = setup.settings.run, setup.settings.sampling
  if run.steps_per_call:
    _, length, _ = setup.data.table()
    return table_rows(
      setup.data,
      length,
      run.seed,
      sampling.num_prompts,
      run.steps_per_call,
      sampling.num_generations,
      setup.algorithm.greedy,
    )
  scorer = setup.scorer(setup.rewards, programs.device_score, training=True)
  if setup.world is None:
    collector = single_turn(
      programs.sample,
      scorer,
      setup.data,
      run.seed,
      sampling.num_prompts,
      programs.greedy,
    )
  else:
    collector = turns(
      programs.turns(setup.config.sampler),
      setup.world,
      scorer,
      setup.data,
      run.seed,
      sizes_of(setup.config.num_prompts, setup.data, setup.config.sampler),
    )
  records_at = functools.partial(examples_at, setup.data, run.seed)
  rounds = setup.algorithm.dynamic_sampling_rounds
  if rounds > 1:
    choices = setup.algorithm.settings
    varied = functools.partial(
      has_reward_variance,
      by_reward=normalizes_each(choices),
      ended_only=choices.get('mask_truncated_completions', False),
    )
    collector = dynamic(collector, rounds, varied, records_at)
  if sampling.replay_groups:
    collector = off_policy.replayed(
      collector,
      sampling.replay_capacity,
      sampling.replay_groups,
      records_at,
      setup.data.buckets[-1],
      run.seed,
    )
  return off_policy.ahead(collector) if sampling.ahead else collector


def check_cursor(setup: Setup, collector: Collector, cursor, step: int) -> None:
  """Refuses to go on where another collector, or another number of steps in a
  call, stopped."""
  n, sampling = setup.settings.run.steps_per_call, setup.settings.sampling
  if collector.init().keys() - cursor.keys():
    raise ValueError(
      f'checkpoint {step} is of a run with other collectors; resume with the '
      '--ahead and --replay_groups that the run was started with (config.yaml)'
    )
  held = len(cursor.get('positions', range(sampling.replay_capacity)))
  if held != sampling.replay_capacity:
    raise ValueError(
      f'the replay buffer of checkpoint {step} holds {held} groups; pass '
      f'--replay_capacity {held}'
    )
  if n and step % n:
    raise ValueError(
      f'--steps_per_call {n} cannot go on from step {step}, which is no '
      'multiple of it; pass --steps_per_call 0'
    )
