"""Faults 2, 5, 6, 7, 8, 10, 11 and 12 of a checkpoint: one that is bad is never
restored, and a good one is found."""

import errno
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from make_format_5 import CURSOR, PROGRESS, SETTINGS, STEP, WHERE, example_state

from jaxrl_tok import checkpoint, digest
from jaxrl_tok.report import disk

OLDER = 2


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
  """Directory of a run with the checkpoints 2 and 4."""
  out = tmp_path_factory.mktemp('runs') / 'lr[1e-3]'  # Orbax looks by patterns
  with checkpoint.open_checkpoints(out, 2) as manager:
    for step in (OLDER, STEP):
      state = example_state().replace(step=jnp.int32(step))
      checkpoint.save(manager, state, CURSOR, PROGRESS, SETTINGS)
  return out


@pytest.fixture
def run(kept, tmp_path):
  """A copy of it, to be broken."""
  return Path(shutil.copytree(kept, tmp_path / 'run[0]'))


def leaves(state):
  state = state.replace(key=jax.random.key_data(state.key))
  return jax.device_get(jax.tree.leaves(state))


def is_what_was_saved(state, cursor, step=STEP) -> bool:
  want = leaves(example_state().replace(step=jnp.int32(step)))
  same = all(map(np.array_equal, leaves(state), want))
  return same and all(np.array_equal(cursor[k], CURSOR[k]) for k in CURSOR)


def restore(run, word='auto'):
  """(step, lines that were said) of --resume; all of it is what was saved."""
  said = []
  with checkpoint.open_checkpoints(run) as manager:
    like = example_state(filled=False)
    state, cursor, _ = checkpoint.restore_named(
      manager, word, like, said.append
    )
  step = int(state.step)
  assert is_what_was_saved(state, cursor, step)
  return step, said


def newest(run) -> Path:
  return run / f'checkpoints/{STEP}'


def flip(path: Path, rng) -> None:
  raw = bytearray(path.read_bytes())
  bit = int(rng.integers(8 * len(raw)))
  raw[bit // 8] ^= 1 << bit % 8
  path.write_bytes(raw)


def truncate(path: Path, rng) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path, rng) -> None:
  path.write_bytes(bytes(path.stat().st_size))


def delete(path: Path, rng) -> None:
  path.unlink()


def files_of(place: Path) -> list[str]:
  files = (p for p in place.rglob('*') if p.is_file())
  return sorted(str(p.relative_to(place)) for p in files)


def test_fault_5_one_flipped_bit_in_each_file(kept, run):
  """Restored, the state is what was saved; else the line names a leaf, or what
  cannot be read."""
  rng, like, found = np.random.default_rng(0), example_state(False), {}
  with checkpoint.open_checkpoints(run) as manager:
    for name in files_of(newest(kept)):
      flip(newest(run) / name, rng)
      try:
        state, cursor, _ = checkpoint.restore(manager, STEP, like)
        assert is_what_was_saved(state, cursor), name
      except checkpoint.BadCheckpoint as e:
        found[name] = str(e)
      shutil.copyfile(newest(kept) / name, newest(run) / name)
  for line in found.values():
    assert line.startswith(f'checkpoint {STEP} is bad: ')
    assert '\n' not in line
  assert 'meta/metadata' in found
  assert {name.split('/')[0] for name in found} == {'meta', 'state', 'cursor'}


@pytest.mark.parametrize('damage', [truncate, zero, delete])
@pytest.mark.parametrize(
  'name', ['meta/metadata', 'state/manifest.ocdbt', 'state/d/*', 'cursor/d/*']
)
def test_fault_6_files_that_are_cut_zeroed_or_gone(run, damage, name):
  (file,) = newest(run).glob(name)
  damage(file, None)
  step, said = restore(run)
  assert step == OLDER
  (line,) = said
  assert line.startswith(f'checkpoint {STEP} is bad: ')
  assert line.endswith('; it is passed over')
  assert len(line) < 200


def test_fault_6_an_empty_directory_of_the_largest_number(run):
  (run / 'checkpoints/999').mkdir()
  assert restore(run) == (
    STEP,
    ['checkpoint 999 is bad: its directory is empty; it is passed over'],
  )
  with checkpoint.open_checkpoints(run, 2) as manager:
    assert checkpoint.drop_after(manager, STEP) == [999]
    state = example_state().replace(step=jnp.int32(STEP + 1))
    checkpoint.save(manager, state, CURSOR, PROGRESS, SETTINGS)
  assert restore(run) == (STEP + 1, [])


def test_fault_2_what_a_killed_save_leaves_is_deleted(run):
  part = newest(run).with_name(f'6{checkpoint.PARTIAL}')
  shutil.copytree(newest(run), part)
  assert restore(run) == (STEP, [])
  assert checkpoint.drop_partial(run) == [part.name]
  assert checkpoint.saved_steps(run) == [OLDER, STEP]
  assert checkpoint.drop_partial(run) == []
  assert not part.exists()


def test_fault_7_every_checkpoint_is_bad(run):
  for step in (OLDER, STEP):
    (run / f'checkpoints/{step}/meta/metadata').unlink()
  with pytest.raises(checkpoint.NotResumed) as refused:
    restore(run)
  line = str(refused.value)
  assert (
    f'is bad: {STEP} (meta is missing), {OLDER} (meta is missing); ' in line
  )
  assert line.endswith('or begin again in another --output_dir')
  assert '\n' not in line


def test_a_step_that_is_named_and_bad_names_the_good_ones(run):
  (run / f'checkpoints/{STEP}/meta/metadata').unlink()
  with pytest.raises(checkpoint.NotResumed) as refused:
    restore(run, str(STEP))
  assert str(refused.value) == (
    f'checkpoint {STEP} is bad: meta is missing; good ones: {OLDER}; pass '
    '--resume auto, or one of them'
  )
  assert restore(run, str(OLDER)) == (OLDER, [])


def test_fault_8_a_full_disk_is_one_line():
  """Orbax passes on the words of the system, in errors of any kind."""
  for error in (
    OSError(errno.ENOSPC, 'No space left on device'),
    ValueError('RESOURCE_EXHAUSTED: write: No space left on device [page 3]'),
    RuntimeError('x: Disk quota exceeded'),
  ):
    with (
      pytest.raises(OSError, match=r'the disk is full: .* to runs/x;') as found,
      disk.writing('a checkpoint', 'runs/x'),
    ):
      raise error
    assert disk.is_full(found.value)
    assert '\n' not in str(found.value)
  with (
    pytest.raises(OSError, match=r'cannot be written to x \(a b\)') as found,
    disk.writing('it', 'x'),
  ):
    raise RuntimeError('a\n b')
  assert not disk.is_full(found.value)
  with pytest.raises(ValueError, match='as it was'), disk.writing('it', 'x'):
    raise ValueError('as it was')


def test_fault_10_digests_are_equal_on_any_devices():
  state = example_state()
  want = digest.to_text(digest.lanes(state))
  for n in (2, 8):
    mesh = jax.make_mesh((n,), ('data',), devices=jax.devices()[:n])

    def placed(x, mesh=mesh, n=n):
      even = x.ndim and x.shape[-1] % n == 0
      spec = [None] * (x.ndim - 1) + ['data'] if even else []
      return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    found = digest.lanes(jax.tree.map(placed, state))
    assert digest.to_text(found) == want


def test_fault_11_another_dtype_is_refused_by_name(kept):
  state = example_state(filled=False)
  norm = {'scale': jnp.ones(4, jnp.float32)}
  other = state.replace(params=state.params | {'norm': norm})
  with (
    checkpoint.open_checkpoints(kept) as manager,
    pytest.raises(
      checkpoint.NotResumed,
      match=r'norm/scale bfloat16\[4\] and this run float32\[4\]; resume with',
    ),
  ):
    checkpoint.restore_named(manager, 'auto', other)


def test_fault_12_the_format_before_digests_is_read():
  """tests/faults/format_5 was written by the version before."""
  assert restore(WHERE) == (STEP, [])
  assert (
    'digests' not in (WHERE / f'checkpoints/{STEP}/meta/metadata').read_text()
  )


def test_parameters_that_are_not_finite_are_not_saved(run):
  state = example_state()
  norm = {'scale': state.params['norm']['scale'] * jnp.nan}
  state = state.replace(step=jnp.int32(9), params=state.params | {'norm': norm})
  with (
    checkpoint.open_checkpoints(run, 1) as manager,
    pytest.raises(ValueError, match='step 9 has params/norm/scale with numb'),
  ):
    checkpoint.save(manager, state, CURSOR, PROGRESS, SETTINGS)
  assert restore(run) == (STEP, [])


def test_the_newest_and_the_best_stay(run):
  held = {'best': OLDER}
  with checkpoint.open_checkpoints(run, 1, held.values) as manager:
    for step in (STEP + 1, STEP + 2):
      state = example_state().replace(step=jnp.int32(step))
      checkpoint.save(manager, state, CURSOR, PROGRESS, SETTINGS)
  assert checkpoint.saved_steps(run) == [OLDER, STEP + 2]


# --- digests ------------------------------------------------------------------

DTYPES = 'float32', 'bfloat16', 'int32', 'int8', 'bool'


@settings(max_examples=60)
@given(st.data())
def test_a_digest_tells_of_any_change_of_one_number(draw):
  dtype = draw.draw(st.sampled_from(DTYPES))
  bits = np.random.default_rng(0).integers(0, 2, (3, 5), np.uint8)
  x = np.asarray(jnp.asarray(bits * 7, dtype))
  i = draw.draw(st.integers(0, x.size - 1))
  other = x.copy()
  raw = other.reshape(-1).view(np.uint8)
  size = x.dtype.itemsize
  if dtype == 'bool':
    raw[i] ^= 1
  else:
    bit = draw.draw(st.integers(0, 8 * size - 1))
    raw[i * size + bit // 8] ^= 1 << bit % 8
  a, b = digest.lanes({'x': x})['x'], digest.lanes({'x': other})['x']
  assert a[0] != b[0]
  assert a[1] != b[1]
  assert x.size < 2 or not np.array_equal(
    digest.lanes({'x': np.arange(6)})['x'],
    digest.lanes({'x': np.arange(6)[::-1]})['x'],
  )


@pytest.mark.parametrize('dtype', DTYPES)
def test_host_and_device_give_one_digest(dtype):
  x = np.arange(24).reshape(2, 3, 4) % 5
  x = jnp.asarray(x, dtype)
  for array in (x, x[:0], x[0, 0, 1]):
    np.testing.assert_array_equal(
      digest.lanes({'x': array})['x'],
      digest.lanes({'x': np.asarray(array)})['x'],
    )


def test_digests_know_numbers_that_are_not_finite():
  for x in (jnp.array([1, jnp.nan]), jnp.array([jnp.inf], jnp.bfloat16)):
    assert digest.lanes({'x': x})['x'][digest.FINITE] == 0
    assert digest.lanes({'x': np.asarray(x)})['x'][digest.FINITE] == 0
  assert digest.lanes({'x': np.array([2**40])})['x'][digest.FINITE] == 1
