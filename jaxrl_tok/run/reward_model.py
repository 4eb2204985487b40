"""Reward models: a classifier of one label, fitted to pairs of completions.

1. `prepare` opens the model and the pairs, and checks both.
2. `learn` fits it by the loop of warm starts (fit.py).
3. `finish` writes export/, which --reward_model opens, and the numbers.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.table

from jaxrl_tok import data, mesh_spec, sharding
from jaxrl_tok.data.pairs import longest
from jaxrl_tok.hub import directory
from jaxrl_tok.hub.trainable import Trainable, with_head
from jaxrl_tok.models import kernels
from jaxrl_tok.report.charts import figure
from jaxrl_tok.report.files import atomic_write
from jaxrl_tok.report.logger import Logger
from jaxrl_tok.run import cache, models, record
from jaxrl_tok.run.fit import Plan, fit
from jaxrl_tok.run.inputs import answer_ids, chat_of, with_chat_date
from jaxrl_tok.run.optimizer import peak_learning_rate
from jaxrl_tok.run.pair_metrics import pair_metrics, reliability
from jaxrl_tok.run.settings import Settings, flatten
from jaxrl_tok.run.task import Caller
from jaxrl_tok.step.device_rewards import reward_model
from jaxrl_tok.step.supervised import answers_as_rollout, pair_loss

TRUE_MARGIN = 'true_margin'  # column of pairs whose true preference is known


class PairSettings(NamedTuple):
  """Choices of the loss, see supervised.pair_loss."""

  center: float = 0.01
  prefixes: float = 0.1


class PairSetup(NamedTuple):
  """Fit of a reward model, prepared."""

  caller: Caller
  settings: Settings
  pairs: PairSettings
  mesh: Any
  model: Any  # hub.model.Model, a classifier
  trainable: Trainable
  network: Any  # Policy
  train: data.PromptSet
  held_out: data.PromptSet
  max_length: int  # T
  logger: Logger


class Fitted(NamedTuple):
  """Reward model that was fitted."""

  out: Path  # directory that --reward_model opens
  metrics: dict  # on held-out pairs
  reliability: list  # see pair_metrics.reliability
  margins: np.ndarray  # of the held-out pairs
  steps: int


def open_classifier(settings: Settings, tokenizer):
  """Model of --model, or a random one, with a score in place of its logits."""
  name = settings.model.model
  if name is None:
    found = models.random_model(settings.size, tokenizer())
  else:
    found = directory.open_model(name, settings.model.revision)
  return found.as_classifier()


def make_trainable(settings: Settings, model) -> Trainable:
  """Trainable of all parameters, or of adapters and the score's head."""
  found = models.make_trainable(settings, model)
  adapted = models.lora_config(settings) is not None
  return with_head(found) if adapted else found


def prompts_of(settings: Settings, model, records, name: str) -> data.PromptSet:
  """Prompts of pairs."""
  found = settings.data
  return data.prompt_set(
    records,
    model.tokenizer,
    model.vocab_size,
    found.max_prompt_length,
    found.long_prompts,
    name=name,
    num_prompts=settings.sampling.num_prompts,
    chat=chat_of(settings),
  )


def prepare(
  pairs: list[dict],
  held_out,
  settings: Settings,
  caller: Caller,
  choices: PairSettings = PairSettings(),  # noqa: B008  a record
  tokenizer=data.byte_tokenizer,
) -> PairSetup:
  """Prepares a fit.

  Args:
    pairs: as data.pairs.read_pairs makes them.
    held_out: pairs, or how many of them to hold out; no prompt is on both
      sides.
    tokenizer: () -> tokenizer of a new model.

  Raises ValueError or OSError, in one line.
  """
  cache.keep_programs()
  sharding.split_cpu(settings.model.cpu_devices)
  auto = settings.model.mesh == mesh_spec.AUTO
  mesh = sharding.make_mesh(mesh_spec.DEFAULT if auto else settings.model.mesh)
  shards, n = sharding.row_shards(mesh), settings.sampling.num_prompts
  if n % shards:
    raise ValueError(
      f'--num_prompts {n} pairs cannot be shared equally by the {shards} '
      f'devices of data x fsdp; pass --num_prompts {-(-n // shards) * shards}'
    )
  model = open_classifier(settings, tokenizer)
  settings = with_chat_date(settings, model.tokenizer)
  split = data.split(data.open_records(pairs), held_out)
  train = prompts_of(settings, model, split.train, 'prompt of a pair')
  kept = prompts_of(settings, model, split.held_out, 'held-out prompt')
  encode = functools.partial(answer_ids, settings, model)
  T = settings.sampling.max_completion_length or max(
    longest(records, encode) for records in (split.train, split.held_out)
  )
  P = max(train.buckets[-1], kept.buckets[-1])
  models.check_context(model, P, T)
  f = settings.model
  dtype = f.dtype
  if dtype == 'auto':
    dtype = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  scan = {'auto': None, 'true': True, 'false': False}[f.scan_layers]
  trainable = make_trainable(settings, model)
  network = model.make_policy(
    jnp.dtype(dtype),
    'none' if f.remat == 'auto' else f.remat,
    kernels.choose(f.attention),
    scan,
  )
  return PairSetup(
    caller,
    settings,
    choices,
    mesh,
    model,
    trainable,
    network._replace(merge_params=trainable.merge),
    train,
    kept,
    T,
    Logger(),
  )


# --- batches -----------------------------------------------------------------


def completions_of(setup: PairSetup, examples: list[dict]) -> tuple:
  """Completions of pairs, (tokens int32 [2n, T], mask bool [2n, T]): each
  chosen one before its rejected one; longer ones are cut as the sampler cuts
  them, without an end."""
  T = setup.max_length
  tokens = np.full((2 * len(examples), T), setup.model.pad_token, np.int32)
  mask = np.zeros(tokens.shape, bool)
  texts = [e[name] for e in examples for name in ('chosen', 'rejected')]
  for row, text in enumerate(texts):
    ids = answer_ids(setup.settings, setup.model, text)[:T]
    tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
  return tokens, mask


def batch_at(setup: PairSetup, number: int) -> tuple:
  """Batch of a step, as supervised.pair_loss takes it."""
  n = setup.settings.sampling.num_prompts
  examples, prompts, _ = data.batch_at(
    setup.train, setup.settings.run.seed, number * n, n
  )
  more = setup.train.buckets[-1] - prompts.tokens.shape[1]
  prompts = prompts._replace(tokens=np.pad(prompts.tokens, ((0, 0), (0, more))))
  margin = np.array([e['margin'] for e in examples], np.float32)
  batch = prompts, *completions_of(setup, examples), margin
  return sharding.put_rows(setup.mesh, batch)


def make_judge(setup: PairSetup, frozen):
  """Returns margins(trained) -> float [n] of the held-out pairs."""
  n, held_out = setup.settings.sampling.num_prompts, setup.held_out
  reward = reward_model(setup.network)
  records, batches = list(held_out.records), []
  for start in range(0, len(records), n):
    some = [records[i % len(records)] for i in range(start, start + n)]
    prompts, _ = held_out.batch(some, held_out.buckets[-1])
    batches.append((prompts, *completions_of(setup, some)))

  @jax.jit
  def scores(trained, frozen, prompts, tokens, mask):
    params = setup.network.merge_params(trained, frozen)
    rollout = answers_as_rollout(prompts, tokens, mask)
    return reward(params, rollout).sum(1).reshape(-1, 2)

  def margins(trained) -> np.ndarray:
    found = [
      jax.device_get(
        scores(trained, frozen, *sharding.put_rows(setup.mesh, batch))
      )
      for batch in batches
    ]
    chosen, rejected = np.concatenate(found)[: len(records)].T
    return chosen - rejected

  return margins


def truth(held_out: data.PromptSet) -> dict:
  """Metrics {'truth/...'} of the true preference, where the pairs have it in
  the column true_margin: no model can know more."""
  margins = [r.get(TRUE_MARGIN) for r in held_out.records]
  if None in margins:
    return {}
  return {f'truth/{k}': v for k, v in pair_metrics(margins).items()}


# --- the fit -----------------------------------------------------------------


def learn(setup: PairSetup):
  """Fits the model: (trained, frozen, steps, margins of held-out pairs). Must
  run under jax.set_mesh."""
  run = setup.settings.run
  trained, frozen = setup.trainable.load(setup.mesh)
  margins = make_judge(setup, frozen)

  def evaluate(trained) -> dict:
    found = pair_metrics(margins(trained))
    return {f'eval/{name}': value for name, value in found.items()}

  trained, steps, _ = fit(
    pair_loss(setup.network, *setup.pairs),
    trained,
    frozen,
    functools.partial(batch_at, setup),
    evaluate,
    Plan(
      name='reward model',
      phase='eval',
      watched='eval/accuracy',
      max_steps=run.max_steps,
      learning_rate=peak_learning_rate(setup.settings),
      check_every=run.eval_every or run.max_steps,
    ),
    setup.network.partition_rules,
    setup.logger,
  )
  return trained, frozen, steps, margins(trained)


def run(setup: PairSetup) -> Fitted:
  """Fits a reward model, writes its directory and shows its numbers."""
  run_dir = record.claim_output_dir(
    setup.settings.run, setup.caller.name, resumable=False
  )
  described = flatten(setup.settings) | setup.pairs._asdict()
  atomic_write(run_dir / 'config.yaml', record.to_yaml(described))
  atomic_write(run_dir / 'command.txt', setup.caller.command + '\n')
  logger = Logger(run_dir, setup.settings.run.report_to)
  setup = setup._replace(logger=logger)
  logger.message(f'run directory: {run_dir}')
  with jax.set_mesh(setup.mesh):
    trained, frozen, steps, margins = learn(setup)
    found = pair_metrics(margins) | truth(setup.held_out)
    out = setup.trainable.export(run_dir, trained, frozen, card(setup, found))
  fitted = Fitted(out, found, reliability(margins), margins, steps)
  finish(setup, run_dir, fitted)
  return fitted


def card(setup: PairSetup, metrics: dict) -> dict:
  """Fields of the model card."""
  count = len(setup.train.records)
  return {
    'title': f'{setup.caller.name} reward model',
    'kind': 'reward model',
    'base_model': setup.model.origin if setup.model.directory else None,
    'data': f'{count:,} pairs of completions',
    'algorithm': 'Bradley-Terry',
    'metrics': {name: figure(value) for name, value in metrics.items()},
  }


def finish(setup: PairSetup, run_dir: Path, fitted: Fitted) -> None:
  """Writes reward_model.json and prints the numbers."""
  found = {
    'steps': fitted.steps,
    'held_out_pairs': len(fitted.margins),
    'metrics': fitted.metrics,
    'reliability': fitted.reliability,
  }
  atomic_write(
    run_dir / 'reward_model.json', json.dumps(found, indent=2) + '\n'
  )
  logger = setup.logger
  logger.close()
  title = f'{len(fitted.margins)} held-out pairs by confidence'
  table = rich.table.Table('said', 'pairs', 'confidence', 'right', title=title)
  for row in fitted.reliability:
    said = f'{row["low"]:.2f} to {row["high"]:.2f}'
    shares = (f'{row[k]:.3f}' for k in ('confidence', 'accuracy'))
    table.add_row(said, str(row['pairs']), *shares)
  logger.console.print(table)
  for name, value in fitted.metrics.items():
    logger.message(f'{name}: {figure(value)}')
  logger.message(f'reward model: {fitted.out}; pass it as --reward_model')
