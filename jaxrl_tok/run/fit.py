"""Supervised fitting: one loop for all that is learnt from right answers,
whatever the loss; warm starts and reward models use it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from jaxrl_tok import sharding
from jaxrl_tok.report.logger import Logger
from jaxrl_tok.step.compile import QUICKLY
from jaxrl_tok.step.supervised import make_supervised_step


class Plan(NamedTuple):
  """Length and learning rate of a fit."""

  name: str  # for the console
  phase: str  # of its rows in metrics.jsonl
  watched: str  # the metric that is shown, and ends the fit
  max_steps: int
  learning_rate: float  # peak
  check_every: int  # steps between evaluations
  stop_at: float = math.inf  # value of the watched metric that ends it


def make_optimizer(plan: Plan) -> optax.GradientTransformation:
  """Makes Adam with clipped gradients, a short warm-up and a cosine to a tenth
  of the peak."""
  last, peak = plan.max_steps, plan.learning_rate
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, peak, min(50, last // 4), last, 0.1 * peak
  )
  return optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0)
  )


def fit(
  loss: Callable,
  trained,
  frozen,
  batch_at: Callable,
  evaluate: Callable,
  plan: Plan,
  rules,
  logger: Logger,
):
  """Lowers a loss, until the watched metric reaches stop_at or for max_steps.

  Args:
    loss: (trained, frozen, *batch) -> float32 [], see step/supervised.py.
    trained: parameters, placed; their memory is taken.
    frozen: parameters that stay, or None.
    batch_at: number of the step -> batch, a tuple of arrays.
    evaluate: trained -> metrics {name: float} on held-out data.
    rules: partition rules of the trained parameters.

  Returns (trained, steps made, metrics of the last evaluation). Must run under
  jax.set_mesh.
  """
  optimizer, last = make_optimizer(plan), plan.max_steps
  opt_state, _ = sharding.born_sharded(
    optimizer.init,
    jax.sharding.get_mesh(),
    rules,
    trained,
    compiler_options=QUICKLY,
  )
  step = jax.jit(make_supervised_step(loss, optimizer), donate_argnums=(0, 1))
  with logger.doing(f'compiling the {plan.name}'):
    step = step.lower(trained, opt_state, frozen, *batch_at(0)).compile()
    found = evaluate(trained)
  with logger.bar(plan.name, last) as show:
    for number in range(last):
      trained, opt_state, value = step(
        trained, opt_state, frozen, *batch_at(number)
      )
      done = number + 1
      if done % plan.check_every and done < last:
        continue
      found = evaluate(trained)
      logger.metrics(plan.phase, done, {'loss': value, **found})
      score = found[plan.watched]
      show(done, f'loss {float(value):.3f}  held-out {score:.3f}')
      if score >= plan.stop_at:
        break
  return trained, done, found
