"""What a reward function says lands on the right token, or is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_tok.rewards import digits, exact_match, lift, make_scorer

END = 9
MASK = np.array(
  [[1, 1, 1, 0], [1, 0, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0]], bool
)  # rows 1 and 3 have holes: tokens that the policy did not choose


# --- lift


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
    (None, 'returned NoneType rewards'),
    (1.0, 'returned float rewards'),
    ((x for x in range(4)), 'returned generator rewards'),
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
    ('1234', "gave '1' for completion 0"),
    ([['1', '2', '3'], 0, 0, 0], "gave '1' for completion 0"),
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
  """One letter a token: 0 is 'a'."""
  return [''.join(chr(ord('a') + i) for i in row) for row in rows]


TOKENS = np.array([[0, 1, END, 0], [2, 3, 4, 5], [END, 0, 0, 0], [6, 7, 0, 0]])
MASK_OF_TOKENS = np.array(
  [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], bool
)
EXAMPLES = [
  {'prompt': 'p', 'answer': 1, 'completion': 'of the data'},
  {'prompt': 'q', 'answer': 2, 'completion': 'of the data'},
]


def spy(calls):
  def look(**kwargs):
    calls.append(kwargs)
    return [0.0] * len(kwargs['completions'])

  return look


def test_a_function_sees_every_completion_with_its_columns():
  calls = []
  score = make_scorer([spy(calls)], decode, [END])
  scores = score(TOKENS, MASK_OF_TOKENS, EXAMPLES)
  # the end token is no text and is an id; the data's own completions are gone
  assert calls == [
    {
      'prompts': ['p', 'p', 'q', 'q'],
      'completions': ['ab', 'cdef', '', 'gh'],
      'completion_ids': [[0, 1, END], [2, 3, 4, 5], [END], [6, 7]],
      'answer': [1, 1, 2, 2],
    }
  ]
  assert scores.completions == ['ab', 'cdef', '', 'gh']


def test_only_the_last_end_token_is_cut():
  calls = []
  score = make_scorer([spy(calls)], decode, [4, 5])
  score(np.array([[4, 0, 5], [4, 5, 0]]), np.ones((2, 3), bool), EXAMPLES)
  assert calls[0]['completions'] == ['ea', 'efa']


def test_tokens_that_were_not_chosen_are_neither_text_nor_ids():
  calls = []
  mask = np.array([[1, 0, 1, 1], [0, 1, 1, 0]], bool)
  tokens = np.array([[0, 1, 2, END], [0, 1, 2, 3]])
  make_scorer([spy(calls)], decode, [END])(tokens, mask, EXAMPLES)
  assert calls[0]['completions'] == ['ac', 'bc']
  assert calls[0]['completion_ids'] == [[0, 2, END], [1, 2]]


def test_a_column_that_a_record_lacks_is_none_wherever_it_stands():
  for examples, want in (
    ([{'prompt': 'p'}, {'prompt': 'q', 'hint': 1}], [None, 1]),
    ([{'prompt': 'q', 'hint': 1}, {'prompt': 'p'}], [1, None]),
  ):
    calls = []
    score = make_scorer([spy(calls)], decode, [END])
    score(np.array([[0], [1]]), np.ones((2, 1), bool), examples)
    assert calls[0]['hint'] == want


def test_functions_are_weighted_and_named():
  def length(completions, **columns):
    return [len(c) for c in completions]

  def first(completions, **columns):
    return [1.0 if c else None for c in completions]

  def each(completion_ids, **columns):
    return [[0.5] * len(ids) for ids in completion_ids]

  functions = [length, first, each]
  score = make_scorer(functions, decode, [END], weights=[1, -2, 0.5])
  scores = score(TOKENS, MASK_OF_TOKENS, EXAMPLES)
  np.testing.assert_array_equal(
    scores.reward,
    [
      [0.25, 0.25, 2 - 2 + 0.25, 0],
      [0.25, 0.25, 0.25, 4 - 2 + 0.25],
      [0.25, 0, 0, 0],
      [0.25, 2 - 2 + 0.25, 0, 0],
    ],
  )
  assert scores.reward.dtype == np.float32
  # before the weights; None is not counted as 0
  assert scores.metrics == {
    'rewards/length/mean': 2.0,
    'rewards/first/mean': 1.0,
    'rewards/each/mean': 0.5 * (3 + 4 + 1 + 2) / 4,
  }
  plain = make_scorer(functions, decode, [END])(
    TOKENS, MASK_OF_TOKENS, EXAMPLES
  )
  np.testing.assert_array_equal(plain.reward[1], [0.5, 0.5, 0.5, 4 + 1 + 0.5])


def test_a_function_that_never_applies_has_mean_zero():
  def silent(completions, **columns):
    return [None] * len(completions)

  scores = make_scorer([silent], decode, [END])(
    TOKENS, MASK_OF_TOKENS, EXAMPLES
  )
  assert scores.metrics == {'rewards/silent/mean': 0.0}
  assert not scores.reward.any()


def test_a_scorer_names_the_function_that_is_wrong():
  def right(completions, **columns):
    return [0.0] * len(completions)

  class Wrong:
    def __call__(self, completions, **columns):
      return [0.0]

  score = make_scorer([right, Wrong()], decode, [END])
  with pytest.raises(ValueError, match='Wrong returned 1 rewards for 4'):
    score(TOKENS, MASK_OF_TOKENS, EXAMPLES)


def test_a_scorer_needs_a_weight_for_each_function():
  with pytest.raises(ValueError, match='3 reward weights for 1 reward'):
    make_scorer([exact_match], decode, [END], weights=[1, 2, 3])


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
