"""Experiments on data of the hub, imdb and gsm8k: the hub's names read from a
directory, rewards, refusals, tiny runs."""

import json
import shutil
import sys
import types

import pytest
from conftest import GOLDEN

from experiments import gsm8k, imdb
from jaxrl_tok import rewards

pytestmark = pytest.mark.usefixtures('one_device')

pytest.importorskip('datasets', reason='an extra; [test] installs it')
REVIEWS = [
  {'text': f'a film<br />of {i} bad jokes and no end', 'label': i % 2}
  for i in range(30)
]
PROBLEMS = [
  {
    'question': f'{i} + 1,000?',
    'answer': f'It is <<{i}+1000={i + 1000}>>.\n#### {i + 1000:,}',
  }
  for i in range(20)
]
TINY = (
  '--num_prompts=8 --num_generations=2 --max_steps=2 --max_completion_length=6 '
  '--mini_batches=1 --eval_every=2 --held_out=4 --report_to=none '
)


def write_hub(place, name: str, monkeypatch, **splits) -> None:
  """Writes a data set that `hub:NAME@main:SPLIT` finds, as datasets takes a
  directory for a name."""
  (place / name).mkdir(parents=True)
  for split, rows in splits.items():
    text = '\n'.join(map(json.dumps, rows))
    (place / name / f'{split}.jsonl').write_text(text)
  monkeypatch.chdir(place)
  monkeypatch.setenv('HF_DATASETS_CACHE', str(place / 'cache'))


# --- imdb


def test_an_opening_is_half_of_a_review():
  assert imdb.opening('good film.<br /><br />Not so') == 'good'
  assert imdb.opening('a b c d<br />e f') == 'a b'
  assert imdb.opening('one<br />two') == 'one\ntwo'


def test_a_classifier_reads_prompt_and_completion(monkeypatch):
  read = []

  def pipeline(task, model, top_k):
    assert (task, model, top_k) == ('text-classification', 'some/judge', None)

    def judge(texts, truncation, batch_size):
      read.extend(texts)
      return [
        [{'label': 'NEG', 'score': 0.25}, {'label': 'POS', 'score': 0.75}]
        for _ in texts
      ]

    config = types.SimpleNamespace(id2label={0: 'NEG', 1: 'POS'})
    judge.model = types.SimpleNamespace(config=config)
    return judge

  fake = types.ModuleType('transformers')
  fake.pipeline = pipeline
  monkeypatch.setitem(sys.modules, 'transformers', fake)
  monkeypatch.setitem(sys.modules, 'torch', types.ModuleType('torch'))
  reward = imdb.classifier('some/judge')
  assert reward(prompts=['a ', 'b '], completions=['c', 'd']) == [0.75, 0.75]
  assert read == ['a c', 'b d']
  assert rewards.get_name(reward) == 'positive'


def test_a_classifier_without_torch_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(ValueError, match='or pass --sentiment vader') as e:
    imdb.imdb()
  assert '\n' not in str(e.value)


def test_reviews_of_the_hub_are_learnt_from(tmp_path, monkeypatch):
  write_hub(tmp_path, 'made/imdb', monkeypatch, train=REVIEWS)
  words = (
    f'--model={GOLDEN / "gpt2"} --data=hub:made/imdb@main:train '
    f'--sentiment=vader {TINY} --max_prompt_length=8 --output_dir=run'
  )
  result = imdb.run(words.split())
  assert result.summary['steps'] == '2'
  rows = [r for r in result.metrics if r['phase'] == 'eval']
  assert {'eval/perplexity', 'eval/distinct_2'} <= rows[-1].keys()
  settings = (tmp_path / 'run/config.yaml').read_text()
  assert 'algorithm: ppo' in settings
  assert 'kl: reward' in settings


# --- gsm8k


def test_answers_stand_after_four_signs(tmp_path, monkeypatch):
  write_hub(tmp_path, 'made/gsm8k', monkeypatch, train=PROBLEMS, test=PROBLEMS)
  names = [f'hub:made/gsm8k@main:{s}' for s in ('train', 'test')]
  task = gsm8k.gsm8k(*names)
  assert task.train[3]['answer'] == '1003'
  (message,) = task.train[3]['prompt']
  assert message['content'].startswith('3 + 1,000? ')
  texts = ['so #### 1,003', '#### $1003.00', '#### 1004', '1003', '####', '']
  columns = {
    'completions': [[{'role': 'assistant', 'content': t}] for t in texts],
    'answer': ['1003'] * len(texts),
  }
  found = {
    f.__name__: f(**rewards.accepted(f).choose(columns)) for f in task.rewards
  }
  assert found == {
    'numeric': [1, 1, 0, 0, 0, 0],
    'regex': [1, 1, 1, 0, 0, 0],
  }
  assert list(task.rewards.values()) == [1.0, 0.1]
  assert rewards.get_name(gsm8k.gsm8k(*names, form=0).rewards) == 'numeric'


def test_a_problem_without_an_answer_is_named(tmp_path):
  file = tmp_path / 'problems.jsonl'
  file.write_text(json.dumps({'question': 'why?', 'answer': 'because'}))
  with pytest.raises(ValueError, match=r'problems.jsonl:1: .*no number') as e:
    gsm8k.gsm8k(str(file), str(file))
  assert '\n' not in str(e.value)


def test_problems_of_files_are_learnt_from(tmp_path):
  model = shutil.copytree(GOLDEN / 'qwen2', tmp_path / 'model')
  template = '{{ messages[0].content[:2] }}'  # few tokens for a tiny model
  (model / 'chat_template.jinja').write_text(template)
  file = tmp_path / 'problems.jsonl'
  file.write_text('\n'.join(map(json.dumps, PROBLEMS)))
  other = tmp_path / 'others.jsonl'
  rows = [row | {'question': f'9{row["question"]}'} for row in PROBLEMS[10:]]
  other.write_text('\n'.join(map(json.dumps, rows)))
  words = (
    f'--model={model} --data={file} --held_out_data={other} {TINY} '
    f'--output_dir={tmp_path / "run"}'
  )
  result = gsm8k.run(words.split())
  assert result.summary['steps'] == '2'
  row = [r for r in result.metrics if r['phase'] == 'train'][-1]
  assert {'rewards/numeric/mean', 'rewards/regex/mean', 'kl'} <= row.keys()
