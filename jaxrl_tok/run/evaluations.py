"""Evaluations of a run: held-out data, other data sets, a step's own batch."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxrl_tok.evaluation import (
  Due,
  Evaluated,
  credit_rows,
  due,
  evaluate_held_out,
  reads_reference,
)
from jaxrl_tok.hub.weights import read_params
from jaxrl_tok.report import goodhart
from jaxrl_tok.report.logger import Logger
from jaxrl_tok.run.inputs import Rewards
from jaxrl_tok.run.prepare import EvalSetup, Setup
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.step import device_rewards, episodes
from jaxrl_tok.step.episodes import Sizes
from jaxrl_tok.step.programs import Programs
from jaxrl_tok.step.shapes import EvaluationShape
from jaxrl_tok.step.turn_programs import counts, jit_turns
from jaxrl_tok.step.turns import with_rewards
from jaxrl_tok.types import first_argument

SHOWN = 20  # held-out completions in samples.jsonl
LARGEST_MISMATCH = 0.05  # nats; bfloat16 alone is below a tenth of it


def read_reward_model(setup: Setup) -> tuple | None:
  """Reward model: (function of parameters and a Rollout, parameters); None
  without one."""
  model, f = setup.reward_model, setup.settings.model
  if model is None:
    return None
  with setup.logger.doing(f'reading {model.origin}'):
    params = read_params(model, setup.mesh, quantized=f.quantize == 'int8')
  network = model.make_policy(setup.dtype, attention=f.attention)
  return device_rewards.reward_model(network, f.reward_model_by), params


def device_score(found: Rewards, model: tuple | None) -> tuple | None:
  """Scorer of rewards on the device, JAX functions and a reward model:
  (function, parameters); None without any.

  model: see read_reward_model.
  """
  if device_rewards.REWARD_MODEL not in found.weights:
    model = None
  if model is None and not found.device:
    return None
  function, params = model or (None, None)
  return device_rewards.make_device_scorer(found.device, function), params


def evaluation_shape(
  e: EvalSetup, model: tuple | None = None
) -> EvaluationShape:
  """Sizes of an evaluation's program, and the rewards that it runs; model: see
  read_reward_model."""
  length, reads = e.data.buckets[-1], reads_reference(e.evaluation.metrics)
  shape = EvaluationShape(
    e.num_prompts, length, e.sampler, reference=reads is not None
  )
  score = device_score(e.rewards, model)
  if score is None:
    return shape
  _, columns = e.data.batch([e.data.records[0]], length)
  return shape._replace(device_score=score, columns=columns)


def sizes_of(count: int, prompts, sampler: SamplerConfig) -> Sizes:
  """Sizes of the episodes of `count` prompts."""
  samples, longest = sampler.samples_per_prompt, prompts.buckets[-1]
  return Sizes(count, samples, longest, counts(sampler))


def played(
  setup: Setup, e: EvalSetup, sample: Callable, key, scorer, step: int
) -> Callable:
  """Returns `play` of evaluate_held_out; a record's seed is the same in every
  evaluation."""
  world, seed = setup.world, setup.settings.run.seed

  def rollout(number, prompts, examples, index):
    found = episodes.play(
      sample(jax.random.fold_in(key, number)),
      world,
      sizes_of(e.num_prompts, e.data, e.sampler),
      examples,
      prompts,
      episodes.episode_seeds(
        seed, episodes.EVALUATION, index % e.data.num_records
      ),
      step,
    )
    return found.rollout, with_rewards(scorer, found, world.on_error)

  return rollout


def run_evaluation(
  setup: Setup,
  e: EvalSetup,
  sample: Callable,
  device: Callable | None,
  step: int = 0,
  mismatch: Callable | None = None,
  reference: Callable | None = None,
):
  """Runs an evaluation by any sampler: Evaluated.

  Args:
    sample: (key, Prompts) -> Rollout; of episodes key -> TurnPrograms.
    device: scorer of its rewards on the device, compiled; None without any.
    step: updates that the policy has had.
    mismatch, reference: see evaluate_held_out.
  """
  key = jax.random.fold_in(jax.random.key(setup.settings.run.seed), step)
  scorer, play = setup.scorer(e.rewards, device), None
  if setup.world is not None:
    play = played(setup, e, sample, key, scorer, step)
  return evaluate_held_out(
    lambda number, prompts: sample(jax.random.fold_in(key, number), prompts),
    scorer,
    e.data,
    e.num_prompts,
    e.data.buckets[-1],
    step,
    e.evaluation.metrics,
    e.evaluation.name,
    mismatch,
    reference if reads_reference(e.evaluation.metrics) else None,
    play,
  )


def make_draw(setup: Setup, sampler: SamplerConfig) -> Callable:
  """Sampler (params, key, Prompts, rule) -> Rollout, or of turns (params, key,
  rule) -> TurnPrograms; compiled when it is used."""
  if setup.world is None:
    return jax.jit(make_sampler(setup.policy, sampler))
  merged = setup.policy._replace(merge_params=first_argument)
  programs = jit_turns(merged, sampler)
  return lambda params, *args: programs((params,), *args)


def evaluate_params(
  setup: Setup,
  e: EvalSetup,
  params,
  draw: Callable,
  reference: Callable | None = None,
) -> Evaluated:
  """Runs an evaluation of parameters, as after step 0.

  Args:
    draw: see make_draw, of e.sampler's choices.
    reference: see evaluate_held_out.
  """

  def sample(*args):
    return draw(params, *args, setup.rule)

  device = jit_scorer(setup, e)
  return run_evaluation(setup, e, sample, device, reference=reference)


def jit_scorer(setup: Setup, e: EvalSetup) -> Callable | None:
  """Scorer of an evaluation's rewards on the device, compiled when it is used;
  None without any."""
  by_model = device_rewards.REWARD_MODEL in e.rewards.weights
  model = read_reward_model(setup) if by_model else None
  found = device_score(e.rewards, model)
  if found is None:
    return None
  score, params = found
  return functools.partial(jax.jit(score), params)


class Latest(NamedTuple):
  """Evaluation that was made, of the policy after a step."""

  step: int
  found: Evaluated


def evaluate(
  setup: Setup,
  programs: Programs,
  e: EvalSetup,
  state,
  step: int,
  made: dict[str, Latest],
) -> Evaluated:
  """Runs an evaluation by the run's programs, unless it was the last one that
  was made, and notes it in `made`, by name."""
  name = e.evaluation.name
  if name not in made or made[name].step != step:
    found = run_by_programs(setup, programs, e, state, step)
    check_best_metric(setup, e, found.metrics)
    made[name] = Latest(step, found)
  return made[name].found


def check_best_metric(setup: Setup, e: EvalSetup, metrics: dict) -> None:
  """Refuses a --best_metric that its evaluation does not give."""
  name = setup.settings.run.best_metric
  if name is None or name in metrics or evaluation_of(setup, name) is not e:
    return
  raise ValueError(
    f'--best_metric {name} is no metric of the evaluation '
    f'{e.evaluation.name}, which has {", ".join(sorted(metrics))}'
  )


def evaluation_of(setup: Setup, metric: str) -> EvalSetup:
  """Evaluation that a metric, eval/... or eval/NAME/..., is of."""
  by_name = {e.evaluation.name: e for e in setup.evaluations}
  return by_name.get(metric.split('/')[1], setup.evaluations[0])


def run_by_programs(
  setup: Setup, programs: Programs, e: EvalSetup, state, step: int
) -> Evaluated:
  """Runs an evaluation by the run's programs."""
  name = e.evaluation.name
  if setup.world is None:
    sample = programs.evaluations[name]
  else:
    sample = programs.turns(e.sampler)
  sample = functools.partial(sample, state)
  device = programs.evaluation_scores.get(name)
  mismatch, reference = (
    f and functools.partial(f, state)
    for f in (programs.mismatch, programs.reference_logp)
  )
  return run_evaluation(setup, e, sample, device, step, mismatch, reference)


def due_evaluations(
  setup: Setup, programs: Programs, made: dict, history: list[dict]
) -> list[Due]:
  """Evaluations while training: the step's batch by token, and the task's,
  which are noted in `made`.

  history: rows of metrics.jsonl so far; those of evaluations are added, and a
    reward that rises while its audit becomes worse is a warning.
  """
  every = setup.settings.run.eval_every

  def own_batch(state, step, batch, last):
    rows = credit_rows(last, batch, setup.decode)
    found = {}
    if programs.reference_kl is not None:
      found['kl'] = programs.reference_kl(state, last.scored.rollout)
    at = {'step': step, 'split': 'train'}
    return found, [{**at, **row} for row in rows]

  def of(e: EvalSetup) -> Due:
    def run(state, step, batch, last):
      found = evaluate(setup, programs, e, state, step, made)
      history.append({'phase': 'eval', 'step': step, **found.metrics})
      warn_of_audit(setup.logger, history)
      return found.metrics, kept_samples(e, step, 'during', found.rows)

    return Due(e.evaluation.name, every_steps(setup, e), run)

  return [Due('train', every, own_batch), *map(of, setup.evaluations)]


def kept_samples(
  e: EvalSetup, step: int, split: str, rows: list[dict], most: int = 0
) -> list[dict]:
  """Rows for samples.jsonl: the first `most`, or all where they are kept."""
  at = {'step': step, 'split': split, 'evaluation': e.evaluation.name}
  rows = rows if e.evaluation.keep_samples else rows[:most]
  return [{**at, **row} for row in rows]


def warn_of_audit(logger: Logger, history: list[dict]) -> None:
  """Prints the first warning of each evaluation, see report/goodhart.py."""
  for name, line in goodhart.warnings(history).items():
    logger.warn_once(f'audit of {name}', line)


def every_steps(setup: Setup, e: EvalSetup) -> int:
  """Steps between runs of an evaluation; 0: at the end only."""
  asked = e.evaluation.every
  return setup.settings.run.eval_every if asked is None else asked


def not_logged(setup: Setup, step: int) -> set[str]:
  """Names of evaluations that the loop does not run after its last step."""
  every = [
    Due(e.evaluation.name, every_steps(setup, e), None)
    for e in setup.evaluations
  ]
  ran = due(every, step, setup.settings.run.max_steps)
  return {e.name for e in every} - {e.name for e in ran}


def mismatch_warning(metrics: dict) -> str | None:
  """Warning of an evaluation where sampler and gradient are two distributions;
  None where they are one."""
  name = next((n for n in metrics if n.endswith('mismatch/kl')), None)
  if name is None or metrics[name] < LARGEST_MISMATCH:
    return None
  return (
    f'{name} is {metrics[name]:.2g} nats: the policy that samples is not the '
    "one that is trained; compare the policy's extend with a cache to extend "
    'without, or pass --attention xla'
  )


def evaluate_all(
  setup: Setup,
  programs: Programs,
  state,
  step: int,
  split: str,
  logged: set[str],
  made: dict,
) -> Evaluated:
  """Evaluates everything, and records samples as 'before' or 'after' and the
  metrics of the evaluations named in `logged`. Evaluations of this step that
  are in `made` are not made again. Returns that of the task's held-out data."""
  first = None
  for e in setup.evaluations:
    found = evaluate(setup, programs, e, state, step, made)
    metrics, rows = found.metrics, found.rows
    if line := mismatch_warning(metrics):
      setup.logger.warn(line)
    setup.logger.samples(kept_samples(e, step, split, rows, SHOWN))
    if e.evaluation.name in logged:
      setup.logger.metrics('eval', step, metrics)
    first = first or found
  return first
