"""Reinforcement learning of language models on tokens.

  from jaxrl_tok import Task, main

  def short(prompts, completions, **columns):
    return [-len(c) for c in completions]

  main(Task('prompts.jsonl', short), model='Qwen/Qwen2.5-0.5B-Instruct')

Names are imported when they are used, so that `import jaxrl_tok` takes no time
and imports no jax.
"""

import importlib
import sys
import types

__version__ = '0.1.0'

_HOMES = {
  'Evaluation': 'run.task',
  'Task': 'run.task',
  'main': 'run.api',
  'Result': 'run.result',
  'Algorithm': 'types',
  'Carry': 'types',
  'Passes': 'types',
  'Policy': 'types',
  'Prefix': 'types',
  'on_device': 'step.device_rewards',
  'algorithms': 'credit.algorithms',
}
__all__ = sorted([*_HOMES, 'Interrupted', 'train'])


class Interrupted(Exception):
  """A signal asked the run to stop; its state is saved. Every process of the
  run knows."""

  agreed = True


class _Package(types.ModuleType):
  """Package whose `train` is the function. Importing the module train.py, the
  loop, would otherwise put the module in its place."""

  @property
  def train(self):
    return importlib.import_module(f'{__name__}.run.api').train

  @train.setter
  def train(self, module):
    pass


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
  if name not in _HOMES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(f'{__name__}.{_HOMES[name]}')
  found = module if name == 'algorithms' else getattr(module, name)
  globals()[name] = found
  return found


def __dir__():
  return [*globals(), *__all__]
