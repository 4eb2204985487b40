"""Turns: the ids that follow a prompt and each turn of the policy.

Nothing that was sampled is tokenised again. An episode's ids are

  prompt, lead, turn 0, between, turn 1, between, turn 2 ...

the turns as they were sampled. `lead` is the observation of reset and what
opens the first turn; `between` closes a turn, says the observation and opens
the next one.

Where the prompt is text, an observation is text and its ids are appended.
Where it is messages, the text is the difference of two renderings of the chat
template, without and with the observation.
"""

import functools
from collections.abc import Callable, Collection
from typing import NamedTuple

from jaxrl_tok.data.chat import Chat, render, tools_of
from jaxrl_tok.data.tokenizers import answer_ids, decode_all, encode_texts

MARK = 'jaxrl-tok-said'  # stands for a turn, in renderings
SAYINGS = MARK, f'<think>\nso\n</think>\n\n{MARK}'
HISTORIES = 'template', 'sampled'


class Talk(NamedTuple):
  """Ids of observations, and texts of turns."""

  lead: Callable  # (example, observation of reset) -> ids
  # (example, observation of reset, observation, last id of the turn) -> ids
  between: Callable
  texts: Callable  # ids of turns -> texts, their end tokens left out
  write: Callable  # text of a turn -> ids, its end token included


def make_talk(
  tokenizer,
  end_tokens: Collection[int],
  vocab_size: int,
  chat: Chat = Chat(),  # noqa: B008  a record
  keep_special_tokens: bool = False,
) -> Talk:
  """Makes the functions of a Talk. They raise ValueError, in one line, for an
  observation that does not fit the prompt or the template."""
  closed, opened = chat._replace(opened=False), chat._replace(opened=True)
  ends = frozenset(end_tokens)

  def ids_of(text: str) -> list[int]:
    ids = encode_texts(tokenizer, [text])[0] if text else []
    if ids and max(ids) >= vocab_size:
      raise ValueError(
        f'an observation has token id {max(ids)} and the model has '
        f'{vocab_size} rows; use the tokenizer that belongs to the model'
      )
    return ids

  def lead(example: dict, first) -> list[int]:
    if is_text(example, first):
      return ids_of(first)
    prompt, tools = example['prompt'], tools_of(example)
    base = render(tokenizer, prompt, closed, tools)
    whole = render(tokenizer, [*prompt, *messages(first)], opened, tools)
    if not whole.startswith(base):
      raise ValueError(
        'the chat template changes the prompt where an observation follows it, '
        'so that its tokens do not stay; put the first observation into the '
        'prompt, and return "" from reset'
      )
    return ids_of(whole[len(base) :])

  def between(example: dict, first, observation, last: int) -> list[int]:
    if is_text(example, observation):
      return ids_of(observation)
    before = opening(example['prompt'], first)
    text = text_between(
      tokenizer, opened, before, messages(observation), tools_of(example)
    )
    ids = ids_of(text)
    said = ids[:1] == [last] and last in ends  # the policy closed its turn
    return ids[1:] if said else ids

  def texts(rows: list[list[int]]) -> list[str]:
    shown = [ids[:-1] if ids and ids[-1] in ends else ids for ids in rows]
    return decode_all(tokenizer, shown, not keep_special_tokens)

  def write(text: str) -> list[int]:
    return answer_ids(tokenizer, text, list(end_tokens))

  return Talk(lead, between, texts, write)


def demonstrate(
  talk: Talk, example: dict, turns: list, turn_length: int
) -> tuple[list, list]:
  """(ids, mask) of an episode that is shown to a policy, True on its turns.

  Args:
    turns: as samples.jsonl has them: {'observation': ...}, of reset, then for
      each turn {'action': ..., 'observation': ...}, what was observed after it.
    turn_length: tokens of a turn at most; one whose text has as many is cut
      before its end token, as it is where it is sampled.

  Raises ValueError, in one line, for what is no such list, and for a turn that
  is too long.
  """
  whole = isinstance(turns, list) and all(isinstance(t, dict) for t in turns)
  if not whole or [i for i, t in enumerate(turns) if 'action' not in t] != [0]:
    raise ValueError(
      'a demonstration is [{"observation": ...}, {"action": ..., '
      f'"observation": ...}}, ...], not {str(turns)[:60]}'
    )
  first = turns[0].get('observation', '')
  ids = list(talk.lead(example, first))
  mask = [False] * len(ids)
  for turn, following in zip(turns[1:], [*turns[2:], None]):
    said = talk.write(turn['action'])
    if len(said) > turn_length + 1:
      raise ValueError(
        f'a demonstrated turn has {len(said)} tokens, which '
        f'--max_completion_length {turn_length} cannot hold; pass '
        f'--max_completion_length {len(said)}'
      )
    said = said[:turn_length]
    ids, mask = ids + said, mask + [True] * len(said)
    if following is not None:
      seen = talk.between(example, first, turn['observation'], said[-1])
      ids, mask = ids + seen, mask + [False] * len(seen)
  return ids, mask


def is_text(example: dict, observation) -> bool:
  """Tells text from messages; an empty list is no text. Raises ValueError for
  messages after a prompt of text."""
  if not isinstance(example['prompt'], str):
    return False
  if not isinstance(observation, str):
    raise ValueError(
      'an observation is a list of messages and the prompt is text; give the '
      'prompt as messages, or return text'
    )
  return True


def messages(observation) -> list[dict]:
  """Messages of an observation; text is said by the user."""
  if not isinstance(observation, str):
    return list(observation)
  return [{'role': 'user', 'content': observation}] if observation else []


def opening(prompt: list[dict], first) -> list[dict]:
  """Messages before the first turn."""
  return [*prompt, *messages(first)]


def text_between(
  tokenizer, chat: Chat, before: list, said: list, tools=None
) -> str:
  """Text that a template writes from the end of a turn to the next one."""
  turn = {'role': 'assistant', 'content': MARK}
  whole = render(tokenizer, [*before, turn, *said], chat, tools)
  at = whole.rfind(MARK)
  if at < 0:
    raise ValueError(
      "the chat template leaves out earlier turns of the assistant's, so that "
      'an episode has no one text; use another model, or prompts of text'
    )
  return whole[at + len(MARK) :]


def check_history(
  tokenizer, chat: Chat, example: dict, history: str = 'template'
) -> None:
  """Refuses a template that rewrites earlier turns, such as one that takes
  their thinking away: what a policy would read is not what it was trained on.

  Two turns are rendered with all their history, and compared with the sum of
  their parts. history 'sampled' takes the sum all the same.
  """
  if isinstance(example['prompt'], str) or history == 'sampled':
    return
  before, tools = list(example['prompt']), tools_of(example)
  if before[-1].get('role') != 'user':
    before.append({'role': 'user', 'content': 'a'})
  reply = [{'role': 'user', 'content': 'b'}]
  write = functools.partial(render, tokenizer, chat=chat, tools=tools)
  step = text_between(tokenizer, chat, before, reply, tools)
  for said in SAYINGS:
    turns = [{'role': 'assistant', 'content': said}, *reply] * 2
    if write([*before, *turns]) != write(before) + (said + step) * 2:
      what = 'their thinking' if said != MARK else 'what they began with'
      raise ValueError(
        f'the chat template rewrites earlier turns, it takes {what} away, and '
        'an episode is trained on the tokens that were sampled; pass --history '
        'sampled to keep them, or another model'
      )
