"""Experiments of games: their settings hold what a good player would say."""

import functools

import pytest

from experiments import (
  dialogue,
  guess_number,
  maze,
  negotiation,
  twenty_questions,
  wordle,
)
from jaxrl_tok import environments
from jaxrl_tok.data import demonstrate, make_talk, open_records, split
from jaxrl_tok.environments.play import play

CASES = {
  'maze': (maze, maze.maze, environments.maze_player()),
  'partial maze': (
    maze,
    functools.partial(maze.maze, 'partially'),
    environments.maze_player('partially'),
  ),
  'wordle': (wordle, wordle.wordle, environments.wordle_player()),
  'guess_number': (
    guess_number,
    guess_number.guess_number,
    environments.guess_number_player,
  ),
  'twenty_questions': (
    twenty_questions,
    twenty_questions.twenty_questions,
    environments.twenty_questions_player,
  ),
  'dialogue': (dialogue, dialogue.dialogue, environments.dialogue_player),
  'negotiation': (
    negotiation,
    functools.partial(negotiation.negotiation, 40),
    environments.negotiation_player(),
  ),
}


def settings_of(module, monkeypatch) -> dict:
  """Defaults that an experiment gives to main."""
  found = {}
  monkeypatch.setattr(
    module, 'main', lambda task, argv, **defaults: found.update(defaults)
  )
  module.run([])
  return found


@pytest.mark.parametrize('name', CASES)
def test_a_good_player_fits_into_the_settings(name, monkeypatch):
  """Every text has its tokens, turns and episodes have room, and no record is
  held out and trained on."""
  module, make_task, player = CASES[name]
  chosen, task = settings_of(module, monkeypatch), make_task()
  tokenizer = task.tokenizer()
  found = split(task.train, task.held_out)
  assert found.counts['removed'] == found.counts['repeated'] == 0

  def length(text) -> int:
    ids = tokenizer.encode(text)
    assert tokenizer.unk_token_id not in ids, text
    return len(ids)

  records = [*open_records(task.train), *open_records(task.held_out)]
  for played in play(task.environment, player, records[:300]):
    assert length(played.example['prompt']) >= 1
    assert len(played.actions) <= chosen['max_turns']
    said = [length(a) for a in played.actions]
    T = chosen['max_completion_length']
    assert max(said) <= T
    ends = sum(n < T for n in said)  # end tokens
    seen = sum(length(text) for text in played.observations)
    assert sum(said) + ends + seen <= chosen['max_episode_length']


def test_walks_are_shown_as_they_are_walked(monkeypatch):
  """A shown move is one token without an end, as a sampled one; each walk of a
  start is another record, and none is held out."""
  task = maze.maze(walks=2)
  tokenizer, T = task.tokenizer(), 1
  assert settings_of(maze, monkeypatch)['max_completion_length'] == T
  talk = make_talk(tokenizer, [tokenizer.eos_token_id], len(tokenizer))
  moves = set()
  for record in task.train:
    ids, mask = demonstrate(talk, record, record['walk'], T)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.unk_token_id not in ids
    said = [i for i, on in zip(ids, mask) if on]
    assert len(said) == len(record['walk']) - 1
    moves |= {tokenizer.decode([i]) for i in said}
  assert moves == {'move up', 'move down', 'move left', 'move right'}
  found = split(task.train, task.held_out)
  assert found.train.num_records == 2 * len(maze.maze().train)
  with pytest.raises(ValueError, match='a share in'):
    maze.maze(noise=2)
