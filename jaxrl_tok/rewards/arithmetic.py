"""Rewards for problems with one right answer in the column `answer`."""


def exact_match(prompts, completions, answer, **columns) -> list[float]:
  """1 where the completion is the answer, spaces around it aside, else 0."""
  return [
    float(c.strip() == str(a).strip()) for c, a in zip(completions, answer)
  ]


def digits(
  prompts, completions, answer, completion_ids, **columns
) -> list[list[float]]:
  """One reward a token: 1/(n+1) for each character of an n-character answer
  in its place, and for ending right after it; a right completion sums to 1.

  Needs a tokenizer with one token a character. The end token is the token
  that has no character.
  """
  rewards = []
  for text, right, ids in zip(completions, answer, completion_ids):
    if not len(text) <= len(ids) <= len(text) + 1:
      raise ValueError(
        f'the digits reward needs one token a character; {text!r} has '
        f'{len(ids)} tokens; use exact_match with this tokenizer'
      )
    right = str(right)
    share = 1.0 / (len(right) + 1)
    row = [
      share * (i < len(right) and c == right[i]) for i, c in enumerate(text)
    ]
    row += [share * (len(text) == len(right))] * (len(ids) - len(text))
    rewards.append(row)
  return rewards
