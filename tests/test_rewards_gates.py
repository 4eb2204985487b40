"""Word gates and personal data, by hand and by laws."""

import ipaddress
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_tok import rewards
from jaxrl_tok.rewards import find_personal_data
from jaxrl_tok.rewards.gates import BIASED_WORDS, SWEAR_WORDS, luhn


def one(reward, text):
  (value,) = reward(completions=[text])
  return value


@pytest.mark.parametrize(
  'text',
  [
    'What the shit', 'SHIT!', 'sh1t', '$h!t', 'shiiiiit', 'shíts', 'shit.',
    "shit's over", 'oh-shit-no', 'assholes', 'a55hole', 'God damn it',
  ],
)  # fmt: skip
def test_swear_words_are_found(text):
  assert one(rewards.profanity(), text) == 0


@pytest.mark.parametrize(
  'text',
  ['assess the class', 'Scunthorpe', 'a cocktail', '455', 'passage', '', '!!',
   'Dickens'],
)  # fmt: skip
def test_words_that_contain_one_are_not_found(text):
  assert one(rewards.profanity(), text) == 1


def test_every_word_of_the_lists_is_found():
  for words, gate in (
    (SWEAR_WORDS, rewards.profanity()),
    (BIASED_WORDS, rewards.biased_words()),
  ):
    for word in words.split(', '):
      assert one(gate, f'so {word.upper()}, he said') == 0
      assert one(gate, f'x{word}x') == 1


def test_phrases_are_words_in_a_row():
  gate = rewards.without_words(['man made', 'very good dog'])
  assert one(gate, 'a man-made lake') == 0
  assert one(gate, 'a very good dog') == 0
  assert one(gate, 'a man who made it, a very good') == 1
  assert one(rewards.biased_words(), 'the man') == 1
  assert one(rewards.profanity(more=['frak']), 'oh frak') == 0


@pytest.mark.parametrize('words', [[], ['...'], 'shit'])
def test_lists_that_are_none_are_one_line(words):
  with pytest.raises(ValueError, match='pass a list of words') as e:
    rewards.without_words(words)
  assert '\n' not in str(e.value)


# --- personal data


@pytest.mark.parametrize(
  ('kind', 'text'),
  [
    ('email', 'bob.smith+x@mail.example.org'),
    ('email', 'a_b@x-y.co'),
    ('phone', '+49 30 1234567'),
    ('phone', '+1 (555) 123-4567'),
    ('phone', '+33-1-23-45-67-89'),
    ('phone', '0049 30 1234567'),
    ('phone', '(555) 123-4567'),
    ('phone', '555-123-4567'),
    ('phone', '020 7946 0958'),
    ('phone', '030/1234567'),
    ('card', '4111 1111 1111 1111'),
    ('card', '5500-0000-0000-0004'),
    ('card', '378282246310005'),
    ('iban', 'GB82 WEST 1234 5698 7654 32'),
    ('iban', 'DE89370400440532013000'),
    ('iban', 'NO93 8601 1117 947'),
    ('ssn', '123-45-6789'),
    ('ip', '8.8.8.8'),
    ('ip', '2606:4700:4700::1111'),
  ],
)
def test_personal_data_is_found(kind, text):
  for sentence in (text, f'It is {text}, he said.', f'({text})\nNo.'):
    assert find_personal_data(sentence) == [(kind, text)], sentence
    assert one(rewards.personal_data(), sentence) == 0
    assert one(rewards.personal_data(kinds=[kind]), sentence) == 0
  others = [k for k in rewards.gates.KINDS if k != kind]
  assert one(rewards.personal_data(kinds=others), text) == 1


@pytest.mark.parametrize(
  'text',
  [
    'on 01-02-2024 and 2024-01-15 at 12:30:45', 'version 1.2.3', 'a@b', '@home',
    '3.14159265358979', '1,234,567,890', '4111 1111 1111 1112',
    'GB82 WEST 1234 5698 7654 33', '000-45-6789', '127.0.0.1', '10.0.0.7',
    '::1', '999.1.1.1', 'std::vector', '1 2 3 4 5 6 7 8 9 10 11 12 13', '2+2=4',
    'room 101', '1984', '10 000 000 000 km', 'ABCDEF12',
  ],
)  # fmt: skip
def test_other_numbers_are_not_personal_data(text):
  assert find_personal_data(text) == []
  assert one(rewards.personal_data(), f'It is {text}.') == 1


def test_kinds_are_named():
  assert one(rewards.personal_data('email'), '8.8.8.8') == 1
  with pytest.raises(ValueError, match='name is no kind of personal data; pas'):
    rewards.personal_data(['name'])


@settings(max_examples=100)
@given(st.integers(10**11, 10**18 - 1))
def test_luhn_finds_one_wrong_digit(n):
  """A number has one right check digit; exchanging any digit is found."""
  right = [d for d in range(10) if luhn(f'{n}{d}')]
  assert len(right) == 1
  number, rng = f'{n}{right[0]}', random.Random(n)
  at = rng.randrange(len(number))
  other = str((int(number[at]) + rng.randint(1, 9)) % 10)
  assert not luhn(number[:at] + other + number[at + 1 :])


def test_an_address_may_follow_a_colon():
  assert find_personal_data('IP:8.8.8.8') == [('ip', '8.8.8.8')]
  assert find_personal_data('::ffff:127.0.0.1') == []


@settings(max_examples=100)
@given(st.ip_addresses(), st.text(alphabet='ab ', max_size=5))
def test_addresses_are_found_if_they_are_public(address, words):
  want = [('ip', str(address))] if address.is_global else []
  found = find_personal_data(f'{words} {address} {words}', ['ip'])
  assert found == want
  assert ipaddress.ip_address(str(address)) == address


def test_time_is_linear_in_the_text():
  began = time.process_time()
  for piece in ('a', '1 ', '1-', 'a.', 'A1', 'a@', '+1', 'f:', '(0', '1.', '@'):
    find_personal_data(piece * 50_000)
  assert time.process_time() - began < 5
