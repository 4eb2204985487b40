"""Optimizer of TrainState.trained, as optax transformations.

One optimizer step, in float32 whatever the dtype of the parameters:

1. gradients are clipped to a global norm;
2. one of DIRECTIONS (Adam, Muon, Adafactor, SGD) makes a direction of them;
3. weight decay is added where `decay_mask` says so (AdamW: decoupled);
4. `scale_by_clock` multiplies by the learning rate of its own count of steps;
5. `in_float32` rounds what is stored in bfloat16 up or down at random, so that
   changes below its last bit arrive in expectation.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_tok.sharding import is_stacked, path_name

# --- learning rate -----------------------------------------------------------

# {name: (peak, optimizer steps, share of the peak at the end) -> schedule}
SCHEDULES = {
  'constant': lambda peak, steps, end: optax.constant_schedule(peak),
  'linear': lambda peak, steps, end: optax.linear_schedule(
    peak, end * peak, steps
  ),
  'cosine': lambda peak, steps, end: optax.cosine_decay_schedule(
    peak, steps, end
  ),
}


def make_schedule(
  name: str, peak, steps: int, warmup: int = 0, end: float = 0.1
) -> Callable:
  """Returns rate(count), the learning rate by optimizer steps made before.

    peak (count + 1) / warmup      count < warmup: the first step learns, too
    decay(count - warmup)          from the peak to end * peak after `steps`

  Args:
    name: of SCHEDULES.
    peak: float, may be traced.
    steps: optimizer steps of the run, the warm-up's included.
    end: share of the peak that is reached after the last step.
  """
  decay = SCHEDULES[name](peak, max(steps - warmup, 1), end)

  def rate(count):
    rise = peak * ((count + 1) / max(warmup, 1))
    found = jnp.where(count < warmup, rise, decay(count - warmup))
    return found.astype(jnp.float32)

  return rate


class Clock(NamedTuple):
  """Optimizer steps made, and the learning rate of the next one."""

  count: jax.Array  # int32 []
  learning_rate: jax.Array  # float32 []


def scale_by_clock(schedule: Callable) -> optax.GradientTransformation:
  """Multiplies updates by minus the learning rate in its state, a Clock: the
  rate that is read from a state is the one that its next step uses."""

  def at(count) -> Clock:
    return Clock(count, jnp.asarray(schedule(count), jnp.float32))

  def update(updates, clock: Clock, params=None):
    scaled = jax.tree.map(lambda x: -clock.learning_rate * x, updates)
    return scaled, at(optax.safe_increment(clock.count))

  return optax.GradientTransformation(lambda params: at(jnp.int32(0)), update)


def rate_metrics(opt_state, learns=True) -> dict:
  """Metric 'learning_rate' of the policy's next optimizer step; none where the
  state has no Clock, as that of a user's own optimizer.

  learns: bool []; False while the policy waits for its critic, at a rate of 0.
  """
  leaves = jax.tree_util.tree_leaves_with_path(
    opt_state, is_leaf=lambda x: isinstance(x, Clock)
  )
  clocks = [
    (path_name(path), leaf) for path, leaf in leaves if isinstance(leaf, Clock)
  ]
  policy = [clock for path, clock in clocks if '/critic/' not in path]
  if not policy:
    return {}
  return {'learning_rate': jnp.where(learns, policy[0].learning_rate, 0.0)}


def after_steps(optimizer, steps: int) -> optax.GradientTransformation:
  """Holds an optimizer, its clock and its moments until training step `steps`;
  its update takes the training step as the argument `step`."""

  def begun(calls, *, step, **more):
    return step >= steps

  return optax.conditionally_mask(optimizer, begun, forward_extra_args=True)


# --- parameters by their paths -----------------------------------------------

# Hugging Face's rule (transformers.Trainer.get_decay_parameter_names)
NOT_DECAYED = r'bias|layernorm|rmsnorm|(^|[/._])norm([/._]|$)'
# reduction axes and output axes of matrices that hold several, or that have
# more than two axes; the other axes count matrices, as those of layers do
MATRICES = (
  (r'attention/qkv$', (0,), (3,)),  # [D, K, M + 2, H]: of each head
  (r'attention/out$', (0, 1, 2), (3,)),  # [K, M, H, D]
  (r'attention/q$', (0,), (2,)),  # [D, N, H], across: of each head
  (r'attention/kv$', (0,), (3,)),  # [D, N, 2, H]
  (r'mlp/gate_up$', (0,), (2,)),  # [D, 2, F]: gate and up
  (r'experts/gate_up$', (1,), (3,)),  # [E, D, 2, F]: of each expert
  (r'experts/down$', (1,), (2,)),  # [E, F, D]
)
# tables of rows and heads, which no hidden state is multiplied by whole
NOT_HIDDEN = r'embed|(^|[/._])positions?([/._]|$)|(^|[/._])(\w*_)?head([/.]|$)'


def decay_mask(params):
  """Marks the leaves that weight decay shrinks: not biases, not the scales of
  norms, and nothing with fewer than two axes."""

  def one(path, x):
    name = path_name(path).lower()
    return x.ndim > 1 and not re.search(NOT_DECAYED, name)

  return jax.tree_util.tree_map_with_path(one, params)


def matrix_axes(path: str, ndim: int):
  """Axes of the hidden matrices in a leaf, or None where Adam changes it.

  A matrix of two axes is taken as it is, [in, out] or [out, in]; leaves with
  more axes that MATRICES does not name are Adam's. Stacks of layers
  (models/stack.py) have one axis more, in front.
  """
  name, layers = path.lower(), int(is_stacked(path))
  if re.search(NOT_DECAYED, name) or re.search(NOT_HIDDEN, name):
    return None
  ndim -= layers
  for pattern, *axes in MATRICES:
    if re.search(pattern, name) and ndim == max(axes[1]) + 1:
      shifted = (tuple(a + layers for a in side) for side in axes)
      return optax.contrib.MuonDimensionNumbers(*shifted)
  if ndim != 2:
    return None
  return optax.contrib.MuonDimensionNumbers(layers, 1 + layers)


# --- directions --------------------------------------------------------------


# coefficients of five equal iterations; a list of them is a loop of one body,
# which compiles once a matrix, not five times
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


def adam(b2: float) -> optax.GradientTransformation:
  """m / (sqrt(v) + 1e-8) with bias corrections, b1 = 0.9. arXiv:1412.6980"""
  return optax.scale_by_adam(b2=b2)


def muon(b2: float) -> optax.GradientTransformation:
  """Orthogonal directions for hidden matrices, Adam's for all else.

  Momentum (0.95, Nesterov's) of a matrix is replaced by its nearest orthogonal
  one, five Newton-Schulz iterations, times 0.2 sqrt(max(in, out)): the root
  mean square of Adam's, so that one learning rate fits both. arXiv:2502.16982
  """

  def axes(updates):
    return jax.tree_util.tree_map_with_path(
      lambda path, x: matrix_axes(path_name(path), x.ndim), updates
    )

  def labels(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, x: (
        'muon' if matrix_axes(path_name(path), x.ndim) else 'adam'
      ),
      params,
    )

  def scale(updates, params=None):
    def one(path, x):
      dims = matrix_axes(path_name(path), x.ndim)
      sides = dims.reduction_axis, dims.output_axis
      sides = [(axes,) if isinstance(axes, int) else axes for axes in sides]
      sizes = [math.prod(x.shape[a] for a in axes) for axes in sides]
      return 0.2 * math.sqrt(max(sizes)) * x

    return jax.tree_util.tree_map_with_path(one, updates)

  matrices = optax.chain(
    optax.contrib.scale_by_muon(NEWTON_SCHULZ, weight_dimension_numbers=axes),
    optax.stateless(scale),
  )
  return optax.partition({'muon': matrices, 'adam': adam(b2)}, labels)


def adafactor(b2: None = None) -> optax.GradientTransformation:
  """g / sqrt(factored mean of g^2), each parameter's root mean square at most
  1, in each layer; no scale by the parameters. arXiv:1804.04235"""
  clip = optax.clip_by_block_rms(1.0)

  def one(path, x):
    clipped = lambda x: clip.update(x, clip.init(x))[0]  # noqa: E731
    return (jax.vmap(clipped) if is_stacked(path_name(path)) else clipped)(x)

  return optax.chain(
    optax.scale_by_factored_rms(),
    optax.stateless(
      lambda updates, params: jax.tree_util.tree_map_with_path(one, updates)
    ),
  )


def sgd(b2: None = None) -> optax.GradientTransformation:
  """The gradient itself."""
  return optax.identity()


# {name: function of Adam's b2}
DIRECTIONS = {'adamw': adam, 'muon': muon, 'adafactor': adafactor, 'sgd': sgd}


# --- dtypes ------------------------------------------------------------------

# leaves of optimizer states that moment_dtype is the dtype of
MOMENTS = r'(^|/)(mu|nu)/'


def random_bits(words: jax.Array, shape: tuple) -> jax.Array:
  """Draws 16 bits, uint32 [shape], by two rounds of MurmurHash3's finalizer of
  each place's index and two key words, uint32 [2].

  A hash of the place fuses with the step, where jax.random's rounds cost ten
  times as much to run and to compile; on a mesh each device makes its own part.
  """
  strides = np.cumprod([1, *shape[:0:-1]], dtype=np.uint32)[::-1]
  index = jnp.zeros(shape, jnp.uint32)
  for axis, stride in enumerate(strides[: len(shape)]):
    index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
  x = index
  for word in words:
    x ^= word
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    x ^= x >> 16
  return x >> 16


def round_stochastically(x: jax.Array, words: jax.Array) -> jax.Array:
  """Rounds float32 to bfloat16, up or down at random: E[rounded] = x.

  The upper neighbour in magnitude is taken with the chance (x - lower) / (upper
  - lower), to 16 bits. Not finite values stay as they are. words: key, uint32
  [2].
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  kept = (bits + random_bits(words, x.shape)) & np.uint32(0xFFFF0000)
  rounded = jax.lax.bitcast_convert_type(kept, jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def round_like(tree, stored, key: jax.Array):
  """Rounds leaves of a float32 tree whose leaf in `stored` is bfloat16, by key
  words of its own each; others stay."""
  leaves, structure = jax.tree.flatten(tree)
  words = jax.random.bits(key, (len(leaves), 2), jnp.uint32)
  rounded = [
    round_stochastically(x, word) if like.dtype == jnp.bfloat16 else x
    for x, like, word in zip(leaves, jax.tree.leaves(stored), words)
  ]
  return jax.tree.unflatten(structure, rounded)


def to_float32(tree):
  """Converts bfloat16 leaves to float32, exactly; others stay."""
  return jax.tree.map(
    lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree
  )


class Float32State(NamedTuple):
  """State of in_float32."""

  count: jax.Array  # int32 [] steps made: their keys of rounding
  inner: Any  # moments in moment_dtype


def check_dtypes(params) -> None:
  """Raises ValueError for a parameter in float16."""
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    if x.dtype == jnp.float16:
      raise ValueError(
        f'{path_name(path)} is float16, which holds no gradient below 6e-8; '
        'store what is trained in bfloat16 or float32'
      )


def in_float32(
  optimizer: optax.GradientTransformation,
  seed: int = 0,
  moment_dtype: str = 'float32',
) -> optax.GradientTransformationExtraArgs:
  """Runs an optimizer in float32 and rounds stochastically what is stored in
  bfloat16: parameters, and moments with moment_dtype 'bfloat16'.

  Updates of bfloat16 parameters are float32, and optax.apply_updates gives
  exactly the rounded sum. The noise is a function of seed, steps made, leaf and
  place in it: a resumed run or another mesh draws equal numbers.
  """
  optimizer = optax.with_extra_args_support(optimizer)

  def init(params) -> Float32State:
    check_dtypes(params)

    def stored(path, x):
      moment = re.search(MOMENTS, path_name(path))
      return x.astype(moment_dtype) if moment else x

    inner = optimizer.init(to_float32(params))
    inner = jax.tree_util.tree_map_with_path(stored, inner)
    return Float32State(jnp.int32(0), inner)

  def update(grads, state: Float32State, params, **more):
    key = jax.random.key(seed, impl='threefry2x32')
    key = jax.random.fold_in(key, state.count)
    of_params, of_moments = jax.random.split(key)
    wide = to_float32(params)
    changes, inner = optimizer.update(
      to_float32(grads), to_float32(state.inner), wide, **more
    )
    moved = jax.tree.map(jnp.add, wide, changes)
    moved = to_float32(round_like(moved, params, of_params))
    changes = jax.tree.map(
      lambda change, new, old, stored: (
        new - old if stored.dtype == jnp.bfloat16 else change
      ),
      *(changes, moved, wide, params),
    )
    inner = round_like(inner, state.inner, of_moments)
    return changes, Float32State(optax.safe_increment(state.count), inner)

  return optax.GradientTransformationExtraArgs(init, update)
