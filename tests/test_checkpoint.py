"""Checkpoints come back bitwise; those that cannot be resumed are refused."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import CONFIG, changed

from jaxrl_tok import checkpoint, finite, sharding
from jaxrl_tok.credit import advantages, algorithms
from jaxrl_tok.models.transformer import make_policy
from jaxrl_tok.run.launch import drop_spoilt
from jaxrl_tok.step.state import init_state
from jaxrl_tok.train import NotFinite

ALGORITHM = algorithms.reinforce(advantages.ema(), kl='reverse', beta=0.1)
CURSOR = {
  'position': np.int64(77),
  'inner': {'count': np.int64(3), 'held': np.arange(6, dtype=np.float32)},
  'places': np.arange(2**40, 2**40 + 3),
  'valid': np.array([True, False]),
}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
POLICY = make_policy(changed(CONFIG, layers=CONFIG.layers[:1]))


def born(spec, optimizer=OPTIMIZER, policy=POLICY):
  mesh = sharding.make_mesh(spec)

  def make(key):
    state = init_state(ALGORITHM, optimizer, policy.init(key), key)
    return state.replace(step=jnp.int32(4))

  rules = policy.partition_rules
  return sharding.born_sharded(make, mesh, rules, jax.random.key(2))[0]


@pytest.fixture
def state():
  return born('data=2,fsdp=2,tensor=2')


def plain(state):
  state = state.replace(key=jax.random.key_data(state.key))
  return jax.device_get(jax.tree.leaves(state))


@pytest.mark.parametrize('spec', ['data=2,fsdp=2,tensor=2', 'data=8'])
def test_comes_back_bitwise_on_any_mesh(tmp_path, state, spec):
  progress = {'step': 4, 'num_tokens': 77, 'eval_reward': 0.1, 'best': None}
  with checkpoint.open_checkpoints(tmp_path, 2) as manager:
    checkpoint.save(manager, state, CURSOR, progress, {'seed': 3})
    manager.wait_until_finished()
    like = jax.tree.map(lambda x: x, born(spec))
    found, cursor, meta = checkpoint.restore(manager, 4, like)
  assert meta['progress'] == progress
  assert meta['settings'] == {'seed': 3}
  assert meta['format'] == checkpoint.FORMAT == 6
  assert jax.tree.structure(cursor) == jax.tree.structure(CURSOR)
  for a, b in zip(jax.tree.leaves(cursor), jax.tree.leaves(CURSOR)):
    np.testing.assert_array_equal(a, b)
    assert np.asarray(a).dtype == b.dtype
  assert found.carries.keys() == {'ema_baseline', 'kl_coef', 'reference'}
  for a, b in zip(plain(found), plain(state), strict=True):
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(like)):
    assert a.sharding == b.sharding
  np.testing.assert_array_equal(
    jax.random.uniform(found.key), jax.random.uniform(state.key)
  )


def test_keeps_the_newest_and_finds_them(tmp_path, state):
  with checkpoint.open_checkpoints(tmp_path, 2) as manager:
    assert checkpoint.restore_named(manager, 'auto', state) is None
    with pytest.raises(ValueError, match=r'no checkpoint of step 3 .*none'):
      checkpoint.restore_named(manager, '3', state)
    for step in (1, 2, 3):
      checkpoint.save(
        manager, state.replace(step=jnp.int32(step)), CURSOR, {}, {}
      )
    manager.wait_until_finished()
    assert sorted(manager.all_steps()) == [2, 3]
    for word, step in (('auto', 3), ('2', 2)):
      found, _, _ = checkpoint.restore_named(manager, word, state)
      assert int(found.step) == step
    with pytest.raises(ValueError, match='there are: 2, 3'):
      checkpoint.restore_named(manager, '1', state)
    with pytest.raises(FileExistsError, match='was not saved'):
      checkpoint.save(manager, state.replace(step=jnp.int32(2)), CURSOR, {}, {})


def test_another_optimizer_or_model_is_refused(tmp_path, state):
  wider = make_policy(changed(CONFIG, layers=CONFIG.layers[:1], d_ff=24))
  with checkpoint.open_checkpoints(tmp_path, 1) as manager:
    checkpoint.save(manager, state, CURSOR, {}, {})
    manager.wait_until_finished()
    with pytest.raises(ValueError, match=r'opt_state.*resume with the flags'):
      checkpoint.restore(manager, 4, born('data=8', optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r'mlp/down float32\[1, 20, 16\]'):
      checkpoint.restore(manager, 4, born('data=8', policy=wider))


def test_another_format_is_refused(tmp_path, state, monkeypatch):
  with checkpoint.open_checkpoints(tmp_path, 1) as manager:
    monkeypatch.setattr(checkpoint, 'FORMAT', 3)
    checkpoint.save(manager, state, CURSOR, {}, {})
    monkeypatch.undo()
    manager.wait_until_finished()
    with pytest.raises(ValueError, match=r'has format 3 and .* reads 4 to 6'):
      checkpoint.restore(manager, 4, state)


def test_frozen_parameters_are_not_written(tmp_path, state):
  """Frozen parameters are read again from the model's files."""
  frozen = {'base': jnp.ones(3)}
  with checkpoint.open_checkpoints(tmp_path, 1) as manager:
    checkpoint.save(manager, state.replace(frozen=frozen), CURSOR, {}, {})
    manager.wait_until_finished()
    like = state.replace(frozen=frozen)
    found, _, meta = checkpoint.restore(manager, 4, like)
  assert found.frozen is None
  assert not any('frozen' in name for name in meta['leaves'])


def test_checkpoints_from_before_a_run_stay(tmp_path, state):
  """Where updates find the policy's log-probs not finite, a run deletes what it
  saved of that policy; the flags may be at fault for an older checkpoint."""
  with checkpoint.open_checkpoints(tmp_path, 3) as manager:
    for step in (1, 2, 3):
      now = state.replace(step=jnp.int32(step))
      checkpoint.save(manager, now, CURSOR, {}, {})
  error = NotFinite('not finite', 1, finite.SAMPLED)
  assert drop_spoilt(tmp_path, 3, ValueError('another'), [2]) == []
  assert drop_spoilt(tmp_path, 3, error, [2]) == [3]
  assert checkpoint.saved_steps(tmp_path) == [1, 2]
  assert drop_spoilt(tmp_path, 3, error) == [1, 2]


def layered(node):
  """A dict of stacks in the names of format 4, by hand."""
  found = {}
  for name, x in flax.traverse_util.flatten_dict(node, sep='/').items():
    if name.startswith('layers/'):
      for i, row in enumerate(x):
        found[name.replace('layers/', f'layer_{i}/')] = row
    elif '.*.' in name:
      for i, row in enumerate(x):
        found[name.replace('.*.', f'.{i}.')] = row
    else:
      found[name] = x
  return flax.traverse_util.unflatten_dict(found, sep='/')


@pytest.mark.parametrize('kind', ['full', 'adapters'])
def test_a_checkpoint_without_stacks_is_read(tmp_path, kind, monkeypatch):
  """Parameters, moments, reference and critic of 12 layers come back: the
  tenth comes after the second."""
  params = {
    'full': {
      'embed': {'embedding': jnp.ones((11, 16))},
      'layers': {
        'mlp': {'down': jnp.ones((12, 20, 16))},
        'mlp_norm': {'scale': jnp.ones((12, 16))},
      },
    },
    'adapters': {
      'model.layers.*.self_attn.q_proj': {
        'a': jnp.ones((12, 2, 3)),
        'b': jnp.ones((12, 4, 2)),
      }
    },
  }[kind]
  policy = POLICY._replace(init=lambda key: jax.tree.map(jnp.copy, params))
  state = jax.tree.map(
    lambda x: (
      x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)
      if jnp.issubdtype(x.dtype, jnp.floating)
      else x
    ),
    born('data=8', policy=policy),
  )
  old = jax.tree.map(
    lambda x: layered(x) if isinstance(x, dict) else x,
    state,
    is_leaf=lambda x: (
      isinstance(x, dict) and any(k == 'layers' or '.*.' in k for k in x)
    ),
  )
  with checkpoint.open_checkpoints(tmp_path, 1) as manager:
    monkeypatch.setattr(checkpoint, 'FORMAT', 4)
    checkpoint.save(manager, old, CURSOR, {}, {})
    monkeypatch.undo()
    manager.wait_until_finished()
    assert len(jax.tree.leaves(old)) > 3 * len(jax.tree.leaves(state))
    found, _, _ = checkpoint.restore(manager, 4, state)
  for a, b in zip(plain(found), plain(state), strict=True):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state)):
    assert a.sharding == b.sharding
