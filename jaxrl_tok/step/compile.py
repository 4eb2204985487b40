"""Compilation of many programs in parallel, whatever they compute."""

import concurrent.futures
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from jaxrl_tok.step import memory

# bfloat16 is rounded where the program says so: by default XLA leaves rounding
# out inside of its fusions, which are others in a sampler than in a gradient
AS_WRITTEN = {'xla_allow_excess_precision': False}
# compiler options of a program that runs rarely, for milliseconds
QUICKLY = AS_WRITTEN | {'xla_backend_optimization_level': 0}
# options of all others on a CPU, whose time goes to products that are compiled
# already: 13 to 27 % less to compile than at level 3 (three programs), as fast
# to run
ON_CPU = AS_WRITTEN | {'xla_backend_optimization_level': 1}


class Job(NamedTuple):
  """Program to compile: the first function that fits the device is taken."""

  functions: list[Callable]  # jitted
  args: tuple  # arrays or ShapeDtypeStructs
  options: dict | None = None  # of the compiler; None: the usual ones
  # (in words, micro-batches) of each function of an update
  ways: Sequence[tuple[str, int]] = ()


def usual_options(platform: str) -> dict:
  """Compiler options of a run's programs on cpu, gpu or tpu; a level named in
  XLA_FLAGS stays."""
  named = 'xla_backend_optimization_level' in os.environ.get('XLA_FLAGS', '')
  return ON_CPU if platform == 'cpu' and not named else AS_WRITTEN


def compile_all(jobs: dict) -> dict:
  """Compiles {name: Job} to {name: compiled}, a job for each two cores at a
  time: a compilation uses about two. Must run under jax.set_mesh."""
  mesh = jax.sharding.get_mesh()
  device = mesh.local_devices[0]
  usual, most = usual_options(device.platform), memory.limit(device)

  def build(job: Job):
    with jax.set_mesh(mesh):  # each thread has its own
      options = usual if job.options is None else job.options
      return memory.first_that_fits(job.functions, job.args, most, options)

  threads = max(1, (os.cpu_count() or 2) // 2)
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    return dict(zip(jobs, pool.map(build, jobs.values())))
