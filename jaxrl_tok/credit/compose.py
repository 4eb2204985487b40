"""Composition of an Algorithm from a credit, a loss and an aggregation.

Every choice of an alias (algorithms.py) may be given another value:

  algorithms.grpo(clip_high=0.28, aggregate='token_mean')

A part may be a word of the tables below or a function of one's own:

  loss       (stats, trajectory) -> loss [T] | (loss [T], metrics {name: [T]})
  credit     (inputs, carries) -> advantage [B, T] | Advantage
  aggregate  (mask [B, T], valid [B]) -> weight [B, T]
  baseline   (returns [C, G, T], valid [C, G]) -> b | a Baseline
  scale      (whole returns [C, G], valid [C, G]) -> s [C, 1]
  multi_objective_aggregation
             (Scored, normalise) -> A [C, G, T], as advantages.py has them

One rule tells a loss, credit or aggregation from a maker of one: a function
whose first two parameters have no default is the part itself; any other is
called, and returns it. All further parameters are choices:

  def mine(stats, trajectory, power=2.0): ...
  algorithms.grpo(loss=mine, power=3.0)

A part that is replaced brings its own numbers. A choice that nothing reads is
refused: it would have no effect.
"""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from jaxrl_tok import masked
from jaxrl_tok.credit import advantages, losses, names, shaping
from jaxrl_tok.credit.choices import check_choices, num_passes
from jaxrl_tok.policy import check_array
from jaxrl_tok.types import (
  KL,
  Advantage,
  AdvantageInputs,
  Algorithm,
  Carry,
  Passes,
)

CREDITS = {name: getattr(advantages, name) for name in names.CREDITS}
# makers of a Baseline; `ema` alone has a number, its decay
BASELINES = {
  'none': advantages.no_baseline,
  'batch_mean': advantages.batch_mean,
  'group_mean': advantages.group_mean,
  'leave_one_out': advantages.leave_one_out,
  'ema': advantages.ema,
  'greedy': advantages.greedy,
}
SCALES = {
  'none': None,
  'group_std': advantages.group_std,
  'batch_std': advantages.batch_std,
}
MULTI_OBJECTIVE = {
  name: getattr(advantages, name) for name in names.MULTI_OBJECTIVE
}
LOSSES = {name: getattr(losses, name) for name in names.LOSSES}
AGGREGATIONS = {name: getattr(losses, name) for name in names.AGGREGATIONS}
WORDS = {
  'credit': CREDITS,
  'baseline': BASELINES,
  'scale': SCALES,
  'multi_objective_aggregation': MULTI_OBJECTIVE,
  'loss': LOSSES,
  'aggregate': AGGREGATIONS,
}
# the parts that may read choices, and what a function of one's own takes
_TAKES = {
  'credit': '(inputs, carries)',
  'loss': '(stats, trajectory)',
  'aggregate': '(mask, valid)',
}

# choices that no part reads, with the values of an alias that is silent
_GENERAL = {
  'max_length': None,  # T; what counts lengths in tokens needs it
  'whiten': False,  # the advantage, over the batch's chosen tokens
  'advantage_clip': None,
  'entropy_coef': 0.0,
  'kl': 'none',  # of names.KL_NAMES
  'beta': 0.0,
  'kl_target': None,  # nats a token; the coefficient then adapts to it
  'kl_horizon': 10_000.0,  # rows
  'ref_sync_steps': 0,  # steps between copies into the reference; 0: never
  'reference_dtype': None,  # of the reference's parameters; None: as trained
  'epochs': 1,
  'mini_batches': 1,
  'max_update_kl': None,
  'recompute_logp': False,
  'importance_cap': None,
  'importance_mode': None,  # of names.IMPORTANCE_MODES; None: token_truncate
  'dynamic_sampling_rounds': 0,
  'overlong_buffer': 0,
  'mask_truncated_completions': False,
  'mask_sync_steps': 0,
}
# choices that need a learned V
_CRITIC = {'value_coef': 0.5, 'value_clip': None, 'critic_warmup_steps': 0}


def lookup(kind: str, word: str, table: dict):
  """Returns table[word]; raises ValueError with a suggestion."""
  if word in table:
    return table[word]
  near = difflib.get_close_matches(word, table, 1)
  hint = f'; did you mean {near[0]}?' if near else ''
  raise ValueError(f'{kind} {word!r} is none of {", ".join(table)}{hint}')


def _word(value) -> Any:
  """Value for people: a part by its name, a number as it is."""
  if value is None or isinstance(value, str | int | float | bool):
    return value
  if isinstance(value, functools.partial):
    return _word(value.func)
  own = type(value).__name__
  return getattr(value, 'name', getattr(value, '__name__', own))


def described(algorithm: Algorithm) -> dict:
  """Settings of an algorithm in words and numbers, for config.yaml."""
  return {k: _word(v) for k, v in algorithm.settings.items()}


# --- parts and their choices -------------------------------------------------


def _parameters(part: Callable) -> tuple[bool, dict]:
  """Returns whether it is the part itself, by the rule of the module's
  docstring, and {choice that it reads: its default or `empty`}."""
  found = [
    p
    for p in inspect.signature(part).parameters.values()
    if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
  ]
  first = found[:2]
  itself = len(first) == 2 and all(p.default is p.empty for p in first)
  return itself, {p.name: p.default for p in found[2 if itself else 0 :]}


def _make(part: Callable, choices: dict) -> Callable:
  """Part itself with its choices, or the result of its maker."""
  itself, reads = _parameters(part)
  given = {k: choices[k] for k in reads}
  return functools.partial(part, **given) if itself else part(**given)


def _is_learned(own: dict, changes: dict) -> bool:
  """Whether the credit reads a learned V: GAE and V-trace do; one of the
  user's own does where it takes their place or comes with a critic's choice."""
  credit = changes.get('credit', own['credit'])
  if credit in CREDITS.values():
    return credit in advantages.LEARNED
  return own['credit'] in advantages.LEARNED or not changes.keys().isdisjoint(
    _CRITIC
  )


def _from_word(choice: str, value):
  """Part that a word names; any other value as it is."""
  if choice not in WORDS or not isinstance(value, str):
    return value
  part = lookup(choice, value, WORDS[choice])
  return part() if choice == 'baseline' else part


def resolved(name: str, own: dict, changes: dict) -> dict:
  """Every choice of an algorithm: a change, else the alias's `own`, else the
  default. Raises ValueError for a change that nothing reads and for a choice
  that is missing."""
  changes = {k: _from_word(k, v) for k, v in changes.items()}
  if changes.get('baseline') is not None:
    changes['baseline'] = advantages.as_baseline(changes['baseline'])
  found = _GENERAL | (_CRITIC if _is_learned(own, changes) else {})
  found |= {k: own[k] for k in found.keys() & own.keys()}
  needed = []
  for part, takes in _TAKES.items():
    chosen = changes.get(part, own[part])
    if not callable(chosen):
      raise ValueError(
        f'{part} {chosen!r} is no function; give one of {takes}, or '
        + ', '.join(WORDS[part])
      )
    numbers = {}
    for choice, default in _parameters(chosen)[1].items():
      missing = default is inspect.Parameter.empty
      numbers[choice] = None if missing else default
      needed += [(part, chosen, choice)] if missing else []
    if chosen is own[part]:
      numbers |= {k: own[k] for k in numbers.keys() & own.keys()}
    found |= {part: chosen, **numbers}
  for choice in changes.keys() - found.keys():
    raise ValueError(
      f'{choice} has no effect on {name}: neither its credit '
      f'{_word(found["credit"])} nor its loss {_word(found["loss"])} '
      f'reads it; leave it out'
    )
  found |= changes
  for part, chosen, choice in needed:
    if found[choice] is None:
      known = chosen in WORDS[part].values()
      raise ValueError(
        f'{name} with the {part} {_word(chosen)} needs a {choice}; give '
        f'{choice}' + ('' if known else f', or a function of {_TAKES[part]}')
      )
  return found


# --- composition -------------------------------------------------------------


def _has_critic(c: dict) -> bool:
  """Whether a V is learnt: only then does an algorithm have these choices."""
  return _CRITIC.keys() <= c.keys()


def _advantage(c: dict) -> Callable:
  """Algorithm.advantage: the credit, with what shapes and finishes it."""
  credit, word = shaping.by_seat(_make(c['credit'], c)), _word(c['credit'])

  def checked(inputs: AdvantageInputs, carries: dict) -> Advantage:
    out = credit(inputs, carries)
    out = out if isinstance(out, Advantage) else Advantage(out)
    B, T = inputs.mask.shape
    check_array(f'credit {word}', out.advantage, float, B=B, T=T)
    if _has_critic(c) and out.value_target is None:
      raise ValueError(
        f'credit {word} gave a critic nothing to learn; return '
        'Advantage(advantage, value_target)'
      )
    found = masked.fill(out.advantage, inputs.mask)
    return out._replace(advantage=found)

  found = checked
  if c['overlong_buffer']:
    found = shaping.shaped(found, c['max_length'], c['overlong_buffer'])
  size = advantages.group_size(c.get('baseline'), c.get('scale'))
  found = shaping.finished(found, c['whiten'], c['advantage_clip'], size)
  if c['mask_truncated_completions']:
    found = shaping.without_truncated(found)
  return found


def _loss(c: dict) -> Callable:
  """Algorithm.loss, with its weights and its entropy bonus."""
  found = losses.with_metrics(_make(c['loss'], c), _word(c['loss']))
  if c['importance_cap'] is not None:
    mode = c['importance_mode'] or names.IMPORTANCE_MODES[0]
    found = losses.corrected(found, c['importance_cap'], mode)
  if c['entropy_coef']:
    found = losses.with_entropy(found, c['entropy_coef'])
  return found


def _aggregate(c: dict) -> Callable:
  """Algorithm.aggregate, checked."""
  weigh, word = _make(c['aggregate'], c), _word(c['aggregate'])

  def aggregate(mask, valid):
    weight = weigh(mask, valid)
    B, T = mask.shape
    check_array(f'aggregation {word}', weight, float, B=B, T=T)
    return weight

  return aggregate


def _carries(c: dict) -> dict[str, Carry]:
  """Values that move between updates."""
  baseline = c.get('baseline')
  found = {} if baseline is None else dict(baseline.carries)
  if c['kl'] != 'none':
    found['kl_coef'] = (
      losses.constant(c['beta'])
      if c['kl_target'] is None
      else losses.adaptive_kl(c['beta'], c['kl_target'], c['kl_horizon'])
    )
    found['reference'] = losses.reference(
      c['ref_sync_steps'], c['reference_dtype']
    )
  if c['mask_sync_steps']:
    found['mask_policy'] = losses.slow_copy(c['mask_sync_steps'])
  return found


def _old_logp(c: dict) -> str:
  """Passes.old_logp. V-trace is about how far the policy is from the sampler,
  so its old log-probs are the policy's own."""
  if c['recompute_logp'] or c['credit'] is advantages.vtrace:
    return 'recomputed'
  return 'sampler' if num_passes(c) > 1 else 'current'


def compose(name: str, own: dict, changes: dict) -> Algorithm:
  """Makes an Algorithm of an alias's `own` choices and the caller's `changes`.

  Raises ValueError, with the cure, for what cannot be or has no effect.
  """
  c = resolved(name, own, changes)
  check_choices(name, c)
  learned = _has_critic(c)
  baseline = c.get('baseline')
  return Algorithm(
    name=name,
    advantage=_advantage(c),
    loss=_loss(c),
    aggregate=_aggregate(c),
    value_loss=(
      losses.value_error(c['value_coef'], c['value_clip']) if learned else None
    ),
    kl=None if c['kl'] == 'none' else KL(c['kl'], c['beta']),
    carries=_carries(c),
    passes=Passes(
      epochs=c['epochs'],
      mini_batches=c['mini_batches'],
      max_update_kl=c['max_update_kl'],
      old_logp=_old_logp(c),
      critic_warmup_steps=c.get('critic_warmup_steps', 0),
    ),
    flat_without_advantage=(
      c['loss'] in losses.FLAT_WITHOUT_ADVANTAGE
      and not learned
      and not c['entropy_coef']
      and c['kl'] == 'none'
    ),
    greedy=baseline is not None and baseline.greedy,
    min_group=advantages.group_size(baseline, c.get('scale')),
    dynamic_sampling_rounds=c['dynamic_sampling_rounds'],
    settings=c,
  )
