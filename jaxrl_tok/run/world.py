"""Environments of a run, made from its settings."""

from jaxrl_tok import data, processes, sharding
from jaxrl_tok.environments import Stepper
from jaxrl_tok.run.inputs import chat_of
from jaxrl_tok.run.settings import Settings
from jaxrl_tok.run.task import Task
from jaxrl_tok.step.episodes import Limits, World


def make_world(
  task: Task, settings: Settings, model, T: int, *records
) -> World | None:
  """Makes the environments of a task, whose episodes have T tokens at most;
  None without any. records: data sets that are played.

  Raises ValueError for a model or a chat template that has no episodes.
  """
  if task.environment is None:
    return None
  if model.is_encoder_decoder:
    raise ValueError(
      f'episodes of several turns need one text that goes on, and '
      f'{model.origin} is an encoder-decoder; pass a decoder'
    )
  f, chat = settings.turns, chat_of(settings)
  for found in records:
    data.check_history(model.tokenizer, chat, found[0], f.history)
  on_error = settings.run.reward_on_error
  return World(
    Stepper(
      task.environment,
      f.turn_deadline,
      f.environment_workers,
      f.environment_processes,
      'raise' if on_error == 'raise' else 'end',
    ),
    data.make_talk(
      model.tokenizer,
      model.end_tokens,
      model.vocab_size,
      chat,
      settings.run.keep_special_tokens,
    ),
    Limits(
      *(f.max_turns, T, f.cut_turns, settings.model.length_buckets, f.seats)
    ),
    on_error,
  )


def check_played(world: World | None, algorithm, mesh) -> None:
  """Refuses what episodes of several turns cannot go with."""
  if world is None:
    return
  if algorithm.greedy:
    raise ValueError(
      f'{algorithm.name} compares with greedy completions, and episodes of '
      'several turns have none; choose another algorithm'
    )
  # those of absent devices, too
  everyone = sorted({d.process_index for d in mesh.devices.flat})
  if processes.each_row_once(mesh, sharding.row_shards(mesh)) != everyone:
    raise ValueError(
      'some processes share rows, as the tensor axis of --mesh spans them, and '
      'each would play their episodes; pass a --mesh whose tensor axis lies '
      'within a process'
    )
