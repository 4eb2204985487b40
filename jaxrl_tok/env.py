"""Environment: versions, devices and settings that a report of a fault needs.

  python -m jaxrl_tok.env

Prints JSON of a run's own env.json, with the packages of the extras that are
installed, cores, memory, and the environment variables of jax, XLA and CUDA;
no other variable is read.
"""

import json
import os
import re
from importlib import metadata

VARIABLES = r'(JAX|XLA|LIBTPU|TPU|CUDA|NCCL)_'


def extras() -> dict[str, str]:
  """{package: version} of what jaxrl_tok's extras ask for and is installed."""
  found = {}
  for required in ['jaxlib', *(metadata.requires('jaxrl_tok') or [])]:
    name = re.match(r'[\w.-]+', required)[0]
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  return found


def variables() -> dict[str, str]:
  """Environment variables of jax and what is below it."""
  return {k: v for k, v in sorted(os.environ.items()) if re.match(VARIABLES, k)}


def environment() -> dict:
  """All that is printed."""
  from jaxrl_tok.run import record

  pages, size = os.sysconf('SC_PHYS_PAGES'), os.sysconf('SC_PAGE_SIZE')
  return {
    **record.environment(),
    'packages': extras(),
    'cores': os.cpu_count(),
    'memory': f'{pages * size / 1024**3:.0f} GiB',
    'variables': variables(),
  }


if __name__ == '__main__':
  print(json.dumps(environment(), indent=2))
