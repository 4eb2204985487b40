"""Progress of a run: what it has done, its best evaluation, when it stops."""

import dataclasses
import math
from collections.abc import Collection

BEST_METRIC = 'eval/reward'  # of the held-out data


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """Schedule of checkpoints and stops; 0: never."""

  max_steps: int = 1000
  save_every: int = 0  # and always at the end
  stop_at_reward: float | None = None  # held-out, greedy
  patience: int = 0  # evaluations without a better one
  max_nonfinite: int = 3  # updates in a row that are not finite
  reward_on_error: str = 'raise'  # see rewards.ON_ERROR
  best_metric: str = BEST_METRIC  # which evaluation is the best
  best_mode: str = 'max'  # or 'min'
  keep_best: bool = False  # saves a checkpoint of the best evaluation
  step_timeout: float = 0.0  # seconds of a step, see watch.Hang
  max_kl: float = 0.0  # see watch.Limits
  min_entropy: float = 0.0
  max_grad_ratio: float = 0.0
  divergence_steps: int = 3


@dataclasses.dataclass(frozen=True)
class Progress:
  """Progress of a run; saved beside the state as JSON.

  Tokens and calls are those of training, without evaluations.
  """

  step: int = 0
  num_tokens: int = 0  # prompt and completion tokens so far
  first_reward: float | None = None  # held-out, before the first step
  eval_reward: float | None = None  # held-out, the last evaluation
  best_value: float | None = None  # of best_metric, while training
  evals_since_best: int = 0
  evaluated: int = 0  # the last step whose evaluations are all done
  best_metric: str = BEST_METRIC
  best_step: int | None = None
  sampled_tokens: int = 0  # completion tokens, those of a greedy baseline too
  reward_calls: int = 0  # completions that rewards judged


def from_saved(saved: dict) -> Progress:
  """Progress of a checkpoint, also of an older version's."""
  found = {'evaluated': saved['step']} | saved
  found |= {'best_value': found.pop('best_reward', found.get('best_value'))}
  return Progress(**found)


def stop_reason(progress: Progress, config: LoopConfig) -> str | None:
  """Reason to end the run after this step, or None."""
  reached, held_out = config.stop_at_reward, progress.eval_reward
  if None not in (reached, held_out) and held_out >= reached:
    return f'held-out reward {held_out:.3f} reached {reached}'
  if config.patience and progress.evals_since_best >= config.patience:
    name = config.best_metric
    name = 'held-out reward' if name == BEST_METRIC else name
    return f'no better {name} in {config.patience} evaluations'
  if progress.step >= config.max_steps:
    return f'max_steps {config.max_steps}'
  return None


def after_evaluation(
  progress: Progress, metrics: dict, config: LoopConfig
) -> Progress:
  """Progress after an evaluation: the held-out reward, the best value of
  best_metric and its step, and the evaluations since. A value that is not
  finite is no better one; among equal ones the first is the best."""
  reward = metrics.get(BEST_METRIC, progress.eval_reward)
  progress = dataclasses.replace(progress, eval_reward=reward)
  value, best = metrics.get(config.best_metric), progress.best_value
  if value is None:  # another evaluation's
    return progress
  sign = 1 if config.best_mode == 'max' else -1
  if math.isfinite(value) and (best is None or sign * value > sign * best):
    return dataclasses.replace(
      progress, best_value=value, best_step=progress.step, evals_since_best=0
    )
  since = progress.evals_since_best + 1
  return dataclasses.replace(progress, evals_since_best=since)


def known_best(
  progress: Progress, config: LoopConfig, saved: Collection[int]
) -> tuple[Progress, str | None]:
  """Progress of a resumed run, without a best evaluation that is of another
  metric or, where it is kept, has no checkpoint: (progress, warning).

  saved: steps of the checkpoints on disk.
  """
  name, step = config.best_metric, progress.best_step
  before, line = progress.best_metric, None
  progress = dataclasses.replace(progress, best_metric=name)
  if before != name:
    line = f'the best evaluation by {before} is forgotten; {name} counts now'
  elif config.keep_best and step not in saved:
    line = 'the checkpoint of the best evaluation is not there; it is forgotten'
  if line is None or progress.best_value is None:
    return progress, None
  fresh = {'best_value': None, 'best_step': None, 'evals_since_best': 0}
  return dataclasses.replace(progress, **fresh), line
