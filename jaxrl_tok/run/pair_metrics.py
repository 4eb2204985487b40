"""Metrics of a reward model on pairs, by the margins s_chosen - s_rejected.

  accuracy     share of margins above 0; a margin of 0 counts half
  log_loss     mean of -log sigmoid(margin): log 2 without any knowledge
  margin       mean margin
  ece          expected calibration error: mean gap between what is said and
               what is right, over bins of confidence

A model says that its preferred completion is the better one with confidence
sigmoid(|margin|), 0.5 to 1. Guo et al., ICML 2017, arXiv:1706.04599.
"""

import math

import numpy as np

BINS = 5
NORMAL_95 = 1.959964  # two-sided quantile of the normal distribution


def interval(share: float, n: int) -> tuple[float, float]:
  """Wilson's interval of a share of n independent cases, 95 %. J. Am. Stat.
  Assoc. 22, 1927."""
  z2 = NORMAL_95**2
  middle = (share + z2 / (2 * n)) / (1 + z2 / n)
  spread = share * (1 - share) / n + z2 / (4 * n * n)
  half = NORMAL_95 * math.sqrt(spread) / (1 + z2 / n)
  return max(0.0, middle - half), min(1.0, middle + half)


def is_right(margins: np.ndarray) -> np.ndarray:
  """1 where the chosen completion has the larger score, 0.5 where both are
  equal."""
  return (np.sign(margins) + 1) / 2


def reliability(margins: np.ndarray, bins: int = BINS) -> list[dict]:
  """Table {low, high, pairs, confidence, accuracy} by confidence, of the bins
  that hold a pair."""
  confidence = 1 / (1 + np.exp(-np.abs(margins)))
  right = is_right(margins)
  edges = np.linspace(0.5, 1, bins + 1)
  place = np.clip(np.digitize(confidence, edges) - 1, 0, bins - 1)
  return [
    {
      'low': float(edges[i]),
      'high': float(edges[i + 1]),
      'pairs': int((place == i).sum()),
      'confidence': float(confidence[place == i].mean()),
      'accuracy': float(right[place == i].mean()),
    }
    for i in range(bins)
    if (place == i).any()
  ]


def pair_metrics(margins) -> dict[str, float]:
  """Metrics of the margins of pairs; the module's docstring has them."""
  margins = np.asarray(margins, np.float64)
  n, accuracy = len(margins), float(is_right(margins).mean())
  low, high = interval(accuracy, n)
  gaps = [
    row['pairs'] * abs(row['accuracy'] - row['confidence'])
    for row in reliability(margins)
  ]
  return {
    'accuracy': accuracy,
    'accuracy_low': low,
    'accuracy_high': high,
    'log_loss': float(np.logaddexp(0, -margins).mean()),
    'margin': float(margins.mean()),
    'ece': math.fsum(gaps) / n,
  }
