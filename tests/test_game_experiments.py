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


@pytest.mark.parametrize(
  ('module', 'make_task', 'none', 'kinds'),
  [
    (maze, lambda n: maze.maze(walks=n), 0, 4),
    (wordle, lambda n: wordle.wordle(40, games=n), 0, 40),
    (dialogue, lambda n: dialogue.dialogue(calls=n), 0, 12),
  ],
)
def test_what_is_imitated_is_said_as_it_is_sampled(
  module, make_task, none, kinds, monkeypatch
):
  """A shown turn has an end token where it has room for one, as a sampled one;
  each demonstration is another record, and none is held out."""
  task, T = make_task(2), settings_of(module, monkeypatch)
  tokenizer, T = task.tokenizer(), T['max_completion_length']
  end = tokenizer.eos_token_id
  talk, said = make_talk(tokenizer, [end], len(tokenizer)), set()
  for record in task.train:
    shown = record[task.answers]
    ids, mask = demonstrate(talk, record, shown, T)
    assert tokenizer.unk_token_id not in ids
    texts = [turn['action'] for turn in shown[1:]]
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert sum(mask) == sum(min(n + 1, T) for n in lengths)
    said |= set(texts)
  assert len(said) >= kinds
  found, alone = split(task.train, task.held_out), make_task(none)
  assert alone.answers is None
  assert found.train.num_records == 2 * len(alone.train)


def test_noise_is_a_share():
  for make in (maze.maze, wordle.wordle, dialogue.dialogue):
    with pytest.raises(ValueError, match='a share in'):
      make(noise=2)
  with pytest.raises(ValueError, match='0 or more'):
    maze.maze(walks=-1)
