"""Texts that look alike: normal forms of Unicode, marks, what is not seen."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok import rewards
from jaxrl_tok.rewards import find_personal_data, normal_form, words_of
from jaxrl_tok.rewards.chart_parser import pieces_of
from jaxrl_tok.rewards.text import is_unseen, seen

NOT_SEEN = '\u00ad\u200b\u200d\u2060\ufeff\u034f\ufe0f\U000e0101'
LETTERS = st.text(
  "aEé\u0301\u0323\u0327 हिन्दीแมวั่_.'’1ﬁÅ\uac01" + NOT_SEEN, max_size=12
)


def one(reward, text, **columns):
  (value,) = reward(completions=[text], **{k: [v] for k, v in columns.items()})
  return value


# --- words


@settings(max_examples=200)
@given(LETTERS, st.sampled_from(NOT_SEEN))
def test_words_are_those_of_every_canonical_form(text, hidden):
  for form in ('NFC', 'NFD'):
    same = unicodedata.normalize(form, text)
    for split in (words_of, pieces_of):
      assert split(same) == split(text)
      assert split(same.replace('a', f'a{hidden}')) == split(text)
    assert seen(same) == seen(text)


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('แมวนั่ง', ['แมวนั่ง']),
    ('हिन्दी भाषा', ['हिन्दी', 'भाषा']),
    ('e\u0301cole', ['école']),
    ('s\u200boft so\u00adft', ['soft', 'soft']),
    ("don't e\u0301’e", ["don't", 'é’e']),
    ('a_b \u0301', ['a', 'b']),
  ],
)
def test_words_go_on_over_marks(text, words):
  assert words_of(text) == words
  keywords = rewards.keywords()
  for word in words:
    assert one(keywords, text, keywords=word) == 1


def test_another_word_of_equal_consonants_is_another():
  assert one(rewards.keywords(), 'हानोदो', keywords='हिन्दी') == 0
  assert one(rewards.without_words(['हिन्दी']), 'हानोदो') == 1
  assert one(rewards.without_words(['हिन्दी']), 'हिन्दी!') == 0


def test_all_of_the_category_is_unseen():
  for c in map(chr, range(0x20000)):
    if unicodedata.category(c) == 'Cf':
      assert is_unseen(c)
  assert not any(map(is_unseen, 'a é\u0301\n\u00a0ह\u200a'))


# --- answers


SIGNS = st.text('()[]{}.,;:!?…"\'“”«»<>-', min_size=1, max_size=4)


@given(SIGNS, SIGNS, st.sampled_from(['', ' ', '\n']))
def test_an_answer_of_punctuation_is_matched_by_itself(answer, other, space):
  exact = rewards.exact()
  assert one(exact, f'{space}{answer}{space}', answer=answer) == 1
  assert one(exact, '', answer=answer) == 0
  if normal_form(answer) == '':
    plain = [unicodedata.normalize('NFKC', x) for x in (answer, other)]
    assert one(exact, other, answer=answer) == (plain[0] == plain[1])


def test_exact_of_punctuation_by_hand():
  found = rewards.exact()(
    completions=['', '(', '...', '!?', '<', '5 < 3', '<5', 'The'],
    answer=[')', ')', '?', '{}', '>', '5 > 3', '5', ''],
  )
  assert found == [0] * 8
  some = rewards.exact(ignore=['the'])
  assert (one(some, '', answer='The'), one(some, 'The', answer='The')) == (0, 1)
  assert one(rewards.exact(), 'Pa\u00adri\u200bs', answer='paris') == 1
  with pytest.raises(ValueError, match='found in every text; pass a pattern'):
    rewards.regex('')


# --- gates


@pytest.mark.parametrize(
  'text',
  [
    'sh\u0301it', '_shit_', 'oh_shit_no', 'sh\u00adit', 's\u200bhit',
    'ｓｈｉｔ', 's\u034fhit', 'ⓢⓗⓘⓣ', 'shit™', 'shi\ufe0ft',
    's\u0300\u0301hi\u0323t',
  ],
)  # fmt: skip
def test_swear_words_are_found_as_they_look(text):
  assert one(rewards.profanity(), text) == 0


@pytest.mark.parametrize(
  'word', ['été', "it's", 'yahoo!', 'Straße', 'naïve', 'foo_bar', 'नमस्ते']
)
def test_a_list_finds_its_own_words(word):
  gate = rewards.without_words(['other', word])
  for form in ('NFC', 'NFD'):
    said = unicodedata.normalize(form, word)
    assert one(gate, f'so {said}, he said') == 0
    assert one(gate, f'x{said}x') == 1


@pytest.mark.parametrize('word', ['...', '!', '', '\u200b'])
def test_no_word_of_a_list_is_left_out_silently(word):
  with pytest.raises(ValueError, match='which is no word; pass a list of'):
    rewards.without_words(['cat', word])


def test_refusals_are_found_across_any_space():
  for text in (
    'I\u00a0cannot  help\nyou',
    'I can\u2019t\u200b help',
    'As an AI',
  ):
    assert one(rewards.no_refusal(), text) == 0


# --- personal data

DATA = {
  'card': '4111 1111 1111 1111',
  'iban': 'GB82 WEST 1234 5698 7654 32',
  'phone': '+49 30 1234567',
  'ssn': '123-45-6789',
  'email': 'a.b@x-y.co',
  'ip': '8.8.8.8',
}


def wide(text):
  return ''.join(chr(ord(c) + 0xFEE0) if '!' <= c <= '~' else c for c in text)


FORMS = {
  'no-break space': lambda t: t.replace(' ', '\u00a0'),
  'narrow space': lambda t: t.replace(' ', '\u202f'),
  'no-break hyphen': lambda t: t.replace('-', '\u2011'),
  'hyphens for spaces': lambda t: t.replace(' ', '\u2011'),
  'dash': lambda t: t.replace('-', '\u2013'),
  'minus': lambda t: t.replace('-', '\u2212'),
  'full width': wide,
  'lower case': str.lower,
  'Arabic digits': lambda t: t.translate(
    {48 + i: 0x660 + i for i in range(10)}
  ),
  'not seen': lambda t: '\u200b'.join(t),
  'soft hyphens': lambda t: t.replace('1', '1\u00ad'),
}


@pytest.mark.parametrize('kind', DATA)
@pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
def test_typography_hides_no_personal_data(kind, form):
  for text in (form(DATA[kind]), f'是 {form(DATA[kind])} 是。'):
    assert kind in [k for k, _ in find_personal_data(text)], text
    assert one(rewards.personal_data(), text) == 0


@pytest.mark.parametrize(
  'text', ['ü@b.de', 'a@bücher.de', 'a@हिन्दी.com', '用户@例子.广告', 'a＠b.co']
)
def test_addresses_have_letters_of_any_script(text):
  for same in (text, unicodedata.normalize('NFD', text)):
    found = find_personal_data(f'“{same}”, he said')
    assert found == [('email', unicodedata.normalize('NFKC', text))]


@given(st.text('abcdefgh 12', max_size=40))
def test_words_are_no_accounts(text):
  """A check number is right by chance in one of 97; words have few digits."""
  (said,) = rewards.personal_data('iban')(completions=[f'ab12 {text}'])
  if sum(map(str.isdigit, text)) < 5:
    assert said == 1
