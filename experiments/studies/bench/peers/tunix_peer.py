"""Tunix: seconds for its Sampler's decode, or for one GRPOLearner step.

decode: one call of the Sampler, texts in, tokens on the host out. The cache is
just P + T long and no token is the end token. Prompts repeat G times, as
Tunix's own learner repeats them; the Sampler reads every copy.

step: from handing GRPOLearner a batch of C prompts, through its vanilla rollout
of G samples each, the reward, the gradient on all C x G rows at once and the
optimizer's update, until the new weights are there. The learner owns the loop,
so the data set's iterator stands between two steps: asked for the next batch,
it waits for the weights, closes that round and starts the next one. One inner
iteration, beta 0 (so no reference), Adam, no logging, no checkpoints.

The model is Tunix's Llama 3 with random weights, untied, no remat; weights,
activations and cache in the job's dtype.

  python tunix_peer.py '{"bench": "decode", "size": {...}, "prompts": 64, ...}'
"""

import protocol

# isort: split
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate import sampler as sampler_lib
from tunix.models.llama3 import model as llama3
from tunix.rl import rl_cluster as cluster_lib
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

PACKAGES = ['jax', 'flax', 'google-tunix']

# No token has this id: it serves as a pad and an end token that are never
# sampled, so that every row runs to T and no token is masked.
NEVER = -1


class Tokenizer:
  """Tokenizer whose texts are token ids, separated by spaces."""

  def encode(self, text):
    return [int(word) for word in text.split()]

  def decode(self, ids):
    return ' '.join(str(i) for i in ids)

  def bos_id(self):
    return None  # nothing is put before a prompt

  def eos_id(self):
    return NEVER

  def pad_id(self):
    return NEVER


def make_model(job):
  size = job['size']
  config = llama3.ModelConfig(
    num_layers=size['num_layers'],
    vocab_size=size['vocab_size'],
    embed_dim=size['d_model'],
    hidden_dim=size['d_ff'],
    num_heads=size['num_heads'],
    head_dim=size['head_dim'],
    num_kv_heads=size['num_kv_heads'],
    rope_theta=10_000,
    norm_eps=1e-6,
    weight_tying=False,
  )
  model = llama3.Llama3(config, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)

  def fresh(w):
    # Tunix starts the feed-forward weights at zero: draw every matrix anew.
    w = rng.normal(0.0, 0.02, w.shape) if w.ndim > 1 else w
    return jnp.asarray(w, job['dtype'])

  nnx.update(model, jax.tree.map(fresh, nnx.state(model)))
  return model


def make_prompts(job):
  V, shape = job['size']['vocab_size'], (job['prompts'], job['prompt_length'])
  tokens_CxP = np.random.default_rng(0).integers(V, size=shape)
  return [Tokenizer().decode(row) for row in tokens_CxP]


def decode(job):
  P, T, size = job['prompt_length'], job['completion_length'], job['size']
  cache = sampler_lib.CacheConfig(
    P + T, size['num_layers'], size['num_kv_heads'], size['head_dim']
  )
  sampler = sampler_lib.Sampler(make_model(job), Tokenizer(), cache)
  prompts = [p for p in make_prompts(job) for _ in range(job['samples'])]
  for i, _ in enumerate(protocol.rounds(PACKAGES, job)):
    out = sampler(prompts, T, P, temperature=1.0, top_p=1.0, seed=i)
    lengths = [len(row) for row in out.tokens]
    protocol.check('tokens in each row', lengths, [T] * len(prompts))


def make_reward(job):
  T, rows = job['completion_length'], job['prompts'] * job['samples']

  def share_of_even_tokens(prompts, completions, **columns):
    tokens = [Tokenizer().encode(text) for text in completions]
    lengths = [len(row) for row in tokens]
    protocol.check('tokens in each completion', lengths, [T] * rows)
    return [float(np.mean(np.array(row) % 2 == 0)) for row in tokens]

  return share_of_even_tokens


def make_cluster(job):
  """Makes a cluster of one device: actor and rollout share the weights."""
  devices_1x1 = np.array(jax.devices()[:1]).reshape(1, 1)
  mesh = jax.sharding.Mesh(devices_1x1, ('fsdp', 'tp'))
  P, T = job['prompt_length'], job['completion_length']
  role = cluster_lib.Role
  config = cluster_lib.ClusterConfig(
    role_to_mesh={role.ACTOR: mesh, role.REFERENCE: mesh, role.ROLLOUT: mesh},
    rollout_engine='vanilla',
    # No mini- or micro-batch size: all rows at once in the rollout and in the
    # gradient, one update a batch.
    training_config=cluster_lib.RLTrainingConfig(
      actor_optimizer=optax.adam(job['learning_rate']),
      eval_every_n_steps=1_000_000,
      max_steps=1_000_000,
    ),
    rollout_config=base_rollout.RolloutConfig(
      max_tokens_to_generate=T,
      max_prompt_length=P,
      kv_cache_size=P + T,
      temperature=1.0,
      top_p=1.0,
    ),
  )
  return cluster_lib.RLCluster(
    actor=make_model(job), tokenizer=Tokenizer(), cluster_config=config
  )


def step(job):
  cluster = make_cluster(job)
  grpo = grpo_learner.GRPOConfig(num_generations=job['samples'], beta=0.0)
  learner = grpo_learner.GRPOLearner(cluster, grpo, make_reward(job))
  prompts = np.array(make_prompts(job))  # repeated G times as an array

  def batches():
    for _ in protocol.rounds(PACKAGES, job):
      yield {'prompts': prompts}
      jax.block_until_ready(nnx.state(cluster.actor_trainer.model))

  learner.train(batches())


def main():
  job = protocol.read_job()
  # XLA makes its threads for the cores that this process may use.
  cores = sorted(os.sched_getaffinity(0))
  os.sched_setaffinity(0, cores[: job['threads']])
  jax.config.update('jax_platforms', 'cpu')
  {'decode': decode, 'step': step}[job['bench']](job)


if __name__ == '__main__':
  main()
