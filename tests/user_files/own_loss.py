"""A loss of one's own: -A log p, weighted by how sure the policy was."""

import jax
import jax.numpy as jnp
from common import SETTINGS, even, sums

from jaxrl_tok import Task, main


def confident(stats, trajectory, power=0.5):
  sure = jax.lax.stop_gradient(jnp.exp(stats.logp)) ** power
  return -sure * trajectory.advantage * stats.logp, {'sure': sure}


def run(argv=None):
  task = Task(sums, even, held_out=16)
  return main(task, argv, loss=confident, algorithm='grpo', **SETTINGS)


if __name__ == '__main__':
  run()
