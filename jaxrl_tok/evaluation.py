"""Evaluation on held-out prompts, and samples that show credit by token."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxrl_tok import processes
from jaxrl_tok.data import PromptSet
from jaxrl_tok.report.evaluated import OWN_METRICS, REWARD, estimates
from jaxrl_tok.report.statistics import draws
from jaxrl_tok.rewards import accepted, get_name
from jaxrl_tok.rewards.functions import own_lists
from jaxrl_tok.rewards.scoring import as_reward_error, quote_samples
from jaxrl_tok.sharding import put_rows
from jaxrl_tok.step.collectors import (
  Score,
  Scorer,
  score,
  token_rewards,
  total_reward,
  valid_rows,
)
from jaxrl_tok.step.device_steps import StepBatch
from jaxrl_tok.types import Scored

EPISODE = 'turns', 'ended_by'  # of a row: what was said, and why it ended
REF_LOGPS = 'ref_logps'  # argument of metrics, measured where one names it


class Evaluated(NamedTuple):
  """Outcome of an evaluation."""

  metrics: dict  # {eval/...: float}
  rows: list  # a dict for each completion, see report/evaluated.py
  examples: list  # record of each completion
  measured: dict  # further arguments of metrics, see corpus_metrics


class Due(NamedTuple):
  """Evaluation that is ready to run."""

  name: str
  every: int  # steps; 0: after the last step only
  # (state, step, Batch, StepBatch) -> (metrics, rows for samples.jsonl)
  run: Callable


def due(evaluations: Sequence[Due], step: int, max_steps: int) -> list[Due]:
  """Selects the evaluations to run after a step."""
  return [
    e
    for e in evaluations
    if step == max_steps or (e.every and step % e.every == 0)
  ]


def reads_reference(metrics: Sequence[Callable]) -> str | None:
  """Name of the first metric that reads log-probs under the reference; None:
  there is none."""
  found = (m for m in metrics if REF_LOGPS in accepted(m).names)
  return next(map(get_name, found), None)


def describe(example: dict) -> dict:
  """Prompt and answer of a record, for samples.jsonl."""
  answer = example.get('answer')
  return {
    'prompt': example['prompt'],
    'answer': None if answer is None else str(answer),
  }


def metric_prefix(name: str) -> str:
  """Prefix of metrics: 'eval/' for the run's held-out data, 'eval/NAME/' for
  others."""
  return 'eval/' if name == 'held_out' else f'eval/{name}/'


def evaluate_held_out(
  sample: Callable,
  scorer: Scorer,
  data: PromptSet,
  num_prompts: int,
  prompt_length: int,
  step: int = 0,
  metrics: Sequence[Callable] = (),
  name: str = 'held_out',
  mismatch: Callable | None = None,
  reference: Callable | None = None,
  play: Callable | None = None,
) -> Evaluated:
  """Evaluates a policy on every prompt of a set: samples and scores them.

  Args:
    sample: (number of the batch, Prompts [num_prompts, P]) -> Rollout.
    num_prompts: prompts at a time; the last batch wraps around and its excess
      is dropped.
    prompt_length: P of all batches.
    step: step of the run, for the reward functions.
    mismatch: Rollout -> {name: float32 []} of sampler and gradient, measured on
      the first batch; None: not measured.
    reference: Rollout -> log-probs float32 [B, T] under the reference, for the
      metrics that read `ref_logps`; None: not measured.
    play: (number of the batch, Prompts on the host, their records, numbers of
      these) -> (Rollout, scorer that knows its episodes), in place of `sample`.

  Metrics are means over completions; where no reward applies to a completion
  its reward is None and in no mean. Several rewards have each a mean and a
  component by name. The reward has an interval of 95 %, reward_low and
  reward_high, by the bootstrap of prompts. Must run under jax.set_mesh.
  """
  mesh, n = jax.sharding.get_mesh(), data.num_records
  own = processes.own_rows(mesh, num_prompts)
  judged, gaps = [], {}
  for number, start in enumerate(range(0, n, num_prompts)):
    index = start + own
    examples = [data.records[int(i % n)] for i in index]
    prompts, columns = data.batch(examples, prompt_length)
    if play is None:
      rollout, by = sample(number, put_rows(mesh, prompts)), scorer
    else:
      rollout, by = play(number, prompts, examples, index)
    if mismatch is not None and number == 0:
      gaps = mismatch(rollout)
    on_device = ({}, {})
    if scorer.device is not None:
      on_device = scorer.device(rollout, put_rows(mesh, columns))
    scoring = functools.partial(score, by, rollout, on_device, examples, step)
    found, _ = processes.together(scoring)
    logp = None if reference is None else reference(rollout)
    judged += [row for row in judge(found, logp, index) if row['index'] < n]
  judged = gathered(judged)
  examples_of = [data.records[row['index']] for row in judged]
  logps = [row.pop('logp') for row in judged]
  rows = [describe(e) | row for e, row in zip(examples_of, judged)]
  measured = {} if reference is None else {REF_LOGPS: logps}
  numbers = add_metrics(rows, examples_of, metrics, scorer, measured)
  numbers |= {f'mismatch/{k}': float(v) for k, v in gaps.items()}
  prefix = metric_prefix(name)
  means = summary(rows)
  if not scorer.weights:  # nothing is judged
    means = {k: v for k, v in means.items() if k not in REWARD}
  record = {prefix + k: v for k, v in (means | numbers).items()}
  return Evaluated(record, rows, examples_of, measured)


def add_metrics(
  rows: list[dict],
  examples: list[dict],
  metrics: Sequence[Callable],
  scorer: Scorer,
  measured: dict,
) -> dict[str, float]:
  """Metrics of all completions together; those of each completion are added to
  its row. The components of a single reward, which are the reward, are taken
  away."""
  if len({name for row in rows for name in row['components']}) < 2:
    for row in rows:
      del row['components']
  completions = [row['completion'] for row in rows]
  found = corpus_metrics(
    metrics, examples, completions, scorer.on_error, scorer.warn, measured
  )
  each = {k: v for k, v in found.items() if isinstance(v, list)}
  for b, row in enumerate(rows if each else ()):
    own = {name: values[b] for name, values in each.items()}
    row['metrics'] = row.get('metrics', {}) | own
  return {k: v for k, v in found.items() if k not in each}


def summary(rows: list[dict]) -> dict[str, float]:
  """Means of completions by name, and the interval of the reward's."""
  found = estimates(rows)
  reward = found['reward']
  if not reward.prompts:
    found['reward'] = reward._replace(value=0.0)
  values = {name: x.value for name, x in found.items() if x.prompts}
  if reward.low is not None:
    values |= {'reward_low': reward.low, 'reward_high': reward.high}
  return {'reward': found['reward'].value} | values


def judge(found: Score, logp, index: np.ndarray) -> list[dict]:
  """Completions of this process's rows, judged: a dict of plain values each.

  Args:
    logp: float32 [B, T] under the reference, or None.
    index: number of the record of each of its prompts, int [n].
  """
  rollout = found.scored.rollout
  mask, over, logp = processes.local((rollout.mask, rollout.ended, logp))
  total, valid = total_reward(found.scored), valid_rows(found.scored)
  G, extra = len(mask) // len(index), found.extra
  return [
    {
      'completion': found.texts[b],
      'reward': float(total[b]) if valid[b] else None,
      'index': int(index[b // G]),
      'length': int(mask[b].sum()),
      'ended': bool(over[b]),
      'components': part,
      'logp': None if logp is None else logp[b][mask[b]].tolist(),
      **{k: extra[k][b] for k in EPISODE if k in extra},
      **({'metrics': extra['numbers'][b]} if 'numbers' in extra else {}),
    }
    for b, part in enumerate(components(found.scored))
  ]


def gathered(rows: list[dict]) -> list[dict]:
  """Judged completions of all processes, in the order of their records; those
  of processes with equal rows once."""
  by_prompt = {}
  for process, found in enumerate(processes.exchange(rows)):
    for row in found:
      first = by_prompt.setdefault(row['index'], (process, []))
      if first[0] == process:
        first[1].append(row)
  return [row for i in sorted(by_prompt) for row in by_prompt[i][1]]


def components(scored: Scored) -> list[dict]:
  """Values {reward: float} of each row, of the rewards that apply to it."""
  values, applies, mask = processes.local(
    (scored.rewards, scored.applies, scored.rollout.mask)
  )
  sums = {k: np.where(mask, v, 0).sum(1).tolist() for k, v in values.items()}
  return [
    {k: v[b] for k, v in sums.items() if applies[k][b]}
    for b in range(len(mask))
  ]


def corpus_metrics(
  metrics,
  examples: list[dict],
  completions: list,
  on_error: str = 'raise',
  warn: Callable = lambda name, text: None,
  measured: dict | None = None,
) -> dict:
  """Metrics {name: float} of all completions together, or {name: a list with a
  float or None for each completion}; see Evaluation.

  measured: further arguments {name: list of a value for each completion}.

  A metric that raises an exception, or gives no number, is a RewardError in one
  line; with another on_error it is left out, and `warn` is told.
  """
  given, found = arguments_of(examples, completions, measured or {}), {}
  for metric in metrics:
    name = get_name(metric)
    try:
      value = metric(**own_lists(accepted(metric).choose(given)))
      value = value if isinstance(value, dict) else {name: value}
      value = {k: metric_value(v, len(completions)) for k, v in value.items()}
    except (Exception, SystemExit) as e:
      samples = quote_samples(examples, completions)
      error = as_reward_error(f'the metric {name}', e, samples, 'mend it')
      if on_error == 'raise':
        raise error from e
      warn(f'metric {name}', f'{error}; it is left out (--reward_on_error)')
      continue
    taken = {*OWN_METRICS, *found} & value.keys()
    if taken:
      raise ValueError(
        f'the metric {name} gives {min(taken)}, which is there already; name '
        'it otherwise'
      )
    found |= value
  return found


def arguments_of(
  examples: list[dict], completions: list, measured: dict
) -> dict:
  """Arguments that metrics choose from, {name: a value for each completion}."""
  names = dict.fromkeys(name for e in examples for name in e)
  columns = {name: [e.get(name) for e in examples] for name in names}
  prompts = columns.pop('prompt')
  return columns | {'prompts': prompts, 'completions': completions} | measured


def metric_value(value, count: int):
  """Float of a metric, or the list of its `count` completions' floats and
  Nones. Raises ValueError or TypeError."""
  if isinstance(value, list | tuple) or getattr(value, 'ndim', 0):
    if len(value) != count:
      raise ValueError(f'{len(value)} numbers for {count} completions')
    found = [None if v is None else float(v) for v in value]
    for b, v in enumerate(found):
      if v is not None and not math.isfinite(v):
        raise ValueError(
          f'{v} for completion {b}; give a finite number, or None where there '
          'is none'
        )
    return found
  return float(value)


def resampled_metrics(
  metrics: Sequence[Callable], found: Evaluated, count: int, seed: int = 0
) -> dict[str, np.ndarray]:
  """Bootstrap samples {name: float [count]} of metrics of all completions that
  are functions of sums, by drawing prompts. Such a metric has an attribute
  `statistics`, a function of the same arguments -> (a list of numbers, or None,
  for each completion; function of their sums -> {name: float}).

  Equal numbers of prompts and equal seeds draw equal prompts, so that models
  can be compared.
  """
  index = np.array([row['index'] for row in found.rows])
  n, given = (
    int(index.max()) + 1,
    arguments_of(
      found.examples, [row['completion'] for row in found.rows], found.measured
    ),
  )
  samples = {}
  for metric in metrics:
    statistics = getattr(metric, 'statistics', None)
    if statistics is None:
      continue
    chosen = accepted(statistics).choose(given)
    rows, compute = statistics(**own_lists(chosen))
    known = [b for b, row in enumerate(rows) if row is not None]
    numbers = np.array([rows[b] for b in known], float)
    sums = np.zeros((n, numbers.shape[1]))
    np.add.at(sums, index[known], numbers)
    drawn = np.concatenate([w @ sums for w in draws(n, count, seed)])
    values = [compute(row) for row in drawn.tolist()]
    samples |= {
      name: np.array([value[name] for value in values]) for name in values[0]
    }
  return samples


def credit_rows(
  last: StepBatch, batch, decode: Callable, prompts: int = 4
) -> list[dict]:
  """Rows for samples.jsonl that show credit: each chosen token with its
  log-prob, reward and advantage, of the prompts with the largest advantages.
  Of an episode all tokens up to the last turn's, and which were chosen.

  Args:
    last: the step's batch after its update.
    batch: collectors.Batch.
    decode: lists of ids -> texts.
  """
  examples, C = batch.examples, len(batch.examples)
  scored, advantage = processes.local(last)
  rollout, reward = scored.rollout, token_rewards(scored)
  largest = np.abs(advantage).reshape(C, -1).max(axis=1)
  G, rows, parts = len(rollout.tokens) // C, [], components(scored)
  for c in np.argsort(-largest, kind='stable')[:prompts]:
    for b in range(c * G, (c + 1) * G):
      chosen = rollout.mask[b]
      extra = {k: v[b] for k, v in batch.extra.items() if b < len(v)}
      story = {k: extra.pop(k) for k in EPISODE if k in extra}
      shown = chosen
      if rollout.turn is not None:  # up to the last chosen one
        shown = np.cumsum(chosen[::-1])[::-1] > 0
        story['chosen'] = chosen[shown].tolist()
      rows.append(
        {
          **describe(examples[c]),
          'completion': decode([rollout.tokens[b][chosen].tolist()])[0],
          'reward': float(reward[b].sum()),
          'components': parts[b],
          'tokens': decode([[t] for t in rollout.tokens[b][shown].tolist()]),
          'logp': rollout.logp[b][shown].tolist(),
          'rewards': reward[b][shown].tolist(),
          'advantage': advantage[b][shown].tolist(),
          **story,
          **({'extra': extra} if extra else {}),
        }
      )
  return rows
