"""Compilation of many programs in parallel, whatever they compute."""

import concurrent.futures
import os
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxrl_tok.step import memory

# compiler options of a program that runs rarely, for milliseconds
QUICKLY = {'xla_backend_optimization_level': 0}
# options of all others on a CPU, whose time goes to products that are compiled
# already: 13 to 27 % less to compile than at level 3 (three programs), as fast
# to run
ON_CPU = {'xla_backend_optimization_level': 1}


class Job(NamedTuple):
  """Program to compile: the first function that fits the device is taken."""

  functions: list[Callable]  # jitted
  args: tuple  # arrays or ShapeDtypeStructs
  options: dict | None = None  # of the compiler; None: the usual ones


def compile_all(jobs: dict) -> dict:
  """Compiles {name: Job} to {name: compiled}, a job for each two cores at a
  time: a compilation uses about two. Must run under jax.set_mesh."""
  mesh = jax.sharding.get_mesh()
  device = mesh.devices.flat[0]
  usual = ON_CPU if device.platform == 'cpu' else {}

  def build(job: Job):
    with jax.set_mesh(mesh):  # each thread has its own
      options = usual if job.options is None else job.options
      return memory.first_that_fits(job.functions, job.args, device, options)

  threads = max(1, (os.cpu_count() or 2) // 2)
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    return dict(zip(jobs, pool.map(build, jobs.values())))
