"""The reasoning-gym experiment: its data, its reward, its refusals, a run."""

import json
import shutil

import pytest
from conftest import GOLDEN

from experiments import reasoning
from jaxrl_tok import data, rewards
from jaxrl_tok.hub.directory import open_model

pytestmark = pytest.mark.usefixtures('one_device')

pytest.importorskip('reasoning_gym', reason='an extra; [test] installs it')


def task(**fields):
  return reasoning.reasoning(**{'num_problems': 50, 'held_out': 8} | fields)


def test_config_words():
  text = 'a=1,b=true,c=word,d=[1, 2],e=0.5'
  assert reasoning.parse_config(text) == {
    'a': 1,
    'b': True,
    'c': 'word',
    'd': [1, 2],
    'e': 0.5,
  }
  assert reasoning.parse_config('') == {}
  with pytest.raises(ValueError, match="part 'a' is not name=value"):
    reasoning.parse_config('a,b=1')


@pytest.mark.parametrize('name', ['chain_sum', 'gcd', 'spell_backward'])
def test_records_hold_what_the_scorer_needs(name):
  found = task(task=name, held_out=20)
  train, held_out = found.train, found.held_out
  assert len(held_out) <= 20
  assert not {r['prompt'] for r in train} & {r['prompt'] for r in held_out}
  prompts = [r['prompt'] for r in train]
  assert len(set(prompts)) == len(prompts)
  assert found.answers == 'answer'
  columns = {k: [r[k] for r in train] for k in ('answer', 'entry')}
  reward = found.rewards
  rewards.check_functions({'reward': reward}, train[0])
  assert rewards.get_name(reward) == 'score_answer'
  right = reward(prompts=prompts, completions=columns['answer'], **columns)
  wrong = ['nonsense'] * len(prompts)
  wrong = reward(prompts=prompts, completions=wrong, **columns)
  assert right == [1.0] * len(prompts)
  assert max(wrong) < 1


@pytest.mark.parametrize(
  ('fields', 'fact'),
  [
    ({'task': 'chain_sums'}, 'did you mean chain_sum?'),
    ({'task_config': 'terms=3'}, 'no setting .terms.; it has min_terms'),
    ({'task_config': 'seed=3'}, "no setting 'seed'"),
    ({'task_config': 'min_terms=9,max_terms=3'}, 'max_terms must be'),
    ({'task_config': 'min_terms'}, 'is not name=value'),
  ],
)
def test_bad_tasks_are_refused(fields, fact):
  with pytest.raises(ValueError, match=fact):
    task(**fields)


def test_flags_that_leave_nothing_are_refused():
  tiny = 'min_terms=2,max_terms=2,min_digits=1,max_digits=1'
  with pytest.raises(ValueError, match='every problem of chain_sum'):
    task(task_config=tiny, held_out=3000)
  with pytest.raises(ValueError, match='need another seed'):
    task(held_out_seed=0)


def test_answers_that_are_no_text_need_a_model(monkeypatch):
  problems = ScoredList({'question': f'q{i}', 'answer': None} for i in range(9))
  sets = problems, ScoredList(problems[:2])
  monkeypatch.setattr(reasoning, 'make_datasets', lambda *args: sets)
  with pytest.raises(ValueError, match='pass --model a saved policy'):
    task()
  found = task(model='some/model')
  assert found.answers is None
  assert len(found.train) == 7


class ScoredList(list):
  def score_answer(self, answer, entry):
    return 0.0


def test_a_bad_task_is_one_line(capsys):
  with pytest.raises(SystemExit) as stopped:
    reasoning.run(['--task', 'nope', '--num_problems', '10'])
  assert stopped.value.code == 2
  said = capsys.readouterr().err.strip()
  assert 'no task' in said
  assert '\n' not in said


def test_runs_end_to_end(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  out = tmp_path / 'run'
  words = (
    '--num_problems=200 --d_model=16 --num_layers=1 --num_heads=2 '
    '--num_kv_heads=1 --d_ff=16 --length_buckets=1 '
    '--num_prompts=8 --num_generations=4 '
    '--held_out=16 --max_steps=2 --warm_start_max_steps=20 '
    '--report_to=none'
  )
  result = reasoning.run([*words.split(), f'--output_dir={out}'])
  assert result.summary['steps'] == '2'
  rows = [json.loads(x) for x in (out / 'metrics.jsonl').open()]
  assert any('rewards/score_answer/mean' in row for row in rows)
  assert 'chain_sum' in (out / 'export/README.md').read_text()
  assert 'task: chain_sum' in (out / 'config.yaml').read_text()


def test_messages_go_through_the_models_chat_template(tmp_path, capsys):
  model = shutil.copytree(GOLDEN / 'qwen3', tmp_path / 'chatty')
  words = f'--chat --num_problems=50 --held_out=8 --model={model}'
  with pytest.raises(SystemExit):
    reasoning.run([*words.split(), '--print_config'])
  said = capsys.readouterr().err
  assert 'no chat template' in said
  assert said.count('\n') == 1

  template = "{{ raise_exception('no users here') }}"
  (model / 'chat_template.jinja').write_text(template)
  with pytest.raises(SystemExit):
    reasoning.run([*words.split(), '--print_config'])
  said = capsys.readouterr().err
  assert 'record 0 of the data: the chat template refuses the messages' in said
  assert 'no users here' in said
  assert said.count('\n') == 1

  template = '<|{{ messages[0].role }}|>{{ messages[0].content }}<|end|>'
  (model / 'chat_template.jinja').write_text(template)
  train = task(chat=True, model=str(model)).train
  tokenizer = open_model(model).tokenizer
  ids = data.prompt_ids(tokenizer, train[0]['prompt'])
  text = tokenizer.decode(ids)
  assert text.startswith('<|user|>State the final answer')
  assert text.endswith('<|end|>')


def test_a_context_that_is_too_short_is_refused(capsys):
  words = f'--num_problems=50 --held_out=8 --model={GOLDEN / "gpt2"}'
  with pytest.raises(SystemExit):
    reasoning.run([*words.split(), '--max_completion_length=64'])
  said = capsys.readouterr().err
  assert 'more than the context of 128' in said
  assert said.count('\n') == 1


def test_help_names_the_task_flags(capsys):
  with pytest.raises(SystemExit) as stopped:
    reasoning.run(['--help'])
  assert stopped.value.code == 0
  assert '--task_config' in capsys.readouterr().out
