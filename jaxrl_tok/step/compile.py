"""Compilation of many programs in parallel, whatever they compute."""

import concurrent.futures
import os
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxrl_tok.step import memory

# compiler options of a program that runs rarely, for milliseconds
QUICKLY = {'xla_backend_optimization_level': 0}


class Job(NamedTuple):
  """Program to compile: the first function that fits the device is taken."""

  functions: list[Callable]  # jitted
  args: tuple  # arrays or ShapeDtypeStructs


def compile_all(jobs: dict) -> dict:
  """Compiles {name: Job} to {name: compiled}, a job for each two cores at a
  time: a compilation uses about two. Must run under jax.set_mesh."""
  mesh = jax.sharding.get_mesh()
  device = mesh.devices.flat[0]

  def build(job: Job):
    with jax.set_mesh(mesh):  # each thread has its own
      return memory.first_that_fits(job.functions, job.args, device)

  threads = max(1, (os.cpu_count() or 2) // 2)
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    return dict(zip(jobs, pool.map(build, jobs.values())))
