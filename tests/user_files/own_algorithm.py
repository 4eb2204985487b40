"""An algorithm of one's own: the sign of the reward above a level that follows
it, and a plain policy gradient."""

import jax.numpy as jnp
from common import SETTINGS, even, sums

from jaxrl_tok import Algorithm, Carry, Task, main
from jaxrl_tok.types import Advantage


def advantage(inputs, carries):
  above = inputs.reward.sum(1, keepdims=True) - carries['level']
  found = jnp.where(inputs.mask, jnp.sign(above), 0.0)
  return Advantage(found, metrics={'level': carries['level']})


def loss(stats, trajectory):
  return -trajectory.advantage * stats.logp, {}


def aggregate(mask, valid):
  return mask / jnp.maximum(mask.sum(), 1).astype(jnp.float32)


def follow(level, state, metrics):
  return 0.9 * level + 0.1 * metrics['reward']


level = Carry(lambda params: jnp.float32(0), follow)
mine = Algorithm('sign', advantage, loss, aggregate, carries={'level': level})


def run(argv=None):
  task = Task(sums, even, held_out=16)
  return main(task, argv, algorithm=mine, **SETTINGS)


if __name__ == '__main__':
  run()
