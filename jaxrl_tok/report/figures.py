"""Figures of a run's report: which curves of its metrics are drawn."""

import math
import re
from typing import NamedTuple

from markupsafe import Markup

from jaxrl_tok.report.charts import COLOURS, Curve, Points, chart, smooth, thin
from jaxrl_tok.report.evaluated import REWARD
from jaxrl_tok.report.files import number

PANELS = (  # phase, metric, heading, unit
  ('train', 'entropy', 'Entropy', 'nats per token'),
  ('train', 'kl', 'KL to the reference', 'nats'),
  ('train', 'surrogate', 'Surrogate loss', ''),
  ('train', 'grad_norm', 'Gradient norm', ''),
  ('train', 'clip_ratio/region_mean', 'Clipped ratios', 'fraction'),
  ('train', 'update_kl', 'KL within an update', 'nats'),
  ('train', 'explained_variance', 'Variance that the critic explains', ''),
  ('train', 'completions/mean_length', 'Completion length', 'tokens, mean'),
  ('train', 'tokens_per_second', 'Speed', 'tokens per second'),
  ('train', 'frac_reward_zero_std', 'Groups without variance', 'fraction'),
  ('train', 'sampler_logp_gap', 'Sampler log-prob gap', 'nats'),
  ('eval', 'eval/mismatch/kl', 'KL of sampler and gradient', 'nats per token'),
  ('warm_start', 'loss', 'Warm-start loss', 'cross-entropy'),
)
MOST_PANELS = 30
HELD_OUT = 'held-out'  # name of the evaluation whose metrics have none


def curve(metrics: list[dict], phase: str, name: str) -> Points:
  """Points (step, value) in order of step; the last of a repeated step wins."""
  points = {}
  for row in metrics:
    if row.get('phase') == phase and name in row:
      points[number(row.get('step'))] = number(row[name])
  found = [(x, y) for x, y in points.items() if None not in (x, y)]
  return sorted(found)


def metric_names(metrics: list[dict], phase: str) -> list[str]:
  """Names that occur in a phase, in order of appearance."""
  rows = [row for row in metrics if row.get('phase') == phase]
  return list(dict.fromkeys(name for row in rows for name in row))


class Axis(NamedTuple):
  """Quantity that the reward is drawn over."""

  total: str | None  # metric of training steps that has it; None: the step
  name: str
  caption: str


AXES = (
  Axis(None, 'step', 'training step'),
  Axis('sampled_tokens', 'sampled tokens', 'tokens sampled in training'),
  Axis('reward_calls', 'reward calls', 'completions that rewards judged'),
)


def totals(metrics: list[dict], axis: Axis) -> dict[float, float] | None:
  """Place on an axis {step: total}; None where the run did not record it."""
  if axis.total is None:
    return {}
  found = dict(curve(metrics, 'train', axis.total))
  return {0.0: 0.0} | found if found else None


def over(points: Points, axis: Axis, places: dict[float, float]) -> Points:
  """Points by step, moved to an axis; steps without a place are left out."""
  if axis.total is None:
    return points
  return [(places[x], y) for x, y in points if x in places]


def evaluation_rewards(
  metrics: list[dict], ending: str = ''
) -> dict[str, Points]:
  """Reward of every evaluation: eval/reward, eval/NAME/reward; ending: of its
  interval, '_low' or '_high'."""
  found = {}
  for name in metric_names(metrics, 'eval'):
    match = re.fullmatch(rf'eval/(?:(.+)/)?reward{ending}', name)
    points = curve(metrics, 'eval', name) if match else []
    if points:
      found[match[1] or HELD_OUT] = points
  return found


def reward_curves(metrics: list[dict], axis: Axis, places: dict) -> list[Curve]:
  """Curves of the reward: each step, its moving mean, every evaluation with its
  interval."""

  def at(points: Points) -> Points:
    return over(points, axis, places)

  reward = at(curve(metrics, 'train', 'reward'))
  half, most = max(2, len(reward) // 30), 400
  runs = math.ceil(len(reward) / most)
  each = 'each step' if runs <= 1 else f'means of {runs} steps'
  mean = f'moving mean of {2 * half + 1} steps'
  colours = COLOURS[1:]
  low, high = (evaluation_rewards(metrics, end) for end in ('_low', '_high'))
  return [
    Curve(
      f'training reward, {each}', thin(reward, most), width=1.2, opacity=0.5
    ),
    Curve(mean, thin(smooth(reward, half), most), end='train'),
    *(
      Curve(
        f'{name} reward' if name == HELD_OUT else name,
        thin(at(points)),
        colours[i % len(colours)],
        dots=True,
        end=name if len(name) <= 10 else f'{name[:9]}…',
        band=(thin(at(low[name])), thin(at(high[name])))
        if name in low and name in high
        else None,
      )
      for i, (name, points) in enumerate(evaluation_rewards(metrics).items())
    ),
  ]


def reward_pictures(metrics: list[dict], unit: str = '') -> list[dict]:
  """Pictures of the reward in training and in every evaluation, over steps and
  the other axes that the run recorded: name of the axis, svg."""
  found = []
  for axis in AXES:
    places = totals(metrics, axis)
    if places is not None:
      drawn = chart(
        reward_curves(metrics, axis, places),
        f'Training reward and held-out reward by {axis.name}',
        (920, 340),
        True,
        unit,
        axis.caption,
        axis.name,
      )
      found.append({'axis': axis.name, 'svg': Markup(drawn)})
  return found


def more_panels(metrics: list[dict]) -> list[tuple]:
  """Panels of metrics that a task names: rewards, numbers of evaluations."""
  train, held_out = (metric_names(metrics, p) for p in ('train', 'eval'))
  rewards = [m for n in train if (m := re.fullmatch('rewards/(.+)/mean', n))]
  found = [('train', m[0], m[1], 'reward, mean') for m in rewards]
  found = found if len(found) > 1 else []  # one is drawn above
  for name in sorted(held_out, key=lambda n: 'rewards' not in n.split('/')):
    parts = name.split('/')
    elsewhere = {'mismatch', 'audit'}.intersection(parts[:-1])
    drawn = parts[-1] in REWARD or elsewhere
    if parts[0] != 'eval' or drawn:
      continue
    reward = re.fullmatch('eval/(?:(.+?)/)?rewards/(.+)/mean', name)
    if reward:
      unit = f'{reward[1] or HELD_OUT}, reward, mean'
      found.append(('eval', name, reward[2], unit))
    else:
      evaluation = '/'.join(parts[1:-1]) or HELD_OUT
      found.append(('eval', name, parts[-1].replace('_', ' '), evaluation))
  return found


def panels(metrics: list[dict]) -> list[dict]:
  """Small pictures of all other metrics: heading, unit, svg, and whether they
  show the policy by its evaluations and its KL, or how training goes."""
  shown = []
  for phase, name, heading, unit in (*more_panels(metrics), *PANELS):
    points = thin(curve(metrics, phase, name), 300)
    if points:
      drawn = chart(
        [Curve(name, points, width=1.6, end='')],
        f'{heading} by step',
        (300, 150),
      )
      shown.append(
        {
          'heading': heading,
          'unit': unit,
          'svg': Markup(drawn),
          'of_policy': phase == 'eval' or name == 'kl',
        }
      )
  return shown[:MOST_PANELS]
