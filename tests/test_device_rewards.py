"""Rewards on the device are those of the host, and read their own columns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_tok import rewards
from jaxrl_tok.data.pieces import make_pieces
from jaxrl_tok.data.tokenizers import byte_tokenizer, decode_all
from jaxrl_tok.step import device_rewards
from jaxrl_tok.step.device_rewards import (
  digit_tokens,
  edit_tokens,
  exact_tokens,
  is_on_device,
  make_columns,
  make_device_scorer,
  on_device,
)
from jaxrl_tok.types import Prompts, Rollout

T = 6
TOKENIZER = byte_tokenizer()
END, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id


def rollout_of(tokens, mask, prompts: int) -> Rollout:
  tokens, mask = np.asarray(tokens, np.int32), np.asarray(mask, bool)
  B = len(tokens)
  read = Prompts(np.ones((prompts, 1), np.int32), np.ones(prompts, np.int32))
  zeros = np.zeros(mask.shape, np.float32)
  return Rollout(
    read, tokens, mask, zeros, None, np.ones(B, bool), np.zeros(B, np.int32)
  )


def encode(text: str) -> list[int]:
  return [*TOKENIZER(text)['input_ids'], END]


def as_rollout(texts: list[str], prompts: int) -> Rollout:
  """Completions as a sampler returns them; one of T characters is cut."""
  tokens = np.full((len(texts), T), PAD, np.int32)
  mask = np.zeros((len(texts), T), bool)
  for b, text in enumerate(texts):
    row = encode(text)[:T]
    tokens[b, : len(row)] = row
    mask[b, : len(row)] = True
  ended = (tokens == END).any(1)
  return rollout_of(tokens, mask, prompts)._replace(ended=ended)


def columns_of(functions: dict, answers: list[str]) -> dict:
  records = [{'prompt': '?', 'answer': a} for a in answers]
  return make_columns(functions, records[0], 'answer', encode, T)(records)


def completions(rng, answer: str) -> list[str]:
  """A right one, an empty one, near, short, long and cut ones."""

  def digits(n):
    return ''.join(rng.choice(list('0123456789'), n))

  place = rng.integers(len(answer))
  return [
    answer,
    '',
    answer[:place] + digits(1) + answer[place + 1 :],
    answer[:place],
    digits(rng.integers(1, T)),
    answer + digits(1),
    (answer + digits(T))[:T],
    digits(T),
  ]


@pytest.mark.parametrize(
  ('host', 'device'),
  [
    (rewards.exact_match, exact_tokens),
    (rewards.digits, digit_tokens),
    (rewards.potentials.edit_distance('answer'), edit_tokens),
  ],
)
def test_rewards_are_those_of_the_host(host, device):
  rng = np.random.default_rng(0)
  answers = [str(n) for n in rng.integers(0, 100_000, 40)]
  texts = [text for a in answers for text in completions(rng, a)]
  rollout = as_rollout(texts, len(answers))
  records = [{'prompt': '?', 'answer': a} for a in answers]
  on_host = rewards.make_scorer(
    {'f': host},
    lambda ids: decode_all(TOKENIZER, ids),
    [END],
    pieces=make_pieces(
      TOKENIZER, lambda ids: decode_all(TOKENIZER, ids), len(TOKENIZER)
    ),
  )
  want = on_host(rollout.tokens, rollout.mask, records)
  assert want.texts == texts
  found, applies = make_device_scorer({'f': device})(
    None, rollout, columns_of({'f': device}, answers)
  )
  np.testing.assert_allclose(found['f'], want.rewards['f'], 1e-6)
  assert found['f'].dtype == jnp.float32
  assert applies['f'].all()
  seen = {round(float(x), 2) for x in want.rewards['f'].sum(1)}
  assert len(seen) > 5 or seen == {0, 1}, 'want all shares of an answer'


def test_the_host_forgives_a_space():
  rollout = as_rollout(['42', ' 42', '42 '], 1)
  found, _ = make_device_scorer({'f': exact_tokens})(
    None, rollout, columns_of({'f': exact_tokens}, ['42'])
  )
  assert found['f'].sum(1).tolist() == [1, 0, 0]
  said = rewards.exact_match([''] * 3, ['42', ' 42', '42 '], ['42'] * 3)
  assert said == [1, 1, 1]


def test_a_cut_answer_is_not_exact():
  rollout = as_rollout(['123456', '12345'], 1)  # only the second has an end
  columns = columns_of({'f': exact_tokens}, ['12345'])
  found = exact_tokens(
    rollout, **{k: np.repeat(v, 2, axis=0) for k, v in columns.items()}
  )
  assert found.tolist() == [0, 1]


# --- the scorer --------------------------------------------------------------

# two prompts of two rows each
MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
ROLLOUT = rollout_of(MASK, MASK, 2)


def test_components_of_a_scorer():
  """An outcome, token rewards, a function that does not always apply and a
  model."""

  def outcome(rollout, scale):
    return scale * jnp.arange(4)

  def each(rollout, **columns):
    return columns['scale'][:, None] * jnp.ones((4, 3))  # also off-mask

  def sometimes(rollout):
    return jnp.full(4, jnp.nan).at[1].set(5.0), jnp.arange(4) == 1

  def model(params, rollout):
    return params * jnp.eye(4, 3)

  functions = {'outcome': outcome, 'each': each, 'sometimes': sometimes}
  score = jax.jit(make_device_scorer(functions, model))
  columns = {'scale': np.array([1, 2]), 'unread': np.ones(2)}
  found, applies = score(3.0, ROLLOUT, columns)
  want = {
    'outcome': [[0, 0, 0], [0, 1, 0], [4, 0, 0], [0, 0, 6]],
    'each': [[1, 1, 1], [1, 1, 0], [2, 0, 0], [2, 2, 2]],
    'sometimes': [[0, 0, 0], [0, 5, 0], [0, 0, 0], [0, 0, 0]],
    'reward_model': [[3, 0, 0], [0, 3, 0], [0, 0, 0], [0, 0, 0]],
  }
  assert found.keys() == want.keys() == applies.keys()
  for name, rows in want.items():
    np.testing.assert_array_equal(found[name], rows)
  assert applies['sometimes'].tolist() == [False, True, False, False]
  assert all(applies[n].all() for n in want if n != 'sometimes')


def test_a_truth_is_one():
  @on_device
  def long(rollout):
    return rollout.mask.sum(1) > 1

  found, _ = make_device_scorer({'long': long})(None, ROLLOUT, {})
  assert found['long'].sum(1).tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize(
  ('value', 'says'),
  [
    (jnp.ones(3), 'returned shape [3] for 4 completions of 3 tokens; it must '),
    (jnp.ones((3, 4)), 'returned shape [3, 4]'),
    (jnp.ones(()), 'returned shape []'),
    (1.0, 'returned float'),
    ([1.0] * 4, 'returned list'),
    (None, 'returned NoneType'),
    ((jnp.ones(4), jnp.ones(4)), 'applies by float32 [4]; it must be bool [4]'),
    ((jnp.ones(4), jnp.ones(3, bool)), 'applies by bool [3]'),
    ((jnp.ones(4), None, None), 'returned tuple'),
  ],
)
def test_wrong_shapes_are_refused_when_traced(value, says):
  score = make_device_scorer({'short': lambda rollout: value})
  with pytest.raises(ValueError, match='@on_device reward short') as e:
    jax.eval_shape(score, None, ROLLOUT, {})
  assert says in str(e.value)
  assert '\n' not in str(e.value)


def test_functions_are_marked():
  def plain(rollout):
    return rollout.mask.sum(1)

  assert not is_on_device(plain)
  assert not is_on_device(rewards.exact_match)
  marked = on_device(plain)
  assert marked is plain
  assert is_on_device(marked)
  assert is_on_device(functools.partial(marked))
  assert is_on_device(jax.jit(marked))
  assert is_on_device(on_device(jax.jit(lambda rollout: rollout)))


# --- columns -----------------------------------------------------------------

RECORDS = [
  {'prompt': 'p', 'solution': 'ab', 'target': 3, 'style': 'dark', 'share': 0.5},
  {'prompt': 'q', 'solution': 'c', 'target': 4, 'style': 'light', 'share': 1},
]
BIG = {'id': 2**40, 'weights': [1, 2], 'on': True, 'ragged': [[1], [1, 2]]}


def columns_for(function, records=RECORDS, answers='solution'):
  return make_columns({'f': function}, records[0], answers, encode, 4)(records)


def test_only_columns_that_are_named_arrive():
  found = columns_for(lambda rollout, target, share=0: None)
  assert found.keys() == {'target', 'share'}
  np.testing.assert_array_equal(found['target'], [3, 4])
  np.testing.assert_array_equal(found['share'], [0.5, 1.0])
  assert found['target'].dtype == np.int32
  assert found['share'].dtype == np.float32
  assert columns_for(lambda rollout: None) == {}


def test_the_rollout_is_whatever_comes_first():
  def renamed(r, target):
    return None

  @functools.wraps(renamed)
  def decorated(*args, **kwargs):
    return renamed(*args, **kwargs)

  records = [r | {'r': 1, 'rollout': 1} for r in RECORDS]
  for function in (
    renamed,
    decorated,
    functools.partial(lambda rollout, target, scale: None, scale=2),
    lambda r, /, target: None,
    lambda *args, target: None,
    jax.jit(renamed),
  ):
    assert columns_for(function, records).keys() == {'target'}


def test_all_numbers_arrive_with_columns():
  records = [r | BIG for r in RECORDS]
  found = columns_for(lambda rollout, **columns: None, records)
  assert {k: (v.dtype, v.shape) for k, v in found.items()} == {
    'target': (np.int32, (2,)),
    'share': (np.float32, (2,)),
    'weights': (np.int32, (2, 2)),
    'on': (np.bool_, (2,)),
  }


def test_answers_arrive_as_tokens():
  a, b, c = TOKENIZER('abc')['input_ids']
  ids = [[a, b, END, 0], [c, END, 0, 0]]
  found = columns_for(lambda rollout, answer, answer_mask, solution: None)
  np.testing.assert_array_equal(found['answer'], ids)
  np.testing.assert_array_equal(found['solution'], ids)
  np.testing.assert_array_equal(
    found['answer_mask'],
    [[True, True, True, False], [True, True, False, False]],
  )
  assert found['answer'].dtype == np.int32
  numbers = [{'prompt': 'p', 'answer': 42}]  # a number is encoded as text
  found = columns_for(lambda rollout, answer: None, numbers, 'answer')
  assert found['answer'][0].tolist() == [*encode('42'), 0]


def test_another_column_of_the_name_stays_itself():
  records = [r | {'answer': 7} for r in RECORDS]
  found = columns_for(lambda rollout, answer, solution: None, records)
  assert found['answer'].tolist() == [7, 7]
  assert found['solution'].shape == (2, 4)


@pytest.mark.parametrize(
  ('function', 'records', 'answers', 'says'),
  [
    (lambda rollout, style: None, RECORDS, None, 'f reads the column style, '
     "which is text or does not fit int32, float32 or bool; name it as the "
     "answers (Task(answers='style'))"),
    (lambda rollout, style=None: None, RECORDS, None, '(it can read: share'),
    (lambda rollout, targets: None, RECORDS, None, 'f asks for targets, which '
     'is no column of the data; it can read: share, target'),
    (lambda rollout, answer: None, RECORDS, None, "name the answers' column, "
     'Task(answers=...)'),
    (lambda rollout, answer: None, RECORDS, 'right', 'no column right for the '
     'answers; it has prompt, solution'),
    (lambda rollout, id: None, [BIG], None, 'the column id, which is text'),
    (lambda rollout, ragged: None, [BIG], None, 'the column ragged, which is'),
    (lambda rollout, answer: None, [{'prompt': 'p', 'solution': 'abcd'}],
     'solution', "'abcd' has 5 tokens with its end, and completions have 4; "
     'pass --max_completion_length 5'),
    (lambda rollout, answer: None,
     [{'prompt': 'p', 'solution': 'a'}, {'prompt': 'q'}], 'solution',
     "the record of prompt 'q' has no 'solution', which @on_device rewards"),
    (lambda rollout, x: None, [{'x': 1}, {'x': 1.5}], None, 'the column x is '
     'int32 in the first record and not in all others'),
    (lambda rollout, x: None, [{'x': 1}, {}], None, 'the column x is int32'),
    (lambda rollout, x: None, [{'x': 1}, {'x': 2**31}], None, 'x is int32'),
    (lambda rollout, x: None, [{'x': 1.5}, {'x': '1'}], None, 'x is float32'),
    (lambda rollout, x: None, [{'x': [1]}, {'x': [1, 2]}], None, 'x is int32'),
    (lambda rollout, x: None, [{'x': True}, {'x': 1}], None, 'x is bool'),
  ],
)  # fmt: skip
def test_what_no_array_can_hold_is_refused(function, records, answers, says):
  with pytest.raises(ValueError, match=r'\w') as e:
    columns_for(function, records, answers)
  assert says in str(e.value)
  assert '\n' not in str(e.value)


def test_a_refusal_comes_before_any_batch():
  with pytest.raises(ValueError, match='@on_device reward exact reads'):
    make_columns(
      {'exact': lambda rollout, style: None}, RECORDS[0], None, encode, 4
    )


def test_a_reward_that_reads_a_column_runs_on_a_batch():
  """An int column of the data, from records to rewards."""

  @on_device
  def below(rollout, target, **columns):
    return (rollout.tokens < target[:, None]).astype(jnp.float32)

  functions = {'below': below, 'exact': exact_tokens}
  records = [{'prompt': 'p', 'target': 2, 'answer': 'a'}] * 2
  make = make_columns(functions, records[0], 'answer', encode, 3)
  score = jax.jit(make_device_scorer(functions))
  found, _ = score(None, ROLLOUT, make(records))
  np.testing.assert_array_equal(found['below'], MASK)
  assert not found['exact'].any()


def test_a_model_scores_the_last_chosen_token():
  class Model:
    @staticmethod
    def encode(params, prompts):
      return prompts.length

    @staticmethod
    def extend(params, prefix, tokens, cache, at):
      hidden = jnp.cumsum(tokens, axis=1) + jnp.repeat(prefix, 2)[:, None]
      return hidden[..., None], None

    @staticmethod
    def value(params, hidden):
      return params * hidden[..., 0]

  score = make_device_scorer({}, device_rewards.reward_model(Model))
  found, applies = score(2.0, ROLLOUT, {})
  np.testing.assert_array_equal(
    found['reward_model'], [[0, 0, 8], [0, 6, 0], [4, 0, 0], [0, 0, 8]]
  )
  assert applies['reward_model'].all()
