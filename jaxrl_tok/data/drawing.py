"""Records that are drawn at random: counts that are asked for, and as many
different ones as there are."""

from collections.abc import Callable
from typing import Any

PATIENCE = 1000  # draws without a new one, at least, before there is none


def check_counts(**counts: int) -> None:
  """Refuses a flag's number of records below 1: check_counts(num_items=5)."""
  for name, count in counts.items():
    if count < 1:
      raise ValueError(f'--{name} {count} must be at least 1')


def draw_different(
  draw: Callable[[], tuple[Any, Any] | None], count: int, flags: str
) -> dict:
  """Draws until there are `count` different ones, {key: value}; of equal keys
  the first value is kept.

  It gives up after as many draws without a new one as make it likely that there
  is none: ten for each that there is, 1,000 at least. Raises ValueError then.

  Args:
    draw: makes (key, value), or None where the draw is not to be used.
    count: number of different keys.
    flags: what the number of them depends on, in words: '--depth 1'.
  """
  found, in_vain = {}, 0
  while len(found) < count:
    drawn = draw()
    if drawn is None or drawn[0] in found:
      in_vain += 1
    else:
      found[drawn[0]] = drawn[1]
      in_vain = 0
    if in_vain > max(PATIENCE, 10 * len(found)):
      raise ValueError(
        f'{flags} and held-out ones ask for {count:,} different prompts, and '
        f'there are about {len(found):,}; pass a smaller number'
      )
  return found
