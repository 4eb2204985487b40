"""Algorithms of the field: aliases that chain a credit, a loss and an
aggregation, with their papers' numbers as defaults.

Every choice of an alias may be given another value, a word or a function of
one's own (compose.py):

  algorithms.grpo(clip_high=0.28, aggregate='token_mean')
"""

from collections.abc import Callable

from jaxrl_tok.credit import advantages, losses, names
from jaxrl_tok.credit.compose import compose, lookup
from jaxrl_tok.types import Algorithm


def reinforce(
  baseline: advantages.Baseline | Callable | str | None = None, **changes
) -> Algorithm:
  """REINFORCE, L_t = -(G_t - b_t) log pi(y_t), summed over the sequence: the
  true policy gradient. The baseline is leave-one-out; ema() for one sample a
  prompt. Williams 1992, Machine Learning 8; for language models
  arXiv:2402.14740."""
  own = {
    'credit': advantages.returns,
    'baseline': advantages.leave_one_out(),
    'loss': losses.reinforce,
    'aggregate': losses.seq_mean_token_sum,
  }
  given = {} if baseline is None else {'baseline': baseline}
  return compose('reinforce', own, given | changes)


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
  """REINFORCE with A_t = G_t - G_t(greedy completion): one more rollout, of one
  row a prompt, and unbiased with one sample. arXiv:2310.10505."""
  own = {
    'credit': advantages.returns,
    'baseline': advantages.greedy(),
    'loss': losses.reinforce,
    'aggregate': losses.seq_mean_token_sum,
  }
  return compose('remax', own, changes)


def a2c(**changes) -> Algorithm:
  """Advantage actor-critic, -A_t l_t + 0.5 (target_t - V_t)^2 - c_e H_t with
  lambda 1 and gamma 0.99. arXiv:1602.01783, with RL4LMs' numbers."""
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
  the policy, refreshed every `mask_sync_steps` steps, may be drawn, and the
  same sets hold in the update. The top-p (0.9 there) is the sampling rule's.
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
  """Group-relative A = (R - mean) / (std + 1e-4), PPO's clip, the mean of each
  sequence's mean. arXiv:2402.03300 (public code has moved to
  token_mean, and the KL, `forward` there, to 0 as here). With several rewards
  multi_objective_aggregation='normalize_then_sum' is GDPO, arXiv:2601.05242."""
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


ALIASES = {name: globals()[name] for name in names.ALGORITHMS}


def by_name(word: str) -> Callable:
  """Alias of that name, a function of choices -> Algorithm."""
  return lookup('algorithm', word, ALIASES)
