"""Checks of a completion's answer and form: rewards from 0 to 1.

exact         the answer, in normal form
numeric       the last number is the answer's
regex         a pattern is found
template      the text has a form, as <think>...</think>...
json_schema   JSON that a schema accepts
"""

import json
import re
from collections.abc import Callable, Collection
from decimal import Decimal
from fractions import Fraction

from jaxrl_tok.rewards.build import best_of, need
from jaxrl_tok.rewards.build import reward_of_text as of_text
from jaxrl_tok.rewards.functions import shorten
from jaxrl_tok.rewards.text import seen

# --- answers

BEFORE, AFTER = '"\'([{“‘«„¿¡', '.,;:!?…"\')]}”’»'


def normal_form(text: str, ignore: Collection[str] = ()) -> str:
  """Text in Unicode's NFKC, folded to lower case, its words with one space
  between them and without punctuation at their ends: quotes, brackets and
  stops. Signs that change a number stay: -5, 5%, .5, $5, <5. Nothing is left of
  a text of punctuation alone.

  # 'The answer: "3.5".' -> 'the answer 3.5'
  """
  folded = seen(text, 'NFKC').casefold()
  words = (w.lstrip(BEFORE).rstrip(AFTER) for w in folded.split())
  return ' '.join(w for w in words if w and w not in ignore)


def exact(column: str = 'answer', ignore: Collection[str] = ()) -> Callable:
  """Reward: 1 where the completion is the answer (one of the answers) in
  `normal_form`, else 0; where that leaves nothing of the answer, as of '()', it
  has to be written as it is, spaces around it aside. Words before the answer
  make it wrong: use `numeric`, `regex` or `template` for answers at the end of
  a text.

  Args:
    column: column of the data with the answer, or a list of answers.
    ignore: words that do not count, as ('a', 'an', 'the').
  """

  def score(text: str, answer: str) -> float:
    said, right = (normal_form(x, ignore) for x in (text, answer))
    if not right:  # of punctuation
      said, right = (seen(x, 'NFKC').strip() for x in (text, answer))
    return float(said == right)

  return of_text('exact', best_of(score, column), column)


NUMBER = re.compile(
  r"""(?<![\w.])-?  # a minus that is no hyphen
  (?: \d{1,3} (?: ,\d{3} )+ (?!\d) (?: \.\d+ )?  # 1,234.5
    | (?: \d+ (?: \.\d+ )? | \.\d+ ) (?: e[-+]?\d{1,3} (?!\d) )?  # 1.5e3
  )
  (?: / [1-9]\d*+ (?!\.\d) )?  # 1/2""",
  re.VERBOSE | re.IGNORECASE | re.ASCII,
)


def last_number(text: str) -> Fraction | None:
  """Last number of a text: 1234, 1,234.5, -.5, 1.5e3 or 1/2; None without.
  Units and signs beside it ($, %) are not read."""
  found = NUMBER.findall(text.replace('−', '-'))
  if not found:
    return None
  above, _, below = found[-1].replace(',', '').partition('/')
  return Fraction(Decimal(above)) / Fraction(Decimal(below or 1))


def numeric(
  column: str = 'answer', tolerance: float = 0.0, after: str = ''
) -> Callable:
  """Reward: 1 where the completion's last number is the answer's last number,
  else 0.

    |x - y| <= tolerance |y|,  exactly equal for tolerance 0

  Numbers before it do not count, so that working may be shown, and units do
  not either: 5 km is 5 miles. A question whose answer is a small number is
  right by chance in a part of all cases.

  Args:
    column: column of the data with the answer: a number, or a text that ends
      in one, as GSM8K's '... #### 72'; or a list of answers.
    tolerance: relative difference that is right.
    after: text that stands before the number, as '####' or 'answer is'; the
      number is then the first one after it, and 0 without it.
  """
  if not 0 <= tolerance < 1:
    raise ValueError(
      f'tolerance {tolerance} of numeric; pass 0 or more, below 1'
    )

  def read(text: str) -> Fraction | None:
    if not after:
      return last_number(text)
    _, there, rest = text.rpartition(after)
    first = NUMBER.search(rest.replace('−', '-')) if there else None
    return first and last_number(first[0])

  def score(text: str, answer: str) -> float:
    wanted = last_number(answer)
    if wanted is None:
      raise ValueError(
        f'column {column} holds {shorten(repr(answer))}, which has no number; '
        'name the column of the numbers, or use exact'
      )
    said = read(text)
    margin = Fraction(tolerance) * abs(wanted)
    return float(said is not None and abs(said - wanted) <= margin)

  return of_text('numeric', best_of(score, column), column)


# --- form


def _compiled(pattern: str, flags: int = 0) -> re.Pattern:
  try:
    return re.compile(pattern, flags)
  except re.error as e:
    raise ValueError(
      f'{shorten(pattern)!r} is no regular expression ({e}); mend it'
    ) from None


def regex(
  pattern: str, whole: bool = False, flags: int = re.DOTALL
) -> Callable:
  """Reward: 1 where a regular expression is found in the completion, else 0.

  A pattern of nested repetitions, as (a+)+b, takes time that is exponential in
  the length of the text.

  Args:
    pattern: of Python's re.
    whole: the expression is the whole text, spaces around it aside.
    flags: of re; the default lets . match line ends.
  """
  found = _compiled(pattern, flags)
  if not pattern:
    raise ValueError(
      'an empty regular expression is found in every text; pass a pattern'
    )
  find = found.fullmatch if whole else found.search

  def score(text: str) -> float:
    return float(find(text.strip() if whole else text) is not None)

  return of_text('regex', score)


def template(form: str, partial: bool = False) -> Callable:
  """Reward: 1 where a completion has a form, else 0: its fixed parts, each once
  and in their order, with some text for every {}.

    template('<think>{}</think>{}')
    template('<think>{}</think><answer>{}</answer>')

  Spaces and line ends may stand around every part; parts are divided by {} and
  between tags. What stands for {} is not read: pair it with a reward of the
  answer by `gated`.

  Args:
    form: fixed parts, with {} for text.
    partial: share of the fixed parts that stand there once and in order, where
      the form is not met: at most n / (n + 1) of n parts.
  """
  gaps = [
    re.split(r'(?<=>)\s*(?=<)', part.strip()) for part in form.split('{}')
  ]
  if len(gaps) < 2 or [''] in gaps[1:-1] or gaps == [[''], ['']]:
    raise ValueError(
      f'{form!r} is no form; write fixed text around each {{}}, as '
      "template('<think>{}</think>{}')"
    )
  parts = [
    # whether text stands before it; the part, with any spaces for its spaces
    (g > 0 and k == 0, re.compile(r'\s+'.join(map(re.escape, part.split()))))
    for g, gap in enumerate(gaps)
    for k, part in enumerate(gap)
    if part
  ]
  open_end = gaps[-1] == ['']

  def score(text: str) -> float:
    at, there, fits = 0, 0, True
    for after_text, part in parts:
      found = list(part.finditer(text))
      once = len(found) == 1 and found[0].start() >= at
      if once:
        between = text[at : found[0].start()].strip()
        fits &= bool(between) == after_text
        at, there = found[0].end(), there + 1
      fits &= once
    if fits and bool(text[at:].strip()) == open_end:
      return 1.0
    return there / (len(parts) + 1) if partial else 0.0

  return of_text('template', score)


FENCE = '```'


def read_json(text: str):
  """Value of a text that is JSON, or one block of it in ``` fences. Raises
  ValueError for anything else: NaN, and nesting deeper than Python's stack."""
  text = text.strip()
  if len(text) > 6 and text.startswith(FENCE) and text.endswith(FENCE):
    text = re.sub(r'\Ajson\b', '', text[3:-3], flags=re.IGNORECASE)

  def refuse(word):
    raise ValueError(f'{word} is no JSON')

  try:
    return json.loads(text, parse_constant=refuse)
  except RecursionError:
    raise ValueError('the JSON is nested too deeply') from None


def json_schema(schema: dict, partial: bool = False) -> Callable:
  """Reward: 1 where a completion is JSON that a schema accepts, else 0; the
  package is jsonschema, of the schema's own draft.

  The least that the schema accepts is enough, as empty texts where it names no
  minLength. References to other documents are refused: nothing is fetched.

  Args:
    schema: the JSON schema, as a dict.
    partial: 1 / (1 + errors) for JSON that the schema does not accept.
  """
  jsonschema = need('jsonschema', 'jsonschema')
  kind = jsonschema.validators.validator_for(schema)
  try:
    kind.check_schema(schema)
  except jsonschema.exceptions.SchemaError as e:
    raise ValueError(
      f'the JSON schema is none ({shorten(e.message)}); mend it'
    ) from None
  registry = need('referencing', 'jsonschema').Registry()  # fetches nothing
  errors_of = kind(schema, registry=registry).iter_errors
  unresolved = need('referencing.exceptions', 'jsonschema').Unresolvable

  def score(text: str) -> float:
    try:
      errors = sum(1 for _ in errors_of(read_json(text)))
    except (ValueError, RecursionError):
      return 0.0
    except unresolved as e:
      raise ValueError(
        f'the JSON schema refers to {shorten(e.ref)}, which it does not hold; '
        'put it under $defs'
      ) from None
    return 1 / (1 + errors) if partial else float(not errors)

  return of_text('json_schema', score)
