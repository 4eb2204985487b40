"""Measures of completions under the reference policy, for the log alone.

The reference is the policy that the run began from, or the copy that
--ref_sync_steps makes; with LoRA it is the frozen base without adapters.
"""

from collections.abc import Callable

from jaxrl_tok import masked
from jaxrl_tok.credit import losses
from jaxrl_tok.policy import evaluate
from jaxrl_tok.types import Policy, Rollout, SamplingRule


def make_reference_kl(policy: Policy, logits_chunk: int | None) -> Callable:
  """Returns reference_kl(reference_params, Rollout, rule) -> KL of the newest
  rows' policy to the reference, the mean k3 in nats a token."""

  def reference_kl(reference_params, rollout: Rollout, rule: SamplingRule):
    reference = policy.merge_params(*reference_params)
    ref = evaluate(policy, reference, rollout, rule, logits_chunk)
    newest = rollout.version == rollout.version.max()  # replayed rows are older
    mask = rollout.mask & newest[:, None]
    d = masked.fill(rollout.logp - ref.logp, mask)
    return masked.mean(losses.k3(d), mask)

  return reference_kl


def make_reference_logp(policy: Policy, logits_chunk: int | None) -> Callable:
  """Returns reference_logp(reference_params, Rollout, rule) -> log-probs
  float32 [B, T] of the completions' tokens, 0 off-mask.

  The distribution has the rule's temperature and forbidden tokens; none are
  truncated, so that greedy completions can be measured.
  """

  def reference_logp(reference_params, rollout: Rollout, rule: SamplingRule):
    reference = policy.merge_params(*reference_params)
    rollout = rollout._replace(num_kept=None)
    return evaluate(policy, reference, rollout, rule, logits_chunk).logp

  return reference_logp
