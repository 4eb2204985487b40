"""Launch scripts of tpu/, with a fake cloud: no network, no gcloud."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TPU = ROOT / 'tpu'
FAKES = Path(__file__).parent / 'fake_cloud'
SCRIPTS = sorted(TPU.glob('*.sh'))
WORDS = 'create setup push run logs status stop resume supervise delete'


class Cloud:
  """A clone in a directory with spaces, beside a fake cloud."""

  def __init__(self, tmp: Path):
    self.place = tmp / 'fake cloud'
    self.clone = tmp / "a user's clone"
    self.env = {
      'PATH': f'{self.place}/bin:{os.environ["PATH"]}',
      'HOME': str(tmp),
      'FAKE_CLOUD': str(self.place),
      'TPU_SLEEP': f'{self.place}/bin/sleep_little',
      'TPU_PROJECT': 'p',
      'TPU_ZONE': 'us-west4-a',
      'TPU_BUCKET': 'gs://b',
      'TPU_RUN': 'first',
      'TPU_POLL': '1',
    }
    for folder in ('bin', 'host_bin'):
      (self.place / folder).mkdir(parents=True)
    slow = '! [ "$1" = 1 ] || sleep 0.1'  # TPU_POLL
    self.script('sleep_little', f'echo "$1" >>"{self.place}/slept"; {slow}')
    shutil.copy(FAKES / 'gcloud', self.place / 'bin')
    for name in ('uv', 'hostname', 'trainer'):
      shutil.copy(FAKES / name, self.place / 'host_bin')
    shutil.copytree(
      TPU, self.clone / 'tpu', ignore=shutil.ignore_patterns('env', '.last')
    )
    shutil.copy(ROOT / 'pyproject.toml', self.clone)

  def script(self, name: str, text: str) -> None:
    file = self.place / 'bin' / name
    file.write_text(f'#!/bin/sh\n{text}\n')
    file.chmod(0o755)

  def start(self, *words: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
      ['tpu/tpu.sh', *words],
      cwd=self.clone,
      env=self.env | env,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, *words: str, status=0, typed='', **env: str) -> str:
    process = self.start(*words, **env)
    out, errors = process.communicate(typed, timeout=300)
    assert process.returncode == status, out + errors
    return out + errors

  def plan(self, name: str, *lines) -> None:
    (self.place / name).write_text('\n'.join(map(str, lines)) + '\n')

  def calls(self, *words: str) -> list[list[str]]:
    """Calls of gcloud that have these words."""
    file = self.place / 'calls'
    text = file.read_text() if file.exists() else ''
    found = [call.split('\x1f')[:-1] for call in text.split('\x1e')[:-1]]
    return [call for call in found if {*words} <= {*call}]

  @property
  def slept(self) -> list[int]:
    file = self.place / 'slept'
    return [*map(int, file.read_text().split())] if file.exists() else []

  def steps(self, run='first') -> list[int]:
    file = self.place / 'buckets/b' / run / 'metrics'
    return [*map(int, file.read_text().split())] if file.exists() else []

  def wait_steps(self, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(self.steps()) < count:
      assert time.monotonic() < deadline, self.steps()
      time.sleep(0.02)

  def set_up(self) -> None:
    """A TPU that is there, without the words that make it so."""
    (self.place / 'tpus').mkdir()
    self.plan('tpus/jaxrl', 'ACTIVE')
    (self.place / 'buckets/b').mkdir(parents=True)
    self.run('setup')

  def end(self) -> None:
    for file in self.place.glob('vm/*/*/jaxrl_run/*'):
      if file.name in ('watcher', 'pid'):
        with contextlib.suppress(ProcessLookupError, ValueError):
          os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path):
  found = Cloud(tmp_path)
  yield found
  found.end()


def one_line(text: str) -> str:
  lines = [x for x in text.splitlines() if x.startswith('error: ')]
  assert len(lines) == 1, text
  return lines[0]


# --- the scripts themselves ---------------------------------------------------


def test_shellcheck_finds_nothing():
  command = Path(sys.executable).with_name('shellcheck')
  fakes = sorted(FAKES.iterdir())
  done = subprocess.run(
    [command, '-x', *SCRIPTS, *fakes],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.returncode, done.stdout) == (0, '')


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda p: p.name)
def test_nothing_that_bash_3_2_has_not(path):
  """macOS has bash 3.2, whose [[ =~ ]] wants a variable where there are
  brackets, and whose empty arrays are unset."""
  text = re.sub(r'(^|\s)#.*', '', path.read_text(), flags=re.M)
  newer = (
    r'declare -[An]|local -[An]|mapfile|readarray|wait -n|\|&|&>>|coproc|'
    r'\$\{\w+(\^|,)|\$\{\w+@|=~ [^$]|\$EPOCH|\bprintf .%\('
  )
  assert not re.findall(newer, text)
  # words of an array that may be empty: ${a[@]+"${a[@]}"}
  always = 'WHERE|LAST|command|PIPESTATUS|BASH_SOURCE|left'
  arrays = re.findall(r'(?<!\+)"\$\{(\w+)\[@\]\}"', text)
  assert {a for a in arrays if not re.fullmatch(always, a)} <= {'flags', 'pids'}


def test_every_word_is_in_the_readme_and_in_help(cloud):
  readme, text = (TPU / 'README.md').read_text(), cloud.run('help')
  for word in WORDS.split():
    assert re.search(rf'^\| `{word}\b', readme, re.M), word
    assert f'tpu/tpu.sh {word}' in text
  settings = re.findall(r'TPU_\w+', (TPU / 'lib.sh').read_text())
  given = re.findall(r'^(TPU_\w+)=', (TPU / 'env.example').read_text(), re.M)
  assert {*given} <= {*settings}


def test_quoted_words_are_read_as_they_were():
  ends = ['', ' ', '\n', "'", '"', '\\', '$HOME', '~', '*', '&', '!', 'é', ';']
  words = [a + b + c for a in ends for b in ends for c in ends]
  script = (
    f'. {shlex.quote(str(TPU / "lib.sh"))}; '
    'eval "set -- $(quote "$@")"; printf "%s\\0" "$@"'
  )
  done = subprocess.run(
    ['bash', '-c', script, '_', *words], capture_output=True, check=True
  )
  assert done.stdout.decode().split('\0')[:-1] == words


# --- settings -----------------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'value', 'words'),
  [
    ('TPU_PROJECT', '', 'copy tpu/env.example to tpu/env'),
    ('TPU_NAME', 'My TPU', 'lower-case'),
    ('TPU_BUCKET', '/tmp/x', 'must begin with gs://'),
    ('TPU_CAPACITY', 'cheap', 'spot, flex-start'),
    ('TPU_TYPE', 'v9-8', 'set TPU_RUNTIME'),
    ('TPU_SLICES', '0', '1 or more'),
    ('TPU_POLL', 'often', 'whole number'),
    ('TPU_SECRETS', '/no/file', 'is no file'),
    ('TPU_DELETE_WHEN_DONE', 'other', 'exact name'),
  ],
)
def test_wrong_settings_are_refused_in_one_line(cloud, name, value, words):
  found = one_line(cloud.run('create', status=2, **{name: value}))
  assert words in found
  assert name in found
  assert not cloud.calls()


def test_wrong_words_are_refused_in_one_line(cloud):
  assert "'creat' is no word" in one_line(cloud.run('creat', status=2))
  assert 'run what?' in one_line(cloud.run('run', status=2))
  assert 'no run of jaxrl' in one_line(cloud.run('resume', status=2))
  assert not cloud.calls()


def test_environment_wins_over_the_file(cloud):
  text = 'TPU_TYPE=v6e-4\nTPU_ZONE=file\nTPU_CREATE_FLAGS=("--network=my net")'
  (cloud.clone / 'tpu/env').write_text(text)
  line = cloud.run('create', DRY_RUN='1')
  create = next(x for x in line.splitlines() if 'resources create' in x)
  words = shlex.split(create)
  assert '--zone=us-west4-a' in words
  assert '--accelerator-type=v6e-4' in words
  assert '--runtime-version=v2-alpha-tpuv6e' in words
  assert words[-1] == '--network=my net'


@pytest.mark.parametrize(
  ('capacity', 'slices', 'expected'),
  [
    ('spot', 1, ['--spot', '--node-id=jaxrl']),
    ('on-demand', 1, ['--node-id=jaxrl']),
    ('reserved', 2, ['--reserved', '--node-count=2', '--node-prefix=jaxrl']),
    (
      'flex-start',
      1,
      [
        '--provisioning-model=flex-start',
        '--max-run-duration=4h',
        '--node-id=jaxrl',
      ],
    ),
  ],
)
def test_create_asks_for_the_capacity(cloud, capacity, slices, expected):
  cloud.run('create', TPU_CAPACITY=capacity, TPU_SLICES=str(slices))
  (call,) = cloud.calls('queued-resources', 'create')
  assert (call[0] == 'alpha') == (capacity == 'flex-start')
  start = call.index('--runtime-version=v2-alpha-tpuv5-lite') + 1
  assert call[start:] == expected


# --- a cloud that fails -------------------------------------------------------


def test_failures_are_tried_again_later_each_time(cloud):
  create, look = 'queued-resources create', 'queued-resources describe'
  cloud.plan('fail', create, create, look, look)
  cloud.run('create')
  assert len(cloud.calls('create', 'jaxrl')) == 3
  waits = [s for s in cloud.slept if s != 1]
  assert waits == [2, 4, 2, 4]


def test_it_gives_up_after_five_tries(cloud):
  cloud.plan('fail', *['queued-resources describe'] * 9)
  text = cloud.run('create', status=2)
  assert text.count('UNAVAILABLE') == 1  # the last error
  assert cloud.slept == [2, 4, 8, 16]
  assert not cloud.calls('queued-resources', 'create')


def test_what_cannot_mend_is_not_tried_again(cloud):
  cloud.run('stop', status=2)  # no such TPU
  assert len(cloud.calls()) == 1
  assert cloud.slept == []


def test_create_twice_is_create_once(cloud):
  cloud.run('create')
  cloud.run('create')
  assert len(cloud.calls('queued-resources', 'create')) == 1


def test_a_suspended_request_is_made_anew(cloud):
  cloud.set_up()
  cloud.plan('tpus/jaxrl', 'SUSPENDED')
  cloud.run('create')
  assert len(cloud.calls('queued-resources', 'delete')) == 1
  assert len(cloud.calls('queued-resources', 'create')) == 1
  assert (cloud.place / 'tpus/jaxrl').read_text() == 'ACTIVE\n'


# --- a run's life -------------------------------------------------------------


def readme_commands() -> list[str]:
  """Commands of the README's first block, without their comments."""
  block = re.search(r'```\n(.*?)```', (TPU / 'README.md').read_text(), re.S)
  lines = (line.partition('#')[0].strip() for line in block[1].splitlines())
  return [line for line in lines if line]


def test_the_readme_leads_to_a_resumed_run_in_six_commands(cloud):
  commands = readme_commands()
  assert len(commands) <= 6
  assert commands[0] == 'cp tpu/env.example tpu/env'
  for name in ('TPU_PROJECT', 'TPU_BUCKET', 'TPU_ZONE', 'TPU_RUN'):
    del cloud.env[name]
  cloud.plan('hold', 7)
  for command in commands:
    subprocess.run(
      command, shell=True, cwd=cloud.clone, env=cloud.env, check=True
    )
    if command.startswith('cp'):  # and the user writes into it
      file = cloud.clone / 'tpu/env'
      text = file.read_text()
      for name, value in (('PROJECT', 'p'), ('BUCKET', 'gs://b')):
        text = re.sub(rf'(?m)^TPU_{name}=\S*', f'TPU_{name}={value}', text)
      file.write_text(re.sub('(?m)^TPU_RUN=', 'TPU_RUN=first', text))
    if ' run ' in command:
      cloud.wait_steps(7)
    if command.endswith('stop'):
      stopped = len(cloud.steps())
      (cloud.place / 'hold').unlink()
  cloud.wait_steps(20)
  assert cloud.steps() == [*range(1, 21)]  # nothing lost, nothing twice
  assert f'begins at {stopped}' in cloud.run('logs', '9')
  cloud.run('delete', 'jaxrl')
  assert not (cloud.place / 'vm/jaxrl').exists()


def test_words_reach_the_run_as_they_were_typed(cloud):
  cloud.set_up()
  cloud.plan('hold', 3)
  words = ['-m', 'my task', '--stop', "it's\n\n", '--x=$HOME "*"', '']
  cloud.run('run', *words, TPU_RUN='my first run')
  out = cloud.place / 'buckets/b/my first run'
  deadline = time.monotonic() + 300
  while not (out / 'words').exists():
    assert time.monotonic() < deadline
    time.sleep(0.02)
  given = (out / 'words').read_text().split('\0')[:-1]
  assert given == [*words, '--output_dir', 'gs://b/my first run']
  again = cloud.run('run', *words, TPU_RUN='my first run')
  assert again.count('runs already') == 2
  assert 'another run goes on' in cloud.run('run', 'x', status=2)
  cloud.run('stop')
  assert 'exit status 75' in cloud.run('logs', '5')


def test_status_tells_of_every_host(cloud):
  assert 'NONE' in cloud.run('status')
  cloud.set_up()
  assert cloud.run('status').count('idle') == 2
  cloud.plan('hold', 3)
  cloud.run('run', 'x')
  assert '@ t1v-w-1 running' in cloud.run('status')
  cloud.run('stop')
  cloud.run('stop')  # harmless
  assert cloud.run('status').count('ended 75 asked') == 2


def test_secrets_are_in_no_command(cloud):
  (cloud.clone / 'my keys').write_text('HF_TOKEN=hf_abc\n')
  cloud.env['TPU_SECRETS'] = str(cloud.clone / 'my keys')
  cloud.set_up()
  cloud.run('run', 'x', '--max_steps', '1')
  cloud.wait_steps(1)
  assert 'token hf_abc' in cloud.run('logs', '5')
  assert 'hf_abc' not in (cloud.place / 'calls').read_text()
  for home in cloud.place.glob('vm/jaxrl/*'):
    assert (home / '.jaxrl_secrets').stat().st_mode & 0o77 == 0


def test_code_is_what_git_would_add(cloud):
  (cloud.clone / '.gitignore').write_text('big\n/tpu/.last/\n')
  for name in ('big', 'gone', 'é new'):
    (cloud.clone / name).write_text('x')
  git = ['git', '-c', 'user.name=a', '-c', 'user.email=b']
  for words in (['init', '-q'], ['add', 'gone', 'tpu']):
    subprocess.run([*git, *words], cwd=cloud.clone, check=True)
  (cloud.clone / 'gone').unlink()
  cloud.set_up()
  sent = cloud.place / 'vm/jaxrl/w1/jaxrl_tok'
  assert (sent / 'é new').is_file()
  assert not (sent / 'big').exists()
  (cloud.clone / 'é new').write_text('y')
  cloud.run('push')
  assert (sent / 'é new').read_text() == 'y'


# --- supervise ----------------------------------------------------------------


def test_supervise_goes_on_when_the_cloud_takes_the_tpu(cloud):
  cloud.plan('preempt', 8)
  cloud.plan('hold', 8)  # in mid-run; then from 5
  process = cloud.start('supervise', '-m', 'x')
  cloud.wait_steps(9)
  (cloud.place / 'hold').unlink()
  out, errors = process.communicate(timeout=300)
  text = out + errors
  assert process.returncode == 0, text
  assert 'the cloud took the TPU (1 of 20' in text
  assert len(cloud.calls('queued-resources', 'create')) == 2
  steps = cloud.steps()
  assert steps == [*range(1, 9), *range(6, 21)]  # from the last checkpoint
  assert 'exit status 0 on every host' in text
  assert 'tpu/tpu.sh delete jaxrl' in text  # it still costs
  assert (cloud.place / 'tpus/jaxrl').exists()


def test_supervise_resumes_and_restarts(cloud):
  cloud.set_up()
  cloud.plan('crash', 75, 1)
  text = cloud.run('supervise', 'x', TPU_DELETE_WHEN_DONE='jaxrl')
  assert text.count('resumed') == 1
  assert 'exit status 1 (failure 1;' in text
  assert cloud.steps()[-1] == 20
  assert cloud.calls('queued-resources', 'delete')  # asked for by its name
  assert not cloud.calls('queued-resources', 'create')


def test_supervise_gives_up(cloud):
  cloud.set_up()
  cloud.plan('crash', 3, 3, 3)
  text = cloud.run('supervise', 'x', TPU_MAX_FAILURES='2', status=1)
  assert text.count('exit status 3') == 2
  assert 'given up; the TPU may still cost' in text


def test_supervise_ends_with_stop(cloud):
  cloud.set_up()
  cloud.plan('hold', 3)
  process = cloud.start('supervise', 'x')
  cloud.wait_steps(3)
  cloud.run('stop')
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 75, out
  assert 'stopped by tpu/tpu.sh stop' in out


def test_supervise_ends_hosts_that_wait_for_one_that_failed(cloud):
  cloud.set_up()
  cloud.plan('hold', 3)
  cloud.run('run', 'x')
  cloud.wait_steps(3)
  pid = int((cloud.place / 'vm/jaxrl/w0/jaxrl_run/pid').read_text())
  os.kill(pid, signal.SIGKILL)
  text = cloud.run('supervise', TPU_GRACE='2', TPU_MAX_FAILURES='1', status=1)
  assert 'exit status 137' in text
  assert cloud.run('status').count('ended 137') == 2


# --- delete, dry run ----------------------------------------------------------


def test_delete_needs_the_exact_name(cloud):
  cloud.set_up()
  for words, typed in (
    (['jaxr'], ''),
    ([''], ''),
    (['jaxrl '], ''),
    ([], '\n'),
    ([], 'y\n'),
  ):
    text = cloud.run('delete', *words, typed=typed, status=2)
    assert 'nothing is deleted' in text
  assert not cloud.calls('delete')
  cloud.plan('fail', *['queued-resources delete'] * 2)
  cloud.run('delete', typed='jaxrl\n')
  assert cloud.slept.count(2) == cloud.slept.count(4) == 1
  assert not (cloud.place / 'tpus/jaxrl').exists()


def test_dry_run_touches_nothing(cloud):
  before = sorted(cloud.clone.rglob('*'))
  lines = []
  for word in WORDS.split():
    more = {
      'run': ['-m', 'my task'],
      'resume': ['x'],
      'supervise': ['x'],
      'delete': ['jaxrl'],
    }
    found = cloud.run(word, *more.get(word, ()), DRY_RUN='1').splitlines()
    commands = [x for x in found if x.startswith('+ ')]
    assert commands, word
    lines += commands
  assert not cloud.calls()
  assert sorted(cloud.clone.rglob('*')) == before
  assert not cloud.slept
  for line in lines:  # whole shell words, ready to be pasted
    assert shlex.split(line)[1] in ('gcloud', 'git')
  remote = next(x for x in shlex.split('\n'.join(lines)) if 'my task' in x)
  assert shlex.split(remote.partition('=')[2])[:6] == [
    'bash',
    'jaxrl_tok/tpu/worker.sh',
    'start',
    '-m',
    'my task',
    '--output_dir',
  ]


# --- several processes on one machine -----------------------------------------

PROCESS = """
import os, signal, sys, time
words = sys.argv[1:]
mode, i = words[0], words[words.index('--process_id') + 1]
came = []
def note(number, frame):
  came.append(number)
  if len(came) > 1:
    os._exit(99)
signal.signal(signal.SIGTERM, note)
signal.signal(signal.SIGINT, note)
print('ready', *words[1:], os.environ['JAX_NUM_CPU_DEVICES'], flush=True)
assert os.environ['JAX_PROCESS_ID'] == i
here = os.path.dirname(sys.argv[0])
open(f'{here}/ready{i}', 'w').close()
while not os.path.exists(f'{here}/ready0'):  # it minds signals
  time.sleep(0.02)
if mode == 'dies once':
  mode = 'ends' if '--resume' in words else 'dies'
while mode != 'ends' and not (came and mode != 'stuck'):
  if i == '1' and mode in ('dies', 'stuck'):
    os.kill(os.getpid(), signal.SIGKILL)
  if i == '1' and mode == 'saves':
    came.append('by another')
  time.sleep(0.02)
if came:
  time.sleep(0.3 * (i == '0'))  # one saves longer
  print('saved without end of line', end='', flush=True)
  sys.exit(75)
"""


def start_local(tmp_path, mode, *more, **env):
  file = tmp_path / 'a process.py'
  file.write_text(PROCESS)
  settings = {'PYTHON': sys.executable, 'GRACE': '1', **env}
  return subprocess.Popen(
    [TPU / 'local_multihost.sh', 'NUM_DEVICES=3', file, mode, *more],
    env=os.environ | settings,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )


def test_processes_get_their_flags_and_prefixes(tmp_path):
  process = start_local(tmp_path, 'ends', 'a b', NUM_PROCESSES='3', PORT='77')
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 0
  assert sorted(out.splitlines()) == [
    f'[{i}] ready a b --coordinator_address localhost:77 --num_processes 3 '
    f'--process_id {i} 3'
    for i in range(3)
  ]


@pytest.mark.parametrize(
  ('mode', 'status', 'saved'), [('dies', 137, 1), ('stuck', 137, 0)]
)
def test_one_process_that_dies_ends_all(tmp_path, mode, status, saved):
  process = start_local(tmp_path, mode)
  out, _ = process.communicate(timeout=300)
  assert process.returncode == status
  assert out.count('saved') == saved


def test_all_start_again_and_resume(tmp_path):
  process = start_local(tmp_path, 'dies once', RESTARTS='2')
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 0, out
  assert out.count('all start again') == 1
  again = [x for x in out.splitlines() if 'ready' in x and 'resume auto' in x]
  assert len(again) == 2


@pytest.mark.parametrize('sent', [signal.SIGTERM, signal.SIGINT, None])
def test_all_processes_save_when_one_is_stopped(tmp_path, sent):
  """A signal comes to each process once: a second would end it unsaved."""
  process = start_local(tmp_path, 'waits' if sent else 'saves', GRACE='9')
  read = [process.stdout.readline() for _ in range(2)]
  assert all('ready' in line for line in read)
  if sent:
    time.sleep(0.1)
    process.send_signal(sent)
    process.send_signal(sent)
    out, _ = process.communicate(timeout=300)
    assert (process.returncode, out.count('saved')) == (75, 2)
    return
  pid = subprocess.run(
    ['pgrep', '-s', str(process.pid), '-f', 'process_id 0'],
    capture_output=True,
    check=True,
  ).stdout.split()[-1]
  os.kill(int(pid), signal.SIGTERM)
  out, _ = process.communicate(timeout=300)
  assert (process.returncode, out.count('saved')) == (75, 2)


# --- GKE, SLURM ---------------------------------------------------------------


def test_gke_asks_for_the_chips_of_its_topology():
  found = yaml.safe_load((TPU / 'gke.yaml').read_text())
  (slices,) = found['spec']['replicatedJobs']
  job = slices['template']['spec']
  pod = job['template']['spec']
  (container,) = pod['containers']
  sides = pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x')
  chips = 1
  for side in sides:
    chips *= int(side)
  limit = container['resources']['limits']['google.com/tpu']
  assert job['parallelism'] == job['completions']
  assert job['parallelism'] * limit == chips
  assert job['backoffLimit'] == 0  # the JobSet starts all pods again
  assert container['args'][-2:] == ['--resume', 'auto']
  output = container['args'][container['args'].index('--output_dir') + 1]
  assert output.startswith('gs://')


@pytest.mark.parametrize('status', [0, 1, 75])
def test_slurm_queues_a_saved_run_again(cloud, status):
  for name in ('srun', 'scontrol'):
    body = f'echo {name} "$@" >>"{cloud.place}/slurm"'
    code = status if name == 'srun' else 0
    cloud.script(name, f'{body}\nexit {code}')
  env = cloud.env | {'SLURM_JOB_ID': '7'}
  script = cloud.clone / 'tpu/slurm.sh'
  command = [script, '-m', 'x', '--output_dir', 'a b']
  done = subprocess.run(command, env=env, check=False)
  assert done.returncode == status
  said = (cloud.place / 'slurm').read_text().splitlines()
  assert said[0].endswith('python -m x --output_dir a b --resume auto')
  assert said[1:] == (['scontrol requeue 7'] if status == 75 else [])
  done = subprocess.run([script, '-m', 'x'], env=env, check=False)
  assert done.returncode == 2
