"""Runs reward functions on a rollout and lifts what they say to [B, T]."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Scores(NamedTuple):
  """reward float32 [B, T]; metrics {'rewards/{function}/mean': float};
  completions: the B texts that were scored."""

  reward: np.ndarray
  metrics: dict
  completions: list


def lift(values, mask: np.ndarray, name: str = 'reward') -> np.ndarray:
  """A float or a per-token list for each completion -> float32 [B, T].

  An outcome goes on the last chosen token; a list has one entry for every
  chosen token, in order; None is 0.

  # 2.5 with mask [1 1 1 0] -> [0 0 2.5 0];  [1, 0, .5] -> [1 0 .5 0]
  """
  B, T = mask.shape
  if not isinstance(values, Sequence | np.ndarray) or len(values) != B:
    size = len(values) if hasattr(values, '__len__') else type(values).__name__
    raise ValueError(
      f'reward function {name} returned {size} rewards for {B} completions; '
      'it must return one for each'
    )
  # float32 whatever the inputs: an int array would cut fractions off
  out = np.zeros((B, T), np.float32)
  for b, value in enumerate(values):
    columns = np.flatnonzero(mask[b])
    if value is None or not len(columns):
      continue
    if np.ndim(value) == 0:
      out[b, columns[-1]] = _number(value, name, b)
    elif len(value) == len(columns):
      out[b, columns] = [_number(v, name, b) for v in value]
    else:
      raise ValueError(
        f'reward function {name} gave {len(value)} token rewards for '
        f'completion {b}, which has {len(columns)} tokens; give one for each'
      )
  return out


def _number(value, name: str, b: int) -> float:
  try:
    if isinstance(value, str | bytes):  # float('1') would take it
      raise TypeError
    value = float(value)
  except (TypeError, ValueError):
    raise ValueError(
      f'reward function {name} gave {value!r} for completion {b}; '
      'a reward is a number, None or a list of numbers'
    ) from None
  except OverflowError:
    value = np.inf
  if not abs(value) <= float(np.finfo(np.float32).max):
    raise ValueError(
      f'reward function {name} gave {value} for completion {b}; '
      'rewards must be finite (return None where it does not apply)'
    )
  return value


def make_scorer(
  functions: Sequence[Callable],
  decode: Callable[[list[list[int]]], list[str]],
  end_tokens: Sequence[int],
  weights: Sequence[float] | None = None,
) -> Callable:
  """Returns score(tokens [B, T], mask [B, T], examples) -> Scores.

  Args:
    functions: reward functions; their weighted sum is the reward. Without
      any (the device has them) it is 0, and there are the texts.
    decode: token ids of each completion, end token left out -> texts.
    end_tokens: ids that end a completion.
    weights: one for each function, 1 by default.

  `examples` are the C records of the prompts, each with its prompt and other
  columns; the G = B / C rows of a prompt are consecutive.
  """
  weights = [1.0] * len(functions) if weights is None else list(weights)
  if len(weights) != len(functions):
    raise ValueError(
      f'{len(weights)} reward weights for {len(functions)} reward functions; '
      'give one for each'
    )
  names = [getattr(f, '__name__', type(f).__name__) for f in functions]
  ends = set(end_tokens)

  def score(tokens: np.ndarray, mask: np.ndarray, examples: list[dict]):
    G = len(tokens) // len(examples)
    ids = [row[m].tolist() for row, m in zip(tokens, mask)]
    texts = decode([i[:-1] if i and i[-1] in ends else i for i in ids])
    rows = [example for example in examples for _ in range(G)]
    found = dict.fromkeys(name for example in examples for name in example)
    columns = {name: [row.get(name) for row in rows] for name in found}
    prompts = columns.pop('prompt')
    columns.pop('completion', None)  # the data's own; the policy's is scored
    total = np.zeros(mask.shape, np.float32)
    metrics = {}
    for name, function, weight in zip(names, functions, weights):
      values = function(
        prompts=prompts, completions=texts, completion_ids=ids, **columns
      )
      lifted = lift(values, mask, name)
      said = np.array([v is not None for v in values])
      metrics[f'rewards/{name}/mean'] = float(
        lifted.sum(1)[said].mean() if said.any() else 0.0
      )
      total += np.float32(weight) * lifted
    return Scores(total, metrics, texts)

  return score
