"""Reward functions in all of TRL's forms run, and what cannot run is refused
before a call."""

import asyncio
import copy
import functools
import operator
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_tok.evaluation import corpus_metrics
from jaxrl_tok.rewards import (
  ARGUMENTS,
  PIECES,
  RewardError,
  TrainerState,
  check_functions,
  gated,
  make_scorer,
  name_rewards,
  product,
)
from jaxrl_tok.rewards.functions import own_lists

END = 9
TOKENS = np.array([[0, 1, END], [2, 3, 4], [END, 0, 0], [5, END, 0]])
MASK = np.array([[1, 1, 1], [1, 1, 1], [1, 0, 0], [1, 1, 0]], bool)
TEXTS = ['ab', 'cde', '', 'f']
EXAMPLES = [{'prompt': 'p', 'answer': 'ab'}, {'prompt': 'q', 'answer': 'g'}]
CHAT = [
  {'prompt': [{'role': 'user', 'content': text}], 'answer': text}
  for text in ('ab', 'g')
]


def decode(rows):
  return [''.join(chr(ord('a') + i) for i in row) for row in rows]


def score(*functions, examples=EXAMPLES, state=None, reserved=(), **given):
  by_name, _ = name_rewards(functions)
  scorer = make_scorer(by_name, decode, [END], reserved=reserved)
  return scorer(TOKENS, MASK, examples, state, **given)


def values(*functions, **given) -> list:
  """Rewards of the only function, summed over tokens; None where it does not
  apply."""
  scores = score(*functions, **given)
  (reward,), (applies,) = scores.rewards.values(), scores.applies.values()
  return [r if a else None for r, a in zip(reward.sum(1).tolist(), applies)]


def one_line(error) -> str:
  said = str(error.value)
  assert '\n' not in said
  return said


# --- the forms of TRL's reward functions -------------------------------------


def length(prompts, completions, **kwargs):
  return [float(len(c)) for c in completions]


def rhyme(completions, rhymes_with):
  return [0] * len(completions)


def no_kwargs(completions, answer):
  return [float(c == a) for c, a in zip(completions, answer)]


async def slow_length(completions, **kwargs):
  await asyncio.sleep(0.01)
  return [float(len(c)) for c in completions]


def only_some(completions, **kwargs):
  return [len(c) if c else None for c in completions]


def of_messages(prompts, completions, answer, **kwargs):
  return [
    float(c[0]['content'] == a and c[0]['role'] == 'assistant' and len(c) == 1)
    for c, a in zip(completions, answer)
  ]


def logs_a_metric(completions, log_metric=None, **kwargs):
  log_metric('accuracy', 0.25)
  return [0.0] * len(completions)


def logs_a_column(completions, log_extra=None, **kwargs):
  log_extra('first', [c[:1] or '[none]' for c in completions])
  return [0.0] * len(completions)


def scaled(scale, completions, offset=0.0, **kwargs):
  return [scale * len(c) + offset for c in completions]


class Length:
  def __init__(self, scale):
    self.scale = scale

  def __call__(self, completions, **kwargs):
    return [self.scale * len(c) for c in completions]

  def method(self, completions):
    return self(completions)

  async def later(self, completions, **kwargs):
    return self(completions)


def for_every_token(completion_ids, **kwargs):
  return [[0.5] * len(ids) for ids in completion_ids]


def by_progress(completions, trainer_state, **kwargs):
  share = trainer_state.global_step / trainer_state.max_steps
  return [share + trainer_state.epoch] * len(completions)


@jax.jit
def jitted(completion_ids):
  return jnp.stack([ids[0].astype(jnp.float32) for ids in completion_ids])


def decorated(function):
  @functools.wraps(function)
  def wrapper(*args, **kwargs):
    return function(*args, **kwargs)

  return wrapper


def with_judge(function):
  """A decorator that gives an argument of its own."""

  @functools.wraps(function)
  def wrapper(**kwargs):
    return function(judge=len, **kwargs)

  return wrapper


def judged(completions, judge):
  return [judge(c) for c in completions]


LENGTHS = [2.0, 3.0, 0.0, 1.0]
DOUBLED = [4.0, 6.0, 0.0, 2.0]


@pytest.mark.parametrize(
  ('function', 'want'),
  [
    (length, LENGTHS),
    (no_kwargs, [1.0, 0.0, 0.0, 0.0]),
    (slow_length, LENGTHS),
    (only_some, [2.0, 3.0, None, 1.0]),
    (functools.partial(scaled, 2.0), DOUBLED),
    (functools.partial(scaled, scale=2.0, offset=0.0), DOUBLED),
    (functools.partial(slow_length), LENGTHS),
    (Length(2.0), DOUBLED),
    (Length(2.0).method, DOUBLED),
    (Length(2.0).later, DOUBLED),
    (for_every_token, [1.5, 1.5, 0.5, 1.0]),
    (lambda completions: [len(c) for c in completions], LENGTHS),
    (lambda completions, **_: np.array([len(c) for c in completions]), LENGTHS),
    (
      lambda completions, **_: jnp.array([float(len(c)) for c in completions]),
      LENGTHS,
    ),
    (
      lambda completions, **_: [np.float32(len(c)) for c in completions],
      LENGTHS,
    ),
    (
      lambda completions, **_: tuple(bool(c) for c in completions),
      [1, 1, 0, 1],
    ),
    (
      lambda completions: np.array([len(c) or None for c in completions]),
      [2.0, 3.0, None, 1.0],
    ),
    (jitted, [0.0, 2.0, 9.0, 5.0]),
    (decorated(no_kwargs), [1.0, 0.0, 0.0, 0.0]),
    (with_judge(judged), LENGTHS),
  ],
)
def test_every_form_runs(function, want):
  check_functions({'f': function}, ['prompt', 'answer'])
  assert values(function) == want


def test_messages_get_messages():
  assert values(of_messages, examples=CHAT) == [1, 0, 0, 0]
  seen = []

  def look(prompts, completions):
    seen.extend(zip(prompts, completions))
    return [0] * 4

  score(look, examples=[CHAT[0], EXAMPLES[1]])
  assert seen[1] == (
    CHAT[0]['prompt'],
    [{'role': 'assistant', 'content': 'cde'}],
  )
  assert seen[3] == ('q', 'f')


def test_the_state_of_training_is_seen():
  state = TrainerState(3, 12, 0.5)
  assert values(by_progress, state=state) == [0.75] * 4


def test_every_argument_arrives_by_name():
  seen = {}

  def look(**kwargs):
    seen.update(kwargs)
    return [0] * 4

  score(look)
  given = {*ARGUMENTS, 'answer'} - {PIECES}
  assert set(seen) == given - {'environments'}
  score(look, environments=['e'] * 4)
  assert set(seen) == given
  assert seen['environments'] == ['e'] * 4
  assert seen['answer'] == ['ab', 'ab', 'g', 'g']


def test_a_metric_and_a_column_are_logged():
  def twice(completions, log_metric):
    log_metric('accuracy', 0.75)
    log_metric('share', np.float32(0.5))
    return [0] * 4

  scores = score(logs_a_metric, logs_a_column, twice)
  assert scores.metrics['accuracy'] == 0.5  # of both
  assert scores.metrics['share'] == 0.5
  assert scores.extra == {'first': ['a', 'c', '[none]', 'f']}


def test_logged_columns_are_plain():
  def logs(completions, log_extra):
    log_extra('numbers', np.arange(4))
    log_extra('objects', [np.int64(1), {1, 2}, np.nan, {'a': [1]}])
    return [0] * 4

  assert score(logs).extra == {
    'numbers': [0, 1, 2, 3],
    'objects': [1, '{1, 2}', 'nan', {'a': [1]}],
  }


# --- async -------------------------------------------------------------------


def test_async_functions_wait_side_by_side():
  started = []

  def make(name):
    async def wait(completions, **kwargs):
      started.append(name)
      while len(started) < 3:  # none returns before all have begun
        await asyncio.sleep(0.001)
      return [ord(name)] * len(completions)

    return wait

  scores = score(make('a'), length, make('b'), make('c'))
  rows = [r.sum(1)[0] for r in scores.rewards.values()]
  assert rows == [ord('a'), 2.0, ord('b'), ord('c')]
  assert list(scores.rewards) == ['wait', 'length', 'wait_2', 'wait_3']


def test_async_functions_run_under_a_running_loop():
  async def notebook():
    return values(slow_length)

  assert asyncio.run(notebook()) == LENGTHS


def test_async_functions_keep_their_loop():
  loops = []

  async def look(completions):
    loops.append((asyncio.get_running_loop(), threading.current_thread()))
    return [0] * 4

  score(look)
  score(look)
  assert loops[0] == loops[1]
  assert not loops[0][0].is_closed()


# --- an exception inside a function ------------------------------------------


def divides(completions, **kwargs):
  return [1 / len(c) for c in completions]


async def divides_later(completions, **kwargs):
  await asyncio.sleep(0)
  return divides(completions)


@pytest.mark.parametrize('function', [divides, divides_later])
def test_an_exception_is_one_line_and_its_authors_traceback(function):
  with pytest.raises(RewardError, match='divi') as e:
    score(length, function, slow_length)
  said = one_line(e)
  assert said.startswith(f'reward {function.__name__} raised ZeroDivisionError')
  assert "4 completions, the first 'ab'" in said
  assert isinstance(e.value.__cause__, ZeroDivisionError)
  shown = e.value.traceback
  assert 'return [1 / len(c) for c in completions]' in shown
  assert shown.rstrip().endswith('ZeroDivisionError: division by zero')
  assert shown.count('File "') == shown.count(f'File "{__file__}"')


def test_a_chained_exception_shows_both():
  def chained(completions):
    try:
      divides(completions)
    except ZeroDivisionError as e:
      raise RuntimeError('two\nlines') from e

  with pytest.raises(RewardError, match='raised RuntimeError: two lines') as e:
    score(chained)
  one_line(e)
  assert 'ZeroDivisionError' in e.value.traceback
  assert 'jaxrl_tok/rewards' not in e.value.traceback


def test_a_refusal_of_ours_needs_no_traceback():
  def digits_of_one(completions, **kwargs):
    return [[0.0] * 2] * len(completions)

  with pytest.raises(ValueError, match='a gate gives one') as e:
    score(gated(digits_of_one, length))
  assert not isinstance(e.value, RewardError)
  one_line(e)


# --- log_metric and log_extra refuse -----------------------------------------


@pytest.mark.parametrize(
  ('call', 'says'),
  [
    (lambda m, x: m('rewards/f/mean', 1), 'rewards/f/mean, which the trainer'),
    (lambda m, x: m('kl', 1), 'names kl, which the trainer logs itself'),
    (lambda m, x: m('accuracy', '1'), "got '1' of accuracy; give a finite"),
    (lambda m, x: m('accuracy', np.nan), 'got nan of accuracy; give a finite'),
    (lambda m, x: m('accuracy', [1, 2]), 'of accuracy; give a finite number'),
    (lambda m, x: x('first', ['a']), 'got 1 values of first for 4 completions'),
    (lambda m, x: x('kl', ['a'] * 4), 'names kl, which every sample has'),
  ],
)
def test_what_cannot_be_logged_is_refused(call, says):
  def logs(completions, log_metric, log_extra):
    call(log_metric, log_extra)
    return [0] * 4

  with pytest.raises(ValueError, match='reward logs: log_') as e:
    score(logs, reserved=['kl'])
  assert says in one_line(e)


def test_a_column_of_two_functions_is_refused():
  with pytest.raises(ValueError, match='both log_extra first; name one') as e:
    score(logs_a_column, logs_a_column)
  assert 'logs_a_column and logs_a_column_2' in one_line(e)


# --- names and weights -------------------------------------------------------


def test_everything_that_may_be_rewards():
  half = functools.partial(length)
  cases = [
    (length, {'length': (length, 1)}),
    ([length, rhyme], {'length': (length, 1), 'rhyme': (rhyme, 1)}),
    ((length,), {'length': (length, 1)}),
    ({length: 0.5}, {'length': (length, 0.5)}),
    ({'long': length}, {'long': (length, 1)}),
    ({'long': (length, -2)}, {'long': (length, -2)}),
    ([length, half, length], {
      'length': (length, 1), 'length_2': (half, 1), 'length_3': (length, 1)
    }),
    ({'length': length, half: 3}, {
      'length': (length, 1), 'length_2': (half, 3)
    }),
  ]  # fmt: skip
  for given, want in cases:
    functions, weights = name_rewards(given)
    assert {k: (f, weights[k]) for k, f in functions.items()} == want


def test_names_are_those_of_what_is_wrapped():
  instance = Length(1.0)
  given = [
    functools.partial(functools.partial(scaled, 1.0), offset=2.0),
    instance,
    instance.method,
    decorated(length),
    jitted,
    lambda completions: [],
    operator.itemgetter('completions'),
  ]
  functions, _ = name_rewards(given, taken=['jitted'])
  assert list(functions) == [
    'scaled', 'Length', 'method', 'length', 'jitted_2', 'lambda', 'itemgetter'
  ]  # fmt: skip


@pytest.mark.parametrize(
  ('given', 'says'),
  [
    (None, 'a Task needs a reward; pass a function'),
    ([], 'a Task needs a reward'),
    ({}, 'a Task needs a reward'),
    (3, 'a reward is 3, which is no function'),
    ('rhyme', "a reward is 'rhyme', which is no function"),
    (['rhyme'], "a reward is 'rhyme', which is no function"),
    ({'rhyme': 0.5}, 'reward rhyme is 0.5, which is no function'),
    ([Length], 'a reward is the class Length; pass an object of it, Length()'),
    ({length: 'much'}, "weight of reward length is 'much'; give a finite"),
    ({length: None}, 'weight of reward length is None'),
    ({length: np.nan}, 'weight of reward length is nan'),
    ({length: True}, 'weight of reward length is True'),
    ({'long': (length, np.inf)}, 'weight of reward long is inf'),
  ],
)
def test_what_is_no_reward_is_refused(given, says):
  with pytest.raises(ValueError, match='reward') as e:
    name_rewards(given)
  assert says in one_line(e)


# --- signatures, before anything is compiled ---------------------------------


@pytest.mark.parametrize(
  ('function', 'says'),
  [
    (rhyme, 'reward f asks for rhymes_with, which is no column of the data '
     '(prompt, answer)'),
    (lambda completions, answers: [], 'did you mean answer?'),
    (lambda prompt, completions: [], 'asks for prompt, which is no column of '),
    (lambda completion: [], 'did you mean completions?'),
    (lambda completions, environments: [], 'asks for environments'),
    (lambda completions, /: [], 'takes completions by position only'),
    (len, 'takes obj by position only'),
    (lambda *args: [], 'takes none of the arguments of a reward function'),
    (lambda scale=1: [], 'takes none of the arguments of a reward function'),
    (functools.partial(scaled), 'asks for scale'),
  ],
)  # fmt: skip
def test_a_signature_that_no_call_satisfies_is_refused(function, says):
  with pytest.raises(ValueError, match=r'^reward f ') as e:
    check_functions({'fine': length, 'f': function}, ['prompt', 'answer'])
  assert says in one_line(e)


def test_a_call_satisfies_these():
  def waits(completions, environments, rhymes_with=None):
    return []

  check_functions({'waits': waits}, ['prompt'], environment=True)


def test_without_a_signature_everything_is_passed():
  class Opaque:
    __signature__ = 3  # as builtins, nothing that can be read

    def __call__(self, **kwargs):
      return [len(kwargs)] * 4

  check_functions({'f': Opaque()}, ['prompt', 'answer'])
  assert values(Opaque()) == [7.0] * 4  # with `answer`


# --- rewards of rewards ------------------------------------------------------


def test_a_gate_lets_a_reward_pass():
  gate = gated(only_some, for_every_token)
  functions, _ = name_rewards(gate)
  assert list(functions) == ['for_every_token_if_only_some']
  assert values(gate) == [1.5, 1.5, None, 1.0]
  assert values(gated(no_kwargs, length)) == [2, 0, 0, 0]
  shut = score(gated(no_kwargs, for_every_token))
  np.testing.assert_array_equal(
    *shut.rewards.values(), [[0.5, 0.5, 0.5], [0] * 3, [0] * 3, [0] * 3]
  )


def test_a_product_is_of_numbers_tokens_and_coroutines():
  assert values(product(length, length)) == [4, 9, 0, 1]
  assert values(product(length, slow_length, only_some)) == [8, 27, None, 1]
  scores = score(product(for_every_token, length, for_every_token))
  (reward,) = scores.rewards.values()
  np.testing.assert_array_equal(
    reward, MASK * 0.25 * np.array(LENGTHS)[:, None]
  )
  assert list(scores.rewards) == ['for_every_token_x_length_x_for_every_token']


def test_a_combination_asks_for_what_its_functions_ask_for():
  both = gated(rhyme, no_kwargs)
  with pytest.raises(ValueError, match='asks for rhymes_with'):
    check_functions({'f': both}, ['prompt', 'answer'])
  check_functions({'f': both}, ['prompt', 'answer', 'rhymes_with'])
  check_functions({'f': product(length, by_progress)}, ['prompt'])


def test_a_combination_refuses_in_one_line():
  def short(completions):
    return [0.0]

  def two(completions):
    return [[1.0, 2.0]] * len(completions)

  def on_device(rollout):
    return rollout

  on_device.on_device = True
  for make, says in (
    (
      lambda: score(product(length, short)),
      'short returned 1 rewards for 4 completions',
    ),
    (lambda: score(product(for_every_token, two)), 'give 2 and 3 values'),
    (lambda: product(), 'product needs a reward function'),
    (lambda: gated(length, on_device), 'multiply @on_device rewards in a'),
  ):
    with pytest.raises(ValueError, match='reward') as e:
      make()
    assert says in one_line(e)


# --- arguments are a function's own ------------------------------------------


def spoil(value):
  """Changes all that can be changed in a value, the inside first."""
  if isinstance(value, dict | list):
    for inner in value.values() if isinstance(value, dict) else value:
      spoil(inner)
    value.clear()
  elif isinstance(value, np.ndarray | Box):
    spoil_number(value)


def spoil_number(value):
  if isinstance(value, Box):
    value.content = 'spoilt'
  else:
    value[...] = -1


class Box:
  """An object of a user's class."""

  content = 'whole'


def spoiling(prompts, completions, completion_ids, **columns):
  n = len(completions)
  for value in (prompts, completions, completion_ids, *columns.values()):
    spoil(value)
  return [1.0] * n


async def spoiling_later(prompts, completions, completion_ids, **columns):
  return spoiling(prompts, completions, completion_ids, **columns)


def rows_of_all():
  """Records with mutable values of all kinds."""
  return [
    {**row, 'cases': [[1], {'a': [2]}], 'array': np.ones(2), 'pair': ([3], 4)}
    for row in copy.deepcopy(CHAT)
  ]


@pytest.mark.parametrize(
  'function',
  [spoiling, spoiling_later, gated(spoiling, spoiling), product(spoiling)],
)
def test_what_a_function_changes_is_its_own(function):
  """Neither the records nor what the next function sees."""
  seen, examples = [], [dict(row, box=Box()) for row in rows_of_all()]

  def looks(prompts, completions, completion_ids, box, **columns):
    names = 'answer', 'cases', 'array', 'pair'
    seen.append((prompts, completions, completion_ids, box))
    seen.append([columns[name] for name in names])
    return [0.0] * 4

  def saw():
    score(looks, examples=examples)
    return str([[b.content for b in seen[0][3]], seen[0][:3], seen[1]])

  want = saw()
  seen.clear()
  score(function, looks, product(function, looks), examples=examples)
  for i in (0, 2):  # beside the function, and in one product with it
    found = [[b.content for b in seen[i][3]], seen[i][:3], seen[i + 1]]
    assert str(found) == want
  bare = [{k: v for k, v in e.items() if k != 'box'} for e in examples]
  assert str(bare) == str(rows_of_all())
  assert [e['box'].content for e in examples] == ['whole', 'whole']


def test_what_cannot_be_copied_is_passed_itself():
  lock, place = threading.Lock(), object()
  given = {'lock': [lock], 'environments': [place], 'trainer_state': lock}
  found = own_lists(given)
  assert found['lock'][0] is lock
  assert found['trainer_state'] is lock
  assert found['environments'] == [place]
  assert found['environments'] is not given['environments']


def test_a_metric_of_an_evaluation_gets_copies():
  examples, completions = rows_of_all(), ['a', 'b']

  def count(prompts, completions, **columns):
    spoil([prompts, completions, *columns.values()])
    return 1.0

  assert corpus_metrics([count], examples, completions) == {'count': 1.0}
  assert str(examples) == str(rows_of_all())
  assert completions == ['a', 'b']
