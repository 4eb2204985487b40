"""Evaluation on held-out prompts, and samples that show credit by token."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxrl_tok.data import PromptSet
from jaxrl_tok.rewards import accepted, get_name
from jaxrl_tok.rewards.functions import own_lists
from jaxrl_tok.rewards.scoring import as_reward_error, quote_samples
from jaxrl_tok.sharding import put_rows
from jaxrl_tok.step.collectors import (
  Scorer,
  score,
  token_rewards,
  total_reward,
  valid_rows,
)
from jaxrl_tok.step.device_steps import StepBatch
from jaxrl_tok.types import Scored

# names of an evaluation's own numbers
OWN_METRICS = ('reward', 'mean_length', 'clipped_ratio')
REF_LOGPS = 'ref_logps'  # argument of metrics, measured where one names it


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
) -> tuple[dict, list[dict]]:
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

  Returns (metrics, rows): means over completions, one dict for each; where no
  reward applies to a completion its reward is None and in no mean. Several
  rewards have each a mean and a component by name. Must run under
  jax.set_mesh.
  """
  mesh, n = jax.sharding.get_mesh(), data.num_records
  lengths, ended, rows, examples_of, gaps = [], [], [], [], {}
  logps, parts = [], []
  for number, start in enumerate(range(0, n, num_prompts)):
    index = np.arange(start, start + num_prompts) % n
    real = min(num_prompts, n - start)
    examples = [data.records[int(i)] for i in index]
    prompts, columns = data.batch(examples, prompt_length)
    rollout = sample(number, put_rows(mesh, prompts))
    if mismatch is not None and number == 0:
      gaps = mismatch(rollout)
    on_device = ({}, {})
    if scorer.device is not None:
      on_device = scorer.device(rollout, put_rows(mesh, columns))
    found = score(scorer, rollout, on_device, examples, step)
    G = len(rollout.mask) // num_prompts
    keep = real * G
    total = total_reward(found.scored)[:keep].tolist()
    valid = valid_rows(found.scored)[:keep].tolist()
    mask, over = jax.device_get((rollout.mask, rollout.ended))
    if reference is not None:
      logp = jax.device_get(reference(rollout))[:keep]
      logps += [row[on].tolist() for row, on in zip(logp, mask)]
    parts += components(found.scored)[:keep]
    lengths.extend(mask[:keep].sum(1).tolist())
    ended.extend(over[:keep].tolist())
    repeated = [e for e in examples[:real] for _ in range(G)]
    examples_of += repeated
    rows += [
      {**describe(e), 'completion': text, 'reward': reward if on else None}
      for e, text, reward, on in zip(repeated, found.texts, total, valid)
    ]
  means = component_means(parts)
  if means:
    rows = [{**row, 'components': part} for row, part in zip(rows, parts)]
  prefix = metric_prefix(name)
  rewards = [row['reward'] for row in rows if row['reward'] is not None]
  found = {
    **({'reward': mean_reward(rewards)} if scorer.weights else {}),
    'mean_length': float(np.mean(lengths)),
    'clipped_ratio': 1.0 - float(np.mean(ended)),
  }
  found |= means
  found |= {f'mismatch/{k}': float(v) for k, v in gaps.items()}
  completions = [row['completion'] for row in rows]
  measured = {} if reference is None else {REF_LOGPS: logps}
  found |= corpus_metrics(
    metrics, examples_of, completions, scorer.on_error, scorer.warn, measured
  )
  return {prefix + name: value for name, value in found.items()}, rows


def mean_reward(rewards: list[float]) -> float:
  """Mean of rewards; 0 of none."""
  return float(np.mean(rewards)) if rewards else 0.0


def components(scored: Scored) -> list[dict]:
  """Values {reward: float} of each row, of the rewards that apply to it."""
  values, applies, mask = jax.device_get(
    (scored.rewards, scored.applies, scored.rollout.mask)
  )
  sums = {k: np.where(mask, v, 0).sum(1).tolist() for k, v in values.items()}
  return [
    {k: v[b] for k, v in sums.items() if applies[k][b]}
    for b in range(len(mask))
  ]


def component_means(parts: list[dict]) -> dict:
  """Mean rewards/NAME/mean of each of several rewards, over the completions
  that it applies to; {} of a single one, which is the reward."""
  names = dict.fromkeys(name for part in parts for name in part)
  if len(names) < 2:
    return {}
  return {
    f'rewards/{name}/mean': float(
      np.mean([part[name] for part in parts if name in part])
    )
    for name in names
  }


def corpus_metrics(
  metrics,
  examples: list[dict],
  completions: list,
  on_error: str = 'raise',
  warn: Callable = lambda name, text: None,
  measured: dict | None = None,
) -> dict:
  """Metrics {name: float} of all completions together; see Evaluation.

  measured: further arguments {name: list of a value for each completion}.

  A metric that raises an exception, or gives no number, is a RewardError in one
  line; with another on_error it is left out, and `warn` is told.
  """
  names = dict.fromkeys(name for e in examples for name in e)
  columns = {name: [e.get(name) for e in examples] for name in names}
  prompts, found = columns.pop('prompt'), {}
  given = columns | {'prompts': prompts, 'completions': completions}
  given |= measured or {}
  for metric in metrics:
    name = get_name(metric)
    try:
      value = metric(**own_lists(accepted(metric).choose(given)))
      value = value if isinstance(value, dict) else {name: value}
      value = {k: float(v) for k, v in value.items()}
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


def credit_rows(
  last: StepBatch, batch, decode: Callable, prompts: int = 4
) -> list[dict]:
  """Rows for samples.jsonl that show credit: each chosen token with its
  log-prob, reward and advantage, of the prompts with the largest advantages.

  Args:
    last: the step's batch after its update.
    batch: collectors.Batch.
    decode: lists of ids -> texts.
  """
  examples, C = batch.examples, len(batch.examples)
  scored, advantage = jax.device_get(last)
  rollout, reward = scored.rollout, token_rewards(scored)
  largest = np.abs(advantage).reshape(C, -1).max(axis=1)
  G, rows, parts = len(rollout.tokens) // C, [], components(scored)
  for c in np.argsort(-largest, kind='stable')[:prompts]:
    for b in range(c * G, (c + 1) * G):
      chosen = rollout.mask[b]
      ids = rollout.tokens[b][chosen].tolist()
      extra = {k: v[b] for k, v in batch.extra.items() if b < len(v)}
      rows.append(
        {
          **describe(examples[c]),
          'completion': decode([ids])[0],
          'reward': float(reward[b].sum()),
          'components': parts[b],
          'tokens': decode([[t] for t in ids]),
          'logp': rollout.logp[b][chosen].tolist(),
          'rewards': reward[b][chosen].tolist(),
          'advantage': advantage[b][chosen].tolist(),
          **({'extra': extra} if extra else {}),
        }
      )
  return rows
