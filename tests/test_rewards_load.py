"""Reward functions of a user's file, and each refusal as one line."""

import functools

import pytest

from jaxrl_tok.rewards import (
  RewardError,
  load_reward,
  load_rewards,
  name_rewards,
)

FILE = """
import dataclasses
import beside_it

@dataclasses.dataclass  # looks its module up
class Settings:
  scale: float = 2.0

def rhyme(completions, **columns):
  return [beside_it.SCALE * Settings().scale for c in completions]

def short(completions):
  return [-len(c) for c in completions]

limit = 3
"""


@pytest.fixture
def file(tmp_path):
  (tmp_path / 'beside_it.py').write_text('SCALE = 3')
  path = tmp_path / 'my_rewards.py'
  path.write_text(FILE)
  return path


def test_a_function_comes_with_its_name_and_weight(file):
  name, function, weight = load_reward(f'{file}:rhyme')
  assert (name, weight) == ('rhyme', 1.0)
  assert function(['a', 'b']) == [6.0, 6.0]
  name, function, weight = load_reward(f'{file}:short = -2e-1')
  assert (name, weight) == ('short', -0.2)
  assert function(['abc']) == [-3]


def test_paths_are_of_the_current_directory(file, monkeypatch):
  monkeypatch.chdir(file.parent)
  assert load_reward('my_rewards.py:rhyme')[0] == 'rhyme'


def test_several_are_what_a_task_takes(file, tmp_path):
  other = tmp_path / 'other.py'
  other.write_text('def rhyme(completions): return [1.0] * len(completions)')
  found = load_rewards(
    [f'{file}:rhyme', f'{other}:rhyme=0.5', f'{file}:short=0.2']
  )
  functions, weights = name_rewards(found)
  assert weights == {'rhyme': 1.0, 'rhyme_2': 0.5, 'short': 0.2}
  assert functions['rhyme'](['a']) == [6.0]
  assert functions['rhyme_2'](['a']) == [1.0]


def test_a_file_is_run_once(tmp_path):
  path = tmp_path / 'counts.py'
  path.write_text('runs = []\ndef f(): return runs\ndef g(): return runs')
  assert load_reward(f'{path}:f')[1]() is load_reward(f'{path}:g')[1]()


@pytest.mark.parametrize(
  ('word', 'says'),
  [
    ('rhyme', '--reward rhyme names no function; pass FILE:NAME'),
    ('FILE', 'names no function; pass FILE:NAME or FILE:NAME=WEIGHT'),
    ('FILE:', 'names no function'),
    ('FILE:=0.5', 'names no function'),
    ('none.py:rhyme', 'none.py is no file; give its path'),
    ('FILE:rime', 'has no rime; did you mean rhyme?'),
    ('FILE:xyz', 'has no xyz; it has Settings, rhyme, short'),
    ('FILE:limit', ' is 3, which is no function'),
    ('FILE:Settings', ' is the class Settings; pass an object of it'),
    ('FILE:rhyme=much', "weight of reward rhyme is 'much'; give a finite"),
    ('FILE:rhyme=', "weight of reward rhyme is ''"),
    ('FILE:rhyme=nan', "weight of reward rhyme is 'nan'"),
  ],
)
def test_what_does_not_load_is_refused(file, word, says):
  with pytest.raises(ValueError, match=r'\w') as e:
    load_reward(word.replace('FILE', str(file)))
  assert says in str(e.value)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  ('text', 'says', 'shown'),
  [
    ('import no_such_module', 'ModuleNotFoundError', 'import no_such_module'),
    ('def f(:', 'SyntaxError', 'def f(:'),
    ('1 / 0', 'ZeroDivisionError', '1 / 0'),
    ('raise SystemExit(2)', "under if __name__ == '__main__'", 'SystemExit'),
  ],
)
def test_a_file_that_does_not_import_shows_its_own_traceback(
  tmp_path, text, says, shown
):
  path = tmp_path / 'broken.py'
  path.write_text(f'# a comment\n{text}\n')
  load = functools.partial(load_reward, f'{path}:f')
  with pytest.raises(RewardError, match=r'broken.py does not import \(') as e:
    load()
  assert says in str(e.value)
  assert '\n' not in str(e.value)
  assert shown in e.value.traceback
  assert f'File "{path}", line 2' in e.value.traceback
  assert e.value.traceback.count('File "') == 1
  path.write_text('def f(completions): return [1.0]')  # mended
  assert load()[0] == 'f'


def test_a_file_of_another_kind_is_refused(tmp_path):
  path = tmp_path / 'rewards.txt'
  path.write_text('def f(): pass')
  with pytest.raises(ValueError, match=r'no Python file; its name must end in'):
    load_reward(f'{path}:f')
