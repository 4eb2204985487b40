"""Experiments with text: summarize, translate, sentences, news."""

import ast
import itertools
import json
import random
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import news, sentences, summarize, translate
from jaxrl_tok import rewards
from jaxrl_tok.rewards import accepted

pytestmark = pytest.mark.usefixtures('one_device', 'few_programs')

FEW = settings(max_examples=25)
MODULES = 'asyncio', 'email', 'json'


def call(reward, **given):
  """A reward's values for the arguments that it accepts."""
  return reward(**accepted(reward).choose(given))


def one_line(error) -> str:
  assert '\n' not in str(error.value)
  return str(error.value)


# --- summarize


@pytest.fixture(scope='module')
def docs():
  """Task of a few modules."""
  return summarize.summarize(packages=MODULES)


def test_a_docstring_is_a_first_line_and_prose():
  text = """Return the
    name of it.

    The name is that of the file, without its directory and ending.

    Args:
      it: a file.
    """
  body = 'The name is that of the file, without its directory and ending.'
  assert summarize.pair_of(text) == (body, 'Return the name of it.')
  assert (
    summarize.pair_of(text, 9)[0] == 'The name is that of the file, without its'
  )
  for no_pair in (
    'Return the name of it.',
    'Return.\n\n' + body,
    'Return the name of it.\n\nArgs: it: a file that has a name, and so on.',
    'Return the name of it.\n\n>>> name(it) and a few more words to be long',
    'Return the name of it.\n\nToo short.',
    '',
  ):
    assert summarize.pair_of(no_pair) is None


@FEW
@given(st.text(max_size=80))
def test_any_docstring_is_read(text):
  found = summarize.pair_of(f'{text}\n\n{text}')
  if found is not None:
    body, first = found
    assert summarize.pair_of(f'{first}\n\n{body}') == found


def test_a_file_that_does_not_parse_has_no_docstring(tmp_path):
  for content in (b'def f(:', b'\x00', b'\xff\xfe', b''):
    path = tmp_path / 'a.py'
    path.write_bytes(content)
    assert list(summarize.docstrings(path)) == []
  path.write_text('class A:\n  """a"""\n  async def f():\n    """b"""\n')
  assert list(summarize.docstrings(path)) == ['a', 'b']
  assert list(summarize.docstrings(tmp_path / 'none.py')) == []


def test_sources_are_found_without_an_import():
  found = summarize.sources(('json', 'ast', 'sys', '_json', 'no_such_package'))
  assert found.keys() == {'json', 'ast'}
  assert found['ast'] == [Path(ast.__file__)]
  assert {p.name for p in found['json']} >= {'__init__.py', 'decoder.py'}
  library = summarize.sources(['stdlib'])
  assert {'json', 'ast', 'email'} <= library.keys()
  assert library.keys().isdisjoint({'sys', 'test', 'idlelib'})


def test_no_copy_is_held_out(docs):
  """Pairs of one module are on one side, and no run of words is on both."""
  train, test = docs.train, docs.held_out
  assert {r['source'] for r in test} == {'email'}
  assert len(train) > 60 < len(test)
  assert {r['source'] for r in train} == {'asyncio', 'json'}
  texts = [r['text'].lower() for r in train + test]
  assert len(set(texts)) == len(texts)
  assert len({r['answer'].lower() for r in train + test}) == len(texts)

  def runs(records):
    for r in records:
      words = re.findall(r'\w+', f'{r["answer"]} {r["text"]}'.lower())
      yield from zip(*(words[i:] for i in range(summarize.RUN)))

  assert set(runs(train)).isdisjoint(runs(test))
  long = test[0] | {'text': ' '.join(f'w{i}' for i in range(20))}
  copy = long | {'text': 'see: ' + long['text'][:40], 'source': 'other'}
  assert summarize.without_copies([*train, copy], [*test, long]) == train


def test_lead_1_is_rouge_of_the_first_sentence():
  text = ['The cat sat. It slept.', 'A dog']
  answer = ['The cat sat.', 'A bird']
  found = summarize.lead_1(text=text, answer=answer)
  assert found == {
    'lead_1_rouge1': pytest.approx([1, 0.5]),
    'lead_1_rouge2': pytest.approx([1, 0]),
    'lead_1_rougeL': pytest.approx([1, 0.5]),
  }


def test_summaries_of_ones_own(tmp_path):
  path = tmp_path / 'a.jsonl'
  rows = [{'article': f'text {i}', 'highlights': f'sum {i}'} for i in range(8)]
  path.write_text('\n'.join(map(json.dumps, rows)))
  given = {'data': str(path), 'text_column': 'article', 'model': 'x'}
  task = summarize.summarize(
    **given, summary_column='highlights', request='Sum up.', held_out=2
  )
  assert task.held_out == 2
  assert task.train[3] == {
    'prompt': [{'role': 'user', 'content': 'Sum up.\n\ntext 3'}],
    'text': 'text 3',
    'answer': 'sum 3',
  }
  with pytest.raises(
    ValueError, match=r'a.jsonl:1: no text in column summ'
  ) as e:
    summarize.summarize(**given)
  assert one_line(e).endswith('it has article, highlights')
  with pytest.raises(ValueError, match='0 pairs to learn and 0 held out') as e:
    summarize.summarize(packages=('no_such_package',))
  one_line(e)


# --- translate


@FEW
@given(st.integers(3, 7), st.integers(1, 90), st.integers(2, 40))
def test_a_number_is_held_out_in_all_languages(digits, count, held_out):
  train, test = translate.number_pairs(['fr', 'de'], digits, count, held_out)
  assert (len(train), len(test)) == (count, held_out)
  assert {p['text'] for p in train}.isdisjoint(p['text'] for p in test)
  assert (train, test) == translate.number_pairs(
    ['fr', 'de'], digits, count, held_out
  )


def test_numbers_are_right():
  assert translate.words_of_number(207, 'en') == 'two hundred and seven'
  assert translate.words_of_number(207, 'fr') == 'deux cent sept'
  task = translate.translate(num_pairs=300, held_out=8)
  for record in (*task.train, *task.held_out):
    assert re.fullmatch(r'(fr|de): [a-z ,-]+ =', record['prompt'])
  answers = [r['answer'] for r in task.train]
  for reward in (task.rewards.outcome, task.eval_rewards):
    assert call(reward, completions=answers, answer=answers) == [1.0] * 300

  def of(metric):
    return metric(completions=answers, answer=answers).items()

  found = {k: v for m in task.metrics for k, v in of(m)}
  assert found == {'bleu': pytest.approx(100), 'chrf': pytest.approx(100)}
  assert 'version' in task.metrics[0].signature


@pytest.mark.parametrize(
  ('given', 'fact'),
  [
    ({'to': 'xx'}, '--to xx is no language of num2words; pass fr'),
    ({'digits': 2}, '--digits 2 must be in 3..12'),
    ({'model': 'x'}, r"--form '\{text\}' must hold \{text\} and \{to\}"),
    ({'form': '{to} {it}'}, 'must hold .*, and no other name in braces'),
    ({'form': '{to'}, "--form '{to' is no format"),
    ({'data': 'none.jsonl'}, 'none.jsonl: no such file'),
  ],
)
def test_what_cannot_be_translated_is_one_line(given, fact):
  with pytest.raises((ValueError, OSError), match=fact) as e:
    translate.translate(num_pairs=4, **given)
  one_line(e)


ENGLISH = """Package: a
Description-md5: 111
Description-en: editor for text
 A long description
 .
 of several lines.

Package: b
Description-md5: 222
Description-en: editor for text

Package: c
Description-md5: 333
Description-en: game of chess

Package: d
Description-md5: 444
Description-en: GNU
"""
FRENCH = """Package: a
Description-md5: 111
Description-fr: \xe9diteur de texte
 Longue.

Package: b
Description-md5: 222
Description-fr: un autre

Package: c
Description-md5: 333
Description-fr: jeu d'\xe9checs

Package: d
Description-md5: 444
Description-fr: GNU

Package: e
Description-md5: 555
Description-fr: sans anglais
"""


def fake_apt(words, **how):
  """Writes lists as apt-get update does, where its options say."""
  assert (words[0], words[-1]) == ('apt-get', 'update')
  assert 'Acquire::Languages=en,fr' in words
  (place,) = (w.partition('=')[2] for w in words if 'State::Lists=' in w)
  for language, text in (('en', ENGLISH), ('fr', FRENCH)):
    name = f'deb.debian.org_main_i18n_Translation-{language}'
    (Path(place) / name).write_text(text)


def test_debian_is_fetched_by_apt(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(subprocess, 'run', fake_apt)
  path = tmp_path / 'debian.jsonl'
  task = translate.translate(to='fr', fetch=str(path), model='x')
  assert f'{path}: 2 pairs' in capsys.readouterr().out
  assert {(r['prompt'], r['answer']) for r in task.train} == {
    ('editor for text', '\xe9diteur de texte'),
    ('game of chess', "jeu d'\xe9checs"),
  }
  again = translate.translate(
    to='fr', data=str(path), form='to {to}: {text}', model='x', held_out=1
  )
  assert again.held_out == 1
  assert {r['prompt'] for r in again.train} == {
    'to fr: editor for text',
    'to fr: game of chess',
  }
  with pytest.raises(
    ValueError, match='no text in column translation; it'
  ) as e:
    translate.translate(data=str(path), answer_column='translation')
  one_line(e)


def test_near_copies_stand_together():
  starts = [f'library {i}' for i in range(30)]
  texts = [f'{s} - {part}' for part in ('files', 'tools') for s in starts]
  english = ''.join(
    f'Description-md5: {i:x}\nDescription-en: {t}\n\n'
    for i, t in enumerate(texts)
  )
  french = english.replace('-en: ', '-fr: la ')
  pairs = translate.debian_pairs({'en': [english], 'fr': [french]})
  keys = [' '.join(p['text'].split()[:2]) for p in pairs]
  assert len(keys) == 60
  assert len(list(itertools.groupby(keys))) == 30


@pytest.mark.parametrize(
  ('error', 'fact'),
  [
    (FileNotFoundError(), '--fetch needs apt-get'),
    (
      subprocess.CalledProcessError(100, 'apt-get', b'', b'W: x\nE: no net\n'),
      r'apt-get update fails \(E: no net\)',
    ),
    (None, 'Debian has no descriptions in fr'),
  ],
)
def test_an_apt_that_fails_is_one_line(monkeypatch, tmp_path, error, fact):
  def run(*args, **how):
    if error:
      raise error

  monkeypatch.setattr(subprocess, 'run', run)
  with pytest.raises(ValueError, match=fact) as e:
    translate.translate(to='fr', fetch=str(tmp_path / 'a.jsonl'))
  one_line(e)


# --- sentences


@FEW
@given(st.integers(0, 10**6))
def test_sensible_sentences_are_grammatical_and_coherent(seed):
  rng = random.Random(seed)
  text = sentences.sentence(*rng.choice(sentences.facts()), rng)
  assert sentences.makes_sense(text)
  assert GRAMMAR(completions=[text]) == [1.0]
  words = text[:-1].split()
  rng.shuffle(words)
  mixed = ' '.join(words) + '.'
  if sentences.makes_sense(mixed):
    assert GRAMMAR(completions=[mixed]) == [1.0]
  both = sentences.sense(completions=[text, ''], topic=[['x'], ['x']])
  assert both == {'makes_sense': 0.5, 'makes_sense_of_topic': 0.0}


GRAMMAR = rewards.grammar(sentences.ENGLISH)


def test_coherence_tells_sense_from_nonsense():
  """Grammar cannot, and the share of sense agrees."""
  texts = [
    'the old baker bakes the fresh bread.',
    'the bread bakes the old baker.',
    'a apple eats an dog.',
    'bread the bakes baker the.',
    '',
  ]
  assert GRAMMAR(completions=texts) == [1, 1, 0, 0, 0]
  good, odd, *_, empty = sentences.ngram_coherence()(completions=texts)
  assert 1 > good > odd + 0.2 > odd > empty == 0
  assert list(map(sentences.makes_sense, texts)) == [True, *[False] * 4]


def test_ngrams_by_hand():
  score = sentences.fit_ngrams(['a b', 'a c'])
  # a: 2 of 2; b: 1 of 2; the end after b: 1 of 1; 6 words, V 4
  p = [0.95 + 0.05 * 3 / 11, 0.475 + 0.05 * 2 / 11, 0.95 + 0.05 * 3 / 11]
  want = sum(map(sentences.math.log, p)) / 3
  assert score('a b') == pytest.approx(want)
  assert score('') is None


@FEW
@given(st.integers(0, 99))
def test_requests_are_held_out_as_pairs(seed):
  train, test = sentences.requests(50, 20, 0.1, seed)
  assert (len(train), len(test)) == (50, 20)
  topics = {tuple(r['topic']) for r in test}
  assert len(topics) == 20
  assert topics.isdisjoint(tuple(r['topic']) for r in train)


# --- news


@FEW
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_what_is_said_is_judged(seed, wrong):
  rng = random.Random(seed)
  facts = news.draw_facts(rng)
  text = news.written(facts, rng, wrong)
  values = [list(facts.values())]
  said = [v for v in facts.values() if v.lower() in text.lower()]
  true = news.no_contradiction(completions=[text], facts=values)
  assert news.one_sentence(completions=[text]) == [1.0]
  whole = news.true_and_whole(completions=[text], facts=values)
  assert whole == [float(len(said) == 5 and true == [1.0])]
  if wrong == 0:
    assert true == [1.0]


def test_another_name_place_day_or_number_contradicts():
  facts = ['Anna Berg', 'won the race', 'Oslo', 'Monday', '40 guests']
  for text, wrong in {
    'On Monday, Anna Berg won the race in Oslo with 40 guests.': [],
    'It rained.': [],
    'Anna Keller won the race in Oslo.': ['keller'],
    'Anna Berg won the race in Riga on Sunday.': ['riga', 'sunday'],
    '41 guests, 40 workers, 2026.': ['41', 'workers', '2026'],
    'Anna Berg founded a bank.': ['founded', 'bank'],
  }.items():
    assert news.contradictions(text, facts) == wrong


def test_a_list_is_no_sentence():
  texts = [
    'Anna Berg won the race in Oslo.',
    'Anna Berg, Oslo, Monday, 40 guests.',
    'who: Anna Berg; where: Oslo.',
    'Anna won. Berg won.',
    'anna won.',
    'Anna won',
    '',
  ]
  assert news.one_sentence(completions=texts) == [1.0] + [0.0] * 6


def test_held_out_facts_are_others():
  train, test = news.items(60, 20, 0.1, False)
  assert {r['prompt'] for r in train}.isdisjoint(r['prompt'] for r in test)
  (message,) = news.items(1, 1, 0.1, True)[0][0]['prompt']
  assert message['content'].startswith('Write one sentence of news')


# --- runs

TINY = (
  '--d_model 16 --d_ff 16 --num_heads 2 --num_kv_heads 1 --num_layers 1 '
  '--vocab_size 300 --max_prompt_length 32 --long_prompts cut_right '
  '--max_completion_length 72 --length_buckets 1 --held_out 8 --max_steps 2 '
  '--num_prompts 8 --num_generations 2 --warm_start_max_steps 2 '
  '--warm_start_batch_size 8 --eval_every 0 --report_to none --no_cache '
)


@pytest.mark.parametrize(
  ('module', 'words', 'numbers'),
  [
    (summarize, '--model None --lora_rank 0', ('rougeL', 'lead_1_rougeL')),
    (translate, '--num_pairs 60', ('bleu', 'chrf')),
    (sentences, '--num_requests 60', ('makes_sense', 'distinct_1')),
    (news, '--num_items 60', ('distinct_1',)),
  ],
  ids=lambda x: getattr(x, '__name__', '').rpartition('.')[2] or None,
)
def test_a_run(module, words, numbers, tmp_path):
  """All programs are of one size, so that they are compiled once."""
  words = f'{TINY} --output_dir {tmp_path / "run"} {words}'.split()
  if module is summarize:
    words += [f'--packages={name}' for name in MODULES[:3]]
  result = module.run(words)
  rows = [row for row in result.metrics if row['phase'] == 'eval']
  assert [row['step'] for row in rows] == [0, 2]
  for row in rows:
    assert 0 <= row['eval/reward'] <= 3
    assert all(row[f'eval/{name}'] >= 0 for name in numbers)
  before = [r for r in result.samples if r['split'] == 'before']
  assert len(before) == 8
  assert all(r['answer'] for r in before)
  assert (tmp_path / 'run/report.html').exists()
