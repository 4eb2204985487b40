"""Optimizer of a run, from its settings."""

import functools

import optax

from jaxrl_tok.run.build import Own
from jaxrl_tok.run.checks import check_warm_up
from jaxrl_tok.run.settings import Settings
from jaxrl_tok.step import optimizer as parts
from jaxrl_tok.step.guard import param_labels
from jaxrl_tok.types import Algorithm

LARGEST_RATE = 0.1  # of optimizers whose steps have a length of their own


def peak_learning_rate(settings: Settings):
  """Peak learning rate: as given, or by kind of policy."""
  given, model = settings.optimizer.learning_rate, settings.model
  if given is not None:
    return given
  if model.model is None:
    return 1e-3
  return 1e-4 if model.lora_rank or model.lora_adapter else 1e-5


def rate_warning(settings: Settings) -> str | None:
  """Warning of a learning rate that no policy survives; None for others."""
  f, rate = settings.optimizer, peak_learning_rate(settings)
  if rate <= LARGEST_RATE or f.optimizer == 'sgd':
    return None
  return (
    f'--learning_rate {rate:g} moves each parameter by about {rate:g} in a '
    f'step of {f.optimizer}, which few policies survive; 1e-6 to 1e-2 is '
    'usual, and --max_kl 10 ends a run that diverges'
  )


def make_chain(settings: Settings, peak, steps: int, warmup: int):
  """Optimizer of one group of parameters, float32; optimizer steps of the run
  and of its warm-up."""
  f = settings.optimizer
  end = 0.1 if f.min_lr_ratio is None else f.min_lr_ratio
  b2 = 0.95 if f.adam_b2 is None else f.adam_b2
  schedule = parts.make_schedule(f.lr_schedule, peak, steps, warmup, end)
  mask = None if f.weight_decay_all else parts.decay_mask
  clip = [optax.clip_by_global_norm(f.max_grad_norm)]
  decay = [optax.add_decayed_weights(f.weight_decay, mask)]
  return optax.chain(
    *(clip if f.max_grad_norm else []),
    parts.DIRECTIONS[f.optimizer](b2),
    *(decay if f.weight_decay else []),
    parts.scale_by_clock(schedule),
  )


def make_optimizer(
  settings: Settings, own: Own, algorithm: Algorithm
) -> optax.GradientTransformation:
  """Makes the optax chain of TrainState.trained, or takes the user's own.

  An update makes up to `passes.count` optimizer steps; the schedule counts
  those that are made, and is as long as max_steps full updates. A critic has a
  learning rate, moments, a norm and a clock of its own; the policy's begin
  after critic_warmup_steps. Raises ValueError for a warm-up that is longer than
  the run.
  """
  if own.optimizer is not None:
    return own.optimizer
  f, passes = settings.optimizer, algorithm.passes
  steps, warmup = settings.run.max_steps, f.lr_warmup_steps
  waits = passes.critic_warmup_steps if algorithm.value_loss is not None else 0
  check_warm_up(settings, waits)
  chain = functools.partial(make_chain, settings)
  warmup, peak = warmup * passes.count, peak_learning_rate(settings)
  policy = chain(peak, (steps - waits) * passes.count, warmup)
  if algorithm.value_loss is not None:
    rate = settings.algorithm.critic_learning_rate or peak
    both = {
      'policy': parts.after_steps(policy, waits) if waits else policy,
      'critic': chain(rate, steps * passes.count, warmup),
    }
    policy = optax.multi_transform(both, param_labels)
  return parts.in_float32(policy, settings.run.seed, f.moment_dtype)
