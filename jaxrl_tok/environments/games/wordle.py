"""Wordle: a hidden word of five letters, of a list of 200; six guesses.

The answer to a guess has a letter for each of its letters: g, it stands there
in the hidden word; y, it stands elsewhere in it; b, it does not occur, or not
as often as it was guessed.

  # hidden 'apple', guess 'paper': 'y y g y b'

A wrong guess costs 1, also a word that is not in the list, of whose letters
nothing is told; the right one costs nothing. `wordle_player` guesses, of the
words that are left, the one whose answers leave the fewest: its mean return
over the 200 words is -1.6, and it finds all of them.
"""

import functools
from collections import Counter

from jaxrl_tok.environments.games.words import episodes
from jaxrl_tok.environments.protocol import Maker

LIST = """
about above actor adult after again agree alarm album alive allow alone angel
anger angle apple apron arena argue arise audio avoid awake award bacon badge
baker basic beach beard begin below bench berry birth black blade blame blank
blind block blood board boost brain brand brave bread break brick bride brief
bring broad brown brush build bunch cabin cable camel candy cargo carry catch
cause chain chair chalk charm chase cheap check cheek chest child civil claim
class clean clear climb clock close cloth cloud coach coast count court cover
crane crash cream crime crowd crown curve daily dance death delay depth diary
dozen draft drama dream dress drink drive early earth elbow empty enemy enjoy
entry equal error event exact exist extra faith fancy favor fence fever field
fight final first flame flash fleet floor fluid focus force frame fresh front
fruit ghost giant glass globe grace grain grape grass green group guard guess
guest guide habit happy heart heavy honey horse hotel house human humor image
index inner issue ivory jelly joint judge juice knife label large laugh layer
lemon light limit lunch magic march match mayor medal metal model money month
mouse music night noise ocean
"""
WORDS = tuple(LIST.split())
PROMPT = 'Guess the word of five letters.\n'
LENGTH = 5


@functools.cache
def answer(guess: str, word: str) -> str:
  """Answer to a guess: 'g y b b b'."""
  left = Counter(w for g, w in zip(guess, word) if g != w)
  marks = []
  for g, w in zip(guess, word):
    if g != w and left[g] > 0:
      left[g] -= 1
      marks.append('y')
    else:
      marks.append('g' if g == w else 'b')
  return ' '.join(marks)


class Wordle:
  """Episode of Wordle; see the module."""

  def __init__(self, words: tuple = WORDS, max_turns: int = 6):
    self.words, self.max_turns = frozenset(words), max_turns

  def reset(self, seed: int, example: dict) -> tuple:
    self.word, self.turns = example['word'], 0
    if self.word not in self.words:
      raise ValueError(
        f'the hidden word {self.word!r} is not in the list; hide one of it'
      )
    return '', {}

  def step(self, action: str) -> tuple:
    guess = ''.join(action.lower().split())
    self.turns += 1
    if guess == self.word:
      return 'g g g g g\n', 0.0, True, False, {'success': True}
    known = guess in self.words
    text = answer(guess, self.word) if known else 'not in the list'
    over = self.turns >= self.max_turns
    return f'{text}\n', -1.0, over, False, {'success': False}


def check_words(words) -> tuple:
  """Words of a list, in small letters. Raises ValueError."""
  words = tuple(words)
  for word in words:
    if len(word) != LENGTH or not word.isalpha() or not word.islower():
      raise ValueError(
        f'{word!r} is no word of five small letters; leave it out of the list'
      )
  if not words:
    raise ValueError('the list of words is empty; give some of five letters')
  return words


def wordle(words=WORDS, max_turns: int = 6) -> Maker:
  """Maker of episodes with a list of words of one's own, or ours."""
  return functools.partial(Wordle, check_words(words), max_turns)


def wordle_examples(words=WORDS, split: str = 'train') -> list[dict]:
  """Records {'prompt', 'word'}, one for each word of a list."""
  return episodes(
    split, [{'prompt': PROMPT, 'word': word} for word in check_words(words)]
  )


def wordle_player(words=WORDS):
  """Player that takes, of the words that are left, the one whose answers leave
  the fewest on average; of equal ones the first in the list."""
  words = check_words(words)

  @functools.cache
  def choose(left: tuple) -> str:
    def cost(guess: str) -> int:
      counts = Counter(answer(guess, word) for word in left)
      return sum(n * n for n in counts.values())

    return min(left, key=cost)

  def player(example: dict, observations: list, actions: list) -> str:
    left = words
    for guess, text in zip(actions, observations[1:]):
      left = tuple(w for w in left if answer(guess, w) == text.strip())
    return choose(left)

  return player
