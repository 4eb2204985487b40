"""experiments.evaluate: the record of training, of saved models."""

import json

import pytest
from test_train import cache, flags, rows, whole  # noqa: F401  fixtures

from experiments import arithmetic, evaluate
from jaxrl_tok import Task

pytestmark = pytest.mark.usefixtures('one_device', 'few_programs')

TASK_FILE = '''
from jaxrl_tok import Task
def short(completions, **columns):
  return [-len(c) for c in completions]
def words(letter: str = 'a', held_out: int | None = None) -> Task:
  """Words.

  Args:
    letter: A letter.
  """
  some = [{'prompt': letter * i, 'half': i < 8} for i in range(1, 17)]
  return Task(some, short, held_out=some[-4:])
task = words()
'''


@pytest.fixture(scope='module')
def pair(whole, tmp_path_factory):  # noqa: F811
  """Evaluation of a run and of a model, four samples a prompt."""
  run, out = whole[0], tmp_path_factory.mktemp('pair') / 'out'
  more = f'--samples 4 --slice sign --output_dir {out}'.split()
  records = arithmetic.problems(1, 1, 16)[1]
  signed = [r | {'sign': '+' if '+' in r['prompt'] else '-'} for r in records]

  def signs(held_out: int | None = None) -> Task:
    """Problems with their signs."""
    task = arithmetic.arithmetic(1, 64, held_out=4)
    return Task(
      task.train,
      task.rewards,
      held_out=signed,
      answers='answer',
      reward_unit='%',
    )

  arithmetic.signs = signs
  try:
    models = [str(run), str(run / 'export')]
    task = ['--task', 'arithmetic:signs']
    found = evaluate.run([*models, *more, *task])
  finally:
    del arithmetic.signs
  return out, found


def test_a_run_is_evaluated_as_while_it_trained(whole, tmp_path):  # noqa: F811
  run, out = whole[0], tmp_path / 'out'
  evaluate.run([str(run), '--output_dir', str(out)])
  found = json.loads((out / 'evaluation.json').read_text())
  (last,) = (
    row
    for row in rows(run / 'metrics.jsonl')
    if row['step'] == 6 and 'eval/reward' in row
  )
  metrics = found['models'][0]['metrics']
  reward = metrics['reward']
  assert reward['value'] == pytest.approx(last['eval/reward'])
  assert reward['low'] == pytest.approx(last['eval/reward_low'])
  assert metrics['mean_length']['value'] == last['eval/mean_length']
  assert metrics['exact']['value'] == reward['value']
  assert metrics['bleu']['low'] <= metrics['bleu']['value']
  assert found['task'] == 'experiments.arithmetic:arithmetic'
  assert found['sampling']['greedy'] is True
  assert found['models'][0]['signatures']['corpus_bleu'].startswith('nrefs:1')


def test_two_models_are_compared_on_the_same_samples(pair):
  """A run and its export are one model, sampled alike."""
  out, (judged, compared) = pair
  lines = (out / 'completions.jsonl').read_text().splitlines()
  found = [json.loads(line) for line in lines]
  assert len(found) == 2 * 16 * 4
  assert {row.pop('model') for row in found} == {0, 1}
  assert found[: 16 * 4] == found[16 * 4 :]
  assert len({row['completion'] for row in found}) > 4  # sampled
  for name, x in compared.differences.items():
    assert x.value == 0, name
  assert compared.wins[:3] == (0.5, 0.5, 0.5)
  numbers = json.loads((out / 'evaluation.json').read_text())
  assert numbers['win_rate']['p'] == 1
  assert {'pass_at_4', 'maj_at_4', 'self_bleu', 'distinct_2'} <= (
    numbers['differences'].keys()
  )
  assert set(judged[0].slices['sign']) == {'+', '-'}
  page = (out / 'evaluation.html').read_text()
  assert 'Reward by sign' in page
  assert 'pass@4' in page


def test_a_task_may_be_a_file_with_flags_of_its_own(tmp_path):
  file = tmp_path / 'words.py'
  file.write_text(TASK_FILE)
  found = evaluate.find_task(f'{file}:words')
  settings = evaluate.Flags()
  task = evaluate.make_task(found, ['--letter', 'b'], {}, settings)
  assert task.train[0]['prompt'] == 'b'
  task = evaluate.make_task(found, [], {'letter': 'c'}, settings)
  assert task.train[1]['prompt'] == 'cc'
  assert isinstance(evaluate.find_task(f'{file}:task'), Task)


def test_no_file_is_run_that_only_a_run_names():
  source = evaluate.Source('runs/x', {'task_function': '/tmp/x.py:words'})
  with pytest.raises(ValueError, match=r'pass --task /tmp/x.py:words to run'):
    evaluate.recorded_task(source)
  field = 'reward', tuple[str, ...], None
  with pytest.raises(ValueError, match=r'runs a file; pass .* --reward x.py:f'):
    evaluate.with_recorded(field, {'reward': ['x.py:f']})
  assert evaluate.with_recorded(field, {}) == field


@pytest.mark.parametrize(
  ('given', 'fact'),
  [
    ('', '0 models are given'),
    ('a b c --samples 2', '3 models are given'),
    ('MODEL', 'is a model; pass --task'),
    ('MODEL --task arithmetics', 'is no experiment; pass one of arithmetic'),
    ('MODEL --task arithmetic:sum', 'there is no function sum'),
    ('RUN --sample 2', 'did you mean --samples?'),
    ('RUN --samples 0', '--samples 0 and --batch 256 must be 1+'),
    ('RUN --samples 2 --decode greedy', 'all the same; pass --decode sample'),
    ('RUN --slice sign', '--slice sign is no column'),
    ('RUN --references text', '--references text is no column'),
    ('RUN --evaluation hard', 'is none of the task, which has held_out'),
    ('RUN --step best', 'no checkpoint of a best evaluation'),
    ('RUN --step 7', 'has no checkpoint of step 7'),
    ('RUN --learning_rate 1', '--learning_rate has no effect here'),
    ('RUN --task_flags --digit 2', 'did you mean --digits?'),
  ],
)
def test_what_cannot_be_is_one_line(whole, tmp_path, capsys, given, fact):  # noqa: F811
  run, out = whole[0], tmp_path / 'out'
  words = given.replace('RUN', str(run)).replace('MODEL', str(run / 'export'))
  argv = words.split()
  if '--task_flags' not in argv:
    argv += ['--output_dir', str(out)]
  capsys.readouterr()
  with pytest.raises(SystemExit) as stopped:
    evaluate.run(argv)
  assert stopped.value.code == 2
  said = capsys.readouterr().err.strip()
  assert fact in said
  assert '\n' not in said
  assert not (out / 'evaluation.json').exists()
