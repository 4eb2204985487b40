"""Grammar: a reward by a chart parser over a context-free grammar.

  english = '''
    S   -> NP VP '.'
    NP  -> Det N | Name
    VP  -> V | V NP
    Det -> 'the' | 'a'
    N   -> 'dog' | 'cat'
    Name -> 'anna'
    V   -> 'sees' | 'sleeps'
  '''
  Task(records, grammar(english))

A rule is a line: a symbol, ->, and its alternatives; words are quoted. The
first rule's symbol is the start.
"""

import functools
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

from jaxrl_tok.rewards.build import reward_of_text
from jaxrl_tok.rewards.functions import shorten
from jaxrl_tok.rewards.text import run_of, seen

PART = re.compile(r"""\s*(?:'([^'"]+)'|"([^"]+)"|([^\s'"|]+))""")


class Grammar(NamedTuple):
  """Grammar in the form that `spans` reads: at most two symbols a rule."""

  start: str
  words: dict  # {word: symbols that derive it}
  pairs: dict  # {left symbol: [(right symbol, symbols that derive both)]}
  symbols: frozenset  # as they were written


def read_grammar(rules: str) -> Grammar:
  """Grammar of its rules, a line each. Raises ValueError, in one line, for what
  is no rule, an empty alternative and a symbol that has no rule."""
  written = list(_read_rules(rules))
  if not written:
    raise ValueError("the grammar has no rule; write lines as NP -> Det 'dog'")
  symbols = {left for left, _ in written}
  for left, right in written:
    for kind, name in right:
      if kind == 'symbol' and name not in symbols:
        raise ValueError(
          f'the grammar has no rule for {name}, which {left} needs; write '
          f"{name} -> ..., or '{name}' if it is a word"
        )
  units, words, pairs = {}, {}, {}
  fresh = (f'{i} ' for i in itertools.count())  # no written symbol has a space
  for left, right in written:
    if len(right) == 1:
      kind, name = right[0]
      into = words if kind == 'word' else units
      into.setdefault(name, set()).add(left)
      continue
    names = []
    for kind, name in right:
      if kind == 'word':
        own = f"'{name}'"
        words.setdefault(name, set()).add(own)
        name = own
      names.append(name)
    while len(names) > 2:
      name = next(fresh)
      pairs.setdefault((names[-2], names[-1]), set()).add(name)
      names[-2:] = [name]
    pairs.setdefault((names[0], names[1]), set()).add(left)
  by_left = {}
  for (a, b), lefts in pairs.items():
    by_left.setdefault(a, []).append((b, _closure(lefts, units)))
  return Grammar(
    written[0][0],
    {word: _closure(lefts, units) for word, lefts in words.items()},
    by_left,
    frozenset(symbols),
  )


def _read_rules(rules: str):
  """(symbol, [('symbol' | 'word', name), ...]) of each alternative."""
  for line in filter(None, map(str.strip, rules.splitlines())):
    left, arrow, rest = (part.strip() for part in line.partition('->'))
    if not arrow or not re.fullmatch(r"""[^\s'"|]+""", left):
      raise ValueError(
        f'{shorten(line)!r} is no rule; write a symbol, -> and what it '
        "derives, as NP -> Det 'dog'"
      )
    right, at = [], 0
    while at < len(rest):
      if bar := re.compile(r'\s*\|').match(rest, at):
        yield left, _not_empty(right, line)
        right, at = [], bar.end()
      elif part := PART.match(rest, at):
        quoted, symbol = part[1] or part[2], part[3]
        if quoted is None:
          right.append(('symbol', symbol))
        else:
          right += [('word', w) for w in pieces_of(quoted)]
        at = part.end()
      else:
        raise ValueError(
          f'the rule {shorten(line)!r} has a quote that is open; close it'
        )
    yield left, _not_empty(right, line)


def _not_empty(right: list, line: str) -> list:
  if not right:
    raise ValueError(
      f'an alternative of {shorten(line)!r} is empty; write the rules that use '
      'it once with and once without the symbol'
    )
  return right


def _closure(symbols: set, units: dict) -> frozenset:
  """Symbols, and all that derive one of them by rules of a single symbol."""
  found, todo = set(), list(symbols)
  while todo:
    symbol = todo.pop()
    if symbol not in found:
      found.add(symbol)
      todo += units.get(symbol, ())
  return frozenset(found)


@functools.cache
def piece_pattern(marks: bool) -> re.Pattern:
  """Pattern of words with their apostrophes, and of every other sign alone."""
  run = run_of('_', marks)
  return re.compile(rf"{run}(?:'{run})*|[^\w\s]")


def pieces_of(text: str) -> list[str]:
  """Words and signs of a text, in lower case."""
  pattern = piece_pattern(not text.isascii())
  return pattern.findall(seen(text).lower().replace('’', "'"))


def spans(grammar: Grammar, words: list[str], longest: int) -> dict:
  """Symbols {(i, j): set} that derive words[i:j], of at most `longest` words:
  the chart of Cocke, Younger and Kasami.

  A number of bits stands for the places where the spans of a symbol end, or
  begin, so that all places that split a span are tried in one operation.
  """
  n, chart = len(words), {}
  ends = [{} for _ in range(n)]  # ends[i]: {symbol: bits of the k of (i, k)}
  starts = [{} for _ in range(n + 1)]  # starts[j]: {symbol: bits of (k, j)}

  def add(i, j, symbols):
    have = chart.setdefault((i, j), set())
    for symbol in symbols - have:
      ends[i][symbol] = ends[i].get(symbol, 0) | 1 << j
      starts[j][symbol] = starts[j].get(symbol, 0) | 1 << i
    have |= symbols

  for j in range(1, n + 1):
    add(j - 1, j, grammar.words.get(words[j - 1], frozenset()))
    for i in range(j - 2, max(j - longest, 0) - 1, -1):
      # all spans (i, k) and (k, j), i < k < j, are there
      for left, places in list(ends[i].items()):
        for right, symbols in grammar.pairs.get(left, ()):
          if places & starts[j].get(right, 0):
            add(i, j, symbols)
  return {span: symbols for span, symbols in chart.items() if symbols}


def covered(
  grammar: Grammar, words: list[str], worth: dict, longest: int
) -> float:
  """Largest sum, over spans that do not overlap, of the worth of a span's
  symbol times its words."""
  begin = {}
  for (i, j), symbols in spans(grammar, words, longest).items():
    value = max((worth[s] for s in symbols & worth.keys()), default=0)
    if value:
      begin.setdefault(j, []).append((i, value * (j - i)))
  best = [0.0]
  for j in range(1, len(words) + 1):
    found = (best[i] + value for i, value in begin.get(j, ()))
    best.append(max(best[-1], *found, 0.0))
  return best[-1]


def grammar(
  rules: str, worth: dict[str, float] | None = None, longest: int = 40
) -> Callable:
  """Reward: share of a completion's words and signs that lie in sentences of
  the grammar, 0 to 1; 0 for an empty text.

    max over spans that do not overlap of sum_span worth(symbol) words(span)
      / words(text)

  Degrees rather than yes or no: a text of one good and one bad sentence of
  equal length is worth 1/2. Phrases may be worth something, too, as steps to a
  sentence: worth={'S': 1, 'NP': 0.3, 'VP': 0.3}.

  Short sentences said again and again score 1: combine it with `length` and
  `no_repetition`. Words of an open vocabulary do not belong in a grammar that
  has a rule for each word.

  Args:
    rules: a rule a line, see the module.
    worth: {symbol: value of a word in one of its spans}; None: 1 for the start.
    longest: words of a sentence at most; time is linear in the text's.

  Raises ValueError for a grammar that has no meaning, in one line.
  """
  read = read_grammar(rules)
  worth = {read.start: 1.0} if worth is None else dict(worth)
  for symbol in worth:
    if symbol not in read.symbols:
      raise ValueError(
        f'worth names {symbol}, for which the grammar has no rule; it has '
        f'{", ".join(sorted(read.symbols))}'
      )

  def score(text: str) -> float:
    words = pieces_of(text)
    return covered(read, words, worth, longest) / max(len(words), 1)

  return reward_of_text('grammar', score)
