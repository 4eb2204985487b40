"""State of a run at its beginning: resumed, supervised, loaded or random.

`check_shapes` traces a step first, so that a user's own functions are refused
before anything is written.
"""

import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import yaml

from jaxrl_tok import checkpoint, processes
from jaxrl_tok.finite import check_finite
from jaxrl_tok.hub import packages
from jaxrl_tok.hub.weights import fingerprint
from jaxrl_tok.policy import evaluate as evaluate_rollout
from jaxrl_tok.progress import Progress, from_saved
from jaxrl_tok.report import mirror
from jaxrl_tok.report.files import last_step
from jaxrl_tok.report.logger import Logger
from jaxrl_tok.run import build, foundation, record
from jaxrl_tok.run.prepare import Setup
from jaxrl_tok.run.settings import flatten
from jaxrl_tok.run.warm_start import warm_start
from jaxrl_tok.sampler import make_sampler
from jaxrl_tok.step import device_rewards
from jaxrl_tok.step.shapes import mesh_shapes
from jaxrl_tok.step.state import make_state
from jaxrl_tok.step.turn_programs import episode_rollout
from jaxrl_tok.step.update import make_update
from jaxrl_tok.types import Greedy, Rollout, Scored


def new_state(setup: Setup, params, frozen):
  """TrainState around trained (None: random) and frozen parameters."""
  return make_state(
    setup.policy,
    with_log_kl(setup),
    setup.optimizer,
    setup.mesh,
    setup.settings.run.seed,
    params,
    frozen,
    setup.critic,
  )


def with_log_kl(setup: Setup):
  """Algorithm of the run, with a reference where the KL is logged."""
  return build.with_log_kl(setup.settings, setup.algorithm)


def measures_kl(setup: Setup) -> bool:
  """Tells whether the KL to the reference is measured beside the update."""
  return setup.settings.algorithm.log_kl and setup.algorithm.kl is None


def first_params(setup: Setup) -> tuple:
  """Parameters (trained, frozen) at step 0."""
  if setup.model.directory is None:
    if setup.task.answers and setup.model.hf_config:
      return warm_start(setup), None
    return None, None
  if setup.model.origin.startswith(packages.SCHEME):
    setup.logger.message(packages.described(setup.model.origin))
  with setup.logger.doing(f'reading {setup.model.origin}'):
    return setup.trainable.load(setup.mesh)


def restore(setup: Setup, run_dir: Path, checkpoints, settings: dict):
  """Restores the checkpoint that --resume names: (state, cursor, progress);
  None without one. Says what has changed since, and refuses what may not.

  settings: saved_settings of this run.
  """
  run, say = setup.settings.run, setup.logger.warn
  if run.resume == 'never':
    return None
  for name in processes.main_only(lambda: checkpoint.drop_partial(run_dir)):
    say(f'checkpoint {name} was not finished; it is deleted')
  like = new_state(setup, *setup.trainable.structs())
  found = checkpoint.restore_named(checkpoints, run.resume, like, say)
  if found is None:
    return None
  state, cursor, meta = found
  changed = foundation.changes(meta['settings'], settings)
  foundation.check_changes(changed, run.allowed, say)
  if like.frozen is not None:  # it is not in the checkpoint
    old = yaml.safe_load((run_dir / 'config.yaml').read_text())
    if old['model_fingerprint'] != fingerprint(setup.model):
      cure = f'--revision {old["model_commit"]}'
      raise checkpoint.NotResumed(
        f'{setup.model.origin} is not the model that the run began with; pass '
        + (cure if old['model_commit'] else '--model as it was')
      )
    frozen = setup.trainable.load_frozen(setup.mesh)
    state = state.replace(frozen=frozen)
  return state, cursor, from_saved(meta['progress'])


def set_aside(run_dir: Path) -> int | None:
  """Renames the rows of a run that has no checkpoint, NAME.old.jsonl: it
  begins again. Returns the last step that they tell of; None without rows."""
  step = last_step(run_dir / 'metrics.jsonl')
  for name in ('metrics', 'samples'):
    file = run_dir / f'{name}.jsonl'
    if file.is_file():
      os.replace(file, file.with_suffix('.old.jsonl'))
  return step


def begin(setup: Setup, run_dir: Path, checkpoints, settings: dict):
  """Begins or resumes: (setup with the run's logger, state, cursor or None,
  progress). settings: saved_settings of this run."""
  restored = restore(setup, run_dir, checkpoints, settings)
  if restored is None:
    before = processes.main_only(lambda: set_aside(run_dir))
    if setup.settings.run.resume != 'never':
      line = f'{mirror.name_of(run_dir)} has no checkpoint: begins at step 0'
      if before is not None:
        line += f'; rows up to step {before:g} are set aside (*.old.jsonl)'
      setup.logger.warn(line)
  logger = Logger(
    run_dir,
    setup.settings.run.report_to,
    restored[2].step if restored else None,
    is_main=processes.is_main(),
    evaluated=restored[2].evaluated if restored else None,
  )
  logger.message(f'run directory: {mirror.name_of(run_dir)}')
  setup = setup._replace(logger=logger)
  if restored is None:
    processes.main_only(lambda: record.write_run_files(setup, run_dir))
    state = new_state(setup, *first_params(setup))
    check_state(setup, state)
    return setup, state, None, Progress()
  state, cursor, progress = restored
  logger.message(f'resumed from step {progress.step}')
  check_state(setup, state)
  if dropped := checkpoint.drop_after(checkpoints, progress.step):
    logger.message(f'later checkpoints are made anew: {dropped}')
  return setup, state, cursor, progress


def check_state(setup: Setup, state) -> None:
  """Refuses a state that begins with parameters that are not finite."""
  origin = getattr(setup.model, 'origin', 'the policy')
  for tree in (state.params, state.frozen):
    check_finite(tree, origin, 'no update of it is finite: give another model')


def saved_settings(setup: Setup) -> dict:
  """Settings in a checkpoint, as JSON has them."""
  found = setup.task_flags | flatten(setup.settings)
  found[foundation.KEY] = foundation.describe(setup)
  return json.loads(json.dumps(found, default=str))


def check_shapes(setup: Setup) -> None:
  """Checks shapes of a user's own functions by tracing a step with them, before
  the run begins. Must run under jax.set_mesh."""
  own = any(value is not None for value in setup.own)
  judged = [(setup.rewards, setup.data)]
  judged += [(e.rewards, e.data) for e in setup.evaluations]
  if not own and not any(rewards.device for rewards, _ in judged):
    return
  state, found = new_state(setup, *setup.trainable.structs()), []
  for rewards, prompts in judged:
    examples = [prompts.records[0]] * setup.config.num_prompts
    batch, columns = prompts.batch(examples, prompts.buckets[-1])
    rollout = jax.eval_shape(
      functools.partial(trace_rollout, setup), state, batch
    )
    if setup.world is not None:
      rollout = traced_episodes(setup, batch)
    score = device_rewards.make_device_scorer(rewards.device)
    found.append((rollout, *jax.eval_shape(score, None, rollout, columns)))
  if own:
    jax.eval_shape(functools.partial(trace_update, setup), state, *found[0])


def trace_rollout(setup: Setup, state, prompts):
  """Rollout of prompts, evaluated, too."""
  params = setup.policy.merge_params(*state.policy_params)
  sample = make_sampler(setup.policy, setup.config.sampler)
  rollout = sample(params, state.key, prompts, setup.rule)
  evaluate_rollout(setup.policy, params, rollout, setup.rule)
  return rollout


def traced_episodes(setup: Setup, prompts) -> Rollout:
  """Structs of the prompts' episodes."""
  config, size = setup.config, prompts.tokens.shape
  return episode_rollout(
    *(mesh_shapes(), *size, config.sampler, config.max_completion_length),
    config.seats,
  )


def trace_update(setup: Setup, state, rollout, rewards: dict, applies: dict):
  """State after an update by the device's rewards, and zeros for the host's."""
  B, C = len(rollout.mask), len(rollout.prompts.length)
  names = setup.rewards.weights.keys() - rewards.keys()
  rewards = rewards | dict.fromkeys(names, jnp.zeros(rollout.mask.shape))
  applies = applies | dict.fromkeys(names, jnp.ones(B, bool))
  weights = dict.fromkeys(rewards, jnp.float32(1))
  greedy = None
  if setup.algorithm.greedy:
    mask = rollout.mask[:C]
    greedy = Greedy(jnp.zeros(mask.shape), mask)
  update = make_update(
    setup.policy, with_log_kl(setup), setup.optimizer, critic=setup.critic
  )
  scored = Scored(rollout, rewards, applies, weights, greedy)
  return update(state, scored, setup.rule)[0]
