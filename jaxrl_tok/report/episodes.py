"""Episodes in a report: turns of the policy, observations, rewards."""

from collections.abc import Callable

from jaxrl_tok.report.charts import figure
from jaxrl_tok.report.files import number

TURNS = 40  # of an episode that are shown


def episode(row: dict, talk: Callable) -> list[dict] | None:
  """Messages {role, text, seen} of a row with turns, where `seen` tells
  observations; None for a row without any.

  talk: text or messages -> messages {role, text}.
  """
  turns = row.get('turns')
  if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
    return None
  found = []
  for k, turn in enumerate(turns[: TURNS + 1]):
    if 'action' in turn:
      seat = f' of seat {turn["seat"]}' if 'seat' in turn else ''
      role = f'turn {k}{seat}, reward {gain(turn.get("reward"))}'
      found += [
        {'role': role, 'text': m}
        for m in (part['text'] for part in talk(turn['action']))
      ]
    found += [
      {
        'role': part['role'] or 'observation',
        'text': part['text'],
        'seen': True,
      }
      for part in talk(turn.get('observation') or '')
      if part['text']
    ]
  if len(turns) > TURNS + 1:
    more = f'{len(turns) - TURNS - 1} more turns'
    found.append({'role': '', 'text': more, 'seen': True})
  over = row.get('ended_by')
  if isinstance(over, str):
    words = over.replace('_', ' ')
    found.append({'role': 'ended by', 'text': words, 'seen': True})
  return found


def gain(reward: object) -> str:
  """Reward with its sign."""
  value = number(reward)
  return '–' if value is None else f'{"+" if value > 0 else ""}{figure(value)}'
