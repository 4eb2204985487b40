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
  that has no character. To a byte tokenizer é is two tokens: from the first
  character on that is not ASCII, nothing counts (where the answer is ASCII).
  """
  rewards = []
  for text, right, ids in zip(completions, answer, completion_ids):
    right = str(right)
    n = len(text)  # characters that are one token each
    if right.isascii():
      n = next((i for i, c in enumerate(text) if not c.isascii()), n)
    whole = n == len(text)
    if n > len(ids) or (whole and len(ids) > n + 1):
      raise ValueError(
        f'the digits reward needs one token a character; {text!r} has '
        f'{len(ids)} tokens; use exact_match with this tokenizer'
      )
    share = 1.0 / (len(right) + 1)
    row = [
      share * (i < len(right) and c == right[i]) for i, c in enumerate(text[:n])
    ]
    row += [share * (whole and n == len(right))] * (len(ids) - n)
    rewards.append(row)
  return rewards
