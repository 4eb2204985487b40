"""Algorithms: aliases that chain an advantage, a loss and an aggregation."""

from collections.abc import Callable

from jaxrl_tok import advantages, losses
from jaxrl_tok.types import Algorithm

# How the KL to the reference enters, named by the effect of its gradient.
KL_FORMS = ('none', 'reward', 'reverse', 'forward')
_IN_LOSS = {'reverse': losses.k2, 'forward': losses.k3}


def reinforce(
  baseline: advantages.Baseline,
  aggregate: Callable = losses.seq_mean_token_sum,
  gamma: float = 1.0,
  kl: str = 'none',
  beta: float = 0.0,
) -> Algorithm:
  """REINFORCE on tokens: -(G_t - b_t) log pi(y_t), summed over the sequence.

  Args:
    baseline: one of advantages.py; leave_one_out() for G > 1, else ema().
    aggregate: weight of each token's loss; the default is the true gradient.
    gamma: discount of token rewards.
    kl: 'reward' takes beta * (log pi - log ref) from each token's reward,
      'reverse' and 'forward' add k2 and k3 to the loss.
    beta: coefficient of the KL.

  Williams 1992, Machine Learning 8; for language models arXiv:2402.14740.
  """
  if kl not in KL_FORMS:
    raise ValueError(f'kl {kl!r} is none of {", ".join(KL_FORMS)}')
  if (kl == 'none') != (beta == 0):
    raise ValueError(
      f'kl {kl} with beta {beta} has no effect; pass both '
      '--kl reward|reverse|forward and --beta, or neither'
    )
  if not 0 <= gamma <= 1:
    raise ValueError(f'gamma {gamma} is outside [0, 1]')
  loss = losses.reinforce
  if kl in _IN_LOSS:
    loss = losses.add_kl(loss, _IN_LOSS[kl], beta)
  return Algorithm(
    name='reinforce',
    init=baseline.init,
    advantage=advantages.return_minus_baseline(baseline, gamma),
    loss=loss,
    aggregate=aggregate,
    kl_in_reward=beta if kl == 'reward' else 0.0,
    needs_reference=kl != 'none',
  )
