"""A baseline of one's own: the median return of the batch."""

import jax.numpy as jnp
from common import SETTINGS, even, sums

from jaxrl_tok import Task, main


def batch_median(returns, valid):
  return jnp.nanmedian(
    jnp.where(valid[..., None], returns, jnp.nan), axis=(0, 1), keepdims=True
  )


def run(argv=None):
  task = Task(sums, even, held_out=16)
  return main(task, argv, baseline=batch_median, **SETTINGS)


if __name__ == '__main__':
  run()
