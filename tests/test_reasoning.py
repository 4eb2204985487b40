"""The reasoning-gym experiment: its data, its reward, its refusals, a run."""

import dataclasses
import json
import shutil

import pytest
from conftest import GOLDEN

from experiments import reasoning
from jaxrl_tok import data
from jaxrl_tok.hub import directory as hf
from jaxrl_tok.run import settings as flag_layer

pytest.importorskip('reasoning_gym', reason='an extra; [test] installs it')


def task(**fields):
  return dataclasses.replace(reasoning.TaskFlags(), num_problems=50, **fields)


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
  train_set, held_out_set = reasoning.make_datasets(task(task=name), 20)
  held_out = reasoning.to_records(held_out_set)
  train = reasoning.to_records(train_set, {r['prompt'] for r in held_out})
  assert not {r['prompt'] for r in train} & {r['prompt'] for r in held_out}
  prompts = [r['prompt'] for r in train]
  assert len(set(prompts)) == len(prompts)
  reward = reasoning.make_reward(train_set)
  columns = {k: [r[k] for r in train] for k in ('answer', 'entry')}
  right = reward(prompts, columns['answer'], **columns)
  wrong = reward(prompts, ['nonsense'] * len(prompts), **columns)
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
    reasoning.make_datasets(task(**fields), 5)


def test_flags_that_leave_nothing_are_refused():
  run = dataclasses.replace(reasoning.DEFAULTS.run, eval_prompts=3000)
  tiny = 'min_terms=2,max_terms=2,min_digits=1,max_digits=1'
  flags = dataclasses.replace(
    reasoning.DEFAULTS, task=task(task_config=tiny), run=run
  )
  with pytest.raises(ValueError, match='every problem of chain_sum'):
    reasoning.prepare(flags)
  same = dataclasses.replace(reasoning.DEFAULTS, task=task(held_out_seed=0))
  with pytest.raises(ValueError, match='need another seed'):
    reasoning.prepare(same)


def test_a_bad_task_is_one_line(capsys):
  with pytest.raises(SystemExit) as stopped:
    reasoning.main(['--task', 'nope', '--num_problems', '10'])
  assert stopped.value.code == 2
  said = capsys.readouterr().err.strip()
  assert 'no task' in said
  assert '\n' not in said


def test_runs_end_to_end(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  out = tmp_path / 'run'
  words = (
    '--num_problems=200 --d_model=16 --num_layers=1 --num_heads=2 '
    '--num_kv_heads=1 --d_ff=16 --num_prompts=8 --num_generations=4 '
    '--eval_prompts=16 --max_steps=2 --warm_start_max_steps=20 '
    '--report_to=none'
  )
  summary = reasoning.main([*words.split(), f'--output_dir={out}'])
  assert summary['steps'] == '2'
  rows = [json.loads(x) for x in (out / 'metrics.jsonl').open()]
  assert any('rewards/score_answer/mean' in row for row in rows)
  assert 'chain_sum' in (out / 'export/README.md').read_text()
  assert 'task: chain_sum' in (out / 'config.yaml').read_text()


def test_messages_go_through_the_models_chat_template(tmp_path, capsys):
  model = shutil.copytree(GOLDEN / 'qwen3', tmp_path / 'chatty')
  words = f'--chat --num_problems=50 --eval_prompts=8 --model={model}'
  with pytest.raises(SystemExit):
    reasoning.main([*words.split(), '--print_config'])
  said = capsys.readouterr().err
  assert 'no chat template' in said
  assert said.count('\n') == 1

  template = "{{ raise_exception('no users here') }}"
  (model / 'chat_template.jinja').write_text(template)
  with pytest.raises(SystemExit):
    reasoning.main([*words.split(), '--print_config'])
  said = capsys.readouterr().err
  assert 'training prompt 0: the chat template refuses the messages' in said
  assert 'no users here' in said
  assert said.count('\n') == 1

  template = '<|{{ messages[0].role }}|>{{ messages[0].content }}<|end|>'
  (model / 'chat_template.jinja').write_text(template)
  flags = flag_layer.parse(reasoning.DEFAULTS, 'x', words.split())
  _, _, train, _ = reasoning.prepare(flags)
  tokenizer = hf.open_model(model).tokenizer
  ids = data.prompt_ids(tokenizer, train[0]['prompt'])
  text = tokenizer.decode(ids)
  assert text.startswith('<|user|>State the final answer')
  assert text.endswith('<|end|>')


def test_a_context_that_is_too_short_is_refused(capsys):
  words = f'--num_problems=50 --eval_prompts=8 --model={GOLDEN / "gpt2"}'
  with pytest.raises(SystemExit):
    reasoning.main([*words.split(), '--max_completion_length=64'])
  said = capsys.readouterr().err
  assert 'more than the context of 128' in said
  assert said.count('\n') == 1


def test_help_names_the_task_flags(capsys):
  with pytest.raises(SystemExit) as stopped:
    flag_layer.parse(reasoning.DEFAULTS, 'x', ['--help'], 'about')
  assert stopped.value.code == 0
  assert '--task_config' in capsys.readouterr().out
