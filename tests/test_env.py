"""Environment of a report: versions, devices, and no secret."""

import json

import jax

from jaxrl_tok import env


def test_versions_devices_and_no_secret(monkeypatch):
  monkeypatch.setenv('HF_TOKEN', 'hf_planted')
  monkeypatch.setenv('JAX_PLANTED', 'shown')
  text = json.dumps(env.environment())
  found = json.loads(text)
  assert 'hf_planted' not in text
  assert found['variables']['JAX_PLANTED'] == 'shown'
  assert found['jax'] == jax.__version__
  assert len(found['devices']) == len(jax.devices())
  assert {'numpy', 'transformers'} & found['packages'].keys()
