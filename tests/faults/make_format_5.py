"""Makes tests/faults/format_5: a run's checkpoint in format 5, which has no
digests. It was made by the commit before digests, and is never made anew:

  PYTHONPATH=.:tests python tests/faults/make_format_5.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_tok import checkpoint
from jaxrl_tok.credit import advantages, algorithms
from jaxrl_tok.step.state import init_state

WHERE = Path(__file__).with_name('format_5')
STEP = 4
CURSOR = {
  'position': np.int64(77),
  'places': np.arange(2**40, 2**40 + 3),
  'valid': np.array([True, False]),
}
PROGRESS = {'step': STEP, 'num_tokens': 77, 'evaluated': STEP}
SETTINGS = {'seed': 3, 'learning_rate': 0.001, 'data_fingerprint': '0123456789'}


def example_state(filled: bool = True):
  """TrainState of a few numbers: parameters, moments, carries and a key.

  filled: all numbers differ; else those of a state that has just begun.
  """
  params = {
    'embed': {'embedding': jnp.ones((5, 4))},
    'layers': {'mlp': {'down': jnp.ones((2, 3, 4))}},
    'norm': {'scale': jnp.ones(4, jnp.bfloat16)},
  }
  algorithm = algorithms.reinforce(advantages.ema(), kl='reverse', beta=0.1)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  state = init_state(algorithm, optimizer, params, jax.random.key(2))
  if not filled:
    return state
  leaves, tree = jax.tree.flatten(state)
  leaves = [
    x + (jnp.arange(x.size).reshape(x.shape) / 7 + i).astype(x.dtype)
    if jnp.issubdtype(x.dtype, jnp.floating)
    else x
    for i, x in enumerate(leaves)
  ]
  return jax.tree.unflatten(tree, leaves).replace(step=jnp.int32(STEP))


if __name__ == '__main__':
  with checkpoint.open_checkpoints(WHERE, 2) as manager:
    checkpoint.save(manager, example_state(), CURSOR, PROGRESS, SETTINGS)
