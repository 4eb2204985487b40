"""Games: their rules, and what optimal or scripted players get."""

import random
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok import environments
from jaxrl_tok.data import split
from jaxrl_tok.environments.games import (
  dialogue,
  guess_number,
  maze,
  negotiation,
  twenty_questions,
  wordle,
)
from jaxrl_tok.environments.play import (
  demonstration,
  noisy,
  play,
  random_player,
)

GAMES = {
  'maze': (environments.maze(), environments.maze_examples()),
  'partial maze': (
    environments.maze('partially'),
    environments.maze_examples('partially'),
  ),
  'wordle': (environments.wordle(), environments.wordle_examples()),
  'numbers': (
    environments.guess_number(),
    environments.guess_number_examples(),
  ),
  'questions': (
    environments.twenty_questions(),
    environments.twenty_questions_examples(),
  ),
  'calculator': (
    environments.calculator(),
    environments.calculator_examples(),
  ),
  'dialogue': (environments.dialogue(), environments.dialogue_examples()),
  'negotiation': (
    environments.negotiation(),
    environments.negotiation_examples(),
  ),
}
SAYINGS = (
  *maze.MOVES,
  *('about', 'xxxxx', '50', '-1', '9' * 99, 'is it a dog?', 'is it an animal'),
  *('which food please?', 'area', 'book thai north cheap', 'book', ''),
  *('offer 1 1 1', 'offer 9 9 9', 'accept', 'ACCEPT ', '\n', '🙂'),
)


def total(played) -> float:
  return mean(p.total for p in played)


def all_right(played) -> bool:
  return all(p.info['success'] and p.ended == 'terminated' for p in played)


# --- laws of every game ------------------------------------------------------


@pytest.mark.parametrize('name', GAMES)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_any_text_is_an_action_and_every_episode_ends(name, seed):
  """Answers are what the protocol has; equal actions give equal episodes."""
  make, examples = GAMES[name]
  some = random.Random(seed).sample(examples, 3)
  first, second = (
    play(make, random_player(SAYINGS, seed), some, max_turns=101)
    for _ in range(2)
  )
  assert first == second
  for played in first:
    assert played.ended
    assert all(isinstance(text, str) for text in played.observations)
    assert isinstance(played.info['success'], bool)


@pytest.mark.parametrize('name', GAMES)
def test_splits_of_a_game_are_other_episodes(name):
  examples = GAMES[name][1]
  others = [e | {'episode': f'test {i}'} for i, e in enumerate(examples)]
  found = split(examples, others)
  assert len(found.train) == len(examples)
  assert len(found.held_out) == len(examples)
  assert len(split(examples, 5).held_out) == 5


# --- the maze ----------------------------------------------------------------


@pytest.mark.parametrize(
  ('observed', 'optimum'), [('fully', -6.84), ('partially', -7.24)]
)
def test_the_optimum_of_the_maze(observed, optimum):
  """Dynamic programming, and its player in the environment, agree; no walk of
  others is better on average."""
  played = play(
    environments.maze(observed),
    environments.maze_player(observed),
    environments.maze_examples(observed, rules='Walk!\n'),
  )
  assert maze.solve(observed)[0] == pytest.approx(optimum)
  assert total(played) == pytest.approx(optimum)
  assert all_right(played)


def test_the_optimum_is_the_mean_shortest_path():
  """Breadth first, from the goal."""
  steps, edge = {maze.GOAL: 0}, [maze.GOAL]
  while edge:
    cell = edge.pop(0)
    for action in maze.MOVES:
      if (there := maze.move(cell, action)) not in steps:
        steps[there] = steps[cell] + 1
        edge.append(there)
  assert len(maze.STARTS) == 25
  assert mean(1 - steps[c] for c in maze.STARTS) == pytest.approx(-6.84)


def test_moves_of_the_maze():
  episode = environments.maze(max_steps=4)()
  episode.reset(0, {'start': [5, 6]})
  assert episode.step(' Move  UP\n')[:4] == (
    'The goal is at position 8, 6. Your current position is at position 5, 6. '
    'There is a wall above you.\n',
    -1.0,
    False,
    False,
  )
  assert episode.step('go up')[1] == -4
  assert episode.step('move down')[0] == (
    'The goal is at position 8, 6. Your current position is at position 6, 6. '
    'There are walls to your right, to your left.\n'
  )
  assert episode.step('move up')[:4] == ('Failure\n', -1.0, False, True)
  assert maze.describe((1, 10), 'fully').split('. ')[1].endswith('1, 1 0')
  assert maze.describe((1, 1), 'partially') == (
    'There are walls to your left, above you, below you.\n'
  )
  with pytest.raises(ValueError, match='fully or partially'):
    environments.maze('not')
  with pytest.raises(ValueError, match='no maze starts'):
    episode.reset(0, {'start': [0, 0]})


def test_a_walk_becomes_a_demonstration():
  examples = environments.maze_examples()[:2]
  played = play(
    environments.maze(),
    noisy(environments.maze_player(), list(maze.MOVES), 0.3),
    examples,
  )
  for episode in played:
    first, *turns = demonstration(episode)
    assert first == {'observation': episode.observations[0]}
    assert [t['action'] for t in turns] == episode.actions
    assert [t['observation'] for t in turns] == episode.observations[1:]


# --- words, numbers, questions -----------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
  st.text('abc', min_size=5, max_size=5), st.text('abc', min_size=5, max_size=5)
)
def test_answers_of_wordle(guess, word):
  """A letter is green where it stands; greens and yellows together are as many
  as both words have in common."""
  marks = wordle.answer(guess, word).split()
  assert [m == 'g' for m in marks] == [g == w for g, w in zip(guess, word)]
  for letter in 'abc':
    told = sum(g == letter and m != 'b' for g, m in zip(guess, marks))
    assert told == min(guess.count(letter), word.count(letter))


def test_a_game_of_wordle():
  assert wordle.answer('paper', 'apple') == 'y y g y b'
  assert len(set(wordle.WORDS)) == 200
  episode = environments.wordle(['apple', 'paper'], max_turns=2)()
  episode.reset(0, {'word': 'apple'})
  assert episode.step('zebra')[:3] == ('not in the list\n', -1.0, False)
  assert episode.step('paper')[:3] == ('y y g y b\n', -1.0, True)
  episode.reset(0, {'word': 'apple'})
  assert episode.step('A p p l e')[:3] == ('g g g g g\n', 0.0, True)
  with pytest.raises(ValueError, match="'Apple' is no word"):
    environments.wordle(['Apple'])
  with pytest.raises(ValueError, match='not in the list'):
    episode.reset(0, {'word': 'zebra'})


def test_players_of_words_and_questions():
  """Scores that the modules state."""
  played = play(
    environments.wordle(),
    environments.wordle_player(),
    environments.wordle_examples(),
  )
  assert (total(played), all_right(played)) == (pytest.approx(-1.6), True)
  played = play(
    environments.twenty_questions(),
    environments.twenty_questions_player,
    environments.twenty_questions_examples(),
  )
  assert (total(played), all_right(played)) == (
    pytest.approx(-5.571, abs=1e-3),
    True,
  )
  bound = -twenty_questions.bound(42) / 42
  assert total(played) <= bound == pytest.approx(-4.857, abs=1e-3)


def test_questions_are_answered_by_the_table():
  things = set(twenty_questions.THINGS)
  assert all(true <= things for true in twenty_questions.TRUE.values())
  assert twenty_questions.answer('Is it an animal', 'dog') == 'yes'
  assert twenty_questions.answer('is it the cat?', 'dog') == 'no'
  assert twenty_questions.answer('why?', 'dog') == 'ask another question'


@pytest.mark.parametrize('count', [1, 7, 100])
def test_halving_is_optimal(count):
  played = play(
    environments.guess_number(),
    environments.guess_number_player,
    environments.guess_number_examples(high=count),
  )
  assert total(played) == pytest.approx(guess_number.optimum(count))
  assert all_right(played)


def test_answers_to_guesses():
  episode = environments.guess_number(4)()
  episode.reset(0, {'low': 1, 'high': 9, 'number': 5})
  said = [episode.step(a)[0] for a in ('Is it 4?', '6', '10')]
  assert said == ['higher\n', 'lower\n', 'a number from 1 to 9\n']
  assert episode.step('no idea')[1:4] == (-1.0, False, True)
  with pytest.raises(ValueError, match='the number 0 is not in 1'):
    episode.reset(0, {'low': 1, 'high': 9, 'number': 0})
  assert len(environments.guess_number_examples(count=3)) == 3


# --- dialogue ----------------------------------------------------------------


def test_a_polite_player_serves_everybody():
  played = play(
    environments.dialogue(),
    environments.dialogue_player,
    environments.dialogue_examples(),
  )
  assert all_right(played)
  kind = [p for p in played if p.example['kind']]
  assert len(kind) == len(played) / 2 == 144
  assert total(kind) == pytest.approx(0.9)
  assert total(played) == pytest.approx(0.85)


def test_a_user_has_manners_and_little_time():
  user = {
    'goal': {'food': 'thai', 'area': 'north', 'price': 'cheap'},
    'first': 'food',
    'kind': False,
    'patience': 5,
  }
  episode = environments.dialogue()()
  episode.reset(0, user)
  assert episode.step('which area please')[:2] == ('In the north.\n', -0.1)
  assert episode.patience == 4
  assert episode.step('which area please')[:2] == ('In the north.\n', -0.1)
  assert episode.patience == 2  # it was told already
  assert episode.step('price!')[:3] == ('Goodbye.\n', -1.0, True)
  episode.reset(0, user | {'kind': True})
  assert episode.step('the price please?')[0] == (
    'In the north. It should be cheap.\n'
  )
  assert episode.step('Book north, cheap, thai.')[1:3] == (1.0, True)
  episode.reset(0, user)
  assert episode.step('book thai north')[1:3] == (0.0, True)
  episode.reset(0, user)
  assert episode.step('hm')[:2] == ('Pardon?\n', -0.1)
  assert episode.patience == 3


# --- the calculator ----------------------------------------------------------


def test_a_tool_does_arithmetic():
  examples = environments.calculator_examples(20)
  played = play(
    environments.calculator(), environments.calculator_player, examples
  )
  assert all_right(played)
  assert {(len(p.actions), p.total) for p in played} == {(2, 1.0)}
  wrong = play(environments.calculator(), lambda *_: '42', examples[:1])
  assert (wrong[0].total, wrong[0].info) == (0.0, {'success': False})


# --- negotiation -------------------------------------------------------------


def test_the_equilibrium_is_played_and_nobody_gains_by_leaving_it():
  """The player gets what backward induction says, by seat; a seat that plays
  anything else against it gets no more."""
  examples = environments.negotiation_examples(12)
  player = environments.negotiation_player()
  make = environments.negotiation()
  for played in play(make, player, examples):
    e = played.example
    solved = negotiation.solve(e['counts'], e['values'], 4)
    got = [10 * played.info['rewards'][seat] for seat in (0, 1)]
    assert got == pytest.approx(solved)
    for seat in (0, 1):
      for seed in range(6):
        offers = [
          f'offer {i} {j} {k}'
          for i in (0, 1)
          for j in (0, 1, 2)
          for k in (0, 1)
        ]
        strange = random_player((*offers, 'accept', 'no'), seed)

        def mixed(example, seen, said, seat=seat, strange=strange):
          chosen = strange if len(said) % 2 == seat else player
          return chosen(example, seen, said)

        (other,) = play(make, mixed, [e])
        mine = sum(i.get('rewards', {}).get(seat, 0) for i in other.infos)
        assert 10 * mine <= solved[seat] + 1e-9


def test_deals_are_paid_by_seat():
  example = {'counts': [1, 2, 3], 'values': [[4, 3, 0], [1, 0, 3]]}
  episode = environments.negotiation(3)()
  assert episode.reset(0, example) == ('', {'seat': 0})
  found = episode.step('accept')  # there is no offer yet
  info = {'seat': 1, 'rewards': {0: -0.1, 1: 0.0}, 'success': False}
  assert found == ('What? Seat 1:\n', -0.1, False, False, info)
  assert episode.step('offer 0 0 2')[0] == (
    'You would get 1 books, 2 hats, 1 balls. Seat 0:\n'
  )
  text, reward, over, _, info = episode.step('accept')
  assert (text, reward, over) == ('A deal.\n', 1.0, True)
  assert info['rewards'] == {0: 1.0, 1: 0.6}
  episode.reset(0, example)
  for _ in range(3):
    found = episode.step('offer 1 2 3')
  assert found[:3] == ('No deal.\n', 0.0, True)
  with pytest.raises(ValueError, match='worth 3 points to seat 0'):
    episode.reset(0, {'counts': [1, 1, 1], 'values': [[1, 1, 1]] * 2})
  with pytest.raises(ValueError, match='2 or more'):
    environments.negotiation(1)


def test_games_that_are_drawn_are_worth_ten_to_both():
  for e in environments.negotiation_examples(30, 'test'):
    assert all(negotiation.points(e['counts'], v) == 10 for v in e['values'])


def test_examples_of_a_dialogue_are_all_users_once():
  found = environments.dialogue_examples()
  keys = {(*e['goal'].values(), e['first'], e['kind']) for e in found}
  assert len(keys) == len(found) == 288
  assert set(found[0]['goal']) == set(dialogue.SLOTS)
