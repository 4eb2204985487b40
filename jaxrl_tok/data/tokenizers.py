"""Text to token ids and back.

1. `encode_prompts` reads many prompts in one call to the tokenizer's Rust code.
2. `decode_all` writes the texts of completions.
3. `stop_ids` finds the tokens that --stop_token names.
"""

from collections.abc import Callable, Iterable, Sequence

from jaxrl_tok.data.chat import Chat, render

NO_ID = 2**31 - 1  # id of no token


def byte_tokenizer():
  """A tokenizer with one id for each byte, then <pad> and <eos>: 258 ids.

  Returns a transformers tokenizer, which saves Hugging Face files.
  """
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {symbol: i for i, symbol in enumerate(alphabet)}
  tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  tokenizer.decoder = decoders.ByteLevel()
  return _finish(tokenizer)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int):
  """Tokenizer of byte pairs that are frequent in texts; Sennrich et al.,
  arXiv:1508.07909. A word and the space before it become one token where
  vocab_size allows, and any other text still becomes bytes.

  It depends on the texts' words and their counts alone, not on their order.
  Returns a transformers tokenizer, which saves Hugging Face files.

  Args:
    texts: text of the kind to be read and written.
    vocab_size: tokens at most, 258 of them bytes, <pad> and <eos>; it has fewer
      where the texts have no further pair that comes twice.

  Raises ValueError for a vocab_size that cannot hold every byte.
  """
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  if vocab_size < len(alphabet) + 2:
    raise ValueError(
      f'a vocab_size of {vocab_size} cannot hold every byte, <pad> and <eos>; '
      f'pass {len(alphabet) + 2} or more'
    )
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size - 2,
    min_frequency=2,
    initial_alphabet=alphabet,
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return _finish(tokenizer)


def _finish(tokenizer):
  """Tokenizer of transformers of one of tokenizers, with <pad> and <eos>."""
  from transformers import PreTrainedTokenizerFast

  tokenizer.add_special_tokens(['<pad>', '<eos>'])
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token='<pad>',
    eos_token='<eos>',
    clean_up_tokenization_spaces=False,
  )


WORD = r' ?\p{L}+|(?m:.)'  # letters with a space before them; a character


def word_tokenizer(texts: Iterable[str], piece: str = WORD):
  """A tokenizer with one id for each piece of the texts, then <unk>, <pad> and
  <eos>. A piece is a word with the space before it, or one character that is no
  letter; or what another regular expression matches.

  # 'sum(x*x for x in xs)' -> 'sum', '(', 'x', '*', 'x', ' for', ...

  Returns a transformers tokenizer, which saves Hugging Face files. A word that
  is in none of the texts is <unk>.
  """
  from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  cut = pre_tokenizers.Split(Regex(piece), 'isolated')
  pieces = {word for t in texts for word, _ in cut.pre_tokenize_str(t)}
  vocab = {word: i for i, word in enumerate([*sorted(pieces), '<unk>'])}
  tokenizer = Tokenizer(models.WordLevel(vocab, '<unk>'))
  tokenizer.pre_tokenizer = cut
  tokenizer.decoder = decoders.Fuse()
  tokenizer.add_special_tokens(['<pad>', '<eos>'])
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    unk_token='<unk>',
    pad_token='<pad>',
    eos_token='<eos>',
    clean_up_tokenization_spaces=False,
  )


def decode_all(
  tokenizer, ids: list[list[int]], skip_special_tokens: bool = True
) -> list[str]:
  """Texts of completions in one call."""
  backend = getattr(tokenizer, 'backend_tokenizer', None)
  if backend is not None:
    return backend.decode_batch(ids, skip_special_tokens=skip_special_tokens)
  return tokenizer.batch_decode(ids, skip_special_tokens=skip_special_tokens)


def rust_backend(tokenizer):
  """Tokenizer of Rust behind a tokenizer, neither cutting nor padding what it
  reads, as a tokenizer.json may ask; None: it has none."""
  backend = getattr(tokenizer, 'backend_tokenizer', None)
  if backend is not None and backend.truncation is not None:
    backend.no_truncation()
  if backend is not None and backend.padding is not None:
    backend.no_padding()
  return backend


def encode_texts(
  tokenizer, texts: Sequence[str], add_special_tokens: bool = False
) -> list[list[int]]:
  """Ids of many texts; the tokenizer's own threads share the work."""
  backend = rust_backend(tokenizer)
  if backend is None:
    more = {} if add_special_tokens else {'add_special_tokens': False}
    return [tokenizer(text, **more)['input_ids'] for text in texts]
  found = backend.encode_batch_fast(
    texts, add_special_tokens=add_special_tokens
  )
  return [encoding.ids for encoding in found]


def written_ids(tokenizer, texts: Sequence[str]) -> list[list[int]]:
  """Ids of many texts as a policy writes them: no token is put before or after.

  A tokenizer of two languages (Marian's) reads them by that of completions.
  """
  if hasattr(tokenizer, 'spm_target'):
    return [
      tokenizer(text_target=text, add_special_tokens=False)['input_ids']
      for text in texts
    ]
  return encode_texts(tokenizer, list(texts))


def text_ids(tokenizer, text: str) -> list[int]:
  """Ids of one text as a policy writes it."""
  return written_ids(tokenizer, [text])[0]


def added_ids(tokenizer) -> tuple[list[int], list[int]]:
  """Ids that the tokenizer puts (before, after) a text that it reads."""
  backend = rust_backend(tokenizer)
  if backend is not None:
    from tokenizers import Tokenizer, models

    word = Tokenizer(models.WordLevel({'a': NO_ID}, 'a')).encode('a')
    whole = backend.post_process(word).ids
  else:
    build = getattr(tokenizer, 'build_inputs_with_special_tokens', list)
    whole = build([NO_ID])
  at = whole.index(NO_ID)
  return whole[:at], whole[at + 1 :]


def open_ended(ids: list[int], start: list[int], end: list[int]) -> list[int]:
  """Ids of a text that a policy continues: the tokenizer's start stands there
  once, its end not at all.

  A text that begins with the start, or with the first tokens of it, loses
  them.
  """
  text = ids[len(start) : len(ids) - len(end)]
  counts = range(len(start), 0, -1)
  own = next((n for n in counts if text[:n] == start[:n]), 0)
  return [*ids[: len(start)], *text[own:]]


def encode_prompts(
  tokenizer,
  prompts: Sequence,
  where: Callable[[int], str] = str,
  chat: Chat = Chat(),  # noqa: B008  a record
  tools: Sequence | None = None,
  whole: bool = False,
) -> list[list[int]]:
  """Ids of many prompts, for a policy to continue.

  Text begins with the start token that the tokenizer puts there, once; an end
  token that it puts behind is left out. Messages go through the chat template,
  which writes its own start token.

  Args:
    where: names a prompt by its place, for errors.
    chat: of all messages.
    tools: of each prompt that is messages, or None.
    whole: keeps all that the tokenizer puts around a text, as the encoder of an
      encoder-decoder reads it: T5's </s>, the language of mBART.

  Raises ValueError where the template refuses a prompt.
  """
  texts = []
  for i, prompt in enumerate(prompts):
    try:
      if not isinstance(prompt, str):
        prompt = render(tokenizer, prompt, chat, tools and tools[i])
    except ValueError as e:
      raise ValueError(f'{where(i)}: {e}') from None
    texts.append(prompt)
  start, end = ([], []) if whole else added_ids(tokenizer)
  plain = [isinstance(prompt, str) for prompt in prompts]
  rows = {
    special: iter(
      encode_texts(
        tokenizer,
        [text for text, p in zip(texts, plain) if p == special],
        special,
      )
    )
    for special in set(plain)
  }
  return [
    open_ended(next(rows[True]), start, end) if p else next(rows[False])
    for p in plain
  ]


def prompt_ids(tokenizer, prompt, chat: Chat = Chat()) -> list[int]:  # noqa: B008
  """Ids of one prompt, text or messages."""
  return encode_prompts(tokenizer, [prompt], chat=chat)[0]


def answer_ids(tokenizer, answer, ends: Sequence[int]) -> list[int]:
  """Ids of a right answer, its end included: the first of `ends`, unless the
  answer's text ends with one of them."""
  found = text_ids(tokenizer, str(answer))
  return found if found and found[-1] in ends else [*found, ends[0]]


def bytes_bound(tokenizer, whole: bool = False) -> tuple[int, int] | None:
  """(factor, constant): a text of n > 0 bytes has 1 to factor * n + constant
  tokens. None: not proven for this tokenizer. whole: as encode_prompts has it.

  Byte-level BPE covers every byte of the normalised text by one token, and no
  token is of less than a byte. NFC makes UTF-8 at most three times as long.
  """
  backend = getattr(tokenizer, 'backend_tokenizer', None)
  if backend is None:
    return None
  from tokenizers import models, pre_tokenizers

  factor = {'NoneType': 1, 'NFC': 3}.get(type(backend.normalizer).__name__)
  splitter = backend.pre_tokenizer
  if isinstance(splitter, pre_tokenizers.Sequence):
    *splits, splitter = splitter
  else:
    splits = []
  if (
    factor is None
    or not isinstance(backend.model, models.BPE)
    or not isinstance(splitter, pre_tokenizers.ByteLevel)
    or splitter.add_prefix_space
    or not all(map(keeps_bytes, splits))
    or not set(pre_tokenizers.ByteLevel.alphabet()) <= set(backend.get_vocab())
  ):
    return None
  start, end = added_ids(tokenizer)
  return factor, len(start) + len(end) * whole


def keeps_bytes(splitter) -> bool:
  """A pre-tokenizer that cuts text and drops nothing of it."""
  from tokenizers import pre_tokenizers

  if isinstance(splitter, pre_tokenizers.Digits):
    return True
  return (
    isinstance(splitter, pre_tokenizers.Split)
    and splitter.behavior.lower() != 'removed'
  )


def largest_id(tokenizer) -> float:
  """Largest id that text can become; infinity where that is not known."""
  backend = getattr(tokenizer, 'backend_tokenizer', None)
  return max(backend.get_vocab().values()) if backend else float('inf')


def stop_ids(tokenizer, names: Sequence[str], vocab_size: int) -> list[int]:
  """Ids of the tokens that --stop_token names, by their text or their id.

  Raises ValueError, in one line, for a text that is not one token and an id
  that the model has no row for.
  """
  found = []
  for name in names:
    is_id = name.isascii() and name.isdecimal()
    ids = [int(name)] if is_id else text_ids(tokenizer, name)
    if len(ids) != 1:
      raise ValueError(
        f'--stop_token {name!r} is {len(ids)} tokens of the tokenizer, {ids}; '
        'name one token, by its text or its id'
      )
    if ids[0] >= vocab_size:
      raise ValueError(
        f'--stop_token {name!r} is id {ids[0]} and the model has {vocab_size} '
        'rows; name a token of the model'
      )
    found += ids
  return found
