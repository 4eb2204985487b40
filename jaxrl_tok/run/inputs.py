"""Inputs of a run: a task's records and rewards, opened and checked, and the
prompts made of them."""

import datetime
import functools
import json
from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple

import numpy as np
import yaml

from jaxrl_tok import data, rewards
from jaxrl_tok.credit.names import read_constraint
from jaxrl_tok.data.chat import asks_date
from jaxrl_tok.data.records import has_messages, select
from jaxrl_tok.report import mirror
from jaxrl_tok.report.logger import Logger
from jaxrl_tok.rewards.functions import check_callable
from jaxrl_tok.run.algorithm_settings import AlgorithmSettings
from jaxrl_tok.run.settings import DataSettings, Settings, with_values
from jaxrl_tok.run.task import Task
from jaxrl_tok.step import device_rewards
from jaxrl_tok.step.turns import REWARD as ENVIRONMENT

LONG = 512  # tokens of a prompt that may be long beside others
DEFAULT_LENGTH = 64  # tokens of a completion at most, by default


class Rewards(NamedTuple):
  """Reward functions of training or of an evaluation, on host and device."""

  host: dict  # {name: function}
  device: dict  # {name: function of JAX}
  weights: dict  # {name: float, or a function of TrainerState}, of both
  constraints: tuple = ()  # of names.Constraint

  def add(self, functions: dict) -> 'Rewards':
    """Rewards with further functions {name: f} of weight 0, which are measured
    alone."""
    is_device = device_rewards.is_on_device
    host = {k: f for k, f in functions.items() if not is_device(f)}
    device = {k: f for k, f in functions.items() if is_device(f)}
    return self._replace(
      host=self.host | host,
      device=self.device | device,
      weights=self.weights | dict.fromkeys(functions, 0.0),
    )


def is_empty(given) -> bool:
  """Tells rewards that name no function."""
  return given is None or (isinstance(given, list | tuple | dict) and not given)


def split_rewards(given, others: dict | None = None) -> Rewards:
  """Splits named reward functions into those of the host and the device. There
  may be none beside others: {name: weight} of rewards that no function of the
  task's gives."""
  is_device, others = device_rewards.is_on_device, others or {}
  functions, weights = {}, {}
  if not others or not is_empty(given):
    functions, weights = rewards.name_rewards(given, others)
  weights = weights | others
  return Rewards(
    {k: f for k, f in functions.items() if not is_device(f)},
    {k: f for k, f in functions.items() if is_device(f)},
    weights,
  )


def model_weight(settings: Settings) -> dict:
  """Weight {name: float} of the reward model; {} without one."""
  model, name = settings.model, device_rewards.REWARD_MODEL
  return {name: model.reward_model_weight} if model.reward_model else {}


def environment_weight(task: Task) -> dict:
  """Weight {name: 1} of the environment's reward; {} without one."""
  return {} if task.environment is None else {ENVIRONMENT: 1.0}


def check_on_host(task: Task, found: Rewards) -> Rewards:
  """Rewards, which beside an environment are all on the host. Raises ValueError
  for others."""
  if task.environment is not None and found.device:
    raise ValueError(
      'episodes of several turns cannot go with the @on_device reward '
      f'{next(iter(found.device))}: it reads one completion; write it for the '
      'host'
    )
  return found


def rewards_of_evaluation(given, task: Task, settings: Settings) -> Rewards:
  """Rewards of an evaluation: those `given`, where that is None the task's, or
  the reward model where the task has no other. An empty tuple is none."""
  played = environment_weight(task)
  if given is not None and is_empty(given) and not played:
    return Rewards({}, {}, {})
  if given is not None or not is_empty(task.rewards):
    given = task.rewards if given is None else given
    return check_on_host(task, split_rewards(given, played))
  return split_rewards((), model_weight(settings) | played)


def rewards_of(task: Task, settings: Settings) -> Rewards:
  """Rewards of training; with --steps_per_call those that are JAX functions.
  Raises ValueError where the task has none."""
  others, given = model_weight(settings), task.rewards
  if settings.run.steps_per_call and task.device_rewards is not None:
    given = task.device_rewards
  found = split_rewards(given, others | environment_weight(task))
  found = check_on_host(task, found)
  check_weights(found, task)
  found = with_constraints(task, settings, found)
  if settings.run.steps_per_call and found.host:
    raise ValueError(
      f'--steps_per_call needs rewards that are JAX functions, and '
      f'{", ".join(found.host)} is none; pass --steps_per_call 0, or mark it '
      '@on_device'
    )
  check_credit_split(settings.algorithm.credit_split, found)
  start = rewards.TrainerState(0, settings.run.max_steps)
  for name, weight in found.weights.items():
    rewards.weight_at(weight, name, start)
    if settings.run.steps_per_call and callable(weight):
      raise ValueError(
        f'the weight of reward {name} changes by step, which --steps_per_call '
        'cannot; pass --steps_per_call 0'
      )
  return found


def check_weights(found: Rewards, task: Task) -> None:
  """Refuses rewards whose weights are all 0, beside which no constraint is a
  reason to learn."""
  if task.constraints is None and not any(found.weights.values()):
    raise ValueError(
      f'every reward ({", ".join(found.weights)}) has the weight 0, so that '
      'nothing is to be learnt; give one of them another weight'
    )


def constraint_entries(given):
  """(name | None, function, limit as text | None) of each of Task.constraints;
  a pair in a list is (function, limit)."""
  if given is None:
    return
  if isinstance(given, dict):
    for key, value in given.items():
      named = isinstance(key, str)
      function, limit = key, value
      if named:
        pair = isinstance(value, tuple | list)
        function, limit = value if pair else (value, None)
      yield key if named else None, function, limit
    return
  for function in [given] if callable(given) else given:
    yield None, function, None


def constraint_functions(task: Task) -> tuple[dict, dict]:
  """({name: function}, {name: limit as text}) of a task's constraints. Raises
  ValueError for two of one name."""
  functions, limits = {}, {}
  for name, function, limit in constraint_entries(task.constraints):
    check_callable(function, 'a constraint')
    name = name or rewards.get_name(function)
    if name in functions:
      raise ValueError(
        f'two constraints are named {name}; give them names of their own, '
        "Task(constraints={'NAME': function})"
      )
    functions[name] = function
    if limit is not None:
      limits[name] = limit
  return functions, limits


def with_constraints(task: Task, settings: Settings, found: Rewards) -> Rewards:
  """Rewards with the task's constraints: those of --constraint, and the task's
  own limits of other names. Raises ValueError for a limit of nothing, and for
  a function without one."""
  functions, limits = constraint_functions(task)
  for name in functions.keys() & found.weights.keys():
    raise ValueError(
      f'a constraint and a reward are both named {name}; to limit the reward, '
      f"pass --constraint '{name}<=LIMIT' alone, else rename one"
    )
  asked = map(read_constraint, settings.algorithm.constraint)
  chosen = {c.name: c for c in asked}
  for name, limit in limits.items():
    chosen.setdefault(name, read_constraint(f'{name}{limit}'))
  known = [*functions, *found.weights]
  for name in chosen.keys() - set(known):
    raise ValueError(
      f"--constraint limits {name}, which is none of the task's constraints "
      f'and rewards ({", ".join(known)}); correct the name'
    )
  for name in functions.keys() - chosen.keys():
    raise ValueError(
      f"the constraint {name} has no limit; pass --constraint '{name}<=0.01', "
      f"or Task(constraints={{{name}: '<=0.01'}})"
    )
  limited, f = tuple(chosen.values()), settings.algorithm
  if limited and f.credit_split == 'constant':
    raise ValueError(
      '--credit_split constant replaces the numbers that constraints limit; '
      'leave one of them out'
    )
  for name in ('constraint_rate', 'constraint_damping'):
    if not limited and getattr(f, name) != getattr(AlgorithmSettings, name):
      raise ValueError(
        f'--{name} has no effect without a constraint; leave it out'
      )
  return found.add(functions)._replace(constraints=limited)


def check_credit_split(how: str, found: Rewards) -> None:
  """Refuses a split of token rewards where none can be: a function has to see
  a completion's tokens to give a number for each. make_split refuses what is
  known at the first batch only."""
  takes = [rewards.accepted(f) for f in found.host.values()]
  tokens = {'completion_ids', rewards.PIECES}
  if how == 'potential' or any(x.any_name or x.names & tokens for x in takes):
    return
  kind = 'of whole completions' if takes else 'that are JAX functions'
  raise ValueError(
    f'--credit_split {how} has no effect on rewards {kind}; leave it out, or '
    'pass a reward of rewards.potentials'
  )


def make_pieces(settings: Settings, model, *judged: Rewards) -> Callable:
  """Makes the function of completion_pieces; checks the tokenizer where a
  reward names them."""
  skip = not settings.run.keep_special_tokens
  decode = functools.partial(
    data.decode_all, model.tokenizer, skip_special_tokens=skip
  )
  pieces = data.make_pieces(model.tokenizer, decode, model.vocab_size, skip)
  functions = [f for found in judged for f in found.host.values()]
  if any(rewards.PIECES in rewards.accepted(f).names for f in functions):
    pieces([], [], [])
  return pieces


def renames(settings: Settings) -> dict[str, str]:
  """Columns {old: new} that --rename names."""
  return dict(pair.split('=') for pair in settings.data.rename)


def open_task(task: Task, settings: Settings) -> data.Split:
  """Opens training and held-out records, disjoint."""
  columns = renames(settings)
  opened = data.open_records(task.train, settings.run.seed, columns)
  count, held_out = settings.run.held_out, task.held_out
  if isinstance(held_out, Integral):
    return data.split(opened, count or held_out)
  held_out = data.open_records(held_out, settings.run.seed, columns)
  if count and held_out.num_records and count < held_out.num_records:
    held_out = select(held_out, np.arange(count))
  return data.split(opened, held_out)


def message_counts(logger: Logger, asked, split, train, held_out) -> None:
  """Prints how many prompts are held out, left out or cut; `asked` is the
  number that was to be held out, or None."""
  counts = split.counts
  if isinstance(asked, int) and counts['held_out'] < asked:
    logger.message(
      f'data: {counts["held_out"]:,} prompts are held out, not {asked:,}: '
      'all that were given, or a fifth of the different ones'
    )
  if counts['removed'] or counts['repeated']:
    logger.message(
      f'data: {counts["removed"]:,} training records have a held-out prompt '
      f'and are left out; {counts["repeated"]:,} held-out ones were repeated'
    )
  for found in (train, held_out):
    least, most = found.buckets[0], found.buckets[-1]
    if most >= LONG and most >= 8 * least:
      logger.warn(
        f'the longest {found.name} has {most:,} tokens, and most batches have '
        f'{least:,} at most: a step with it takes many times as long, and as '
        f'much memory; --max_prompt_length {found.buckets[-2]} --long_prompts '
        'drop leaves it out'
      )
    for what in ('dropped', 'cut'):
      if found.counts.get(what):
        logger.message(
          f'data: {found.counts[what]:,} of {found.counts["records"]:,} '
          f'{found.name}s are longer than --max_prompt_length and were {what}'
        )


def chat_of(settings: Settings) -> data.Chat:
  """Choices that prompts of messages are rendered with."""
  found = settings.data
  return data.Chat(json.loads(found.chat_template_kwargs), found.chat_date)


def with_chat_date(settings: Settings, tokenizer) -> Settings:
  """Fixes the date that a chat template asks for: the one given, that of the
  run to go on with, else today's."""
  run = settings.run
  if settings.data.chat_date is not None or not asks_date(tokenizer):
    return settings
  date = None
  if run.resume != 'never':
    file = mirror.local(run.output_dir) / 'config.yaml'
    begun = yaml.safe_load(file.read_text()) if file.is_file() else {}
    date = begun.get('chat_date')
  today = datetime.date.today().isoformat()
  return with_values(settings, {'chat_date': date or today})


def check_chat_used(given: DataSettings, sets) -> None:
  """Refuses choices of chats where no prompt is a list of messages."""
  for name in ('chat_template_kwargs', 'chat_date'):
    if getattr(given, name) == getattr(DataSettings, name):
      continue
    if not any(has_messages(found.records) for found in sets):
      raise ValueError(
        f'--{name} has no effect: no prompt is a list of messages; leave it out'
      )


def answer_ids(settings: Settings, model, answer) -> list[int]:
  """Ids of a right answer, its end token included unless it ends with a stop
  text. Raises ValueError for a stop text before its end."""
  ids = data.answer_ids(model.tokenizer, answer, model.end_tokens)
  decode = functools.partial(
    data.decode_all,
    model.tokenizer,
    skip_special_tokens=not settings.run.keep_special_tokens,
  )
  return data.end_at_stop(decode, ids, settings.sampling.stop)


def completion_length(task: Task, settings: Settings, model, split) -> int:
  """Length T of completions: as given, else that of the longest answer if a
  supervised start learns them, else DEFAULT_LENGTH."""
  given, column = settings.sampling.max_completion_length, task.answers
  new = model.directory is None and model.hf_config is not None
  learns = column is not None and new
  if not learns or split.train.num_records is None or task.environment:
    return given or DEFAULT_LENGTH
  need = 0
  for records in (split.train, split.held_out):
    for i, record in enumerate(records):
      if not isinstance(record.get(column), str):
        raise ValueError(
          f'{records.where(i)}: no {column!r} that is text; a supervised '
          'start needs an answer for each prompt, or pass --model'
        )
      need = max(need, len(answer_ids(settings, model, record[column])))
  if given is not None and given < need:
    raise ValueError(
      f'--max_completion_length {given} cannot hold an answer of {need - 1} '
      f'tokens and the end; pass --max_completion_length {need}'
    )
  return given or need


def prompt_set(
  settings: Settings, model, found: Rewards, records, task, T, name
):
  """Makes prompts of records, with the columns that device rewards read."""
  columns, first = None, records[0]
  rewards.check_functions(found.host, first)
  if found.device:
    columns = device_rewards.make_columns(
      found.device,
      first,
      task.answers,
      functools.partial(answer_ids, settings, model),
      T,
    )
  return data.prompt_set(
    records,
    model.tokenizer,
    model.vocab_size,
    settings.data.max_prompt_length,
    settings.data.long_prompts,
    columns=columns,
    name=name,
    num_prompts=settings.sampling.num_prompts,
    chat=chat_of(settings)._replace(opened=task.environment is None),
    whole=model.is_encoder_decoder,
  )
