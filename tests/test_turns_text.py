"""Ids between turns: nothing that was sampled is tokenised again, and a chat
template writes what is between."""

import jax
import numpy as np
import pytest
from conftest import make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok import data, sharding
from jaxrl_tok.data.chat import Chat, render
from jaxrl_tok.data.turns import Talk, check_history, make_talk
from jaxrl_tok.environments import Stepper
from jaxrl_tok.step import episodes
from jaxrl_tok.step.episodes import Limits, Sizes, TurnPrograms, World
from jaxrl_tok.types import Prompts

WORDS = 'low lower lowest new newer newest wide wider widest'
CHATML = (
  '{%- for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n'
  '{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}'
)
# thinking is kept in the last turn alone, as Qwen 3 has it
FORGETS = CHATML.replace(
  '{{ m.content }}',
  "{{ m.content if loop.last else m.content.split('</think>')[-1].strip() }}",
)
# an empty thought opens each turn, and is left out of earlier ones
OPENS = CHATML.replace('<assistant>', '<assistant><think></think>')
# the last message of the user has the tools
MOVES = CHATML.replace(
  '{{ m.content }}',
  "{{ m.content }}{% if loop.last and m.role == 'user' %}[tools]{% endif %}",
)
USER = {'role': 'user', 'content': 'hi'}


@pytest.fixture(scope='module')
def merging():
  """Tokenizer of byte pairs, which merge wherever text meets text."""
  return data.bpe_tokenizer([WORDS] * 20, 300)


class Says:
  """Answers with the texts of its example, then ends."""

  def reset(self, seed, example):
    first, *self.rest = example['said']
    return first, {}

  def step(self, action):
    said, *self.rest = self.rest
    return said, 0.0, not self.rest, False, {}


def play(talk, prompt, said, turns):
  """Episode whose turns are these ids; the environment says these texts."""

  def sample(rows, number, prompts):
    tokens = np.array([turns[int(number)]], np.int32)
    on = np.ones(tokens.shape, bool)
    return make_rollout(None, tokens, on, np.zeros(tokens.shape, np.float32))

  text, ids = prompt
  limits = Limits(len(turns), 10_000)
  with (
    Stepper(Says) as stepper,
    jax.set_mesh(sharding.make_mesh('data=1', jax.devices()[:1])),
  ):
    found = episodes.play(
      TurnPrograms(lambda prompts: prompts, sample),
      World(stepper, talk, limits),
      Sizes(1, 1, len(ids), False),
      [{'prompt': text, 'said': said}],
      Prompts(np.array([ids], np.int32), np.array([len(ids)], np.int32)),
      [0],
      0,
    )
  rollout = jax.device_get(found.rollout)
  n = len(found.episodes[0].tokens)
  return rollout.tokens[0, :n], rollout.mask[0, :n]


pieces = st.text('lowernwidst ', min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(
  actions=st.lists(
    st.lists(st.integers(0, 299), min_size=1, max_size=5),
    min_size=1,
    max_size=3,
  ),
  said=st.lists(pieces, min_size=4, max_size=4),
)
def test_what_was_sampled_is_never_tokenised_again(merging, actions, said):
  """Any ids may be sampled, also those that the tokenizer would merge."""
  end = merging.eos_token_id
  talk = make_talk(merging, [end], 300)
  said = said[: len(actions) + 1]
  ids = data.text_ids(merging, 'new')
  tokens, mask = play(talk, ('new', ids), said, actions)
  assert tokens[mask].tolist() == [i for turn in actions for i in turn]
  want = [
    i
    for text, turn in zip(said, actions)
    for i in (*data.text_ids(merging, text), *turn)
  ]
  assert tokens.tolist() == want


def test_the_tokenizer_merges_across_turns(merging):
  """The law above says something: text made of turns would be other ids."""
  whole, parts = data.text_ids(merging, 'lowest'), []
  for i in range(1, 6):
    texts = 'lowest'[:i], 'lowest'[i:]
    parts.append([n for t in texts for n in data.text_ids(merging, t)])
  assert any(ids != whole for ids in parts)


@pytest.fixture
def tokenizer():
  found = data.byte_tokenizer()
  found.chat_template = CHATML
  return found


def conversation(first, said, actions):
  """Messages of a whole episode, with all of its turns."""
  found = [USER, {'role': 'user', 'content': first}] if first else [USER]
  for text, action in zip([*said, ''], actions):
    found.append({'role': 'assistant', 'content': action})
    found.append({'role': 'user', 'content': text})
  return found[:-1]


@pytest.mark.parametrize('first', ['', 'look'])
@pytest.mark.parametrize('ends', [True, False])
def test_a_chat_is_what_its_template_writes(tokenizer, first, ends):
  """Also where a turn was cut: its end is then no choice of the policy's."""
  end, actions = tokenizer.eos_token_id, ['go', '', ' so ']
  talk = make_talk(tokenizer, [end], 258)
  (ids,) = data.encode_prompts(tokenizer, [[USER]], chat=Chat(opened=False))
  turns = [data.text_ids(tokenizer, a or 'x') + [end] * ends for a in actions]
  tokens, mask = play(talk, ([USER], ids), [first, 'b', 'c', 'd'], turns)
  actions = [a or 'x' for a in actions]
  want = render(
    tokenizer, conversation(first, 'bc', actions), Chat(opened=False)
  )
  found = tokenizer.decode([*ids, *tokens])
  closing = '<eos>\n' if not ends else '\n'
  assert found + closing == want
  assert tokens[mask].tolist() == [i for turn in turns for i in turn]


@pytest.mark.parametrize(
  ('template', 'fact'),
  [
    (CHATML, None),
    (CHATML.replace('m.content', 'm.content | trim'), None),
    (FORGETS, 'their thinking'),
    (OPENS, 'what they began with'),
    (MOVES, 'what they began with'),
  ],
  ids=['plain', 'trims', 'forgets', 'opens', 'moves'],
)
def test_a_template_that_rewrites_turns_is_refused(tokenizer, template, fact):
  tokenizer.chat_template = template
  example = {'prompt': [USER]}
  check_history(tokenizer, Chat(), example, 'sampled')
  check_history(tokenizer, Chat(), {'prompt': 'text'})
  if fact is None:
    check_history(tokenizer, Chat(), example)
    return
  with pytest.raises(ValueError, match=fact) as e:
    check_history(tokenizer, Chat(), example)
  assert '--history sampled' in str(e.value)


def test_turns_stay_as_they_were_sampled(tokenizer):
  """With --history sampled, the text between is that of the last turn."""
  tokenizer.chat_template = FORGETS
  end = tokenizer.eos_token_id
  talk: Talk = make_talk(tokenizer, [end], 258)
  ids = talk.between({'prompt': [USER]}, '', 'b', end)
  assert tokenizer.decode(ids) == '\n<user>b<eos>\n<assistant>'


@pytest.mark.parametrize(
  ('prompt', 'observation', 'fact'),
  [
    ('text', [USER], 'the prompt is text'),
    ([USER], [{'role': 'nobody', 'content': 'a'}], 'refuses the messages'),
  ],
)
def test_an_observation_that_does_not_fit(tokenizer, prompt, observation, fact):
  tokenizer.chat_template = CHATML.replace(
    '{%- for m in messages %}',
    "{%- for m in messages %}{% if m.role == 'nobody' %}"
    "{{ raise_exception('who') }}{% endif %}",
  )
  talk = make_talk(tokenizer, [tokenizer.eos_token_id], 258)
  with pytest.raises(ValueError, match=fact) as e:
    talk.between({'prompt': prompt}, '', observation, 0)
  assert '\n' not in str(e.value)


def test_messages_of_tools_are_observations(tokenizer):
  talk = make_talk(tokenizer, [tokenizer.eos_token_id], 258)
  said = [{'role': 'tool', 'content': '4'}]
  ids = talk.between({'prompt': [USER]}, '', said, tokenizer.eos_token_id)
  assert tokenizer.decode(ids) == '\n<tool>4<eos>\n<assistant>'


@pytest.mark.parametrize('prompt', ['hi', [USER]], ids=['text', 'messages'])
def test_a_demonstration_is_an_episode(tokenizer, prompt):
  """Ids and mask of an episode in which a policy says the same."""
  end, said = tokenizer.eos_token_id, ['a', 'b', 'c']
  talk = make_talk(tokenizer, [end], 258)
  chat = Chat(opened=False)
  (ids,) = data.encode_prompts(tokenizer, [prompt], chat=chat)
  turns = [talk.write(text) for text in ('go', 'stop')]
  tokens, mask = play(talk, (prompt, ids), said, turns)
  shown = [
    {'observation': 'a'},
    {'action': 'go', 'observation': 'b', 'reward': 0.0},
    {'action': 'stop', 'observation': 'c'},
  ]
  longest = max(map(len, turns))
  found = data.demonstrate(talk, {'prompt': prompt}, shown, longest)
  assert found == (tokens.tolist(), mask.tolist())
  # a turn of all its tokens has no end, as where it is sampled
  ids, mask = data.demonstrate(talk, {'prompt': prompt}, shown, longest - 1)
  chosen = [i for i, on in zip(ids, mask) if on]
  assert chosen == [*turns[0], *turns[1][:-1]]
  with pytest.raises(ValueError, match='a demonstrated turn has 5 tokens'):
    data.demonstrate(talk, {'prompt': prompt}, shown, longest - 2)


@pytest.mark.parametrize('turns', [None, [], [{'action': 'a'}], [{}, {}]])
def test_what_is_no_demonstration_is_refused(tokenizer, turns):
  talk = make_talk(tokenizer, [tokenizer.eos_token_id], 258)
  with pytest.raises(ValueError, match='a demonstration is') as e:
    data.demonstrate(talk, {'prompt': 'a'}, turns, 9)
  assert '\n' not in str(e.value)
