"""Values of a reward function land on the right token, or are refused."""

from typing import get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_tok import rewards
from jaxrl_tok.rewards import digits, exact_match, lift, make_scorer
from jaxrl_tok.rewards.scoring import merge_metrics
from jaxrl_tok.run.settings import RunSettings

END = 9
MASK = np.array(
  [[1, 1, 1, 0], [1, 0, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0]], bool
)  # rows 1 and 3 have holes: tokens that the policy did not choose


# --- lift


class OnGpu:
  """Array that is not on the host."""

  def __array__(self, dtype=None, copy=None):
    raise TypeError("can't convert it to numpy")


def test_an_outcome_sits_on_the_last_chosen_token():
  lifted = lift([2.5, -1, 0.25, 4], MASK)
  assert lifted.dtype == np.float32
  np.testing.assert_array_equal(
    lifted, [[0, 0, 2.5, 0], [0, 0, 0, -1], [0.25, 0, 0, 0], [0, 0, 4, 0]]
  )


def test_token_rewards_follow_the_mask_through_its_holes():
  lifted = lift([[1, 2, 3], [4, 5, 6], [7], [8, 9]], MASK)
  np.testing.assert_array_equal(
    lifted, [[1, 2, 3, 0], [4, 0, 5, 6], [7, 0, 0, 0], [0, 8, 9, 0]]
  )


def test_outcomes_lists_and_none_may_mix():
  lifted = lift([None, (1, 2, 3), True, np.array([8.0, 9.0])], MASK)
  np.testing.assert_array_equal(
    lifted, [[0, 0, 0, 0], [1, 0, 2, 3], [1, 0, 0, 0], [0, 8, 9, 0]]
  )


def test_a_completion_without_chosen_tokens_gets_nothing():
  mask = np.array([[0, 0], [1, 1]], bool)
  np.testing.assert_array_equal(lift([5.0, 1.0], mask), [[0, 0], [0, 1]])


@pytest.mark.parametrize(
  'values',
  [
    [1, 0.5, 2, 0.25],
    [np.int64(1), 0.5, np.float16(2), np.float64(0.25)],
    np.array([1, 0.5, 2, 0.25]),
    (1, 0.5, 2, 0.25),
  ],
)
def test_an_integer_first_does_not_cut_fractions(values):
  np.testing.assert_array_equal(lift(values, MASK).sum(1), [1, 0.5, 2, 0.25])


def test_an_integer_first_does_not_cut_token_fractions():
  values = [[1, 0.5, 0.25], [1, 0.5, 0.25], [1], [1, 0.5]]
  np.testing.assert_array_equal(lift(values, MASK).sum(1), [1.75, 1.75, 1, 1.5])


@pytest.mark.parametrize(
  ('values', 'says'),
  [
    ([1, 2, 3], 'returned 3 rewards for 4 completions'),
    ([1, 2, 3, 4, 5], 'returned 5 rewards for 4 completions'),
    ([], 'returned 0 rewards for 4 completions'),
    (None, 'returned nothing for 4 completions'),
    (1.0, 'returned a float for 4 completions'),
    (np.float32(1), 'returned a ndarray for 4 completions'),
    ((x for x in range(4)), 'returned a generator'),
    ({0: 1, 1: 1, 2: 1, 3: 1}, 'returned a dict'),
    ('1234', 'returned a str'),
    ([0, [1, 2], 0, 0], '2 token rewards for completion 1, which has 3'),
    ([0, [1, 2, 3, 4], 0, 0], '4 token rewards for completion 1'),
    ([0, [], 0, 0], '0 token rewards for completion 1'),
    ([0, np.nan, 0, 0], 'gave nan for completion 1'),
    ([0, 0, np.inf, 0], 'gave inf for completion 2'),
    ([0, 0, 0, -np.inf], 'gave -inf for completion 3'),
    ([1e39, 0, 0, 0], 'gave 1e+39 for completion 0'),  # inf as float32
    ([10**400, 0, 0, 0], 'gave inf for completion 0'),
    ([[0, np.nan, 0], 0, 0, 0], 'gave nan for completion 0'),
    (['good', 0, 0, 0], "gave 'good' for completion 0"),
    (['1', 0, 0, 0], "gave '1' for completion 0"),
    ([['1', '2', '3'], 0, 0, 0], "gave '1' for completion 0"),
    ([[1, [2], 3], 0, 0, 0], 'gave [2] for completion 0'),
    ([[1, 10**400, 3], 0, 0, 0], 'gave inf for completion 0'),
    (OnGpu(), "a OnGpu that numpy cannot read (can't convert"),
    ([[1, None, 3], 0, 0, 0], 'gave None for completion 0'),
    ([{'score': 1}, 0, 0, 0], "gave {'score': 1} for completion 0"),
  ],
)
def test_what_is_no_reward_is_refused_by_name(values, says):
  with pytest.raises(ValueError, match='rhyme') as e:
    lift(values, MASK, 'rhyme')
  assert says in str(e.value)
  assert '\n' not in str(e.value)


# --- make_scorer


def decode(rows):
  """Decodes tokens to letters: 0 is 'a'."""
  return [''.join(chr(ord('a') + i) for i in row) for row in rows]


TOKENS = np.array([[0, 1, END, 0], [2, 3, 4, 5], [END, 0, 0, 0], [6, 7, 0, 0]])
MASK_OF_TOKENS = np.array(
  [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], bool
)
EXAMPLES = [
  {'prompt': 'p', 'answer': 1, 'completion': 'of the data'},
  {'prompt': 'q', 'answer': 2, 'completion': 'of the data'},
]


def scored(functions, tokens=TOKENS, mask=MASK_OF_TOKENS, examples=EXAMPLES):
  """HostScores of functions by name, or of a list of them."""
  if not isinstance(functions, dict):
    functions, _ = rewards.name_rewards(functions)
  return make_scorer(functions, decode, [END])(tokens, mask, examples)


def spy(calls):
  def look(prompts, completions, completion_ids, **columns):
    for name in ('trainer_state', 'log_extra', 'log_metric'):
      del columns[name]
    calls.append((prompts, completions, completion_ids, columns))
    return [0.0] * len(completions)

  return look


def test_a_function_sees_every_completion_with_its_columns():
  calls = []
  scores = scored(spy(calls))
  # the end token is no text and is an id; the data's own completions are gone
  assert calls == [
    (
      ['p', 'p', 'q', 'q'],
      ['ab', 'cdef', '', 'gh'],
      [[0, 1, END], [2, 3, 4, 5], [END], [6, 7]],
      {'answer': [1, 1, 2, 2]},
    )
  ]
  assert scores.texts == ['ab', 'cdef', '', 'gh']


def test_only_the_last_end_token_is_cut():
  score = make_scorer({}, decode, [4, 5])
  tokens = np.array([[4, 0, 5], [4, 5, 0]])
  scores = score(tokens, np.ones((2, 3), bool), EXAMPLES)
  assert scores == ({}, {}, ['ea', 'efa'], {}, {})


def test_special_tokens_are_kept_on_demand():
  def decode_all(rows, skip_special_tokens=True):
    return [f'{len(row)} {skip_special_tokens}' for row in rows]

  for keep in (False, True):
    score = make_scorer({}, decode_all, [END], keep_special_tokens=keep)
    scores = score(TOKENS, MASK_OF_TOKENS, EXAMPLES)
    assert scores.texts == [f'{n} {not keep}' for n in (2, 4, 0, 2)]


def test_tokens_that_were_not_chosen_are_neither_text_nor_ids():
  calls = []
  mask = np.array([[1, 0, 1, 1], [0, 1, 1, 0]], bool)
  tokens = np.array([[0, 1, 2, END], [0, 1, 2, 3]])
  scored(spy(calls), tokens, mask)
  assert calls[0][1:3] == (['ac', 'bc'], [[0, 2, END], [1, 2]])


def test_a_column_that_a_record_lacks_is_none_wherever_it_stands():
  for examples, want in (
    ([{'prompt': 'p'}, {'prompt': 'q', 'hint': 1}], [None, 1]),
    ([{'prompt': 'q', 'hint': 1}, {'prompt': 'p'}], [1, None]),
  ):
    calls = []
    scored(spy(calls), np.array([[0], [1]]), np.ones((2, 1), bool), examples)
    assert calls[0][3]['hint'] == want


def test_components_are_kept_by_name():
  def length(completions, **columns):
    return [len(c) for c in completions]

  def first(completions, **columns):
    return [1.0 if c else None for c in completions]

  def each(completion_ids, **columns):
    return [[0.5] * len(ids) for ids in completion_ids]

  scores = scored([length, first, each])
  want = {
    'length': [[0, 0, 2, 0], [0, 0, 0, 4], [0, 0, 0, 0], [0, 2, 0, 0]],
    'first': [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]],
    'each': MASK_OF_TOKENS / 2,
  }
  assert list(scores.rewards) == list(want)
  for name, values in want.items():
    np.testing.assert_array_equal(scores.rewards[name], values)
    assert scores.rewards[name].dtype == np.float32
  applies = {name: a.tolist() for name, a in scores.applies.items()}
  assert applies == {
    'length': [True] * 4,
    'first': [True, True, False, True],
    'each': [True] * 4,
  }
  # the update has the means, of the batch that is trained
  assert scores.metrics == {'rewards/first/not_applicable': 1}


def test_a_function_that_never_applies_is_counted():
  def silent(completions, **columns):
    return [None] * len(completions)

  scores = scored(silent)
  assert scores.metrics == {'rewards/silent/not_applicable': 4.0}
  assert not scores.rewards['silent'].any()
  assert not scores.applies['silent'].any()


def test_a_scorer_names_the_function_and_the_completion_that_are_wrong():
  def right(completions, **columns):
    return [0.0] * len(completions)

  class Wrong:
    def __call__(self, completions, **columns):
      return [0.0]

  with pytest.raises(ValueError, match='Wrong returned 1 rewards for 4'):
    scored([right, Wrong()])

  def dark(completions):
    return [np.nan if c.startswith('cd') else 0 for c in completions]

  with pytest.raises(
    ValueError, match=r"dark gave nan for .* 1 \('cdef' of prompt 'p'\)"
  ):
    scored([right, dark])


def test_a_long_completion_is_quoted_on_one_line():
  mask = np.ones((1, 100), bool)
  with pytest.raises(ValueError, match='rhyme gave inf') as e:
    lift([np.inf], mask, 'rhyme', ['two\nlines ' * 20])
  assert repr(('two\nlines ' * 20)[:60]) + '…' in str(e.value)
  assert '\n' not in str(e.value)


def test_completions_that_no_prompt_has_are_refused():
  with pytest.raises(ValueError, match='4 completions of 3 prompts'):
    scored({}, examples=[{'prompt': 'p'}] * 3)


# --- exact_match and digits


def test_exact_match_forgives_spaces_around_and_nothing_else():
  completions = ['035', ' 035\n', '35', '035.', '0 35', '', '-7']
  answers = ['035', '035 ', '035', '035', '035', '035', -7]
  found = exact_match([''] * 7, completions, answers)
  assert found == [1, 1, 0, 0, 0, 0, 1]


def ids_of(text, ended):
  return [ord(c) for c in text] + [257] * ended


def digits_of(text, answer, ended):
  return digits(['?'], [text], [answer], [ids_of(text, ended)])[0]


@pytest.mark.parametrize(
  ('text', 'ended', 'quarters'),
  [
    ('035', True, [1, 1, 1, 1]),  # right: sums to 1
    ('035', False, [1, 1, 1]),  # right, and cut before the end token
    ('935', True, [0, 1, 1, 1]),  # a wrong digit costs its own share only
    ('350', True, [0, 0, 0, 1]),  # in its place, not somewhere
    ('03', True, [1, 1, 0]),  # ends too soon
    ('0355', True, [1, 1, 1, 0, 0]),  # goes on after the answer
    ('', True, [0]),
    ('', False, []),
    ('0é5', True, [1, 0, 0, 0]),  # nothing counts from é on
  ],
)
def test_digits_by_hand(text, ended, quarters):
  expected = [q / 4 for q in quarters]
  assert digits_of(text, '035', ended) == expected


def test_digits_takes_numbers_and_several_rows():
  rows = digits(
    ['', ''], ['12', '5'], [12, 57], [ids_of('12', True), ids_of('5', True)]
  )
  np.testing.assert_allclose(rows[0], [1 / 3] * 3)
  np.testing.assert_allclose(rows[1], [1 / 3, 0])


ASCII = st.text('0123 -', max_size=6)


@given(answer=ASCII, text=ASCII, ended=st.booleans())
def test_digits_agrees_with_its_rules_written_out(answer, text, ended):
  # character i of the answer and its end are n + 1 marks; count those met
  marks = {(i, c) for i, c in enumerate([*answer, 'END'])}
  said = [*text] + ['END'] * ended
  expected = [((i, c) in marks) / len(marks) for i, c in enumerate(said)]
  np.testing.assert_allclose(digits_of(text, answer, ended), expected)
  if text == answer and ended:
    assert sum(expected) == pytest.approx(1)
  else:
    assert sum(expected) < 1 - 1e-3


@pytest.mark.parametrize(
  ('text', 'ids'), [('12', [7]), ('12', [1, 2, 3, 4]), ('1é', [])]
)
def test_digits_refuses_a_tokenizer_of_longer_tokens(text, ids):
  with pytest.raises(ValueError, match='use exact_match with this tokenizer'):
    digits([''], [text], ['12'], [ids])


@given(st.lists(st.sampled_from([*b'035\xc3\xa9\xff']), max_size=5))
def test_digits_takes_whatever_a_byte_tokenizer_samples(raw):
  text = bytes(raw).decode(errors='replace')
  row = digits([''], [text], ['035'], [[*raw, 257]])[0]
  assert len(row) == len(raw) + 1
  foreign = [i for i, byte in enumerate(raw) if byte > 127]
  assert not foreign or not any(row[foreign[0] :])
  if raw != [*b'035']:
    assert sum(row) < 1


# --- functions that fail


def raises(completions, **columns):
  raise RuntimeError('the judge answered 503')


async def raises_later(completions, **columns):
  raise RuntimeError('the judge answered 503')


def leaves(completions, **columns):
  raise SystemExit(1)


async def leaves_later(completions, **columns):
  raise SystemExit(1)


def too_few(completions, **columns):
  return [1.0]


def dark(completions, **columns):
  return [1.0, np.nan, 'good', [1.0]]


def fine(completions, **columns):
  return [1.0, 2.0, None, 4.0]


WHOLE = [raises, raises_later, leaves, leaves_later, too_few]


def scored_with(on_error, *functions):
  """(HostScores, warnings) of functions."""
  named, _ = rewards.name_rewards(functions)
  warned = []
  score = make_scorer(
    named,
    decode,
    [END],
    on_error=on_error,
    warn=lambda name, text: warned.append((name, text)),
  )
  return score(TOKENS, MASK_OF_TOKENS, EXAMPLES), warned


@pytest.mark.parametrize('function', [*WHOLE, dark])
@pytest.mark.parametrize('on_error', ['mask', 'zero'])
def test_a_function_that_fails_is_masked_or_zero(function, on_error):
  """The other function keeps its values; None stays None."""
  scores, warned = scored_with(on_error, function, fine)
  name = function.__name__
  # a wrong value concerns its own completion
  failed = np.array([function is not dark, True, True, True])
  assert scores.applies[name].tolist() == (
    (~failed).tolist() if on_error == 'mask' else [True] * 4
  )
  want = np.where(failed, 0.0, 1.0)
  np.testing.assert_array_equal(scores.rewards[name].sum(1), want)
  np.testing.assert_array_equal(scores.rewards['fine'].sum(1), [1, 2, 0, 4])
  assert scores.applies['fine'].tolist() == [True, True, False, True]
  assert scores.metrics[f'rewards/{name}/errors'] == failed.sum()
  assert scores.metrics['rewards/fine/errors'] == 0
  ((who, text),) = warned
  assert who == name
  assert f'--reward_on_error {on_error} goes on' in text
  assert 'or pass' not in text, 'advises what is passed already'
  assert '\n' not in text


@pytest.mark.parametrize('function', WHOLE[:4])
def test_an_exception_names_function_sample_and_cure(function):
  with pytest.raises(rewards.RewardError) as e:
    scored_with('raise', fine, function)
  said = {'raises': 'RuntimeError: the judge answered 503'}
  want = said.get(function.__name__.removesuffix('_later'), 'SystemExit: 1')
  assert str(e.value) == (
    f'reward {function.__name__} raised {want} on 4 completions, the first '
    "'ab' of prompt 'p'; mend it, return None where it does not apply, or pass "
    '--reward_on_error mask'
  )


def test_a_wrong_value_names_the_flag_once():
  with pytest.raises(ValueError, match='finite') as e:
    scored_with('raise', lambda completions, **columns: [np.nan] * 4)
  assert str(e.value).endswith('; or pass --reward_on_error mask')
  assert str(e.value).count('--reward_on_error') == 1


def test_rollouts_of_a_step_are_counted_together():
  rounds = [
    {'rewards/a/errors': 1.0, 'accuracy': 0.5, 'rewards/b/not_applicable': 2.0},
    {'rewards/a/errors': 3.0, 'accuracy': 1.0, 'now_and_then': 7.0},
  ]
  assert merge_metrics(rounds) == {
    'rewards/a/errors': 4.0,
    'rewards/b/not_applicable': 2.0,
    'accuracy': 0.75,
    'now_and_then': 7.0,
  }


def test_the_flag_has_the_choices_of_the_scorer():
  flag = get_type_hints(RunSettings)['reward_on_error']
  assert get_args(flag) == rewards.ON_ERROR


def test_without_a_policy_there_is_no_count():
  scores, warned = scored_with('raise', fine)
  assert 'rewards/fine/errors' not in scores.metrics
  assert warned == []
