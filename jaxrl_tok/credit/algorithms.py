"""Algorithms: aliases that chain a credit, a loss and an aggregation.

`compose` makes an Algorithm of parts. A part (advantages.gae, losses.clip) is
a function whose parameters are the choices that it reads, with the paper's
numbers as defaults; an alias names its parts and what it changes of them.
Every choice of an alias may be given another value:

  algorithms.grpo(clip_high=0.28, aggregate=losses.token_mean)

A part that is replaced brings its own numbers, and a choice that nothing
reads is refused: it would have no effect.
"""

import inspect
from collections.abc import Callable
from typing import Any

from jaxrl_tok.credit import advantages, losses
from jaxrl_tok.types import KL, Algorithm

# choices that no part reads, with the values of an alias that is silent
_GENERAL = {
  'max_length': None,  # T; what counts lengths in tokens needs it
  'whiten': False,  # the advantage, over the batch's chosen tokens
  'advantage_clip': None,
  'entropy_coef': 0.0,
  'kl': 'none',  # of losses.KL_FORMS
  'beta': 0.0,
  'kl_target': None,  # nats a token; the coefficient then adapts to it
  'kl_horizon': 10_000.0,  # rows
  'ref_sync_steps': 0,  # steps between copies into the reference; 0: never
  'epochs': 1,
  'mini_batches': 1,
  'max_update_kl': None,
  'recompute_logp': False,
  'importance_cap': None,
  'dynamic_sampling_rounds': 0,
  'overlong_buffer': 0,
  'mask_sync_steps': 0,
}
# and those that need a learned V
_CRITIC = {'value_coef': 0.5, 'value_clip': None, 'critic_warmup_steps': 0}


def _reads(part: Callable) -> dict:
  """{choice that the part reads: its default}."""
  found = inspect.signature(part).parameters.values()
  return {p.name: None if p.default is p.empty else p.default for p in found}


def resolved(name: str, own: dict, changes: dict) -> dict:
  """Every choice of an algorithm: what is changed, else what the alias says
  of its `own`, else the default. Raises ValueError for a change that nothing
  reads."""
  found = {'aggregate': own['aggregate'], **_GENERAL}
  if changes.get('credit', own['credit']) in advantages.LEARNED:
    found |= _CRITIC
  found |= {k: own[k] for k in found.keys() & own.keys()}
  for part in ('credit', 'loss'):
    chosen = changes.get(part, own[part])
    numbers = _reads(chosen)
    if chosen is own[part]:
      numbers |= {k: own[k] for k in numbers.keys() & own.keys()}
    found |= {part: chosen, **numbers}
  for choice in changes.keys() - found.keys():
    raise ValueError(
      f'{choice} has no effect on {name}: neither its credit '
      f'{found["credit"].__name__} nor its loss {found["loss"].__name__} '
      f'reads it; leave it out'
    )
  return found | changes


def _check(name: str, c: dict) -> None:
  """Refuses numbers and pairs of choices that cannot be."""

  def refuse(wrong: Any, said: str):
    if wrong:
      raise ValueError(said)

  for rate in ('gamma', 'gae_lambda'):
    value = c.get(rate, 1.0)
    refuse(not 0 <= value <= 1, f'{rate} {value} is outside [0, 1]')
  if 'clip_low' in c:
    low, high = c['clip_low'], c['clip_high']
    refuse(
      not (0 <= low < 1 and high >= 0 and low + high > 0),
      f'clip_low {low} and clip_high {high} leave the ratio the empty or '
      f'impossible range [{1 - low:g}, {1 + high:g}]; pass 0 <= clip_low < 1 '
      'and clip_high >= 0, not both 0',
    )
    dual = c.get('dual_clip')
    refuse(dual is not None and dual <= 1, f'dual_clip {dual} must be above 1')
  if 'ratio_cap' in c:
    refuse(
      not 0 <= c['ratio_floor'] < c['ratio_cap'],
      f'ratio_floor {c["ratio_floor"]} and ratio_cap {c["ratio_cap"]} leave '
      'an empty range',
    )
  refuse(
    'baseline' in c and c['baseline'] is None,
    f'{name} with the credit returns needs a baseline',
  )
  kl, beta = c['kl'], c['beta']
  refuse(
    kl in ('k1', 'loss'),
    'k1 in the loss has an expected gradient of exactly 0 on-policy; pass '
    '--kl reward, reverse or forward',
  )
  refuse(
    kl not in losses.KL_FORMS,
    f'kl {kl!r} is none of {", ".join(losses.KL_FORMS)}',
  )
  refuse(
    (kl == 'none') != (beta == 0),
    f'kl {kl} with beta {beta} has no effect; pass both '
    '--kl reward|reverse|forward and --beta, or neither',
  )
  refuse(
    c['kl_target'] is not None and kl == 'none',
    'kl_target steers a coefficient; pass --kl and --beta, its first value',
  )
  refuse(
    c['ref_sync_steps'] and kl == 'none',
    'ref_sync_steps has no effect without a KL; pass --kl and --beta',
  )
  passes = c['epochs'] * c['mini_batches']
  refuse(
    c['importance_cap'] is not None and passes > 1 and not c['recompute_logp'],
    'importance_cap has no effect: with several passes over a rollout l_old '
    "is the sampler's; pass --recompute_logp True",
  )
  refuse(
    c['importance_cap'] is not None and c['loss'] is losses.sequence_clip,
    f'{name} has one ratio a sequence, and importance_cap weighs tokens; leave '
    'it out, or pass --loss clip',
  )
  refuse(
    c['max_update_kl'] is not None and passes == 1,
    'max_update_kl has no effect on one pass over a rollout; pass --epochs or '
    '--mini_batches',
  )
  whole = losses.seq_mean_token_sum, losses.seq_mean_token_sum_norm
  refuse(
    c['loss'] is losses.sequence_clip and c['aggregate'] not in whole,
    f'{name} has one loss a sequence, of which no mean over tokens can be '
    'taken; pass --aggregation seq_mean_token_sum',
  )
  refuse(
    (c['aggregate'] is losses.seq_mean_token_sum_norm or c['overlong_buffer'])
    and c['max_length'] is None,
    f'{name} counts in shares of the longest completion; give max_length',
  )
  refuse(
    c['max_length'] is not None and c['overlong_buffer'] > c['max_length'],
    f'overlong_buffer {c["overlong_buffer"]} is more than a completion of '
    f'{c["max_length"]} tokens',
  )


def compose(name: str, own: dict, changes: dict) -> Algorithm:
  """An Algorithm of an alias's `own` choices and the caller's `changes`.

  Raises ValueError, with the cure, for what cannot be or has no effect.
  """
  c = resolved(name, own, changes)
  _check(name, c)
  learned = c['credit'] in advantages.LEARNED

  def part(maker):
    return maker(**{k: c[k] for k in _reads(maker)})

  advantage, loss = part(c['credit']), part(c['loss'])
  if c['overlong_buffer']:
    advantage = advantages.shaped(
      advantage, c['max_length'], c['overlong_buffer']
    )
  advantage = advantages.finished(advantage, c['whiten'], c['advantage_clip'])
  if c['importance_cap'] is not None:
    loss = losses.corrected(loss, c['importance_cap'])
  if c['entropy_coef']:
    loss = losses.with_entropy(loss, c['entropy_coef'])
  kl = None
  if c['kl'] != 'none':
    kl = KL(c['kl'], c['beta'], c['kl_target'], c['kl_horizon'])
  value_loss = None
  if learned:
    value_loss = losses.value_error(c['value_coef'], c['value_clip'])
  baseline = c.get('baseline')
  needed = 1 if baseline is None else baseline.min_group
  return Algorithm(
    name=name,
    settings=c,
    init=(lambda: ()) if baseline is None else baseline.init,
    advantage=advantage,
    loss=loss,
    value_loss=value_loss,
    aggregate=lambda mask: c['aggregate'](mask, c['max_length']),
    kl=kl,
    epochs=c['epochs'],
    mini_batches=c['mini_batches'],
    max_update_kl=c['max_update_kl'],
    # V-trace is about how far the policy is from the sampler
    recompute_logp=c['recompute_logp'] or c['credit'] is advantages.vtrace,
    critic_warmup_steps=c.get('critic_warmup_steps', 0),
    ref_sync_steps=c['ref_sync_steps'],
    mask_sync_steps=c['mask_sync_steps'],
    dynamic_sampling_rounds=c['dynamic_sampling_rounds'],
    flat_without_advantage=(
      c['loss'] in losses.FLAT_WITHOUT_ADVANTAGE
      and not learned
      and not c['entropy_coef']
      and kl is None
    ),
    greedy=baseline is not None and baseline.greedy,
    min_group=2 if c.get('scale') is not None else needed,
  )


def described(algorithm: Algorithm) -> dict:
  """The settings in words and numbers, for config.yaml."""

  def word(value):
    return getattr(value, 'name', getattr(value, '__name__', value))

  return {k: word(v) for k, v in algorithm.settings.items()}


# --- the aliases -------------------------------------------------------------


def reinforce(
  baseline: advantages.Baseline | None = None, **changes
) -> Algorithm:
  """L_t = -(G_t - b_t) log pi(y_t), summed over the sequence: the true policy
  gradient. The baseline is leave-one-out; ema() for one sample a prompt.
  Williams 1992, Machine Learning 8; for language models arXiv:2402.14740."""
  own = {
    'credit': advantages.returns,
    'baseline': baseline or advantages.leave_one_out(),
    'loss': losses.reinforce,
    'aggregate': losses.seq_mean_token_sum,
  }
  return compose('reinforce', own, changes)


def rloo(**changes) -> Algorithm:
  """Leave-one-out advantages and PPO's clip of the whole sequence's ratio.
  arXiv:2402.14740; the ratio as in TRL (the paper takes one step a rollout,
  where it is 1)."""
  own = {
    'credit': advantages.returns,
    'baseline': advantages.leave_one_out(),
    'loss': losses.sequence_clip,
    'aggregate': losses.seq_mean_token_sum,
  }
  return compose('rloo', own, changes)


def remax(**changes) -> Algorithm:
  """REINFORCE with A_t = G_t - R(greedy completion): one more rollout, of one
  row a prompt, and unbiased with one sample. arXiv:2310.10505."""
  own = {
    'credit': advantages.returns,
    'baseline': advantages.greedy(),
    'loss': losses.reinforce,
    'aggregate': losses.seq_mean_token_sum,
  }
  return compose('remax', own, changes)


def a2c(**changes) -> Algorithm:
  """-A_t l_t + 0.5 (target_t - V_t)^2 - c_e H_t with lambda 1 and gamma 0.99:
  advantage actor-critic, arXiv:1602.01783, with RL4LMs' numbers."""
  own = {
    'credit': advantages.gae,
    'gamma': 0.99,
    'gae_lambda': 1.0,
    'loss': losses.reinforce,
    'aggregate': losses.token_mean,
  }
  return compose('a2c', own, changes)


_PPO = {
  'credit': advantages.gae,
  'whiten': True,
  'loss': losses.clip,
  'value_clip': 0.2,
  'epochs': 4,
  'aggregate': losses.token_mean,
}


def ppo(**changes) -> Algorithm:
  """Clipped ratios in [0.8, 1.2], whitened GAE(0.95), clipped values, four
  epochs. arXiv:1707.06347; whitening and value clipping as its first code has
  them (dual_clip=3.0 adds arXiv:1912.09729)."""
  return compose('ppo', _PPO, changes)


def nlpo(**changes) -> Algorithm:
  """PPO whose actions are masked: only tokens in the top-p set of a copy of
  the policy, refreshed every `mask_sync_steps` steps, may be drawn, and the same
  sets hold in the update. The top-p (0.9 there) is the sampling rule's.
  arXiv:2210.01241.

  That paper's code refreshes the copy every 5 to 20 rollouts, at learning rates
  of about 1e-6. No gradient reaches a token outside the set, nor a set of one;
  at 1.5e-3 such tokens drift until the refresh lets them in: on arithmetic,
  greedy accuracy was 0.40 under sets 5 steps old and fell to 0.28 with each
  refresh after 10. So 2 here; raise it with a small learning rate."""
  return compose('nlpo', _PPO | {'mask_sync_steps': 2}, changes)


_GRPO = {
  'credit': advantages.returns,
  'baseline': advantages.group_mean(),
  'scale': advantages.group_std,
  'loss': losses.clip,
  'aggregate': losses.seq_mean_token_mean,
}


def grpo(**changes) -> Algorithm:
  """A = (R - mean) / (std + 1e-4) in the prompt's group, PPO's clip, the mean
  of each sequence's mean. arXiv:2402.03300 (public code has moved to
  token_mean, and the KL, `forward` there, to 0 as here)."""
  return compose('grpo', _GRPO, changes)


def dr_grpo(**changes) -> Algorithm:
  """GRPO without its two biases: no std, and a constant denominator B *
  max_length. arXiv:2503.20783 asks for both; systems that change one keep
  the other bias."""
  own = _GRPO | {
    'scale': None,
    'aggregate': losses.seq_mean_token_sum_norm,
  }
  return compose('dr_grpo', own, changes)


def dapo(max_length: int, **changes) -> Algorithm:
  """GRPO with the wider upper clip [0.8, 1.28], a global mean over tokens,
  groups without variance drawn anew (10 rounds at most), and a punishment of
  the last fifth of `max_length`, in tokens. arXiv:2503.14476."""
  own = _GRPO | {
    'clip_high': 0.28,
    'aggregate': losses.token_mean,
    'dynamic_sampling_rounds': 10,
    'overlong_buffer': max_length // 5,
  }
  return compose('dapo', own, changes | {'max_length': max_length})


def gspo(**changes) -> Algorithm:
  """GRPO with one ratio a sequence, its geometric mean over tokens, in
  [1 - 3e-4, 1 + 4e-4]; its token form. arXiv:2507.18071."""
  return compose('gspo', _GRPO | {'loss': losses.gspo}, changes)


def cispo(**changes) -> Algorithm:
  """GRPO's advantage times a capped ratio that no gradient flows through: no
  token loses its gradient. arXiv:2506.13585."""
  own = _GRPO | {'loss': losses.cispo, 'aggregate': losses.token_mean}
  return compose('cispo', own, changes)


_REINFORCE_PP = {
  'credit': advantages.returns,
  'baseline': advantages.no_baseline(),
  'whiten': True,
  'loss': losses.clip,
  'kl': 'reward',
  'beta': 0.01,
  'aggregate': losses.token_mean,
}


def reinforce_pp(**changes) -> Algorithm:
  """Returns with the KL (k1) in the reward, whitened over all tokens of the
  batch, and PPO's clip. REINFORCE++, arXiv:2501.03262."""
  return compose('reinforce_pp', _REINFORCE_PP, changes)


def reinforce_pp_baseline(**changes) -> Algorithm:
  """REINFORCE++ that takes the group's mean first, then whitens. The KL stays
  in the reward (the paper's variant has k2 in the loss: kl='reverse').
  arXiv:2501.03262."""
  own = _REINFORCE_PP | {'baseline': advantages.group_mean()}
  return compose('reinforce_pp_baseline', own, changes)
