"""The benchmark measures the work that it names, and runs peers by their
protocol."""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import flax.traverse_util
import jax
import numpy as np
import pytest

from experiments.studies.bench import __main__ as bench
from experiments.studies.bench import (
  ceilings,
  decode,
  experiment,
  learn,
  networks,
  pictures,
  sizes,
  startup,
  timing,
)

CLASSIFIER = Path(__file__).parent / 'golden/families/llama_classifier'
MODEL = str(Path(__file__).parent / 'golden/families/llama')
TINY = sizes.Size(16, 1, 2, 1, 8, 24, 64)
PEER = """
import json, sys
job = json.loads(sys.argv[1])
print(json.dumps({'ready': {'peer': job['dtype']}}), flush=True)
for number, line in enumerate(sys.stdin):
  if job['dtype'] == 'bfloat16' and number == 2:
    sys.exit('no bfloat16 here')
  print(json.dumps({'seconds': number + job['prompts'] / 100}), flush=True)
"""


def work(**changes) -> timing.Work:
  """Work of the tiny size, with other fields."""
  found = timing.Work(
    *('tiny', TINY, 'float32', 16, 4, 20, 3, {}), show=lambda text: None
  )
  return found._replace(**changes)


@pytest.fixture
def peers(tmp_path, monkeypatch):
  """A directory of scripts, with one that counts its rounds."""
  monkeypatch.setattr(timing, 'SCRIPTS', tmp_path)
  (tmp_path / 'hf_peer.py').write_text(PEER)
  return {'hf': sys.executable}


def test_contenders_take_turns_after_one_round_each():
  order = []

  def contender(name):
    def run():
      order.append(name)
      return float(len(order))

    return run

  found = timing.in_turn({n: contender(n) for n in 'ab'}, work(rounds=2))
  assert order == ['a', 'b'] * 3
  assert found == {'a': [3.0, 5.0], 'b': [4.0, 6.0]}


def test_a_profile_is_of_a_round_that_does_not_count(tmp_path):
  times = iter(range(9))
  found = timing.in_turn(
    {'a': lambda: next(times)}, work(rounds=2, profile=str(tmp_path))
  )
  assert found == {'a': [2, 3]}
  assert list(tmp_path.rglob('*.xplane.pb'))


def test_peers_take_turns_too(peers, monkeypatch):
  monkeypatch.setattr(timing, 'PEER_DTYPES', {'hf': ('float32',)})
  seconds, versions = timing.with_peers(
    work(peers=peers), 'decode', 16, 1, {'own': lambda: 0.5}
  )
  assert seconds == {'own': [0.5] * 3, 'hf float32': [1.16, 2.16, 3.16]}
  assert versions == {'hf float32': {'peer': 'float32'}}


def test_a_peer_that_ends_says_why(peers):
  with pytest.raises(ValueError, match='hf, bfloat16 ended: no bfloat16 here'):
    timing.with_peers(work(peers=peers), 'decode', 16, 1, {})


def test_lengths_are_ragged_as_asked():
  length = decode.ragged_lengths(64, 64)
  assert length.max() == 64
  assert length.min() >= 1
  assert length.mean() / 64 == pytest.approx(0.4, abs=0.01)


def test_ragged_rows_end_where_they_must(monkeypatch):
  """The benchmark itself refuses a sampler whose rows end elsewhere."""
  monkeypatch.setattr(decode, 'COMPACT_LEVELS', 1)  # each is compiled
  rows = decode.ragged(work(rounds=1))
  assert [row.tokens for row in rows] == [
    decode.ragged_lengths(16, 20).sum()
  ] * 2
  assert len({row.who for row in rows}) == 2


def test_steps_learn_alike_on_the_host_and_in_one_program():
  """Two steps from one state: both move it, and alike."""
  one = learn.Step(work(completion_length=4), 2, 8)
  begin = jax.tree.map(np.array, one.state.params)
  again = jax.tree.map(jax.numpy.copy, one.state)  # host's is donated
  state, _ = one.compile_steps(2)(again)
  assert min(one.on_device(2)(), one.host(), one.host()) > 0
  assert set(one.parts) == {'rollout', 'score', 'update'}
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), begin, state.params)
  assert max(jax.tree.leaves(moved)) > 1e-6
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    one.state.params,
    state.params,
  )


@pytest.fixture(scope='module')
def model():
  return networks.open_decoder(MODEL)


def test_a_model_is_sampled_and_its_adapters_are_trained(model):
  """Its own weights, which stay."""
  given = work(completion_length=4, prompt_length=8, model=model)
  given = given._replace(size=networks.size_of(model))
  assert 0 < decode.contender(given, 2, 2)() < 60
  one = learn.Step(given, 2, 2)
  before = jax.tree.map(np.array, (one.state.params, one.state.frozen))
  assert min(one.host(), one.host()) > 0
  after = one.state.params, one.state.frozen
  moved = [
    max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, pair)))
    for pair in zip(before, after)
  ]
  assert moved[0] > 1e-6
  assert moved[1] == 0
  whole, none = networks.make_network(
    given.size, model, 'float32', False
  ).params
  assert none is None
  for a, b in zip(*map(jax.tree.leaves, (whole, before[1])), strict=True):
    np.testing.assert_array_equal(a, b)


def test_peers_read_the_directory_of_a_model(model, tmp_path):
  """One that is given, or one that is written and opens to equal weights."""
  with networks.directory_for_peers(model, True) as found:
    assert found == MODEL
  with networks.directory_for_peers(model, False) as found:
    assert found is None
  copied = model._replace(origin='pip:some-package')
  with networks.directory_for_peers(copied, True) as found:
    again = networks.open_decoder(found)
    weights = [
      networks.make_network(TINY, m, 'float32', False).params[0]
      for m in (model, again)
    ]
  assert not Path(found).exists()
  for a, b in zip(*map(jax.tree.leaves, weights), strict=True):
    np.testing.assert_array_equal(a, b)


def test_peers_are_told_of_the_model_and_its_adapters(tmp_path, monkeypatch):
  monkeypatch.setattr(timing, 'SCRIPTS', tmp_path)
  (tmp_path / 'trl_peer.py').write_text(
    'import json, sys\njob = json.loads(sys.argv[1])\n'
    "print(json.dumps({'ready': job}), flush=True)\n"
    "for line in sys.stdin: print(json.dumps({'seconds': 1.0}), flush=True)\n"
  )
  given = work(
    peers={'trl': sys.executable},
    directory='/m',
    peer_dtypes=('float32', 'autocast'),
  )
  adapters = {'rank': 8, 'alpha': 16.0}
  _, told = timing.with_peers(given, 'step', 2, 8, {}, adapters)
  assert set(told) == {'trl float32', 'trl autocast'}
  for job in told.values():
    assert (job['model'], job['adapters']) == ('/m', adapters)


def test_a_sampler_is_a_contender():
  sample = decode.contender(work(completion_length=2), 2, 8)
  assert 0 < sample() < 60


def test_weights_are_counted(model):
  """Matrices count: all parameters but norms, biases and the embedding where it
  is not the head."""
  for size, config in (
    (TINY, sizes.make_config(TINY)),
    (networks.size_of(model), model.config),
  ):
    policy = learn.make_policy(config)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    flat = flax.traverse_util.flatten_dict(shapes, sep='/')
    if not config.tie_embeddings:
      flat.pop('embed/embedding')
    counted = sum(
      x.size for path, x in flat.items() if not re.search('norm|bias', path)
    )
    assert sizes.num_weights(size) == counted


@pytest.fixture
def stubbed(monkeypatch):
  """Contenders of decode and step that take no time, on a slow machine."""
  slow = ceilings.Ceilings(1e9, 1e9, 1e9, 1e-6)
  monkeypatch.setattr(ceilings, 'measure', lambda *args: slow)
  times = iter(np.arange(1, 1000) / 1000)
  monkeypatch.setattr(
    decode, 'contender', lambda *args: lambda: float(next(times))
  )

  class Step:
    def __init__(self, work, C, G):
      self.parts = {'rollout': [0.1, 0.2], 'update': [0.1, 0.3]}

    def host(self):
      return float(next(times))

    def on_device(self, n):
      return self.host

  monkeypatch.setattr(learn, 'Step', Step)


def test_a_run_leaves_numbers_and_a_roofline(tmp_path, stubbed, capsys):
  out = tmp_path / 'out'
  given = '--size nano --rows 16 --completion_length 4 --rounds 2'
  bench.main(['decode', 'step', *given.split(), f'--output_dir={out}'])
  found = json.loads((out / 'bench.json').read_text())
  row, longer, step, _ = found['rows']
  assert (row['tokens'], longer['tokens'], step['tokens']) == (64, 128, 64)
  assert len(row['seconds']) == 2
  assert row['median'] == np.mean(row['seconds'])
  assert step['notes'] == {'rollout': 0.2, 'update': 0.3}
  assert found['machine']['backend'] == 'cpu'
  assert found['flags']['what'] == ['decode', 'step']
  page = ElementTree.parse(out / 'roofline.svg').getroot()
  assert 'nano' in ' '.join(page.itertext())
  shown = capsys.readouterr().out
  assert 'decode nano' in shown
  assert 'step nano' in shown


def test_results_survive_a_benchmark_that_fails(tmp_path, stubbed, monkeypatch):
  def fail(work):
    raise ValueError('no such peer')

  monkeypatch.setitem(experiment.BENCHES, 'step', fail)
  out = tmp_path / 'out'
  with pytest.raises(SystemExit) as stopped:
    bench.main(['decode', 'step', '--size', 'nano', f'--output_dir={out}'])
  assert stopped.value.code == 2
  found = json.loads((out / 'bench.json').read_text())
  assert [row['bench'] for row in found['rows']] == ['decode'] * 2


@pytest.mark.parametrize(
  ('given', 'jobs'),
  [
    ('decode', ['decode nano', 'decode small']),
    (
      'step decode step',
      ['step nano', 'step small', 'decode nano', 'decode small'],
    ),
    ('startup logp --size small', ['startup small', 'logp small']),
    ('startup', ['startup nano']),
    ('step decode --model a/b', ['step b', 'decode b']),
  ],
)
def test_benchmarks_run_once_in_the_order_given(monkeypatch, given, jobs):
  monkeypatch.setattr(bench, 'check', lambda flags: None)
  monkeypatch.setattr(experiment, 'run', experiment.jobs_of)
  assert list(map(' '.join, bench.main(given.split()))) == jobs


def test_all_runs_every_benchmark(monkeypatch):
  monkeypatch.setattr(experiment, 'run', experiment.jobs_of)
  for given in ([], ['all'], ['all', 'decode']):
    found = bench.main(given)
    assert [name for name, size in found if size == 'nano'] == list(
      experiment.BENCHES
    )


@pytest.mark.parametrize(
  ('given', 'fact'),
  [
    ('sing', 'sing'),
    ('decode sing', 'sing'),
    ('decode --rounds 0', 'must be at least 1'),
    ('decode --rows 20', 'pass --rows 32'),
    ('decode --size huge', 'huge'),
    ('decode --peer hf', 'one interpreter'),
    ('decode --peer hf --peer_python /none', 'is no file'),
    ('decode --peer hf hf --peer_python /a', 'names one twice'),
    ('decode --peer hf --profile /a', 'pass it without --peer'),
    ('decode --model /m --size nano', 'pass it or --model'),
    ('decode logp --model /m', 'not logp; name those'),
    ('all --model /m', 'decode and step'),
    ('step --model /m --cpu_devices 2', 'leave it out with --model'),
    ('step --model /m --peer tunix --peer_python /a', 'pass hf or trl'),
    ('step --peer_dtype float32', 'no effect without --peer'),
    ('step --model /none-such', '/none-such'),
    (f'step --model {CLASSIFIER}', 'not a decoder that writes'),
    ('decode --roudns 3', 'did you mean --rounds?'),
  ],
)
def test_flags_that_cannot_be_are_one_line(tmp_path, capsys, given, fact):
  with pytest.raises(SystemExit) as stopped:
    bench.main([*given.split(), f'--output_dir={tmp_path / "out"}'])
  assert stopped.value.code == 2
  error = capsys.readouterr().err.strip()
  assert fact in error
  assert '\n' not in error
  assert not (tmp_path / 'out').exists()


def test_groups_are_measured_beside_prompts_of_their_own(stubbed):
  rows = decode.group(work(rounds=2))
  assert [(row.bench, row.size, row.who) for row in rows] == [
    ('group', 'tiny G=8', 'shared by 8'),
    ('group', 'tiny G=8', 'each its own'),
    ('group', 'tiny G=16', 'shared by 16'),
    ('group', 'tiny G=16', 'each its own'),
  ]
  assert {row.tokens for row in rows} == {16 * 20}


def test_log_probs_are_measured_in_chunks_and_whole(monkeypatch):
  monkeypatch.setattr(learn, 'LOGP_VOCABULARIES', (512,))
  monkeypatch.setattr(learn, 'LOGP_LENGTH', 16)
  rows = learn.logp(work(rounds=1))
  assert [(row.bench, row.size, row.who) for row in rows] == [
    ('logp', 'tiny V=512', 'chunked'),
    ('logp', 'tiny V=512', 'whole'),
  ]
  for row in rows:
    assert 0 < row.median < 60
    assert row.notes['temporary_bytes'] > 0


def test_a_start_is_measured_until_its_first_step(tmp_path, monkeypatch):
  """A program in place of python logs a step after 0.2 s."""
  program = tmp_path / 'python'
  program.write_text(
    '#!/bin/sh\nout=${4#--output_dir=}\nmkdir -p $out\nsleep 0.2\n'
    """echo '{"phase": "train", "step": 1}' > $out/metrics.jsonl\n"""
    'sleep 0.5\n'
  )
  program.chmod(0o755)
  monkeypatch.setattr(startup.sys, 'executable', str(program))
  rows = startup.startup(work(rounds=1))
  assert [row.who for row in rows] == ['cold', 'warm']
  for row in rows:
    assert row.median > 0.2


def test_a_start_that_fails_says_why(tmp_path, monkeypatch):
  program = tmp_path / 'python'
  program.write_text('#!/bin/sh\necho no memory >&2\nexit 1\n')
  program.chmod(0o755)
  monkeypatch.setattr(startup.sys, 'executable', str(program))
  with pytest.raises(ValueError, match=r'max_steps=1.* ended: no memory'):
    startup.first_step(str(tmp_path))


def test_the_machine_is_measured():
  found = ceilings.measure(TINY, 16, 'float32', 10_000)
  assert min(found) > 0
  assert found.operation < 1e-3


@pytest.mark.parametrize('ms', [10.0, 0.1])
def test_a_dot_on_the_edge_of_a_decade_has_a_place(ms):
  """A machine that does all that it can, or more than was measured."""
  notes = {
    'flops_a_step': 1e7,
    'bytes_a_step': 1e7,
    'ms_a_step': ms,
    'share_of_ceiling': 1.0,
    **ceilings.Ceilings(1e9, 1e9, 1e9, 1e-6)._asdict(),
  }
  row = timing.Row('decode', 'nano', 'jaxrl_tok', [0.1], 64, notes)
  page = ElementTree.fromstring(pictures.roofline([row]))
  (dot,) = [x for x in page.iter() if x.tag.endswith('circle')]
  assert pictures.TOP <= float(dot.get('cy')) <= pictures.BOTTOM


def test_the_roof_is_over_every_dot():
  notes = {
    'flops_a_step': 1e8,
    'bytes_a_step': 1e7,
    'ms_a_step': 10.0,
    'share_of_ceiling': 0.2,
    **ceilings.Ceilings(1e11, 5e10, 1e10, 1e-6)._asdict(),
  }
  rows = [
    timing.Row('decode', name, 'jaxrl_tok', [0.1], 64, notes)
    for name in ('nano', 'small')
  ]
  page = ElementTree.fromstring(pictures.roofline(rows))
  dots = [x for x in page.iter() if x.tag.endswith('circle')]
  assert len(dots) == 2
  roofs = [
    float(x.get('d').rsplit(',', 1)[1].split('H')[0])
    for x in page.iter()
    if x.get('stroke-width') == '1.5'
  ]
  for dot, roof in zip(dots, roofs, strict=True):
    assert float(dot.get('cy')) > roof + 10  # down the page is less
