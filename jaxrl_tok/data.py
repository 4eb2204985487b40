"""Records, the tokenizer, and batches of prompts.

1. `read_jsonl` turns a file into records, each {'prompt': text or messages,
   ...other columns}; every fault is named by file:line.
2. `tokenize` turns the prompts into ids once, checked at the door.
3. `batch_at` is a pure function of (seed, position): a resumed run needs
   nothing but the position.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrl_tok.types import Prompts

ROLES = ('system', 'user', 'assistant', 'tool')


class PromptSet(NamedTuple):
  """Records and their prompts as ids, int32 [n, P] and int32 [n]; columns are
  what rewards on the device read of a record, {name: [n, ...]}."""

  examples: list
  tokens: np.ndarray
  length: np.ndarray
  columns: dict = {}  # noqa: RUF012  never changed


def check_record(record, where: str) -> dict:
  """The record, when it has a prompt that can be used; else ValueError."""
  if not isinstance(record, dict):
    raise ValueError(
      f'{where}: a {type(record).__name__}, not an object; '
      'write {"prompt": ...} on each line'
    )
  if 'prompt' not in record:
    raise ValueError(
      f'{where}: no "prompt"; it has {", ".join(record) or "nothing"}'
    )
  prompt = record['prompt']
  if isinstance(prompt, list):
    for message in prompt:
      if not isinstance(message, dict) or not isinstance(
        message.get('content'), str
      ):
        raise ValueError(
          f'{where}: a message is {{"role": ..., "content": text}}, '
          f'not {message!r}'
        )
      if message.get('role') not in ROLES:
        raise ValueError(
          f'{where}: unknown role {message.get("role")!r}; '
          f'use {", ".join(ROLES)}'
        )
  elif not isinstance(prompt, str):
    raise ValueError(
      f'{where}: "prompt" is a {type(prompt).__name__}; '
      'it must be text or a list of messages'
    )
  if not prompt:
    raise ValueError(f'{where}: the prompt is empty; a policy needs a token')
  return record


def check_surrogates(record, where: str) -> None:
  """Refuses half of a surrogate pair, which no tokenizer or file takes."""
  try:
    json.dumps(record, ensure_ascii=False).encode('utf-8')
  except UnicodeEncodeError as e:
    raise ValueError(
      f'{where}: \\u{ord(e.object[e.start]):x} is half of a surrogate pair; '
      'write both halves, or the character itself'
    ) from None


def read_jsonl(path: str | Path) -> list[dict]:
  """One record a line; blank lines are skipped. Errors name file:line."""
  records = []
  with open(path, 'rb') as file:
    for number, raw in enumerate(file, 1):
      where = f'{path}:{number}'
      if number == 1 and raw.startswith(b'\xef\xbb\xbf'):
        raise ValueError(f'{where}: starts with a BOM; save it as plain UTF-8')
      try:
        line = raw.decode('utf-8').strip()
        record = json.loads(line) if line else None
      except UnicodeDecodeError as e:
        raise ValueError(f'{where}: not UTF-8 ({e.reason})') from None
      except json.JSONDecodeError as e:
        raise ValueError(
          f'{where}: not JSON ({e.msg}, column {e.colno})'
        ) from None
      except (ValueError, RecursionError) as e:  # a number or depth too large
        raise ValueError(f'{where}: not JSON ({e})') from None
      if re.search(r'\\u[dD][89a-fA-F]', line):
        check_surrogates(record, where)
      if line:
        records.append(check_record(record, where))
  if not records:
    raise ValueError(
      f'{path}: no records; write {{"prompt": ...}} on each line'
    )
  return records


# --- tokenizer ---------------------------------------------------------------


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


def decode_all(tokenizer, ids: list[list[int]]) -> list[str]:
  """Texts of completions, special tokens left out, in one call."""
  backend = getattr(tokenizer, 'backend_tokenizer', None)
  if backend is not None:
    return backend.decode_batch(ids, skip_special_tokens=True)
  return tokenizer.batch_decode(ids, skip_special_tokens=True)


def prompt_ids(tokenizer, prompt) -> list[int]:
  """Text as the tokenizer reads it; messages through its chat template."""
  if isinstance(prompt, str):
    return tokenizer(prompt)['input_ids']
  if not getattr(tokenizer, 'chat_template', None):
    raise ValueError(
      'the prompt is a list of messages and the tokenizer has no chat '
      'template; give prompts as text, or a model with a template'
    )
  try:
    text = tokenizer.apply_chat_template(
      prompt, tokenize=False, add_generation_prompt=True
    )
  except Exception as e:  # a template raises what it likes
    raise ValueError(
      f'the chat template refuses the messages ({" ".join(str(e).split())}); '
      'use the roles, in the order, that the model knows'
    ) from None
  return tokenizer(text, add_special_tokens=False)['input_ids']


def tokenize(
  records: Sequence[dict],
  tokenizer,
  vocab_size: int,
  max_prompt_length: int | None = None,
  name: str = 'prompt',
) -> PromptSet:
  """All prompts as right-padded ids.

  max_prompt_length None: as long as the longest. Raises ValueError, naming
  the record, for an empty prompt, one that is too long, or an id that the
  model has no row for.
  """
  if not records:
    raise ValueError(f'{name}: no records')
  rows = []
  for i, record in enumerate(records):
    try:
      rows.append(prompt_ids(tokenizer, record['prompt']))
    except ValueError as e:
      raise ValueError(f'{name} {i}: {e}') from None
  longest = max(map(len, rows))
  P = max_prompt_length or longest
  for i, row in enumerate(rows):
    if not row:
      raise ValueError(f'{name} {i} is empty; a policy needs a token')
    if len(row) > P:
      raise ValueError(
        f'{name} {i} has {len(row)} tokens, more than max_prompt_length {P}; '
        f'pass --max_prompt_length {longest} or shorten it'
      )
    if max(row) >= vocab_size or min(row) < 0:
      raise ValueError(
        f'{name} {i} has token id {max(row)} and the model has {vocab_size} '
        'rows; use the tokenizer that belongs to the model'
      )
  tokens = np.zeros((len(rows), P), np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
  return PromptSet(
    list(records), tokens, np.array([len(r) for r in rows], np.int32)
  )


# --- order -------------------------------------------------------------------


def record_indices(n: int, seed: int, position: int, count: int) -> np.ndarray:
  """Which records stand at positions position .. position + count - 1.

  Every epoch of n is its own permutation by (seed, epoch).
  """
  positions = np.arange(position, position + count)
  order = {
    epoch: np.random.default_rng((seed, epoch)).permutation(n)
    for epoch in range(positions[0] // n, positions[-1] // n + 1)
  }
  return np.array([order[p // n][p % n] for p in positions.tolist()])


def batch_at(data: PromptSet, seed: int, position: int, count: int):
  """The `count` prompts from a position on -> (examples, Prompts, columns)."""
  index = record_indices(len(data.examples), seed, position, count)
  examples = [data.examples[i] for i in index]
  columns = {name: values[index] for name, values in data.columns.items()}
  return examples, Prompts(data.tokens[index], data.length[index]), columns
