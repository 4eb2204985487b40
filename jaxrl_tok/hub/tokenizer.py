"""Tokenizer of a model directory, and the tokens that end a completion.

1. `read_tokenizer` reads tokenizer.json itself. transformers builds the class
   that a directory names, which may split, normalise or add tokens otherwise;
   the name plays no part here.
2. `special_tokens` unites the ends that the files name.
3. `name_class` lets transformers read the same ids from an export.
"""

import codecs
import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from jaxrl_tok.data.tokenizers import added_ids, rust_backend
from jaxrl_tok.hub.tokenizer_language import use_source_language
from jaxrl_tok.hub.tokenizer_settings import (
  SETTINGS,
  chat_templates,
  read_if_there,
  read_settings,
  token_text,
)

# transformers is imported for its tokenizers; it advises on torch otherwise
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')

FILE = 'tokenizer.json'
GENERATION = 'generation_config.json'
GENERIC = 'PreTrainedTokenizerFast'
# vocabularies that the package sentencepiece reads; two of them are Marian's
SENTENCEPIECE = 'source.spm', 'spiece.model', 'sentencepiece.bpe.model'
VOCABULARIES = (
  FILE,
  'tokenizer.model',
  'vocab.json',
  'vocab.txt',
  *SENTENCEPIECE,
)
# texts that tell tokenizers apart: digits, spaces, signs, accents (composed and
# not), scripts, emoji, code
PROBES = (
  '47-12= 2026, 3.14159 and 1,000,000',
  'Hello  world,   and\tmore\n\n\nlines \r\n here  ',
  ' ' * 17 + 'x' + '\n' * 9 + '\t\t',
  "I'll say: don't! It's 5 o'clock (or so)... [x] {y} <z>",
  'Café cafe\u0301 Ångström ß ﬁ ½ naïve STRASSE İ',
  '你好，世界。日本語のテスト 한국어',
  'Привет ελλ שלום مرحبا नमस्ते ไทย',
  '😀👨\u200d👩\u200d👧 ❤\ufe0f 🇫🇷 ▁Ġ\xa0\u2003\u200b',
  'def f(x):\n    return x**2 + 1  # ok\n\tif a != b: a->b',
  '\\frac{1}{2} $x_{i}^{2}$ <b>html</b> &amp; https://a.bc/d?e=f#g',
  'x',
  '',
)


# --- settings beside tokenizer.json ------------------------------------------


def named_tokens(settings: dict, known) -> tuple[dict, list[str]]:
  """Special tokens by their names: ({name: text} of those that tokenizer.json
  has, notes on the others)."""
  found, notes = {}, []
  for name, token in settings.items():
    if not name.endswith('_token') or token_text(token) is None:
      continue
    text = token_text(token)
    if known(text) is not None:
      found[name] = text
    elif name == 'eos_token':
      notes.append(
        f'{SETTINGS} names the {name} {text!r}, which {FILE} does not have; it '
        'ends nothing'
      )
  return found, notes


def extra_tokens(settings: dict, known) -> list[str]:
  """Further special tokens that tokenizer.json has."""
  found = []
  for name in ('additional_special_tokens', 'extra_special_tokens'):
    tokens = settings.get(name) or []
    tokens = tokens.values() if isinstance(tokens, dict) else tokens
    found += [token_text(token) for token in tokens]
  return [
    text for text in dict.fromkeys(found) if text and known(text) is not None
  ]


def check_added(directory: Path, settings: dict, known) -> None:
  """Refuses added tokens to which the files give different ids. A pad that
  only one of them has is never read."""
  given = read_if_there(directory / 'added_tokens.json')
  for i, token in (settings.get('added_tokens_decoder') or {}).items():
    given[token_text(token)] = int(i)
  if known(token_text(settings.get('pad_token')) or '') is None:
    given.pop(token_text(settings.get('pad_token')), None)
  wrong = [
    f'{text!r} is {i} and {known(text)}'
    for text, i in given.items()
    if text and known(text) != i
  ]
  if wrong:
    raise ValueError(
      f'{SETTINGS} or added_tokens.json and {FILE} give tokens different ids: '
      f'{", ".join(wrong[:3])}; save the tokenizer again, so that {FILE} has '
      'its added tokens'
    )


def notes_on(settings: dict, tokenizer) -> list[str]:
  """Contradictions of tokenizer_config.json, each in one line."""
  added, notes = added_ids(tokenizer), []
  for name, place, ids in zip(('bos', 'eos'), ('before', 'behind'), added):
    wants = settings.get(f'add_{name}_token')
    i = getattr(tokenizer, f'{name}_token_id')
    if wants is not None and i is not None and bool(wants) != (i in ids):
      notes.append(
        f'{SETTINGS} has add_{name}_token {str(wants).lower()} and {FILE} puts '
        f'{ids or "nothing"} {place} a text; {FILE} holds'
      )
  flags = ('lstrip', 'rstrip', 'normalized', 'single_word', 'special')
  own = tokenizer.backend_tokenizer.get_added_tokens_decoder()
  differ = [
    str(own[int(i)])
    for i, token in (settings.get('added_tokens_decoder') or {}).items()
    if isinstance(token, dict) and int(i) in own
    if any(
      token.get(f, getattr(own[int(i)], f)) != getattr(own[int(i)], f)
      for f in flags
    )
  ]
  if differ:
    notes.append(
      f'{SETTINGS} and {FILE} tell differently how {", ".join(differ[:3])} '
      f'takes the spaces around it or is decoded; {FILE} holds'
    )
  return notes


# --- reading -----------------------------------------------------------------


def attempt(call: Callable, *args, **kwargs):
  """Calls another library's reader. Raises ValueError, in one line, for any
  fault."""
  try:
    return call(*args, **kwargs)
  except Exception as e:  # many kinds, with pages of advice
    said = ' '.join(str(e).split())[:200]
    raise ValueError(
      f'no tokenizer could be read ({said}); put the tokenizer files of the '
      'model there'
    ) from None


def probes_of(backend) -> list[str]:
  """Texts by which two tokenizers are compared: PROBES, and added tokens."""
  added = [str(t) for t in backend.get_added_tokens_decoder().values()][:64]
  return [*PROBES, *(f'a {token} b{token}' for token in added)]


def outcome(read: Callable, text: str):
  """Ids that read(text) returns, or the fault that it raises."""
  try:
    return read(text)[:]
  except Exception as e:  # a vocabulary without a token for the unknown
    return type(e).__name__


def first_difference(backend, other) -> str | None:
  """Text of the first probe, with its ids, that `other` (text -> ids) reads
  differently; None: there is none."""
  for text in probes_of(backend):
    want = outcome(lambda text: backend.encode(text).ids, text)
    got = outcome(other, text)
    if want != got:
      return f'{text[:40]!r} as {got[:16]}, not {want[:16]}'
  return None


def from_file(directory: Path):
  """Reads tokenizer.json as it is -> (tokenizer, notes).

  Raises ValueError, in one line, where transformers reads other ids with it.
  """
  from tokenizers import Tokenizer, models
  from transformers import PreTrainedTokenizerFast, __version__

  with open(directory / FILE, 'rb') as file:
    if file.read(3) == codecs.BOM_UTF8:
      raise ValueError(
        f'{directory / FILE}: it begins with a byte order mark (BOM); save it '
        'as UTF-8 without one'
      )
  backend = attempt(Tokenizer.from_file, str(directory / FILE))
  if getattr(backend.model, 'dropout', None):
    backend.model.dropout = None  # ids that are the same every time
  known = backend.token_to_id
  settings = read_settings(directory)
  use_source_language(backend, settings)
  check_added(directory, settings, known)
  named, notes = named_tokens(settings, known)
  # made around an empty tokenizer, which its constructor adds tokens to; the
  # file's own then takes that one's place
  tokenizer = attempt(
    PreTrainedTokenizerFast,
    tokenizer_object=Tokenizer(models.BPE()),
    chat_template=chat_templates(directory, settings),
    clean_up_tokenization_spaces=False,
    extra_special_tokens=extra_tokens(settings, known),
    model_max_length=settings.get('model_max_length'),
    **named,
  )
  tokenizer._tokenizer = backend
  rust_backend(tokenizer)
  differs = first_difference(backend, lambda text: tokenizer(text)['input_ids'])
  if tokenizer.backend_tokenizer is not backend or differs:
    raise ValueError(
      f'transformers {__version__} reads {differs or "texts"} otherwise than '
      f'{FILE} has them; '
      'install transformers 5'
    )
  return tokenizer, (*notes, *notes_on(settings, tokenizer))


def from_vocabulary(directory: Path):
  """Reads a vocabulary that is no tokenizer.json, as transformers does."""
  from transformers import AutoTokenizer

  read_settings(directory)  # refused here, in one line
  chat_templates(directory, {})
  check_sentencepiece(directory)
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Recommended: pip install sacremoses')
    tokenizer = attempt(
      AutoTokenizer.from_pretrained,
      directory,
      local_files_only=True,
      trust_remote_code=False,
    )
  return tokenizer, ()


def check_sentencepiece(directory: Path) -> None:
  """Refuses a vocabulary that sentencepiece reads where that is missing."""
  found = [name for name in SENTENCEPIECE if (directory / name).is_file()]
  if (directory / FILE).is_file() or not found:
    return
  if importlib.util.find_spec('sentencepiece') is None:
    raise ValueError(
      f'{found[0]} is read by the package sentencepiece, which is not there; '
      'pip install sentencepiece'
    )


def has_tokenizer(directory: Path) -> bool:
  """Tells whether a directory has a tokenizer's vocabulary."""
  return any((directory / name).is_file() for name in VOCABULARIES)


def read_tokenizer(directory: Path, vocab_size: int) -> tuple:
  """Reads (tokenizer, notes), runs no code of its own; its ids are those of
  tokenizer.json.

  notes: contradictions between its files, each in one line. Raises ValueError,
  in one line, where there is none or it has more ids than the model has rows.
  """
  # without any, transformers makes an empty tokenizer of some families
  if not has_tokenizer(directory):
    raise ValueError(
      f'no tokenizer files ({", ".join(VOCABULARIES)}); put those of the model '
      'there'
    )
  read = from_file if (directory / FILE).is_file() else from_vocabulary
  tokenizer, notes = read(directory)
  # ids of added tokens may lie beyond: a prompt that has one is refused
  if tokenizer.vocab_size > vocab_size:
    raise ValueError(
      f'the tokenizer has {tokenizer.vocab_size} ids and the model '
      f'{vocab_size} rows; use the tokenizer that belongs to the model'
    )
  return tokenizer, notes


# --- ends --------------------------------------------------------------------


def listed(ids) -> list:
  """Ids in a list: one, several or none."""
  return ids if isinstance(ids, list) else [] if ids is None else [ids]


def turn_end(tokenizer, ends: list[int]) -> int | None:
  """End that the chat template writes behind an assistant's message."""
  talk = [
    {'role': 'user', 'content': 'one'},
    {'role': 'assistant', 'content': 'two-three'},
  ]
  try:
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    after = text.rpartition('two-three')[2]
    ids = tokenizer.backend_tokenizer.encode(
      after, add_special_tokens=False
    ).ids
  except Exception:  # no template, or one that wants other messages
    return None
  return next((i for i in ids if i in ends), None)


def special_tokens(
  directory: Path, hf_config: dict, tokenizer, vocab_size: int
):
  """(end ids, pad id) of generation_config.json, config.json and the tokenizer.

  Ends are the union of theirs, in this order; the end that the chat template
  writes behind an assistant's message comes first: it ends right answers. The
  first pad counts: one that is missing or no row of the model is the first end
  (the mask is recorded, so pad may equal end). Raises ValueError for an end
  that is no row.
  """
  generation = read_if_there(directory / GENERATION)
  sources = {
    GENERATION: generation.get('eos_token_id'),
    'config.json': hf_config.get('eos_token_id'),
    SETTINGS: tokenizer.eos_token_id,
  }
  ends = []
  for source, ids in sources.items():
    for i in listed(ids):
      if not is_row(i, vocab_size):
        raise ValueError(
          f'end token {i!r} is none of the {vocab_size} ids of the model; '
          f'correct it in {source}'
        )
      ends += [] if i in ends else [i]
  if not ends:
    raise ValueError(
      f'no end token in {GENERATION}, config.json or the tokenizer; add '
      'eos_token_id'
    )
  first = turn_end(tokenizer, ends)
  if first is not None:
    ends = [first, *(i for i in ends if i != first)]
  pads = (
    generation.get('pad_token_id'),
    hf_config.get('pad_token_id'),
    tokenizer.pad_token_id,
  )
  pad = next((i for i in pads if i is not None), None)
  return tuple(ends), pad if is_row(pad, vocab_size) else ends[0]


def pad_notes(tokenizer, pad: int, ends: tuple) -> tuple:
  """Note on a pad that is a word of its own, as padding is never sampled."""
  if pad in ends:
    return ()
  text = tokenizer.decode([pad])
  is_word = bool(text.strip()) and text.strip().isalnum()
  if not is_word or tokenizer.encode(text, add_special_tokens=False) != [pad]:
    return ()
  return (
    f'the pad token {pad} is the text {text!r}, which is then never sampled; '
    f'give pad_token_id a token of its own, or an end token, in {GENERATION}',
  )


def is_row(i, vocab_size: int) -> bool:
  """Tells whether it is the id of a row of the model."""
  return type(i) is int and 0 <= i < vocab_size


# --- writing -----------------------------------------------------------------


def auto_difference(directory: Path) -> str | None:
  """First probe that AutoTokenizer reads otherwise than tokenizer.json."""
  from tokenizers import Tokenizer

  backend = Tokenizer.from_file(str(directory / FILE))
  backend.no_truncation()
  backend.no_padding()
  use_source_language(backend, read_settings(directory))
  try:
    auto, _ = from_vocabulary(directory)
    return first_difference(backend, lambda text: auto(text)['input_ids'])
  except Exception as e:  # of a class that the file does not fit
    return str(e)


def name_class(directory: Path) -> bool:
  """Names the class in tokenizer_config.json with which transformers reads
  tokenizer.json as it is, where the one that is named does not.

  False: there is none for the family; the file stays as it was.
  """
  if not (directory / FILE).is_file() or not auto_difference(directory):
    return True
  path = directory / SETTINGS
  before = path.read_bytes() if path.is_file() else None
  settings = read_if_there(path)
  for name in (
    'auto_map',
    'add_bos_token',
    'add_eos_token',
    'add_prefix_space',
  ):
    settings.pop(name, None)
  settings |= {'tokenizer_class': GENERIC}
  path.write_text(json.dumps(settings, indent=2) + '\n')
  if not auto_difference(directory):
    return True
  if before is None:
    path.unlink()
  else:
    path.write_bytes(before)
  return False
