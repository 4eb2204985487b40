"""A policy of one's own: a recurrent network (GRU)."""

import jax
import jax.numpy as jnp
from common import even, sums

from jaxrl_tok import Policy, Prefix, Task, main

V, D = 258, 16  # bytes, <pad>, <eos>
SHAPES = {'embed': (V, D), 'x': (D, 3 * D), 'h': (D, 3 * D), 'out': (D, V)}


def init(key):
  keys = jax.random.split(key, len(SHAPES))
  draw = jax.nn.initializers.normal(D**-0.5)
  return {name: draw(k, SHAPES[name]) for name, k in zip(SHAPES, keys)}


def cell(params, h, token):  # [R, D], [R] -> [R, D]
  x = jnp.split(params['embed'][token] @ params['x'], 3, axis=1)
  g = jnp.split(h @ params['h'], 3, axis=1)
  update, reset = jax.nn.sigmoid(x[0] + g[0]), jax.nn.sigmoid(x[1] + g[1])
  return (1 - update) * h + update * jnp.tanh(x[2] + reset * g[2])


def read(params, h, tokens, real):  # [R, D], [R, t], bool [R, t]
  def step(h, column):
    h = jnp.where(column[1][:, None], cell(params, h, column[0]), h)
    return h, h

  h, hidden = jax.lax.scan(step, h, (tokens.T, real.T))
  return h, jnp.moveaxis(hidden, 0, 1)


def encode(params, prompts):
  real = jnp.arange(prompts.tokens.shape[1]) < prompts.length[:, None]
  h, _ = read(params, jnp.zeros((len(real), D)), prompts.tokens, real)
  return Prefix(h, h, prompts.length)


def extend(params, prefix, tokens, cache, at):
  h = jnp.repeat(prefix.kv, len(tokens) // len(prefix.kv), axis=0)
  h = h if cache is None else jnp.where(at == 0, h, cache)
  h, hidden = read(params, h, tokens, jnp.ones(tokens.shape, bool))
  return hidden, None if cache is None else h


def init_cache(rows, length):
  return jnp.zeros((rows, D))


gru = Policy(init, encode, extend, lambda p, h: h @ p['out'], init_cache, V)


def run(argv=None):
  return main(Task(sums, even, held_out=16), argv, policy=gru, num_prompts=8)


if __name__ == '__main__':
  run()
