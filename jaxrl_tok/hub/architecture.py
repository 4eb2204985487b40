"""Architectures: networks of which the families are configurations.

A family (families.py) names one; whoever has a loaded model needs no more than
its functions, and a network of another kind is another value.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxrl_tok.hub import layout, seq2seq_layout
from jaxrl_tok.models import encoder_decoder, transformer


class Architecture(NamedTuple):
  """Functions of a network's configuration, a frozen dataclass.

  Its fields or properties that others read: vocab_size, max_length (prompt and
  completion), tie_embeddings, lm_head (False: a classifier) and value_head.
  """

  make_policy: Callable  # (config, dtype, remat, attention, scan_layers)
  param_mappings: Callable  # (config, family) -> [ParamMapping]
  peft_task: str = 'CAUSAL_LM'  # adapter_config.json's task_type


TRANSFORMER = Architecture(transformer.make_policy, layout.param_mappings)
ENCODER_DECODER = Architecture(
  encoder_decoder.make_policy, seq2seq_layout.param_mappings, 'SEQ_2_SEQ_LM'
)
