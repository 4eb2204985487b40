"""Twenty questions: a hidden thing, questions answered yes or no.

A question of QUESTIONS is answered by our table; 'is it a dog?' is a guess. A
question costs 1, a wrong guess and what is not understood as well; the right
guess costs nothing. An episode ends after 20 turns.

`twenty_questions_player` asks what halves the things that are left best, and
guesses where one or two are left: its mean return over the 42 things is -5.57.
No player is above -4.86, the optimum if there were a question for every half
(`bound`).
"""

import functools
import re

from jaxrl_tok.environments.games.words import episodes, normal
from jaxrl_tok.environments.protocol import Maker

PROMPT = 'I think of a thing. Ask questions that I can answer by yes or no.\n'
QUESTIONS = {
  'is it an animal?': (
    'dog cat horse cow sheep chicken eagle penguin duck shark salmon frog '
    'snake bee spider elephant'
  ),
  'is it a mammal?': 'dog cat horse cow sheep elephant',
  'does it live on a farm?': 'horse cow sheep chicken duck',
  'can it fly?': 'eagle duck bee airplane',
  'does it swim?': 'penguin duck shark salmon frog boat',
  'does it have feathers?': 'chicken eagle penguin duck',
  'is it bigger than a person?': 'horse cow elephant shark oak car train boat '
  'airplane piano bed',
  'does it have wool?': 'sheep',
  'does it bark?': 'dog',
  'does it have horns?': 'cow',
  'does it have legs?': 'dog cat horse cow sheep chicken eagle penguin duck '
  'frog bee spider elephant chair table bed piano',
  'is it poisonous?': 'bee spider snake',
  'does it have scales?': 'salmon snake',
  'is it a plant?': 'rose oak apple carrot',
  'can you eat it?': 'apple carrot bread cheese',
  'is it sweet?': 'apple',
  'is it made of milk?': 'cheese',
  'does it have wheels?': 'car bicycle train airplane',
  'can you ride in it?': 'car train boat airplane',
  'does it run on rails?': 'train',
  'is it furniture?': 'chair table bed lamp',
  'can you sit or lie on it?': 'chair bed bicycle horse',
  'does it make music?': 'guitar piano drum',
  'does it have strings?': 'guitar piano',
  'is it a tool?': 'hammer knife spoon',
  'is it sharp?': 'knife rose',
  'is it for eating with?': 'knife spoon',
  'does it need electricity?': 'phone computer lamp train',
  'does it have a screen?': 'phone computer',
  'does it fit into a pocket?': 'phone spoon knife bee apple',
  'do you wear it?': 'shirt shoe',
  'does it have sleeves?': 'shirt',
}
LIST = """
dog cat horse cow sheep chicken eagle penguin duck shark salmon frog snake bee
spider elephant rose oak apple carrot bread cheese car bicycle train boat
airplane chair table bed lamp hammer knife spoon book phone computer shirt shoe
guitar piano drum
"""
THINGS = tuple(LIST.split())
TRUE = {
  question: frozenset(text.split()) for question, text in QUESTIONS.items()
}
GUESS = re.compile(r'is it (?:a |an |the )?([a-z]+)\??')


def answer(question: str, thing: str) -> str:
  """Answer to a question: 'yes', 'no', or that it was not understood."""
  found = normal(question)
  found = found if found.endswith('?') else f'{found}?'
  if found in TRUE:
    return 'yes' if thing in TRUE[found] else 'no'
  guess = GUESS.fullmatch(found)
  if guess and guess[1] in THINGS:
    return 'yes' if guess[1] == thing else 'no'
  return 'ask another question'


def is_guess(question: str, thing: str) -> bool:
  """Tells whether a question names the thing."""
  guess = GUESS.fullmatch(normal(question))
  return bool(guess) and guess[1] == thing


class TwentyQuestions:
  """Episode of questions; see the module."""

  def __init__(self, max_turns: int = 20):
    self.max_turns = max_turns

  def reset(self, seed: int, example: dict) -> tuple:
    self.thing, self.turns = example['thing'], 0
    if self.thing not in THINGS:
      raise ValueError(f'{self.thing!r} is not in THINGS; hide one of them')
    return '', {}

  def step(self, action: str) -> tuple:
    self.turns += 1
    if is_guess(action, self.thing):
      return 'yes\n', 0.0, True, False, {'success': True}
    over = self.turns >= self.max_turns
    text = f'{answer(action, self.thing)}\n'
    return text, -1.0, over, False, {'success': False}


def twenty_questions(max_turns: int = 20) -> Maker:
  """Maker of episodes of at most `max_turns` questions."""
  return functools.partial(TwentyQuestions, max_turns)


def twenty_questions_examples(split: str = 'train') -> list[dict]:
  """Records {'prompt', 'thing'}, one for each thing."""
  return episodes(
    split, [{'prompt': PROMPT, 'thing': thing} for thing in THINGS]
  )


@functools.cache
def choose(left: frozenset) -> str:
  """Question that halves the things that are left best; the guess where one or
  two are left."""
  if len(left) <= 2:
    return f'is it a {min(left)}?'
  return min(QUESTIONS, key=lambda q: abs(2 * len(TRUE[q] & left) - len(left)))


@functools.cache
def bound(count: int) -> int:
  """Least cost of all `count` things together, whatever may be asked: a guess
  costs 1 to all others, a question 1 to everything, and parts them."""
  if count <= 1:
    return 0
  guess = count - 1 + bound(count - 1)
  return min(
    guess,
    *(count + bound(n) + bound(count - n) for n in range(1, count)),
  )


def twenty_questions_player(example: dict, observations: list, actions: list):
  """Player that halves the things which are left."""
  left = frozenset(
    thing
    for thing in THINGS
    if all(
      answer(question, thing) == said.strip()
      for question, said in zip(actions, observations[1:])
    )
  )
  return choose(left)
