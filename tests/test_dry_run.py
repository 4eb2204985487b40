"""A dry run counts what a program computes and moves, and writes nothing."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest
from conftest import GOLDEN, late_letters
from jax.experimental import topologies
from jax.sharding import PartitionSpec

from jaxrl_tok import Task, hlo, main, sharding, train
from jaxrl_tok.run import dry_run, flags
from jaxrl_tok.run.build import Own
from jaxrl_tok.run.dry_run import Program, Report, advice, lines, verdict
from jaxrl_tok.run.prepare import prepare
from jaxrl_tok.run.task import Caller
from jaxrl_tok.step import work
from jaxrl_tok.targets import CHIPS, GIB

RECORDS = [{'prompt': f'ab {i}'} for i in range(8)]

# --- communication -----------------------------------------------------------

TEXT = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %r = f32[] add(%a, %b)
}

%inner_body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %g2 = bf16[16,4] fusion(%x), kind=kLoop, calls=%fused2
  %cp = (bf16[8,4]{1,0:T(8,128)}, bf16[8,4]{1,0}, u32[]) REPLACED
}

%inner_cond (p: (s32[], bf16[8,4])) -> pred[] {
  %limit = s32[] constant(4)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%fused (x: bf16[8,4]) -> bf16[16,4] {
  %g1 = bf16[16,4] all-gather(%x), channel_id=7, replica_groups={{0,1},{2,3}}
}

%fused2 (x: bf16[8,4]) -> bf16[16,4] {
  %g3 = bf16[16,4] all-gather(%x), channel_id=7, replica_groups={{0,1},{2,3}}
}

%all-reduce-scatter.1 (x: f32[8]) -> f32[4] {
  %sum2 = f32[8] all-reduce(%x), channel_id=8, replica_groups={{0,1},{2,3}}
  ROOT %own = f32[4] dynamic-slice(%sum2, %at)
}

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %g = bf16[16,4] fusion(%x), kind=kLoop, calls=%fused
  %w2 = (s32[], bf16[8,4]) while(%p), condition=%inner_cond, body=%inner_body
}

%cond (p: (s32[], bf16[8,4])) -> pred[] {
  ROOT %any = pred[] custom-call(%p)
}

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %w1 = (s32[], bf16[8,4]) while(%t), condition=%cond, body=%body
  %sum = (f32[10]{0}, f32[]) all-reduce(%u, %v), replica_groups=[2,4]<=[8]
  %part = f32[5] reduce-scatter(%u), replica_groups=mesh['a'=2,'b'=4] {'b'}
  %fused3 = f32[4] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %start = (bf16[2,4], bf16[8,4]) all-gather-start(%x), replica_groups=[1,4]
}
""".replace('REPLACED', 'collective-permute-start(%x), channel_id=3')


def test_collectives_are_counted_by_the_turns_of_their_loops():
  found = hlo.collectives(TEXT, turns=[10])
  by_kind = {}
  for c in found:
    by_kind.setdefault(c.kind, []).append((c.moved, c.times))
  assert by_kind == {
    # half of 16 x 4 x 2 bytes, in the loop of 10 alone; and 3 / 4 of 64
    'all-gather': [(64, 10), (48, 1)],
    'collective-permute': [(64, 40)],
    'all-reduce': [(44 * 2 * 3 / 4, 1)],
    'reduce-scatter': [(60, 1), (16, 1)],
  }
  assert hlo.total_by_kind(found)['all-gather'] == 64 * 10 + 48
  (gather,) = [c for c in found if c.name == 'g1']
  assert gather.where == ('w1',)


def test_a_loop_that_ends_by_data_turns_once_unless_told():
  times = {c.kind: c.times for c in hlo.collectives(TEXT)}
  assert times['collective-permute'] == 4


# --- FLOPs -------------------------------------------------------------------


def counted(f, *shapes, turns=None):
  structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return work.flops(jax.jit(f).trace(*structs).jaxpr, turns)


def test_flops_of_products_and_loops():
  def loop(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

  assert counted(jnp.matmul, (3, 4), (4, 7)) == 2 * 3 * 4 * 7
  assert counted(loop, (3, 4), (4, 4)) == 5 * 2 * 3 * 4 * 4
  both = jax.grad(lambda x, w: loop(x, w).sum(), (0, 1))
  assert counted(both, (3, 4), (4, 4)) == 3 * 5 * 2 * 3 * 4 * 4
  again = jax.grad(lambda x, w: jax.checkpoint(loop)(x, w).sum(), (0, 1))
  assert counted(again, (3, 4), (4, 4)) >= 4 * 5 * 2 * 3 * 4 * 4


def test_flops_of_all_devices_of_a_shard_map():
  mesh = sharding.make_mesh('data=2,fsdp=2', jax.devices()[:4])
  with jax.set_mesh(mesh):
    own = jax.shard_map(
      jnp.matmul,
      in_specs=(PartitionSpec('data'), PartitionSpec()),
      out_specs=PartitionSpec('data'),
      axis_names={'data'},
      check_vma=False,
    )
    assert counted(own, (6, 4), (4, 7)) == 2 * 6 * 4 * 7


def test_flops_of_a_loop_that_ends_by_data_are_told():
  def f(x, w):
    return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x)

  assert counted(f, (3, 4), (4, 4)) == 2 * 3 * 4 * 4
  assert counted(f, (3, 4), (4, 4), turns=[6]) == 6 * 2 * 3 * 4 * 4


# --- the report --------------------------------------------------------------


def report(need=4 * GIB, memory=16 * GIB, fault='', **more) -> Report:
  rollout = Program('sample', '', 3.0, need // 2, 1, 1e12, ())
  update = Program('update', '2 ways', 9.0, need, 2, 5e12, (), fault)
  fields = {
    'devices': '8 x v5e',
    'count': 8,
    'mesh': {'data': 4, 'fsdp': 2, 'tensor': 1},
    'batch': {'C': 32, 'G': 8, 'P': 512, 'T': 512},
    'parameters': 600,
    'state': {'parameters': GIB, 'optimizer': 2 * GIB},
    'rollout': {'weights': GIB, 'cache': GIB, 'prompts': 0},
    'other': 0,
    'programs': (rollout, update),
    'memory': memory,
    'chip': CHIPS['v5e'],
    'stand_in': False,
  }
  return Report(**fields | more)


def test_a_step_fits_by_its_largest_program():
  fits, words = verdict(report())
  assert fits
  assert words.startswith('fits: 4 GiB of 16 GiB a device')
  fits, words = verdict(report(need=15 * GIB))
  assert not fits
  assert 'update' in words
  assert '--remat full' in words
  # a rollout's arrays lie beside the optimizer's
  r = report()
  assert dry_run.needed(r, r.programs[0]) == 4 * GIB
  assert verdict(report(memory=None))[0]


def test_what_the_compiler_refuses_does_not_fit():
  fits, words = verdict(report(fault='RESOURCE_EXHAUSTED: 20G of 16G'))
  assert not fits
  assert '20G of 16G' in words


@pytest.mark.parametrize(
  ('more', 'words'),
  [
    ({'state': {'optimizer': 12 * GIB}}, '--mesh auto'),
    (
      {
        'state': {'optimizer': 12 * GIB},
        'mesh': {'data': 1, 'fsdp': 8, 'tensor': 1},
      },
      '--lora_rank',
    ),
    ({'rollout': {'weights': 6 * GIB, 'cache': 0}}, 'more of tensor'),
    ({}, '--num_prompts 32'),
  ],
)
def test_advice_is_of_what_takes_most(more, words):
  r = report(**more)
  assert words in advice(r, r.programs[0])


def test_least_seconds_are_over_the_chips_rates():
  r = report()
  found = dry_run.least_seconds(r, r.programs[0])
  assert found['products'] == 1e12 / 197e12
  assert found['memory'] == 512 * 1.5 * GIB / 819e9
  assert 'memory' not in dry_run.least_seconds(r, r.programs[1])
  text = '\n'.join(lines(r))
  assert '197 TFLOP/s' in text
  assert 'docs.cloud.google.com' in text


# --- from the command line ---------------------------------------------------


def test_a_config_alone_is_accounted_for(tmp_path, monkeypatch, capsys):
  """Neither weights nor tokenizer nor GPUs are there, and nothing is left."""
  model = tmp_path / 'model'
  model.mkdir()
  shutil.copy(GOLDEN / 'qwen3' / 'config.json', model)
  config = json.loads((model / 'config.json').read_text())
  config |= {'vocab_size': 512, 'eos_token_id': 1}
  (model / 'config.json').write_text(json.dumps(config))
  work_dir = tmp_path / 'work'
  work_dir.mkdir()
  monkeypatch.chdir(work_dir)
  argv = (
    f'--model {model} --dry_run --target gpu:4 --mesh auto --num_prompts 4 '
    '--num_generations 2 --max_completion_length 4 --max_prompt_length 16 '
    '--no_log_kl --algorithm grpo'
  )
  main(Task(RECORDS, late_letters, held_out=2), argv.split())
  out = ' '.join(capsys.readouterr().out.split())
  for words in (
    'mesh: data=4,fsdp=1,tensor=1 on 4 gpu:4 of 80.0 GiB',
    'dry run on 4 x gpu:4',
    '4 prompts x 2 completions, 16 + 4 tokens',
    'all-reduce',
    'GPUs are absent',
    'fits: ',
  ):
    assert words in out
  assert not list(work_dir.iterdir())


class Count:
  """Environment whose episodes end by max_turns."""

  def reset(self, seed, example):
    return '0', {}

  def step(self, action):
    return '1', 0.0, False, False, {}


def test_episodes_are_accounted_for_by_their_longest_turn():
  size = {'d_model': 16, 'num_layers': 1, 'num_heads': 2, 'num_kv_heads': 1}
  batch = {'num_prompts': 4, 'num_generations': 2, 'max_completion_length': 3}
  turns = {'max_turns': 3, 'max_episode_length': 20, 'length_buckets': 2}
  how = {'dry_run': True, 'target': 'gpu:2', 'mesh': 'auto', 'log_kl': False}
  task = Task(RECORDS, None, held_out=2, environment=Count)
  settings = flags.settings_of(size | batch | turns | how)
  setup = prepare(task, settings, Own(), Caller('dry', 'pytest'), {})
  with jax.set_mesh(setup.mesh):
    report = dry_run.measure(setup)
  names = [p.name for p in report.programs]
  assert names == ['read', 'append', 'turn', 'update']
  P, (rows, token) = report.batch['P'], (4 * 2 // 2, 2 * 8 * 2)  # bfloat16
  read = report.rollout
  assert read['cache'] == rows * 3 * token
  assert read['prompts'] == rows * (P + 19 + 8) * token
  text = '\n'.join(lines(report))
  assert 'mesh data 2, fsdp 1, tensor 1' in text
  assert '4 prompts x 2 episodes of 3 turns (of 3 tokens) at most' in text
  assert 'longest turn: compiled in' in text
  assert verdict(report)[0]
  assert '--max_episode_length' in advice(report, report.programs[2])
  least = dry_run.least_seconds(report, report.programs[2])['memory']
  assert least * report.chip.bandwidth == pytest.approx(
    3 * (read['weights'] + read['cache'] / 2 + read['prompts'])
  )


def test_a_target_without_libtpu_is_one_line(monkeypatch):
  def absent(**kwargs):
    raise RuntimeError('JAX TPU support not installed')

  monkeypatch.setattr(topologies, 'get_topology_desc', absent)
  task = Task(RECORDS, late_letters, held_out=2)
  with pytest.raises(ValueError, match=r"pip install 'jaxrl_tok\[tpu\]'"):
    train(task, dry_run=True, target='v5e:2x4')


@pytest.mark.parametrize(
  ('given', 'fault'),
  [
    ({'target': 'v5e:2x4'}, 'is of a --dry_run'),
    ({'target': 'v5e:8', 'dry_run': True}, 'has 1 dimensions'),
  ],
)
def test_a_target_is_checked_early(given, fault):
  with pytest.raises(ValueError, match=fault):
    train(Task(RECORDS, late_letters), **given)
