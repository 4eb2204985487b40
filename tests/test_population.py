"""A run in a population is the run alone, and a population leaves its files."""

import json
import types
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from test_train import TINY, cache  # noqa: F401

from experiments.studies import population
from jaxrl_tok.run import begin

SHARED = (
  'digits d_model num_layers num_heads num_kv_heads d_ff num_prompts '
  'num_generations held_out warm_start_max_steps warm_start_check_every '
  'warm_start_learning_rate warm_start_batch_size lr_schedule'
)
GRID = '--seeds 0 3 --learning_rates 1e-3 5e-3 --max_steps 4 --eval_every 2'
GIVEN = [*(f'--{name}={TINY[name]}' for name in SHARED.split()), *GRID.split()]


@pytest.fixture(scope='module')
def grown(cache, tmp_path_factory):  # noqa: F811
  """Four runs of four steps on four devices, and where their files are."""
  out = tmp_path_factory.mktemp('population') / 'run'
  runs = population.main([*GIVEN, f'--output_dir={out}'])
  return types.SimpleNamespace(out=out, runs=runs)


def test_a_run_of_a_population_is_the_run_alone(grown):
  setup = population.prepare_population(population.parse(GIVEN))
  with jax.set_mesh(setup.mesh):
    params, _ = begin.first_params(setup)
  train = jax.jit(population.make_train(setup))
  start = jax.device_get(params), *population.tables(setup)
  for run in grown.runs[1:3]:  # the other seed, the other rate
    key = jax.random.key(run.seed)
    (order,) = population.orders(setup, [run.seed])
    accuracy, metrics = train(*start, key, np.float32(run.learning_rate), order)
    np.testing.assert_allclose(accuracy, run.accuracy, 1e-5)
    assert metrics.keys() == run.metrics.keys()
    for name, value in run.metrics.items():
      np.testing.assert_allclose(
        metrics[name][-1], value, 1e-5, 1e-5, err_msg=name
      )


def test_runs_differ_by_seed_and_by_rate(grown):
  assert [run[:2] for run in grown.runs] == [
    (seed, rate) for rate in (1e-3, 5e-3) for seed in (0, 3)
  ]
  assert len({run.accuracy[0] for run in grown.runs}) == 1
  for name in ('entropy', 'grad_norm', 'advantage_std'):
    assert len({run.metrics[name] for run in grown.runs}) == 4


def test_a_population_leaves_its_files(grown):
  assert {p.name for p in grown.out.iterdir()} == {
    'population.json',
    'population.svg',
  }
  found = json.loads((grown.out / 'population.json').read_text())
  assert found['flags']['learning_rates'] == [1e-3, 5e-3]
  assert found['flags']['digits'] == TINY['digits']
  assert [population.Run(**run) for run in found['runs']] == grown.runs
  assert all(len(run['accuracy']) == 1 + 4 // 2 for run in found['runs'])
  page = ElementTree.parse(grown.out / 'population.svg').getroot()
  paths = [p for p in page.iter() if p.tag.endswith('path')]
  assert len([p for p in paths if p.get('fill')]) == 2
  text = ' '.join(page.itertext())
  assert 'rate 0.001' in text
  assert 'mean of 2 seeds' in text


def test_the_table_is_of_last_accuracies():
  runs = [
    population.Run(seed, 0.1, [0.0, last], {})
    for seed, last in enumerate((0.5, 0.7, 0.9))
  ]
  columns = [list(c.cells) for c in population.table(runs).columns]
  assert columns == [['0.1'], ['70.0'], ['50.0'], ['90.0'], ['20.0']]


@pytest.mark.parametrize(
  ('given', 'fact'),
  [
    ('--algorithm dapo', 'needs the host between rollouts'),
    ('--max_steps 33', 'pass --max_steps 40'),
    ('--learning_rates 0.1 0', 'must be finite, above 0'),
    ('--seeds 1 1', 'must be different'),
    ('--seeds -1', 'must be in 0..4294967295'),
    ('--eval_every 0', 'pass --max_steps 300 --eval_every 300'),
    ('--learning_rate 1e-3', 'has no effect here'),
    ('--model gpt2', 'has no effect here'),
    ('--learning_rats 1', 'did you mean --learning_rates?'),
  ],
)
def test_flags_that_cannot_be_are_one_line(tmp_path, capsys, given, fact):
  with pytest.raises(SystemExit) as stopped:
    population.main([*given.split(), f'--output_dir={tmp_path / "run"}'])
  assert stopped.value.code == 2
  error = capsys.readouterr().err.strip()
  assert fact in error
  assert '\n' not in error
  assert not (tmp_path / 'run').exists()


def test_help_names_the_flags_that_have_an_effect(capsys):
  with pytest.raises(SystemExit) as stopped:
    population.main(['--help'])
  assert stopped.value.code == 0
  words = capsys.readouterr().out.split()
  assert {'--learning_rates', '--seeds', '--digits', '--top_p'} <= set(words)
  assert not {'--learning_rate', '--mesh', '--resume'} & set(words)
