"""--mesh auto splits as little as fits, and never what cannot be split."""

import types

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_tok import mesh_spec, sharding, targets
from jaxrl_tok.mesh_spec import GIB, Need, choose_mesh

BILLION = 10**9


def need(devices=8, memory=16, state=1, weights=1, **more) -> Need:
  """Sizes in GiB."""
  fields = {'cache': 0, 'prompts': (devices * 4,), 'split': (8,)} | more
  return Need(devices, memory * GIB, state * GIB, weights * GIB, **fields)


@st.composite
def needs(draw):
  slices = draw(st.sampled_from([1, 2]))
  devices = slices * 2 ** draw(st.integers(0, 6))
  return Need(
    devices,
    draw(st.none() | st.sampled_from([16 * GIB, 95 * GIB])),
    draw(st.integers(1, 2**40)),
    draw(st.integers(1, 2**38)),
    draw(st.integers(0, 2**40)),
    tuple(draw(st.lists(st.sampled_from([8, 32, 48, 256]), min_size=1))),
    draw(st.sampled_from([(), (2, 96), (8, 3072), (3,)])),
    slices,
  )


@given(needs())
def test_a_mesh_splits_only_what_can_be_split(n):
  if not mesh_spec.meshes_of(n):
    with pytest.raises(ValueError, match=r'cannot share .* --num_prompts'):
      choose_mesh(n)
    return
  sizes, why = choose_mesh(n)
  assert sizes == mesh_spec.mesh_sizes(mesh_spec.format_mesh(sizes), n.devices)
  assert all(C % (sizes['data'] * sizes['fsdp']) == 0 for C in n.prompts)
  assert all(size % sizes['tensor'] == 0 for size in n.split or (1,))
  inside = sizes['fsdp'] * sizes['tensor']
  assert n.devices // n.slices % inside == 0  # data alone crosses slices
  assert '\n' not in why


@given(needs())
def test_no_smaller_split_fits(n):
  if not mesh_spec.meshes_of(n):
    return
  sizes, why = choose_mesh(n)
  if n.memory is None:
    assert sizes['fsdp'] == 1
    return

  def fits(sizes):
    state, more = mesh_spec.bytes_with(n, sizes['fsdp'], sizes['tensor'])
    return state <= 0.6 * n.memory and state + more <= 0.9 * n.memory

  less = [
    m
    for m in mesh_spec.meshes_of(n)
    if (m['tensor'], m['fsdp']) < (sizes['tensor'], sizes['fsdp'])
  ]
  assert fits(sizes) != ('more than there is' in why)
  assert not any(map(fits, less))


@pytest.mark.parametrize(
  ('given', 'chosen'),
  [
    (need(state=1), (8, 1, 1)),
    (need(state=9), (8, 1, 1)),
    (need(state=18), (4, 2, 1)),
    (need(state=70), (1, 8, 1)),
    # a rollout holds all of its weights but for tensor
    (need(state=30, weights=16), (1, 4, 2)),
    (need(state=30, weights=16, split=()), (1, 8, 1)),
    # more devices than prompts
    (need(devices=64, memory=95, prompts=(32,)), (32, 1, 2)),
    (need(devices=8, slices=2, state=30), (2, 4, 1)),
    # nothing fits inside of a slice: the fewest bytes on a device
    (need(devices=8, slices=2, state=70), (2, 1, 4)),
  ],
)
def test_chosen_meshes(given, chosen):
  assert tuple(choose_mesh(given)[0].values()) == chosen


def test_a_batch_that_no_mesh_can_share_is_refused():
  with pytest.raises(ValueError, match='pass --num_prompts 16, or fewer'):
    choose_mesh(need(devices=8, prompts=(9,), split=()))


def test_the_reason_names_what_was_weighed():
  _, why = choose_mesh(need(state=18, kind='TPU v5 lite'))
  assert 'data=4,fsdp=2,tensor=1 on 8 TPU v5 lite of 16.0 GiB' in why
  assert '18.00 GiB is 9.00 on each' in why


# --- slices ------------------------------------------------------------------


def fakes(slices: int, each: int) -> list:
  return [
    types.SimpleNamespace(
      id=i,
      slice_index=i // each,
      process_index=i // each,
      platform='cpu',
      device_kind='fake',
    )
    for i in range(slices * each)
  ]


@pytest.mark.parametrize(
  'spec', ['data=4,fsdp=2', 'data=2,fsdp=2,tensor=2', 'data=8', 'data=2,fsdp=4']
)
def test_only_data_crosses_slices(spec):
  sizes = mesh_spec.mesh_sizes(spec, 8)
  order = sharding.device_order(sizes, fakes(2, 4))
  assert order.shape == tuple(sizes.values())
  slices = np.vectorize(lambda d: d.slice_index)(order)
  assert (slices == slices[:, :1, :1]).all()
  assert len({d.id for d in order.flat}) == 8


def test_fsdp_crosses_slices_where_data_cannot():
  order = sharding.device_order(mesh_spec.mesh_sizes('fsdp=8', 8), fakes(2, 4))
  assert [d.slice_index for d in order.flat] == [0] * 4 + [1] * 4


def test_tensor_never_crosses_slices():
  devices = fakes(2, 4)
  for device in devices:
    device.platform = 'tpu'
  with pytest.raises(ValueError, match='a data that 2 divides, or --mesh auto'):
    sharding.make_mesh('tensor=8', devices)


# --- targets -----------------------------------------------------------------


def test_targets_are_read():
  found = targets.parse_target('v5p:4x4x4')
  assert (found.count, found.topology, found.is_tpu) == (64, 'v5p:4x4x4', True)
  gpu = targets.parse_target('gpu:8')
  assert (gpu.count, gpu.is_tpu) == (8, False)


@pytest.mark.parametrize(
  ('text', 'fault'),
  [
    ('v9:2x2', 'is none of v4:2x2x4'),
    ('v5e', 'is none of v4:2x2x4'),
    ('v5e:0x4', 'is none of v4:2x2x4'),
    ('v5e:2x2x2', 'has 3 dimensions, and a slice of v5e has 2'),
    ('v5p:4x4', 'pass --target v5p:4x4x4'),
  ],
)
def test_a_target_that_cannot_be_is_refused(text, fault):
  with pytest.raises(ValueError, match=fault):
    targets.parse_target(text)


@pytest.mark.parametrize(
  ('kind', 'name'),
  [
    ('TPU v5 lite', 'v5e'),
    ('TPU v5', 'v5p'),
    ('TPU v6 lite', 'v6e'),
    ('NVIDIA H100 80GB HBM3', 'gpu'),
    ('cpu', None),
  ],
)
def test_chips_by_jaxs_names(kind, name):
  assert targets.chip_of(kind) is (name and targets.CHIPS[name])


def test_the_platform_is_the_meshs():
  mesh = sharding.make_mesh('data=2', jax.devices()[:2])
  assert sharding.platform() == jax.default_backend()
  with jax.set_mesh(mesh):
    seen = jax.eval_shape(lambda: (sharding.platform(), 0)[1])
    assert (seen.shape, sharding.platform()) == ((), 'cpu')
    assert sharding.device_kind() == jax.devices()[0].device_kind
