"""Model: a Hugging Face directory as it describes itself, without weights."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxrl_tok.hub import families
from jaxrl_tok.hub.layout import ParamMapping
from jaxrl_tok.models.encoder_decoder_config import EncoderDecoderConfig
from jaxrl_tok.types import Policy


class TensorInfo(NamedTuple):
  """Tensor in a file."""

  file: Path
  name: str  # in the file; some files leave out the family's first word
  shape: tuple
  dtype: str  # safetensors' name: F32


class Model(NamedTuple):
  """Configuration, tokenizer and special tokens; where the weights are."""

  config: Any  # of the family's architecture
  hf_config: dict  # config.json
  tokenizer: Any
  end_tokens: tuple
  pad_token: int
  origin: str  # hub id or directory; 'random weights'
  directory: Path | None = None  # None: random weights
  tensors: dict = {}  # noqa: RUF012  {name: TensorInfo}; read only
  notes: tuple = ()  # contradictions between its files, each in one line

  @property
  def family(self) -> families.Family:
    return families.family_of(self.hf_config)

  @property
  def vocab_size(self) -> int:
    return self.config.vocab_size

  @property
  def max_length(self) -> int:
    """Largest number of tokens of a prompt and its completion together."""
    return self.config.max_length

  @property
  def is_classifier(self) -> bool:
    """Tells a model that scores text (a reward model) from one that writes."""
    return not self.config.lm_head

  @property
  def is_encoder_decoder(self) -> bool:
    """Tells a model whose encoder reads the prompt, with all that the tokenizer
    puts around it, and whose decoder writes from its start tokens on."""
    return isinstance(self.config, EncoderDecoderConfig)

  @property
  def param_mappings(self) -> list[ParamMapping]:
    """Places of all parameters in the files."""
    return self.family.architecture.param_mappings(self.config, self.family)

  def make_policy(
    self,
    dtype=jnp.float32,
    remat: str = 'none',
    attention: str = 'auto',
    scan_layers: bool | None = None,
  ) -> Policy:
    """Network of this configuration; arguments as transformer.make_policy."""
    make_policy = self.family.architecture.make_policy
    return make_policy(self.config, dtype, remat, attention, scan_layers)

  def with_value_head(self) -> 'Model':
    """Gives the model a value head: of a policy, a critic."""
    return self._replace(
      config=dataclasses.replace(self.config, value_head=True),
      hf_config=self.hf_config | {'jaxrl_tok_value_head': True},
    )

  def as_classifier(self) -> 'Model':
    """Gives a decoder one score in place of its logits: a reward model, whose
    score begins at 0 for every text. Raises ValueError for an
    encoder-decoder."""
    if self.is_classifier:
      return self
    if self.is_encoder_decoder:
      raise ValueError(
        f'{self.origin} is an encoder-decoder, and a reward model reads prompt '
        'and completion as one text; give a decoder'
      )
    config = dataclasses.replace(self.config, lm_head=False, value_head=True)
    pad = self.pad_token
    if pad in self.end_tokens:  # transformers scores the last other token
      others = set(self.tokenizer.all_special_ids) - set(self.end_tokens)
      pad = min(others, default=pad)
    hf_config = self.hf_config | {
      'architectures': [families.classifier_name(self.hf_config)],
      'num_labels': 1,
      'id2label': {'0': 'score'},
      'label2id': {'score': 0},
      'pad_token_id': int(pad),
    }
    head = f'{self.family.names["head"]}.weight'
    tensors = {k: v for k, v in self.tensors.items() if k != head}
    return self._replace(config=config, hf_config=hf_config, tensors=tensors)
