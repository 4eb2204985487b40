"""Evaluation of a saved model on a task, by the evaluation of training.

judge      model and task -> Judged: numbers with intervals, slices, rows
compare    two of them on the same prompts
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_tok import rewards, sharding
from jaxrl_tok.evaluation import (
  REF_LOGPS,
  Evaluated,
  metric_prefix,
  resampled_metrics,
)
from jaxrl_tok.hub.directory import open_model
from jaxrl_tok.hub.weights import read_params
from jaxrl_tok.report.evaluated import (
  Comparison,
  comparison,
  estimates,
  said,
  slice_names,
  slices,
)
from jaxrl_tok.report.statistics import Difference, Estimate, bounds, crossing
from jaxrl_tok.run.build import Own
from jaxrl_tok.run.evaluations import evaluate_params, make_draw
from jaxrl_tok.run.prepare import EvalSetup, Setup, prepare, sampler_of
from jaxrl_tok.run.task import Caller, Task
from jaxrl_tok.step.reference import make_reference_logp

DRAWS = 1000  # bootstrap samples of metrics that are no means
VOTES = {  # what completions vote for, in maj@k
  'text': said,
  'number': lambda completion: rewards.last_number(said(completion)),
}


class Plan(NamedTuple):
  """Choices of an evaluation, beside those of the task and the settings."""

  evaluation: str = 'held_out'
  samples: int = 1
  greedy: bool | None = None  # None: as the evaluation has it
  slices: tuple = ()  # columns
  references: str | None = None  # column; None: see reference_column
  reference: str | None = None  # model that perplexity is measured under
  vote: str = 'text'  # of VOTES
  batch: int = 256  # completions at a time


class Judged(NamedTuple):
  """Model, judged."""

  name: str
  estimates: dict[str, Estimate]
  slices: dict  # {column: {slice: {name: Estimate}}}
  rows: list
  draws: dict  # {metric that is no mean: bootstrap samples}
  signatures: dict  # {metric: text}
  sampling: dict  # how completions were sampled
  records: Any


# --- metrics


def reference_column(task: Task, record: dict, asked: str | None) -> str | None:
  """Column of references: the one asked for, else 'reference', the task's
  answers, or 'answer', where the data has it. Raises ValueError."""
  if asked is not None and asked not in record:
    has = ', '.join(name for name in record if name != 'prompt') or 'none'
    raise ValueError(
      f'--references {asked} is no column of the data, which has {has}'
    )
  names = (asked, 'reference', task.answers, 'answer')
  return next((n for n in names if n is not None and n in record), None)


def metrics_of(
  task: Task, given, record: dict, plan: Plan, reference: bool
) -> list[Callable]:
  """Metrics of the evaluation, then the general ones that it lacks: distinct,
  self-BLEU of several samples, exact match and overlap with references, and
  perplexity where there is a model to measure it under. Without sacrebleu and
  rouge-score their metrics are left out."""
  column = reference_column(task, record, plan.references)
  makers = {'distinct': lambda: rewards.distinct}
  if plan.samples > 1:
    makers['self_bleu'] = rewards.self_bleu
  if column is not None:
    makers['exact'] = lambda: rewards.exact(column)
    for name in ('corpus_bleu', 'corpus_chrf', 'corpus_rouge'):
      makers[name] = functools.partial(getattr(rewards, name), column)
  if reference:
    makers['perplexity'] = lambda: rewards.perplexity
  found = [
    m for m in given if reference or REF_LOGPS not in rewards.accepted(m).names
  ]
  there = set(map(rewards.get_name, found))
  for name, make in makers.items():
    if name not in there and (made := made_if_installed(make)):
      found.append(made)
  return found


def made_if_installed(make: Callable) -> Callable | None:
  """Metric, or None where its package is not installed."""
  try:
    return make()
  except ValueError as e:
    if 'is not installed' not in str(e):
      raise
    return None


def signatures_of(metrics) -> dict[str, str]:
  """Signatures {metric: text} of the metrics that have one."""
  found = {rewards.get_name(m): getattr(m, 'signature', None) for m in metrics}
  return {k: v for k, v in found.items() if isinstance(v, str)}


# --- a model


def choose_evaluation(setup: Setup, plan: Plan, metrics: Callable) -> EvalSetup:
  """Evaluation that is planned, with its samples and metrics. Raises
  ValueError."""
  by_name = {e.evaluation.name: e for e in setup.evaluations}
  if plan.evaluation not in by_name:
    raise ValueError(
      f'--evaluation {plan.evaluation} is none of the task, which has '
      f'{", ".join(by_name)}'
    )
  e = by_name[plan.evaluation]
  greedy = plan.greedy
  if greedy is None:
    greedy = plan.samples == 1 and e.evaluation.greedy
  if greedy and plan.samples > 1:
    raise ValueError(
      f'the {plan.samples} greedy completions of a prompt are all the same; '
      'pass --decode sample, or --samples 1'
    )
  own = dataclasses.replace(
    e.evaluation,
    samples=plan.samples,
    greedy=greedy,
    metrics=metrics(e.evaluation.metrics, e.data.records[0]),
  )
  config = setup.config.greedy if greedy else setup.config.sampler
  shards = sharding.row_shards(setup.mesh)
  count = min(e.data.num_records, max(1, plan.batch // plan.samples))
  return e._replace(
    evaluation=own,
    sampler=sampler_of(config, plan.samples),
    num_prompts=-(-count // shards) * shards,
  )


def make_reference(setup: Setup, name: str | None) -> Callable | None:
  """Returns reference(Rollout) -> log-probs under a model, or None. Raises
  ValueError for one with other tokens."""
  if name is None:
    return None
  model, kernel = open_model(name), setup.settings.model.attention
  own = getattr(setup.model.tokenizer, 'get_vocab', dict)()
  if model.is_classifier or model.tokenizer.get_vocab() != own:
    raise ValueError(
      f'--reference {name} has other tokens than {setup.model.origin}; pass a '
      'model of the same family'
    )
  policy = model.make_policy(setup.dtype, attention=kernel)
  measure = jax.jit(make_reference_logp(policy, None))
  with setup.logger.doing(f'reading {name}'):
    params = read_params(model, setup.mesh)
  return lambda rollout: measure((params, None), rollout, setup.rule)


def judge(
  name: str, task: Task, settings, caller: Caller, plan: Plan
) -> Judged:
  """Evaluates settings.model.model on a task. Raises ValueError or OSError."""
  setup = prepare(task, settings, Own(), caller, {})

  def metrics(given, record):
    return metrics_of(task, given, record, plan, plan.reference is not None)

  e = choose_evaluation(setup, plan, metrics)
  columns = {c: column_names(e, c) for c in plan.slices}
  with jax.set_mesh(setup.mesh):
    with setup.logger.doing(f'reading {name}'):
      params = setup.policy.merge_params(*setup.trainable.load(setup.mesh))
    draw = make_draw(setup, e.sampler)
    reference = make_reference(setup, plan.reference)
    with setup.logger.doing(f'evaluating {name}'):
      found = evaluate_params(setup, e, params, draw, reference)
  return judged(name, setup, e, found, plan, columns)


def column_names(e: EvalSetup, column: str) -> list[str]:
  """Slice of each prompt, by a column. Raises ValueError without it."""
  records = list(e.data.records)
  missing = next((r for r in records if column not in r), None)
  if missing is not None:
    has = ', '.join(name for name in missing if name != 'prompt') or 'none'
    raise ValueError(
      f'--slice {column} is no column of every record, which have {has}'
    )
  return slice_names([r[column] for r in records], column)


def judged(
  name: str,
  setup: Setup,
  e: EvalSetup,
  found: Evaluated,
  plan: Plan,
  columns: dict,
) -> Judged:
  """Numbers with intervals, of an evaluation that was made."""
  vote, n = VOTES[plan.vote], e.data.num_records
  numbers = estimates(found.rows, vote)
  with setup.logger.doing('resampling prompts'):
    samples = resampled_metrics(e.evaluation.metrics, found, DRAWS)
  prefix = metric_prefix(e.evaluation.name)
  for key, value in found.metrics.items():
    key = key.removeprefix(prefix)
    if key not in numbers and key not in ('reward_low', 'reward_high'):
      ends = bounds(samples[key], n) if key in samples else (None, None)
      numbers[key] = Estimate(value, *ends, n)
  s, sampler = setup.settings.sampling, e.sampler
  sampling = {'samples': plan.samples, 'greedy': sampler.greedy}
  if not sampler.greedy:
    names = 'temperature', 'top_k', 'top_p', 'min_p'
    sampling |= {k: getattr(s, k) for k in names}
  sampling['max_completion_length'] = sampler.max_completion_length
  return Judged(
    name,
    numbers,
    {c: slices(found.rows, names, vote) for c, names in columns.items()},
    found.rows,
    samples,
    signatures_of((*e.evaluation.metrics, *e.rewards.host.values())),
    sampling,
    e.data.records,
  )


def compare(first: Judged, second: Judged, plan: Plan) -> Comparison:
  """Compares two models on the same prompts. Raises ValueError where the
  prompts are not the same."""
  prompts = [[r['prompt'] for r in one.records] for one in (first, second)]
  if prompts[0] != prompts[1]:
    raise ValueError(
      'the two models leave out different prompts, as too long; pass a larger '
      '--max_prompt_length'
    )
  found = comparison(first.rows, second.rows, VOTES[plan.vote])
  for name, value in first.estimates.items():
    if name in found.differences or name not in second.estimates:
      continue
    low = high = p = None
    if name in first.draws and name in second.draws:
      moved = first.draws[name] - second.draws[name]
      (low, high), p = bounds(np.asarray(moved), value.prompts), crossing(moved)
    other = second.estimates[name]
    found.differences[name] = Difference(
      value.value - other.value, low, high, p, value.prompts
    )
  return found
