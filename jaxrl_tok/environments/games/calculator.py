"""Calculator: arithmetic that is done by a tool, and said.

  # prompt  What is 4821 * 377 + 92?
  # policy  <tool_call>{"name": "calculate", "arguments": {"expression":
            "4821 * 377 + 92"}}</tool_call>
  # tool    1817609
  # policy  1817609

The answer that is right, a number and nothing else, is paid 1; a call costs
nothing, nor does a fault in it, which comes back as text. `calculator_player`
calls once and says the result: 1 in every episode.

A policy that can add would be paid without the tool: the numbers have four
digits, and are multiplied.
"""

import random

from jaxrl_tok.environments.games.words import episodes
from jaxrl_tok.environments.protocol import Maker
from jaxrl_tok.environments.toolbox import calculate
from jaxrl_tok.environments.tools import tools

CALL = (
  '<tool_call>{{"name": "calculate", "arguments": {{"expression": "{}"}}}}'
  '</tool_call>'
)


def is_right(answer: str, example: dict) -> float:
  """1 for the right number, else 0."""
  return float(answer.strip() == example['answer'])


def calculator(form: str = 'hermes', cost: float = 0.0) -> Maker:
  """Maker of episodes with the tool `calculate`.

  Args:
    form: format of the calls, see tools.
    cost: of a turn with calls.
  """
  return tools([calculate], form, is_right, cost)


def calculator_examples(
  count: int = 200, split: str = 'train', digits: int = 4, seed: int = 0
) -> list[dict]:
  """Records {'prompt', 'answer'} of problems that are drawn, others in each
  split. with_tools and a prompt of messages make them ready for a chat."""
  rng, found = random.Random(f'{split} {seed}'), []
  low, high = 10 ** (digits - 1), 10**digits - 1
  for _ in range(count):
    a, b, c = (rng.randint(low, high) for _ in range(3))
    text = f'{a} * {b} {rng.choice("+-")} {c}'
    found.append({'prompt': f'What is {text}?\n', 'answer': calculate(text)})
  return episodes(split, found)


def calculator_player(example: dict, observations: list, actions: list) -> str:
  """Player that calls the tool once, and says its result."""
  if not actions:
    text = example['prompt'].removeprefix('What is ').rstrip('?\n')
    return CALL.format(text)
  return observations[-1].split('\n')[1]
