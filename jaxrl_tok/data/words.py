"""Words: the bytes that each token adds to decoded text."""

import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# A word is a str of symbols: chr(b), a byte; chr(BYTE + b), a byte token
# (<0x0A>), shown if it and its neighbours are UTF-8; chr(SPACE), a space that
# is shown once a token follows.
BYTE, SPACE, SYMBOLS = 256, 512, 513
LOST = '\ufffd'  # shown for bytes that are no UTF-8


class Words(NamedTuple):
  """Symbols that each token adds to decoded text."""

  first: list[str]  # as the first token
  later: list[str]  # after other tokens
  skipped: np.ndarray  # bool [V]  decode leaves it out


def decoder_parts(tokenizer) -> dict:
  """Decoders {type: settings} of a tokenizer."""
  backend = getattr(tokenizer, 'backend_tokenizer', None)
  found = {}

  def read(part: dict) -> None:
    found[part['type']] = part
    for inner in part.get('decoders', ()):
      read(inner)

  if backend is not None and backend.decoder is not None:
    read(json.loads(backend.decoder.__getstate__()))
  return found


def special_ids(tokenizer) -> set[int]:
  """Ids that decode(skip_special_tokens=True) leaves out."""
  backend = getattr(tokenizer, 'backend_tokenizer', None)
  if backend is None:
    return set(tokenizer.all_special_ids)
  added = backend.get_added_tokens_decoder()
  return {i for i, token in added.items() if token.special}


def as_word(text: str) -> str:
  """Word of a text: its UTF-8 bytes."""
  return text.encode().decode('latin-1')


def byte_level_words(names: list[str]) -> list[str]:
  """Words of a byte-level vocabulary, whose characters each name a byte."""
  printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = sorted(set(range(256)) - set(printed))
  byte_of = {b: chr(b) for b in printed}
  byte_of |= {256 + i: chr(b) for i, b in enumerate(others)}
  known = set(map(chr, byte_of))
  return [
    name.translate(byte_of) if known.issuperset(name) else as_word(name)
    for name in names
  ]


def suffix_words(names: list[str], suffix: str) -> list[str]:
  """Words of a vocabulary that marks the end of a word: 'lo</w>'."""
  return [
    as_word(name.replace(suffix, ' ')[:-1]) + chr(SPACE)
    if name.endswith(suffix)
    else as_word(name.replace(suffix, ' '))
    for name in names
  ]


def decoded_words(
  decode: Callable, names: list[str], skipped: np.ndarray, has_bytes: bool
) -> tuple[list[str], list[str]]:
  """Words (first, later) as decode shows them, alone and after an anchor.

  decode: lists of ids -> texts.
  """
  alone = decode([[i] for i in range(len(names))])
  shown = [
    i for i in np.flatnonzero(~skipped) if alone[i] and LOST not in alone[i]
  ]
  letters = (i for i in shown if alone[i].isascii() and alone[i].isalpha())
  anchor = next(letters, shown[0] if shown else None)
  if anchor is None:
    return [''] * len(names), [''] * len(names)
  before = alone[anchor]
  after = decode([[anchor, i] for i in range(len(names))])
  first = [as_word(text) for text in alone]
  # a text that an anchor changes is no sum, which the probes will find
  later = [as_word(text.removeprefix(before)) for text in after]
  for i, name in enumerate(names):
    byte = has_bytes and name.startswith('<0x')
    if byte and re.fullmatch(r'<0x[0-9A-Fa-f]{2}>', name):
      later[i] = chr(BYTE + int(name[3:5], 16))
      first[i] = later[i] if alone[i] else ''
  return first, later


def token_words(
  tokenizer, decode: Callable, V: int, skip_special_tokens: bool = True
) -> Words:
  """Reads the words of the ids below V.

  decode: lists of ids -> texts.
  """
  names, skipped = [''] * V, np.ones(V, bool)
  for name, i in tokenizer.get_vocab().items():
    if i < V:
      names[i], skipped[i] = name, False
  if skip_special_tokens:
    skipped[[i for i in special_ids(tokenizer) if i < V]] = True
  parts = decoder_parts(tokenizer)
  if 'ByteLevel' in parts:
    first = later = byte_level_words(names)
  elif 'BPEDecoder' in parts:
    first = later = suffix_words(names, parts['BPEDecoder']['suffix'])
  else:
    first, later = decoded_words(
      decode, names, skipped, 'ByteFallback' in parts
    )
  if skipped.any():
    first, later = (
      ['' if no else word for word, no in zip(words, skipped.tolist())]
      for words in (first, later)
    )
  return Words(first, later, skipped)


def text_of(words: Words, ids: Sequence[int]) -> str:
  """Text of tokens by their words; every run of bytes that are no UTF-8 is
  one U+FFFD."""
  shown = [i for i in ids if not words.skipped[i]]
  word = ''.join(
    (words.later if n else words.first)[i] for n, i in enumerate(shown)
  )
  word = word.removesuffix(chr(SPACE)).replace(chr(SPACE), ' ')
  parts = re.split(f'([{chr(BYTE)}-{chr(SPACE - 1)}]+)', word)
  text = ''
  for n, part in enumerate(parts):
    code = bytes(ord(c) % BYTE for c in part)
    try:
      text += code.decode(errors='strict' if n % 2 else 'replace')
    except UnicodeDecodeError:
      text += LOST
  return merge_lost(text)


def merge_lost(text: str) -> str:
  """Merges neighbouring U+FFFD, whose number decoders choose differently."""
  return re.sub(f'{LOST}+', LOST, text)
