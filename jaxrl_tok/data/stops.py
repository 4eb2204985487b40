"""Stop texts as an automaton over tokens, which the sampler runs.

A completion ends with the first token that makes `stop in decode(tokens so
far)` true. That token is kept whole, so text may follow the stop text inside
it.

1. words.py reads the bytes that each token adds to decoded text.
2. `symbol_table` makes an automaton of the stop texts (Aho & Corasick, 1975):
   a state is the longest end of the text so far that begins a stop text.
3. `token_kinds` walks each token's bytes from all states. Tokens that move all
   states alike are one kind; there are few, as most tokens lead to "nothing".
4. `check_probes` compares the automaton with `decode` on random tokens, and
   refuses a tokenizer whose text is not the sum of its tokens' texts.

  stop 'ab':  state       0 (start)  1 ''  2 'a'  3 (complete, stays)
              kind 'a'    2          2     2      3
              kind 'b'    1          1     3      3
              kind other  1          1     1      3
"""

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from jaxrl_tok.data.tokenizers import decode_all, written_ids
from jaxrl_tok.data.words import (
  BYTE,
  LOST,
  SPACE,
  SYMBOLS,
  Words,
  decoder_parts,
  merge_lost,
  special_ids,
  text_of,
  token_words,
)

START, ROOT = 0, 1  # states: no token yet; nothing that begins a stop text
BROKEN = (-1,)  # a run of byte tokens that is no UTF-8
# UTF-8: lead bytes first..last, bytes that follow, range of the next one
LEADS = (
  (0xC2, 0xDF, 1, 0x80, 0xBF),
  (0xE0, 0xE0, 2, 0xA0, 0xBF),
  (0xE1, 0xEC, 2, 0x80, 0xBF),
  (0xED, 0xED, 2, 0x80, 0x9F),
  (0xEE, 0xEF, 2, 0x80, 0xBF),
  (0xF0, 0xF0, 3, 0x90, 0xBF),
  (0xF1, 0xF3, 3, 0x80, 0xBF),
  (0xF4, 0xF4, 3, 0x80, 0x8F),
)
PROBES, PROBE_LENGTH = 256, 12


# --- from stop texts to an automaton over symbols ----------------------------


def next_run(run: tuple, byte: int) -> tuple:
  """Reads a byte token: () complete UTF-8, (bytes that follow, low, high of the
  next one), or BROKEN."""
  if run == BROKEN:
    return BROKEN
  if run:
    n, low, high = run
    if not low <= byte <= high:
      return BROKEN
    return (n - 1, 0x80, 0xBF) if n > 1 else ()
  if byte < 0x80:
    return ()
  found = (lead[2:] for lead in LEADS if lead[0] <= byte <= lead[1])
  return next(found, BROKEN)


def make_step(stops: Sequence[bytes]) -> Callable:
  """Returns step(place, symbol) -> place, with places (end of the text that
  begins a stop text, run of byte tokens, whether a space is due), or None once
  a stop text is complete."""
  begins = {stop[:n] for stop in stops for n in range(len(stop))}
  used, stops = set(b''.join(stops)), tuple(stops)

  def add(end: bytes | None, byte: int) -> bytes | None:
    if end is None or byte not in used:
      return None if end is None else b''
    end += bytes([byte])
    if end.endswith(stops):
      return None
    while end not in begins:
      end = end[1:]
    return end

  def step(place, symbol: int):
    if place is None:
      return None
    end, run, space = place
    if space:
      end = add(end, ord(' '))
    if symbol < BYTE:
      # after half a character no stop text, which is UTF-8, goes on
      end, run = add(end, symbol), ()
    elif symbol < SPACE:
      # characters of a run that is no UTF-8 are not shown
      run = next_run(run, symbol - BYTE)
      end = b'' if run == BROKEN else add(end, symbol - BYTE)
    return None if end is None else (end, run, symbol == SPACE)

  return step


def symbol_table(stops: Sequence[bytes], used: Sequence[int]) -> np.ndarray:
  """Table int32 [S, SYMBOLS] of the state after a state and a used symbol.

  START is no state of it; the last state is the complete stop text.
  """
  step, places = make_step(stops), {(b'', (), False): ROOT}
  queue, rows = list(places), []
  for place in queue:  # grows
    row = []
    for symbol in used:
      after = step(place, symbol)
      if after is not None and after not in places:
        places[after] = ROOT + len(queue)
        queue.append(after)
      row.append(-1 if after is None else places[after])
    rows.append(row)
  S = ROOT + len(queue) + 1
  table = np.full((S, SYMBOLS), S - 1, np.int32)
  rows = np.asarray(rows, np.int32).reshape(len(queue), len(used))
  table[ROOT : S - 1, list(used)] = np.where(rows < 0, S - 1, rows)
  return table


# --- from symbols to tokens --------------------------------------------------


def walk(words: list[str], start: np.ndarray, move: Callable) -> np.ndarray:
  """Walks all words at once: value = move(value [n], symbol [n]), from `start`
  [V]."""
  symbols = np.frombuffer(''.join(words).encode('utf-16-le'), np.uint16)
  length = np.fromiter(map(len, words), np.int64, len(words))
  begin, value = np.cumsum(length) - length, start.copy()
  rows, n = np.flatnonzero(length), 0
  while len(rows):
    value[rows] = move(value[rows], symbols[begin[rows] + n].astype(np.int64))
    n += 1
    rows = rows[length[rows] > n]
  return value


def token_kinds(table: np.ndarray, words: Words) -> tuple:
  """Kind int32 [V] of each token, and the state int32 [S, K] after a state and
  a token of a kind."""
  S, V = len(table), len(words.later)
  functions = [np.arange(S, dtype=np.int32)]  # state -> state
  known = {functions[0].tobytes(): 0}

  def compose(function, symbol):
    """Follows functions by symbols; new functions are numbered as they come."""
    pairs, place = np.unique(function * SYMBOLS + symbol, return_inverse=True)
    found = []
    for f, s in zip(*divmod(pairs, SYMBOLS)):
      after = table[functions[f], s]
      number = known.setdefault(after.tobytes(), len(functions))
      if number == len(functions):
        functions.append(after)
      found.append(number)
    return np.asarray(found)[place]

  function = walk(words.later, np.zeros(V, np.int64), compose)
  from_root = np.full(V, ROOT, np.int64)
  first = walk(
    words.first, from_root, lambda state, symbol: table[state, symbol]
  )
  first = np.where(words.skipped, START, first)
  pairs, kind = np.unique(function * S + first, return_inverse=True)
  next_state = np.stack(functions)[pairs // S].T.copy()
  next_state[START] = pairs % S
  return kind.astype(np.int32), next_state


def automaton(stops: Sequence[str], words: Words) -> tuple:
  """Automaton (kind int32 [V], next_state int32 [S, K]) of stop texts."""
  used = sorted(map(ord, set(''.join(words.first) + ''.join(words.later))))
  table = symbol_table([stop.encode() for stop in stops], used)
  return token_kinds(table, words)


def states_after(kind, next_state, ids: Sequence[int]) -> list[int]:
  """States after each of the tokens."""
  state, found = START, []
  for i in ids:
    state = int(next_state[state, kind[i]])
    found.append(state)
  return found


# --- checks ------------------------------------------------------------------


def reaches_end(next_state: np.ndarray) -> bool:
  """Tells whether some tokens complete a stop text."""
  seen, queue = {START}, [START]
  for state in queue:  # grows
    new = set(next_state[state].tolist()) - seen
    seen |= new
    queue += new
  return len(next_state) - 1 in seen


def check_special(tokenizer, stops: Sequence[str]) -> None:
  """Refuses a stop text with a special token, where decode leaves it out."""
  names = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
  for stop in stops:
    for name in filter(None, names):
      if name in stop:
        raise ValueError(
          f'--stop {stop!r} holds the special token {name}, which decoded text '
          f'leaves out; pass --stop_token {name!r}, which ends by the token'
        )


def check_reached(tokenizer, decode: Callable, stops, words: Words) -> None:
  """Refuses a stop text that no tokens are decoded to."""
  texts = decode(written_ids(tokenizer, stops))
  for stop, text in zip(stops, texts):
    if stop not in text and not reaches_end(automaton([stop], words)[1]):
      raise ValueError(
        f'--stop {stop!r} can never be complete: no tokens of the tokenizer '
        'are decoded to it; mind its case, its spaces and its spelling'
      )


def random_ids(tokenizer, stops, kind: np.ndarray) -> list:
  """Rows of ids for check_probes: any of them, those that touch a stop text,
  and stop texts as the tokenizer reads them."""
  rng, V = np.random.default_rng(0), len(kind)
  known = np.array([i for i in tokenizer.get_vocab().values() if i < V])
  touching = known[kind[known] != np.bincount(kind[known]).argmax()]
  pools = [known, touching] if len(touching) else [known]
  rows = []
  for n in range(PROBES):
    row = rng.choice(pools[n % len(pools)], PROBE_LENGTH).tolist()
    rows.append(row[: rng.integers(1, PROBE_LENGTH + 1)])
  read = written_ids(tokenizer, stops)
  rows += [[*row[:n], *ids] for ids in read for n, row in enumerate(rows[:4])]
  return [[i for i in row if i < V] for row in rows]


def check_probes(
  tokenizer, decode: Callable, stops, words: Words, kind, next_state
) -> None:
  """Refuses a tokenizer for which the automaton and decode disagree."""
  last = len(next_state) - 1
  for ids in random_ids(tokenizer, stops, kind):
    texts = decode([ids[: n + 1] for n in range(len(ids))])
    want = [any(stop in text for stop in stops) for text in texts]
    # once complete, a text stays: what decode shows later does not matter
    want = np.logical_or.accumulate(want).tolist()
    found = [state == last for state in states_after(kind, next_state, ids)]
    same = merge_lost(texts[-1]) == text_of(words, ids) if ids else True
    if want == found and same:
      continue
    kinds = ', '.join(decoder_parts(tokenizer)) or 'none'
    raise ValueError(
      f"--stop needs text that is the sum of its tokens' texts, and the "
      f'tokenizer (decoder: {kinds}) reads {ids} as {texts[-1]!r}, not as '
      f'{text_of(words, ids)!r}; leave --stop out'
    )


def check_texts(stops: Sequence[str]) -> None:
  """Refuses stop texts that cannot be meant. Raises ValueError."""
  for stop in stops:
    if not stop:
      raise ValueError(
        "--stop '' ends every completion at once; give the text that ends it"
      )
    # a command of LaTeX has a letter after it
    escape = re.search(r'\\[nrt](?![a-zA-Z])', stop)
    if escape:
      raise ValueError(
        f'--stop {stop!r} holds a backslash and a letter where a new line or a '
        f"tab is meant; write $'{stop}' in bash, or stop=('{stop}',) in Python"
      )
    if any(c == LOST or '\ud800' <= c <= '\udfff' for c in stop):
      raise ValueError(
        f'--stop {stop!r} is no UTF-8 text; give the text itself'
      )


# --- what a run calls --------------------------------------------------------


def stop_automaton(
  tokenizer,
  stops: Sequence[str],
  vocab_size: int,
  skip_special_tokens: bool = True,
) -> tuple[np.ndarray, np.ndarray] | None:
  """Automaton of stop texts over the tokens of a vocabulary; None without any.

  A text begins in state 0; a token moves state s to next_state[s, kind[token]];
  the last state is reached when a stop text is complete, and never left.

  Args:
    skip_special_tokens: as decode has it; tokens left out change no state.

  Returns (kind int32 [V], next_state int32 [S, K]). Raises ValueError, in one
  line, for texts that cannot be, and for a tokenizer whose decoded text is not
  the sum of its tokens' texts.
  """
  if not stops:
    return None
  check_texts(stops)
  if skip_special_tokens:
    check_special(tokenizer, stops)
  decode = functools.partial(
    decode_all, tokenizer, skip_special_tokens=skip_special_tokens
  )
  words = token_words(tokenizer, decode, vocab_size, skip_special_tokens)
  check_reached(tokenizer, decode, stops, words)
  found = automaton(stops, words)
  check_probes(tokenizer, decode, stops, words, *found)
  return found


def first_stop(
  decode: Callable, ids: list[int], stops: Sequence[str]
) -> int | None:
  """Number of tokens after which decoded text first holds a stop text; None:
  never. decode: lists of ids -> texts."""
  if not stops:
    return None
  texts = decode([ids[: n + 1] for n in range(len(ids))])
  held = (n + 1 for n, t in enumerate(texts) if any(s in t for s in stops))
  return next(held, None)


def end_at_stop(
  decode: Callable, ids: list[int], stops: Sequence[str]
) -> list[int]:
  """Ids of a right answer and its end token, without the end where the answer
  ends with a stop text: there the sampler ends. decode: as in first_stop.

  Raises ValueError for a stop text before the answer's end, which the policy
  could never go beyond.
  """
  n = first_stop(decode, ids, stops)
  if n is not None and n < len(ids) - 1:
    raise ValueError(
      f'the answer {decode([ids])[0][:60]!r} goes on after a text of --stop, '
      'where a completion ends; leave that text out of --stop'
    )
  return ids[:n]
