"""Cache directory of the user: warm starts, and compiled programs."""

import hashlib
import os
import platform
from pathlib import Path

import jax
import jaxlib

SHORTEST = 0.2  # s; what compiles faster is compiled again


def user_cache() -> Path:
  home = os.environ.get('XDG_CACHE_HOME')
  # a container's user may have no home; expanduser then leaves the ~
  return Path(home or os.path.expanduser('~/.cache')) / 'jaxrl_tok'


def processor() -> str:
  """Hash of the processor's instructions: a home that several
  machines share must not hand one's instructions to another."""
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    lines = []
  able = [line for line in lines if line.startswith(('flags', 'Features'))][:1]
  text = platform.machine() + platform.processor() + ''.join(able)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def keep_programs() -> None:
  """Caches compiled programs by user, version of jax and processor;
  JAX_COMPILATION_CACHE_DIR names another place."""
  if jax.config.jax_compilation_cache_dir:
    return
  made_for = jax.__version__, jaxlib.__version__, processor()
  place = user_cache() / 'programs' / '-'.join(made_for)
  try:
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
  except OSError:  # a home that cannot be written is no reason to stop
    return
  jax.config.update('jax_compilation_cache_dir', str(place))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', SHORTEST)
