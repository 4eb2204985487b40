"""Environment that a process imports: it counts, and sleeps where told to."""

import os
import random
import time


class Count:
  """Counts actions; the third ends it. Sleeps as long as an action says."""

  closed = []  # noqa: RUF012

  def reset(self, seed, example):
    self.rng, self.said = random.Random(seed), []
    example['seen'] = True  # a copy of its own
    return f'{example["start"]} {self.rng.random()}', {'seed': seed}

  def step(self, action):
    if action == 'exit':  # its process is gone
      os._exit(3)
    time.sleep(float(action))
    self.said.append(action)
    text = f'{len(self.said)} {self.rng.random()}'
    return text, float(len(self.said)), len(self.said) == 3, False, {}

  def close(self):
    self.closed.append(1)
