"""Settings beside tokenizer.json, each of the kind that FIELDS has it.

1. `read_settings` reads tokenizer_config.json and special_tokens_map.json.
2. `chat_templates` reads the chat template, or several that have names.
"""

import json
import re
from pathlib import Path

SETTINGS = 'tokenizer_config.json'


def read_json(path: Path) -> dict:
  """Reads a JSON object. Raises ValueError, in one line, for anything else."""
  try:
    found = json.loads(path.read_text('utf-8-sig'))
  except (ValueError, RecursionError) as e:  # not UTF-8; too deep, too long
    raise ValueError(f'{path}: not JSON ({e}); fetch it again') from None
  if not isinstance(found, dict):
    raise ValueError(
      f'{path}: a {type(found).__name__}, not an object; fetch it again'
    )
  return found


def read_if_there(path: Path) -> dict:
  """Reads a JSON object; empty where there is no such file."""
  return read_json(path) if path.is_file() else {}


def token_text(token) -> str | None:
  """Text of a token, which may be an object of its settings."""
  text = token.get('content') if isinstance(token, dict) else token
  return text if isinstance(text, str) else None


def is_token(value) -> bool:
  """Tells whether it is a token's text, or an object that has it."""
  return token_text(value) is not None


def all_tokens(value) -> bool:
  """Tells whether it is a list of tokens, or an object of them."""
  values = value.values() if isinstance(value, dict) else value
  return isinstance(value, (dict, list)) and all(map(is_token, values))


def numbered_tokens(value) -> bool:
  """Tells whether it is an object of tokens whose keys are ids."""
  return (
    isinstance(value, dict)
    and all(re.fullmatch('[0-9]{1,18}', key) for key in value)
    and all_tokens(value)
  )


def is_number(value) -> bool:
  """Tells whether it is a number."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_template(value) -> bool:
  """Tells whether it is a chat template, or several that have names."""
  if isinstance(value, dict):
    return all(isinstance(text, str) for text in value.values())
  if not isinstance(value, list):
    return isinstance(value, str)
  return all(
    isinstance(each, dict)
    and isinstance(each.get('name'), str)
    and isinstance(each.get('template'), str)
    for each in value
  )


TOKEN = is_token, 'a text or {"content": text}'
TOKENS = all_tokens, 'a list of texts or of {"content": text}'
FLAG = (lambda value: isinstance(value, bool)), 'true or false'
# fields that are read of the settings: (test, kind that they are of)
FIELDS = {
  **{f'{name}_token': TOKEN for name in ('bos', 'eos', 'pad', 'unk')},
  **{f'{name}_token': TOKEN for name in ('sep', 'cls', 'mask')},
  **{f'{name}_special_tokens': TOKENS for name in ('additional', 'extra')},
  **{f'add_{name}_token': FLAG for name in ('bos', 'eos')},
  'added_tokens_decoder': (
    numbered_tokens,
    'an object, {"id": {"content": text}}',
  ),
  'model_max_length': (is_number, 'a number'),
  'src_lang': (lambda value: isinstance(value, str), 'a text'),
  'chat_template': (
    is_template,
    'a text or a list of {"name": text, "template": text}',
  ),
}


def read_fields(path: Path) -> dict:
  """Reads settings; empty where there is no such file.

  Raises ValueError, in one line, for a field of FIELDS of another kind.
  """
  found = {k: v for k, v in read_if_there(path).items() if v is not None}
  for name, (fits, kind) in FIELDS.items():
    if name in found and not fits(found[name]):
      raise ValueError(
        f'{path}: {name} is {repr(found[name])[:60]}, not {kind}; correct it, '
        'or fetch the file again'
      )
  return found


def read_settings(directory: Path) -> dict:
  """Reads tokenizer_config.json, and what only special_tokens_map.json has."""
  legacy = read_fields(directory / 'special_tokens_map.json')
  return legacy | read_fields(directory / SETTINGS)


def read_template(path: Path) -> str:
  """Reads a chat template. Raises ValueError, in one line, for no UTF-8."""
  try:
    return path.read_text('utf-8-sig')
  except ValueError as e:
    raise ValueError(
      f'{path}: the chat template is not UTF-8 ({e}); fetch it again'
    ) from None


def chat_templates(directory: Path, settings: dict):
  """Chat template: its text, {name: text} of several, or None.

  Files come before settings: chat_template.jinja and those of
  additional_chat_templates/, chat_template.json, tokenizer_config.json.
  """
  found = {}
  for file in sorted((directory / 'additional_chat_templates').glob('*.jinja')):
    found[file.stem] = read_template(file)
  if (directory / 'chat_template.jinja').is_file():
    found['default'] = read_template(directory / 'chat_template.jinja')
  if not found:
    given = read_fields(directory / 'chat_template.json')
    given = given.get('chat_template') or settings.get('chat_template')
    if not isinstance(given, list):
      return given
    found = {each['name']: each['template'] for each in given}
  return found['default'] if list(found) == ['default'] else found
