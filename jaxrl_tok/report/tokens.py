"""Tokens in a report: one colour each, by its advantage."""

import math
import re
import unicodedata
from itertools import islice, zip_longest

from markupsafe import Markup, escape

from jaxrl_tok.report.episodes import gain
from jaxrl_tok.report.files import number

TOKENS = 600  # of a sample that are shown
DARKEST = 0.62  # opacity of the largest advantage; text stays readable on it


def clip(text: object, limit: int = 4000) -> str:
  """Text of at most so many characters, and how many more there are."""
  text = '' if text is None else str(text)
  more = len(text) - limit
  return text if more <= 0 else f'{text[:limit]} … ({more} more characters)'


def entries(value: object) -> list:
  """Value where it is a list, [] otherwise."""
  return value if isinstance(value, list) else []


def shade(advantage: object, largest: float) -> str:
  """CSS of a token: its sign picks the hue, its share of the largest the alpha.

  Blue tokens are pushed to be likelier, orange ones less likely. Made of
  numbers only, because everything else in a sample is untrusted.
  """
  advantage = number(advantage) or 0.0
  if not advantage or largest <= 0:
    return ''
  alpha = DARKEST * min(1.0, abs(advantage) / largest)
  red, green, blue = (37, 99, 235) if advantage > 0 else (234, 88, 12)
  return f'background:rgba({red},{green},{blue},{alpha:.4f})'


def visible(token: object) -> Markup:
  """Token with its markup escaped and its invisible characters marked."""
  text = ''.join(
    f'⟨U+{ord(c):04X}⟩'
    if c not in '\n\r\t'
    and unicodedata.category(c) in ('Cc', 'Cf', 'Cs', 'Zl', 'Zp')
    else c
    for c in str(token)[:200]
  )
  marks = {' ': '␣', '\n': '↵', '\r': '␍', '\t': '⇥', '\xa0': '⍽'}
  marked = re.sub(
    '[ \n\r\t\xa0]', lambda m: f'<i>{marks[m[0]]}</i>', str(escape(text))
  )
  return Markup(marked or '<i>·</i>')


def shown_tokens(row: dict, largest: float) -> list[dict]:
  """Tokens of a sample, with their shades and numbers. Of an episode those that
  were observed are `seen`, and a turn ends with its reward."""
  names = 'logp', 'rewards', 'advantage', 'chosen'
  columns = [entries(row.get(k)) for k in names]
  tokens, turned = entries(row.get('tokens')), 'chosen' in row
  columns = [column[: len(tokens)] for column in columns]
  shown = []
  for token, *values, on in islice(zip_longest(tokens, *columns), TOKENS):
    logp, reward, advantage = map(number, values)
    seen = turned and not on
    credit = ['–' if v is None else f'{v:+.3f}' for v in (reward, advantage)]
    chance = (
      '–'
      if logp is None
      else (f'{logp:.3f} (p = {math.exp(min(logp, 0)):.3g})')
    )
    shown.append(
      {
        'text': visible(token),
        'style': shade(advantage, largest),
        'paid': bool(reward),
        'seen': seen,
        'gain': gain(reward) if turned and reward else '',
        'newline': '\n' in str(token),
        'title': f'{clip(repr(token), 200)}\n'
        + (
          'observed'
          if seen
          else f'log-prob {chance}\nreward {credit[0]}\nadvantage {credit[1]}'
        ),
      }
    )
  return shown
