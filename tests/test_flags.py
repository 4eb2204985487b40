"""A bad flag is one line, the fact and the cure, before jax is imported."""

import dataclasses
import os
import subprocess
import sys

import pytest

import jaxrl_tok
from jaxrl_tok import Task
from jaxrl_tok.credit.names import IMPORTANCE_MODES
from jaxrl_tok.run import flags
from jaxrl_tok.run.settings import RENAMED, Settings, flatten, with_values

MODULE = 'experiments.arithmetic'
ONE_RECORD = [{'prompt': 'a'}]


def score(completions, **columns):
  return [0.0] * len(completions)


def read(*argv, function=None, **defaults) -> flags.Parsed:
  return flags.parse(
    with_values(Settings(), defaults), function, 'x', list(argv)
  )


def parse(*argv) -> Settings:
  return read(*argv).settings


def the_line(capsys, run, /, *args, **more) -> str:
  """The only line that a refusal prints."""
  with pytest.raises(SystemExit) as e:
    run(*args, **more)
  assert e.value.code == 2
  said = capsys.readouterr()
  assert said.out == ''
  assert said.err.startswith('error: ')
  assert said.err.count('\n') == 1
  assert said.err.endswith('\n')
  return said.err.strip()


def refusal(capsys, *argv) -> str:
  return the_line(capsys, parse, *argv)


# --- spelling


@pytest.mark.parametrize(
  ('word', 'meant'),
  [
    ('--learning_rat', 'learning_rate'),
    ('--learning-rat', 'learning_rate'),
    ('--num_generation=4', 'num_generations'),
    ('--max_step', 'max_steps'),
    ('--outputdir', 'output_dir'),
    ('--run.seed', 'seed'),
  ],
)
def test_a_misspelt_flag_gets_a_suggestion(capsys, word, meant):
  line = refusal(capsys, word, '3')
  given = word.split('=')[0]
  assert line == f'error: unknown flag {given}; did you mean --{meant}?'


def test_a_flag_like_no_other_gets_help(capsys):
  line = refusal(capsys, '--zebra', '3')
  assert line == 'error: unknown flag --zebra; --help lists the flags'


def test_a_word_that_is_no_flag_is_refused(capsys):
  assert 'quantum' in refusal(capsys, 'quantum')
  assert '-q' in refusal(capsys, '-q')


@pytest.mark.parametrize('old', RENAMED)
def test_an_old_spelling_is_refused_with_the_new_one(capsys, old):
  new = RENAMED[old]
  for word in (f'--{old}', f'--{old.replace("_", "-")}'):
    want = f'error: unknown flag {word}; it is called --{new} now'
    assert refusal(capsys, word, '2') == want
    assert refusal(capsys, f'{word}=2') == want
  with pytest.raises(ValueError) as e:  # noqa: PT011
    jaxrl_tok.train(Task(ONE_RECORD, score), **{old: 2})
  assert str(e.value) == f'{old} is no setting; it is called {new} now'
  assert new in flatten(Settings())


@pytest.mark.parametrize('name', ['learning_rate', 'learning-rate'])
def test_dashes_and_underscores_both_work(name):
  assert parse(f'--{name}', '0.5').optimizer.learning_rate == 0.5
  assert parse(f'--{name}=0.5').optimizer.learning_rate == 0.5


def test_flags_change_only_what_they_name():
  assert parse() == Settings()
  found = parse('--top_k', '7', '--no-cache', '--remat', 'dots', '--seed', '3')
  changed = flatten(found).items() - flatten(parse()).items()
  assert changed == {
    ('top_k', 7),
    ('cache', False),
    ('remat', 'dots'),
    ('seed', 3),
  }


@pytest.mark.parametrize(
  ('argv', 'kl', 'beta'),
  [
    ((), 'reverse', 0.04),
    (('--kl', 'none'), 'none', 0.0),
    (('--beta=0',), 'none', 0.0),
    (('--kl=forward',), 'forward', 0.04),
    (
      ('--kl', 'none', '--beta', '0.1'),
      'none',
      0.1,
    ),  # refused by its algorithm
  ],
)
def test_either_of_its_flags_turns_off_a_kl_that_is_a_default(argv, kl, beta):
  found = flatten(read(*argv, kl='reverse', beta=0.04).settings)
  assert (found['kl'], found['beta']) == (kl, beta)


def test_every_flag_has_a_name_of_its_own():
  groups = vars(Settings()).values()
  names = [f.name for group in groups for f in dataclasses.fields(group)]
  assert len(set(names)) == len(names)
  assert set(flatten(Settings())) == set(names)


# --- values


@pytest.mark.parametrize(
  ('flag', 'value', 'says'),
  [
    ('--num_prompts', '0', 'must be at least 1'),
    ('--num_generations', '0', 'must be at least 1'),
    ('--max_completion_length', '0', 'must be at least 1'),
    ('--max_prompt_length', '0', 'must be at least 1'),
    ('--max_steps', '0', 'must be at least 1'),
    ('--held_out', '0', 'must be at least 1'),
    ('--keep', '0', 'must be at least 1'),
    ('--d_model', '0', 'must be at least 1'),
    ('--num_layers', '0', 'must be at least 1'),
    ('--num_heads', '0', 'must be at least 1'),
    ('--num_kv_heads', '0', 'must be at least 1'),
    ('--d_ff', '0', 'must be at least 1'),
    ('--warm_start_max_steps', '0', 'must be at least 1'),
    ('--warm_start_batch_size', '0', 'must be at least 1'),
    ('--warm_start_check_every', '0', 'must be at least 1'),
    ('--temperature', '0.0', 'above 0'),
    ('--temperature', 'inf', 'finite'),
    ('--temperature', 'nan', 'finite'),
    ('--top_p', '0.0', 'in (0, 1]'),
    ('--top_p', '1.1', 'in (0, 1]'),
    ('--min_p', '-0.1', 'in [0, 1]'),
    ('--min_p', '1.1', 'in [0, 1]'),
    ('--top_k', '-1', '0 or more'),
    ('--gamma', '-0.1', 'in [0, 1]'),
    ('--gamma', '1.1', 'in [0, 1]'),
    ('--beta', '-0.1', '0 or more'),
    ('--ema_decay', '1.0', 'in [0, 1)'),
    ('--ema_decay', '-0.1', 'in [0, 1)'),
    ('--learning_rate', '0.0', 'above 0'),
    ('--learning_rate', 'inf', 'finite'),
    ('--max_grad_norm', '-1.0', '0 or more'),
    ('--micro_batch', '-1', '0 or more'),
    ('--lora_rank', '-1', '0 or more'),
    ('--lora_alpha', '0.0', 'above 0'),
    ('--reward_model_weight', 'nan', 'finite'),
    ('--eval_every', '-1', '0 or more'),
    ('--save_every', '-1', '0 or more'),
    ('--patience', '-1', '0 or more'),
    ('--seed', '-1', 'in 0..4294967295'),
    ('--seed', '4294967296', 'in 0..4294967295'),
  ],
)
def test_a_value_out_of_its_range_is_refused(capsys, flag, value, says):
  line = refusal(capsys, flag, value)
  assert line.startswith(f'error: {flag} {value} must be ')
  assert says in line


@pytest.mark.parametrize(
  ('flag', 'value'),
  [
    ('--top_p', '1'),
    ('--min_p', '0'),
    ('--min_p', '1'),
    ('--top_k', '0'),
    ('--gamma', '0'),
    ('--gamma', '1'),
    ('--ema_decay', '0'),
    ('--eval_every', '0'),
    ('--save_every', '0'),
    ('--patience', '0'),
    ('--seed', '0'),
    ('--num_generations', '1'),
    ('--temperature', '1e-6'),
    ('--stop_at_reward', '-1.5'),
  ],
)
def test_the_ends_of_a_range_are_taken(flag, value):
  found = flatten(parse(flag, value))
  assert found[flag.removeprefix('--')] == float(value)


@pytest.mark.parametrize(
  ('flag', 'value'),
  [
    ('--top_p', 'half'),
    ('--max_steps', '1.5'),
    ('--learning_rate', '1e'),
    ('--algorithm', 'magic'),
    ('--baseline', 'magic'),
    ('--aggregation', 'magic'),
    ('--dtype', 'float64'),
    ('--report_to', 'magic'),
    ('--lr_schedule', 'magic'),
  ],
)
def test_a_value_of_another_kind_is_refused(capsys, flag, value):
  line = refusal(capsys, flag, value)
  assert flag in line
  assert value in line
  assert '--help' in line


def test_choices_are_listed(capsys):
  line = refusal(capsys, '--kl', 'magic', '--beta', '1')
  for choice in ('none', 'reward', 'reverse', 'forward'):
    assert choice in line


def test_a_flag_without_its_value_is_refused(capsys):
  assert '--max_steps' in refusal(capsys, '--max_steps')
  assert '--max_steps' in refusal(capsys, '--max_steps', '--seed', '1')


# --- values that do not go together


@pytest.mark.parametrize(
  ('C', 'G', 'micro', 'cure'),
  [
    (6, 4, 6, 4),  # half a group
    (6, 4, 2, 4),  # less than a group
    (6, 4, 16, 12),  # whole groups, and 24 is not divisible
    (6, 4, 48, 24),  # more than there are
  ],
)
def test_micro_batch_takes_whole_groups(capsys, C, G, micro, cure):
  batch = ('--num_prompts', str(C), '--num_generations', str(G))
  line = refusal(capsys, *batch, '--micro_batch', str(micro))
  assert f'--micro_batch {micro} must divide the {C * G} completions' in line
  assert line.endswith(f'pass --micro_batch {cure}')
  assert parse(*batch, '--micro_batch', str(cure)).model.micro_batch == cure


def test_every_micro_batch_that_fits_is_taken():
  batch = ('--num_prompts', '6', '--num_generations', '4')
  assert parse(*batch).model.micro_batch == 'auto'
  for micro in (0, 4, 8, 12, 24):
    found = parse(*batch, '--micro_batch', str(micro))
    assert found.model.micro_batch == micro


@pytest.mark.parametrize(
  'mesh',
  ['data', 'data=0', 'data=-2', 'data=x', 'model=2', 'data=2;fsdp=1', ''],
)
def test_a_mesh_that_cannot_be_read_is_refused(capsys, mesh):
  line = refusal(capsys, '--mesh', mesh)
  assert 'pass --mesh data=-1,fsdp=1,tensor=1' in line


@pytest.mark.parametrize('mesh', ['data=-1', 'fsdp=2, tensor=4', 'tensor=10'])
def test_a_mesh_that_can_be_read_is_taken(mesh):
  assert parse('--mesh', mesh).model.mesh == mesh


@pytest.mark.parametrize('word', ['yes', '-1', '1.5', 'Auto', 'auto 3'])
def test_resume_takes_three_kinds_of_word(capsys, word):
  line = refusal(capsys, f'--resume={word}', '--output_dir', 'x')
  assert f'{word!r} is none of never, auto, a step' in line


@pytest.mark.parametrize('word', ['auto', '20'])
def test_resume_needs_the_directory_of_the_run(capsys, word):
  assert '--output_dir' in refusal(capsys, '--resume', word)
  assert parse('--resume', word, '--output_dir', 'x').run.resume == word


def test_a_model_that_is_no_directory_is_refused(capsys, tmp_path):
  line = refusal(capsys, '--model', str(tmp_path / 'nowhere'))
  assert 'is no directory' in line
  parse('--model', str(tmp_path))


def test_a_hub_out_of_reach_is_one_line_before_jax(tmp_path):
  code = (
    'import sys, time; from experiments import arithmetic\n'
    'begun = time.monotonic()\n'
    'try: arithmetic.run(["--model", "some/model"])\n'
    'except SystemExit as e: assert e.code == 2\n'
    'assert "jax" not in sys.modules\n'
    'assert time.monotonic() - begun < 5'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    env={
      **os.environ,
      'HF_ENDPOINT': 'http://127.0.0.1:9',
      'HF_HOME': tmp_path,
    },
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stderr.startswith('error: some/model is not in the local cache')
  assert done.stderr.endswith('pass --model a local directory\n')
  assert done.stderr.count('\n') == 1


@pytest.mark.parametrize(
  'argv', [('--lora_rank', '4'), ('--lora_adapter', '.')]
)
def test_adapters_need_a_model(capsys, argv, tmp_path):
  assert 'pass --model' in refusal(capsys, *argv)
  parse(*argv, '--model', str(tmp_path))


def test_what_would_be_ignored_is_refused(capsys, tmp_path):
  model = '--model', str(tmp_path)
  line = refusal(capsys, *model, '--revision', 'main')
  assert 'pass --model OWNER/NAME' in line
  both = '--lora_rank', '2', '--lora_adapter', str(tmp_path)
  assert 'pass it or --lora_rank' in refusal(capsys, *model, *both)


def test_an_adapter_that_is_no_directory_is_refused(capsys, tmp_path):
  argv = '--model', str(tmp_path), '--lora_adapter', str(tmp_path / 'x')
  assert 'is no directory' in refusal(capsys, *argv)


def test_param_dtype_is_of_a_model(capsys, tmp_path):
  argv = '--param_dtype', 'bfloat16'
  assert 'pass --model' in refusal(capsys, *argv)
  parse(*argv, '--model', str(tmp_path))


def test_uploading_needs_a_token_and_a_name(capsys, monkeypatch):
  monkeypatch.delenv('HF_TOKEN', raising=False)
  assert 'set HF_TOKEN' in refusal(capsys, '--push_to_hub', 'me/policy')
  monkeypatch.setenv('HF_TOKEN', 'secret')
  line = refusal(capsys, '--push_to_hub', 'policy')
  assert 'is no OWNER/NAME' in line
  assert 'secret' not in line
  parse('--push_to_hub', 'me/policy')


# --- collectors


@pytest.mark.parametrize(
  'argv',
  [
    '--steps_per_call 2 --dynamic_sampling_rounds 2',
    '--steps_per_call 2 --replay_groups 2',
    '--steps_per_call 2 --ahead',
    '--ahead --dynamic_sampling_rounds 2',
    '--ahead --replay_groups 2',
  ],
)
def test_collectors_that_cannot_wrap_each_other_are_refused(capsys, argv):
  more = '--eval_every 2 --save_every 2 --max_steps 2'
  line = refusal(capsys, *argv.split(), *more.split())
  named = [word for word in argv.split() if word.startswith('--')]
  assert all(word in line for word in named)
  assert line.endswith('exclude each other; leave one out')


def test_a_replay_buffer_holds_what_is_drawn_from_it(capsys):
  argv = '--replay_groups', '9', '--replay_capacity', '8'
  assert refusal(capsys, *argv).endswith('pass --replay_capacity 9 or more')


def test_steps_per_call_divide_what_is_counted(capsys):
  line = refusal(capsys, '--steps_per_call', '4', '--max_steps', '10')
  assert line.endswith('pass --max_steps 12')


def test_a_rename_is_a_pair(capsys):
  assert 'is not old=new' in refusal(capsys, '--rename', 'question')
  found = parse('--rename', 'question=prompt', 'solution=answer')
  assert found.data.rename == ('question=prompt', 'solution=answer')


# --- flags of a task's own


def verses(
  count: int,
  words: tuple[str, ...] = (),
  kind: str = 'iamb',
  held_out: int | None = None,
) -> Task:
  """Verses.

  Args:
    count: Verses in
      all.
    words: Words that rhyme.
    kind: Foot of a verse.
  """
  return Task([{'prompt': f'{i}'} for i in range(count)], score)


def test_a_tasks_parameters_are_flags():
  argv = '--count 3 --words love --words dove --held_out 7 --max_steps 5'
  found = read(*argv.split(), function=verses)
  assert found.own == {
    'count': 3,
    'words': ('love', 'dove'),
    'kind': 'iamb',
    'held_out': 7,
  }
  assert found.settings.run.max_steps == 5
  assert found.settings.run.held_out == 7
  assert found.typed == {'count', 'words', 'held_out', 'max_steps'}
  assert read('--count=1', function=verses).own['words'] == ()


def test_a_tasks_flags_are_checked_as_all_are(capsys):
  line = the_line(capsys, read, '--cuont', '3', function=verses)
  assert line == 'error: unknown flag --cuont; did you mean --count?'
  line = the_line(capsys, read, '--count', 'many', function=verses)
  assert '--count' in line
  assert 'many' in line
  line = the_line(capsys, read, function=verses)
  assert '--count' in line
  assert 'required' in line.lower()


def test_help_has_a_tasks_flags_and_their_lines(capsys):
  with pytest.raises(SystemExit) as stopped:
    read('--help', function=verses)
  assert stopped.value.code == 0
  said = ' '.join(capsys.readouterr().out.replace('│', ' ').split())
  for words in ('--count INT', 'Verses in all.', 'Foot of a verse.'):
    assert words in said


def test_flags_without_names_are_refused(capsys):
  def task(*words, **more):
    return None

  line = the_line(capsys, read, function=task)
  assert line == 'error: task takes *words; name each of its flags'


@pytest.mark.parametrize(
  ('settings', 'says'),
  [
    ({'max_step': 3}, 'max_step is no setting; did you mean max_steps?'),
    ({'max_steps': '3'}, "--max_steps '3' must be int"),
    ({'max_steps': 0}, '--max_steps 0 must be at least 1'),
    ({'seed': True}, '--seed True must be int'),
    ({'learning_rate': 'x'}, "--learning_rate 'x' must be float"),
    ({'dtype': 'float64'}, "--dtype 'float64' must be one of auto, float32"),
    ({'mesh': 3}, '--mesh 3 must be text'),
    ({'lora_targets': 'q_proj'}, "'q_proj' must be a list of texts"),
    ({'policy': 'gru'}, "policy 'gru' is a word; give a value"),
    ({'loss': 'magic'}, "--loss 'magic' must be one of"),
  ],
)
def test_a_library_call_and_defaults_are_checked_alike(capsys, settings, says):
  task = Task(ONE_RECORD, score)
  with pytest.raises(ValueError) as e:  # noqa: PT011
    jaxrl_tok.train(task, **settings)
  assert says in str(e.value)
  assert '\n' not in str(e.value)
  assert says in the_line(capsys, jaxrl_tok.main, task, [], **settings)


@pytest.mark.parametrize(
  ('flag', 'value'),
  [
    ('importance_mode', 'tokens'),
    ('algorithm', 'magic'),
    ('dtype', 'float64'),
    ('learning_rate', 'fast'),
  ],
)
def test_a_choice_that_is_none_gets_the_choices_in_order(capsys, flag, value):
  """Alike on the command line and in a call."""
  line = refusal(capsys, f'--{flag}', value)
  with pytest.raises(ValueError) as e:  # noqa: PT011
    flags.settings_of({flag: value})
  assert line == f'error: {e.value}; --help lists the flags'
  if flag == 'importance_mode':
    assert f'one of {", ".join(IMPORTANCE_MODES)} or None' in line


def test_a_list_stands_for_a_tuple():
  found = flags.settings_of({'stop': ['a', 'b'], 'lora_targets': ['q_proj']})
  assert found.sampling.stop == ('a', 'b')
  assert found.model.lora_targets == ('q_proj',)
  assert with_values(Settings(), {'stop': ['a']}).sampling.stop == ('a',)
  for wrong in ({'stop': [1]}, {'top_k': [1]}):
    with pytest.raises(ValueError, match=r'\] must be|\) must be'):
      flags.settings_of(wrong)


def test_a_setting_that_a_value_replaces_is_refused(capsys):
  task, own = Task(ONE_RECORD, score), {'optimizer': object()}
  line = the_line(capsys, jaxrl_tok.main, task, ['--learning_rate', '1'], **own)
  assert line == (
    'error: --learning_rate has no effect: optimizer is a value of your own; '
    'leave it out'
  )
  with pytest.raises(ValueError, match='--d_model has no effect: policy is'):
    jaxrl_tok.train(task, policy=object(), d_model=8)
  argv = ['--loss', 'clip']
  line = the_line(capsys, jaxrl_tok.main, task, argv, loss=lambda *args: None)
  assert '--loss has no effect' in line


# --- from outside


def test_a_bad_flag_is_answered_without_jax():
  code = f"""
import runpy, sys
sys.argv = ['arithmetic', '--temperature', '-1']
try:
  runpy.run_module('{MODULE}', run_name='__main__')
except SystemExit as e:
  slow = {{'jax', 'flax', 'transformers', 'numpy'}} & set(sys.modules)
  print(e.code, sorted(slow))
"""
  found = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, timeout=60
  )
  assert found.stderr == 'error: --temperature -1.0 must be above 0\n'
  assert found.stdout == '2 []\n'


def test_importing_the_package_imports_nothing():
  code = (
    'import sys, jaxrl_tok\n'
    'from jaxrl_tok import Evaluation, Interrupted, Task, main, train\n'
    'print({"jax", "numpy", "transformers"} & set(sys.modules))\n'
    'assert {"Result", "Policy", "algorithms"} <= set(dir(jaxrl_tok))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False
  )
  assert (done.stdout, done.stderr) == ('set()\n', '')
  with pytest.raises(AttributeError, match="no attribute 'quantum'"):
    _ = jaxrl_tok.quantum


def test_help_names_every_flag():
  found = subprocess.run(
    [sys.executable, '-m', MODULE, '--help'],
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert found.returncode == 0
  assert found.stderr == ''
  assert f'python -m {MODULE}' in found.stdout
  words = set(found.stdout.replace(',', ' ').split())
  for name in ('digits', 'data', *flatten(Settings())):
    assert f'--{name}' in words


@pytest.mark.parametrize(
  ('values', 'rate'),
  [
    ({}, 1e-3),
    ({'model': 'some/model'}, 1e-5),
    ({'model': 'some/model', 'lora_rank': 4}, 1e-4),
    ({'model': 'some/model', 'learning_rate': 0.5}, 0.5),
  ],
)
def test_the_default_learning_rate_is_of_the_kind_of_policy(values, rate):
  from jaxrl_tok.run.optimizer import peak_learning_rate
  from jaxrl_tok.run.settings import Settings, with_values

  assert peak_learning_rate(with_values(Settings(), values)) == rate
