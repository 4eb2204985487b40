"""From a source of records to batches of prompts.

  order       which record stands at which position
  records     one record; many
  chat        messages -> text
  sources     files, the hub, data sets, lists, functions -> records
  held_out    training and held-out records
  tokenizers  text <-> ids
  buckets     the few lengths of batches
  prompts     records -> batches of those lengths
  words       tokens -> the bytes that they add to decoded text
  stops       stop texts -> an automaton over tokens
  pieces      completions -> the text that each token adds
  pairs       preferred completions and the others
  drawing     records that are drawn at random, all different
  turns       observations -> the ids between turns

Nothing here imports jax, transformers or datasets before it is used.
"""

from jaxrl_tok.data.buckets import choose_buckets
from jaxrl_tok.data.chat import ROLES, Chat
from jaxrl_tok.data.drawing import check_counts, draw_different
from jaxrl_tok.data.held_out import Split, split
from jaxrl_tok.data.order import record_index, record_indices
from jaxrl_tok.data.pieces import make_pieces
from jaxrl_tok.data.prompts import (
  LONG_PROMPTS,
  PromptSet,
  batch_at,
  prompt_set,
)
from jaxrl_tok.data.records import (
  RESERVED,
  Records,
  data_fingerprint,
)
from jaxrl_tok.data.sources import open_records, read_jsonl, read_pairs
from jaxrl_tok.data.stops import end_at_stop, stop_automaton
from jaxrl_tok.data.tokenizers import (
  answer_ids,
  bpe_tokenizer,
  byte_tokenizer,
  decode_all,
  encode_prompts,
  prompt_ids,
  text_ids,
  word_tokenizer,
)
from jaxrl_tok.data.turns import check_history, demonstrate, make_talk

__all__ = [
  'LONG_PROMPTS',
  'RESERVED',
  'ROLES',
  'Chat',
  'PromptSet',
  'Records',
  'Split',
  'answer_ids',
  'batch_at',
  'bpe_tokenizer',
  'byte_tokenizer',
  'check_counts',
  'check_history',
  'choose_buckets',
  'data_fingerprint',
  'decode_all',
  'demonstrate',
  'draw_different',
  'encode_prompts',
  'end_at_stop',
  'make_pieces',
  'make_talk',
  'open_records',
  'prompt_ids',
  'prompt_set',
  'read_jsonl',
  'read_pairs',
  'record_index',
  'record_indices',
  'split',
  'stop_automaton',
  'text_ids',
  'word_tokenizer',
]
