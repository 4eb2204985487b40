"""Task: data and rewards, the only thing that a user must make. No jax."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Caller(NamedTuple):
  """Program that runs: names the run directory, repeated by command.txt."""

  name: str  # of the experiment
  command: str
  task: str | None = None  # function that makes it, MODULE:NAME or FILE:NAME


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Evaluation of the policy on a data set while it trains.

  Metrics are named eval/NAME/reward and so on.
  """

  name: str
  data: Any
  """Records, as Task.train takes them."""
  rewards: Any = None
  """Rewards, as Task.rewards takes them; None: the task's; (): none."""
  every: int | None = None
  """Steps between evaluations; None: --eval_every."""
  samples: int = 1
  """Completions of each prompt."""
  greedy: bool = True
  """Takes the most likely tokens; False: samples as in training."""
  metrics: Sequence[Callable] = ()
  """Functions of all completions, never optimised:
  metric(prompts, completions, **columns) -> float | {name: float}. A list of a
  float or None for each completion, as a reward function's, is averaged. One
  that names ref_logps gets, for each completion, the list of its tokens'
  log-probs under the reference, the starting policy (rewards.perplexity)."""
  keep_samples: bool = False
  """Keeps all completions of every evaluation in samples.jsonl, and shows them
  by step in the report, as of canary prompts: Evaluation('canaries',
  [{'prompt': ...}], rewards=(), keep_samples=True)."""


@dataclasses.dataclass(frozen=True)
class Task:
  """Task: the prompts, and the rewards that the policy learns from.

  Task('couplets.jsonl', rhymes)
  Task(records, {rhymes: 1.0, short: 0.2}, held_out=100)
  """

  train: Any
  """Records with a "prompt" (text or messages): path of a jsonl or parquet
  file, hub:OWNER/NAME@REVISION:SPLIT, a datasets.Dataset, a list of dicts, or
  for endless data a function (seed, index) -> dict."""
  rewards: Any = None
  """A reward function, several, or {function: weight}; those marked
  @on_device are JAX functions of a rollout. A weight is a number, or a function
  of a TrainerState (rewards.ramp). Beside a --reward_model or an environment
  there may be none."""
  held_out: Any = 512
  """Records as above, or how many of the training ones to hold out."""
  eval_rewards: Any = None
  """Rewards of the held-out evaluation; None: those of training."""
  metrics: Sequence[Callable] = ()
  """Metrics of the held-out evaluation, see Evaluation."""
  greedy: bool = True
  """Takes the most likely tokens in the held-out evaluation; False: samples as
  in training."""
  answers: str | None = None
  """Column of right answers: where no model is given, a new policy learns them
  by supervision first; @on_device rewards read its tokens. With an environment
  it holds demonstrations, the `turns` of samples.jsonl: [{'observation': ...},
  {'action': ..., 'observation': ...}, ...]."""
  device_rewards: Any = None
  """The rewards as JAX functions, for --steps_per_call; None: `rewards`."""
  evaluations: Sequence[Evaluation] = ()
  """Evaluations on further data sets."""
  tokenizer: Callable | None = None
  """Tokenizer of a new model: () -> transformers tokenizer; None: of bytes."""
  description: str = ''
  """The data in words, for config.yaml and the model card."""
  reward_unit: str = ''
  """'%' where a reward is a share of right answers; for the report."""
  constraints: Any = None
  """Functions whose means are limited, never part of the reward: a function
  (its limit is --constraint 'NAME<=LIMIT'), several, {function: '<=0.01'} or
  {name: (function, '>=20')}. They are written as rewards are."""
  environment: Callable | None = None
  """Function that makes an environment, for one episode of several turns
  (environments/protocol.py): its class, or environments.maze(). Its reward is
  one of the rewards, of weight 1; `rewards` judge the whole episode."""
