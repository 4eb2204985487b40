"""Looking at a policy: held-out prompts, its drift, credit token by token."""

from collections.abc import Callable

import jax
import numpy as np

from jaxrl_tok import masked
from jaxrl_tok.credit import losses
from jaxrl_tok.data import PromptSet
from jaxrl_tok.policy import evaluate
from jaxrl_tok.sharding import put_rows
from jaxrl_tok.types import Policy, Prompts, Rollout, SamplingRule


def describe(example: dict) -> dict:
  """The prompt and answer of a record, as samples.jsonl holds them."""
  answer = example.get('answer')
  return {
    'prompt': example['prompt'],
    'answer': None if answer is None else str(answer),
  }


def held_out_reward(
  sample: Callable,
  judge: Callable,
  weights,
  held_out: PromptSet,
  rule: SamplingRule,
  batch: int,
) -> tuple[dict, list[dict]]:
  """One completion of every held-out prompt, judged.

  Args:
    sample: (weights, key, Prompts [batch, P], rule) -> Rollout; greedy, so
      the key decides nothing.
    judge: (tokens, mask, examples) -> rewards.Scores.
    batch: prompts at a time; the last batch wraps and its excess is dropped.

  Returns (metrics, rows): mean reward and length, one dict for each prompt.
  Must run under jax.set_mesh.
  """
  mesh, key = jax.sharding.get_mesh(), jax.random.key(0)
  n = len(held_out.examples)
  lengths, rows = [], []
  for start in range(0, n, batch):
    index = np.arange(start, start + batch) % n
    real = min(batch, n - start)
    prompts = Prompts(held_out.tokens[index], held_out.length[index])
    rollout = sample(weights, key, put_rows(mesh, prompts), rule)
    tokens, mask = jax.device_get((rollout.tokens, rollout.mask))
    tokens, mask = tokens[:real], mask[:real]
    examples = [held_out.examples[i] for i in index[:real]]
    scores = judge(tokens, mask, examples)
    lengths.extend(mask.sum(1).tolist())
    rows.extend(
      {**describe(example), 'completion': text, 'reward': float(reward)}
      for example, text, reward in zip(
        examples, scores.completions, scores.reward.sum(1)
      )
    )
  metrics = {
    'eval/reward': float(np.mean([row['reward'] for row in rows])),
    'eval/mean_length': float(np.mean(lengths)),
  }
  return metrics, rows


def make_reference_kl(
  policy: Policy, logits_chunk: int | None = None
) -> Callable:
  """Returns reference_kl(TrainState.reference_weights, rollout, rule) -> mean k3 in
  nats a token: how far the policy that sampled is from the reference."""

  def reference_kl(weights, rollout: Rollout, rule: SamplingRule):
    reference = policy.merge_params(*weights)
    ref = evaluate(policy, reference, rollout, rule, logits_chunk)
    d = masked.fill(rollout.logp - ref.logp, rollout.mask)
    return masked.mean(losses.k3(d), rollout.mask)

  return reference_kl


def credit_rows(
  rollout: Rollout, advantage, scores, examples, decode: Callable, prompts=4
) -> list[dict]:
  """samples.jsonl rows of the step's prompts with the largest advantages, all
  their samples: each chosen token with its log-prob, reward and advantage.

  decode: list of ids -> texts.
  """
  C = len(examples)
  tokens, mask, logp, advantage = jax.device_get(
    (rollout.tokens, rollout.mask, rollout.logp, advantage)
  )
  largest = np.abs(advantage).reshape(C, -1).max(axis=1)
  rows = []
  for c in np.argsort(-largest, kind='stable')[:prompts]:
    G = len(tokens) // C
    for b in range(c * G, (c + 1) * G):
      chosen = mask[b]
      rows.append(
        {
          **describe(examples[c]),
          'completion': scores.completions[b],
          'reward': float(scores.reward[b].sum()),
          'tokens': decode([[t] for t in tokens[b][chosen].tolist()]),
          'logp': logp[b][chosen].tolist(),
          'rewards': scores.reward[b][chosen].tolist(),
          'advantage': advantage[b][chosen].tolist(),
        }
      )
  return rows
