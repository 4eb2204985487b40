"""An optimizer of one's own: any optax transformation."""

import optax
from common import SETTINGS, even, sums

from jaxrl_tok import Task, main

lion = optax.chain(optax.clip_by_global_norm(0.5), optax.lion(3e-3))


def run(argv=None):
  task = Task(sums, even, held_out=16)
  settings = {k: v for k, v in SETTINGS.items() if k != 'learning_rate'}
  return main(task, argv, optimizer=lion, **settings)


if __name__ == '__main__':
  run()
