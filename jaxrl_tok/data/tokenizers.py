"""Text to token ids and back.

`prompt_ids` reads one prompt, `encode_prompts` many in one call to the
tokenizer's Rust code. Messages go through the model's chat template.
"""

from collections.abc import Callable, Sequence


def byte_tokenizer():
  """A tokenizer with one id for each byte, then <pad> and <eos>: 258 ids.

  Returns a transformers tokenizer, which saves Hugging Face files.
  """
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {symbol: i for i, symbol in enumerate(alphabet)}
  tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(['<pad>', '<eos>'])
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
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


def render_prompt(tokenizer, prompt) -> str:
  """Text of a prompt: messages go through the chat template."""
  if isinstance(prompt, str):
    return prompt
  if not getattr(tokenizer, 'chat_template', None):
    raise ValueError(
      'the prompt is a list of messages and the tokenizer has no chat '
      'template; give prompts as text, or a model with a template'
    )
  try:
    return tokenizer.apply_chat_template(
      prompt, tokenize=False, add_generation_prompt=True
    )
  except Exception as e:  # a template raises what it likes
    raise ValueError(
      f'the chat template refuses the messages ({" ".join(str(e).split())}); '
      'use the roles, in the order, that the model knows'
    ) from None


def encode_texts(
  tokenizer, texts: Sequence[str], add_special_tokens: bool
) -> list[list[int]]:
  """Ids of many texts; the tokenizer's own threads share the work."""
  backend = getattr(tokenizer, 'backend_tokenizer', None)
  if backend is None:
    more = {} if add_special_tokens else {'add_special_tokens': False}
    return [tokenizer(text, **more)['input_ids'] for text in texts]
  if backend.truncation is not None:  # a tokenizer.json may ask for them
    backend.no_truncation()
  if backend.padding is not None:
    backend.no_padding()
  found = backend.encode_batch_fast(
    texts, add_special_tokens=add_special_tokens
  )
  return [encoding.ids for encoding in found]


def encode_prompts(
  tokenizer, prompts: Sequence, where: Callable[[int], str] = str
) -> list[list[int]]:
  """Ids of many prompts. A prompt that the template refuses is named by
  where(its place in `prompts`)."""
  texts = []
  for i, prompt in enumerate(prompts):
    try:
      texts.append(render_prompt(tokenizer, prompt))
    except ValueError as e:
      raise ValueError(f'{where(i)}: {e}') from None
  # a template writes its own start token
  plain = [isinstance(prompt, str) for prompt in prompts]
  groups = {
    special: iter(
      encode_texts(
        tokenizer,
        [text for text, p in zip(texts, plain) if p == special],
        special,
      )
    )
    for special in set(plain)
  }
  return [next(groups[special]) for special in plain]


def prompt_ids(tokenizer, prompt) -> list[int]:
  """Text as the tokenizer reads it; messages through its chat template."""
  text = render_prompt(tokenizer, prompt)
  return encode_texts(tokenizer, [text], isinstance(prompt, str))[0]


def bytes_bound(tokenizer) -> tuple[int, int] | None:
  """(factor, constant): a text of n > 0 bytes has 1 to factor * n + constant
  tokens. None: not proven for this tokenizer.

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
  constant = len(encode_texts(tokenizer, [''], True)[0])
  return factor, constant


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
