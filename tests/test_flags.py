"""A bad flag is one line, the fact and the cure, before jax is imported."""

import dataclasses
import os
import subprocess
import sys

import pytest

from experiments import arithmetic
from jaxrl_tok.run import settings as flag_layer

MODULE = 'experiments.arithmetic'


def parse(*argv):
  return flag_layer.parse(arithmetic.DEFAULTS, MODULE, list(argv))


def the_line(capsys, function, *args) -> str:
  """The only line that a refusal prints."""
  with pytest.raises(SystemExit) as e:
    function(*args)
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
  line = refusal(capsys, '--quantum', '3')
  assert line == 'error: unknown flag --quantum; --help lists the flags'


def test_a_word_that_is_no_flag_is_refused(capsys):
  assert 'quantum' in refusal(capsys, 'quantum')
  assert '-q' in refusal(capsys, '-q')


@pytest.mark.parametrize('name', ['learning_rate', 'learning-rate'])
def test_dashes_and_underscores_both_work(name):
  assert parse(f'--{name}', '0.5').optimizer.learning_rate == 0.5
  assert parse(f'--{name}=0.5').optimizer.learning_rate == 0.5


def test_flags_change_only_what_they_name():
  assert parse() == arithmetic.DEFAULTS
  flags = parse('--top_k', '7', '--no-cache', '--remat', 'dots', '--seed', '3')
  changed = flag_layer.flat(flags).items() - flag_layer.flat(parse()).items()
  assert changed == {
    ('top_k', 7),
    ('cache', False),
    ('remat', 'dots'),
    ('seed', 3),
  }


def test_every_flag_has_a_name_of_its_own():
  groups = [f.type for f in dataclasses.fields(arithmetic.Flags)]
  names = [f.name for group in groups for f in dataclasses.fields(group)]
  assert len(set(names)) == len(names)
  assert set(flag_layer.flat(arithmetic.DEFAULTS)) == set(names)


# --- values


@pytest.mark.parametrize(
  ('flag', 'value', 'says'),
  [
    ('--num_prompts', '0', 'must be at least 1'),
    ('--num_generations', '0', 'must be at least 1'),
    ('--max_completion_length', '0', 'must be at least 1'),
    ('--max_prompt_length', '0', 'must be at least 1'),
    ('--max_steps', '0', 'must be at least 1'),
    ('--eval_prompts', '0', 'must be at least 1'),
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
    ('--max_grad_norm', '0.0', 'above 0'),
    ('--micro_batch', '-1', '0 or more'),
    ('--lora_rank', '-1', '0 or more'),
    ('--lora_alpha', '0.0', 'above 0'),
    ('--reward_model_weight', 'nan', 'finite'),
    ('--eval_every', '-1', '0 or more'),
    ('--save_every', '-1', '0 or more'),
    ('--patience', '-1', '0 or more'),
    ('--seed', '-1', '0 or more'),
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
  found = flag_layer.flat(parse(flag, value))
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
    ('--reward', 'magic'),
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
    'import sys, time; from experiments import flags, arithmetic\n'
    'begun = time.monotonic()\n'
    'try: flags.parse(arithmetic.DEFAULTS, "x", ["--model", "some/model"])\n'
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


def test_what_cannot_hold_an_answer_is_refused(capsys):
  def start(*argv):
    return arithmetic.load(parse(*argv))[0].sampling

  argv = ('--digits', '3', '--num_problems', '50', '--max_completion_length')
  with pytest.raises(ValueError, match=r'pass --max_completion_length 5$'):
    start(*argv, '4')
  assert start(*argv, '5').max_completion_length == 5
  assert start(*argv[:-1]).max_completion_length == 5

  def check(*argv):
    arithmetic.check(parse(*argv).task)

  for digits in ('0', '10'):
    line = the_line(capsys, check, '--digits', digits)
    assert f'--digits {digits} must be in 1..9' in line


# --- the run's directory


def claim(path, **more):
  run = flag_layer.RunFlags(output_dir=path and str(path), **more)
  return flag_layer.claim_output_dir(run, 'sums')


def test_a_new_directory_is_made_and_left_empty(tmp_path):
  path = claim(tmp_path / 'a' / 'b')
  assert path == tmp_path / 'a' / 'b'
  assert list(path.iterdir()) == []
  assert claim(path) == path  # empty: nothing to lose


def test_the_default_directory_is_named_after_experiment_and_time(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  path = claim(None)
  assert path.is_dir()
  assert path.parts[0] == 'runs'
  assert path.name.startswith('sums-2')


def test_a_run_is_not_overwritten(capsys, tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('precious')
  line = the_line(capsys, claim, tmp_path)
  assert f'--output_dir {tmp_path} is not empty' in line
  assert '--resume auto' in line
  assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']
  assert (tmp_path / 'metrics.jsonl').read_text() == 'precious'


@pytest.mark.parametrize('word', ['auto', '20'])
def test_a_resumed_run_has_its_directory_as_it_was(tmp_path, word):
  (tmp_path / 'metrics.jsonl').write_text('precious')
  assert claim(tmp_path, resume=word) == tmp_path
  assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']
  assert (tmp_path / 'metrics.jsonl').read_text() == 'precious'


def test_a_file_in_the_way_is_named(capsys, tmp_path):
  path = tmp_path / 'file'
  path.write_text('precious')
  line = the_line(capsys, claim, path)
  assert line == f'error: --output_dir {path} is a file; give a directory'
  line = the_line(capsys, claim, path / 'under')
  assert f'--output_dir {path / "under"} cannot be written: ' in line
  assert path.read_text() == 'precious'


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
  for name in flag_layer.flat(arithmetic.DEFAULTS):
    assert f'--{name}' in words
