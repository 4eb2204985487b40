"""Tokenizer of a GGUF file, written as Hugging Face's files.

Two kinds of llama.cpp's: 'gpt2', byte-level BPE whose `tokenizer.ggml.pre`
names how text is split first, and 'llama', SentencePiece's BPE by score.
"""

import collections
import json
from pathlib import Path
from typing import NamedTuple

# how text is split before byte-level BPE; the expressions of the models'
# own tokenizer.json
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
  _CONTRACTIONS + r'|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s'
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
LLAMA3, QWEN2 = _WORDS % '{1,3}', _WORDS % ''
_CASED = (
  r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*'
  r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s'
  r'|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+'
  r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s'
  r'|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
TEKKEN = _CASED % ('', '', '')
GPT4O = _CASED % (_CONTRACTIONS + '?', _CONTRACTIONS + '?', '{1,3}')


class Splitting(NamedTuple):
  """How a named pre-tokenizer of byte-level BPE works."""

  pattern: str | None = None  # None: GPT-2's
  digits: bool = False  # each digit is alone
  whole_words: bool = False  # a word that is a token is not merged up to
  add_bos: bool = False  # where the metadata does not say
  nfc: bool = False  # Unicode's composed form first


SPLITTINGS = {
  **dict.fromkeys(
    ('gpt-2', 'phi-2', 'mpt', 'olmo', 'exaone4', 'gigachat', 'trillion'),
    Splitting(),
  ),
  **dict.fromkeys(
    ('smollm', 'starcoder', 'refact', 'command-r', 'exaone', 'minerva-7b'),
    Splitting(digits=True),
  ),
  **dict.fromkeys(
    ('llama3', 'llama-v3', 'llama-bpe', 'falcon3', 'pixtral', 'lfm2'),
    Splitting(LLAMA3, whole_words=True, add_bos=True),
  ),
  **dict.fromkeys(('dbrx', 'smaug-bpe'), Splitting(LLAMA3)),
  'qwen2': Splitting(QWEN2, nfc=True),
  **dict.fromkeys(
    ('deepseek-r1-qwen', 'stablelm2', 'megrez', 'hunyuan'), Splitting(QWEN2)
  ),
  'tekken': Splitting(TEKKEN, whole_words=True, add_bos=True),
  **dict.fromkeys(('gpt-4o', 'llama4'), Splitting(GPT4O)),
}

# token types of llama.cpp
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# tokens that end a turn, in files that do not say so
ENDS = (
  '<|eot_id|>',
  '<|eom_id|>',
  '<|im_end|>',
  '<|end|>',
  '<end_of_turn>',
  '<|endoftext|>',
  '<|end_of_text|>',
)
SPACE = '\u2581'  # SentencePiece's


def _byte_level(splitting: Splitting, vocab: dict, merges: list):
  from tokenizers import Regex, Tokenizer, decoders, models, normalizers
  from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

  steps = [Digits(individual_digits=True)] if splitting.digits else []
  if splitting.pattern:
    steps.append(Split(Regex(splitting.pattern), behavior='isolated'))
  plain = splitting.pattern is None
  steps.append(ByteLevel(add_prefix_space=False, use_regex=plain))
  tokenizer = Tokenizer(
    models.BPE(vocab, merges, ignore_merges=splitting.whole_words)
  )
  tokenizer.pre_tokenizer = Sequence(steps) if steps[1:] else steps[0]
  tokenizer.decoder = decoders.ByteLevel()
  if splitting.nfc:
    tokenizer.normalizer = normalizers.NFC()
  return tokenizer


def _merges_by_score(vocab: dict, mergeable: dict) -> list:
  """Merges of SentencePiece's BPE, which joins the pair whose token has the
  highest score: every way to cut a token in two, best token first.

  mergeable: {token: score}.
  """
  found = []
  for token, score in mergeable.items():
    for i in range(1, len(token)):
      left = token[:i]
      if left in mergeable and (right := token[i:]) in mergeable:
        rank = -score, vocab[token], vocab[left], vocab[right]
        found.append((rank, (left, right)))
  return [pair for _, pair in sorted(found)]


def _sentencepiece(vocab: dict, merges: list, has_bytes, unknown, add_space):
  from tokenizers import Tokenizer, decoders, models, normalizers

  tokenizer = Tokenizer(
    models.BPE(
      vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes
    )
  )
  # llama.cpp puts the space before every stretch of plain text
  first = [normalizers.Prepend(SPACE)] if add_space else []
  tokenizer.normalizer = normalizers.Sequence(
    [*first, normalizers.Replace(' ', SPACE)]
  )
  last = [decoders.Strip(' ', 1, 0)] if add_space else []
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace(SPACE, ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *last,
    ]
  )
  return tokenizer


def _list(meta: dict, name: str, kind, length: int | None = None):
  """List of the metadata, None where there is none. Raises ValueError for one
  of another kind or length."""
  found = meta.get(f'tokenizer.ggml.{name}')
  if found is None:
    return None
  right = isinstance(found, list) and all(isinstance(x, kind) for x in found)
  if not right or length not in (None, len(found)):
    raise ValueError(
      f"tokenizer.ggml.{name} is no list of {length or 'all'} tokens' values; "
      'convert it again'
    )
  return found


def _vocabulary(meta: dict) -> tuple[list, list]:
  """(tokens, types). Rows without a token, which converters add at the end,
  are left out."""
  tokens = _list(meta, 'tokens', str)
  if not tokens:
    raise ValueError(
      'no tokenizer.ggml.tokens in the metadata; convert it again'
    )
  count = len(tokens)
  types = _list(meta, 'token_type', int, count) or [NORMAL] * count
  while count and types[count - 1] == UNUSED:
    count -= 1
  tokens, types = tokens[:count], types[:count]
  if len(set(tokens)) != count:
    twice = collections.Counter(tokens).most_common(1)[0][0]
    raise ValueError(f'token {twice!r} has two ids; convert it again')
  return tokens, types


def _stated_merges(meta: dict) -> list | None:
  """Merges of the metadata: 'left right', where left may be a space."""
  merges = _list(meta, 'merges', str)
  if merges is None:
    return None
  cuts = ((merge, merge.find(' ', 1)) for merge in merges)
  return [(merge[:at], merge[at + 1 :]) for merge, at in cuts]


def _special_ids(meta: dict, count: int) -> dict:
  """{bos, eos, eot, eom, unknown, padding: id} of those that are tokens."""
  spm = meta.get('tokenizer.ggml.model') == 'llama'
  found = {'bos': 1, 'eos': 2, 'unknown': 0} if spm else {}  # llama.cpp's
  for name in ('bos', 'eos', 'eot', 'eom', 'unknown', 'padding'):
    found[name] = meta.get(f'tokenizer.ggml.{name}_token_id', found.get(name))
  return {
    name: i for name, i in found.items() if type(i) is int and 0 <= i < count
  }


def _end_ids(ids: dict, tokens: list, types: list) -> list:
  """Ids that end a completion: the metadata's, then those known by name."""
  found = [ids[name] for name in ('eos', 'eot', 'eom') if name in ids]
  places = {token: i for i, token in enumerate(tokens) if types[i] != NORMAL}
  found += [places[token] for token in ENDS if token in places]
  return list(dict.fromkeys(found))


def _of_bytes(meta: dict, vocab: dict):
  """Byte-level BPE of the metadata: (Tokenizer, whether it begins with bos
  where the metadata does not say)."""
  pre, merges = meta.get('tokenizer.ggml.pre'), _stated_merges(meta)
  if pre not in SPLITTINGS:
    raise ValueError(
      f'pre-tokenizer (tokenizer.ggml.pre) {pre!r} is not supported, and ids '
      f'would be guesses; supported: {", ".join(SPLITTINGS)}'
    )
  if merges is None:
    raise ValueError(
      'no tokenizer.ggml.merges in the metadata; convert it again'
    )
  splitting = SPLITTINGS[pre]
  return _byte_level(splitting, vocab, merges), splitting.add_bos


def _of_pieces(meta: dict, vocab: dict):
  """SentencePiece's BPE of the metadata; returns as _of_bytes."""
  tokens, types = _vocabulary(meta)
  merges, ids = _stated_merges(meta), _special_ids(meta, len(tokens))
  if merges is None:
    count = len(meta['tokenizer.ggml.tokens'])
    scores = _list(meta, 'scores', int | float, count) or [0.0] * count
    rows = zip(tokens, types, scores)
    mergeable = {t: score for t, what, score in rows if what == NORMAL}
    merges = _merges_by_score(vocab, mergeable)
  unknown = tokens[ids['unknown']] if 'unknown' in ids else None
  space = meta.get('tokenizer.ggml.add_space_prefix', True)
  return _sentencepiece(vocab, merges, BYTE in types, unknown, space), True


MODELS = {'gpt2': _of_bytes, 'llama': _of_pieces}


def _frame(meta: dict, tokens: list, ids: dict, add_bos: bool):
  """Post-processor that puts bos before a text, or eos behind it; None."""
  from tokenizers import processors

  around = []
  for name, default in (('bos', add_bos), ('eos', False)):
    wanted = meta.get(f'tokenizer.ggml.add_{name}_token', default)
    if wanted and name not in ids:
      raise ValueError(
        f'add_{name}_token is set and there is no {name} token; convert it '
        'again'
      )
    around.append([tokens[ids[name]]] if wanted else [])
  before, after = around
  if not before and not after:
    return None
  return processors.TemplateProcessing(
    single=[*before, '$A', *after],
    pair=[*before, '$A', *after, *(f'{t}:1' for t in before), '$B:1'],
    special_tokens=[(t, tokens.index(t)) for t in {*before, *after}],
  )


def make_tokenizer(meta: dict):
  """Makes (tokenizers.Tokenizer, special ids, end ids) of the metadata.

  Raises ValueError, in one line, for an unknown model or pre-tokenizer.
  """
  from tokenizers import AddedToken

  tokens, types = _vocabulary(meta)
  vocab = {token: i for i, token in enumerate(tokens)}
  ids, kind = _special_ids(meta, len(tokens)), meta.get('tokenizer.ggml.model')
  if kind not in MODELS:
    raise ValueError(
      f'tokenizer {kind!r} is not supported; supported: gpt2 (byte-level BPE), '
      'llama (SentencePiece)'
    )
  try:
    tokenizer, add_bos = MODELS[kind](meta, vocab)
  except ValueError:
    raise
  except Exception as e:  # a merge of tokens that are none
    said = ' '.join(str(e).split())
    raise ValueError(f'no tokenizer ({said}); convert it again') from None
  special = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
  tokenizer.add_tokens(
    [
      AddedToken(token, normalized=False, special=special[what])
      for token, what in zip(tokens, types)
      if what in special
    ]
  )
  frame = _frame(meta, tokens, ids, add_bos)
  if frame is not None:
    tokenizer.post_processor = frame
  return tokenizer, ids, _end_ids(ids, tokens, types)


def write(out: Path, meta: dict) -> dict:
  """Writes tokenizer.json and tokenizer_config.json; returns the ids of
  generation_config.json."""
  tokenizer, ids, ends = make_tokenizer(meta)
  tokens = meta['tokenizer.ggml.tokens']
  settings = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
  }
  names = {'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding'}
  for name, theirs in names.items():
    if theirs in ids:
      settings[f'{name}_token'] = tokens[ids[theirs]]
  if template := meta.get('tokenizer.chat_template'):
    if not isinstance(template, str):
      raise ValueError(
        'tokenizer.chat_template of the GGUF file is no text; convert it again'
      )
    settings['chat_template'] = template
  tokenizer.save(str(out / 'tokenizer.json'))
  (out / 'tokenizer_config.json').write_text(json.dumps(settings, indent=2))
  found = {'bos_token_id': ids.get('bos'), 'pad_token_id': ids.get('padding')}
  found['eos_token_id'] = ends[0] if len(ends) == 1 else ends or None
  return {name: i for name, i in found.items() if i is not None}
