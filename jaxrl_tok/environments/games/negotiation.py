"""Negotiation: two seats share books, hats and balls.

There are some of each item, and an item is worth something else to each seat;
all items are worth 10 points to either. The seats take turns, seat 0 first:

  # offer 1 2 0      'I take 1 book, 2 hats and no ball, you get the rest'
  # accept           ends it: both get their points / 10

After `max_turns` turns without an acceptance both get 0. What is neither costs
its seat 0.1, and the turn passes.

One policy plays both seats in one transcript, so that both know all values (the
prompt tells them): the game has complete information, and backward induction
solves it (`solve`). A seat accepts what gives it at least as much as it would
get by going on; in the last turn an offer comes too late.

Rewards are by seat, see protocol.py: where seat 1 accepts, `reward` is seat
1's, and info['rewards'] has both.
"""

import functools
import itertools
import random
import re

from jaxrl_tok.environments.games.words import episodes, normal
from jaxrl_tok.environments.protocol import Maker

ITEMS = 'books', 'hats', 'balls'
TOTAL = 10  # points of all items, for each seat
ILLEGAL = -0.1
OFFER = re.compile(r'offer (\d{1,3}) (\d{1,3}) (\d{1,3})')


def points(share, values) -> int:
  """Points of a share of the items."""
  return sum(n * value for n, value in zip(share, values))


def read_offer(action: str, counts) -> tuple | None:
  """Share that the speaker would take; None where there is no such offer."""
  found = OFFER.fullmatch(normal(action))
  share = tuple(map(int, found.groups())) if found else None
  if share is None or any(n > c for n, c in zip(share, counts)):
    return None
  return share


class Negotiation:
  """Episode of two seats; see the module."""

  def __init__(self, max_turns: int = 4):
    self.max_turns = max_turns

  def reset(self, seed: int, example: dict) -> tuple:
    self.counts = tuple(example['counts'])
    self.values = tuple(map(tuple, example['values']))
    for seat, values in enumerate(self.values):
      if points(self.counts, values) != TOTAL:
        raise ValueError(
          f'all items are worth {points(self.counts, values)} points to seat '
          f'{seat}; give values that make {TOTAL}'
        )
    self.seat, self.turns, self.offer = 0, 0, None
    return '', {'seat': 0}

  def step(self, action: str) -> tuple:
    seat = self.seat
    self.turns, self.seat = self.turns + 1, 1 - seat
    if normal(action) == 'accept' and self.offer is not None:
      rewards = self.payoff(1 - seat, self.offer)
      info = {'seat': 1 - seat, 'rewards': rewards, 'success': True}
      return 'A deal.\n', rewards[seat], True, False, info
    share, text, reward = read_offer(action, self.counts), 'What?', ILLEGAL
    if share is not None:
      rest = tuple(c - n for n, c in zip(share, self.counts))
      text, reward = f'You would get {written(rest)}.', 0.0
      self.offer = share
    else:
      self.offer = None  # only the latest offer can be accepted
    over = self.turns >= self.max_turns
    text = 'No deal.' if over else f'{text} Seat {1 - seat}:'
    rewards = {seat: reward, 1 - seat: 0.0}
    info = {'seat': 1 - seat, 'rewards': rewards, 'success': False}
    return f'{text}\n', reward, over, False, info

  def payoff(self, proposer: int, share: tuple) -> dict:
    """Rewards of both seats for a share of the proposer."""
    rest = tuple(c - n for n, c in zip(share, self.counts))
    return {
      proposer: points(share, self.values[proposer]) / TOTAL,
      1 - proposer: points(rest, self.values[1 - proposer]) / TOTAL,
    }


def written(numbers) -> str:
  """Numbers of items in words: '1 books, 2 hats, 0 balls'."""
  return ', '.join(f'{n} {item}' for n, item in zip(numbers, ITEMS))


def negotiation(max_turns: int = 4) -> Maker:
  """Maker of negotiations of at most `max_turns` turns, of both seats
  together."""
  if max_turns < 2:
    raise ValueError(
      f'{max_turns} turns leave nobody to accept; let there be 2 or more'
    )
  return functools.partial(Negotiation, max_turns)


def draw_values(rng: random.Random, counts: tuple) -> tuple:
  """Values of the items that make TOTAL points."""
  ways = [
    values
    for values in itertools.product(range(TOTAL + 1), repeat=len(counts))
    if points(counts, values) == TOTAL
  ]
  return rng.choice(ways)


def negotiation_examples(
  count: int = 200, split: str = 'train', seed: int = 0
) -> list[dict]:
  """Records {'prompt', 'counts', 'values'} of games that are drawn, others in
  each split."""
  rng, records = random.Random(f'{split} {seed}'), []
  while len(records) < count:
    counts = tuple(rng.randint(1, 4) for _ in ITEMS)
    if 5 <= sum(counts) <= 7:
      values = draw_values(rng, counts), draw_values(rng, counts)
      prompt = f'There are {written(counts)}.\n' + ''.join(
        f'Points of seat {seat}: {written(values[seat])}.\n' for seat in (0, 1)
      )
      records.append(
        {
          'prompt': f'{prompt}Seat 0:\n',
          'counts': list(counts),
          'values': list(map(list, values)),
        }
      )
  return episodes(split, records)


def solve(counts, values, max_turns: int) -> tuple:
  """Payoffs (seat 0's, seat 1's), in points, of subgame-perfect play: by
  backward induction over the turns. The responder accepts where it gets as much
  as by going on; of the best offers the proposer makes the one that leaves the
  other most."""
  counts = tuple(counts)
  return tuple(
    points
    for _, points in sorted(plan(counts, values, max_turns, 0)[1].items())
  )


def plan(counts: tuple, values, left: int, seat: int) -> tuple:
  """(best offer | None, {seat: points}) where `seat` makes an offer and `left`
  turns are left, its own included."""
  other = 1 - seat
  if left < 2:
    return None, {0: 0, 1: 0}
  later = plan(counts, values, left - 1, other)[1]  # it refuses, and offers
  best = None
  for share in itertools.product(*(range(c + 1) for c in counts)):
    rest = tuple(c - n for n, c in zip(share, counts))
    mine, theirs = points(share, values[seat]), points(rest, values[other])
    if theirs >= later[other]:
      best = max(best or (-1, -1, ()), (mine, theirs, share))
  if best is None or best[0] < later[seat]:
    return None, later
  return best[2], {seat: best[0], other: best[1]}


def negotiation_player(max_turns: int = 4):
  """Player of both seats that plays `solve`'s equilibrium: seat 0 offers and
  seat 1 accepts."""

  def player(example: dict, observations: list, actions: list) -> str:
    counts, values = tuple(example['counts']), example['values']
    seat, left = len(actions) % 2, max_turns - len(actions)
    offer = read_offer(actions[-1], counts) if actions else None
    share, later = plan(counts, values, left, seat)
    if offer is not None:
      rest = tuple(c - n for n, c in zip(offer, counts))
      if points(rest, values[seat]) >= later[seat]:
        return 'accept'
    return f'offer {" ".join(map(str, share or counts))}'

  return player
