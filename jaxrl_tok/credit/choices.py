"""Choices of an algorithm that cannot be, or have no effect, each with its
cure."""

from collections.abc import Callable

from jaxrl_tok.credit import advantages, losses, names


def _outside_unit(choice: str) -> Callable:
  return lambda c: not 0 <= c.get(choice, 1.0) <= 1


def _empty_clip(c: dict) -> bool:
  if not {'clip_low', 'clip_high'} <= c.keys():
    return False
  low, high = c['clip_low'], c['clip_high']
  return not (0 <= low < 1 and high >= 0 and low + high > 0)


def _empty_cap(c: dict) -> bool:
  bounds = 'ratio_floor', 'ratio_cap'
  if not c.keys() >= set(bounds):
    return False
  floor, cap = (c[bound] for bound in bounds)
  return not 0 <= floor < cap


def normalizes_each(c: dict) -> bool:
  """Tells whether these choices normalise each reward by itself."""
  chosen = c.get('multi_objective_aggregation')
  return chosen is advantages.normalize_then_sum


def num_passes(c: dict) -> int:
  """Number of optimizer steps that these choices make of a rollout."""
  return c['epochs'] * c['mini_batches']


# (choices -> whether they are refused, the fact and the cure)
_REFUSED = (
  (_outside_unit('gamma'), 'gamma {gamma} is outside [0, 1]'),
  (
    lambda c: c.get('discount', 'token') not in names.DISCOUNTS,
    'discount {discount!r} is none of ' + ', '.join(names.DISCOUNTS),
  ),
  (_outside_unit('gae_lambda'), 'gae_lambda {gae_lambda} is outside [0, 1]'),
  (
    _empty_clip,
    'clip_low {clip_low} and clip_high {clip_high} leave the ratio an empty or '
    'impossible range; pass 0 <= clip_low < 1 and clip_high >= 0, not both 0',
  ),
  (
    lambda c: c.get('dual_clip') is not None and c['dual_clip'] <= 1,
    'dual_clip {dual_clip} must be above 1',
  ),
  (
    _empty_cap,
    'ratio_floor {ratio_floor} and ratio_cap {ratio_cap} leave an empty range',
  ),
  (
    lambda c: (c['kl'] == 'none') != (c['beta'] == 0),
    'kl {kl} with beta {beta} has no effect; pass both '
    '--kl reward|reverse|forward and --beta, or neither',
  ),
  (
    lambda c: c['kl_target'] is not None and c['kl'] == 'none',
    'kl_target steers a coefficient; pass --kl and --beta, its first value',
  ),
  (
    lambda c: c['ref_sync_steps'] and c['kl'] == 'none',
    'ref_sync_steps has no effect without a KL; pass --kl and --beta',
  ),
  (
    lambda c: (
      c['importance_cap'] is not None
      and num_passes(c) > 1
      and not c['recompute_logp']
    ),
    'importance_cap has no effect: with several passes over a rollout l_old '
    "is the sampler's; pass --recompute_logp True",
  ),
  (
    lambda c: c['importance_mode'] not in (None, *names.IMPORTANCE_MODES),
    'importance_mode {importance_mode!r} is none of '
    + ', '.join(names.IMPORTANCE_MODES),
  ),
  (
    lambda c: c['importance_mode'] is not None and c['importance_cap'] is None,
    'importance_mode has no effect without weights; pass --importance_cap 2',
  ),
  (
    lambda c: (
      c['importance_cap'] is not None
      and c['loss'] is losses.sequence_clip
      and not (c['importance_mode'] or '').startswith('sequence')
    ),
    '{name} has one ratio a sequence, and importance_cap weighs tokens; pass '
    '--importance_mode sequence_truncate, or --loss clip',
  ),
  (
    lambda c: c['max_update_kl'] is not None and num_passes(c) == 1,
    'max_update_kl has no effect on one pass over a rollout; pass --epochs or '
    '--mini_batches',
  ),
  (
    lambda c: (
      c['loss'] is losses.sequence_clip
      and c['aggregate'] in (losses.token_mean, losses.seq_mean_token_mean)
    ),
    '{name} has one loss a sequence, of which no mean over tokens can be '
    'taken; pass --aggregation seq_mean_token_sum',
  ),
  (
    lambda c: normalizes_each(c) and c['scale'] is None,
    'normalize_then_sum divides each reward by a scale of its own, and {name} '
    'has none; pass --scale group_std',
  ),
  (
    lambda c: (
      normalizes_each(c) and bool(c['baseline'].greedy or c['baseline'].carries)
    ),
    'normalize_then_sum compares each reward by itself, and the baseline of '
    '{name} knows their sum alone; pass --baseline group_mean',
  ),
  (
    lambda c: c['mask_truncated_completions'] and c.get('bootstrap_truncated'),
    'bootstrap_truncated has no effect on completions that '
    'mask_truncated_completions leaves out; pass one of them',
  ),
  (
    lambda c: c['max_length'] is None and c['overlong_buffer'],
    '{name} counts in shares of the longest completion; give max_length',
  ),
  (
    lambda c: (
      c['max_length'] is not None and c['overlong_buffer'] > c['max_length']
    ),
    'overlong_buffer {overlong_buffer} is more than a completion of '
    '{max_length} tokens',
  ),
)


def check_choices(name: str, choices: dict) -> None:
  """Raises ValueError for numbers and pairs of choices that cannot be."""
  names.check_kl(choices['kl'])
  for refused, message in _REFUSED:
    if refused(choices):
      raise ValueError(message.format_map(choices | {'name': name}))
