"""Token environment: our episode of one completion as a gymnasium.Env.

  observation  {'tokens': ids [S], 'mask': 1 where there is a token}
  action       a token
  reward       that of the reward functions, at the end; 0 before it
  terminated   an end token was chosen; truncated: max_length tokens were

For libraries of reinforcement learning that know no language, such as
stable-baselines3: a check of the trainer, not a way to train a large model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl_tok.data import decode_all, open_records, prompt_ids
from jaxrl_tok.environments.adapters import need
from jaxrl_tok.rewards.functions import name_rewards
from jaxrl_tok.rewards.scoring import make_scorer


def make_score(tokenizer, rewards, end_tokens: Sequence[int]):
  """Returns score(ids, record) -> sum of the weighted rewards."""
  functions, weights = name_rewards(rewards)
  score = make_scorer(
    functions,
    lambda ids, **more: decode_all(tokenizer, ids, **more),
    end_tokens,
  )

  def total(ids: list[int], record: dict) -> float:
    tokens = np.array([ids], np.int32)
    found = score(tokens, np.ones_like(tokens, bool), [record])
    return float(
      sum(
        float(weights[name]) * found.rewards[name].sum()
        for name in functions
        if found.applies[name][0]
      )
    )

  return total


def token_env(tokenizer, records, rewards, max_length: int) -> Any:
  """Makes a gymnasium.Env of completions of a data set's prompts.

  Args:
    tokenizer: a transformers tokenizer, with an end token.
    records: as Task.train takes them, but finite.
    rewards: as Task.rewards takes them; functions of text.
    max_length: tokens of a completion at most.

  A reward for each token is summed, and paid at the end. Each reset draws a
  record; options={'record': i} chooses one. Raises ValueError where gymnasium
  is missing.
  """
  gymnasium = need('gymnasium', 'gymnasium')
  records = open_records(records)
  end = tokenizer.eos_token_id
  if end is None:
    raise ValueError(
      'the tokenizer has no end token, so that no completion would end; set '
      'its eos_token'
    )
  prompts = [prompt_ids(tokenizer, record['prompt']) for record in records]
  S = max(map(len, prompts)) + max_length
  V = len(tokenizer)
  score = make_score(tokenizer, rewards, [end])
  spaces = gymnasium.spaces

  class TokenEnv(gymnasium.Env):
    """Completion of a prompt, a token a step; see the module."""

    metadata = {'render_modes': []}  # noqa: RUF012  as gymnasium has it
    observation_space = spaces.Dict(
      {
        'tokens': spaces.Box(0, V - 1, (S,), np.int64),
        'mask': spaces.MultiBinary(S),
      }
    )
    action_space = spaces.Discrete(V)

    def reset(self, *, seed=None, options=None):
      super().reset(seed=seed)
      chosen = (options or {}).get('record')
      if chosen is None:
        chosen = self.np_random.integers(len(prompts))
      self.record, self.prompt = records[int(chosen)], prompts[int(chosen)]
      self.said = []
      return self.observe(), {}

    def step(self, action):
      self.said.append(int(action))
      terminated = self.said[-1] == end
      truncated = not terminated and len(self.said) >= max_length
      reward = 0.0
      if terminated or truncated:
        reward = score(self.said, self.record)
      return self.observe(), reward, terminated, truncated, {}

    def observe(self) -> dict:
      ids = [*self.prompt, *self.said]
      tokens, mask = np.zeros(S, np.int64), np.zeros(S, np.int8)
      tokens[: len(ids)], mask[: len(ids)] = ids, 1
      return {'tokens': tokens, 'mask': mask}

    def text(self) -> str:
      """Completion so far."""
      shown = self.said[:-1] if self.said[-1:] == [end] else self.said
      return decode_all(tokenizer, [shown])[0]

  return TokenEnv()
