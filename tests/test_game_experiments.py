"""Experiments of games: their settings hold what a good player would say."""

import functools

import pytest

from experiments import (
  dialogue,
  guess_number,
  maze,
  maze_walks,
  negotiation,
  twenty_questions,
  wordle,
)
from jaxrl_tok import environments
from jaxrl_tok.data import open_records, split
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


def test_walks_are_cut_into_moves():
  task = maze_walks.maze_walks(walks=1)
  tokenizer = task.tokenizer()
  for record in [*task.train, *task.held_out]:
    assert len(tokenizer.encode(record['answer'])) == 1
    assert tokenizer.unk_token_id not in tokenizer.encode(record['prompt'])
  assert {r['answer'] for r in task.train} == {
    'move up',
    'move down',
    'move left',
    'move right',
  }
  with pytest.raises(ValueError, match='a share of the moves'):
    maze_walks.maze_walks(noise=2)
