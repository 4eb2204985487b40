"""Language that a tokenizer of many (mBART's) writes beside every text."""

import json
import re

from jaxrl_tok.hub.tokenizer_settings import SETTINGS

CODE = r'[a-z]{2,3}_[A-Z][A-Za-z]{1,3}'  # en_XX


def use_source_language(backend, settings: dict) -> None:
  """Has the post-processor write the language that src_lang names, instead of
  the one that tokenizer.json was saved with, as transformers' classes do.

  backend: tokenizers.Tokenizer, changed in place. Raises ValueError, in one
  line, for a language that is no token.
  """
  from tokenizers.processors import TemplateProcessing

  language, processor = settings.get('src_lang'), backend.post_processor
  if language is None or not isinstance(processor, TemplateProcessing):
    return
  state = json.loads(processor.__getstate__())
  written = list(state['special_tokens'])
  codes = [token for token in written if re.fullmatch(CODE, token)]
  if len(codes) != 1 or codes == [language]:
    return
  if backend.token_to_id(language) is None:
    raise ValueError(
      f'{SETTINGS} has src_lang {language!r}, which is no token of '
      'tokenizer.json; correct it'
    )

  def swapped(token: str) -> str:
    return language if token == codes[0] else token

  def piece(part: dict) -> str:
    ((kind, found),) = part.items()
    text = f'${found["id"]}' if kind == 'Sequence' else swapped(found['id'])
    return f'{text}:{found["type_id"]}'

  backend.post_processor = TemplateProcessing(
    single=list(map(piece, state['single'])),
    pair=list(map(piece, state['pair'])),
    special_tokens=[
      (token, backend.token_to_id(token)) for token in map(swapped, written)
    ],
  )
